"""Metrics against values worked by hand, published definitions and slow loops."""
import itertools
import math

import numpy as np
import pytest
import torch

import eval as evaluation
from eval import accuracy, average_precision, bleu, cider, knn, mean_iou, recall_at_k, vqa_accuracy

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = math.nan


def generator(seed):
    return torch.Generator().manual_seed(seed)


def coarse_scores(*shape, seed, levels=4):
    """Few distinct scores, so that most comparisons are ties."""
    return torch.randint(levels, shape, generator=generator(seed)) / levels


def best_first(row):
    """The tie rule: sorted() is stable, so of equal scores the earlier stays first."""
    return sorted(range(len(row)), key=lambda i: -row[i])


# ---- accuracy ----

def test_accuracy_agrees_with_sorting_every_row_when_most_scores_tie():
    scores = coarse_scores(200, 7, seed=0)
    labels = torch.randint(7, (200,), generator=generator(1)).tolist()
    for k in (1, 5, 7):
        right = [y in best_first(row)[:k] for row, y in zip(scores.tolist(), labels)]
        assert accuracy(scores, torch.tensor(labels), k) == pytest.approx(sum(right) / 200)
    assert accuracy(scores, torch.tensor(labels), k=8) is None  # of 7 classes


def test_a_nan_is_never_right_and_beats_no_other():
    scores = torch.tensor([[NAN, 0, 1], [NAN, NAN, NAN], [NAN, 2, 1]])
    labels = torch.tensor([0, 0, 1])
    for k in (1, 3):
        assert accuracy(scores, labels, k) == pytest.approx(1 / 3)  # argmax would say NaN
    two_texts = torch.tensor([[NAN], [0.5]])  # of one image: the other text still counts
    recall = recall_at_k(two_texts, torch.tensor([0, 0]), [1])
    assert recall == {"i2t": {1: 1}, "t2i": {1: 1 / 2}}
    train = torch.tensor([[NAN, 0], [0, 1], [1, 0]])
    test = torch.tensor([[0., 2], [NAN, 1]])
    assert knn(train, torch.tensor([0, 1, 2]), test, k=3).tolist() == [1, -1]


def test_mean_per_class_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 3])
    predicted = torch.tensor([0, 0, 1, 1, 2, 3])
    expected = (2 / 3 + 1 / 2 + 1) / 3  # no label has class 2: it does not count
    assert evaluation.mean_per_class(predicted, labels) == pytest.approx(expected)


# ---- retrieval ----

def recall_by_sorting(sim, owner, k):
    owner = owner.tolist()
    t2i = [owner[t] in best_first(row)[:k] for t, row in enumerate(sim.tolist())]
    i2t = []
    for image, column in enumerate(sim.T.tolist()):
        if image in owner:
            i2t.append(any(owner[t] == image for t in best_first(column)[:k]))
    return sum(i2t) / len(i2t), sum(t2i) / len(t2i)


def test_recall_and_its_chance_by_hand():
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    sim = torch.tensor([[.9, .1, .3], [.2, .8, .1], [.1, .7, .6], [.5, .4, .6], [.3, .9, .2],
                        [.2, .1, .8], [.6, .5, .4]])
    assert recall_at_k(sim, owner, (1, 2)) == {
        "i2t": {1: 1, 2: 1}, "t2i": pytest.approx({1: 4 / 7, 2: 5 / 7})}
    own = (2, 3, 2)  # texts of each image
    i2t = sum(1 - (6 / 7)**n for n in own) / 3
    assert evaluation.chance_recall(owner, [1]) == {"i2t": pytest.approx({1: i2t}),
                                                    "t2i": {1: 1 / 3}}


@pytest.mark.parametrize("seed", range(2))
def test_recall_agrees_with_sorting_when_texts_are_many_uneven_and_tied(seed):
    sim = coarse_scores(60, 25, seed=seed, levels=(3, 50)[seed % 2])
    owner = torch.randint(25, (60,), generator=generator(seed + 100))
    assert len(owner.unique()) < 25  # some images own no text, others several
    recall = recall_at_k(sim, owner)
    for k in (1, 5, 10):
        expected = recall_by_sorting(sim, owner, k)
        assert (recall["i2t"][k], recall["t2i"][k]) == pytest.approx(expected)


