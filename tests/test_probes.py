"""BLEU, CIDEr and the linear probe against independent routes; captioning with fake models whose captions are known; boxes of random crops."""
import io, itertools, json, math, tarfile
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

REFS = [["a cat sits on a mat", "the cat is on the mat"], ["two dogs run in the park", "dogs running through a park"],
        ["a man rides a red bike", "a person on a bike"]]
HYPS = ["a cat is on a mat", "two dogs running in a park", "a man on a bike"]                # formats 11.8
CFG = SimpleNamespace(context=150, precision="fp32")
CPU, BYTES = torch.device("cpu"), data.Tokenizer()


# -- captions against references --

def grams(text, n):                                          # a list, where the code under test counts
    t = text.split()
    return [tuple(t[i:i + n]) for i in range(len(t) - n + 1)]


def slow_bleu(hyps, refs, n):
    logs = 0
    for k in range(1, n + 1):
        right = total = 0
        for h, ref in zip(hyps, refs):
            total += len(grams(h, k))
            right += sum(min(grams(h, k).count(g), max(grams(r, k).count(g) for r in ref)) for g in set(grams(h, k)))
        logs += math.log((right + 1e-15) / (total + 1e-9)) / n
    length = [len(h.split()) for h in hyps]
    near = [sorted((len(r.split()) for r in ref), key=lambda m: (abs(m - c), m))[0] for c, ref in zip(length, refs)]
    return math.exp(logs) * min(1, math.exp(1 - sum(near) / sum(length)))


def slow_cider(hyps, refs):
    scores = []
    for h, ref in zip(hyps, refs):
        for r, n in itertools.product(ref, range(1, 5)):     # dense vectors over all n-grams of the two
            both = sorted(set(grams(h, n) + grams(r, n)))
            df = np.array([sum(any(g in grams(x, n) for x in other) for other in refs) for g in both])
            idf = math.log(len(refs)) - np.log(np.maximum(df, 1))
            a, b = (np.array([grams(t, n).count(g) for g in both]) * idf for t in (h, r))
            norm = np.linalg.norm(a) * np.linalg.norm(b)
            gap = len(grams(h, 2)) - len(grams(r, 2))
            scores.append((np.minimum(a, b) @ b / norm if norm else 0) * math.exp(-gap ** 2 / 72) * 10 / 4 / len(ref))
    return sum(scores) / len(hyps)


def babble(rng, images, least=0):
    sentence = lambda low: " ".join(rng.choice(list("abcdef"), rng.integers(low, 10)))
    return [sentence(least) for _ in range(images)], [[sentence(1) for _ in range(rng.integers(1, 4))] for _ in range(images)]


def test_golden_bleu_and_cider():
    assert E.bleu(HYPS, REFS) == pytest.approx([1, 0.886405, 0.598408, 0.000072], abs=1e-6)
    assert E.cider(HYPS, REFS) == pytest.approx(3.043195, abs=1e-6)
    for i, want in enumerate((3.825536, 2.614917, 2.689131)):                                # the others score nothing, but set the frequencies
        assert 3 * E.cider([h if i == k else "" for k, h in enumerate(HYPS)], REFS) == pytest.approx(want, abs=1e-6)
    assert E.bleu(["a b c d"], [["a b c d e f"]])[0] == pytest.approx(0.606531, abs=1e-6)    # brevity: exp(1 - 6 / 4)
    assert E.cider(["a b c", "d e f"], [["a b c"], ["d e f"]]) == pytest.approx(7.5) and E.cider(HYPS[:1], REFS[:1]) == 0


@pytest.mark.parametrize("seed", range(40))
def test_bleu_and_cider_agree_with_slow_loops_on_random_sentences(seed):
    hyps, refs = babble(np.random.default_rng(seed), 8)
    assert E.bleu(hyps, refs) == pytest.approx([slow_bleu(hyps, refs, n) for n in range(1, 5)], rel=1e-9)
    assert E.cider(hyps, refs) == pytest.approx(slow_cider(hyps, refs), rel=1e-9)


