"""Trained heads: their parts against hand-worked values, perfect predictions, what is trained and what is not, ranks, and what is refused."""
import io, itertools, json, math, shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import align
import common
import data
import eval as E
import lcl
import mug
import timix
from common import UserError, ViT

CPU, CFG = torch.device("cpu"), SimpleNamespace(precision="fp32", seed=0)
SHORT = E.Recipe(epochs=1, batch=16, lr=1e-3, scale=0.5, layer_decay=0.9)


pytestmark = pytest.mark.usefixtures("one_thread")


def small(depth=2, size=16, patch=8, **how):
    torch.manual_seed(0)
    return ViT(size, patch, 16, depth, 2, **how)


class Alone(nn.Module):                                      # a model that is its encoder
    def __init__(self, cfg=None):
        super().__init__()
        self.vision = small()


@pytest.fixture(scope="module")
def tiny_world(tiny_world, tmp_path_factory):
    """The same training shards beside fewer held-out samples."""
    folder = tmp_path_factory.mktemp("few")
    for part, numbers in (("pairs", range(40)), ("labels", range(64))):
        shutil.copytree(f"{tiny_world}/{part}", folder / part)
        data.write_shard(folder / part / "test-00000.tar", f"{part}/test", numbers, seed=0, noise=0.0, scenes=256)
    return str(folder)


def world_of(tiny_world, part="pairs"):
    return data.expand(f"{tiny_world}/{part}", "test")


# -- what is trained how fast, and what is left out --

def test_rates_fall_from_layer_to_layer_as_maes_and_every_parameter_is_in_one_group():
    head = E.Classifier(ViT(32, 16, 16, 12, 2), 5, E.Recipe())
    groups = E.layers(head, E.Recipe())
    scales = sorted({g["scale"] for g in groups})
    assert len(scales) == 14 and scales[0] == pytest.approx(0.003697, abs=1e-6) and scales[-1] == 1
    place = {id(p): g for g in groups for p in g["params"]}
    assert len(place) == sum(len(g["params"]) for g in groups) == len(list(head.parameters()))
    names = {n: place[id(p)] for n, p in head.named_parameters()}
    for name, power in (("vision.cls_token", 13), ("vision.pos_embed", 13), ("vision.patch_embed.proj.weight", 13), ("vision.blocks.0.mlp.fc1.weight", 12),
                        ("vision.blocks.11.attn.qkv.bias", 1), ("vision.norm.weight", 0), ("head.weight", 0), ("norm.bias", 0)):
        assert names[name]["scale"] == pytest.approx(0.65 ** power), name
    for name, group in names.items():
        thin = name.endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight", "cls_token", "pos_embed"))
        assert group["weight_decay"] == (0 if thin else 0.05), name


def test_dropped_branches_leave_a_block_out_and_the_kept_ones_make_up_for_it():
    vision, images = small(depth=3).eval(), torch.randn(2, 3, 16, 16)
    plain = vision(images, upto=3)
    E.drop_path(vision, 0.5)                                 # rates 0, 0.25, 0.5
    assert torch.equal(vision(images, upto=3), plain)        # no noise: nothing is left out
    vision.noise = torch.zeros(2, 6)
    torch.testing.assert_close(vision(images, upto=3), vision(images, upto=1))               # the first block always stays
    vision.noise = torch.tensor([[1.0] * 6, [1, 1, 1, 1, 0.4, 1]])
    got, x = vision(images, upto=3), vision.noise
    vision.noise = None
    h, (second, third) = vision(images, upto=1), vision.blocks[1:]
    for row, keep in ((0, 1), (1, 0)):
        y = h[row:row + 1]
        y = y + second.attn(second.norm1(y)) / 0.75
        y = y + second.mlp(second.norm2(y)) / 0.75
        y = y + keep * third.attn(third.norm1(y)) / 0.5
        y = y + third.mlp(third.norm2(y)) / 0.5
        torch.testing.assert_close(got[row:row + 1], y)


def test_over_many_draws_a_branch_keeps_its_mean():
    vision = small(depth=2)
    E.drop_path(vision, 0.4)
    vision.noise, out = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0)), torch.ones(20_000, 4, 16)
    hook = next(iter(vision.blocks[1].mlp._forward_hooks.values()))
    kept = hook(None, None, out)
    assert kept.mean().item() == pytest.approx(1, abs=0.02) and kept.unique().tolist() == pytest.approx([0, 1 / 0.6])


