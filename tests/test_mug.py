"""MUG: masking, pixel loss, caption loss, generation and ranks against the oracles of the paper."""
import math

import pytest
import torch
import torch.nn.functional as F

import common
import mug
from common import UserError, ViT, rank, world_size
from conftest import assert_same_gradients, gradients, painted_sample, run, tiny_config
from data import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

# a few thousand parameters, 16 patches of 192 numbers, 4 of them kept
SMALL = dict(
    image_size=32, patch=8, dim=16, depth=2, heads=2, pixel_dim=24, pixel_depth=2, pixel_heads=2,
    text_dim=16, text_depth=1, cross_depth=2, text_heads=2, context=12, vocab_size=300,
)
N = 16


def config(**changes):
    return mug.Config(**{**SMALL, **changes})


def build(noise=0.1, seed=0, **changes):
    """A model in float64. Noise on all weights, since biases and tokens of zero hide mistakes."""
    torch.manual_seed(seed)
    model = mug.MUG(config(**changes)).double()
    for p in model.parameters():
        if p.requires_grad:
            p.data += noise * torch.randn_like(p)
    return model


def make_batch(n=3, vocab_size=300):
    """images, noise, tokens, valid of n rows; captions of 2, 3, ... 7 words, 2, 3, ... in turn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    noise = torch.rand(n, N, generator=generator)
    words = torch.randint(8, vocab_size, (n, 12), generator=generator)
    tokens = torch.full((n, 12), Tokenizer.PAD)
    for row in range(n):
        end = 3 + row % 6
        tokens[row, 0] = Tokenizer.BOS
        tokens[row, 1:end] = words[row, 1:end]
        tokens[row, end] = Tokenizer.EOS
    return images, noise, tokens, tokens != Tokenizer.PAD


def loss_of(model, batch, recon_weight=1.0, cap_weight=1.0):
    cfg = config(recon_weight=recon_weight, cap_weight=cap_weight)
    loss, terms = mug.losses(*model(*batch), batch[3], cfg)
    return loss


def visible_patches(model, noise):
    """(B, N) bool: the n_keep patches of least noise, counted for each patch by itself."""
    smaller = (noise[:, None, :] < noise[:, :, None]).sum(2)
    return smaller < model.n_keep


def record_outputs(module):
    """A list that gets every output of the module."""
    outputs = []

    def hook(module, args, output):
        outputs.append(output)

    module.register_forward_hook(hook)
    return outputs


# ---- patches, positions, masks ----

def test_unpatchify_is_the_inverse_of_patchify_to_the_bit():
    model = build()
    x = torch.randn(2, 3, 32, 32)
    patches = model.vision.patchify(x)
    assert torch.equal(patches[1, 6], x[1, :, 8:16, 16:24].flatten())  # second row, third column
    assert torch.equal(model.unpatchify(patches), x)


def test_positions_tell_column_and_row_and_are_never_trained():
    model = build(noise=0)
    before = model.vision.pos_embed.clone()
    assert before[0, 0].eq(0).all()  # the class token's
    for table in (before[0, 1:], model.pixel_decoder.positions):
        half = table.shape[1] // 2
        columns, rows = table.view(4, 4, -1).split(half, dim=2)
        assert columns.eq(columns[:1]).all() and rows.eq(rows[:, :1]).all()
        quarter = half // 2
        assert table[0].tolist() == 2 * ([0] * quarter + [1] * quarter)
    optimizer = common.adamw(model, wd=10.0, betas=(0.9, 0.95))
    loss_of(model, make_batch()).backward()
    optimizer.step()
    assert torch.equal(model.vision.pos_embed, before)
    assert "positions" not in dict(model.pixel_decoder.named_parameters())


@pytest.mark.parametrize("ratio, kept", [(0.75, 49), (0.7, 58), (0.9, 19), (0.5, 98), (0.999, 0)])
def test_the_kept_number_is_cut_off_as_in_mae(ratio, kept):
    changes = dict(image_size=224, patch=16, mask_ratio=ratio, depth=1)
    if kept:
        assert mug.MUG(config(**changes)).n_keep == kept
    else:
        with pytest.raises(UserError, match="keeps none of 196 patches"):
            mug.MUG(config(**changes))


def test_each_image_of_each_step_loses_another_random_three_quarters():
    model = mug.MUG(config(depth=0, pixel_depth=0, cap_weight=0.0))
    ids_keep = []

    def hook(module, args):
        ids_keep.append(args[1])

    model.vision.register_forward_pre_hook(hook)
    _, _, tokens, valid = make_batch(64)
    for step in range(100):
        noise = common.batch_noise(7, step, 64, N)
        model(torch.zeros(64, 3, 32, 32), noise, tokens, valid)
    kept = F.one_hot(torch.stack(ids_keep), N).sum(2)  # (steps, images, patches)
    assert kept.max() == 1 and kept.sum(2).eq(4).all()
    share = kept.double().mean((0, 1))  # of 6,400 draws: 0.022 is four standard deviations
    assert (share - 0.25).abs().max() < 0.022
    assert len(kept.flatten(0, 1).unique(dim=0)) > 1500  # of 1,820 sets of 4 patches


def test_without_masking_the_shuffled_encoder_is_the_plain_vit():
    model = build(mask_ratio=0.0, recon_weight=0.0)
    batch = make_batch()
    latents = record_outputs(model.vision)
    model(*batch)
    plain = model.vision(batch[0])
    in_order = batch[1].argsort(1).argsort(1)[..., None].expand(-1, -1, 16)
    patches = latents[0][:, 1:]
    torch.testing.assert_close(latents[0][:, 0], plain[:, 0])
    torch.testing.assert_close(patches.gather(1, in_order), plain[:, 1:])
    assert (patches - plain[:, 1:]).abs().max() > 0.01


def test_one_encoder_pass_over_the_visible_tokens_serves_both_losses():
    model = build()
    outputs = record_outputs(model.vision.blocks[0])
    model(*make_batch())
    assert [tuple(x.shape) for x in outputs] == [(3, 1 + 4, 16)]


def test_the_encoder_alone_is_a_plain_vit():
    model = build()
    plain = ViT(32, 8, 16, 2, 2).double()
    plain.load_state_dict(model.vision.state_dict())  # nothing is missing, nothing left over
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.equal(plain(images), model.vision(images))
    pooled = F.normalize(plain(images)[:, 1:].mean(1), dim=1)
    torch.testing.assert_close(model.encode_image(images), pooled)


# ---- pixels ----

def mae_loss(model, images, noise):
    """MAE's loss of each image, for one image at a time and with patches in their order."""
    vision = model.vision
    decoder = model.pixel_decoder
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    losses = []
    for image, visible in zip(images, visible_patches(model, noise)):
        image = (image / 255.0 - mean).double() / std
        patches = image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(N, -1)

        weight = vision.patch_embed.proj.weight.flatten(1)
        x = patches @ weight.T + vision.patch_embed.proj.bias + vision.pos_embed[0, 1:]
        x = torch.cat([vision.cls_token[0], x[visible]])[None]
        for block in vision.blocks:
            x = block(x)
        latent = decoder.embed(vision.norm(x))[0]

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


