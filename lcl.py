"""LCL (arXiv 2406.07543): a vision encoder learned from interleaved documents, by one causal pass
of a small language model over text and images.

    python lcl.py                                  # toy data: trains, evaluates, draws
    python lcl.py --docs 'mmc4/*.tar' --size b     # KEY.json (text_list, image_info), KEY.0.jpg ...
    python lcl.py --data 'cc3m/*.tar' --lr 5e-4    # pairs: a pair is a document with one image
    torchrun --standalone --nproc_per_node 8 lcl.py --docs 'mmc4/*.tar' --data 'cc3m/*.tar'

The states of the language model shall tell as much as possible about what comes next. Next token:
cross-entropy. Next image: the state at soi, just before its patches, picks it out of the global
batch (InfoNCE). To predict its tokens by regression instead would let the encoder make all tokens
equal, which leaves no error (--objective gen+reg).

Reading order: losses and info_nce (the method), LCL.forward (the model), sequence and pack
(documents -> rows), main.

Departures. Of the paper we had the abstract and tables, not the text. "LCL code" marks values and
rules of its released code, from which we depart in this:
- no norm before the ViT's blocks (the code's ln_pre), LayerNorm eps 1e-6 (1e-5), a bias in the
  patch embedding (none), weight decay on the class token (none); initial sizes of common.py
- no biases of the pool's keys: softmax cancels them
- every sequence starts with the begin token and ends with the end token; the code leaves out one
  of them in pairs
- an image with nothing before it, half of those of pairs, is not contrasted; the code contrasts it
  in documents (--contrast-empty-context)
- means over ranks are exact, where ranks hold different numbers of images and labels
- documents are packed into rows; byte-level BPE instead of CLIP's

Dimension key: R rows of L tokens of this rank, K images of S x S pixels, N patches of each, D width
of the language model, M labels, V vocabulary; in evaluation, B pairs. What ranks gather: C rows of
a rank, G of all, padding included.
"""
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import data
from common import (
    Block, UserError, ViT, all_gather, all_gather_with_grad, all_reduce_sum,
    at_least_float32, checkpointed_chunks, l2_normalize, print0, rank, run_blocks, split_heads,
    world_size)
from data import Tokenizer

# the terms of each --objective
OBJECTIVES = {"lcl": ("gen", "con"), "gen": ("gen",), "con": ("con",), "gen+reg": ("gen", "reg")}


@dataclass
class Config:
    # data and output
    docs: list = None  # documents: files, folders, globs, {0..9}; without --data, too: toy data
    data: list = None  # training pairs
    docs_share: float = 0.5  # ours: share of documents among the samples of a batch
    val: list = None  # held-out: captions -> retrieval, captions; classes -> zero-shot, kNN, linear
    out: str = "runs/lcl"  # checkpoint, log, results, pictures; a second start goes on here
    fresh: bool = False  # start anew in --out
    init: str = None  # weights to start from: a checkpoint, or an encoder under timm's names
    # image tower
    image_size: int = 224  # LCL code
    scale: float = 0.9  # LCL code: least area of the random resized crop
    patch: int = 16  # LCL code
    size: str = None  # ti s b l h 1b: sets dim, depth, heads
    dim: int = 768  # LCL code: ViT-B
    depth: int = 12  # ViT-B
    heads: int = 12  # ViT-B
    # documents
    context: int = 2048  # LCL code: tokens of a row of documents
    image_first: float = 0.5  # LCL code: probability that an image precedes its text; MMC4, pairs
    max_images: int = 6  # LCL code: the first ones of a document
    similarity: float = 0.24  # LCL code: least matched_sim of an image; MMC4 only
    pack: bool = True  # ours: several documents share a row
    # language model
    vocab: str = None  # vocabulary file; none = train one on documents, else on captions
    vocab_size: int = 49_411  # LCL code
    text_dim: int = 768  # LCL code
    text_depth: int = 12  # LCL code
    text_heads: int = 12  # LCL code
    # objective
    objective: str = "lcl"  # or an arm: gen, gen+reg (paper Table 1), con (its ablation of losses)
    w_gen: float = 1.0  # LCL code: next token
    w_con: float = 0.1  # LCL code: contrast of an image with the state at its soi
    temperature: float = 0.07  # LCL code: initial value; learned, stays within 0.01 .. 1
    contrast_empty_context: bool = False  # also images with nothing before them (LCL code: of docs)
    # optimization
    batch: int = 4096  # ours: documents and pairs, global
    steps: int = 100_000  # ours
    lr: float = 3e-4  # LCL code: documents; pairs 5e-4
    warmup: int = 2000  # LCL code, in steps; at most a tenth of them
    wd: float = 0.2  # LCL code
    grad_clip: float = 0.0  # LCL code clips nothing; 0 = off
    seed: int = 0  # LCL code
    # machine
    micro: int = 0  # images and rows at a time through the towers, recomputed in backward; 0 = all
    grad_checkpoint: bool = False  # recompute every block in backward
    precision: str = "auto"  # auto: bf16 on CUDA, fp32 on the CPU
    compile: bool = None  # none = on CUDA only
    workers: int = None  # loader processes of a rank; none = its cores less one
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 10  # steps between lines of the log
    eval_every: int = 0  # steps between evaluations; 0 = at the end, -1 = never

    method = "LCL"
    # what --init takes from a checkpoint of this script
    model_fields = ("image_size", "patch", "dim", "depth", "heads", "context", "vocab_size",
                    "text_dim", "text_depth", "text_heads")


