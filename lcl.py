"""LCL (arXiv 2406.07543): a vision encoder learned from interleaved documents, by one causal pass of a small language model over text and images.

    python lcl.py                                                # trains on the built-in world's documents, evaluates, draws
    python lcl.py --docs 'mmc4/*.tar' --size b                   # documents: KEY.json with text_list and image_info, KEY.0.jpg, KEY.1.jpg ...
    python lcl.py --data 'cc3m/*.tar'                            # pairs, in random order: a pair is a document with one image
    torchrun --standalone --nproc_per_node 8 lcl.py --docs 'mmc4/*.tar' --data 'cc3m/*.tar' --docs-share 0.5

The language model should know as much as possible of what comes next. Next token: cross-entropy. Next image: it is picked out of the global
batch by the state just before it (InfoNCE): predicting its latent instead would let the encoder make all latents the same.

Read Config (what the run is), sequence and pack (documents -> rows), AttentivePool and LCL (the model), contrast, then main.
Departures: the paper's text was not available to us, the method is that of its released code. (1) ViT, blocks and initial values as everywhere
here; (2) every sequence starts with the begin token and ends with the end token, the code leaves out one of them in pairs (so here an image
behind its caption also helps to predict the end); (3) an image with nothing before it is not contrasted, in documents the code does
(--contrast-empty-context); (4) means over ranks are exact; (5) documents are packed into rows; (6) byte-level BPE.

Dimension key: B documents of this rank, R rows of L tokens they are packed into, K images, N patches of each, D width, M labels, V vocabulary.
"""
import contextlib, math
from dataclasses import dataclass
from functools import partial

import common                    # before torch: it sets how OpenMP waits
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import eval as evaluation
from common import Block, UserError, ViT, averaging, lr_at, rank, run_blocks, split_heads, unit, world
from data import Tokenizer


@dataclass
class Config:
    docs: list = None            # training documents: files, folders, globs, {0..9} ranges; none of both = the built-in world's documents
    data: list = None            # training pairs
    docs_share: float = 0.5      # ours: documents among the rows of a batch, where both are given
    val: list = None             # held-out shards: with captions -> retrieval and captioning, with classes -> zero-shot, kNN, linear probe
    out: str = "runs/lcl"        # checkpoints, log, results and pictures; a second start here resumes
    fresh: bool = False          # start anew in --out
    init: str = None             # file of timm-named encoder weights to start from; tells dim, depth, heads, patch unless they are given
    # image tower
    image_size: int = 224        # LCL code
    scale: float = 0.9           # LCL code: least area of the random resized crop
    patch: int = 16              # LCL code
    size: str = None             # ti s b l h g: fills dim, depth, heads unless they are given
    dim: int = 768               # LCL code: ViT-B
    depth: int = 12              # ViT-B
    heads: int = 12              # ViT-B
    cls: bool = True             # LCL code: takes part in attention only
    # documents
    context: int = 2048          # LCL code, documents: tokens of a row
    image_first: float = 0.5     # LCL code: an image stands before, not after, its sentence
    max_images: int = 6          # LCL code: the first ones of a document
    similarity: float = 0.24     # LCL code: least matched_sim of an image
    pack: bool = True            # ours: several documents share a row
    # language model
    vocab: str = None            # vocabulary file; none = train one on the first documents
    vocab_size: int = 49_411     # LCL code
    text_dim: int = 768          # LCL code
    text_depth: int = 12         # LCL code
    text_heads: int = 12         # LCL code
    # objective
    objective: str = "lcl"       # lcl, or an arm of the paper's Table 1: gen, con, gen+reg (predicts image tokens by regression)
    w_gen: float = 1.0           # LCL code: next-token cross-entropy
    w_con: float = 0.1           # LCL code: contrast of an image with the state before it
    temperature: float = 0.07    # LCL code: initial value; its inverse is learned in log space and stays within 1 .. 100
    contrast_empty_context: bool = False  # as the released document loader: contrast images with nothing before them too
    # optimisation
    batch: int = 4096            # ours: documents and pairs, global
    steps: int = 100_000         # ours
    lr: float = 5e-4             # LCL code, pairs
    warmup: int = 2000           # LCL code, in steps; at most a tenth of them
    schedule: str = "cosine"     # LCL code; or linear
    wd: float = 0.2              # LCL code
    grad_clip: float = 0.0       # LCL code clips nothing; 0 = off
    seed: int = 0                # LCL code
    # machine
    micro: int = 0               # images and rows taken at a time, recomputed in backward; 0 = all
    grad_checkpoint: bool = False  # recompute every block in backward
    precision: str = "auto"      # bf16 where the device computes in it, else fp32
    compile: bool = None         # none = on for CUDA, off for CPU
    workers: int = None          # loader processes of a rank; none = its cores less one
    window: int = 64             # shards shuffled together
    save_every: int = 1000       # ours
    log_every: int = 10          # ours
    eval_every: int = 0          # steps between evaluations; 0 = at the end, -1 = never
    timeout: int = 600           # seconds a rank waits for the others


