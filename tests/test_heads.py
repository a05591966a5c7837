"""Trained heads: their parts worked by hand, perfect predictions, what learns, ranks, refusals."""
import argparse
import io
import json
import math
import os
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
from common import UserError
from conftest import painted_sample, tiny_config

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


def arguments(out, **changes):
    """What the command line gives a head, for a short training on data of one's own."""
    fields = {"data": ["given"], "out": str(out), "epochs": 0.2, "batch": 16, "lr": 1e-3, "seed": 0}
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
    n_grouped = sum(len(group["params"]) for group in groups)
    assert len(group_of) == n_grouped == len(list(head.parameters()))
    scales = sorted({group["lr_scale"] for group in groups})
    assert len(scales) == 14 and scales[-1] == 1
    assert scales[0] == pytest.approx(0.003697, abs=1e-6)  # MAE's and timm's for ViT-B

    parameters = dict(head.named_parameters())
    power = {"vision.cls_token": 13, "vision.pos_embed": 13, "vision.patch_embed.proj.weight": 13,
             "vision.blocks.0.mlp.fc1.weight": 12, "vision.blocks.11.attn.qkv.bias": 1,
             "vision.norm.weight": 0, "head.weight": 0, "norm.bias": 0}
    for name, n in power.items():
        assert group_of[id(parameters[name])]["lr_scale"] == pytest.approx(0.65**n), name
    no_decay = ("bias", "norm.weight", "norm1.weight", "norm2.weight", "cls_token", "pos_embed")
    for name, p in parameters.items():
        wd = 0.0 if name.endswith(no_decay) else 0.05
        assert group_of[id(p)]["weight_decay"] == wd, name


def test_the_rate_starts_at_the_given_one_and_nears_maes_least_rate(few, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def note_and_step(optimizer):
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", note_and_step)
    args = arguments(tmp_path, lr=3e-6)
    evaluation.segment(TinyEncoder(), None, held_out(few), CFG, CPU, args)
    cosine = [(1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]  # 3 steps of 16 of 256
    assert rates == pytest.approx([1e-6 + 2e-6 * value for value in cosine])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_encoder_stays_another_learns_and_the_model_is_not_touched(
        frozen, few, tmp_path, monkeypatch):
    heads = []

    def keep_head(head, *rest):
        heads.append(head)
        return []

    monkeypatch.setattr(evaluation, "evaluate_segmenter", keep_head)
    model = TinyEncoder()
    model.vision.pos_embed.requires_grad_(False)  # MUG's are fixed; fine-tuning moves them
    before = {name: x.clone() for name, x in model.state_dict().items()}
    evaluation.segment(model, None, held_out(few), CFG, CPU, arguments(tmp_path, frozen=frozen))
    head, = heads
    assert not head.training
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
        assert torch.equal(head.state_dict()[name], before[name]) == frozen, name


def test_a_batch_is_at_most_an_eighth_and_the_same_on_2_4_and_8_ranks(monkeypatch):
    assert evaluation.batch_size(64, 3) == 1 and evaluation.batch_size(64, 50) == 6
    for n_ranks in (1, 2, 4, 8):
        monkeypatch.setattr(evaluation, "world_size", partial(int, n_ranks))
        assert evaluation.batch_size(1024, 100_000) == 1024
        assert evaluation.batch_size(64, 230) == 24  # 28 is an eighth


def test_recipes_are_the_papers_with_data_and_the_toy_ones_without():
    nothing = argparse.Namespace(data=None)
    assert evaluation.recipe_for("finetune", nothing).epochs == 12
    assert evaluation.recipe_for("finetune", argparse.Namespace(data=["x"])).epochs == 100
    given = argparse.Namespace(data=None, epochs=3.0, lr=None, frozen=True)
    recipe = evaluation.recipe_for("vqa", given)
    assert (recipe.epochs, recipe.lr, recipe.frozen) == (3, 2e-3, True)


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


class GivenTokens(nn.Module):
    """An encoder of 8 values a patch, whose images are their tokens."""

    def __init__(self):
        super().__init__()
        self.pos_embed = torch.zeros(1, 9, 8)

    def patch_tokens(self, images):
        return images


def marked_patches(n, generator):
    """Nine patches, one of them marked with the image's class, the others with random ones."""
    labels = torch.randint(4, (n,), generator=generator)
    others = torch.randint(4, (n, 9), generator=generator)
    tokens = torch.cat([torch.eye(4)[others], torch.zeros(n, 9, 4)], 2)
    marked = torch.randint(9, (n,), generator=generator)
    tokens[range(n), marked] = torch.cat([torch.eye(4)[labels], torch.ones(n, 4)], 1)
    return tokens + 0.05 * torch.randn(n, 9, 8, generator=generator), labels


def test_an_attentive_probe_finds_the_patch_that_pooling_blurs():
    generator = torch.Generator().manual_seed(0)
    train, labels = marked_patches(1500, generator)
    test, truth = marked_patches(300, generator)
    torch.manual_seed(0)
    probe = evaluation.AttentiveProbe(GivenTokens(), 4)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-3)
    for step in range(400):
        rows = torch.randint(1500, (128,), generator=generator)
        optimizer.zero_grad()
        probe.loss({"images": train[rows], "label": labels[rows]}).backward()
        optimizer.step()
    assert (probe(test).argmax(1) == truth).double().mean() > 0.95
    pooled = evaluation.linear_probe(train.mean(1), labels, test.mean(1))
    assert (pooled == truth).double().mean() < 0.8


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
    logits = torch.zeros(3, 2, 2)
    logits[0] = 9.0
    logits[1, :, 0] = 1.0
    predicted = evaluation.predict_mask(logits, (4, 8))
    assert predicted.tolist() == [[1, 1, 1, 1, 1, 1, 1, 1]] * 4
    logits[2, :, 1] = 1.0
    assert evaluation.predict_mask(logits, (4, 8)).tolist() == [[1, 1, 1, 1, 2, 2, 2, 2]] * 4


def masked_sample(mask, pixels=None):
    if pixels is None:
        pixels = np.zeros((*mask.shape, 3), np.uint8)
    members = {}
    for suffix, array in (("png", pixels), ("seg.png", mask)):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "PNG")
        members[suffix] = file.getvalue()
    return data.Sample("key", members)


