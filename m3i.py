"""M3I (arXiv 2211.09807): supervised, weakly supervised and self-supervised signals in one stage, one encoder pass, one loss.

    python m3i.py                                                # trains on the built-in world, evaluates, draws
    python m3i.py --data 'cc3m/*.tar' --labels imagenet/ --labels-share 0.5       # captioned and labelled shards in one batch
    torchrun --standalone --nproc_per_node 8 m3i.py --data 'cc3m/*.tar' --size l
    python m3i.py --size g --patch 14 --image-size 224 --dry-run # memory of a billion parameters

Patches of two images a and b make one input. From what the encoder makes of its own patches, a must predict the features of the same view
(intra), b those of another view of itself (inter), and both their caption (text) and category (class). Image targets come from a moving
average of the encoder, without gradient. All are bounds on one quantity, I(input; target): regression assumes a Gaussian, softmax a Boltzmann
distribution around the prediction. Each method below is a setting of this file (tests/test_m3i.py):

    supervised                    --labels ... --only class --keep 1
    CutMix, supervised            --labels ... --only class --pool all         (labels weighted by the share of patches)
    image-text contrast           --data ...   --only text --keep 1            (ALIGN's image-to-text half, without smoothing)
    masked image modelling        --data ...   --only intra --target pixels    (masked patches show another image)
    masked siamese modelling      --data ...   --only inter

Read Config (what the run is), relative_position, M3I (the model), image_loss and softmax_loss, then main.
Departures: the paper's section 3.1 items are confirmed, its equations, recipe and tables were not available to us. Mask ratio and unit, decoder,
normalisation of targets, weights, temperature and schedule are ours or its sibling SiameseIM's, and so marked in Config.

Dimension key: B mixtures of this rank = B images, L patches, K of them from image a, D width, T text tokens, C classes.
"""
import copy, math, weakref
from dataclasses import dataclass, replace
from functools import partial

import common                    # before torch: it sets how OpenMP waits
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageEnhance, ImageFilter, ImageOps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import eval as evaluation
from common import Block, TextTransformer, UserError, ViT, averaging, lr_at, print0, rank, run_blocks, unit, world

TERMS = ("intra", "inter", "text", "class")