# -- mixing --

@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_targets_are_mixed_as_the_pixels_are(mixup, cutmix):
    how, kinds = replace(SHORT, mixup=mixup, cutmix=cutmix, smoothing=0), set()
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 20)                     # each image is its number
    for step in range(20):
        got, targets = E.mixed(images, torch.arange(4), 4, how, step)
        torch.testing.assert_close(got.mean((1, 2, 3)), targets @ torch.arange(4.0))         # the share of a label is its share of the pixels
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert (targets[0, 2:] == 0).all() and targets[0, 0] == targets[1, 1]                # neighbours are partners
        kinds.add("mixup" if len(got[1].unique()) == 1 and got[1].unique()[0] % 1 else "cut")
        halves = [E.mixed(x, y, 4, how, step) for x, y in zip(images.split(2), torch.arange(4).split(2))]     # as on two ranks
        assert torch.equal(torch.cat([h[0] for h in halves]), got) and torch.equal(torch.cat([h[1] for h in halves]), targets)
    assert kinds == ({"mixup"} if not cutmix else {"cut"} if not mixup else {"mixup", "cut"})


def test_smoothing_alone_by_hand():
    images, targets = E.mixed(torch.ones(2, 3, 4, 4), torch.tensor([1, 0]), 4, replace(SHORT, mixup=0, cutmix=0, smoothing=0.1), 0)
    assert (images == 1).all() and targets[0].tolist() == pytest.approx([0.025, 0.925, 0.025, 0.025])


def test_a_new_classifier_knows_nothing_and_pools_patches_before_its_own_norm():
    vision = small()
    head, images = E.Classifier(vision, 7, replace(SHORT, mixup=0, cutmix=0)), torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    assert head.loss({"images": images, "label": torch.arange(4)}, 0).item() == pytest.approx(math.log(7), abs=1e-3)
    x = vision.patches(images) @ vision.patch_embed.proj.weight.flatten(1).T + vision.patch_embed.proj.bias + vision.pos_embed[:, 1:]
    x = torch.cat([(vision.cls_token + vision.pos_embed[:, :1]).expand(4, 1, -1), x], 1)
    for block in vision.blocks:
        x = block(x)
    want = F.layer_norm(x[:, 1:].mean(1), (16,), eps=1e-6) @ head.head.weight.T
    torch.testing.assert_close(head(images), want)
    head.loss({"images": images, "label": torch.arange(4)}, 0).backward()
    assert vision.norm.weight.grad is None                   # the encoder's last norm is not used


# -- segmentation --

def test_only_labelled_pixels_teach():
    head, images = E.Segmenter(small(), 4), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mask = torch.zeros(2, 16, 16, dtype=torch.int32)
    mask[0, 3, 5], mask[0, 9, 9] = 2, 3
    logits = F.interpolate(head(images), (16, 16), mode="bilinear").log_softmax(1)
    want = -(logits[0, 2, 3, 5] + logits[0, 3, 9, 9]) / 2
    assert head.loss({"images": images, "mask": mask}, 0).item() == pytest.approx(want.item(), rel=1e-5)
    assert head.loss({"images": images, "mask": mask * 0}, 0).item() == 0                    # nothing to learn is no division by zero


def test_confusion_sums_over_a_split_before_it_divides():
    label, pred = torch.tensor([[1, 1, 2, 0], [1, 3, 2, 2]]), torch.tensor([[1, 2, 2, 3], [1, 3, 3, 2]])      # formats 11.5
    counts = sum(E.confusion(p, t, 4) for p, t in zip(pred, label))
    assert counts.sum() == 7 and E.iou_of(counts) == (pytest.approx(0.55556, abs=1e-5), 3)
    assert counts.diag().sum() / counts.sum() == pytest.approx(5 / 7)


