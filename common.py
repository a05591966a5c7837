"""What the five scripts share: transformers, ranks, seeds, precision, command line, checkpoints.

No loss is here. Reading order: ViT and Block (the models), all_gather_with_grad and
average_gradients (what makes many ranks one run), then resume_from and Log.

Dimension key: B rows of this rank, N patches, K kept patches, L tokens, D width, H heads, P numbers
a patch, S side of an image in pixels.
"""
import argparse
import dataclasses
import enum
import errno
import fcntl
import functools
import hashlib
import inspect
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# width, depth, heads of --size: ViT's ti s b l h, and 1b (1.02 billion parameters, ours)
SIZES = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
    "1b": (1536, 36, 24),
}


class UserError(Exception):
    """A mistake that the user can mend, as one line: what, value, remedy. Exit code 2."""


# ---- transformers ----

def attention(q, k, v, mask=None, causal=False):
    """Scaled dot-product attention of q, k, v (B, H, L, D/H).

    mask: None, a bool tensor (True = may attend), or a FlexAttention BlockMask. causal: no token
    attends to a later one; only without a mask.
    """
    if mask is None or isinstance(mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    from torch.nn.attention.flex_attention import flex_attention  # the import takes a second
    return flex_attention(q, k, v, block_mask=mask)


def split_heads(x, heads):
    """(B, L, D) -> (B, H, L, D/H)"""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, H, L, D/H) -> (B, L, D)"""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention under timm's names: the rows of qkv are all of q, then k, then v.

    One matrix for q, k, v means one Xavier range (as MAE) and one LAMB ratio (BERT has a matrix,
    and so a ratio, for each).
    """

    def __init__(self, dim, heads):
        super().__init__()
        if heads < 1 or dim % heads:
            remedy = f"try {math.gcd(dim, max(heads, 1))} heads"
            raise UserError(f"a width of {dim} does not divide into {heads} heads: {remedy}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None, causal=False):  # x (B, L, D)
        q, k, v = self.qkv(x).chunk(3, dim=2)
        q = split_heads(q, self.heads)
        k = split_heads(k, self.heads)
        v = split_heads(v, self.heads)
        return self.proj(merge_heads(attention(q, k, v, mask, causal)))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block (ViT, arXiv 2010.11929, Eq. 2-3)."""

    def __init__(self, dim, heads, mlp_ratio=4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x, mask=None, causal=False):  # x (B, L, D)
        x = x + self.attn(self.norm1(x), mask, causal)
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Queries from one sequence; keys and values from another, whose width may differ."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, context):  # x (B, L, D), context (B, N, context_dim)
        k, v = self.kv(context).chunk(2, dim=2)
        q = split_heads(self.q(x), self.heads)
        k = split_heads(k, self.heads)
        v = split_heads(v, self.heads)
        return self.proj(merge_heads(attention(q, k, v)))


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to an image's tokens, MLP; pre-norm."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.cross = CrossAttention(dim, context_dim, heads)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, context, mask=None, causal=False):  # x (B, L, D)
        x = x + self.attn(self.norm1(x), mask, causal)
        x = x + self.cross(self.norm2(x), context)
        return x + self.mlp(self.norm3(x))


def run_blocks(blocks, x, *args, grad_checkpoint=False):
    """x through the blocks; grad_checkpoint: each is run again in backward, which saves memory."""
    for block in blocks:
        if grad_checkpoint and torch.is_grad_enabled():
            x = checkpoint(block, x, *args, use_reentrant=False)
        else:
            x = block(x, *args)
    return x


def init_weights(module):
    """Xavier-uniform matrices (MAE), embeddings truncated normal 0.02 (BERT), biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)


def sincos_positions(grid, dim):
    """Fixed 2-D positions (grid * grid, dim): half for the column, half for the row (MAE)."""
    if dim % 4:
        raise UserError(f"a width of {dim} is no multiple of 4, as sine-cosine positions need")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, dim/4)
    table = torch.cat([angle.sin(), angle.cos()], 1)  # (grid, dim/2)
    column = table.repeat(grid, 1)
    row = table.repeat_interleave(grid, 0)
    return torch.cat([column, row], 1).float()


