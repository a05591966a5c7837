"""ALIGN's objective, optimiser and model against the oracles of its specification."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import align
import common
import data
from align import ALIGN, Lamb, contrastive_loss

torch.set_num_threads(1)


def pairs(n, dim=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (F.normalize(torch.randn(n, dim, generator=g, dtype=dtype), dim=1).requires_grad_() for _ in range(2))


def naive(image, text, temperature, smoothing):
    """The definition, written out: materialised targets, a softmax over rows and one over columns."""
    z = image @ text.T / temperature
    n = len(z)
    target = (1 - smoothing) * torch.eye(n, dtype=z.dtype) + smoothing / n
    return -(target * z.log_softmax(1)).sum() / n - (target * z.log_softmax(0)).sum() / n


# ---- loss ----

@pytest.mark.parametrize("n", [1, 2, 7, 64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_loss_and_gradients_equal_the_definition(n, smoothing, chunk):
    image, text = pairs(n)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ours, theirs = contrastive_loss(image, text, t, smoothing, chunk), naive(image, text, t, smoothing)
    assert abs(ours.item() - theirs.item()) < 1e-12
    for a, b in zip(torch.autograd.grad(ours, (image, text, t)), torch.autograd.grad(theirs, (image, text, t))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_two_orthogonal_pairs_by_hand():
    # logits are the 2x2 identity, so each direction costs -log(e / (e + 1)) = 0.31326
    assert contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor(1.0)).item() == pytest.approx(2 * 0.31326, abs=1e-4)


def test_loss_passes_gradcheck():
    image, text = pairs(4, 3)
    t = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for chunk in (0, 3):
        assert torch.autograd.gradcheck(lambda *a: contrastive_loss(*a, 0.1, chunk), (image, text, t))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_pair_alone_has_no_loss(smoothing):
    image, text = pairs(1)
    assert contrastive_loss(image, text, torch.tensor(0.1, dtype=torch.float64), smoothing).item() == pytest.approx(0, abs=1e-12)


def test_collapsed_embeddings_and_infinite_temperature_give_two_ln_n():
    image, _ = pairs(64)
    same = image[:1].expand(64, -1)
    assert contrastive_loss(same, same, torch.tensor(0.07), 0.1).item() == pytest.approx(2 * math.log(64), abs=1e-9)
    image, text = pairs(64)
    assert contrastive_loss(image, text, torch.tensor(1e9), 0.1).item() == pytest.approx(2 * math.log(64), abs=1e-6)


def test_floor_under_smoothing_is_reached_at_the_stated_margin():
    n, e = 64, 0.1
    margin = math.log((1 - e + e / n) / (e / n))             # 6.36: logits whose softmax is the target
    rows = torch.eye(n, dtype=torch.float64)
    assert margin == pytest.approx(6.36, abs=5e-3)
    at = lambda m: contrastive_loss(rows, rows, torch.tensor(1 / m, dtype=torch.float64), e).item()
    assert at(margin) == pytest.approx(2 * 0.7295, abs=1e-4)
    assert at(margin * 1.1) > at(margin) and at(margin * 0.9) > at(margin)


def test_loss_is_symmetric_and_blind_to_joint_order_and_rotation():
    image, text = pairs(9)
    t, order = torch.tensor(0.2, dtype=torch.float64), torch.randperm(9)
    loss = contrastive_loss(image, text, t, 0.1).item()
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    for a, b in ((text, image), (image[order], text[order]), (image @ turn, text @ turn)):
        assert contrastive_loss(a, b, t, 0.1).item() == pytest.approx(loss, abs=1e-12)
    near = F.normalize(image + 0.1 * text, dim=1).detach()
    assert contrastive_loss(image, near[order], t).item() > contrastive_loss(image, near, t).item()      # the right pairing is the cheaper one


def test_gradients_follow_the_published_formula():
    image, text = pairs(6)
    t = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    z = (image @ text.T / t).detach()
    G = (z.softmax(1) + z.softmax(0) - 2 * (0.9 * torch.eye(6, dtype=torch.float64) + 0.1 / 6)) / 6
    assert G.sum().abs() < 1e-12
    grads = torch.autograd.grad(contrastive_loss(image, text, t, 0.1), (image, text, t))
    for ours, theirs in zip(grads, (G @ text / t, G.T @ image / t, -(G * z).sum() / t)):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-13)


def test_temperature_gradient_is_that_of_its_log_over_minus_itself():
    image, text = pairs(6)
    t = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(math.log(1 / 0.25), dtype=torch.float64, requires_grad=True)
    direct, = torch.autograd.grad(contrastive_loss(image, text, t, 0.1), t)
    log, = torch.autograd.grad(contrastive_loss(image, text, 1 / s.exp(), 0.1), s)
    assert direct.item() == pytest.approx(-log.item() / 0.25, rel=1e-10)


def test_gradient_is_orthogonal_to_the_raw_embedding():
    raw = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    _, text = pairs(6)
    grad, = torch.autograd.grad(contrastive_loss(common.unit(raw), text, torch.tensor(0.1, dtype=torch.float64)), raw)
    assert (grad * raw).sum(1).abs().max() < 1e-12


def test_strided_inputs_change_nothing():
    image, text = pairs(6)
    t = torch.tensor(0.2, dtype=torch.float64)
    strided = image.detach().T.contiguous().T
    assert not strided.is_contiguous()
    assert contrastive_loss(strided, text, t, 0.1).item() == pytest.approx(contrastive_loss(image, text, t, 0.1).item(), rel=1e-14)


def test_float32_logits_at_scale_100_stay_close_to_float64():
    image, text = pairs(128, 32)
    t = torch.tensor(0.01, dtype=torch.float64)
    single = contrastive_loss(image.float(), text.float(), t.float(), 0.1)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(contrastive_loss(image, text, t, 0.1).item(), rel=1e-5)


# ---- LAMB ----

def reference_lamb(w, grads, lr, wd, steps, b1=0.9, b2=0.999, eps=1e-6):
    """The algorithm on plain lists of floats."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t in range(1, steps + 1):
        g = grads[t - 1]
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g)]
        v = [b2 * a + (1 - b2) * b * b for a, b in zip(v, g)]
        u = [(a / (1 - b1 ** t)) / (math.sqrt(b / (1 - b2 ** t)) + eps) + wd * x for a, b, x in zip(m, v, w)]
        norm, size = math.sqrt(sum(x * x for x in w)), math.sqrt(sum(x * x for x in u))
        ratio = norm / size if norm > 0 and size > 0 else 1
        w = [x - lr * ratio * y for x, y in zip(w, u)]
    return w