def test_a_mask_is_cut_flipped_and_shrunk_with_its_image():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 30:] = 255
    mask = (pixels[..., 0] > 0) + np.uint8(1)                # 1 left, 2 right
    raw = [io.BytesIO(), io.BytesIO()]
    Image.fromarray(pixels).save(raw[0], "PNG")
    Image.fromarray(mask).save(raw[1], "PNG")
    sample, flips = data.Sample("k", {"png": raw[0].getvalue(), "seg.png": raw[1].getvalue()}), set()
    for i in range(20):
        row = E.mask_row(sample, data.rng_for(i), 32, 2, SHORT, 3)
        bright = row["images"][0] > 127
        assert ((row["mask"] == 2) != bright).mean() < 0.04  # the image is resampled, the mask takes the nearest
        flips.add(bool(bright[:, 0].all()) and not bright[:, -1].any())
    assert flips == {True, False}
    with pytest.raises(UserError, match="class 2 in the mask of k, but only 2 names"):
        E.mask_row(sample, data.rng_for(0), 32, 2, SHORT, 2)
    for members in ({"png": raw[0].getvalue()}, {"png": raw[0].getvalue(), "seg.png": b"no mask"}, {"png": raw[1].getvalue(), "seg.png": raw[0].getvalue()}):
        with pytest.raises(data.Skip, match="no mask"):
            E.mask_row(data.Sample("k", members), data.rng_for(0), 32, 2, SHORT, 3)


# -- boxes --

def test_patches_are_assigned_by_hand():
    found, target = E.assign([(0, 0, 32, 32), (9, 1, 6, 6), (27, 27, 2, 2)], [4, 5, 6], 4, 8)       # middles at 4, 12, 20, 28
    #   the large box: middles within 12 px of (16, 16), which are all; the small one: (12, 4); the tiny one holds (28, 28)
    assert found.reshape(4, 4).tolist() == [[4, 5, 4, 4], [4] * 4, [4] * 4, [4, 4, 4, 6]]
    assert target.reshape(4, 4, 4)[0, 1].tolist() == [9, 1, 15, 7] and target.reshape(4, 4, 4)[2, 2].tolist() == [0, 0, 32, 32]
    found, target = E.assign([(1, 1, 2, 2)], [0], 4, 8)      # holds no middle: the patch of its own middle takes it, and it reaches to (4, 4)
    assert found.tolist() == [0] + [-1] * 15 and target[0].tolist() == [1, 1, 5, 5]
    found, _ = E.assign([(0, 0, 80, 80)], [0], 10, 8)        # only patches near the middle of a large box
    assert (found.reshape(10, 10) == 0).sum() == 16 and found.reshape(10, 10)[3:7, 3:7].tolist() == [[0] * 4] * 4
    assert (E.assign([], [], 3, 8)[0] == -1).all()


def test_generalised_iou_by_hand():
    box = lambda *x: torch.tensor(x, dtype=torch.float32)
    assert E.giou(box(0, 0, 2, 2), box(0, 0, 2, 2)).item() == pytest.approx(1)
    assert E.giou(box(0, 0, 1, 1), box(2, 0, 3, 1)).item() == pytest.approx(-1 / 3)          # union 2, hull 3
    assert E.giou(box(0, 0, 2, 2), box(1, 0, 3, 2)).item() == pytest.approx(1 / 3)           # 2 of 6, hull 6


class Told(E.Detector):
    """A detector whose outputs are given."""
    def __init__(self, logits, boxes, centre, grid=1, patch=8):
        nn.Module.__init__(self)
        self.told, self.classes, self.vision = (logits, boxes, centre), logits.shape[2], SimpleNamespace(grid=grid, patch=patch)

    def forward(self, images):
        return self.told


def test_the_loss_of_one_patch_by_hand():
    # one positive patch, its middle at (4, 4), box 2 .. 8: distances 2, 2, 4, 4, so centre-ness sqrt(2 / 4 * 2 / 4) = 1 / 2
    batch = {"images": None, "cls": torch.tensor([[0]]), "box": torch.tensor([[[2.0, 2, 8, 8]]])}
    logits, boxes, centre = torch.zeros(1, 1, 2), torch.tensor([[[2.0, 2, 8, 8]]]), torch.ones(1, 1)
    focal = 0.25 * 0.25 * math.log(2) + 0.75 * 0.25 * math.log(2)                            # the right class, and the other
    told = math.log(1 + math.e) - 0.5                        # cross-entropy of a logit of 1 with 1 / 2
    assert Told(logits, boxes, centre).loss(batch, 0).item() == pytest.approx(focal + 0 + told, rel=1e-5)
    off = torch.tensor([[[2.0, 2, 8, 5]]])                   # half of the box: IoU 1 / 2, weighted by centre-ness, over the sum of weights
    assert Told(logits, off, centre).loss(batch, 0).item() == pytest.approx(focal + 0.5 + told, rel=1e-5)
    nothing = {"images": None, "cls": torch.tensor([[-1]]), "box": torch.zeros(1, 1, 4)}
    assert Told(logits, boxes, centre).loss(nothing, 0).item() == pytest.approx(2 * 0.75 * 0.25 * math.log(2), rel=1e-5)


