"""MUG (arXiv 2301.07088): one encoder pass over the visible quarter of an image feeds two decoders, pixels and caption.

    python mug.py                                                # trains on the built-in world, evaluates, draws
    python mug.py --data 'cc3m/*.tar' --val coco/ --size b       # your shards: KEY.jpg + KEY.txt
    torchrun --standalone --nproc_per_node 8 mug.py --data 'cc3m/*.tar'
    python mug.py --cap-weight 0                                 # exactly MAE; --recon-weight 0: a captioner of masked images

Read Config (what the run is), MUG.forward (the method, paper Algorithm 1), PixelDecoder and CaptionDecoder, then main.
Departures: the paper's tables were not available to us. (1) What Algorithm 1 leaves open is MAE's: encoder, pixel decoder, targets, recipe;
(2) both weights are 1; (3) the caption decoder is made of plain pre-norm blocks with learned positions and an untied head, where the authors'
demo has parallel multi-query blocks; (4) byte-level BPE stands for BERT's WordPiece.

Why two losses: for any decoders q, I(image, caption; code) >= const - (pixel loss + caption loss): the sum bounds what the code keeps of both.
Dimension key: B images of this rank, N patches, K kept ones, P values of a patch, L text tokens, D width, V vocabulary.
"""
import math
from dataclasses import dataclass
from functools import partial

import common                    # before torch: it sets how OpenMP waits
import torch
import torch.nn.functional as F
from torch import nn

import data
import eval as evaluation
from common import Block, CrossBlock, TextTransformer, UserError, ViT, averaging, lr_at, normalised, rank, run_blocks, sincos, unit, world
from data import Tokenizer


@dataclass
class Config:
    data: list = None            # training shards: files, folders, globs, {0..9} ranges; none = the built-in world
    val: list = None             # held-out shards: with captions -> captioning, with classes -> kNN, linear probe, classes named
    out: str = "runs/mug"        # checkpoints, log, results and pictures; a second start here resumes
    fresh: bool = False          # start anew in --out
    init: str = None             # file of timm-named encoder weights to start from; tells dim, depth, heads, patch unless they are given
    # encoder
    image_size: int = 224        # MAE; the authors' demo
    scale: float = 0.2           # MAE: least area of the random resized crop
    patch: int = 16              # the authors' demo
    size: str = None             # ti s b l h g: fills dim, depth, heads unless they are given
    dim: int = 768               # the authors' demo: ViT-B
    depth: int = 12              # ViT-B
    heads: int = 12              # ViT-B
    cls: bool = True             # MAE
    flip: bool = True            # MAE; turns left into right under captions that say so
    mask_ratio: float = 0.75     # MAE; default of the authors' demo
    # pixel decoder
    pixel_dim: int = 512         # MAE
    pixel_depth: int = 8         # MAE
    pixel_heads: int = 16        # MAE
    # caption decoder
    context: int = 40            # ours, in tokens
    vocab: str = None            # vocabulary file; none = train one on the first captions
    vocab_size: int = 30_522     # the authors' demo: BERT's size
    text_dim: int = 768          # the authors' demo
    text_depth: int = 3          # ours: causal layers on text alone
    cross_depth: int = 3         # ours: layers that also look at the image
    text_heads: int = 12         # the authors' demo
    # objective
    recon_weight: float = 1.0    # ours; 0 = no pixel decoder
    cap_weight: float = 1.0      # ours; 0 = no caption decoder
    # optimisation
    batch: int = 4096            # MAE, global
    steps: int = 250_000         # MAE: 800 epochs of ImageNet at this batch
    lr: float = 1.5e-4           # MAE: base rate for 256 images, scaled by batch / 256
    warmup: int = 12_500         # MAE: 40 epochs, in steps; at most a tenth of them
    schedule: str = "cosine"     # MAE; or linear
    wd: float = 0.05             # MAE
    grad_clip: float = 0.0       # MAE clips nothing; 0 = off
    seed: int = 0                # ours
    # machine
    micro: int = 0               # rows of a rank taken at a time, recomputed in backward; 0 = all
    grad_checkpoint: bool = False  # recompute every block in backward
    precision: str = "auto"      # bf16 where the device computes in it, else fp32
    compile: bool = None         # none = on for CUDA, off for CPU
    workers: int = None          # loader processes of a rank; none = its cores less one
    window: int = 64             # shards shuffled together
    save_every: int = 1000       # ours
    log_every: int = 10          # ours
    eval_every: int = 0          # steps between evaluations; 0 = at the end, -1 = never
    timeout: int = 600           # seconds a rank waits for the others


