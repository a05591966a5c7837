"""common.py: the models against references written anew, the schedule, the command line, checkpoints, the log, and runs of align.py that
are stopped, killed and resumed."""
import contextlib, dataclasses, inspect, json, math, os, pickle, re, shutil, signal, zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import align
import common
import data
import eval as evaluation
from common import UserError, ViT, parse


SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_handler_and_no_progress_bar_of_a_killed_run():
    handlers = [signal.getsignal(s) for s in SIGNALS]
    yield
    for bar in list(tqdm._instances):
        bar.close()
    for s, handler in zip(SIGNALS, handlers):
        signal.signal(s, handler)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def stirred(module, seed=0, scale=0.2):
    """The module in float64 with every parameter random: zero biases and unit gains hide mistakes."""
    g = seeded(seed)
    module = module.double()
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * scale + (p.ndim == 1) * 0.3
    return module


# -- ViT: names and shapes --

VIT_B = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,),
         "norm.weight": (768,), "norm.bias": (768,)}
for i in range(12):
    for name, shape in {"norm1.weight": (768,), "norm1.bias": (768,), "attn.qkv.weight": (2304, 768), "attn.qkv.bias": (2304,),
                        "attn.proj.weight": (768, 768), "attn.proj.bias": (768,), "norm2.weight": (768,), "norm2.bias": (768,),
                        "mlp.fc1.weight": (3072, 768), "mlp.fc1.bias": (3072,), "mlp.fc2.weight": (768, 3072), "mlp.fc2.bias": (768,)}.items():
        VIT_B[f"blocks.{i}.{name}"] = shape


def test_vit_b_has_exactly_the_150_names_and_shapes_of_timm():
    with torch.device("meta"):
        found = ViT(224, 16, *common.SIZES["b"]).state_dict()
    assert len(VIT_B) == 150
    assert {name: tuple(t.shape) for name, t in found.items()} == VIT_B


def test_without_class_token_one_name_and_one_row_of_positions_are_gone():
    with torch.device("meta"):
        found = ViT(224, 16, *common.SIZES["b"], cls=False).state_dict()
    want = {**VIT_B, "pos_embed": (1, 196, 768)}
    del want["cls_token"]
    assert {name: tuple(t.shape) for name, t in found.items()} == want


@pytest.mark.parametrize("size,patch,with_head", [("ti", 16, 5_717_416), ("s", 16, 22_050_664), ("b", 16, 86_567_656), ("b", 32, 88_224_232),
                                                  ("l", 16, 304_326_632), ("h", 14, 632_045_800)])
def test_parameter_counts_are_those_of_timm_less_the_head(size, patch, with_head):
    width = common.SIZES[size][0]
    with torch.device("meta"):
        model = ViT(224, patch, *common.SIZES[size])
    assert sum(p.numel() for p in model.parameters()) == with_head - 1000 * (width + 1)


# -- ViT: numbers --

def layer_norm(x, state, name):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_block(x, state, i, heads):
    """One pre-norm block, head by head, from formats 10.1: qkv rows are all of q, then k, then v; inside each head by head."""
    name, width = f"blocks.{i}.", x.shape[-1]
    d, h = width // heads, layer_norm(x, state, f"blocks.{i}.norm1")
    weight, bias, parts = state[name + "attn.qkv.weight"], state[name + "attn.qkv.bias"], []
    for head in range(heads):
        q, k, v = (h @ weight[s:s + d].T + bias[s:s + d] for s in (head * d, width + head * d, 2 * width + head * d))
        scores = torch.einsum("bid,bjd->bij", q, k) / math.sqrt(d)
        share = scores.exp() / scores.exp().sum(-1, keepdim=True)
        parts.append(torch.einsum("bij,bjd->bid", share, v))
    x = x + torch.cat(parts, -1) @ state[name + "attn.proj.weight"].T + state[name + "attn.proj.bias"]
    h = layer_norm(x, state, f"blocks.{i}.norm2") @ state[name + "mlp.fc1.weight"].T + state[name + "mlp.fc1.bias"]
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))          # exact GELU
    return x + h @ state[name + "mlp.fc2.weight"].T + state[name + "mlp.fc2.bias"]


def plain_vit(state, images, patch, heads, keep=None):
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch).flatten(2).transpose(1, 2)
    x = x + state["pos_embed"][:, -x.shape[1]:]
    if keep is not None:
        x = torch.stack([row[ids] for row, ids in zip(x, keep)])
    if "cls_token" in state:
        first = state["cls_token"] + state["pos_embed"][:, :1]
        x = torch.cat([first.repeat(len(x), 1, 1), x], 1)
    for i in range(sum(name.endswith("norm1.bias") for name in state)):
        x = plain_block(x, state, i, heads)
    return layer_norm(x, state, "norm")


@pytest.fixture(scope="module")
def vit():
    return stirred(ViT(12, 4, 8, 3, 2)).requires_grad_(False), torch.randn(2, 3, 12, 12, generator=seeded(1), dtype=torch.float64)


def test_vit_equals_convolution_and_attention_written_head_by_head(vit):
    model, images = vit
    torch.testing.assert_close(model(images), plain_vit(model.state_dict(), images, 4, 2), rtol=1e-10, atol=1e-11)


def test_vit_without_class_token_equals_the_same_reference():
    model, images = stirred(ViT(8, 4, 8, 2, 4, cls=False)), torch.randn(2, 3, 8, 8, generator=seeded(2), dtype=torch.float64)
    found = model(images)
    assert found.shape[1] == 4                               # patches alone: one row less
    torch.testing.assert_close(found, plain_vit(model.state_dict(), images, 4, 4), rtol=1e-10, atol=1e-11)


def test_bytes_are_normalised_channel_by_channel():
    model = stirred(ViT(8, 4, 8, 1, 2, mean=(0.1, 0.4, 0.7), std=(0.2, 0.3, 0.5)))
    model.mean, model.std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.1, 0.4, 0.7), (0.2, 0.3, 0.5)))
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=seeded(3), dtype=torch.uint8)
    by_hand = torch.stack([(images[:, c].double() / 255 - m) / s for c, (m, s) in enumerate(zip((0.1, 0.4, 0.7), (0.2, 0.3, 0.5)))], 1)
    torch.testing.assert_close(model(images), model(by_hand), rtol=1e-12, atol=1e-12)