@dataclass
class Config:
    data: list = None            # captioned shards: files, folders, globs, {0..9} ranges; none of both = the built-in world
    labels: list = None          # labelled shards, with classes.txt beside them
    labels_share: float = 0.5    # ours: labelled images among the rows of a batch, where both are given
    val: list = None             # held-out shards: with captions -> retrieval, with classes -> zero-shot, kNN, linear probe
    out: str = "runs/m3i"        # checkpoints, log, results and pictures; a second start here resumes
    fresh: bool = False          # start anew in --out
    init: str = None             # file of timm-named encoder weights to start from; tells dim, depth, heads, patch unless they are given
    # encoder and views
    image_size: int = 224        # SiameseIM
    scale: float = 0.2           # ours: least area of a view (SiameseIM 0.08 for 1600 epochs)
    color: float = 1.0           # SiameseIM: jitter, grey, blur and solarise with their published strengths times this; 0 = none
    patch: int = 16              # ours: ViT-B/16
    size: str = None             # ti s b l h g: fills dim, depth, heads unless they are given
    dim: int = 768               # ViT-B
    depth: int = 12              # ViT-B
    heads: int = 12              # ViT-B
    cls: bool = True             # ours: takes part in attention only
    flip: bool = True            # SiameseIM
    # mixture
    keep: float = 0.5            # ours: share of patches from image a; 1 = no mixing, and no image b
    unit: int = 2                # ours: mask unit in patches
    block: int = 64              # ours: rows among which partners are sought, even; ranks hold whole blocks
    p_plain: float = 0.0         # ours: share of steps that show image a whole; its partner has no part in them
    pool: str = "own"            # ours: global targets are predicted from an image's own patches, or from all
    # image targets
    target: str = "ema"          # SiameseIM: features of the averaged encoder; or pixels, normalised by patch (MAE)
    momentum: float = 0.995      # SiameseIM: of the average, rising to 1 with a cosine
    moment: float = 0.02         # SiameseIM: weight of the second-moment term, at width 768
    projector_depth: int = 2     # SiameseIM
    decoder_depth: int = 4       # SiameseIM
    # text and category
    context: int = 64            # ours, in tokens
    vocab: str = None            # vocabulary file; none = train one on the first captions
    vocab_size: int = 30_522     # ours: BERT's size
    text_dim: int = 768          # paper: BERT-base
    text_depth: int = 12         # paper: BERT-base
    text_heads: int = 12         # paper: BERT-base
    classes: int = 0             # counted in classes.txt
    temperature: float = 0.07    # ours: initial value; its inverse is learned in log space, at most 100
    # objective
    w_intra: float = 1.0         # ours
    w_inter: float = 1.0         # ours
    w_text: float = 1.0          # ours
    w_class: float = 1.0         # ours
    only: str = None             # short cut: this term with its weight, the others with 0
    balance: str = "none"        # ours: grad = weights such that all terms pull as hard on the encoder's output
    # optimisation
    batch: int = 4096            # SiameseIM, global
    steps: int = 250_000         # ours
    lr: float = 1.5e-4           # ours: base rate for 256 images, scaled by batch / 256
    warmup: int = 10_000         # ours, in steps; at most a tenth of them
    schedule: str = "cosine"     # SiameseIM; or linear
    wd: float = 0.05             # SiameseIM
    grad_clip: float = 1.0       # SiameseIM; 0 = off
    seed: int = 0                # ours
    # machine
    micro: int = 0               # rows of a rank that the encoders take at a time, recomputed in backward; 0 = all
    grad_checkpoint: bool = False  # recompute every block of the encoders in backward; the others' batch norms may run only once
    precision: str = "auto"      # bf16 where the device computes in it, else fp32
    compile: bool = None         # none = on for CUDA, off for CPU
    workers: int = None          # loader processes of a rank; none = its cores less one
    window: int = 64             # shards shuffled together
    save_every: int = 1000       # ours
    log_every: int = 10          # ours
    eval_every: int = 0          # steps between evaluations; 0 = at the end, -1 = never
    timeout: int = 600           # seconds a rank waits for the others
    dry_run: bool = False        # print how much memory a step of a rank needs, and stop


# The built-in world on two CPU cores. Colours are what its captions name, so they stay; no flips, as captions say left and right.
DEMO = dict(image_size=48, patch=8, dim=128, depth=3, heads=4, scale=0.6, color=0.0, flip=False, unit=1, block=8, moment=0.12, projector_depth=1,
            decoder_depth=1, text_dim=64, text_depth=2, text_heads=2, context=24, vocab_size=512, momentum=0.99, batch=128, steps=400, lr=3e-3,
            warmup=50, save_every=200)


# ---- views ----

def distort(image, rng, strength, second):
    """SiameseIM's colours: jitter (0.4, 0.4, 0.2 times strength; hue is left out) in 80 % of views, grey in 20 %, blur in all first and a tenth of
    second views, solarise in 20 % of second views."""
    if rng.random() < 0.8:
        for how, most in ((ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4), (ImageEnhance.Color, 0.2)):
            image = how(image).enhance(1 + strength * most * rng.uniform(-1, 1))
    if rng.random() < 0.2 * strength:
        image = ImageOps.grayscale(image).convert("RGB")
    if rng.random() < (0.1 if second else 1.0) * strength:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2) * min(image.size) / 224))
    return ImageOps.solarize(image, 128) if second and rng.random() < 0.2 * strength else image


