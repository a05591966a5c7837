"""What several scripts share and no paper has an opinion on: ViT and text transformer, ranks, randomness, precision, schedule,
command line, checkpoints, log. Nothing here knows a loss.

Dimension key: B rows of this rank, W ranks, N patches, L text tokens, D width, H heads.
Read ViT and Block (the models), then gather and averaging (what makes W ranks one run), then Log (what a step tells the others).
"""
import argparse, collections, contextlib, dataclasses, difflib, inspect, json, math, os, re, resource, signal, sys, time, zipfile
from datetime import timedelta

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")          # read when torch loads OpenMP: threads that spin while they wait take the loader's core

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# torch 2.13 gave these two new names and warns at every call of the old ones
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16), "g": (1536, 36, 24)}
# Fields that a resumed run may change, and fields that must be at least 1.
ELSEWHERE = "out data docs labels val workers log_every save_every eval_every compile micro grad_checkpoint fresh timeout dry_run".split()
AT_LEAST_ONE = ("batch steps resize image_size patch dim heads text_dim text_heads vocab_size save_every log_every timeout max_images block "
                "unit entries embed").split()


class UserError(Exception):
    """A mistake of the person at the keyboard, told in one line: the thing, its value, the remedy. Exit code 2."""


# ---- models ----

def attention(q, k, v, mask=None, causal=False):
    """Scaled dot-product attention; q, k, v (B, H, L, D/H). mask: None, bool (True = may attend), or a FlexAttention BlockMask."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:   # two matrix products: SDPA's bf16 backward on CPU is 10 to 40 times slower
        if mask is None and causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        return (scores if mask is None else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)).softmax(-1, torch.float32).to(v.dtype) @ v
    if mask is None or isinstance(mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
    from torch.nn.attention.flex_attention import flex_attention   # its import costs a second that only packed documents need
    return flex_attention(q, k, v, block_mask=mask)


def split_heads(x, heads):                                   # (B, L, D) -> (B, H, L, D/H)
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention under timm's names: qkv rows are all of q, then k, then v, inside each head by head."""
    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise UserError(f"a width (--dim ...) of {dim} does not divide into {heads} heads: try {math.gcd(dim, heads)}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None, causal=False, past=None):
        """past: list that holds keys and values of all earlier tokens (empty at first) and takes in those of x."""
        B, L, D = x.shape
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, 2))            # each (B, H, L, D/H)
        if past is not None:
            past[:] = k, v = [torch.cat(pair, 2) for pair in zip(past, (k, v))] or [k, v]
        return self.proj(attention(q, k, v, mask, causal).transpose(1, 2).reshape(B, L, D))


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

    def forward(self, x, mask=None, causal=False, past=None):    # x (B, L, D)
        x = x + self.attn(self.norm1(x), mask, causal, past)
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another, whose width may differ."""
    def __init__(self, dim, memory_dim, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(memory_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def memory(self, latent):                                # (B, N, memory_dim) -> keys and values (B, H, N, D/H)
        return [split_heads(part, self.heads) for part in self.kv(latent).chunk(2, 2)]

    def forward(self, x, memory):
        return self.proj(attention(split_heads(self.q(x), self.heads), *memory).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to another sequence (an image's tokens), MLP; pre-norm."""
    def __init__(self, dim, memory_dim, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.attn, self.cross, self.mlp = Attention(dim, heads), CrossAttention(dim, memory_dim, heads), Mlp(dim, 4 * dim)

    def forward(self, x, latent, mask=None, causal=False, memory=None, past=None):
        """x (B, L, D), latent (B, N, memory_dim). memory: self.cross.memory(latent) made before; mask, causal, past: see Attention."""
        x = x + self.attn(self.norm1(x), mask, causal, past)
        x = x + self.cross(self.norm2(x), memory or self.cross.memory(latent))
        return x + self.mlp(self.norm3(x))


def run_blocks(blocks, x, *args, recompute=False, past=None):
    """x through the blocks. recompute: each anew in backward. past: one list of keys and values for each block (see Attention)."""
    for block, seen in zip(blocks, past or [None] * len(blocks)):
        x = checkpoint(block, x, *args, use_reentrant=False) if recompute and x.requires_grad else block(x, *args, past=seen)
    return x


def init_weights(module):
    """Xavier-uniform matrices (MAE, and ViT's own code), which suits any width; embeddings truncated normal 0.02 (BERT); zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)


def sincos(grid, dim):
    """Fixed 2-D sine-cosine positions (grid * grid, dim), as MAE stores them: the first half of the width tells the column, the second the row."""
    if dim % 4:
        raise UserError(f"a width (--dim ...) of {dim} is no multiple of 4, as sine-cosine positions need: try {-(-dim // 4) * 4}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega                             # (grid, dim/4)
    table = torch.cat([angle.sin(), angle.cos()], 1)                                             # (grid, dim/2)
    return torch.cat([table.repeat(grid, 1), table.repeat_interleave(grid, 0)], 1).float()


class ViT(nn.Module):
    """Vision transformer whose names, shapes and numerics are timm's vit_*_patch*_224 without head, so weights travel both ways.

    images (B, 3, S, S): uint8, normalised here on the device, or float, taken as already normalised.
    """
    def __init__(self, image_size, patch, dim, depth, heads, mlp_ratio=4, cls=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), fixed=False):
        super().__init__()
        if image_size % patch:
            raise UserError(f"--image-size {image_size} is not divisible by --patch {patch}: try {image_size // patch * patch or patch}")
        self.patch, self.grid, self.recompute = patch, image_size // patch, False
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch, patch)   # holds weights in timm's shape; forward uses them as a matrix
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if cls else None
        self.pos_embed = nn.Parameter(torch.zeros(1, cls + self.grid ** 2, dim), requires_grad=not fixed)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.apply(init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(dim, -1))                      # MAE: as a linear layer
        nn.init.zeros_(self.patch_embed.proj.bias)
        for table in [self.pos_embed] + [self.cls_token] * cls:
            nn.init.trunc_normal_(table, std=0.02)
        if fixed:
            self.pos_embed.data = F.pad(sincos(self.grid, dim), (0, 0, int(cls), 0))[None]       # the class token's row is zero

    def patches(self, images):
        """(B, 3, S, S) -> (B, N, 3 * patch^2), row by row, each in the order (channel, y, x) of the convolution's weight."""
        if not images.is_floating_point():
            images = images.to(self.mean.dtype).div_(255).sub_(self.mean).div_(self.std)
        B, p, g = len(images), self.patch, self.grid
        return images.view(B, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(B, g * g, 3 * p * p)

    def forward(self, images, ids_keep=None, tap=None, upto=None):
        """Tokens (B, [1+]N, D) after the final norm. images: see the class, or their patches as patches() makes them. ids_keep (B, K): only these
        patches enter. tap=k: also the tokens after k blocks, not normalised. upto=k: stop after k blocks and return those alone."""
        x, position = images if images.ndim == 3 else self.patches(images), self.pos_embed[:, self.pos_embed.shape[1] - self.grid ** 2:]
        if ids_keep is not None:                                                                 # dropped before anything is computed on them
            x = x.gather(1, ids_keep[..., None].expand(-1, -1, x.shape[2]))
            position = F.embedding(ids_keep, position[0])    # position[0][ids_keep], whose gradient on the CPU depends on its threads
        x = F.linear(x, self.patch_embed.proj.weight.flatten(1), self.patch_embed.proj.bias) + position
        if self.cls_token is not None:
            x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1).to(x.dtype), x], 1)
        k = upto if upto is not None else tap if tap is not None else len(self.blocks)
        tapped = run_blocks(self.blocks[:k], x, recompute=self.recompute)
        if upto is not None:
            return tapped
        x = self.norm(run_blocks(self.blocks[k:], tapped, recompute=self.recompute))
        return x if tap is None else (x, tapped)

    def patch_tokens(self, images):                          # (B, 3, S, S) -> (B, N, D), after the final norm, without the class token
        return self(images)[:, self.cls_token is not None:]