class ViT(nn.Module):
    """Vision transformer whose names, shapes and numerics are timm's vit_*_patch* without head.

    images (B, 3, S, S): uint8, normalized here on the device, or float, taken as normalized.
    """

    def __init__(self, image_size, patch, dim, depth, heads, mlp_ratio=4, cls=True,
                 mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), sincos_pos=False,
                 grad_checkpoint=False):
        super().__init__()
        if image_size % patch:
            nearest = max(image_size // patch, 1) * patch
            raise UserError(f"--image-size {image_size} is not divisible by --patch {patch}: "
                            f"try {nearest}")
        self.image_size = image_size
        self.patch = patch
        self.grid = image_size // patch
        self.grad_checkpoint = grad_checkpoint
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)  # timm's shape; used as a matrix
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if cls else None
        positions = torch.zeros(1, self.grid**2 + int(cls), dim)
        self.pos_embed = nn.Parameter(positions, requires_grad=not sincos_pos)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(dim, -1))  # MAE: as a matrix
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if cls:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if sincos_pos:  # the class token's position is zero (MAE)
            table = F.pad(sincos_positions(self.grid, dim), (0, 0, int(cls), 0))
            self.pos_embed.data = table[None]

    def patchify(self, images):
        """(B, 3, S, S) -> normalized (B, N, P), P in the order (channel, y, x) of the weight."""
        if not images.is_floating_point():
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        g, p = self.grid, self.patch
        patches = images.view(-1, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(-1, g * g, 3 * p * p)

    def embed(self, images, ids_keep=None):
        """Tokens (B, [1+]N, D) that enter the first block. ids_keep (B, K): only these patches."""
        x = self.patchify(images)
        position = self.pos_embed[:, -self.grid**2:]
        if ids_keep is not None:
            x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[2]))
            # not position[0][ids_keep]: its gradient would be summed in no fixed order
            position = F.embedding(ids_keep, position[0])
        # a strided convolution is slow on the CPU; this is the same product
        x = F.linear(x, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias)
        x = x + position
        if self.cls_token is not None:
            cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
            x = torch.cat([cls.to(x.dtype), x], 1)
        return x

    def forward(self, images, ids_keep=None, mask=None):
        """Tokens (B, [1+]N, D) after the final norm. ids_keep (B, K): only these patches enter.
        mask: which tokens attend to which, as in attention()."""
        return self.blocks_from(self.embed(images, ids_keep), 0, mask)

    def blocks_until(self, images, k):
        """Tokens (B, [1+]N, D) after the first k blocks, before any final norm."""
        return run_blocks(self.blocks[:k], self.embed(images), grad_checkpoint=self.grad_checkpoint)

    def blocks_from(self, x, k, mask=None):
        """The other blocks and the final norm, for x = blocks_until(images, k)."""
        return self.norm(run_blocks(self.blocks[k:], x, mask, grad_checkpoint=self.grad_checkpoint))

    def patch_tokens(self, images, mask=None):
        """(B, 3, S, S) -> (B, N, D) after the final norm, without the class token."""
        return self(images, mask=mask)[:, -self.grid**2:]