# The built-in world on two CPU cores. Neither crops nor flips: the scenes vary enough by themselves, and their captions say left and right.
DEMO = dict(image_size=48, patch=8, dim=128, depth=3, heads=4, pixel_dim=64, pixel_depth=2, pixel_heads=4, text_dim=64, text_depth=1, cross_depth=2,
            text_heads=2, context=24, vocab_size=512, flip=False, scale=1.0, batch=256, steps=700, lr=3e-3, warmup=60, save_every=200)


class PixelDecoder(nn.Module):
    """MAE's: visible tokens and copies of one mask token, put back in order, a narrow transformer, the pixels of every patch."""
    def __init__(self, latent_dim, cls, dim, depth, heads, grid, patch):
        super().__init__()
        self.cls, self.recompute = cls, False
        self.embed = nn.Linear(latent_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("position", sincos(grid, dim), persistent=False)                    # the class token's is zero
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, 3 * patch ** 2)
        self.apply(common.init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent, ids_restore):                  # latent (B, [1+]K, D), ids_restore (B, N) -> (B, N, P)
        lead, x = self.embed(latent).tensor_split([int(self.cls)], 1)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), ids_restore.shape[1] - x.shape[1], -1)], 1)
        x = x.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2])) + self.position
        x = run_blocks(self.blocks, torch.cat([lead.to(x.dtype), x], 1), recompute=self.recompute)
        return self.pred(self.norm(x[:, int(self.cls):]))


