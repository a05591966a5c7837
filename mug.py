"""MUG (arXiv 2301.07088): one encoder pass over the visible patches of an image, a quarter of them,
feeds two decoders: one for the removed pixels and one for the caption.

    python mug.py                                             # toy data: trains, evaluates, draws
    python mug.py --data 'cc3m/*.tar' --val coco/ --size b    # your shards: KEY.jpg and KEY.txt
    torchrun --standalone --nproc_per_node 8 mug.py --data 'cc3m/*.tar'
    python mug.py --cap-weight 0      # MAE alone; --recon-weight 0: a captioner of masked images

Reading order: MUG.forward and losses (the method, paper Algorithm 1), PixelDecoder and
CaptionDecoder, main.

Departures from the paper, whose tables were not available to us:
- where Algorithm 1 leaves something open we follow MAE (arXiv 2111.06377): encoder, pixel decoder,
  targets, recipe
- both loss weights are 1
- the caption decoder has plain pre-norm blocks, a norm between those on the text alone and those
  that also attend to the image, learned positions and an untied head; the authors' demo has
  parallel multi-query blocks. It attends to all encoder tokens, the class token included
- byte-level BPE instead of BERT's WordPiece
- the first step of the warm-up has a rate of max_lr / warmup, MAE's has 0
- held-out images: short side to image_size, central crop; MAE crops 224 of 256 pixels

Dimension key: B images of this rank, S pixels a side, N patches, K kept ones, P numbers a patch,
L text tokens, D encoder width, W width of the caption decoder, V vocabulary.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import common
import data
from common import (Block, CrossBlock, TextTransformer, UserError, ViT, all_reduce_sum,
                    at_least_float32, l2_normalize, normalize_patches, rank, run_blocks, world_size)
from data import Tokenizer


@dataclass
class Config:
    # data and output
    data: list = None  # training shards: files, folders, globs, {0..9} ranges; none = toy data
    val: list = None  # held-out shards: captions -> captions, classes -> kNN, linear probe
    out: str = "runs/mug"  # checkpoint, log, results, pictures; a second start goes on here
    fresh: bool = False  # start anew in --out
    init: str = None  # weights to start from: a checkpoint, or an encoder under timm's names
    # encoder
    image_size: int = 224  # MAE; the authors' demo
    scale: float = 0.2  # MAE: smallest area of the random resized crop, as a share of the image
    patch: int = 16  # the authors' demo
    size: str = None  # ti s b l h 1b: sets dim, depth, heads
    dim: int = 768  # the authors' demo: ViT-B
    depth: int = 12  # ViT-B
    heads: int = 12  # ViT-B
    flip: bool = True  # MAE; makes captions that say left and right wrong
    mask_ratio: float = 0.75  # MAE; default of the authors' demo
    # pixel decoder
    pixel_dim: int = 512  # MAE
    pixel_depth: int = 8  # MAE
    pixel_heads: int = 16  # MAE
    # caption decoder
    context: int = 40  # ours, in tokens
    vocab: str = None  # vocabulary file; none = train one on the first captions
    vocab_size: int = 30_522  # the authors' demo: BERT's
    text_dim: int = 768  # the authors' demo
    text_depth: int = 3  # ours: causal layers on the text alone
    cross_depth: int = 3  # ours: causal layers that also attend to the image
    text_heads: int = 12  # the authors' demo, in its copy by LAION; the original differs
    # objective
    recon_weight: float = 1.0  # ours; 0 = no pixel decoder
    cap_weight: float = 1.0  # ours; 0 = no caption decoder
    # optimization
    batch: int = 4096  # MAE, global
    steps: int = 250_000  # MAE: 800 epochs of ImageNet at this batch
    lr: float = 1.5e-4  # MAE: for 256 images; scaled by batch / 256
    warmup: int = 12_500  # MAE: 40 epochs, in steps; at most a tenth of them
    wd: float = 0.05  # MAE
    grad_clip: float = 0.0  # MAE clips nothing; 0 = off
    seed: int = 0  # ours
    # machine
    micro: int = 0  # rows at a time through the model, recomputed in backward; 0 = all
    grad_checkpoint: bool = False  # recompute every block in backward
    precision: str = "auto"  # auto: bf16 on CUDA, fp32 on the CPU
    compile: bool = None  # none = on CUDA only
    workers: int = None  # loader processes of a rank; none = its cores less one
    save_every: int = 1000  # steps between checkpoints
    log_every: int = 10  # steps between lines of the log
    eval_every: int = 0  # steps between evaluations; 0 = at the end, -1 = never

    method = "MUG"
    # what --init takes from a checkpoint of this script
    model_fields = ("image_size", "patch", "dim", "depth", "heads", "pixel_dim", "pixel_depth",
                    "pixel_heads", "context", "vocab_size", "text_dim", "text_depth",
                    "cross_depth", "text_heads")


# Toy data on two CPU cores. No crops and no flips: captions say where things are. The encoder sees
# half of the patches, not a quarter, and pixels weigh less: captions teach more in a short run.
DEMO = dict(
    image_size=48, patch=8, dim=128, depth=3, heads=4, scale=1.0, flip=False, mask_ratio=0.5,
    pixel_dim=64, pixel_depth=2, pixel_heads=4, recon_weight=0.1,
    text_dim=64, text_depth=1, cross_depth=2, text_heads=2, context=24, vocab_size=512,
    batch=128, steps=720, lr=2e-3, warmup=60, save_every=100,
)


# ---- model ----

class PixelDecoder(nn.Module):
    """MAE's: kept and mask tokens in the image's order, a narrow transformer, pixels of patches."""

    def __init__(self, image_dim, dim, depth, heads, grid, patch, grad_checkpoint=False):
        super().__init__()
        self.grad_checkpoint = grad_checkpoint
        self.embed = nn.Linear(image_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = common.sincos_positions(grid, dim)  # of patches; the class token's is zero
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, 3 * patch**2)
        self.apply(common.init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent, ids_restore):
        """latent (B, 1+K, D): class token, then kept patches, shuffled; ids_restore (B, N)
        -> (B, N, P) in the order of the image."""
        x = self.embed(latent)
        cls = x[:, :1]
        kept = x[:, 1:]

        # mask tokens stand after the kept ones, as the removed patches do in ids_shuffle
        n_removed = ids_restore.shape[1] - kept.shape[1]
        x = torch.cat([kept, self.mask_token.expand(len(x), n_removed, -1)], 1)
        x = x.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[2]))
        x = x + self.positions

        x = torch.cat([cls, x], 1)
        x = run_blocks(self.blocks, x, grad_checkpoint=self.grad_checkpoint)
        return self.pred(self.norm(x[:, 1:]))


class CaptionDecoder(nn.Module):
    """Causal layers on the text alone, then layers that also attend to the encoder's tokens.

    Paper Algorithm 1. Image tokens may come in any order: the encoder has added their positions.
    """

    def __init__(self, vocab, length, image_dim, dim, depth, cross_depth, heads,
                 grad_checkpoint=False):
        super().__init__()
        self.grad_checkpoint = grad_checkpoint
        self.text = TextTransformer(vocab, length, dim, depth, heads, causal=True,
                                    grad_checkpoint=grad_checkpoint)
        self.cross_blocks = nn.ModuleList(
            CrossBlock(dim, image_dim, heads) for _ in range(cross_depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, vocab)
        self.cross_blocks.apply(common.init_weights)
        self.head.apply(common.init_weights)

    def hidden_states(self, tokens, latent):
        """tokens (B, L), latent (B, 1+K, D) -> (B, L, W); a state has seen the tokens up to it."""
        x = self.text(tokens)
        mask = None
        causal = True
        x = run_blocks(self.cross_blocks, x, latent, mask, causal,
                       grad_checkpoint=self.grad_checkpoint)
        return self.norm(x)

    def forward(self, tokens, latent):
        """tokens (B, L), latent (B, 1+K, D) -> logits (B, L, V) of the tokens that follow."""
        return self.head(self.hidden_states(tokens, latent))

    @torch.no_grad()
    def generate(self, latent, length):
        """Greedy captions: ids (B, length) without the begin token, PAD after the end token."""
        n_positions = len(self.text.pos_embed)
        assert length <= n_positions, f"{length} tokens do not fit {n_positions} positions"
        tokens = torch.full((len(latent), 1 + length), Tokenizer.PAD, device=latent.device)
        tokens[:, 0] = Tokenizer.BOS
        unfinished = torch.ones(len(latent), dtype=torch.bool, device=latent.device)
        for t in range(length):
            hidden_states = self.hidden_states(tokens[:, :t + 1], latent)
            token = self.head(hidden_states[:, -1]).argmax(1)  # (B,)
            tokens[:, t + 1] = torch.where(unfinished, token, Tokenizer.PAD)
            unfinished = unfinished & (token != Tokenizer.EOS)  # each row ends by itself
            if not unfinished.any():
                break
        return tokens[:, 1:]


class MUG(nn.Module):
    """MAE's encoder and pixel decoder, and a caption decoder that attends to the same tokens."""

    def __init__(self, cfg):
        super().__init__()
        self.recon_weight = cfg.recon_weight
        self.cap_weight = cfg.cap_weight
        self.context = cfg.context
        self.vision = ViT(cfg.image_size, cfg.patch, cfg.dim, cfg.depth, cfg.heads,
                          sincos_pos=True, grad_checkpoint=cfg.grad_checkpoint,
                          mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # MAE: ImageNet's
        n_patches = self.vision.grid**2
        self.n_keep = int(n_patches * (1 - cfg.mask_ratio))  # MAE: rounded down
        if self.n_keep < 1:
            raise UserError(f"--mask-ratio {cfg.mask_ratio} keeps none of {n_patches} patches: "
                            "0.75 is usual")
        if self.n_keep == n_patches and cfg.recon_weight:
            raise UserError(f"--mask-ratio {cfg.mask_ratio} removes none of {n_patches} patches, "
                            "and pixels are learned from removed ones: 0.75 is usual, and "
                            "--recon-weight 0 does without pixels")
        if not cfg.recon_weight and not cfg.cap_weight:
            raise UserError("--recon-weight 0 and --cap-weight 0 leave nothing to learn: "
                            "give one of them a value")

        # a loss of weight 0 has no decoder
        if cfg.recon_weight:
            self.pixel_decoder = PixelDecoder(
                cfg.dim, cfg.pixel_dim, cfg.pixel_depth, cfg.pixel_heads, self.vision.grid,
                cfg.patch, cfg.grad_checkpoint)
        if cfg.cap_weight:
            self.caption_decoder = CaptionDecoder(
                cfg.vocab_size, cfg.context, cfg.dim, cfg.text_dim, cfg.text_depth,
                cfg.cross_depth, cfg.text_heads, cfg.grad_checkpoint)
            # eval.py asks with hasattr what a model can do; without captions, none of these
            self.generate = self._generate
            self.score = self._score
            self.fused = self._fused

    def forward(self, images, noise, tokens, valid):
        """Algorithm 1 for each image -> pixel_loss (B,), a mean over removed patches, and
        caption_loss (B,), a sum over tokens; `losses`, below, weights and adds them.

        images (B, 3, S, S); noise (B, N), uniform: the K patches of least noise are kept;
        tokens, valid (B, L): begin token, text, end token, padding, where valid is False.
        """
        ids_shuffle = noise.argsort(1)  # (B, N), kept patches first
        ids_restore = ids_shuffle.argsort(1)
        ids_keep = ids_shuffle[:, :self.n_keep]
        ids_removed = ids_shuffle[:, self.n_keep:]
        latent = self.vision(images, ids_keep)  # (B, 1+K, D)
        pixel_loss = torch.zeros(len(images), device=images.device)
        caption_loss = torch.zeros(len(images), device=images.device)

        # pixels: squared error of the normalized pixels of removed patches (MAE)
        if self.recon_weight:
            pred = self.pixel_decoder(latent, ids_restore)  # (B, N, P)
            target, _, _ = normalize_patches(self.vision.patchify(images))  # float32
            error = (pred - target).square().mean(2)  # (B, N), float32 too under autocast
            pixel_loss = error.gather(1, ids_removed).mean(1)

        # caption: cross-entropy of each next token, given those before it and the visible patches
        if self.cap_weight:
            logits = self.caption_decoder(tokens[:, :-1], latent)  # (B, L-1, V)
            caption_loss = next_token_loss(logits, tokens, valid).sum(1)
        return pixel_loss, caption_loss

    def encode_image(self, images):
        """(B, 3, S, S) -> (B, D), unit length: the mean patch of the whole image."""
        return l2_normalize(self.vision.patch_tokens(images).mean(1))

    def held_out_view(self, image):
        """Short side to image_size, central crop (MAE: short side to 256, crop of 224)."""
        return data.center_crop(image, self.vision.image_size)

    def _generate(self, images, length=None):
        """Greedy captions of whole images: ids (B, length) without begin token, PAD after the end.

        length: in tokens; None = --context - 1, as in training, after the begin token.
        """
        if length is None:
            length = self.context - 1
        return self.caption_decoder.generate(self.vision(images), length)

    def _score(self, images, tokens, valid):
        """Mean log-probability of each caption's tokens given the whole image (B,)."""
        logits = self.caption_decoder(tokens[:, :-1], self.vision(images))
        loss = next_token_loss(logits, tokens, valid)
        return -loss.sum(1) / valid[:, 1:].sum(1)

    def _fused(self, images, tokens, valid):
        """Text about an image -> (B, W): the state at the end token. Captioning never reads it; the
        head of question answering trains it."""
        hidden_states = self.caption_decoder.hidden_states(tokens, self.vision(images))
        return common.last_token(hidden_states, valid)

    @torch.no_grad()
    def reconstruct(self, images, noise):
        """images (B, 3, S, S), noise (B, N) as in forward -> three tensors (B, 3, S, S) in 0..1:
        the images, the same with removed patches gray, and with removed patches as predicted.

        What is predicted is a patch's pattern; its mean and deviation are the original's.
        """
        ids_shuffle = noise.argsort(1)
        ids_restore = ids_shuffle.argsort(1)
        latent = self.vision(images, ids_shuffle[:, :self.n_keep])
        pred = self.pixel_decoder(latent, ids_restore)
        patches = self.vision.patchify(images)  # (B, N, P)
        _, mean, std = normalize_patches(patches)
        removed = (ids_restore >= self.n_keep)[..., None]  # (B, N, 1)
        masked = torch.where(removed, 0.0, patches)
        reconstructed = torch.where(removed, pred * std + mean, patches)
        pictures = [self.unpatchify(x) for x in (patches, masked, reconstructed)]
        return [(x * self.vision.std + self.vision.mean).clamp(0, 1) for x in pictures]

    def unpatchify(self, patches):
        """(B, N, P) -> normalized images (B, 3, S, S): the inverse of vision.patchify."""
        g = self.vision.grid
        p = self.vision.patch
        images = patches.view(-1, g, g, 3, p, p).permute(0, 3, 1, 4, 2, 5)
        return images.reshape(-1, 3, g * p, g * p)


# ---- objective ----

def next_token_loss(logits, tokens, valid):
    """Cross-entropy (B, L-1) of each token after the first, 0 at padding.

    logits (B, L-1, V): each predicted from the tokens before. tokens, valid (B, L).
    """
    targets = tokens[:, 1:]
    logits = at_least_float32(logits)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return loss.view(targets.shape) * valid[:, 1:]


def losses(pixel_loss, caption_loss, valid, cfg):
    """The last line of Algorithm 1: the weighted sum of both losses.

    pixel_loss, caption_loss (B,): of MUG.forward. valid (B, L). -> loss, {name: unweighted term} of
    the terms whose weight is not 0. Means over ranks are the loss and terms of the global batch.
    """
    pixels = pixel_loss.mean()
    # captions differ in length: a mean of the ranks' means would be another loss than the mean over
    # the tokens of all ranks
    n_tokens = all_reduce_sum(valid[:, 1:].sum())
    caption = caption_loss.sum() * world_size() / n_tokens
    loss = cfg.recon_weight * pixels + cfg.cap_weight * caption
    terms = {}
    if cfg.recon_weight:
        terms["pixels"] = pixels
    if cfg.cap_weight:
        terms["caption"] = caption
    return loss, terms


# ---- training ----

def example(sample, rng, cfg, tokenizer):
    """A training row: a random resized crop (MAE), maybe mirrored, and one caption."""
    caption = sample.caption(rng) if cfg.cap_weight else ""  # pixels alone need none
    tokens, valid = tokenizer.pad(caption, cfg.context)
    image = sample.image(min_size=round(cfg.image_size / cfg.scale**0.5))
    box = data.random_box(rng, *image.size, cfg.scale)
    flip = cfg.flip and rng.random() < 0.5
    return {"images": data.crop(image, box, cfg.image_size, flip), "tokens": tokens, "valid": valid}


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
    model = MUG(cfg).to(device)
    optimizer = common.adamw(model, cfg.wd, betas=(0.9, 0.95))  # MAE
    max_lr = cfg.lr * cfg.batch / 256  # MAE
    start_step, vocab = common.resume_from(cfg, model, optimizer)

    index = data.open_index(cfg.data)
    tokenizer = data.make_tokenizer(cfg, index if cfg.cap_weight else None, vocab)
    order = data.ShuffledOrder(index.starts, cfg.batch, cfg.seed)
    rows = data.TrainingSet(index, order, partial(example, cfg=cfg, tokenizer=tokenizer))
    dataset = data.BatchDataset([rows], cfg.batch, rank(), world_size())
    batches = data.loader(dataset, start_step, cfg.steps, cfg.workers, device)
    forward = common.compiled(model, cfg.compile, device)
    common.print_summary(cfg, device, model, [rows], start_step, max_lr)
    log = common.Log(cfg, start_step, data.REASONS, data.UNREADABLE)

    for step in range(start_step, cfg.steps):
        batch = next(batches)
        lr = common.cosine_lr(step, cfg.steps, cfg.warmup, max_lr)
        noise = common.batch_noise(cfg.seed, step, cfg.batch, model.vision.grid**2, device=device)
        with common.autocast(cfg.precision, device):
            pixel_loss, caption_loss = common.checkpointed_chunks(
                forward, cfg.micro, batch["images"], noise, batch["tokens"], batch["valid"])
        loss, terms = losses(pixel_loss, caption_loss, batch["valid"], cfg)

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
    """Metrics on cfg.val as {name: value}; prints them and writes out/result.json."""
    import eval as evaluation
    return evaluation.evaluate(model, tokenizer, cfg, device)


# ---- pictures: a reader may stop here ----

def draw(model, tokenizer, cfg, device):
    """out/curves.png and out/reconstruction.png."""
    import eval as evaluation
    index, title = evaluation.held_out_pairs(cfg)
    if rank() > 0:
        return
    fields = ["loss"]
    if cfg.recon_weight:
        fields.append("pixels")
    if cfg.cap_weight:
        fields.append("caption")
    evaluation.curves(f"{cfg.out}/log.jsonl", f"{cfg.out}/curves.png", [*fields, "lr", "grad_norm"],
                      f"MUG, {cfg.steps} steps of {cfg.batch}")
    views = [model.held_out_view(s.image()) for s in evaluation.pick_samples(index, 8)]
    images = torch.stack([torch.tensor(view) for view in views]).to(device)
    with common.autocast(cfg.precision, device):
        cells = reconstruction_cells(model, tokenizer, images, cfg.seed)
    columns = 2 * len(cells) // len(images)  # two images in a row
    contents = ["image"]
    if cfg.cap_weight:
        contents = ["image with generated caption"]
    if cfg.recon_weight:
        contents += ["what is seen of it", "reconstruction"]
    evaluation.sheet(cells, f"{cfg.out}/reconstruction.png", columns,
                     f"{title.capitalize()}: {', '.join(contents)}", size=144)


@torch.no_grad()
def reconstruction_cells(model, tokenizer, images, seed):
    """Cells of a sheet for each image: the image over the caption generated for it, what the
    encoder sees of it in training, and the rest as predicted."""
    captions = [""] * len(images)
    if model.cap_weight:
        captions = [tokenizer.decode(ids) for ids in model.generate(images).tolist()]
    pictures = [images.cpu()]
    if model.recon_weight:
        generator = common.generator(common.Stream.FIGURE, seed)
        noise = torch.rand(len(images), model.vision.grid**2, generator=generator)
        pictures = model.reconstruct(images, noise.to(images.device))
        pictures = [(255 * x).round().byte().cpu() for x in pictures]
    cells = []
    for i, caption in enumerate(captions):
        texts = [caption, "seen by the encoder", "pattern predicted, mean and contrast true"]
        for picture, text in zip(pictures, texts):
            cells.append((picture[i], text, None))
    return cells


if __name__ == "__main__":
    common.run(main, Config, DEMO, __doc__)
