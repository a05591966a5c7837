"""M3I (arXiv 2211.09807): supervised, weakly supervised and self-supervised targets in one stage.

    python m3i.py                                               # toy data: trains, evaluates, draws
    python m3i.py --data 'cc3m/*.tar' --labels imagenet/ --val coco/ --size s     # your shards
    torchrun --standalone --nproc_per_node 8 m3i.py --data 'cc3m/*.tar'
    python m3i.py --data flickr/ --init runs/m3i/last.pt --keep 1 --lr 1e-5 --out runs/flickr

Patches of two images, a and b, are mixed into one input. The tokens of image a's patches predict
image a's hidden patches (intra-view); those of image b's predict another view of image b
(inter-view); both predict their image's caption (text) and category (class). For fixed targets,
each loss is, up to constants, minus a lower bound of the mutual information of input and target:
squared errors take the target to be Gaussian around its prediction, softmax losses take it to be
one of a set of candidates. The image terms' penalty on second moments is added against collapse.

Reading order: random_view and relative_position (how two views of an image lie to each other),
random_mask and mix, M3I (the model), losses (the method) with feature_loss, text_loss and
labeled_cross_entropy, main.

Special cases (tests/test_m3i.py compares each with a formula of its own):
    supervised             --w-intra 0 --w-inter 0 --w-text 0 --keep 1
    CutMix                 --w-intra 0 --w-inter 0 --w-text 0 --pool all
    image-text contrast    --w-intra 0 --w-inter 0 --w-class 0 --keep 1
    masked image modeling  --w-inter 0 --w-text 0 --w-class 0
                           --target pixels --second-moment-weight 0
    masked siamese         --w-intra 0 --w-text 0 --w-class 0
CutMix draws its share and one box; here random squares have a fixed share, --keep. The contrast is
ALIGN's image-to-text half. Where the masked methods hide patches of an image, the encoder sees
patches of the other.

Departures: the text of the paper after its introduction was not available to us. Confirmed are its
Figure 1, the caption of its Figure 2, and that the text encoder has BERT-Base's architecture. All
else is ours or that of its sibling SiameseIM (arXiv 2206.01204), as marked in Config. Differences
from SiameseIM:
- the encoder ends with a final norm; projector and decoder have its heads (SiameseIM: 16)
- its patch embedding and its positions are trained (there frozen; fixed sines and cosines)
- the class token enters neither projector nor decoder
- the blur is in proportion to the size of a view, as published at 224 pixels

Dimension key: B mixed images of this rank, G of all ranks, S side of an image in pixels, U squares
of a mask, L patches, K of them of one image, D width, P numbers of an image target (D, or those of
a patch's pixels), T text tokens, E width of text, N classes, I held-out images.
"""
import copy
import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import nn

import common
import data
from common import (Block, TextTransformer, UserError, ViT, all_gather, all_gather_with_grad,
                    all_reduce_sum, at_least_float32, checkpointed_chunks, l2_normalize, rank,
                    run_blocks, world_size)


