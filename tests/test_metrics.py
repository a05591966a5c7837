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

@pytest.mark.parametrize("k", [1, 5])
def test_accuracy_agrees_with_sorting_every_row_when_most_scores_tie(k):
    scores = coarse_scores(200, 7, seed=0)
    labels = torch.randint(7, (200,), generator=generator(1))
    right = [label in best_first(row)[:k] for row, label in zip(scores.tolist(), labels.tolist())]
    assert accuracy(scores, labels, k) == pytest.approx(sum(right) / 200)


def test_top_5_of_4_classes_is_undefined_and_of_5_is_not():
    assert accuracy(torch.rand(3, 4), torch.arange(3), k=5) is None
    assert accuracy(torch.rand(3, 5), torch.arange(3), k=5) == 1


def test_a_nan_score_is_never_right_and_beats_no_other():
    scores = torch.tensor([[NAN, 0, 1], [NAN, NAN, NAN], [NAN, 2, 1]])
    labels = torch.tensor([0, 0, 1])
    assert accuracy(scores, labels) == pytest.approx(1 / 3)  # the last row: argmax would say NaN
    assert accuracy(scores, labels, k=3) == pytest.approx(1 / 3)
    assert accuracy(torch.full((3, 3), -math.inf), torch.arange(3)) == pytest.approx(1 / 3)


def test_mean_per_class_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 2])
    expected = (2 / 3 + 1 / 2 + 1) / 3
    assert evaluation.mean_per_class(predicted, labels) == pytest.approx(expected)
    absent = evaluation.mean_per_class(torch.tensor([7, 3, 9]), torch.tensor([7, 7, 3]))
    assert absent == pytest.approx((1 / 2 + 0) / 2)  # classes that no label has do not count


# ---- retrieval ----

OWNER = torch.tensor([0, 0, 1, 1, 1, 2, 2])
SIM = torch.tensor([[.9, .1, .3], [.2, .8, .1], [.1, .7, .6], [.5, .4, .6], [.3, .9, .2],
                    [.2, .1, .8], [.6, .5, .4]])


def recall_by_sorting(sim, owner, k):
    owner = owner.tolist()
    t2i = [owner[t] in best_first(row)[:k] for t, row in enumerate(sim.tolist())]
    i2t = []
    for image, column in enumerate(sim.T.tolist()):
        if image in owner:
            i2t.append(any(owner[t] == image for t in best_first(column)[:k]))
    return sum(i2t) / len(i2t), sum(t2i) / len(t2i)


def test_recall_by_hand():
    recall = recall_at_k(SIM, OWNER, (1, 2))
    assert recall["i2t"] == {1: 1, 2: 1}
    assert recall["t2i"] == pytest.approx({1: 4 / 7, 2: 5 / 7})


def test_random_scores_find_one_of_the_own_texts_by_chance():
    own = (2, 3, 2)  # texts of each image
    expected = sum(1 - (6 / 7)**n for n in own) / 3
    assert evaluation.chance_recall(OWNER, [1]) == {
        "i2t": pytest.approx({1: expected}), "t2i": {1: 1 / 3}}


@pytest.mark.parametrize("seed", range(2))
def test_recall_agrees_with_sorting_when_texts_are_many_uneven_and_tied(seed):
    sim = coarse_scores(60, 25, seed=seed, levels=(3, 50)[seed % 2])
    owner = torch.randint(25, (60,), generator=generator(seed + 100))
    assert len(owner.unique()) < 25  # some images own no text, others several
    recall = recall_at_k(sim, owner)
    for k in (1, 5, 10):
        expected = recall_by_sorting(sim, owner, k)
        assert (recall["i2t"][k], recall["t2i"][k]) == pytest.approx(expected)


def test_nan_similarities_are_never_found_not_even_when_k_covers_everything():
    sim = torch.eye(3)
    sim[1, 1] = NAN
    recall = recall_at_k(sim, torch.arange(3), (1, 10))
    assert recall["i2t"] == recall["t2i"] == pytest.approx({1: 2 / 3, 10: 2 / 3})
    two_texts = torch.tensor([[NAN], [0.5]])  # of one image: the other text still counts
    assert recall_at_k(two_texts, torch.tensor([0, 0]), [1])["i2t"][1] == 1


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
    assert knn(torch.ones(100, 1), labels, torch.ones(3, 1), k=4).tolist() == [2, 2, 2]
    # even rows are neighbors of the first query: 2, 2; odd ones of the second: 0, 2, so 0 wins
    assert knn(torch.eye(2).repeat(50, 1), labels, torch.eye(2), k=2).tolist() == [2, 0]


def test_a_nan_feature_gets_no_label_and_gives_no_vote():
    train = torch.tensor([[NAN, 0], [0, 1], [1, 0]])
    test = torch.tensor([[0., 2], [NAN, 1]])
    assert knn(train, torch.tensor([0, 1, 2]), test, k=3).tolist() == [1, -1]


