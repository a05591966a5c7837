"""ALIGN (arXiv 2102.05918): a dual encoder on noisy alt-text, contrasted over the global batch.

    python align.py                                           # toy data: trains, evaluates, draws
    python align.py --data 'cc3m/*.tar' --val coco/ --size s  # your shards: KEY.jpg and KEY.txt
    torchrun --standalone --nproc_per_node 8 align.py --data 'cc3m/*.tar'
    python align.py --data coco/ --init runs/align/last.pt --out runs/coco \
        --batch 2048 --steps 6000 --lr 1e-5                   # fine-tune for retrieval, paper s5.1

Reading order: contrastive_loss (the method, Eq. 1-2), ALIGN (the model), Lamb, main.

Departures from the paper:
- ViT and a pre-norm text transformer instead of EfficientNet and BERT; no dropout
- 224 pixels instead of 289; byte-level BPE instead of WordPiece
- LAMB, of which the paper gives no details: biases and gains get no decay and no trust ratio,
  the temperature gets the ratio; q, k, v are one matrix and get one ratio
- the linear warm-up starts at lr / warmup, not at 0
- the outputs of all transformer branches start at a tenth of their usual size

Dimension key: B pairs of this rank, G of all ranks, S pixels a side, L text tokens, E = --dim.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import common
import data
from common import TextTransformer, ViT, all_gather_with_grad, l2_normalize, rank, world_size


@dataclass
class Config:
    # data and output
    data: list = None  # training shards: files, folders, globs, {0..9} ranges; none = toy data
    val: list = None  # held-out shards: captions -> retrieval, classes -> zero-shot, kNN, linear
    out: str = "runs/align"  # checkpoint, log, results, pictures; a second start goes on here
    fresh: bool = False  # start anew in --out
    init: str = None  # weights to start from: a checkpoint, or an encoder under timm's names
    # image tower
    image_size: int = 224  # ours; paper s5: 289 (EfficientNet)
    resize: float = 346 / 289  # paper s5: both sides to this multiple of image_size, then a crop
    patch: int = 16  # ViT
    size: str = None  # ti s b l h 1b: sets dim, depth, heads
    dim: int = 768  # ours: ViT-B for EfficientNet
    depth: int = 12  # ViT-B
    heads: int = 12  # ViT-B
    flip: bool = True  # paper s5
    # text tower
    context: int = 64  # paper s5, in tokens
    vocab: str = None  # vocabulary file; none = train one on the first captions
    vocab_size: int = 100_000  # paper s4.1
    text_dim: int = 768  # paper Tables 8-10: BERT-base
    text_depth: int = 12  # paper Tables 8-10: BERT-base
    text_heads: int = 12  # paper Tables 8-10: BERT-base
    # objective
    temperature: float = 1.0  # paper s5: initial value, learned as the divisor itself
    label_smoothing: float = 0.1  # paper s5
    # optimization
    batch: int = 16_384  # paper s5, global
    steps: int = 1_200_000  # paper s5
    lr: float = 1e-3  # paper s5
    warmup: int = 10_000  # paper s5, in steps; at most a tenth of them
    wd: float = 1e-5  # paper s5
    grad_clip: float = 0.0  # the paper names none; 0 = off
    seed: int = 0  # ours
    # machine
    micro: int = 0  # rows at a time through the towers, recomputed in backward; 0 = all
    chunk: int = 0  # rows of the logits at a time, recomputed in backward; 0 = all
    grad_checkpoint: bool = False  # recompute every block in backward
    precision: str = "auto"  # auto: bf16 on CUDA, fp32 on the CPU
    compile: bool = None  # none = on CUDA only
    workers: int = None  # loader processes of a rank; none = its cores less one
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 10  # steps between lines of the log
    eval_every: int = 0  # steps between evaluations; 0 = at the end, -1 = never

    method = "ALIGN"
    # what --init takes from a checkpoint of this script
    model_fields = ("image_size", "patch", "dim", "depth", "heads", "context", "vocab_size",
                    "text_dim", "text_depth", "text_heads")


# Toy data on two CPU cores. No crops and no flips: captions say left and right, and where things
# are. From a temperature of 1.0 a run of this length comes down to about 0.5 at best.
DEMO = dict(
    image_size=48, patch=8, dim=128, depth=3, heads=4, resize=1.0, flip=False,
    text_dim=64, text_depth=1, text_heads=2, context=16, vocab_size=512, temperature=0.07,
    batch=128, steps=500, lr=3e-3, warmup=40, save_every=100,
)


# ---- model ----

class ALIGN(nn.Module):
    """Two towers and a temperature (paper s4.1)."""

    def __init__(self, cfg):
        super().__init__()
        self.resize = cfg.resize
        # the class token is not pooled; it makes the encoder one that all scripts can start from
        self.vision = ViT(cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads,
                          grad_checkpoint=cfg.grad_checkpoint)
        self.text = TextTransformer(cfg.vocab_size, cfg.context, cfg.text_dim, cfg.text_depth,
                                    cfg.text_heads, causal=False,
                                    grad_checkpoint=cfg.grad_checkpoint)
        self.text_proj = nn.Linear(cfg.text_dim, cfg.dim)
        self.temperature = nn.Parameter(torch.tensor(cfg.temperature))
        common.init_weights(self.text_proj)
        # LAMB changes a matrix by a fixed share of its norm, so a branch that starts too large
        # shrinks slowly: they start small (ours, after CaiT's layer scale, arXiv 2103.17239)
        for block in [*self.vision.blocks, *self.text.blocks]:
            block.attn.proj.weight.data *= 0.1
            block.mlp.fc2.weight.data *= 0.1

    def encode_image(self, images):
        """(B, 3, S, S) -> (B, E), unit length: the mean patch, as the paper pools globally."""
        return l2_normalize(self.vision.patch_tokens(images).mean(1))

    def encode_text(self, tokens, valid):
        """(B, L) -> (B, E), unit length: the begin token, as [CLS], and one linear map."""
        return l2_normalize(self.text_proj(self.text(tokens, valid)[:, 0]))

    def forward(self, images, tokens, valid):
        return self.encode_image(images), self.encode_text(tokens, valid)

    def held_out_view(self, image):
        """Paper s5: squashed to a square, central crop."""
        return data.resize_and_crop(image, self.vision.image_size, full=self.resize)


# ---- objective ----

def contrastive_loss(image, text, temperature, label_smoothing=0.0, chunk=0):
    """Softmax cross-entropy over the global batch, image to text plus text to image (Eq. 1-2).

    image, text: (B, E) unit-length embeddings of this rank; row i of one belongs to row i of the
    other. temperature: 0-dim divisor. Each rank scores its own B rows against all G columns; the
    mean of the results over ranks is the loss. chunk > 0 keeps only that many rows of logits in
    memory and recomputes them in backward.
    """
    labels = rank() * len(image) + torch.arange(len(image), device=image.device)

    def one_direction(rows, columns):
        def row_losses(some_rows, some_labels):
            logits = some_rows @ columns.T / temperature  # (B or chunk, G)
            return F.cross_entropy(logits, some_labels, label_smoothing=label_smoothing,
                                   reduction="none")
        return common.checkpointed_chunks(row_losses, chunk, rows, labels).mean()

    image_to_text = one_direction(image, all_gather_with_grad(text))
    text_to_image = one_direction(text, all_gather_with_grad(image))
    return image_to_text + text_to_image


# ---- optimizer ----

class Lamb(torch.optim.Optimizer):
    """LAMB (arXiv 1904.00962, Algorithm 2, phi = identity, with bias correction).

    A tensor of two or more dimensions moves by lr * |w| * u / |u|, where u is Adam's update plus
    wd * w. So does the temperature, without wd: as u / |u| is 1 or -1, a step is a factor of 1 - lr
    or 1 + lr, and it stays positive. Biases and gains (1-D) get plain Adam steps.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, wd=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, wd=wd))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self.update(w, group)

    def update(self, w, group):
        beta1, beta2 = group["betas"]
        state = self.state[w]
        if not state:
            state["step"] = 0
            state["m"] = torch.zeros_like(w)
            state["v"] = torch.zeros_like(w)
        state["step"] += 1
        state["m"].lerp_(w.grad, 1 - beta1)
        state["v"].mul_(beta2).addcmul_(w.grad, w.grad, value=1 - beta2)
        m_hat = state["m"] / (1 - beta1 ** state["step"])
        v_hat = state["v"] / (1 - beta2 ** state["step"])
        u = m_hat / (v_hat.sqrt() + group["eps"])
        if w.ndim >= 2:
            u += group["wd"] * w
        if w.ndim != 1:  # two or more dimensions, or the temperature
            w_norm = w.norm()
            u_norm = u.norm()
            u *= torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)  # trust ratio
        w -= group["lr"] * u


