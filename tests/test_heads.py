"""Trained heads: their parts worked by hand, perfect predictions, what learns, ranks, refusals."""
import argparse
import io
import math
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import data
import eval as evaluation
import lcl
import mug
import timix
from conftest import painted_sample, refused, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CFG = SimpleNamespace(precision="fp32")


class TinyEncoder(nn.Module):
    """A model that can do nothing but show its encoder: 16 pixels, 2 x 2 patches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision = common.ViT(image_size=16, patch=8, dim=16, depth=2, heads=2)

    def held_out_view(self, image):
        return data.center_crop(image, 16)


def random_images(n):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)


def arguments(**changes):
    """What the command line gives a head, for a short training on data of one's own."""
    fields = {"data": ["given"], "epochs": 0.2, "batch": 16, "lr": 1e-3, "seed": 0}
    return argparse.Namespace(**{**fields, **changes})


@pytest.fixture(scope="module")
def few(toy_data, tmp_path_factory):
    """Folder with the toy training shards beside fewer held-out samples."""
    folder = tmp_path_factory.mktemp("few")
    for part, n in (("pairs", 40), ("labels", 64)):
        shutil.copytree(f"{toy_data}/{part}", folder / part)
        data.write_toy_shard(folder / part / "test-00000.tar", f"{part}/test", range(n))
    return str(folder)


def held_out(folder, part="pairs"):
    return data.expand(f"{folder}/{part}", "test")


def values_of(rows):
    return {metric: value for metric, value, _ in rows}


# ---- training ----

def test_rates_fall_from_layer_to_layer_as_maes_and_every_parameter_is_in_one_group():
    vision = common.ViT(image_size=32, patch=16, dim=16, depth=12, heads=2)
    head = evaluation.Classifier(vision, 5)
    groups = evaluation.layerwise_groups(head, evaluation.Recipe())
    group_of = {id(p): group for group in groups for p in group["params"]}
    parameters = dict(head.named_parameters())
    assert len(parameters) == len(group_of) == sum(len(group["params"]) for group in groups)
    power = {"vision.cls_token": 13, "vision.patch_embed.proj.weight": 13,
             "vision.blocks.0.mlp.fc1.weight": 12, "vision.blocks.11.attn.qkv.bias": 1,
             "vision.norm.weight": 0, "head.weight": 0}
    for name, n in power.items():
        assert group_of[id(parameters[name])]["lr_scale"] == pytest.approx(0.65**n), name
    no_decay = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "cls_token", "pos_embed")
    for name, p in parameters.items():
        wd = 0.0 if name.endswith(no_decay) else 0.05
        assert group_of[id(p)]["weight_decay"] == wd, name


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_encoder_stays_another_learns_and_the_model_is_not_touched(
        frozen, few, monkeypatch):
    def return_head(head, *rest):
        return head

    monkeypatch.setattr(evaluation, "evaluate_segmenter", return_head)
    model = TinyEncoder()
    model.vision.pos_embed.requires_grad_(False)  # MUG's are fixed; fine-tuning moves them
    before = {name: x.clone() for name, x in model.state_dict().items()}
    head = evaluation.segment(model, None, held_out(few), CFG, CPU, arguments(frozen=frozen))
    assert not head.training
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
        assert torch.equal(head.state_dict()[name], before[name]) == frozen, name


def test_a_batch_is_at_most_an_eighth_and_the_same_on_2_4_and_8_ranks(monkeypatch):
    for n_ranks in (1, 2, 4, 8):
        monkeypatch.setattr(evaluation, "world_size", partial(int, n_ranks))
        assert evaluation.batch_size(64, 230) == 24  # 28 is an eighth


# ---- classes ----

def test_a_new_classifier_knows_nothing_and_pools_patches_before_its_own_norm():
    vision = TinyEncoder().vision
    head = evaluation.Classifier(vision, 7)
    images = random_images(4)
    loss = head.loss({"images": images, "label": torch.arange(4)})
    assert loss.item() == pytest.approx(math.log(7), abs=1e-3)
    x = vision.blocks_until(images, 2)[:, 1:].mean(1)
    expected = F.layer_norm(x, (16,), eps=1e-6) @ head.head.weight.T
    torch.testing.assert_close(head(images), expected)
    loss.backward()
    assert vision.norm.weight.grad is None  # the encoder's last norm is not used