def view(image, rng, cfg, second=False):
    """A random view uint8 (3, S, S), and where it lies (row, column, height, width, flip, width of the image), in the flipped image's pixels."""
    x, y, w, h = box = data.random_box(rng, *image.size, cfg.scale)
    flip = bool(cfg.flip and rng.random() < 0.5)
    image = distort(image, rng, cfg.color, second) if cfg.color else image
    return data.crop(image, box, cfg.image_size, flip), np.array([y, image.width - x - w if flip else x, h, w, flip, image.width], np.float32)


def example(sample, rng, cfg, tokenizer):
    """A training row: two views with their geometry, and a caption, a class (-1 = none), or both."""
    captioned = sample.captioned()
    tokens, valid = tokenizer.pad(sample.caption(rng) if captioned else "", cfg.context)
    image = sample.image(near=round(cfg.image_size / cfg.scale ** 0.5))
    (first, g1), (second, g2) = view(image, rng, cfg), view(image, rng, cfg, True)
    label = sample.label() if "cls" in sample.members else -1
    label = label if label < cfg.classes else -1
    if label < 0 and not captioned:
        raise data.Skip("no class")
    return {"first": first, "second": second, "geometry": np.stack([g1, g2]), "tokens": tokens, "valid": valid, "has_text": np.bool_(captioned),
            "label": np.int64(label)}


def relative_position(source, target, grid, dim):
    """Where the patches of a target view lie in a source view, as sines and cosines (B, L, 2 dim) (SiameseIM's formula).

    source, target (B, 6): see view(). Rows and columns in the source's patches from its top left one, then log ratios of the views' sides.
    """
    i1, j1, h1, w1, f1, W = source.double().T[..., None]     # each (B, 1)
    i2, j2, h2, w2, f2, _ = target.double().T[..., None]
    k = torch.arange(grid, dtype=torch.float64, device=source.device) + 0.5
    row = grid * (i2 - i1) / h1 + h2 / h1 * k - 0.5          # (B, grid)
    col = torch.where(f1 == f2, grid * (j2 - j1) / w1 + w2 / w1 * k, grid * (W - j1 - j2) / w1 - w2 / w1 * k) - 0.5
    row, col = row.repeat_interleave(grid, 1), col.repeat(1, grid)                               # (B, L)
    parts = [row, col, (10 * (h2 / h1).log()).expand_as(row), (10 * (w2 / w1).log()).expand_as(col)]
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=source.device) / (dim / 4))
    return torch.cat([wave for part in parts for wave in ((part[..., None] * omega).sin(), (part[..., None] * omega).cos())], 2)


def masks(noise, grid, size, keep):
    """(B, L) bool, True = the patch comes from image a: the same number in each row, in units of size x size patches. noise (B, units)."""
    side = grid // size
    chosen = noise.argsort(1).argsort(1) < int(side ** 2 * keep)
    return chosen.view(-1, side, side).repeat_interleave(size, 1).repeat_interleave(size, 2).flatten(1)


def pixels(own, patch):                                      # (B, L) by patch -> (B, 1, S, S) by pixel
    side = math.isqrt(own.shape[1])
    return own.view(-1, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


# ---- model ----

class _Total(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: common.total(x))
    backward = staticmethod(lambda ctx, grad: common.total(grad))    # every rank's loss depends on every rank's rows


class BatchNorm(nn.Module):
    """Batch normalisation over the rows and tokens of all ranks, in float32, without running statistics (SiameseIM's, in train mode)."""
    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):                                    # (B, L, D)
        x = x.to(self.weight.dtype)
        first, second = _Total.apply(torch.stack([x.mean((0, 1)), x.square().mean((0, 1))])) / world()      # ranks hold equally many rows
        return (x - first) * (second - first.square() + 1e-5).rsqrt() * self.weight + self.bias


def blocks_with_batch_norm(dim, heads, depth):
    blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
    blocks.apply(common.init_weights)
    for block in blocks:
        block.norm1, block.norm2 = BatchNorm(dim), BatchNorm(dim)
    return blocks


