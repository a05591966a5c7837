"""MUG: masking, pixel loss, caption loss and generation against the oracles of the paper."""
import math
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

import common
import mug
from common import UserError
from conftest import assert_same_gradients, gradients, run, tiny_config
from data import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

N = 16


def config(**changes):
    """16 patches of 192 numbers, 4 of them kept."""
    fields = dict(image_size=32, mask_ratio=0.75, pixel_dim=24, pixel_depth=2, cross_depth=2,
                  context=12)
    return tiny_config("mug", "no data", "no folder", **{**fields, **changes})


def build(noise=0.1, seed=0, **changes):
    """A model in float64. Noise on all weights, since biases and tokens of zero hide mistakes."""
    torch.manual_seed(seed)
    model = mug.MUG(config(**changes)).double()
    for p in model.parameters():
        if p.requires_grad:
            p.data += noise * torch.randn_like(p)
    return model


def make_batch(n=3):
    """images, noise, tokens, valid of n rows; captions of 2, 3, ... 7 words, 2, 3, ... in turn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    noise = torch.rand(n, N, generator=generator)
    place = torch.arange(12)
    end = 3 + torch.arange(n)[:, None] % 6
    tokens = torch.randint(8, 300, (n, 12), generator=generator)
    tokens[:, 0] = Tokenizer.BOS
    tokens = tokens.where(place != end, Tokenizer.EOS).where(place <= end, Tokenizer.PAD)
    return images, noise, tokens, place <= end


def loss_of(model, batch, recon_weight=1.0, cap_weight=1.0):
    cfg = config(recon_weight=recon_weight, cap_weight=cap_weight)
    loss, terms = mug.losses(*model(*batch), batch[3], cfg)
    return loss


def visible_patches(model, noise):
    """(B, N) bool: the n_keep patches of least noise, counted for each patch by itself."""
    smaller = (noise[:, None, :] < noise[:, :, None]).sum(2)
    return smaller < model.n_keep


# ---- patches, masks ----

def test_the_kept_number_is_rounded_down_as_in_mae():
    assert mug.MUG(config(mask_ratio=0.7)).n_keep == 4  # of 4.8


def test_one_encoder_pass_serves_both_losses():
    model = build()
    model.vision.forward = Mock(wraps=model.vision.forward)
    model(*make_batch())
    model.vision.forward.assert_called_once()


def test_an_image_is_embedded_by_its_normalized_mean_patch():
    model = build()
    images, *_ = make_batch()
    expected = F.normalize(model.vision(images)[:, 1:].mean(1), dim=1)
    torch.testing.assert_close(model.encode_image(images), expected)


# ---- pixels ----

def mae_loss(model, images, noise):
    """MAE's loss of each image, for one image at a time and with patches in their order."""
    decoder = model.pixel_decoder
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    losses = []
    for image, visible in zip(images, visible_patches(model, noise)):
        image = (image / 255.0 - mean).double() / std
        patches = image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(N, -1)

        latent = decoder.embed(model.vision(image[None], visible.nonzero().T))[0]
        x = decoder.mask_token[0].repeat(N, 1)
        x[visible] = latent[1:]
        x = torch.cat([latent[:1], x + decoder.positions])[None]
        for block in decoder.blocks:
            x = block(x)
        pred = decoder.pred(decoder.norm(x))[0, 1:]

        variance = patches.var(1, keepdim=True)  # unbiased
        target = (patches - patches.mean(1, keepdim=True)) / (variance + 1e-6).sqrt()
        losses.append((pred - target)[~visible].square().mean())
    return torch.stack(losses)


def test_without_captions_it_is_mae():
    model = build(cap_weight=0.0)
    batch = make_batch()
    pixel_loss, _ = model(*batch)
    reference = mae_loss(model, *batch[:2])
    torch.testing.assert_close(pixel_loss, reference, rtol=1e-6, atol=0)  # mean, std are float32
    assert_same_gradients(gradients(model, loss_of(model, batch, cap_weight=0.0)),
                          gradients(model, reference.mean()), rtol=1e-5, atol=1e-8)