# Toy data on two CPU cores. Images follow what is said about them, or the contrast would not learn
# from it. A second sentence may come after. At this size a weight of 0.1 is too weak.
DEMO = dict(
    image_size=48, patch=8, dim=128, depth=3, heads=4, scale=1.0, docs_share=0.25, image_first=0.0,
    text_dim=64, text_depth=2, text_heads=2, context=256, vocab_size=512, w_con=1.0,
    batch=64, steps=800, lr=1e-3, warmup=40, wd=0.05, save_every=100,
)


# ---- model ----

class AttentivePool(nn.Module):
    """Attention of one learned query to an image's patches (LCL code).

    Image tokens: out(values). Latent: out(concatenated weighted sums of the values, one for each
    head).
    """

    def __init__(self, dim, out_dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, dim))
        self.norm_q = nn.LayerNorm(dim, eps=1e-6)
        self.norm_v = nn.LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, out_dim)
        self.v = nn.Linear(dim, out_dim)
        # no biases (LCL code has both): each would add the same to all keys, and softmax cancels it
        self.norm_k = nn.LayerNorm(dim, eps=1e-6, bias=False)
        self.k = nn.Linear(dim, out_dim, bias=False)
        self.out = nn.Linear(out_dim, out_dim, bias=False)  # LCL code

    def forward(self, x):
        """Patches (K, N, width of the ViT) -> tokens (K, N, D), latent (K, D)."""
        query = self.q(self.norm_q(self.query)).expand(len(x), 1, -1)
        key = self.k(self.norm_k(x))
        value = self.v(self.norm_v(x))
        pooled = common.attention(
            split_heads(query, self.heads), split_heads(key, self.heads),
            split_heads(value, self.heads))  # (K, heads, 1, D / heads)
        return self.out(value), self.out(pooled.flatten(1))


