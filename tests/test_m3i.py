"""M3I: geometry of views, mixtures, the four terms and the EMA against the oracles of its spec."""
import io
import math
import os
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

import align
import common
import data
import m3i
from conftest import (
    TINY, TINY_OF, assert_same_gradients, gradients, refused, run, tiny_config)
from m3i import M3I, Config, feature_loss, labeled_cross_entropy, text_loss

pytestmark = pytest.mark.usefixtures("one_thread")

TERMS = ("intra", "inter", "text", "class")
GRID = 4
L = 16  # patches of 4 x 4 pixels
D = 16
B = 8
GROUP = 4
CLASSES = 5
PARTNERS = [3, 2, 1, 0, 7, 6, 5, 4]


def config(**changes):
    """A Config as main has it once it knows that there are captions and classes."""
    sizes = dict(patch=4, depth=1, context=12, second_moment_weight=0.3, data=["-"], labels=["-"])
    return Config(**{**TINY, **TINY_OF["m3i"], **sizes, "classes": CLASSES, **changes})


def only(term, **changes):
    """Settings that leave one term."""
    return {**{f"w_{name}": 0.0 for name in TERMS if name != term}, **changes}


def build(**changes):
    """In float64, with no parameter at 0 and an EMA apart from its encoder: both hide mistakes."""
    torch.manual_seed(0)
    model = M3I(config(**changes)).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def geometries(n, seed=0):
    """(n, 6): views of 40 to 100 pixels a side in an image 100 + n wide, flipped or not."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        height, width = rng.integers(40, 101, 2)
        top = rng.integers(101 - height)
        left = rng.integers(101 - width)
        rows.append([top, left, height, width, rng.integers(2), 100 + n])
    return torch.tensor(rows, dtype=torch.float32)


def make_batch(n=B):
    """Every fourth row lacks its caption, every fourth its class."""
    g = torch.Generator().manual_seed(0)
    i = torch.arange(n)
    first, second = torch.randint(0, 256, (2, n, 3, 16, 16), generator=g, dtype=torch.uint8)
    return {
        "first": first,
        "second": second,
        "geometry": torch.stack([geometries(n), geometries(n, 1)], 1),
        "tokens": torch.randint(8, 300, (n, 12), generator=g),
        "valid": torch.arange(12) < 4 + i[:, None] % 6,
        "has_text": i % 4 != 1,
        "label": (i * 3 % CLASSES).where(i % 4 != 2, -1),
    }


def make_mask(model, n=B):
    noise = torch.rand(n, model.n_units, generator=torch.Generator().manual_seed(1))
    return m3i.random_mask(noise, 1, model.units_of_a)


def objective(model, batch=None, mask=None, encode=None, **changes):
    """-> terms and metrics as main gets them."""
    batch = make_batch() if batch is None else batch
    mask = make_mask(model, len(batch["label"])) if mask is None else mask
    encode = model.vision.patch_tokens if encode is None else encode
    encode_ema = model.ema_encoder.patch_tokens if model.has_ema else None
    return m3i.losses(model, batch, mask, config(**changes), encode, encode_ema)


def values(terms):
    return {name: term.item() for name, term in terms.items()}


def close(value, rel=1e-10):
    return pytest.approx(value, rel=rel, abs=1e-12)


# ---- where views lie ----

def by_brute_force(source, target):
    """(L, 4): centers of the target's patches, through the image as it was before flipping, into
    the source's patches; log ratios of the sides."""
    source_top, source_left, source_height, source_width, source_flip, full_width = source.tolist()
    target_top, target_left, target_height, target_width, target_flip, _ = target.tolist()
    rows = []
    for i in range(L):
        y = target_top + (i // GRID + 0.5) * target_height / GRID
        x = target_left + (i % GRID + 0.5) * target_width / GRID
        if target_flip:
            x = full_width - x
        if source_flip:
            x = full_width - x
        rows.append([(y - source_top) * GRID / source_height - 0.5,
                     (x - source_left) * GRID / source_width - 0.5,
                     10 * math.log(target_height / source_height),
                     10 * math.log(target_width / source_width)])
    return torch.tensor(rows, dtype=torch.float64)


def waves(source, target):
    """(L, 2 D): the published sines and cosines of these numbers."""
    angle = by_brute_force(source, target)[..., None] * 10000.0 ** -(torch.arange(4.0) / 4).double()
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


def coordinates(source, target):
    return m3i.relative_coordinates(source[None], target[None], GRID)[0]  # (L, 4)


def view_pairs(n=60):
    return list(zip(geometries(n), geometries(n, 1)))


def test_relative_positions_are_those_of_brute_force_geometry():
    flips = set()
    for source, target in view_pairs():
        found = coordinates(source, target)
        torch.testing.assert_close(found, by_brute_force(source, target), rtol=0, atol=1e-11)
        position = m3i.relative_position(source[None], target[None], GRID, D)[0]
        assert (position - waves(source, target)).abs().max() < 1e-5
        flips.add((source[4].item(), target[4].item()))
    assert len(flips) == 4


def test_a_view_seen_from_itself_is_the_plain_grid():
    position = m3i.relative_position(geometries(3), geometries(3), GRID, D)
    column, row = common.sincos_positions(GRID, D).chunk(2, 1)  # MAE's order
    plain = torch.cat([row, column], 1).expand(3, -1, -1)
    torch.testing.assert_close(position[..., :D], plain, rtol=0, atol=1e-6)
    same_size = torch.tensor([0.0] * 4 + [1.0] * 4).repeat(2)  # sin 0, cos 0, for both sides
    assert torch.equal(position[..., D:], same_size.expand(3, L, -1))
    torch.testing.assert_close(build().decoder.source_pos.float(), plain[0], rtol=0, atol=1e-6)


def test_a_view_lies_where_its_geometry_says_also_with_colors():
    """On an image whose red is the column and whose green is the row."""
    y, x = np.mgrid[:180, :240]
    image = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))
    cfg = config(image_size=32, scale=0.2, color=False, flip=True)
    flips = 0
    for seed in range(12):
        view, geometry = m3i.random_view(image, np.random.default_rng(seed), cfg)
        top, left, height, width, flip, full_width = geometry
        center = (np.arange(32) + 0.5) / 32
        row = top + center * height - 0.5
        column = left + center * width
        column = (full_width - column if flip else column) - 0.5
        inner = slice(2, -2)  # at the border bicubic weights are cut off
        assert np.abs(view[0] - column)[:, inner].max() < 1
        assert np.abs(view[1] - row[:, None])[inner].max() < 1

        box = m3i.view_box(geometry, "")
        crop = data.crop(image, [int(box[name]) for name in "xywh"], 32)
        assert np.array_equal(crop[:, :, ::-1] if flip else crop, view)
        colorful = replace(cfg, color=True)
        for second in (False, True):
            other, same = m3i.random_view(image, np.random.default_rng(seed), colorful, second)
            assert np.array_equal(same, geometry) and other.shape == view.shape
        flips += flip
    assert 0 < flips < 12
    assert m3i.random_view(image, np.random.default_rng(0), replace(cfg, flip=False))[1][4] == 0