class TextTransformer(nn.Module):
    """Token and learned position embeddings, pre-norm blocks, final norm."""

    def __init__(self, vocab, length, dim, depth, heads, causal, grad_checkpoint=False):
        super().__init__()
        self.causal = causal
        self.grad_checkpoint = grad_checkpoint
        self.token_embed = nn.Embedding(vocab, dim)
        self.pos_embed = nn.Parameter(torch.zeros(length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, tokens, valid=None):
        """tokens, valid (B, L) -> (B, L, D). valid: True on text, False on the padding after it.

        Causal attention needs no `valid`: padding comes last, so no text token sees it.
        """
        x = self.token_embed(tokens) + self.pos_embed[:tokens.shape[1]]
        mask = None if self.causal else valid[:, None, None, :]
        x = run_blocks(self.blocks, x, mask, self.causal, grad_checkpoint=self.grad_checkpoint)
        return self.norm(x)


def at_least_float32(x):
    """bfloat16, which autocast makes, becomes float32; float32 and float64 stay."""
    return x.float() if x.dtype == torch.bfloat16 else x


def l2_normalize(x):
    """x / |x| along the last dimension, not in bfloat16."""
    return F.normalize(at_least_float32(x), dim=-1)


def normalize_patches(patches):
    """MAE's targets (..., P): each patch minus its mean, over its deviation; -> them, mean, std.

    The variance is unbiased. Needs float32: in bfloat16 flat patches fail.
    """
    mean = patches.mean(-1, keepdim=True)
    centered = patches - mean
    variance = centered.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    std = (variance + 1e-6).sqrt()
    return centered / std, mean, std


def last_token(hidden_states, valid):
    """(B, L, D), (B, L) with padding last -> (B, D): the state of each row's last valid token."""
    last = valid.sum(1) - 1
    index = last[:, None, None].expand(-1, 1, hidden_states.shape[2])
    return hidden_states.gather(1, index)[:, 0]


def checkpointed_chunks(fn, micro, *rows):
    """fn(*rows), `micro` rows at a time, recomputed in backward: less memory. 0: all at once.

    fn gives a tensor, or a tuple of tensors, with a row for each input row.
    """
    if not micro or micro >= len(rows[0]):
        return fn(*rows)
    chunks = zip(*[row.split(micro) for row in rows])
    results = [checkpoint(fn, *chunk, use_reentrant=False) for chunk in chunks]
    if isinstance(results[0], torch.Tensor):
        return torch.cat(results)
    return tuple(torch.cat(parts) for parts in zip(*results))


def adamw(model, wd, betas, eps=1e-8):
    """AdamW that decays all but scalars and 1-D shapes (MAE: biases and gains); tokens decay."""
    decay = []
    no_decay = []
    for p in model.parameters():
        if p.requires_grad:
            (decay if p.ndim >= 2 else no_decay).append(p)
    groups = [{"params": decay, "weight_decay": wd}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


# ---- ranks ----

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args):
    """print on rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, args)), file=sys.stdout)
        sys.stdout.flush()


def init_distributed():
    """Join the ranks that torchrun started, once per process; -> this rank's device.

    One machine:  torchrun --standalone --nproc_per_node 8 mug.py ...
    Several:      torchrun --nnodes N --node_rank K --master_addr HOST --nproc_per_node 8 mug.py ...
    Slurm:        srun --ntasks-per-node 1 bash -c 'torchrun --nnodes $SLURM_NNODES
                  --node_rank $SLURM_NODEID --master_addr HOST --nproc_per_node 8 mug.py ...'
    """
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set and {name} is not: "
                                "start with torchrun, or unset WORLD_SIZE")
        # two hours: while rank 0 indexes large data for the first time, the others wait
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    if not cuda:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def on_main_process(fn):
    """fn() on rank 0 while the others wait; -> its result there, None on them.

    A UserError of rank 0 is raised on all ranks.
    """
    result = None
    problem = [None]
    if rank() == 0:
        try:
            result = fn()
        except UserError as error:
            problem = [str(error)]
    if world_size() > 1:
        dist.broadcast_object_list(problem, src=0, device=torch.device("cpu"))
    if problem[0] is not None:
        raise UserError(problem[0])
    return result


def main_process_first(make):
    """make() on rank 0, then on the others, which find the files that it left."""
    result = on_main_process(make)
    return result if rank() == 0 else make()


def all_gather(x):
    """(B, ...) -> (ranks * B, ...) in rank order, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce_sum(grad).chunk(world_size())[rank()]


def all_gather_with_grad(x):
    """(B, ...) -> (ranks * B, ...) in rank order, with exact gradients.

    The loss is the mean of the ranks' losses, and each of them depends on every rank's x. So the
    gradient of x is summed over ranks here, and average_gradients divides by their number.
    """
    return _AllGather.apply(x) if world_size() > 1 else x


def all_reduce_sum(x):
    """Sum of x over ranks, without gradient; a global mean divides by a global count."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def average_gradients(parameters):
    """Replace every gradient by its mean over ranks, in one all-reduce.

    The same parameters have gradients on every rank: what a step computes depends on flags and
    step alone.
    """
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def check_batch(batch, group=None):
    """Does the global batch divide into ranks, and a rank's rows into --group?"""
    ranks = world_size()
    if batch % ranks:
        remedy = math.ceil(batch / ranks) * ranks
        raise UserError(f"--batch {batch} is the global batch and does not divide into {ranks} "
                        f"ranks: try {remedy}")
    rows = batch // ranks
    if group is not None and (group < 2 or group % 2 or rows % group):
        remedy = f"--group {math.gcd(group + group % 2, rows)}"
        if rows % 2:
            remedy = f"--batch {batch + ranks}"
        raise UserError(f"--group {group} must be even and divide the {rows} rows of a rank: "
                        f"try {remedy}")


def partner(x, group):
    """(B, ...) -> the partners' rows: each group of consecutive rows in reverse.

    Its own inverse; as groups are even, no row is its own partner. Ranks hold whole groups.
    """
    return x.unflatten(0, (-1, group)).flip(1).flatten(0, 1)


def cpu_count():
    """CPU cores of this rank: those lent to the process, shared by the ranks of this machine."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


# ---- seeds: randomness never depends on rank, number of ranks or loader worker ----

class Stream(enum.IntEnum):
    """First number of each seed, so that no two uses draw the same numbers.

    Keys of one stream have one length: numpy's SeedSequence makes the same of (7, 3) and (7, 3, 0).
    """
    SHARDS = 1  # (seed, epoch): order of the shards
    WINDOW = 2  # (seed, epoch, window): order of the samples in a window of shards
    SAMPLE = 3  # (seed, epoch, sample): what is drawn while a sample is read
    BATCH = 4  # (seed, step): what each row of a global batch draws
    STEP = 5  # (seed, step): what all rows of a step share
    FIGURE = 6  # (seed,): pictures; (document,): what is drawn of held-out documents
    TOY = 8  # (seed, part, number): toy data


def rng(stream, *key):
    """A numpy generator for integers such as (seed, epoch, sample)."""
    return np.random.default_rng([int(stream), *map(int, key)])


def generator(stream, *key):
    """A torch generator on the CPU for integers such as (seed, step)."""
    return torch.Generator().manual_seed(int(rng(stream, *key).integers(2**63)))


def batch_noise(seed, step, batch, *shape, device=torch.device("cpu")):
    """Uniform noise (B, *shape) for this rank's rows of a step.

    Drawn for the whole global batch, so that a row keeps its noise on any number of ranks.
    """
    noise = torch.rand(batch, *shape, generator=generator(Stream.BATCH, seed, step))
    noise = noise.chunk(world_size())[rank()]
    if device.type == "cuda":
        noise = noise.pin_memory()  # else the host would wait for the device
    return noise.to(device, non_blocking=True)


# ---- precision and schedule ----

def autocast(precision, device):
    """auto and bf16: bfloat16 on CUDA; auto and fp32: float32 on the CPU. fp32 forces float32."""
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"--precision {precision}: choose auto, bf16 or fp32")
    if precision == "bf16" and device.type == "cpu":
        raise UserError("--precision bf16 is slower than float32 on a CPU: leave it out")
    enabled = precision != "fp32" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def compiled(fn, compile, device):
    """torch.compile(fn) where --compile says so; None: on CUDA. Names of weights stay."""
    if compile is None:
        compile = device.type == "cuda"
    if not compile:
        return fn
    compilers = [os.environ.get("CXX", "g++"), "g++", "clang++"]
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers):
        raise UserError("--compile needs a C++ compiler and there is none: install g++, "
                        "or use --no-compile")
    return torch.compile(fn)


def cosine_lr(step, steps, warmup, max_lr):
    """Linear warm-up, at most a tenth of the run, then half a cosine to 0."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return max_lr * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return max_lr * (1 + math.cos(math.pi * done)) / 2


# ---- command line ----

class Parser(argparse.ArgumentParser):
    """Errors are one line, that of an unknown flag names the sub-command."""

    def error(self, message):
        raise UserError(f"{message}: {self.prog} -h lists the flags")

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def at_least(least):
    """A type of argparse: integers that are not smaller."""
    def integer(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: at least {least} is needed")
        return value
    return integer


def flag(name):
    return "--" + name.replace("_", "-")


def parse(Config, DEMO, doc="", argv=None):
    """Command line -> Config. A flag for each field; its help is the field's trailing comment.

    Where no training data are given, the values of DEMO stand between defaults and flags.
    """
    parser = Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        default = f"{field.default}"
        if field.name in DEMO:
            default += f"; demo {DEMO[field.name]}"
        text = comments.get(field.name, "").replace("%", "%%")
        options = {"default": argparse.SUPPRESS, "help": f"{text} [{default}]"}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.name == "size":
            options["choices"] = SIZES
        elif field.type is list:
            options["nargs"] = "+"
            options["metavar"] = "PATH"
        else:
            options["type"] = field.type
            options["metavar"] = field.type.__name__.upper()
        parser.add_argument(flag(field.name), **options)

    given = vars(parser.parse_args(argv))
    if "size" in given:
        dim, depth, heads = SIZES[given["size"]]
        given = {"dim": dim, "depth": depth, "heads": heads, **given}
    is_demo = not any(name in given for name in training_fields(Config))
    values = {**DEMO, **given} if is_demo else given
    if values.get("init"):
        import eval as evaluation  # reads encoder files
        values = {**values, **evaluation.fields_from_init(values["init"], Config, given)}
    cfg = Config(**values)
    check_values(cfg)
    return cfg


def training_fields(Config):
    """Names of the fields that hold paths of training shards: those of type list but `val`."""
    fields = dataclasses.fields(Config)
    return [field.name for field in fields if field.type is list and field.name != "val"]


def check_values(cfg):
    """Numbers are not negative, sizes at least 1, scales positive, shares at most 1."""
    bounds = {"eval_every": -1, "scale": 1e-3, "temperature": 1e-6, "resize": 1}
    for name in "batch steps image_size patch depth vocab_size save_every log_every".split():
        bounds[name] = 1
    for name, value in dataclasses.asdict(cfg).items():
        if type(value) not in (int, float):  # a bool is an int, too
            continue
        least = bounds.get(name, 0)
        if name.endswith(("dim", "heads", "embed")):
            least = 1
        if name.endswith("context"):  # in tokens: begin, a word, end
            least = 3
        if not value >= least:
            raise UserError(f"{flag(name)} {value}: at least {least} is needed")
        if name.endswith(("scale", "share", "ratio", "momentum", "smoothing")) and value > 1:
            raise UserError(f"{flag(name)} {value}: at most 1 is possible")


def run(main, Config, DEMO, doc):
    """Entry point of a script."""
    def parse_and_run():
        main(parse(Config, DEMO, doc))
    run_command(parse_and_run)


def printable(text):
    """One line: names may hold line ends or terminal codes."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def one_line(error):
    return str(error).partition("\n")[0] or type(error).__name__


def run_command(command):
    """command(); a UserError becomes its one line and exit code 2.

    Output into a pipe that nobody reads on (head), or that is closed, ends quietly.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # what a terminal cannot print
    line = None
    try:
        try:
            command()
        finally:
            sys.stdout.flush()
    except UserError as error:
        line = printable(error)
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            line = f"{one_line(error)}: fewer --workers need less memory"
        elif isinstance(error, dist.DistError) or "gloo/" in str(error):
            line = f"rank {rank()} has lost another rank: torchrun names the first that failed"
        else:
            raise
    except KeyboardInterrupt:  # while training, a signal leads to a save instead
        line = "interrupted"
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:
            raise
        line = printable(f"{error.filename}: {error.strerror}")
    if line is not None:
        if rank() > 0:  # rank 0 says it, and its end ends the others
            time.sleep(2)
        print(f"error: {line}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(0 if line is None else 2)


# ---- checkpoints: tensors, numbers and strings; never a pickle of our own classes ----

# Settings that may change when a run goes on, as may all paths of data.
FREE = ("out", "fresh", "workers", "save_every", "log_every", "eval_every", "compile", "micro",
        "chunk", "grad_checkpoint")


def owns_output_folder(main):
    """Decorator of main(cfg): cfg.out exists and belongs to this start alone until main returns.

    lockf, since flock would stay with forked loader workers; it ends with the process (kill -9).
    """
    @functools.wraps(main)
    def main_with_lock(cfg):
        init_distributed()
        lock = on_main_process(functools.partial(lock_folder, cfg.out))
        try:
            return main(cfg)
        finally:
            if lock is not None:
                lock.close()
    return main_with_lock


def lock_folder(folder):
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, ".lock"), "w")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror}): choose another")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"--out {folder} is in use by another run: choose another --out")
        print0(f"warning: {folder} has no locks ({error.strerror}): start only one run in it")
    return lock