def run_lamb(w, grads, **kw):
    w = nn.Parameter(w.clone())
    opt = Lamb([w], **kw)
    for g in grads:
        w.grad = g.clone()
        opt.step()
    return w.detach()


def test_lamb_equals_a_scalar_reference_over_four_steps():
    w, grads = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64)
    ours = run_lamb(w, grads, lr=0.05, wd=0.1)
    theirs = reference_lamb(w.flatten().tolist(), [g.flatten().tolist() for g in grads], 0.05, 0.1, 4)
    torch.testing.assert_close(ours.flatten(), torch.tensor(theirs, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_adapted_tensors_move_by_lr_times_their_norm_whatever_the_gradient_scale():
    w, g = torch.randn(4, 4, dtype=torch.float64), torch.randn(1, 4, 4, dtype=torch.float64)
    g += 0.1 * g.sign()                                      # beside smaller ones eps would show
    for scale in (1.0, 1e3):
        moved = run_lamb(w, g * scale, lr=0.02) - w
        assert (moved.norm() / w.norm()).item() == pytest.approx(0.02, rel=1e-9)
    torch.testing.assert_close(run_lamb(w, g, lr=0.02), run_lamb(w, g * 1e3, lr=0.02), rtol=3e-5, atol=1e-7)


def test_vectors_get_adamw_steps_without_decay():
    w, grads = torch.randn(5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    theirs = nn.Parameter(w.clone())
    opt = torch.optim.AdamW([theirs], lr=0.01, eps=1e-6, weight_decay=0.0)
    for g in grads:
        theirs.grad = g.clone()
        opt.step()
    torch.testing.assert_close(run_lamb(w, grads, lr=0.01, wd=0.5), theirs.detach(), rtol=1e-12, atol=1e-12)


def test_zero_weights_and_zero_gradients_take_ratio_one_and_stay_finite():
    g = torch.ones(1, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(run_lamb(torch.zeros(2, 2, dtype=torch.float64), g, lr=0.1), torch.full((2, 2), -0.1, dtype=torch.float64), rtol=1e-5, atol=0)
    w = torch.randn(2, 2, dtype=torch.float64)
    assert torch.equal(run_lamb(w, 0 * g, lr=0.1), w)


def test_temperature_is_adapted_not_decayed_and_stays_positive_under_hostile_signs():
    t = run_lamb(torch.tensor(1.0, dtype=torch.float64), torch.ones(1, dtype=torch.float64), lr=0.01, wd=100.0)
    assert t.item() == pytest.approx(0.99, abs=1e-12)        # one multiplicative step, no decay
    t = run_lamb(torch.tensor(1.0, dtype=torch.float64), torch.ones(1000, dtype=torch.float64), lr=1e-3)
    assert t.item() == pytest.approx(0.999 ** 1000, rel=1e-6)


def test_lamb_leaves_parameters_without_gradient_alone():
    w = nn.Parameter(torch.ones(2, 2))
    Lamb([w]).step()
    assert torch.equal(w, torch.ones(2, 2))


# ---- model ----

@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return ALIGN(tiny).double()


def test_text_embedding_ignores_padding_and_sees_later_tokens(model, tiny):
    tokens, valid = torch.randint(8, 300, (3, 9)), torch.arange(9) < torch.tensor([[9], [6], [4]])
    e = model.encode_text(tokens, valid)
    torch.testing.assert_close(model.encode_text(tokens.where(valid, 17), valid), e)
    torch.testing.assert_close(model.encode_text(F.pad(tokens, (0, 5)), F.pad(valid, (0, 5))), e)
    changed = tokens.clone()
    changed[:, 3] += 1
    assert (model.encode_text(changed, valid) - e).abs().max() > 1e-4        # bidirectional: [CLS] sees what follows


def test_embeddings_are_unit_float32_at_least_and_pool_the_patches(model, tiny):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    e = model.encode_image(images)
    tokens = model.vision(images)
    torch.testing.assert_close(e, F.normalize(tokens[:, 1:].mean(1), dim=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert ALIGN(tiny).encode_image(images).dtype == torch.float32


def test_defaults_are_the_papers_recipe():
    cfg = align.Config()
    assert (cfg.batch, cfg.steps, cfg.lr, cfg.warmup, cfg.wd) == (16384, 1_200_000, 1e-3, 10_000, 1e-5)
    assert (cfg.temperature, cfg.label_smoothing, cfg.context, cfg.vocab_size, cfg.schedule) == (1.0, 0.1, 64, 100_000, "linear")


def test_class_token_is_optional(tiny):
    bare = ALIGN(replace(tiny, cls=False))
    assert "vision.cls_token" not in bare.state_dict() and bare.encode_image(torch.zeros(1, 3, 16, 16)).shape == (1, 16)


def test_the_branches_of_both_towers_start_at_a_tenth_of_xaviers_size(model):
    for block in (*model.vision.blocks, *model.text.blocks):
        sizes = {name: w.abs().max() / math.sqrt(6 / sum(w.shape)) for name, w in block.named_parameters() if w.ndim == 2}
        assert {name: round(size.item(), 1) for name, size in sizes.items()} == {"attn.qkv.weight": 1, "attn.proj.weight": 0.1, "mlp.fc1.weight": 1,
                                                                                "mlp.fc2.weight": 0.1}


def test_64_pairs_are_overfit_to_the_floor_of_the_smoothed_loss(tiny):
    """Loss near 2 H(target), every caption finds its image; the temperature has fallen from 1 on the way."""
    torch.manual_seed(0)
    model = ALIGN(replace(tiny, temperature=1.0, dim=32, text_dim=32))
    images, tokens = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8), torch.randint(8, 300, (64, 8))
    opt, valid = Lamb(model.parameters(), lr=0.03), torch.ones(64, 8, dtype=torch.bool)
    for step in range(250):
        for group in opt.param_groups:
            group["lr"] = 0.03 * min(1, (step + 1) / 20) * (1 - step / 250)
        image, text = model(images, tokens, valid)
        loss = contrastive_loss(image, text, model.temperature, 0.1)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert 2 * 0.7295 - 1e-4 < loss.item() < 2 * 0.7295 + 0.15
    assert (text @ image.T).argmax(1).equal(torch.arange(64))
    assert 0 < model.temperature.item() < 0.5


# ---- the whole script ----

def test_script_trains_evaluates_and_draws(tiny, tiny_world):
    result = align.main(replace(tiny, eval_every=0, val=[f"{tiny_world}/pairs", f"{tiny_world}/labels"], steps=4))
    assert {"zeroshot_seen", "zeroshot_unseen", "i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10", "knn"} <= result.keys()
    assert all(0 <= v <= 1 for v in result.values())
    for name in ("retrieval.png", "similarity.png", "curves.png"):
        with data.Image.open(f"{tiny.out}/{name}") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50        # drawn on, not blank


def test_without_val_real_data_is_not_evaluated_and_the_pictures_say_training(tiny, capsys):
    assert align.main(replace(tiny, eval_every=0, steps=2)) == {}
    assert "no --val" in capsys.readouterr().out
