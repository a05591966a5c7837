"""MUG's masking, its two decoders, its generation and its training run against the oracles of its specification."""
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import conftest
import mug
from common import UserError, ViT
from conftest import far
from data import Tokenizer

torch.set_num_threads(1)
PIXELS, CAPTION = dict(cap_weight=0.0), dict(recon_weight=0.0)          # each branch alone
TERMS = "loss", "pixels", "caption"


def config(**changes):
    """A MUG of a few thousand parameters: 16 patches of 192 values, 4 of them kept."""
    tiny = dict(image_size=32, patch=8, dim=16, depth=2, heads=2, pixel_dim=16, pixel_depth=1, pixel_heads=2, text_dim=16, text_depth=1,
                cross_depth=1, text_heads=2, context=12, vocab_size=300, batch=16, steps=20, warmup=2, lr=0.1, workers=0, save_every=100,
                eval_every=-1, precision="fp32", flip=False)
    return mug.Config(**{**tiny, **changes})


def build(scale=0.1, **changes):
    """In float64, with no bias or mask token left at zero, as zeros hide mistakes; scale=0: as initialised."""
    torch.manual_seed(0)
    model = mug.MUG(config(**changes)).double()
    for p in model.parameters():
        p.data += scale * p.requires_grad * torch.randn_like(p)
    return model


def rows(n=3, vocab_size=300):
    """Images, noise, tokens and valid as forward takes them; captions of 4, 5, 6 .. tokens, begin and end among them."""
    g, lengths, place = torch.Generator().manual_seed(0), 4 + torch.arange(n)[:, None] % 6, torch.arange(12)
    tokens = torch.randint(8, vocab_size, (n, 12), generator=g).where(place < lengths - 1, Tokenizer.PAD)
    tokens = tokens.where(place > 0, Tokenizer.BOS).where(place != lengths - 1, Tokenizer.EOS)
    return torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8), torch.rand(n, 16, generator=g), tokens, place < lengths


def kept(model, noise):
    """(B, N) bool: what forward shows the encoder."""
    return torch.zeros(noise.shape, dtype=torch.bool).scatter(1, noise.argsort(1)[:, :model.n_keep], True)


def objective(model, batch, a=1.0, b=1.0, micro=0):
    """The loss of main on one rank."""
    pixels, captions = common.in_chunks(model, micro, *batch)
    return a * pixels.mean() + b * captions.sum() / batch[3][:, 1:].sum()


def gradients(model, batch, *args):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return dict(zip((n for n, _ in named), torch.autograd.grad(objective(model, batch, *args), [p for _, p in named], allow_unused=True)))


def same_gradients(ours, theirs, exact=False):
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], **(dict(rtol=0, atol=0) if exact else dict(rtol=1e-9, atol=1e-12)), msg=name)


# ---- patches, positions, masks ----

def test_pictures_undo_patches_to_the_bit():
    model, x = build(), torch.randn(2, 3, 32, 32)
    patches = model.vision.patches(x)
    assert torch.equal(model.pictures(patches), x)
    assert torch.equal(patches[1, 6], x[1, :, 8:16, 16:24].flatten())                            # second row, third column


def test_positions_tell_column_and_row_and_are_never_trained():
    model, cfg = build(0), config(wd=10.0)
    before, opt = model.vision.pos_embed.clone(), common.adamw(model, cfg, (0.9, 0.95))
    assert before[0, 0].eq(0).all()                          # the class token's
    for table in (before[0, 1:], model.pixels.position):
        columns, lines = table.view(4, 4, 16).tensor_split([8], 2)
        assert columns.eq(columns[:1]).all() and lines.eq(lines[:, :1]).all()
        assert table[0].tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    objective(model, rows()).backward()
    opt.step()
    assert torch.equal(model.vision.pos_embed, before) and model.vision.pos_embed.grad is None
    held = {id(p) for group in opt.param_groups for p in group["params"]}
    assert {n for n, p in model.named_parameters() if id(p) not in held} == {"vision.pos_embed"}
    assert "pixels.position" not in model.state_dict() and "position" not in dict(model.pixels.named_parameters())


