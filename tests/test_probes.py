"""Probes on frozen features, and protocols with models whose answers are known."""
import io
import json
import math
import tarfile
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import eval as evaluation
from common import UserError
from conftest import refused
from eval import bleu, cider, linear_probe

CFG = SimpleNamespace(context=150, precision="fp32")
CPU = torch.device("cpu")
BYTES = data.Tokenizer()  # without merges: a token for each byte

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- linear probe ----

def clouds(n, dim, classes, noise, seed=0):
    """Points around the axes: class c lies around the c-th. -> x (n, dim), labels (n,)"""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return torch.eye(dim)[labels] + noise * torch.randn(n, dim, generator=generator), labels


@pytest.mark.parametrize("C", [1e-4, 1])
def test_the_gradient_of_scikit_learns_objective_vanishes_at_the_solution(C):
    x, y = clouds(150, 6, 3, noise=1)
    x = x.double()
    start = (torch.zeros(6, 3).double(), torch.zeros(3).double())
    weight, bias = evaluation.logistic_regression(x, y, C, start, max_iter=1000)
    weight.requires_grad_()
    bias.requires_grad_()
    summed = F.cross_entropy(x @ weight + bias, y, reduction="sum")
    objective = weight.square().sum() / 2 + C * summed
    for gradient in torch.autograd.grad(objective, (weight, bias)):
        assert gradient.abs().max() < 1e-4 * C * len(y)  # scikit-learn's own stopping rule


def test_a_probe_separates_what_can_be_separated_and_refuses_four_images():
    train, labels = clouds(300, 8, 4, noise=0.1)
    test, truth = clouds(400, 8, 4, noise=0.1, seed=1)
    assert torch.equal(linear_probe(train + 50, labels, test + 50), truth)  # a common offset
    with pytest.raises(UserError, match="at least 5 labelled training images, here are 4"):
        linear_probe(train[:4], labels[:4], test)


def test_C_is_the_best_of_those_tried_on_a_random_fifth(monkeypatch):
    train, clean = clouds(200, 20, 2, noise=1, seed=3)
    labels = clean ^ (torch.rand(200, generator=torch.Generator().manual_seed(4)) < 0.3)
    fits = []
    fit = evaluation.logistic_regression

    def noting_fit(x, y, C, start, max_iter):
        result = fit(x, y, C, start, max_iter)
        fits.append((C, len(x), result))
        return result

    monkeypatch.setattr(evaluation, "logistic_regression", noting_fit)
    linear_probe(train, labels, train)
    *searched, (best, n_rows, _) = fits
    assert n_rows == 200 and {n for _, n, _ in searched} == {160}
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    fifth = order % 5 == 4
    held_out = (train - train.mean(0))[fifth].double()
    right = {}
    for C, _, (weight, bias) in searched:
        right[C] = ((held_out @ weight + bias).argmax(1) == labels[fifth]).sum().item()
    assert right[best] == max(right.values()) > min(right.values())


def test_a_probe_does_not_mind_classes_in_turn():
    torch.manual_seed(0)
    labels = torch.arange(200) % 10  # every fifth row: two classes alone
    signal = torch.eye(10)[labels] + 0.2 * torch.randn(200, 10)
    train = torch.cat([signal, 20 * torch.randn(200, 2)], 1)  # the smallest C sees the noise alone
    assert (linear_probe(train, labels, train) == labels).float().mean() > 0.95


# ---- models whose answers are known ----

def write_shard(path, samples):
    """samples: [(color, {suffix: text})] as 16 x 16 pictures with texts -> the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, (color, texts) in enumerate(samples):
            raw = io.BytesIO()
            Image.new("RGB", (16, 16), color).save(raw, "PNG")
            data.add_file(tar, f"{i:03d}.png", raw.getvalue())
            for suffix, text in texts.items():
                data.add_file(tar, f"{i:03d}.{suffix}", text.encode())
    return str(path)


def labelled(*pairs):
    return [(color, {"cls": str(label)}) for color, label in pairs]


class Colors(nn.Module):
    """A vision tower whose tokens are the colors of four patches."""
    image_size = 16

    def forward(self, images):
        patches = images.float().unfold(2, 8, 8).unfold(3, 8, 8)
        return patches.mean((4, 5)).flatten(2).transpose(1, 2)  # (B, 4, 3)

    patch_tokens = forward


class Blind(nn.Module):
    """It has a vision tower and nothing else; an untrained one sees nothing at all."""

    def __init__(self, cfg=None):
        super().__init__()
        self.vision = Colors()
        if cfg is not None:
            self.vision.patch_tokens = lambda images: torch.zeros(len(images), 4, 3)

    def held_out_view(self, image):
        return data.center_crop(image, 16)


class Captioner(Blind):
    """It writes what `say` makes of an image; a token costs the image's brightness."""

    def __init__(self, say):
        super().__init__()
        self.say = say

    def generate(self, images, length):
        rows = [BYTES.pad(self.say(image), length)[0] for image in images]
        return torch.tensor(np.array(rows, np.int64).reshape(-1, length))

    def score(self, images, tokens, valid):
        return -images.double().mean((1, 2, 3)) * valid.sum(1)