@dataclass
class Config:
    # data and output
    data: list = None  # captioned shards: files, folders, globs; without --labels, too: toy data
    labels: list = None  # labeled shards; classes.txt beside them numbers the classes of data too
    labels_share: float = 0.5  # ours: of labeled images; at 0.5 a mixture has one of each kind
    val: list = None  # held-out shards: captions -> retrieval, classes -> zero-shot, kNN, linear
    out: str = "runs/m3i"  # checkpoint, log, results, pictures; a second start goes on here
    fresh: bool = False  # start anew in --out
    init: str = None  # weights to start from: a checkpoint, or an encoder under timm's names
    # encoder
    image_size: int = 224  # SiameseIM
    patch: int = 16  # ViT-B/16
    size: str = None  # ti s b l h 1b: sets dim, depth, heads
    dim: int = 768  # ViT-B
    depth: int = 12  # ViT-B
    heads: int = 12  # ViT-B
    # views
    scale: float = 0.2  # ours: least area of a view; SiameseIM 0.08, for 1600 epochs
    color: bool = True  # SiameseIM: jitter, gray, blur, solarize
    flip: bool = True  # SiameseIM
    # mixture
    keep: float = 0.5  # ours: share of patches from image a; 1 = no image b, no image terms
    mask_unit: int = 2  # ours: side of the squares that are mixed, in patches
    group: int = 64  # ours: partners are mirrored inside groups of rows; ranks hold whole groups
    block_attention: bool = False  # MixMAE: patches attend to those of their own image (and to cls)
    pool: str = "own"  # ours: text, class from own patches (a, b weigh 1 each) or all (area shares)
    # image targets
    target: str = "ema"  # SiameseIM: features of the EMA encoder; or pixels (MAE)
    momentum: float = 0.995  # SiameseIM: of the EMA, rising to 1 with a cosine
    second_moment_weight: float = 0.02  # SiameseIM, at width 768; at others try 15 / dim (ours)
    projector_depth: int = 2  # SiameseIM
    decoder_depth: int = 4  # SiameseIM
    # text and class
    context: int = 64  # ours, in tokens
    vocab: str = None  # vocabulary file; none = train one on the first captions
    vocab_size: int = 30_522  # ours: BERT's
    text_dim: int = 768  # paper: BERT-Base
    text_depth: int = 12  # paper: BERT-Base
    text_heads: int = 12  # paper: BERT-Base
    temperature: float = 0.07  # ours: initial; log(1 / it) is learned, 1 / it at most 100
    classes: int = 0  # counted in classes.txt, not to be given
    # objective; with --pool own, text and class weigh twice, for image a and for image b
    w_intra: float = 1.0  # ours: weight of each term
    w_inter: float = 1.0  # ours
    w_text: float = 1.0  # ours
    w_class: float = 1.0  # ours
    # optimization
    batch: int = 4096  # SiameseIM, global
    steps: int = 250_000  # ours
    lr: float = 1.5e-4  # ours: for 256 rows, scaled by batch / 256
    warmup: int = 10_000  # ours, in steps; at most a tenth of them
    wd: float = 0.05  # SiameseIM
    grad_clip: float = 1.0  # SiameseIM; 0 = off
    seed: int = 0  # ours
    # machine
    micro: int = 0  # rows at a time through the encoders, recomputed in backward; 0 = all
    grad_checkpoint: bool = False  # recompute every block of the encoders in backward
    precision: str = "auto"  # auto: bf16 on CUDA, fp32 on the CPU
    compile: bool = None  # none = on CUDA only
    workers: int = None  # loader processes of a rank; none = its cores less one
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 10  # steps between lines of the log
    eval_every: int = 0  # steps between evaluations; 0 = at the end, -1 = never

    method = "M3I"
    # what --init takes from a checkpoint of this script
    model_fields = ("image_size", "patch", "dim", "depth", "heads", "target", "projector_depth",
                    "decoder_depth", "context", "vocab_size", "text_dim", "text_depth",
                    "text_heads")


# Toy data on two CPU cores. Captions name colors and say where things are: no crop, color or flip.
# block_attention: a run this short does not learn by itself which patches belong together.
DEMO = dict(
    image_size=48, patch=8, dim=128, depth=3, heads=4, scale=1.0, color=False, flip=False,
    mask_unit=1, group=8, block_attention=True, second_moment_weight=0.12, momentum=0.99,
    projector_depth=1, decoder_depth=1, text_dim=64, text_depth=2, text_heads=2, context=24,
    vocab_size=512, batch=64, steps=500, lr=8e-3, warmup=40, save_every=100,
)


# ---- views ----

def shift_hue(image, turn):
    """Hue moved by `turn` of the color circle, -0.5 to 0.5."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.uint8(round(255 * turn) % 256)  # wraps around at 256
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


def jitter(image, rng):
    """torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1): four changes in random order."""
    for change in rng.permutation(["brightness", "contrast", "saturation", "hue"]):
        if change == "brightness":
            image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.4))
        elif change == "contrast":
            image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.6, 1.4))
        elif change == "saturation":
            image = ImageEnhance.Color(image).enhance(rng.uniform(0.8, 1.2))
        else:
            image = shift_hue(image, rng.uniform(-0.1, 0.1))
    return image


def distort_colors(view, rng, second):
    """SiameseIM's colors for a first or second view, after the crop."""
    if rng.random() < 0.8:
        view = jitter(view, rng)
    if rng.random() < 0.2:
        view = ImageOps.grayscale(view).convert("RGB")
    blur_share = 0.1 if second else 1.0
    if rng.random() < blur_share:
        sigma = rng.uniform(0.1, 2.0) * view.width / 224  # published for 224 pixels
        view = view.filter(ImageFilter.GaussianBlur(sigma))
    if second and rng.random() < 0.2:
        view = ImageOps.solarize(view)
    return view


def random_view(image, rng, cfg, second=False):
    """A random crop, uint8 (3, S, S), and its geometry, float32 (6,).

    The geometry: top, left, height and width of the crop in pixels, measured in the mirrored image
    if the view is mirrored; 1 if it is, else 0; width of the image.
    """
    x, y, w, h = data.random_box(rng, image.width, image.height, cfg.scale)
    flip = cfg.flip and rng.random() < 0.5
    size = (cfg.image_size, cfg.image_size)
    view = image.resize(size, Image.BICUBIC, box=(x, y, x + w, y + h))
    if cfg.color:
        view = distort_colors(view, rng, second)
    left = image.width - x - w if flip else x
    geometry = np.array([y, left, h, w, flip, image.width], np.float32)
    return data.to_chw(view, flip), geometry