def test_a_constant_model_finds_the_earliest_whatever_the_chunks():
    recall = recall_at_k(torch.zeros(5000, 2000), torch.arange(5000) % 2000, [5])
    # the first five images, by their three texts each; the first five texts likewise
    assert recall == {"i2t": {5: 5 / 2000}, "t2i": {5: 3 * 5 / 5000}}


# ---- nearest neighbors and prompts ----

def test_knn_agrees_with_a_loop():
    train = torch.randn(80, 4, generator=generator(0)).double()
    test = torch.randn(60, 4, generator=generator(1)).double()
    labels = torch.randint(5, (80,), generator=generator(2))
    expected = []
    for x in test:
        sim = [(x @ t / x.norm() / t.norm()).item() for t in train]
        votes = [0.0] * 5
        for i in best_first(sim)[:20]:
            votes[labels[i]] += math.exp(sim[i] / 0.07)
        expected.append(votes.index(max(votes)))
    assert knn(train, labels, test).tolist() == expected


def test_knn_takes_the_earlier_of_equal_neighbors():
    labels = torch.tensor([2, 0, 2, 2] + 96 * [1])
    assert knn(torch.ones(100, 1), labels, torch.ones(1, 1), k=4).tolist() == [2]
    # even rows are neighbors of the first query: 2, 2; odd ones of the second: 0, 2, so 0 wins
    assert knn(torch.eye(2).repeat(50, 1), labels, torch.eye(2), k=2).tolist() == [2, 0]


def test_a_long_prompt_vector_weighs_no_more_than_a_short_one():
    embeds = torch.tensor([[[3., 0], [0, 1]], [[0, -2], [0, -7]]])
    expected = torch.tensor([[0.70711, 0.70711], [0, -1]])
    torch.testing.assert_close(evaluation.prompt_ensemble(embeds), expected, atol=1e-5, rtol=0)


# ---- segmentation ----

def test_mean_iou_by_hand_and_classes_that_are_nowhere_leave_the_mean():
    target = torch.tensor([[1, 1, 2, 0], [1, 3, 2, 2]])
    predicted = torch.tensor([[1, 2, 2, 3], [1, 3, 3, 2]])
    assert mean_iou(predicted, target, 4) == pytest.approx(5 / 9)
    assert mean_iou(predicted, target, 151) == pytest.approx(5 / 9)
    assert mean_iou(predicted, 0 * target, 4) is None  # nothing is labelled
    with pytest.raises(ValueError, match="prediction 1 .. 3 is not in 0 .. 2"):
        mean_iou(predicted, target.clamp(max=2), 3)


def test_mean_iou_sums_the_whole_split_before_it_divides():
    target = torch.randint(6, (5, 7, 9), generator=generator(1))
    predicted = torch.randint(6, (5, 7, 9), generator=generator(2))
    counted = target != 3  # to be ignored
    values = []
    for c in (0, 1, 2, 4, 5):
        both = (predicted == c) & (target == c) & counted
        either = ((predicted == c) | (target == c)) & counted
        values.append(both.sum().item() / either.sum().item())
    assert mean_iou(list(predicted), list(target), 8, ignore=3) == pytest.approx(np.mean(values))


# ---- boxes ----

def box(image, category, where, **more):
    return {"image_id": image, "category_id": category, "bbox": where, **more}


def test_average_precision_equals_pycocotools_on_the_published_example():
    truths = [
        box(1, 1, [10, 10, 40, 40]), box(1, 3, [60, 60, 20, 20]), box(2, 1, [0, 0, 50, 50]),
        box(2, 1, [50, 50, 50, 50], iscrowd=1),
    ]
    detections = [
        box(1, 1, [12, 10, 40, 40], score=.9), box(1, 1, [60, 10, 20, 20], score=.6),
        box(1, 3, [60, 60, 20, 28], score=.8), box(2, 1, [0, 0, 50, 40], score=.7),
        box(2, 1, [60, 60, 20, 20], score=.5),
    ]
    result = average_precision(detections, truths)
    assert result == {"AP": pytest.approx(0.650495, abs=1e-6), "AP50": 1, "AP75": 0.5}