def test_the_kept_number_is_rounded_not_cut():
    assert mug.MUG(config(image_size=224, patch=16)).n_keep == 49
    assert mug.MUG(config(image_size=40, patch=4, mask_ratio=0.9)).n_keep == 10  # int(100 * (1 - 0.9)) is 9


def test_each_image_of_each_step_loses_another_random_three_quarters():
    """What reaches the encoder, over 200 steps of 64 images."""
    model, cfg, seen = mug.MUG(config(depth=0, **PIXELS)), config(batch=64), []
    model.vision.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    _, _, tokens, valid = rows(64)
    for step in range(200):
        model(torch.zeros(64, 3, 32, 32), common.row_noise(cfg, step, 16), tokens, valid)
    shown = torch.stack([F.one_hot(ids, 16).sum(1) for ids in seen])                             # (steps, images, patches)
    assert shown.max() == 1 and shown.sum(2).eq(4).all()
    removed = 1 - shown.flatten(0, 1).double().mean(0)
    assert ((removed > 0.735) & (removed < 0.765)).all()     # 12,800 draws: four standard deviations
    assert len(shown[0].unique(dim=0)) > 40 and not torch.equal(shown[0], shown[1])


def test_without_masking_the_shuffled_encoder_is_the_plain_vit():
    model, seen = build(mask_ratio=0.0, **CAPTION), []
    images, noise, tokens, valid = rows()
    model.vision.register_forward_hook(lambda module, args, out: seen.append(out))
    model(images, noise, tokens, valid)
    plain, back = model.vision(images), noise.argsort(1).argsort(1)[..., None].expand(-1, -1, 16)
    torch.testing.assert_close(seen[0][:, 0], plain[:, 0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(seen[0][:, 1:].gather(1, back), plain[:, 1:], rtol=1e-11, atol=1e-12)
    assert (seen[0] - plain).abs().max() > 0.01              # not without putting it back in order


# ---- pixels ----

def test_only_removed_patches_teach(monkeypatch):
    model, batch, seen = build(**PIXELS), rows(), []
    model.pixels.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.append(out))[0])
    loss, visible = model(*batch)[0], kept(model, batch[1])
    loss.sum().backward()
    assert seen[0].grad[visible].eq(0).all() and seen[0].grad[~visible].ne(0).all()
    plain = common.normalised
    for where, same in ((visible, True), (~visible, False)):
        monkeypatch.setattr(mug, "normalised", lambda patches: (plain(patches)[0] + where[..., None], *plain(patches)[1:]))
        assert torch.equal(model(*batch)[0], loss) == same


def test_the_encoder_never_sees_what_was_removed(monkeypatch):
    """Neither loss depends on removed pixels but as a target, which is held still here; both depend on every visible patch."""
    model, (images, noise, tokens, valid), plain = build(), rows(), common.normalised
    monkeypatch.setattr(mug, "normalised", lambda patches: [part.detach() for part in plain(patches)])
    leaf, visible = torch.randn(3, 3, 32, 32, dtype=torch.float64, requires_grad=True), kept(model, noise)
    for loss in model(leaf, noise, tokens, valid):
        grad = model.vision.patches(torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0])
        assert grad[~visible].eq(0).all() and grad[visible].ne(0).any(1).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_heads_that_say_nothing_cost_what_a_guess_costs(autocast):
    """0 for normalised pixels: their biased variance, (D - 1) / D. Equal logits: ln V a token, in float32 also where products are not."""
    model, batch = mug.MUG(config()), rows()
    for p in (*model.pixels.pred.parameters(), *model.caption.head.parameters()):
        p.data.zero_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pixels, captions = model(*batch)
        score = model.score(batch[0], *batch[2:])
    assert pixels.tolist() == pytest.approx([191 / 192] * 3, abs=1e-4)
    assert captions.tolist() == pytest.approx([n * math.log(300) for n in (3, 4, 5)], rel=1e-6)
    assert score.tolist() == pytest.approx([-math.log(300)] * 3, rel=1e-6)       # a mean: long captions score no worse