def relative_coordinates(source_geometry, target_geometry, grid):
    """Where the patches of a target view lie in a source view of the same image (SiameseIM).

    Geometries (B, 6) of random_view -> (B, L, 4): row and column of the center of each target
    patch, in patches of the source, from the center of the source's top left patch; 10 times the
    logarithms of the ratios of heights and of widths.
    """
    source_top, source_left, source_height, source_width, source_flip, full_width = (
        source_geometry.double()[..., None].unbind(1))  # (B, 1) each
    target_top, target_left, target_height, target_width, target_flip = (
        target_geometry.double()[:, :5, None].unbind(1))
    # centers of the target's patches in pixels of the image, mirrored if the source is
    center = (torch.arange(grid, device=source_top.device) + 0.5).double() / grid
    y = target_top + center * target_height  # (B, grid)
    x = target_left + center * target_width
    x = torch.where(source_flip == target_flip, x, full_width - x)

    row = grid * (y - source_top) / source_height - 0.5
    column = grid * (x - source_left) / source_width - 0.5
    return torch.stack([
        row.repeat_interleave(grid, 1),
        column.repeat(1, grid),
        10 * (target_height / source_height).log().expand(-1, grid**2),
        10 * (target_width / source_width).log().expand(-1, grid**2),
    ], 2)