def slow_nms(boxes, scores, classes, threshold):
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        x, y, w, h = boxes[i]
        for j in kept:
            a, b, c, d = boxes[j]
            both = max(0, min(x + w, a + c) - max(x, a)) * max(0, min(y + h, b + d) - max(y, b))
            if classes[i] == classes[j] and both > threshold * (w * h + c * d - both):
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(10))
def test_suppression_agrees_with_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    boxes, scores, classes = np.c_[rng.uniform(0, 20, (60, 2)), rng.uniform(1, 20, (60, 2))], rng.permutation(60) / 60, rng.integers(0, 3, 60)
    assert E.nms(boxes, scores, classes, 0.3) == slow_nms(boxes, scores, classes, 0.3) and len(E.nms(boxes, scores, classes, 0.3)) < 50
    assert E.nms(boxes[:0], scores[:0], classes[:0]) == []


def test_ap_by_how_often_a_class_was_seen():
    truth = [{"image_id": 1, "category_id": c, "bbox": [0, 0, 10, 10]} for c in range(4)]
    told = [{**t, "score": 1.0} for t in truth if t["category_id"] in (1, 3)]
    found = E.average_precision(told, truth, {0: 10, 1: 11, 2: 100, 3: 101})
    assert (found["rare"], found["common"], found["frequent"]) == (0, 0.5, 1) and found["AP"] == 0.5
    assert E.average_precision(told, truth, {1: 5000})["rare"] == pytest.approx(1 / 3)       # never seen is rare
    assert E.average_precision(told, truth, {c: 500 for c in range(4)})["rare"] is None and "rare" not in E.average_precision(told, truth)


def test_boxes_follow_the_crop_and_the_flip():
    pixels, raw = np.zeros((64, 96, 3), np.uint8), io.BytesIO()
    pixels[20:44, 40:64] = 255
    Image.fromarray(pixels).save(raw, "PNG")
    boxes = [{"x": 40, "y": 20, "w": 24, "h": 24, "text": "a white thing", "name": "thing"}, {"x": 0, "y": 0, "w": 96, "h": 64, "text": "all", "iscrowd": 1}]
    sample = data.Sample("k", {"png": raw.getvalue(), "json": json.dumps({"boxes": boxes}).encode()})
    for i in range(20):
        row = E.box_row(sample, data.rng_for(i), 48, 2, replace(SHORT, scale=0.8), {"thing": 3, "all": 1}, 6)
        assert set(row["cls"].tolist()) == {-1, 3}           # a crowd teaches nothing
        for left, top, right, bottom in {tuple(b) for b, c in zip(row["box"], row["cls"]) if c == 3}:
            bright = np.argwhere(row["images"][0] > 127)
            assert abs(np.array([top, left]) - bright.min(0)).max() <= 1.5 and abs(np.array([bottom, right]) - 1 - bright.max(0)).max() <= 1.5


# -- questions --

def record(**fields):
    return data.Sample("k", {"txt": b"a sentence", "json": json.dumps(fields).encode()})


def test_questions_of_each_layout():
    assert E.asked(record(label="true", sentence="x")) == [("a sentence", ["true"], "yes/no")]
    assert E.asked(record(label=False)) == [("a sentence", ["false"], "yes/no")]
    plain = record(qa=[{"question": "is it?", "answer": "yes"}, {"question": "how many?", "answer": "2"}, {"question": "what?", "answer": "a cat"},
                       {"question": "no answer"}, {"answer": "no question"}, "neither"])
    assert E.asked(plain) == [("is it?", ["yes"], "yes/no"), ("how many?", ["2"], "number"), ("what?", ["a cat"], "other")]
    ten = ["two"] * 6 + ["2"] * 4
    assert E.asked(record(qa=[{"question": "how many?", "answer": "two", "answers": ten, "answer_type": "number"}])) == [("how many?", ten, "number")]
    for none in ({}, {"qa": []}, {"qa": [{"question": "?"}]}, {"qa": None}, {"qa": 3}, {"qa": "yes"}, {"qa": [{"question": "?", "answers": 3}]}):
        with pytest.raises(data.Skip, match="no question"):
            E.asked(record(**none))