def caption_rows(say, paths):
    rows = evaluation.caption(Captioner(say), BYTES, paths, CFG, CPU)
    return {metric: value for metric, value, _ in rows}


# ---- captions ----

def color_shards(folder):
    """Six held-out pictures of three classes, one of which is unseen in training."""
    (folder / "l").mkdir(parents=True)
    (folder / "l/classes.txt").write_text("red\ngreen\nblue\n")
    (folder / "l/unseen.txt").write_text("blue\n")
    colors = (("red", 0), ("lime", 1), ("blue", 2), ("red", 0), ("red", 0), ("blue", 2))
    return [write_shard(folder / "l/test-0.tar", labelled(*colors))]


def name_of_color(image):
    return ("red", "green", "blue")[int(image.float().mean((1, 2)).argmax())]


def test_a_class_counts_where_its_name_stands_as_whole_words(tmp_path):
    paths = color_shards(tmp_path)
    rows = caption_rows(lambda image: f"A {name_of_color(image).upper()}, I think.", paths)
    assert (rows["named_seen"], rows["named_unseen"]) == (1, 1)
    rows = caption_rows(lambda image: f"dark{name_of_color(image)} {name_of_color(image)}s", paths)
    assert (rows["named_seen"], rows["named_unseen"]) == (0, 0)
    rows = caption_rows(lambda image: "always red", paths)
    assert (rows["named_seen"], rows["named_unseen"]) == (3 / 4, 0)
    assert (rows["named_seen_majority"], rows["named_unseen_majority"]) == (3 / 4, 1)


def first_caption(i):
    return f"picture number {i} is{i % 4 * ' here'}"