def relative_position(source_geometry, target_geometry, grid, dim):
    """The relative coordinates as sines and cosines: (B, 6), (B, 6) -> (B, L, 2 D) (SiameseIM).

    Of a view seen from itself, the first half is the plain two-dimensional position, rows first.
    """
    coordinates = relative_coordinates(source_geometry, target_geometry, grid).float()
    omega = 10000.0 ** -(torch.arange(dim // 4, device=coordinates.device) / (dim / 4))
    angle = coordinates[..., None] * omega  # (B, L, 4, D / 4)
    return torch.stack([angle.sin(), angle.cos()], 3).flatten(2)


# ---- mixture ----

def mask_units(cfg):
    """How many squares of mask_unit x mask_unit patches an image has, and how many show image a."""
    n_units = (cfg.image_size // cfg.patch // cfg.mask_unit) ** 2
    return n_units, int(cfg.keep * n_units + 1e-9)  # 0.29 * 100 is a little less than 29


def random_mask(noise, mask_unit, units_of_a):
    """Which patches of a mixture come from image a: (B, L) bool.

    noise (B, U): one number for each square; the units_of_a squares of the lowest noise show a.
    """
    side = math.isqrt(noise.shape[1])
    ranking = noise.argsort(1).argsort(1)  # 0 = lowest
    mask = (ranking < units_of_a).view(-1, side, side)
    return mask.repeat_interleave(mask_unit, 1).repeat_interleave(mask_unit, 2).flatten(1)


def to_pixels(mask, patch):
    """(B, L) by patch -> (B, 1, S, S) by pixel."""
    grid = math.isqrt(mask.shape[1])
    mask = mask.view(-1, 1, grid, grid)
    return mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def mix(images, mask, cfg):
    """(B, 3, S, S), (B, L) -> each row's image where its mask is True, elsewhere its partner's."""
    return torch.where(to_pixels(mask, cfg.patch), images, common.partner(images, cfg.group))


def same_image(mask):
    """(B, L) -> which tokens attend to which, (B, 1, 1+L, 1+L) bool: patches to those of their own
    image, as in MixMAE. The class token, which MixMAE has not, sees both and is seen by both."""
    same = mask[:, None, :, None] == mask[:, None, None, :]
    return F.pad(same, (1, 0, 1, 0), value=True)


# ---- model ----

class BatchNorm(nn.Module):
    """Batch normalization over the rows and tokens of all ranks, in float32 (SiameseIM).

    There are no running statistics: nothing that has this layer is used outside training.
    """

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):  # (B, L, D)
        x = at_least_float32(x)
        # means over ranks, which have equally many rows
        mean = all_gather_with_grad(x.mean((0, 1))[None]).mean(0)
        x = x - mean  # before the square: in float32 the mean of x^2 less mean^2 cancels
        variance = all_gather_with_grad(x.square().mean((0, 1))[None]).mean(0)
        return x * (variance + 1e-5).rsqrt() * self.weight + self.bias


def blocks_with_batch_norm(dim, heads, depth):
    blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
    blocks.apply(common.init_weights)
    for block in blocks:
        block.norm1 = BatchNorm(dim)
        block.norm2 = BatchNorm(dim)
    return blocks


class Projector(nn.Module):
    """Encoder tokens (B, K, D) -> tokens for the decoder, or features that are image targets."""

    def __init__(self, dim, heads, depth):
        super().__init__()
        self.embed = nn.Linear(dim, dim)
        common.init_weights(self.embed)
        self.blocks = blocks_with_batch_norm(dim, heads, depth)

    def forward(self, tokens):
        return run_blocks(self.blocks, self.embed(tokens))


class Decoder(nn.Module):
    """Predicts a target view from visible tokens and one mask token for each target patch."""

    def __init__(self, grid, dim, heads, depth, target_dim):
        super().__init__()
        self.grid = grid
        self.pos_proj = nn.Linear(2 * dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = blocks_with_batch_norm(dim, heads, depth)
        self.out = nn.Linear(dim, target_dim)
        common.init_weights(self.pos_proj)
        common.init_weights(self.out)
        nn.init.normal_(self.mask_token, std=0.02)
        column, row = common.sincos_positions(grid, dim).chunk(2, 1)
        source_pos = torch.cat([row, column], 1)  # (L, D), rows first as in relative_position
        self.register_buffer("source_pos", source_pos, persistent=False)

    def forward(self, tokens, ids, source_geometry, target_geometry):
        """tokens (B, K, D) of the patches ids (B, K) of the source view -> (B, L, P)."""
        K, dim = tokens.shape[1:]
        source_pos = F.embedding(ids, self.source_pos)  # (B, K, D)
        target_pos = relative_position(source_geometry, target_geometry, self.grid, dim)
        mask_tokens = self.mask_token + self.pos_proj(target_pos.to(self.mask_token.dtype))
        x = torch.cat([tokens + source_pos, mask_tokens], 1)  # (B, K + L, D)
        return self.out(run_blocks(self.blocks, x)[:, K:])


class TextEncoder(nn.Module):
    """Captions -> unit vectors: a transformer and the mean of the text's tokens (Figure 1)."""

    def __init__(self, cfg):
        super().__init__()
        self.transformer = TextTransformer(
            cfg.vocab_size, cfg.context, cfg.text_dim, cfg.text_depth, cfg.text_heads, causal=False,
            grad_checkpoint=cfg.grad_checkpoint)

    def forward(self, tokens, valid):  # (B, T), (B, T) -> (B, E)
        return l2_normalize(masked_mean(self.transformer(tokens, valid), valid))


def masked_mean(x, mask):
    """(B, L, D), (B, L) bool -> (B, D): mean of the tokens where mask is True, in float32."""
    x = at_least_float32(x)
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def mlp(dim, out_dim):
    layers = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, out_dim))
    return layers.apply(common.init_weights)


class M3I(nn.Module):
    """The encoder, and for each term whose weight is not 0 the parts that it needs."""

    def __init__(self, cfg):
        super().__init__()
        self.vision = ViT(cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads,
                          mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),  # ImageNet's
                          grad_checkpoint=cfg.grad_checkpoint)
        grid = self.vision.grid
        self.n_units, self.units_of_a = mask_units(cfg)
        self.n_a = cfg.mask_unit**2 * self.units_of_a  # patches of image a in each mixture
        self.n_b = grid**2 - self.n_a  # of image b

        self.has_text = cfg.w_text > 0
        if self.has_text:
            self.encode_text = TextEncoder(cfg)
            self.text_head = mlp(cfg.dim, cfg.text_dim)
            self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.temperature)))
        if cfg.w_class > 0:
            # Figure 1: an MLP, then its products with the embeddings of the categories
            class_embeddings = nn.Linear(cfg.dim, cfg.classes)
            common.init_weights(class_embeddings)
            self.class_head = nn.Sequential(mlp(cfg.dim, cfg.dim), class_embeddings)

        self.has_ema = has_image_terms(cfg) and cfg.target == "ema"
        if has_image_terms(cfg):
            target_dim = cfg.dim if self.has_ema else 3 * cfg.patch**2
            self.projector = Projector(cfg.dim, cfg.heads, cfg.projector_depth)
            self.decoder = Decoder(grid, cfg.dim, cfg.heads, cfg.decoder_depth, target_dim)
        if self.has_ema:
            self.ema_encoder = copy.deepcopy(self.vision).requires_grad_(False)
            self.ema_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def update_ema(self, momentum):
        """EMA weights = momentum * EMA weights + (1 - momentum) * weights, where there are any."""
        if not self.has_ema:
            return
        weights = [*self.vision.parameters(), *self.projector.parameters()]
        ema_weights = [*self.ema_encoder.parameters(), *self.ema_projector.parameters()]
        for w, ema in zip(weights, ema_weights):
            ema.lerp_(w, 1 - momentum)

    @torch.no_grad()
    def clamp_scale(self):
        """The logit scale is at most 100 (CLIP)."""
        if self.has_text:
            self.log_scale.clamp_(max=math.log(100))

    @torch.no_grad()
    def targets(self, images, encode_ema, micro):
        """(B, 3, S, S) -> image targets (B, L, P): mean 0, deviation 1 (flat pixel patches: 0)."""
        if not self.has_ema:
            return common.normalize_patches(self.vision.patchify(images))[0]
        features = self.ema_projector(checkpointed_chunks(encode_ema, micro, images))
        return F.layer_norm(at_least_float32(features), [features.shape[2]])

    def predict(self, tokens, visible, n_visible, source_geometry, target_geometry):
        """What an image's own patches in a mixture predict of a target view, (B, L, P).

        tokens (B, L, D) of the mixture. visible (B, L) bool: the image's patches, n_visible in each
        row. source_geometry, target_geometry (B, 6): of random_view.
        """
        # places of the visible patches, in order
        ids = visible.logical_not().argsort(dim=1, stable=True)[:, :n_visible]  # (B, K)
        own_tokens = tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))
        return self.decoder(self.projector(own_tokens), ids, source_geometry, target_geometry)

    def encode_image(self, images):
        """(B, 3, S, S) -> unit vectors: the mean patch (B, D); with text, its text_head (B, E)."""
        pooled = self.vision.patch_tokens(images).mean(1)
        if self.has_text:
            pooled = self.text_head(pooled)
        return l2_normalize(pooled)

    def held_out_view(self, image):
        """The largest central square (ours; SiameseIM: 224 of 256 pixels)."""
        return data.center_crop(image, self.vision.image_size)

    def load_state_dict(self, state, **options):
        """As usual; but parts that this run's terms do not need, say a decoder, are left out."""
        own = self.state_dict()
        return super().load_state_dict({name: x for name, x in state.items() if name in own},
                                       **options)