def test_the_box_in_views_png_is_where_the_target_lies():
    for source, target in view_pairs():
        source_top, source_left, source_height, source_width, source_flip, full_width = source
        target_left = target[1]
        if source_flip != target[4]:
            target_left = full_width - target[1] - target[3]
        box = m3i.box_in_source(source.numpy(), target.numpy(), GRID, 25)  # sides of 100 pixels
        expected = [(target_left - source_left) / source_width, (target[0] - source_top) /
                    source_height, target[3] / source_width, target[2] / source_height]
        assert [box[name] for name in "xywh"] == close([100 * float(x) for x in expected], 1e-5)


# ---- colors ----

def test_colors_are_siameseims_after_the_crop(monkeypatch):
    """How often, how strong, in which order: recorded over 1,000 first and 1,000 second views."""
    calls = []

    def record(module, name):
        plain = getattr(module, name)

        def recorded(*args):
            calls.append((name, args))
            return plain(*args)

        monkeypatch.setattr(module, name, recorded)

    for name in ("Brightness", "Contrast", "Color"):
        record(ImageEnhance, name)
    for name in ("grayscale", "solarize"):
        record(ImageOps, name)
    record(ImageFilter, "GaussianBlur")
    record(m3i, "shift_hue")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    cfg = config(image_size=8, color=True)
    rng = np.random.default_rng(0)
    orders = set()
    for second, blur_share, solarize_share in ((False, 1.0, 0.0), (True, 0.1, 0.2)):
        counts = dict.fromkeys(("Brightness", "grayscale", "GaussianBlur", "solarize"), 0)
        for _ in range(1000):
            calls.clear()
            m3i.random_view(image, rng, cfg, second)
            names = [name for name, _ in calls]
            for name in counts:
                counts[name] += name in names
            if "Brightness" in names:
                orders.add(tuple(names[:4]))
            for name, args in calls:
                if name == "GaussianBlur":
                    assert 0.1 <= args[0] * 224 / 8 <= 2.0
                else:
                    assert args[0].size == (8, 8)  # a view, not the image
        expected = (0.8, 0.2, blur_share, solarize_share)
        assert [n / 1000 for n in counts.values()] == pytest.approx(expected, abs=0.05)
    assert len(orders) == 24 and {len(set(order)) for order in orders} == {4}


def test_a_third_of_the_color_circle_turns_red_into_green():
    red = Image.new("RGB", (2, 2), (250, 0, 0))
    assert m3i.shift_hue(red, 0.0).getpixel((0, 0)) == (250, 0, 0)
    assert np.abs(np.array(m3i.shift_hue(red, 1 / 3).getpixel((0, 0))) - (0, 250, 0)).max() < 9
    assert np.abs(np.array(m3i.shift_hue(red, -1 / 3).getpixel((0, 0))) - (0, 0, 250)).max() < 9


# ---- rows, masks, mixtures ----

def test_a_row_may_have_a_caption_a_class_both_or_with_image_terms_neither():
    raw = io.BytesIO()
    Image.new("RGB", (30, 20)).save(raw, "JPEG")

    def row(cfg=config(), **members):
        sample = data.Sample("key", {"jpg": raw.getvalue(), **members})
        return m3i.example(sample, np.random.default_rng(0), cfg, data.Tokenizer())

    found = [row(txt=b"red"), row(cls=b"3"), row(txt=b"red", cls=b"3"),
             row(json=b'{"caption": ["red"]}', cls=b"5"), row(cls=b"5"), row(json=b"{}")]
    kinds = [(bool(r["has_text"]), int(r["label"])) for r in found]
    assert kinds == [(True, -1), (False, 3), (True, 3), (True, -1), (False, -1), (False, -1)]
    assert np.array_equal(found[0]["tokens"], found[3]["tokens"])
    assert found[1]["valid"].any()  # a mean over no token would not be finite
    for members in ({"cls": b"5"}, {"json": b"{}"}):
        for term in ("intra", "inter"):
            assert row(config(**only(term)), **members)["label"] == -1
        with pytest.raises(data.Skip, match="no caption"):
            row(config(w_intra=0.0, w_inter=0.0), **members)
        with pytest.raises(data.Skip, match="no class"):
            row(config(**only("class")), **members)