def test_an_attentive_probe_weighs_the_patches_by_one_query():
    vision = common.ViT(image_size=16, patch=8, dim=128, depth=1, heads=2)
    probe = evaluation.AttentiveProbe(vision, 4)
    images = random_images(3)
    x = F.layer_norm(vision.patch_tokens(images), (128,))
    pooled = []
    for head in (slice(0, 64), slice(64, 128)):  # LCL's width
        query = probe.q(probe.query)[head]
        weight = (probe.k(x)[..., head] @ query / 8).softmax(1)  # (B, N)
        pooled.append((weight[..., None] * probe.v(x)[..., head]).sum(1))
    pooled = F.layer_norm(probe.out(torch.cat(pooled, 1)), (128,))
    torch.testing.assert_close(probe(images), probe.head(pooled), rtol=1e-4, atol=1e-5)


# ---- masks ----

def test_only_labelled_pixels_count_in_the_loss():
    head = evaluation.Segmenter(TinyEncoder().vision, 4)
    images = random_images(2)
    mask = torch.zeros(2, 16, 16, dtype=torch.int32)
    mask[0, 3, 5] = 2
    mask[0, 9, 9] = 3
    log_p = F.interpolate(head(images), (16, 16), mode="bilinear").log_softmax(1)
    expected = -(log_p[0, 2, 3, 5] + log_p[0, 3, 9, 9]) / 2
    loss = head.loss({"images": images, "mask": mask})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert head.loss({"images": images, "mask": 0 * mask}).item() == 0


def test_a_mask_is_predicted_at_its_own_size_and_never_as_unlabeled():
    logits = torch.tensor([[[9.0, 9], [9, 9]], [[1, 0], [1, 0]], [[0, 1], [0, 1]]])
    assert evaluation.predict_mask(logits, (4, 8)).tolist() == [[1, 1, 1, 1, 2, 2, 2, 2]] * 4


def with_mask(sample, mask):
    raw = io.BytesIO()
    Image.fromarray(mask).save(raw, "PNG")
    return data.Sample("key", {**sample.members, "seg.png": raw.getvalue()})


def test_255_is_no_class_and_a_class_without_a_name_is_refused():
    mask = np.array([[1, 2], [255, 0]], np.uint8)
    sample = with_mask(painted_sample([], size=(2, 2)), mask)
    example = partial(evaluation.mask_example, sample, np.random.default_rng(0), 16, 1.0)
    assert set(np.unique(example(classes=3)["mask"])) <= {0, 1, 2}
    assert "class 2 in the mask of key, but only 2 names" in refused(example, 2)
    assert evaluation.count_mask_classes([sample], [sample], ["nix/test-0.tar"]) == 3  # no names


# ---- boxes ----

def test_patches_are_assigned_by_hand():
    # a grid of 6 patches of 8 pixels, with centers at 4, 12, .., 44. The large box takes those
    # within 12 pixels of its middle, the small one its only center, the tiny one the patch of its
    # middle, for whose center it is widened
    boxes = np.array([(0, 0, 48, 48), (9, 1, 15, 7), (41, 41, 43, 43)], float)
    label, box = evaluation.assign_boxes(boxes, [4, 5, 6], 6, 8)
    expected = np.full((6, 6), -1)
    expected[1:5, 1:5] = 4
    expected[0, 1] = 5
    expected[5, 5] = 6
    assert np.array_equal(label.reshape(6, 6), expected)
    assert box[[1, 7, 35]].tolist() == [[9, 1, 15, 7], [0, 0, 48, 48], [41, 41, 45, 45]]
    assert (evaluation.assign_boxes(np.zeros((0, 4)), [], 3, 8)[0] == -1).all()


