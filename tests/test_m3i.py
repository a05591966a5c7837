"""M3I: geometry of views, mixtures, the four terms and the EMA against the oracles of its spec."""
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import m3i
from conftest import (
    assert_same_gradients, close, gradients, painted_sample, refused, run, tiny_config, values)
from m3i import M3I, Config

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = 4
L = 16  # patches of 4 x 4 pixels
D = 16
B = 8
CLASSES = 5
PARTNERS = [3, 2, 1, 0, 7, 6, 5, 4]  # in groups of 4

# the special cases in the docstring: {name: flags}
ONE_LINE_EACH = re.sub(r"\n {20,}", " ", m3i.__doc__)
CASES = dict(re.findall(r"^    (\S.*?) {2,}(--\S.*)$", ONE_LINE_EACH, re.M))


def special_case(name):
    """Settings that are not the defaults, by the flags in the docstring."""
    given = vars(common.parse(Config, {}, "", CASES[name].split()))
    return {field: value for field, value in given.items() if value != getattr(Config, field)}


def config(**changes):
    """A Config as main has it once it knows that there are captions and classes."""
    fields = dict(patch=4, depth=1, context=12, second_moment_weight=0.3, labels=["-"],
                  classes=CLASSES)
    return tiny_config("m3i", "no data", "no folder", **{**fields, **changes})


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
    size = rng.integers(40, 101, (n, 2))
    corner = rng.integers(101 - size)
    flip = rng.integers(0, 2, (n, 1))
    full_width = np.full((n, 1), 100 + n)
    return torch.tensor(np.concatenate([corner, size, flip, full_width], 1), dtype=torch.float32)


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


def objective(model, batch, mask, **changes):
    """-> terms, metrics as main gets them."""
    encode_ema = model.ema_encoder.patch_tokens if model.has_ema else None
    return m3i.losses(model, batch, mask, config(**changes), model.vision.patch_tokens, encode_ema)


def step(**settings):
    """-> model, batch, mask, terms"""
    model = build(**settings)
    batch = make_batch()
    mask = make_mask(model)
    terms, _ = objective(model, batch, mask, **settings)
    return model, batch, mask, terms


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


def test_relative_coordinates_are_those_of_brute_force_geometry():
    flips = set()
    for source, target in zip(geometries(60), geometries(60, 1)):
        found = m3i.relative_coordinates(source[None], target[None], GRID)[0]  # (L, 4)
        torch.testing.assert_close(found, by_brute_force(source, target), rtol=0, atol=1e-11)
        flips.add((source[4].item(), target[4].item()))
    assert len(flips) == 4


def test_a_view_lies_where_its_geometry_says():
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
        flips += flip
    assert 0 < flips < 12


# ---- rows, masks, mixtures ----

def test_a_row_may_have_a_caption_a_class_or_both_and_with_image_terms_neither():
    image = painted_sample().members["jpg"]

    def row(cfg=config(), **members):
        sample = data.Sample("key", {"jpg": image, **members})
        return m3i.example(sample, np.random.default_rng(0), cfg, data.Tokenizer())

    # of five classes, so that number 5 is none
    found = [row(txt=b"red"), row(cls=b"3"), row(txt=b"red", cls=b"3"), row(cls=b"5")]
    kinds = [(bool(r["has_text"]), int(r["label"])) for r in found]
    assert kinds == [(True, -1), (False, 3), (True, 3), (False, -1)]
    assert found[1]["valid"].any()  # a mean over no token would not be finite
    with pytest.raises(data.Skip, match="no caption"):
        row(config(w_intra=0.0, w_inter=0.0), cls=b"5")
    with pytest.raises(data.Skip, match="no class"):
        row(config(**special_case("CutMix")), cls=b"5")