class Projector(nn.Module):
    """Encoder tokens -> tokens for the decoder, or image targets."""
    def __init__(self, dim, heads, depth):
        super().__init__()
        self.embed = nn.Linear(dim, dim)
        common.init_weights(self.embed)
        self.blocks = blocks_with_batch_norm(dim, heads, depth)

    def forward(self, z):                                    # (B, L, D) -> (B, L, D)
        return run_blocks(self.blocks, self.embed(z))


class Decoder(nn.Module):
    """Own tokens of an image and a mask token for each target patch, which knows its place relative to the input view -> target features."""
    def __init__(self, dim, heads, depth, out_dim):
        super().__init__()
        self.place = nn.Linear(2 * dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = blocks_with_batch_norm(dim, heads, depth)
        self.out = nn.Linear(dim, out_dim)
        for part in (self.place, self.out):
            common.init_weights(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens, own, k, source, target, grid):     # (B, L, D), (B, L) bool with k in each row, (B, 6), (B, 6) -> (B, L, out)
        dim = tokens.shape[2]
        ids = own.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :k, None].expand(-1, -1, dim)
        here, there = (relative_position(source, view, grid, dim).to(self.mask_token.dtype) for view in (source, target))
        asked = self.mask_token + self.place(there)
        x = torch.cat([(tokens + here[..., :dim]).gather(1, ids), asked.to(here.dtype)], 1)
        return self.out(run_blocks(self.blocks, x)[:, -asked.shape[1]:])


class M3I(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.vision = ViT(cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads, cls=cfg.cls,
                          mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))                 # ImageNet's
        self.text = TextTransformer(cfg.vocab_size, cfg.context, cfg.text_dim, cfg.text_depth, cfg.text_heads, causal=False)
        self.vision.recompute = self.text.recompute = cfg.grad_checkpoint
        self.grid, self.ema = self.vision.grid, cfg.target == "ema"
        if self.grid % cfg.unit:
            raise UserError(f"--unit {cfg.unit} does not divide the grid of {self.grid} patches: try {math.gcd(self.grid, cfg.unit)}")
        head = lambda out: nn.Sequential(nn.Linear(cfg.dim, cfg.dim), nn.GELU(), nn.Linear(cfg.dim, out))
        self.text_head, self.log_scale = head(cfg.text_dim), nn.Parameter(torch.tensor(-math.log(cfg.temperature)))
        self.class_head = nn.Sequential(head(cfg.dim), nn.Linear(cfg.dim, cfg.classes)) if cfg.classes else None
        for part in [self.text_head] + [self.class_head] * bool(cfg.classes):
            part.apply(common.init_weights)
        self.projector = Projector(cfg.dim, cfg.heads, cfg.projector_depth)
        self.decoder = Decoder(cfg.dim, cfg.heads, cfg.decoder_depth, cfg.dim if self.ema else 3 * cfg.patch ** 2)
        if self.ema:
            self.average = copy.deepcopy(nn.ModuleList([self.vision, self.projector])).requires_grad_(False)
        self.register_buffer("pull", torch.zeros(len(TERMS)))    # --balance: average gradient norms, kept in the checkpoint

    def encoders(self):
        """Images (B, 3, S, S) -> tokens (B, L, D), online and, where the targets need it, averaged."""
        return [vision.patch_tokens for vision in (self.vision, *([self.average[0]] if self.ema else []))]

    @torch.no_grad()
    def follow(self, momentum):
        for slow, fast in zip(self.average.parameters(), [*self.vision.parameters(), *self.projector.parameters()]):
            slow.lerp_(fast, 1 - momentum)

    @torch.no_grad()
    def targets(self, images, encode, micro):                # (B, 3, S, S) -> (B, L, D), each of zero mean and unit deviation
        if not self.ema:
            return common.normalised(self.vision.patches(images))[0]
        z = self.average[1](common.in_chunks(encode, micro, images))
        return F.layer_norm(z.to(torch.promote_types(z.dtype, torch.float32)), [z.shape[2]])

    def mean(self, x, own):                                  # (B, L, D), (B, L) bool -> (B, D): mean of those tokens, in float32 at least
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x * own[..., None]).sum(1) / own.sum(1, keepdim=True)

    @torch.no_grad()
    def clamp(self):                                         # at the top of a step: beyond the bound there would be no gradient back
        self.log_scale.clamp_(max=math.log(100))

    def scale(self):
        return self.log_scale.clamp(max=math.log(100)).exp()     # clamped for readers of a checkpoint, which is written after a step

    def encode_image(self, images):                          # (B, 3, S, S) -> (B, E) unit
        return unit(self.text_head(self.vision.patch_tokens(images).mean(1)))

    def encode_text(self, tokens, valid):                    # (B, T) -> (B, E) unit
        return unit(self.mean(self.text(tokens, valid), valid))