def test_keeping_all_patches_in_order_changes_nothing(vit):
    model, images = vit
    assert torch.equal(model(images, ids_keep=torch.arange(9).repeat(2, 1)), model(images))


def test_kept_patches_run_as_if_the_others_had_never_been(vit):
    model, images = vit
    keep = torch.tensor([[7, 0, 4], [2, 8, 3]])
    torch.testing.assert_close(model(images, ids_keep=keep), plain_vit(model.state_dict(), images, 4, 2, keep), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_tap_and_upto_give_the_tokens_between_blocks(vit, k):
    model, images = vit
    seen = []
    hooks = [b.register_forward_hook(lambda m, args, out: seen.extend([args[0], out] if not seen else [out])) for b in model.blocks]
    plain = model(images)
    for hook in hooks:
        hook.remove()
    final, tapped = model(images, tap=k)
    assert torch.equal(tapped, seen[k]) and torch.equal(final, plain)
    assert torch.equal(model(images, upto=k), seen[k])


@pytest.mark.parametrize("grid,dim", [(3, 16), (14, 192)])
def test_fixed_positions_are_those_of_mae(grid, dim):
    # get_2d_sincos_pos_embed, told anew: of meshgrid(w, h) the column comes first; sin then cos in each half; a zero row for the class token
    want = np.zeros((1 + grid * grid, dim))
    for row in range(grid):
        for column in range(grid):
            for half, place in ((0, column), (1, row)):
                for i in range(dim // 4):
                    angle = place / 10000 ** (i / (dim / 4))
                    want[1 + row * grid + column, half * dim // 2 + i] = math.sin(angle)
                    want[1 + row * grid + column, half * dim // 2 + dim // 4 + i] = math.cos(angle)
    model = ViT(4 * grid, 4, dim, 0, 2, fixed=True)
    torch.testing.assert_close(model.pos_embed.detach()[0].double(), torch.from_numpy(want), rtol=0, atol=1e-6)
    assert not model.pos_embed.requires_grad


def test_fixed_positions_get_no_gradient_and_everything_else_does():
    model = ViT(8, 4, 8, 1, 2, fixed=True)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["pos_embed"]


def test_an_image_size_that_patches_do_not_fill_is_refused_with_one_that_they_do():
    with pytest.raises(UserError, match="--image-size 50.*--patch 16.*48"):
        ViT(50, 16, 8, 1, 2)


def test_recomputing_blocks_leaves_the_gradients_as_they_are():
    grads = []
    for recompute in (False, True):
        model = stirred(ViT(8, 4, 8, 2, 2))
        model.recompute = recompute
        model(torch.randn(2, 3, 8, 8, generator=seeded(4), dtype=torch.float64)).pow(3).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_recomputing_really_runs_every_block_twice():
    model, calls = ViT(8, 4, 8, 3, 2), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.recompute = True
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert len(calls) == 6


# -- Block and attention --

@pytest.mark.parametrize("kind", ["none", "causal", "bool"])
def test_block_equals_torchs_encoder_layer(kind):
    block, x = stirred(common.Block(12, 3)), torch.randn(2, 7, 12, generator=seeded(5), dtype=torch.float64)
    layer = nn.TransformerEncoderLayer(12, 3, 48, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True).double()
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.",
             "norm1.": "norm1.", "norm2.": "norm2."}
    own = block.state_dict()
    layer.load_state_dict({theirs + s: own[ours + s] for theirs, ours in names.items() for s in ("weight", "bias")})
    may = torch.ones(7, 7, dtype=torch.bool) if kind == "none" else torch.ones(7, 7).tril().bool() if kind == "causal" else (
        torch.rand(7, 7, generator=seeded(6)) < 0.5) | torch.eye(7, dtype=torch.bool)
    found = block(x, may if kind == "bool" else None, kind == "causal")
    torch.testing.assert_close(found, layer(x, src_mask=~may), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("lengths", [(9, 9), (5, 9)])
@pytest.mark.parametrize("kind", ["none", "causal", "bool"])
def test_bf16_attention_on_cpu_is_float32_attention_rounded(kind, lengths):
    g, (long, wide) = seeded(7), lengths
    q, k, v = (torch.randn(2, 3, n, 16, generator=g).bfloat16() for n in (long, wide, wide))
    mask = (torch.rand(2, 1, long, wide, generator=g) < 0.5) | (torch.arange(wide) == 0) if kind == "bool" else None
    found = common.attention(q, k, v, mask, causal=kind == "causal")
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=kind == "causal")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), want, rtol=0.02, atol=0.02)        # bf16 keeps 8 bits


def test_bf16_attention_on_cpu_has_the_gradients_of_float32():
    g = seeded(8)
    plain = [torch.randn(2, 2, 6, 8, generator=g).bfloat16() for _ in range(3)]
    grads = []
    for dtype in (torch.bfloat16, torch.float32):
        rows = [t.to(dtype, copy=True).requires_grad_() for t in plain]
        common.attention(*rows, causal=True).float().pow(2).sum().backward()
        grads.append(torch.cat([r.grad.float().flatten() for r in rows]))
    assert F.cosine_similarity(*grads, dim=0) > 0.999


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_block_mask_means_what_the_same_bool_mask_means():
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="this torch has no FlexAttention")
    document = torch.arange(128) // 40                       # packed documents, each causal
    rule = lambda b, h, i, j: (document[i] == document[j]) & (i >= j)
    q, k, v = (torch.randn(1, 2, 128, 16, generator=g) for g in map(seeded, (9, 10, 11)))
    found = common.attention(q, k, v, flex.create_block_mask(rule, None, None, 128, 128, device="cpu"))
    i, j = torch.arange(128)[:, None], torch.arange(128)
    torch.testing.assert_close(found, common.attention(q, k, v, rule(0, 0, i, j)), rtol=1e-4, atol=1e-5)


