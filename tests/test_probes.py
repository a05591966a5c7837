"""Probes on frozen features, and protocols with models whose answers are known."""
import io
import json
import math
import tarfile
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
from conftest import refused, tiny_config
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
    x = torch.eye(dim)[labels] + noise * torch.randn(n, dim, generator=generator)
    return x.double(), labels


def test_the_gradient_of_scikit_learns_objective_vanishes_at_the_solution():
    x, y = clouds(150, 6, 3, noise=1)
    C = 0.1
    start = (torch.zeros(6, 3).double(), torch.zeros(3).double())
    weight, bias = evaluation.logistic_regression(x, y, C, start, max_iter=1000)
    weight.requires_grad_()
    bias.requires_grad_()
    summed = F.cross_entropy(x @ weight + bias, y, reduction="sum")
    objective = weight.square().sum() / 2 + C * summed
    for gradient in torch.autograd.grad(objective, (weight, bias)):
        assert gradient.abs().max() < 1e-4 * C * len(y)  # scikit-learn's own stopping rule


def test_C_is_the_best_of_those_tried_on_a_random_fifth_and_then_all_rows_are_fitted(monkeypatch):
    train, clean = clouds(200, 20, 2, noise=0.5, seed=3)
    labels = clean ^ (torch.rand(200, generator=torch.Generator().manual_seed(4)) < 0.3)
    fits = []
    fit = evaluation.logistic_regression

    def noting_fit(x, y, C, start, max_iter):
        result = fit(x, y, C, start, max_iter)
        fits.append((C, len(x), result))
        return result

    def predict(weight, bias):
        return ((train - train.mean(0)) @ weight + bias).argmax(1)

    monkeypatch.setattr(evaluation, "logistic_regression", noting_fit)
    predicted = linear_probe(train, labels, train)
    *searched, (best, n_rows, last_fit) = fits
    assert n_rows == 200 and torch.equal(predicted, predict(*last_fit))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    fifth = order % 5 == 4
    right = {}
    for C, n_rows, searched_fit in searched:
        assert n_rows == 160
        right[C] = (predict(*searched_fit) == labels)[fifth].sum().item()
    assert right[best] == max(right.values()) > min(right.values())
    assert len(right) > len(range(-6, 7, 2))  # finer steps around the best


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
        return F.avg_pool2d(images.float(), 8).flatten(2).transpose(1, 2)  # (B, 4, 3)

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


def measure(task, model, paths):
    """-> {metric: value}"""
    rows = evaluation.PROTOCOLS[task](model, BYTES, paths, CFG, CPU)
    return {metric: value for metric, value, _ in rows}


# ---- captions ----

def color_shards(folder):
    """Six held-out pictures of three of the classes, one of which is unseen in training."""
    (folder / "l").mkdir(parents=True)
    (folder / "l/classes.txt").write_text("red\ngreen\nblue\na\nb\nc\n")
    (folder / "l/unseen.txt").write_text("blue\n")
    colors = (("red", 0), ("lime", 1), ("blue", 2), ("red", 0), ("red", 0), ("blue", 2))
    return [write_shard(folder / "l/test-0.tar", labelled(*colors))]


def color_of(image):
    return ("red", "green", "blue")[int(image.float().mean((1, 2)).argmax())]


def test_a_class_counts_where_its_name_stands_as_whole_words(tmp_path):
    paths = color_shards(tmp_path)

    def share_named(say):
        rows = measure("caption", Captioner(say), paths)
        assert (rows["named_seen_majority"], rows["named_unseen_majority"]) == (3 / 4, 1)
        return rows["named_seen"], rows["named_unseen"]

    assert share_named(lambda image: f"A {color_of(image).upper()}, I think.") == (1, 1)
    assert share_named(lambda image: f"dark{color_of(image)} {color_of(image)}s") == (0, 0)
    assert share_named(lambda image: "always red") == (3 / 4, 0)


SENTENCES = ["picture number 0 is", "picture number 1 is here", "picture number 2 is here here"]