class LCL(nn.Module):
    """ViT, attentive pool, and a causal language model over text and image tokens."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.objective not in OBJECTIVES:
            raise UserError(f"--objective {cfg.objective}: choose {', '.join(OBJECTIVES)}")
        if not term_weights(cfg):
            raise UserError(f"--objective {cfg.objective} has nothing to learn with --w-gen "
                            f"{cfg.w_gen:g} and --w-con {cfg.w_con:g}: raise one of its weights")
        D = cfg.text_dim
        self.objective = cfg.objective
        self.context = cfg.context
        self.micro = cfg.micro
        self.grad_checkpoint = cfg.grad_checkpoint
        self.flex_attention = False  # packed rows by FlexAttention: main says so
        self.vision = ViT(cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads,
                          grad_checkpoint=cfg.grad_checkpoint,
                          mean=(0.48145466, 0.4578275, 0.40821073),  # CLIP's, as LCL code
                          std=(0.26862954, 0.26130258, 0.27577711))
        self.image_ids = ids_of_image(cfg)
        least = len(self.image_ids) + 2  # begin and end token
        if cfg.context < least:
            raise UserError(f"--context {cfg.context} has no room for an image of "
                            f"{self.vision.grid**2} patches and the tokens around it: {least} is "
                            "the least")
        self.pool = AttentivePool(cfg.dim, D, cfg.text_heads)
        self.token_embed = nn.Embedding(cfg.vocab_size, D)
        self.pos_embed = nn.Parameter(torch.zeros(cfg.context, D))
        self.blocks = nn.ModuleList(Block(D, cfg.text_heads) for _ in range(cfg.text_depth))
        self.norm_context = nn.LayerNorm(D, eps=1e-6)
        self.norm_head = nn.LayerNorm(D, eps=1e-6)
        self.context_proj = nn.Linear(D, D, bias=False)
        self.head = nn.Linear(D, cfg.vocab_size, bias=False)
        if cfg.objective == "gen+reg":
            self.regress = nn.Linear(D, D)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.temperature)))
        for name, module in self.named_children():
            if name != "vision":
                module.apply(common.init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.01)  # LCL code

    def forward(self, batch):
        """A batch of pack() -> all that the losses compare, in a dict.

        image_tokens (K, N, D) of the images; unit vectors latent (K, D) of the images and context
        (K, D) of the states at their soi; where the objective has the term, logits (M, V) of the
        labels (gen) and predicted_tokens (K, N, D) (reg).
        """
        # images -> tokens for the language model, and one latent each
        image_tokens, latent = checkpointed_chunks(self.encode, self.micro, batch["images"])

        # rows of text and image tokens through the language model
        x = self.embed(batch["ids"], batch["position"], batch["soi_index"], image_tokens)
        x = checkpointed_chunks(self.decode_packed, self.micro, x, batch["document"])  # (R, L, D)
        x = x.flatten(0, 1)

        # F.embedding(index, x) is x[index] whose gradient is the same to the bit each time
        out = {
            "image_tokens": image_tokens,
            "latent": l2_normalize(latent),
            "context": self.context_embeds(F.embedding(batch["soi_index"], x)),
        }
        if "gen" in OBJECTIVES[self.objective]:
            out["logits"] = self.logits(F.embedding(batch["label_index"], x))
        if "reg" in OBJECTIVES[self.objective]:  # from the state at the place before each token
            before = self.image_places(batch["soi_index"]) - 1
            out["predicted_tokens"] = self.regress(F.embedding(before, x))
        return out

    def encode(self, images):
        """(K, 3, S, S) -> tokens (K, N, D), latent (K, D)."""
        return self.pool(self.vision.patch_tokens(images))

    def image_places(self, soi_index):
        """(K,) places of soi in the flattened rows -> (K, N): those of the patches after it."""
        n_patches = self.vision.grid**2
        return soi_index[:, None] + torch.arange(1, n_patches + 1, device=soi_index.device)

    def embed(self, ids, position, soi_index, image_tokens):
        """ids (R, L), position (R, L) or (L,), soi_index (K,), image_tokens (K, N, D) ->
        embeddings (R, L, D), those of IMG replaced by the image tokens."""
        x = self.token_embed(ids).flatten(0, 1)
        places = self.image_places(soi_index).flatten()
        # masked_scatter is slower on the CPU, and its backward waits for the device
        x = x.index_copy(0, places, image_tokens.flatten(0, 1).to(x.dtype))
        return x.unflatten(0, ids.shape) + F.embedding(position, self.pos_embed)

    def decode(self, x, mask=None):
        """(R, L, D) -> (R, L, D). Causal, also inside an image (LCL code); no mask: each row is one
        document."""
        causal = mask is None
        return run_blocks(self.blocks, x, mask, causal, grad_checkpoint=self.grad_checkpoint)

    def decode_packed(self, x, document):
        """Packed rows (R, L, D), number of each token's document (R, L) -> (R, L, D)"""
        mask = block_mask(document) if self.flex_attention else dense_mask(document)
        return self.decode(x, mask)

    def context_embeds(self, hidden_states):
        """States at soi (K, D) -> (K, D), unit length."""
        return l2_normalize(self.context_proj(self.norm_context(hidden_states)))

    def logits(self, hidden_states):
        """(..., D) -> (..., V)"""
        return self.head(self.norm_head(hidden_states))

    def contrast_scale(self):
        """What the cosines of the contrast are multiplied by: 1 / temperature."""
        return self.log_scale.clamp(0, math.log(100)).exp()

    @torch.no_grad()
    def clamp_scale(self):
        """Back into the bounds of contrast_scale, beyond which it has no gradient (LCL code)."""
        self.log_scale.clamp_(0, math.log(100))

    def encode_image(self, images):
        """(B, 3, S, S) -> (B, D), unit length."""
        _, latent = self.encode(images)
        return l2_normalize(latent)

    def encode_text(self, tokens, valid):
        """(B, L) -> (B, D), unit length: the state at a soi in the place of the end token."""
        last = valid.sum(1, keepdim=True) - 1
        x = self.token_embed(tokens.scatter(1, last, Tokenizer.SOI))
        x = self.decode(x + self.pos_embed[:tokens.shape[1]])
        return self.context_embeds(common.last_token(x, valid))

    def held_out_view(self, image):
        """Short side to image_size, central crop (LCL code)."""
        return data.center_crop(image, self.vision.image_size)

    # ---- text after an image ----

    def embed_prefix(self, images):
        """(B, 3, S, S) -> embeddings of: begin token, image (B, N+3, D)."""
        image_tokens, _ = self.encode(images)
        row = [Tokenizer.BOS, *self.image_ids]
        ids = torch.tensor(row, device=images.device).expand(len(images), -1)
        position = torch.arange(len(row), device=images.device)
        soi_index = len(row) * torch.arange(len(images), device=images.device) + 1
        return self.embed(ids, position, soi_index, image_tokens)

    def caption_states(self, images, tokens):
        """Captions after their images: states (B, L', D) at eoi, then at tokens[:, 1:].

        The begin token stands before the image. L' < L where the context ends earlier.
        """
        prefix = self.embed_prefix(images)
        start = prefix.shape[1]
        tokens = tokens[:, 1:1 + self.context - start]
        text = self.token_embed(tokens) + self.pos_embed[start:start + tokens.shape[1]]
        return self.decode(torch.cat([prefix, text], 1))[:, start - 1:]

    def score(self, images, tokens, valid):
        """Mean log-probability of each caption's tokens after its image (B,)."""
        x = self.caption_states(images, tokens)
        logits = at_least_float32(self.logits(x[:, :-1]))  # (B, L'-1, V)
        labels = tokens[:, 1:x.shape[1]]
        valid = valid[:, 1:x.shape[1]]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return -(loss.view(labels.shape) * valid).sum(1) / valid.sum(1)

    def fused(self, images, tokens, valid):
        """Text about an image -> (B, D): the state at its end token, which only a head trains."""
        x = self.norm_head(self.caption_states(images, tokens))
        return common.last_token(x, valid[:, :x.shape[1]])

    @torch.no_grad()
    def generate(self, images, length=40):
        """Greedy captions, what follows the image: ids (B, length) as of generate_from."""
        return self.generate_from(self.embed_prefix(images), length)

    def generate_from(self, x, length):
        """Greedy continuation of embedded documents (B, n, D) up to the end token or the next soi:
        ids (B, length), PAD after that and beyond the context."""
        start = x.shape[1]
        ids = torch.full((len(x), length), Tokenizer.PAD, device=x.device)
        unfinished = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for t in range(min(length, self.context - start)):
            token = self.logits(self.decode(x)[:, -1]).argmax(1)  # (B,)
            token = torch.where(unfinished, token, Tokenizer.PAD)
            ids[:, t] = token
            unfinished = unfinished & (token != Tokenizer.EOS) & (token != Tokenizer.SOI)
            if not unfinished.any():
                break
            embedded = self.token_embed(token) + self.pos_embed[start + t]
            x = torch.cat([x, embedded[:, None]], 1)
        return ids


