"""TiMix (arXiv 2312.08846): contrast of texts with images that are mixed by what texts describe.

    python timix.py                                    # toy data: trains, evaluates, draws
    python timix.py --mix none --out runs/timix-none   # the same model without mixing
    python timix.py --data coco/ --val coco/           # your shards: KEY.jpg, KEY.txt, KEY.json
    torchrun --standalone --nproc_per_node 8 timix.py --data 'cc3m/*.tar'

A patch predictor in the middle of the image tower scores each patch: does it belong to what this
text describes? It learns that from boxes with texts (patch-text alignment, PTA). Images i and j are
partners. The s x s patches of j with the highest total score for caption j cover those of i with
the lowest for caption i (text_aware_mix). The mixed image should match caption i with weight
lambda = 1 - s^2 / N and caption j with the rest (mixed_targets). With l_i the InfoNCE of the mixed
image with caption i as its positive, and z_i its logit for that caption, the loss (mix_loss) is

    L_mix = lambda l_i + (1 - lambda) l_j = l_i + (1 - lambda) (z_i - z_j),

InfoNCE plus a linear penalty on the margin z_i - z_j. The penalty alone has no minimum; L_mix is
least at z_i - z_j = log(lambda / (1 - lambda)). That is for one-hot targets: mixed_targets puts
the model's probabilities on the clean batch in their place, as the released code does.

Reading order: losses (the method, term by term), text_aware_mix and mixed_targets, PatchPredictor,
ALBEF and TiMix (the model), main.

Departures. The paper's text was not available to us; the method is that of its released code.
- ALBEF (arXiv 2107.07651) from scratch, not mPLUG with CLIP's and BERT's weights: no decoder, no
  dropout (0.1 in BERT and in the released ViT), one learning rate (the released ViT has a tenth),
  pre-norm blocks, no transform before the word head
- one step for the sum of all terms, not three; one encoding of an image for the texts of its boxes
- images with boxes are half as many as pairs, each with up to --texts-per-region texts (released:
  in all half as many texts as pairs)
- within groups of --group rows (released: a GPU's batch) partners are the rows in reverse and
  matching's negatives are drawn; the contrast is over all ranks, gradients and means are exact
- targets of texts mix the columns of the text-to-image probabilities; the released code takes the
  image-to-text table for both directions
- texts of boxes, as captions, end with the end token (released: no end token)
- without boxes, or with --w-pta 0, windows are chosen by the cosine of patches and text (ours)
- byte-level BPE; captions are not lower-cased, stripped or cut to 30 words; random words of the
  masking are never special tokens
- warm-up from lr / warmup (released: from 1e-6), cosine to 0 at every step (to 1e-6, by epochs)
As in the released code there is no queue: keys and negatives are the batch's, of the online model.

Dimension key: B pairs of this rank, G pairs of all ranks, N = n x n patches, L text tokens, D image
width, W text width, E joint embedding, V vocabulary, R images with boxes, T texts of each of them.
"""
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

import common
import data
from common import (CrossBlock, TextTransformer, UserError, ViT, all_gather_with_grad,
                    all_reduce_sum, at_least_float32, l2_normalize, partner, print0, rank,
                    run_blocks, world_size)
from data import Tokenizer


@dataclass
class Config:
    # data and output
    data: list = None  # training shards: files, folders, globs, {0..9} ranges; none = toy data
    val: list = None  # held-out shards: captions -> retrieval, classes -> zero-shot, kNN, linear
    out: str = "runs/timix"  # checkpoint, log, results, pictures; a second start goes on here
    fresh: bool = False  # start anew in --out
    init: str = None  # weights to start from: a checkpoint, or an encoder under timm's names
    # image tower
    image_size: int = 256  # TiMix code
    scale: float = 0.2  # TiMix code: smallest area of the random resized crop, as a share
    patch: int = 16  # TiMix code
    size: str = None  # ti s b l h 1b: sets dim, depth, heads
    dim: int = 768  # TiMix code: ViT-B
    depth: int = 12  # ViT-B; the patch predictor follows half of the blocks (TiMix code)
    heads: int = 12  # ViT-B
    flip: bool = True  # TiMix code
    augment: bool = True  # TiMix code: RandAugment(2, 7)
    # text tower and fusion
    context: int = 20  # TiMix code, in tokens
    vocab: str = None  # vocabulary file; none = train one on the first captions
    vocab_size: int = 30_522  # ALBEF: BERT's
    text_dim: int = 768  # ALBEF
    text_depth: int = 6  # ALBEF
    fusion_depth: int = 6  # ALBEF
    text_heads: int = 12  # ALBEF
    embed: int = 256  # ALBEF: width of the joint embedding
    # patch-text alignment
    boxes: bool = None  # train the patch predictor; none = if the first sample has boxes
    texts_per_region: int = 5  # TiMix code: texts of an image with boxes, at most
    caption_as_region: bool = True  # TiMix code: the caption is one of them and marks every patch
    region_context: int = 40  # TiMix code, in tokens
    # mixing
    mix: str = "text"  # windows by text scores; or none, cutmix, random (scores)
    min_side: float = 0.35  # TiMix code: smallest side of the window, in sides of the image
    max_side: float = 0.75  # TiMix code
    mix_until: float = 2 / 3  # TiMix code: 20 of 30 epochs; share of the steps
    group: int = 128  # TiMix code; rows among which partners and matching's negatives are found
    # objective
    w_itc: float = 1.0  # TiMix code: image-text contrast, over all ranks
    w_itm: float = 1.0  # TiMix code: image-text matching; 0 leaves it out
    w_mlm: float = 1.0  # TiMix code: masked words; 0 leaves them out
    w_pta: float = 1.0  # TiMix code: patch-text alignment; 0 leaves it out
    w_mix: float = 1.0  # TiMix code: contrast of mixed images; 0 leaves it out
    mask_ratio: float = 0.15  # ALBEF, of the words
    alpha: float = 0.4  # ALBEF: weight of the teacher's probabilities in the targets
    momentum: float = 0.995  # ALBEF, of the teacher
    ramp: float = 1 / 30  # TiMix code: share of the steps in which alpha and w_mix rise from 0
    temperature: float = 0.07  # ALBEF: initial value, learned directly, not its log
    # optimization
    batch: int = 1024  # ours, global
    steps: int = 120_000  # ours: about 30 epochs of 4 M images
    lr: float = 1e-4  # ALBEF
    warmup: int = 2000  # TiMix code, in steps; at most a tenth of them
    wd: float = 0.02  # TiMix code
    grad_clip: float = 1.0  # TiMix code; 0 = off
    seed: int = 0  # ours
    # machine
    grad_checkpoint: bool = False  # recompute every block in backward
    precision: str = "auto"  # auto: bf16 on CUDA, fp32 on the CPU
    compile: bool = None  # none = on CUDA only
    workers: int = None  # loader processes of a rank; none = its cores less one
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 10  # steps between lines of the log
    eval_every: int = 0  # steps between evaluations; 0 = at the end, -1 = never

    method = "TiMix"
    # what --init takes from a checkpoint of this script
    model_fields = ("image_size", "patch", "dim", "depth", "heads", "context", "region_context",
                    "vocab_size", "text_dim", "text_depth", "fusion_depth", "text_heads", "embed")