def test_removed_pixels_are_a_target_and_nothing_else(monkeypatch):
    """With the targets held still, no loss has a gradient there; both have one wherever visible."""
    model = build()
    _, noise, tokens, valid = make_batch()

    def still_targets(patches):
        return common.normalize_patches(patches.detach())

    monkeypatch.setattr(mug, "normalize_patches", still_targets)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    visible = visible_patches(model, noise)
    for loss in model(images, noise, tokens, valid):
        grad = torch.autograd.grad(loss.sum(), images, retain_graph=True)[0]
        grad = model.vision.patchify(grad)
        assert grad[~visible].eq(0).all() and grad[visible].ne(0).any(1).all()


def test_a_prediction_of_zero_costs_the_variance_of_normalized_pixels_also_in_bfloat16():
    """Their unbiased variance is 1, so their mean square is (P - 1) / P with P = 192; patches of
    one value have targets of 0."""
    model = mug.MUG(config(cap_weight=0.0))
    for p in model.pixel_decoder.pred.parameters():
        p.data.zero_()
    _, noise, tokens, valid = make_batch()
    images = torch.randn(3, 3, 32, 32)
    images[2] = 0.3
    with torch.autocast("cpu", torch.bfloat16):
        pixel_loss, _ = model(images, noise, tokens, valid)
    assert pixel_loss.dtype == torch.float32
    assert pixel_loss.tolist() == pytest.approx([191 / 192, 191 / 192, 0], abs=1e-4)


def test_a_perfect_prediction_pasted_back_is_the_image(monkeypatch):
    model = build(cap_weight=0.0)
    images, noise, _, _ = make_batch()
    target, _, _ = common.normalize_patches(model.vision.patchify(images))

    def perfect(latent, ids_restore):
        return target

    monkeypatch.setattr(model.pixel_decoder, "forward", perfect)
    whole, masked, reconstructed = model.reconstruct(images, noise)
    torch.testing.assert_close(whole, images.double() / 255, rtol=0, atol=1e-7)
    torch.testing.assert_close(reconstructed, whole)
    changed = model.vision.patchify(masked - whole).abs().amax(2) > 0.01
    assert torch.equal(changed, ~visible_patches(model, noise))


# ---- captions ----

def test_caption_loss_worked_by_hand():
    """Where the end token has probability 1/2 and the 299 others share the rest, captions of 2, 3,
    4 words cost n ln 598 + ln 2: the begin token and padding cost nothing, the end token does."""
    model = build()
    head = model.caption_decoder.head
    head.weight.data.zero_()
    head.bias.data.zero_()
    head.bias.data[Tokenizer.EOS] = math.log(299)
    images, noise, tokens, valid = make_batch()
    pixel_loss, caption_loss = model(images, noise, tokens, valid)
    by_hand = [n * math.log(598) + math.log(2) for n in (2, 3, 4)]
    assert caption_loss.tolist() == pytest.approx(by_hand)
    _, terms = mug.losses(pixel_loss, caption_loss, valid, config())
    assert terms["caption"].item() == pytest.approx(sum(by_hand) / (3 + 4 + 5))


def test_loss_and_score_are_of_each_token_after_those_before_it():
    model = build(recon_weight=0.0, mask_ratio=0.0)
    images, noise, tokens, valid = make_batch(6)
    _, caption_loss = model(images, noise, tokens, valid)
    score = model.score(images, tokens, valid)
    for row, latent in enumerate(model.vision(images)):
        caption = tokens[row, :valid[row].sum()]
        log_probs = []
        for t in range(1, len(caption)):
            logits = model.caption_decoder(caption[None, :t], latent[None])[0, -1]
            log_probs.append(logits.log_softmax(0)[caption[t]].item())
        assert caption_loss[row].item() == pytest.approx(-sum(log_probs))
        assert score[row].item() == pytest.approx(sum(log_probs) / len(log_probs))


