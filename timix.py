"""TiMix (arXiv 2312.08846): text-aware image mixing: over what a caption cares least about goes what another caption cares most about.

    python timix.py                                              # trains on the built-in world, evaluates, draws
    python timix.py --mix none --out runs/timix-none             # the same model without mixing
    python timix.py --base clip                                  # two towers and contrast alone below the same mixing
    torchrun --standalone --nproc_per_node 8 timix.py --data 'cc3m/*.tar'     # boxes in KEY.json where there are any

A predictor (TPP) in the middle of the image tower scores each patch: does it belong to what this text describes? It learns that from boxes with
texts (PTA). In each block of the batch image i is paired with image j. The s x s patches of j that its caption cares about most cover those of i
that i's caption cares about least; the mixture shall match caption i with weight lambda = 1 - s^2 / n^2 and caption j with the rest:

    L_mix = lambda * l_i + (1 - lambda) * l_j = l_i + (1 - lambda) * (s_i - s_j)       (l = InfoNCE, s = logits; tests/test_timix.py)

so it is InfoNCE plus a penalty on the margin between the two captions, least at a finite margin log(lambda / (1 - lambda)).

Read Config (what the run is), text_aware_mix, soft_labels and soft_itc (the method, free functions), PatchPredictor, TiMix, losses, then main.
Departures: the paper's text was not available to us, the method is that of its released code. (1) Backbone: ALBEF as described there, without
the released model's decoder; no queue, as in the released code, where it is commented out, so keys and negatives are the online model's; (2) one
summed step for three; (3) pairs and hard negatives live in blocks of rows, means over ranks are exact; (4) text targets of `predicted` labels are
mixed over columns; (5) from scratch, one learning rate; (6) a region image is encoded once for all its texts; (7) byte-level BPE, plain pre-norm
blocks, an untied word head.

Dimension key: B pairs of this rank, G = B * ranks, N = n * n patches, L text tokens, D width, E joint embedding, V vocabulary, R region images.
"""
import math
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import common                    # before torch: it sets how OpenMP waits
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import data
import eval as evaluation
from common import CrossBlock, TextTransformer, UserError, ViT, averaging, lr_at, partner, print0, rank, run_blocks, unit, world
from data import Tokenizer


@dataclass
class Config:
    data: list = None            # training shards: files, folders, globs, {0..9} ranges; none = the built-in world
    val: list = None             # held-out shards: with captions -> retrieval, with classes -> zero-shot, kNN, linear probe
    out: str = "runs/timix"      # checkpoints, log, results and pictures; a second start here resumes
    fresh: bool = False          # start anew in --out
    init: str = None             # file of timm-named encoder weights to start from; tells dim, depth, heads, patch unless they are given
    # image tower
    image_size: int = 256        # TiMix code
    scale: float = 0.2           # TiMix code: least area of the random resized crop
    patch: int = 16              # TiMix code
    size: str = None             # ti s b l h g: fills dim, depth, heads unless they are given
    dim: int = 768               # TiMix code: ViT-B
    depth: int = 12              # ViT-B
    heads: int = 12              # ViT-B
    flip: bool = True            # TiMix code
    augment: bool = True         # TiMix code: RandAugment, two of its operations, each in half of the cases; strengths ours
    # text tower and fusion
    base: str = "albef"          # or clip: two towers and contrast alone (ours)
    context: int = 20            # TiMix code, in tokens
    vocab: str = None            # vocabulary file; none = train one on the first captions
    vocab_size: int = 30_522     # ALBEF: BERT's size
    text_dim: int = 768          # ALBEF
    text_depth: int = 6          # ALBEF
    fusion_depth: int = 6        # ALBEF
    text_heads: int = 12         # ALBEF
    embed: int = 256             # ALBEF: width of the joint embedding
    # patch predictor
    tap: int = None              # blocks below it; none = half of them (TiMix code: 6 of 12)
    entries: int = 2             # ours: texts of a region image (TiMix code: at most 5)
    whole: bool = True           # TiMix code: the caption is one of these texts, and every patch belongs to it
    # mixing
    mix: str = "text"            # none, cutmix, random (scores) or text
    targets: str = "predicted"   # TiMix code: the model's own probabilities, mixed; or area (lambda), relevance (share of relevant patches)
    min_side: float = 0.35       # TiMix code: least side of the window, in sides of the image
    max_side: float = 0.75       # TiMix code
    mix_until: float = 2 / 3     # TiMix code: 20 of 30 epochs; share of the steps
    block: int = 128             # TiMix code's batch on a GPU: rows among which partners and negatives are sought, even; ranks hold whole blocks
    # objective
    w_itc: float = 1.0           # TiMix code: contrast of images and texts
    w_itm: float = 1.0           # TiMix code: do these two match?
    w_mlm: float = 1.0           # TiMix code: masked words
    w_pta: float = 1.0           # TiMix code: patch predictor
    w_mix: float = 1.0           # TiMix code
    mask_ratio: float = 0.15     # ALBEF, of the words
    alpha: float = 0.4           # ALBEF: weight of the averaged model's opinion in the targets
    momentum: float = 0.995      # ALBEF
    ramp: float = 1 / 30         # TiMix code: share of the steps in which alpha and the weight of the mixing rise from 0
    temperature: float = 0.07    # ALBEF: initial value, learned as the divisor itself, within 0.001 .. 0.5
    # optimisation
    batch: int = 1024            # ours, global
    steps: int = 120_000         # ours: about 30 epochs of 4 M images
    lr: float = 1e-4             # ALBEF
    warmup: int = 2000           # TiMix code, in steps; at most a tenth of them
    schedule: str = "cosine"     # TiMix code; or linear
    wd: float = 0.02             # TiMix code
    grad_clip: float = 1.0       # TiMix code; 0 = off
    seed: int = 0                # ours
    # machine
    micro: int = 0               # rows of a rank that the towers take at a time, recomputed in backward; 0 = all
    grad_checkpoint: bool = False  # recompute every block in backward
    precision: str = "auto"      # bf16 where the device computes in it, else fp32
    compile: bool = None         # none = on for CUDA, off for CPU
    workers: int = None          # loader processes of a rank; none = its cores less one
    window: int = 64             # shards shuffled together
    save_every: int = 1000       # ours
    log_every: int = 10          # ours
    eval_every: int = 0          # steps between evaluations; 0 = at the end, -1 = never
    timeout: int = 600           # seconds a rank waits for the others