# Toy data on two CPU cores. Pairs: no crops, flips or changes of color, since captions name all of
# them; images with boxes are always cropped. Toy captions read like the texts of boxes; marking
# every patch for them would contradict the boxes.
DEMO = dict(
    image_size=48, patch=8, dim=128, depth=3, heads=4, scale=1.0, flip=False, augment=False,
    text_dim=64, text_depth=1, fusion_depth=1, text_heads=2, embed=64, context=24, vocab_size=512,
    texts_per_region=2, caption_as_region=False, region_context=24, group=8, batch=64, steps=720,
    lr=1e-3, warmup=40, momentum=0.99, ramp=0.1, save_every=100,
)


# ---- model ----

class PatchPredictor(nn.Module):
    """Does a patch belong to what a text describes? (TiMix code: text-aware patch predictor)"""

    def __init__(self, dim, text_dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.embed = nn.Linear(dim, dim)
        self.head = nn.Sequential(
            nn.Linear(dim + text_dim, dim // 2), nn.GELU(),
            nn.Linear(dim // 2, dim // 4), nn.GELU(),
            nn.Linear(dim // 4, 2))
        self.apply(common.init_weights)

    def forward(self, patch_tokens, text):
        """patch_tokens (B, N, D) from the middle of the image tower, text (B, W) ->
        log-probabilities (B, N, 2); [..., 1] is that the patch belongs to the text."""
        local, shared = F.gelu(self.embed(self.norm(patch_tokens))).chunk(2, dim=2)
        of_all = torch.cat([shared.mean(1), text.to(shared.dtype)], 1)  # (B, D/2 + W)
        of_each = of_all[:, None].expand(-1, patch_tokens.shape[1], -1)  # (B, N, D/2 + W)
        logits = self.head(torch.cat([local, of_each], 2))
        return at_least_float32(logits).log_softmax(2)


class Encoded(NamedTuple):
    """What the two towers make of pairs."""
    middle_tokens: torch.Tensor  # (B, 1+N, D), after half of the image blocks
    image_tokens: torch.Tensor  # (B, 1+N, D)
    hidden_states: torch.Tensor  # (B, L, W), of the text
    image: torch.Tensor  # (B, E), unit length
    text: torch.Tensor  # (B, E), unit length


class ALBEF(nn.Module):
    """Two towers, and a fusion in which the text attends to the image (arXiv 2107.07651)."""

    def __init__(self, cfg):
        super().__init__()
        self.grad_checkpoint = cfg.grad_checkpoint
        self.middle = (cfg.depth + 1) // 2  # blocks below the patch predictor
        self.vision = ViT(
            cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads,
            mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
            grad_checkpoint=cfg.grad_checkpoint)  # mean and std: CLIP's, as TiMix code
        self.text = TextTransformer(
            cfg.vocab_size, max(cfg.context, cfg.region_context), cfg.text_dim, cfg.text_depth,
            cfg.text_heads, causal=False, grad_checkpoint=cfg.grad_checkpoint)
        self.image_proj = nn.Linear(cfg.dim, cfg.embed)
        self.text_proj = nn.Linear(cfg.text_dim, cfg.embed)
        self.fusion = nn.ModuleList(
            CrossBlock(cfg.text_dim, cfg.dim, cfg.text_heads) for _ in range(cfg.fusion_depth))
        self.fusion_norm = nn.LayerNorm(cfg.text_dim, eps=1e-6)
        self.itm_head = nn.Linear(cfg.text_dim, 2)
        self.mlm_head = nn.Linear(cfg.text_dim, cfg.vocab_size)
        for part in (self.image_proj, self.text_proj, self.fusion, self.itm_head, self.mlm_head):
            part.apply(common.init_weights)

    def image_embeds(self, tokens):
        """(..., D) -> (..., E), unit length"""
        return l2_normalize(self.image_proj(tokens))

    def text_embeds(self, hidden_states):
        """(B, L, W) -> (B, E), unit length: the begin token, as [CLS]"""
        return l2_normalize(self.text_proj(hidden_states[:, 0]))

    def encode_image(self, images):
        """(B, 3, S, S) -> (B, E), unit length: the class token"""
        return self.image_embeds(self.vision(images)[:, 0])

    def encode_text(self, tokens, valid):
        """(B, L) -> (B, E), unit length"""
        return self.text_embeds(self.text(tokens, valid))

    def encode(self, images, tokens, valid):
        """(B, 3, S, S), (B, L), (B, L) -> Encoded"""
        middle_tokens = self.vision.blocks_until(images, self.middle)
        image_tokens = self.vision.blocks_from(middle_tokens, self.middle)
        hidden_states = self.text(tokens, valid)
        return Encoded(middle_tokens, image_tokens, hidden_states,
                       self.image_embeds(image_tokens[:, 0]), self.text_embeds(hidden_states))

    def fuse(self, hidden_states, valid, image_tokens):
        """A text read beside an image: (B, L, W), (B, L), (B, 1+N, D) -> (B, L, W)"""
        mask = valid[:, None, None, :]
        x = run_blocks(self.fusion, hidden_states, image_tokens, mask,
                       grad_checkpoint=self.grad_checkpoint)
        return self.fusion_norm(x)

    def match_logits(self, hidden_states, valid, image_tokens):
        """Inputs as for fuse -> (B, 2); [:, 1] is that text and image are a pair"""
        fused = self.fuse(hidden_states, valid, image_tokens)
        return at_least_float32(self.itm_head(fused[:, 0]))

    def word_log_probs(self, tokens, valid, image_tokens, position):
        """Words at `position` (B, K) of texts (B, L) read beside images -> (B, K, V)"""
        fused = self.fuse(self.text(tokens, valid), valid, image_tokens)
        fused = fused.gather(1, position[..., None].expand(-1, -1, fused.shape[2]))
        return at_least_float32(self.mlm_head(fused)).log_softmax(2)


class TiMix(ALBEF):
    """ALBEF with a patch predictor, and its teacher: an average of its earlier weights."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.boxes = bool(cfg.boxes)
        self.temperature = nn.Parameter(torch.tensor(cfg.temperature))
        self.predictor = PatchPredictor(cfg.dim, cfg.text_dim)
        self.teacher = ALBEF(cfg).requires_grad_(False)
        self.update_ema(0.0)

    @torch.no_grad()
    def update_ema(self, momentum):
        """teacher = momentum * teacher + (1 - momentum) * student"""
        student = dict(self.named_parameters())
        for name, p in self.teacher.named_parameters():
            p.lerp_(student[name], 1 - momentum)

    @torch.no_grad()
    def clamp_temperature(self):
        """Between 0.001 and 0.5 (ALBEF), in place: a clamp in forward would pass no gradient
        outside the bounds."""
        self.temperature.clamp_(0.001, 0.5)

    def compile_methods(self, compile, device):
        """Compile the towers and the fusion as losses calls them, in place, so that weights keep
        their names. Losses, collectives and all that is random are not compiled."""
        methods = [
            (self, "encode"), (self, "encode_image"), (self, "match_logits"),
            (self, "word_log_probs"), (self, "region_log_probs"),
            (self.teacher, "encode"), (self.teacher, "word_log_probs"),
        ]
        for model, name in methods:
            setattr(model, name, common.compiled(getattr(model, name), compile, device))

    def region_log_probs(self, images, tokens, valid):
        """Patch predictor on images (R, 3, S, S), each with texts (R, T, L) -> (R, T, N, 2)"""
        patch_tokens = self.vision.blocks_until(images, self.middle)[:, 1:]  # no need of the rest
        text = self.text(tokens.flatten(0, 1), valid.flatten(0, 1))[:, 0]  # (R * T, W)
        n_texts = tokens.shape[1]
        log_probs = self.predictor(patch_tokens.repeat_interleave(n_texts, 0), text)
        return log_probs.unflatten(0, (-1, n_texts))

    @torch.no_grad()
    def patch_scores(self, encoded):
        """How much each patch belongs to its image's caption (B, N): log-probabilities of the patch
        predictor; without boxes to learn from, cosines of patches and text (ours)."""
        if self.boxes:
            patch_tokens = encoded.middle_tokens[:, 1:]
            return self.predictor(patch_tokens, encoded.hidden_states[:, 0])[..., 1]
        patches = self.image_embeds(encoded.image_tokens[:, 1:])  # (B, N, E)
        return (patches * encoded.text[:, None]).sum(2)

    def fused(self, images, tokens, valid):
        """The begin token of a text read beside its image: images, (B, L), (B, L) -> (B, W)"""
        return self.fuse(self.text(tokens, valid), valid, self.vision(images))[:, 0]

    def match_score(self, image_tokens, tokens, valid):
        """How well text and image match (B,): logit 1 of the matching head, with which ALBEF and
        TiMix re-rank retrieval. image_tokens = vision(images)."""
        return self.match_logits(self.text(tokens, valid), valid, image_tokens)[:, 1]

    def held_out_view(self, image):
        """The whole image, squashed to a square (ALBEF, TiMix code)."""
        return data.crop(image, (0, 0, *image.size), self.vision.image_size)


# ---- mixing ----

def text_aware_mix(images, scores, s, group):
    """Cover the s x s patches of an image that have the lowest total score with those of its
    partner that have the highest.

    images (B, 3, S, S); scores (B, N): relevance of each patch to its own image's caption, of any
    scale. Partners are the rows of a group in reverse; of equal windows the first in reading order
    is taken. -> mixed images, and lambda = 1 - s^2 / N, the share of a mixed image that is its own.
    TiMix code (TPMix); SMMix (arXiv 2212.12977) with text scores.
    """
    if group % 2:
        raise ValueError(f"group {group} is odd: its middle row would be its own partner")
    n = math.isqrt(scores.shape[1])  # patches per side
    totals = F.avg_pool2d(at_least_float32(scores).view(-1, 1, n, n), s, stride=1).flatten(1)
    numbers = torch.arange(n * n, device=scores.device).view(n, n)
    windows = numbers.unfold(0, s, 1).unfold(1, s, 1).reshape(-1, s * s)  # each window's patches
    covered = windows[totals.argmin(1)]  # (B, s^2), in the image
    pasted = windows[partner(totals.argmax(1), group)]  # (B, s^2), in its partner

    # vectorized: a loop with .tolist() would make the CPU wait for the GPU
    patch = images.shape[2] // n
    patches = F.pixel_unshuffle(images, patch).flatten(2)  # (B, P, N), P = 3 * patch^2 values
    covered = covered[:, None].expand(-1, patches.shape[1], -1)  # (B, P, s^2)
    pasted = pasted[:, None].expand(-1, patches.shape[1], -1)
    mixed = patches.scatter(2, covered, partner(patches, group).gather(2, pasted))
    lam = 1 - s**2 / n**2
    return F.pixel_shuffle(mixed.unflatten(2, (n, n)), patch), lam


def cutmix(images, group, generator):
    """CutMix (arXiv 1905.04899): one box for the whole batch, at the same place in both images.

    Its area is 1 - lambda with lambda uniform, its center uniform; what is outside the image is
    clipped. -> mixed images, and lambda as clipped.
    """
    size = images.shape[-1]
    lam, y, x = torch.rand(3, generator=generator).tolist()  # on the CPU: nothing to wait for
    half = math.sqrt(1 - lam) / 2
    top = round(size * max(y - half, 0))
    bottom = round(size * min(y + half, 1))
    left = round(size * max(x - half, 0))
    right = round(size * min(x + half, 1))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = partner(images, group)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / size**2


def window_side(n, min_side, max_side, generator):
    """Side of a step's window in patches, uniform over the integers from int(n * min_side) to
    int(n * max_side) (TiMix code); at least 1."""
    side = torch.randint(int(n * min_side), int(n * max_side) + 1, (), generator=generator)
    return max(1, int(side))


def mixed_targets(i2t, t2i, lam, group):
    """What mixed images should find among all texts, and texts among all mixed images.

    i2t, t2i (B, G): logits of the clean batch. The model's own probabilities are mixed as the
    images are: lambda * own + (1 - lambda) * partner's (TiMix code). A text's columns are mixed, as
    they are the images. -> two constant tables (B, G) whose rows sum to 1.
    """
    image_probs = i2t.detach().softmax(1)
    text_probs = t2i.detach().softmax(1)
    image_targets = lam * image_probs + (1 - lam) * partner(image_probs, group)
    text_targets = lam * text_probs + (1 - lam) * partner(text_probs.T, group).T
    return image_targets, text_targets


# ---- objective ----

def similarities(image, text, temperature):
    """Logits (B, G) of this rank's images against all texts, and of its texts against all images.

    image, text (B, E), unit length. Gradients are exact on any number of ranks.
    """
    with torch.autocast(image.device.type, enabled=False):  # never in bfloat16
        i2t = image @ all_gather_with_grad(text).T / temperature
        t2i = text @ all_gather_with_grad(image).T / temperature
    return i2t, t2i


def soft_targets(teacher_logits, alpha):
    """(1 - alpha) * the true pairs + alpha * the teacher's probabilities (ALBEF).

    teacher_logits: i2t, t2i (B, G). -> two tables (B, G).
    """
    B, G = teacher_logits[0].shape
    labels = rank() * B + torch.arange(B, device=teacher_logits[0].device)
    hard_targets = F.one_hot(labels, G).to(teacher_logits[0].dtype)
    return [alpha * x.softmax(1) + (1 - alpha) * hard_targets for x in teacher_logits]


def itc_loss(logits, targets):
    """Image-text contrast: cross-entropy with soft targets, the mean of both directions.

    logits, targets: i2t and t2i, each (B, G). The mean over ranks is the loss of the global batch.
    """
    i2t, t2i = logits
    image_targets, text_targets = targets
    image_loss = -(image_targets * i2t.log_softmax(1)).sum(1).mean()
    text_loss = -(text_targets * t2i.log_softmax(1)).sum(1).mean()
    return (image_loss + text_loss) / 2


@torch.no_grad()
def hard_negatives(image, text, temperature, noise, group):
    """For each image a text of another pair (B,), for each text an image (B,).

    Drawn in the row's group with the probability that the model takes them for the pair (ALBEF).
    image, text (B, E), unit length; noise (B, 2, group), uniform.
    """
    with torch.autocast(image.device.type, enabled=False):
        logits = image.unflatten(0, (-1, group)) @ text.unflatten(0, (-1, group)).mT / temperature
    own = torch.eye(group, dtype=torch.bool, device=image.device)
    logits = logits.masked_fill(own, -math.inf)  # (B / group, group, group)
    gumbel = -(-noise.clamp(min=1e-12).log()).log()  # argmax(logits + gumbel) draws from softmax
    first_row = torch.arange(len(image), device=image.device) // group * group
    negative_text = first_row + (logits.flatten(0, 1) + gumbel[:, 0]).argmax(1)
    negative_image = first_row + (logits.mT.flatten(0, 1) + gumbel[:, 1]).argmax(1)
    return negative_text, negative_image


def itm_loss(model, student, valid, noise, group):
    """Image-text matching: B pairs, B images with a negative text, B texts with a negative image
    (ALBEF).

    student: Encoded; valid (B, L); noise (B, 2, group), for hard_negatives.
    """
    negative_text, negative_image = hard_negatives(
        student.image, student.text, model.temperature, noise, group)
    B = len(valid)
    own = torch.arange(B, device=valid.device)
    text_index = torch.cat([own, negative_text, own])
    image_index = torch.cat([own, own, negative_image])
    # index_select: on the CPU the gradient of x[index] is summed in no fixed order
    logits = model.match_logits(
        student.hidden_states.index_select(0, text_index),
        valid[text_index],
        student.image_tokens.index_select(0, image_index))
    is_pair = torch.arange(3 * B, device=valid.device) < B
    return F.cross_entropy(logits, is_pair.long())


def mask_tokens(tokens, valid, noise, ratio, vocab_size):
    """BERT's masking: each token except the begin token and padding is to be predicted with
    probability `ratio`, at most L // 2 in a text; of these 80 % become the mask token, 10 % a
    random word, 10 % stay.

    tokens, valid (B, L); noise (B, 3, L), uniform. -> masked tokens (B, L); position (B, K), the
    K = L // 2 candidates of least noise; the words there (B, K), -1 where a candidate stays.
    """
    chosen_noise, kind_noise, word_noise = noise.unbind(1)
    chosen_noise = chosen_noise.masked_fill(~valid, 1.0)
    chosen_noise = torch.cat([torch.ones_like(chosen_noise[:, :1]), chosen_noise[:, 1:]], 1)
    least_noise, position = chosen_noise.topk(tokens.shape[1] // 2, largest=False)
    is_masked = least_noise < ratio
    words = tokens.gather(1, position)

    first_word = len(Tokenizer.SPECIAL)
    random_words = first_word + (word_noise * (vocab_size - first_word)).long()
    kind = kind_noise.gather(1, position)
    replacement = torch.where(kind < 0.9, random_words.gather(1, position), words)
    replacement = torch.where(kind < 0.8, Tokenizer.MASK, replacement)
    masked_tokens = tokens.scatter(1, position, torch.where(is_masked, replacement, words))
    return masked_tokens, position, torch.where(is_masked, words, -1)


def mlm_loss(model, batch, student, teacher, noise, alpha, cfg):
    """Masked words, predicted by a text that is read beside its image (ALBEF): hard targets are the
    words, soft ones the teacher's probabilities.

    student, teacher: Encoded; noise (B, 3, L). The mean of the results over ranks is the mean over
    the masked words of all ranks, of which each has a number of its own.
    """
    masked_tokens, position, labels = mask_tokens(
        batch["tokens"], batch["valid"], noise, cfg.mask_ratio, cfg.vocab_size)
    log_probs = model.word_log_probs(
        masked_tokens, batch["valid"], student.image_tokens, position)  # (B, K, V)
    with torch.no_grad():
        teacher_probs = model.teacher.word_log_probs(
            masked_tokens, batch["valid"], teacher.image_tokens, position).exp()

    is_masked = labels >= 0
    hard_loss = F.nll_loss(log_probs.flatten(0, 1), labels.flatten(), ignore_index=-1,
                           reduction="sum")
    soft_loss = (-(teacher_probs * log_probs).sum(2) * is_masked).sum()
    n_masked = all_reduce_sum(is_masked.sum()).clamp(min=1)
    return ((1 - alpha) * hard_loss + alpha * soft_loss) * world_size() / n_masked


def pta_loss(log_probs, in_box, used):
    """Patch-text alignment: cross-entropy of each patch, in the text's box or not (TiMix code).

    log_probs (R, T, N, 2); in_box (R, T, N) bool; used (R, T) bool: False where an image has fewer
    texts. The mean of the results over ranks is the mean over the used patches of all ranks.
    """
    patch_losses = -torch.where(in_box, log_probs[..., 1], log_probs[..., 0])
    n_patches = all_reduce_sum(used.sum()) * in_box.shape[2]
    return (patch_losses * used[..., None]).sum() * world_size() / n_patches.clamp(min=1)


def recall_and_precision(log_probs, in_box, used):
    """Of the patches in boxes, the share predicted; of the patches predicted, the share in boxes.

    Inputs as for pta_loss; over all ranks. Texts that mark every patch, such as captions, are left
    out.
    """
    used = used & ~in_box.all(2)
    predicted = (log_probs[..., 1] > log_probs[..., 0]) & used[..., None]
    wanted = in_box & used[..., None]
    counts = torch.stack([(predicted & wanted).sum(), wanted.sum(), predicted.sum()])
    n_hits, n_wanted, n_predicted = all_reduce_sum(counts)
    return {"pta_recall": n_hits / n_wanted.clamp(min=1),
            "pta_precision": n_hits / n_predicted.clamp(min=1)}


def mix_loss(model, images, student, logits, random_scores, generator, cfg):
    """Contrast of mixed images with the clean texts; the targets are mixed like the images.

    student: Encoded, and logits: i2t, t2i, of the clean pairs; random_scores (B, N).
    """
    if cfg.mix == "cutmix":
        mixed, lam = cutmix(images, cfg.group, generator)
    else:
        # "random": the same mixing, by scores that know no text
        scores = model.patch_scores(student) if cfg.mix == "text" else random_scores
        s = window_side(model.vision.grid, cfg.min_side, cfg.max_side, generator)
        mixed, lam = text_aware_mix(images, scores, s, cfg.group)
    mixed_logits = similarities(model.encode_image(mixed), student.text, model.temperature)
    return itc_loss(mixed_logits, mixed_targets(*logits, lam, cfg.group))


class Noise(NamedTuple):
    """What the rows of a step draw, uniform."""
    mlm: torch.Tensor  # (B, 3, L)
    itm: torch.Tensor  # (B, 2, group)
    random_scores: torch.Tensor  # (B, N)


def draw_noise(cfg, step, device):
    """Noise of this rank's rows, from one table: what a row draws does not depend on ranks."""
    sizes = [3 * cfg.context, 2 * cfg.group, (cfg.image_size // cfg.patch) ** 2]
    table = common.batch_noise(cfg.seed, step, cfg.batch, sum(sizes), device=device)
    mlm, itm, random_scores = table.split(sizes, 1)
    return Noise(mlm.unflatten(1, (3, -1)), itm.unflatten(1, (2, -1)), random_scores)


def losses(model, batch, noise, generator, cfg, progress, mixing):
    """The objective of a step -> loss, {name: term or metric}; means over ranks are exact.

    batch: clean pairs, and with cfg.boxes images with boxes; noise: Noise; generator: of the step,
    on the CPU; progress: 0 .. 1, how far alpha and the weight of the mix term have risen; mixing:
    has this step a mix term? Nothing here waits for the device.
    """
    images = batch["images"]
    tokens = batch["tokens"]
    valid = batch["valid"]
    alpha = cfg.alpha * progress
    student = model.encode(images, tokens, valid)
    with torch.no_grad():
        teacher = model.teacher.encode(images, tokens, valid)
        teacher_logits = similarities(teacher.image, teacher.text, model.temperature)

    # image-text contrast: targets are the true pairs, softened by the teacher's probabilities
    logits = similarities(student.image, student.text, model.temperature)  # i2t, t2i: (B, G) each
    terms = {"itc": itc_loss(logits, soft_targets(teacher_logits, alpha))}
    loss = cfg.w_itc * terms["itc"]

    # image-text matching: is this a pair, or are its image or text a hard negative?
    if cfg.w_itm:
        terms["itm"] = itm_loss(model, student, valid, noise.itm, cfg.group)
        loss = loss + cfg.w_itm * terms["itm"]

    # masked words: read beside the image; the teacher reads the same masked text
    if cfg.w_mlm:
        terms["mlm"] = mlm_loss(model, batch, student, teacher, noise.mlm, alpha, cfg)
        loss = loss + cfg.w_mlm * terms["mlm"]

    # patch-text alignment: which patches belong to the text of a box?
    if cfg.boxes:
        log_probs = model.region_log_probs(
            batch["region_images"], batch["region_tokens"], batch["region_valid"])
        in_box = batch["region_in_box"]
        used = batch["region_used"]
        terms["pta"] = pta_loss(log_probs, in_box, used)
        terms.update(recall_and_precision(log_probs, in_box, used))
        loss = loss + cfg.w_pta * terms["pta"]

    # mixed images, by --mix: the targets are mixed like the images
    if mixing:
        terms["mix"] = mix_loss(model, images, student, logits, noise.random_scores, generator, cfg)
        loss = loss + cfg.w_mix * progress * terms["mix"]
    return loss, terms


# ---- training rows ----

# RandAugment(2, 7) of ALBEF and TiMix code; on images with boxes only what moves no pixels.
PHOTOMETRIC = ("identity", "autocontrast", "equalize", "brightness", "sharpness")
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def rand_augment(image, rng, operations):
    """Two of the operations, drawn with replacement, each applied with probability 0.5."""
    for i in rng.integers(len(operations), size=2):
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < 0.5:
            image = distort(image, operations[i], sign)
    return image


def distort(image, operation, sign):
    """One operation at magnitude 7 of 10; the sign is that of geometric ones. Gaps are gray."""
    if operation == "autocontrast":
        return ImageOps.autocontrast(image)
    if operation == "equalize":
        return ImageOps.equalize(image)
    if operation == "brightness":
        return ImageEnhance.Brightness(image).enhance(1.36)
    if operation == "sharpness":
        return ImageEnhance.Sharpness(image).enhance(1.36)
    if operation == "rotate":
        return image.rotate(21 * sign, Image.BILINEAR, fillcolor=(128, 128, 128))
    source = {  # a, b, c, d, e, f: pixel (x, y) comes from (a x + b y + c, d x + e y + f)
        "shear_x": (1, 0.21 * sign, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.21 * sign, 1, 0),
        "translate_x": (1, 0, 7 * sign, 0, 1, 0),  # 7 pixels, whatever the size of the image
        "translate_y": (1, 0, 0, 0, 1, 7 * sign),
    }
    if operation in source:
        return image.transform(image.size, Image.AFFINE, source[operation], Image.BILINEAR,
                               fillcolor=(128, 128, 128))
    return image  # identity


def training_view(image, box, flip, rng, cfg, operations):
    """The box (x, y, w, h) of an image, mirrored or not, then distorted -> uint8 (3, S, S)"""
    x, y, w, h = box
    size = (cfg.image_size, cfg.image_size)
    image = image.resize(size, Image.BICUBIC, box=(x, y, x + w, y + h))
    if flip:
        image = ImageOps.mirror(image)
    if cfg.augment:
        image = rand_augment(image, rng, operations)
    return data.to_chw(image)


def example(sample, rng, cfg, tokenizer):
    """A training pair: a random resized crop, maybe mirrored and distorted, and one caption."""
    tokens, valid = tokenizer.pad(sample.caption(rng), cfg.context)
    image = sample.image(min_size=round(cfg.image_size / cfg.scale**0.5))
    box = data.random_box(rng, *image.size, cfg.scale)
    flip = cfg.flip and rng.random() < 0.5
    image = training_view(image, box, flip, rng, cfg, PHOTOMETRIC + GEOMETRIC)
    return {"images": image, "tokens": tokens, "valid": valid}


def has_boxes(sample):
    """Does it claim to have boxes? sample.boxes() says whether it really has."""
    return "boxes" in sample.json or "segments" in sample.json


def region_example(sample, rng, cfg, tokenizer):
    """An image with boxes: a crop that holds a whole box, maybe mirrored and distorted, and the
    texts of the boxes of which more than half is inside it (X-VLM's loading, as TiMix code)."""
    if not has_boxes(sample):  # known before anything is decoded: boxes may be rare
        raise data.Skip("no box")
    image = sample.image()
    boxes = sample.boxes()
    crop = crop_around(boxes[int(rng.integers(len(boxes)))], image.size, rng)
    flip = cfg.flip and rng.random() < 0.5
    regions = []  # (text, edges in pixels of the crop)
    if cfg.caption_as_region and sample.has_caption():
        regions.append((sample.caption(rng), (0, 0, *crop[2:])))
    for i in rng.permutation(len(boxes)):
        edges = edges_in_crop(boxes[i], crop)
        if edges is not None and len(regions) < cfg.texts_per_region:
            regions.append((boxes[i][4], edges))
    image = training_view(image, crop, flip, rng, cfg, PHOTOMETRIC)
    return {"region_images": image, **stack_regions(regions, crop[2:], flip, cfg, tokenizer)}


def crop_around(box, size, rng):
    """A crop (x, y, w, h) that holds a whole box (x, y, w, h, text) of an image of `size` (width,
    height). Each edge is uniform over the pixels between the box and the image's edge."""
    x, y, w, h, _ = box
    left = int(rng.integers(int(x) + 1))
    top = int(rng.integers(int(y) + 1))
    right = int(rng.integers(math.ceil(x + w), size[0] + 1))
    bottom = int(rng.integers(math.ceil(y + h), size[1] + 1))
    return left, top, right - left, bottom - top


def edges_in_crop(box, crop):
    """Left, top, right and bottom of what a crop (x, y, w, h) shows of a box (x, y, w, h, text), in
    pixels of the crop; None if that is not more than half of the box (X-VLM)."""
    x, y, w, h, _ = box
    left = max(x - crop[0], 0)
    top = max(y - crop[1], 0)
    right = min(x - crop[0] + w, crop[2])
    bottom = min(y - crop[1] + h, crop[3])
    area = max(right - left, 0) * max(bottom - top, 0)
    if area > w * h / 2:
        return left, top, right, bottom
    return None


def box_patches(edges, size, grid):
    """Every patch that a box touches, at least one: (grid, grid) bool.

    edges: left, top, right, bottom in an image of `size` (width, height).
    """
    left, top, right, bottom = edges
    width, height = size
    column = min(int(left * grid / width), grid - 1)
    row = min(int(top * grid / height), grid - 1)
    end_column = max(math.ceil(right * grid / width), column + 1)
    end_row = max(math.ceil(bottom * grid / height), row + 1)
    in_box = np.zeros((grid, grid), bool)
    in_box[row:end_row, column:end_column] = True
    return in_box


def stack_regions(regions, size, flip, cfg, tokenizer):
    """At most T regions (text, edges) of an image of `size`, filled up to T with unused texts.

    flip: the image is mirrored after the edges were taken.
    """
    T = cfg.texts_per_region
    grid = cfg.image_size // cfg.patch
    in_box = np.zeros((T, grid, grid), bool)
    padded = [tokenizer.pad("", cfg.region_context)] * T
    for t, (text, edges) in enumerate(regions):
        padded[t] = tokenizer.pad(text, cfg.region_context)
        in_box[t] = box_patches(edges, size, grid)
    if flip:
        in_box = in_box[:, :, ::-1]
    return {
        "region_tokens": np.stack([tokens for tokens, _ in padded]),
        "region_valid": np.stack([valid for _, valid in padded]),
        "region_in_box": in_box.reshape(T, -1),
        "region_used": np.arange(T) < len(regions),
    }


class PairsAndRegions(torch.utils.data.Dataset):
    """Batches of pairs and batches of images with boxes, joined; each has an order of its own."""

    def __init__(self, pairs, regions):
        self.pairs = pairs
        self.regions = regions

    def __getitem__(self, step):
        pairs = self.pairs[step]
        regions = self.regions[step]
        for batch in (pairs, regions):
            if "error" in batch:
                return batch
        skipped = pairs["skipped"].clone()
        n = len(data.UNREADABLE)  # every sample is a pair, too: what is unreadable counts there
        skipped[n:] += regions["skipped"][n:]
        return {**pairs, **regions, "skipped": skipped}


def training_data(cfg, index, tokenizer):
    """-> training set of pairs, and the dataset of batches: pairs, with cfg.boxes also half as many
    images with boxes (ours; TiMix code: 64 texts of boxes beside 128 pairs). Where few images have
    boxes, a batch holds the same ones several times."""
    order = data.ShuffledOrder(index.starts, cfg.batch, cfg.seed)
    pairs = data.TrainingSet(index, order, partial(example, cfg=cfg, tokenizer=tokenizer))
    dataset = data.BatchDataset([pairs], cfg.batch, rank(), world_size())
    if cfg.boxes:
        order = data.ShuffledOrder(index.starts, cfg.batch // 2, cfg.seed + 1)
        make_row = partial(region_example, cfg=cfg, tokenizer=tokenizer)
        regions = data.TrainingSet(index, order, make_row)
        regions = data.BatchDataset([regions], cfg.batch // 2, rank(), world_size())
        dataset = PairsAndRegions(dataset, regions)
    return pairs, dataset


# ---- training ----

def check(cfg):
    common.check_batch(cfg.batch, group=cfg.group)
    if cfg.mix not in ("none", "cutmix", "random", "text"):
        raise UserError(f"--mix {cfg.mix}: choose none, cutmix, random or text")
    if not 0 < cfg.min_side <= cfg.max_side <= 1:
        raise UserError(f"--min-side {cfg.min_side} --max-side {cfg.max_side}: give sides of the "
                        "window between 0 and 1, the smallest first")
    if cfg.alpha > 1:
        raise UserError(f"--alpha {cfg.alpha}: a share of the targets is at most 1")
    if cfg.mask_ratio > 0.5:
        raise UserError(f"--mask-ratio {cfg.mask_ratio}: at most 0.5 of the context can be masked")
    if cfg.texts_per_region < 1 + cfg.caption_as_region:
        raise UserError(f"--texts-per-region {cfg.texts_per_region} leaves no room for the text "
                        f"of a box: give {1 + cfg.caption_as_region} or more")


def trains_predictor(cfg, index):
    """As --boxes says; without it, if the first sample has boxes. Never at weight 0."""
    if not cfg.w_pta:
        return False
    if cfg.boxes is not None:
        return cfg.boxes
    try:
        return has_boxes(index[0])
    except data.Skip:
        return False


@common.owns_output_folder
def main(cfg):
    """Train, evaluate, draw. Returns the metrics of the last evaluation."""
    device = common.init_distributed()
    check(cfg)
    cfg = data.use_toy_data(cfg)
    if cfg.eval_every >= 0:
        import eval as evaluation  # only where something is evaluated or drawn
        evaluation.check_held_out(cfg)  # now, not after the last step
    index = data.open_index(cfg.data)
    cfg = replace(cfg, boxes=trains_predictor(cfg, index))
    if not cfg.boxes:
        print0("no boxes or --w-pta 0: the patch predictor is not trained, patches are scored by "
               "their cosine with the text")
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    model = TiMix(cfg).to(device)
    optimizer = common.adamw(model, cfg.wd, betas=(0.9, 0.999))  # torch's, as TiMix code
    start_step, vocab = common.resume_from(cfg, model, optimizer)

    tokenizer = data.make_tokenizer(cfg, index, vocab)
    pairs, dataset = training_data(cfg, index, tokenizer)
    batches = data.loader(dataset, start_step, cfg.steps, cfg.workers, device)
    model.compile_methods(cfg.compile, device)
    common.print_summary(cfg, device, model, [pairs], start_step, cfg.lr)
    log = common.Log(cfg, start_step, data.REASONS, data.UNREADABLE)

    for step in range(start_step, cfg.steps):
        model.clamp_temperature()
        model.update_ema(cfg.momentum)  # before the teacher is used (ALBEF)
        batch = next(batches)
        lr = common.cosine_lr(step, cfg.steps, cfg.warmup, cfg.lr)
        progress = min(1.0, step / max(1.0, cfg.ramp * cfg.steps))
        mixing = cfg.mix != "none" and cfg.w_mix > 0 and step < cfg.mix_until * cfg.steps
        noise = draw_noise(cfg, step, device)
        generator = common.generator(common.Stream.STEP, cfg.seed, step)
        with common.autocast(cfg.precision, device):
            loss, terms = losses(model, batch, noise, generator, cfg, progress, mixing)
        terms["temperature"] = model.temperature.detach().clone()  # as in this step

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
    if cfg.boxes and cfg.val:
        result.update(predictor_metrics(model, tokenizer, cfg, device))
        evaluation.write_result(result, cfg)
    return result


@torch.no_grad()
def predictor_metrics(model, tokenizer, cfg, device):
    """Recall and precision of the patch predictor on the boxes of held-out images; prints them."""
    import eval as evaluation
    rows = []
    for pattern in cfg.val:
        index = data.open_index(pattern, "test")
        for i in range(min(512, len(index))):
            try:
                rows.append(held_out_row(index[i], model, tokenizer, cfg))
            except data.Skip:
                continue
    if not rows:
        return {}
    batch = data.stack(rows)
    log_probs = evaluation.in_batches(
        model.region_log_probs, cfg, device, batch["region_images"], batch["region_tokens"],
        batch["region_valid"], size=64)
    metrics = recall_and_precision(log_probs, batch["region_in_box"], batch["region_used"])
    metrics = {name: value.item() for name, value in metrics.items()}
    print0(f"patches of {len(rows)} held-out images predicted from the texts of their boxes: "
           f"recall {metrics['pta_recall']:.1%}, precision {metrics['pta_precision']:.1%}")
    return metrics


def held_out_row(sample, model, tokenizer, cfg):
    """As region_example, but of the whole image and its first T boxes."""
    if not has_boxes(sample):
        raise data.Skip("no box")
    image = sample.image()
    regions = []
    for x, y, w, h, text in sample.boxes()[:cfg.texts_per_region]:
        regions.append((text, (x, y, x + w, y + h)))
    return {"region_images": model.held_out_view(image),
            **stack_regions(regions, image.size, False, cfg, tokenizer)}


# ---- pictures: a reader may stop here ----

def draw(model, tokenizer, cfg, device):
    """out/curves.png, and out/mixing.png: images mixed by text scores, whatever --mix is."""
    import eval as evaluation
    index, title = evaluation.held_out_pairs(cfg)
    if rank() > 0:
        return
    terms = ["loss", "itc"]
    if cfg.w_itm:
        terms.append("itm")
    if cfg.w_mlm:
        terms.append("mlm")
    if cfg.mix != "none" and cfg.w_mix:
        terms.append("mix")
    if cfg.boxes:
        terms += ["pta", "pta_recall", "pta_precision"]
    evaluation.curves(f"{cfg.out}/log.jsonl", f"{cfg.out}/curves.png",
                      [*terms, "temperature", "grad_norm"],
                      f"TiMix ({cfg.mix}), {cfg.steps} steps of {cfg.batch}")

    how = "the patch predictor" if cfg.boxes else "cosine of patch and text"
    samples = evaluation.pick_samples(index, 6, captioned=True)
    with common.autocast(cfg.precision, device):
        cells = mixing_cells(model, tokenizer, samples, cfg, device)
    evaluation.sheet(cells, f"{cfg.out}/mixing.png", 4,
                     f"Mixing of {title}, windows by {how}; trained with --mix {cfg.mix}", size=150)


@torch.no_grad()
def mixing_cells(model, tokenizer, samples, cfg, device):
    """Four cells of a sheet for each sample; sample i's partner is sample len - 1 - i. The window
    has half a side."""
    import eval as evaluation
    texts = [sample.captions(lines=True)[0] for sample in samples]
    tokens, valid = evaluation.tokenize(tokenizer, texts, cfg.context)
    images = torch.stack([torch.tensor(model.held_out_view(sample.image())) for sample in samples])
    encoded = model.encode(images.to(device), tokens.to(device), valid.to(device))
    scores = model.patch_scores(encoded).float().cpu()  # (B, N)
    n = model.vision.grid
    mixed, lam = text_aware_mix(images, scores, max(1, n // 2), len(images))
    maps = [evaluation.overlay(*pair) for pair in zip(images, scores.view(-1, n, n))]
    cells = []
    for i in range(len(texts)):
        j = len(texts) - 1 - i
        cells += [
            (images[i], texts[i], None),
            (maps[i], "patches of its caption", None),
            (maps[j], f"partner: {texts[j]}", None),
            (mixed[i], f"mixed: {lam:.2f} its own", None),
        ]
    return cells


if __name__ == "__main__":
    common.run(main, Config, DEMO, __doc__)
