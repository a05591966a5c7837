"""TiMix against its specification: mixing, targets, losses, predictor, rows, runs."""
import math
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import timix
from conftest import (
    RGB, assert_same_gradients, close, gradients, painted_sample, refused, run, tiny_config,
    values)
from data import Tokenizer
from timix import TiMix, mixed_targets, text_aware_mix

pytestmark = pytest.mark.usefixtures("one_thread")

B = 8
GROUP = 4
L = 12
GRID = 4
N = GRID**2
PROGRESS = 0.5  # of the rise of alpha and of the weight of the mixture
PARTNER = [3, 2, 1, 0, 7, 6, 5, 4]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def config(**changes):
    """A tiny TiMix with 16 patches, windows of 1 to 3 patches a side, groups of 4 rows."""
    fields = dict(image_size=32, context=L, region_context=10, embed=8, mask_ratio=0.3, boxes=True)
    return tiny_config("timix", "no data", "no folder", **{**fields, **changes})


def make_model(**changes):
    """In float64, without zeros and with a teacher of its own: both would hide mistakes."""
    torch.manual_seed(0)
    model = TiMix(config(**changes)).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.temperature.data.fill_(0.3)
    return model


def make_texts(length, *shape):
    """Random texts of 4 to 9 tokens, begin and end among them -> tokens, valid (*shape, length)."""
    place = torch.arange(length)
    lengths = 4 + torch.arange(math.prod(shape)).view(*shape, 1) % 6
    tokens = torch.randint(8, 300, (*shape, length), generator=seeded(length))
    tokens[..., 0] = Tokenizer.BOS
    tokens = tokens.where(place != lengths - 1, Tokenizer.EOS).where(place < lengths, Tokenizer.PAD)
    return tokens, place < lengths


