"""ALIGN (arXiv 2102.05918): a dual encoder on noisy alt-text; both directions of a softmax over the whole global batch.

    python align.py                                              # trains on the built-in world, evaluates, draws
    python align.py --data 'cc3m/*.tar' --val coco/ --size s     # your shards: KEY.jpg + KEY.txt
    torchrun --standalone --nproc_per_node 8 align.py --data 'cc3m/*.tar'

Read Config (what the run is), ALIGN (the model), contrastive_loss (the method), Lamb, then main.
Departures: (1) ViT and a pre-norm text transformer stand for EfficientNet and BERT; (2) 224 px, the paper has 289; (3) byte-level BPE, the
paper has WordPiece; (4) LAMB leaves 1-D tensors without decay and adaptation and keeps the temperature adapted: the paper does not say;
(5) the outputs of the transformers' branches start at a tenth of their usual size.

Dimension key: B pairs of this rank, G = B * ranks, N patches, L text tokens, D image width = E joint embedding.
"""
import math
from dataclasses import dataclass
from functools import partial

import common                    # before torch: it sets how OpenMP waits
import torch
import torch.distributed as dist
from torch import nn

import data
import eval as evaluation
from common import TextTransformer, ViT, averaging, lr_at, rank, unit, world


@dataclass
class Config:
    data: list = None            # training shards: files, folders, globs, {0..9} ranges; none = the built-in world
    val: list = None             # held-out shards: with captions -> retrieval, with classes -> zero-shot and kNN
    out: str = "runs/align"      # checkpoints, log, results and pictures; a second start here resumes
    fresh: bool = False          # start anew in --out
    init: str = None             # file of timm-named encoder weights to start from; tells dim, depth, heads, patch unless they are given
    # image tower
    image_size: int = 224        # ours; paper s5: 289 (EfficientNet)
    resize: float = 346 / 289    # paper s5: both sides to this multiple of image_size, then a crop
    patch: int = 16              # ViT
    size: str = None             # ti s b l h g: fills dim, depth, heads unless they are given
    dim: int = 768               # ours: ViT-B stands for EfficientNet
    depth: int = 12              # ViT-B
    heads: int = 12              # ViT-B
    cls: bool = True             # ViT keeps its class token; the embedding is the mean of the patches, as the paper pools globally
    flip: bool = True            # paper s5
    # text tower
    context: int = 64            # paper s5, in tokens
    vocab: str = None            # vocabulary file; none = train one on the first captions
    vocab_size: int = 100_000    # paper s4.1, trained on the corpus
    text_dim: int = 768          # paper T8-T10: BERT-base
    text_depth: int = 12         # paper T8-T10: BERT-base
    text_heads: int = 12         # paper T8-T10: BERT-base
    # objective
    temperature: float = 1.0     # paper s5: initial value, learned as the divisor itself
    label_smoothing: float = 0.1 # paper s5
    chunk: int = 0               # rows of the logits block at a time, recomputed in backward; 0 = all
    # optimisation
    batch: int = 16_384          # paper s5, global
    steps: int = 1_200_000       # paper s5
    lr: float = 1e-3             # paper s5
    warmup: int = 10_000         # paper s5, in steps; at most a tenth of them
    schedule: str = "linear"     # paper s5; or cosine
    wd: float = 1e-5             # paper s5
    grad_clip: float = 0.0       # the paper names none; 0 = off
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


# The built-in world on two CPU cores. From temperature 1.0 a short run would spend its time on the way down. Neither crops nor flips: the
# scenes vary enough by themselves, and their captions say left and right.
DEMO = dict(image_size=48, patch=8, dim=128, depth=3, heads=4, text_dim=64, text_depth=2, text_heads=2, context=16, vocab_size=512, flip=False,
            resize=1.0, temperature=0.07, batch=128, steps=640, lr=3e-3, warmup=40, save_every=200)


class ALIGN(nn.Module):
    """Two towers and a temperature (paper s4.1). The image embedding is the pooled tower itself; the text's [CLS] gets one linear map."""
    def __init__(self, cfg):
        super().__init__()
        self.resize = cfg.resize                             # held-out images are seen as in training: squashed, central crop (paper s5)
        self.vision = ViT(cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads, cls=cfg.cls)
        self.text = TextTransformer(cfg.vocab_size, cfg.context, cfg.text_dim, cfg.text_depth, cfg.text_heads, causal=False)
        self.text_proj = nn.Linear(cfg.text_dim, cfg.dim)
        self.temperature = nn.Parameter(torch.tensor(cfg.temperature))
        common.init_weights(self.text_proj)
        # Ours: the branches start at a tenth, as CaiT's scales do (arXiv 2103.17239). LAMB's steps are shares of a weight and shrink it slowly.
        for block in [*self.vision.blocks, *self.text.blocks]:
            for out in (block.attn.proj, block.mlp.fc2):
                out.weight.data *= 0.1
        self.vision.recompute = self.text.recompute = cfg.grad_checkpoint

    def encode_image(self, images):                          # (B, 3, S, S) -> (B, E) unit
        return unit(self.vision.patch_tokens(images).mean(1))

    def encode_text(self, tokens, valid):                    # (B, L) -> (B, E) unit; position 0 is the [CLS]
        return unit(self.text_proj(self.text(tokens, valid)[:, 0]))

    def forward(self, images, tokens, valid):
        return self.encode_image(images), self.encode_text(tokens, valid)