def captions_on_rank(paths):
    """Of a captioner that reads the number of a picture from its color."""
    return caption_rows(lambda image: first_caption(int(image[0, 0, 0]) // 40), paths)


def test_a_perfect_captioner_has_bleu_1_and_costs_what_the_model_says_on_any_number_of_ranks(
        tmp_path, run_on_ranks):
    first = [first_caption(i) for i in range(3)]
    references = [[text, f"second caption {i} of it"] for i, text in enumerate(first)]
    samples = []
    for i, lines in enumerate(references):
        samples.append(((40 * i, 10 * i, 9), {"txt": "\n".join(lines)}))
    paths = [write_shard(tmp_path / "p/test-0.tar", samples)]
    rows = captions_on_rank(paths)
    rotated = first[-1:] + first[:-1]
    assert rows["bleu4"] == pytest.approx(1)
    assert rows["bleu4_other_image"] == pytest.approx(bleu(rotated, references)[3])
    assert rows["cider"] == pytest.approx(cider(first, references))
    assert rows["cider_other_image"] == pytest.approx(cider(rotated, references))

    brightness = np.array([(40 * i + 10 * i + 9) / 3 for i in range(3)])
    lengths = np.array([len(text) + 2 for text in first])  # bytes, begin and end
    assert rows["nats_per_token"] == pytest.approx(np.mean(brightness * lengths))
    other = np.mean(np.roll(brightness, 1) * lengths)
    assert rows["nats_per_token_other_image"] == pytest.approx(other)
    assert run_on_ranks(4, captions_on_rank, paths) == [pytest.approx(rows)] * 4  # one has none


# ---- frozen features ----

RED_BLUE = labelled(("red", 0), ("blue", 1)) * 10


def test_probes_are_scored_on_classes_of_the_training_part_only(tmp_path):
    write_shard(tmp_path / "l/train-0.tar", RED_BLUE)
    test = labelled(("red", 1), ("green", 2))
    paths = [write_shard(tmp_path / "l/test-0.tar", RED_BLUE[:7] + test)]
    for name in ("knn", "linear"):
        rows = evaluation.PROTOCOLS[name](Blind(), BYTES, paths, CFG, CPU)
        assert rows == [(name, 7 / 8, 8), (f"{name}_mean_per_class", pytest.approx(7 / 8), 8),
                        (f"{name}_majority", 4 / 8, 8)]


def test_unreadable_images_and_samples_without_a_class_are_counted(tmp_path, capsys):
    path = tmp_path / "l/test-0.tar"
    write_shard(path, RED_BLUE[:8] + [("red", {"txt": "no class"})])
    raw = bytearray(path.read_bytes())
    raw[512:700] = bytes(188)  # the first sample's picture
    path.write_bytes(raw)
    model = Blind()
    index = data.Index([str(path)])
    features, labels, ids = evaluation.embed_labelled(model, index, CFG, CPU, model.vision)
    assert labels.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert ids.tolist() == [1, 2, 3, 4, 5, 6, 7] and features.shape == (7, 4, 3)
    message = "2 of 9 samples are not evaluated: 1 no class, 1 unreadable image"
    assert message in capsys.readouterr().err


def test_a_model_sees_no_batch_of_no_rows_and_the_result_has_none():
    seen = []

    def features(images):
        seen.append(len(images))
        return images.flatten(1)

    nothing = torch.zeros(0, 3, 2, 2)
    assert evaluation.in_batches(features, CFG, CPU, nothing).shape == (0, 12)
    assert seen == [1]


def test_shards_without_training_part_or_usable_sample_are_refused_in_one_line(tmp_path):
    alone = [write_shard(tmp_path / "a/test-0.tar", RED_BLUE)]
    no_class = [write_shard(tmp_path / "b/test-0.tar", [("red", {"txt": "a"})])]
    write_shard(tmp_path / "b/train-0.tar", RED_BLUE)
    other = [write_shard(tmp_path / "c/test-0.tar", labelled(("red", 5)))]
    write_shard(tmp_path / "c/train-0.tar", RED_BLUE)

    def knn(paths):
        evaluation.PROTOCOLS["knn"](Blind(), BYTES, paths, CFG, CPU)

    assert "also need labelled training shards" in refused(knn, alone)
    assert "word train, val or test into all names" in refused(knn, alone)
    assert "none of the 1 samples" in refused(knn, no_class)
    assert "a class that one of" in refused(knn, other)


def test_training_parts_of_all_folders_count_and_numbers_of_classes_may_have_gaps(tmp_path):
    paths = []
    for name, color, label in (("a", "red", 3), ("b", "blue", 2**31 - 1)):
        write_shard(tmp_path / name / "train-0.tar", labelled((color, label)))
        paths.append(write_shard(tmp_path / name / "test-0.tar", labelled((color, label))))
    rows = evaluation.PROTOCOLS["knn"](Judge(), BYTES, paths, CFG, CPU)
    assert rows[0] == ("knn", 1.0, 2)
    (tmp_path / "a/classes.txt").write_text("a\nb")
    (tmp_path / "b/classes.txt").write_text("b\na")
    with pytest.raises(UserError, match="differ: use the shards one folder at a time"):
        evaluation.PROTOCOLS["knn"](Judge(), BYTES, paths, CFG, CPU)


# ---- zero-shot and re-ranking ----

class Reader(Blind):
    """It sees colors, and reads the words red and green; all others are dark to it."""

    def encode_image(self, images):
        return F.normalize(images.float().mean((2, 3)), dim=1)

    def encode_text(self, tokens, valid):
        words = [BYTES.decode(text.tolist()).rpartition(" ")[2] for text in tokens]
        rows = [[float(word == "red"), float(word == "green"), 0] for word in words]
        return torch.tensor(rows).view(-1, 3)  # a rank may have no text


def test_zero_shot_scores_classes_apart_that_training_never_saw(tmp_path):
    paths = color_shards(tmp_path)
    (tmp_path / "l/zeroshot_classification_templates.txt").write_text("a {c}\n{}\n")
    rows = evaluation.PROTOCOLS["zeroshot"](Reader(), BYTES, paths, CFG, CPU)
    assert rows == [
        ("zeroshot_seen", 1, 4), ("zeroshot_seen_mean_per_class", 1, 4),
        ("zeroshot_seen_chance", 1 / 3, 4), ("zeroshot_unseen", 0, 2),
        ("zeroshot_unseen_mean_per_class", 0, 2), ("zeroshot_unseen_chance", 1 / 3, 2)]


class Judge(Reader):
    """Its match_score knows blue as well."""

    def match_score(self, image_tokens, tokens, valid):
        scores = []
        for image, text in zip(image_tokens, tokens):
            color = ("red", "green", "blue")[int(image.mean(0).argmax())]
            scores.append(float(BYTES.decode(text.tolist()).rpartition(" ")[2] == color))
        return torch.tensor(scores)


@pytest.mark.parametrize("seed", range(2))
def test_reranking_sorts_the_best_by_score_and_leaves_the_rest(seed):
    generator = torch.Generator().manual_seed(seed)
    sim = torch.randint(6, (12, 9), generator=generator) / 6  # many ties: the earlier is better
    scores = torch.randn(12, 9, generator=generator)
    k = (3, 16)[seed % 2]
    calls = []

    def score(queries, candidates):
        calls.extend(zip(queries.tolist(), candidates.tolist()))
        return scores[queries, candidates]

    result = evaluation.rerank(sim, score, k)
    assert len(calls) == len(set(calls)) == 12 * min(k, 9)  # asked about the best only
    for q in range(12):
        order = sorted(range(9), key=lambda c: -sim[q, c])
        expected = sorted(order[:k], key=lambda c: -scores[q, c]) + order[k:]
        assert sorted(range(9), key=lambda c: -result[q, c]) == expected
        assert torch.equal(result[q, order[k:]], sim[q, order[k:]])


def judge(task, paths):
    rows = evaluation.PROTOCOLS[task](Judge(), BYTES, paths, CFG, CPU)
    return {metric: value for metric, value, _ in rows}


def test_a_match_score_that_knows_better_reranks_on_any_number_of_ranks(tmp_path, run_on_ranks):
    texts = {"red": "a red\nthe red", "lime": "a green", "blue": "a blue"}
    samples = [(color, {"txt": text}) for color, text in texts.items()]
    paths = [write_shard(tmp_path / "p/test-0.tar", samples)]
    recall = judge("retrieval", paths)
    assert recall["i2t_r1"] == pytest.approx(2 / 3) and recall["t2i_r1"] == 3 / 4
    assert recall["t2i_r1_chance"] == pytest.approx(1 / 3)
    assert recall["i2t_r1_itm"] == recall["t2i_r1_itm"] == 1
    assert run_on_ranks(4, judge, "retrieval", paths) == [recall] * 4


# ---- a script's own evaluation ----

@dataclass
class HeldOut:
    """What an evaluation reads of a Config."""
    out: str
    val: list
    data: list = None
    context: int = CFG.context
    precision: str = CFG.precision


def test_results_of_two_sets_stand_apart_beside_untrained_features_and_what_cannot_run(
        tmp_path, capsys):
    a = tmp_path / "a"
    b = tmp_path / "b"
    for folder, n in ((a, 7), (b, 8)):
        write_shard(folder / "train-0.tar", RED_BLUE)
        write_shard(folder / "test-0.tar", RED_BLUE[:n])
    cfg = HeldOut(str(tmp_path), [str(a), str(b)])
    result = evaluation.evaluate(Reader(), BYTES, cfg, CPU)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["knn"] == result["linear"] == 1
    assert result["knn_random"] == result["linear_random"] == result["knn_majority"] == 4 / 7
    assert result[f"knn_majority on {b}"] == 1 / 2
    out = capsys.readouterr().out
    line = "100.0 %   n = 7   (untrained encoder 57.1 %, most frequent answer 57.1 %)"
    assert f"held out, {a}:\n  {'knn':<30}  {line}" in out
    assert f"zeroshot on {a}: - (no classes.txt" in out


def test_shards_are_of_the_kind_of_their_first_sample(tmp_path):
    samples = [({"txt": "a", "cls": "0"}, "captions"), ({"cls": "0"}, "classes"),
               ({"json": '{"text_list": ["a"]}'}, "documents")]
    for texts, kind in samples:
        path = write_shard(tmp_path / f"{kind}.tar", [("red", texts)])
        assert evaluation.kind_of(data.Index([path])) == kind


def test_class_lists_that_do_not_fit_are_refused_by_a_training_and_by_an_evaluation(tmp_path):
    paths = color_shards(tmp_path)
    cfg = HeldOut(str(tmp_path), [str(tmp_path / "l")])
    evaluation.check_held_out(cfg)

    def assert_refused(file, text, message):
        (tmp_path / "l" / file).write_text(text)
        assert message in refused(evaluation.check_held_out, cfg)
        assert message in refused(partial(judge, "zeroshot"), paths)

    assert_refused("unseen.txt", "bleu\n", "'bleu' in unseen.txt")
    (tmp_path / "l/unseen.txt").unlink()
    assert_refused("classes.txt", "red\ngreen\n", "label 2")
    templates = "zeroshot_classification_templates.txt"
    assert_refused(templates, "a {c}\na %s\n", "'a %s'")
    assert_refused(templates, "a {label}\n", "write {} or {c}")
    (tmp_path / "l/classes.txt").unlink()
    assert "no classes.txt" in refused(evaluation.check_held_out, cfg)


def test_values_that_are_missing_or_not_finite_are_shown_as_a_dash():
    shown = {("bleu4", 0.1234): "12.3 %", ("cider", 0.5): "0.500", ("nats_per_token", 2.5): "2.500",
             ("top5", None): "-", ("AP", math.nan): "-"}
    for (metric, value), text in shown.items():
        assert evaluation.table([(metric, value, 1024)]).split() == [
            metric, *text.split(), "n", "=", "1,024"]


# ---- progress ----

def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 3))  # each look at the clock is three seconds later
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: next(clock))
    assert list(evaluation.progress(range(9), "reading", 9)) == list(range(9))
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 5 and all(line.startswith("reading: ") for line in lines)