def test_a_mask_is_cropped_and_mirrored_with_its_image():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 30:] = 255
    mask = np.where(pixels[..., 0] > 0, 2, 1).astype(np.uint8)
    sample = masked_sample(mask, pixels)
    bright_sides = set()
    for i in range(20):
        rng = np.random.default_rng(i)
        row = evaluation.mask_example(sample, rng, size=32, min_area=0.5, classes=3)
        bright = row["images"][0] > 127
        assert ((row["mask"] == 2) != bright).mean() < 0.04  # the mask takes nearest pixels
        bright_sides.add((bool(bright[:, 0].all()), bool(bright[:, -1].all())))
    assert {(True, False), (False, True)} <= bright_sides


def test_255_is_no_class_and_a_class_without_a_name_is_refused():
    mask = np.array([[1, 2], [255, 0]], np.uint8)
    example = partial(evaluation.mask_example, size=16, min_area=1.0)
    row = example(masked_sample(mask), np.random.default_rng(0), classes=3)
    assert set(np.unique(row["mask"])) <= {0, 1, 2}
    with pytest.raises(UserError, match="class 2 in the mask of key, but only 2 names"):
        example(masked_sample(mask), np.random.default_rng(0), classes=2)


# ---- boxes ----

def test_patches_are_assigned_by_hand():
    # grid of 4 patches of 8 pixels: centers at 4, 12, 20, 28. The large box takes all within 12
    # pixels of its middle, the small one (12, 4), the tiny one the patch that holds its middle
    boxes = np.array([(0, 0, 32, 32), (9, 1, 15, 7), (27, 27, 29, 29)], float)
    label, box = evaluation.assign_boxes(boxes, [4, 5, 6], 4, 8)
    assert label.reshape(4, 4).tolist() == [[4, 5, 4, 4], [4] * 4, [4] * 4, [4, 4, 4, 6]]
    assert box.reshape(4, 4, 4)[0, 1].tolist() == [9, 1, 15, 7]
    assert box.reshape(4, 4, 4)[2, 2].tolist() == [0, 0, 32, 32]

    # a box without a center: the patch of its middle takes it, and it is widened to hold (4, 4)
    label, box = evaluation.assign_boxes(np.array([(1.0, 1, 3, 3)]), [0], 4, 8)
    assert label.tolist() == [0] + [-1] * 15 and box[0].tolist() == [1, 1, 5, 5]

    # only patches near the middle of a large box
    label, _ = evaluation.assign_boxes(np.array([(0.0, 0, 80, 80)]), [0], 10, 8)
    expected = np.full((10, 10), -1)
    expected[3:7, 3:7] = 0
    assert np.array_equal(label.reshape(10, 10), expected)
    assert (evaluation.assign_boxes(np.zeros((0, 4)), [], 3, 8)[0] == -1).all()