def load_torch_file(path):
    """What a torch file of tensors, numbers and strings holds; nothing in it is executed.

    ValueError for anything else, FileNotFoundError for none.
    """
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is not None:
            raise ValueError("it is damaged")  # torch does not check
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:  # whose first line is torch's advice
        blocked = re.search(r"(?:GLOBAL|class|global) ([\w.]+\.[\w.]+)", str(error))
        what = blocked[1] if blocked else "other objects"
        raise ValueError(f"it holds {what}, not tensors alone; save the state_dict() alone")
    except Exception as error:  # zip, pickle and torch each have their own errors for a bad file
        raise ValueError(one_line(error))


def read_checkpoint(path):
    """The dict that save() wrote. ValueError for anything else, FileNotFoundError for none."""
    if os.path.isfile(path) and not zipfile.is_zipfile(path):
        raise ValueError("it is cut short, or no checkpoint of this project")
    state = load_torch_file(path)
    if not isinstance(state, dict) or "method" not in state or "config" not in state:
        raise ValueError("it is no checkpoint of this project")
    return state


def save(cfg, model, optimizer, step, vocab):
    """Rank 0 writes out/last.pt, whole or not at all; UserError on all ranks if it cannot."""
    state = {
        "method": cfg.method,
        "config": dataclasses.asdict(cfg),
        "vocab": vocab,
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "mean": model.vision.mean.flatten().tolist(),
        "std": model.vision.std.flatten().tolist(),
    }
    path = pathlib.Path(cfg.out, "last.pt")
    new_path = pathlib.Path(cfg.out, "last.pt.tmp")

    def write():
        try:
            with open(new_path, "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(new_path, path)
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
            new_path.unlink(missing_ok=True)
            if str(error).startswith("DataLoader worker"):  # one has died during the save
                raise
            raise UserError(f"{path} of step {step} could not be written ({one_line(error)}): "
                            "make room; the same command goes on from the checkpoint before")

    on_main_process(write)


def resume_from(cfg, model, optimizer):
    """Load out/last.pt, else --init, else nothing; -> step to start from, vocabulary or None."""
    path = pathlib.Path(cfg.out, "last.pt")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun
    if cfg.fresh and not restarted:
        on_main_process(functools.partial(path.unlink, missing_ok=True))
    if not path.exists():
        if not cfg.init:
            return 0, None
        import eval as evaluation
        return 0, evaluation.init_model(cfg, model)
    try:
        state = read_checkpoint(path)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, or --fresh starts anew")
    check_same_run(cfg, state)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["vocab"]


def check_same_run(cfg, state):
    if state["method"] != cfg.method:
        raise UserError(f"--out {cfg.out} holds a run of {state['method']}, not of {cfg.method}: "
                        "choose another --out, or --fresh")
    free = [*FREE, "val", *training_fields(cfg)]
    changed = []
    for name, value in dataclasses.asdict(cfg).items():
        before = state["config"].get(name)
        if name not in free and value != before:
            changed.append(f"{flag(name)} {before} -> {value}")
    if changed:
        raise UserError(f"--out {cfg.out} holds a run with other settings ({', '.join(changed)}): "
                        "repeat them, choose another --out, or --fresh")


def write_config(cfg, model, start_step):
    """out/config.json when a run begins; later only a warning if the script has changed since."""
    with open(inspect.getsourcefile(type(model)), "rb") as f:
        script_hash = hashlib.sha256(f.read()).hexdigest()
    path = pathlib.Path(cfg.out, "config.json")
    if not start_step or not path.exists():
        config = {**dataclasses.asdict(cfg), "script_hash": script_hash}
        path.write_text(json.dumps(config, indent=1))
    elif json.loads(path.read_text())["script_hash"] != script_hash:
        print0("warning: the script has changed since this run began, and the weights in "
               f"{cfg.out} are of the older code: --fresh starts anew")


def print_summary(cfg, device, model, sources, start_step, max_lr):
    """The lines that a run opens with; also out/config.json. sources: training sets, or None."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print0(f"{cfg.method}: {millions:.1f} M parameters, {world_size()} rank(s) on {name}")
    for source in sources:
        if source is None:
            continue
        epochs = cfg.steps * source.order.batch / len(source.index)
        print0(f"data: {source.index.summary()}; {source.order.batch} a step, {epochs:.1f} epochs")
        for line in source.index.warnings()[:5]:
            print0(f"warning: {line}")
    rate = f"lr {cfg.lr:g}"
    if max_lr != cfg.lr:
        rate += f" for 256 rows, so {max_lr:g} for {cfg.batch}"
    print0(f"{cfg.steps:,} steps of {cfg.batch}, {rate}, to {cfg.out}")
    if start_step >= cfg.steps:
        print0("this run is finished: it is only evaluated; --fresh starts anew")
    elif start_step:
        print0(f"going on from step {start_step}")
    if rank() == 0:
        write_config(cfg, model, start_step)


# ---- log ----

def is_save_step(step, cfg):
    return (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps


def is_eval_step(step, cfg):
    """An evaluation in between; the one at the end is main's."""
    return cfg.eval_every > 0 and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps


class Log:
    """A line in out/log.jsonl every cfg.log_every steps and at each save; on the screen a bar, or
    where that is no terminal a line now and then.

    Reading values waits for the device, which is why it is not done at every step. All ranks call
    the log at every step. It raises UserError on all of them when more than a tenth of the samples
    cannot be read, or when loss or gradient is not finite; a save step is always checked before it
    is saved, so that no checkpoint holds NaN. TERM, INT or USR1 to any rank sets `stop` on all
    ranks at the next line; main then saves and ends.
    """

    def __init__(self, cfg, start_step, reasons, unreadable):
        """reasons: why samples are skipped, in the order of batch["skipped"]; unreadable: which of
        them count towards the tenth."""
        self.cfg = cfg
        self.start_step = start_step
        self.saved_step = start_step  # of the last checkpoint, 0 = none
        self.path = os.path.join(cfg.out, "log.jsonl")
        self.stop = False  # all ranks have agreed to stop
        self.signalled = False  # this rank got a signal
        self.reasons = reasons
        self.is_unreadable = torch.tensor([reason in unreadable for reason in reasons])
        self.skipped = torch.zeros(len(reasons), dtype=torch.long)  # since the last line
        self.total_skipped = torch.zeros_like(self.skipped)  # of all ranks, in this start
        self.data_wait = 0.0  # seconds, since the last line
        self.last_step = start_step
        self.last_time = time.perf_counter()
        self.last_print = 0.0
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=cfg.steps, initial=start_step, unit="step", dynamic_ncols=True,
                        disable=rank() > 0 or not self.terminal)
        if rank() == 0:
            cut_log(self.path, start_step)
        self.handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self.handlers[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.signalled = True

    def __call__(self, step, batch, lr, loss, grad_norm, terms):
        """loss, terms {name: 0-dim tensor}: this rank's shares, whose mean over ranks is logged."""
        self.bar.update()
        self.skipped += batch["skipped"]
        self.data_wait += batch["data_wait"]
        if (step + 1) % self.cfg.log_every and not is_save_step(step, self.cfg):
            return
        values = {"loss": loss, "grad_norm": grad_norm, **terms}
        packed = torch.stack([value.detach().double().cpu() for value in values.values()])
        counts = torch.cat([self.skipped, torch.tensor([int(self.signalled)])]).double()
        sums = all_reduce_sum(torch.cat([packed, counts]))
        n = len(values)
        means = dict(zip(values, (sums[:n] / world_size()).tolist()))
        self.total_skipped += sums[n:-1].long()
        self.stop = sums[-1].item() > 0
        self.skipped.zero_()
        self.write(step, lr, means)
        self.check(step, means)
        if self.stop or is_save_step(step, self.cfg):
            self.saved_step = step + 1  # main saves now

    def write(self, step, lr, values):
        """One line of JSON, in which what is not finite is null; the bar, or a line of text.

        images_per_s: rows of the global batch (of LCL, documents), in all the time since the last
        line, with saves and evaluations.
        """
        now = time.perf_counter()
        seconds = now - self.last_time
        row = {"step": step}
        for name, value in values.items():
            row[name] = value if math.isfinite(value) else None
        row["lr"] = lr
        row["images_per_s"] = self.cfg.batch * (step + 1 - self.last_step) / seconds
        row["data_wait"] = self.data_wait / seconds
        row["skipped"] = int(self.total_skipped.sum())
        text = (f"loss {values['loss']:.3f}, {row['images_per_s']:.0f} images/s, "
                f"waiting for data {row['data_wait']:.0%}")
        self.bar.set_postfix_str(text)
        if not self.terminal and (now - self.last_print > 10 or step + 1 == self.cfg.steps):
            print0(f"step {step + 1} of {self.cfg.steps}: {text}")
            self.last_print = now
        if rank() == 0:
            try:
                with open(self.path, "a") as f:
                    f.write(json.dumps(row) + "\n")
            except OSError as error:  # a full disk; save() says more
                print0(f"warning: {self.path} was not written ({error.strerror})")
        self.data_wait = 0.0
        self.last_step = step + 1
        self.last_time = now

    def check(self, step, values):
        problem = None
        n_samples = (step + 1 - self.start_step) * self.cfg.batch
        n_unreadable = int(self.total_skipped[self.is_unreadable].sum())
        if n_samples >= 1000 and n_unreadable > 0.1 * n_samples:
            problem = (f"{n_unreadable} of {n_samples} samples could not be read: "
                       "python data.py check names them")
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            last_checkpoint = "none"
            if self.saved_step:
                last_checkpoint = f"{self.cfg.out}/last.pt of step {self.saved_step}"
            problem = (f"loss {values['loss']}, gradient norm {values['grad_norm']} at step "
                       f"{step}: try a lower --lr; last checkpoint: {last_checkpoint}")
        if problem is not None:
            self.close()
            raise UserError(problem)

    def close(self):
        """End the bar, give the signals back, say what was skipped and how to go on."""
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        counts = zip(self.total_skipped.tolist(), self.reasons)
        skips = [f"{n} {reason}" for n, reason in counts if n]
        if skips:
            print0(f"samples skipped or mended: {', '.join(skips)}")
        if self.stop:
            print0(f"stopped at step {self.saved_step}: the same command goes on from there")


def cut_log(path, start_step):
    """Drop the lines from start_step on, which are run again; the last may be cut short."""
    kept = []
    if start_step and os.path.exists(path):
        with open(path) as f:
            for line in f:
                if not line.endswith("\n") or json.loads(line)["step"] >= start_step:
                    break
                kept.append(line)
    with open(path, "w") as f:
        f.writelines(kept)