class FixedDetector(evaluation.Detector):
    """A Detector of one patch of 8 pixels, or of more, whose outputs are given."""

    def __init__(self, logits, boxes, centerness, grid=1):
        nn.Module.__init__(self)
        self.outputs = (logits, boxes, centerness)
        self.classes = logits.shape[2]
        self.vision = SimpleNamespace(grid=grid, patch=8, image_size=8 * grid)

    def forward(self, images):
        return self.outputs


def test_the_detectors_loss_of_one_patch_by_hand():
    # center (4, 4), box 2 .. 8: distances 2, 2, 4, 4, so a center-ness of sqrt(2/4 * 2/4) = 1/2
    batch = {"images": None, "label": torch.tensor([[0]]), "box": torch.tensor([[[2.0, 2, 8, 8]]])}
    logits = torch.zeros(1, 1, 2)
    centerness = torch.ones(1, 1)
    focal = (0.25 + 0.75) * 0.25 * math.log(2)  # the right class and the other
    center = math.log(1 + math.e) - 0.5  # cross-entropy of a logit of 1 with 1/2
    right = FixedDetector(logits, torch.tensor([[[2.0, 2, 8, 8]]]), centerness)
    assert right.loss(batch).item() == pytest.approx(focal + center, rel=1e-5)
    # intersection 9, union 63, hull 81: a generalized IoU of 9 / 63 - 18 / 81
    moved = FixedDetector(logits, torch.tensor([[[5.0, 5, 11, 11]]]), centerness)
    giou = 9 / 63 - 18 / 81
    assert moved.loss(batch).item() == pytest.approx(focal + 1 - giou + center, rel=1e-5)
    nothing = {**batch, "label": torch.tensor([[-1]])}
    expected = 2 * 0.75 * 0.25 * math.log(2)
    assert right.loss(nothing).item() == pytest.approx(expected, rel=1e-5)


def test_boxes_and_masks_follow_the_crop_and_the_flip():
    crowd = {"x": 0, "y": 0, "w": 96, "h": 64, "text": "blue", "iscrowd": 1}
    red_box = {"x": 60, "y": 20, "w": 24, "h": 24, "text": "red"}
    mask = np.ones((64, 96), np.uint8)
    mask[20:44, 60:84] = 2
    sample = with_mask(painted_sample([crowd, red_box]), mask)
    truths = evaluation.true_boxes(sample, {"red": 3, "blue": 1}, size=48)  # of the whole view
    assert truths.tolist() == [[1, 0, 0, 48, 48, 1], [3, 30, 15, 12, 18, 0]]
    for i in range(20):
        row = evaluation.box_example(sample, np.random.default_rng(i), size=48, min_area=0.8,
                                     labels={"red": 3, "blue": 1}, grid=6)
        assert set(row["label"].tolist()) == {-1, 3}  # a crowd teaches nothing
        red = (row["images"][0] > 128) & (row["images"][2] < 128)
        corners = np.argwhere(red)
        for left, top, right, bottom in row["box"][row["label"] == 3]:
            assert np.abs([top, left] - corners.min(0)).max() <= 1.5
            assert np.abs([bottom, right] - corners.max(0) - 1).max() <= 1.5

        row = evaluation.mask_example(sample, np.random.default_rng(i), 48, 0.8, classes=3)
        assert ((row["mask"] == 2) != red).mean() < 0.04  # the mask takes nearest pixels


def test_outputs_become_boxes_of_the_view_best_first():
    logits = torch.full((1, 4, 2), -9.0)
    logits[0, 0, 1] = 3.0
    logits[0, 1] = torch.tensor([-2.0, 4.0])
    logits[0, 3, 0] = -1.0
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 9], [0, 0, 1, 1], [10, 10, 99, 16]]])
    head = FixedDetector(logits, boxes, torch.tensor([[0.0, 2.0, 9.0, 1.0]]), grid=2)
    found, = evaluation.predict_boxes(head, torch.zeros(1, 3, 16, 16), CFG, CPU)

    def score(logit, centerness):
        return math.sqrt(torch.tensor([logit, centerness]).sigmoid().prod())

    # the first patch's box is too near the second's of its class; what lies outside is cut off
    assert found.tolist() == [pytest.approx([1, 0, 0, 8, 9, score(4.0, 2.0)]),
                              pytest.approx([0, 10, 10, 6, 6, score(-1.0, 1.0)]),
                              pytest.approx([0, 0, 0, 8, 9, score(-2.0, 2.0)])]