def test_captions_of_a_batch_are_greedy_and_each_ends_by_itself():
    # a seed and a vocabulary with which captions of 16 images have five lengths
    model = build(noise=0.5, seed=12, vocab_size=12, recon_weight=0.0, mask_ratio=0.0)
    model.caption_decoder.head.bias.data[Tokenizer.PAD] = -100  # PAD is never said
    images, *_ = make_batch(16)
    expected = torch.full((16, 11), Tokenizer.PAD)
    for row, latent in enumerate(model.vision(images)):
        ids = [Tokenizer.BOS]
        while len(ids) < 12 and ids[-1] != Tokenizer.EOS:
            logits = model.caption_decoder(torch.tensor([ids]), latent[None])
            ids.append(logits[0, -1].argmax().item())
        expected[row, :len(ids) - 1] = torch.tensor(ids[1:])
    assert len((expected != Tokenizer.PAD).sum(1).unique()) == 5
    assert torch.equal(model.generate(images), expected)


# ---- both losses ----

@pytest.mark.parametrize("kept, gone", [("recon_weight", "caption"), ("cap_weight", "pixel")])
def test_a_weight_of_zero_leaves_the_other_loss_exactly_and_no_decoder(kept, gone):
    weights = {"recon_weight": 0.0, "cap_weight": 0.0, kept: 1.0}
    joint = build()
    single = build(**weights)
    # AdamW would shrink weights whose gradient is zero
    assert not any(name.startswith(gone) for name in single.state_dict())
    assert not single.load_state_dict(joint.state_dict(), strict=False).missing_keys
    batch = make_batch()
    loss = loss_of(single, batch, **weights)
    joint_loss = loss_of(joint, batch, **weights)
    assert loss.item() == joint_loss.item()
    ours = gradients(single, loss)
    assert_same_gradients(ours, gradients(joint, joint_loss), rtol=0, atol=0)
    assert all(grad.abs().max() > 0 for grad in ours.values())  # the encoder's among them
    for method in ("generate", "score", "fused"):
        assert hasattr(single, method) == (kept == "cap_weight")


# ---- training ----

@pytest.mark.parametrize("changes, words", [
    (dict(mask_ratio=1.0), "--mask-ratio 1.0 keeps none of 16 patches"),
    (dict(mask_ratio=0.0), "--mask-ratio 0.0 removes none of 16 patches"),
    (dict(recon_weight=0.0, cap_weight=0.0), "nothing to learn"),
])
def test_what_cannot_be_trained_is_refused_with_its_value(changes, words):
    with pytest.raises(UserError, match=words):
        mug.MUG(config(**changes))


def test_the_logged_loss_is_weighted_and_the_rate_is_scaled_by_the_batch(toy_data, tmp_path):
    cfg = tiny_config("mug", toy_data, tmp_path, recon_weight=2.0, cap_weight=0.5, lr=0.1,
                      steps=20, context=40)
    log, _, _ = run(mug.main, cfg)
    for row in log:
        assert row["loss"] == pytest.approx(2 * row["pixels"] + 0.5 * row["caption"], rel=1e-5)
    assert max(row["lr"] for row in log) == pytest.approx(0.1 * 16 / 256)
    assert log[-1]["caption"] < log[0]["caption"] - 0.5


@pytest.mark.parametrize("weight, term, part", [
    ("recon_weight", "caption", "pairs"),
    ("cap_weight", "pixels", "labels"),  # images without captions
])
def test_a_run_of_one_loss_needs_logs_and_draws_that_alone(
        toy_data, tmp_path, weight, term, part):
    shards = [f"{toy_data}/{part}/test-00000.tar"]
    cfg = tiny_config("mug", toy_data, tmp_path, data=shards, val=shards, steps=1, eval_every=0,
                      **{weight: 0.0})
    log, _, _ = run(mug.main, cfg)
    assert {"pixels", "caption"} & log[0].keys() == {term}
    assert log[0]["loss"] == pytest.approx(log[0][term]) and log[0]["skipped"] == 0
    assert (tmp_path / "reconstruction.png").exists()