# ---- objective: the mean of the ranks' values is the loss ----

def feature_loss(pred, target, loss_mask, second_moment_weight):
    """mean |p - t|^2 / P + second_moment_weight * mean p^T C p / P, C = mean t t^T (SiameseIM).

    p and t are the prediction and the target of a patch; means are over the scored patches of all
    ranks. The second moment C of the targets keeps predictions, and with them later targets, from
    crowding into few directions. A prediction of 0 costs 1 (less if there are flat pixel patches).
    pred, target (B, L, P). loss_mask (B, L): scored patches, equally many on every rank.
    """
    with torch.autocast(pred.device.type, enabled=False):  # no product in bfloat16
        pred = pred.to(target.dtype)
        weight = loss_mask[..., None].to(target.dtype)  # (B, L, 1)
        n = weight.sum()
        scored = (target * weight).flatten(0, 1)  # (B * L, P), 0 where not scored
        C = all_reduce_sum(scored.T @ scored) / (world_size() * n)  # (P, P)
        squared_error = ((pred - target).square() * weight).sum() / n
        second_moment = ((pred @ C) * pred * weight).sum() / n
        return (squared_error + second_moment_weight * second_moment) / target.shape[2]


def text_loss(image, text, has_text, text_row, logit_scale):
    """Softmax cross-entropy of each image against the texts of all ranks (paper, Figure 1).

    image, text (B, E): unit length. has_text (B,): False where a row of `text` is no caption.
    text_row (B,): the row of each image's caption. logit_scale: 0-dim factor of the cosines.
    """
    with torch.autocast(image.device.type, enabled=False):  # no product in bfloat16
        logits = logit_scale * image @ all_gather_with_grad(text).T  # (B, G)
    logits = logits.masked_fill(~all_gather(has_text), torch.finfo(logits.dtype).min)
    labels = rank() * len(text) + text_row
    return labeled_cross_entropy(logits, labels.where(has_text[text_row], -1))


def labeled_cross_entropy(logits, labels):
    """Softmax cross-entropy, the mean over the rows of all ranks that have a label; 0 if none has.

    logits (B, N). labels (B,): -1 = none.
    """
    total = F.cross_entropy(at_least_float32(logits), labels, ignore_index=-1, reduction="sum")
    n = all_reduce_sum((labels >= 0).sum())
    return world_size() * total / n.clamp(min=1)


@torch.no_grad()
def target_std(target):
    """Deviation of image targets (B, L, P) from their mean over all ranks: 1 = free, 0 = collapsed.

    Features have a mean square of 1, so that the variance is 1 less the mean target's square. With
    pixel targets it is an upper bound: flat patches are 0.
    """
    mean = all_reduce_sum(target.mean((0, 1))) / world_size()
    return (1 - mean.square().mean()).clamp(min=0).sqrt()


def images_in_mixture(tokens, mask, cfg):
    """[(mean token (B, D) that predicts the text and class of an image, its row (B,), weight)]

    From their own patches, both images count in full, so that a term weighs 2; else it weighs 1.
    With --keep 1 there is only image a.
    """
    row_a = torch.arange(len(mask), device=mask.device)
    if cfg.keep == 1:
        return [(masked_mean(tokens, mask), row_a, 1.0)]
    row_b = common.partner(row_a, cfg.group)
    if cfg.pool == "own":
        return [(masked_mean(tokens, mask), row_a, 1.0), (masked_mean(tokens, ~mask), row_b, 1.0)]
    pooled = at_least_float32(tokens).mean(1)  # of all patches, as CutMix
    share_a = mask.float().mean()
    return [(pooled, row_a, share_a), (pooled, row_b, 1 - share_a)]