Model = ALIGN


class _Contrast(torch.autograd.Function):
    """z = image @ texts.T / temperature is the only block of logits: B rows of G. Rows are normalised here, columns with two all-reduces. In chunks,
    neither all of z nor all texts are ever in memory: those of each rank come in turn, in backward once more."""
    @staticmethod
    def forward(ctx, image, text, temperature, smoothing, chunk):
        scaled, rows, columns, total, kept = image / temperature, torch.full_like(image[:, 0], -math.inf), [], 0, []
        for texts in common.in_turn(text) if chunk else [common.all_gather(text)]:               # (B, E) of each rank, or (G, E)
            column = torch.full_like(texts[:, 0], -math.inf)
            for x, row in zip(scaled.split(chunk or len(image)), rows.split(chunk or len(image))):
                z = x @ texts.T                                                                  # (chunk, B) or (B, G)
                torch.logaddexp(row, z.logsumexp(1), out=row)
                column = torch.logaddexp(column, z.logsumexp(0))
            columns.append(column)
            total = total + texts.sum(0)
            kept = [] if chunk else [texts, z]
        columns = torch.cat(columns)
        if world() > 1:                                                                          # log-sum-exp over the ranks' rows
            top = columns.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX)
            mass = (columns - top).exp()
            dist.all_reduce(mass)
            columns = top + mass.log()
        ctx.save_for_backward(image, text, temperature, rows, columns, *kept)
        ctx.smoothing, ctx.chunk = smoothing, chunk
        right, mean = (scaled * text).sum(1), scaled @ total / len(columns)
        # Summed over ranks, the columns' smoothing term equals the rows': both are the sum of all logits over G.
        return (rows + columns.chunk(world())[rank()] - 2 * (1 - smoothing) * right - 2 * smoothing * mean).mean()

    @staticmethod
    def backward(ctx, grad):
        image, text, temperature, rows, columns, *kept = ctx.saved_tensors
        B, c, k, own = len(image), ctx.chunk or len(image), grad / (len(image) * temperature), 2 * (1 - ctx.smoothing)
        scaled, d_scale = image / temperature, own * (image * text).sum() / temperature
        d_image, d_text = -own * text, -own * k * image      # of each row's own logit; what all logits add follows
        for r, texts in enumerate(common.in_turn(text) if ctx.chunk else kept[:1]):
            d_texts, column = torch.zeros_like(texts), columns.split(len(texts))[r]
            for i in range(0, B, c):
                d_x, z = d_image[i:i + c], kept[1] if kept else scaled[i:i + c] @ texts.T
                g = (z - rows[i:i + c, None]).exp_()                                             # softmax over rows + over columns
                g.add_((z - column).exp_()).sub_(2 * ctx.smoothing / len(columns))
                torch.addmm(d_x, g, texts, out=d_x)
                torch.addmm(d_texts, g.T, image[i:i + c], out=d_texts)
                d_scale -= g.flatten() @ z.flatten()
                del z, g                                     # or the next z would be made beside them
            d_texts *= k
            d_text += common.sum_at(r, d_texts) if ctx.chunk else common.reduce_scatter(d_texts)
            del d_texts
        return d_image.mul_(k), d_text, d_scale * k, None, None


def contrastive_loss(image, text, temperature, label_smoothing=0.0, chunk=0):
    """Sum of the image-to-text and text-to-image softmax cross-entropies over the global batch (paper s4.1, Eq. 1-2).

    image, text: (B, E) unit rows of this rank's pairs; temperature: 0-dim divisor. Returns this rank's share: the mean over ranks is the
    loss, and gradients averaged over ranks are its gradients. Needs no process group. chunk: rows of logits alive at a time, against one
    rank's texts, recomputed in backward (0 = all, against all). One block of logits serves both directions (ours): half the memory of
    scoring rows and columns apart.
    """
    return _Contrast.apply(image, text, temperature, label_smoothing, chunk)