def dense_mask(document):
    """Number of each token's document (R, L) -> which tokens it may attend to (R, 1, L, L): itself
    and earlier ones of its document."""
    length = document.shape[1]
    same_document = document[:, :, None] == document[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    return (same_document & causal)[:, None]


def block_mask(document):
    """The same as a BlockMask of FlexAttention."""
    from torch.nn.attention.flex_attention import create_block_mask  # the import takes a second

    def may_attend(row, head, query, key):
        return (query >= key) & (document[row, query] == document[row, key])

    n_rows, length = document.shape
    return create_block_mask(may_attend, n_rows, None, length, length, device=document.device)


# ---- objective ----

def losses(model, batch, cfg):
    """L = w_gen L_gen + w_con L_con + L_reg; --objective picks the terms.

    -> loss, {name: unweighted term, or one of collapse_metrics}. LCL code has the first two terms.
    All is this rank's share: the mean over ranks is that of the global batch.
    """
    with common.autocast(cfg.precision, batch["ids"].device):
        out = model(batch)
    image_tokens = at_least_float32(out["image_tokens"])
    weights = term_weights(cfg)
    terms = {}

    # L_gen: cross-entropy of each next token: text, end and soi tokens; not image patches and eoi
    if "gen" in weights:
        logits = at_least_float32(out["logits"])  # (M, V)
        terms["gen"] = mean_over_ranks(F.cross_entropy(logits, batch["labels"], reduction="none"))

    # L_con: InfoNCE between each image and the state at its soi. Ranks hold different numbers of
    # images: all are padded to the most there can be, so that what is gathered has one size
    if "con" in weights:
        most_images = cfg.max_images if cfg.docs else 1  # of a document, of a pair
        capacity = cfg.batch // world_size() * most_images
        is_contrasted = has_context(batch) | cfg.contrast_empty_context  # (K,)
        terms["con"] = info_nce(
            pad_rows(out["latent"], capacity), pad_rows(out["context"], capacity),
            pad_rows(is_contrasted, capacity), model.contrast_scale())

    # L_reg, with which all collapses: squared error of each image token, predicted from the state
    # before it. The target is not detached: tokens that are the same in all images minimize it
    if "reg" in weights:
        error = at_least_float32(out["predicted_tokens"]) - image_tokens  # (K, N, D)
        terms["reg"] = mean_over_ranks(error.square().mean((1, 2)))

    loss = sum(weights[name] * terms[name] for name in weights)
    terms.update(collapse_metrics(image_tokens, out["latent"]))
    return loss, terms


def term_weights(cfg):
    """{term of --objective: its weight}, without those of weight 0."""
    weights = {"gen": cfg.w_gen, "con": cfg.w_con, "reg": 1.0}
    return {name: weights[name] for name in OBJECTIVES[cfg.objective] if weights[name]}


def info_nce(latent, context, valid, scale):
    """L_con = mean_i -1/2 [log softmax_j(s z_i . y_j)_i + log softmax_j(s y_i . z_j)_i]  (LCL code)

    z = latent, y = context: (C, D), unit length, row i of one belongs to row i of the other. valid
    (C,): False for a pair that is not counted and no negative of others. s = scale: 0-dim factor.
    C is the same on all ranks; the mean of the results over ranks is the mean over all valid pairs,
    0 if there is none.
    """
    all_valid = all_gather(valid)  # (G,)
    labels = rank() * len(valid) + torch.arange(len(valid), device=valid.device)

    def cross_entropy(rows, columns):
        logits = scale * rows @ columns.T  # (C, G)
        # finite, not -inf: rows that are not valid get a gradient of 0 from where() below, and 0
        # times their softmax must stay 0, not become NaN, even if no pair is valid
        logits = logits.masked_fill(~all_valid, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, labels, reduction="none")

    image_to_context = cross_entropy(latent, all_gather_with_grad(context))
    context_to_image = cross_entropy(context, all_gather_with_grad(latent))
    loss = torch.where(valid, (image_to_context + context_to_image) / 2, 0)
    n_valid = all_reduce_sum(valid.sum()).clamp(min=1)
    return loss.sum() * world_size() / n_valid


def has_context(batch):
    """(K,): True if anything but the begin token precedes the image in its document."""
    return batch["position"].flatten()[batch["soi_index"]] > 1


def pad_rows(x, n):
    """(K, ...) -> (n, ...), padded with zeros."""
    if len(x) > n:
        raise UserError(f"{len(x)} images in a batch that may have {n}: documents are for --docs")
    padding = x.new_zeros(n - len(x), *x.shape[1:])
    return torch.cat([x, padding])


def count_over_ranks(x):
    """Number of rows of all ranks, 0-dim."""
    return all_reduce_sum(torch.full((), len(x), device=x.device))


def mean_over_ranks(values):
    """This rank's share of the mean of the values (n,) of all ranks, whose n differ."""
    return values.sum() * world_size() / count_over_ranks(values)


@torch.no_grad()
def collapse_metrics(image_tokens, latent):
    """How much the images of all ranks differ: spread -> 0 and cosine -> 1 are collapse.

    image_tokens (K, N, D), latent (K, D) of unit length -> spread: standard deviation of the
    images' mean tokens, averaged over D, over the root mean square of all tokens; cosine: mean over
    the pairs of different latents, 0 if there is one image alone.
    """
    n = count_over_ranks(latent)
    mean_token = image_tokens.mean(1)  # (K, D)
    center = all_reduce_sum(mean_token.sum(0)) / n
    variance = all_reduce_sum((mean_token - center).square().sum(0)) / n  # (D,)
    mean_square = all_reduce_sum(image_tokens.square().mean((1, 2)).sum()) / n
    spread = variance.sqrt().mean() / mean_square.sqrt()
    latent_sum = all_reduce_sum(latent.sum(0))  # its square: n ones, n (n - 1) cosines
    cosine = (latent_sum.square().sum() - n) / (n * (n - 1)).clamp(min=1)
    return {"spread": spread, "cosine": cosine}


# ---- documents -> rows ----

def example(sample, rng, cfg, tokenizer):
    """A training document: ids, and a random resized crop of each image (LCL code)."""
    read = read_document if sample.is_document() else read_pair
    # a square crop of the least area then has image_size pixels a side; an oblong one is enlarged
    min_size = round(cfg.image_size / cfg.scale**0.5)

    def view(image):
        box = data.random_box(rng, *image.size, cfg.scale)
        return data.crop(image, box, cfg.image_size)

    return sequence(read(sample, rng, cfg, tokenizer, min_size), view, cfg)


def read_document(sample, rng, cfg, tokenizer, min_size=None):
    """Sentences as lists of ids, and PIL images, chosen and placed by LCL's rules (data.Sample)."""
    parts = sample.document(rng, min_size, cfg.similarity, cfg.max_images, cfg.image_first)
    segments = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            space = " " if i > 0 else ""  # LCL code joins sentences and images by spaces
            segments.append(tokenizer.encode(space + part))
        else:
            segments.append(part)
    return segments


def read_pair(sample, rng, cfg, tokenizer, min_size=None):
    """A pair as a document: a list of ids and an image, in random order. The caption is as in
    evaluation, without a space before it; a long one is cut, or would push its image out."""
    room = cfg.context - len(ids_of_image(cfg)) - 2  # begin and end token
    segments = [tokenizer.encode(sample.caption(rng))[:room], sample.image(min_size)]
    if rng.random() < cfg.image_first:
        segments.reverse()
    return segments


def ids_of_image(cfg):
    """The ids of an image: soi, a place for each patch, eoi."""
    n_patches = (cfg.image_size // cfg.patch) ** 2
    return [Tokenizer.SOI, *n_patches * [Tokenizer.IMG], Tokenizer.EOI]


def sequence(segments, view, cfg):
    """Lists of ids and images in reading order -> {"ids": (n,), "images": (k, 3, S, S)}.

    view(image) -> (3, S, S). What is longer than the context is cut there, or before the image that
    would be cut in two, and gets the end token all the same (LCL code). Raises Skip if no image is
    left.
    """
    room = cfg.context - 1  # the end token takes one
    ids = [Tokenizer.BOS]
    image_ids = ids_of_image(cfg)
    images = []
    for segment in segments:
        if isinstance(segment, list):
            ids += segment
        elif len(ids) + len(image_ids) <= room:
            ids += image_ids
            images.append(view(segment))
        else:
            break
    if not images:
        raise data.Skip("no image left")
    return {"ids": np.array(ids[:room] + [Tokenizer.EOS]), "images": np.stack(images)}


def pack(documents, cfg):
    """Documents of sequence() -> rows of cfg.context tokens, as tensors:

    ids, document (its number in the row, -1 after the last), position (in the document), each
    (R, L); images (K, 3, S, S) in the order of their tokens; labels (M,): the tokens that are
    predicted, all but begin tokens, image patches and eoi (LCL code). Places in the flattened rows:
    soi_index (K,), and label_index (M,) of the token just before each label.

    R, K and M differ from batch to batch, without padding: when torch.compile meets a second number
    it makes a graph for any. Only what ranks gather is padded, in losses.
    """
    rows = fill_rows(documents, cfg)
    ids = np.full((len(rows), cfg.context), Tokenizer.PAD)
    document = np.full_like(ids, -1)
    position = np.zeros_like(ids)
    images = []
    for r, row in enumerate(rows):
        start = 0
        for number, doc in enumerate(row):
            end = start + len(doc["ids"])
            ids[r, start:end] = doc["ids"]
            document[r, start:end] = number
            position[r, start:end] = np.arange(end - start)
            images.append(doc["images"])
            start = end

    batch = {"ids": ids, "document": document, "position": position}
    batch["images"] = np.concatenate(images)
    # made here, on the CPU: x[mask] would wait for the device
    batch["soi_index"] = np.flatnonzero(ids == Tokenizer.SOI)
    never_predicted = [Tokenizer.PAD, Tokenizer.BOS, Tokenizer.IMG, Tokenizer.EOI]
    is_label = ~np.isin(ids, never_predicted)
    batch["labels"] = ids[is_label]
    batch["label_index"] = np.flatnonzero(is_label) - 1
    return {name: torch.from_numpy(x) for name, x in batch.items()}


def fill_rows(documents, cfg):
    """Documents -> [[document, ...], ...] that fit into a row: first-fit decreasing."""
    if not cfg.pack:
        return [[doc] for doc in documents]
    rows = []
    lengths = []
    for doc in sorted(documents, key=lambda doc: len(doc["ids"]), reverse=True):
        n = len(doc["ids"])
        for r, length in enumerate(lengths):
            if length + n <= cfg.context:
                rows[r].append(doc)
                lengths[r] += n
                break
        else:
            rows.append([doc])
            lengths.append(n)
    return rows


def warn_of_long_documents(index, cfg, tokenizer, n=300):
    """One line if --context ends before the first image of some of the first n documents."""
    needed = []  # tokens of each up to its first image, and the end token
    for i in range(min(n, len(index))):
        try:
            segments = read_document(index[i], common.rng(common.Stream.FIGURE, i), cfg, tokenizer,
                                     min_size=1)  # of images only the places count
        except data.Skip:
            continue
        length = len(ids_of_image(cfg)) + 2  # begin and end token
        for segment in segments:
            if not isinstance(segment, list):
                break
            length += len(segment)
        needed.append(length)
    n_long = sum(length > cfg.context for length in needed)
    if n_long:
        print0(f"warning: {n_long / len(needed):.0%} of the first {len(needed)} documents have "
               f"their first image beyond --context {cfg.context} and are passed over: "
               f"--context {max(needed)} would hold them")


# ---- training ----

@common.owns_output_folder
def main(cfg):
    """Train, evaluate, draw. Returns the metrics of the last evaluation; {} with --eval-every -1 or
    when stopped."""
    device = common.init_distributed()
    common.check_batch(cfg.batch)
    cfg = data.use_toy_data(cfg, docs="docs", data="pairs")
    if cfg.eval_every >= 0:
        import eval as evaluation  # only where something is evaluated or drawn
        evaluation.check_held_out(cfg)  # now, not after the last step
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    model = LCL(cfg).to(device)
    optimizer = common.adamw(model, cfg.wd, betas=(0.9, 0.98), eps=1e-6)  # LCL code
    start_step, vocab = common.resume_from(cfg, model, optimizer)

    pairs = data.open_index(cfg.data)
    docs = data.open_index(cfg.docs)
    tokenizer = data.make_tokenizer(cfg, pairs if docs is None else docs, vocab)
    if docs is not None and rank() == 0:
        warn_of_long_documents(docs, cfg, tokenizer)
    sources, share = data.two_sources(cfg, [pairs, docs], cfg.docs_share,
                                      partial(example, cfg=cfg, tokenizer=tokenizer))
    dataset = data.BatchDataset(sources, cfg.batch, rank(), world_size(), share,
                                partial(pack, cfg=cfg))
    batches = data.loader(dataset, start_step, cfg.steps, cfg.workers, device)
    # the towers, not model.forward, whose graph would depend on the number of chunks of --micro
    model.encode = common.compiled(model.encode, cfg.compile, device)
    model.decode = common.compiled(model.decode, cfg.compile, device)
    # a block mask skips fully masked tiles; it has no backward on the CPU, and eager it is slow
    model.flex_attention = device.type == "cuda" and cfg.compile is not False
    common.print_summary(cfg, device, model, sources, start_step, cfg.lr)
    log = common.Log(cfg, start_step, data.REASONS, data.UNREADABLE)

    for step in range(start_step, cfg.steps):
        batch = next(batches)
        lr = common.cosine_lr(step, cfg.steps, cfg.warmup, cfg.lr)
        model.clamp_scale()
        loss, terms = losses(model, batch, cfg)
        terms["temperature"] = 1 / model.contrast_scale()

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
    """Metrics on cfg.val, and how well the last images of documents and the states at their soi
    find each other, as {name: value}; prints them and writes out/result.json.

    context_r1: images whose own context is the best of all; image_r1: the reverse.
    """
    import eval as evaluation
    result = evaluation.evaluate(model, tokenizer, cfg, device)
    if not cfg.docs:
        return result
    documents, title = read_held_out(cfg, tokenizer)
    which, similarity = match_contexts(model, documents, cfg, device)
    if which:
        own = torch.arange(len(which))
        image_rank = evaluation.target_ranks(similarity, own)
        context_rank = evaluation.target_ranks(similarity.T, own)
        result["context_r1"] = (context_rank == 0).float().mean().item()
        result["image_r1"] = (image_rank == 0).float().mean().item()
        print0(f"last images of {len(own)} {title} documents: "
               f"context_r1 {result['context_r1']:.1%}, image_r1 {result['image_r1']:.1%}")
        evaluation.write_result(result, cfg)
    return result


def read_held_out(cfg, tokenizer, n=200):
    """The first n held-out documents, else training documents -> [of sequence()], what they are."""
    training = data.expand(cfg.docs)
    try:
        paths = data.expand(cfg.docs, "test")
    except UserError:  # a folder of training shards alone
        paths = training
    title = "training" if set(training) & set(paths) else "held-out"
    index = data.open_index(paths)
    view = partial(data.center_crop, size=cfg.image_size)
    documents = []
    for i in range(min(n, len(index))):
        rng = common.rng(common.Stream.FIGURE, i)
        try:
            segments = read_document(index[i], rng, cfg, tokenizer)
            documents.append(sequence(segments, view, cfg))
        except data.Skip:
            continue
    return documents, title


@torch.no_grad()
def match_contexts(model, documents, cfg, device):
    """The last image of each document, if anything precedes it: [(document, its k-th image)], and
    cosines (n, n) of the states at their soi (rows) with the images (columns)."""
    which = []
    contexts = [torch.zeros(0, cfg.text_dim, device=device)]
    latents = [torch.zeros(0, cfg.text_dim, device=device)]
    for d, document in enumerate(documents):
        batch = {name: x.to(device) for name, x in pack([document], cfg).items()}
        if not has_context(batch)[-1]:
            continue
        with common.autocast(cfg.precision, device):
            out = model(batch)
        which.append((d, len(document["images"]) - 1))
        contexts.append(out["context"][-1:])
        latents.append(out["latent"][-1:])
    return which, (torch.cat(contexts) @ torch.cat(latents).T).cpu()


# ---- pictures: a reader may stop here ----

def draw(model, tokenizer, cfg, device):
    """out/curves.png, and out/document.png: images of documents with the text before each, the rank
    of its own context among all, what the model writes after it, and what follows."""
    import eval as evaluation
    if rank() == 0:
        evaluation.curves(f"{cfg.out}/log.jsonl", f"{cfg.out}/curves.png",
                          ["loss", *term_weights(cfg), "spread", "cosine", "temperature"],
                          f"LCL ({cfg.objective}), {cfg.steps} steps of {cfg.batch}")
    if not cfg.docs:
        return
    documents, title = read_held_out(cfg, tokenizer)
    if rank() > 0:
        return
    which, similarity = match_contexts(model, documents, cfg, device)
    if not which:
        return
    context_rank = evaluation.target_ranks(similarity.T, torch.arange(len(which))).tolist()
    cells = []
    for (d, k), own_rank in list(zip(which, context_rank))[:8]:
        before, written, after = text_around(model, tokenizer, documents[d], k, cfg, device)
        frame = "green" if own_rank == 0 else None
        caption = f"own context: rank {own_rank + 1} of {len(which)}"
        cells.append((None, "... " + before, None))
        cells.append((documents[d]["images"][k], caption, frame))
        cells.append((None, written, None))
        cells.append((None, after + " ...", None))
    evaluation.sheet(cells, f"{cfg.out}/document.png", 4,
                     f"{title.capitalize()}: text before, image, what the model writes, "
                     "what follows", size=150)


@torch.no_grad()
def text_around(model, tokenizer, document, k, cfg, device):
    """Text before the k-th image of a document, what the model writes after it, and what follows in
    the document."""
    ids = document["ids"]
    soi_index = np.flatnonzero(ids == Tokenizer.SOI)[:k + 1]
    start = soi_index[k]
    end = start + len(model.image_ids)
    images = torch.from_numpy(document["images"][:k + 1]).to(device)
    with common.autocast(cfg.precision, device):
        image_tokens, _ = model.encode(images)
        x = model.embed(torch.from_numpy(ids[None, :end]).to(device),
                        torch.arange(end, device=device),
                        torch.from_numpy(soi_index).to(device), image_tokens)
        written = model.generate_from(x, 40)[0].tolist()
    is_text = ids >= Tokenizer.FIRST_BYTE
    before = ids[:start][is_text[:start]][-30:]
    after = ids[end:][is_text[end:]][:30]
    return [tokenizer.decode(x) for x in (before, written, after)]


if __name__ == "__main__":
    common.run(main, Config, DEMO, __doc__)