class TextTransformer(nn.Module):
    """Token and learned position embeddings, pre-norm blocks, final norm. causal: a token sees only itself and what came before."""
    def __init__(self, vocab, length, dim, depth, heads, causal):
        super().__init__()
        self.causal, self.recompute = causal, False
        self.token_embed = nn.Embedding(vocab, dim)
        self.pos_embed = nn.Parameter(torch.zeros(length, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, tokens, valid=None, at=0, past=None):
        """tokens, valid (B, L) -> (B, L, D). valid: True on text, False on the padding behind it; causal needs none, as padding comes last.
        past (causal only): lists as run_blocks takes them; then tokens is (B, 1), the one at position `at`."""
        x = self.token_embed(tokens) + self.pos_embed[at:at + tokens.shape[1]]
        mask = None if self.causal else valid[:, None, None, :]
        return self.norm(run_blocks(self.blocks, x, mask, self.causal and past is None, recompute=self.recompute, past=past))


def adamw(model, cfg, betas, eps=1e-8):
    """AdamW with decay on matrices and longer shapes only (MAE: biases, gains and other 1-D parameters have none)."""
    params = [p for p in model.parameters() if p.requires_grad]
    wide, thin = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    return torch.optim.AdamW([{"params": wide, "weight_decay": cfg.wd}, {"params": thin, "weight_decay": 0.0}], betas=betas, eps=eps, fused=True)


def unit(x):
    """x / |x| along the last dimension, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def normalised(patches):
    """MAE's targets: each patch's values (..., P) less their mean, over their deviation (unbiased), and both. Needs float32: bfloat16 fails on flat
    patches."""
    mean = patches.mean(-1, keepdim=True)
    centred = patches - mean
    std = (centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1) + 1e-6).sqrt()       # patches.var takes four times as long on the CPU
    return centred / std, mean, std


def at_end(states, valid):                                   # (B, L, D), (B, L) with padding last -> (B, D): each row's last valid state
    return states.gather(1, (valid.sum(1) - 1)[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]


def in_chunks(fn, micro, *rows):
    """fn(*rows) -> a tensor or a tuple of them, a row for each input row; `micro` rows at a time, recomputed in backward: less memory."""
    if not micro or micro >= len(rows[0]):
        return fn(*rows)
    parts = [checkpoint(fn, *chunk, use_reentrant=False) for chunk in zip(*(r.split(micro) for r in rows))]
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else tuple(torch.cat(column) for column in zip(*parts))


# ---- ranks ----

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args):
    if rank() == 0:
        tqdm.write(" ".join(map(str, args)), file=sys.stdout)
        sys.stdout.flush()


_store, _turns, _own, _refused = None, 0, None, False        # _own: group in which gradients travel in backward; _refused: no room for the last save


def join(timeout=600):
    """Enter the process group that torchrun announces (once per process). Returns this rank's device."""
    global _store, _own
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        _store, r, w = next(rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":                             # torchrun's own: it outlives --max-restarts
            _store = dist.PrefixStore(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", _store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"   # evaluation gathers on the CPU
        dist.init_process_group(backend, store=dist.PrefixStore("group", _store), rank=r, world_size=w, timeout=timedelta(seconds=timeout))
        # Backward has collectives of its own: in one group with the gradients, ranks that come to these in another order would mix them up. nccl
        # wants one order over groups as well, which holds as the graphs of the five scripts depend on flags and step, not on a rank's rows.
        _own = dist.new_group(timeout=timedelta(seconds=timeout))
    return device


def check_rows(cfg):
    """Do the rows of the global batch divide into ranks, a rank's into --micro chunks and whole blocks?"""
    if cfg.batch % world():
        raise UserError(f"--batch {cfg.batch} is the global batch and does not divide into {world()} ranks: try {-(-cfg.batch // world()) * world()}")
    rows = cfg.batch // world()
    if cfg.micro and rows % cfg.micro:
        raise UserError(f"--micro {cfg.micro} does not divide the {rows} rows of a rank")
    if (block := getattr(cfg, "block", None)) and (block % 2 or rows % block):
        raise UserError(f"--block {block} must be even, so that nobody is his own partner, and divide the {rows} rows of a rank")


def start(cfg):
    """Check what concerns ranks, join them, make out/, seed. Returns the device."""
    device = join(cfg.timeout)
    check_rows(cfg)
    try:
        os.makedirs(cfg.out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {cfg.out} cannot be a folder ({error}): choose another") from None
    torch.manual_seed(cfg.seed)                              # the same initial weights on every rank: nothing broadcasts them later
    return device


def rank0_first(make):
    """Rank 0 runs make() while the others wait on the store, where no collective's timeout applies; then they run it and find it done."""
    global _turns
    if _store is None:
        return make()
    _turns += 1
    if rank() > 0:
        _store.wait([f"turn{_turns}"], timedelta(days=7))
    made = make()
    if rank() == 0:
        _store.set(f"turn{_turns}", "done")
    return made


def cores():                                                 # CPU cores of this rank; a batch system may have lent a part of the machine
    lent = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, lent // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def to_device(x, device):
    """A CPU tensor on its way to the device. From pinned memory: else the host may wait until the device has done all that it was given before."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def all_gather(x):
    """(B, ...) -> (W * B, ...) in rank order; carries no gradient (gather does)."""
    if world() == 1:
        return x
    out = x.new_empty(world() * len(x), *x.shape[1:])
    ALL_GATHER(out, x.detach().contiguous())
    return out


def total(x):
    """Sum of x over ranks; carries no gradient. For counts: a mean over all ranks divides by the total, never by a rank's own."""
    x = x.detach().clone()
    if world() > 1:
        dist.all_reduce(x)
    return x


def reduce_scatter(x):
    """(W * B, ...) -> (B, ...): the sum over ranks of this rank's rows."""
    if world() == 1:
        return x
    out = x.new_empty(len(x) // world(), *x.shape[1:])
    REDUCE_SCATTER(out, x.contiguous())
    return out


def in_turn(x):
    """The rows (B, ...) of every rank, one rank after another, so that never all are in memory; each stands only until the next is asked for."""
    own = x.contiguous()
    other = torch.empty_like(own) if world() > 1 else None
    for r in range(world()):
        part = own if r == rank() else other
        if world() > 1:
            dist.broadcast(part, r)
        yield part


def sum_at(r, x):
    """The sum of x over ranks on rank r, 0 on the others. x is overwritten."""
    if world() > 1:
        dist.reduce(x, r)
    return x if r == rank() else 0


class _Gather(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: all_gather(x))
    backward = staticmethod(lambda ctx, grad: reduce_scatter(grad))     # SUM: rank losses are means over own rows; gradients get averaged


def gather(x):
    """(B, ...) -> (W * B, ...) in rank order, with exact gradients when rank losses are shares whose mean is the loss."""
    return _Gather.apply(x) if world() > 1 else x


@contextlib.contextmanager
def averaging(params, bucket=2 ** 22):
    """Around backward(): every gradient becomes its mean over ranks, as average_gradients makes it, most of it while backward still runs.

    They travel in buckets of `bucket` numbers (16 MiB of float32), the last parameters first, as backward comes to them in about this order. A
    bucket is sent when its gradients and all before it have arrived, what is left at the end: every rank sends the same in one order, even
    where graphs differ. A compiled part gives all its gradients at its end, so they hide behind the backward of parts before it only. The hooks
    live as long as the block. KeyError where a gradient arrives twice: one backward, no reentrant checkpoint.
    """
    groups, sent, size = [], [], 0
    for p in reversed([p for p in params if p.requires_grad] if world() > 1 else []):
        size += p.numel()
        if not groups or size > bucket:
            groups.append([])
            size = p.numel()
        groups[-1].append(p)

    def send(group):
        absent = [p.grad is None for p in group]
        flags = to_device(torch.tensor(absent, dtype=group[0].dtype), group[0].device)
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in group] + [flags])
        for p, part in zip(group, flat.split([*(p.numel() for p in group), len(group)])):
            p.grad = part.view_as(p)                         # frees what was copied
        sent.append((flat, absent, dist.all_reduce(flat, group=_own, async_op=True)))

    def arrived(p, k):
        awaited[k].remove(p)
        while len(sent) < len(groups) and not awaited[len(sent)]:
            send(groups[len(sent)])

    awaited = [set(group) for group in groups]
    hooks = [p.register_post_accumulate_grad_hook(lambda p, k=k: arrived(p, k)) for k, group in enumerate(groups) for p in group]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for group in groups[len(sent):]:
        send(group)
    for group, (flat, absent, work) in zip(groups, sent):
        work.wait()
        nobody = (flat[-len(group):] == world()).tolist() if any(absent) else absent             # a host sync only where something is missing
        flat /= world()
        for p, none in zip(group, nobody):
            p.grad = None if none else p.grad


def average_gradients(params, bucket=2 ** 22):
    """Replace every gradient by its mean over ranks. None on all ranks stays None; None on some counts as zero."""
    with averaging(params, bucket):                          # nothing arrives in here: all is sent at the end
        pass


# ---- randomness: never depends on rank, world size or worker ----

def generator(*key):
    """A CPU generator for integers such as (seed, step)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> 1))


def partner(x, block):
    """(B, ...) -> the rows' partners: each block of rows in reverse. Its own inverse; nobody is paired with itself. Ranks hold whole blocks."""
    return x.unflatten(0, (-1, block)).flip(1).flatten(0, 1)


def row_noise(cfg, step, *shape):
    """Uniform noise (B, *shape) for this rank's rows of step `step`: drawn for the whole global batch, so rows keep theirs on any number of ranks."""
    return torch.rand(cfg.batch, *shape, generator=generator(cfg.seed, step)).chunk(world())[rank()]


# ---- precision and schedule ----

def fast_bf16(device):
    """Has this device bf16 arithmetic? (x86 CPUs without it emulate it, slower than float32.)"""
    names = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cuda" or any(names.get(n) for n in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(cfg, device):
    if cfg.precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"--precision {cfg.precision}: choose auto, bf16 or fp32")
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16" or cfg.precision == "auto" and fast_bf16(device))


def compiled(module, cfg, device):
    """The module to call: compiled by default on CUDA; the parameters and their names stay those of `module`."""
    return torch.compile(module) if cfg.compile or cfg.compile is None and device.type == "cuda" else module


def lr_at(step, cfg, peak):
    """Linear from 0 to peak over the warm-up, then linear or cosine to 0 at cfg.steps."""
    warmup = min(cfg.warmup, cfg.steps // 10)
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, cfg.steps - warmup)
    return peak * (1 - done if cfg.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


# ---- command line ----

class Parser(argparse.ArgumentParser):
    def error(self, message):
        flag = re.search(r"unrecognized arguments: (\S+)", message)
        near = difflib.get_close_matches(flag[1].split("=")[0], self._option_string_actions, 1) if flag else []
        raise UserError(message + (f": did you mean {near[0]}?" if near else f": {self.prog} -h lists the flags"))


def parse(Config, demo, doc="", argv=None):
    """Command line -> Config. One flag per field; its help is the field's trailing comment. Without --data, --docs, --labels the
    overrides in `demo` stand between the defaults and the flags."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comment = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.M))
    for f in dataclasses.fields(Config):
        flag, note = "--" + f.name.replace("_", "-"), comment.get(f.name, "").replace("%", "%%")
        shown = f"{note} [{f.default}" + (f"; demo {demo[f.name]}]" if f.name in demo else "]")
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"nargs": "+"} if f.type is list else {"type": f.type, "metavar": ""}
        parser.add_argument(flag, default=argparse.SUPPRESS, help=shown, **how)
    given = vars(parser.parse_args(argv))
    values = dict(given) if given.keys() & {"data", "docs", "labels"} else {**demo, **given}
    if "size" in given:
        if given["size"] not in SIZES:
            raise UserError(f"--size {given['size']}: choose one of {' '.join(SIZES)}")
        values.update({k: v for k, v in zip(("dim", "depth", "heads"), SIZES[given["size"]]) if k not in given})
    if values.get("init"):
        fixed = {*given, *(("dim", "depth", "heads") if "size" in given else ())}
        values.update({k: v for k, v in encoder_sizes(values["init"]).items() if k not in fixed})
    least = {"eval_every": -1, "context": 3, "temperature": 1e-9, "scale": 1e-3, **dict.fromkeys(AT_LEAST_ONE, 1)}
    wrong = [f"--{k.replace('_', '-')} {v}" for k, v in values.items() if isinstance(v, (int, float)) and not v >= least.get(k, 0)]
    if values.get("schedule", "linear") not in ("linear", "cosine"):
        raise UserError(f"--schedule {values['schedule']}: choose linear or cosine")
    if wrong:
        raise UserError(f"{', '.join(wrong)}: too small")
    return Config(**values)


def guard(main):
    """Entry point of every script: run main() and turn a UserError into its one line and exit code 2; 1 tells of a last checkpoint not written."""
    try:
        main()
        code = int(_refused)
    except UserError as error:
        time.sleep(2 * (rank() > 0))                         # the same mistake on every rank is told once: rank 0's exit ends the others
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


# ---- checkpoints: plain tensors, numbers and strings; never a pickle of ours ----

def read_checkpoint(path):
    """The dict that save() wrote. Raises ValueError for anything else: torch alone does not check the archive's CRCs."""
    try:
        if (bad := zipfile.ZipFile(path).testzip()) is not None:
            raise ValueError(f"member {bad} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or "method" not in state:
            raise ValueError("it is not one of our checkpoints")
        return state
    except FileNotFoundError:
        raise
    except Exception as error:                               # zip, pickle and torch each have their own words for a bad file
        raise ValueError(f"{path}: {str(error).partition(chr(10))[0] or type(error).__name__}") from None


def save(cfg, model, opt, step, vocab, log):
    """Rank 0 writes out/last.pt; the one before becomes prev.pt. At every moment one of the two is whole."""
    global _refused
    if rank():
        log.saved = step
        return
    state = {"method": type(model).__name__, "config": dataclasses.asdict(cfg), "vocab": vocab, "step": step,
             "model": model.state_dict(), "optimizer": opt.state_dict()}
    last, prev, tmp = (os.path.join(cfg.out, name) for name in ("last.pt", "prev.pt", "last.pt.tmp"))
    try:
        with open(tmp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(last):
            os.replace(last, prev)
        os.replace(tmp, last)
        folder = os.open(cfg.out, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:                 # torch turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(tmp)
        print0(f"warning: checkpoint of step {step} was not written ({str(error).partition(chr(10))[0]}); the one before is kept, "
               "the next save tries again, and without a next one the exit code is 1")
        _refused = True
    else:
        log.saved, _refused = step, False


def resume(cfg, method):
    """State dict to go on from, or None for a new run. Refuses another method or another recipe; falls back to prev.pt."""
    if cfg.fresh and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        for name in ("last.pt", "prev.pt") * (rank() == 0):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(cfg.out, name))
        return None
    state, problems = None, []
    for name in ("last.pt", "prev.pt"):
        try:
            state = state or read_checkpoint(os.path.join(cfg.out, name))
        except FileNotFoundError:
            pass
        except ValueError as error:
            problems.append(str(error))
            print0(f"warning: unreadable checkpoint {error}; trying the one before")
    if state is None:
        if problems:
            raise UserError(f"no readable checkpoint in {cfg.out} ({'; '.join(problems)}): --fresh starts anew")
        return None
    if problems and rank() == 0:
        os.replace(f"{cfg.out}/last.pt", f"{cfg.out}/last.pt.damaged")
    if state["method"] != method:
        raise UserError(f"--out {cfg.out} holds a run of {state['method']}, not of {method}: choose another --out, or --fresh")
    now, then = dataclasses.asdict(cfg), state["config"]
    changed = [f"--{k.replace('_', '-')} {then.get(k)} -> {now[k]}" for k in now if k not in ELSEWHERE and then.get(k) != now[k]]
    if changed:
        raise UserError(f"--out {cfg.out} holds a run with other settings ({', '.join(changed)}): repeat them, choose another --out, or --fresh")
    return state


def restore(state, model, opt):
    """Load what resume() returned; the step to go on from."""
    if state is None:
        return 0
    model.load_state_dict(state["model"])
    opt.load_state_dict(state["optimizer"])
    return state["step"]


def describe(cfg, device, model, sources, first, peak):
    """The lines a run opens with; config.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    precision = "bf16" if autocast(cfg, device)._enabled else "fp32"
    print0(f"{type(model).__name__}: {millions:.1f} M parameters, {world()} rank(s) on {name}, {precision}")
    for index, batch in ((s.index, s.plan.batch) for s in sources if s):
        print0(f"data: {index.summary()}; {batch} a step, {cfg.steps * batch / len(index):.1f} epochs")
        for line in index.oddities()[:5]:
            print0(f"warning: {line}")
    print0(f"{cfg.steps:,} steps of {cfg.batch}, lr {cfg.lr:g} -> {peak:g}, to {cfg.out}" + (f"; going on from step {first}" if first else ""))
    if rank() == 0:
        with open(os.path.join(cfg.out, "config.json"), "w") as f:
            json.dump(dataclasses.asdict(cfg), f, indent=1)


# ---- encoders from elsewhere (--init): timm's names, in safetensors or torch files ----

def read_safetensors(path):
    """-> {name: tensor}, {metadata: str}. Eight bytes of header length, a JSON header, then the tensors' bytes; anything else raises."""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if size > os.path.getsize(path) - 8:
            raise ValueError("no safetensors header")
        header, body = json.loads(f.read(size)), bytearray(f.read())
    meta, tensors = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if not 0 <= start < stop <= len(body):
            raise ValueError(f"{name} lies outside the file")
        tensors[name] = torch.frombuffer(body[start:stop], dtype=types[entry["dtype"]]).view(entry["shape"])
    return tensors, meta


def read_encoder(path):
    """Weights of a timm-named ViT in float32, without classifier -> {name: tensor}, {metadata: str}."""
    try:
        if path.endswith(".safetensors"):
            tensors, meta = read_safetensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if "method" in state:
                raise ValueError("a whole checkpoint: python eval.py export makes an encoder file of it")
            tensors, meta = state.get("model", state.get("state_dict", state)), state.get("metadata", {})
        named = {re.sub(r"^((module|_orig_mod)\.)+", "", name): x.float() for name, x in tensors.items() if isinstance(x, torch.Tensor)}
        tensors = {name: x for name, x in named.items() if not name.startswith("head.")}
        for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"):
            if name not in tensors:
                raise ValueError(f"no {name}, so no ViT as timm names it")
        return tensors, meta
    except Exception as error:                               # JSON, pickle, zip and torch each have their own words for a bad file
        raise UserError(f"--init {path} cannot be read ({str(error).partition(chr(10))[0] or type(error).__name__}): give a ViT with timm's names as "
                        ".safetensors, or as a torch file of plain tensors") from None


def encoder_sizes(path):
    """dim, depth, heads, patch of such a file. Heads leave no trace in the weights: where its metadata does not tell, they are 64 wide."""
    tensors, meta = read_encoder(path)
    dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    return {"dim": dim, "depth": depth, "heads": int(meta.get("heads", max(1, dim // 64))), "patch": patch}


def resized_positions(table, grid):
    """(1, [1+]g*g, D) -> the class token's row as it is (1, 0 or 1, D), and those of grid x grid patches, bicubic (as timm resamples them)."""
    side = math.isqrt(table.shape[1])
    lead, patches = table.split([table.shape[1] - side ** 2, side ** 2], 1)
    if side != grid:
        patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, (grid, grid), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    return lead, patches


def init_encoder(vision, path):
    """Start a ViT from a timm-named file (none: leave it). Positions are resized to its grid, fixed ones stay; a class token that only one of the two
    has is left as initialised, or out. UserError where shapes differ."""
    if not path:
        return
    (tensors, meta), own = read_encoder(path), {name: x.detach().cpu() for name, x in vision.state_dict().items()}
    lead, patches = resized_positions(tensors.pop("pos_embed"), vision.grid)
    if vision.cls_token is None:
        tensors.pop("cls_token", None)
        lead = lead[:, :0]
    elif "cls_token" not in tensors or not lead.shape[1]:    # its position is no row of some files: there it is zero
        lead = torch.zeros_like(own["cls_token"]) if "cls_token" in tensors else own["pos_embed"][:, :1]
        tensors.setdefault("cls_token", own["cls_token"])
    tensors["pos_embed"] = torch.cat([lead, patches], 1) if vision.pos_embed.requires_grad else own["pos_embed"]
    shape = lambda state, name: tuple(state[name].shape) if name in state else "missing"
    wrong = [f"{name} is {there} there and {here} here" for name in [*own, *tensors]
             for there, here in [(shape(tensors, name), shape(own, name))] if there != here]
    heads = vision.blocks[0].attn.heads
    wrong += [f"{meta['heads']} heads there and {heads} here"] if meta.get("heads", str(heads)) != str(heads) else []
    if wrong:
        raise UserError(f"--init {path} does not fit: {wrong[0]}: leave --size, --dim, --depth, --heads, --patch to the file; it must be a plain ViT")
    vision.load_state_dict(tensors)
    print0(f"encoder from {path}: width {own['pos_embed'].shape[2]}, {len(vision.blocks)} blocks, {heads} heads"
           + ("" if "heads" in meta else " (the file does not say how many)"))
    told = {name: (json.loads(meta[name]), getattr(vision, name).flatten().tolist()) for name in ("mean", "std") if name in meta}
    if any(abs(a - b) > 1e-3 for there, here in told.values() for a, b in zip(there, here)):
        print0(f"warning: its images were normalised by another mean and deviation than here ({meta['mean']}, {meta['std']})")


# ---- log: one line per step in log.jsonl, one tiny all-reduce per step, read one step late ----

class Log:
    """What a step tells the other ranks (loss terms, skipped samples, the wish to stop), and what the user sees of it.

    Every step posts one small all-reduce and reads the one before, so the host never waits for the device. step() raises UserError on all
    ranks together when a loss is not finite, or when more than a tenth of the last 1,000 samples could not be read.
    """
    def __init__(self, cfg, device, first, reasons):         # reasons: {why a sample was passed over: "hard", "soft" or "kept"}
        self.cfg, self.device, self.reasons = cfg, device, reasons
        self.path, self.lines, self.pending, self.saved = os.path.join(cfg.out, "log.jsonl"), [], None, first
        self.stop, self.asked, self.totals, self.recent = False, 0.0, collections.Counter(), []
        self.clock, self.waited, self.skipped = time.perf_counter(), 0.0, torch.zeros(len(reasons))
        self.bar = tqdm(total=cfg.steps, initial=first, disable=rank() > 0, unit="step", dynamic_ncols=True, mininterval=1.0)
        if rank() == 0:
            self.cut(first)
        self.handlers = {}
        with contextlib.suppress(ValueError):                # signals belong to the main thread: elsewhere there are none to take
            self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def on_signal(self, number, _):
        now = time.monotonic()
        if self.asked and now - self.asked > 5:              # launchers repeat a signal at once; a person repeats it when out of patience
            os._exit(128 + number)
        self.asked = self.asked or now

    def cut(self, first):
        """Forget lines at or beyond the checkpoint's step, and broken ones: those steps are about to be run again."""
        keep = []
        if first and os.path.exists(self.path):
            with open(self.path, errors="replace") as f:
                lines = f.readlines()
            for line in lines:
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    keep += [line] * (json.loads(line)["step"] < first and line.endswith("\n"))
        with open(self.path + ".tmp", "w") as f:
            f.writelines(keep)
        os.replace(self.path + ".tmp", self.path)

    def next(self, batches):
        """The next batch, on the device; notes how long it was waited for and what was skipped to fill it."""
        began = time.perf_counter()
        try:
            batch = next(batches)
        except UserError as error:
            self.fail(error)
        self.waited, self.skipped = time.perf_counter() - began, batch.pop("skipped")
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def step(self, step, loss, terms, lr, grad_norm, temperature=None):
        """loss and terms (dict): 0-dim tensors, this rank's shares, whose mean over ranks is logged. The rest is equal on all ranks."""
        cuda, shared = self.device.type == "cuda", [grad_norm, torch.full_like(grad_norm, math.nan) if temperature is None else temperature]
        told = torch.stack([t.detach() for t in (loss, *terms.values(), *shared)]).double()
        told = torch.cat([told, to_device(torch.cat([self.skipped, torch.tensor([self.asked > 0])]).double(), self.device)])
        work = dist.all_reduce(told, async_op=not cuda) if world() > 1 else None
        told, wait = told.to("cpu", non_blocking=True), work.wait if work else None
        if cuda:                                             # the copy is asked for now: one step later it would wait for that step, too
            wait = torch.cuda.current_stream().record_event().synchronize
        now = time.perf_counter()
        row = {"step": step, "samples": (step + 1) * self.cfg.batch, "loss": 0, **dict.fromkeys(terms), "lr": lr, "grad_norm": 0, "temperature": 0,
               "images_per_s": self.cfg.batch / (now - self.clock), "data_wait": self.waited / (now - self.clock), "skipped": 0}
        before, self.pending, self.clock = self.pending, (row, ["loss", *terms, "grad_norm", "temperature"], told, wait), now
        if before:
            self.read(*before)

    def settle(self):
        """Read the step just posted too: before a checkpoint, and at the end."""
        if self.pending:
            before, self.pending = self.pending, None
            self.read(*before)
        self.flush()

    def read(self, row, names, told, wait):
        if wait:
            wait()
        told = told.tolist()
        values = [t / world() for t in told[:len(names)]]
        row.update({k: v if math.isfinite(v) else None for k, v in zip(names, values)})          # JSON has no NaN
        counts, self.stop = dict(zip(self.reasons, map(int, told[len(names):-1]))), told[-1] > 0
        row["skipped"] = sum(n for reason, n in counts.items() if self.reasons[reason] != "kept")
        row["mem_gb"] = (torch.cuda.max_memory_allocated() if self.device.type == "cuda"
                         else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)) / 2 ** 30
        self.lines.append(json.dumps(row) + "\n")
        self.totals.update(counts)
        self.recent = (self.recent + [sum(n for reason, n in counts.items() if self.reasons[reason] == "hard")])[-max(1, -(-1000 // self.cfg.batch)):]
        self.bar.update()
        if row["step"] % self.cfg.log_every == 0:
            self.flush()
            self.bar.set_postfix_str(f"loss {values[0]:.3f}, {row['images_per_s']:.0f} images/s, waiting for data {row['data_wait']:.0%}")
        if row["loss"] is None or row["grad_norm"] is None:
            self.fail(f"loss {values[0]}, gradient norm {values[-2]} at step {row['step']}; last good checkpoint: "
                      + (f"{self.cfg.out}/last.pt of step {self.saved}" if self.saved else "none yet") + "; try a lower --lr")
        seen = len(self.recent) * self.cfg.batch
        if seen >= 1000 and sum(self.recent) > 0.1 * seen:
            self.fail(f"{sum(self.recent)} of the last {seen} samples could not be read ({self.skips()}): python data.py check names them")

    def skips(self):
        return ", ".join(f"{n} {reason}" for reason, n in self.totals.items() if n)

    def fail(self, message):
        self.flush()
        self.close()
        raise UserError(message)

    def flush(self):
        if rank() == 0 and self.lines:
            try:
                with open(self.path, "a") as f:
                    f.writelines(self.lines)
            except OSError as error:
                print0(f"warning: {self.path} was not written ({error})")
        self.lines = []

    def close(self):
        """Give the terminal and the signals back; say what was left out, and how to go on if the run was stopped."""
        self.bar.close()
        if self.skips():
            print0(f"samples passed over or mended: {self.skips()}")
        if self.stop:
            print0(f"stopped after step {self.saved}: the same command goes on from there")
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