def say_sentence(image):
    return SENTENCES[int(image[0, 0, 0]) // 40]


def test_a_perfect_captioner_has_bleu_1_and_costs_what_the_model_says_on_any_number_of_ranks(
        tmp_path, run_on_ranks):
    references = [[text, f"second caption {i} of it"] for i, text in enumerate(SENTENCES)]
    samples = []
    for i, lines in enumerate(references):
        samples.append(((40 * i, 10 * i, 9), {"txt": "\n".join(lines)}))
    paths = [write_shard(tmp_path / "p/test-0.tar", samples)]
    rows = measure("caption", Captioner(say_sentence), paths)
    rotated = SENTENCES[-1:] + SENTENCES[:-1]
    assert rows["bleu4"] == pytest.approx(1)
    assert rows["bleu4_other_image"] == pytest.approx(bleu(rotated, references)[3])
    assert rows["cider"] == pytest.approx(cider(SENTENCES, references))
    assert rows["cider_other_image"] == pytest.approx(cider(rotated, references))

    brightness = np.array([(40 * i + 10 * i + 9) / 3 for i in range(3)])
    lengths = np.array([len(text) + 2 for text in SENTENCES])  # bytes, begin and end
    assert rows["nats_per_token"] == pytest.approx(np.mean(brightness * lengths))
    other = np.mean(np.roll(brightness, 1) * lengths)
    assert rows["nats_per_token_other_image"] == pytest.approx(other)
    on_ranks = run_on_ranks(4, measure, "caption", Captioner(say_sentence), paths)  # one has none
    assert on_ranks == [pytest.approx(rows)] * 4


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
    path = tmp_path / "test-0.tar"
    write_shard(path, RED_BLUE[:8] + [("red", {"txt": "no class"})])
    raw = bytearray(path.read_bytes())
    raw[512:700] = bytes(188)  # the first sample's picture
    path.write_bytes(raw)
    index = data.Index([str(path)])
    features, labels, ids = evaluation.embed_labelled(Blind(), index, CFG, CPU, Colors())
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


def test_shards_that_a_probe_cannot_use_are_refused_in_one_line(tmp_path):
    def refusal(probe, train, test):
        """train, test: samples."""
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        path = write_shard(folder / "test-0.tar", test)
        if train:
            write_shard(folder / "train-0.tar", train)
        run = partial(evaluation.PROTOCOLS[probe], Blind(), BYTES, cfg=CFG, device=CPU)
        return refused(run, [path])

    assert "also need labelled training shards" in refusal("knn", [], RED_BLUE)
    assert "none of the 1 samples" in refusal("knn", RED_BLUE, [("red", {"txt": "a"})])
    assert "a class that one of" in refusal("knn", RED_BLUE, labelled(("red", 5)))
    assert "at least 5 labelled training images" in refusal("linear", RED_BLUE[:4], RED_BLUE)


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
        ("zeroshot_seen_chance", 1 / 6, 4), ("zeroshot_seen_top5", 1, 4),
        ("zeroshot_unseen", 0, 2), ("zeroshot_unseen_mean_per_class", 0, 2),
        ("zeroshot_unseen_chance", 1 / 6, 2), ("zeroshot_unseen_top5", 1, 2)]


class Judge(Reader):
    """Its match_score knows blue as well."""

    def match_score(self, image_tokens, tokens, valid):
        scores = []
        for image, text in zip(image_tokens, tokens):
            color = ("red", "green", "blue")[int(image.mean(0).argmax())]
            scores.append(float(BYTES.decode(text.tolist()).rpartition(" ")[2] == color))
        return torch.tensor(scores)


@pytest.mark.parametrize("k", [3, 16])
def test_reranking_sorts_the_best_by_score_and_leaves_the_rest(k):
    generator = torch.Generator().manual_seed(k)
    sim = torch.randint(6, (12, 9), generator=generator) / 6  # many ties: the earlier is better
    scores = torch.randn(12, 9, generator=generator)
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


def test_a_match_score_that_knows_better_reranks_on_any_number_of_ranks(tmp_path, run_on_ranks):
    texts = {"red": "a red\nthe red", "lime": "a green", "blue": "a blue"}
    samples = [(color, {"txt": text}) for color, text in texts.items()]
    paths = [write_shard(tmp_path / "p/test-0.tar", samples)]
    recall = measure("retrieval", Judge(), paths)
    assert recall["i2t_r1"] == pytest.approx(2 / 3) and recall["t2i_r1"] == 3 / 4
    assert recall["t2i_r1_chance"] == pytest.approx(1 / 3)
    assert recall["i2t_r1_itm"] == recall["t2i_r1_itm"] == 1
    assert run_on_ranks(4, measure, "retrieval", Judge(), paths) == [recall] * 4


# ---- a script's own evaluation ----

def test_results_of_two_sets_stand_apart_beside_untrained_features_and_what_cannot_run(
        tmp_path, capsys):
    a = tmp_path / "a"
    b = tmp_path / "b"
    for folder, n in ((a, 7), (b, 8)):
        write_shard(folder / "train-0.tar", RED_BLUE)
        write_shard(folder / "test-0.tar", RED_BLUE[:n])
    cfg = tiny_config("align", tmp_path, tmp_path, val=[str(a), str(b)], context=150)
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
    cfg = tiny_config("align", tmp_path, tmp_path, data=None, val=[str(tmp_path / "l")])
    evaluation.check_held_out(cfg)

    def assert_refused(file, text, message):
        (tmp_path / "l" / file).write_text(text)
        assert message in refused(evaluation.check_held_out, cfg)
        assert message in refused(partial(measure, "zeroshot", Judge()), paths)

    assert_refused("unseen.txt", "bleu\n", "'bleu' in unseen.txt")
    (tmp_path / "l/unseen.txt").unlink()
    assert_refused("classes.txt", "red\ngreen\n", "label 2")
    assert_refused("zeroshot_classification_templates.txt", "a {c}\na %s\n", "'a %s'")


def test_values_that_are_missing_or_not_finite_are_shown_as_a_dash():
    shown = {("bleu4", 0.1234): "12.3 %", ("cider", 0.5): "0.500", ("nats_per_token", 2.5): "2.500",
             ("top5", None): "-", ("AP", math.nan): "-"}
    for (metric, value), text in shown.items():
        assert evaluation.table([(metric, value, 1024)]).split() == [
            metric, *text.split(), "n", "=", "1,024"]
