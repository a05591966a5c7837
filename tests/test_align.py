"""ALIGN: contrastive loss, LAMB and model against the oracles of the paper.

test_scripts.py has shards of the batch on several ranks, --chunk and --micro.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import align
import data
from align import ALIGN, Lamb, contrastive_loss
from conftest import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def by_definition(image, text, temperature, smoothing):
    """The targets as a matrix, a softmax over rows and one over columns."""
    logits = image @ text.T / temperature
    n = len(logits)
    target = (1 - smoothing) * torch.eye(n, dtype=logits.dtype) + smoothing / n
    image_to_text = -(target * logits.log_softmax(1)).sum() / n
    text_to_image = -(target * logits.log_softmax(0)).sum() / n
    return image_to_text + text_to_image


# ---- loss ----

@pytest.mark.parametrize("smoothing,chunk", [(0.0, 0), (0.1, 3)])
def test_loss_and_gradients_equal_the_definition(smoothing, chunk):
    vectors = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image, text = F.normalize(vectors.requires_grad_(), dim=2)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ours = contrastive_loss(image, text, temperature, smoothing, chunk)
    theirs = by_definition(image, text, temperature, smoothing)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    ours = torch.autograd.grad(ours, (vectors, temperature), retain_graph=True)
    theirs = torch.autograd.grad(theirs, (vectors, temperature))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_two_orthogonal_pairs_by_hand():
    # the logits are the identity, so each direction costs -log(e / (e + 1)) = 0.31326
    loss = contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor(1.0))
    assert loss.item() == pytest.approx(2 * 0.31326, abs=1e-4)


def test_floor_under_smoothing_is_reached_at_the_margin_of_the_targets():
    n = 64
    smoothing = 0.1
    margin = math.log((1 - smoothing + smoothing / n) / (smoothing / n))  # softmax = targets
    rows = torch.eye(n, dtype=torch.float64)

    def loss_at(margin):
        return contrastive_loss(rows, rows, torch.tensor(1 / margin), smoothing).item()

    assert margin == pytest.approx(6.36, abs=5e-3)
    assert loss_at(margin) == pytest.approx(2 * 0.7295, abs=1e-4)
    assert loss_at(0.9 * margin) > loss_at(margin) < loss_at(1.1 * margin)


# ---- LAMB ----

def lamb_on_lists(w, grads, lr, wd, beta1=0.9, beta2=0.999, eps=1e-6):
    """The algorithm on plain lists of floats."""
    m = [0.0] * len(w)
    v = [0.0] * len(w)
    for t, g in enumerate(grads, start=1):
        m = [beta1 * a + (1 - beta1) * b for a, b in zip(m, g)]
        v = [beta2 * a + (1 - beta2) * b * b for a, b in zip(v, g)]
        update = []
        for m_i, v_i, w_i in zip(m, v, w):
            m_hat = m_i / (1 - beta1**t)
            v_hat = v_i / (1 - beta2**t)
            update.append(m_hat / (math.sqrt(v_hat) + eps) + wd * w_i)
        ratio = math.hypot(*w) / math.hypot(*update)
        w = [w_i - lr * ratio * u for w_i, u in zip(w, update)]
    return w


def run_lamb(w, grads, **options):
    w = nn.Parameter(w.clone())
    optimizer = Lamb([w], **options)
    for grad in grads:
        w.grad = grad.clone()
        optimizer.step()
    return w.detach()


def test_lamb_equals_the_algorithm_on_lists_over_four_steps():
    w = torch.randn(2, 3, dtype=torch.float64)
    grads = torch.randn(4, 2, 3, dtype=torch.float64)
    ours = run_lamb(w, grads, lr=0.05, wd=0.1)
    theirs = lamb_on_lists(w.flatten().tolist(), grads.flatten(1).tolist(), 0.05, 0.1)
    assert ours.flatten().tolist() == pytest.approx(theirs, rel=1e-12)


def test_vectors_get_adam_steps_without_decay():
    w = torch.randn(5, dtype=torch.float64)
    grads = torch.randn(3, 5, dtype=torch.float64)
    adam = nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([adam], lr=0.01, eps=1e-6, weight_decay=0.0)
    for grad in grads:
        adam.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(run_lamb(w, grads, lr=0.01, wd=0.5), adam.detach(), rtol=1e-12,
                               atol=1e-12)


def test_zero_weights_and_zero_gradients_take_ratio_one_and_stay_finite():
    grads = torch.ones(1, 2, 2, dtype=torch.float64)
    from_zero = run_lamb(torch.zeros(2, 2, dtype=torch.float64), grads, lr=0.1)
    torch.testing.assert_close(from_zero, torch.full_like(from_zero, -0.1), rtol=1e-5, atol=0)
    w = torch.randn(2, 2, dtype=torch.float64)
    assert torch.equal(run_lamb(w, 0 * grads, lr=0.1), w)


def test_temperature_is_adapted_not_decayed_and_stays_positive():
    one_step = run_lamb(torch.tensor(1.0).double(), torch.ones(1).double(), lr=0.01, wd=100.0)
    assert one_step.item() == pytest.approx(0.99, abs=1e-12)
    hostile = run_lamb(torch.tensor(1.0).double(), torch.ones(1000).double(), lr=1e-3)
    assert hostile.item() == pytest.approx(0.999**1000, rel=1e-6)


def test_the_rate_rises_over_the_warmup_and_falls_linearly():
    for step, share in [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.5), (99, 1 / 90)]:
        assert align.linear_lr(step, 100, 10, 2.0) == pytest.approx(2.0 * share)


# ---- model ----

def build(**changes):
    torch.manual_seed(0)
    return ALIGN(tiny_config("align", "no data", "no folder", **changes)).double()


def test_image_embedding_is_the_normalized_mean_patch():
    model = build()
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    tokens = model.vision(images)
    expected = F.normalize(tokens[:, 1:].mean(1), dim=1)
    torch.testing.assert_close(model.encode_image(images), expected)


def test_held_out_images_are_squashed_and_cropped_in_the_middle():
    image = data.Image.new("RGB", (40, 20), "red")
    image.paste((0, 0, 255), (0, 0, 2, 20))  # a margin that the crop removes
    view = build(resize=20 / 16).held_out_view(image)
    assert view.shape == (3, 16, 16)
    assert (view[0] > 250).all()
