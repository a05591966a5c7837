"""ViT, blocks and text transformer of common.py against references written anew."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
from common import ViT

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
    ("s", 16, 22_050_664), ("h", 14, 632_045_800)])
def test_parameter_counts_are_those_of_timm_less_the_head(size, patch, with_head):
    with torch.device("meta"):
        model = ViT(224, patch, *common.SIZES[size])
    head = 1000 * (common.SIZES[size][0] + 1)
    assert sum(p.numel() for p in model.parameters()) == with_head - head


# ---- ViT: numbers ----

def torchs(layer_class, block, heads, names):
    """A layer of torch with the weights of a block; names {torch's: ours}, without the ending."""
    dim = len(block.norm1.weight)
    layer = layer_class(dim, heads, 4 * dim, dropout=0.0, activation="gelu", norm_first=True,
                        layer_norm_eps=1e-6, batch_first=True).double()
    ours = block.state_dict()
    theirs = {}
    for name, our_name in names.items():
        for end in ("weight", "bias"):
            separator = "" if name.endswith("_") else "."
            theirs[f"{name}{separator}{end}"] = ours[f"{our_name}.{end}"]
    layer.load_state_dict(theirs)
    return layer


BLOCK = {"self_attn.in_proj_": "attn.qkv", "self_attn.out_proj": "attn.proj", "norm1": "norm1",
         "norm2": "norm2", "linear1": "mlp.fc1", "linear2": "mlp.fc2"}


def encoder_layer(block, heads):
    return torchs(nn.TransformerEncoderLayer, block, heads, BLOCK)


def reference_vit(model, images, heads, keep=None):
    """By a convolution and torch's own layers."""
    proj = model.patch_embed.proj
    x = F.conv2d(images, proj.weight, proj.bias, stride=model.patch).flatten(2).mT
    x = x + model.pos_embed[:, -x.shape[1]:]
    if keep is not None:
        x = torch.stack([row[ids] for row, ids in zip(x, keep)])
    if model.cls_token is not None:
        first = model.cls_token + model.pos_embed[:, :1]
        x = torch.cat([first.repeat(len(x), 1, 1), x], 1)
    for block in model.blocks:
        x = encoder_layer(block, heads)(x)
    return F.layer_norm(x, x.shape[2:], model.norm.weight, model.norm.bias, 1e-6)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("cls", [True, False])
def test_vit_equals_a_convolution_and_layers_of_torch(cls):
    model = randomized(ViT(12, 4, 8, 3, 2, cls=cls))
    images = randn(2, 3, 12, 12, seed=1)
    assert_close(model(images), reference_vit(model, images, 2))
    assert model.patch_tokens(images).shape == (2, 9, 8)
    assert torch.equal(model.blocks_from(model.blocks_until(images, 2), 2), model(images))


def test_kept_patches_run_as_if_the_others_had_never_been():
    model = randomized(ViT(12, 4, 8, 3, 2))
    images = randn(2, 3, 12, 12, seed=1)
    keep = torch.tensor([[7, 0, 4], [2, 8, 3]])
    assert_close(model(images, ids_keep=keep), reference_vit(model, images, 2, keep))


def test_fixed_positions_are_those_of_mae():
    grid = 3
    dim = 16
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


# ---- blocks ----

@pytest.mark.parametrize("causal", [True, False])
def test_block_with_a_mask_equals_torchs_encoder_layer(causal):
    block = randomized(common.Block(12, 3))
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    if not causal:
        allowed |= torch.rand(7, 7, generator=seeded(6)) < 0.5
    x = randn(2, 7, 12, seed=5)
    mask = None if causal else allowed
    assert_close(block(x, mask, causal), encoder_layer(block, 3)(x, src_mask=~allowed))


def test_cross_block_equals_torchs_decoder_layer():
    block = randomized(common.CrossBlock(12, 12, 3))
    block.cross.qkv = nn.Linear(12, 36)  # torch has one matrix
    for x in ("weight", "bias"):
        parts = [getattr(block.cross.q, x), getattr(block.cross.kv, x)]
        setattr(block.cross.qkv, x, nn.Parameter(torch.cat(parts)))
    names = {**BLOCK, "multihead_attn.in_proj_": "cross.qkv", "norm3": "norm3",
             "multihead_attn.out_proj": "cross.proj"}
    layer = torchs(nn.TransformerDecoderLayer, block, 3, names)
    x = randn(2, 5, 12, seed=5)
    image = randn(2, 7, 12, seed=6)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    assert_close(block(x, image, None, True), layer(x, image, tgt_mask=mask))


# ---- text ----

def padded(tokens, length, pad=0):
    n_pad = length - len(tokens)
    valid = torch.arange(length)[None] < len(tokens)
    return torch.tensor([tokens + [pad] * n_pad]), valid


@pytest.mark.parametrize("causal", [False, True])
def test_no_token_sees_the_padding_and_an_earlier_one_a_later_only_without_causal_mask(causal):
    model = randomized(common.TextTransformer(20, 12, 8, 2, 2, causal))
    alone = model(*padded([3, 9, 4, 17, 5], 5))
    assert_close(model(*padded([3, 9, 4, 17, 5], 12, pad=19))[:, :5], alone)
    changed = model(*padded([3, 9, 4, 11, 5], 5))
    assert torch.equal(changed[:, :3], alone[:, :3]) == causal
    assert not torch.allclose(changed[:, 3:], alone[:, 3:])


# ---- small functions ----

def test_no_more_rows_than_micro_are_run_at_a_time():
    """test_scripts.py compares the gradients."""
    sizes = []

    def count(x):
        sizes.append(len(x))
        return 2 * x

    x = randn(10, 4)
    assert_close(common.checkpointed_chunks(count, 3, x), 2 * x)
    assert sizes == [3, 3, 3, 1]


def test_only_matrices_are_decayed():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer = common.adamw(model, 0.1, (0.9, 0.95))
    decay, no_decay = optimizer.param_groups
    assert [tuple(p.shape) for p in decay["params"]] == [(2, 3)] and decay["weight_decay"] == 0.1
    assert len(no_decay["params"]) == 3 and no_decay["weight_decay"] == 0