def encode_mixture(images, mask, cfg, encode):
    """Mix images (B, 3, S, S) as mask (B, L) says -> tokens of the mixtures (B, L, D)."""
    mixed = mix(images, mask, cfg)
    if cfg.block_attention:
        return checkpointed_chunks(encode, cfg.micro, mixed, same_image(mask))
    return checkpointed_chunks(encode, cfg.micro, mixed)


def losses(model, batch, mask, cfg, encode, encode_ema):
    """M3I's terms from one encoder pass over mixed images, and metrics: {name: 0-dim tensor} each.

    batch: rows of example(). mask (B, L): True where a mixture shows image a, that of its own row,
    in model.n_a patches; False where it shows image b, that of the partner's row.
    encode, encode_ema: images (B, 3, S, S) -> patch tokens (B, L, D), of the encoder and its EMA;
    encode also takes an attention mask.
    """
    partner = functools.partial(common.partner, group=cfg.group)
    input_geometry, other_geometry = batch["geometry"].unbind(1)  # (B, 6) each
    terms = {}
    metrics = {}

    tokens = encode_mixture(batch["first"], mask, cfg, encode)  # (B, L, D)

    # intra-view: image a's visible patches predict its hidden patches, in the same view
    if cfg.w_intra > 0:
        pred = model.predict(tokens, mask, model.n_a, input_geometry, input_geometry)
        target = model.targets(batch["first"], encode_ema, cfg.micro)
        terms["intra"] = feature_loss(pred, target, ~mask, cfg.second_moment_weight)

    # inter-view: image b's visible patches predict every patch of its other view
    if cfg.w_inter > 0:
        pred = model.predict(tokens, ~mask, model.n_b,
                             partner(input_geometry), partner(other_geometry))
        target = partner(model.targets(batch["second"], encode_ema, cfg.micro))
        terms["inter"] = feature_loss(pred, target, torch.ones_like(mask), cfg.second_moment_weight)

    if has_image_terms(cfg):
        metrics["target_std"] = target_std(target)  # of the last term's

    pooled_images = images_in_mixture(tokens, mask, cfg)

    # text: the patches of image a predict its caption among those of all ranks, and so for b
    if cfg.w_text > 0:
        text = checkpointed_chunks(model.encode_text, cfg.micro, batch["tokens"], batch["valid"])
        logit_scale = model.log_scale.exp()
        metrics["temperature"] = 1 / logit_scale
        terms["text"] = 0
        for pooled, row, weight in pooled_images:
            image = l2_normalize(model.text_head(pooled))  # (B, E)
            terms["text"] += weight * text_loss(image, text, batch["has_text"], row, logit_scale)

    # class: the patches of image a predict its class, and so for b
    if cfg.w_class > 0:
        terms["class"] = 0
        for pooled, row, weight in pooled_images:
            terms["class"] += weight * labeled_cross_entropy(
                model.class_head(pooled), batch["label"][row])

    return terms, metrics


# ---- training ----

def example(sample, rng, cfg, tokenizer):
    """A training row: two views, caption and class number (-1 = none).

    Without image terms, an image that has neither caption nor class is skipped; one that has
    either stays, even if the weight of that term is 0. What it has must be sound: a damaged caption
    or class skips it.
    """
    has_text = sample.has_caption()
    text = sample.caption(rng) if has_text else ""
    label = sample.label() if sample.has_label() else -1
    if label >= cfg.classes:  # captioned shards may have classes that classes.txt does not name
        label = -1
    if label < 0 and not has_text and not has_image_terms(cfg):
        raise data.Skip("no caption" if cfg.w_text > 0 else "no class")
    image = sample.image(min_size=round(cfg.image_size / cfg.scale**0.5))
    first, first_geometry = random_view(image, rng, cfg)
    second, second_geometry = random_view(image, rng, cfg, second=True)
    tokens, valid = tokenizer.pad(text, cfg.context)
    return {
        "first": first,
        "second": second,
        "geometry": np.stack([first_geometry, second_geometry]),  # (2, 6)
        "tokens": tokens,
        "valid": valid,
        "has_text": np.bool_(has_text),
        "label": np.int64(label),
    }


def class_names(cfg):
    """The lines of classes.txt or classnames.txt near the labeled shards; [] without shards."""
    if not cfg.labels:
        return []
    names = data.read_class_names(data.expand(cfg.labels))
    if names is None:
        raise UserError(f"--labels {cfg.labels[0]}: no classes.txt beside the shards or one folder "
                        "up: write one, the name of class 0 in its first line")
    return names