@pytest.mark.parametrize("dim", [16, 128])
def test_fresh_predictions_have_the_variance_of_xavier(dim):
    # unit inputs of width d into D = 192 outputs: variance 2d / (d + D), on top of the target's own 1
    images, noise, tokens, valid = rows(16)
    assert build(0, pixel_dim=dim, **PIXELS)(images, noise, tokens, valid)[0].mean().item() == pytest.approx(1 + 2 * dim / (dim + 192), rel=0.1)


def test_flat_patches_are_a_target_of_zero():
    model, (_, *rest) = build(**PIXELS), rows()
    batch = torch.full((3, 3, 32, 32), 0.3, dtype=torch.float64), *rest          # one value in all channels, after normalisation
    assert all(grad.isfinite().all() for grad in gradients(model, batch).values())
    for p in model.pixels.pred.parameters():
        p.data.zero_()
    assert model(*batch)[0].abs().max() < 1e-12


def test_a_perfect_prediction_pasted_back_is_the_image(monkeypatch):
    model, (images, noise, *_) = build(**PIXELS), rows()
    monkeypatch.setattr(model.pixels, "forward", lambda latent, restore: common.normalised(model.vision.patches(images))[0])
    whole, masked, pasted = model.reconstruct(images, noise)
    torch.testing.assert_close(whole, images / 255.0, check_dtype=False, rtol=0, atol=1e-7)
    torch.testing.assert_close(pasted, whole, rtol=1e-12, atol=1e-12)
    visible, masked, whole = kept(model, noise), model.vision.patches(masked), model.vision.patches(whole)
    assert torch.equal(masked[visible], whole[visible])
    assert masked[~visible].view(-1, 3, 64).std(2).max() < 1e-12                 # one grey