def texts(rows, length):
    tokens, valid = zip(*(data.Tokenizer().pad(t, length) for t in rows))
    return torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(valid))


FIELDS = dict(image_size=16, patch=8, dim=16, depth=2, heads=2, text_dim=16, text_depth=2, text_heads=2, context=24, vocab_size=300)


@pytest.mark.parametrize("make", [lambda: timix.TiMix(timix.Config(**FIELDS, fusion_depth=1, embed=8)), lambda: lcl.LCL(lcl.Config(**{**FIELDS, "context": 40})),
                                  lambda: mug.MUG(mug.Config(**FIELDS, pixel_dim=16, pixel_depth=1, pixel_heads=2, cross_depth=1)),
                                  lambda: E.Fusion(small(), 300, 24, 32)])
def test_a_question_is_read_whole_beside_its_image_and_padding_does_not_matter(make):
    torch.manual_seed(0)
    model, images = make().eval(), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    short, long = (model.fused(images, *texts(["what is it?", "how?"], n)) for n in (14, 20))
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-5)
    for other in (model.fused(images.flip(0), *texts(["what is it?", "how?"], 14)), model.fused(images, *texts(["what is at?", "now?"], 14))):
        assert ((other - short).abs().amax(1) > 1e-4).all()  # both the image and a letter anywhere make a difference


def test_what_timix_tells_of_a_pair_is_read_from_the_same_state():
    torch.manual_seed(0)
    model, images = timix.TiMix(timix.Config(**FIELDS, fusion_depth=1, embed=8)), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    x = model.match(model.fused(images, *texts(["a cat", "two dogs"], 12)))
    torch.testing.assert_close(x[:, 1] - x[:, 0], model.score(images, *texts(["a cat", "two dogs"], 12)))
    assert timix.TiMix(timix.Config(**FIELDS, embed=8, base="clip")).fused is None


# -- whole protocols on the built-in world --

def perfect(monkeypatch, answer):
    """Heads that know the answer to each image: {bytes of the image: what forward returns}."""
    class Knows(nn.Module):
        def forward(self, images, *_):
            return torch.stack([answer[x.numpy().tobytes()] for x in images])
    monkeypatch.setattr(E, "trained", lambda *_: iter([("", Knows())]))


def views(world, part, model, view=None):
    index = data.Index(world_of(world, part))
    for images, samples, _ in E.looks(index, lambda s: s, model, view):
        yield from zip(images, samples)


def values(rows):
    return {name: v for name, v, _ in rows}


def test_metrics_of_perfect_classes_are_exactly_1(tiny_world, monkeypatch):
    model = Alone()
    perfect(monkeypatch, {x.numpy().tobytes(): F.one_hot(torch.tensor(s.label()), 64).float() for x, s in views(tiny_world, "labels", model)})
    found = values(E.finetune(model, None, world_of(tiny_world, "labels"), CFG, CPU, None, how=SHORT))
    assert found["finetune"] == found["finetune_mean_per_class"] == 1 and found["finetune_majority"] == 1 / 56


def test_metrics_of_perfect_masks_are_exactly_1(tiny_world, monkeypatch, tmp_path):
    model, whole = Alone(), E.whole(16)
    masks = {x.numpy().tobytes(): F.one_hot(torch.from_numpy(E.mask_of(s)).long(), 9).permute(2, 0, 1).float() for x, s in
             views(tiny_world, "pairs", model, whole)}
    perfect(monkeypatch, masks)
    rows = E.segment(model, None, world_of(tiny_world), CFG, CPU, None, how=replace(SHORT, out=str(tmp_path)))
    found = values(rows)
    assert found["miou"] == found["pixel_accuracy"] == 1 and dict((r[0], r[2]) for r in rows)["miou"] == 8 and 0 < found["miou_majority"] < 0.05
    assert Image.open(tmp_path / "segment.png").width == 6 * 204 + 14