def overlap(detection, truth):
    """Intersection over union; of a crowd, over the detection's area."""
    x, y, w, h = detection["bbox"]
    left, top, width, height = truth["bbox"]
    intersection = (max(0, min(x + w, left + width) - max(x, left))
                    * max(0, min(y + h, top + height) - max(y, top)))
    if truth["iscrowd"]:
        return intersection / (w * h)
    return intersection / (w * h + width * height - intersection)


def slow_average_precision(detections, truths, category, threshold):
    """One class at one threshold, as COCO counts it; None without a truth."""
    of_class = [t for t in truths if t["category_id"] == category]
    n_truths = sum(not t["iscrowd"] for t in of_class)
    if n_truths == 0:
        return None
    free = [t for t in of_class if not t["iscrowd"]]
    points = []  # recall, precision
    tp = 0
    fp = 0
    for detection in sorted(detections, key=lambda d: (-d["score"], d["image_id"])):
        if detection["category_id"] != category:
            continue
        image = detection["image_id"]
        fits = [t for t in of_class
                if t["image_id"] == image and overlap(detection, t) >= threshold]
        candidates = [t for t in fits if any(t is other for other in free)]
        if candidates:
            best = max(candidates, key=lambda t: overlap(detection, t))
            free = [t for t in free if t is not best]
            tp += 1
        elif not any(t["iscrowd"] for t in fits):
            fp += 1
        points.append((tp / n_truths, tp / max(1, tp + fp)))
    levels = np.linspace(0, 1, 101)
    return np.mean([max([p for r, p in points if r >= level], default=0) for level in levels])


def random_boxes(rng, n, tied):
    """Truths, some of them crowds, and detections near them, in 4 images and 3 classes."""
    truths = []
    detections = []
    for _ in range(n):
        corner = rng.integers(0, 60, 2).tolist()
        sides = rng.choice([8, 20, 32, 60], 2).tolist()
        kind = (int(rng.integers(4)), int(rng.integers(3)))
        truths.append(box(*kind, corner + sides, iscrowd=int(rng.random() < 0.1)))
        for _ in range(rng.integers(0, 4)):
            moved = [c + float(rng.integers(-3, 4)) for c in corner]
            scaled = [side * float(rng.choice([1, 0.9, 1.2])) for side in sides]
            score = float(rng.integers(4) if tied else rng.random())
            detections.append(box(*kind, moved + scaled, score=score))
    return detections, truths


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_agrees_with_slow_loops_on_random_boxes(seed):
    detections, truths = random_boxes(np.random.default_rng(seed), 25, tied=seed % 2)
    result = average_precision(detections, truths)
    thresholds = {"AP": np.linspace(0.5, 0.95, 10), "AP50": [0.5], "AP75": [0.75]}
    for name, values in thresholds.items():
        pairs = itertools.product(range(3), values)
        slow = [slow_average_precision(detections, truths, c, t) for c, t in pairs]
        assert result[name] == pytest.approx(np.mean([v for v in slow if v is not None])), name


def test_of_equal_overlaps_a_detection_takes_the_last_truth():
    truths = [box(0, 0, [0, 0, 10, 10]), box(0, 0, [4, 0, 10, 10])]
    between = box(0, 0, [2, 0, 10, 10], score=0.9)  # IoU 2/3 with both
    first = box(0, 0, [0, 0, 10, 10], score=0.8)  # left for it, as in pycocotools
    assert average_precision([between, first], truths)["AP50"] == 1


def test_only_the_best_100_detections_of_an_image_count():
    truth = [box(0, 0, [0, 0, 10, 10])]
    wrong = [box(0, 0, [50, 50, 9, 9], score=1.0)]
    right = [box(0, 0, [0, 0, 10, 10], score=0.5)]
    assert average_precision(99 * wrong + right, truth)["AP"] == pytest.approx(1 / 100)
    assert average_precision(100 * wrong + right, truth)["AP"] == 0