# ---- questions ----

def test_questions_of_each_layout():
    def questions(**fields):
        return evaluation.read_questions(painted_sample(caption="a sentence", **fields))

    assert questions(label=False) == [("a sentence", ["false"])]
    ten = ["two"] * 6 + ["2"] * 4
    records = [{"question": "is it?", "answer": "yes"}, {"question": "no answer"}, "neither",
               {"answer": "no question"},
               {"question": "how many?", "answer": "two", "answers": ten}]
    assert questions(qa=records) == [("is it?", ["yes"]), ("how many?", ten)]
    for fields in ({"qa": [{"question": "?", "answers": 3}]}, {"label": "cat"}):  # of a class
        with pytest.raises(data.Skip, match="no question"):
            questions(**fields)


MODELS = {"mug": mug.MUG, "lcl": lcl.LCL, "timix": timix.TiMix}


@pytest.mark.parametrize("name", MODELS)
def test_a_question_is_read_whole_beside_its_image_and_padding_does_not_matter(name, toy_data):
    torch.manual_seed(0)
    model = MODELS[name](tiny_config(name, toy_data, "unused", context=64)).eval()
    images = random_images(2)

    def read(images, *texts):
        tokens, valid = evaluation.tokenize(data.Tokenizer(), texts, 64)
        with torch.no_grad():
            return model.fused(images, tokens, valid)

    both = read(images, "what is it?", "how?")
    torch.testing.assert_close(read(images[1:], "how?"), both[1:], rtol=1e-4, atol=1e-5)
    for other in (read(images.flip(0), "what is it?", "how?"), read(images, "what is at?", "now?")):
        assert ((other - both).abs().amax(1) > 1e-4).all()


# ---- perfect predictions ----

def test_metrics_of_perfect_masks_are_exactly_1(few):
    index = data.open_index(held_out(few))
    masks = torch.stack([torch.from_numpy(index[i].mask()) for i in range(len(index))])

    def one_hot(images):
        return F.one_hot(masks.long(), 9).permute(0, 3, 1, 2).float()

    head = TinyEncoder()
    head.forward = one_hot
    rows = evaluation.evaluate_segmenter(head, index, 9, CFG, CPU)
    assert rows[0] == ("miou", 1, 8) and 0 < values_of(rows)["miou_majority"] < 0.06


def test_metrics_of_perfect_boxes_are_exactly_1(few, monkeypatch):
    index = data.open_index(held_out(few))
    labels = {name: i for i, name in enumerate(evaluation.images_with_class(index))}

    def predict(head, images, cfg, device):
        truths = [evaluation.true_boxes(index[i], labels, size=16) for i in range(len(images))]
        return [F.pad(rows[:, :5], (0, 1), value=1) for rows in truths]  # and a score

    monkeypatch.setattr(evaluation, "predict_boxes", predict)
    train_images = {i: 200 if i % 2 else 5 for i in labels.values()}
    rows = evaluation.evaluate_detector(TinyEncoder(), index, labels, train_images, CFG, CPU)
    values = values_of(rows)
    assert values.pop("AP_common") is None
    assert set(values.values()) == {1}


def test_metrics_of_perfect_answers_are_exactly_1(few):
    def right_answer(images, questions):
        assert len(images) == len(questions)
        return [question.answers[0] for question in questions]

    index = data.open_index(held_out(few))
    view = evaluation.whole_view(TinyEncoder().vision)
    rows = evaluation.evaluate_answers(right_answer, "yes", index, view)
    assert rows[0] == ("vqa", 1, 120) and 0.1 < values_of(rows)["vqa_majority"] < 0.4


# ---- whole heads ----