def test_metrics_of_perfect_boxes_are_exactly_1(tiny_world, monkeypatch, tmp_path):
    model, truth = Alone(), {}
    names = sorted({b[4] for s in data.Index(data.expand(f"{tiny_world}/pairs")) for b in E.named_boxes(s, (64, 64))})
    for x, s in views(tiny_world, "pairs", model, E.whole(16)):
        boxes = torch.tensor([[names.index(c), bx / 4, by / 4, w / 4, h / 4, 1] for bx, by, w, h, c, *_ in E.named_boxes(s, (64, 64))])
        truth[x.numpy().tobytes()] = boxes
    perfect(monkeypatch, truth)
    monkeypatch.setattr(E, "detections", lambda head, images, cfg, device: [truth[x.numpy().tobytes()].clone() for x in images])
    found = values(E.detect(model, None, world_of(tiny_world), CFG, CPU, None, how=replace(SHORT, out=str(tmp_path))))
    assert {v for name, v in found.items() if "mean_box" not in name} == {1.0} and {"AP", "AP50", "AP75", "AP_small", "AP_common"} <= found.keys()
    assert found["AP_mean_box"] < 0.05 and (tmp_path / "detect.png").exists()


def test_detections_turn_outputs_into_boxes_of_the_view_best_first():
    logits = torch.full((1, 4, 2), -9.0)
    logits[0, 0, 1], logits[0, 1, 1], logits[0, 3, 0] = 3.0, 4.0, -1.0
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 9], [0, 0, 1, 1], [10, 10, 99, 16]]])
    (found,) = E.detections(Told(logits, boxes, torch.tensor([[0.0, 2.0, 9.0, 1.0]])), torch.zeros(1, 3, 16, 16), CFG, CPU)
    s = lambda v: 1 / (1 + math.exp(-v))
    want = [[1, 0, 0, 8, 9, math.sqrt(s(4) * s(2))], [0, 10, 10, 6, 6, math.sqrt(s(-1) * s(1))]]              # the first was too near the second
    assert found.tolist() == [pytest.approx(row) for row in want]


def test_metrics_of_perfect_answers_are_exactly_1(tiny_world, monkeypatch, tmp_path):
    index, model = data.Index(world_of(tiny_world)), Alone()
    answers = [a for a, _ in E.collections.Counter(q["answer"] for s in data.Index(data.expand(f"{tiny_world}/pairs")) for q in s.json["qa"]).most_common()]
    tokenizer = data.Tokenizer.train([q["question"] for s in data.Index(data.expand(f"{tiny_world}/pairs")) for q in s.json["qa"]], 4096)
    key = lambda x, tokens: x.numpy().tobytes() + bytes(str([t for t in tokens.tolist() if t]), "ascii")
    known, missing = {}, 0
    for x, s in views(tiny_world, "pairs", model, E.whole(16)):
        for q in s.json["qa"]:
            missing += q["answer"] not in answers            # nobody can give an answer that training never showed
            one = torch.tensor(answers.index(q["answer"]) if q["answer"] in answers else 0)
            known[key(x, torch.from_numpy(tokenizer.pad(q["question"], 64)[0]))] = F.one_hot(one, len(answers)).float()
    head = lambda images, tokens, valid: torch.stack([known[key(x, t)] for x, t in zip(images, tokens)])
    monkeypatch.setattr(E, "trained", lambda *_: iter([("", head)]))
    rows = E.vqa(model, data.Tokenizer(), world_of(tiny_world), CFG, CPU, None, how=replace(SHORT, out=str(tmp_path)))
    found, total = values(rows), 3 * len(index)
    assert found["vqa"] == pytest.approx(1 - missing / total) and found["vqa_yes/no"] == found["vqa_number"] == 1
    assert 0.3 < found["vqa_majority"] < 0.6 and (tmp_path / "vqa.png").exists()


@pytest.fixture(scope="module")
def dual(tiny_world, tmp_path_factory):
    """An ALIGN of a few thousand parameters, hardly trained."""
    out = str(tmp_path_factory.mktemp("dual") / "align")
    fields = {**FIELDS, "context": 16}
    align.main(align.Config(data=[f"{tiny_world}/pairs"], out=out, **fields, batch=16, steps=2, workers=0, precision="fp32", eval_every=-1, flip=False))
    return f"{out}/last.pt"