def test_a_long_prompt_vector_weighs_no_more_than_a_short_one():
    embeds = torch.tensor([[[3., 0], [0, 1]], [[0, -2], [0, -7]]])
    expected = torch.tensor([[0.70711, 0.70711], [0, -1]])
    torch.testing.assert_close(evaluation.prompt_ensemble(embeds), expected, atol=1e-5, rtol=0)


# ---- segmentation ----

LABEL = torch.tensor([[1, 1, 2, 0], [1, 3, 2, 2]])
GUESS = torch.tensor([[1, 2, 2, 3], [1, 3, 3, 2]])


def test_mean_iou_by_hand_and_classes_that_are_nowhere_leave_the_mean():
    assert mean_iou(GUESS, LABEL, 4) == pytest.approx(5 / 9)
    assert mean_iou(GUESS, LABEL, 151) == pytest.approx(5 / 9)
    assert mean_iou(GUESS, 0 * LABEL, 4) is None  # nothing is labelled
    with pytest.raises(ValueError, match="prediction 1 .. 3 is not in 0 .. 2"):
        mean_iou(GUESS, LABEL.clamp(max=2), 3)


def iou_by_pixels(predicted, target, classes, ignore):
    pairs = list(zip(predicted.flatten().tolist(), target.flatten().tolist()))
    pairs = [(p, t) for p, t in pairs if t != ignore]
    values = []
    for c in range(classes):
        union = sum(p == c or t == c for p, t in pairs)
        if union and c != ignore:
            values.append(sum(p == t == c for p, t in pairs) / union)
    return sum(values) / len(values)


@pytest.mark.parametrize("ignore", [0, 3])
def test_mean_iou_sums_the_whole_split_before_it_divides(ignore):
    target = torch.randint(6, (5, 7, 9), generator=generator(1))
    predicted = torch.randint(6, (5, 7, 9), generator=generator(2))
    expected = iou_by_pixels(predicted, target, 8, ignore)
    assert mean_iou(list(predicted), list(target), 8, ignore) == pytest.approx(expected)
    alone = [mean_iou(p, t, 8, ignore) for p, t in zip(predicted, target)]
    assert expected != pytest.approx(np.mean(alone), abs=1e-4)


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


def iou_by_hand(a, b, crowd):
    sides = []
    for i in (0, 1):
        sides.append(max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])))
    intersection = sides[0] * sides[1]
    return intersection / (a[2] * a[3] + (0 if crowd else b[2] * b[3] - intersection))


def match_by_hand(detection, truths, used, threshold):
    """Index of the truth that a detection takes (COCO's rules), or None."""
    for wanted_crowd in (0, 1):
        best = None
        for i, truth in enumerate(truths):
            crowd = truth.get("iscrowd", 0)
            if crowd != wanted_crowd or (i in used and not crowd):
                continue
            iou = iou_by_hand(detection["bbox"], truth["bbox"], crowd)
            if iou >= threshold and (best is None or iou >= best[0]):
                best = (iou, i)
        if best is not None:
            return best[1]
    return None


def slow_average_precision(detections, truths, category, threshold):
    """One class at one threshold, as formats.md tells it; None without a truth."""
    matches = []  # score, "tp" or "fp"
    n_truths = 0
    for image in range(4):
        def of_image(boxes):
            return [b for b in boxes if (b["image_id"], b["category_id"]) == (image, category)]

        real = of_image(truths)
        n_truths += sum(not truth.get("iscrowd") for truth in real)
        used = set()
        for detection in sorted(of_image(detections), key=lambda d: -d["score"])[:100]:
            match = match_by_hand(detection, real, used, threshold)
            used.add(match)
            if match is None:
                matches.append((detection["score"], "fp"))
            elif not real[match].get("iscrowd"):
                matches.append((detection["score"], "tp"))
    if n_truths == 0:
        return None
    points = []
    tp = 0
    for n, (_, kind) in enumerate(sorted(matches, key=lambda m: -m[0]), start=1):
        tp += kind == "tp"
        points.append((tp / n_truths, tp / n))
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


def test_nothing_found_is_0_and_nothing_to_find_is_none():
    truth = [box(0, 0, [0, 0, 10, 10])]
    assert average_precision([], truth)["AP"] == 0
    assert average_precision([{**truth[0], "score": 1.0}], [])["AP"] is None


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
    assert groups == [1, 0.5, 0]
    assert average_precision(detections, truths, {})["AP_common"] is None


# ---- questions ----

def test_agreeing_humans_give_0_3_6_9_tenths_and_then_all():
    scores = [vqa_accuracy("x", ["x"] * n + ["y"] * (10 - n)) for n in range(11)]
    assert scores == pytest.approx([0, .3, .6, .9] + 7 * [1])


