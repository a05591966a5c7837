"""M3I's geometry, mixtures, objective, moving average and training run against the oracles of its specification (O1 .. O19)."""
import io, math, os, re, subprocess, sys
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import align
import common
import conftest
import data
import m3i
from common import UserError
from conftest import ROOT, close, exact, far, gradients, numbers, same_gradients
from m3i import TERMS

torch.set_num_threads(1)
GRID, L, D, B, BLOCK, CLASSES = 4, 16, 16, 8, 4, 5


def config(**changes):
    """An M3I of a few thousand parameters: 16 patches of 48 values, 8 of them of each image."""
    tiny = dict(image_size=16, patch=4, unit=1, dim=16, depth=1, heads=2, projector_depth=1, decoder_depth=1, text_dim=16, text_depth=1, text_heads=2,
                context=12, vocab_size=300, batch=16, block=BLOCK, scale=0.5, color=0.0, momentum=0.9, steps=20, warmup=2, lr=0.05, workers=0,
                save_every=100, eval_every=-1, log_every=1, precision="fp32")
    return m3i.Config(**{**tiny, **changes})


def known(**changes):
    """As main knows it once it has looked at the data: captions and classes are there."""
    return config(**{"data": ["-"], "classes": CLASSES, **changes})


def build(**changes):
    """In float64, with nothing left at zero and an average that is not the encoder, as both hide mistakes."""
    torch.manual_seed(0)
    model = m3i.M3I(known(**changes)).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def places(n, seed=0, fewest=40):
    """Geometries (n, 6) of views of images as wide as 100 to 200, flipped or not."""
    rng = np.random.default_rng(seed)
    W, H = rng.integers(100, 200, (2, n))
    h, w = (rng.integers(fewest, side + 1) for side in (H, W))
    return torch.tensor(np.stack([rng.integers(0, H - h + 1), rng.integers(0, W - w + 1), h, w, rng.integers(0, 2, n), W], 1), dtype=torch.float32)


def rows(n=B, **changes):
    """A batch: every fourth row lacks its caption, every fourth its class."""
    g, place, lengths = torch.Generator().manual_seed(0), torch.arange(12), 4 + torch.arange(n)[:, None] % 6
    first, second = torch.randint(0, 256, (2, n, 3, 16, 16), generator=g, dtype=torch.uint8)
    g1 = places(n)
    geometry = torch.stack([g1, torch.cat([places(n, 1)[:, :5], g1[:, 5:]], 1)], 1)
    made = dict(first=first, second=second, geometry=geometry, tokens=torch.randint(8, 300, (n, 12), generator=g), valid=place < lengths,
                has_text=torch.arange(n) % 4 != 1, label=(torch.arange(n) * 3 % CLASSES).where(torch.arange(n) % 4 != 2, -1))
    return {**made, **changes}


def halves(n=B, keep=0.5):
    return m3i.masks(torch.rand(n, L, generator=torch.Generator().manual_seed(1)), GRID, 1, keep)