Model = M3I


# ---- objective ----

def image_loss(pred, target, scored, moment):
    """Squared error by dimension over the scored patches of all ranks, plus moment times p'Cp, C the targets' second moment (SiameseIM). 1 for a
    prediction of 0. pred, target (B, L, D); scored (B, L), as many on every rank. Returns this rank's share."""
    pred, weight = pred.to(target.dtype), scored[..., None].to(target.dtype)
    count = weight.sum() * target.shape[2]
    seen = (target * weight).flatten(0, 1)
    C = common.total(seen.T @ seen) / (world() * weight.sum())
    return ((pred - target).square() * weight).sum() / count + moment * ((pred @ C) * pred * weight).sum() / count


def softmax_loss(logits, labels, weight=None):
    """Cross-entropy of the rows with a label (not -1), over how many all ranks have (0 if none has). logits (B, C). Returns this rank's share."""
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    return (losses if weight is None else losses * weight).sum() * world() / common.total((labels >= 0).sum()).clamp(min=1)


def text_loss(images, texts, has_text, mine, scale, weight=None):
    """Each image among the texts of all ranks (paper, Figure 1; InfoNCE, images to texts). images, texts (B, E) unit; mine (B,): this rank's row of
    each image's text; has_text (B,) of the texts. Returns this rank's share."""
    there = common.all_gather(has_text)
    logits = (scale * images @ common.gather(texts).T).masked_fill(~there, torch.finfo(images.dtype).min)
    return softmax_loss(logits, (rank() * len(texts) + mine).where(has_text[mine], -1), weight)


