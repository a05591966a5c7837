"""TiMix's mixer, labels, losses, predictor, backbone and training run against the oracles of its specification (1 .. 35)."""
import json, math, os, re
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import align
import common
import conftest
import data
import timix
from common import UserError
from conftest import PAINT, SHAPES, close, exact, far, gradients, numbers, painted, same_gradients
from data import Index, Sample, Skip, Tokenizer
from timix import Mix, text_aware_mix

torch.set_num_threads(1)
GRID, L, B, BLOCK = 4, 12, 8, 4
MIRROR = [i // BLOCK * BLOCK + BLOCK - 1 - i % BLOCK for i in range(16)]     # each row's partner
ALBEF_TERMS = ("itc", "itm", "mlm", "pta", "mix")


def config(**changes):
    """A TiMix of some ten thousand parameters: 16 patches, windows of 1 .. 3 patches a side, blocks of 4 rows."""
    tiny = dict(image_size=32, patch=8, dim=16, depth=2, heads=2, text_dim=16, text_depth=1, fusion_depth=1, text_heads=2, embed=8, context=L,
                vocab_size=300, block=BLOCK, batch=16, steps=20, warmup=2, lr=3e-3, momentum=0.9, ramp=0.2, mask_ratio=0.3, scale=1.0, flip=False,
                augment=False, whole=False, workers=0, save_every=100, eval_every=-1, log_every=1, precision="fp32")
    return timix.Config(**{**tiny, **changes})


def build(**changes):
    """In float64, with nothing left at zero and a teacher that is not the model, as both hide mistakes."""
    torch.manual_seed(0)
    model = timix.TiMix(config(**changes)).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.temperature.data.fill_(0.3)
    return model


def texts(*shape):
    """Random tokens of lengths 4, 5, 6 .. 9 and their valid; begin and end among them."""
    g, place, lengths = torch.Generator().manual_seed(len(shape)), torch.arange(L), 4 + torch.arange(math.prod(shape)).view(*shape, 1) % 6
    tokens = torch.randint(8, 300, (*shape, L), generator=g).where(place < lengths, Tokenizer.PAD).where(place > 0, Tokenizer.BOS)
    return tokens.where(place != lengths - 1, Tokenizer.EOS), place < lengths


def rows(n=B, boxes=True):
    """A batch of n pairs and n / 2 region images of two texts, of which every third lacks its second."""
    g = torch.Generator().manual_seed(0)
    images, regions = (torch.randint(0, 256, (k, 3, 32, 32), generator=g, dtype=torch.uint8) for k in (n, n // 2))
    made = dict(zip(("images", "tokens", "valid"), (images, *texts(n))))
    used = torch.tensor([[True, i % 3 != 1] for i in range(n // 2)])
    more = dict(zip(("region_images", "region_tokens", "region_valid"), (regions, *texts(n // 2, 2))), region_used=used,
                region_patches=torch.rand(n // 2, 2, GRID ** 2, generator=g) < 0.3)
    return {**made, **(more if boxes else {})}


def noise(n=B):
    return torch.rand(n, 2 * L + 2 * BLOCK + GRID ** 2, generator=torch.Generator().manual_seed(1))


def objective(model, batch=None, chance=None, rise=0.5, mixing=True, **changes):
    """-> terms, gauges as main gets them."""
    batch = batch or rows()
    with exact():
        return timix.losses(model, batch, noise(len(batch["images"])) if chance is None else chance, common.generator(0, 0, 1), config(**changes),
                            rise, mixing)


def mine(x):
    """This rank's rows."""
    return x.chunk(common.world())[common.rank()]


# ---- the mixer (oracles 1 .. 10) ----

def brute_mix(images, scores, s, block):
    """Window by window and patch by patch."""
    n, out = math.isqrt(scores.shape[1]), images.clone()
    p, kept, taken = images.shape[2] // n, torch.ones(len(images), n, n, dtype=torch.bool), torch.zeros(len(images), n, n, dtype=torch.bool)

    def best(i, which):                                      # of equal windows the first in reading order
        table = scores[i].view(n, n)
        sums = {(r, c): sum(table[r + a, c + b].item() for a in range(s) for b in range(s)) for r in range(n - s + 1) for c in range(n - s + 1)}
        return which(sums, key=sums.get)
    for i in range(len(images)):
        j = i // block * block + block - 1 - i % block
        (r, c), (y, x), (own_y, own_x) = best(i, min), best(j, max), best(i, max)
        for a in range(s):
            for b in range(s):
                out[i, :, (r + a) * p:(r + a + 1) * p, (c + b) * p:(c + b + 1) * p] = \
                    images[j, :, (y + a) * p:(y + a + 1) * p, (x + b) * p:(x + b + 1) * p]
                kept[i, r + a, c + b], taken[i, own_y + a, own_x + b] = False, True
    return Mix(out, 1 - s * s / n ** 2, kept.flatten(1), taken.flatten(1))


def same_mix(ours, theirs):
    assert ours.lam == theirs.lam and all(torch.equal(a, b) for a, b in zip((ours.images, *ours[2:]), (theirs.images, *theirs[2:])))


def pictures(n, size=16, seed=0, patches=16):
    """n random images, and scores without ties."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8), torch.randn(n, patches, generator=g, dtype=torch.float64)


def test_the_specified_example():
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    images, scores = torch.stack([10 * y + x, 100 + 10 * y + x])[:, None].expand(-1, 3, -1, -1).clone(), torch.zeros(2, 4, 4)
    scores[0, :2, :2], scores[0, 2:, 2:], scores[1, 2:, :2], scores[1, :2, 2:] = 1, -1, 1, -1
    want = images.clone()
    want[0, :, 2:, 2:], want[1, :, :2, 2:] = torch.tensor([[120, 121], [130, 131]]), torch.tensor([[0, 1], [10, 11]])
    mix = text_aware_mix(images, scores.flatten(1), 2)
    assert torch.equal(mix.images, want) and mix.lam == 0.75 and mix.kept.sum(1).tolist() == [12, 12]


@pytest.mark.parametrize("n,side,s,rows,block,ties", [(4, 1, 2, 2, 2, False), (8, 2, 3, 8, 4, False), (8, 1, 6, 6, 6, False), (5, 3, 1, 8, 2, True),
                                                      (6, 2, 4, 4, 4, True), (6, 1, 6, 4, 2, False)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.bfloat16, torch.float64])
def test_windows_are_chosen_and_pasted_as_by_plain_loops(n, side, s, rows, block, ties, kind):
    images, scores = pictures(rows, n * side, patches=n * n)
    images, scores = images.to(kind), scores.round() if ties else scores
    before, mix = images.clone(), text_aware_mix(images, scores, s, block)
    same_mix(mix, brute_mix(images, scores, s, block))
    assert torch.equal(images, before) and mix.images.dtype == kind and mix.kept.double().mean().item() == pytest.approx(mix.lam)
    assert mix.kept.sum(1).eq(n * n - s * s).all() and mix.taken.sum(1).eq(s * s).all()


def test_scores_may_be_of_any_scale_and_precision_and_turned_round_swap_the_windows():
    images, scores = pictures(B)
    mix, turned = (text_aware_mix(images, sign * scores, 2, 4) for sign in (1, -1))
    scale, shift = torch.rand(B, 1) * 5 + 0.1, torch.randn(B, 1)
    same_mix(text_aware_mix(images, scale * scores + shift, 2, 4), mix)
    assert torch.equal(turned.kept, ~mix.taken) and torch.equal(turned.taken, ~mix.kept)
    images, scores = pictures(2, 16, patches=256)
    scores = (100 + scores.round()).bfloat16()               # sums of 36 of them, rounded to bfloat16, would be told apart no more
    same_mix(text_aware_mix(images, scores, 6), brute_mix(images, scores.double(), 6, 2))


def test_from_no_window_to_the_whole_partner():
    images, scores = pictures(B)
    none, whole = (text_aware_mix(images, scores, s, 4) for s in (0, 4))
    assert torch.equal(none.images, images) and none.lam == 1 and none.kept.all() and not none.taken.any()
    assert torch.equal(whole.images, images[MIRROR[:B]]) and whole.lam == 0 and not whole.kept.any() and whole.taken.all()
    assert torch.equal(images[MIRROR[:B]][MIRROR[:B]], images) and all(i != j for i, j in enumerate(MIRROR))
    equal = images[:1].expand(4, -1, -1, -1)                 # in constant scores the first window is the least and the most
    assert torch.equal(text_aware_mix(equal, torch.zeros(4, 16), 2).images, equal)
    for rows, block in ((3, None), (4, 1), (6, 3), (6, 4), (5, 2)):
        with pytest.raises(ValueError, match="do not divide into blocks"):
            text_aware_mix(*pictures(rows), 2, block)


@pytest.mark.parametrize("n,most", [(16, 12), (14, 10), (6, 4)])
def test_sides_are_drawn_evenly_between_their_bounds(n, most):
    counts = Counter(timix.side(n, common.generator(0, step, 1), timix.Config()) for step in range(2000))
    least = {16: 5, 14: 4, 6: 2}[n]
    assert set(counts) == set(range(least, most + 1))
    assert all(abs(c - 2000 / len(counts)) < 5 * math.sqrt(2000 / len(counts)) for c in counts.values())
    if n == 16:                                              # the mean share that is pasted
        assert sum(c * s * s for s, c in counts.items()) / 2000 / 256 == pytest.approx(0.3027, abs=0.015)


def test_pairs_are_nothing_to_each_other():
    images, scores = pictures(B)
    for block, order in ((B, [2, 0, 3, 1, 6, 4, 7, 5]), (4, [4, 5, 6, 7, 0, 1, 2, 3]), (4, [1, 0, 3, 2, 4, 5, 6, 7])):
        assert [order[k] for k in common.partner(torch.arange(B), block)] == [common.partner(torch.arange(B), block)[k] for k in order]
        mix, moved = text_aware_mix(images, scores, 2, block), text_aware_mix(images[order], scores[order], 2, block)
        same_mix(moved, Mix(mix.images[order], mix.lam, mix.kept[order], mix.taken[order]))
    same_mix(Mix(mix.images[4:], mix.lam, mix.kept[4:], mix.taken[4:]), text_aware_mix(images[4:], scores[4:], 2))


def test_cutmix_pastes_one_box_at_the_same_place_and_counts_its_pixels():
    images, shares = torch.arange(4)[:, None, None, None].expand(4, 3, 16, 16).to(torch.uint8), []
    for step in range(1500):
        mix = timix.cutmix(images, 4, common.generator(0, step), 2)
        other = mix.images[:, 0] != torch.arange(4)[:, None, None]
        ys, xs = other[0].any(1).nonzero()[:, 0], other[0].any(0).nonzero()[:, 0]
        assert other.eq(other[:1]).all() and other[0].sum() == len(ys) * len(xs)                 # a box
        assert torch.equal(mix.images[:, 0], torch.where(other, torch.tensor([1, 0, 3, 2])[:, None, None], torch.arange(4)[:, None, None]))
        assert mix.lam == pytest.approx(1 - other[0].double().mean().item())
        assert torch.equal(mix.taken[0].double(), other[0].double().view(4, 4, 4, 4).mean((1, 3)).flatten()) and torch.equal(mix.kept, 1 - mix.taken)
        shares.append(other[0].double())
    # for an area a = 1 - lambda and a uniform centre the clipped side is 2h - h^2, h = sqrt(a) / 2; squared and integrated over a: 77 / 240
    found = torch.stack(shares).mean(0)
    assert found.mean().item() == pytest.approx(77 / 240, abs=0.03) and (found - found.flip(0)).abs().max() < 0.08
    assert (found - found.flip(1)).abs().max() < 0.08 and (found - found.T).abs().max() < 0.08


# ---- labels (11 .. 13) ----

def dense(lam, size=16):
    """M = lambda I + (1 - lambda) J of the whole batch; lam: a number, or one for each mixture (rows)."""
    J = torch.block_diag(*[torch.eye(BLOCK, dtype=torch.float64).flip(0)] * (size // BLOCK))
    lam = torch.as_tensor(lam, dtype=torch.float64).expand(size)[:, None]
    return lam * torch.eye(size, dtype=torch.float64) + (1 - lam) * J


def label_world():
    """Logits (16, 16) of images and of texts, a mixture's kept and taken patches, probabilities that patches are relevant."""
    g = torch.Generator().manual_seed(3)
    i2t, t2i = torch.randn(2, 16, 16, generator=g, dtype=torch.float64)
    kept, taken = torch.rand(2, 16, 9, generator=g) < 0.5
    return i2t, t2i, kept, taken, torch.rand(16, 9, generator=g, dtype=torch.float64)


def labels_here(mode):
    i2t, t2i, kept, taken, relevance = map(mine, label_world())
    return timix.soft_labels(mode, Mix(None, 0.7, kept, taken), BLOCK, i2t.requires_grad_(), t2i.requires_grad_(), relevance.requires_grad_())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_labels_are_those_of_the_dense_matrix_on_any_number_of_ranks(pools, world):
    i2t, t2i, kept, taken, q = label_world()
    lam = [(q[i] * kept[i]).sum().item() / ((q[i] * kept[i]).sum() + (q[MIRROR[i]] * taken[MIRROR[i]]).sum()).item() for i in range(16)]
    soft = dense(lam)
    want = {"area": (dense(0.7), dense(0.7)), "relevance": (soft, soft.T / soft.T.sum(1, keepdim=True)),
            "predicted": (dense(0.7) @ i2t.softmax(1), t2i.softmax(1) @ dense(0.7))}
    for mode, tables in want.items():
        parts = [labels_here(mode)] if world == 1 else pools(world)(labels_here, mode)
        for found, table in zip(map(torch.cat, zip(*parts)), tables):
            torch.testing.assert_close(found, table, rtol=1e-12, atol=1e-14)
            assert not found.requires_grad and (found.sum(1) - 1).abs().max() < 1e-12


def test_the_matrix_is_doubly_stochastic_and_predictions_soften_it():
    found, back = labels_here("area")
    assert torch.equal(found, found.T) and torch.equal(found, back) and found.ne(0).sum(1).eq(2).all() and (found.sum(0) - 1).abs().max() < 1e-12
    for sure, want in ((1e4, found), (0.0, torch.full_like(found, 1 / 16))):     # sure predictions are the area, ignorant ones uniform
        logits = sure * torch.eye(16, dtype=torch.float64)
        for soft in timix.soft_labels("predicted", Mix(None, 0.7, None, None), BLOCK, logits, logits):
            torch.testing.assert_close(soft, want)


def test_relevance_by_hand():
    # image 0 keeps patches 0 1 2 of relevance 0.2 each and gets patch 3 of image 1, of relevance 0.9: 0.6 / 1.5; image 1 keeps 0.3, gets 0.2
    q = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.1, 0.1, 0.1, 0.9]])
    kept, taken = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]]).bool(), torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    found, back = timix.soft_labels("relevance", Mix(None, 0.75, kept, taken), 2, torch.zeros(2, 2), torch.zeros(2, 2), q)
    torch.testing.assert_close(found, torch.tensor([[0.4, 0.6], [0.4, 0.6]]))
    torch.testing.assert_close(back, torch.tensor([[0.5, 0.5], [0.5, 0.5]]))     # texts 0 and 1 find 0.4 in both, and 0.6: rows made to sum to 1
    same = timix.soft_labels("relevance", Mix(None, 0.75, kept, taken), 2, torch.zeros(2, 2), torch.zeros(2, 2), torch.full((2, 4), 0.3))
    torch.testing.assert_close(same[0], torch.tensor([[0.75, 0.25], [0.25, 0.75]]))


# ---- the loss (14 .. 22) ----

def area(lam, logits):
    M = dense(lam, len(logits))
    return timix.soft_itc((logits, logits.T), (M, M))


S16 = torch.randn(16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3


def test_the_loss_is_linear_between_clean_contrast_and_that_of_the_partners():
    clean = (F.cross_entropy(S16, torch.arange(16)) + F.cross_entropy(S16.T, torch.arange(16))) / 2
    swapped = (F.cross_entropy(S16, torch.tensor(MIRROR)) + F.cross_entropy(S16.T, torch.tensor(MIRROR))) / 2
    for lam in (1.0, 0.0, 0.3, 0.75):
        assert area(lam, S16).item() == close((lam * clean + (1 - lam) * swapped).item())
    eye = torch.eye(16, dtype=torch.float64)
    assert align.contrastive_loss(eye, S16.T, torch.tensor(1.0)).item() == close(2 * clean.item())               # logits eye @ S


def test_mixing_is_infonce_plus_a_penalty_on_the_margin():
    """L = l_i + (1 - lambda)(s_i - s_j), and never less than the entropy of the label (17, 18)."""
    for lam in (0.4375, 0.75, 0.9023):
        bound = -(lam * math.log(lam) + (1 - lam) * math.log(1 - lam))
        told = [-S.log_softmax(1)[i, i] + (1 - lam) * (S[i, i] - S[i, MIRROR[i]]) for S in (S16, S16.T) for i in range(16)]
        assert area(lam, S16).item() == close(sum(told).item() / 32) and area(lam, S16) > bound
    best = torch.full((4, 4), -50.0, dtype=torch.float64)
    best.fill_diagonal_(math.log(0.7 / 0.3))
    for i in range(4):
        best[i, 3 - i] = 0
    assert area(0.7, best).item() == pytest.approx(0.610864, abs=1e-6)           # least at a finite margin
    assert all(area(0.7, best + e * torch.eye(4)) > area(0.7, best) for e in (-0.1, 0.1, 5.0))


def test_the_gradient_is_probability_less_label_and_pulls_a_sure_positive_down():
    zero, sure = torch.zeros(16, 16), 9 * torch.eye(16, dtype=torch.float64)
    for start in (S16, sure):
        logits = start.clone().requires_grad_()
        timix.soft_itc((logits, zero), (dense(0.7), zero)).backward()
        torch.testing.assert_close(logits.grad, (start.softmax(1) - dense(0.7)) / 32, rtol=1e-10, atol=1e-12)
        assert logits.grad.sum(1).abs().max() < 1e-15
    assert logits.grad.diag().min() > 0                      # which clean InfoNCE never does


def test_the_worked_numbers():
    S, M = torch.tensor([[2.0, 1.0], [0.5, 1.5]]), torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    zero = torch.zeros(2, 2)
    one_way = lambda logits, target: 2 * timix.soft_itc((logits, zero), (target, zero)).item()
    assert one_way(S, M) == pytest.approx(0.5633, abs=5e-5) and one_way(S.T, M) == pytest.approx((0.5764 + 0.5991) / 2, abs=5e-5)
    assert timix.soft_itc((S, S.T), (M, M)).item() == pytest.approx(0.5755, abs=5e-5)
    Y, back = timix.soft_labels("predicted", Mix(None, 0.75, None, None), 2, S, S.T)
    torch.testing.assert_close(Y, torch.tensor([[0.6155, 0.3845], [0.3845, 0.6155]]), rtol=0, atol=5e-5)
    assert one_way(S, Y) == pytest.approx(0.6977, abs=5e-5) and one_way(S.T, Y) == pytest.approx(0.7222, abs=5e-5)
    torch.testing.assert_close(back, S.T.softmax(1) @ M)     # ours: columns are mixed


def test_the_order_of_pairs_and_the_length_of_features_do_not_matter():
    order, model = torch.tensor([6, 4, 7, 5, 2, 0, 3, 1]), build()
    S = S16[:B, :B]
    assert area(0.6, S[order][:, order]).item() == close(area(0.6, S).item())
    for proj, embed in ((model.image_proj, model.image_embeds), (model.text_proj, lambda x: model.text_embeds(x[:, None]))):
        x = torch.randn(5, 16, dtype=torch.float64)
        found = embed(x)
        proj.weight.data *= 3
        proj.bias.data *= 3
        assert found.shape == (5, 8) and (found.norm(dim=1) - 1).abs().max() < 1e-12
        torch.testing.assert_close(embed(x), found)


class Slice(torch.autograd.Function):
    """A gather whose backward keeps this rank's part and forgets the others' (the released code's)."""
    forward = staticmethod(lambda ctx, x: common.all_gather(x))
    backward = staticmethod(lambda ctx, grad: mine(grad))


def mixed_gradients(how):
    """Loss and averaged gradients of the mixed contrast of 16 rows through two linear towers. how: "ours", "naive" (ours with a naive gather) or
    "released" (naive gather of both sides, every rank takes the loss of the whole batch)."""
    g, plain = torch.Generator().manual_seed(4), common.gather
    images, texts = (torch.randn(16, k, generator=g, dtype=torch.float64) for k in (6, 5))
    torch.manual_seed(0)
    towers = nn.ModuleList([nn.Linear(6, 4, dtype=torch.float64), nn.Linear(5, 4, dtype=torch.float64)])
    image, text = (common.unit(tower(mine(x))) for tower, x in zip(towers, (images, texts)))
    if how == "released":
        logits = Slice.apply(image) @ Slice.apply(text).T / 0.3
        loss = timix.soft_itc((logits, logits.T), (dense(0.6),) * 2)
    else:
        common.gather = Slice.apply if how == "naive" else plain
        logits = timix.similarities(image, text, 0.3)
        common.gather = plain
        loss = timix.soft_itc(logits, timix.soft_labels("area", Mix(None, 0.6, None, None), BLOCK, *logits))
    loss.backward()
    common.average_gradients(towers.parameters())
    return common.all_gather(loss.detach()[None]).mean().item(), [p.grad for p in towers.parameters()]


@pytest.mark.parametrize("world", [2, 4])
def test_the_mixed_loss_of_shards_is_that_of_the_whole_batch_and_a_naive_gather_is_noticed(pools, world):
    loss, grads = mixed_gradients("ours")
    for found, theirs in pools(world)(mixed_gradients, "ours"):
        assert found == close(loss) and far(theirs, grads) < 1e-10
    found, theirs = pools(world)(mixed_gradients, "released")[0]
    assert found == close(loss) and far([world * g for g in theirs], grads) < 1e-10              # exactly 1 / G of the gradient (22)
    found, theirs = pools(world)(mixed_gradients, "naive")[0]
    assert found == close(loss) and min(far([a], [b]) for a, b in zip(theirs, grads)) > 0.1


# ---- predictor and its supervision (23 .. 27) ----

def test_the_predictor_has_the_published_size_and_tells_log_probabilities():
    assert sum(p.numel() for p in timix.PatchPredictor(768, 768).parameters()) == 1_256_642
    tpp, h, g = build().predictor, torch.randn(3, 9, 16, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    found, order = tpp(h, g), torch.randperm(9)
    assert found.shape == (3, 9, 2) and (found.exp().sum(2) - 1).abs().max() < 1e-12
    torch.testing.assert_close(tpp(h[:, order], g), found[:, order], rtol=1e-10, atol=1e-12)
    assert (tpp(h, g.roll(1, 0)) - found).abs().amax((1, 2)).min() > 1e-3
    a = F.gelu(F.linear(F.layer_norm(h, [16], tpp.norm.weight, tpp.norm.bias, 1e-6), tpp.embed.weight, tpp.embed.bias))
    z = torch.cat([a[..., :8], a[..., 8:].mean(1, keepdim=True).expand(-1, 9, -1), g[:, None].expand(-1, 9, -1)], 2)
    first, _, second, _, third = tpp.head
    torch.testing.assert_close(found, third(F.gelu(second(F.gelu(first(z))))).log_softmax(2), rtol=1e-10, atol=1e-12)
    first.weight.data[:, 16:] = 0                            # text-blind without the columns of the text
    assert torch.equal(tpp(h, g.roll(1, 0)), tpp(h, g))


def test_pta_is_the_cross_entropy_of_the_patches_of_used_entries():
    g, used = torch.Generator().manual_seed(8), torch.tensor([True, False, True, True, False])
    found, patches = torch.randn(5, 9, 2, generator=g, dtype=torch.float64).log_softmax(2), torch.rand(5, 9, generator=g) < 0.4
    loss, gauges = timix.pta_loss(found, patches, used)
    for cost in (F.cross_entropy, F.nll_loss):
        assert loss.item() == close(cost(found[used].flatten(0, 1), patches[used].flatten().long()).item())
    right = (found[used].argmax(2) == patches[used].long()).double()
    assert gauges["pta_accuracy"].item() == close(right.mean().item()) and gauges["pta_recall"].item() == close(right[patches[used]].mean().item())
    nothing, gauges = timix.pta_loss(found, patches, used & False)
    assert nothing == 0 and all(x == 0 for x in gauges.values())


@pytest.mark.parametrize("box,size,n,want", [
    ((8, 4, 24, 8), (32, 32), 8, (slice(1, 2), slice(2, 6))), ((5, 5, 6, 6), (32, 32), 8, (slice(1, 2), slice(1, 2))),
    ((7, 0, 9, 4), (32, 32), 8, (slice(0, 1), slice(1, 3))), ((0, 0, 50, 20), (50, 20), 6, (slice(0, 6), slice(0, 6))),
    ((40, 10, 41, 20), (100, 20), 4, (slice(2, 4), slice(1, 2))), ((9.99, 9.99, 10, 10), (10, 10), 5, (slice(4, 5), slice(4, 5))),
    ((25, 0, 25, 20), (100, 20), 4, (slice(0, 4), slice(1, 2)))])
def test_a_box_marks_every_patch_it_touches_and_at_least_one(box, size, n, want):
    marked = np.zeros((n, n), bool)
    marked[want] = True
    assert np.array_equal(timix.box_patches(box, size, n), marked)
    left, top, right, bottom = box                           # no patch border lies on an edge twice: flipped boxes give flipped maps
    flipped = timix.box_patches((size[0] - right, top, size[0] - left, bottom), size, n)
    assert right == left or np.array_equal(flipped, marked[:, ::-1])


@pytest.mark.parametrize("whole", [False, True])
def test_region_images_show_a_box_and_mark_the_patches_of_each_text(whole, monkeypatch):
    seen, crop, tokenizer, counts, chosen = [], data.crop, Tokenizer(), Counter(), Counter()
    monkeypatch.setattr(data, "crop", lambda *args: (seen.append(args), crop(*args))[1])
    cfg, sample = config(entries=4, whole=whole, flip=True, context=16), painted(caption="all of it")
    for seed in range(60):
        row = timix.region_example(sample, data.rng_for(seed), cfg, tokenizer)
        (_, (x, y, w, h), size, flip), told = seen[-1], [tokenizer.decode(t) for t in row["region_tokens"]]
        assert size == 32 and 0 <= x < x + w <= 96 and 0 <= y < y + h <= 64
        used, inside, want = row["region_used"], {}, {}
        for b in SHAPES:                                     # pixel by pixel
            there = np.zeros((64, 96), bool)
            there[b["y"]:b["y"] + b["h"], b["x"]:b["x"] + b["w"]] = True
            there = there[y:y + h, x:x + w][:, ::-1] if flip else there[y:y + h, x:x + w]
            inside[b["text"]] = there.sum() / (b["w"] * b["h"])
            ys, xs = there.nonzero()
            down, across = ([any(k * side < 4 * (p + 1) and 4 * p < (k + 1) * side for p in at) for k in range(4)] for at, side in ((ys, h), (xs, w)))
            want[b["text"]] = np.outer(down, across).ravel()
        assert 1.0 in inside.values()                        # a whole box
        fits, first = {t for t, share in inside.items() if share > 0.5}, ["all of it"] if whole else []
        assert told[:whole] == first and set(told[whole:used.sum()]) == fits and used.sum() == len(fits) + whole
        assert not whole or row["region_patches"][0].all()
        assert used.tolist() == sorted(used, reverse=True) and not row["region_patches"][~used].any() and set(told[used.sum():]) <= {""}
        for text, marks in zip(told[whole:used.sum()], row["region_patches"][whole:]):
            assert np.array_equal(marks, want[text]), text
            colour, shown = np.array(PAINT[text])[:, None, None], row["region_images"].astype(int)
            strong = (np.abs(shown - colour).max(0) < 60).reshape(4, 8, 4, 8).any((1, 3)).ravel()
            assert strong.any() and not strong[~marks].any()  # the pixels went the same way
        counts.update(first_text=told[whole], flip=flip, whole=w == 96 and h == 64)
        chosen[tuple(told[:used.sum()])] += 1
    assert 15 < counts["flip"] < 45 and len(chosen) > 5
    assert timix.region_example(sample, data.rng_for(0), replace(cfg, entries=1), tokenizer)["region_tokens"].shape == (1, 16)


def test_crops_reach_from_the_box_to_every_edge_and_records_without_boxes_are_left_out(monkeypatch):
    seen, crop, one = [], data.crop, painted(SHAPES[:1])
    monkeypatch.setattr(data, "crop", lambda *args: (seen.append(args[1]), crop(*args))[1])
    for seed in range(40):
        timix.region_example(one, data.rng_for(seed), config(), Tokenizer())
    x, y, w, h = map(np.array, zip(*seen))
    assert (x.min(), x.max(), y.min(), y.max()) == (0, 6, 0, 5) and (x + w).min() >= 26 and (y + h).min() >= 19 and len(set(seen)) > 35
    for boxes in ([], [{**SHAPES[0], "text": " "}]):
        with pytest.raises(Skip, match="no box"):
            timix.region_example(painted(listed=boxes), data.rng_for(0), config(), Tokenizer())


def test_distortions_move_nothing_unless_they_may():
    image = Image.fromarray(np.where(np.arange(40)[:, None] + 0 * np.arange(40) < 20, 60, 190).astype(np.uint8)[..., None].repeat(3, 2))
    for moving in (False, True):
        found = [np.asarray(timix.distort(image, data.rng_for(seed), moving)).astype(int) for seed in range(80)]
        moved = [not (x[:18].max() < x[22:].min() and x[:18].std() == x[22:].std() == 0) for x in found]   # sharpened twice: two rows
        assert any(moved) == moving and 0.2 < np.mean([not np.array_equal(x, np.asarray(image)) for x in found]) < 0.95


def test_a_training_pair_is_a_crop_and_its_caption():
    sample, draw = painted(caption=["one", "two"]), lambda seed, **how: timix.example(sample, data.rng_for(seed), config(**how), Tokenizer())
    found = [draw(seed, scale=0.3) for seed in range(30)]
    assert {Tokenizer().decode(r["tokens"]) for r in found} == {"one", "two"} and len({r["images"].tobytes() for r in found}) == 30
    red = lambda x: np.argmax((x["images"][0].astype(int) - x["images"][1]).clip(0).sum(0)) < 16  # on the left
    assert red(draw(0)) and 2 < sum(red(draw(seed, flip=True)) for seed in range(20)) < 18
    with pytest.raises(Skip, match="no caption"):
        timix.example(painted(), data.rng_for(0), config(), Tokenizer())


# ---- the objective: an independent reference, row by row (28, 30 .. 34) ----

def by_hand(model, batch, chance, alpha):
    """The terms of one process with predicted labels and text scores; nothing is done to more than one row at a time."""
    (images, tokens, valid), tau, slow, n = (batch[k] for k in ("images", "tokens", "valid")), model.temperature, model.teacher, len(batch["images"])
    towers = lambda m: ([m.vision(x[None])[0] for x in images], [m.text(t[None], v[None])[0] for t, v in zip(tokens, valid)])
    joint = lambda m: [F.normalize(torch.stack([F.linear(x[0], p.weight, p.bias) for x in side]), dim=1)
                       for side, p in zip(towers(m), (m.image_proj, m.text_proj))]
    (seen, states), (taught, _), (v, u) = towers(model), towers(slow), joint(model)
    S, eye = v @ u.T / tau, torch.eye(n, dtype=torch.float64)
    T = (lambda v, u: v @ u.T / tau)(*joint(slow)).detach()
    ce = lambda logits, y: -(y * logits.log_softmax(1)).sum() / n
    itc = sum(ce(s, alpha * t.softmax(1) + (1 - alpha) * eye) for s, t in ((S, T), (S.T, T.T))) / 2

    gumbel, other = -(-chance[:, 2 * L:2 * L + 2 * BLOCK].double().log()).log(), {}
    for i in range(n):
        block = [j for j in range(n) if j // BLOCK == i // BLOCK and j != i]
        for way, logits in enumerate((S, S.T)):
            other[way, i] = max(block, key=lambda j: (logits[i, j] + gumbel[i, way * BLOCK + j % BLOCK]).item())
    match = lambda t, i: model.match(model.fuse(states[t][None], valid[t][None], seen[i][None])[0, 0]).log_softmax(0)
    itm = -sum(match(i, i)[1] + match(i, other[1, i])[0] + match(other[0, i], i)[0] for i in range(n)) / (3 * n)

    shown, at, asked = timix.mask_tokens(tokens, valid, chance[:, :2 * L].view(n, 2, L), 0.3, 300)
    costs, read = [], lambda m, i, x: m.word(m.fuse(m.text(shown[i:i + 1], valid[i:i + 1]), valid[i:i + 1], x[i][None]))[0]
    for i in range(n):
        for place, word in zip(at[i].tolist(), asked[i].tolist()):
            if word >= 0:
                guess, opinion = read(model, i, seen)[place].log_softmax(0), read(slow, i, taught)[place].softmax(0)
                costs.append(-(1 - alpha) * guess[word] - alpha * (opinion * guess).sum())

    pta = [F.cross_entropy(model.predictor(model.vision(batch["region_images"][r:r + 1], upto=model.tap)[:, 1:], model.text(
        batch["region_tokens"][r, e:e + 1], batch["region_valid"][r, e:e + 1])[:, 0])[0], batch["region_patches"][r, e].long())
        for r, e in batch["region_used"].nonzero().tolist()]

    scores = torch.cat([model.predictor(model.vision(x[None], upto=model.tap)[:, 1:], s[None, 0])[..., 1] for x, s in zip(images, states)])
    mix = brute_mix(images, scores, timix.side(GRID, common.generator(0, 0, 1), config()), BLOCK)
    M, mixed = dense(mix.lam, n), torch.cat([model.encode_image(x[None]) for x in mix.images])
    S2 = mixed @ u.T / tau
    found = {"itc": itc, "itm": itm, "mlm": sum(costs) / len(costs), "pta": sum(pta) / len(pta),
             "mix": (ce(S2, (M @ S.softmax(1)).detach()) + ce(S2.T, (S.T.softmax(1) @ M).detach())) / 2}
    return found, len(costs)


@pytest.mark.parametrize("rise", [0.0, 0.5, 1.0])
def test_all_terms_are_those_told_row_by_row(rise):
    model = build()
    (ours, gauges), (theirs, asked) = objective(model, rise=rise), by_hand(model, rows(), noise(), 0.4 * rise)
    assert tuple(ours) == ALBEF_TERMS and numbers(ours) == close(numbers(theirs)) and asked > 8 and set(gauges) == {"pta_accuracy", "pta_recall"}
    same_gradients(gradients(model, sum(ours.values())), gradients(model, sum(theirs.values())), rtol=1e-8, atol=1e-10)


def test_without_the_teacher_s_opinion_contrast_is_hard_label_cross_entropy():
    for changes, rise in ((dict(), 0.0), (dict(alpha=0.0), 1.0), (dict(base="clip"), 1.0)):
        model, batch = build(**changes), rows()
        with torch.no_grad():
            S = model.encode_image(batch["images"]) @ model.encode_text(batch["tokens"], batch["valid"]).T / model.temperature
        want = (F.cross_entropy(S, torch.arange(B)) + F.cross_entropy(S.T, torch.arange(B))) / 2
        terms, _ = objective(model, batch, rise=rise, **changes)
        assert terms["itc"].item() == close(want.item())
    assert set(terms) == {"itc", "pta", "mix"} and model.teacher is None and not hasattr(model, "fusion")


def test_gradients_stop_where_they_should():
    model, tap = build(tap=1), 1
    model.teacher.requires_grad_(True)                       # even so
    terms, _ = objective(model, tap=tap)
    found = {name: {n for n, g in gradients(model, term).items() if g is not None and g.ne(0).any()} for name, term in terms.items()}
    part = lambda *prefixes: {n for n, _ in model.named_parameters() if n.startswith(prefixes)}
    above, below = part("vision.blocks.1.", "vision.norm."), part("vision.blocks.0.", "vision.patch_embed", "vision.pos", "vision.cls")
    assert not any(names & part("teacher.") for names in found.values())
    for name in ("itc", "itm", "mlm", "mix"):
        assert not found[name] & part("predictor.") and found[name] > above | below | part("text."), name
    assert found["pta"] == part("predictor.", "text.") | below
    fusion = part("fusion.", "norm.")
    assert found["mix"] == found["itc"] == above | below | part("text.", "image_proj", "text_proj", "temperature")
    assert found["itm"] > fusion | part("match.") and found["mlm"] > fusion | part("word.") and "temperature" not in found["itm"] | found["mlm"]


def test_mixed_images_enter_only_their_own_loss(monkeypatch):
    model, seen = build(), []
    plain = numbers(objective(model)[0])
    monkeypatch.setitem(timix.MIXERS, "text", lambda batch, *args: (seen.append(args), Mix(batch["images"].flip(3), 0.5, None, None))[1])
    other = numbers(objective(model)[0])
    assert {k for k in plain if plain[k] != other[k]} == {"mix"}
    scores, chance, n, generator, cfg = seen[0]
    assert not scores.requires_grad and torch.equal(chance, noise()[:, -GRID ** 2:]) and n == GRID
    assert numbers(objective(model, mixing=False)[0]) == {k: v for k, v in plain.items() if k != "mix"}


def test_without_boxes_patches_are_scored_by_their_cosine_with_the_text(monkeypatch):
    model, batch, seen, mixer = build(), rows(boxes=False), [], timix.MIXERS["text"]
    monkeypatch.setitem(timix.MIXERS, "text", lambda *args: (seen.append(args[1]), mixer(*args))[1])
    terms, gauges = objective(model, batch)
    assert set(terms) == set(ALBEF_TERMS) - {"pta"} and not gauges
    text = model.encode_text(batch["tokens"], batch["valid"])
    want = [F.cosine_similarity(F.linear(model.vision(x[None])[0, 1:], model.image_proj.weight, model.image_proj.bias), t[None])
            for x, t in zip(batch["images"], text)]
    torch.testing.assert_close(seen[0], torch.stack(want), rtol=1e-9, atol=1e-11)
    assert not seen[0].requires_grad


@pytest.mark.parametrize("changes", [{}, dict(base="clip", targets="area", mix="cutmix")])
def test_recomputing_changes_no_gradient(changes):
    for build_with, use in ((dict(grad_checkpoint=True), {}), ({}, dict(micro=2))):
        ours, theirs, most = build(**changes, **build_with), build(**changes), []
        for block in (ours.vision.blocks[0], ours.text.blocks[0], *(ours.fusion if hasattr(ours, "fusion") else ())):
            block.register_forward_pre_hook(lambda module, args: most.append(len(args[0])))
        a, b = (objective(m, **changes, **u)[0] for m, u in ((ours, use), (theirs, {})))
        calls, grads = len(most), gradients(ours, sum(a.values()))
        assert numbers(a) == close(numbers(b)) and len(most) > calls and (max(most) <= 2 or not use)             # again in backward, and in parts
        same_gradients(grads, gradients(theirs, sum(b.values())))


def test_bfloat16_changes_little():
    model = build().float()
    one, other = (timix.losses(model, rows(), noise(), common.generator(0, 0, 1), config(precision=p, mix="random"), 0.5, True)[0]
                  for p in ("fp32", "bf16"))
    assert all(t.dtype == torch.float32 for t in other.values()) and numbers(other) == pytest.approx(numbers(one), rel=0.05)
    same_gradients(gradients(model, other["mix"]), gradients(model, one["mix"]), rtol=0.5, atol=0.02)


def test_the_average_forgets_at_the_rate_of_its_momentum():
    model, k = build(), 7
    fast = dict(model.named_parameters())
    want = {n: fast[n] + 0.9 ** k * (m - fast[n]) for n, m in model.teacher.named_parameters()}
    for _ in range(k):
        model.follow(0.9)
    found = dict(model.teacher.named_parameters())
    assert all((found[n] - w).abs().max() < 1e-12 for n, w in want.items())
    assert found.keys() >= {"norm.weight", "word.weight", "fusion.0.norm1.weight"}
    fresh = timix.TiMix(config())
    assert all(torch.equal(m, dict(fresh.named_parameters())[n]) and not m.requires_grad for n, m in fresh.teacher.named_parameters())


def test_temperature_is_held_between_its_bounds():
    model = build()
    for start, want in ((0.0, 0.001), (-3.0, 0.001), (0.07, 0.07), (7.0, 0.5)):
        model.temperature.data.fill_(start)
        model.clamp()
        assert model.temperature.item() == pytest.approx(want)


# ---- draws: negatives and masks (32, 33) ----

def test_negatives_are_other_pairs_of_the_block_as_often_as_they_are_confused():
    g, n, block = torch.Generator().manual_seed(2), 4000, 5
    one = F.normalize(torch.randn(2, block, 4, generator=g), dim=2)
    image, text = (x.repeat(n, 1) for x in one)
    found = timix.hard_negatives(image, text, 0.5, torch.rand(n * block, 2, block, generator=g), block)
    for drawn, logits in zip(found, (one[0] @ one[1].T / 0.5, one[1] @ one[0].T / 0.5)):
        assert torch.equal(drawn // block, torch.arange(n).repeat_interleave(block)) and (drawn != torch.arange(n * block)).all()
        counts = F.one_hot(drawn % block, block).view(n, block, block).sum(0).double()
        want = n * logits.double().masked_fill(torch.eye(block).bool(), -math.inf).softmax(1)
        off = ~torch.eye(block).bool()
        chi2 = ((counts - want)[off] ** 2 / want[off]).sum()
        assert chi2 < 15 + 5 * math.sqrt(2 * 15) and want[off].max() > 4 * want[off].min()       # 5 rows of 3 degrees of freedom
    assert torch.equal(*(timix.hard_negatives(image[:2], text[:2], 0.5, torch.rand(2, 2, 2, generator=g), 2)[k] for k in (0, 1)))


def drawn_here():
    """Negatives (as global rows) and masked tokens of this rank's rows of 16."""
    g, cfg = torch.Generator().manual_seed(6), config()
    image, text = (mine(F.normalize(torch.randn(16, 4, generator=g), dim=1)) for _ in range(2))
    words, draws, rest = common.row_noise(cfg, 3, 2 * L + 2 * BLOCK + 16).split([2 * L, 2 * BLOCK, 16], 1)
    negatives = timix.hard_negatives(image, text, 0.3, draws.view(-1, 2, BLOCK), BLOCK)
    shown, at, asked = timix.mask_tokens(*map(mine, texts(16)), words.view(-1, 2, L), 0.3, 300)
    return *(x + common.rank() * len(image) for x in negatives), shown, at, asked, rest


@pytest.mark.parametrize("world", [2, 4])
def test_draws_are_the_same_on_any_number_of_ranks(pools, world):
    for theirs, ours in zip(zip(*pools(world)(drawn_here)), drawn_here()):
        assert torch.equal(torch.cat(theirs), ours)


def test_words_are_masked_at_their_rates_and_asked_for_as_they_were():
    n, length, vocab, g = 6000, 20, 500, torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 21, (n, 1), generator=g)
    valid, tokens = torch.arange(length) < lengths, torch.randint(8, vocab, (n, length), generator=g)
    tokens[:, 0] = Tokenizer.BOS
    tokens.scatter_(1, lengths - 1, Tokenizer.EOS)
    tokens, chance = tokens.where(valid, Tokenizer.PAD), torch.rand(n, 2, length, generator=g)
    shown, at, asked = timix.mask_tokens(tokens, valid, chance, 0.15, vocab)
    assert all(torch.equal(a, b) for a, b in zip((shown, at, asked), timix.mask_tokens(tokens, valid, chance, 0.15, vocab)))
    masked = torch.zeros(n, length, dtype=torch.bool).scatter(1, at, asked >= 0)
    assert at.shape == (n, length // 2) and torch.equal(tokens.gather(1, at).where(asked >= 0, -1), asked)
    assert not masked[:, 0].any() and not (masked & ~valid).any() and torch.equal(shown[~masked], tokens[~masked])
    assert masked.gather(1, lengths - 1).double().mean().item() == pytest.approx(0.15, abs=0.02)         # the end may be
    places, wrong = int(valid[:, 1:].sum()), lambda p, n: 4 * math.sqrt(p * (1 - p) / n)
    assert masked.sum() / places == pytest.approx(0.15, abs=wrong(0.15, places))
    kinds, total = shown[masked], int(masked.sum())
    same, mask = kinds == tokens[masked], kinds == Tokenizer.MASK
    for share, want in ((mask, 0.8), (same, 0.1 * (1 + 1 / 492)), (~mask & ~same, 0.1)):
        assert share.double().mean().item() == pytest.approx(want, abs=wrong(want, total))
    anything = kinds[~mask & ~same]
    assert anything.min() >= 8 and anything.max() < vocab and abs(anything.double().mean() - 253.5) < 4 * 142 / math.sqrt(len(anything))
    for none in (timix.mask_tokens(tokens, valid, chance, 0.0, vocab), timix.mask_tokens(tokens, valid & False, chance, 0.9, vocab)):
        assert torch.equal(none[0], tokens) and (none[2] == -1).all()


# ---- learning (29) ----

def test_one_image_is_learned_by_heart_and_the_window_moves_with_the_text():
    cfg, tokenizer = config(base="clip", dim=32, text_dim=32), Tokenizer()
    corners = [{"x": 0, "y": 0, "w": 16, "h": 16, "text": "red"}, {"x": 16, "y": 16, "w": 16, "h": 16, "text": "blue"}]
    image = torch.from_numpy(np.asarray(painted(corners, (32, 32)).image()).copy()).permute(2, 0, 1)
    tokens, valid = (torch.from_numpy(np.stack(x)) for x in zip(*(tokenizer.pad(t, L) for t in ("red", "blue"))))
    marks = torch.from_numpy(np.stack([timix.box_patches((b["x"], b["y"], b["x"] + 16, b["y"] + 16), (32, 32), 4).ravel() for b in corners]))
    batch = dict(images=image.expand(4, -1, -1, -1), tokens=tokens.repeat(2, 1), valid=valid.repeat(2, 1), region_images=image[None],
                 region_tokens=tokens[None], region_valid=valid[None], region_patches=marks[None], region_used=torch.ones(1, 2, dtype=torch.bool))
    torch.manual_seed(0)
    model = timix.TiMix(cfg)
    opt = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        terms, gauges = timix.losses(model, batch, noise(4), common.generator(0), cfg, 0.0, False)
        opt.zero_grad()
        terms["pta"].backward()
        opt.step()
    assert gauges["pta_accuracy"] == 1 and gauges["pta_recall"] == 1
    pair = image.expand(2, -1, -1, -1)
    scores = model.relevance(model.vision(pair, upto=model.tap), None, model.text(tokens, valid), True)
    mix = text_aware_mix(pair, scores, 2)
    assert torch.equal(mix.taken, marks) and not (~mix.kept & marks).any()       # pastes what is told, covers what is not


def test_a_taught_predictor_covers_fewer_patches_with_objects_than_chance_and_the_reverse_more(tiny_world, plain, tmp_path):
    """Taught by the boxes of the tiny world alone, without a mixture, and judged by boxes held out."""
    cfg = config(data=[f"{tiny_world}/pairs"], out=str(tmp_path / "run"), base="clip", mix="none", w_itc=0.0, image_size=48, dim=32, text_dim=32,
                 context=24, steps=60, lr=5e-3)
    log, saved, _ = run(cfg)
    torch.manual_seed(0)
    model, tokenizer, found = timix.TiMix(cfg), Tokenizer.loads(saved["vocab"]), []
    for state in ({}, saved["model"]):
        model.load_state_dict(state, strict=bool(state))
        found.append(timix.measure(model, tokenizer, cfg, torch.device("cpu"), Index([str(plain / "val/test-00000.tar")])))
    before, after = found
    assert after["covered_text"] < after["covered_random"] - 0.1 and after["covered_random"] < after["covered_inverted"] - 0.1
    assert after["covered_random"] == before["covered_random"] == pytest.approx(0.3, abs=0.08) and after["pta_relevant"] == before["pta_relevant"]
    assert after["pta_accuracy"] > 0.72 > before["pta_accuracy"] + 0.03 and after["pta_recall"] > 0.5 and after["pta_precision"] > 0.6
    assert all("mix" not in r and r["pta"] > 0 for r in log)


# ---- whole runs ----

run, first_step, refused = (partial(ask, timix.main) for ask in (conftest.run, conftest.first_step, conftest.refused))


@pytest.fixture
def paths(tiny_world, tmp_path):
    return dict(data=[f"{tiny_world}/pairs"], context=24, out=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(tiny_world, tmp_path_factory):
    """Twenty steps in one process: what they logged and saved; of each the rise, was there a mixture, model and teacher as flat vectors, draws."""
    cfg = config(data=[f"{tiny_world}/pairs"], out=str(tmp_path_factory.mktemp("timix") / "run"), context=24, w_itm=2.0, w_mlm=0.5, w_pta=0.7,
                 w_mix=0.3, ramp=0.25, mix_until=0.5)
    steps, losses = [], timix.losses
    flat = lambda model, names: torch.cat([dict(model.named_parameters())[n].detach().flatten() for n in names])

    def watched(model, batch, chance, generator, cfg, rise, mixing, *parts):
        names = [n for n, _ in model.teacher.named_parameters()]
        steps.append((rise, mixing, flat(model, names), flat(model.teacher, names), chance))
        return losses(model, batch, chance, generator, cfg, rise, mixing, *parts)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(timix, "losses", watched)
        return cfg, *run(cfg)[:2], steps


def test_the_logged_loss_is_the_weighted_sum_and_rises_with_the_ramp(whole):
    _, log, _, steps = whole
    assert [r for r, *_ in steps] == pytest.approx([min(1, k / 5) for k in range(20)])
    for k, r in enumerate(log):
        weights = dict(itc=1, itm=2, mlm=0.5, pta=0.7, **({"mix": 0.3 * min(1, k / 5)} if k < 10 else {}))
        assert set(ALBEF_TERMS) & r.keys() == set(weights) and steps[k][1] == (k < 10)
        assert r["loss"] == pytest.approx(sum(w * r[name] for name, w in weights.items()), rel=1e-5) and 0 <= r["pta_recall"] <= 1
    assert log[-1]["loss"] < log[0]["loss"] - 0.5


def test_the_average_is_moved_before_it_is_asked_and_no_step_repeats_its_draws(whole):
    _, _, saved, steps = whole
    (_, _, first, slow, *_), *rest = steps
    assert torch.equal(first, slow)                          # the average of equals
    for _, _, fast, now, *_ in rest:
        torch.testing.assert_close(now, 0.9 * slow + 0.1 * fast, rtol=1e-5, atol=1e-7)
        slow = now
    assert torch.equal(torch.cat([v.flatten() for k, v in saved["model"].items() if k.startswith("teacher.")]), slow)
    assert len(torch.cat([chance for *_, chance in steps]).unique(dim=0)) == 20 * 16


def test_stopped_and_resumed_is_bitwise_the_run_without_a_stop(whole, monkeypatch):
    cfg, log, saved, _ = whole
    keys = ("loss", *ALBEF_TERMS, "pta_accuracy", "pta_recall", "lr", "grad_norm", "temperature")
    conftest.resumes_bitwise(timix.main, cfg, log, saved, keys, monkeypatch)


CASES = {"albef text predicted": {}, "clip random relevance": dict(base="clip", mix="random", targets="relevance"),
         "albef cutmix area": dict(mix="cutmix", targets="area")}


@pytest.fixture(scope="module")
def alone(tiny_world, tmp_path_factory):
    """alone(case): its configuration, the first step's gradients and the log of a run in one process."""
    found = {}

    def one(case):
        if case not in found:
            cfg = config(data=[f"{tiny_world}/pairs"], context=24, out=str(tmp_path_factory.mktemp("alone") / "run"), ramp=0.0, **CASES[case])
            found[case] = cfg, first_step(cfg), run(cfg)[0]
        return found[case]
    return one


@pytest.mark.parametrize("case,world", [("albef text predicted", 4), *((case, 2) for case in CASES)])
def test_runs_on_any_number_of_ranks_are_one_run(alone, pools, case, world):
    cfg, grads, log = alone(case)
    for theirs in pools(world)(first_step, cfg):
        assert far(theirs, grads) < 1e-5
    theirs = pools(world)(run, replace(cfg, out=f"{cfg.out}-{world}"))[0][0]
    terms = {"loss", "pta_accuracy", *ALBEF_TERMS}
    for a, b in zip(log, theirs, strict=True):
        assert {k: b[k] for k in terms & b.keys()} == pytest.approx({k: a[k] for k in terms & a.keys()}, rel=1e-4)


def test_micro_and_recomputing_leave_the_first_step_of_a_run_what_it_was(alone):
    cfg, grads, _ = alone("albef text predicted")
    for changes in (dict(micro=4), dict(grad_checkpoint=True)):
        assert far(first_step(replace(cfg, **changes)), grads) < 1e-5


def test_a_mixer_put_in_from_outside_is_used(paths, monkeypatch):
    """The wrong way round, and as scores the patches' saturation, which in this world tells objects from grounds."""
    found, cfg = {}, config(steps=2, **paths)
    colour = lambda images: F.avg_pool2d(images.amax(1).float() - images.amin(1).float(), cfg.patch).flatten(1)
    for name, order in (("text", None), ("inverted", lambda images, scores: -scores), ("oracle", lambda images, scores: colour(images))):
        if order:
            with pytest.raises(UserError, match=f"--mix {name}: choose none, text, random, cutmix"):
                timix.check(replace(cfg, mix=name))
            monkeypatch.setitem(timix.MIXERS, name, lambda batch, scores, chance, n, generator, cfg, order=order: text_aware_mix(
                batch["images"], order(batch["images"], scores), timix.side(n, generator, cfg), cfg.block))
        found[name] = run(replace(cfg, mix=name, out=f"{cfg.out}-{name}"))[0][0]["mix"]
        monkeypatch.delitem(timix.MIXERS, name, raising=False) if order else None
    assert len(set(found.values())) == 3


@pytest.fixture(scope="module")
def plain(tiny_world, tmp_path_factory):
    """The tiny world's first images and captions without their boxes, and a few held out with theirs."""
    folder, index = tmp_path_factory.mktemp("plain"), Index(data.expand([f"{tiny_world}/pairs"]))
    os.makedirs(folder / "val")
    data.write_shard(str(folder / "val/test-00000.tar"), "pairs/test", range(64))
    with data.tarfile.open(folder / "train-00000.tar", "w") as tar:
        for i in range(48):
            sample = index[i]
            data.add(tar, f"{i:04d}.jpg", sample.members["jpg"])
            data.add(tar, f"{i:04d}.json", json.dumps({"caption": sample.json["caption"]}).encode())
    return folder


def test_data_without_boxes_train_with_cosines_and_say_so(plain, paths, capsys):
    cfg = config(**{**paths, "data": [str(plain / "train-00000.tar")]}, steps=3, temperature=0.7)
    log, _, _ = run(cfg)
    told = capsys.readouterr().out
    assert "no boxes in the data, so cosines of patches and text; PTA is off" in told and len(told.splitlines()) <= 4
    assert all("pta" not in r for r in log) and "mix" in log[1] and "mix" not in log[2] and log[0]["temperature"] == 0.5
    assert "relevance needs probabilities" in refused(replace(cfg, targets="relevance", out=cfg.out + "-relevance"))


def test_real_pairs_train_at_their_default_augmentation(shared, paths):
    cfg = config(**{**paths, "data": [f"{shared}/pairs"]}, steps=2, scale=0.2, flip=True, augment=True, whole=True)
    log, _, _ = run(cfg)
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in log) and "mix" in log[1]


def test_a_finished_run_is_evaluated_measured_and_drawn(plain, paths):
    _, saved, result = run(config(**paths, val=[str(plain / "val")], steps=3, eval_every=0))
    assert {"curves.png", "mixing.png", "result.json"} <= set(os.listdir(paths["out"])) and {"i2t_r1", "t2i_r1", "pta_recall"} <= result.keys()
    assert all(0 <= result[k] <= 1 for k in ("pta_accuracy", "pta_precision", "covered_text", "covered_random", "covered_inverted"))
    model, batch = timix.Model(config(context=24)), rows()
    model.load_state_dict(saved["model"])
    told = model.score(*(batch[k] for k in ("images", "tokens", "valid")))
    states = model.text(batch["tokens"], batch["valid"])
    log_odds = model.match(model.fuse(states, batch["valid"], model.vision(batch["images"]))[:, 0]).log_softmax(1)
    torch.testing.assert_close(told, log_odds[:, 1] - log_odds[:, 0])


@pytest.mark.parametrize("changes,told", [
    (dict(batch=15), "--block 4 must be even.*divide the 15 rows"), (dict(block=3), "--block 3 must be even"), (dict(batch=18), "divide the 18 rows"),
    (dict(mix="mixup"), "--mix mixup: choose none, text, random, cutmix"), (dict(base="blip"), "--base blip: choose albef, clip"),
    (dict(targets="soft"), "--targets soft: choose predicted, area, relevance"), (dict(tap=3), "--tap 3: .* 1 to 2"), (dict(tap=0), "--tap 0"),
    (dict(min_side=0.8), "--min-side 0.8 --max-side 0.75"), (dict(min_side=0.0), "--min-side 0.0"), (dict(max_side=1.5), "--max-side 1.5"),
    (dict(micro=3), "--micro 3")])
def test_what_cannot_be_trained_is_refused_in_one_line(paths, changes, told):
    assert re.search(told, refused(config(**{**paths, **changes})))


def test_a_block_that_spans_ranks_is_refused(paths, pools):
    assert all("--block 16" in told and "divide the 8 rows of a rank" in told for told in pools(2)(refused, config(block=16, **paths)))


def test_the_demo_is_sound():
    demo = common.parse(timix.Config, timix.DEMO, "", [])
    timix.check(demo)
    common.check_rows(demo)
    assert timix.TiMix(demo).tap == 2 and timix.Config().tap is None and (timix.Config().depth + 1) // 2 == 6