def protocols(path, tiny_world, out, **how):
    """Every head, briefly -> {metric: value}."""
    model, tokenizer, cfg, _ = E.load(path)
    before, found = {n: p.clone() for n, p in model.state_dict().items()}, {}
    for task, part in (("finetune", "labels"), ("segment", "pairs"), ("detect", "pairs"), ("vqa", "pairs")):
        recipe = replace(SHORT, epochs=0.1 if part == "labels" else 0.5, out=out, frozen=task != "finetune" and how.get("frozen", False))
        found |= values(E.TASKS[task](model, tokenizer, world_of(tiny_world, part), cfg, CPU, None, how=recipe))
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())             # what is measured is a copy
    return found


def mean_losses():
    """Of masks and of boxes, on rows that lie unevenly: most labelled pixels and boxes are in the first half."""
    images, found = torch.arange(4 * 768, dtype=torch.uint8).view(4, 3, 16, 16), []
    mask = (torch.arange(4 * 256).view(4, 16, 16) < 300).int() * 2
    mask[3, 0, 0] = 1
    cells = torch.tensor([[0, 1, 0, -1], [1, -1, -1, 0], [-1] * 4, [-1, -1, 1, -1]])
    boxes = torch.tensor([0.0, 0, 16, 16]) + torch.arange(4.0)[:, None, None].expand(4, 4, 4) * torch.tensor([0.3, 0.2, -0.5, -0.1])
    for kind, batch in ((E.Segmenter, {"images": images, "mask": mask}), (E.Detector, {"images": images, "cls": cells, "box": boxes})):
        vision = small()
        head, own = kind(vision, 3), {name: x.chunk(common.world())[common.rank()] for name, x in batch.items()}
        found.append(common.total(head.loss(own, 0)).item() / common.world())
    return found


def test_ranks_shares_of_a_loss_average_to_the_loss_of_all_rows(pools):
    whole = mean_losses()
    assert min(whole) > 0.1
    for world in (2, 4):
        for theirs in pools(world)(mean_losses):
            assert theirs == pytest.approx(whole, rel=1e-5)


def on_a_rank(*args):
    return protocols(*args)


def test_heads_end_alike_on_one_and_two_ranks(dual, tiny_world, tmp_path, pools):
    alone = protocols(dual, tiny_world, str(tmp_path))
    first, second = pools(2)(on_a_rank, dual, tiny_world, str(tmp_path))
    assert first == second and first.keys() == alone.keys() and len(alone) > 20
    assert {k: v for k, v in first.items()} == pytest.approx(alone, abs=0.01)                # a rounding may turn a pixel or an answer
    assert sum(abs(first[k] - v) < 1e-9 for k, v in alone.items()) > len(alone) / 2


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_encoder_stays_and_another_learns(frozen, tiny_world, monkeypatch, tmp_path):
    made, build = [], E.Segmenter
    monkeypatch.setattr(E, "Segmenter", lambda *args: made.append(build(*args)) or made[-1])
    model = Alone()
    model.vision.pos_embed.requires_grad_(False)             # as MUG's fixed positions: fine-tuned like the rest
    E.segment(model, None, world_of(tiny_world), CFG, CPU, None, how=replace(SHORT, epochs=0.5, frozen=frozen, out=str(tmp_path)))
    start, (tuned, _) = model.vision.state_dict(), made
    same = {name: torch.equal(start[name], x) for name, x in tuned.vision.state_dict().items()}
    assert set(same.values()) == {frozen} and tuned.vision.noise is None and not tuned.training


def test_a_head_learns_shapes_that_its_baselines_do_not(tiny_world, tmp_path, monkeypatch):
    paths, trained = world_of(tiny_world), E.trained
    monkeypatch.setattr(E, "trained", lambda *args: itertools.islice(trained(*args), 1))     # without the second baseline
    torch.manual_seed(1)
    found = values(E.segment(Alone(), None, paths, CFG, CPU, None, how=replace(SHORT, epochs=60, lr=5e-3, drop_path=0, seed=1, out=str(tmp_path))))
    assert found["miou"] > 3 * found["miou_majority"]


def test_shots_and_percent_take_their_share_of_each_class(tiny_world):
    paths = world_of(tiny_world, "labels")
    labels = lambda part: E.collections.Counter(part[i].label() for i in range(len(part)))
    whole, few, tenth = (labels(E.chosen(paths, replace(SHORT, **how), by_class=True)) for how in ({}, {"shots": 2}, {"percent": 10}))
    assert few == {c: min(2, n) for c, n in whole.items()} and tenth == {c: math.ceil(n / 10) for c, n in whole.items()}
    a, b = (E.chosen(paths, replace(SHORT, shots=2, seed=s), by_class=True).numbers.tolist() for s in (0, 1))
    assert a != b and a == sorted(a)
    assert len(E.chosen(world_of(tiny_world), replace(SHORT, percent=25))) == 64