@pytest.mark.parametrize("raw,plain", [
    ("The dog.", "dog"), ("1,000", "1000"), ("a-b", "b"), ("Yes, it is!", "yes it is"),
    ("U.S.A.", "usa"), ("it's 5.5 m.", "it's 5.5 m"), ("dont", "don't"), ("two", "2"),
    ("none", "0"), ("couldn'tve", "couldn't've"), ("somebody'd", "somebodyd"), ("lets", "lets"),
])
def test_answers_are_normalized_as_the_official_code_does(raw, plain):
    assert evaluation.normalize_answer(raw) == plain
    assert vqa_accuracy(raw, [plain] * 9 + ["other"]) == 1


def test_where_all_humans_agree_answers_are_compared_as_they_are():
    assert vqa_accuracy("The dog", ["dog"] * 10) == 0
    assert vqa_accuracy("\tdog\n", ["dog "] * 10) == 1
    assert vqa_accuracy("dog", ["dog"]) == 1
    assert vqa_accuracy("cat", ["dog"]) == 0


@pytest.mark.parametrize("answer", ["Red.", "2"])
def test_vqa_accuracy_is_the_mean_over_leaving_each_human_out(answer):
    answers = np.random.default_rng(0).choice(["red", "blue", "two", "the cat"], 10).tolist()
    normal = [evaluation.normalize_answer(a) for a in answers]
    scores = []
    for i in range(10):
        others = normal[:i] + normal[i + 1:]
        scores.append(min(1, others.count(evaluation.normalize_answer(answer)) / 3))
    assert vqa_accuracy(answer, answers) == pytest.approx(np.mean(scores))


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


def test_bleu_and_cider_by_hand():
    brevity = math.exp(1 - 6 / 4)
    assert bleu(["A b, (c) D."], [["a b c d e f"]])[0] == pytest.approx(brevity)
    assert bleu([""], [["a b"]]) == [0] * 4
    assert cider(["a b c", "d e f"], [["a b c"], ["d e f"]]) == pytest.approx(7.5)
    assert cider(CAPTIONS[:1], REFERENCES[:1]) == 0  # one image: no n-gram is informative


def n_grams(text, n):
    tokens = text.split()
    return [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]


def slow_bleu(captions, references, n):
    logs = []
    for k in range(1, n + 1):
        right = 0
        total = 0
        for caption, refs in zip(captions, references):
            own = n_grams(caption, k)
            total += len(own)
            for g in set(own):
                right += min(own.count(g), max(n_grams(ref, k).count(g) for ref in refs))
        logs.append(math.log((right + 1e-15) / (total + 1e-9)))
    caption_length = 0
    reference_length = 0
    for caption, refs in zip(captions, references):
        length = len(caption.split())
        caption_length += length
        lengths = sorted(len(ref.split()) for ref in refs)
        reference_length += min(lengths, key=lambda m: abs(m - length))  # the shorter of a tie
    brevity = min(1, math.exp(1 - reference_length / caption_length))
    return math.exp(np.mean(logs)) * brevity


def slow_cider(captions, references):
    """Dense vectors over all n-grams of caption and reference."""
    total = 0
    for caption, refs in zip(captions, references):
        for ref, n in itertools.product(refs, range(1, 5)):
            both = sorted(set(n_grams(caption, n) + n_grams(ref, n)))
            idf = []
            for g in both:
                df = sum(any(g in n_grams(r, n) for r in others) for others in references)
                idf.append(math.log(len(references)) - math.log(max(df, 1)))
            a = np.array([n_grams(caption, n).count(g) for g in both]) * idf
            b = np.array([n_grams(ref, n).count(g) for g in both]) * idf
            norm = np.linalg.norm(a) * np.linalg.norm(b)
            gap = len(n_grams(caption, 2)) - len(n_grams(ref, 2))
            if norm:
                cosine = np.minimum(a, b) @ b / norm
                total += cosine * math.exp(-(gap**2) / 72) / 4 / len(refs)
    return 10 * total / len(captions)


def random_sentences(rng, images, min_words):
    def sentence(least):
        return " ".join(rng.choice(list("abcdef"), rng.integers(least, 10)))

    captions = [sentence(min_words) for _ in range(images)]
    references = [[sentence(1) for _ in range(rng.integers(1, 4))] for _ in range(images)]
    return captions, references


@pytest.mark.parametrize("seed", range(2))
def test_bleu_and_cider_agree_with_slow_loops_on_random_sentences(seed):
    captions, references = random_sentences(np.random.default_rng(seed), 8, min_words=0)
    slow = [slow_bleu(captions, references, n) for n in (1, 2, 3, 4)]
    assert bleu(captions, references) == pytest.approx(slow, rel=1e-9)
    assert cider(captions, references) == pytest.approx(slow_cider(captions, references), rel=1e-9)
