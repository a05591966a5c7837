"""ViT, blocks and text transformer of common.py against references written anew."""
import math

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

VIT_B = {  # of timm, with the first block alone
    "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768),
    "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,),
    "blocks.0.norm1.weight": (768,), "blocks.0.norm1.bias": (768,),
    "blocks.0.attn.qkv.weight": (2304, 768), "blocks.0.attn.qkv.bias": (2304,),
    "blocks.0.attn.proj.weight": (768, 768), "blocks.0.attn.proj.bias": (768,),
    "blocks.0.norm2.weight": (768,), "blocks.0.norm2.bias": (768,),
    "blocks.0.mlp.fc1.weight": (3072, 768), "blocks.0.mlp.fc1.bias": (3072,),
    "blocks.0.mlp.fc2.weight": (768, 3072), "blocks.0.mlp.fc2.bias": (768,),
    "norm.weight": (768,), "norm.bias": (768,),
}


def test_vit_has_the_names_and_shapes_of_timm():
    with torch.device("meta"):
        state = ViT(224, 16, 768, 1, 12).state_dict()
        without_cls = ViT(224, 16, 768, 1, 12, cls=False).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == VIT_B
    assert VIT_B.keys() - without_cls.keys() == {"cls_token"}
    assert without_cls["pos_embed"].shape == (1, 196, 768)


@pytest.mark.parametrize("size,patch,with_head", [
    ("s", 16, 22_050_664), ("b", 16, 86_567_656), ("h", 14, 632_045_800)])
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
    # of 2 x 2 patches: two sines and two cosines of the column, with frequencies 1 and
    # 1 / 10000^(1/2), then those of the row
    zero = [0, 0, 1, 1]
    one = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    class_token = [0] * 8
    expected = [class_token, zero + zero, one + zero, zero + one, one + one]
    model = ViT(8, 4, 8, 0, 2, sincos_pos=True)
    torch.testing.assert_close(model.pos_embed[0], torch.tensor(expected))
    assert not model.pos_embed.requires_grad


# ---- text and cross-attention ----

@pytest.mark.parametrize("causal", [False, True])
def test_text_transformer_equals_layers_of_torch(causal):
    model = randomized(common.TextTransformer(20, 12, 8, 3, 2, causal))
    tokens = torch.randint(20, (3, 7), generator=seeded(5))
    valid = torch.arange(7) < torch.tensor([[7], [3], [5]])
    x = F.embedding(tokens, model.token_embed.weight) + model.pos_embed[:7]
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    for block in model.blocks:
        layer = encoder_layer(block, 2)
        x = layer(x, src_mask=later) if causal else layer(x, src_key_padding_mask=~valid)
    x = F.layer_norm(x, (8,), model.norm.weight, model.norm.bias, 1e-6)
    assert_close(model(tokens, valid)[valid], x[valid])


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


# ---- small functions ----

def test_no_more_rows_than_micro_are_run_at_a_time():
    sizes = []

    def double(x):
        sizes.append(len(x))
        return 2 * x

    x = randn(10, 4)
    assert torch.equal(common.checkpointed_chunks(double, 3, x), 2 * x)
    assert sizes == [3, 3, 3, 1]


def test_only_matrices_are_decayed():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(4, 2))
    model[2].weight.requires_grad_(False)
    optimizer = common.adamw(model, 0.1, (0.9, 0.95))
    decay, no_decay = optimizer.param_groups
    assert [tuple(p.shape) for p in decay["params"]] == [(2, 3)] and decay["weight_decay"] == 0.1
    assert len(no_decay["params"]) == 3 and no_decay["weight_decay"] == 0