def complements(n=B):
    """Masks with which both mixtures of a pair are one picture: whatever one hides of an image, the other hides too."""
    own = halves(n)
    first = (torch.arange(n) % BLOCK < BLOCK // 2)[:, None]
    return own.where(first, ~common.partner(own, BLOCK))


WHOLE = halves(keep=1.0)                                     # image a alone


def objective(model, batch=None, own=None, encode=None, **changes):
    """-> terms, z, gauges as main gets them."""
    own, batch, encoders = halves() if own is None else own, batch or rows(), model.encoders()
    with exact():
        return m3i.losses(model, batch, own, int(own[0].sum()), known(**changes), encode or encoders[0], *encoders[1:])


# ---- where views lie (O1 .. O4) ----

def brute(source, target):
    """Centres of the target's patches, through the pixels of the image as it was before flipping, into the source's patches; log ratios of sides."""
    (i1, j1, h1, w1, f1, W), (i2, j2, h2, w2, f2, _) = source.tolist(), target.tolist()
    found = []
    for r in range(GRID):
        for c in range(GRID):
            y, x = i2 + (r + 0.5) * h2 / GRID, j2 + (c + 0.5) * w2 / GRID
            x = W - x if f2 else x
            x = W - x if f1 else x
            found.append([(y - i1) * GRID / h1 - 0.5, (x - j1) * GRID / w1 - 0.5, 10 * math.log(h2 / h1), 10 * math.log(w2 / w1)])
    return np.array(found)


def waves(source, target):
    """(L, 2 D): the published sines and cosines of the numbers of brute(), in float64."""
    angle = brute(source, target)[:, :, None] * 10000.0 ** -(np.arange(4) / 4)
    return torch.from_numpy(np.stack([np.sin(angle), np.cos(angle)], 2).reshape(L, 2 * D))


def coordinates(source, target):
    """The same four numbers read off relative_position(): the third frequency of width 16 is 0.01, slow enough to be unambiguous."""
    found = m3i.relative_position(source[None], target[None], GRID, D)[0].double().view(L, 4, 2, 4)[..., 2]
    return (torch.atan2(found[:, :, 0], found[:, :, 1]) / 0.01).numpy()


def pairs_of_views(n=60):
    a, b = places(n), places(n, 1)
    return list(zip(a, torch.cat([b[:, :5], a[:, 5:]], 1)))


def test_a_view_seen_from_itself_is_the_plain_grid():
    found = m3i.relative_position(places(3), places(3), GRID, D).float()
    column, row = common.sincos(GRID, D).chunk(2, 1)         # MAE's table tells the column first
    torch.testing.assert_close(found[..., :D], torch.cat([row, column], 1).expand(3, -1, -1), rtol=0, atol=1e-6)
    assert found[0, 0, D:].tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 and torch.equal(found[..., D:], found[:1, :1, D:].expand(3, L, -1))


def test_a_view_mirrored_is_seen_with_its_columns_in_reverse():
    for g in places(20):
        mirror = torch.stack([g[0], g[5] - g[1] - g[3], g[2], g[3], 1 - g[4], g[5]])
        row, column = coordinates(g, mirror)[:, :2].T.reshape(2, GRID, GRID)
        assert np.abs(row - np.arange(GRID)[:, None]).max() < 1e-4 and np.abs(column - np.arange(GRID)[::-1]).max() < 1e-4


def test_relative_positions_are_those_of_brute_force_geometry():
    flips = set()
    for source, target in pairs_of_views():
        assert (m3i.relative_position(source[None], target[None], GRID, D)[0] - waves(source, target)).abs().max() < 1e-5
        assert np.abs(coordinates(source, target) - brute(source, target)).max() < 1e-3
        flips.add((source[4].item(), target[4].item()))
    assert len(flips) == 4


def test_there_and_back_again_is_the_identity():
    for source, target in pairs_of_views():
        there, back = coordinates(source, target), coordinates(target, source)
        for axis, last in ((0, -GRID), (1, GRID - 1)):       # both maps are lines: through the first and the last patch
            slope = (back[last, axis] - back[0, axis]) / (GRID - 1)
            k = np.arange(L) // GRID if axis == 0 else np.arange(L) % GRID
            assert np.abs(back[0, axis] + slope * there[:, axis] - k).max() < 1e-3
        assert np.abs(there[:, 2:] + back[:, 2:]).max() < 1e-3


def test_moving_both_views_changes_nothing_where_flips_agree():
    for source, target in pairs_of_views():
        target[4], offset = source[4], torch.tensor([7.0, 5, 0, 0, 0, 0])
        assert torch.equal(*(m3i.relative_position((source + o)[None], (target + o)[None], GRID, D) for o in (0, offset)))


def test_a_view_lies_where_its_geometry_says():
    """On an image whose red is the column and whose green the row; colours do not move a view."""
    y, x = np.mgrid[:180, :240]
    image, cfg, flips = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8)), config(image_size=32, scale=0.2), []
    for seed in range(12):
        seen, g = m3i.view(image, data.rng_for(seed), cfg)
        i, j, h, w, flip, W = g
        at = (np.arange(32) + 0.5) / 32
        column, row = W - (j + at * w) if flip else j + at * w, i + at * h
        inner = slice(2, -2)                                 # bicubic weights are cut off at the edges
        assert np.abs(seen[0] - (column - 0.5))[:, inner].max() < 1 and np.abs(seen[1] - (row - 0.5)[:, None])[inner].max() < 1
        there = m3i.box(g, "")
        crop = data.crop(image, [int(there[k]) for k in "xywh"], 32)
        assert W == 240 and np.array_equal(crop[:, :, ::-1] if flip else crop, seen)
        others = [m3i.view(image, data.rng_for(seed), replace(cfg, color=1.0), second) for second in (False, True)]
        assert all(np.array_equal(where, g) for _, where in others) and m3i.view(image, data.rng_for(seed), replace(cfg, flip=False))[1][4] == 0
        flips.append((flip, *(not np.array_equal(x, seen) for x, _ in others)))
    assert 0 < sum(flip for flip, _, _ in flips) < 12 and all(sum(column) > 5 for column in list(zip(*flips))[1:])


def test_the_box_that_is_drawn_is_where_relative_positions_put_the_edges():
    for source, target in pairs_of_views():
        (row, column, *_), (h, w) = brute(source, target).min(0), (target[2:4] / source[2:4]).tolist()
        want = [(column + 0.5 - w / 2) * 25, (row + 0.5 - h / 2) * 25, 100 * w, 100 * h]         # 25 pixels a patch
        assert [float(m3i.seen_from(source.numpy(), target.numpy(), 100)[k]) for k in "xywh"] == pytest.approx(want, abs=1e-3)


# ---- rows, masks, mixtures (O5) ----

def test_a_row_may_have_a_caption_a_class_or_both():
    raw, cfg, tokenizer = io.BytesIO(), config(classes=CLASSES), data.Tokenizer()
    Image.new("RGB", (30, 20)).save(raw, "JPEG")
    row = lambda **members: m3i.example(data.Sample("k", {"jpg": raw.getvalue(), **members}), data.rng_for(0), cfg, tokenizer)
    found = [row(txt=b"red"), row(cls=b"3"), row(txt=b"red", cls=b"3"), row(json=b'{"caption": ["red"]}', cls=b"5")]
    assert [(bool(r["has_text"]), int(r["label"])) for r in found] == [(True, -1), (False, 3), (True, 3), (True, -1)]
    assert (found[0]["tokens"] == found[3]["tokens"]).all() and found[1]["valid"].any()          # nobody's mean is over nothing
    for members in ({"cls": b"5"}, {"cls": b"-2"}, {"json": b"{}"}):
        with pytest.raises(data.Skip, match="no class"):
            row(**members)