class CaptionDecoder(nn.Module):
    """Causal layers on the text alone, then layers that look at the encoder's tokens, in any order of these (Algorithm 1)."""
    def __init__(self, vocab, length, memory_dim, dim, depth, cross_depth, heads):
        super().__init__()
        self.recompute = False
        self.text = TextTransformer(vocab, length, dim, depth, heads, causal=True)
        self.blocks = nn.ModuleList(CrossBlock(dim, memory_dim, heads) for _ in range(cross_depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, vocab)
        self.blocks.apply(common.init_weights)
        self.head.apply(common.init_weights)

    def states(self, tokens, latent):                        # (B, L), (B, [1+]K, D) -> (B, L, Dt)
        return self.norm(run_blocks(self.blocks, self.text(tokens), latent, None, True, recompute=self.recompute))

    def forward(self, tokens, latent):                       # (B, L), (B, [1+]K, D) -> logits (B, L, V) of the next tokens
        return self.head(self.states(tokens, latent))

    @torch.no_grad()
    def generate(self, latent, length):
        """Greedy. Keys and values of what was written are kept, those of the image are made once. -> ids (B, length), PAD after EOS."""
        memories = [b.cross.memory(latent) for b in self.blocks]
        past_text, past = [[] for _ in self.text.blocks], [[] for _ in self.blocks]
        ids = torch.full((len(latent), 1), Tokenizer.BOS, device=latent.device)
        going = torch.ones_like(ids, dtype=torch.bool)
        while ids.shape[1] <= length and going.any():
            x = self.text(ids[:, -1:], at=ids.shape[1] - 1, past=past_text)
            for block, memory, seen in zip(self.blocks, memories, past):
                x = block(x, latent, memory=memory, past=seen)
            ids = torch.cat([ids, self.head(self.norm(x))[:, 0].argmax(1, keepdim=True).where(going, Tokenizer.PAD)], 1)
            going = going & (ids[:, -1:] != Tokenizer.EOS)   # each row ends for itself
        return F.pad(ids[:, 1:], (0, length + 1 - ids.shape[1]), value=Tokenizer.PAD)


class MUG(nn.Module):
    """MAE's encoder and pixel decoder, and a caption decoder that reads the same tokens."""
    def __init__(self, cfg):
        super().__init__()
        self.vision = ViT(cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads, cls=cfg.cls, fixed=True,
                          mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))                 # ImageNet's, as MAE
        self.n_keep, self.context = round(self.vision.grid ** 2 * (1 - cfg.mask_ratio)), cfg.context
        if not 1 <= self.n_keep <= self.vision.grid ** 2 - bool(cfg.recon_weight):
            raise UserError(f"--mask-ratio {cfg.mask_ratio} of {self.vision.grid ** 2} patches: at least one must stay, and with a pixel decoder one "
                            "must go (--recon-weight 0 does without); 0.75 is usual")
        if not cfg.recon_weight and not cfg.cap_weight:
            raise UserError("--recon-weight 0 and --cap-weight 0 leave nothing to learn: give one of them a value")
        # A loss of weight 0 has no decoder: AdamW would shrink its weights, and they would be saved.
        self.pixels = PixelDecoder(cfg.dim, cfg.cls, cfg.pixel_dim, cfg.pixel_depth, cfg.pixel_heads, self.vision.grid,
                                   cfg.patch) if cfg.recon_weight else None
        self.caption = CaptionDecoder(cfg.vocab_size, cfg.context, cfg.dim, cfg.text_dim, cfg.text_depth, cfg.cross_depth,
                                      cfg.text_heads) if cfg.cap_weight else None
        if not cfg.cap_weight:
            self.generate = self.score = self.fused = None   # so that eval.py asks for no captions
        for part in [self.vision] + [self.pixels] * bool(self.pixels) + [self.caption, self.caption and self.caption.text] * bool(self.caption):
            part.recompute = cfg.grad_checkpoint

    def forward(self, images, noise, tokens, valid):
        """Algorithm 1, sums for each image: pixel_loss (B,), its mean over removed patches, and caption_loss (B,), its sum over tokens.

        images (B, 3, S, S); noise (B, N), uniform: the patches of least noise are kept; tokens, valid (B, L), begin to end token.
        """
        order = noise.argsort(1)                             # ids_keep first; a fresh subset for each image
        patches = self.vision.patches(images)
        latent = self.vision(patches, order[:, :self.n_keep])
        pixel_loss = caption_loss = torch.zeros(len(images), device=images.device)
        if self.pixels:
            pred, target = self.pixels(latent, order.argsort(1)), normalised(patches)[0]
            error = (pred.to(target.dtype) - target).square().mean(2)                            # (B, N), float32 even under autocast
            pixel_loss = error.gather(1, order[:, self.n_keep:]).mean(1)                         # visible patches teach nothing
        if self.caption:
            caption_loss = token_loss(self.caption(tokens[:, :-1], latent), tokens, valid).sum(1)
        return pixel_loss, caption_loss

    def encode_image(self, images):                          # (B, 3, S, S) -> (B, D) unit
        return unit(self.vision.patch_tokens(images).mean(1))

    def generate(self, images, length=None):
        """Greedy captions of whole images: ids (B, length) without the begin token, PAD after the end token."""
        return self.caption.generate(self.vision(images), length or self.context - 1)

    def fused(self, images, tokens, valid):                  # (B, 3, S, S), (B, L) -> (B, Dt): the state at the end of a text about the image
        return common.at_end(self.caption.states(tokens, self.vision(images)), valid)

    def score(self, images, tokens, valid):
        """Mean log-probability of a caption's tokens given the whole image (B,)."""
        loss = token_loss(self.caption(tokens[:, :-1], self.vision(images)), tokens, valid)
        return -loss.sum(1) / valid[:, 1:].sum(1)

    @torch.no_grad()
    def reconstruct(self, images, noise):
        """Images (B, 3, S, S) in 0..1, masked ones (removed patches grey), and with removed patches as predicted. With normalised targets the
        network knows only a patch's pattern: its mean and deviation are taken from the original."""
        order, patches = noise.argsort(1), self.vision.patches(images)
        pred = self.pixels(self.vision(patches, order[:, :self.n_keep]), order.argsort(1)).to(patches.dtype)
        _, mean, std = normalised(patches)
        removed = (order.argsort(1) >= self.n_keep)[..., None]
        shown = [patches, torch.where(removed, 0.0, patches), torch.where(removed, pred * std + mean, patches)]
        return [(self.pictures(x) * self.vision.std + self.vision.mean).clamp(0, 1) for x in shown]

    def pictures(self, patches):
        """(B, N, P) -> (B, 3, S, S): the inverse of vision.patches."""
        g, p = self.vision.grid, self.vision.patch
        return patches.view(-1, g, g, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, g * p, g * p)