def test_perfect_captions_score_1_and_10_and_empty_ones_nothing():
    refs = [[f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4}"] for i in range(0, 50, 5)]
    perfect = [r[0] for r in refs]
    assert E.bleu(perfect, refs) == pytest.approx([1] * 4) and E.cider(perfect, refs) == pytest.approx(10)
    for nothing in ("", " \n", "... !"):
        assert E.bleu([nothing] * 10, refs) == [0] * 4 and E.cider([nothing] * 10, refs) == 0
    assert E.bleu(["", *perfect[1:]], refs)[3] == pytest.approx(math.exp(1 - 50 / 45))       # an empty one costs brevity only


def test_case_marks_and_the_order_of_references_do_not_matter():
    rng = np.random.default_rng(1)
    hyps, refs = babble(rng, 30, least=4)
    loud = lambda t: '"' + t.upper().replace(" ", ",  ") + '" .'
    noisy, shuffled = [[loud(t) for t in r] for r in refs], [[r[i] for i in rng.permutation(len(r))] for r in refs]
    for other, theirs in ((list(map(loud, hyps)), noisy), (hyps, shuffled)):
        assert E.bleu(other, theirs) == E.bleu(hyps, refs) and E.cider(other, theirs) == pytest.approx(E.cider(hyps, refs), rel=1e-12)
    assert E.words('A t-shirt, "RED"...') == ["a", "t-shirt", "red"]


# -- linear probe --

def clouds(n, e, classes, noise, seed=0):                    # class c lies around the c-th axis
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    return torch.eye(e)[labels] + noise * torch.randn(n, e, generator=g), labels


def probabilities(x, W, b):
    z = np.exp((z := x @ W + b) - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def zeros(x, classes):
    return torch.zeros(x.shape[1], classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)


@pytest.mark.parametrize("C", [1e-4, 1e-2, 1, 100])
def test_the_gradient_of_scikit_learns_objective_vanishes_at_the_solution(C):
    x, y = clouds(150, 6, 3, 1)
    W, b = (p.numpy() for p in E.logistic(x.double(), y, C, zeros(x, 3)))
    error = probabilities(x.double().numpy(), W, b) - np.eye(3)[y]
    for gradient in (W + C * x.double().numpy().T @ error, C * error.sum(0)):
        assert abs(gradient).max() < 1e-4 * C * len(y)       # scikit-learn's own stopping rule, on its mean loss
    start = abs(C * x.double().numpy().T @ (1 / 3 - np.eye(3)[y])).max()
    assert abs(W + C * x.double().numpy().T @ error).max() < start / 1000


@pytest.mark.parametrize("C", [1e-3, 0.03, 1])
def test_two_classes_agree_with_newton(C):
    x, y = clouds(120, 4, 2, 1.5)
    W, b = E.logistic(x.double(), y, C, zeros(x, 2))
    # two classes: W is (-v, v) / 2 and |W|^2 = |v|^2 / 2, so v solves the binary problem with half the penalty
    X, t, v, ridge = np.c_[x.double().numpy(), np.ones(120)], y.numpy(), np.zeros(5), np.diag([0.5] * 4 + [0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-X @ v))
        v -= np.linalg.solve(ridge + C * X.T @ (X * (p * (1 - p))[:, None]), ridge @ v + C * X.T @ (p - t))
    assert (W[:, 1] - W[:, 0]).numpy() == pytest.approx(v[:4], abs=5e-3 * abs(v).max()) and (b[1] - b[0]).item() == pytest.approx(v[4], abs=1e-2)
    assert (W.sum(1)).abs().max() < 1e-3 * abs(v).max()


def test_a_probe_separates_what_can_be_and_guesses_on_shuffled_labels():
    train, labels = clouds(300, 8, 4, 0.1)
    test, truth = clouds(400, 8, 4, 0.1, seed=1)
    assert torch.equal(E.linear_probe(train, labels, test), truth)
    shuffled = labels[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    assert (E.linear_probe(train, shuffled, test) == truth).double().mean() < 0.5


def test_one_informative_dimension_is_found_and_C_is_the_best_of_those_tried_on_every_fifth_row(monkeypatch):
    g, logistic, tried = torch.Generator().manual_seed(3), E.logistic, []
    monkeypatch.setattr(E, "logistic", lambda x, y, C, start, most=1000: tried.append((C, len(x), logistic(x, y, C, start, most))) or tried[-1][2])
    x, flips = torch.randn(1000, 20, generator=g), torch.rand(200, generator=g) < 0.3
    clean = (x[:, 13] > 0).long()
    assert (E.linear_probe(x[:200], clean[:200], x[200:]) == clean[200:]).double().mean() > 0.85
    noisy = clean[:200] ^ flips.long()
    tried.clear()
    E.linear_probe(x[:200], noisy, x[200:])
    *searched, (chosen, rows, _) = tried
    assert [C for C, _, _ in searched[:7]] == pytest.approx([10.0 ** p for p in range(-6, 7, 2)]) and len({C for C, _, _ in searched}) == 13
    assert {n for _, n, _ in searched} == {160} and rows == 200                              # chosen without a fifth, fitted on all
    hits = {C: ((x[4:200:5].double() @ W + b).argmax(1) == noisy[4::5]).sum().item() for C, _, (W, b) in searched}
    assert hits[chosen] == max(hits.values()) > min(hits.values())


def test_maes_probe_learns_what_a_line_separates_once_its_steps_suffice_and_agrees_with_autograd():
    train, labels = clouds(400, 8, 4, 0.1)
    test, truth = clouds(200, 8, 4, 0.1, seed=1)
    assert torch.equal(E.mae_probe(train, labels, test, epochs=8000), truth)                 # on 400 rows its 90 epochs are far from done
    # the same recipe with torch's own layers, as main_linprobe.py states it: epochs of 3 batches, the tail dropped
    g = common.generator(0)
    W, b = nn.Parameter(nn.init.trunc_normal_(torch.empty(4, 8), std=0.01, generator=g)), nn.Parameter(torch.zeros(4))
    norm, state = nn.BatchNorm1d(8, affine=False, eps=1e-6), [torch.zeros(4, 8), torch.zeros(4)]
    for epoch in range(600):
        order = torch.randperm(400, generator=g)
        for place in range(3):
            rows, e = order[place * 128:(place + 1) * 128], epoch + place / 3
            lr = 0.1 * 128 / 256 * (e / 10 if e < 10 else (1 + math.cos(math.pi * (e - 10) / 590)) / 2)
            F.cross_entropy(norm(train[rows]) @ W.T + b, labels[rows]).backward()
            with torch.no_grad():
                for i, p in enumerate((W, b)):
                    state[i] = 0.9 * state[i] + p.grad * (0.001 * p.norm() / p.grad.norm() if p.ndim > 1 else 1)
                    p -= lr * state[i]
                    p.grad = None
    noisy, _ = clouds(5000, 8, 4, 0.6, seed=2)
    agree = E.mae_probe(train, labels, noisy, epochs=600, batch=128) == (norm.eval()(noisy) @ W.T + b).argmax(1)
    assert agree.double().mean() > 0.999


def test_an_attentive_probe_finds_the_patch_that_pooling_blurs():
    """One patch in nine is marked and tells the class; the others hold other classes' directions, so that the mean tells nothing."""
    g = torch.Generator().manual_seed(0)

    def images(n):
        labels, others = torch.randint(4, (n,), generator=g), torch.randint(4, (n, 9), generator=g)
        tokens = torch.cat([torch.eye(4)[others], torch.zeros(n, 9, 4)], 2) + 0.05 * torch.randn(n, 9, 8, generator=g)
        at = torch.randint(9, (n,), generator=g)
        tokens[range(n), at] = torch.cat([torch.eye(4)[labels], torch.ones(n, 4)], 1)
        return tokens, labels
    (train, labels), (test, truth) = images(1500), images(300)
    pred, threads = E.attentive_probe(train.half(), labels, test.half()), torch.get_rng_state()
    assert (pred == truth).double().mean() > 0.95
    assert (E.linear_probe(train.mean(1), labels, test.mean(1)) == truth).double().mean() < 0.8
    assert torch.equal(E.attentive_probe(train[:50], labels[:50], test), E.attentive_probe(train[:50], labels[:50], test))      # deterministic
    assert torch.equal(torch.get_rng_state(), threads)       # and leaves others' randomness alone


def test_an_attentive_probe_is_attention_with_one_query():
    probe, x = E.AttentiveProbe(128, 5).double(), torch.randn(6, 9, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for p in probe.parameters():
        nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    key, value = (common.split_heads(m(probe.norm(x)), 2) for m in (probe.k, probe.v))
    query = probe.q(probe.query).view(1, 2, 1, 64).expand(6, -1, -1, -1)
    pooled = F.scaled_dot_product_attention(query, key, value)[:, :, 0].flatten(1)
    torch.testing.assert_close(probe(x), probe.head(probe.norm_pooled(probe.out(pooled))))


# -- protocols, with models whose answers are known --

def write(path, samples):                                    # [(colour, {suffix: text})]
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, (colour, texts) in enumerate(samples):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), colour).save(picture, "PNG")
            for suffix, raw in {"png": picture.getvalue(), **{s: t.encode() for s, t in texts.items()}}.items():
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return str(path)


class Colours(nn.Module):                                    # tokens: the colours of the patches
    grid, patch = 2, 8

    def forward(self, images):
        return images.float().unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).flatten(2).transpose(1, 2)

    patch_tokens = forward


class Captioner(nn.Module):
    """Says what it is told to of an image; a caption costs the image's brightness x the caption's length."""
    def __init__(self, says):
        super().__init__()
        self.vision, self.says = Colours(), says

    def generate(self, images):
        return torch.from_numpy(np.array([BYTES.pad(self.says(x), CFG.context)[0] for x in images], np.int64).reshape(-1, CFG.context))

    def score(self, images, tokens, valid):
        return -images.double().mean((1, 2, 3)) * valid.sum(1)


def answers(paths, text):                                    # {image as the protocol shows it: text(sample)}
    index = data.Index(paths)
    return {data.centre(index[i].image(), 16).tobytes(): text(index[i]) for i in range(len(index))}


def captioned(folder, how):                                  # how: the one caption, or [a pattern for the first reference or class name]
    paths, names = data.expand(folder, "test"), [" ".join(p) for p in data.PAIRS]
    told = lambda s: names[s.label()] if "cls" in s.members and "caption" not in s.json else s.captions(lines=True)[0]
    right = {} if isinstance(how, str) else answers(paths, lambda s: how[0].format(told(s)))
    says = (lambda x: how) if isinstance(how, str) else lambda x: right[x.numpy().tobytes()]
    return {name: value for name, value, _ in E.caption(Captioner(says), BYTES, paths, CFG, CPU)}


def test_a_class_is_named_by_its_whole_words_and_a_constant_captioner_names_its_share(tiny_world):
    folder = f"{tiny_world}/labels"
    assert captioned(folder, ["There is a big {}, I think."]) == {"named_seen": 1, "named_unseen": 1}
    index, first = data.Index(data.expand(folder, "test")), data.PAIRS.index(data.SEEN[0])
    labels = [index[i].label() for i in range(len(index))]
    seen = [c for c in labels if data.PAIRS[c] in data.SEEN]
    assert captioned(folder, ["a dark{0}s, {0}like"]) == {"named_seen": 0, "named_unseen": 0}
    assert captioned(folder, f"A {' '.join(data.SEEN[0])}!") == {"named_seen": seen.count(first) / len(seen), "named_unseen": 0}


def test_a_perfect_captioner_has_bleu_1_and_a_blind_one_costs_what_its_words_do(tiny_world):
    folder = f"{tiny_world}/pairs"
    index = data.Index(data.expand(folder, "test"))
    refs = [index[i].captions(lines=True) for i in range(len(index))]
    perfect, blind = captioned(folder, ["{}"]), captioned(folder, "a red circle on the left")
    assert perfect["bleu4"] == pytest.approx(1) and perfect["cider"] == pytest.approx(E.cider([r[0] for r in refs], refs))
    assert (blind["bleu4"], blind["cider"]) == (E.bleu(["a red circle on the left"] * len(refs), refs)[3],
                                                E.cider(["a red circle on the left"] * len(refs), refs))
    light = np.array([data.centre(index[i].image(), 16).mean() for i in range(len(index))])
    length = np.array([len(r[0].encode()) + 2 for r in refs])
    assert perfect["nats_per_token"] == pytest.approx((light * length).mean(), rel=1e-6)
    assert perfect["nats_per_token_other_image"] == pytest.approx((np.roll(light, 1) * length).mean(), rel=1e-6)
    assert perfect["nats_per_token"] != pytest.approx(perfect["nats_per_token_other_image"], rel=1e-4)


@pytest.mark.parametrize("world", [2, 4])
def test_captioning_does_not_depend_on_the_number_of_ranks(tiny_world, tmp_path, pools, world):
    few = write(tmp_path / "few.tar", [((60 * i, 9, 9), {"txt": "a b c d" + " e" * i * i}) for i in range(1, 4)])     # 4 ranks: one has nothing
    for folder in (f"{tiny_world}/pairs", few):
        alone = captioned(folder, ["a {}"])
        assert pools(world)(captioned, folder, ["a {}"]) == [alone] * world


def test_frozen_features_are_judged_on_classes_of_the_bank_only(tmp_path):
    samples = [("red", {"cls": "0"}), ("blue", {"cls": "1"})] * 10
    write(tmp_path / "l/train-0.tar", samples)
    test = [write(tmp_path / "l/test-0.tar", samples[:7] + [("red", {"cls": "1"}), ("green", {"cls": "2"})])]
    model = Captioner(None)
    for name, probe in (("linear", E.linear), ("knn", E.nearest), ("attentive", E.attentive)):
        assert probe(model, BYTES, test, CFG, CPU) == [(name, 7 / 8, 8), (f"{name}_mean_per_class", pytest.approx((1 + 3 / 4) / 2), 8)]


def test_the_encoder_sees_each_image_once_however_many_probes_follow(tmp_path, monkeypatch):
    samples = [("red", {"cls": "0"}), ("blue", {"cls": "1"})] * 10
    write(tmp_path / "l/train-0.tar", samples)
    test, seen, look = [write(tmp_path / "l/test-0.tar", samples[:7])], [], Colours.patch_tokens
    monkeypatch.setattr(Colours, "patch_tokens", lambda self, images: seen.append(len(images)) or look(self, images))
    for store in (E.Store(str(tmp_path), "a"), E.Store(str(tmp_path), "a")):                 # the second reads what the first left in its folder
        for _ in range(2):
            assert E.linear(Captioner(None), BYTES, test, CFG, CPU, store)[0] == ("linear", 1, 7)
            assert E.nearest(Captioner(None), BYTES, test, CFG, CPU, store)[0] == ("knn", 1, 7)
        assert sum(seen) == 27
    E.nearest(Captioner(None), BYTES, test, CFG, CPU, E.Store(str(tmp_path), "b"))           # another checkpoint
    assert sum(seen) == 54


def test_images_that_cannot_be_read_and_samples_without_a_class_are_counted_aloud(tmp_path, capsys):
    samples = [("red", {"cls": "0"}), ("blue", {"cls": "1"})] * 4
    path = write(tmp_path / "l/test-0.tar", samples + [("red", {"txt": "no class"})])
    raw = bytearray((tmp_path / "l/test-0.tar").read_bytes())
    raw[512:700] = bytes(188)                                # the first sample's picture
    (tmp_path / "l/test-0.tar").write_bytes(raw)
    features, labels, _ = E.embed_labelled("pooled", Captioner(None), data.Index([path]), CFG, CPU)
    assert labels.tolist() == [1, 0, 1, 0, 1, 0, 1] and len(features) == 7
    said = capsys.readouterr().err
    assert "1 of 9 samples left out of the evaluation: unreadable image" in said and "1 of 8 samples left out of the evaluation: no class" in said


@pytest.mark.parametrize("seed", range(4))
def test_reranking_sorts_the_best_by_score_and_leaves_the_rest(seed):
    g = torch.Generator().manual_seed(seed)
    sim, extra = torch.randint(6, (12, 9), generator=g) / 6, torch.randn(12, 9, generator=g)     # many ties: of equals the earlier is among the best
    asked, k = [], (3, 16)[seed % 2]
    got = E.rerank(sim, lambda q, c: asked.extend(zip(q.tolist(), c.tolist())) or extra[q, c], k)
    assert len(asked) == len(set(asked)) == 12 * min(k, 9)   # the score is asked of the best only
    for q in range(12):
        order = sorted(range(9), key=lambda c: -sim[q, c])
        want = sorted(order[:k], key=lambda c: -extra[q, c]) + order[k:]
        assert sorted(range(9), key=lambda c: -got[q, c]) == want and torch.equal(got[q, order[k:]], sim[q, order[k:]])


class Judge(Captioner):
    """Knows nothing of a picture but its brightness; its score knows the colour, whose name is the text."""
    rerank, hues = True, {"red": 0, "green": 1, "blue": 2}

    def __init__(self):
        super().__init__(None)

    def encode_image(self, images):
        return F.normalize(torch.stack([images.float().mean((1, 2, 3)), torch.ones(len(images))], 1), dim=1)

    def encode_text(self, tokens, valid):
        return torch.ones(len(tokens), 2) / 2 ** 0.5

    def score(self, images, tokens, valid):                  # images: what self.vision made of them
        said = [BYTES.decode(t).split()[-1] for t in tokens]
        return torch.tensor([float(x.float().mean(0).argmax() == self.hues[s]) for x, s in zip(images, said)])


def reranked(folder, task):
    subject = (Judge(), BYTES, SimpleNamespace(**vars(CFG), seed=0), "", E.Store())
    return {r["metric"]: r["value"] for r in E.records(task, subject, folder, data.expand(folder, "test"), CPU)}


def test_a_model_whose_score_knows_better_is_reranked_in_both_directions_and_among_classes(tmp_path, pools):
    colours = [("red", "red"), ("green", "lime"), ("blue", "blue")]
    write(tmp_path / "p/test-0.tar", [(colour, {"txt": f"a\n{name}"[2:]}) for name, colour in colours])
    write(tmp_path / "l/test-0.tar", [(colour, {"cls": str(i)}) for i, (_, colour) in enumerate(colours)] * 2)
    (tmp_path / "l/classes.txt").write_text("red\ngreen\nblue\n")
    (tmp_path / "l/zeroshot_classification_templates.txt").write_text("a {c}\n{c}\n")
    pairs, classes = reranked(str(tmp_path / "p"), "retrieval"), reranked(str(tmp_path / "l"), "zeroshot")
    assert pairs["i2t_r1"] == pairs["t2i_r1"] == classes["zeroshot"] == pytest.approx(1 / 3)
    assert pairs["i2t_r1_itm"] == pairs["t2i_r1_itm"] == classes["zeroshot_itm"] == classes["zeroshot_itm_mean_per_class"] == 1
    for theirs in pools(2)(reranked, str(tmp_path / "p"), "retrieval"):
        assert theirs == pairs
    Plain = type("Plain", (Judge,), {"rerank": False})
    assert not [m for m, _, _ in E.retrieval(Plain(), BYTES, data.expand(str(tmp_path / "p"), "test"), CFG, CPU) if "itm" in m]


def test_the_mean_over_classes_differs_where_classes_are_of_different_size(tmp_path):
    write(tmp_path / "l/train-0.tar", [("red", {"cls": "0"}), ("blue", {"cls": "1"})] * 10)
    test = [write(tmp_path / "l/test-0.tar", [("red", {"cls": "0"})] * 8 + [("red", {"cls": "1"})])]
    assert E.nearest(Captioner(None), BYTES, test, CFG, CPU) == [("knn", 8 / 9, 9), ("knn_mean_per_class", 1 / 2, 9)]


def test_shards_decide_on_the_tasks_and_models_on_what_is_run_of_them(tmp_path, monkeypatch):
    pairs, labels = write(tmp_path / "p/test-0.tar", [("red", {"txt": "a"})]), write(tmp_path / "l/test-0.tar", [("red", {"cls": "0"})])
    assert E.tasks_for([pairs]) == E.tasks_for([write(tmp_path / "j/test-0.tar", [("red", {"cls": "0", "json": '{"caption": "a"}'})])])
    assert E.tasks_for([pairs]) == ["retrieval", "caption"] and E.tasks_for([labels]) == ["zeroshot", "caption"]
    write(tmp_path / "l/train-0.tar", [("red", {"cls": "0"})])
    assert E.tasks_for([labels]) == ["zeroshot", "caption", "knn", "linear"]
    monkeypatch.setattr(E, "TASKS", {task: lambda *_, task=task: [(task, 0.5, 1)] for task in E.TASKS})
    cfg = SimpleNamespace(val=[pairs, labels], out=str(tmp_path))
    for methods, want in (((), "knn linear"), (("encode_text",), "retrieval zeroshot knn linear"), (("generate",), "caption knn linear")):
        model = SimpleNamespace(**{"generate": None, **dict.fromkeys(methods, print)})
        assert list(E.evaluate(model, BYTES, cfg, CPU)) == list(json.loads((tmp_path / "result.json").read_text())) == want.split()


def test_the_table_shows_fractions_as_percent_and_costs_and_cider_as_they_are():
    for name, value, want in (("bleu4", 0.1234, "12.3 %"), ("cider", 0.5, "0.500"), ("nats_per_token_own", 2.5, "2.500"), ("top5", None, "-")):
        assert E.table([(name, value, 1024)]).split() == [name, *want.split(), "n", "=", "1,024"]


def test_the_command_line_refuses_what_a_model_cannot_do_and_says_what_it_can(tiny, tiny_world, tmp_path, monkeypatch):
    model = align.Model(tiny)
    (tmp_path / "run").mkdir()
    common.save(tiny, model, torch.optim.SGD(model.parameters()), 0, BYTES.dumps(), SimpleNamespace())
    with pytest.raises(common.UserError, match="last.pt is a ALIGN: it can do zeroshot, retrieval, knn, linear, attentive, finetune, segment, detect, vqa$"):
        E.main(["caption", f"{tiny.out}/last.pt", "--data", f"{tiny_world}/pairs"])
    monkeypatch.setattr(E, "load", lambda *_: (Captioner(None), BYTES, CFG, ""))
    with pytest.raises(common.UserError, match="x.pt is a Captioner: it can do knn, linear, attentive, caption, finetune, segment, detect, vqa$"):
        E.main(["zeroshot", "x.pt", "--data", f"{tiny_world}/labels"])


# -- boxes of random crops --

@pytest.mark.parametrize("width, height, scale", [(100, 100, 0.2), (640, 400, 0.08), (300, 500, 0.6), (7, 5, 0.1)])
def test_boxes_lie_inside_and_keep_area_and_ratio(width, height, scale):
    rng = np.random.default_rng(0)
    boxes = np.array([data.random_box(rng, width, height, scale) for _ in range(3000)])
    x, y, w, h = boxes.T
    assert (boxes[:, :2] >= 0).all() and (x + w <= width).all() and (y + h <= height).all() and min(w.min(), h.min()) > 0
    slack = 0.5 / w + 0.5 / h                                # each side is rounded
    assert (w * h >= scale * width * height * (1 - slack) - 1).all() and (abs(np.log(w / h)) <= math.log(4 / 3) + 1.5 * slack).all()
    free = (w < width) & (h < height)
    for at, room in ((x, width - w), (y, height - h)):       # anywhere, both borders included
        assert at[free].min() == 0 and (at == room)[free].any() and abs(np.mean(at[free] / room[free]) - 0.5) < 0.03


def test_areas_and_ratios_are_evenly_spread_where_no_box_is_refused():
    rng = np.random.default_rng(1)
    _, _, w, h = np.array([data.random_box(rng, 1000, 1000, 0.2) for _ in range(20000)]).T
    area, ratio = w * h / 1e6, np.log(w / h) / math.log(4 / 3)
    inside = area < 0.75                                     # both sides fit, whatever the ratio
    for values, low, high in ((area, 0.2, 0.75), (ratio, -1, 1)):
        share = np.histogram(values[inside], 5, (low, high))[0] / inside.sum()
        assert abs(share - 0.2).max() < 0.02, share
    r = np.random.default_rng(2).uniform((0.2, -1), (1, 1), (10**5, 2))                      # refused: a side beyond the image
    fits = abs(r[:, 1]) * math.log(4 / 3) <= -np.log(r[:, 0])
    assert inside.mean() == pytest.approx((r[:, 0] < 0.75).sum() / fits.sum(), abs=0.015)


def test_extreme_images_give_the_central_box_of_the_nearest_ratio_and_scale_1_the_whole_of_a_square():
    drawn = lambda *of: {data.random_box(np.random.default_rng(s), *of) for s in range(100)}
    assert drawn(10, 1000, 0.2) == {(0, 493, 10, 13)} and drawn(1000, 10, 0.2) == {(493, 0, 13, 10)}
    for side in (1, 16, 48, 1001):
        assert drawn(side, side, 1.0) == {(0, 0, side, side)}


def test_crops_mirror_and_the_central_view_is_the_central_square():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    image, planes = Image.fromarray(pixels), pixels.transpose(2, 0, 1)
    for box, size in (((0, 0, 48, 32), 20), ((5, 3, 30, 20), 16)):
        assert np.array_equal(data.crop(image, box, size, True), data.crop(image, box, size)[:, :, ::-1])
    assert np.array_equal(data.centre(image, 32), planes[:, :, 8:40]) and np.array_equal(data.crop(image, (3, 2, 16, 16), 16), planes[:, 2:18, 3:19])
    tall = Image.fromarray(np.repeat(np.repeat(pixels[:12, :8], 10, 0), 10, 1))              # blocks of 10 survive any reduction in their middles
    assert np.array_equal(data.centre(tall, 80), np.asarray(tall).transpose(2, 0, 1)[:, 20:100])