def linear_lr(step, steps, warmup, max_lr):
    """Linear warm-up, at most a tenth of the run, then linearly to 0 (paper s5)."""
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return max_lr * (step + 1) / warmup
    return max_lr * (1 - (step - warmup) / (steps - warmup))


# ---- training ----

def example(sample, rng, cfg, tokenizer):
    """A training row: the image squashed, cropped, maybe mirrored, and one caption."""
    tokens, valid = tokenizer.pad(sample.caption(rng), cfg.context)
    image = sample.image(min_size=round(cfg.image_size * cfg.resize))
    image = data.resize_and_crop(image, cfg.image_size, rng, cfg.flip, cfg.resize)
    return {"images": image, "tokens": tokens, "valid": valid}


@common.owns_output_folder
def main(cfg):
    """Train, evaluate, draw. Returns the metrics of the last evaluation."""
    device = common.init_distributed()
    common.check_batch(cfg.batch)
    cfg = data.use_toy_data(cfg)
    if cfg.eval_every >= 0:
        import eval as evaluation  # only where something is evaluated or drawn
        evaluation.check_held_out(cfg)  # now, not after the last step
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    model = ALIGN(cfg).to(device)
    optimizer = Lamb(model.parameters(), wd=cfg.wd)
    start_step, vocab = common.resume_from(cfg, model, optimizer)

    index = data.open_index(cfg.data)
    tokenizer = data.make_tokenizer(cfg, index, vocab)
    order = data.ShuffledOrder(index.starts, cfg.batch, cfg.seed)
    rows = data.TrainingSet(index, order, partial(example, cfg=cfg, tokenizer=tokenizer))
    dataset = data.BatchDataset([rows], cfg.batch, rank(), world_size())
    batches = data.loader(dataset, start_step, cfg.steps, cfg.workers, device)
    forward = common.compiled(model, cfg.compile, device)
    common.print_summary(cfg, device, model, [rows], start_step, cfg.lr)
    log = common.Log(cfg, start_step, data.REASONS, data.UNREADABLE)

    for step in range(start_step, cfg.steps):
        batch = next(batches)
        lr = linear_lr(step, cfg.steps, cfg.warmup, cfg.lr)
        with common.autocast(cfg.precision, device):
            image, text = common.checkpointed_chunks(
                forward, cfg.micro, batch["images"], batch["tokens"], batch["valid"])
        # not in bfloat16
        loss = contrastive_loss(image, text, model.temperature, cfg.label_smoothing, cfg.chunk)
        terms = {"temperature": model.temperature.detach().clone()}

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
    return evaluation.evaluate(model, tokenizer, cfg, device)