@pytest.mark.parametrize("a, b, expected", [
    ((0, 0, 2, 2), (0, 0, 2, 2), 1),
    ((0, 0, 1, 1), (2, 0, 3, 1), -1 / 3),  # union 2, hull 3
    ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),  # 2 of 6, hull 6
])
def test_generalized_iou_by_hand(a, b, expected):
    a, b = torch.tensor([a, b], dtype=torch.float32)
    assert evaluation.generalized_iou(a, b).item() == pytest.approx(expected)


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
    half = FixedDetector(logits, torch.tensor([[[2.0, 2, 8, 5]]]), centerness)  # an IoU of 1/2
    assert half.loss(batch).item() == pytest.approx(focal + 0.5 + center, rel=1e-5)
    nothing = {**batch, "label": torch.tensor([[-1]])}
    expected = 2 * 0.75 * 0.25 * math.log(2)
    assert right.loss(nothing).item() == pytest.approx(expected, rel=1e-5)


def slow_nms(boxes, scores, classes, threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        overlaps = [evaluation.box_iou(boxes[[i]], boxes[[j]])[0, 0] for j in kept
                    if classes[i] == classes[j]]
        if all(overlap <= threshold for overlap in overlaps):
            kept.append(i)
    return kept


def test_nms_agrees_with_a_slow_loop_and_stops_at_the_best():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        boxes = np.concatenate([rng.uniform(0, 20, (60, 2)), rng.uniform(1, 20, (60, 2))], 1)
        scores = rng.permutation(60) / 60
        classes = rng.integers(0, 3, 60)
        expected = slow_nms(boxes, scores, classes, 0.3)
        assert evaluation.nms(boxes, scores, classes, 0.3) == expected and len(expected) < 50
        assert evaluation.nms(boxes, scores, classes, 0.3, most=5) == expected[:5]
    assert evaluation.nms(boxes[:0], scores[:0], classes[:0]) == []


def test_boxes_follow_the_crop_and_the_flip():
    boxes = [{"x": 40, "y": 20, "w": 24, "h": 24, "text": "red"}]
    crowd = {"x": 0, "y": 0, "w": 96, "h": 64, "text": "all", "iscrowd": 1}
    sample = painted_sample(boxes)
    record = {"boxes": [{**boxes[0], "name": "thing"}, crowd]}
    sample = data.Sample("key", {**sample.members, "json": json.dumps(record).encode()})
    for i in range(20):
        row = evaluation.box_example(sample, np.random.default_rng(i), size=48, min_area=0.8,
                                     labels={"thing": 3, "all": 1}, grid=6)
        assert set(row["label"].tolist()) == {-1, 3}  # a crowd teaches nothing
        red = np.argwhere((row["images"][0] > 192) & (row["images"][1] < 64))
        for left, top, right, bottom in row["box"][row["label"] == 3]:
            assert np.abs([top, left] - red.min(0)).max() <= 1.5
            assert np.abs([bottom, right] - red.max(0) - 1).max() <= 1.5


def test_outputs_become_boxes_of_the_view_best_first():
    logits = torch.full((1, 4, 2), -9.0)
    logits[0, 0, 1] = 3.0
    logits[0, 1, 1] = 4.0
    logits[0, 3, 0] = -1.0
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 9], [0, 0, 1, 1], [10, 10, 99, 16]]])
    head = FixedDetector(logits, boxes, torch.tensor([[0.0, 2.0, 9.0, 1.0]]), grid=2)
    found, = evaluation.predict_boxes(head, torch.zeros(1, 3, 16, 16), CFG, CPU)
    best = math.sqrt(torch.tensor([4.0, 2.0]).sigmoid().prod())
    other = math.sqrt(torch.tensor([-1.0, 1.0]).sigmoid().prod())
    # the first patch's box is too near the second's; what lies outside is cut off
    assert found.tolist() == [pytest.approx([1, 0, 0, 8, 9, best]),
                              pytest.approx([0, 10, 10, 6, 6, other])]


