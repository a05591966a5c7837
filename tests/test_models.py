"""ViT, blocks and text transformer of common.py against references written anew."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import UserError, ViT
from conftest import gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def randomized(module, seed=0):
    """In float64 with every parameter random: zero biases and unit gains hide mistakes."""
    module = module.double()
    generator = seeded(seed)
    for p in module.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.ndim == 1:
            p.data += 0.3
    return module


# ---- ViT: names and shapes ----

def names_of_vit_b():
    shapes = {
        "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "norm.weight": (768,),
        "norm.bias": (768,), "patch_embed.proj.weight": (768, 3, 16, 16),
        "patch_embed.proj.bias": (768,),
    }
    for i in range(12):
        for name, rows, columns in [("attn.qkv", 2304, 768), ("attn.proj", 768, 768),
                                    ("mlp.fc1", 3072, 768), ("mlp.fc2", 768, 3072)]:
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
        for name in ("norm1", "norm2"):
            shapes[f"blocks.{i}.{name}.weight"] = (768,)
            shapes[f"blocks.{i}.{name}.bias"] = (768,)
    return shapes


@pytest.mark.parametrize("cls", [True, False])
def test_vit_b_has_the_names_and_shapes_of_timm(cls):
    with torch.device("meta"):
        state = ViT(224, 16, *common.SIZES["b"], cls=cls).state_dict()
    expected = names_of_vit_b()
    assert len(expected) == 150
    if not cls:
        del expected["cls_token"]
        expected["pos_embed"] = (1, 196, 768)
    assert {name: tuple(x.shape) for name, x in state.items()} == expected


@pytest.mark.parametrize("size,patch,with_head", [
    ("ti", 16, 5_717_416), ("s", 16, 22_050_664), ("b", 16, 86_567_656), ("b", 32, 88_224_232),
    ("l", 16, 304_326_632), ("h", 14, 632_045_800)])
def test_parameter_counts_are_those_of_timm_less_the_head(size, patch, with_head):
    with torch.device("meta"):
        model = ViT(224, patch, *common.SIZES[size])
    head = 1000 * (common.SIZES[size][0] + 1)
    assert sum(p.numel() for p in model.parameters()) == with_head - head


def test_size_1b_has_a_billion_parameters():
    with torch.device("meta"):
        model = ViT(224, 14, *common.SIZES["1b"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.02e9, rel=0.01)


# ---- ViT: numbers ----

def reference_norm(x, state, name):
    centered = x - x.mean(-1, keepdim=True)
    deviation = (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centered / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def reference_block(x, state, i, heads):
    """A pre-norm block head by head; rows of qkv are all of q, then k, then v."""
    block = f"blocks.{i}"
    width = x.shape[-1]
    size = width // heads
    h = reference_norm(x, state, f"{block}.norm1")
    qkv = h @ state[f"{block}.attn.qkv.weight"].T + state[f"{block}.attn.qkv.bias"]
    outputs = []
    for head in range(heads):
        q, k, v = (qkv[..., part * width + head * size:][..., :size] for part in range(3))
        weights = (q @ k.mT / math.sqrt(size)).softmax(-1)
        outputs.append(weights @ v)
    joined = torch.cat(outputs, -1)
    x = x + joined @ state[f"{block}.attn.proj.weight"].T + state[f"{block}.attn.proj.bias"]
    h = reference_norm(x, state, f"{block}.norm2")
    h = h @ state[f"{block}.mlp.fc1.weight"].T + state[f"{block}.mlp.fc1.bias"]
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))  # exact GELU
    return x + h @ state[f"{block}.mlp.fc2.weight"].T + state[f"{block}.mlp.fc2.bias"]


def reference_vit(state, images, patch, heads, depth, keep=None):
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = x + state["pos_embed"][:, -x.shape[1]:]
    if keep is not None:
        x = torch.stack([row[ids] for row, ids in zip(x, keep)])
    if "cls_token" in state:
        first = state["cls_token"] + state["pos_embed"][:, :1]
        x = torch.cat([first.repeat(len(x), 1, 1), x], 1)
    for i in range(depth):
        x = reference_block(x, state, i, heads)
    return reference_norm(x, state, "norm")


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cls", [True, False])
def test_vit_equals_convolution_and_attention_written_head_by_head(cls):
    model = randomized(ViT(12, 4, 8, 3, 2, cls=cls))
    images = randn(2, 3, 12, 12, seed=1)
    assert_close(model(images), reference_vit(model.state_dict(), images, 4, 2, 3))
    assert model.patch_tokens(images).shape == (2, 9, 8)


def test_kept_patches_run_as_if_the_others_had_never_been():
    model = randomized(ViT(12, 4, 8, 3, 2))
    images = randn(2, 3, 12, 12, seed=1)
    keep = torch.tensor([[7, 0, 4], [2, 8, 3]])
    expected = reference_vit(model.state_dict(), images, 4, 2, 3, keep)
    assert_close(model(images, ids_keep=keep), expected)
    everything = torch.arange(9).repeat(2, 1)
    assert torch.equal(model(images, ids_keep=everything), model(images))


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_the_blocks_can_be_run_in_two_parts(k):
    model = randomized(ViT(12, 4, 8, 3, 2))
    images = randn(2, 3, 12, 12, seed=1)
    x = model.blocks_until(images, k)
    expected = model.embed(images)
    for i in range(k):
        expected = reference_block(expected, model.state_dict(), i, 2)
    assert_close(x, expected)
    assert torch.equal(model.blocks_from(x, k), model(images))


def test_bytes_are_normalized_channel_by_channel():
    mean = (0.1, 0.4, 0.7)
    std = (0.2, 0.3, 0.5)
    model = ViT(8, 4, 8, 1, 2, mean=mean, std=std)
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=seeded(3), dtype=torch.uint8)
    by_hand = images.float() / 255
    for c in range(3):
        by_hand[:, c] = (by_hand[:, c] - mean[c]) / std[c]
    torch.testing.assert_close(model.patchify(images), model.patchify(by_hand))


@pytest.mark.parametrize("grid,dim", [(3, 16), (14, 192)])
def test_fixed_positions_are_those_of_mae(grid, dim):
    # the column in the first half of the width, the row in the second; sine, then cosine
    expected = np.zeros((1 + grid * grid, dim))  # a zero row for the class token
    for row in range(grid):
        for column in range(grid):
            for half, place in ((0, column), (1, row)):
                for i in range(dim // 4):
                    angle = place / 10000 ** (i / (dim / 4))
                    start = half * dim // 2 + i
                    expected[1 + row * grid + column, start] = math.sin(angle)
                    expected[1 + row * grid + column, start + dim // 4] = math.cos(angle)
    model = ViT(4 * grid, 4, dim, 0, 2, sincos_pos=True)
    np.testing.assert_allclose(model.pos_embed.detach()[0].numpy(), expected, atol=1e-6)
    assert not model.pos_embed.requires_grad


def test_an_image_size_that_patches_do_not_fill_is_refused_with_one_that_they_do():
    with pytest.raises(UserError, match="--image-size 50.*--patch 16.*48"):
        ViT(50, 16, 8, 1, 2)


def test_recomputed_blocks_run_twice_and_give_the_same_gradients():
    images = randn(2, 3, 8, 8, seed=4)
    results = []
    for grad_checkpoint in (False, True):
        model = randomized(ViT(8, 4, 8, 2, 2, grad_checkpoint=grad_checkpoint))
        calls = []
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
        model(images).pow(3).mean().backward()
        results.append([p.grad for p in model.parameters()])
        assert len(calls) == (4 if grad_checkpoint else 2)
    for a, b in zip(*results):
        assert torch.equal(a, b)


# ---- blocks ----

@pytest.mark.parametrize("kind", ["none", "causal", "bool"])
def test_block_equals_torchs_encoder_layer(kind):
    block = randomized(common.Block(12, 3))
    layer = nn.TransformerEncoderLayer(12, 3, 48, dropout=0.0, activation="gelu", norm_first=True,
                                       layer_norm_eps=1e-6, batch_first=True).double()
    ours = block.state_dict()
    theirs = {}
    for a, b in [("self_attn.in_proj_", "attn.qkv."), ("self_attn.out_proj.", "attn.proj."),
                 ("linear1.", "mlp.fc1."), ("linear2.", "mlp.fc2."), ("norm1.", "norm1."),
                 ("norm2.", "norm2.")]:
        theirs[f"{a}weight"] = ours[f"{b}weight"]
        theirs[f"{a}bias"] = ours[f"{b}bias"]
    layer.load_state_dict(theirs)
    allowed = {
        "none": torch.ones(7, 7, dtype=torch.bool),
        "causal": torch.ones(7, 7, dtype=torch.bool).tril(),
        "bool": (torch.rand(7, 7, generator=seeded(6)) < 0.5) | torch.eye(7, dtype=torch.bool),
    }[kind]
    x = randn(2, 7, 12, seed=5)
    mask = allowed if kind == "bool" else None
    assert_close(block(x, mask, kind == "causal"), layer(x, src_mask=~allowed))


def test_cross_block_equals_torchs_decoder_layer():
    block = randomized(common.CrossBlock(12, 12, 3))
    layer = nn.TransformerDecoderLayer(12, 3, 48, dropout=0.0, activation="gelu", norm_first=True,
                                       layer_norm_eps=1e-6, batch_first=True).double()
    ours = block.state_dict()
    theirs = {
        f"multihead_attn.in_proj_{x}": torch.cat([ours[f"cross.q.{x}"], ours[f"cross.kv.{x}"]])
        for x in ("weight", "bias")
    }
    for a, b in [("self_attn.in_proj_", "attn.qkv."), ("self_attn.out_proj.", "attn.proj."),
                 ("multihead_attn.out_proj.", "cross.proj."), ("linear1.", "mlp.fc1."),
                 ("linear2.", "mlp.fc2."), ("norm1.", "norm1."), ("norm2.", "norm2."),
                 ("norm3.", "norm3.")]:
        theirs[f"{a}weight"] = ours[f"{b}weight"]
        theirs[f"{a}bias"] = ours[f"{b}bias"]
    layer.load_state_dict(theirs)
    x = randn(2, 5, 12, seed=5)
    image = randn(2, 7, 12, seed=6)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    assert_close(block(x, image, None, True), layer(x, image, tgt_mask=mask))


def test_cached_keys_and_values_give_what_the_whole_sequence_gives():
    block = randomized(common.Block(12, 3))
    x = randn(2, 7, 12, seed=5)
    cache = common.KVCache()
    parts = [block(part, None, True, cache) for part in (x[:, :4], x[:, 4:5], x[:, 5:6], x[:, 6:])]
    assert_close(torch.cat(parts, 1), block(x, None, True))


def test_a_width_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(UserError, match="16.*3 heads.*try 1"):
        common.Attention(16, 3)


# ---- text ----

def padded(tokens, length, pad=0):
    n_pad = length - len(tokens)
    valid = torch.arange(length)[None] < len(tokens)
    return torch.tensor([tokens + [pad] * n_pad]), valid


@pytest.mark.parametrize("causal", [False, True])
def test_neither_the_amount_of_padding_nor_the_ids_in_it_matter(causal):
    model = randomized(common.TextTransformer(20, 12, 8, 2, 2, causal))
    tokens = [3, 9, 4, 17, 5]
    expected = model(*padded(tokens, 5))
    for length, pad in [(8, 0), (12, 0), (12, 19)]:
        assert_close(model(*padded(tokens, length, pad))[:, :5], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_an_earlier_token_sees_a_later_one_only_without_causal_mask(causal):
    model = randomized(common.TextTransformer(20, 12, 8, 2, 2, causal))
    a = model(*padded([3, 9, 4, 17, 5], 6))
    b = model(*padded([3, 9, 4, 11, 5], 6))
    assert torch.equal(a[:, :3], b[:, :3]) == causal
    assert not torch.allclose(a[:, 3:5], b[:, 3:5])


def test_text_written_token_by_token_has_the_states_of_the_whole():
    model = randomized(common.TextTransformer(20, 12, 8, 2, 2, causal=True))
    tokens = torch.randint(0, 20, (3, 6), generator=seeded(1))
    caches = [common.KVCache() for _ in model.blocks]
    parts = [model.forward_cached(tokens[:, i:i + 1], i, caches) for i in range(6)]
    assert_close(torch.cat(parts, 1), model(tokens))


# ---- small functions ----

@pytest.mark.parametrize("micro", [1, 3, 4, 10, 11])
def test_chunks_give_the_values_and_gradients_of_the_whole(micro):
    layer = nn.Linear(4, 3).double()
    x = randn(10, 4, seed=12)
    y = randn(10, 3, seed=13)
    sizes = []

    def two_outputs(x, y):
        sizes.append(len(x))
        return layer(x).tanh() * y, (layer(x) + y).square().sum(1)

    results = []
    for chunk in (0, micro):
        sizes.clear()
        a, b = common.checkpointed_chunks(two_outputs, chunk, x, y)
        grads = gradients(layer, a.sum() ** 2 + (b * torch.arange(10)).sum())
        results.append([a, b, *grads.values()])
    assert max(sizes) <= micro
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


def test_vectors_are_normalized_in_float32_or_better():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert common.l2_normalize(x).tolist() == [[0.6, 0.8]]
    assert common.l2_normalize(x.bfloat16()).dtype == torch.float32


def test_normalized_patches_have_mean_0_and_unbiased_deviation_1():
    patches = 5 + 3 * randn(2, 4, 12)
    normalized, mean, std = common.normalize_patches(patches)
    torch.testing.assert_close(normalized.mean(-1), torch.zeros(2, 4).double())
    torch.testing.assert_close(normalized.std(-1), torch.ones(2, 4).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(normalized * std + mean, patches)
    flat, _, _ = common.normalize_patches(torch.full((1, 1, 12), 7.0))
    assert torch.equal(flat, torch.zeros(1, 1, 12))


def test_the_last_token_is_that_before_the_padding():
    states = torch.arange(24.0).view(2, 4, 3)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    assert common.last_token(states, valid).tolist() == [[9, 10, 11], [15, 16, 17]]


def test_only_matrices_are_decayed():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer = common.adamw(model, 0.1, (0.9, 0.95))
    decay, no_decay = optimizer.param_groups
    assert [tuple(p.shape) for p in decay["params"]] == [(2, 3)] and decay["weight_decay"] == 0.1
    assert len(no_decay["params"]) == 3 and no_decay["weight_decay"] == 0