# -- encoders from files --

def test_an_exported_encoder_is_measured_as_its_checkpoint(dual, tiny_world, tmp_path):
    for name in ("vit.safetensors", "vit.pt"):
        E.main(["export", dual, "--out", str(tmp_path / name)])
        model, _, cfg, _ = E.load(str(tmp_path / name))
        images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
        assert torch.equal(model.vision(images), E.load(dual)[0].vision(images)) and type(model).__name__ == "Encoder"
    E.main(["knn", str(tmp_path / name), "--data", f"{tiny_world}/labels", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="is a Encoder|is an Encoder"):
        E.main(["zeroshot", str(tmp_path / name), "--data", f"{tiny_world}/labels"])
    other = type(model)(cfg)
    assert other.vision.grid == 2 and not torch.equal(other.vision.pos_embed, model.vision.pos_embed)


# -- the command line --

def test_a_report_with_heads_holds_them(dual, tiny_world, tmp_path, monkeypatch):
    for probe in ("linear_probe", "attentive_probe"):
        monkeypatch.setattr(E, probe, lambda train, labels, test, *_: E.knn(train.flatten(1), labels, test.flatten(1), 1))
    recipe = E.recipe
    monkeypatch.setattr(E, "recipe", lambda task, args: replace(recipe(task, args), epochs=0.1, batch=16))
    E.main(["compare", dual, "--data", f"{tiny_world}/pairs", f"{tiny_world}/labels", "--heads", "--out", str(tmp_path)])
    report = json.load(open(tmp_path / "compare.json"))["results"]
    assert {"finetune", "segment", "detect", "vqa", "retrieval"} <= {r["protocol"] for r in report}
    assert len(list(tmp_path.glob("*/*.png"))) == 3          # a folder of pictures for each checkpoint


@pytest.mark.parametrize("argv, told", [
    (["finetune", "C", "--frozen"], "--frozen belongs to segment detect vqa, not to finetune"), (["knn", "C", "--epochs", "3"], "--epochs belongs to"),
    (["segment", "C", "--percent", "0"], "--percent 0.0: must"), (["segment", "C", "--percent", "101"], "--percent 101"), (["vqa", "C", "--batch", "-1"], "--batch -1"),
    (["finetune", "C", "--shots", "0"], "--shots 0"), (["detect", "C", "--scale", "2"], "--scale 2"), (["vqa", "C", "--epochs", "nan"], "--epochs nan"),
    (["segment", "C", "--data", "L"], "no mask"), (["detect", "C", "--data", "L"], "no boxes"), (["vqa", "C", "--data", "L"], "no questions"),
    (["finetune", "C", "--data", "P"], "classes.txt"), (["segment", "C", "--data", "T"], "needs training shards")])
def test_what_cannot_be_trained_is_told_in_one_line(dual, tiny_world, tmp_path, argv, told):
    places = {"C": dual, "L": f"{tiny_world}/labels", "P": f"{tiny_world}/pairs", "T": str(tmp_path / "alone")}
    (tmp_path / "alone").mkdir()
    with open(world_of(tiny_world)[0], "rb") as f:
        (tmp_path / "alone/test-0.tar").write_bytes(f.read())
    with pytest.raises(UserError, match=told.replace(".", r"\.")) as error:
        E.main([places.get(a, a) for a in argv])
    assert "\n" not in str(error.value)


def test_real_masks_and_true_or_false_are_read(dual, shared, tmp_path):
    model, tokenizer, cfg, _ = E.load(dual)
    how = replace(SHORT, epochs=0.3, out=str(tmp_path))
    found = values(E.segment(model, tokenizer, data.expand(f"{shared}/seg", "test"), cfg, CPU, None, how=how))
    assert 0 <= found["miou"] < 0.5 and E.heads_for(data.expand(f"{shared}/seg", "test")) == ["segment", "detect"]
    rows = E.vqa(model, tokenizer, data.expand(f"{shared}/nlvr", "test"), cfg, CPU, None, how=how)
    assert {n for _, _, n in rows} == {167} and 0.4 < values(rows)["vqa_majority"] < 0.6
