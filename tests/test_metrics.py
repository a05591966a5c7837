"""Metrics against hand-worked values and slow loops; pictures by what can be read back from their pixels."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch.utils._python_dispatch import TorchDispatchMode

import eval as E

OWN = torch.tensor([0, 0, 1, 1, 1, 2, 2])
SIM = torch.tensor([[.9, .1, .3], [.2, .8, .1], [.1, .7, .6], [.5, .4, .6], [.3, .9, .2], [.2, .1, .8], [.6, .5, .4]])
STRANGE = "犬が走る 🐶👩‍👩‍👧 שלום עולם مرحبا e\u0301 \u202e\u200b\x00\ud83d\n\ttail"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def coarse(*shape, seed, levels=4):                          # few distinct scores, so that most comparisons are ties
    return torch.randint(levels, shape, generator=seeded(seed)) / levels


def best_first(row):                                         # the tie rule, spelt out: sorted() is stable, so the earlier index stays first
    return sorted(range(len(row)), key=lambda i: -row[i])


def loop_recall(sim, owner, k):
    rows, columns, owner = sim.tolist(), sim.T.tolist(), owner.tolist()
    t2i = [owner[t] in best_first(row)[:k] for t, row in enumerate(rows)]
    i2t = [any(owner[t] == i for t in best_first(column)[:k]) for i, column in enumerate(columns) if i in owner]
    return sum(i2t) / len(i2t), sum(t2i) / len(t2i)


# -- accuracy --

def test_four_of_six_predictions_are_right():
    labels, pred = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 0, 2])        # formats 11.3
    assert E.accuracy(F.one_hot(pred, 3).float(), labels) == pytest.approx(4 / 6)


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_accuracy_agrees_with_sorting_every_row_when_most_scores_tie(k):
    scores, labels = coarse(200, 7, seed=0), torch.randint(7, (200,), generator=seeded(1))
    want = sum(label in best_first(row)[:k] for row, label in zip(scores.tolist(), labels.tolist())) / 200
    assert E.accuracy(scores, labels, k) == pytest.approx(want)


def test_a_constant_classifier_is_right_on_the_first_class_only():
    assert E.accuracy(torch.zeros(4, 4), torch.arange(4)) == 0.25


def test_top_5_of_4_classes_is_undefined_and_of_5_is_not():
    assert E.accuracy(torch.rand(3, 4), torch.arange(3), k=5) is None
    assert E.accuracy(torch.rand(3, 5), torch.arange(3), k=5) == 1


def test_a_nan_score_is_never_a_hit_and_beats_nobody():
    nan = math.nan
    scores = torch.tensor([[nan, 0, 1], [nan, nan, nan], [nan, 2, 1]])
    assert E.accuracy(scores, torch.tensor([0, 0, 1])) == pytest.approx(1 / 3)               # the last row: argmax would say NaN
    assert E.accuracy(scores, torch.tensor([0, 0, 1]), k=3) == pytest.approx(1 / 3)
    assert E.accuracy(torch.full((3, 3), -math.inf), torch.arange(3)) == pytest.approx(1 / 3)  # -inf is an ordinary score


# -- retrieval --

def test_golden_retrieval():
    assert E.recall_at_k(SIM, OWN, (1, 2)) == {"i2t": {1: 1, 2: 1}, "t2i": {1: pytest.approx(4 / 7), 2: pytest.approx(5 / 7)}}   # 11.2


@pytest.mark.parametrize("seed", range(8))
def test_recall_agrees_with_sorting_when_texts_are_many_uneven_and_tied(seed):
    sim, owner = coarse(60, 25, seed=seed, levels=(3, 50)[seed % 2]), torch.randint(25, (60,), generator=seeded(seed + 100))
    assert len(owner.unique()) < 25                          # some images own no text, others several
    got = E.recall_at_k(sim, owner)
    for k in (1, 5, 10):
        assert (got["i2t"][k], got["t2i"][k]) == pytest.approx(loop_recall(sim, owner, k))


def test_chunks_do_not_show():
    sim, owner = coarse(1100, 5000, seed=3, levels=999), torch.randint(5000, (1100,), generator=seeded(4))   # 2 and 2 chunks
    own = sim[range(1100), owner][:, None]
    before = torch.arange(5000) < owner[:, None]
    place = (sim > own).sum(1) + ((sim == own) & before).sum(1)
    assert E.recall_at_k(sim, owner, [40])["t2i"][40] == pytest.approx((place < 40).double().mean().item())
    wide, label = sim.T.contiguous(), torch.arange(5000) % 1100
    parts = [E.ranks(wide[i:i + 1], label[i:i + 1]) for i in range(0, 5000, 97)]
    assert torch.equal(E.ranks(wide, label)[::97], torch.cat(parts))


def test_a_constant_model_by_hand():
    got = E.recall_at_k(torch.zeros(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]), (1, 3))
    assert got["t2i"] == {1: pytest.approx(2 / 6), 3: 1}     # image 0 always comes first; two of six texts belong to it
    assert got["i2t"] == {1: pytest.approx(1 / 3), 3: pytest.approx(2 / 3)}                  # best places of the images' texts: 0, 2, 4


def test_a_perfect_model_scores_1_and_a_random_one_k_over_n():
    owner = torch.arange(40).repeat_interleave(5)
    assert set(E.recall_at_k(F.one_hot(owner, 40).float(), owner)["i2t"].values()) == {1.0}
    assert set(E.recall_at_k(F.one_hot(owner, 40).float(), owner)["t2i"].values()) == {1.0}
    got = E.recall_at_k(torch.rand(2000, 2000, generator=seeded(0)), torch.arange(2000), [200])
    assert got["i2t"][200] == pytest.approx(0.1, abs=0.03) and got["t2i"][200] == pytest.approx(0.1, abs=0.03)


def test_order_of_texts_and_images_does_not_matter_without_ties():
    sim, owner = torch.rand(50, 20, generator=seeded(5)), torch.randint(20, (50,), generator=seeded(6))
    texts, images = torch.randperm(50, generator=seeded(7)), torch.randperm(20, generator=seeded(8))
    assert E.recall_at_k(sim[texts][:, images], images.argsort()[owner[texts]]) == E.recall_at_k(sim, owner)


def test_nan_similarities_never_hit_not_even_when_k_covers_everything():
    sim = torch.eye(3)
    sim[1, 1] = math.nan
    assert E.recall_at_k(sim, torch.arange(3), (1, 10)) == {d: {1: pytest.approx(2 / 3), 10: pytest.approx(2 / 3)} for d in ("i2t", "t2i")}
    sim = torch.tensor([[math.nan], [0.5], [0.7]])           # image 0 owns a NaN text and a real one, which is second of three
    assert E.recall_at_k(sim, torch.tensor([0, 0, 0]), [1])["i2t"][1] == 1
    assert set(E.recall_at_k(torch.full((3, 3), math.nan), torch.arange(3))["i2t"].values()) == {0.0}


def test_an_image_without_text_is_left_out_of_i2t_but_competes_in_t2i():
    got = E.recall_at_k(torch.tensor([[.3, .9, .2], [.1, .2, .8]]), torch.tensor([0, 2]), [1])
    assert got == {"i2t": {1: 1}, "t2i": {1: 0.5}}           # images 0 and 2 find their texts; text 0 prefers image 1, which owns none


class Sizes(TorchDispatchMode):                              # the largest tensor with memory of its own that any operation returns
    largest = 0

    def __init__(self, given):
        super().__init__()
        self.given = given.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() != self.given:
                self.largest = max(self.largest, x.numel())
        return out


def test_nothing_as_large_as_the_similarities_is_ever_built():
    sim, owner = torch.zeros(5000, 2000), torch.arange(5000) % 2000
    with Sizes(sim) as sizes:
        E.recall_at_k(sim, owner)
    assert 0 < sizes.largest <= 2**22 < sim.numel()


# -- the others --

def test_golden_mean_per_class():
    pred, labels = torch.tensor([0, 0, 1, 1, 0, 2]), torch.tensor([0, 0, 0, 1, 1, 2])        # 11.3
    assert E.mean_per_class(pred, labels) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)


def test_a_class_absent_from_the_labels_does_not_count():
    assert E.mean_per_class(torch.tensor([7, 3, 9]), torch.tensor([7, 7, 3])) == pytest.approx((1 / 2 + 0) / 2)


def test_golden_knn_the_nearest_outvotes_the_majority():
    train, labels = torch.tensor([[1, 0], [.8, .6], [0, 1], [-1, 0]]), torch.tensor([0, 1, 1, 0])
    assert E.knn(train, labels, torch.tensor([[1, .2]]), k=3).tolist() == [0]                # 11.4
    assert E.knn(5 * train, labels, torch.tensor([[1, .2]]) / 9, k=3).tolist() == [0]        # lengths are taken out


def test_knn_agrees_with_a_loop():
    train, test = torch.randn(80, 4, generator=seeded(0)).double(), torch.randn(60, 4, generator=seeded(1)).double()
    labels = torch.randint(5, (80,), generator=seeded(2))
    want = []
    for x in test:
        sim = [(x @ t / x.norm() / t.norm()).item() for t in train]
        votes = [0.0] * 5
        for i in best_first(sim)[:20]:
            votes[labels[i]] += math.exp(sim[i] / 0.07)
        want.append(max(range(5), key=votes.__getitem__))
    assert E.knn(train, labels, test).tolist() == want


def test_knn_takes_the_earlier_of_equal_neighbours():
    labels = torch.tensor([2, 0, 2, 2] + 96 * [1])
    assert E.knn(torch.ones(100, 1), labels, torch.ones(3, 1), k=4).tolist() == [2, 2, 2]
    assert E.knn(torch.eye(2).repeat(50, 1), labels, torch.eye(2), k=2).tolist() == [2, 0]   # even rows: 2, 2; odd rows: 0, 2, and 0 wins


def test_a_nan_feature_gets_no_label_and_gives_no_vote():
    train, labels = torch.tensor([[math.nan, 0], [0, 1], [1, 0]]), torch.tensor([0, 1, 2])
    assert E.knn(train, labels, torch.tensor([[0., 2], [math.nan, 1]]), k=3).tolist() == [1, -1]


def test_knn_refuses_more_neighbours_than_there_are():
    with pytest.raises(AssertionError, match="k = 20 neighbours out of 3"):
        E.knn(torch.eye(3), torch.arange(3), torch.eye(3))


def test_golden_prompt_ensemble():
    got = E.prompt_ensemble(torch.tensor([[[3., 0], [0, 1]], [[0, -2], [0, -7]]]))           # 11.1
    assert torch.allclose(got, torch.tensor([[0.70711, 0.70711], [0, -1]]), atol=1e-5)


# -- segmentation --

LABEL, GUESS = torch.tensor([[1, 1, 2, 0], [1, 3, 2, 2]]), torch.tensor([[1, 2, 2, 3], [1, 3, 3, 2]])      # formats 11.5


def test_golden_mean_iou_and_classes_that_are_nowhere_leave_the_mean():
    assert E.mean_iou(GUESS, LABEL, 4) == pytest.approx(5 / 9) == E.mean_iou(GUESS, LABEL, 151)
    assert E.mean_iou(GUESS - 1, LABEL - 1, 3, ignore=-1) == pytest.approx(5 / 9)            # 0 = a class, -1 = ignored


def loop_iou(pred, target, classes, ignore):
    pairs = [(p, t) for p, t in zip(pred.flatten().tolist(), target.flatten().tolist()) if t != ignore]
    found = []
    for c in (c for c in range(classes) if c != ignore):
        union = sum(p == c or t == c for p, t in pairs)
        found += [sum(p == t == c for p, t in pairs) / union] if union else []
    return sum(found) / len(found)


@pytest.mark.parametrize("ignore", [0, 3, 255])
def test_mean_iou_agrees_with_a_loop_over_pixels_and_sums_the_split_before_it_divides(ignore):
    target, pred = (torch.randint(6, (5, 7, 9), generator=seeded(s)) for s in (1, 2))
    want = loop_iou(pred, target, 8, ignore)
    assert E.mean_iou(pred, target, 8, ignore) == pytest.approx(want)
    maps = [list(x) for x in (pred, target)]
    assert E.mean_iou(*maps, 8, ignore) == pytest.approx(want)                               # images one by one
    assert want != pytest.approx(sum(E.mean_iou(p, t, 8, ignore) for p, t in zip(*maps)) / 5, abs=1e-4)


def test_perfect_maps_score_1_a_constant_one_the_mean_of_its_share_and_unlabelled_ones_nothing():
    target = torch.tensor([1, 1, 1, 2, 2, 0])
    assert E.mean_iou(target, target, 3) == 1 and E.mean_iou(torch.ones(6).long(), target, 3) == pytest.approx(3 / 5 / 2)
    assert E.mean_iou(target, torch.zeros(6).long(), 3) is None
    with pytest.raises(AssertionError, match="prediction 0 .. 3 is not in 0 .. 2"):
        E.mean_iou(GUESS.clamp(max=3) * (LABEL != 2), LABEL.clamp(max=2), 3)


# -- boxes --

def box(image, category, where, **more):
    return {"image_id": image, "category_id": category, "bbox": where, **more}


TRUTHS = [box(1, 1, [10, 10, 40, 40]), box(1, 3, [60, 60, 20, 20]), box(2, 1, [0, 0, 50, 50]), box(2, 1, [50, 50, 50, 50], iscrowd=1)]
FOUND = [box(1, 1, [12, 10, 40, 40], score=.9), box(1, 1, [60, 10, 20, 20], score=.6), box(1, 3, [60, 60, 20, 28], score=.8),
         box(2, 1, [0, 0, 50, 40], score=.7), box(2, 1, [60, 60, 20, 20], score=.5)]         # formats 11.6


def test_golden_average_precision():
    got = E.average_precision(FOUND, TRUTHS)
    assert (got["AP"], got["AP50"], got["AP75"]) == (pytest.approx(0.650495, abs=1e-6), 1, 0.5)
    assert got["L"] is None and got["S"] == 0.5              # class 3 alone is small, and 1 at five thresholds of ten


def iou_of(a, b, crowd):
    wide, tall = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return wide * tall / (a[2] * a[3] + (0 if crowd else b[2] * b[3] - wide * tall))


def slow_ap(found, truths, category, threshold, low=0, high=1e10):
    """One class, one threshold, one range of areas, as formats 9.7 tells it; None without a normal truth."""
    rows, normal = [], 0
    for image in sorted({x["image_id"] for x in found + truths if x["category_id"] == category}):
        mine = lambda xs: [x for x in xs if (x["image_id"], x["category_id"]) == (image, category)]
        real, used = [], set()
        for t in mine(truths):
            area = t.get("area", t["bbox"][2] * t["bbox"][3])
            real.append((t["bbox"], bool(t.get("iscrowd")), bool(t.get("iscrowd")) or not low <= area <= high))
        normal += sum(not ignored for _, _, ignored in real)
        for d in sorted(mine(found), key=lambda d: -d["score"])[:100]:
            choice = None
            for wanted in (False, True):
                fits = [(iou_of(d["bbox"], b, crowd), g) for g, (b, crowd, ignored) in enumerate(real) if ignored == wanted and (crowd or g not in used)]
                fits = [x for x in fits if x[0] >= min(threshold, 1 - 1e-10)]
                choice = max(fits)[1] if fits and choice is None else choice
            used.add(choice)
            void = real[choice][2] if choice is not None else not low <= d["bbox"][2] * d["bbox"][3] <= high
            rows.append((d["score"], choice is not None, void))
    if not normal:
        return None
    points, tp, fp = [], 0, 0
    for _, hit, void in sorted(rows, key=lambda r: -r[0]):
        tp, fp = tp + (hit and not void), fp + (not hit and not void)
        points.append((tp / normal, tp / max(1, tp + fp)))
    return sum(max([p for r, p in points if r >= level], default=0) for level in np.linspace(0, 1, 101)) / 101


def some_boxes(rng, n, tied):
    """Truths, and detections near them, in 4 images and 3 classes: sizes on both sides of the borders, crowds, mask areas, tied scores."""
    truths, found = [], []
    for _ in range(n):
        where, kind = [*rng.integers(0, 60, 2).tolist(), *rng.choice([8, 20, 32, 60, 96, 120], 2).tolist()], (int(rng.integers(4)), int(rng.integers(3)))
        more = {"iscrowd": 1} if rng.random() < 0.1 else {"area": 0.7 * where[2] * where[3]} if rng.random() < 0.3 else {}
        truths.append(box(*kind, where, **more))
        for _ in range(rng.integers(0, 4)):
            shifted = [w + float(rng.integers(-3, 4)) for w in where[:2]] + [w * float(rng.choice([1, 0.9, 1.2])) for w in where[2:]]
            found.append(box(*kind, shifted, score=float(rng.integers(4) if tied else rng.random())))
    return found, truths


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_agrees_with_slow_loops_on_random_boxes(seed):
    found, truths = some_boxes(np.random.default_rng(seed), 25, seed % 2)
    got, mean = E.average_precision(found, truths), lambda xs: pytest.approx(sum(xs) / len(xs)) if xs else None
    for name, low, high, thresholds in (("AP", 0, 1e10, E.IOUS), ("AP50", 0, 1e10, [0.5]), ("AP75", 0, 1e10, [0.75]), ("S", 0, 32**2, E.IOUS),
                                        ("M", 32**2, 96**2, E.IOUS), ("L", 96**2, 1e10, E.IOUS)):
        values = [slow_ap(found, truths, c, t, low, high) for c in range(3) for t in thresholds]
        assert got[name] == mean([v for v in values if v is not None]), name


def test_perfect_boxes_score_1_none_0_and_a_constant_detector_its_precision():
    _, truths = some_boxes(np.random.default_rng(9), 40, False)
    truths = [{**t, "iscrowd": 0} for t in truths]
    perfect = [{**t, "score": 1.0} for t in truths]
    assert E.average_precision(perfect, truths)["AP"] == pytest.approx(1) and E.average_precision([], truths)["AP"] == 0
    assert set(E.average_precision(perfect, []).values()) == {None}
    everywhere = [box(i, c, [0, 0, 10, 10], score=0.5) for i in range(4) for c in range(2)]
    got = E.average_precision(everywhere, [box(3, 0, [0, 0, 10, 10]), box(0, 1, [0, 0, 10, 10])])
    assert got["AP"] == pytest.approx((1 / 4 + 1) / 2)       # of tied scores the earlier image stands first, as pycocotools sorts


def test_only_the_best_100_detections_of_an_image_count():
    truth, wrong = [box(0, 0, [0, 0, 10, 10])], [box(0, 0, [50, 50, 9, 9], score=1.0)]
    right = [box(0, 0, [0, 0, 10, 10], score=0.5)]
    assert E.average_precision(99 * wrong + right, truth)["AP"] == pytest.approx(1 / 100) and E.average_precision(100 * wrong + right, truth)["AP"] == 0


# -- questions --

def test_golden_answers():
    assert [E.vqa_accuracy("x", ["x"] * n + ["y"] * (10 - n)) for n in range(11)] == pytest.approx([0, .3, .6, .9] + 7 * [1])       # 11.7
    for raw, plain in (("The dog.", "dog"), ("1,000", "1000"), ("a-b", "b"), ("Yes, it is!", "yes it is"), ("U.S.A.", "usa"), ("it's 5.5 m.", "it's 5.5 m"),
                       ("dont", "don't"), ("two", "2"), ("none", "0"), ("couldn'tve", "couldn't've"), ("somebody'd", "somebodyd"), ("lets", "lets")):
        assert E.plain_answer(raw) == plain
        assert E.vqa_accuracy(raw, [plain] * 9 + ["other"]) == 1 and E.vqa_accuracy(raw, [raw] * 9 + ["other"]) == 1


def test_where_all_humans_agree_answers_are_compared_as_they_stand():
    assert E.vqa_accuracy("The dog", ["dog"] * 10) == 0 and E.vqa_accuracy("\tdog\n", ["dog "] * 10) == 1
    assert E.vqa_accuracy("dog", ["dog"]) == 1 and E.vqa_accuracy("cat", ["dog"]) == 0       # one answer: ours


@pytest.mark.parametrize("seed", range(5))
def test_vqa_accuracy_is_the_mean_over_leaving_each_human_out(seed):
    rng = np.random.default_rng(seed)
    answers = rng.choice(["red", "blue", "two", "the cat"], 10).tolist()
    for answer in ("red", "Red.", "2", "cat", "dog"):
        others = [answers[:i] + answers[i + 1:] for i in range(10)]
        want = sum(min(1, sum(E.plain_answer(o) == E.plain_answer(answer) for o in left) / 3) for left in others) / 10
        assert E.vqa_accuracy(answer, answers) == pytest.approx(want)


# -- pictures --

def count(picture, colour):
    return (np.asarray(picture.convert("RGB")) == ImageColor.getrgb(colour)).all(-1).sum()


def noise(height, width, seed=0):
    return torch.randint(256, (3, height, width), generator=seeded(seed)).byte()


def test_sheet_frames_the_right_cell_only(tmp_path):
    cells = [(torch.zeros(3, 28, 28).byte(), "black", "green"), (noise(40, 30).permute(1, 2, 0).numpy(), "", None), (None, "query", None)]
    E.sheet(cells, tmp_path / "s.png", columns=3, title="three cells", size=112)
    page = Image.open(tmp_path / "s.png").convert("RGB")
    assert page.size == (3 * 126 + 14, 44 + 112 + 6 + 15 + 14)                               # one line of caption
    assert count(page.crop((0, 0, 133, page.height)), "green") == 120**2 - 112**2            # 28 x 4 fills the cell, 4 of frame around it
    assert count(page, "green") == 120**2 - 112**2
    assert count(page.crop((14, 44, 126, 156)), "black") == 112**2


def test_a_tiny_picture_grows_by_a_whole_number_and_a_large_one_keeps_its_aspect():
    assert E.fit(noise(48, 24), 112).size == (48, 96) and E.fit(noise(300, 600), 112).size == (112, 56)
    assert E.fit(noise(2, 4000), 112).size == (112, 1)


def test_captions_fit_their_lines_and_show_where_they_were_cut():
    lines = E.wrap("a small dog and a very large cat sleep on one blue sofa " * 3, E.FONT, 112, 4)
    assert len(lines) == 4 and lines[-1].endswith("…") and all(E.FONT.getlength(line) <= 112 for line in lines)
    assert E.wrap("a dog", E.FONT, 112, 4) == ["a dog"] and E.wrap(" \n", E.FONT, 112, 4) == []
    assert "".join(E.wrap("x" * 40, E.FONT, 60, 99)) == "x" * 40                             # no spaces to break at


@pytest.mark.parametrize("text", [STRANGE, "w" * 10**6, ""])
def test_no_caption_crashes_a_picture(tmp_path, text):
    E.sheet([(noise(9, 9), text, "red"), (None, text, "red")], tmp_path / "s.png", 2, title=text)
    E.matrix(torch.zeros(2, 2), tmp_path / "m.png", [noise(9, 9)] * 2, [text] * 2, title=text)
    E.overlay(noise(30, 30), [{"x": 1, "y": 1, "w": 5, "h": 5, "text": text}], tmp_path / "o.png")
    assert all(Image.open(tmp_path / name).width > 100 for name in ("s.png", "m.png", "o.png"))


def test_matrix_paints_low_and_high_values_and_nan_apart(tmp_path):
    values = torch.eye(16)
    values[0, 15] = math.nan
    E.matrix(values, tmp_path / "m.png", [noise(32, 32, i) for i in range(16)], [f"caption {i}" for i in range(16)], "eye")
    page = Image.open(tmp_path / "m.png")
    assert page.size == (250 + 16 * 44 + 90, 94 + 16 * 44 + 14)
    at = lambda row, column: page.getpixel((250 + column * 44 + 22, 94 + row * 44 + 22))
    assert at(3, 3) == (253, 231, 37) and at(3, 4) == (68, 1, 84) and at(0, 15) == (200, 200, 200)


def write_log(path, records, tail=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path


def test_curves_survives_nulls_gaps_nan_and_a_cut_last_line(tmp_path):
    records = [{"step": s, "loss": 5 / (s + 1), "lr": 1e-3 * 0.9**s, "temperature": None if s % 2 else 0.07} for s in range(100)]
    records[7]["loss"], records[8]["loss"] = math.nan, math.inf
    del records[9]["loss"]
    log = write_log(tmp_path / "log.jsonl", records, '{"step": 100, "lo')
    E.curves(log, tmp_path / "c.png", ["loss", "lr", "temperature", "absent", "loss"], "run")
    page = Image.open(tmp_path / "c.png")
    assert page.size == (960, 40 + 3 * 250) and count(page, E.BLUE) > 500


def test_curves_refuses_a_log_broken_in_the_middle(tmp_path):
    with pytest.raises(AssertionError, match="line 1: not JSON"):
        E.curves(write_log(tmp_path / "log.jsonl", [], '{"st\n{"step": 1, "loss": 2}\n'), tmp_path / "c.png", ["loss"])


@pytest.mark.parametrize("values", [[], [0], [3.5], [2, 2, 2], [-1e9, 1e-9]])
def test_curves_draws_any_short_log(tmp_path, values):
    log = write_log(tmp_path / "log.jsonl", [{"step": s, "loss": v} for s, v in enumerate(values)])
    E.curves(log, tmp_path / "c.png", ["loss"])
    assert Image.open(tmp_path / "c.png").size == (480, 256)


def test_ticks_are_round_few_and_inside():
    assert E.ticks(0, 599) == [0, 100, 200, 300, 400, 500] and E.ticks(0.3, 120, log=True) == [1, 10, 100]
    for low, high in [(0, 1), (-3.2, 17), (0.0369, 0.0701), (1.1e-9, 2.9e-9), (1e6, 1e6 + 1)]:
        assert 3 <= len(E.ticks(low, high)) <= 8 and low <= min(E.ticks(low, high)) and max(E.ticks(low, high)) <= high


def test_overlay_of_boxes_colours_their_outlines_and_scales_small_images():
    picture = E.overlay(Image.new("RGB", (50, 40), "white"), [{"x": 10, "y": 20, "w": 5, "h": 8, "text": ""}])
    assert picture.size == (200, 160)                        # 4 x
    red = E.class_colour(0)
    assert [picture.getpixel(p) == red for p in ((40, 80), (59, 111), (50, 81), (50, 95), (39, 80), (60, 111))] == 3 * [True] + 3 * [False]


def test_overlay_of_a_mask_leaves_class_0_clear_and_colours_the_rest():
    mask = torch.zeros(300, 300).long()
    mask[100:, :] = 5
    picture = E.overlay(Image.new("RGB", (300, 300), "white"), mask)
    want = tuple(round(0.45 * 255 + 0.55 * c) for c in E.class_colour(5))
    assert picture.getpixel((9, 99)) == (255, 255, 255) and picture.getpixel((9, 100)) == want
    with pytest.raises(AssertionError, match="mask"):
        E.overlay(Image.new("RGB", (300, 200)), mask)


def test_overlay_of_a_map_is_brightest_where_the_map_is_highest(tmp_path):
    heat = torch.zeros(7, 7)
    heat[2, 5] = 3
    grey = E.overlay(Image.new("RGB", (350, 350), "grey"), heat, tmp_path / "o.png").convert("L")
    assert max((grey.getpixel((x, y)), x, y) for x in range(0, 350, 5) for y in range(0, 350, 5))[1:] == pytest.approx((275, 125), abs=5)
    assert Image.open(tmp_path / "o.png").size == (350, 350)