# The built-in world on two CPU cores. At this size a weight of 0.1 is too weak for the contrast.
DEMO = dict(image_size=48, patch=8, dim=128, depth=3, heads=4, text_dim=128, text_depth=2, text_heads=4, context=256, vocab_size=512, scale=1.0,
            w_con=1.0, batch=64, steps=400, lr=1e-3, warmup=40, wd=0.05, save_every=200)


# ---- documents -> rows ----

def sequence(segments, cfg):
    """Token ids (list or PIL image) in reading order -> {"ids": (n,), "images": (k, 3, S, S)}. An image is soi, a slot for each patch, eoi.

    What is longer than the context is cut there, before an image that would be cut in two (LCL code).
    """
    N, ids, blocks = (cfg.image_size // cfg.patch) ** 2, [Tokenizer.BOS], []
    for segment in segments:
        if isinstance(segment, list):
            ids += segment
        else:
            blocks.append((len(ids), segment))
            ids += [Tokenizer.SOI, *[Tokenizer.IMG] * N, Tokenizer.EOI]
    cut = min([cfg.context - 1] + [at for at, _ in blocks if at + N + 2 > cfg.context - 1])
    images = [image for at, image in blocks if at < cut]
    if not images:
        raise data.Skip("no image left")
    return {"ids": np.array(ids[:cut] + [Tokenizer.EOS]), "images": np.stack(images)}


def tokenized(parts, tokenizer, view):
    """Sentences -> lists of ids, a space between them; images -> view(image)."""
    return [tokenizer.encode(" " * (i > 0) + part) if isinstance(part, str) else view(part) for i, part in enumerate(parts)]


def example(sample, rng, cfg, tokenizer):
    """A training document: LCL's choice and placement of images (data.Sample.document); a pair is one with one sentence and one image."""
    near = round(cfg.image_size / cfg.scale ** 0.5)

    def view(image):
        return data.crop(image, data.random_box(rng, *image.size, cfg.scale), cfg.image_size)
    if sample.is_document():
        return sequence(tokenized(sample.document(rng, near, cfg.similarity, cfg.max_images, cfg.image_first), tokenizer, view), cfg)
    room = cfg.context - (cfg.image_size // cfg.patch) ** 2 - 4                                  # a caption never pushes its image out
    parts = [tokenizer.encode(sample.caption(rng))[:room], view(sample.image(near))]
    return sequence(parts[::-1] if rng.random() < cfg.image_first else parts, cfg)


def pack(documents, cfg):
    """Rows for the language model and what it needs to find its way in them. Counts are rounded up, so that few shapes are compiled.

    ids, doc, position (R, L): tokens, number of the document (-1 behind the last), position in it. images (K, 3, S, S); slots (K, N): flat places
    of an image's tokens; soi (K,): of its begin token; context (K,): does anything stand before it? real (K,): False for padding images.
    label_at, labels (M,): a flat place and the token after it, which the model shall predict: text, end and soi, not slots and eoi (LCL
    code); -1 for padding. Padding points one place behind the last row.
    """
    L, N, B = cfg.context, (cfg.image_size // cfg.patch) ** 2, len(documents)
    up = lambda n, most: -(-n // (step := max(1, most // 16))) * step
    rows = []                                                # first fit, the longest document first
    for d in sorted(documents, key=lambda d: -len(d["ids"])):
        row = next((r for r in rows if cfg.pack and sum(len(e["ids"]) for e in r) + len(d["ids"]) <= L), None)
        rows.append([d]) if row is None else row.append(d)
    R = up(len(rows), B)
    ids, doc, position = np.full((R, L), Tokenizer.PAD), np.full((R, L), -1), np.zeros((R, L), int)
    for r, row in enumerate(rows):
        at = 0
        for i, d in enumerate(row):
            n = len(d["ids"])
            ids[r, at:at + n], doc[r, at:at + n], position[r, at:at + n] = d["ids"], i, np.arange(n)
            at += n
    images = np.concatenate([d["images"] for row in rows for d in row])                          # in the order of their soi in the rows
    soi, after = np.flatnonzero(ids == Tokenizer.SOI), np.append(ids.ravel()[1:], Tokenizer.PAD)
    goes_on = (doc[:, 1:] == doc[:, :-1]) & (doc[:, 1:] >= 0)
    wanted = np.pad(goes_on, ((0, 0), (0, 1))).ravel() & ~np.isin(after, (Tokenizer.IMG, Tokenizer.EOI))
    label_at, k, m = np.flatnonzero(wanted), up(len(images), B * cfg.max_images) - len(images), up(wanted.sum(), B * L) - wanted.sum()
    out = {"ids": ids, "doc": doc, "position": position, "images": np.pad(images, ((0, k), (0, 0), (0, 0), (0, 0))),
           "slots": np.pad(soi[:, None] + 1 + np.arange(N), ((0, k), (0, 0)), constant_values=R * L),
           "soi": np.pad(soi, (0, k), constant_values=R * L), "real": np.pad(np.ones(len(images), bool), (0, k)),
           "context": np.pad((position.ravel()[soi] > 1) | cfg.contrast_empty_context, (0, k)),
           "label_at": np.pad(label_at, (0, m), constant_values=R * L), "labels": np.pad(after[label_at], (0, m), constant_values=-1)}
    assert len(images) == len(soi), f"{len(images)} images for {len(soi)} begin tokens"
    return {name: torch.from_numpy(value) for name, value in out.items()}


def same_document(doc):
    """(R, L) -> mask of the tokens each may attend to: earlier ones of its document. Dense on CPU; on CUDA a FlexAttention block mask, which skips
    what is empty and has no backward on CPU."""
    if doc.device.type == "cpu":
        return ((doc[:, :, None] == doc[:, None]) & torch.ones(doc.shape[1], doc.shape[1], dtype=torch.bool).tril())[:, None]
    from torch.nn.attention.flex_attention import create_block_mask                              # the import costs a second
    rule = lambda b, h, q, k: (q >= k) & (doc[b, q] == doc[b, k])
    return create_block_mask(rule, len(doc), None, doc.shape[1], doc.shape[1], device=doc.device)


# ---- model ----

class AttentivePool(nn.Module):
    """One learned query pools the patches into an image's latent; the same values, each by itself, are its tokens for the language model
    (LCL code). So with uniform attention the latent is the mean of the tokens."""
    def __init__(self, dim, out_dim, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, dim))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(dim, out_dim) for _ in range(3))
        self.out = nn.Linear(out_dim, out_dim, bias=False)

    def forward(self, x):                                    # (K, N, width of the ViT) -> tokens (K, N, D), latent (K, D)
        value = self.v(self.norm_v(x))
        query = self.q(self.norm_q(self.query)).expand(len(x), 1, -1)
        pooled = common.attention(*(split_heads(part, self.heads) for part in (query, self.k(self.norm_k(x)), value)))   # (K, H, 1, D/H)
        return self.out(value), self.out(pooled.flatten(1))


class LCL(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D = cfg.text_dim
        self.context, self.recompute = cfg.context, cfg.grad_checkpoint
        self.vision = ViT(cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads, cls=cfg.cls, mean=(0.48145466, 0.4578275, 0.40821073),
                          std=(0.26862954, 0.26130258, 0.27577711))                              # CLIP's, as LCL's code
        if self.vision.grid ** 2 + 4 > cfg.context:
            raise UserError(f"--context {cfg.context} has no room for an image of {self.vision.grid ** 2} patches and the tokens around it: "
                            f"{self.vision.grid ** 2 + 4} is the least")
        self.vision.recompute = cfg.grad_checkpoint
        self.pool = AttentivePool(cfg.dim, D, cfg.text_heads)
        self.token_embed = nn.Embedding(cfg.vocab_size, D)
        self.pos_embed = nn.Parameter(torch.zeros(cfg.context, D))
        self.blocks = nn.ModuleList(Block(D, cfg.text_heads) for _ in range(cfg.text_depth))
        self.norm_context, self.norm_head = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.context_proj = nn.Linear(D, D, bias=False)
        self.head = nn.Linear(D, cfg.vocab_size, bias=False)
        self.regress = nn.Linear(D, D) if cfg.objective == "gen+reg" else None
        self.log_scale = nn.Parameter(torch.tensor(-math.log(cfg.temperature)))
        for part in (self.pool, self.token_embed, self.blocks, self.context_proj, self.head, *[self.regress] * (self.regress is not None)):
            part.apply(common.init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.01)      # LCL code

    def encode(self, images):                                # (K, 3, S, S) -> tokens (K, N, D), latent (K, D)
        return self.pool(self.vision.patch_tokens(images))

    def embed(self, ids, position, slots, tokens):
        """Embeddings of a batch's rows (R, L, D), the images' tokens in their slots, plus learned positions."""
        x = self.token_embed(ids)
        x = F.pad(x.flatten(0, 1), (0, 0, 0, 1)).index_copy(0, slots.flatten(), tokens.flatten(0, 1).to(x.dtype))[:-1].view(x.shape)
        return x + F.embedding(position, self.pos_embed)     # padding images wrote to the place cut off again

    def trunk(self, x, mask=None, past=None):                # (R, L, D) -> (R, L, D); causal, also inside an image
        return run_blocks(self.blocks, x, mask, mask is None and (past is None or x.shape[1] > 1), recompute=self.recompute, past=past)

    def contexts(self, x):                                   # states at soi (K, D) -> (K, D) unit
        return unit(self.context_proj(self.norm_context(x)))

    def logits(self, x):
        return self.head(self.norm_head(x))

    @torch.no_grad()
    def clamp(self):                                         # at the top of a step: beyond the bounds there would be no gradient back
        self.log_scale.clamp_(0, math.log(100))              # LCL code

    def scale(self):
        return self.log_scale.clamp(0, math.log(100)).exp()  # clamped for readers of a checkpoint, which is written after a step

    def encode_image(self, images):                          # (B, 3, S, S) -> (B, D) unit
        return unit(self.encode(images)[1])

    def encode_text(self, tokens, valid):                    # (B, L) -> (B, D) unit: the state at a soi in the place of the end token
        last = valid.sum(1, keepdim=True) - 1
        x = self.token_embed(tokens.scatter(1, last, Tokenizer.SOI)) + self.pos_embed[:tokens.shape[1]]
        return self.contexts(common.at_end(self.trunk(x), valid))

    def prefix(self, images):
        """Embeddings of: begin token, image (B, N+3, D)."""
        N = self.vision.grid ** 2
        ids = torch.tensor([Tokenizer.BOS, Tokenizer.SOI, *[Tokenizer.IMG] * N, Tokenizer.EOI], device=images.device).expand(len(images), -1)
        slots = torch.arange(ids.numel(), device=images.device).view(ids.shape)[:, 2:-1]
        return self.embed(ids, torch.arange(N + 3, device=images.device), slots, self.encode(images)[0])

    @torch.no_grad()
    def go_on(self, x, length):
        """Greedy continuation of embedded rows (B, L, D): ids (B, length), PAD after the end token. Keys and values are kept."""
        past, at, ids = [[] for _ in self.blocks], x.shape[1], torch.empty(len(x), 0, dtype=torch.long, device=x.device)
        going = torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        for i in range(min(length, self.context - at)):
            token = self.logits(self.trunk(x, past=past)[:, -1]).argmax(1, keepdim=True).where(going, Tokenizer.PAD)
            ids, going = torch.cat([ids, token], 1), going & (token != Tokenizer.EOS)
            x = self.token_embed(token) + self.pos_embed[at + i]
        return F.pad(ids, (0, length - ids.shape[1]), value=Tokenizer.PAD)

    def generate(self, images, length=40):
        """Greedy captions: what follows the image. ids (B, length), PAD after the end token."""
        return self.go_on(self.prefix(images), length)

    def fused(self, images, tokens, valid):                  # (B, 3, S, S), (B, L) -> (B, D): the state at the end of a text after its image
        x = self.prefix(images)
        text = self.token_embed(tokens[:, 1:]) + self.pos_embed[x.shape[1]:x.shape[1] + tokens.shape[1] - 1]
        return common.at_end(self.norm_head(self.trunk(torch.cat([x, text], 1))[:, x.shape[1] - 1:]), valid)

    def score(self, images, tokens, valid):
        """Mean log-probability of a caption's tokens after its image (B,)."""
        x, room = self.prefix(images), self.context - self.vision.grid ** 2 - 3
        tokens, valid = tokens[:, 1:room], valid[:, 1:room]  # the begin token stands before the image
        text = self.token_embed(tokens) + self.pos_embed[x.shape[1]:x.shape[1] + tokens.shape[1]]
        logits = self.logits(self.trunk(torch.cat([x, text], 1))[:, x.shape[1] - 1:-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none").view(tokens.shape) * valid
        return -loss.sum(1) / valid.sum(1)


Model = LCL


# ---- objective ----

def contrast(latent, context, valid, scale):
    """InfoNCE both ways, halved, between images and the states before them (paper's L_con; LCL code), over the valid pairs of all ranks.

    latent, context (K, D) unit; valid (K,); scale 0-dim factor. K may hold padding but is the same on all ranks. Returns this rank's share:
    the mean over ranks is the mean over all valid pairs, 0 if nobody has one.
    """
    columns, K = common.all_gather(valid), len(valid)
    own = rank() * K + torch.arange(K, device=valid.device)
    loss = 0
    for row, column in ((latent, context), (context, latent)):
        logits = (scale * row @ common.gather(column).T).masked_fill(~columns, torch.finfo(latent.dtype).min)    # finite: no NaN in unused rows
        loss = loss + F.cross_entropy(logits, own, reduction="none") / 2
    return torch.where(valid, loss, 0).sum() * world() / common.total(valid.sum()).clamp(min=1)


def gauge(tokens, latent, real):
    """How far from collapse the images of all ranks are: spread (deviation of an image's mean token over images, by dimension, over the tokens'
    root mean square) and mean pairwise cosine of the latents."""
    real, n = real[:, None].float(), common.total(real.sum()).clamp(min=2)
    tokens, latent = tokens.detach().float(), unit(latent.detach()) * real
    mean, power = tokens.mean(1) * real, tokens.square().mean((1, 2)) * real[:, 0]
    sums = common.total(torch.cat([mean.sum(0), mean.square().sum(0), latent.sum(0), power.sum()[None]]))
    first, second, third, energy = sums.split([tokens.shape[2], tokens.shape[2], latent.shape[1], 1])
    deviation = (second / n - (first / n).square()).clamp(min=0).sqrt().mean()
    return {"spread": deviation / (energy[0] / n).sqrt(), "cosine": (third.square().sum() - n) / (n * (n - 1))}


@torch.no_grad()
def rank_images(model, documents, cfg, device):
    """Rows of sequence() -> which = [(document, its k-th image)] of the images that have something before them, and the cosines of the contexts
    (rows) with the images (columns) of all documents."""
    latents, contexts, which = [], [], []
    for d, document in enumerate(documents):
        batch = {k: v.to(device) for k, v in pack([document], cfg).items()}
        with common.autocast(cfg, device):
            tokens, latent = model.encode(batch["images"])
            x = model.trunk(model.embed(batch["ids"], batch["position"], batch["slots"], tokens), same_document(batch["doc"]))
            used = batch["context"]
            latents.append(unit(latent[used]))
            contexts.append(model.contexts(x.flatten(0, 1)[batch["soi"][used]]))
        which += [(d, k) for k in used.nonzero()[:, 0].tolist()]
    return which, (torch.cat(contexts) @ torch.cat(latents).T).cpu()


@torch.no_grad()
def draw(model, tokenizer, cfg, device):
    """out/curves.png; out/document.png: images of held-out documents with the text before, the rank of the true context among all, what the model
    writes after them and what follows. -> {"context_r1": share of images whose true context is the best, "image_r1": the reverse}."""
    if rank():
        return {}
    evaluation.curves(f"{cfg.out}/log.jsonl", f"{cfg.out}/curves.png", ["loss", "gen", "con", "spread", "cosine", "temperature"],
                      f"LCL ({cfg.objective}), {cfg.steps} steps of {cfg.batch}")
    if not cfg.docs:
        return {}
    paths, documents = data.expand(cfg.docs, "test"), []
    index, title = data.Index(paths), "training" if set(paths) & set(data.expand(cfg.docs)) else "held-out"
    for i in range(min(len(index), 200)):
        with contextlib.suppress(data.Skip):
            parts = index[i].document(data.rng_for(5, i), None, cfg.similarity, cfg.max_images, cfg.image_first)
            documents.append(sequence(tokenized(parts, tokenizer, lambda image: data.centre(image, cfg.image_size)), cfg))
    which, sim = rank_images(model, documents, cfg, device)
    places, N, cells = evaluation.ranks(sim.T, torch.arange(len(sim))).tolist(), model.vision.grid ** 2, []
    for (d, k), place in list(zip(which, places))[:8]:
        ids, images = documents[d]["ids"], torch.from_numpy(documents[d]["images"]).to(device)
        soi = np.flatnonzero(ids == Tokenizer.SOI)[:k + 1]
        before, after, end = ids[:soi[k]], ids[soi[k] + N + 2:], soi[k] + N + 2
        with common.autocast(cfg, device):
            slots = torch.from_numpy(soi[:, None] + 1 + np.arange(N)).to(device)
            x = model.embed(torch.from_numpy(ids[None, :end]).to(device), torch.arange(end, device=device), slots, model.encode(images[:k + 1])[0])
            written = model.go_on(x, 40)[0].cpu().numpy()
        cells += [(None, "... " + tokenizer.decode(before[-30:]), None),
                  (images[k].cpu(), f"true context: rank {place + 1} of {len(sim)}", "green" if place == 0 else None),
                  (None, tokenizer.decode(written[:np.append(np.flatnonzero(written == Tokenizer.SOI), 40)[0]]), None),
                  (None, tokenizer.decode(after[:30]) + " ...", None)]
    evaluation.sheet(cells, f"{cfg.out}/document.png", 4, f"{title.capitalize()}: text before, image, what the model writes, what follows", 150)
    recall = evaluation.recall_at_k(sim, torch.arange(len(sim)), (1,))
    return {"context_r1": recall["i2t"][1], "image_r1": recall["t2i"][1]}


def main(cfg):
    """Train, evaluate, draw. Returns the metrics of the last evaluation."""
    if cfg.objective not in ("lcl", "gen", "con", "gen+reg"):
        raise UserError(f"--objective {cfg.objective}: choose lcl, gen, con or gen+reg")
    device = common.start(cfg)
    cfg = data.with_world(cfg, docs="docs")
    state = common.resume(cfg, "LCL")
    indices = data.indices_of(cfg.data, cfg.docs)
    tokenizer = common.rank0_first(lambda: data.vocabulary(cfg, indices[1] or indices[0], state))
    rows, share = data.mixture(cfg, indices, cfg.docs_share, partial(example, cfg=cfg, tokenizer=tokenizer))
    model = LCL(cfg).to(device)
    common.init_encoder(model.vision, cfg.init)
    opt = common.adamw(model, cfg, betas=(0.9, 0.98), eps=1e-6)                                  # LCL code
    first, peak = common.restore(state, model, opt), cfg.lr
    common.describe(cfg, device, model, rows, first, peak)
    batches = data.Batches(rows, cfg.batch, rank(), world(), share, partial(pack, cfg=cfg))
    batches = data.Loader(batches, first, cfg, device)
    encode, trunk = (common.compiled(f, cfg, device) for f in (model.encode, model.trunk))
    w_gen, w_con = cfg.w_gen * (cfg.objective != "con"), cfg.w_con * (cfg.objective in ("lcl", "con"))
    capacity = cfg.batch // world() * cfg.max_images         # images of a rank at most: the size that all ranks gather
    log = common.Log(cfg, device, first, data.REASONS)

    for step in range(first, cfg.steps):
        model.clamp()
        batch = log.next(batches)
        with common.autocast(cfg, device):
            tokens, latent = common.in_chunks(encode, cfg.micro, batch["images"])
            x = model.embed(batch["ids"], batch["position"], batch["slots"], tokens)
            x = common.in_chunks(lambda x, doc: trunk(x, same_document(doc) if cfg.pack else None), cfg.micro, x, batch["doc"])
            x = F.pad(x.flatten(0, 1), (0, 0, 0, 1))         # padding looks one place behind the last row
            # F.embedding: the gradient of x[...] on the CPU depends on its threads' order
            context, logits = model.contexts(F.embedding(batch["soi"], x)), model.logits(F.embedding(batch["label_at"], x))
        gen = F.cross_entropy(logits.float(), batch["labels"], ignore_index=-1, reduction="sum")
        gen = gen * world() / common.total((batch["labels"] >= 0).sum())
        pairs = (F.pad(y, (0, 0) * (y.ndim - 1) + (0, capacity - len(y))) for y in (unit(latent), context, batch["context"]))
        con = contrast(*pairs, model.scale())
        loss = w_gen * gen + w_con * con
        terms, temperature = {"gen": gen, "con": con, **gauge(tokens, latent, batch["real"])}, 1 / model.scale().detach()
        if model.regress:                                    # the arm that collapses: nothing keeps the target from becoming constant
            with common.autocast(cfg, device):
                guess = model.regress(F.embedding(batch["slots"] - 1, x))
            error = (guess.float() - tokens.float()).square().mean((1, 2))
            terms["reg"] = torch.where(batch["real"], error, 0).sum() * world() / common.total(batch["real"].sum())
            loss = loss + terms["reg"]

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
    result.update(draw(model, tokenizer, cfg, device))
    evaluation.write(result, cfg)
    return result


if __name__ == "__main__":
    common.guard(lambda: main(common.parse(Config, DEMO, __doc__)))