def test_the_prediction_of_a_visible_patch_has_no_gradient():
    model = build(cap_weight=0.0)
    batch = make_batch()
    preds = record_outputs(model.pixel_decoder)
    loss = loss_of(model, batch, cap_weight=0.0)
    grad = torch.autograd.grad(loss, preds[0])[0]
    visible = visible_patches(model, batch[1])
    assert grad[visible].eq(0).all() and grad[~visible].ne(0).all()


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


@pytest.mark.parametrize("bf16", [False, True])
def test_a_prediction_of_zero_costs_the_variance_of_normalized_pixels(bf16):
    """Their unbiased variance is 1, so their mean square is (P - 1) / P with P = 192."""
    model = mug.MUG(config(cap_weight=0.0))
    for p in model.pixel_decoder.pred.parameters():
        p.data.zero_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        pixel_loss, _ = model(*make_batch())
    assert pixel_loss.dtype == torch.float32
    assert pixel_loss.tolist() == pytest.approx([191 / 192] * 3, abs=1e-4)


@pytest.mark.parametrize("dim", [16, 128])
def test_fresh_predictions_have_the_variance_of_xavier(dim):
    # inputs of variance 1 and width d, P = 192 outputs: 2 d / (d + P), on top of the target's 1
    model = build(noise=0, pixel_dim=dim, cap_weight=0.0)
    pixel_loss, _ = model(*make_batch(16))
    assert pixel_loss.mean().item() == pytest.approx(1 + 2 * dim / (dim + 192), rel=0.1)