# ---- questions ----

def record(**fields):
    return data.Sample("key", {"txt": b"a sentence", "json": json.dumps(fields).encode()})


def test_questions_of_each_layout():
    questions = evaluation.read_questions
    assert questions(record(label="true")) == [("a sentence", ["true"])]
    assert questions(record(label=False)) == [("a sentence", ["false"])]
    plain = record(qa=[{"question": "is it?", "answer": "yes"}, {"question": "no answer"},
                       {"answer": "no question"}, "neither"])
    assert questions(plain) == [("is it?", ["yes"])]
    ten = ["two"] * 6 + ["2"] * 4
    full = {"question": "how many?", "answer": "two", "answers": ten}
    assert questions(record(qa=[full])) == [("how many?", ten)]


@pytest.mark.parametrize("fields", [
    {}, {"qa": [{"question": "?"}]}, {"qa": "yes"}, {"qa": [{"question": "?", "answers": 3}]},
    {"label": "cat"},
])
def test_no_question_and_the_label_of_a_class_are_skipped(fields):
    with pytest.raises(data.Skip, match="no question"):
        evaluation.read_questions(record(**fields))


MODELS = {"mug": mug.MUG, "lcl": lcl.LCL, "timix": timix.TiMix}


@pytest.mark.parametrize("name", MODELS)
def test_a_question_is_read_whole_beside_its_image_and_padding_does_not_matter(name, toy_data):
    torch.manual_seed(0)
    model = MODELS[name](tiny_config(name, toy_data, "unused", context=64)).eval()
    images = random_images(2)

    def read(images, texts, length):
        rows = [data.Tokenizer().pad(text, length) for text in texts]
        tokens, valid = (torch.from_numpy(np.stack(column)) for column in zip(*rows))
        with torch.no_grad():
            return model.fused(images, tokens, valid)

    short = read(images, ["what is it?", "how?"], 14)
    longer = read(images, ["what is it?", "how?"], 20)
    torch.testing.assert_close(longer, short, rtol=1e-4, atol=1e-5)
    other_images = read(images.flip(0), ["what is it?", "how?"], 14)
    other_letters = read(images, ["what is at?", "now?"], 14)
    for other in (other_images, other_letters):
        assert ((other - short).abs().amax(1) > 1e-4).all()


# ---- perfect predictions ----