Model = MUG


def token_loss(logits, tokens, valid):
    """Cross-entropy of every next token (B, L-1), 0 at padding. logits (B, L-1, V) stand at the tokens before."""
    loss = F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), tokens[:, 1:].flatten(), reduction="none")
    return loss.view(valid[:, 1:].shape) * valid[:, 1:]


def example(sample, rng, cfg, tokenizer):
    """A training row: randomly cropped, maybe flipped image and one caption."""
    tokens, valid = tokenizer.pad(sample.caption(rng), cfg.context)
    image = sample.image(near=round(cfg.image_size / cfg.scale ** 0.5))
    box = data.random_box(rng, *image.size, cfg.scale)
    return {"images": data.crop(image, box, cfg.image_size, cfg.flip and rng.random() < 0.5), "tokens": tokens, "valid": valid}


@torch.no_grad()
def draw(model, tokenizer, cfg, device):
    """out/curves.png; out/reconstruction.png: eight images, what the encoder saw of them, their reconstruction, the caption of the whole."""
    index, title = evaluation.held_out(cfg)
    if rank():
        return
    terms = ["pixels"] * bool(model.pixels) + ["caption"] * bool(model.caption)
    evaluation.curves(f"{cfg.out}/log.jsonl", f"{cfg.out}/curves.png", ["loss", *terms, "lr", "grad_norm"], f"MUG, {cfg.steps} steps of {cfg.batch}")
    samples = evaluation.specimens(index, 8)
    images = torch.stack([torch.tensor(data.centre(s.image(), cfg.image_size)) for s in samples]).to(device)
    noise = torch.rand(8, model.vision.grid ** 2, generator=common.generator(cfg.seed)).to(device)
    with common.autocast(cfg, device):
        texts = [tokenizer.decode(ids) for ids in model.generate(images).tolist()] if model.caption else [""] * 8
        shown = [(255 * x).round().byte().cpu() for x in model.reconstruct(images, noise)] if model.pixels else [images.cpu()]
    words = [texts, ["seen by the encoder"] * 8, ["pattern predicted, mean true"] * 8]
    cells = [(shown[k][i], words[k][i], None) for i in range(8) for k in range(len(shown))]
    evaluation.sheet(cells, f"{cfg.out}/reconstruction.png", 2 * len(shown),
                     f"{title.capitalize()}: image with generated caption, what is seen of it, reconstruction", 128)


def main(cfg):
    """Train, evaluate, draw. Returns the metrics of the last evaluation."""
    device = common.start(cfg)
    cfg = data.with_world(cfg)
    state = common.resume(cfg, "MUG")
    index = data.open_index(data.expand(cfg.data))
    tokenizer = common.rank0_first(lambda: data.vocabulary(cfg, index, state))
    plan = data.Plan(index.starts, cfg.batch, cfg.seed, cfg.window)
    model = MUG(cfg).to(device)
    common.init_encoder(model.vision, cfg.init)
    opt = common.adamw(model, cfg, betas=(0.9, 0.95))        # MAE
    first, peak = common.restore(state, model, opt), cfg.lr * cfg.batch / 256                    # linear scaling rule, MAE
    rows = [data.Rows(index, plan, partial(example, cfg=cfg, tokenizer=tokenizer))]
    common.describe(cfg, device, model, rows, first, peak)
    batches = data.Loader(data.Batches(rows, cfg.batch, rank(), world()), first, cfg, device)
    forward = common.compiled(model, cfg, device)
    log = common.Log(cfg, device, first, data.REASONS)

    for step in range(first, cfg.steps):
        batch = log.next(batches)
        noise = common.to_device(common.row_noise(cfg, step, model.vision.grid ** 2), device)
        count = common.total(batch["valid"][:, 1:].sum())    # captions differ in length: a mean of the ranks' means would be another loss
        with common.autocast(cfg, device):
            pixels, captions = common.in_chunks(forward, cfg.micro, batch["images"], noise, batch["tokens"], batch["valid"])
        pixels, captions = pixels.mean(), captions.sum() * world() / count
        loss = cfg.recon_weight * pixels + cfg.cap_weight * captions
        terms = {**({"pixels": pixels} if cfg.recon_weight else {}), **({"caption": captions} if cfg.cap_weight else {})}
        temperature = None

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