def mae(model, cfg, images, noise):
    """MAE's loss told anew, in numpy, image by image; patches in order of place, not of noise; attention head by head."""
    s, n_keep = {k: v.numpy() for k, v in model.state_dict().items()}, model.n_keep
    grid, p, erf = cfg.image_size // cfg.patch, cfg.patch, np.vectorize(math.erf)

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(1, keepdims=True)
        return x / np.sqrt((x ** 2).mean(1, keepdims=True) + 1e-6) * s[f"{name}.weight"] + s[f"{name}.bias"]

    def transformer(x, name, depth, heads):
        for b in (f"{name}blocks.{i}" for i in range(depth)):
            q, k, v = np.split(linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv"), 3, 1)
            parts = []
            for h in np.split(np.arange(x.shape[1]), heads):
                weight = np.exp(q[:, h] @ k[:, h].T / math.sqrt(len(h)))
                parts.append(weight / weight.sum(1, keepdims=True) @ v[:, h])
            x = x + linear(np.concatenate(parts, 1), f"{b}.attn.proj")
            hidden = linear(norm(x, f"{b}.norm2"), f"{b}.mlp.fc1")
            x = x + linear(hidden * (1 + erf(hidden / math.sqrt(2))) / 2, f"{b}.mlp.fc2")
        return norm(x, f"{name}norm")

    def position(place, dim):
        angles = [at / 10000 ** (np.arange(dim // 4) / (dim / 4)) for at in (place % grid, place // grid)]
        return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)]).astype(np.float32)

    losses = []
    mean, std = (np.array(v, np.float32).astype(float)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for image, chance in zip((images.numpy() / 255 - mean) / std, noise.numpy()):
        patches = [image[:, i * p:i * p + p, j * p:j * p + p] for i in range(grid) for j in range(grid)]
        visible = [n for n in range(grid ** 2) if (chance < chance[n]).sum() < n_keep]
        x = [np.einsum("chw,dchw->d", patches[n], s["vision.patch_embed.proj.weight"]) + s["vision.patch_embed.proj.bias"] + position(n, cfg.dim)
             for n in visible]
        latent = linear(transformer(np.stack([s["vision.cls_token"][0, 0], *x]), "vision.", cfg.depth, cfg.heads), "pixels.embed")
        tokens = [latent[1 + visible.index(n)] if n in visible else s["pixels.mask_token"][0, 0] for n in range(grid ** 2)]
        x = np.stack([latent[0]] + [t + position(n, cfg.pixel_dim) for n, t in enumerate(tokens)])
        pred = linear(transformer(x, "pixels.", cfg.pixel_depth, cfg.pixel_heads), "pixels.pred")[1:]
        targets = [(x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-6) for x in patches]
        losses.append(np.mean([(pred[n] - targets[n].ravel()) ** 2 for n in range(grid ** 2) if n not in visible]))
    return losses


def test_without_caption_loss_it_is_mae():
    changes = dict(pixel_dim=24, pixel_depth=2, **PIXELS)
    model, (images, noise, tokens, valid) = build(**changes), rows()
    pixels, captions = model(images, noise, tokens, valid)
    assert pixels.tolist() == pytest.approx(mae(model, config(**changes), images, noise), rel=1e-9) and captions.eq(0).all()


@pytest.mark.parametrize("alone,weights,gone", [(PIXELS, (1.0, 0.0), "caption."), (CAPTION, (0.0, 1.0), "pixels.")])
def test_a_weight_of_zero_leaves_the_other_loss_exactly_and_no_decoder(alone, weights, gone):
    joint, single, batch = build(), build(**alone), rows()
    assert not any(name.startswith(gone) for name in single.state_dict())        # AdamW would shrink what gets a zero gradient
    assert not single.load_state_dict(joint.state_dict(), strict=False).missing_keys
    assert objective(single, batch).item() == objective(joint, batch, *weights).item()
    ours, theirs = gradients(single, batch), gradients(joint, batch, *weights)
    same_gradients(ours, theirs, exact=True)
    assert ours.keys() == {name for name in theirs if not name.startswith(gone)}
    assert all(grad.abs().max() > 0 for grad in ours.values())                   # the encoder's among them
    assert all(grad.eq(0).all() for name, grad in theirs.items() if name.startswith(gone))


# ---- captions ----

@pytest.fixture(scope="module")
def captioner():
    """Twelve words and large weights: its captions differ from image to image and end at many lengths."""
    return build(scale=1.0, vocab_size=12, cross_depth=2, **CAPTION).requires_grad_(False)


def test_a_token_changes_no_logits_before_its_own(captioner):
    images, _, tokens, _ = rows(vocab_size=12)
    latent = captioner.vision(images)
    plain = captioner.caption(tokens, latent)
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 12
        differs = (captioner.caption(changed, latent) != plain).any(2)
        assert not differs[:, :t].any() and differs[:, t].all()


def test_padding_changes_nothing(captioner):
    images, noise, tokens, valid = rows(vocab_size=12)
    shown, latent = captioner(images, noise, tokens, valid)[1], captioner.vision(images)
    assert torch.equal(captioner(images, noise, tokens.where(valid, 9), valid)[1], shown)        # nor what stands there
    for length in (9, 10, 11):                               # the longest caption has six tokens
        torch.testing.assert_close(captioner(images, noise, tokens[:, :length], valid[:, :length])[1], shown, rtol=1e-13, atol=0)
        logits = captioner.caption(tokens[:, :length], latent)
        torch.testing.assert_close(logits, captioner.caption(tokens, latent)[:, :length], rtol=1e-12, atol=1e-13)


def test_a_caption_depends_on_the_image_but_not_on_the_order_of_its_tokens(captioner):
    images, _, tokens, _ = rows(vocab_size=12)
    latent = captioner.vision(images)
    logits = captioner.caption(tokens, latent)
    torch.testing.assert_close(captioner.caption(tokens, latent[:, torch.randperm(17)]), logits, rtol=1e-12, atol=1e-13)
    assert (captioner.caption(tokens, latent.roll(1, 0)) - logits).abs().amax((1, 2)).min() > 1e-3


def greedy(model, images, length):
    """Every caption anew from its beginning for every token, row by row. -> ids, logits of the steps."""
    found, logits = torch.full((len(images), length), Tokenizer.PAD), [[] for _ in images]
    for row, latent in enumerate(model.vision(images)):
        ids = [Tokenizer.BOS]
        while len(ids) <= length and ids[-1] != Tokenizer.EOS:
            logits[row].append(model.caption(torch.tensor([ids]), latent[None])[0, -1])
            ids.append(logits[row][-1].argmax().item())
        found[row, :len(ids) - 1] = torch.tensor(ids[1:])
    return found, logits


def test_generation_with_kept_keys_and_values_is_generation_anew(captioner):
    """And each row ends for itself, whatever its neighbours do; the loop ends with the longest; the second time is as the first."""
    images, (want, logits) = rows(16)[0], greedy(captioner, rows(16)[0], 11)
    lengths, steps = torch.tensor([len(row) for row in logits]), []
    hook = captioner.caption.head.register_forward_hook(lambda module, args, out: steps.append(out[:, 0]))
    assert torch.equal(captioner.generate(images), want) and len(lengths.unique()) > 4
    for row, at in ((row, at) for row in range(16) for at in range(lengths[row])):
        torch.testing.assert_close(steps[at][row], logits[row][at], rtol=1e-11, atol=1e-12)
    steps.clear()
    early = lengths < 11
    assert torch.equal(captioner.generate(images[early]), want[early]) and len(steps) == lengths[early].max() < 11
    hook.remove()
    assert torch.equal(captioner.generate(images), want)
    assert all(torch.equal(captioner.generate(images[i:i + 1])[0], want[i]) for i in range(16))
    forced = captioner.caption(F.pad(want, (1, 0), value=Tokenizer.BOS)[:, :-1], captioner.vision(images)).argmax(2)
    assert torch.equal(forced.where(torch.arange(11) < lengths[:, None], Tokenizer.PAD), want)   # a teacher's words choose themselves again


@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_eight_pairs_are_learned_by_heart_and_told_from_whole_images(ratio):
    torch.manual_seed(0)
    model = mug.MUG(config(mask_ratio=ratio, dim=32, text_dim=32, **CAPTION))
    images, _, tokens, valid = rows(8)
    opt, step, loss = torch.optim.AdamW(model.parameters(), lr=2e-3), 0, torch.tensor(9.0)
    while loss > 0.01 and step < 1000:
        loss, step = objective(model, (images, torch.rand(8, 16), tokens, valid)), step + 1
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < 0.01
    assert torch.equal(model.generate(images), tokens[:, 1:])
    assert (model.score(images, tokens, valid) > model.score(images.roll(1, 0), tokens, valid) + 1).all()


# ---- both ----

def test_gradients_are_additive_in_the_weights():
    model, batch = build(), rows()
    both, pixels, captions = (gradients(model, batch, *weights) for weights in ((0.3, 1.7), (1.0, 0.0), (0.0, 1.0)))
    same_gradients(both, {name: 0.3 * pixels[name] + 1.7 * captions[name] for name in both})


def test_one_encoder_pass_on_the_visible_tokens_serves_both_losses():
    model, seen = build(), []
    model.vision.blocks[0].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model(*rows())
    assert seen == [(3, 1 + 4, 16)]


def test_the_encoder_alone_is_a_plain_vit():
    model, plain, images = build(), ViT(32, 8, 16, 2, 2).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain.load_state_dict(model.vision.state_dict())         # strict: nothing is missing, nothing left over
    assert torch.equal(plain(images), model.vision(images))
    torch.testing.assert_close(model.encode_image(images), F.normalize(plain(images)[:, 1:].mean(1), dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("changes,micro", [({}, 1), ({}, 2), (dict(grad_checkpoint=True), 0)])
def test_recomputing_changes_no_gradient(changes, micro):
    model, batch, calls = build(**changes), rows(4), []
    for block in (model.vision.blocks[0], model.pixels.blocks[0], model.caption.text.blocks[0], model.caption.blocks[0]):
        block.register_forward_pre_hook(lambda module, args: calls.append(id(module)))
    same_gradients(gradients(model, batch, 1.0, 1.0, micro), gradients(build(), batch))
    assert [calls.count(c) for c in dict.fromkeys(calls)] == [2 * (4 // micro if micro else 1)] * 4   # recomputed, and in every part


@pytest.mark.parametrize("changes,told", [
    (dict(mask_ratio=1.0), "--mask-ratio 1.0 of 16"), (dict(mask_ratio=0.0), "--recon-weight 0 does without"),
    (dict(recon_weight=0.0, cap_weight=0.0), "nothing to learn"), (dict(dim=18, heads=4), "18.*4 heads"),
    (dict(pixel_dim=20, pixel_heads=8), "20.*8 heads"), (dict(text_dim=18, text_heads=4), "18.*4 heads")])
def test_what_cannot_be_trained_is_refused_with_its_value(changes, told):
    with pytest.raises(UserError, match=told):
        mug.MUG(config(**changes))


# ---- whole runs ----

run = partial(conftest.run, mug.main)


@pytest.fixture(scope="module")
def whole(tiny_world, tmp_path_factory):
    """Twenty steps in one process: what they logged and saved, and their noise. The context is long enough for captions to differ in length."""
    cfg = config(data=[f"{tiny_world}/pairs"], out=str(tmp_path_factory.mktemp("mug") / "run"), context=40, depth=1, recon_weight=2.0, cap_weight=0.5)
    noise, forward = [], mug.MUG.forward
    with pytest.MonkeyPatch.context() as m:
        m.setattr(mug.MUG, "forward", lambda *args: (noise.append(args[2]), forward(*args))[1])
        return cfg, *run(cfg)[:2], noise


def test_the_logged_loss_is_weighted_and_the_rate_peaks_after_warm_up(whole):
    _, log, _, _ = whole
    assert [r["lr"] for r in log[:3]] == pytest.approx([0, 0.05 * 16 / 256, 0.1 * 16 / 256]) and max(r["lr"] for r in log) == log[2]["lr"]
    assert mug.Config().lr * mug.Config().batch / 256 == pytest.approx(2.4e-3)   # MAE's, at its batch
    for r in log:
        assert r["loss"] == pytest.approx(2 * r["pixels"] + 0.5 * r["caption"], rel=1e-5)
    assert log[-1]["caption"] < log[0]["caption"] - 0.5


def test_no_image_of_a_run_gets_a_mask_twice(whole):
    assert len(torch.cat(whole[3]).unique(dim=0)) == 20 * 16


def test_stopped_and_resumed_is_bitwise_the_run_without_a_stop(whole, monkeypatch):
    cfg, log, saved, _ = whole
    conftest.resumes_bitwise(mug.main, cfg, log, saved, (*TERMS, "lr", "grad_norm"), monkeypatch)


def first_step(cfg, naive=False):
    """Gradients of the first step, caught where the optimiser would use them; noise and caption lengths of this rank's rows.
    naive: as if all ranks had as many tokens as this one."""
    seen, forward, total = [], mug.MUG.forward, common.total
    mug.MUG.forward = lambda *args: (seen.extend([args[2], args[4][:, 1:].sum(1)]), forward(*args))[1]
    if naive:
        common.total = lambda count: count * common.world()
    try:
        caught = conftest.first_step(mug.main, cfg)
    finally:
        mug.MUG.forward, common.total = forward, total
    return caught, *seen


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_captions_of_unequal_length_are_one_run(whole, pools, world):
    cfg, log, _, (noise, *_) = whole
    (alone, *_), found = first_step(cfg), pools(world)(first_step, cfg)
    assert torch.equal(torch.cat([part for _, part, _ in found]), noise)         # each rank its own masks, together those of one process
    assert all(far(theirs, alone) < 1e-5 for theirs, _, _ in found)
    assert len({lengths.sum().item() for _, _, lengths in found}) > 1
    assert far(pools(world)(first_step, cfg, True)[0][0], alone) > 1e-3          # so a mean of the ranks' means would have been noticed
    theirs, _, _ = pools(world)(run, replace(cfg, out=f"{cfg.out}-{world}"))[0]
    for a, b in zip(log, theirs, strict=True):
        assert [b[k] for k in TERMS] == pytest.approx([a[k] for k in TERMS], rel=1e-4)