class Perfect(nn.Module):
    """A head that looks its output up: {bytes of an image (and text): output}."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs
        self.vision = TinyEncoder().vision

    def forward(self, images):
        return torch.stack([self.outputs[image.numpy().tobytes()] for image in images])


def look_up(index, view, read):
    """{bytes of the view: read(sample)} of an index."""
    found = {}
    for i in range(len(index)):
        found[np.ascontiguousarray(view(index[i].image())).tobytes()] = read(index[i])
    return found


def test_metrics_of_perfect_classes_are_exactly_1_and_unseen_ones_are_left_out(few):
    index = data.open_index(held_out(few, "labels"))
    model = TinyEncoder()
    one_hot = torch.eye(64)

    def read(sample):
        return one_hot[sample.label()]

    head = Perfect(look_up(index, model.held_out_view, read))
    known = torch.arange(64) >= 8
    view = model.held_out_view
    rows = evaluation.evaluate_classifier("finetune", head, index, known, view, CFG, CPU)
    assert rows == [("finetune", 1.0, 56), ("finetune_mean_per_class", 1.0, 56),
                    ("finetune_majority", 1 / 56, 56)]


def test_metrics_of_perfect_masks_are_exactly_1(few):
    index = data.open_index(held_out(few))

    def one_hot(sample):
        return F.one_hot(torch.from_numpy(sample.mask()).long(), 9).permute(2, 0, 1).float()

    head = Perfect(look_up(index, evaluation.whole_view(TinyEncoder().vision), one_hot))
    rows = evaluation.evaluate_segmenter(head, index, 9, CFG, CPU)
    values = values_of(rows)
    assert values["miou"] == 1 and rows[0][2] == 8
    assert 0 < values["miou_majority"] < 0.06


def test_metrics_of_perfect_boxes_are_exactly_1(few, monkeypatch):
    index = data.open_index(held_out(few))
    labels = {name: i for i, name in enumerate(evaluation.images_with_class(index))}

    def read(sample):
        rows = evaluation.true_boxes(sample, labels, size=16)
        return torch.cat([rows[:, :5], torch.ones(len(rows), 1)], 1)  # a score for the crowd

    def predict(head, images, cfg, device):
        return [head.outputs[image.numpy().tobytes()] for image in images]

    head = Perfect(look_up(index, evaluation.whole_view(TinyEncoder().vision), read))
    monkeypatch.setattr(evaluation, "predict_boxes", predict)
    train_images = {i: 200 if i % 2 else 5 for i in labels.values()}
    rows = evaluation.evaluate_detector(head, index, labels, train_images, CFG, CPU)
    values = values_of(rows)
    for metric in ("AP", "AP50", "AP75", "AP_rare", "AP_frequent"):
        assert values[metric] == 1
    assert values["AP_common"] is None


def test_metrics_of_perfect_answers_are_exactly_1(few):
    index = data.open_index(held_out(few))

    def right_answer(images, questions):
        assert len(images) == len(questions)
        return [question.answers[0] for question in questions]

    view = evaluation.whole_view(TinyEncoder().vision)
    rows = evaluation.evaluate_answers(right_answer, "yes", index, view)
    values = values_of(rows)
    assert rows[0] == ("vqa", 1, 120) and 0.1 < values["vqa_majority"] < 0.4


# ---- whole heads ----

def run_head(task, few, out):
    """A head trained for a few steps -> {metric: value}."""
    model = TinyEncoder()
    cfg = CFG
    if task == "vqa":
        cfg = tiny_config("mug", few, "unused", context=24)
        torch.manual_seed(0)
        model = mug.MUG(cfg).eval()
    on_labels = task in ("finetune", "attentive")
    paths = held_out(few, "labels" if on_labels else "pairs")
    args = arguments(out, epochs=0.05 if on_labels else 0.2)
    return values_of(evaluation.HEADS[task](model, data.Tokenizer(), paths, cfg, CPU, args))


@pytest.mark.parametrize("task", ["finetune", "attentive", "segment", "detect", "vqa"])
def test_a_head_ends_alike_on_one_and_two_ranks(task, few, tmp_path, run_on_ranks):
    alone = run_head(task, few, tmp_path / "alone")
    first, second = run_on_ranks(2, run_head, task, few, str(tmp_path))
    assert first == second and first.keys() == alone.keys()
    for metric, value in alone.items():
        assert first[metric] == pytest.approx(value, abs=0.01), metric  # rounding may turn a pixel


def shares_of_losses():
    """Of masks and boxes in rows that are uneven: most labelled pixels are in the first half."""
    images = random_images(4)
    mask = (torch.arange(4 * 256).view(4, 16, 16) < 300).int() * 2
    mask[3, 0, 0] = 1
    label = torch.tensor([[0, 1, 0, -1], [1, -1, -1, 0], [-1] * 4, [-1, -1, 1, -1]])
    box = torch.tensor([0.0, 0, 16, 16]).expand(4, 4, 4)
    box = box + torch.arange(4.0)[:, None, None] * torch.tensor([0.3, 0.2, -0.5, -0.1])
    rows = slice(4 * common.rank() // common.world_size(),
                 4 * (common.rank() + 1) // common.world_size())
    losses = []
    for kind, batch in ((evaluation.Segmenter, {"images": images, "mask": mask}),
                        (evaluation.Detector, {"images": images, "label": label, "box": box})):
        head = kind(TinyEncoder().vision, 3)
        loss = head.loss({name: x[rows] for name, x in batch.items()})
        losses.append(common.all_reduce_sum(loss).item() / common.world_size())
    return losses


def test_the_mean_of_the_ranks_losses_is_the_loss_of_all_rows(run_on_ranks):
    whole = shares_of_losses()
    for losses in run_on_ranks(2, shares_of_losses):
        assert losses == pytest.approx(whole, rel=1e-5) and min(losses) > 0.1


def test_a_head_learns_shapes_that_its_baseline_does_not(few, tmp_path):
    args = arguments(tmp_path, epochs=16, lr=1e-2)
    values = values_of(evaluation.segment(TinyEncoder(), None, held_out(few), CFG, CPU, args))
    assert values["miou"] > 3 * values["miou_majority"]


def test_a_few_labelled_images_are_enough(few, tmp_path):
    folder = tmp_path / "three"
    shutil.copytree(f"{few}/labels", folder)
    for path in folder.glob("train*"):
        path.unlink()
    data.write_toy_shard(folder / "train-00000.tar", "labels/train", range(3))
    args = arguments(tmp_path, epochs=1)
    rows = evaluation.finetune(TinyEncoder(), None, held_out(folder, "."), CFG, CPU, args)
    assert rows[0][2] == 56


def test_real_masks_boxes_and_true_or_false_are_read(shared, tmp_path):
    args = arguments(tmp_path, epochs=0.2, batch=8)
    paths = data.expand(f"{shared}/seg", "test")
    for task, metric in (("segment", "miou"), ("detect", "AP")):
        rows = evaluation.HEADS[task](TinyEncoder(), None, paths, CFG, CPU, args)
        assert 0 <= values_of(rows)[metric] < 0.5
    cfg = tiny_config("mug", shared, "unused", context=24)
    paths = data.expand(f"{shared}/nlvr", "test")
    rows = evaluation.vqa(mug.MUG(cfg).eval(), data.Tokenizer(), paths, cfg, CPU, args)
    assert {n for _, _, n in rows} == {167} and 0.4 < values_of(rows)["vqa_majority"] < 0.6


# ---- refusals ----

def refusal(task, folder, out, part=".", **changes):
    with pytest.raises(UserError) as caught:
        paths = held_out(folder, part)
        args = arguments(out, **changes)
        evaluation.HEADS[task](TinyEncoder(), None, paths, CFG, CPU, args)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_set_that_does_not_fit_is_refused_before_training(few, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "train_head", None)
    assert "no mask" in refusal("segment", few, tmp_path, "labels")
    assert "no boxes" in refusal("detect", few, tmp_path, "labels")
    assert "no questions" in refusal("vqa", few, tmp_path, "labels")
    assert "classes.txt" in refusal("finetune", few, tmp_path, "pairs")

    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(held_out(few)[0], alone)
    for task in ("segment", "detect", "vqa"):
        assert f"{task} also needs training shards" in refusal(task, alone, tmp_path)

    short = tmp_path / "short"
    shutil.copytree(f"{few}/labels", short)
    os.remove(short / "unseen.txt")
    (short / "classes.txt").write_text("one\ntwo\n")
    assert "only 2 class names" in refusal("finetune", short, tmp_path)


def test_a_loss_that_is_no_number_ends_the_head_in_one_line(few, tmp_path):
    assert "lower --lr" in refusal("segment", few, tmp_path, "pairs", lr=1e30, epochs=0.5)