# ---- pictures: a reader may stop here ----

def draw(model, tokenizer, cfg, device):
    """out/curves.png; out/retrieval.png: queries, their five nearest, the right ones framed."""
    import eval as evaluation
    index, title = evaluation.held_out_pairs(cfg)
    image, text, owner, ids = evaluation.embed_pairs(model, tokenizer, index, cfg, device)
    if rank() > 0:
        return
    evaluation.curves(f"{cfg.out}/log.jsonl", f"{cfg.out}/curves.png",
                      ["loss", "lr", "temperature", "grad_norm"],
                      f"ALIGN, {cfg.steps} steps of {cfg.batch}")
    # rows of image and text; owner (T,): the image of each text; ids (I,): its number in the index
    similarity = text @ image.T  # (T, I)
    first_text = torch.searchsorted(owner, torch.arange(len(image)))  # of each image
    n_nearest = min(5, len(image), len(text))

    def caption(t):
        captions = index[ids[owner[t]]].captions(lines=True)
        return captions[t - first_text[owner[t]]]

    def picture(i):
        return index[ids[i]].image()

    cells = []
    for i in torch.linspace(0, len(image) - 1, 6).long().tolist():
        t = int(first_text[i])
        cells.append((None, caption(t), None))
        for j in similarity[t].topk(n_nearest).indices.tolist():
            frame = "green" if j == i else None
            cells.append((picture(j), f"{similarity[t, j]:.2f}", frame))
        cells.append((picture(i), "", None))
        for u in similarity[:, i].topk(n_nearest).indices.tolist():
            frame = "green" if owner[u] == i else None
            cells.append((None, caption(u), frame))
    evaluation.sheet(cells, f"{cfg.out}/retrieval.png", 1 + n_nearest,
                     f"Query (left) and its nearest among {len(image)} {title}", size=128)


if __name__ == "__main__":
    common.run(main, Config, DEMO, __doc__)