@pytest.mark.parametrize("unit, keep, count", [(1, 0.5, 98), (2, 0.3, 56)])
def test_a_mask_has_equally_many_patches_in_each_row_in_whole_units(unit, keep, count):
    model = M3I(config(image_size=56, mask_unit=unit, keep=keep))
    assert (model.n_a, model.n_b) == (count, 196 - count)
    noise = torch.rand(500, model.n_units, generator=torch.Generator().manual_seed(0))
    mask = m3i.random_mask(noise, unit, model.units_of_a)
    assert mask.sum(1).eq(count).all()
    units = mask.view(500, 14 // unit, unit, 14 // unit, unit).float().mean((2, 4))
    assert ((units == 0) | (units == 1)).all()
    assert (units.mean(0) - count / 196).abs().max() < 0.12  # anywhere: five standard deviations


# ---- what a prediction depends on ----

@pytest.mark.parametrize("blocked", [True, False])
def test_tokens_depend_on_the_other_image_unless_attention_is_blocked(blocked):
    model = build()  # of one block: the class token, which sees both, passes nothing on
    mask = make_mask(model)
    images = torch.randn(B, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    cfg = config(block_attention=blocked)
    tokens = m3i.encode_mixture(images, mask, cfg, model.vision.patch_tokens)
    own_tokens = tokens[0][mask[0]]  # the other image of this mixture is number 3
    grad, = torch.autograd.grad(own_tokens.square().sum(), images)
    assert grad[0].any() and grad[3].any() != blocked


def waves(source, target):
    """(L, 2 D): the published sines and cosines of these coordinates."""
    angle = by_brute_force(source, target)[..., None] * 10000.0 ** -(torch.arange(4.0) / 4).double()
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


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


def test_targets_get_no_gradient_and_hidden_patches_are_targets_only():
    model = build()
    mask = make_mask(model)
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
    visible = mask | ~mask[PARTNERS]  # in its own mixture or in its partner's
    assert grad[~visible].eq(0).all() and grad[visible].ne(0).any(1).all()


# ---- EMA ----

def test_the_ema_moves_by_1_less_a_momentum_that_rises_to_1_with_half_a_cosine():
    momentum = [m3i.ema_momentum(step, 100, 0.9) for step in (0, 50, 100)]
    assert momentum == close([0.9, 0.95, 1.0])
    model = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.update_ema(0.3)
    for name, p in model.named_parameters():
        if name.startswith("ema_"):
            online = name.replace("ema_encoder", "vision").replace("ema_projector", "projector")
            expected = 0.3 * before[name] + 0.7 * before[online]
            torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-14)


# ---- text and class ----

def text_and_class(model, tokens, batch, patches, rows):
    """The loss of the captions and of the classes of images `rows`, predicted from `patches` of the
    mixtures."""
    pooled = torch.stack([x[visible].mean(0) for x, visible in zip(tokens, patches)])
    class_loss = F.cross_entropy(model.class_head(pooled), batch["label"][rows], ignore_index=-1)
    text = [F.normalize(model.encode_text.transformer(t[None, v], v[None, v])[0].mean(0), dim=0)
            for t, v in zip(batch["tokens"], batch["valid"])]
    there = batch["has_text"]
    image = F.normalize(model.text_head(pooled))
    logits = image @ torch.stack(text)[there].T * model.log_scale.exp()
    labels = (there.cumsum(0) - 1).where(there, -1)  # places among the captions
    text_loss = F.cross_entropy(logits, labels[rows], ignore_index=-1)
    return {"text": text_loss.item(), "class": class_loss.item()}


def mixed_tokens(model, batch, mask):
    pixels = mask.view(B, 1, GRID, GRID).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return model.vision.patch_tokens(batch["first"].where(pixels, batch["first"][PARTNERS]))


def test_both_images_of_a_mixture_predict_their_text_and_class_from_their_own_patches():
    model, batch, mask, terms = step(keep=0.3)
    tokens = mixed_tokens(model, batch, mask)
    a = text_and_class(model, tokens, batch, mask, range(B))
    b = text_and_class(model, tokens, batch, ~mask, PARTNERS)
    for name in ("text", "class"):
        assert terms[name].item() == close(a[name] + b[name])


@pytest.mark.parametrize("term, missing", [
    ("text", {"has_text": torch.zeros(B, dtype=torch.bool)}),
    ("class", {"label": torch.full((B,), -1)})])
def test_a_batch_without_targets_of_a_term_is_a_batch_without_the_term(term, missing):
    model = build()
    batch = {**make_batch(), **missing}
    mask = make_mask(model)
    terms, _ = objective(model, batch, mask)
    others, _ = objective(model, batch, mask, **{f"w_{term}": 0.0})
    assert values(terms) == {**values(others), term: 0}
    grads = gradients(model, sum(terms.values()))
    assert all(g is None or g.isfinite().all() for g in grads.values())
    assert_same_gradients(grads, gradients(model, sum(others.values())), rtol=0, atol=0)


# ---- special cases ----

def test_supervised_learning_is_one_cross_entropy_of_whole_images():
    model, batch, _, terms = step(**special_case("supervised"))
    pooled = model.vision(batch["first"])[:, 1:].mean(1)
    expected = F.cross_entropy(model.class_head(pooled), batch["label"], ignore_index=-1)
    assert values(terms) == close({"class": expected.item()})
    torch.testing.assert_close(model.encode_image(batch["first"]), F.normalize(pooled))
    assert not hasattr(model, "encode_text")  # what it did not learn it does not have


def test_image_text_contrast_is_infonce_over_the_rows_with_a_caption():
    model, batch, _, terms = step(**special_case("image-text contrast"))
    there = batch["has_text"]
    image = model.encode_image(batch["first"][there])
    text = model.encode_text(batch["tokens"][there], batch["valid"][there])
    expected = F.cross_entropy(model.log_scale.exp() * image @ text.T, torch.arange(6))
    assert values(terms) == close({"text": expected.item()})


def test_class_from_all_patches_is_cutmix():
    model, batch, mask, terms = step(**special_case("CutMix"), keep=0.3)
    logits = model.class_head(mixed_tokens(model, batch, mask).mean(1))
    a = F.cross_entropy(logits, batch["label"], ignore_index=-1)
    b = F.cross_entropy(logits, batch["label"][PARTNERS], ignore_index=-1)
    assert values(terms) == close({"class": (0.25 * a + 0.75 * b).item()}, rel=1e-7)


def test_intra_view_on_pixels_without_second_moment_is_mae():
    model, batch, mask, terms = step(**special_case("masked image modeling"), keep=0.3)
    view = batch["geometry"][:, 0]
    pred = model.predict(mixed_tokens(model, batch, mask), mask, 4, view, view)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    images = (batch["first"] / 255 - mean) / std
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(B, L, -1)
    variance = patches.var(2, keepdim=True)
    target = (patches - patches.mean(2, keepdim=True)) / (variance + 1e-6).sqrt()
    expected = (pred - target)[~mask].square().mean().item()
    assert values(terms) == pytest.approx({"intra": expected}, rel=1e-6)  # mean in float32


@pytest.mark.parametrize("term, settings", [
    ("intra", dict(w_inter=0.0, w_text=0.0, w_class=0.0)),
    ("inter", special_case("masked siamese"))])
def test_image_terms_are_siameseims_loss_image_by_image(term, settings):
    """Of image a, its patches in its own mixture; of image b, those in the partner's (spec 8)."""
    model, batch, mask, terms = step(**settings, keep=0.3)
    tokens = mixed_tokens(model, batch, mask)
    first_view, second_view = batch["geometry"].unbind(1)
    if term == "intra":
        pred = model.predict(tokens, mask, 4, first_view, first_view)
        scored = ~mask
        images = batch["first"]
    else:
        pred = model.predict(tokens[PARTNERS], ~mask[PARTNERS], 12, first_view, second_view)
        scored = torch.ones_like(mask)
        images = batch["second"]
    features = model.ema_projector(model.ema_encoder(images)[:, 1:])
    target = features - features.mean(2, keepdim=True)
    target = target / (features.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    p = pred[scored]
    t = target[scored]
    C = t.T @ t / len(t)
    expected = ((p - t).square().sum(1) + 0.3 * (p @ C @ p.T).diag()).mean() / D
    assert values(terms) == close({term: expected.item()})


# ---- batch norm ----

def test_batch_norm_is_that_of_torch_also_in_float32_far_from_zero():
    norm = m3i.BatchNorm(6).double()
    norm.weight.data = torch.randn(6, dtype=torch.float64)
    x, coefficient = torch.randn(2, 40, 6, dtype=torch.float64)
    x = (50 + 0.1 * x).requires_grad_()
    out = norm(x[None])[0]
    expected = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad((y * coefficient).sum(), x)[0] for y in (out, expected)]
    torch.testing.assert_close(*grads)
    assert (norm.float()(x[None].float())[0] - expected).abs().max() < 1e-3


# ---- ranks ----

def terms_and_gradients_of_rank():
    """Of this rank's rows of 16: terms, averaged gradients. The first half of the rows has classes
    alone, the second half has captions alone."""
    in_first_half = torch.arange(16) < 8
    batch = make_batch(16)
    batch["has_text"] = ~in_first_half
    batch["label"] = batch["label"].abs().where(in_first_half, -1)
    model = build()
    batch["mask"] = make_mask(model, 16)
    batch = {name: x.chunk(common.world_size())[common.rank()] for name, x in batch.items()}
    terms, _ = objective(model, batch, batch["mask"])
    sum(terms.values()).backward()
    common.average_gradients(model.parameters())
    means = {name: common.all_reduce_sum(x).item() / common.world_size()
             for name, x in terms.items()}
    return means, {name: p.grad for name, p in model.named_parameters()}


def test_two_ranks_are_one_process_also_if_one_lacks_captions_and_the_other_classes(run_on_ranks):
    terms, grads = terms_and_gradients_of_rank()
    for their_terms, their_grads in run_on_ranks(2, terms_and_gradients_of_rank):
        assert their_terms == close(terms, rel=1e-9)
        assert_same_gradients(their_grads, grads)


# ---- runs ----

def test_image_terms_alone_need_neither_captions_nor_classes(toy_data, tmp_path):
    cfg = tiny_config("m3i", toy_data, tmp_path, data=[f"{toy_data}/labels/test-00000.tar"],
                      labels=None, w_text=0.0, steps=2)
    rows, _, _ = run(m3i.main, cfg)
    terms = rows[-1].keys() & {"intra", "inter", "text", "class"}
    assert terms == {"intra", "inter"} and rows[-1]["skipped"] == 0


def test_the_loss_is_the_weighted_sum_of_the_terms(toy_data, tmp_path):
    cfg = tiny_config("m3i", toy_data, tmp_path, w_inter=0.5, w_text=2.0, color=True, flip=True)
    rows, _, _ = run(m3i.main, cfg)
    for row in rows:
        loss = row["intra"] + 0.5 * row["inter"] + 2 * row["text"] + row["class"]
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert rows[0]["temperature"] == pytest.approx(0.07)


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
    (dict(w_class=0.0, w_intra=0.0, w_inter=0.0, data=None), "nothing to learn"),
    (dict(keep=0.2), "--keep 0.2 of 4 mask units is 0: give a share of 1 to 4"),
    (dict(pool="half"), "--pool half: choose own or all"),
    (dict(target="text"), "--target text: choose ema or pixels"),
    (dict(patch=32), "--patch 32 is larger than --image-size 16: try --patch 16"),
    (dict(mask_unit=3), "--mask-unit 3 .* try 1"),
])
def test_what_cannot_be_trained_is_refused_with_its_value(toy_data, tmp_path, changes, line):
    assert re.search(line, refused(m3i.main, tiny_config("m3i", toy_data, tmp_path, **changes)))