# -- text transformer --

def text_model(causal):
    return stirred(common.TextTransformer(20, 12, 8, 2, 2, causal)).requires_grad_(False)


def padded(tokens, length, pad=0):
    return torch.tensor([tokens + [pad] * (length - len(tokens))]), torch.tensor([[True] * len(tokens) + [False] * (length - len(tokens))])


@pytest.mark.parametrize("causal", [False, True])
def test_neither_the_amount_of_padding_nor_the_ids_in_it_matter(causal):
    model, tokens = text_model(causal), [3, 9, 4, 17, 5]
    want = model(*padded(tokens, 5))
    for length, pad in ((8, 0), (12, 0), (12, 19)):
        torch.testing.assert_close(model(*padded(tokens, length, pad))[:, :5], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_a_later_token_is_seen_by_an_earlier_one_only_without_causal_mask(causal):
    model = text_model(causal)
    a, b = (model(*padded(tokens, 6)) for tokens in ([3, 9, 4, 17, 5], [3, 9, 4, 11, 5]))
    assert torch.equal(a[:, :3], b[:, :3]) == causal         # before the changed one
    assert not torch.allclose(a[:, 3:5], b[:, 3:5])          # itself and after


@pytest.mark.parametrize("causal", [False, True])
def test_the_order_of_words_matters(causal):
    model = text_model(causal)
    assert not torch.allclose(model(*padded([3, 9, 4], 3))[:, 2], model(*padded([9, 3, 4], 3))[:, 2])


# -- chunks, unit --

@pytest.mark.parametrize("micro", [1, 3, 4, 10, 11])
def test_chunks_give_the_values_and_gradients_of_the_whole(micro):
    layer = nn.Linear(4, 3).double()
    rows = torch.randn(10, 4, generator=seeded(12), dtype=torch.float64), torch.randn(10, 3, generator=seeded(13), dtype=torch.float64)
    results, sizes = [], []

    def fn(x, y):
        sizes.append(len(x))
        return layer(x).tanh() * y, (layer(x) + y).square().sum(1)
    for m in (0, micro):
        layer.zero_grad()
        x = rows[0].clone().requires_grad_()
        sizes.clear()
        a, b = common.in_chunks(fn, m, x, rows[1])
        (a.sum() ** 2 + (b * torch.arange(10)).sum()).backward()
        results.append((a, b, x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    assert max(sizes) <= micro
    for want, found in zip(*results):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_unit_of_three_four_is_three_fifths_four_fifths_and_half_precision_rises():
    assert common.unit(torch.tensor([[3.0, 4.0]], dtype=torch.float64)).tolist() == [[0.6, 0.8]]
    assert common.unit(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert common.unit(torch.ones(1, 3, dtype=torch.float64)).dtype == torch.float64


# -- schedule --

def lr(step, steps, warmup, schedule="linear"):
    return common.lr_at(step, SimpleNamespace(steps=steps, warmup=warmup, schedule=schedule), 2.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_starts_at_0_peaks_at_the_end_of_warm_up_and_ends_at_0(schedule):
    assert [lr(s, 1000, 100, schedule) for s in (0, 100)] == [0, 2]
    assert lr(1000, 1000, 100, schedule) == pytest.approx(0, abs=1e-12)
    found = [lr(s, 1000, 100, schedule) for s in range(1001)]
    assert max(found) == found[100] and found[:101] == sorted(found[:101]) and found[100:] == sorted(found[100:], reverse=True)


def test_linear_is_a_straight_line_on_both_sides():
    assert [lr(s, 1000, 100) for s in (25, 50, 75)] == pytest.approx([0.5, 1.0, 1.5])
    assert [lr(s, 1000, 100) for s in (325, 550, 775)] == pytest.approx([1.5, 1.0, 0.5])


def test_cosine_is_at_half_half_way_and_at_three_quarters_after_a_third():
    assert lr(550, 1000, 100, "cosine") == pytest.approx(1.0)
    assert lr(400, 1000, 100, "cosine") == pytest.approx(1.5)         # (1 + cos 60 degrees) / 2


def test_a_ranks_cores_are_its_share_of_those_lent_and_never_none(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 6, 7}, raising=False)
    assert common.cores() == 6                               # not the 64 of the machine
    for ranks, share in ((1, 6), (4, 1), (3, 2), (8, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert common.cores() == share
    monkeypatch.delattr(os, "sched_getaffinity")             # macOS
    assert common.cores() == 8


def test_warm_up_takes_at_most_a_tenth_of_the_run():
    assert lr(20, 200, 10_000) == 2 and lr(10, 200, 10_000) == 1


@pytest.mark.parametrize("steps", range(1, 10))
def test_a_run_of_a_few_steps_has_no_warm_up_and_no_division_by_zero(steps):
    assert [lr(s, steps, 50) for s in range(steps)] == pytest.approx([2 * (1 - s / steps) for s in range(steps)])


# -- randomness --

def test_no_two_of_many_seeds_and_steps_share_their_numbers():
    drawn = {tuple(torch.rand(2, generator=common.generator(*key), dtype=torch.float64).tolist()) for key in np.ndindex(20, 50)}
    assert len(drawn) == 1000
    assert common.generator(1, 2).initial_seed() != common.generator(2, 1).initial_seed()


def test_row_noise_is_the_same_for_the_same_seed_and_step_whatever_was_drawn_before():
    a = common.row_noise(SimpleNamespace(batch=4, seed=3), 7, 5)
    torch.rand(100)
    torch.manual_seed(99)
    assert torch.equal(common.row_noise(SimpleNamespace(batch=4, seed=3), 7, 5), a)
    assert not torch.equal(common.row_noise(SimpleNamespace(batch=4, seed=3), 8, 5), a)
    assert not torch.equal(common.row_noise(SimpleNamespace(batch=4, seed=4), 7, 5), a)


@pytest.mark.parametrize("world", [2, 4])
def test_row_noise_of_all_ranks_in_order_is_that_of_one_rank(world, monkeypatch):
    cfg = SimpleNamespace(batch=8, seed=5)
    whole, parts = common.row_noise(cfg, 3, 2, 3), []
    monkeypatch.setattr(common, "world", lambda: world)
    for r in range(world):
        monkeypatch.setattr(common, "rank", lambda: r)
        parts.append(common.row_noise(cfg, 3, 2, 3))
    assert {len(p) for p in parts} == {8 // world} and torch.equal(torch.cat(parts), whole)


def test_a_single_rank_averages_to_what_it_has():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    a.grad = torch.tensor([1.0, -2.0, 3.0])
    common.average_gradients([a, b])
    assert a.grad.tolist() == [1, -2, 3] and b.grad is None
    with common.averaging([a, b]):
        assert not a._post_accumulate_grad_hooks             # nobody to average with: nothing is hooked
        (2 * b).sum().backward()
    assert a.grad.tolist() == [1, -2, 3] and b.grad.tolist() == [2, 2]


@pytest.mark.parametrize("precision,want", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_decides_in_what_products_are_made(precision, want):
    with common.autocast(SimpleNamespace(precision=precision), torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == want


# -- command line --

FIELDS = {f.name: f for f in dataclasses.fields(align.Config)}


def read(*argv):
    return parse(align.Config, align.DEMO, align.__doc__, list(argv))


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("size", "init")])                # these fill other fields
def test_every_field_has_its_flag_with_hyphens(name):
    flag, kind = "--" + name.replace("_", "-"), FIELDS[name].type
    word = {"schedule": "cosine", "resize": "1.5", "precision": "bf16", "dim": "24", "text_dim": "24", "image_size": "64"}.get(name, {int: "8", float: "0.5"}.get(kind, "x"))
    words, want = ([], True) if kind is bool else (["a", "b"], ["a", "b"]) if kind is list else ([word], kind(word))
    cfg = read(flag, *words, *[] if name == "data" else ["--data", "somewhere"])
    assert getattr(cfg, name) == want and type(getattr(cfg, name)) is kind
    assert {n for n in FIELDS if getattr(cfg, n) != FIELDS[n].default} <= {name, "data"}


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.type is bool])
def test_every_switch_can_be_turned_off(name):
    assert getattr(read("--no-" + name.replace("_", "-"), "--data", "x"), name) is False


def test_without_data_the_demo_stands_between_defaults_and_flags():
    assert read() == align.Config(**align.DEMO)
    assert read("--batch", "32") == align.Config(**{**align.DEMO, "batch": 32})
    assert align.DEMO["batch"] != FIELDS["batch"].default    # or this would show nothing


def test_with_data_the_demo_is_out_of_the_way():
    assert read("--data", "a", "b") == align.Config(data=["a", "b"])


def test_size_fills_what_is_not_given_and_beats_the_demo():
    shape = lambda c: (c.dim, c.depth, c.heads)
    assert shape(read("--size", "s")) == (384, 12, 6)
    assert shape(read("--size", "ti", "--data", "x")) == (192, 12, 3)
    assert shape(read("--size", "s", "--depth", "3")) == (384, 3, 6)
    assert shape(read("--depth", "3", "--dim", "64", "--size", "l")) == (64, 3, 16)


def test_a_negative_number_is_a_value_and_not_a_flag():
    assert read("--eval-every", "-1").eval_every == -1


@pytest.mark.parametrize("argv", [["--lr", "-1"], ["--lr", "-0.5"], ["--steps", "0"], ["--batch", "0"], ["--seed", "-1"], ["--eval-every", "-2"]])
def test_a_number_below_its_range_is_told_with_its_flag(argv):
    with pytest.raises(UserError, match=argv[0]) as told:
        read(*argv)
    assert argv[1] in str(told.value)


def test_the_smallest_numbers_that_mean_something_are_taken():
    cfg = read("--steps", "1", "--batch", "1", "--workers", "0", "--warmup", "0", "--lr", "0", "--micro", "0", "--seed", "0")
    assert (cfg.steps, cfg.batch, cfg.workers, cfg.warmup, cfg.lr, cfg.micro, cfg.seed) == (1, 1, 0, 0, 0, 0, 0)


def test_flags_are_not_guessed_from_their_beginning():
    with pytest.raises(UserError, match="--see"):
        read("--see", "1")


def packed(text):
    return re.sub(r"\s", "", text)


def test_help_tells_each_field_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as ended:
        read("-h")
    shown = packed(capsys.readouterr().out)
    assert ended.value.code == 0 and packed("torchrun --standalone") in shown
    for name, f in FIELDS.items():
        line = next(l for l in inspect.getsource(align.Config).splitlines() if l.startswith(f"    {name}: "))
        assert packed("--" + name.replace("_", "-")) in shown and packed(line.split("#", 1)[1]) in shown, name
        assert packed(f"[{f.default}") in shown, name


@pytest.mark.parametrize("script,words", [(data, ["make", "check", "index", "vocab"]), (evaluation, ["zeroshot", "retrieval", "knn", "--data"])])
def test_help_of_the_other_scripts_names_what_they_do(script, words, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["-h"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(w in shown for w in words)


@pytest.mark.parametrize("error,code", [(UserError("x 1: do y"), 2), (KeyboardInterrupt(), 130), (None, 0)])
def test_guard_ends_with_the_promised_code(error, code, capsys):
    def main():
        if error:
            raise error
    with pytest.raises(SystemExit) as ended:
        common.guard(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == ("error: x 1: do y\n" if code == 2 else "")


# -- checkpoints --

class Tower(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.w = nn.Parameter(torch.full((64, 64), value))


def written(cfg, step, value=None, log=None):
    """A checkpoint whose weights are its step, so that one can tell which was read."""
    os.makedirs(cfg.out, exist_ok=True)
    model = Tower(float(step if value is None else value))
    opt = torch.optim.AdamW(model.parameters())
    model.w.grad = torch.ones_like(model.w)
    opt.step()
    model.w.data.fill_(float(step if value is None else value))
    common.save(cfg, model, opt, step, "the vocabulary", log or SimpleNamespace())
    return model, opt


@pytest.fixture
def cfg(tmp_path):
    return align.Config(out=str(tmp_path / "run"), data=["x"])


def test_a_checkpoint_comes_back_as_it_was_written(cfg):
    log = SimpleNamespace(saved=0)
    model, opt = written(cfg, 5, 1.25, log)
    state = common.resume(cfg, "Tower")
    assert log.saved == 5 and state["method"] == "Tower" and state["vocab"] == "the vocabulary" and state["config"] == dataclasses.asdict(cfg)
    again = Tower()
    other = torch.optim.AdamW(again.parameters())
    assert common.restore(state, again, other) == 5
    assert torch.equal(again.w, model.w)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(other.state[again.w][key], opt.state[model.w][key])


def test_a_new_folder_starts_at_step_0(cfg):
    assert common.resume(cfg, "Tower") is None and common.restore(None, None, None) == 0


def test_prev_is_the_one_before_last(cfg):
    for step in (1, 2, 3):
        written(cfg, step)
    assert sorted(os.listdir(cfg.out)) == ["last.pt", "prev.pt"]
    assert [common.read_checkpoint(f"{cfg.out}/{n}.pt")["step"] for n in ("last", "prev")] == [3, 2]


def flip_a_bit(path):
    with zipfile.ZipFile(path) as z:
        member = max(z.infolist(), key=lambda m: m.file_size)                    # a tensor's bytes, stored as they are
    raw = bytearray(open(path, "rb").read())
    at = raw.index(member.filename.encode(), member.header_offset) + len(member.filename) + member.file_size // 2
    raw[at] ^= 4
    open(path, "wb").write(raw)


def cut_in_half(path):
    os.truncate(path, os.path.getsize(path) // 2)


def empty(path):
    os.truncate(path, 0)


def with_noise(path):
    open(path, "wb").write(os.urandom(5000))


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, empty, with_noise])
def test_a_damaged_last_falls_back_to_prev_and_says_so(cfg, damage, capsys):
    written(cfg, 4)
    written(cfg, 8)
    damage(f"{cfg.out}/last.pt")
    assert common.resume(cfg, "Tower")["step"] == 4
    said = capsys.readouterr().out
    assert "warning" in said and "last.pt" in said


def test_a_flipped_bit_would_have_passed_torch_unnoticed(cfg):
    written(cfg, 4)
    flip_a_bit(f"{cfg.out}/last.pt")
    try:
        torch.load(f"{cfg.out}/last.pt", weights_only=True)
    except Exception:
        pytest.skip("this torch checks the archive's CRCs itself")
    with pytest.raises(ValueError, match="damaged"):
        common.read_checkpoint(f"{cfg.out}/last.pt")


def test_two_damaged_checkpoints_end_the_run_with_a_way_out(cfg):
    written(cfg, 4)
    written(cfg, 8)
    for name in ("last.pt", "prev.pt"):
        cut_in_half(f"{cfg.out}/{name}")
    with pytest.raises(UserError, match="--fresh") as told:
        common.resume(cfg, "Tower")
    assert "last.pt" in str(told.value) and "prev.pt" in str(told.value) and "\n" not in str(told.value)


def test_a_kill_between_the_two_renames_leaves_prev(cfg, monkeypatch):
    written(cfg, 4)
    moves, replace = [], os.replace

    def killed(a, b):
        if moves:
            raise KeyboardInterrupt
        moves.append(replace(a, b))
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        written(cfg, 8)
    monkeypatch.undo()
    assert not os.path.exists(f"{cfg.out}/last.pt") and common.resume(cfg, "Tower")["step"] == 4


@pytest.mark.parametrize("survived", [0, 1])
def test_a_kill_at_a_rename_after_a_damaged_last_still_leaves_one_whole(cfg, survived, monkeypatch):
    written(cfg, 4)
    written(cfg, 8)
    cut_in_half(f"{cfg.out}/last.pt")
    assert common.resume(cfg, "Tower")["step"] == 4          # the run goes on from prev and comes to its next save
    moves, replace = [], os.replace

    def killed(a, b):
        if len(moves) == survived:
            raise KeyboardInterrupt
        moves.append(replace(a, b))
    monkeypatch.setattr(os, "replace", killed)
    with contextlib.suppress(KeyboardInterrupt):             # a save may need one rename only
        written(cfg, 12)
    monkeypatch.undo()
    assert common.resume(cfg, "Tower")["step"] in (4, 12)    # the damaged one must not have driven out the only whole one


def test_a_leftover_of_a_killed_save_is_ignored_and_overwritten(cfg):
    written(cfg, 4)
    open(f"{cfg.out}/last.pt.tmp", "wb").write(b"half")
    assert common.resume(cfg, "Tower")["step"] == 4
    written(cfg, 8)
    assert common.resume(cfg, "Tower")["step"] == 8 and not os.path.exists(f"{cfg.out}/last.pt.tmp")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["pickle", "torch", "legacy torch"])
def test_a_checkpoint_that_would_run_code_is_refused_and_nothing_runs(cfg, how, tmp_path):
    os.makedirs(cfg.out)
    evil, state = str(tmp_path / "executed"), {"method": "Tower", "config": dataclasses.asdict(cfg), "step": 1}
    state["payload"] = Payload(evil)
    with open(f"{cfg.out}/last.pt", "wb") as f:
        pickle.dump(state, f) if how == "pickle" else torch.save(state, f, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError):
        common.read_checkpoint(f"{cfg.out}/last.pt")
    with pytest.raises(UserError):
        common.resume(cfg, "Tower")
    assert not os.path.exists(evil)


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3), "text"])
def test_what_torch_saved_but_we_did_not_is_refused(cfg, content):
    os.makedirs(cfg.out)
    torch.save(content, f"{cfg.out}/last.pt")
    with pytest.raises(ValueError, match="last.pt"):
        common.read_checkpoint(f"{cfg.out}/last.pt")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")])
def test_a_full_disk_costs_a_warning_and_not_the_last_checkpoint(cfg, error, monkeypatch, capsys):
    written(cfg, 4)
    log = SimpleNamespace(saved=4)

    def full(state, f):
        f.write(b"begun")
        raise error
    monkeypatch.setattr(torch, "save", full)
    written(cfg, 8, log=log)
    monkeypatch.undo()
    said = capsys.readouterr().out
    assert "warning" in said and "step 8" in said and str(error).splitlines()[0] in said
    assert os.listdir(cfg.out) == ["last.pt"] and log.saved == 4 and common.resume(cfg, "Tower")["step"] == 4
    for code in (1, 0):                                      # no later save: a batch system must hear of it
        with pytest.raises(SystemExit) as end:
            common.guard(lambda: None)
        assert end.value.code == code
        written(cfg, 8, log=log)


def test_fresh_starts_anew_but_not_after_an_elastic_restart(cfg, monkeypatch):
    written(cfg, 4)
    fresh = dataclasses.replace(cfg, fresh=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert common.resume(fresh, "Tower")["step"] == 4
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert common.resume(fresh, "Tower") is None


def test_a_fresh_run_that_dies_before_its_first_checkpoint_does_not_fall_back_into_the_old_run(cfg, monkeypatch):
    written(cfg, 4)
    fresh = dataclasses.replace(cfg, fresh=True)
    assert common.resume(fresh, "Tower") is None             # the fresh run begins, and is killed before it saves
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")    # torchrun starts it again
    assert common.resume(fresh, "Tower") is None


def test_another_learning_rate_is_refused_by_name_and_both_values(cfg):
    written(cfg, 4)
    with pytest.raises(UserError, match=r"--lr 0\.001 -> 0\.5") as told:
        common.resume(dataclasses.replace(cfg, lr=0.5), "Tower")
    assert cfg.out in str(told.value) and "--fresh" in str(told.value)


def stored_with(cfg, **changes):
    os.makedirs(cfg.out, exist_ok=True)
    torch.save({"method": "Tower", "config": {**dataclasses.asdict(cfg), **changes}, "step": 4}, f"{cfg.out}/last.pt")


def test_what_does_not_change_the_result_may_differ_at_resume(cfg):
    elsewhere = {"out", "data", "val", "workers", "log_every", "save_every", "eval_every", "compile", "micro", "grad_checkpoint", "fresh", "timeout"}
    stored_with(cfg, **{name: "another" for name in elsewhere})
    assert elsewhere < set(FIELDS) and common.resume(cfg, "Tower")["step"] == 4


@pytest.mark.parametrize("name", "image_size patch size dim depth heads cls flip context vocab vocab_size text_dim text_depth text_heads temperature "
                         "label_smoothing chunk batch steps lr warmup schedule wd grad_clip seed precision window".split())
def test_what_changes_the_result_may_not_differ_at_resume(cfg, name):
    stored_with(cfg, **{name: "another"})
    with pytest.raises(UserError, match="--" + name.replace("_", "-") + " another -> "):
        common.resume(cfg, "Tower")


def test_a_folder_of_another_method_is_refused(cfg):
    written(cfg, 4)
    with pytest.raises(UserError, match="Tower.*ALIGN") as told:
        common.resume(cfg, "ALIGN")
    assert cfg.out in str(told.value)


# -- log --

@pytest.fixture
def logs(tmp_path):
    made = []

    def make(first=0, reasons=data.REASONS, batch=16, log_every=1, steps=8):
        made.append(common.Log(SimpleNamespace(out=str(tmp_path), batch=batch, steps=steps, log_every=log_every), torch.device("cpu"), first, reasons))
        return made[-1]
    yield make
    for log in reversed(made):
        log.close()


def posted(log, step, loss=1.0, temperature=None, **terms):
    log.step(step, torch.tensor(loss), {k: torch.tensor(v) for k, v in terms.items()}, 0.1, torch.tensor(2.0), temperature)


def lines(log):
    with open(log.path) as f:
        return [json.loads(line) for line in f]


def test_a_line_has_the_designs_keys_in_order_and_the_values_it_was_given(logs):
    log = logs()
    log.waited, log.skipped = 0.0, torch.tensor([1, 0, 0, 2, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 8])  # hard, hard, soft, kept
    posted(log, 3, 1.5, torch.tensor(0.25), pixels=0.5, words=1.0)
    log.settle()
    (row,) = lines(log)
    assert list(row) == ["step", "samples", "loss", "pixels", "words", "lr", "grad_norm", "temperature", "images_per_s", "data_wait", "skipped", "mem_gb"]
    want = dict(step=3, samples=64, loss=1.5, pixels=0.5, words=1.0, lr=0.1, grad_norm=2.0, temperature=0.25, skipped=7)
    assert {k: row[k] for k in want} == want
    assert row["images_per_s"] > 0 and row["data_wait"] == 0 and 0.01 < row["mem_gb"] < 100


def test_a_run_without_temperature_logs_null(logs):
    log = logs()
    posted(log, 0)
    log.settle()
    assert lines(log)[0]["temperature"] is None


def test_a_step_is_read_one_step_late_and_settle_reads_it_at_once(logs):
    log = logs()
    posted(log, 0)
    assert lines(log) == []
    posted(log, 1)
    assert [r["step"] for r in lines(log)] == [0]
    log.settle()
    assert [r["step"] for r in lines(log)] == [0, 1]


def test_log_every_holds_lines_back_until_then(logs):
    log = logs(log_every=3)
    seen = []
    for step in range(6):
        posted(log, step)
        seen.append(len(lines(log)))
    assert seen == [0, 1, 1, 1, 4, 4]                        # 0 is a multiple and is read at step 1, 3 at step 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_step_and_the_last_good_checkpoint(logs, bad):
    log = logs()
    log.saved = 4
    posted(log, 5, bad)
    with pytest.raises(UserError, match=r"step 5.*last\.pt.*step 4"):
        posted(log, 6)
    assert [r["step"] for r in lines(log)] == [5]            # the line that shows it is on the disk


def test_a_gradient_that_is_no_number_stops_the_run_too(logs):
    log = logs()
    log.step(2, torch.tensor(1.0), {}, 0.1, torch.tensor(math.inf))
    with pytest.raises(UserError, match="step 2.*none yet"):
        log.settle()


def skipping(log, counts, reason):
    log.skipped = torch.zeros(len(data.REASONS))
    for step, n in enumerate(counts):
        log.skipped[list(data.REASONS).index(reason)] = n
        posted(log, step)
    log.settle()


@pytest.mark.parametrize("reason", [r for r, kind in data.REASONS.items() if kind == "hard"])
def test_more_than_a_tenth_unreadable_stops_the_run_and_says_why(logs, reason):
    with pytest.raises(UserError, match=f"110 of the last 1000.*110 {reason}.*data.py check"):
        skipping(logs(batch=100), [11] * 10, reason)


@pytest.mark.parametrize("reason", [r for r, kind in data.REASONS.items() if kind != "hard"])
def test_soft_and_kept_ones_never_stop_it(logs, reason):
    log = logs(batch=100)
    skipping(log, [90] * 30, reason)
    assert len(lines(log)) == 30


def test_exactly_a_tenth_goes_on(logs):
    skipping(logs(batch=100), [10] * 30, "no image")


def test_only_the_last_thousand_count(logs):
    skipping(logs(batch=100), [100] + [0] * 9 + [100] + [0] * 9, "no image")     # 200 of 1100, but never more than 100 of 1000
    with pytest.raises(UserError, match="120 of the last 1000"):
        skipping(logs(batch=100), [0] * 40 + [60, 60], "no image")               # 3 % of all


def test_nothing_is_concluded_from_fewer_than_a_thousand(logs):
    skipping(logs(batch=100), [100] * 9, "no image")


def test_cut_removes_lines_at_or_beyond_the_step_and_a_half_one(logs, tmp_path):
    rows = [json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(6)]
    (tmp_path / "log.jsonl").write_text("".join(rows) + '{"step": 3, "lo')
    log = logs(first=4)
    assert open(log.path).read() == "".join(rows[:4])


def test_a_new_run_empties_an_old_log(logs, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    assert lines(logs(first=0)) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_the_wish_to_stop_one_step_later(logs, number):
    log = logs()
    posted(log, 0)
    os.kill(os.getpid(), number)
    posted(log, 1)
    assert log.stop is False                                 # only step 0 has been read, which was before the signal
    posted(log, 2)
    assert log.stop is True


def test_closing_the_log_gives_the_signals_back(logs):
    before = [signal.getsignal(s) for s in SIGNALS]
    log = logs()
    assert signal.getsignal(signal.SIGTERM) == log.on_signal
    log.close()
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_a_second_signal_counts_only_after_five_seconds(logs, monkeypatch):
    log, clock, ended = logs(), [1000.0], []
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=common.time.perf_counter))
    monkeypatch.setattr(os, "_exit", ended.append)
    for after, want in ((0.0, []), (0.1, []), (4.9, []), (5.1, [128 + signal.SIGTERM])):
        clock[0] = 1000.0 + after
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == want, f"{after} s after the first"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_under_the_log_does_not_end_in_a_traceback(logs):
    log = logs()
    log.path = "/dev/full"
    posted(log, 0)
    try:
        log.settle()
    except UserError:
        pass                                                 # one line is fine, an OSError is not


# -- whole runs --

class Killed(BaseException):
    """What SIGKILL does, as far as Python can: nothing catches it."""


def at_step(monkeypatch, first, chosen, act):
    """act() while the batch of step `chosen` is fetched, in a run that begins at step `first`."""
    original, count = common.Log.next, iter(range(first, 10 ** 9))

    def patched(self, batches):
        if next(count) == chosen:
            act()
        return original(self, batches)
    monkeypatch.setattr(common.Log, "next", patched)


def die():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def state_of(cfg):
    return common.read_checkpoint(f"{cfg.out}/last.pt")


def tensors(state):
    return {**state["model"], **{f"opt.{i}.{k}": torch.as_tensor(v) for i, s in state["optimizer"]["state"].items() for k, v in s.items()}}


def same(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys() and len(a) > 20
    return [k for k in a if not torch.equal(a[k], b[k])]


def story(cfg):
    """The log without what depends on the clock and the machine."""
    with open(f"{cfg.out}/log.jsonl") as f:
        return [{k: v for k, v in json.loads(line).items() if k not in ("images_per_s", "data_wait", "mem_gb")} for line in f]


@pytest.fixture(scope="module")
def whole(tiny_world, tmp_path_factory):
    """Eight steps in one go, to compare with."""
    out = tmp_path_factory.mktemp("whole")
    cfg = align.Config(data=[f"{tiny_world}/pairs"], out=str(out), image_size=16, patch=8, dim=16, depth=1, heads=2, text_dim=16, text_depth=1,
                       text_heads=2, context=16, vocab_size=300, batch=16, steps=8, workers=0, log_every=1, precision="fp32", save_every=4,
                       eval_every=-1, temperature=0.07, lr=1e-2, warmup=2, flip=False)
    align.main(cfg)
    return cfg


def into(whole, tmp_path, **changes):
    return dataclasses.replace(whole, out=str(tmp_path / "run"), **changes)


def test_the_same_run_twice_in_one_process_ends_with_the_same_weights(whole, tmp_path):
    cfg = into(whole, tmp_path)
    torch.rand(10)                                           # whatever went before
    align.main(cfg)
    assert same(state_of(cfg), state_of(whole)) == [] and story(cfg) == story(whole)


def test_another_seed_ends_elsewhere(whole, tmp_path):
    cfg = into(whole, tmp_path, seed=1)
    align.main(cfg)
    assert len(same(state_of(cfg), state_of(whole))) > 20


def test_stopped_by_sigterm_and_resumed_is_bitwise_the_run_without_a_stop(whole, tmp_path, monkeypatch, capsys):
    cfg = into(whole, tmp_path, save_every=100)
    with monkeypatch.context() as m:
        at_step(m, 0, 2, terminate)                          # told with step 2, read at step 3, which is finished and saved
        assert align.main(cfg) == {}
    assert state_of(cfg)["step"] == 4 and [r["step"] for r in story(cfg)] == [0, 1, 2, 3]
    align.main(cfg)
    assert state_of(cfg)["step"] == 8 and "from step 4" in capsys.readouterr().out
    assert same(state_of(cfg), state_of(whole)) == [] and story(cfg) == story(whole)


@pytest.mark.parametrize("killed_at,resumes_from", [(3, 0), (6, 4)])
def test_killed_and_resumed_is_bitwise_the_run_without_a_kill(whole, tmp_path, monkeypatch, killed_at, resumes_from):
    cfg = into(whole, tmp_path)
    with monkeypatch.context() as m:
        at_step(m, 0, killed_at, die)
        with pytest.raises(Killed):
            align.main(cfg)
    assert len(story(cfg)) == killed_at - 1                  # the last step before was not read yet
    assert os.path.exists(f"{cfg.out}/last.pt") == bool(resumes_from)
    align.main(cfg)
    assert same(state_of(cfg), state_of(whole)) == [] and story(cfg) == story(whole)


def test_a_damaged_last_checkpoint_costs_steps_but_not_the_result(whole, tmp_path, capsys):
    cfg = into(whole, tmp_path)
    shutil.copytree(whole.out, cfg.out)
    cut_in_half(f"{cfg.out}/last.pt")
    align.main(cfg)
    assert "from step 4" in capsys.readouterr().out
    assert same(state_of(cfg), state_of(whole)) == [] and story(cfg) == story(whole)


def test_a_stopped_run_says_how_to_go_on(whole, tmp_path, monkeypatch, capsys):
    cfg = into(whole, tmp_path)
    at_step(monkeypatch, 0, 2, terminate)
    align.main(cfg)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.search(r"\bstep 4\b", last) and re.search("same command|again|go on|resume", last)


def test_a_finished_run_started_again_trains_no_step(whole, tmp_path, monkeypatch):
    cfg = into(whole, tmp_path)
    shutil.copytree(whole.out, cfg.out)
    before = open(f"{cfg.out}/last.pt", "rb").read()
    monkeypatch.setattr(common.Log, "next", lambda *_: die())
    assert align.main(cfg) == {}
    assert open(f"{cfg.out}/last.pt", "rb").read() == before and story(cfg) == story(whole)


def test_fresh_starts_a_finished_run_anew(whole, tmp_path):
    cfg = into(whole, tmp_path, fresh=True)
    shutil.copytree(whole.out, cfg.out)
    align.main(dataclasses.replace(cfg, steps=4))            # other settings are no hindrance then
    assert [r["step"] for r in story(cfg)] == [0, 1, 2, 3] and state_of(cfg)["step"] == 4


@pytest.mark.parametrize("change", [dict(micro=4), dict(grad_checkpoint=True), dict(micro=8, grad_checkpoint=True)])
def test_saving_memory_does_not_change_the_weights(whole, tmp_path, change):
    plain, thrifty = into(whole, tmp_path / "a", steps=3), into(whole, tmp_path / "b", steps=3, **change)
    align.main(plain)
    align.main(thrifty)
    a, b = state_of(plain)["model"], state_of(thrifty)["model"]
    for name in a:
        if name.endswith("qkv.bias"):                        # softmax does not see the keys' bias: its gradient is rounding, which LAMB magnifies
            d = len(a[name]) // 3
            a[name][d:2 * d] = b[name][d:2 * d]
        assert (a[name] - b[name]).norm() <= 1e-5 * a[name].norm(), name      # float32 sums in another order, three steps on


def test_nothing_is_saved_from_a_step_whose_loss_is_no_number(whole, tmp_path, monkeypatch):
    cfg, original, count = into(whole, tmp_path), align.contrastive_loss, iter(range(100))

    def loss(image, *rest):
        return original(image, *rest) * (math.nan if next(count) == 7 else 1)
    monkeypatch.setattr(align, "contrastive_loss", loss)     # step 7 is the last, whose checkpoint would be written at once
    with pytest.raises(UserError, match=r"step 7.*last\.pt of step 4"):
        align.main(cfg)
    assert state_of(cfg)["step"] == 4 and all(t.isfinite().all() for t in tensors(state_of(cfg)).values())


def test_a_run_that_ends_in_an_error_gives_the_signals_back(whole, tmp_path, monkeypatch):
    before = [signal.getsignal(s) for s in SIGNALS]
    monkeypatch.setattr(align, "contrastive_loss", lambda image, *rest: image.sum() * math.nan)
    with pytest.raises(UserError):
        align.main(into(whole, tmp_path))
    assert [signal.getsignal(s) for s in SIGNALS] == before      # or Ctrl-C is dead in a notebook


def test_the_vocabulary_travels_in_the_checkpoint(whole, tmp_path):
    cfg = into(whole, tmp_path)
    shutil.copytree(whole.out, cfg.out)
    os.remove(f"{cfg.out}/vocab.json")
    _, tokenizer, _, _ = evaluation.load(f"{cfg.out}/last.pt")
    assert tokenizer.vocab_size == 300 and tokenizer.decode(tokenizer.encode("a red circle")) == "a red circle"


def test_the_first_lines_of_a_run_tell_what_it_is(whole, tmp_path, capsys):
    align.main(into(whole, tmp_path, steps=1))
    said = capsys.readouterr().out
    for part in ("ALIGN", "1 rank", "cpu", "fp32", "1 shards", "256 samples", "00000000", "1 steps of 16", str(tmp_path / "run")):
        assert part in said, part
    assert json.load(open(tmp_path / "run/config.json"))["batch"] == 16


def test_a_restart_by_torchrun_sees_nothing_of_the_attempt_before_in_its_store(monkeypatch):
    made, store = [], common.dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(common.dist, "init_process_group", lambda *args, **how: made.append(how["store"]))
    monkeypatch.setattr(common.dist, "new_group", lambda **how: None)
    monkeypatch.setattr(common, "_store", None)
    for attempt in "01":
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port)),
                            ("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RESTART_COUNT", attempt)):
            monkeypatch.setenv(name, value)
        common.join()
        assert not common._store.check(["turn1"]) and not made[-1].check(["0"])
        common._store.set("turn1", "done")
        made[-1].set("0", "an address")