def losses(model, batch, own, k, cfg, encode, slow=None):
    """One pass over the mixtures: {term: this rank's share}, the encoder's output z (B, L, D), {name: gauge of the image targets}.

    own (B, L): patches that show image a, k in each row; k = L is a plain step, which has no image b. encode, slow: model.encoders(), maybe compiled.
    """
    (B, L), device, weights, found, gauges = own.shape, own.device, term_weights(cfg), [], {}
    other = partial(common.partner, block=cfg.block)
    rows = torch.arange(B, device=device)
    images = [(own, rows, None), (~own, other(rows), None)][:1 + (k < L)]                        # (patches, row of caption and class, weight)
    if cfg.pool == "all":                                    # as CutMix: one description for both images, each with its share of patches
        images = [(torch.ones_like(own), mine, shown.float().mean(1)) for shown, mine, _ in images]
    with common.autocast(cfg, device):
        z = common.in_chunks(encode, cfg.micro, torch.where(pixels(own, cfg.patch), batch["first"], other(batch["first"])))
        if k < L and weights["intra"] + weights["inter"]:
            projected, (g1, g2) = model.projector(z), batch["geometry"].unbind(1)
            if weights["intra"]:                             # hidden patches only: the visible ones need no prediction
                found.append(("intra", model.decoder(projected, own, k, g1, g1, model.grid), model.targets(batch["first"], slow, cfg.micro), ~own))
            if weights["inter"]:
                found.append(("inter", model.decoder(projected, ~own, L - k, other(g1), other(g2), model.grid),
                              other(model.targets(batch["second"], slow, cfg.micro)), torch.ones_like(own)))
        pooled = [model.mean(z, shown) for shown, _, _ in images]
        if weights["text"]:
            texts = common.in_chunks(model.encode_text, cfg.micro, batch["tokens"], batch["valid"])
            seen = [unit(model.text_head(x)) for x in pooled]
        logits = [model.class_head(x) for x in pooled] if weights["class"] else []
    terms = {name: image_loss(pred, target, scored, cfg.moment) for name, pred, target, scored in found}
    if weights["text"]:
        terms["text"] = sum(text_loss(x, texts, batch["has_text"], mine, model.scale(), share) for x, (_, mine, share) in zip(seen, images))
    if logits:
        logits = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits]
        terms["class"] = sum(softmax_loss(x, batch["label"][mine], share) for x, (_, mine, share) in zip(logits, images))
    for _, _, target, _ in found[-1:]:                       # over the tokens of all ranks; each has unit deviation by itself
        gauges["target_std"] = (1 - (common.total(target.mean((0, 1))) / world()).square().mean()).clamp(min=0).sqrt()
    return terms, z, gauges


def term_weights(cfg):
    """Weight of each term; 0 where --only names another, or where there are no captions or classes."""
    there = {"text": bool(cfg.data), "class": cfg.classes > 0}
    return {t: getattr(cfg, f"w_{t}") * (cfg.only in (None, t)) * there.get(t, True) for t in TERMS}


def balanced(model, terms, z, step, weights):
    """Weights times the ratio of the first term's pull on z to each term's (ours): measured when a term first pulls, and every 100 steps."""
    for k, name in enumerate(TERMS):
        if name in terms and (step % 100 == 0 or model.pull[k] == 0):
            pull = common.total(torch.autograd.grad(terms[name], z, retain_graph=True)[0].square().sum()).sqrt()
            model.pull[k].lerp_(pull, 0.5 if model.pull[k] > 0 else 1.0)
    first = next((pull for pull in model.pull if pull > 0), 1)   # also on a plain step, or the scale of the loss would jump
    return {name: weights[name] * (first / model.pull[k] if model.pull[k] > 0 else 1) for k, name in enumerate(TERMS) if name in terms}