def test_a_patch_of_one_value_has_a_target_of_zero():
    model = build(cap_weight=0.0)
    _, noise, tokens, valid = make_batch()
    batch = (torch.full((3, 3, 32, 32), 0.3, dtype=torch.float64), noise, tokens, valid)
    for grad in gradients(model, loss_of(model, batch, cap_weight=0.0)).values():
        assert grad.isfinite().all()
    for p in model.pixel_decoder.pred.parameters():
        p.data.zero_()
    assert model(*batch)[0].abs().max() < 1e-12


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
    visible = visible_patches(model, noise)
    masked = model.vision.patchify(masked)
    assert torch.equal(masked[visible], model.vision.patchify(whole)[visible])
    assert masked[~visible].view(-1, 3, 64).std(2).max() < 1e-12  # one gray


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
    lengths = torch.tensor([3, 4, 5])
    assert model.score(images, tokens, valid).tolist() == pytest.approx(
        (-torch.tensor(by_hand) / lengths).tolist())


def test_caption_loss_is_float32_under_autocast():
    model = mug.MUG(config())
    for p in model.caption_decoder.head.parameters():
        p.data.zero_()
    images, noise, tokens, valid = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        _, caption_loss = model(images, noise, tokens, valid)
        score = model.score(images, tokens, valid)
    assert caption_loss.tolist() == pytest.approx([n * math.log(300) for n in (3, 4, 5)], rel=1e-6)
    assert score.tolist() == pytest.approx([-math.log(300)] * 3, rel=1e-6)


@pytest.fixture(scope="module")
def captioner():
    """Of a dozen ids, with a seed whose captions of 16 images have five lengths; never says PAD."""
    model = build(noise=0.5, seed=12, vocab_size=12, recon_weight=0.0).requires_grad_(False)
    model.caption_decoder.head.bias.data[Tokenizer.PAD] = -100
    return model


def test_score_is_the_mean_log_probability_of_the_caption_token_by_token(captioner):
    images, _, tokens, valid = make_batch(6, vocab_size=12)
    scores = captioner.score(images, tokens, valid)
    for row, latent in enumerate(captioner.vision(images)):
        caption = tokens[row, :valid[row].sum()]
        log_probs = []
        for t in range(1, len(caption)):
            logits = captioner.caption_decoder(caption[None, :t], latent[None])[0, -1]
            log_probs.append(logits.log_softmax(0)[caption[t]].item())
        assert scores[row].item() == pytest.approx(sum(log_probs) / len(log_probs))


def test_a_token_changes_no_logits_before_its_own(captioner):
    images, _, tokens, _ = make_batch(vocab_size=12)
    latent = captioner.vision(images)
    plain = captioner.caption_decoder(tokens, latent)
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 12
        differs = (captioner.caption_decoder(changed, latent) != plain).any(2)
        assert not differs[:, :t].any() and differs[:, t].all()


def test_padding_changes_nothing(captioner):
    images, noise, tokens, valid = make_batch(vocab_size=12)
    _, loss = captioner(images, noise, tokens, valid)
    _, loss_of_other_padding = captioner(images, noise, tokens.where(valid, 9), valid)
    assert torch.equal(loss_of_other_padding, loss)
    for length in (6, 9):  # the longest caption has six tokens
        _, cut = captioner(images, noise, tokens[:, :length], valid[:, :length])
        torch.testing.assert_close(cut, loss)
    fused = captioner.fused(images, tokens, valid)
    torch.testing.assert_close(captioner.fused(images, tokens[:, :6], valid[:, :6]), fused)