def test_classes_are_grouped_by_their_training_images():
    truths = [box(0, c, [0, 0, 10, 10]) for c in range(4)]
    detections = [box(0, c, [0, 0, 10, 10], score=1.0) for c in (0, 2)]
    result = average_precision(detections, truths, {0: 10, 1: 11, 2: 100, 3: 101})
    groups = [result[f"AP_{name}"] for name in ("rare", "common", "frequent")]
    assert groups == [1, 0.5, 0]  # nothing found is 0
    result = average_precision(detections, truths[:1], {})
    assert result["AP"] == 1 and result["AP_common"] is None  # class 2 has nothing to find


# ---- questions ----

def test_vqa_accuracy_by_hand():
    scores = [vqa_accuracy("x", ["x"] * n + ["y"] * (10 - n)) for n in range(11)]
    assert scores == pytest.approx([0, .3, .6, .9] + 7 * [1])
    # where all humans agree, answers are compared as they are
    assert vqa_accuracy("The dog", ["dog"] * 10) == 0
    assert vqa_accuracy("\tdog\n", ["dog "] * 10) == 1
    assert vqa_accuracy("dog", ["dog"]) == 1  # one human alone


@pytest.mark.parametrize("raw,plain", [
    ("The dog.", "dog"), ("1,000", "1000"), ("a-b", "b"), ("Yes, it is!", "yes it is"),
    ("U.S.A.", "usa"), ("it's 5.5 m.", "it's 5.5 m"), ("dont", "don't"), ("two", "2"),
    ("none", "0"), ("couldn'tve", "couldn't've"), ("somebody'd", "somebodyd"), ("lets", "lets"),
])
def test_answers_are_normalized_as_the_official_code_does(raw, plain):
    assert evaluation.normalize_answer(raw) == plain
    assert vqa_accuracy(raw, [plain] + 9 * [f"the {raw}"]) == 1


# ---- captions against references ----

REFERENCES = [
    ["a cat sits on a mat", "the cat is on the mat"],
    ["two dogs run in the park", "dogs running through a park"],
    ["a man rides a red bike", "a person on a bike"],
]
CAPTIONS = ["a cat is on a mat", "two dogs running in a park", "a man on a bike"]


def test_bleu_and_cider_equal_pycocoevalcap_on_the_published_example():
    assert bleu(CAPTIONS, REFERENCES) == pytest.approx([1, 0.886405, 0.598408, 7.2e-5], abs=1e-6)
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(3.043195, abs=1e-6)
    for i, expected in enumerate((3.825536, 2.614917, 2.689131)):
        alone = [""] * 3  # the others score nothing, but set the document frequencies
        alone[i] = CAPTIONS[i]
        assert 3 * cider(alone, REFERENCES) == pytest.approx(expected, abs=1e-6)


def test_bleu_by_hand():
    # a word counts as often as in the reference that has it most (Papineni et al., example 2)
    references = ["The cat is on the mat.", "There is a cat on the mat."]
    assert bleu(["the the the the the the the"], [references])[0] == pytest.approx(2 / 7)
    # of lengths 1 and 6 the second is closer to 4; of lengths 3 and 5 the shorter counts
    brevity = math.exp(1 - 6 / 4)
    assert bleu(["A b, (c) D."], [["a", "a b c d e f"]])[0] == pytest.approx(brevity)
    assert bleu(["a b c d"], [["a b c d e", "b c d"]])[0] == pytest.approx(1)
    assert bleu([""], [["a b"]]) == [0] * 4


def test_cider_by_hand():
    assert cider(["a b c", "d e f"], [["a b c"], ["d e f"]]) == pytest.approx(7.5)
    assert cider(CAPTIONS[:1], REFERENCES[:1]) == 0  # one image: no n-gram is informative
    # counts (2, 1) of a, b against (1, 1), and of a a, a b against a b; one word too long
    penalty = math.exp(-1 / 72)
    unigrams = penalty * (1 + 1) / math.sqrt(5 * 2)  # of two a's one counts
    bigrams = penalty * 1 / math.sqrt(2 * 1)
    expected = 10 * ((unigrams + 1) / 2 + bigrams / 2) / 4  # the second image: 1 and 0
    assert cider(["a a b", "c"], [["a b"], ["c"]]) == pytest.approx(expected)
