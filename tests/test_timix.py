"""TiMix against its specification: mixing, targets, losses, predictor, rows, runs."""
import io
import math
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import timix
from common import rank, world_size
from conftest import (
    BOXES, RGB, assert_same_gradients, gradients, painted_sample, refused, run, tiny_config)
from data import Tokenizer
from timix import TiMix, mixed_targets, text_aware_mix

pytestmark = pytest.mark.usefixtures("one_thread")

B, GROUP, L, GRID = 8, 4, 12, 4
N = GRID**2
PARTNER = [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def config(**changes):
    """A tiny TiMix with 16 patches, windows of 1 to 3 patches a side, groups of 4 rows."""
    fields = dict(image_size=32, context=L, region_context=10, embed=8, scale=1.0, momentum=0.9,
                  ramp=0.2, mask_ratio=0.3, steps=20, save_every=100, boxes=True)
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


def make_images(n, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=seeded(seed), dtype=torch.uint8)


def make_batch(n=B):
    """n pairs, and n / 2 images with two texts, of which every third lacks its second."""
    tokens, valid = make_texts(L, n)
    region_tokens, region_valid = make_texts(10, n // 2, 2)
    return {
        "images": make_images(n), "tokens": tokens, "valid": valid,
        "region_images": make_images(n // 2, seed=1), "region_tokens": region_tokens,
        "region_valid": region_valid,
        "region_in_box": torch.rand(n // 2, 2, N, generator=seeded()) < 0.3,
        "region_used": torch.tensor([[True, i % 3 != 1] for i in range(n // 2)]),
    }


def make_noise(n=B):
    g = seeded(1)
    return timix.Noise(torch.rand(n, 3, L, generator=g), torch.rand(n, 2, GROUP, generator=g),
                       torch.rand(n, N, generator=g))


def objective(model, batch=None, progress=0.5, mixing=True, **changes):
    """loss, terms of a step on one rank."""
    batch = make_batch() if batch is None else batch
    noise = make_noise(len(batch["images"]))
    return timix.losses(model, batch, noise, seeded(), config(**changes), progress, mixing)


def values(terms):
    return {name: x.item() for name, x in terms.items()}


def shard(x):
    """This rank's rows."""
    return x.chunk(world_size())[rank()]


def exactly(x):
    return pytest.approx(x, rel=1e-10, abs=1e-12)


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


def mix_by_loops(images, scores, s, group):
    """Window by window, patch by patch; of equal windows the first in reading order."""
    n = math.isqrt(scores.shape[1])
    p = images.shape[2] // n
    corners = [(r, c) for r in range(n - s + 1) for c in range(n - s + 1)]

    def total(i, corner):
        r, c = corner
        return scores[i].view(n, n)[r:r + s, c:c + s].double().sum().item()

    mixed = images.clone()
    for i in range(len(images)):
        j = i // group * group + group - 1 - i % group
        to_row, to_column = min(corners, key=lambda corner: total(i, corner))
        row, column = max(corners, key=lambda corner: total(j, corner))
        for a in range(s * p):
            for b in range(s * p):
                pixel = images[j, :, row * p + a, column * p + b]
                mixed[i, :, to_row * p + a, to_column * p + b] = pixel
    return mixed


@pytest.mark.parametrize("n,patch,s,rows,group,ties", [
    (4, 1, 2, 2, 2, False), (8, 2, 3, 8, 4, False), (8, 1, 6, 6, 6, False), (5, 3, 1, 8, 2, True),
    (6, 2, 4, 4, 4, True), (6, 1, 6, 4, 2, False)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_windows_are_chosen_and_pasted_as_by_loops(n, patch, s, rows, group, ties, dtype):
    images = make_images(rows, n * patch).to(dtype)
    scores = torch.randn(rows, n * n, generator=seeded(), dtype=torch.float64)
    scores = scores.round() if ties else scores
    before = images.clone()
    mixed, lam = text_aware_mix(images, scores, s, group)
    assert torch.equal(mixed, mix_by_loops(images, scores, s, group))
    assert torch.equal(images, before) and mixed.dtype == dtype
    assert lam == 1 - s * s / n**2


def test_scores_may_be_of_any_scale_and_are_summed_in_float32():
    images = make_images(B)
    scores = torch.randn(B, N, generator=seeded())
    scaled = (0.1 + 5 * torch.rand(B, 1)) * scores + torch.randn(B, 1)
    mixed, _ = text_aware_mix(images, scores, 2, GROUP)
    assert torch.equal(text_aware_mix(images, scaled, 2, GROUP)[0], mixed)
    images = make_images(2, 16)  # bfloat16 could not tell apart sums of 36 such scores
    scores = (100 + torch.randn(2, 256, generator=seeded()).round()).bfloat16()
    assert torch.equal(text_aware_mix(images, scores, 6, 2)[0], mix_by_loops(images, scores, 6, 2))


def test_a_window_of_everything_and_of_equal_images():
    images = make_images(B)
    scores = torch.randn(B, N, generator=seeded())
    mixed, lam = text_aware_mix(images, scores, GRID, GROUP)
    assert torch.equal(mixed, images[PARTNER[:B]]) and lam == 0
    equal = images[:1].expand(4, -1, -1, -1)  # constant scores: the first window is least and most
    assert torch.equal(text_aware_mix(equal, torch.zeros(4, N), 2, 4)[0], equal)
    with pytest.raises(ValueError, match="group 3 is odd"):
        text_aware_mix(images[:6], scores[:6], 2, 3)


def test_pairs_do_not_depend_on_other_pairs():
    images = make_images(B)
    scores = torch.randn(B, N, generator=seeded())
    mixed, _ = text_aware_mix(images, scores, 2, GROUP)
    for order in ([4, 5, 6, 7, 0, 1, 2, 3], [1, 0, 3, 2, 4, 5, 6, 7]):
        moved, _ = text_aware_mix(images[order], scores[order], 2, GROUP)
        assert torch.equal(moved, mixed[order])


@pytest.mark.parametrize("n,smallest,largest", [(16, 5, 12), (14, 4, 10), (6, 2, 4), (1, 1, 1)])
def test_window_sides_are_uniform_between_their_bounds(n, smallest, largest):
    g = seeded()
    sides = Counter(timix.window_side(n, 0.35, 0.75, g) for _ in range(2000))
    assert set(sides) == set(range(smallest, largest + 1))
    mean = 2000 / len(sides)
    assert all(abs(count - mean) < 5 * math.sqrt(mean) for count in sides.values())
    if n == 16:  # mean share of a pasted window
        pasted = sum(count * s * s for s, count in sides.items()) / 2000 / 256
        assert pasted == pytest.approx(0.3027, abs=0.015)


def test_cutmix_pastes_one_box_at_the_same_place_and_counts_its_pixels():
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 16, 16)
    others = images[[1, 0, 3, 2]]
    g = seeded()
    shares = []
    for _ in range(1500):
        mixed, lam = timix.cutmix(images, 2, g)
        box = (mixed != images)[0, 0]
        height = box.any(1).sum()
        width = box.any(0).sum()
        assert box.sum() == height * width
        assert torch.equal(mixed, torch.where(box, others, images))
        assert lam == pytest.approx(1 - box.double().mean().item())
        shares.append(box.double())
    # area a = 1 - lambda, uniform center: a clipped side is 2h - h^2 with h = sqrt(a) / 2 on
    # average; squared and integrated over a that is 77 / 240
    shares = torch.stack(shares).mean(0)
    assert shares.mean().item() == pytest.approx(77 / 240, abs=0.03)
    for mirrored in (shares.flip(0), shares.flip(1), shares.T):
        assert (shares - mirrored).abs().max() < 0.08


# ---- targets ----

def mixing_matrix(lam, size=16):
    """M = lambda I + (1 - lambda) J, with J the permutation that takes a row to its partner."""
    eye = torch.eye(size, dtype=torch.float64)
    return lam * eye + (1 - lam) * eye[PARTNER[:size]]


def random_logits():
    return torch.randn(2, 16, 16, generator=seeded(3), dtype=torch.float64) * 3


def targets_of_this_rank():
    i2t, t2i = random_logits()
    targets = mixed_targets(shard(i2t).requires_grad_(), shard(t2i).requires_grad_(), 0.7, GROUP)
    assert not any(x.requires_grad for x in targets)
    return targets


@pytest.mark.parametrize("world", [1, 2, 4])
def test_targets_are_the_mixed_probabilities_on_any_number_of_ranks(run_on_ranks, world):
    if world == 1:
        parts = [targets_of_this_rank()]
    else:
        parts = run_on_ranks(world, targets_of_this_rank)
    image_targets, text_targets = [torch.cat(x) for x in zip(*parts)]
    i2t, t2i = random_logits()
    M = mixing_matrix(0.7)
    torch.testing.assert_close(image_targets, M @ i2t.softmax(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(text_targets, t2i.softmax(1) @ M, rtol=1e-12, atol=1e-14)
    for targets in (image_targets, text_targets):
        assert (targets.sum(1) - 1).abs().max() < 1e-12


def test_targets_of_a_sure_model_are_lambda_and_of_an_ignorant_one_uniform():
    eye = torch.eye(16, dtype=torch.float64)
    for sureness, expected in [(1e4, mixing_matrix(0.7)), (0.0, torch.full_like(eye, 1 / 16))]:
        for targets in mixed_targets(sureness * eye, sureness * eye, 0.7, GROUP):
            torch.testing.assert_close(targets, expected)


def soft_targets_of_this_rank(alpha):
    return timix.soft_targets([shard(x) for x in random_logits()], alpha)


@pytest.mark.parametrize("world", [2, 4])
def test_teacher_softens_the_true_pairs_on_any_number_of_ranks(run_on_ranks, world):
    parts = run_on_ranks(world, soft_targets_of_this_rank, 0.4)
    for targets, logits in zip(zip(*parts), random_logits()):
        expected = 0.4 * logits.softmax(1) + 0.6 * mixing_matrix(1.0)
        torch.testing.assert_close(torch.cat(targets), expected, rtol=1e-12, atol=1e-14)


# ---- contrast ----

S16 = random_logits()[0]


def loss_with_lambda(lam, logits):
    M = mixing_matrix(lam, len(logits))
    return timix.itc_loss((logits, logits.T), (M, M))


def test_the_mixed_loss_is_linear_between_own_and_partners_texts():
    own = torch.arange(16)
    theirs = torch.tensor(PARTNER)
    clean = (F.cross_entropy(S16, own) + F.cross_entropy(S16.T, own)) / 2
    swapped = (F.cross_entropy(S16, theirs) + F.cross_entropy(S16.T, theirs)) / 2
    for lam in (1.0, 0.0, 0.3, 0.75):
        expected = lam * clean + (1 - lam) * swapped
        assert loss_with_lambda(lam, S16).item() == exactly(expected.item())


@pytest.mark.parametrize("lam", [0.4375, 0.75, 0.9023])
def test_mixing_is_infonce_plus_a_penalty_on_the_margin(lam):
    losses = []
    for logits in (S16, S16.T):
        for i, j in enumerate(PARTNER):
            infonce = -logits[i].log_softmax(0)[i]
            losses.append(infonce + (1 - lam) * (logits[i, i] - logits[i, j]))
    assert loss_with_lambda(lam, S16).item() == exactly(sum(losses).item() / 32)


def test_the_mixed_loss_is_least_at_a_finite_margin_and_there_the_entropy_of_lambda():
    best = torch.full((4, 4), -50.0, dtype=torch.float64)
    best.fill_diagonal_(math.log(0.7 / 0.3))
    for i in range(4):
        best[i, 3 - i] = 0
    assert loss_with_lambda(0.7, best).item() == pytest.approx(0.610864, abs=1e-6)
    for step in (-0.1, 0.1, 5.0):
        assert loss_with_lambda(0.7, best + step * torch.eye(4)) > loss_with_lambda(0.7, best)


def test_the_gradient_is_probability_minus_target_and_lowers_a_sure_positive():
    zero = torch.zeros(16, 16, dtype=torch.float64)
    M = mixing_matrix(0.7)
    for start in (S16, 9 * torch.eye(16, dtype=torch.float64)):
        logits = start.clone().requires_grad_()
        timix.itc_loss((logits, zero), (M, zero)).backward()
        torch.testing.assert_close(logits.grad, (start.softmax(1) - M) / 32)
    assert logits.grad.diag().min() > 0  # which clean InfoNCE never does


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


# ---- draws ----

def test_negatives_are_of_other_pairs_of_the_group_as_often_as_the_model_confuses_them():
    n, group = 4000, 5
    one_image, one_text = F.normalize(torch.randn(2, group, 4, generator=seeded(2)), dim=2)
    noise = torch.rand(n * group, 2, group, generator=seeded(3))
    drawn = timix.hard_negatives(one_image.repeat(n, 1), one_text.repeat(n, 1), 0.5, noise, group)
    rows = torch.arange(n * group)
    other = ~torch.eye(group, dtype=torch.bool)
    for negative, logits in zip(drawn, (one_image @ one_text.T, one_text @ one_image.T)):
        assert torch.equal(negative // group, rows // group) and (negative != rows).all()
        counts = F.one_hot(negative % group, group).view(n, group, group).sum(0)[other]
        expected = n * (logits / 0.5).masked_fill(~other, -math.inf).softmax(1)[other]
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < 15 + 5 * math.sqrt(2 * 15)  # 5 rows of 3 degrees of freedom
        assert expected.max() > 4 * expected.min()


def test_words_are_masked_at_their_rates_and_predicted_as_they_were():
    n, length, vocab = 6000, 20, 500
    lengths = torch.randint(8, 21, (n, 1), generator=seeded())
    valid = torch.arange(length) < lengths
    tokens = torch.randint(8, vocab, (n, length), generator=seeded(1))
    tokens[:, 0] = Tokenizer.BOS
    tokens = tokens.scatter(1, lengths - 1, Tokenizer.EOS).where(valid, Tokenizer.PAD)
    noise = torch.rand(n, 3, length, generator=seeded(2))
    result, position, labels = timix.mask_tokens(tokens, valid, noise, 0.15, vocab)
    masked = torch.zeros(n, length, dtype=torch.bool).scatter(1, position, labels >= 0)
    assert torch.equal(tokens.gather(1, position).where(labels >= 0, -1), labels)
    assert torch.equal(result[~masked], tokens[~masked])
    assert not masked[:, 0].any() and not (masked & ~valid).any()

    def close_to(share, trials):
        return pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / trials))

    n_words = int(valid[:, 1:].sum())
    total = int(masked.sum())
    assert total / n_words == close_to(0.15, n_words)
    assert masked.gather(1, lengths - 1).double().mean().item() == close_to(0.15, n)  # end tokens
    became = result[masked]
    same = became == tokens[masked]
    is_mask = became == Tokenizer.MASK
    random_words = became[~is_mask & ~same]
    assert is_mask.double().mean().item() == close_to(0.8, total)
    assert same.double().mean().item() == close_to(0.1 * (1 + 1 / 492), total)
    assert random_words.min() >= 8 and random_words.max() < vocab
    deviation = 142 / math.sqrt(len(random_words))
    assert random_words.double().mean().item() == pytest.approx(253.5, abs=4 * deviation)


def test_nothing_is_masked_at_a_rate_of_zero_or_in_an_empty_text():
    tokens, valid = make_texts(L, B)
    noise = make_noise().mlm
    for ratio, valid in [(0.0, valid), (0.9, torch.zeros_like(valid))]:
        result, _, labels = timix.mask_tokens(tokens, valid, noise, ratio, 300)
        assert torch.equal(result, tokens) and (labels == -1).all()


def noise_of_this_rank(step):
    return tuple(timix.draw_noise(config(group=GROUP), step, torch.device("cpu")))


@pytest.mark.parametrize("world", [2, 4])
def test_a_row_draws_the_same_on_any_number_of_ranks_and_anew_at_each_step(run_on_ranks, world):
    parts = run_on_ranks(world, noise_of_this_rank, 3)
    for sharded, whole, next_step in zip(zip(*parts), noise_of_this_rank(3), noise_of_this_rank(4)):
        assert torch.equal(torch.cat(sharded), whole)
        assert not torch.isin(next_step, whole).any()


# ---- the objective ----

class Reference:
    """All terms on one rank, nothing done to more than one row at a time."""

    def __init__(self, model, batch, noise, alpha):
        self.model = model
        self.batch = batch
        self.noise = noise
        self.alpha = alpha
        self.n = len(batch["images"])
        self.valid = batch["valid"]
        self.tokens, self.states, self.S, self.text = self.towers(model)
        self.teacher_tokens, _, T, _ = self.towers(model.teacher)
        self.T = T.detach()

    def towers(self, net):
        image_tokens = [net.vision(x[None]) for x in self.batch["images"]]
        states = [net.text(t[None], v[None]) for t, v in zip(self.batch["tokens"], self.valid)]
        image = torch.cat([F.normalize(net.image_proj(x[:, 0])) for x in image_tokens])
        text = torch.cat([F.normalize(net.text_proj(x[:, 0])) for x in states])
        return image_tokens, states, image @ text.T / self.model.temperature, text

    def cross_entropy(self, logits, targets):
        return -(targets * logits.log_softmax(1)).sum() / self.n

    def itc(self):
        loss = 0
        for S, T in [(self.S, self.T), (self.S.T, self.T.T)]:
            targets = self.alpha * T.softmax(1) + (1 - self.alpha) * mixing_matrix(1.0, self.n)
            loss += self.cross_entropy(S, targets) / 2
        return loss

    def negative(self, logits, i, direction):
        """The largest of logits + Gumbel noise among the others of the group."""
        gumbel = -(-self.noise.itm[i, direction].log()).log()
        others = [j for j in range(self.n) if j // GROUP == i // GROUP and j != i]
        return max(others, key=lambda j: (logits[i, j] + gumbel[j % GROUP]).item())

    def match(self, t, i):
        fused = self.model.fuse(self.states[t], self.valid[t:t + 1], self.tokens[i])
        return self.model.itm_head(fused[0, 0]).log_softmax(0)

    def itm(self):
        loss = 0
        for i in range(self.n):
            loss -= self.match(i, i)[1]
            loss -= self.match(self.negative(self.S, i, 0), i)[0]
            loss -= self.match(i, self.negative(self.S.T, i, 1))[0]
        return loss / (3 * self.n)

    def read(self, net, tokens, i, image_tokens):
        states = net.text(tokens[None], self.valid[i:i + 1])
        fused = net.fuse(states, self.valid[i:i + 1], image_tokens[i])
        return net.mlm_head(fused)[0].log_softmax(1)

    def mlm(self):
        masked, position, labels = timix.mask_tokens(
            self.batch["tokens"], self.valid, self.noise.mlm, 0.3, 300)
        losses = []
        for i in range(self.n):
            log_probs = self.read(self.model, masked[i], i, self.tokens)
            teacher = self.read(self.model.teacher, masked[i], i, self.teacher_tokens).detach()
            for place, word in zip(position[i], labels[i]):
                if word >= 0:
                    soft = (teacher[place].exp() * log_probs[place]).sum()
                    hard = log_probs[place, word]
                    losses.append(-(1 - self.alpha) * hard - self.alpha * soft)
        assert len(losses) > 8
        return sum(losses) / len(losses)

    def predict(self, image, states):
        middle = self.model.vision.blocks_until(image[None], self.model.middle)
        return self.model.predictor(middle[:, 1:], states[:, 0])[0]

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
        mixed = mix_by_loops(images, torch.stack(scores), s, GROUP)
        mixed = torch.cat([self.model.encode_image(x[None]) for x in mixed])
        S = mixed @ self.text.T / self.model.temperature
        M = mixing_matrix(1 - s * s / N, self.n)
        image_loss = self.cross_entropy(S, (M @ self.S.softmax(1)).detach())
        text_loss = self.cross_entropy(S.T, (self.S.T.softmax(1) @ M).detach())
        return (image_loss + text_loss) / 2


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_all_terms_and_their_weighted_sum_are_those_of_a_reference_row_by_row(progress):
    model = make_model()
    weights = dict(w_itc=0.7, w_itm=2.0, w_mlm=0.5, w_pta=0.3, w_mix=1.5)
    loss, terms = objective(model, progress=progress, **weights)
    reference = Reference(model, make_batch(), make_noise(), 0.4 * progress)
    weights["w_mix"] *= progress
    expected_loss = 0
    for name in ("itc", "itm", "mlm", "pta", "mix"):
        expected = getattr(reference, name)()
        assert terms[name].item() == exactly(expected.item()), name
        expected_loss += weights[f"w_{name}"] * expected
    assert loss.item() == exactly(expected_loss.item())
    assert_same_gradients(gradients(model, loss), gradients(model, expected_loss), 1e-8, 1e-10)


def objective_of_this_rank(naive=False):
    """Mean terms and averaged gradients of 16 rows on this rank. naive: gather without gradient."""
    model = make_model()
    batch = {name: shard(x) for name, x in make_batch(16).items()}
    noise = timix.Noise(*[shard(x) for x in make_noise(16)])
    if naive:
        timix.all_gather_with_grad = common.all_gather
    try:
        loss, terms = timix.losses(model, batch, noise, seeded(), config(), 0.5, True)
    finally:
        timix.all_gather_with_grad = common.all_gather_with_grad
    loss.backward()
    common.average_gradients(model.parameters())
    means = {name: common.all_reduce_sum(x).item() / world_size() for name, x in terms.items()}
    return means, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("world", [2, 4])
def test_shards_give_the_terms_and_gradients_of_the_whole_batch(run_on_ranks, world):
    terms, grads = objective_of_this_rank()
    for shard_terms, shard_grads in run_on_ranks(world, objective_of_this_rank):
        assert shard_terms == exactly(terms)
        assert_same_gradients(shard_grads, grads, 1e-9, 1e-12)


def test_a_gather_without_gradient_would_be_noticed(run_on_ranks):
    _, grads = objective_of_this_rank()
    terms, wrong = run_on_ranks(2, objective_of_this_rank, True)[0]
    for name in ("image_proj.weight", "text_proj.weight"):
        assert (wrong[name] - grads[name]).norm() > 0.1 * grads[name].norm()


def test_gradients_stop_at_the_teacher_the_targets_and_the_predictor():
    model = make_model()
    model.teacher.requires_grad_(True)  # it must not get any even so
    _, terms = objective(model)

    def reached(name):
        return {p for p, g in gradients(model, terms[name]).items() if g is not None and g.any()}

    def part(*prefixes):
        return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}

    lower = part("vision.blocks.0.", "vision.patch_embed", "vision.pos", "vision.cls")
    towers = part("vision.", "text.")
    heads = part("image_proj", "text_proj", "temperature")
    fusion = part("fusion")
    assert reached("itc") == reached("mix") == towers | heads
    assert reached("itm") == towers | fusion | part("itm_head")
    assert reached("mlm") == towers | fusion | part("mlm_head")
    assert reached("pta") == lower | part("predictor.", "text.")


def test_mixed_images_enter_their_own_term_alone():
    model = make_model()
    terms = values(objective(model)[1])
    for mix in ("random", "cutmix"):
        others = values(objective(model, mix=mix)[1])
        assert {name for name in terms if terms[name] != others[name]} == {"mix"}
    del terms["mix"]
    assert values(objective(model, mixing=False)[1]) == terms


def test_a_term_of_weight_zero_is_left_out():
    model = make_model()
    loss, terms = objective(model, w_itm=0.0, w_mlm=0.0)
    assert set(terms) == {"itc", "pta", "pta_recall", "pta_precision", "mix"}
    assert gradients(model, loss)["fusion.0.mlp.fc1.weight"] is None


def test_under_bfloat16_terms_stay_float32_and_change_little():
    model = make_model().float()
    _, plain = objective(model, mix="random")
    with torch.autocast("cpu", torch.bfloat16):
        _, terms = objective(model, mix="random")
    for name in ("itc", "itm", "mlm", "pta", "mix"):
        assert terms[name].dtype == torch.float32
        assert terms[name].item() == pytest.approx(plain[name].item(), rel=0.05), name


def test_without_boxes_patches_are_scored_by_their_cosine_with_the_text():
    model = make_model(boxes=False)
    _, terms = objective(model, boxes=False)
    assert set(terms) == {"itc", "itm", "mlm", "mix"}
    batch = make_batch()
    text = model.encode_text(batch["tokens"], batch["valid"])
    patches = model.image_proj(model.vision(batch["images"])[:, 1:])
    scores = model.patch_scores(model.encode(batch["images"], batch["tokens"], batch["valid"]))
    torch.testing.assert_close(scores, F.cosine_similarity(patches, text[:, None], dim=2))
    assert not scores.requires_grad


# ---- model ----

def test_the_teacher_forgets_at_the_rate_of_its_momentum():
    model = make_model()
    student = dict(model.named_parameters())
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    for _ in range(7):
        model.update_ema(0.9)
    for name, p in model.teacher.named_parameters():
        expected = student[name] + 0.9**7 * (before[name] - student[name])
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-14)
    assert {"fusion.0.norm1.weight", "mlm_head.weight"} <= before.keys()  # not in released code


def test_the_teacher_starts_as_the_student_and_is_not_trained():
    model = TiMix(config())
    student = dict(model.named_parameters())
    for name, p in model.teacher.named_parameters():
        assert torch.equal(p, student[name]) and not p.requires_grad


@pytest.mark.parametrize("before,after", [(0.0, 0.001), (-3.0, 0.001), (0.07, 0.07), (7.0, 0.5)])
def test_temperature_is_held_between_its_bounds(before, after):
    model = TiMix(config(temperature=before))
    model.clamp_temperature()
    assert model.temperature.item() == pytest.approx(after)


def test_the_predictor_has_the_published_size():
    assert sum(p.numel() for p in timix.PatchPredictor(768, 768).parameters()) == 1_256_642


def test_the_predictor_joins_each_patch_with_the_mean_patch_and_the_text():
    predictor = make_model().predictor
    h = torch.randn(3, 9, 16, generator=seeded(), dtype=torch.float64)
    text = torch.randn(3, 16, generator=seeded(1), dtype=torch.float64)
    a = F.gelu(predictor.embed(F.layer_norm(h, [16], predictor.norm.weight, predictor.norm.bias,
                                            1e-6)))
    log_probs = predictor(h, text)
    for b in range(3):
        mean = a[b, :, 8:].mean(0)
        for n in range(9):
            logits = predictor.head(torch.cat([a[b, n, :8], mean, text[b]]))
            torch.testing.assert_close(log_probs[b, n], logits.log_softmax(0))
    predictor.head[0].weight.data[:, 16:] = 0  # without the columns of the text it is text-blind
    assert torch.equal(predictor(h, text), predictor(h, text.roll(1, 0)))


def test_pta_is_the_cross_entropy_of_the_patches_of_used_texts():
    log_probs = torch.randn(5, 3, 9, 2, generator=seeded(), dtype=torch.float64).log_softmax(3)
    patches = torch.rand(5, 3, 9, generator=seeded(1)) < 0.4
    used = torch.rand(5, 3, generator=seeded(2)) < 0.6
    expected = F.cross_entropy(log_probs[used].flatten(0, 1), patches[used].flatten().long())
    assert timix.pta_loss(log_probs, patches, used).item() == exactly(expected.item())
    metrics = values(timix.recall_and_precision(log_probs, patches, used))
    predicted = log_probs[used].argmax(2) == 1
    hits = (predicted & patches[used]).sum().item()
    assert metrics["pta_recall"] == pytest.approx(hits / patches[used].sum().item())
    assert metrics["pta_precision"] == pytest.approx(hits / predicted.sum().item())
    assert timix.pta_loss(log_probs, patches, torch.zeros_like(used)) == 0
    patches[0] = True  # texts of every patch, as captions
    without = used.clone()
    without[0] = False
    assert used[0].any() and values(timix.recall_and_precision(log_probs, patches, used)) == values(
        timix.recall_and_precision(log_probs, patches, without))


def test_held_out_images_are_squashed_to_the_square():
    image = Image.new("RGB", (80, 20), "red")
    image.paste((0, 0, 255), (20, 0, 80, 20))  # a central crop would be blue alone
    view = TiMix(config()).held_out_view(image)
    assert view.shape == (3, 32, 32)
    assert (view[0, :, :6] > 250).all() and (view[2, :, 10:] > 250).all()


def test_retrieval_is_reranked_by_logit_1_of_the_matching_head():
    model = make_model()
    batch = make_batch()
    tokens = batch["tokens"]
    valid = batch["valid"]
    score = model.match_score(model.vision(batch["images"]), tokens, valid)
    fused = model.fused(batch["images"], tokens, valid)
    torch.testing.assert_close(score, model.itm_head(fused)[:, 1])


# ---- rows ----

@pytest.mark.parametrize("box,size,grid,rows,columns", [
    ((8, 4, 24, 8), (32, 32), 8, slice(1, 2), slice(2, 6)),
    ((5, 5, 6, 6), (32, 32), 8, slice(1, 2), slice(1, 2)),
    ((7, 0, 9, 4), (32, 32), 8, slice(0, 1), slice(1, 3)),
    ((0, 0, 50, 20), (50, 20), 6, slice(0, 6), slice(0, 6)),
    ((40, 10, 41, 20), (100, 20), 4, slice(2, 4), slice(1, 2)),
    ((9.99, 9.99, 10, 10), (10, 10), 5, slice(4, 5), slice(4, 5)),
    ((25, 0, 25, 20), (100, 20), 4, slice(0, 4), slice(1, 2)),
])
def test_a_box_marks_every_patch_it_touches_and_at_least_one(box, size, grid, rows, columns):
    expected = np.zeros((grid, grid), bool)
    expected[rows, columns] = True
    assert np.array_equal(timix.box_patches(box, size, grid), expected)


def region_row(monkeypatch, sample, seed, **changes):
    """A row of region_example, with the crop (x, y, w, h) and the flip that it drew."""
    drawn = []
    view = timix.training_view

    def record(image, box, flip, *args):
        drawn.append((box, flip))
        return view(image, box, flip, *args)

    with monkeypatch.context() as m:
        m.setattr(timix, "training_view", record)
        cfg = config(texts_per_region=4, region_context=16, flip=True, **changes)
        row = timix.region_example(sample, np.random.default_rng(seed), cfg, Tokenizer())
    return row, *drawn[0]


def visible_part(box, crop, flip):
    """Pixels (h, w) of a crop that show a box, as bool."""
    pixels = np.zeros((64, 96), bool)
    pixels[box["y"]:box["y"] + box["h"], box["x"]:box["x"] + box["w"]] = True
    x, y, w, h = crop
    pixels = pixels[y:y + h, x:x + w]
    return pixels[:, ::-1] if flip else pixels


def touched_patches(pixels):
    """(16,) bool: the patches of a 4 x 4 grid that hold a part of a pixel, one by one."""
    patches = np.zeros((GRID, GRID), bool)
    for y, x in np.argwhere(pixels):
        top, bottom = np.array([y, y + 1]) * GRID / pixels.shape[0]
        left, right = np.array([x, x + 1]) * GRID / pixels.shape[1]
        patches[int(top):math.ceil(bottom), int(left):math.ceil(right)] = True
    return patches.ravel()


@pytest.mark.parametrize("caption_as_region", [False, True])
def test_region_images_show_a_whole_box_and_mark_the_patches_of_each_text(
        monkeypatch, caption_as_region):
    sample = painted_sample(caption="all of it")
    flips = 0
    for seed in range(40):
        row, crop, flip = region_row(monkeypatch, sample, seed, caption_as_region=caption_as_region)
        flips += flip
        parts = {box["text"]: visible_part(box, crop, flip) for box in BOXES}
        shares = {box["text"]: parts[box["text"]].sum() / (box["w"] * box["h"]) for box in BOXES}
        assert max(shares.values()) == 1
        texts = [Tokenizer().decode(tokens) for tokens in row["region_tokens"]]
        patches = list(row["region_in_box"])
        n_used = row["region_used"].sum()
        assert row["region_used"].tolist() == [t < n_used for t in range(4)]
        assert not any(texts[n_used:]) and not np.any(patches[n_used:])
        used = dict(zip(texts[:n_used], patches))
        if caption_as_region:
            assert texts[0] == "all of it" and used.pop("all of it").all()
        assert used.keys() == {text for text, share in shares.items() if share > 0.5}
        for text, marked in used.items():
            assert np.array_equal(marked, touched_patches(parts[text])), text
            off = np.abs(row["region_images"].astype(int) - np.reshape(RGB[text], (3, 1, 1)))
            colored = (off.max(0) < 60).reshape(4, 8, 4, 8).any((1, 3)).ravel()
            assert colored.any() and not colored[~marked].any()  # pixels and marks moved alike
    assert 10 < flips < 30


def test_crops_reach_from_the_box_to_every_edge(monkeypatch):
    sample = painted_sample(BOXES[:1])
    crops = [region_row(monkeypatch, sample, seed)[1] for seed in range(40)]
    x, y, w, h = np.array(crops).T
    assert (x.min(), x.max(), y.min(), y.max()) == (0, 6, 0, 5)
    assert (x + w).min() >= 26 and (y + h).min() >= 19 and len(set(crops)) > 35


@pytest.mark.parametrize("sample", [
    painted_sample(boxes=[]), painted_sample(boxes=BOXES[:1], segments=3)])
def test_a_crop_takes_at_most_as_many_texts_as_asked(sample, monkeypatch):
    cfg = config(texts_per_region=1)
    if sample.json["boxes"]:
        row = timix.region_example(sample, np.random.default_rng(0), cfg, Tokenizer())
        assert row["region_tokens"].shape == (1, 10)
    else:
        with pytest.raises(data.Skip, match="no box"):
            timix.region_example(sample, np.random.default_rng(0), cfg, Tokenizer())


def test_a_training_pair_is_a_crop_maybe_mirrored_and_one_of_its_captions():
    sample = painted_sample(caption=["one", "two"])

    def row(seed, **changes):
        return timix.example(sample, np.random.default_rng(seed), config(**changes), Tokenizer())

    rows = [row(seed, scale=0.3) for seed in range(30)]
    assert {Tokenizer().decode(row["tokens"]) for row in rows} == {"one", "two"}
    assert len({row["images"].tobytes() for row in rows}) == 30

    def red_is_left(row):
        red = row["images"][0].astype(int) - row["images"][1]
        return red[:, :16].sum() > red[:, 16:].sum()

    assert red_is_left(row(0))
    assert 2 < sum(red_is_left(row(seed, flip=True)) for seed in range(20)) < 18


# ---- augmentation ----

def gradient_image(size=40):
    """A ramp in x, a ramp in y, their sum; far from 0 and 255."""
    y, x = np.mgrid[:size, :size]
    return Image.fromarray(np.stack([60 + 2 * x, 60 + 2 * y, 60 + x + y], 2).astype(np.uint8))


def source_of(operation, x, y, sign):
    """Where in the image a pixel comes from, of the operations that move pixels."""
    if operation == "translate_x":
        return x + 7 * sign, y
    if operation == "translate_y":
        return x, y + 7 * sign
    if operation == "shear_x":
        return x + 0.21 * sign * (y + 0.5), y
    if operation == "shear_y":
        return x, y + 0.21 * sign * (x + 0.5)
    angle = math.radians(21 * sign)
    x = x - 19.5
    y = y - 19.5
    return (19.5 + math.cos(angle) * x - math.sin(angle) * y,
            19.5 + math.sin(angle) * x + math.cos(angle) * y)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("operation", timix.GEOMETRIC)
def test_geometric_operations_move_pixels_as_released(operation, sign):
    result = np.asarray(timix.distort(gradient_image(), operation, sign)).astype(float)
    expected = np.full((40, 40, 3), 128.0)  # gray where nothing comes
    for y in range(40):
        for x in range(40):
            u, v = source_of(operation, x, y, sign)
            if 0 <= u <= 39 and 0 <= v <= 39:
                expected[y, x] = 60 + 2 * u, 60 + 2 * v, 60 + u + v
    off = np.abs(result - expected).max(2)
    assert (off <= 2).mean() > 0.93  # but for the border between image and gray
    assert 0.02 < (expected == 128).all(2).mean() < 0.5


def test_photometric_operations_have_the_released_strength_and_move_nothing():
    image = gradient_image()
    pixels = np.asarray(image).astype(float)
    brighter = np.asarray(timix.distort(image, "brightness", -1)).astype(float)
    assert np.abs(brighter - 1.36 * pixels).max() <= 1
    noisy = np.random.default_rng(0).integers(100, 150, (40, 40, 3)).astype(float)
    noisy_image = Image.fromarray(noisy.astype(np.uint8))
    sharper = np.asarray(timix.distort(noisy_image, "sharpness", -1)).astype(float)
    window = np.lib.stride_tricks.sliding_window_view(noisy, (3, 3), (0, 1))
    smooth = (window.sum((3, 4)) + 4 * noisy[1:-1, 1:-1]) / 13
    expected = smooth + 1.36 * (noisy[1:-1, 1:-1] - smooth)
    assert np.abs(sharper[1:-1, 1:-1] - expected).max() <= 2
    for operation in ("autocontrast", "equalize"):
        result = np.asarray(timix.distort(image, operation, 1)).astype(int)
        assert result.min() == 0 and result.max() >= 254
        for channel, axis in ((0, 1), (1, 0)):  # still ramps
            assert (np.diff(result[..., channel], axis=axis) >= 0).all()
    assert timix.distort(image, "identity", 1) is image


def test_two_operations_are_drawn_and_each_applied_half_of_the_time(monkeypatch):
    applied = []

    def record(image, operation, sign):
        applied.append((operation, sign))
        return image

    monkeypatch.setattr(timix, "distort", record)
    operations = timix.PHOTOMETRIC + timix.GEOMETRIC
    rng = np.random.default_rng(0)
    numbers = Counter()
    for _ in range(2000):
        before = len(applied)
        timix.rand_augment(None, rng, operations)
        numbers[len(applied) - before] += 1
    assert [numbers[k] / 2000 for k in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.05)
    counts = Counter(applied)
    assert len(counts) == 20 and min(counts.values()) > 65 and max(counts.values()) < 140


def test_views_are_distorted_last_and_those_with_boxes_keep_their_pixels_in_place(monkeypatch):
    calls = []

    def record(image, rng, operations):
        calls.append((image.size, operations))
        return image

    monkeypatch.setattr(timix, "rand_augment", record)
    sample = painted_sample(caption="red")
    for make_row in (timix.example, timix.region_example):
        make_row(sample, np.random.default_rng(0), config(augment=True), Tokenizer())
    assert calls == [((32, 32), timix.PHOTOMETRIC + timix.GEOMETRIC),
                     ((32, 32), timix.PHOTOMETRIC)]


# ---- learning ----

def test_one_image_is_overfit_and_the_window_moves_with_the_text():
    corners = [{"x": 0, "y": 0, "w": 16, "h": 16, "text": "red"},
               {"x": 16, "y": 16, "w": 16, "h": 16, "text": "blue"}]
    sample = painted_sample(corners, (32, 32))
    cfg = config(dim=32, text_dim=32, context=10)
    torch.manual_seed(0)
    model = TiMix(cfg)
    row = timix.held_out_row(sample, model, Tokenizer(), cfg)
    batch = data.stack([row])
    patches = batch["region_in_box"]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        log_probs = model.region_log_probs(
            batch["region_images"], batch["region_tokens"], batch["region_valid"])
        optimizer.zero_grad()
        timix.pta_loss(log_probs, patches, batch["region_used"]).backward()
        optimizer.step()
    assert torch.equal(log_probs[..., 1] > log_probs[..., 0], patches)

    images = batch["region_images"].expand(2, -1, -1, -1)  # "red" is paired with "blue"
    encoded = model.encode(images, batch["region_tokens"][0], batch["region_valid"][0])
    mixed, _ = text_aware_mix(images, model.patch_scores(encoded), 2, 2)
    for i, color in enumerate(["red", "blue"]):
        same = (mixed[i] == images[i]).all(0).view(4, 8, 4, 8).all(3).all(1)
        assert same.flatten()[patches[0, i]].all(), color  # what the caption names is not covered
    pasted = (mixed[0] == torch.tensor(RGB["blue"])[:, None, None]).all(0)
    assert pasted.sum() >= 2 * 16 * 16 - 16 * 16  # and what the partner's names is pasted


# ---- runs ----

@pytest.fixture
def cfg(toy_data, tmp_path):
    return tiny_config("timix", toy_data, tmp_path / "run", image_size=32, scale=1.0, momentum=0.9,
                       steps=10)


def test_a_run_raises_its_weights_stops_mixing_and_averages_before_the_teacher_is_used(
        cfg, monkeypatch):
    steps = []
    losses = timix.losses

    def record(model, batch, noise, generator, cfg, progress, mixing):
        student = model.fusion_norm.bias.detach().clone()
        teacher = model.teacher.fusion_norm.bias.clone()
        steps.append((progress, mixing, student, teacher))
        return losses(model, batch, noise, generator, cfg, progress, mixing)

    monkeypatch.setattr(timix, "losses", record)
    weights = dict(w_itm=2.0, w_mlm=0.5, w_pta=0.7)
    rows, _, _ = run(timix.main, replace(cfg, ramp=0.4, mix_until=0.5, w_mix=0.3, **weights))
    assert [progress for progress, *_ in steps] == pytest.approx(
        [min(1, k / 4) for k in range(10)])
    assert [mixing for _, mixing, *_ in steps] == [k < 5 for k in range(10)]
    for k, row in enumerate(rows):
        expected = row["itc"] + sum(weight * row[name[2:]] for name, weight in weights.items())
        if k < 5:
            expected += 0.3 * min(1, k / 4) * row["mix"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
    for (_, _, _, before), (_, _, student, teacher) in zip(steps, steps[1:]):
        torch.testing.assert_close(teacher, 0.9 * before + 0.1 * student)


def test_the_predictor_finds_boxes_of_held_out_images_better_than_marking_every_patch(
        cfg, toy_data):
    cfg = replace(cfg, mix="none", w_itc=0.0, w_itm=0.0, w_mlm=0.0, dim=32, text_dim=32, steps=60,
                  lr=5e-3, boxes=True, region_context=16, val=[f"{toy_data}/pairs"])
    _, state, _ = run(timix.main, cfg)
    model = TiMix(cfg)
    model.load_state_dict(state["model"])
    tokenizer = Tokenizer.loads(state["vocab"])
    metrics = timix.predictor_metrics(model, tokenizer, cfg, torch.device("cpu"))
    batch = data.stack(timix.held_out_regions(model, tokenizer, cfg))
    share_in_box = batch["region_in_box"][batch["region_used"]].double().mean().item()
    assert metrics["pta_recall"] > 0.4
    assert metrics["pta_precision"] > share_in_box + 0.1


@pytest.fixture
def without_boxes(toy_data, tmp_path):
    """A shard of toy scenes without their boxes."""
    index = data.Index(data.expand([f"{toy_data}/pairs"]))
    path = str(tmp_path / "train-00000.tar")
    with tarfile.open(path, "w") as tar:
        for i in range(48):
            sample = index[i]
            files = {"jpg": sample.members["jpg"], "txt": sample.captions()[0].encode()}
            for suffix, raw in files.items():
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return path


def test_pta_and_mix_of_weight_zero_are_left_out_and_patches_scored_by_cosines(cfg):
    rows, state, _ = run(timix.main, replace(cfg, steps=2, w_pta=0.0, w_mix=0.0, boxes=True))
    assert state["config"]["boxes"] is False
    assert not {"pta", "pta_recall", "mix"} & rows[0].keys()


def test_data_without_boxes_train_with_cosines_and_say_so(cfg, without_boxes, capsys):
    rows, state, _ = run(timix.main, replace(cfg, data=[without_boxes], steps=3, temperature=0.7))
    assert "no boxes or --w-pta 0: the patch predictor is not trained" in capsys.readouterr().out
    assert state["config"]["boxes"] is False and "mix" in rows[0] and "pta" not in rows[0]
    assert rows[0]["temperature"] == 0.5


def test_asking_for_boxes_that_are_not_there_is_refused(cfg, without_boxes):
    line = refused(timix.main, replace(cfg, data=[without_boxes], boxes=True))
    assert "none of the 48 samples can be used" in line and "no box" in line


def test_real_pairs_train_at_the_released_augmentation(shared, cfg):
    cfg = replace(cfg, data=[f"{shared}/pairs"], steps=2, scale=0.2, flip=True, augment=True)
    rows, _, _ = run(timix.main, cfg)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("changes,expected", [
    (dict(batch=18), "--group 4 must be even and divide the 18 rows"),
    (dict(group=3, batch=18), "--group 3 must be even"),
    (dict(mix="mixup"), "--mix mixup: choose none, cutmix, random or text"),
    (dict(min_side=0.8), "--min-side 0.8 --max-side 0.75"),
    (dict(min_side=0.0), "--min-side 0.0"),
    (dict(max_side=1.5), "--max-side 1.5"),
    (dict(mask_ratio=0.6), "--mask-ratio 0.6: give 0.5 or less, since at most half of the context"),
    (dict(texts_per_region=0), "--texts-per-region 0: give 1 or more"),
    (dict(texts_per_region=1, caption_as_region=True), "give 2 or more, or --no-caption-as-region"),
])
def test_what_cannot_be_trained_is_refused_in_one_line(cfg, changes, expected):
    assert expected in refused(timix.main, replace(cfg, **changes))


def test_the_demo_is_sound():
    cfg = common.parse(timix.Config, timix.DEMO, "", [])
    timix.check(cfg)
    assert TiMix(cfg).middle == 2