class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962, Algorithm 2, phi = identity, with bias correction; no clipping of norms).

    Layer adaptation for tensors with ndim >= 2 and for 0-dim ones (the temperature: its steps become multiplicative, so it stays positive);
    weight decay for ndim >= 2. Biases and gains get plain Adam steps.
    """
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, wd=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, wd=wd))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), eps = group["betas"], group["eps"]
            for w in (p for p in group["params"] if p.grad is not None):
                state = self.state[w]
                if not state:
                    state.update(step=0, m=torch.zeros_like(w), v=torch.zeros_like(w))
                state["step"] += 1
                m = state["m"].lerp_(w.grad, 1 - b1)
                v = state["v"].mul_(b2).addcmul_(w.grad, w.grad, value=1 - b2)
                update = (m / (1 - b1 ** state["step"])) / ((v / (1 - b2 ** state["step"])).sqrt_() + eps)
                if w.ndim >= 2:
                    update.add_(w, alpha=group["wd"])
                if w.ndim != 1:
                    norm, size = w.norm(), update.norm()
                    update *= torch.where((norm > 0) & (size > 0), norm / size, 1.0)
                w.add_(update, alpha=-group["lr"])


def example(sample, rng, cfg, tokenizer):
    """A training row: squashed, cropped, maybe flipped image and one caption."""
    tokens, valid = tokenizer.pad(sample.caption(rng), cfg.context)
    image = sample.image(near=round(cfg.image_size * cfg.resize))
    return {"images": data.squash(image, cfg.image_size, rng, cfg.flip, cfg.resize), "tokens": tokens, "valid": valid}


def draw(model, tokenizer, cfg, device):
    """out/curves.png; out/retrieval.png: queries with their five nearest, the right ones framed; out/similarity.png: 16 pairs."""
    index, title = evaluation.held_out(cfg)
    image, text, owner, ids = evaluation.embed_pairs(model, tokenizer, index, cfg, device)       # all ranks share this work
    if rank():
        return
    sim, first = text @ image.T, torch.searchsorted(owner, torch.arange(len(image)))             # first caption of each image
    picture = lambda i: index[ids[i]].image()
    caption = lambda t: index[ids[owner[t]]].captions(lines=True)[t - first[owner[t]]]
    cells, chosen = [], torch.linspace(0, len(image) - 1, 16).long().tolist()
    for i in chosen[::3]:                                    # a caption and its images, then an image and its captions
        t = first[i] + torch.argmax(torch.tensor([len(c) for c in index[ids[i]].captions(lines=True)]))
        cells += [(None, caption(t), None)] + [(picture(j), f"{sim[t, j]:.2f}", "green" if j == i else None) for j in sim[t].topk(5).indices]
        cells += [(picture(i), "", None)] + [(None, caption(u), "green" if owner[u] == i else None) for u in sim[:, i].topk(5).indices]
    evaluation.sheet(cells, f"{cfg.out}/retrieval.png", 6, f"Query (left) and its five nearest among {len(image)} {title}; right ones framed", 128)
    evaluation.matrix(sim[first[chosen]][:, chosen], f"{cfg.out}/similarity.png", [picture(i) for i in chosen], [caption(first[i]) for i in chosen],
                      f"Cosine of 16 {title}")
    evaluation.curves(f"{cfg.out}/log.jsonl", f"{cfg.out}/curves.png", ["loss", "lr", "temperature", "grad_norm"],
                      f"ALIGN, {cfg.steps} steps of {cfg.batch}")


def main(cfg):
    """Train, evaluate, draw. Returns the metrics of the last evaluation."""
    device = common.start(cfg)
    cfg = data.with_world(cfg)
    state = common.resume(cfg, "ALIGN")
    index = data.open_index(data.expand(cfg.data))
    tokenizer = common.rank0_first(lambda: data.vocabulary(cfg, index, state))
    plan = data.Plan(index.starts, cfg.batch, cfg.seed, cfg.window)
    model = ALIGN(cfg).to(device)
    common.init_encoder(model.vision, cfg.init)
    opt = Lamb(model.parameters(), wd=cfg.wd)
    first, peak = common.restore(state, model, opt), cfg.lr
    rows = [data.Rows(index, plan, partial(example, cfg=cfg, tokenizer=tokenizer))]
    common.describe(cfg, device, model, rows, first, peak)
    batches = data.Loader(data.Batches(rows, cfg.batch, rank(), world()), first, cfg, device)
    forward = common.compiled(model, cfg, device)
    log = common.Log(cfg, device, first, data.REASONS)

    for step in range(first, cfg.steps):
        batch = log.next(batches)
        with common.autocast(cfg, device):
            image, text = common.in_chunks(forward, cfg.micro, batch["images"], batch["tokens"], batch["valid"])
        loss = contrastive_loss(image, text, model.temperature, cfg.label_smoothing, cfg.chunk)
        terms, temperature = {}, model.temperature.detach().clone()

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