@torch.no_grad()
def draw(model, tokenizer, cfg, device):
    """out/curves.png; out/views.png: sources with their views, mixture, and where the target view lies in the input view; out/neighbours.png:
    held-out images and those nearest to them by pooled tokens."""
    index, title = evaluation.held_out(cfg)
    images, _, ids = evaluation.read(index, lambda s: None, model)
    features = evaluation.collect(evaluation.in_batches(lambda x: unit(model.vision.patch_tokens(x).mean(1)), cfg, device, images))
    ids = evaluation.collect(ids)
    if rank():
        return
    shown = [t for t, weight in term_weights(cfg).items() if weight]
    shown += ["target_std"] * bool({"intra", "inter"} & set(shown))
    evaluation.curves(f"{cfg.out}/log.jsonl", f"{cfg.out}/curves.png", ["loss", *shown, "grad_norm"], f"M3I, {cfg.steps} steps of {cfg.batch}")
    cells, near = [], features @ features.T
    for i in torch.linspace(0, len(ids) - 1, 8).long().tolist():
        best = [i] + [j for j in near[i].topk(6).indices.tolist() if j != i][:5]
        cells += [(index[ids[j]].image(), "" if j == i else f"{near[i, j]:.2f}", None) for j in best]
    evaluation.sheet(cells, f"{cfg.out}/neighbours.png", 6, f"{title.capitalize()}: image (left) and its five nearest", 112)
    rng, cells = data.rng_for(6, cfg.seed), []
    for a, b in torch.linspace(0, len(ids) - 1, 8).long().view(4, 2).tolist():
        left, right = index[ids[a]].image(), index[ids[b]].image()
        views = view(left, rng, cfg), view(right, rng, cfg), view(right, rng, cfg, True)
        (va, ga), (vb, gb), (target, gt) = ((torch.tensor(x), place) for x, place in views)
        own = masks(torch.rand(1, (model.grid // cfg.unit) ** 2, generator=common.generator(cfg.seed, a)), model.grid, cfg.unit, cfg.keep)
        up = pixels(own, cfg.patch)[0, 0]
        mixture = torch.where(up, va, vb)
        cells += [(evaluation.overlay(left, [box(ga, "input")]), "image a", None), (evaluation.overlay(mixture, up.long()), "patches of a", None),
                  (mixture, "mixture", None), (evaluation.overlay(right, [box(gb, "input"), box(gt, "target")]), "image b", None),
                  (evaluation.overlay(vb, [seen_from(gb, gt, cfg.image_size)]), "target in input view", None),
                  (target, "b's target view", None)]
    evaluation.sheet(cells, f"{cfg.out}/views.png", 6, f"{title.capitalize()}: what is made of two images", 128)


def box(g, text):
    """Geometry of a view -> its box in the image as it was before flipping."""
    return {"x": g[5] - g[1] - g[3] if g[4] else g[1], "y": g[0], "w": g[3], "h": g[2], "text": text}


def seen_from(source, target, size):
    """Box of the target view in pixels of the source view: where relative_position() puts its outer edges."""
    x = target[1] if source[4] == target[4] else source[5] - target[1] - target[3]
    return {"x": size * (x - source[1]) / source[3], "y": size * (target[0] - source[0]) / source[2], "w": size * target[3] / source[3],
            "h": size * target[2] / source[2], "text": "target"}


def check(cfg):
    for name, allowed in (("only", (None, *TERMS)), ("pool", ("own", "all")), ("target", ("ema", "pixels")), ("balance", ("none", "grad"))):
        if getattr(cfg, name) not in allowed:
            raise UserError(f"--{name} {getattr(cfg, name)}: choose {', '.join(filter(None, allowed))}")
    if not 0 < cfg.keep <= 1 or not 0 <= cfg.p_plain <= 1:
        raise UserError(f"--keep {cfg.keep} --p-plain {cfg.p_plain}: shares lie between 0 and 1, and an image keeps something")
    weights = term_weights(cfg)
    if not weights["text"] + weights["class"] + (weights["intra"] + weights["inter"]) * (cfg.keep < 1 and cfg.p_plain == 0):
        raise UserError("nothing to learn: image terms need a mixture in every step (--keep below 1, --p-plain 0) or another term beside them, text "
                        "needs --data, class needs --labels with classes.txt")


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that come to life inside, and the most that lived at a time."""
    def __init__(self):
        super().__init__()
        self.now, self.most, self.known = 0, 0, weakref.WeakSet()

    def grow(self, n):
        self.now, self.most = self.now + n, max(self.most, self.now + n)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage not in self.known:
                self.known.add(storage)
                self.grow(storage.nbytes())
                weakref.finalize(storage, self.grow, -storage.nbytes())
        return out


def memory(cfg, device):
    """{what: bytes} of a step of one rank, its forward and backward pass traced on tensors without data."""
    with torch.device("meta"):
        model = M3I(cfg)
    trained, rest = (sum(p.nbytes for p in model.parameters() if p.requires_grad == want) for want in (True, False))
    B, L, S, units = cfg.batch // world(), model.grid ** 2, cfg.image_size, (model.grid // cfg.unit) ** 2
    k = int(masks(torch.rand(1, units), model.grid, cfg.unit, cfg.keep).sum())
    with FakeTensorMode(allow_non_fake_inputs=True), Peak() as peak:
        model.to_empty(device=device)
        batch = {"first": torch.zeros(B, 3, S, S, dtype=torch.uint8, device=device), "geometry": torch.ones(B, 2, 6, device=device),
                 "tokens": torch.zeros(B, cfg.context, dtype=torch.long, device=device), "label": torch.zeros(B, dtype=torch.long, device=device)}
        batch.update(second=batch["first"].clone(), valid=batch["tokens"] == 0, has_text=batch["label"] == 0)
        terms, _, _ = losses(model, batch, torch.ones(B, L, dtype=torch.bool, device=device), k, cfg, *model.encoders())
        sum(terms.values()).backward()
    return {"parameters": trained, "moving average": rest, "gradients": trained, "optimizer": 2 * trained,
            "activations, batch, temporaries": peak.most - 2 * trained - rest, "total": peak.most + 2 * trained}


def main(cfg):
    """Train, evaluate, draw. Returns the metrics of the last evaluation."""
    if cfg.dry_run:
        cfg, device = replace(cfg, data=["-"], classes=cfg.classes or 1000), common.join()
        common.check_rows(cfg)
        check(cfg)
        for what, size in memory(cfg, device).items():
            print0(f"{what:<34}{size / 2 ** 30:10.3f} GiB")
        return {}
    device = common.start(cfg)
    cfg = data.with_world(cfg, data="pairs", labels="labels")
    names = data.beside(data.expand(cfg.labels), "classes.txt", "classnames.txt") if cfg.labels else None
    cfg = replace(cfg, classes=len(names or ()))
    check(cfg)
    state = common.resume(cfg, "M3I")
    indices = data.indices_of(cfg.data, cfg.labels)
    tokenizer = common.rank0_first(lambda: data.vocabulary(cfg, indices[0], state, names or ()))
    rows, share = data.mixture(cfg, indices, cfg.labels_share, partial(example, cfg=cfg, tokenizer=tokenizer))
    model = M3I(cfg).to(device)
    common.init_encoder(model.vision, cfg.init)
    if cfg.init and model.ema:
        model.follow(0)                                      # the averaged encoder starts where the online one does
    opt = common.adamw(model, cfg, betas=(0.9, 0.95))        # SiameseIM
    first, peak = common.restore(state, model, opt), cfg.lr * cfg.batch / 256
    common.describe(cfg, device, model, rows, first, peak)
    batches = data.Loader(data.Batches(rows, cfg.batch, rank(), world(), share), first, cfg, device)
    encoders = [common.compiled(f, cfg, device) for f in model.encoders()]
    log = common.Log(cfg, device, first, data.REASONS)

    for step in range(first, cfg.steps):
        model.clamp()
        if model.ema:
            model.follow(1 - (1 - cfg.momentum) * (1 + math.cos(math.pi * step / cfg.steps)) / 2)
        batch, noise = log.next(batches), common.row_noise(cfg, step, (model.grid // cfg.unit) ** 2)
        plain = torch.rand((), generator=common.generator(cfg.seed, step, 1)) < cfg.p_plain
        own = masks(noise, model.grid, cfg.unit, 1.0 if plain else cfg.keep)
        k = int(own[0].sum())                                # on the CPU: nothing waits for the device
        terms, z, gauges = losses(model, batch, common.to_device(own, device), k, cfg, *encoders)
        weights = balanced(model, terms, z, step, term_weights(cfg)) if cfg.balance == "grad" else term_weights(cfg)
        loss = sum(weights[name] * term for name, term in terms.items())
        terms, temperature = {**terms, **gauges}, 1 / model.scale().detach()

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
    draw(model, tokenizer, cfg, device)
    return result


if __name__ == "__main__":
    common.guard(lambda: main(common.parse(Config, DEMO, __doc__)))