@pytest.mark.parametrize("size,keep,count", [(1, 0.5, 98), (2, 0.5, 96), (2, 0.3, 56), (2, 1.0, 196)])
def test_masks_hold_as_many_patches_in_each_row_in_whole_units(size, keep, count):
    own = m3i.masks(torch.rand(500, (14 // size) ** 2, generator=torch.Generator().manual_seed(0)), 14, size, keep)
    assert own.sum(1).eq(count).all()
    units = own.view(500, 14 // size, size, 14 // size, size).float().mean((2, 4))
    assert units.eq(0).logical_or(units.eq(1)).all()
    assert (units.mean(0) - count / 196).abs().max() < 0.12  # anywhere: 500 draws, five standard deviations
    assert keep == 1 or len(own.unique(dim=0)) == 500


def test_partners_are_each_others_and_never_oneself():
    n = torch.arange(12)
    there = common.partner(n, 4)
    assert torch.equal(common.partner(there, 4), n) and there.ne(n).all() and torch.equal(there // 4, n // 4)


def test_every_patch_of_a_mixture_is_one_of_either_image_to_the_bit():
    model, batch, own, seen = build(), rows(), halves(keep=0.3), []
    objective(model, batch, own, encode=lambda x: (seen.append(x), model.vision.patch_tokens(x))[1])
    patches = lambda x: x.view(B, 3, GRID, 4, GRID, 4).permute(0, 2, 4, 1, 3, 5).reshape(B, L, 48)
    x, a = patches(seen[0]), patches(batch["first"])
    b = a.view(B // BLOCK, BLOCK, L, 48).flip(1).view(B, L, 48)
    assert own.sum(1).eq(4).all() and torch.equal(x, torch.where(own[..., None], a, b)) and x[own].ne(b[own]).any(1).all()


def test_what_the_other_image_left_behind_never_reaches_a_prediction():
    """O6: nor batch statistics of the decoder, which sees own tokens only."""
    model, own, (g1, g2), z = build(), halves(keep=0.3), rows()["geometry"].unbind(1), torch.randn(B, L, D, dtype=torch.float64)
    for tokens, same in ((z.where(own[..., None], 9.0), True), (z.where(~own[..., None], 9.0), False)):
        with exact():
            assert torch.equal(model.decoder(tokens, own, 4, g1, g2, GRID), model.decoder(z, own, 4, g1, g2, GRID)) == same
        torch.testing.assert_close(model.mean(z, own), torch.stack([x[o].mean(0) for x, o in zip(z, own)]), rtol=1e-12, atol=1e-14)
        assert torch.equal(model.mean(tokens, own), model.mean(z, own)) == same


def test_the_decoder_knows_where_its_tokens_and_its_targets_lie():
    model, own, views, z = build(), halves(keep=0.3), rows()["geometry"], torch.randn(B, L, D, dtype=torch.float64)
    x = torch.stack([torch.cat([(tokens + waves(g1, g1)[:, :D])[o], model.decoder.mask_token[0] + model.decoder.place(waves(g1, g2))])
                     for tokens, o, (g1, g2) in zip(z, own, views)])
    with exact():
        found = model.decoder(z, own, 4, *views.unbind(1), GRID)
    torch.testing.assert_close(found, model.decoder.out(model.decoder.blocks[0](x)[:, 4:]), rtol=0, atol=1e-4)


# ---- who learns (O7, O14) ----

def test_targets_teach_and_never_learn():
    model, batch, own = build(), rows(), complements()
    leaves = {name: torch.randn(B, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(k)).requires_grad_()
              for k, name in enumerate(("first", "second"))}
    terms, _, _ = objective(model, {**batch, **leaves}, own)
    sum(terms.values()).backward()
    assert all(p.grad is None for p in model.average.parameters()) and leaves["second"].grad is None
    assert all(p.grad is not None and p.grad.ne(0).any() for p in model.parameters() if p.requires_grad)
    seen = model.vision.patches(leaves["first"].grad)        # in both mixtures of a pair the same patches of an image are hidden
    assert seen[~own].eq(0).all() and seen[own].ne(0).any(1).all()
    up = own.view(B, 1, GRID, 1, GRID, 1).expand(-1, 3, -1, 4, -1, 4).reshape(B, 3, 16, 16)
    for changed, other in (("intra", dict(first=leaves["first"].where(up, 0.5))), ("inter", dict(second=leaves["second"].flip(3))),
                           ("inter", dict(geometry=batch["geometry"][:, :1].expand(-1, 2, -1)))):        # hidden patches are targets only
        assert {k for k, t in objective(model, {**batch, **leaves, **other}, own)[0].items() if t != terms[k]} == {changed}


def test_the_average_is_copied_frozen_or_in_between():
    for momentum in (0.0, 1.0, 0.3):
        model = build()
        fast, slow = [*model.vision.parameters(), *model.projector.parameters()], list(model.average.parameters())
        want = [momentum * s + (1 - momentum) * f for s, f in zip(slow, fast, strict=True)]
        model.follow(momentum)
        for s, w in zip(slow, want):
            torch.testing.assert_close(s, w, rtol=1e-12, atol=1e-14)


# ---- text and class (O8, O9, O15, O17, O18) ----

def described(model, z, batch, shown, mine, weight=None):
    """Cost of the caption and of the class of image mine[n], told from the tokens shown[n]; row by row, over the rows that have one."""
    texts = [F.normalize(model.text(t[None, v], v[None, v])[0].mean(0), dim=0) for t, v in zip(batch["tokens"], batch["valid"])]
    there, found = batch["has_text"].nonzero()[:, 0].tolist(), {"text": [], "class": []}
    for n, m in enumerate(mine):
        pooled, w = z[n][shown[n]].mean(0), 1.0 if weight is None else weight[n]
        if batch["has_text"][m]:
            scores = torch.stack([F.normalize(model.text_head(pooled), dim=0) @ texts[j] for j in there]) * model.log_scale.exp()
            found["text"].append(-w * scores.log_softmax(0)[there.index(m)])
        if batch["label"][m] >= 0:
            found["class"].append(-w * model.class_head(pooled).log_softmax(0)[batch["label"][m]])
    return {name: sum(x).item() / len(x) for name, x in found.items()}


OTHERS = [i // BLOCK * BLOCK + BLOCK - 1 - i % BLOCK for i in range(B)]


@pytest.mark.parametrize("only", ["text", "class"])
def test_whole_images_cost_one_infonce_or_cross_entropy(only):
    model, batch = build(), rows()
    terms, z, _ = objective(model, batch, WHOLE, only=only, keep=1.0)
    assert torch.equal(z, model.vision(batch["first"])[:, 1:])
    assert numbers(terms) == close({only: described(model, z, batch, WHOLE, range(B))[only]})
    if only == "class":
        assert terms["class"].item() == close(F.cross_entropy(model.class_head(z.mean(1)), batch["label"], ignore_index=-1).item())


def test_text_is_the_image_to_text_half_of_align():
    images, texts = F.normalize(torch.randn(2, B, D, dtype=torch.float64), dim=2)
    half = partial(m3i.text_loss, has_text=torch.ones(B, dtype=torch.bool), mine=torch.arange(B), scale=torch.tensor(5.0, dtype=torch.float64))
    i2t, t2i = half(images, texts), half(texts, images)
    assert (i2t + t2i).item() == close(align.contrastive_loss(images, texts, torch.tensor(0.2, dtype=torch.float64)).item())
    assert i2t.item() == close(F.cross_entropy(5 * images @ texts.T, torch.arange(B)).item())


def test_a_mixture_is_described_once_for_each_image_from_its_own_patches():
    """O18: the terms are a's, as they are without b, and b's."""
    model, batch, own = build(), rows(), halves(keep=0.3)
    terms, z, _ = objective(model, batch, own)
    a, b = described(model, z, batch, own, range(B)), described(model, z, batch, ~own, OTHERS)
    assert {k: terms[k].item() for k in a} == close({k: a[k] + b[k] for k in a})


def test_class_from_all_patches_is_cutmix():
    model, batch, own = build(), rows(label=torch.arange(B) % CLASSES), halves(keep=0.3)
    terms, z, _ = objective(model, batch, own, only="class", pool="all")
    logits, share = model.class_head(z.mean(1)), 4 / 16
    want = share * F.cross_entropy(logits, batch["label"]) + (1 - share) * F.cross_entropy(logits, batch["label"][OTHERS])
    assert numbers(terms) == close({"class": want.item()})
    a, b = (described(model, z, batch, WHOLE, m, [w] * B)["text"] for m, w in ((range(B), share), (OTHERS, 1 - share)))
    assert objective(model, batch, own, only="text", pool="all")[0]["text"].item() == close(a + b)


def test_knowing_nothing_costs_the_logarithm_of_the_candidates():
    model = build()
    for p in (model.text_head[2].weight, *model.class_head[1].parameters()):
        p.data.zero_()
    terms = objective(model, own=WHOLE, keep=1.0)[0]
    assert terms["class"].item() == close(math.log(CLASSES)) and terms["text"].item() > math.log(6)        # constant images, unequal texts
    model.text_head[2].bias.data.zero_()
    assert objective(model, own=WHOLE, keep=1.0)[0]["text"].item() == close(math.log(6))         # two of eight rows have no text


def test_cross_entropy_is_a_bound_on_information():
    """O16: H(y) - loss = I(x; y) at the true conditional, less for anything else. Rows enumerate a joint distribution."""
    count = torch.tensor([[4, 1, 0], [1, 2, 3]])
    p = count.double() / count.sum()
    known = (p * (p / (p.sum(1, keepdim=True) * p.sum(0))).log().nan_to_num()).sum()
    x, y = (torch.arange(6).repeat_interleave(count.flatten()) // 3, torch.arange(6).repeat_interleave(count.flatten()) % 3)
    bound = lambda table: -(p.sum(0) * p.sum(0).log()).sum() - m3i.softmax_loss(table[x], y)
    assert bound((p / p.sum(1, keepdim=True)).clamp(min=1e-30).log()).item() == close(known.item())
    assert all(bound(torch.randn(2, 3, dtype=torch.float64)) < known for _ in range(50))


@pytest.mark.parametrize("term,without", [("text", dict(has_text=torch.zeros(B, dtype=torch.bool))), ("class", dict(label=torch.full((B,), -1)))])
def test_a_batch_without_targets_is_a_batch_without_their_term(term, without):
    model, batch = build(), rows(**without)
    (ours, *_), (theirs, *_) = objective(model, batch), objective(model, batch, **{f"w_{term}": 0.0})
    assert ours[term].item() == 0 and numbers(ours) == {**numbers(theirs), term: 0}
    grads = gradients(model, sum(ours.values()))
    assert all(g is None or g.isfinite().all() for g in grads.values())
    same_gradients(grads, gradients(model, sum(theirs.values())), rtol=0, atol=0)


def test_each_term_alone_is_what_it_is_beside_the_others():
    model = build()
    joint = numbers(objective(model)[0])
    assert list(joint) == list(TERMS)
    for term in TERMS:
        assert numbers(objective(model, only=term)[0]) == {term: joint[term]}


def test_a_plain_step_has_no_image_terms_and_no_partner():
    model, batch = build(), rows()
    (terms, z, gauges), half = objective(model, batch, WHOLE), {k: v.clone() for k, v in batch.items()}
    assert numbers(terms) == close(described(model, z, batch, WHOLE, range(B))) and not gauges
    half["label"][4:], half["has_text"][4:] = -1, False      # rows of one block are nothing to those of another
    assert objective(model, half, WHOLE)[0]["class"].item() == close(F.cross_entropy(model.class_head(z[:4].mean(1)), batch["label"][:4],
                                                                                     ignore_index=-1).item())


def test_what_is_evaluated_is_the_mean_token_of_a_whole_image_and_a_caption_without_padding():
    model, batch = build(), rows()
    want = F.normalize(model.text_head(model.vision(batch["first"])[:, 1:].mean(1)), dim=1)
    torch.testing.assert_close(model.encode_image(batch["first"]), want, rtol=1e-12, atol=1e-14)
    texts = model.encode_text(batch["tokens"], batch["valid"])
    assert torch.equal(model.encode_text(batch["tokens"].where(batch["valid"], 7), batch["valid"]), texts)
    torch.testing.assert_close(model.encode_text(batch["tokens"][:3, :6], batch["valid"][:3, :6]), texts[:3], rtol=1e-12, atol=1e-14)


# ---- images (O10 .. O12) ----

def test_intra_alone_on_pixels_is_mae():
    model, batch, own, seen = build(target="pixels"), rows(), halves(keep=0.3), []
    model.decoder.register_forward_hook(lambda module, args, out: seen.append(out))
    terms, _, _ = objective(model, batch, own, only="intra", moment=0.0)
    mean, std = (torch.tensor(v).double() for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    costs = []
    for image, hidden, pred in zip(batch["first"].double() / 255, ~own, seen[0]):
        for k in hidden.nonzero()[:, 0].tolist():
            r, c = k // GRID * 4, k % GRID * 4
            patch = ((image[:, r:r + 4, c:c + 4] - mean[:, None, None]) / std[:, None, None]).flatten()
            costs.append((pred[k] - (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()).square().mean().item())
    assert numbers(terms) == {"intra": pytest.approx(np.mean(costs), rel=1e-6)}                  # ViT's means are stored in float32


def test_inter_with_the_same_view_as_target_is_intra(monkeypatch):
    model, batch, own, seen = build(), rows(), complements(), []
    batch["second"], batch["geometry"] = batch["first"], batch["geometry"][:, :1].expand(-1, 2, -1)
    plain = m3i.image_loss
    monkeypatch.setattr(m3i, "image_loss", lambda *args: (seen.append(args), plain(*args))[1])
    terms, _, _ = objective(model, batch, own)
    (intra, target, scored, moment), (inter, other, everywhere, _) = seen
    for ours, theirs in ((inter, intra[OTHERS]), (other, target[OTHERS])):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.equal(scored, ~own) and everywhere.all()
    assert plain(inter, other, scored[OTHERS], moment).item() == close(terms["intra"].item())
    assert target.mean(2).abs().max() < 1e-12 and (target.std(2, correction=0) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("dim,weight", [(16, 0.3), (768, 0.02)])
def test_the_image_loss_runs_from_its_anchors_to_one(dim, weight):
    one = torch.ones(2, dim // 2, dtype=torch.bool)
    spread = math.sqrt(dim) * torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0].view(2, dim // 2, dim)
    same = F.layer_norm(torch.randn(dim, dtype=torch.float64), [dim], eps=0).expand(2, dim // 2, dim)
    for target, best, lowest in ((spread, spread / (1 + weight), weight / (1 + weight)),
                                 (same, same / (1 + weight * dim), weight * dim / (1 + weight * dim))):
        assert m3i.image_loss(torch.zeros_like(target), target, one, weight).item() == close(1.0)
        assert m3i.image_loss(best, target, one, weight).item() == close(lowest)
        assert m3i.image_loss(best + 0.01 * torch.randn_like(best), target, one, weight) > lowest
    assert dim < 768 or lowest == pytest.approx(0.939, abs=5e-4)


def test_the_image_loss_and_its_gradient_are_those_of_the_formula():
    target, scored = F.layer_norm(torch.randn(B, L, D, dtype=torch.float64), [D]), halves(keep=0.3)
    pred = torch.randn_like(target).requires_grad_()
    loss = m3i.image_loss(pred, target, scored, 0.3)
    loss.backward()
    t, p, n = target[scored], pred.detach()[scored], 4 * B
    C = sum(torch.outer(x, x) for x in t) / n
    assert loss.item() == close((((p - t) ** 2).sum() + 0.3 * (p @ C @ p.T).diag().sum()).item() / (n * D))
    torch.testing.assert_close(pred.grad[scored], 2 / (D * n) * (p - t + 0.3 * p @ C), rtol=1e-11, atol=1e-14)
    assert pred.grad[~scored].eq(0).all()
    best, c = torch.zeros_like(target), torch.linalg.eigvalsh(C)
    best[scored] = t @ torch.linalg.inv(torch.eye(D, dtype=torch.float64) + 0.3 * C)
    assert m3i.image_loss(best, target, scored, 0.3).item() == close((0.3 * c ** 2 / (1 + 0.3 * c)).sum().item() / D)


# ---- all of it: recomputing, balance, order, ranks (O13) ----

@pytest.mark.parametrize("build_with,use", [({}, dict(micro=2)), (dict(grad_checkpoint=True), {})])
def test_recomputing_changes_no_gradient(build_with, use):
    model, plain, calls = build(**build_with), build(), []
    for k, block in enumerate((model.vision.blocks[0], model.text.blocks[0])):
        block.register_forward_pre_hook(lambda module, args, k=k: calls.append((k, len(args[0]))))
    same_gradients(gradients(model, sum(objective(model, **use)[0].values())), gradients(plain, sum(objective(plain)[0].values())))
    assert set(calls) == {(k, use.get("micro", B)) for k in (0, 1)} and [sum(k == j for j, _ in calls) for k in (0, 1)] == [16 // calls[0][1]] * 2


@exact()
def test_balanced_terms_pull_equally_hard():
    model, ones = build(), dict.fromkeys(TERMS, 1.0)
    terms, z, _ = objective(model)
    weights = m3i.balanced(model, terms, z, 0, {**ones, "text": 3.0})
    pulls = {k: torch.autograd.grad(w * terms[k], z, retain_graph=True)[0].norm().item() for k, w in weights.items()}
    want = pulls["intra"]
    assert weights["intra"] == 1 and pulls == pytest.approx({"intra": want, "inter": want, "text": 3 * want, "class": want}, rel=1e-6)
    before = model.pull.clone()
    assert m3i.balanced(model, {k: 9 * t for k, t in terms.items()}, z, 99, ones)["text"].item() == close(weights["text"].item() / 3)
    assert torch.equal(model.pull, before)                   # measured every hundredth step only
    m3i.balanced(model, {k: 3 * t for k, t in terms.items()}, z, 100, ones)
    torch.testing.assert_close(model.pull, 2 * before)       # half old, half new
    assert "pull" in model.state_dict()


def test_the_order_of_pairs_does_not_matter():
    model, batch, own = build(), rows(), halves()
    for order in (torch.arange(B).flip(0), torch.tensor([5, 4, 7, 6, 1, 0, 3, 2])):              # blocks swapped, partners kept
        assert numbers(objective(model, {k: v[order] for k, v in batch.items()}, own[order])[0]) == close(numbers(objective(model, batch, own)[0]))
    assert objective(model, {k: v[[1, 0, 2, 3, 4, 5, 6, 7]] for k, v in batch.items()}, own)[0]["inter"] != objective(model, batch, own)[0]["inter"]


EARLY = torch.arange(16) < 8
LACKING = {"nothing": {}, "text or label on half of the rows": dict(has_text=~EARLY, label=(torch.arange(16) % CLASSES).where(EARLY, -1)),
           "any text": dict(has_text=torch.zeros(16, dtype=torch.bool)), "any label": dict(label=torch.full((16,), -1))}


def on_this_rank(lacking, changes):
    """Terms as logged, averaged gradients, and the weights of --balance grad, of this rank's rows of 16."""
    mine = lambda x: x.chunk(common.world())[common.rank()]
    model, batch = build(**changes), {k: mine(v) for k, v in rows(16, **LACKING[lacking]).items()}
    terms, z, gauges = objective(model, batch, mine(halves(16)), **changes)
    with exact():
        weights = m3i.balanced(model, terms, z, 0, dict.fromkeys(TERMS, 1.0)) if lacking == "nothing" else {}
    sum(terms.values()).backward()
    common.average_gradients(model.parameters())
    logged = {k: common.all_gather(t.detach()[None]).mean().item() for k, t in {**terms, **gauges, **weights}.items()}
    return logged, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("lacking,changes", [(k, {}) for k in LACKING] + [("nothing", dict(pool="all", target="pixels", micro=2))])
def test_ranks_are_one_process_also_where_some_lack_targets(pools, world, lacking, changes):
    logged, grads = on_this_rank(lacking, changes)
    assert max(g.abs().max() for g in grads.values() if g is not None) > 1e-3
    for theirs, theirs_grads in pools(world)(on_this_rank, lacking, changes):
        assert theirs == pytest.approx(logged, rel=1e-9, abs=1e-12)
        same_gradients(theirs_grads, grads)


def normalised(plain=False):
    """Output and input gradient of batch normalisation of this rank's rows."""
    g = torch.Generator().manual_seed(0)
    x, coefficient, gain, shift = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((8, 5, 6), (8, 5, 6), (6,), (6,)))
    x, coefficient = (part.chunk(common.world())[common.rank()] for part in (3 * x + 1, coefficient))
    norm, x = (torch.nn.BatchNorm1d(6) if plain else m3i.BatchNorm(6)).double(), x.clone().requires_grad_()
    norm.weight.data, norm.bias.data = gain, shift
    out = norm(x.flatten(0, 1)).view_as(x) if plain else norm(x)
    (out * coefficient).sum().backward()
    return out.detach(), x.grad, norm.weight.grad, norm.bias.grad


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batch_normalisation_of_all_ranks_is_that_of_torch(pools, world):
    (out, grad, *parameters), found = normalised(True), [normalised()] if world == 1 else pools(world)(normalised)
    for want, theirs in zip((out, grad, *parameters), zip(*found)):
        theirs = torch.cat(theirs) if want.ndim == 3 else sum(theirs)
        torch.testing.assert_close(theirs, want, rtol=1e-9, atol=1e-12)


def test_eight_rows_are_learned_by_heart():
    torch.manual_seed(0)
    cfg = config(dim=32, text_dim=32, classes=CLASSES, moment=0.0)
    model, batch, own = m3i.M3I(cfg), rows(label=torch.arange(B) % CLASSES), halves()
    opt, low, step = common.adamw(model, cfg, (0.9, 0.95)), False, 0
    opt.param_groups[0]["lr"] = opt.param_groups[1]["lr"] = 3e-3
    while not low and step < 600:
        model.follow(0.99)
        terms, _, _ = m3i.losses(model, batch, own, int(own[0].sum()), cfg, *model.encoders())
        opt.zero_grad()
        sum(terms.values()).backward()
        opt.step()
        low, step = all(t < (0.05 if name in ("text", "class") else 0.2) for name, t in terms.items()), step + 1
    assert low, numbers(terms)


@pytest.mark.parametrize("changes,told", [
    (dict(only="class", classes=0), "class needs --labels"), (dict(only="text", data=None), "text needs --data"),
    (dict(block=3), "--block 3 must be even"), (dict(block=6), "divide the 16 rows"), (dict(keep=0.0), "--keep 0.0"), (dict(keep=1.1), "--keep 1.1"),
    (dict(p_plain=-0.1), "--p-plain -0.1"), (dict(only="texts"), "--only texts: choose intra, inter, text, class"),
    (dict(pool="half"), "--pool half"), (dict(target="pixel"), "--target pixel: choose ema, pixels"), (dict(balance="loss"), "--balance loss"),
    (dict(unit=3), "--unit 3.*try 1"),
    (dict(only="intra", keep=1.0), "nothing to learn"), (dict(only="inter", p_plain=0.5), "nothing to learn"),
    (dict.fromkeys([f"w_{t}" for t in TERMS], 0.0), "nothing to learn"), (dict(only="text", w_text=0.0), "nothing to learn")])
def test_what_cannot_be_trained_is_refused_with_its_value(changes, told):
    with pytest.raises(UserError, match=told):
        common.check_rows(known(**changes))
        m3i.check(known(**changes))
        m3i.M3I(known(**changes))


# ---- whole runs ----

run, first_step, refused = (partial(ask, m3i.main) for ask in (conftest.run, conftest.first_step, conftest.refused))


@pytest.fixture
def paths(tiny_world):
    return dict(data=[f"{tiny_world}/pairs"], labels=[f"{tiny_world}/labels"])


@pytest.fixture(scope="module")
def whole(tiny_world, tmp_path_factory):
    """Twenty steps in one process on captions and classes: what they logged and saved, and the encoder and its average at every use as target."""
    cfg = config(data=[f"{tiny_world}/pairs"], labels=[f"{tiny_world}/labels"], w_inter=0.5, w_text=2.0,
                 out=str(tmp_path_factory.mktemp("m3i") / "run"))
    weights, targets = [], m3i.M3I.targets
    flat = lambda *modules: torch.cat([p.detach().flatten() for m in modules for p in m.parameters()])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(m3i.M3I, "targets",
                  lambda model, *args: (weights.append((flat(model.vision, model.projector), flat(model.average))), targets(model, *args))[1])
        return cfg, *run(cfg)[:2], weights


def test_the_logged_loss_is_the_weighted_sum_of_all_terms(whole):
    _, log, _, _ = whole
    for r in log:
        assert r["loss"] == pytest.approx(r["intra"] + 0.5 * r["inter"] + 2 * r["text"] + r["class"], rel=1e-5) and 0 < r["target_std"] < 1
    assert log[-1]["loss"] < log[0]["loss"] - 1


def test_the_average_follows_ever_more_slowly_and_before_it_is_used(whole):
    cfg, _, saved, weights = whole
    weights, before = weights[::2], weights[0][0]            # two uses a step, of the same weights
    assert torch.equal(weights[0][1], before) and len(weights) == 20
    for step, (fast, slow) in enumerate(weights):
        momentum = 1 - 0.1 * math.cos(math.pi * step / 40) ** 2
        torch.testing.assert_close(slow, momentum * before + (1 - momentum) * fast, rtol=1e-5, atol=1e-7)
        before = slow
    assert momentum > 0.999 and torch.equal(torch.cat([v.flatten() for k, v in saved["model"].items() if k.startswith("average.")]), before)


def test_stopped_and_resumed_is_bitwise_the_run_without_a_stop(whole, monkeypatch):
    cfg, log, saved, _ = whole
    conftest.resumes_bitwise(m3i.main, cfg, log, saved, ("loss", *TERMS, "target_std", "lr", "grad_norm", "temperature"), monkeypatch)


@pytest.mark.parametrize("world", [2, 4])
def test_runs_on_any_number_of_ranks_are_one_run(whole, pools, world):
    cfg, log, _, _ = whole
    alone = first_step(cfg)
    for theirs in pools(world)(first_step, cfg):
        assert far(theirs, alone) < 1e-5
    theirs, _, _ = pools(world)(run, replace(cfg, out=f"{cfg.out}-{world}"))[0]
    for a, b in zip(log, theirs, strict=True):
        assert [b[k] for k in ("loss", *TERMS)] == pytest.approx([a[k] for k in ("loss", *TERMS)], rel=1e-4)


def test_a_block_that_spans_ranks_is_refused(paths, tmp_path, pools):
    for told in pools(4)(refused, config(block=8, out=str(tmp_path / "run"), **paths)):
        assert "divide the 4 rows of a rank" in told


CASES = re.findall(r"^    (\S.*?) {2,}(--.*?)(?: {2,}\(.*)?$", m3i.__doc__, re.M)


@pytest.mark.parametrize("flags", [flags for _, flags in CASES])
def test_each_method_of_the_table_runs_on_its_flags_and_learns_its_term_alone(paths, tmp_path, flags):
    given = common.parse(m3i.Config, {}, "", flags.split())
    changes = {f.name: getattr(given, f.name) for f in fields(given) if getattr(given, f.name) != f.default}
    changes.update({name: paths[name] for name in ("data", "labels") if changes.get(name)})
    assert len(CASES) == 5 and len(changes) == flags.count("--")
    log, _, _ = run(config(steps=2, warmup=0, out=str(tmp_path / "run"), **changes))
    assert len(log) == 2 and all(r.keys() & {*TERMS} == {given.only} and r["loss"] == r[given.only] > 0 and r["grad_norm"] > 0 for r in log)


def test_plain_steps_come_at_their_share_and_learn_captions_and_classes_only(paths, tmp_path):
    log, _, _ = run(config(steps=12, p_plain=0.5, balance="grad", out=str(tmp_path / "run"), **paths))
    kinds = [tuple(t for t in TERMS if t in r) for r in log]
    assert set(kinds) == {TERMS, ("text", "class")} and 2 <= kinds.count(TERMS) <= 10


def test_classes_alone_are_trained_evaluated_and_drawn(tmp_path):
    """Without any caption: prompts are encoded with a vocabulary of class names."""
    for name, stream in (("train/train-00000", "labels/train"), ("val/test-00000", "labels/test")):
        os.makedirs(os.path.dirname(tmp_path / name))
        data.write_shard(str(tmp_path / f"{name}.tar"), stream, range(64))
        (tmp_path / f"{name.split('/')[0]}/classes.txt").write_text("\n".join(map(" ".join, data.PAIRS)))
    log, saved, result = run(config(labels=[str(tmp_path / "train")], val=[str(tmp_path / "val")], steps=2, eval_every=0, only="class",
                                    out=str(tmp_path / "run")))
    assert log[0]["class"] == pytest.approx(2 * math.log(64), abs=1) and "text" not in log[0] and 0 <= result["zeroshot"] <= 1
    assert len(data.Tokenizer.loads(saved["vocab"]).encode("purple star")) <= 4  # eleven letters
    assert {"curves.png", "views.png", "neighbours.png"} <= set(os.listdir(tmp_path / "run"))


# ---- memory ----

STEP = """
import resource, torch, common, m3i
from functools import partial
def step(cfg, model, opt):
    B, S, L = cfg.batch, cfg.image_size, model.grid ** 2
    images, tokens = torch.zeros(B, 3, S, S, dtype=torch.uint8), torch.zeros(B, cfg.context, dtype=torch.long)
    batch = dict(first=images, second=images.clone(), geometry=torch.ones(B, 2, 6), tokens=tokens, valid=tokens == 0,
                 has_text=torch.ones(B, dtype=torch.bool), label=tokens[:, 0])
    own = m3i.masks(torch.rand(B, L), model.grid, 1, 0.5)
    sum(m3i.losses(model, batch, own, L // 2, cfg, *model.encoders())[0].values()).backward()
    opt.step()
    opt.zero_grad()
def run(**changes):
    cfg = m3i.Config(**{**dict(data=["-"], classes=10, image_size=64, patch=8, unit=1, block=8, dim=192, depth=4, heads=3, projector_depth=1,
                               decoder_depth=1, text_dim=64, text_depth=1, text_heads=1, context=16, vocab_size=1000, batch=96), **changes})
    model = m3i.M3I(cfg)
    opt = common.adamw(model, cfg, (0.9, 0.95))
    for _ in range(2):
        step(cfg, model, opt)
    return cfg
run(batch=8, dim=12, depth=1)                                # code and libraries are loaded before the start is taken
start = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
cfg = run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start, m3i.memory(cfg, torch.device("cpu"))["total"])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_a_dry_run_tells_the_memory_that_a_step_takes():
    """With small blocks given back at once: else glibc keeps up to a quarter more than lives."""
    made = subprocess.run([sys.executable, "-c", STEP], env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": ROOT},
                          capture_output=True, text=True)
    measured, told = map(int, made.stdout.split())
    assert told == pytest.approx(measured, rel=0.15)


def test_a_billion_parameters_are_counted_without_being_made(capsys):
    cfg = m3i.Config(image_size=224, patch=14, dim=1536, depth=36, heads=24, batch=64, dry_run=True)
    with torch.device("meta"):
        assert sum(p.numel() for p in m3i.M3I(cfg).vision.parameters()) == pytest.approx(1.02e9, rel=0.01)
    assert m3i.main(cfg) == {}
    sizes = {line[:34].strip(): float(line[34:].split()[0]) for line in capsys.readouterr().out.splitlines()}
    assert sizes["total"] == pytest.approx(sum(v for k, v in sizes.items() if k != "total"), abs=0.01)
    assert sizes["optimizer"] == pytest.approx(2 * sizes["gradients"], abs=0.01)
    small = replace(cfg, data=["-"], classes=1000, dim=192, depth=12, heads=3, projector_depth=1, decoder_depth=1, batch=128)
    sizes = [m3i.memory(c, torch.device("cpu"))["total"] for c in (small, replace(small, grad_checkpoint=True, micro=64))]
    assert sizes[1] < 0.6 * sizes[0]