# The built-in world on two CPU cores. Neither crops, flips nor colour changes: its captions name all of them. Its captions read like the texts of
# its boxes, so that calling all patches relevant to them would teach a contradiction.
DEMO = dict(image_size=48, patch=8, dim=128, depth=3, heads=4, text_dim=64, text_depth=2, fusion_depth=2, text_heads=2, embed=64, context=24,
            vocab_size=512, scale=1.0, flip=False, augment=False, whole=False, block=8, batch=128, steps=400, lr=3e-3, warmup=40, momentum=0.99,
            ramp=0.1, save_every=200)


# ---- the method: pure functions ----

Mix = namedtuple("Mix", "images lam kept taken")             # kept, taken (B, N): share of each patch still seen; of the partner's patches pasted


def text_aware_mix(images, scores, s, block=None):
    """Cover each image's s x s patches of least total score by its partner's of largest (TiMix code, TPMix; SMMix's mixer with text scores).

    images (B, 3, S, S), any type; scores (B, N) relevance of the patches, any scale; s: side of the window in patches, 0 .. n; block: rows among
    which partners are sought (common.partner), all by default. -> Mix, its lam = 1 - s^2 / N the share that is an image's own. Nothing is drawn
    here. Of equal windows the first in reading order is taken. Raises ValueError for an odd block: a row would be its own partner.
    """
    (B, N), block, S = scores.shape, block or len(images), images.shape[-1]
    if block % 2 or B % block:
        raise ValueError(f"{B} rows do not divide into blocks of {block}, or these into pairs")
    n, kept, taken = math.isqrt(N), images.new_ones(B, N, dtype=torch.bool), images.new_zeros(B, N, dtype=torch.bool)
    if s == 0:
        return Mix(images.clone(), 1.0, kept, taken)
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))                # bfloat16 would make ties
    windows = F.avg_pool2d(scores.view(B, 1, n, n), s, stride=1).flatten(1)                      # (B, (n - s + 1)^2)
    wide, at = n - s + 1, torch.arange(n, device=images.device)
    least, most = windows.argmin(1), windows.argmax(1)

    def inside(corner):                                      # (B,) -> (B, N): patches of the window there
        row, col = ((at >= c[:, None]) & (at < c[:, None] + s) for c in (corner // wide, corner % wide))
        return (row[:, :, None] & col[:, None]).flatten(1)
    shift = partner(most, block)                             # the window in the partner, whose patches move by a constant
    shift = (shift // wide - least // wide) * n + shift % wide - least % wide
    covered, own = inside(least), torch.arange(N, device=images.device).expand(B, N)
    source = torch.where(covered, own + shift[:, None], own)
    patches = images.view(B, 3, n, S // n, n, S // n).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)    # (B, N, 3, p, p)
    pasted = partner(patches, block).gather(1, source[..., None, None, None].expand_as(patches))
    mixed = torch.where(covered[..., None, None, None], pasted, patches)
    mixed = mixed.unflatten(1, (n, n)).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    return Mix(mixed, 1 - s * s / N, ~covered, inside(most))


def cutmix(images, n, generator, block=None):
    """CutMix (arXiv 1905.04899), one box for the batch: area 1 - lambda, lambda uniform, centre uniform, clipped, the same place in both images."""
    side, box = images.shape[-1], []
    lam, *centre = torch.rand(3, generator=generator).tolist()
    for c in centre:
        half = math.sqrt(1 - lam) / 2
        box.append([round(side * min(max(edge, 0), 1)) for edge in (c - half, c + half)])
    (top, bottom), (left, right) = box
    hole = torch.zeros(side, side, dtype=torch.bool, device=images.device)
    hole[top:bottom, left:right] = True
    covered = F.avg_pool2d(hole[None].float(), side // n).flatten(1).expand(len(images), -1)
    mixed = torch.where(hole, partner(images, block or len(images)), images)
    return Mix(mixed, 1 - (bottom - top) * (right - left) / side ** 2, 1 - covered, covered)


def soft_labels(mode, mix, block, i2t, t2i, relevance=None):
    """What a mixed image should find among all texts, and a text among all mixed images: two constant (B, G) tables whose rows sum to 1.

    mode area: lambda for its own, 1 - lambda for the partner. predicted (TiMix code): the same mixture of the clean images' probabilities, the
    softmax of i2t, t2i (B, G), logits of the clean batch; for texts the columns are mixed (ours; the code reuses the first table). relevance (ours,
    after TransMix): lambda is an image's own share of the relevance (B, N), probabilities, that is seen in the mixture.
    """
    B, wide = len(i2t), torch.promote_types(i2t.dtype, torch.float32)
    own = torch.full((B,), mix.lam, dtype=wide, device=i2t.device)
    if mode == "predicted":
        images, texts = i2t.detach().to(wide).softmax(1), t2i.detach().to(wide).softmax(1)
    else:
        images = texts = F.one_hot(rank() * B + torch.arange(B, device=i2t.device), i2t.shape[1]).to(wide)
    if mode == "relevance":
        seen, pasted = ((relevance.detach().to(wide) * shown).sum(1) for shown in (mix.kept, mix.taken))
        own = seen / (seen + partner(pasted, block)).clamp(min=1e-12)
    columns = common.all_gather(own)                         # (G,)
    found = own[:, None] * images + (1 - own[:, None]) * partner(images, block)
    back = columns * texts + (1 - columns) * partner(texts.T, block).T
    return found, back / back.sum(1, keepdim=True)           # with one lambda for all, the rows sum to 1 already


def similarities(image, text, temperature):
    """Unit rows (B, E) of this rank against those of all ranks -> logits (B, G) image to text, text to image, with exact gradients."""
    return image @ common.gather(text).T / temperature, text @ common.gather(image).T / temperature


def soft_itc(logits, targets):
    """Cross-entropy with soft targets, both ways, halved. logits, targets: pairs of (B, G). Returns this rank's share: the mean over ranks is the
    loss of the global batch."""
    return sum(-(target * x.log_softmax(1)).sum(1).mean() for x, target in zip(logits, targets)) / 2


def hard_negatives(image, text, temperature, noise, block):
    """For each image a text, for each text an image (B,) of another pair of its block, drawn with the probabilities that the model confuses them
    (ALBEF). image, text (B, E) unit; noise (B, 2, block) uniform, as Gumbel noise the same on any number of ranks."""
    image, text = (x.detach().unflatten(0, (-1, block)) for x in (image, text))
    first = torch.arange(0, image.shape[0] * block, block, device=image.device).repeat_interleave(block)
    found = []
    for (rows, columns), u in zip(((image, text), (text, image)), noise.unbind(1)):
        logits = (rows @ columns.mT / temperature).masked_fill(torch.eye(block, dtype=torch.bool, device=u.device), -math.inf).flatten(0, 1)
        found.append(first + (logits - (-u.clamp(min=1e-12).log()).log()).argmax(1))
    return found


def mask_tokens(tokens, valid, noise, ratio, vocab_size):
    """BERT's masking (ALBEF): words with noise below `ratio` are to be told; of these 80 % become the mask token, 10 % any word, 10 % stay.

    tokens, valid (B, L); noise (B, 2, L) uniform. -> tokens (B, L), places (B, L // 2) and the words there, -1 where none is asked: at most half of
    a row. The begin token and padding are never masked, the end token may be.
    """
    pick = noise[:, 0].masked_fill(~valid, 1.0)
    pick = torch.cat([torch.ones_like(pick[:, :1]), pick[:, 1:]], 1)
    pick, at = pick.topk(tokens.shape[1] // 2, largest=False)
    words, kind, first = tokens.gather(1, at), noise[:, 1].gather(1, at), len(Tokenizer.SPECIAL)
    anything = first + ((kind - 0.8) * 10 * (vocab_size - first)).long().clamp(0, vocab_size - first - 1)        # uniform where kind is in 0.8 .. 0.9
    shown = torch.where(kind < 0.8, Tokenizer.MASK, torch.where(kind < 0.9, anything, words))
    return tokens.scatter(1, at, shown.where(pick < ratio, words)), at, words.where(pick < ratio, -1)


# Mixtures by name: (batch, scores (B, N), noise (B, N), n, generator of the step, cfg) -> Mix.
MIXERS = {"text": lambda batch, scores, noise, n, generator, cfg: text_aware_mix(batch["images"], scores, side(n, generator, cfg), cfg.block),
          "random": lambda batch, scores, noise, n, generator, cfg: text_aware_mix(batch["images"], noise, side(n, generator, cfg), cfg.block),
          "cutmix": lambda batch, scores, noise, n, generator, cfg: cutmix(batch["images"], n, generator, cfg.block)}


def side(n, generator, cfg):
    """Side of a step's window, in patches: uniform over the integers between int(n * min_side) and int(n * max_side) (TiMix code), at least 1."""
    return max(1, int(torch.randint(int(n * cfg.min_side), int(n * cfg.max_side) + 1, (), generator=generator)))


# ---- model ----

class PatchPredictor(nn.Module):
    """TPP: patch tokens h (B, N, D) in the middle of the image tower and a text vector g (B, Dt) -> log-probabilities (B, N, 2); [..., 1] =
    belongs to the text (TiMix code)."""
    def __init__(self, dim, text_dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.embed = nn.Linear(dim, dim)
        self.head = nn.Sequential(nn.Linear(dim + text_dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2))
        self.apply(common.init_weights)

    def forward(self, h, g):
        local, whole = F.gelu(self.embed(self.norm(h))).chunk(2, 2)
        around = torch.cat([whole.mean(1), g.to(whole.dtype)], 1)[:, None].expand(-1, h.shape[1], -1)
        x = self.head(torch.cat([local, around], 2))
        return x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(2)


class ALBEF(nn.Module):
    """Two towers, and above them a fusion of the text with the image's tokens, which tells matching pairs and masked words."""
    def __init__(self, cfg):
        super().__init__()
        self.vision = ViT(cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads, mean=(0.48145466, 0.4578275, 0.40821073),
                          std=(0.26862954, 0.26130258, 0.27577711))                              # CLIP's, as TiMix's code
        self.text = TextTransformer(cfg.vocab_size, cfg.context, cfg.text_dim, cfg.text_depth, cfg.text_heads, causal=False)
        self.vision.recompute = self.text.recompute = self.recompute = cfg.grad_checkpoint
        self.image_proj, self.text_proj = nn.Linear(cfg.dim, cfg.embed), nn.Linear(cfg.text_dim, cfg.embed)
        parts = [self.image_proj, self.text_proj]
        if cfg.base == "albef":
            self.fusion = nn.ModuleList(CrossBlock(cfg.text_dim, cfg.dim, cfg.text_heads) for _ in range(cfg.fusion_depth))
            self.norm = nn.LayerNorm(cfg.text_dim, eps=1e-6)
            self.match, self.word = nn.Linear(cfg.text_dim, 2), nn.Linear(cfg.text_dim, cfg.vocab_size)
            parts += [self.fusion, self.match, self.word]
        for part in parts:
            part.apply(common.init_weights)

    def fuse(self, states, valid, image_tokens):             # (B, L, Dt), (B, L), (B, 1+N, D) -> (B, L, Dt)
        return self.norm(run_blocks(self.fusion, states, image_tokens, valid[:, None, None], recompute=self.recompute))

    def image_embeds(self, tokens):                          # (..., D) -> (..., E) unit; of the class token
        return unit(self.image_proj(tokens))

    def text_embeds(self, states):                           # (B, L, Dt) -> (B, E) unit; position 0 is the [CLS]
        return unit(self.text_proj(states[:, 0]))

    def encode_image(self, images):                          # (B, 3, S, S) -> (B, E) unit
        return self.image_embeds(self.vision(images)[:, 0])

    def encode_text(self, tokens, valid):                    # (B, L) -> (B, E) unit
        return self.text_embeds(self.text(tokens, valid))


class TiMix(ALBEF):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.tap = (cfg.depth + 1) // 2 if cfg.tap is None else cfg.tap
        if not 0 < self.tap <= cfg.depth:
            raise UserError(f"--tap {self.tap}: the patch predictor stands after 1 to {cfg.depth} blocks")
        self.temperature = nn.Parameter(torch.tensor(cfg.temperature))
        self.predictor = PatchPredictor(cfg.dim, cfg.text_dim)
        self.teacher = None
        if cfg.base == "albef":
            self.teacher = ALBEF(cfg).requires_grad_(False)
            self.teacher.load_state_dict(self.state_dict(), strict=False)
        self.rerank = cfg.base == "albef"                    # for eval.py: score() judges a pair better than the cosine
        if not self.rerank:
            self.fused = self.score = None                   # two towers: nothing reads a text beside its image

    @torch.no_grad()
    def clamp(self):                                         # at the top of a step: beyond the bounds there would be no gradient back
        self.temperature.clamp_(0.001, 0.5)                  # ALBEF

    @torch.no_grad()
    def follow(self, momentum):
        fast = dict(self.named_parameters())
        for name, slow in self.teacher.named_parameters():
            slow.lerp_(fast[name], 1 - momentum)

    def fused(self, images, tokens, valid):                  # (B, 3, S, S), (B, L) -> (B, Dt): the [CLS] of a text read beside its image
        return self.fuse(self.text(tokens, valid), valid, self.vision(images))[:, 0]

    def score(self, images, tokens, valid):
        """Log-odds (B,) that image and text match (ITM). images (B, 3, S, S), or what self.vision made of them, where each meets many texts."""
        seen = images if images.ndim == 3 else self.vision(images)
        x = self.match(self.fuse(self.text(tokens, valid), valid, seen)[:, 0]).float()
        return x[:, 1] - x[:, 0]

    @torch.no_grad()
    def relevance(self, tapped, tokens, states, boxes):
        """Log-probability (B, N) that a patch belongs to its image's caption; where no boxes taught the predictor, the cosine of patch and text."""
        if boxes:
            return self.predictor(tapped[:, 1:], states[:, 0])[..., 1]
        return (self.image_embeds(tokens[:, 1:]) @ self.text_embeds(states)[..., None])[..., 0]


Model = TiMix


# ---- objective ----

def losses(model, batch, noise, generator, cfg, rise, mixing, fast=None, slow=None):
    """One step on clean pairs, their mixture and region images: {term: this rank's share}, {name: gauge}.

    noise (B, 2L + 2 block + N) uniform; generator: of the step; rise: 0 .. 1, how far alpha and the mixture's weight have risen; mixing: is there
    a mixture in this step? fast, slow: namespaces of the (compiled) vision, text, fuse of the model and of its teacher.
    """
    fast, slow, boxes = fast or model, slow or model.teacher, "region_images" in batch
    images, tokens, valid = (batch[name] for name in ("images", "tokens", "valid"))
    (B, L), tau, chunks = tokens.shape, model.temperature, lambda f, *rows: common.in_chunks(f, cfg.micro, *rows)
    words, rivals, chance = common.to_device(noise, tokens.device).split([2 * L, 2 * cfg.block, model.vision.grid ** 2], 1)
    alpha, terms, gauges = cfg.alpha * rise * (model.teacher is not None), {}, {}
    with common.autocast(cfg, images.device):
        seen, tapped = chunks(lambda x: fast.vision(x, tap=model.tap), images)
        states = chunks(fast.text, tokens, valid)
        image, text = model.image_embeds(seen[:, 0]), model.text_embeds(states)
    logits = similarities(image, text, tau)
    pairs = F.one_hot(rank() * B + torch.arange(B, device=tokens.device), logits[0].shape[1]).to(image.dtype)      # (B, G)
    targets = (pairs, pairs)
    if model.teacher:
        with torch.no_grad():
            with common.autocast(cfg, images.device):
                seen_slow = chunks(slow.vision, images)
                opinion = model.teacher.image_embeds(seen_slow[:, 0]), model.teacher.text_embeds(chunks(slow.text, tokens, valid))
            targets = [alpha * x.softmax(1) + (1 - alpha) * pairs for x in similarities(*opinion, tau)]
    terms["itc"] = soft_itc(logits, targets)

    if model.teacher:
        other_text, other_image = hard_negatives(image, text, tau, rivals.view(B, 2, cfg.block), cfg.block)
        rows = torch.arange(B, device=tokens.device)
        rows_t, rows_i = torch.cat([rows, rows, other_text]), torch.cat([rows, other_image, rows])
        shown, at, asked = mask_tokens(tokens, valid, words.view(B, 2, L), cfg.mask_ratio, cfg.vocab_size)
        pick = at[..., None].expand(-1, -1, cfg.text_dim)
        with common.autocast(cfg, images.device):
            joint = chunks(lambda *x: fast.fuse(*x)[:, 0], states.index_select(0, rows_t), valid[rows_t], seen.index_select(0, rows_i))
            match = model.match(joint).float()
            states_at = lambda run, latent: chunks(lambda t, v, z: run.fuse(run.text(t, v), v, z), shown, valid, latent).gather(1, pick)
            guessed = model.word(states_at(fast, seen)).float().log_softmax(2)
            with torch.no_grad():
                taught = model.teacher.word(states_at(slow, seen_slow)).float().softmax(2)
        terms["itm"] = F.cross_entropy(match, (torch.arange(3 * B, device=tokens.device) < B).long())
        hard = F.nll_loss(guessed.flatten(0, 1), asked.flatten(), ignore_index=-1, reduction="sum")
        soft = torch.where(asked >= 0, -(taught * guessed).sum(2), 0).sum()
        terms["mlm"] = ((1 - alpha) * hard + alpha * soft) * world() / common.total((asked >= 0).sum()).clamp(min=1)

    if boxes:
        R, E = batch["region_used"].shape
        with common.autocast(cfg, images.device):
            h = chunks(lambda x: fast.vision(x, upto=model.tap)[:, 1:], batch["region_images"])                    # the blocks above are not run
            g = chunks(lambda t, v: fast.text(t, v)[:, 0], batch["region_tokens"].flatten(0, 1), batch["region_valid"].flatten(0, 1))
            found = model.predictor(h.repeat_interleave(E, 0), g)                                # (R * E, N, 2)
        terms["pta"], gauges = pta_loss(found, batch["region_patches"].flatten(0, 1), batch["region_used"].flatten())
    if mixing:
        with common.autocast(cfg, images.device):
            scores = model.relevance(tapped, seen, states, boxes)
        mix = MIXERS[cfg.mix](batch, scores, chance, model.vision.grid, generator, cfg)
        labels = soft_labels(cfg.targets, mix, cfg.block, *logits, scores.exp())
        with common.autocast(cfg, images.device):
            mixed = model.image_embeds(chunks(lambda x: fast.vision(x)[:, 0], mix.images))
        terms["mix"] = soft_itc(similarities(mixed, text, tau), labels)
    return terms, gauges


def pta_loss(found, patches, used):
    """Patch-text alignment: cross-entropy of found (M, N, 2) log-probabilities with patches (M, N) bool, over the used (M,) entries of all ranks.
    -> this rank's share, {"pta_accuracy", "pta_recall"}: shares of these ranks' patches, and of the relevant ones, that are found."""
    loss = torch.where(used[:, None], F.nll_loss(found.flatten(0, 1), patches.flatten().long(), reduction="none").view(patches.shape), 0)
    right = (found[..., 1] > found[..., 0]) == patches
    sums = common.total(torch.stack([x.sum() for x in (used[:, None].expand_as(patches), used[:, None] & right, used[:, None] & patches,
                                                       used[:, None] & patches & right)])).double()
    sums[::2].clamp_(min=1)                                  # what is divided by
    return loss.sum() * world() / sums[0].to(loss.dtype), {"pta_accuracy": sums[1] / sums[0], "pta_recall": sums[3] / sums[2]}


# ---- training rows ----

def distort(image, rng, moving):
    """RandAugment(2, 7) (TiMix code): two operations, each in half of the cases; those that move pixels only if `moving`. Strengths are ours."""
    bend = lambda a, b, c, d, e, f: image.transform(image.size, Image.AFFINE, (a, b, c, d, e, f), Image.BILINEAR)
    for op in rng.integers(9 if moving else 5, size=2):
        sign, (w, h) = 1 if rng.random() < 0.5 else -1, image.size
        if rng.random() < 0.5 or op == 0:
            continue
        image = (lambda: ImageOps.autocontrast(image), lambda: ImageOps.equalize(image),
                 lambda: ImageEnhance.Brightness(image).enhance(1 + 0.36 * sign), lambda: ImageEnhance.Sharpness(image).enhance(1 + 0.36 * sign),
                 lambda: bend(1, 0.2 * sign, -0.1 * sign * h, 0, 1, 0), lambda: bend(1, 0, 0, 0.2 * sign, 1, -0.1 * sign * w),
                 lambda: image.rotate(20 * sign, Image.BILINEAR), lambda: bend(1, 0, 0.05 * sign * w, 0, 1, 0.05 * sign * h))[op - 1]()
    return image


def example(sample, rng, cfg, tokenizer):
    """A training pair: randomly cropped, maybe flipped and distorted image and one caption."""
    tokens, valid = tokenizer.pad(sample.caption(rng), cfg.context)
    image = sample.image(near=round(cfg.image_size / cfg.scale ** 0.5))
    box, flip = data.random_box(rng, *image.size, cfg.scale), cfg.flip and rng.random() < 0.5
    image = distort(image, rng, True) if cfg.augment else image
    return {"images": data.crop(image, box, cfg.image_size, flip), "tokens": tokens, "valid": valid}


def region_example(sample, rng, cfg, tokenizer):
    """A region image with --entries texts and the patches (entries, N) that each describes (X-VLM's loading, as TiMix's code): a crop around one
    box, maybe flipped; texts of boxes that lie in it by more than half; `used` is False where there are fewer."""
    if not {"boxes", "segments"} & sample.json.keys():       # told before anything is decoded: where boxes are rare, many are passed over
        raise data.Skip("no box")
    image = sample.image()
    boxes = sample.boxes(*image.size)
    x, y, w, h, _ = boxes[int(rng.integers(len(boxes)))]
    left, top = int(rng.integers(int(x) + 1)), int(rng.integers(int(y) + 1))
    right, bottom = (int(rng.integers(math.ceil(least), most + 1)) for least, most in ((x + w, image.width), (y + h, image.height)))
    flip, n = cfg.flip and rng.random() < 0.5, cfg.image_size // cfg.patch
    found = [(sample.caption(rng), np.ones((n, n), bool))] if cfg.whole and sample.captioned() else []
    for i in rng.permutation(len(boxes)):
        x, y, w, h, text = boxes[i]
        a, b, c, d = max(x, left), max(y, top), min(x + w, right), min(y + h, bottom)
        if c > a and d > b and (c - a) * (d - b) > w * h / 2:
            a, c = (right - c, right - a) if flip else (a - left, c - left)
            found.append((text, box_patches((a, b - top, c, d - top), (right - left, bottom - top), n)))
    found = found[:cfg.entries]
    image = distort(image, rng, False) if cfg.augment else image
    texts = [tokenizer.pad(text, cfg.context) for text, _ in found] + [tokenizer.pad("", cfg.context)] * (cfg.entries - len(found))
    patches = np.zeros((cfg.entries, n * n), bool)
    patches[:len(found)] = [p.ravel() for _, p in found]
    return {"region_images": data.crop(image, (left, top, right - left, bottom - top), cfg.image_size, flip),
            "region_tokens": np.stack([t for t, _ in texts]), "region_valid": np.stack([v for _, v in texts]), "region_patches": patches,
            "region_used": np.arange(cfg.entries) < len(found)}


def box_patches(box, size, n):
    """Edges (left, top, right, bottom) in an image of `size` (width, height) -> (n, n) bool: every patch that the box touches, at least one."""
    marked = np.zeros((n, n), bool)
    (x, y), (right, bottom) = ([min(int(edge * n / side), n - 1) for edge, side in zip(box[:2], size)],
                               [math.ceil(edge * n / side) for edge, side in zip(box[2:], size)])
    marked[y:max(bottom, y + 1), x:max(right, x + 1)] = True
    return marked


class Joined(torch.utils.data.Dataset):
    """Batches of pairs and of region images, made of their own plans, as one."""
    def __init__(self, *parts):
        self.parts = parts

    def __getitem__(self, step):
        pairs, regions = (part[step] for part in self.parts)
        if "error" in pairs or "error" in regions:
            return pairs if "error" in pairs else regions
        return {**pairs, **regions, "skipped": pairs["skipped"] + regions["skipped"]}


def has_boxes(index):
    """Has any of a hundred samples, spread over all, a box with a text?"""
    def found(i):
        try:
            sample = index[i]
            return bool(sample.boxes(*sample.image().size))
        except data.Skip:
            return False
    return any(map(found, np.linspace(0, len(index) - 1, 100).astype(int).tolist()))


# ---- held-out pictures and gauges ----

@torch.no_grad()
def measure(model, tokenizer, cfg, device, index):
    """On up to 512 held-out images with boxes, seen as in training: how well the predictor finds the patches of a text, and how many of the patches
    that any box touches a mixture of side n / 2 covers, chosen by the predictor, at random, and the wrong way round."""
    rows = []
    for i in range(len(index)):
        try:
            sample, rng = index[i], data.rng_for(7, i)
            image = sample.image()
            touched = [box_patches((x, y, x + w, y + h), image.size, model.vision.grid) for x, y, w, h, _ in sample.boxes(*image.size)]
            tokens, valid = tokenizer.pad(sample.caption(rng), cfg.context)
            rows.append({**region_example(sample, rng, cfg, tokenizer), "images": data.crop(image, (0, 0, *image.size), cfg.image_size),
                         "tokens": tokens, "valid": valid, "touched": np.any(touched, 0).ravel()})
        except data.Skip:
            continue
        if len(rows) == 512:
            break
    if len(rows) < 2:
        return {}
    batch = {k: v.to(device) for k, v in data.stack(rows[:len(rows) // 2 * 2]).items()}
    with common.autocast(cfg, device):
        h = model.vision(batch["region_images"], upto=model.tap)[:, 1:].repeat_interleave(cfg.entries, 0)
        found = model.predictor(h, model.text(batch["region_tokens"].flatten(0, 1), batch["region_valid"].flatten(0, 1))[:, 0])
        tapped, states = model.vision(batch["images"], upto=model.tap), model.text(batch["tokens"], batch["valid"])
        scores = model.relevance(tapped, None, states, True)
    used = batch["region_used"].flatten()
    found, patches = (found[..., 1] > found[..., 0])[used], batch["region_patches"].flatten(0, 1)[used]
    result = {"pta_accuracy": (found == patches).double().mean(), "pta_recall": found[patches].double().mean(),
              "pta_precision": patches[found].double().mean(), "pta_relevant": patches.double().mean()}
    chance = torch.rand(scores.shape, generator=common.generator(cfg.seed)).to(device)
    for name, order in (("text", scores), ("random", chance), ("inverted", -scores)):
        kept = text_aware_mix(batch["images"], order, model.vision.grid // 2).kept
        result[f"covered_{name}"] = (batch["touched"] & ~kept).sum().double() / batch["touched"].sum()
    return {name: value.item() for name, value in result.items()}


@torch.no_grad()
def draw(model, tokenizer, cfg, device, boxes):
    """out/curves.png; out/mixing.png: image, its score map, partner, its score map, mixture, both captions with their weights. -> measure()"""
    index, title = evaluation.held_out(cfg)
    if rank():
        return {}
    terms = ["itc"] + ["mix"] * (cfg.mix != "none") + ["itm", "mlm"] * bool(model.teacher) + ["pta", "pta_recall"] * boxes
    evaluation.curves(f"{cfg.out}/log.jsonl", f"{cfg.out}/curves.png", ["loss", *terms, "temperature", "grad_norm"],
                      f"TiMix ({cfg.mix}), {cfg.steps} steps of {cfg.batch}")
    samples, n = evaluation.specimens(index, 6), model.vision.grid
    texts = [s.captions(lines=True)[0] for s in samples]
    images = torch.stack([torch.tensor(data.centre(s.image(), cfg.image_size)) for s in samples])
    tokens, valid = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*(tokenizer.pad(t, cfg.context) for t in texts)))
    with common.autocast(cfg, device):
        seen, tapped = model.vision(images.to(device), tap=model.tap)
        scores = model.relevance(tapped, seen, model.text(tokens, valid), boxes).float().cpu()
    mix, cells = text_aware_mix(images, scores, max(1, n // 2)), []
    maps = [evaluation.overlay(image, score.view(n, n)) for image, score in zip(images, scores)]
    for i in range(6):
        j = 5 - i
        cells += [(images[i], "image i", None), (maps[i], "what its caption names", None), (images[j], "image j", None), (maps[j], "", None),
                  (mix.images[i], "mixture", None), (None, f"{mix.lam:.2f}: {texts[i]}    {1 - mix.lam:.2f}: {texts[j]}", None)]
    how = "patch predictor" if boxes else "cosine of patch and text"
    evaluation.sheet(cells, f"{cfg.out}/mixing.png", 6, f"{title.capitalize()}: text-aware mixing, scores by {how}", 128)
    return measure(model, tokenizer, cfg, device, index) if boxes else {}


def check(cfg):
    for name, allowed in (("base", ("albef", "clip")), ("mix", ("none", *MIXERS)), ("targets", ("predicted", "area", "relevance"))):
        if getattr(cfg, name) not in allowed:
            raise UserError(f"--{name} {getattr(cfg, name)}: choose {', '.join(allowed)}")
    if cfg.mask_ratio > 0.5:
        raise UserError(f"--mask-ratio {cfg.mask_ratio}: at most half of a caption's words can be asked")
    if not 0 < cfg.min_side <= cfg.max_side <= 1:
        raise UserError(f"--min-side {cfg.min_side} --max-side {cfg.max_side}: a window's side lies between 0 and 1 sides of the image")


def main(cfg):
    """Train, evaluate, draw. Returns the metrics of the last evaluation."""
    check(cfg)
    device = common.start(cfg)
    cfg = data.with_world(cfg)
    state = common.resume(cfg, "TiMix")
    index, = data.indices_of(cfg.data)
    tokenizer = common.rank0_first(lambda: data.vocabulary(cfg, index, state))
    make, boxes = partial(example, cfg=cfg, tokenizer=tokenizer), has_boxes(index)
    rows = [data.Rows(index, data.Plan(index.starts, cfg.batch, cfg.seed, cfg.window), make)]
    batches = data.Batches(rows, cfg.batch, rank(), world())
    if boxes:
        plan = data.Plan(index.starts, cfg.batch // 2, cfg.seed + 1, cfg.window)
        regions = data.Rows(index, plan, partial(region_example, cfg=cfg, tokenizer=tokenizer))
        batches = Joined(batches, data.Batches([regions], cfg.batch // 2, rank(), world()))
    elif cfg.targets == "relevance":
        raise UserError("--targets relevance needs probabilities of the patch predictor, which boxes teach: there are none in this data")
    model = TiMix(cfg).to(device)
    common.init_encoder(model.vision, cfg.init)
    if cfg.init and model.teacher:
        model.follow(0)                                      # the teacher starts where the model does
    opt = common.adamw(model, cfg, betas=(0.9, 0.999))       # torch's, as TiMix's code
    first, peak = common.restore(state, model, opt), cfg.lr
    common.describe(cfg, device, model, rows, first, peak)
    print0("patch scores: " + ("patch predictor, taught by boxes" if boxes else "no boxes in the data, so cosines of patches and text; PTA is off"))
    batches = data.Loader(batches, first, cfg, device)
    fast, slow = (part and SimpleNamespace(**{name: common.compiled(getattr(part, name), cfg, device) for name in ("vision", "text", "fuse")})
                  for part in (model, model.teacher))
    log = common.Log(cfg, device, first, data.REASONS)

    for step in range(first, cfg.steps):
        model.clamp()
        if model.teacher:
            model.follow(cfg.momentum)                       # before its opinion is asked (ALBEF)
        batch, rise = log.next(batches), min(1.0, step / max(1.0, cfg.ramp * cfg.steps))
        noise = common.row_noise(cfg, step, 2 * cfg.context + 2 * cfg.block + model.vision.grid ** 2)
        mixing = cfg.mix != "none" and step < cfg.mix_until * cfg.steps
        terms, gauges = losses(model, batch, noise, common.generator(cfg.seed, step, 1), cfg, rise, mixing, fast, slow)
        loss = sum(getattr(cfg, f"w_{name}") * (rise if name == "mix" else 1) * term for name, term in terms.items())
        terms, temperature = {**terms, **gauges}, model.temperature.detach().clone()

        # -- the same lines in every script, held together by tests/test_text.py --
        for group in opt.param_groups:
            group["lr"] = lr_at(step, cfg, peak)
        opt.zero_grad(set_to_none=True)
        with averaging(model.parameters()):                  # gradients become means over ranks while backward runs
            loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)      # after averaging, or ranks drift apart; 0 = off
        opt.step()
        log.step(step, loss, terms, lr_at(step, cfg, peak), grad_norm, temperature)
        if log.stop or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            log.settle()                                     # a checkpoint is written only after its own step was read clean
            common.save(cfg, model, opt, step + 1, tokenizer.dumps(), log)
        if cfg.eval_every > 0 and (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            evaluation.evaluate(model, tokenizer, cfg, device)
        if log.stop:
            break
        # -- end --

    batches.close()
    log.close()
    if log.stop or cfg.eval_every < 0:
        return {}
    result = evaluation.evaluate(model, tokenizer, cfg, device)
    result.update(draw(model, tokenizer, cfg, device, boxes))
    evaluation.write(result, cfg)
    return result


if __name__ == "__main__":
    common.guard(lambda: main(common.parse(Config, DEMO, __doc__)))
