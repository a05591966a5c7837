"""M3I: geometry of views, mixtures, the four terms and the EMA against the oracles of its spec."""
import math
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import m3i
from conftest import (
    TINY, TINY_OF, assert_same_gradients, close, gradients, painted_sample, refused, run,
    tiny_config, values)
from m3i import M3I, Config

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


def objective(model, batch=None, mask=None, **changes):
    """-> terms and metrics as main gets them."""
    batch = make_batch() if batch is None else batch
    mask = make_mask(model, len(batch["label"])) if mask is None else mask
    encode_ema = model.ema_encoder.patch_tokens if model.has_ema else None
    return m3i.losses(model, batch, mask, config(**changes), model.vision.patch_tokens, encode_ema)


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


def test_relative_positions_are_those_of_brute_force_geometry():
    flips = set()
    for source, target in zip(geometries(60), geometries(60, 1)):
        found = m3i.relative_coordinates(source[None], target[None], GRID)[0]  # (L, 4)
        torch.testing.assert_close(found, by_brute_force(source, target), rtol=0, atol=1e-11)
        position = m3i.relative_position(source[None], target[None], GRID, D)[0]
        assert (position - waves(source, target)).abs().max() < 1e-5
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
        row(config(**only("class")), cls=b"5")


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
    images = make_batch()["first"].double() / 255
    changed = torch.where(m3i.to_pixels(mask, 4), images, 1 - images)
    own_tokens = []

    def encode(_, *attention_mask):
        """Of both images, as losses() wants its mixtures encoded."""
        for x in (images, changed):
            own_tokens.append(model.vision.patch_tokens(x, *attention_mask)[mask])
        return model.vision.patch_tokens(images)

    cfg = config(block_attention=blocked)
    m3i.losses(model, make_batch(), mask, cfg, encode, model.ema_encoder.patch_tokens)
    assert torch.allclose(*own_tokens) == blocked


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


# ---- EMA ----

def test_the_ema_moves_towards_the_weights_by_1_less_the_momentum():
    model = build()
    expected = {}
    for ema, online in (("ema_encoder", model.vision), ("ema_projector", model.projector)):
        for name, w in online.named_parameters():
            old = model.get_parameter(f"{ema}.{name}")
            expected[f"{ema}.{name}"] = 0.3 * old + 0.7 * w
    model.update_ema(0.3)
    for name, w in expected.items():
        torch.testing.assert_close(model.get_parameter(name), w, rtol=1e-12, atol=1e-14)


def test_the_momentum_of_the_ema_rises_to_1_with_half_a_cosine():
    momentum = [m3i.ema_momentum(step, 100, 0.9) for step in (0, 50, 100)]
    assert momentum == close([0.9, 0.95, 1.0])


# ---- text and class ----

def text_and_class(model, tokens, batch, patches, rows):
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
    return {"text": sum(text_losses).item() / len(text_losses),
            "class": sum(class_losses).item() / len(class_losses)}


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


# ---- special cases ----

def test_supervised_learning_is_one_cross_entropy_of_whole_images():
    settings = only("class", w_intra=0.0, keep=1.0)
    model = build(**settings)
    batch = make_batch()
    terms, metrics = objective(model, batch, **settings)
    pooled = model.vision(batch["first"])[:, 1:].mean(1)
    expected = F.cross_entropy(model.class_head(pooled), batch["label"], ignore_index=-1)
    assert values(terms) == close({"class": expected.item()}) and metrics == {}
    torch.testing.assert_close(model.encode_image(batch["first"]), F.normalize(pooled))
    assert not hasattr(model, "encode_text")  # what it did not learn it does not have


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


# ---- batch norm ----

def test_batch_norm_is_that_of_torch():
    x, coefficient = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    ours = m3i.BatchNorm(6).double()
    theirs = torch.nn.BatchNorm1d(6).double()
    ours.weight.data = theirs.weight.data = torch.randn(6, dtype=torch.float64)
    x = (3 * x + 1).requires_grad_()
    out = ours(x)
    expected = theirs(x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(out, expected)
    grad, = torch.autograd.grad((out * coefficient).sum(), x)
    expected_grad, = torch.autograd.grad((expected * coefficient).sum(), x)
    torch.testing.assert_close(grad, expected_grad)


def test_batch_norm_in_float32_is_right_for_mean_50_and_std_0_1():
    x = 50 + 0.1 * torch.randn(64, 16, 4, generator=torch.Generator().manual_seed(0))
    exact = x.double()
    exact = exact - exact.mean((0, 1))
    exact = exact / (exact.square().mean((0, 1)) + 1e-5).sqrt()
    assert (m3i.BatchNorm(4)(x) - exact).abs().max() < 1e-3


# ---- ranks ----

def terms_and_gradients_of_rank():
    """Of this rank's rows of 16: terms, averaged gradients. The first half of the rows has classes
    alone, the second half has captions alone."""
    model = build()
    in_first_half = torch.arange(16) < 8
    batch = {**make_batch(16), "has_text": ~in_first_half,
             "label": (torch.arange(16) % CLASSES).where(in_first_half, -1)}

    def of_rank(x):
        return x.chunk(common.world_size())[common.rank()]

    batch = {name: of_rank(x) for name, x in batch.items()}
    terms, _ = objective(model, batch, of_rank(make_mask(model, 16)))
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


def test_image_terms_alone_need_neither_captions_nor_classes(toy_data, tmp_path):
    cfg = tiny_config("m3i", toy_data, tmp_path, data=[f"{toy_data}/labels/test-00000.tar"],
                      labels=None, w_text=0.0, steps=2)
    rows, _, _ = run(m3i.main, cfg)
    assert rows[-1].keys() & set(TERMS) == {"intra", "inter"} and rows[-1]["skipped"] == 0


def test_the_loss_is_the_weighted_sum_of_the_terms(toy_data, tmp_path):
    cfg = tiny_config("m3i", toy_data, tmp_path, w_inter=0.5, w_text=2.0, color=True, flip=True)
    rows, _, _ = run(m3i.main, cfg)
    for row in rows:
        loss = row["intra"] + 0.5 * row["inter"] + 2 * row["text"] + row["class"]
        assert row["loss"] == pytest.approx(loss, rel=1e-5)


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
    (only("text", data=None), "nothing to learn"),
    (only("intra", keep=1.0), "nothing to learn"),
    (dict(keep=0.2), "--keep 0.2 of 4 mask units is 0: give a share of 1 to 4"),
    (dict(pool="half"), "--pool half: choose own or all"),
    (dict(mask_unit=3), "--mask-unit 3 .* try 1"),
])
def test_what_cannot_be_trained_is_refused_with_its_value(toy_data, tmp_path, changes, line):
    assert re.search(line, refused(m3i.main, tiny_config("m3i", toy_data, tmp_path, **changes)))