def test_a_caption_depends_on_the_image_but_not_on_the_order_of_its_tokens(captioner):
    images, _, tokens, _ = make_batch(vocab_size=12)
    latent = captioner.vision(images)
    logits = captioner.caption_decoder(tokens, latent)
    shuffled = latent[:, torch.randperm(1 + N)]
    torch.testing.assert_close(captioner.caption_decoder(tokens, shuffled), logits)
    other_image = captioner.caption_decoder(tokens, latent.roll(1, 0))
    assert (other_image - logits).abs().amax((1, 2)).min() > 1e-6


def test_both_decoders_read_all_encoder_tokens_the_class_token_included():
    model = build()
    latents = record_outputs(model.vision)
    for loss in model(*make_batch()):
        grad = torch.autograd.grad(loss.sum(), latents[0], retain_graph=True)[0]
        assert grad.ne(0).any(2).all()


def generate_without_cache(model, image, length):
    """The whole text anew for each token -> ids up to the end token, logits of each step."""
    latent = model.vision(image[None])
    ids = [Tokenizer.BOS]
    logits = []
    while len(ids) <= length and ids[-1] != Tokenizer.EOS:
        logits.append(model.caption_decoder(torch.tensor([ids]), latent)[0, -1])
        ids.append(logits[-1].argmax().item())
    return ids[1:], logits


def test_generation_with_and_without_cache_is_equal(captioner):
    images = make_batch(16)[0]
    steps = record_outputs(captioner.caption_decoder.head)
    ids = captioner.generate(images)
    steps = list(steps)  # of these captions alone
    assert ids.shape == (16, 11)
    lengths = set()
    for row, image in enumerate(images):
        expected, logits = generate_without_cache(captioner, image, 11)
        n = len(expected)
        lengths.add(n)
        assert ids[row].tolist() == expected + [Tokenizer.PAD] * (11 - n)
        for t in range(n):
            torch.testing.assert_close(steps[t][row, 0], logits[t])
    assert len(lengths) == 5


def test_each_caption_ends_by_itself_and_generation_with_the_longest(captioner):
    images = make_batch(16)[0]
    ids = captioner.generate(images)
    for row in range(16):
        assert torch.equal(captioner.generate(images[row:row + 1])[0], ids[row])
    lengths = (ids != Tokenizer.PAD).sum(1)
    short = lengths < 11
    assert short.any() and not short.all()
    steps = record_outputs(captioner.caption_decoder.head)
    captioner.generate(images[short])
    assert len(steps) == lengths[short].max()


def test_a_caption_longer_than_the_context_is_refused(captioner):
    images = make_batch(1)[0]
    assert captioner.generate(images, 12).shape == (1, 12)
    with pytest.raises(AssertionError, match="12 positions"):
        captioner.generate(images, 13)


def test_eight_masked_pairs_are_learned_by_heart_and_read_from_whole_images():
    torch.manual_seed(0)
    cfg = config(dim=32, text_dim=32, cross_depth=1, recon_weight=0.0)
    model = mug.MUG(cfg)
    images, _, tokens, valid = make_batch(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1000):
        terms = model(images, torch.rand(8, N), tokens, valid)
        loss, _ = mug.losses(*terms, valid, cfg)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    assert loss < 0.01
    assert torch.equal(model.generate(images), tokens[:, 1:])
    other = model.score(images.roll(1, 0), tokens, valid)
    assert (model.score(images, tokens, valid) > other + 1).all()


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


def test_what_a_model_without_captions_cannot_do_it_does_not_have():
    for name in ("generate", "score", "fused"):
        assert hasattr(build(), name)
        assert not hasattr(build(cap_weight=0.0), name)


def test_gradients_are_additive_in_the_weights():
    model = build()
    batch = make_batch()
    pixels = gradients(model, loss_of(model, batch, cap_weight=0.0))
    caption = gradients(model, loss_of(model, batch, recon_weight=0.0))
    both = gradients(model, loss_of(model, batch, 0.3, 1.7))
    expected = {}
    for name, grad in both.items():
        expected[name] = torch.zeros_like(grad)
        if pixels[name] is not None:
            expected[name] += 0.3 * pixels[name]
        if caption[name] is not None:
            expected[name] += 1.7 * caption[name]
    assert_same_gradients(both, expected)