@pytest.mark.parametrize("unit, keep, count", [
    (1, 0.5, 98), (2, 0.5, 96), (2, 0.3, 56), (2, 1.0, 196)])
def test_a_mask_has_equally_many_patches_in_each_row_in_whole_units(unit, keep, count):
    model = M3I(config(image_size=56, mask_unit=unit, keep=keep))
    assert (model.n_a, model.n_b) == (count, 196 - count)
    noise = torch.rand(500, model.n_units, generator=torch.Generator().manual_seed(0))
    mask = m3i.random_mask(noise, unit, model.units_of_a)
    assert mask.sum(1).eq(count).all()
    units = mask.view(500, 14 // unit, unit, 14 // unit, unit).float().mean((2, 4))
    assert ((units == 0) | (units == 1)).all()
    assert (units.mean(0) - count / 196).abs().max() < 0.12  # anywhere: five standard deviations
    assert keep == 1 or len(mask.unique(dim=0)) == 500


def test_a_share_of_whole_units_is_not_rounded_down():
    assert int(1 / 49 * 49) == 0
    assert M3I(config(image_size=56, mask_unit=2, keep=1 / 49)).n_a == 4


def test_every_patch_of_a_mixture_is_that_of_one_image_to_the_bit():
    model = build(keep=0.3)
    batch = make_batch()
    mask = make_mask(model)
    inputs = []

    def encode(images):
        inputs.append(images)
        return model.vision.patch_tokens(images)

    def patches(images):
        return images.view(B, 3, GRID, 4, GRID, 4).permute(0, 2, 4, 1, 3, 5).reshape(B, L, 48)

    objective(model, batch, mask, encode, keep=0.3)
    a = patches(batch["first"])
    assert len(inputs) == 1 and mask.sum(1).eq(4).all()
    assert torch.equal(patches(inputs[0]), torch.where(mask[..., None], a, a[PARTNERS]))


# ---- what a prediction depends on ----

def test_a_prediction_does_not_change_with_the_tokens_of_the_other_image():
    """Neither do the batch statistics of projector and decoder, nor the pooled token."""
    model = build(keep=0.3)
    mask = make_mask(model)
    input_view, other_view = make_batch()["geometry"].unbind(1)
    tokens = torch.randn(B, L, D, dtype=torch.float64)

    def outputs(tokens):
        a = model.predict(tokens, mask, 4, input_view, other_view)
        b = model.predict(tokens, ~mask, 12, input_view, other_view)
        return a, b, m3i.masked_mean(tokens, mask), m3i.masked_mean(tokens, ~mask)

    plain = outputs(tokens)
    other_b = [torch.equal(x, y) for x, y in
               zip(plain, outputs(tokens.where(mask[..., None], 9.0)))]
    other_a = [torch.equal(x, y) for x, y in
               zip(plain, outputs(tokens.where(~mask[..., None], 9.0)))]
    assert other_b == [True, False, True, False] and other_a == [False, True, False, True]
    means = torch.stack([x[visible].mean(0) for x, visible in zip(tokens, mask)])
    torch.testing.assert_close(plain[2], means, rtol=1e-12, atol=1e-14)


def test_the_decoder_knows_where_its_tokens_and_its_targets_lie():
    model = build(keep=0.3)
    mask = make_mask(model)
    views = make_batch()["geometry"]
    tokens = torch.randn(B, L, D, dtype=torch.float64)
    projected = model.projector(torch.stack([x[visible] for x, visible in zip(tokens, mask)]))
    rows = []
    for x, visible, (source, target) in zip(projected, mask, views):
        mask_tokens = model.decoder.mask_token[0] + model.decoder.pos_proj(waves(source, target))
        rows.append(torch.cat([x + waves(source, source)[visible, :D], mask_tokens]))
    expected = model.decoder.out(model.decoder.blocks[0](torch.stack(rows))[:, 4:])
    found = model.predict(tokens, mask, 4, *views.unbind(1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def complementary_mask(model):
    """Both mixtures of a pair hide the same patches of each of the two images."""
    mask = make_mask(model)
    in_first_half = (torch.arange(B) % GROUP < GROUP // 2)[:, None]
    return mask.where(in_first_half, ~mask[PARTNERS])


def test_targets_get_no_gradient_and_hidden_patches_are_targets_only():
    model = build()
    mask = complementary_mask(model)
    batch = make_batch()
    for name in ("first", "second"):
        batch[name] = torch.randn(B, 3, 16, 16, dtype=torch.float64).requires_grad_()
    terms, _ = objective(model, batch, mask)
    sum(terms.values()).backward()
    for name, p in model.named_parameters():
        if name.startswith("ema_"):
            assert p.grad is None
        else:
            assert p.grad.ne(0).any(), name
    assert batch["second"].grad is None
    grad = model.vision.patchify(batch["first"].grad)  # (B, L, 48)
    assert grad[~mask].eq(0).all() and grad[mask].ne(0).any(1).all()

    hidden_changed = batch["first"].where(m3i.to_pixels(mask, 4), 0.5)
    same_view = batch["geometry"][:, :1].expand(-1, 2, -1)
    for name, change in (("intra", {"first": hidden_changed}),
                         ("inter", {"second": batch["second"].flip(3)}),
                         ("inter", {"geometry": same_view})):
        changed, _ = objective(model, {**batch, **change}, mask)
        assert {key for key in TERMS if changed[key] != terms[key]} == {name}


# ---- EMA ----

@pytest.mark.parametrize("momentum", [0.0, 1.0, 0.3])
def test_the_ema_is_copied_frozen_or_in_between(momentum):
    model = build()
    expected = {}
    for ema, online in (("ema_encoder", model.vision), ("ema_projector", model.projector)):
        for name, w in online.named_parameters():
            old = model.get_parameter(f"{ema}.{name}")
            expected[f"{ema}.{name}"] = momentum * old + (1 - momentum) * w
    model.update_ema(momentum)
    found = {name: p for name, p in model.named_parameters() if name.startswith("ema_")}
    assert found.keys() == expected.keys()
    for name, w in expected.items():
        torch.testing.assert_close(found[name], w, rtol=1e-12, atol=1e-14)


def test_a_run_updates_the_ema_before_its_use_with_momentum_rising_to_1(
        toy_data, tmp_path, monkeypatch):
    cfg = tiny_config("m3i", toy_data, tmp_path, momentum=0.9)
    targets = M3I.targets
    uses = []  # weights of the encoder and of its EMA, two uses a step

    def recorded(model, *args):
        uses.append([torch.cat([p.detach().flatten() for p in part.parameters()])
                     for part in (model.vision, model.ema_encoder)])
        return targets(model, *args)

    monkeypatch.setattr(M3I, "targets", recorded)
    _, state, _ = run(m3i.main, cfg)
    assert len(uses) == 2 * cfg.steps
    expected = uses[0][0]  # the initial encoder
    for step, (weights, ema) in enumerate(uses[::2]):
        momentum = 1 - 0.1 * math.cos(math.pi * step / cfg.steps / 2) ** 2
        assert m3i.ema_momentum(step, cfg.steps, 0.9) == close(momentum)
        expected = momentum * expected + (1 - momentum) * weights
        torch.testing.assert_close(ema, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(uses[-1][0], uses[0][0])
    saved = [x.flatten() for name, x in state["model"].items() if name.startswith("ema_encoder.")]
    assert torch.equal(torch.cat(saved), ema)
    assert m3i.ema_momentum(cfg.steps, cfg.steps, 0.9) == 1


# ---- text and class ----

def text_and_class(model, tokens, batch, patches, rows, weight=1.0):
    """The loss of the caption and of the class of image rows[i], predicted from the patches[i] of
    mixture i, one row after the other."""
    text = [F.normalize(model.encode_text.transformer(t[None, v], v[None, v])[0].mean(0), dim=0)
            for t, v in zip(batch["tokens"], batch["valid"])]
    captioned = batch["has_text"].nonzero()[:, 0].tolist()
    text_losses = []
    class_losses = []
    for i, row in enumerate(rows):
        pooled = tokens[i][patches[i]].mean(0)
        if row in captioned:
            image = F.normalize(model.text_head(pooled), dim=0)
            logits = torch.stack([image @ text[j] for j in captioned]) * model.log_scale.exp()
            text_losses.append(-logits.log_softmax(0)[captioned.index(row)])
        if batch["label"][row] >= 0:
            class_losses.append(-model.class_head(pooled).log_softmax(0)[batch["label"][row]])
    return {"text": weight * sum(text_losses).item() / len(text_losses),
            "class": weight * sum(class_losses).item() / len(class_losses)}


def mixed_tokens(model, batch, mask):
    pixels = mask.view(B, 1, GRID, GRID).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return model.vision.patch_tokens(batch["first"].where(pixels, batch["first"][PARTNERS]))


def test_both_images_of_a_mixture_predict_their_text_and_class_from_their_own_patches():
    model = build(keep=0.3)
    batch = make_batch()
    mask = make_mask(model)
    terms, metrics = objective(model, batch, mask, keep=0.3)
    tokens = mixed_tokens(model, batch, mask)
    a = text_and_class(model, tokens, batch, mask, range(B))
    b = text_and_class(model, tokens, batch, ~mask, PARTNERS)
    for name in ("text", "class"):
        assert terms[name].item() == close(a[name] + b[name])
    assert metrics["temperature"].item() == close(math.exp(-model.log_scale.item()))


def test_text_loss_is_the_image_to_text_half_of_align():
    image, text = F.normalize(torch.randn(2, B, D, dtype=torch.float64), dim=2)
    all_there = torch.ones(B, dtype=torch.bool)
    scale = torch.tensor(5.0, dtype=torch.float64)
    i2t = text_loss(image, text, all_there, torch.arange(B), scale)
    t2i = text_loss(text, image, all_there, torch.arange(B), scale)
    both = align.contrastive_loss(image, text, 1 / scale)
    assert (i2t + t2i).item() == close(both.item())
    assert i2t.item() == close(F.cross_entropy(5 * image @ text.T, torch.arange(B)).item())


def test_a_prediction_that_knows_nothing_costs_the_log_of_the_number_of_candidates():
    model = build(keep=1.0)
    for p in (*model.text_head[2].parameters(), *model.class_head[1].parameters()):
        p.data.zero_()
    terms, _ = objective(model, keep=1.0, w_intra=0.0, w_inter=0.0)
    assert values(terms) == close({"text": math.log(6), "class": math.log(CLASSES)})  # 6 captions


def test_cross_entropy_bounds_the_mutual_information():
    """H(y) - loss is I(x; y) at the true conditional, and less anywhere else."""
    count = torch.tensor([[4, 1, 0], [1, 2, 3]])
    x = torch.arange(2).repeat_interleave(count.sum(1))
    y = torch.arange(3).repeat(2).repeat_interleave(count.flatten())
    p = count.double() / count.sum()
    px = p.sum(1, keepdim=True)
    py = p.sum(0)
    information = (p * (p / (px * py)).log()).nan_to_num().sum()
    entropy = -(py * py.log()).sum()
    exact = (p / px).clamp(min=1e-30).log()
    assert (entropy - labeled_cross_entropy(exact[x], y)).item() == close(information.item())
    for _ in range(50):
        assert entropy - labeled_cross_entropy(torch.randn(2, 3).double()[x], y) < information


@pytest.mark.parametrize("term, missing", [
    ("text", {"has_text": torch.zeros(B, dtype=torch.bool)}),
    ("class", {"label": torch.full((B,), -1)})])
def test_a_batch_without_targets_of_a_term_is_a_batch_without_the_term(term, missing):
    model = build()
    batch = {**make_batch(), **missing}
    terms, _ = objective(model, batch)
    others, _ = objective(model, batch, **{f"w_{term}": 0.0})
    assert values(terms) == {**values(others), term: 0}
    grads = gradients(model, sum(terms.values()))
    assert all(g is None or g.isfinite().all() for g in grads.values())
    assert_same_gradients(grads, gradients(model, sum(others.values())), rtol=0, atol=0)


def test_each_term_alone_is_what_it_is_beside_the_others():
    together, _ = objective(build())
    assert tuple(together) == TERMS
    for term in TERMS:
        assert values(objective(build(), **only(term))[0]) == {term: together[term].item()}


def test_evaluation_sees_the_mean_token_and_captions_without_padding():
    model = build()
    batch = make_batch()
    pooled = model.vision(batch["first"])[:, 1:].mean(1)
    expected = F.normalize(model.text_head(pooled), dim=1)
    torch.testing.assert_close(model.encode_image(batch["first"]), expected)
    tokens = batch["tokens"]
    valid = batch["valid"]
    text = model.encode_text(tokens, valid)
    assert torch.equal(model.encode_text(tokens.where(valid, 7), valid), text)
    torch.testing.assert_close(model.encode_text(tokens[:3, :6], valid[:3, :6]), text[:3])
    without = build(**only("class"))
    assert not hasattr(without, "encode_text")  # what it did not learn it does not have
    torch.testing.assert_close(without.encode_image(batch["first"]).norm(dim=1),
                               torch.ones(B, dtype=torch.float64))


# ---- special cases ----

def test_supervised_learning_is_one_cross_entropy_of_whole_images():
    settings = only("class", w_intra=0.0, keep=1.0)
    model = build(**settings)
    batch = make_batch()
    terms, metrics = objective(model, batch, **settings)
    logits = model.class_head(model.vision(batch["first"])[:, 1:].mean(1))
    expected = F.cross_entropy(logits, batch["label"], ignore_index=-1)
    assert values(terms) == close({"class": expected.item()}) and metrics == {}


def test_image_text_contrast_is_infonce_over_the_rows_with_a_caption():
    settings = only("text", keep=1.0)
    model = build(**settings)
    batch = make_batch()
    terms, _ = objective(model, batch, **settings)
    there = batch["has_text"]
    image = model.encode_image(batch["first"][there])
    text = model.encode_text(batch["tokens"][there], batch["valid"][there])
    expected = F.cross_entropy(model.log_scale.exp() * image @ text.T, torch.arange(6))
    assert values(terms) == close({"text": expected.item()})


def test_class_from_all_patches_is_cutmix():
    settings = only("class", keep=0.3, pool="all")
    model = build(**settings)
    batch = {**make_batch(), "label": torch.arange(B) % CLASSES}
    mask = make_mask(model)
    logits = model.class_head(mixed_tokens(model, batch, mask).mean(1))
    a = F.cross_entropy(logits, batch["label"])
    b = F.cross_entropy(logits, batch["label"][PARTNERS])
    terms, _ = objective(model, batch, mask, **settings)
    assert values(terms) == close({"class": (0.25 * a + 0.75 * b).item()}, rel=1e-7)


def test_intra_view_on_pixels_without_second_moment_is_mae():
    settings = only("intra", target="pixels", keep=0.3, second_moment_weight=0.0)
    model = build(**settings)
    batch = make_batch()
    mask = make_mask(model)
    predictions = []
    model.decoder.register_forward_hook(lambda module, args, out: predictions.append(out))
    terms, _ = objective(model, batch, mask, **settings)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    errors = []
    for i, k in (~mask).nonzero().tolist():
        y = k // GRID * 4
        x = k % GRID * 4
        patch = batch["first"][i, :, y:y + 4, x:x + 4] / 255
        patch = ((patch - mean) / std).flatten()
        target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
        errors.append((predictions[0][i, k] - target).square().mean().item())
    assert values(terms) == pytest.approx({"intra": np.mean(errors)}, rel=1e-6)  # mean in float32


@pytest.mark.parametrize("term", ["intra", "inter"])
def test_image_terms_are_siameseims_loss_image_by_image(term):
    """Of image a, its patches in its own mixture; of image b, those in the partner's (spec 8)."""
    settings = only(term, keep=0.3)
    model = build(**settings)
    batch = make_batch()
    mask = make_mask(model)
    tokens = mixed_tokens(model, batch, mask)
    first_view, second_view = batch["geometry"].unbind(1)
    if term == "intra":
        mixtures = range(B)
        visible = mask
        scored = ~mask
        images = batch["first"]
        target_view = first_view
    else:
        mixtures = PARTNERS
        visible = ~mask
        scored = torch.ones_like(mask)
        images = batch["second"]
        target_view = second_view
    own_tokens = torch.stack([tokens[j][visible[j]] for j in mixtures])
    ids = torch.stack([visible[j].nonzero()[:, 0] for j in mixtures])
    pred = model.decoder(model.projector(own_tokens), ids, first_view, target_view)
    features = model.ema_projector(model.ema_encoder(images)[:, 1:])
    target = features - features.mean(2, keepdim=True)
    target = target / (features.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    p = pred[scored]
    t = target[scored]
    C = t.T @ t / len(t)
    expected = ((p - t).square().sum(1) + 0.3 * (p @ C @ p.T).diag()).mean() / D
    assert values(objective(model, batch, mask, **settings)[0]) == close({term: expected.item()})


# ---- image loss ----

@pytest.mark.parametrize("dim, weight", [(16, 0.3), (768, 0.02)])
@pytest.mark.parametrize("collapsed", [False, True])
def test_feature_loss_runs_from_1_to_its_closed_minimum(dim, weight, collapsed):
    if collapsed:  # one target for all patches
        target = F.layer_norm(torch.randn(dim, dtype=torch.float64), [dim], eps=0).expand(dim, -1)
        strength = weight * dim
    else:  # orthogonal targets
        target = math.sqrt(dim) * torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0]
        strength = weight
    target = target.view(2, dim // 2, dim)
    everywhere = torch.ones(2, dim // 2, dtype=torch.bool)
    best = target / (1 + strength)
    near = best + 0.01 * torch.randn_like(best)
    lowest = feature_loss(best, target, everywhere, weight)
    zero = feature_loss(torch.zeros_like(target), target, everywhere, weight)
    assert zero.item() == close(1.0)
    assert lowest.item() == close(strength / (1 + strength))
    assert feature_loss(near, target, everywhere, weight) > lowest


def test_feature_loss_and_its_gradient_are_those_of_the_formula():
    target = F.layer_norm(torch.randn(B, L, D, dtype=torch.float64), [D])
    pred = torch.randn_like(target).requires_grad_()
    loss_mask = make_mask(build(keep=0.3))
    loss = feature_loss(pred, target, loss_mask, 0.3)
    loss.backward()
    t = target[loss_mask]
    p = pred.detach()[loss_mask]
    C = sum(torch.outer(x, x) for x in t) / len(t)
    expected = ((p - t).square().sum() + 0.3 * sum(x @ C @ x for x in p)) / (len(t) * D)
    assert loss.item() == close(expected.item())
    grad = 2 / (D * len(t)) * (p - t + 0.3 * p @ C)
    torch.testing.assert_close(pred.grad[loss_mask], grad, rtol=1e-11, atol=1e-14)
    assert pred.grad[~loss_mask].eq(0).all()


def test_losses_are_not_computed_in_bfloat16_under_autocast():
    generator = torch.Generator().manual_seed(0)
    x, y = F.layer_norm(torch.randn(2, 4, 6, 32, generator=generator), [32])
    arguments = [(feature_loss, (x, y, torch.ones(4, 6, dtype=torch.bool), 0.3)),
                 (text_loss, (common.l2_normalize(x[:, 0]), common.l2_normalize(y[:, 0]),
                              torch.ones(4, dtype=torch.bool), torch.arange(4), torch.tensor(9.0)))]
    for loss, args in arguments:
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(*args)
        assert found.dtype == torch.float32 and torch.equal(found, loss(*args))


def test_target_std_tells_collapsed_targets_from_free_ones():
    target = F.layer_norm(torch.randn(64, L, D, dtype=torch.float64), [D], eps=0)
    assert m3i.target_std(target[:1, :1].expand(64, L, D)).item() == pytest.approx(0, abs=1e-6)
    spread = target.flatten(0, 1).var(0, correction=0).mean().sqrt()
    assert m3i.target_std(target).item() == close(spread.item())


# ---- batch norm ----

def batch_norm_of_rank(make_norm):
    """Output and gradients of a batch norm for this rank's rows of 8."""
    generator = torch.Generator().manual_seed(0)
    x, coefficient = torch.randn(2, 8, 5, 6, generator=generator, dtype=torch.float64)
    norm = make_norm(6).double()
    norm.weight.data = torch.randn(6, generator=generator, dtype=torch.float64)
    norm.bias.data = torch.randn(6, generator=generator, dtype=torch.float64)
    x = (3 * x + 1).chunk(common.world_size())[common.rank()].clone().requires_grad_()
    coefficient = coefficient.chunk(common.world_size())[common.rank()]
    if make_norm is m3i.BatchNorm:
        out = norm(x)
    else:
        out = norm(x.flatten(0, 1)).view_as(x)
    (out * coefficient).sum().backward()
    return out.detach(), x.grad, norm.weight.grad, norm.bias.grad


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batch_norm_over_all_ranks_is_that_of_torch(run_on_ranks, world):
    expected = batch_norm_of_rank(torch.nn.BatchNorm1d)
    if world == 1:
        found = [batch_norm_of_rank(m3i.BatchNorm)]
    else:
        found = run_on_ranks(world, batch_norm_of_rank, m3i.BatchNorm)
    for name, theirs, ours in zip(("out", "grad", "weight", "bias"), expected, zip(*found)):
        ours = torch.cat(ours) if theirs.ndim == 3 else sum(ours)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


def test_batch_norm_is_finite_and_0_for_constant_channels():
    constants = torch.linspace(-100, 100, 256)  # most of them without an exact mean in float32
    x = constants.expand(8, 10, 256).clone().requires_grad_()
    out = m3i.BatchNorm(256)(x)
    out.square().sum().backward()
    assert out.abs().max() < 0.02 and x.grad.isfinite().all()


def test_batch_norm_in_float32_is_right_for_mean_50_and_std_0_1():
    x = 50 + 0.1 * torch.randn(64, 16, 4, generator=torch.Generator().manual_seed(0))
    exact = x.double()
    exact = exact - exact.mean((0, 1))
    exact = exact / (exact.square().mean((0, 1)) + 1e-5).sqrt()
    assert (m3i.BatchNorm(4)(x) - exact).abs().max() < 1e-3


# ---- order and ranks ----

def test_the_order_of_groups_and_within_a_pair_does_not_matter():
    model = build()
    batch = make_batch()
    mask = make_mask(model)
    terms = values(objective(model, batch, mask)[0])
    for order in (torch.arange(B).flip(0), torch.tensor([5, 4, 7, 6, 1, 0, 3, 2])):
        reordered = {name: x[order] for name, x in batch.items()}  # partners stay partners
        assert values(objective(model, reordered, mask[order])[0]) == close(terms)
    other_partners = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    changed = {name: x[other_partners] for name, x in batch.items()}
    assert objective(model, changed, mask)[0]["inter"].item() != close(terms["inter"])


FIRST_HALF = torch.arange(16) < 8
LACKING = {
    "nothing": {},
    "text or class on half of the rows": {
        "has_text": ~FIRST_HALF, "label": (torch.arange(16) % CLASSES).where(FIRST_HALF, -1)},
    "any text": {"has_text": torch.zeros(16, dtype=torch.bool)},
    "any class": {"label": torch.full((16,), -1)},
}


def terms_and_gradients_of_rank(lacking, settings):
    """This rank's rows of 16: terms as they are logged, averaged gradients."""
    model = build(**settings)

    def of_rank(x):
        return x.chunk(common.world_size())[common.rank()]

    batch = {name: of_rank(x) for name, x in {**make_batch(16), **LACKING[lacking]}.items()}
    terms, metrics = objective(model, batch, of_rank(make_mask(model, 16)), **settings)
    sum(terms.values()).backward()
    common.average_gradients(model.parameters())
    logged = {}
    for name, x in {**terms, **metrics}.items():
        logged[name] = common.all_reduce_sum(x).item() / common.world_size()
    return logged, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("lacking, settings", [
    *[(lacking, {}) for lacking in LACKING],
    ("nothing", {"pool": "all", "target": "pixels", "micro": 2})])
def test_ranks_are_one_process_also_if_some_lack_targets(run_on_ranks, world, lacking, settings):
    logged, grads = terms_and_gradients_of_rank(lacking, settings)
    assert max(g.abs().max() for g in grads.values() if g is not None) > 1e-3
    for theirs, their_grads in run_on_ranks(world, terms_and_gradients_of_rank, lacking, settings):
        assert theirs == pytest.approx(logged, rel=1e-9, abs=1e-12)
        assert_same_gradients(their_grads, grads)


# ---- learning and runs ----

def test_eight_rows_are_learned_by_heart():
    torch.manual_seed(0)
    cfg = config(dim=32, text_dim=32, second_moment_weight=0.0)
    model = M3I(cfg)
    batch = {**make_batch(), "label": torch.arange(B) % CLASSES}
    mask = make_mask(model)
    optimizer = common.adamw(model, 0.05, (0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(300):
        model.update_ema(0.99)
        terms, _ = m3i.losses(model, batch, mask, cfg, model.vision.patch_tokens,
                              model.ema_encoder.patch_tokens)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        low = terms["text"] < 0.05 and terms["class"] < 0.05
        low = low and terms["intra"] < 0.25 and terms["inter"] < 0.25
        if low:
            break
    assert low, values(terms)


ONE_LINE_EACH = re.sub(r"\n {20,}", " ", m3i.__doc__)
CASES = re.findall(r"^    (\S.*?) {2,}(--\S.*)$", ONE_LINE_EACH, re.M)


@pytest.mark.parametrize("case, flags", CASES)
def test_a_special_case_runs_with_its_flags_and_learns_its_term_alone(
        case, flags, toy_data, tmp_path):
    given = common.parse(Config, {}, "", flags.split())
    changes = {}
    for field in fields(Config):
        if getattr(given, field.name) != field.default:
            changes[field.name] = getattr(given, field.name)
    assert len(CASES) == 5 and len(changes) == flags.count("--")
    rows, _, _ = run(m3i.main, tiny_config("m3i", toy_data, tmp_path, steps=2, **changes))
    term = {"supervised": "class", "CutMix": "class", "image-text contrast": "text",
            "masked image modeling": "intra", "masked siamese": "inter"}[case]
    for row in rows:
        assert row.keys() & set(TERMS) == {term}
        assert row["loss"] == row[term] > 0 and row["grad_norm"] > 0


def test_the_loss_is_the_weighted_sum_of_the_terms(toy_data, tmp_path):
    cfg = tiny_config("m3i", toy_data, tmp_path, w_inter=0.5, w_text=2.0)
    rows, _, _ = run(m3i.main, cfg)
    for row in rows:
        loss = row["intra"] + 0.5 * row["inter"] + 2 * row["text"] + row["class"]
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert 0 < row["target_std"] < 1 and 0 < row["temperature"] < 1


def test_classes_alone_are_trained_evaluated_and_drawn(toy_data, tmp_path):
    """Without captions there is no text encoder, so no zero-shot; the class head's accuracy is that
    of the held-out images whose class occurs in training."""
    cfg = tiny_config("m3i", toy_data, tmp_path / "run", data=None, eval_every=0, steps=20,
                      **only("class", keep=1.0), val=[f"{toy_data}/labels"])
    rows, state, result = run(m3i.main, cfg)
    names = data.read_lines_near(data.expand(cfg.labels), "classes.txt")
    unseen = data.read_lines_near(data.expand(cfg.labels), "unseen.txt")
    index = data.open_index(cfg.val, "test")
    assert rows[0]["class"] == pytest.approx(math.log(len(names)), abs=1)
    assert "knn" in result and not any(name.startswith("zeroshot") for name in result)
    assert {"curves.png", "views.png", "neighbours.png"} <= set(os.listdir(cfg.out))

    model = M3I(Config(**state["config"]))
    model.load_state_dict(state["model"])
    samples = [index[i] for i in range(len(index))]
    samples = [sample for sample in samples if names[sample.label()] not in unseen]
    views = torch.tensor(np.stack([model.held_out_view(sample.image()) for sample in samples]))
    predicted = model.class_head(model.vision(views)[:, 1:].mean(1)).argmax(1).tolist()
    right = [label == sample.label() for label, sample in zip(predicted, samples)]
    assert 0 < len(samples) < len(index)
    assert result["class_head"] == pytest.approx(np.mean(right), abs=0.002)


def test_init_from_a_checkpoint_with_more_terms_than_the_run_needs(toy_data, tmp_path):
    _, state, _ = run(m3i.main, tiny_config("m3i", toy_data, tmp_path / "all", steps=2))
    cfg = tiny_config("m3i", toy_data, tmp_path / "text", steps=1, lr=0.0, labels=None, keep=1.0,
                      init=f"{tmp_path}/all/last.pt")
    _, tuned, _ = run(m3i.main, cfg)
    assert tuned["vocab"] == state["vocab"]
    parts = {name.split(".")[0] for name in tuned["model"]}
    assert parts == {"vision", "encode_text", "text_head", "log_scale"}
    for name, x in tuned["model"].items():
        assert torch.equal(x, state["model"][name]), name


def test_a_term_that_cannot_be_learned_is_dropped_with_a_line(capsys):
    cfg = m3i.drop_terms(config(data=None, keep=1.0, w_inter=0.0))
    assert m3i.term_weights(cfg) == {"intra": 0, "inter": 0, "text": 0, "class": 1}
    assert capsys.readouterr().out.startswith("--w-intra --w-text taken as 0: ")
    assert m3i.drop_terms(config()) == config() and not capsys.readouterr().out


@pytest.mark.parametrize("changes, line", [
    (only("class", labels=None), "nothing to learn"),
    (only("text", data=None), "nothing to learn"),
    (only("intra", keep=1.0), "nothing to learn"),
    (dict.fromkeys([f"w_{name}" for name in TERMS], 0.0), "nothing to learn"),
    (dict(group=3), "--group 3 must be even"),
    (dict(group=6), "divide the 16 rows"),
    (dict(keep=0.0), "--keep 0.0"),
    (dict(keep=1.1), "--keep 1.1"),
    (dict(keep=0.2), "--keep 0.2 of 4 mask units is none: at least 0.250"),
    (dict(keep=0.02, image_size=56), "--keep 0.02 of 49 mask units is none: at least 0.021"),
    (dict(pool="half"), "--pool half: choose own or all"),
    (dict(target="pixel"), "--target pixel: choose ema or pixels"),
    (dict(mask_unit=3), "--mask-unit 3 .* try 1"),
    (dict(group=0), "--group 0"),
    (dict(scale=1.5), "--scale 1.5"),
    (dict(labels_share=2.0), "--labels-share 2.0"),
])
def test_what_cannot_be_trained_is_refused_with_its_value(toy_data, tmp_path, changes, line):
    assert re.search(line, refused(m3i.main, tiny_config("m3i", toy_data, tmp_path, **changes)))


def test_labels_without_class_names_are_refused(toy_data, tmp_path):
    cfg = tiny_config("m3i", toy_data, tmp_path, labels=[f"{toy_data}/pairs"])
    assert "no classes.txt" in refused(m3i.main, cfg)