def check(cfg):
    """UserError for values that do not exist or do not fit together."""
    if cfg.pool not in ("own", "all"):
        raise UserError(f"--pool {cfg.pool}: choose own or all")
    if cfg.target not in ("ema", "pixels"):
        raise UserError(f"--target {cfg.target}: choose ema or pixels")
    grid = cfg.image_size // cfg.patch
    if grid < 1:
        raise UserError(f"--patch {cfg.patch} is larger than --image-size {cfg.image_size}: "
                        f"try --patch {cfg.image_size}")
    if cfg.mask_unit < 1 or grid % cfg.mask_unit:
        raise UserError(f"--mask-unit {cfg.mask_unit} does not divide the grid of {grid} patches: "
                        f"try {math.gcd(grid, cfg.mask_unit)}")
    n_units, units_of_a = mask_units(cfg)
    if not 1 <= units_of_a <= n_units:
        raise UserError(f"--keep {cfg.keep} of {n_units} mask units is {units_of_a}: give a share "
                        f"of 1 to {n_units} of them")


TERMS_NEED = "image terms need --keep below 1, text needs --data, class needs --labels"


def drop_terms(cfg):
    """cfg with weight 0 for the terms that --keep and data rule out, and a line that says so."""
    possible = {"w_intra": cfg.keep < 1, "w_inter": cfg.keep < 1,
                "w_text": cfg.data, "w_class": cfg.labels}
    dropped = [name for name in possible if getattr(cfg, name) > 0 and not possible[name]]
    if dropped:
        common.print0(f"{' '.join(map(common.flag, dropped))} taken as 0: {TERMS_NEED}")
    return replace(cfg, **dict.fromkeys(dropped, 0.0))


def term_weights(cfg):
    return {"intra": cfg.w_intra, "inter": cfg.w_inter, "text": cfg.w_text, "class": cfg.w_class}


def has_image_terms(cfg):
    return cfg.w_intra > 0 or cfg.w_inter > 0