def loss_and_gradients():
    """Of this rank's share of eight rows -> loss, gradients, number of tokens of the share."""
    model = build()
    images, noise, tokens, valid = [x.chunk(world_size())[rank()] for x in make_batch(8)]
    pixel_loss, caption_loss = model(images, noise, tokens, valid)
    loss, _ = mug.losses(pixel_loss, caption_loss, valid, config())
    loss.backward()
    common.average_gradients(model.parameters())
    mean_loss = common.all_reduce_sum(loss).item() / world_size()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return mean_loss, grads, valid.sum().item()


@pytest.mark.parametrize("world", [2, 4])
def test_a_sharded_batch_with_captions_of_unequal_length_is_the_whole_batch(run_on_ranks, world):
    whole_loss, whole_grads, _ = loss_and_gradients()
    results = run_on_ranks(world, loss_and_gradients)
    for loss, grads, _ in results:
        assert loss == pytest.approx(whole_loss, rel=1e-12)
        assert_same_gradients(grads, whole_grads)
    lengths = {n_tokens for _, _, n_tokens in results}
    assert len(lengths) > 1  # so that a mean of the ranks' means would be another loss


# ---- training ----

@pytest.mark.parametrize("changes, words", [
    (dict(mask_ratio=1.0), "--mask-ratio 1.0 keeps none of 16 patches"),
    (dict(mask_ratio=0.0), "--recon-weight 0 does without pixels"),
    (dict(recon_weight=0.0, cap_weight=0.0), "nothing to learn"),
    (dict(pixel_dim=20, pixel_heads=8), "20 does not divide into 8 heads"),
    (dict(text_dim=18, text_heads=4), "18 does not divide into 4 heads"),
])
def test_what_cannot_be_trained_is_refused_with_its_value(changes, words):
    with pytest.raises(UserError, match=words):
        mug.MUG(config(**changes))


def test_the_recipe_is_mae():
    cfg = mug.Config()
    assert cfg.lr * cfg.batch / 256 == pytest.approx(2.4e-3)
    assert (cfg.wd, cfg.scale, cfg.flip, cfg.grad_clip) == (0.05, 0.2, True, 0)


def test_a_row_is_an_image_mirrored_in_half_of_the_cases_and_its_caption():
    sample = painted_sample(size=(48, 48), boxes=[dict(x=0, y=0, w=24, h=48, text="red")],
                            caption="a red half")
    tokenizer = Tokenizer()
    rows = []
    for seed in range(40):
        rng = common.rng(common.Stream.SAMPLE, 0, 0, seed)
        rows.append(mug.example(sample, rng, config(scale=1.0, flip=True), tokenizer))
    assert tokenizer.decode(rows[0]["tokens"]) == "a red half"[:10]  # 12 tokens with both ends
    red_left = [bool(row["images"][0, 16, 8] > row["images"][0, 16, 24]) for row in rows]
    assert 10 < sum(red_left) < 30
    assert rows[0]["images"].shape == (3, 32, 32)


def test_the_logged_loss_is_weighted_and_the_rate_is_scaled_by_the_batch(toy_data, tmp_path):
    cfg = tiny_config("mug", toy_data, tmp_path, recon_weight=2.0, cap_weight=0.5, lr=0.1,
                      steps=20, context=40)
    log, _, _ = run(mug.main, cfg)
    for row in log:
        assert row["loss"] == pytest.approx(2 * row["pixels"] + 0.5 * row["caption"], rel=1e-5)
    rates = [row["lr"] for row in log]
    max_lr = 0.1 * 16 / 256
    assert rates[:3] == pytest.approx([max_lr / 2, max_lr, max_lr])
    assert max(rates) == pytest.approx(max_lr)
    assert log[-1]["caption"] < log[0]["caption"] - 0.5


@pytest.mark.parametrize("weight, term", [("recon_weight", "caption"), ("cap_weight", "pixels")])
def test_a_run_of_one_loss_logs_and_draws_that_alone(toy_data, tmp_path, weight, term):
    cfg = tiny_config("mug", toy_data, tmp_path, steps=1, eval_every=0, **{weight: 0.0})
    log, _, _ = run(mug.main, cfg)
    assert {"pixels", "caption"} & log[0].keys() == {term}
    assert log[0]["loss"] == pytest.approx(log[0][term])
    assert (tmp_path / "reconstruction.png").exists()