def run_head(task, few):
    """A head trained for a few steps -> {metric: value}."""
    model = TinyEncoder()
    cfg = CFG
    if task == "vqa":
        cfg = tiny_config("mug", few, "unused", context=24)
        torch.manual_seed(0)
        model = mug.MUG(cfg).eval()
    on_labels = task in ("finetune", "attentive")
    paths = held_out(few, "labels" if on_labels else "pairs")
    args = arguments(epochs=0.05 if on_labels else 0.2)
    return values_of(evaluation.HEADS[task](model, data.Tokenizer(), paths, cfg, CPU, args))


@pytest.mark.parametrize("task", evaluation.HEADS)
def test_a_head_ends_alike_on_one_and_two_ranks(task, few, run_on_ranks):
    alone = run_head(task, few)
    first, second = run_on_ranks(2, run_head, task, few)
    assert first == second and first.keys() == alone.keys()
    for metric, value in alone.items():
        assert first[metric] == pytest.approx(value, abs=0.01), metric  # rounding may turn a pixel


def mean_of_losses():
    """Of a segmenter and a detector; the first half of the rows has most of the labels."""
    images = random_images(4)
    mask = (torch.arange(4 * 256).view(4, 16, 16) < 300).int()
    mask[3, 0, 0] = 2
    label = torch.tensor([[0, 1, 0, -1], [1, -1, -1, 0], [-1] * 4, [-1, -1, 1, -1]])
    box = torch.tensor([0.0, 1, 14, 16]).expand(4, 4, 4)
    rows = list(evaluation.rank_slice(4))
    losses = []
    for kind, batch in ((evaluation.Segmenter, {"images": images, "mask": mask}),
                        (evaluation.Detector, {"images": images, "label": label, "box": box})):
        head = kind(TinyEncoder().vision, 3)
        loss = head.loss({name: x[rows] for name, x in batch.items()})
        losses.append(common.all_reduce_sum(loss).item() / common.world_size())
    return losses


def test_the_mean_of_the_ranks_losses_is_the_loss_of_all_rows(run_on_ranks):
    whole = mean_of_losses()
    for losses in run_on_ranks(2, mean_of_losses):
        assert losses == pytest.approx(whole, rel=1e-5) and min(losses) > 0.1


def test_a_head_learns_shapes_that_its_baseline_does_not(few):
    args = arguments(epochs=16, lr=1e-2)
    values = values_of(evaluation.segment(TinyEncoder(), None, held_out(few), CFG, CPU, args))
    assert values["miou"] > 3 * values["miou_majority"]


def test_three_labelled_images_are_enough_and_their_small_batch_lowers_the_rate(
        few, tmp_path, capsys):
    for name in ("classes.txt", "unseen.txt", "test-00000.tar"):
        shutil.copy(f"{few}/labels/{name}", tmp_path)
    data.write_toy_shard(tmp_path / "train-00000.tar", "labels/train", range(3))
    finetune = evaluation.HEADS["finetune"]
    rows = finetune(TinyEncoder(), None, held_out(tmp_path, "."), CFG, CPU, arguments(epochs=1))
    assert rows[0][2] == 56
    assert "3 training images, 3 steps of 1, lr 6.25e-05" in capsys.readouterr().out


# ---- refusals ----

def refusal(task, folder, part=".", **changes):
    def run(paths):
        evaluation.HEADS[task](TinyEncoder(), None, paths, CFG, CPU, arguments(**changes))

    return refused(run, held_out(folder, part))


def test_a_set_that_does_not_fit_is_refused_before_training(few, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "train_head", None)
    assert "no mask" in refusal("segment", few, "labels")
    assert "no boxes" in refusal("detect", few, "labels")
    assert "no questions" in refusal("vqa", few, "labels")
    assert "classes.txt" in refusal("finetune", few, "pairs")
    shutil.copy(held_out(few)[0], tmp_path)
    assert "detect also needs training shards" in refusal("detect", tmp_path)
    shutil.copytree(f"{few}/labels", tmp_path / "short")
    (tmp_path / "short/classes.txt").write_text("one\ntwo\n")
    assert "only 2 class names" in refusal("finetune", tmp_path / "short")


def test_a_loss_that_is_no_number_ends_the_head_in_one_line(few):
    assert "lower --lr" in refusal("segment", few, "pairs", lr=1e30, epochs=0.5)