def ema_momentum(step, steps, start):
    """From `start` to 1 with half a cosine (SiameseIM)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * step / steps)) / 2


@common.owns_output_folder
def main(cfg):
    """Train, evaluate, draw. Returns the metrics of the last evaluation."""
    device = common.init_distributed()
    common.check_batch(cfg.batch, cfg.group)
    check(cfg)
    cfg = data.use_toy_data(cfg, data="pairs", labels="labels")
    if cfg.eval_every >= 0:
        import eval as evaluation  # only where something is evaluated or drawn
        evaluation.check_held_out(cfg)  # now, not after the last step
    names = class_names(cfg)
    cfg = drop_terms(replace(cfg, classes=len(names)))
    weights = term_weights(cfg)
    if not any(weights.values()):
        raise UserError(f"nothing to learn: {TERMS_NEED}, each a weight (--w-intra ...) above 0")
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    model = M3I(cfg).to(device)
    optimizer = common.adamw(model, cfg.wd, betas=(0.9, 0.95))  # SiameseIM
    start_step, vocab = common.resume_from(cfg, model, optimizer)

    indices = [data.open_index(cfg.data), data.open_index(cfg.labels)]
    captioned = indices[0] if cfg.w_text > 0 else None  # without the text term none need be
    tokenizer = data.make_tokenizer(cfg, captioned, vocab, names)
    sources, labels_share = data.two_sources(
        cfg, indices, cfg.labels_share, functools.partial(example, cfg=cfg, tokenizer=tokenizer))
    dataset = data.BatchDataset(sources, cfg.batch, rank(), world_size(), labels_share)
    batches = data.loader(dataset, start_step, cfg.steps, cfg.workers, device)
    encode = common.compiled(model.vision.patch_tokens, cfg.compile, device)
    encode_ema = None
    if model.has_ema:
        encode_ema = common.compiled(model.ema_encoder.patch_tokens, cfg.compile, device)
    max_lr = cfg.lr * cfg.batch / 256
    common.print_summary(cfg, device, model, sources, start_step, max_lr)
    log = common.Log(cfg, start_step, data.REASONS, data.UNREADABLE)

    for step in range(start_step, cfg.steps):
        batch = next(batches)
        lr = common.cosine_lr(step, cfg.steps, cfg.warmup, max_lr)
        # these two complete the previous step: the lines below are shared by all scripts;
        # a checkpoint lacks its last EMA update, which a resumed run makes here
        model.update_ema(ema_momentum(step, cfg.steps, cfg.momentum))
        model.clamp_scale()
        noise = common.batch_noise(cfg.seed, step, cfg.batch, model.n_units, device=device)
        mask = random_mask(noise, cfg.mask_unit, model.units_of_a)
        with common.autocast(cfg.precision, device):
            terms, metrics = losses(model, batch, mask, cfg, encode, encode_ema)
        loss = sum(weights[name] * term for name, term in terms.items())
        terms = {**terms, **metrics}

        # -- the same lines in every script, held together by tests/test_text.py --
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        common.average_gradients(model.parameters())
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        optimizer.step()
        log(step, batch, lr, loss, grad_norm, terms)
        if log.stop or common.is_save_step(step, cfg):
            common.save(cfg, model, optimizer, step + 1, tokenizer.dumps())
        if log.stop:
            break
        if common.is_eval_step(step, cfg):
            evaluate(model, tokenizer, cfg, device)
        # -- end --

    log.close()
    batches.close()
    if log.stop or cfg.eval_every < 0:
        return {}
    result = evaluate(model, tokenizer, cfg, device)
    draw(model, tokenizer, cfg, device)
    return result


def evaluate(model, tokenizer, cfg, device):
    """Metrics on cfg.val as {name: fraction}; prints them and writes out/result.json."""
    import eval as evaluation
    result = evaluation.evaluate(model, tokenizer, cfg, device)
    if cfg.val and cfg.w_class > 0:
        accuracy = class_head_accuracy(model, cfg, device)
        if accuracy is not None:
            common.print0(f"class head on held-out images: {accuracy:.1%}")
            result["class_head"] = accuracy
            evaluation.write_result(result, cfg)
    return result


def class_head_accuracy(model, cfg, device):
    """Accuracy of the class head on the first of cfg.val that has the classes of --labels, or None.

    Classes of unseen.txt are left out: they do not occur in training.
    """
    import eval as evaluation

    def class_logits(images):
        return model.class_head(model.vision.patch_tokens(images).mean(1))

    names = class_names(cfg)
    for pattern in cfg.val:
        paths = data.expand(pattern, "test")
        if data.read_class_names(paths) != names:
            continue
        index = data.open_index(paths)
        logits, labels, _ = evaluation.embed_labelled(model, index, cfg, device, class_logits)
        unseen = evaluation.unseen_classes(paths, names)
        in_training = torch.isin(labels, torch.where(~unseen)[0])
        if not in_training.any():
            return None
        return evaluation.accuracy(logits[in_training], labels[in_training])
    return None


# ---- pictures: a reader may stop here ----

def draw(model, tokenizer, cfg, device):
    """out/curves.png; out/neighbours.png: images and their nearest; out/views.png: mixtures, if
    images are mixed."""
    import eval as evaluation

    def pooled_tokens(images):
        return l2_normalize(model.vision.patch_tokens(images).mean(1))

    index, title = evaluation.held_out_pairs(cfg)
    features, ids = evaluation.embed_images(model, index, cfg, device, pooled_tokens)
    if rank() > 0:
        return
    fields = ["loss", *[name for name, weight in term_weights(cfg).items() if weight > 0]]
    if has_image_terms(cfg):
        fields.append("target_std")
    evaluation.curves(f"{cfg.out}/log.jsonl", f"{cfg.out}/curves.png", [*fields, "grad_norm"],
                      f"M3I, {cfg.steps} steps of {cfg.batch}")

    def picture(i):
        return index[ids[i]].image()

    picked = torch.linspace(0, len(ids) - 1, 8).long().tolist()
    n_near = min(5, len(ids) - 1)
    cells = neighbour_cells(features, picture, picked, n_near)
    evaluation.sheet(cells, f"{cfg.out}/neighbours.png", 1 + n_near,
                     f"{title.capitalize()}: an image (left) and its nearest")

    if cfg.keep == 1:
        return
    rng = common.rng(common.Stream.FIGURE, cfg.seed)
    cells = []
    for a, b in zip(picked[::2], picked[1::2]):
        cells += mixture_cells(picture(a), picture(b), rng, model, cfg)
    evaluation.sheet(cells, f"{cfg.out}/views.png", 4,
                     f"{title.capitalize()}: two images, mixed, and another view of b", size=144)


def neighbour_cells(features, picture, picked, n_near):
    """Cells of a sheet: picture(i) of the picked rows of features (I, D), each with its nearest."""
    cells = []
    for i in picked:
        similarity = features @ features[i]  # (I,)
        similarity[i] = -math.inf
        cells.append((picture(i), "", None))
        for j in similarity.topk(n_near).indices.tolist():
            cells.append((picture(j), f"{similarity[j]:.2f}", None))
    return cells


def mixture_cells(image_a, image_b, rng, model, cfg):
    """A row of views.png: views of two images, their mixture, and the view that the inter-view term
    predicts from b."""
    view_a, _ = random_view(image_a, rng, cfg)
    view_b, _ = random_view(image_b, rng, cfg)
    target_view, _ = random_view(image_b, rng, cfg, second=True)
    view_a, view_b, target_view = [torch.tensor(view) for view in (view_a, view_b, target_view)]
    noise = torch.from_numpy(rng.random((1, model.n_units)))
    mask = random_mask(noise, cfg.mask_unit, model.units_of_a)
    mask = to_pixels(mask, cfg.patch)[0, 0]  # (S, S)
    return [
        (view_a, "image a", None),
        (view_b, "image b", None),
        (torch.where(mask, view_a, view_b), "mixture", None),
        (target_view, "b's other view", None),
    ]


if __name__ == "__main__":
    common.run(main, Config, DEMO, __doc__)