def make_batch():
    """Pairs, and half as many images with two texts, of which every third lacks its second."""
    images = torch.randint(0, 256, (2 * B, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    tokens, valid = make_texts(L, B)
    region_tokens, region_valid = make_texts(10, B // 2, 2)
    return {
        "images": images[:B], "tokens": tokens, "valid": valid,
        "region_images": images[-B // 2:], "region_tokens": region_tokens,
        "region_valid": region_valid,
        "region_in_box": torch.rand(B // 2, 2, N, generator=seeded()) < 0.3,
        "region_used": torch.tensor([[True, i % 3 != 1] for i in range(B // 2)]),
    }


def make_noise():
    g = seeded(1)
    return timix.Noise(torch.rand(B, 3, L, generator=g), torch.rand(B, 2, GROUP, generator=g),
                       torch.rand(B, N, generator=g))


def objective(model, **changes):
    """loss, terms of a step with a mixture."""
    return timix.losses(model, make_batch(), make_noise(), seeded(), config(**changes), PROGRESS,
                        mixing=True)


# ---- mixing ----

def test_the_worked_example_of_mixing():
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    first = 10 * y + x
    images = torch.stack([first, 100 + first])[:, None].expand(-1, 3, -1, -1)
    scores = torch.zeros(2, 4, 4)
    scores[0, :2, :2] = 1
    scores[0, 2:, 2:] = -1
    scores[1, 2:, :2] = 1
    scores[1, :2, 2:] = -1
    expected = images.clone()
    expected[0, :, 2:, 2:] = torch.tensor([[120, 121], [130, 131]])
    expected[1, :, :2, 2:] = torch.tensor([[0, 1], [10, 11]])
    mixed, lam = text_aware_mix(images, scores.flatten(1), 2, 2)
    assert torch.equal(mixed, expected) and lam == 0.75


def mix_by_loops(images, scores, s):
    """Window by window; of equal windows the first in reading order."""
    n = math.isqrt(scores.shape[1])
    p = images.shape[2] // n
    corners = [(r, c) for r in range(n - s + 1) for c in range(n - s + 1)]

    def window(x, corner, side):
        row, column = corner
        return x[..., row * side:(row + s) * side, column * side:(column + s) * side]

    def total(i, corner):
        return window(scores[i].view(n, n), corner, 1).sum().item()

    mixed = images.clone()
    for i in range(len(images)):
        j = PARTNER[i]
        covered = min(corners, key=lambda corner: total(i, corner))
        pasted = max(corners, key=lambda corner: total(j, corner))
        window(mixed[i], covered, p)[:] = window(images[j], pasted, p)
    return mixed


def test_window_sides_are_uniform_between_their_bounds():
    g = seeded()
    sides = Counter(timix.window_side(16, 0.35, 0.75, g) for _ in range(2000))
    assert set(sides) == set(range(5, 13))
    pasted = sum(count * s * s for s, count in sides.items()) / 2000 / 256
    assert pasted == pytest.approx(0.3027, abs=0.015)  # the specification's mean share
    assert timix.window_side(1, 0.35, 0.75, g) == 1


def test_cutmix_pastes_one_box_at_the_same_place_and_counts_its_pixels():
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 16, 16)
    g = seeded()
    shares = []
    for _ in range(1500):
        mixed, lam = timix.cutmix(images, 2, g)
        box = (mixed != images)[0, 0]
        assert box.sum() == box.any(1).sum() * box.any(0).sum()
        assert torch.equal(mixed, torch.where(box, images[[1, 0, 3, 2]], images))
        shares.append(box.double().mean().item())
        assert lam == pytest.approx(1 - shares[-1])
    # area a = 1 - lambda, uniform center: a clipped side is 2h - h^2 with h = sqrt(a) / 2 on
    # average; squared and integrated over a that is 77 / 240
    assert np.mean(shares) == pytest.approx(77 / 240, abs=0.03)


# ---- contrast ----

def mixing_matrix(lam, size=B):
    """M = lambda I + (1 - lambda) J, with J the permutation that takes a row to its partner."""
    eye = torch.eye(size, dtype=torch.float64)
    return lam * eye + (1 - lam) * eye[PARTNER[:size]]


def loss_with_lambda(lam, logits):
    M = mixing_matrix(lam, len(logits))
    return timix.itc_loss((logits, logits.T), (M, M))


def test_mixing_is_infonce_plus_a_penalty_on_the_margin():
    S = 3 * torch.randn(B, B, generator=seeded(3), dtype=torch.float64)
    losses = []
    for logits in (S, S.T):
        for i, j in enumerate(PARTNER):
            infonce = -logits[i].log_softmax(0)[i]
            losses.append(infonce + 0.25 * (logits[i, i] - logits[i, j]))
    assert loss_with_lambda(0.75, S).item() == close(sum(losses).item() / (2 * B))


def test_the_mixed_loss_is_least_at_a_finite_margin_and_there_the_entropy_of_lambda():
    best = torch.full((4, 4), -50.0, dtype=torch.float64)
    best.fill_diagonal_(math.log(0.7 / 0.3))
    for i in range(4):
        best[i, 3 - i] = 0
    assert loss_with_lambda(0.7, best).item() == pytest.approx(0.610864, abs=1e-6)
    for step in (-0.1, 0.1, 5.0):
        assert loss_with_lambda(0.7, best + step * torch.eye(4)) > loss_with_lambda(0.7, best)


def test_the_worked_numbers_of_the_specification():
    S = torch.tensor([[2.0, 1.0], [0.5, 1.5]])
    M = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    assert timix.itc_loss((S, S.T), (M, M)).item() == pytest.approx(0.5755, abs=5e-5)
    image_targets, text_targets = mixed_targets(S, S.T, 0.75, 2)
    expected = torch.tensor([[0.6155, 0.3845], [0.3845, 0.6155]])
    torch.testing.assert_close(image_targets, expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(text_targets, S.T.softmax(1) @ M)
    as_released = timix.itc_loss((S, S.T), (image_targets, image_targets))  # one table for both
    assert as_released.item() == pytest.approx((0.6977 + 0.7222) / 2, abs=5e-5)


def test_words_are_masked_at_their_rates_and_predicted_as_they_were():
    tokens, valid = make_texts(20, 12_000)
    noise = torch.rand(12_000, 3, 20, generator=seeded(2))
    result, position, labels = timix.mask_tokens(tokens, valid, noise, 0.15, 500)
    masked = torch.zeros_like(valid).scatter(1, position, labels >= 0)
    assert torch.equal(tokens.gather(1, position).where(labels >= 0, -1), labels)
    assert torch.equal(result[~masked], tokens[~masked])
    assert not masked[:, 0].any() and not (masked & ~valid).any()
    became = result[masked]
    same = became == tokens[masked]
    is_mask = became == Tokenizer.MASK
    random_words = became[~is_mask & ~same]
    assert masked.sum() / valid[:, 1:].sum() == pytest.approx(0.15, abs=0.01)
    assert is_mask.double().mean().item() == pytest.approx(0.8, abs=0.02)
    assert same.double().mean().item() == pytest.approx(0.1, abs=0.02)
    assert random_words.min() >= 8 and random_words.max() < 500  # never a special token
    assert random_words.double().mean().item() == pytest.approx(253.5, abs=20)


# ---- the objective ----

class Reference:
    """All terms on one rank, nothing done to more than one row at a time."""

    def __init__(self, model, batch, noise, alpha):
        self.model = model
        self.batch = batch
        self.noise = noise
        self.alpha = alpha
        self.tokens, self.states, self.text, self.S = self.towers(model)
        self.teacher_tokens, _, _, T = self.towers(model.teacher)
        self.T = T.detach()

    def towers(self, net):
        pairs = zip(self.batch["tokens"], self.batch["valid"])
        image_tokens = [net.vision(x[None]) for x in self.batch["images"]]
        states = [net.text(tokens[None], valid[None]) for tokens, valid in pairs]
        image = torch.cat([F.normalize(net.image_proj(x[:, 0])) for x in image_tokens])
        text = torch.cat([F.normalize(net.text_proj(x[:, 0])) for x in states])
        return image_tokens, states, text, image @ text.T / self.model.temperature

    def itc(self):
        losses = []
        for S, T in [(self.S, self.T), (self.S.T, self.T.T)]:
            targets = self.alpha * T.softmax(1) + (1 - self.alpha) * mixing_matrix(1.0)
            losses.append(F.cross_entropy(S, targets))
        return sum(losses) / 2

    def negative(self, logits, i, direction):
        """The largest of logits + Gumbel noise among the others of the group."""
        gumbel = -(-self.noise.itm[i, direction].log()).log()
        others = [j for j in range(B) if j // GROUP == i // GROUP and j != i]
        return max(others, key=lambda j: (logits[i, j] + gumbel[j % GROUP]).item())

    def fuse(self, net, states, i, image_tokens):
        return net.fuse(states, self.batch["valid"][i:i + 1], image_tokens)[0]

    def itm(self):
        logits = []
        for i in range(B):
            negative_text = self.negative(self.S, i, 0)
            negative_image = self.negative(self.S.T, i, 1)
            for t, j in [(i, i), (negative_text, i), (i, negative_image)]:
                fused = self.fuse(self.model, self.states[t], t, self.tokens[j])
                logits.append(self.model.itm_head(fused[0]))
        return F.cross_entropy(torch.stack(logits), torch.tensor([1, 0, 0] * B))

    def mlm(self):
        masked, position, labels = timix.mask_tokens(
            self.batch["tokens"], self.batch["valid"], self.noise.mlm, 0.3, 300)
        losses = []
        for i in range(B):
            log_probs = self.read(self.model, masked[i], i, self.tokens[i])
            teacher = self.read(self.model.teacher, masked[i], i, self.teacher_tokens[i]).detach()
            for place, word in zip(position[i], labels[i]):
                if word >= 0:
                    soft = (teacher[place].exp() * log_probs[place]).sum()
                    hard = log_probs[place, word]
                    losses.append(-(1 - self.alpha) * hard - self.alpha * soft)
        assert len(losses) > 8
        return sum(losses) / len(losses)

    def read(self, net, tokens, i, image_tokens):
        states = net.text(tokens[None], self.batch["valid"][i:i + 1])
        return net.mlm_head(self.fuse(net, states, i, image_tokens)).log_softmax(1)

    def predict(self, image, states):
        """The patch predictor: each patch beside the mean patch and the text."""
        predictor = self.model.predictor
        middle = self.model.vision.blocks_until(image[None], self.model.middle)[0, 1:]
        halves = F.gelu(predictor.embed(predictor.norm(middle)))
        mean = halves[:, 8:].mean(0)
        rows = [predictor.head(torch.cat([x[:8], mean, states[0, 0]])) for x in halves]
        return torch.stack(rows).log_softmax(1)

    def pta(self):
        losses = []
        for r, t in self.batch["region_used"].nonzero().tolist():
            states = self.model.text(self.batch["region_tokens"][r, t:t + 1],
                                     self.batch["region_valid"][r, t:t + 1])
            log_probs = self.predict(self.batch["region_images"][r], states)
            patches = self.batch["region_in_box"][r, t]
            losses.append(F.cross_entropy(log_probs, patches.long()))
        return sum(losses) / len(losses)

    def mix(self):
        images = self.batch["images"]
        scores = [self.predict(x, states)[:, 1] for x, states in zip(images, self.states)]
        s = timix.window_side(GRID, 0.35, 0.75, seeded())
        mixed = mix_by_loops(images, torch.stack(scores), s)
        mixed = torch.cat([self.model.encode_image(x[None]) for x in mixed])
        S = mixed @ self.text.T / self.model.temperature
        M = mixing_matrix(1 - s * s / N)
        image_loss = F.cross_entropy(S, (M @ self.S.softmax(1)).detach())
        text_loss = F.cross_entropy(S.T, (self.S.T.softmax(1) @ M).detach())
        return (image_loss + text_loss) / 2


def test_all_terms_and_their_weighted_sum_are_those_of_a_reference_row_by_row():
    model = make_model()
    weights = dict(w_itc=0.7, w_itm=2.0, w_mlm=0.5, w_pta=0.3, w_mix=1.5)
    loss, terms = objective(model, **weights)
    reference = Reference(model, make_batch(), make_noise(), alpha=0.4 * PROGRESS)
    weights["w_mix"] *= PROGRESS
    expected_loss = 0
    for name in ("itc", "itm", "mlm", "pta", "mix"):
        expected = getattr(reference, name)()
        assert terms[name].item() == close(expected.item()), name
        expected_loss += weights[f"w_{name}"] * expected
    assert loss.item() == close(expected_loss.item())
    assert_same_gradients(gradients(model, loss), gradients(model, expected_loss), 1e-8, 1e-10)


def test_gradients_stop_at_the_teacher_the_targets_and_the_predictor():
    """The reference, above, has the gradients of all other parts."""
    model = make_model()
    model.teacher.requires_grad_(True)  # it must not get any even so
    _, terms = objective(model)
    without_gradient = {name: ("teacher.", "predictor.") for name in ("itc", "itm", "mlm", "mix")}
    without_gradient["pta"] = ("teacher.", "vision.blocks.1.", "vision.norm.", "fusion")
    for name, parts in without_gradient.items():
        for parameter, grad in gradients(model, terms[name]).items():
            if parameter.startswith(parts):
                assert grad is None or not grad.any(), (name, parameter)


def test_without_boxes_patches_are_scored_by_their_cosine_with_the_text():
    model = make_model(boxes=False)
    images, tokens, valid, *_ = make_batch().values()
    patches = model.image_proj(model.vision(images)[:, 1:])
    text = model.encode_text(tokens, valid)
    scores = model.patch_scores(model.encode(images, tokens, valid))
    torch.testing.assert_close(scores, F.cosine_similarity(patches, text[:, None], dim=2))
    assert not scores.requires_grad


# ---- model ----

def test_the_teacher_starts_as_the_student_and_forgets_at_the_rate_of_its_momentum():
    model = TiMix(config()).double()
    start = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.data += p.requires_grad  # the student moves by 1
    for _ in range(7):
        model.update_ema(0.9)
    for name, p in model.teacher.named_parameters():
        torch.testing.assert_close(p, start[name] + 1 - 0.9**7, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before,after", [(-3.0, 0.001), (7.0, 0.5)])
def test_temperature_is_held_between_its_bounds(before, after):
    model = TiMix(config(temperature=before))
    model.clamp_temperature()
    assert model.temperature.item() == pytest.approx(after)


def test_the_predictor_has_the_published_size():
    assert sum(p.numel() for p in timix.PatchPredictor(768, 768).parameters()) == 1_256_642


def test_recall_and_precision_by_hand():
    # the third text marks every patch, as captions do; the fourth is not used
    in_box = torch.tensor([[[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]]]).bool()
    predicted = torch.tensor([[[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]])
    used = torch.tensor([[True, True, True, False]])
    metrics = timix.recall_and_precision(torch.stack([1 - predicted, predicted], 3), in_box, used)
    assert values(metrics) == pytest.approx({"pta_recall": 2 / 4, "pta_precision": 2 / 3})


def test_held_out_images_are_squashed_to_the_square():
    image = Image.new("RGB", (80, 20), "red")
    image.paste((0, 0, 255), (20, 0, 80, 20))  # a central crop would be blue alone
    view = TiMix(config()).held_out_view(image)
    assert view.shape == (3, 32, 32)
    assert (view[0, :, :6] > 250).all() and (view[2, :, 10:] > 250).all()


def test_retrieval_is_reranked_by_logit_1_of_the_matching_head():
    model = make_model()
    images, tokens, valid, *_ = make_batch().values()
    score = model.match_score(model.vision(images), tokens, valid)
    expected = model.itm_head(model.fused(images, tokens, valid))[:, 1]
    torch.testing.assert_close(score, expected)


# ---- rows ----

@pytest.mark.parametrize("box,size,grid,rows,columns", [
    ((8, 4, 24, 8), (32, 32), 8, slice(1, 2), slice(2, 6)),
    ((25, 0, 25, 20), (100, 20), 4, slice(0, 4), slice(1, 2)),
])
def test_a_box_marks_every_patch_it_touches_and_at_least_one(box, size, grid, rows, columns):
    expected = np.zeros((grid, grid), bool)
    expected[rows, columns] = True
    assert np.array_equal(timix.box_patches(box, size, grid), expected)


def test_a_crop_holds_its_box_whole_and_each_edge_lies_anywhere_between_box_and_border():
    rng = np.random.default_rng(0)
    box = (6.5, 5, 20, 14, "red")
    crops = np.array([timix.crop_around(box, (28, 21), rng) for _ in range(200)])
    left, top, width, height = crops.T
    assert set(left) == set(range(7)) and set(left + width) == {27, 28}
    assert set(top) == set(range(6)) and set(top + height) == {19, 20, 21}


def test_a_region_image_has_the_texts_and_patches_of_the_boxes_that_are_mostly_inside(monkeypatch):
    def crop(box, size, rng):
        assert box in sample.boxes() and size == (96, 64)
        return 16, 2, 64, 60  # with half of the red box, more of the green one, all of the blue one

    def augment(image, rng, operations):
        assert operations == timix.PHOTOMETRIC  # the others would move the pixels of the boxes
        return image

    monkeypatch.setattr(timix, "crop_around", crop)
    monkeypatch.setattr(timix, "rand_augment", augment)
    cfg = config(texts_per_region=4, caption_as_region=True, region_context=16, flip=True,
                 augment=True)
    sample = painted_sample(caption="all of it")
    for seed in range(8):
        row = timix.region_example(sample, np.random.default_rng(seed), cfg, Tokenizer())
        texts = [Tokenizer().decode(tokens) for tokens in row["region_tokens"][row["region_used"]]]
        patches = dict(zip(texts, row["region_in_box"]))
        assert patches.pop("all of it").all()
        assert patches.keys() == {"green", "blue"}
        for text, marked in patches.items():  # pixels and marks are mirrored alike
            off = np.abs(row["region_images"].astype(int) - np.reshape(RGB[text], (3, 1, 1)))
            colored = (off.max(0) < 60).reshape(4, 8, 4, 8).any((1, 3)).ravel()
            assert colored.any() and not colored[~marked].any()


# ---- augmentation ----

@pytest.mark.parametrize("operation,sign,x,y", [
    ("translate_x", 1, 17, 20), ("translate_y", -1, 10, 13), ("shear_x", 1, 14.3, 20),
    ("shear_y", 1, 10, 22.2), ("rotate", 1, 10.45, 16.56), ("rotate", -1, 10.81, 23.37)])
def test_geometric_operations_move_pixels_as_released(operation, sign, x, y):
    """Pixel (10, 20) of 40 x 40 comes from (x, y), worked by hand."""
    rows, columns = np.mgrid[:40, :40]
    image = np.stack([60 + 2 * columns, 60 + 2 * rows, 0 * rows], 2).astype(np.uint8)
    result = np.asarray(timix.distort(Image.fromarray(image), operation, sign))
    assert result[20, 10, :2] == pytest.approx([60 + 2 * x, 60 + 2 * y], abs=2)


# ---- runs ----

@pytest.fixture
def cfg(toy_data, tmp_path):
    return tiny_config("timix", toy_data, tmp_path / "run", image_size=32, scale=1.0, momentum=0.9,
                       steps=10, augment=True)


def test_a_run_raises_its_weights_and_stops_mixing(cfg):
    weights = dict(w_itm=2.0, w_mlm=0.5, w_pta=0.7)
    rows, _, _ = run(timix.main, replace(cfg, ramp=0.4, mix_until=0.5, w_mix=0.3, **weights))
    for k, row in enumerate(rows):
        expected = row["itc"] + sum(weight * row[name[2:]] for name, weight in weights.items())
        assert ("mix" in row) == (k < 5)
        if k < 5:
            expected += 0.3 * min(1, k / 4) * row["mix"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_mixtures_differ_in_the_mixed_term_alone(cfg):
    rows = []
    for mix in ("text", "random", "cutmix"):
        (row,), _, _ = run(timix.main, replace(cfg, mix=mix, steps=1, out=f"{cfg.out}-{mix}"))
        rows.append(row)
    for name in ("itc", "itm", "mlm", "pta"):
        assert len({row[name] for row in rows}) == 1, name
    assert len({row["mix"] for row in rows}) == 3


def test_data_without_boxes_train_with_cosines_and_say_so_unless_boxes_are_wanted(
        cfg, toy_data, tmp_path, capsys):
    index = data.open_index(f"{toy_data}/pairs")
    path = f"{tmp_path}/train-00000.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(48):
            data.add_file(tar, f"{i}.jpg", index[i].members["jpg"])
            data.add_file(tar, f"{i}.txt", index[i].captions()[0].encode())
    cfg = replace(cfg, data=[path], steps=2)
    rows, state, _ = run(timix.main, cfg)
    assert "no boxes or --w-pta 0: the patch predictor is not trained" in capsys.readouterr().out
    assert state["config"]["boxes"] is False and "mix" in rows[0] and "pta" not in rows[0]
    line = refused(timix.main, replace(cfg, boxes=True, fresh=True))
    assert "none of the 48 samples can be used" in line and "no box" in line


@pytest.mark.parametrize("changes,expected", [
    (dict(mix="mixup"), "--mix mixup: choose none, cutmix, random or text"),
    (dict(min_side=0.8), "--min-side 0.8 --max-side 0.75"),
    (dict(alpha=1.5), "--alpha 1.5"),
    (dict(mask_ratio=0.6), "--mask-ratio 0.6"),
    (dict(texts_per_region=0), "--texts-per-region 0"),
])
def test_what_cannot_be_trained_is_refused_in_one_line(cfg, changes, expected):
    assert expected in refused(timix.main, replace(cfg, **changes))
