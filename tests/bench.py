"""Speed and memory as ratios, each measured in one run beside its limit or peer: medians of interleaved repeats.

    python tests/bench.py                # all subjects but the long ones
    python tests/bench.py step contrast  # some of them
    python tests/bench.py step --profile # and where the rest of a step goes
    python tests/bench.py long           # does anything grow? some minutes, Linux
    python tests/bench.py large quality  # the loss of 32k and 64k pairs; how long until ALIGN's demo is good
    python tests/bench.py link           # gradients averaged over a 1 Gbit/s link: as root on Linux, which joins two network namespaces
    python tests/bench.py --peers        # beside open_clip and webdataset, which must be installed
    python tests/bench.py --gpu          # paper sizes on a GPU, beside its bf16 matrix products

Read the counted flops (align_flops and so on), drive (how a script's own steps are measured), then the subjects.
"""
import argparse, collections, contextlib, functools, gc, importlib, io, math, multiprocessing, os, shutil, statistics, sys, tarfile, tempfile, time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import align
import bench_gradients
import bench_plan
import data
import eval as evaluation
import lcl
import m3i
import mug
import timix
from common import ViT

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARED = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "shared", "data")
DOCS, PAIRS = os.path.join(SHARED, "docs", "train-*.tar"), os.path.join(SHARED, "pairs", "train-*.tar")
METHODS = {"align": align, "mug": mug, "lcl": lcl, "timix": timix, "m3i": m3i}


# ---- counted flops: of the matrix products of one training step of the whole batch ----
#
# A product of (m, k) and (k, n) is 2mnk. Backward is two such products, one for each operand: three times the forward in all, less the gradients
# nobody asks for: of the images (patch embedding), of fixed positions, of constants. Patches that a masked encoder does not see are not counted,
# decoders are, an averaged encoder counts forward alone. Attention counts its two products over all L x L pairs, causal or not; what a kernel
# computes again in backward is not counted, nor is what --micro and --grad-checkpoint do again.

def block_flops(rows, length, dim, depth, seen=None):
    """Forward of `depth` blocks on rows of `length` tokens: qkv 3 D^2, proj D^2, MLP 8 D^2, and two products with the `seen` tokens (all) each."""
    return rows * length * depth * (2 * 12 * dim ** 2 + 2 * 2 * (seen or length) * dim)


def cross_flops(rows, length, dim, depth, memory, memory_dim):
    """Forward of cross blocks: a block, q and proj of the cross-attention, keys and values of `memory` tokens, two products with these."""
    return (block_flops(rows, length, dim, depth)
            + rows * depth * (length * 2 * 2 * dim ** 2 + 2 * memory * memory_dim * 2 * dim + 2 * 2 * length * memory * dim))


def patch_flops(cfg, images, kept=None):
    """Forward of the patch embedding; its backward is as much: only the weight's gradient."""
    return 2 * images * (kept or grid(cfg)) * 3 * cfg.patch ** 2 * cfg.dim


def grid(cfg):                                               # patches of an image
    return (cfg.image_size // cfg.patch) ** 2


def vit_flops(cfg, images, kept=None, depth=None):
    """Forward of a ViT that sees `kept` patches (all) with `depth` blocks (all)."""
    return patch_flops(cfg, images, kept) + block_flops(images, (kept or grid(cfg)) + getattr(cfg, "cls", True), cfg.dim, depth or cfg.depth)


def align_flops(cfg, batch=None):
    """Both towers, the text's projection, one block of logits B x B."""
    B = cfg.batch
    text = block_flops(B, cfg.context, cfg.text_dim, cfg.text_depth) + 2 * B * cfg.text_dim * cfg.dim
    return 3 * (vit_flops(cfg, B) + text + 2 * B * B * cfg.dim) - patch_flops(cfg, B)


def mug_flops(cfg, batch=None):
    """The encoder on the kept patches; the pixel decoder on all; the caption decoder's causal and cross blocks and its head on L - 1 tokens."""
    B, N, K, L, d = cfg.batch, grid(cfg), round(grid(cfg) * (1 - cfg.mask_ratio)), cfg.context - 1, cfg.pixel_dim
    pixels = 2 * B * (K + cfg.cls) * cfg.dim * d + block_flops(B, N + cfg.cls, d, cfg.pixel_depth) + 2 * B * N * d * 3 * cfg.patch ** 2
    words = (block_flops(B, L, cfg.text_dim, cfg.text_depth) + cross_flops(B, L, cfg.text_dim, cfg.cross_depth, K + cfg.cls, cfg.dim)
             + 2 * B * L * cfg.text_dim * cfg.vocab_size)
    return 3 * (vit_flops(cfg, B, K) + pixels * bool(cfg.recon_weight) + words * bool(cfg.cap_weight)) - patch_flops(cfg, B, K)


def lcl_flops(cfg, batch, packed=False):
    """ViT and pool over the K images, blocks over the R rows, the head at the M labels, two blocks of logits between all images a batch can have.
    R, K and M are the batch's, with its padding. packed: attention counts only what a token of a document may see, as FlexAttention computes it."""
    (R, L), K, M, N, D, most = batch["ids"].shape, len(batch["images"]), len(batch["labels"]), grid(cfg), cfg.text_dim, cfg.batch * cfg.max_images
    pool = 2 * (1 + 2 * K * N) * cfg.dim * D + 2 * 2 * K * N * D + 2 * K * (N + 1) * D ** 2      # query, keys, values; attention; their projection
    seen = (batch["position"] + 1)[batch["doc"] >= 0].sum().item() / (R * L) if packed else L
    heads = 2 * K * D ** 2 + 2 * M * D * cfg.vocab_size + 2 * 2 * most ** 2 * D + 2 * K * N * D ** 2 * (cfg.objective == "gen+reg")
    return 3 * (vit_flops(cfg, K) + pool + block_flops(R, L, D, cfg.text_depth, seen) + heads) - patch_flops(cfg, K)


def timix_flops(cfg, batch=None):
    """A step with mixture and region images. Towers on clean pairs; fusion of 3 B pairs for matching; tower, fusion and word head for masked words;
    the first half of the image tower, text tower and patch predictor for regions; the predictor's opinion of the clean images, forward alone; the
    image tower on mixtures. The teacher: towers, fusion and word head, forward alone."""
    B, L, N, D, d, E, S = cfg.batch, cfg.context, grid(cfg), cfg.dim, cfg.text_dim, cfg.embed, cfg.batch // 2 * cfg.entries
    text, images, logits = block_flops(B, L, d, cfg.text_depth), vit_flops(cfg, B) + 2 * B * D * E, 2 * 2 * B * B * E
    fusion, words = cross_flops(B, L, d, cfg.fusion_depth, N + 1, D), 2 * B * (L // 2) * d * cfg.vocab_size
    towers = images + text + 2 * B * d * E + logits
    predictor = 2 * N * (D * D + (D + d) * (D // 2) + (D // 2) * (D // 4) + (D // 4) * 2)
    regions = vit_flops(cfg, B // 2, depth=(cfg.depth + 1) // 2 if cfg.tap is None else cfg.tap)
    regions += block_flops(S, L, d, cfg.text_depth) + S * predictor
    mixing = cfg.mix != "none"
    trained = towers + regions + mixing * (images + logits) + (cfg.base == "albef") * (3 * fusion + 2 * 3 * B * d * 2 + text + fusion + words)
    teacher = (cfg.base == "albef") * (towers + text + fusion + words + 2 * 2 * B * cfg.block * E)                 # and the search for rivals
    return 3 * trained - patch_flops(cfg, B + B // 2 + B * mixing) + mixing * B * predictor + teacher


def m3i_flops(cfg, batch=None):
    """A step with mixtures: encoder and projector on them; intra and inter decoders on own and asked tokens; targets by the averaged encoder and
    projector, forward alone, and their second moments; the text tower; heads and logits of both images."""
    B, N, D, d, units = cfg.batch, grid(cfg), cfg.dim, cfg.text_dim, (math.isqrt(grid(cfg)) // cfg.unit) ** 2
    k, weights, ema = int(units * cfg.keep) * cfg.unit ** 2, m3i.term_weights(cfg), cfg.target == "ema"
    out, seen = D if ema else 3 * cfg.patch ** 2, 1 + (k < N)                                    # width of the targets; images in a mixture
    views = [own for name, own in (("intra", k), ("inter", N - k)) if weights[name] and k < N]
    project, place = 2 * B * N * D * D + block_flops(B, N, D, cfg.projector_depth), 2 * B * N * 2 * D * D
    decode = sum(place + block_flops(B, own + N, D, cfg.decoder_depth) + 2 * B * N * D * out for own in views)
    moments = 2 * B * N * out * out                          # C = t't: no gradient; p C: p's gradient alone
    trained = vit_flops(cfg, B) + project * bool(views) + decode
    if weights["text"]:
        trained += block_flops(B, cfg.context, d, cfg.text_depth) + seen * 2 * B * (D * D + D * d + B * d)
    if weights["class"]:
        trained += seen * 2 * B * (2 * D * D + D * cfg.classes)
    constant = (ema * (vit_flops(cfg, B) + project) + moments * 3 - place) * len(views)
    return 3 * trained - patch_flops(cfg, B) + constant


FLOPS = {"align": align_flops, "mug": mug_flops, "lcl": lcl_flops, "timix": timix_flops, "m3i": m3i_flops}


# ---- a script's own steps ----

@functools.cache
def world():
    """A small world for the whole run, in a folder that goes with this process; indexes go there too."""
    folder = tempfile.TemporaryDirectory(prefix="bench-")
    world.folder = folder                                    # kept alive
    os.environ["XDG_CACHE_HOME"] = folder.name
    with quiet():
        return data.make_world(root=folder.name, scenes=2000, documents=600, parts=data.PARTS)


@contextlib.contextmanager
def quiet():
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def demo(name, **fields):
    """Config of a script's demo on the small world, never evaluated nor saved; fields: what differs."""
    where = {"docs": [f"{world()}/docs"]} if name == "lcl" else {"data": [f"{world()}/pairs"]}
    where.update({"labels": [f"{world()}/labels"]} if name == "m3i" else {})
    return configured(name, {**METHODS[name].DEMO, **where, **fields})


def configured(name, fields):
    return METHODS[name].Config(**{"out": f"{world()}/run-{name}", "fresh": True, "workers": 0, "eval_every": -1, "save_every": 10 ** 9, **fields})


class Done(Exception):
    pass


def drive(name, cfg, protocol):
    """Run a script's main() on its own first batch over and over. protocol(batch, losses), a generator, goes on before every step, and to its next
    yield; its end ends the run. So what lies between two yields is one step as it is: forward, loss, backward, optimizer, log."""
    following, telling, losses, going = common.Log.next, common.Log.step, [], []

    def wait(log, batches):
        if not going:
            batch = following(log, batches)
            going.extend([batch, protocol(batch, losses)])
        if next(going[1], Done) is Done:
            batches.close()
            log.close()
            raise Done
        return dict(going[0])

    def told(log, step, loss, *rest):
        losses.append(loss.detach())
        telling(log, step, loss, *rest)
    with mock.patch.object(common.Log, "next", wait), mock.patch.object(common.Log, "step", told), quiet(), contextlib.suppress(Done):
        METHODS[name].main(cfg)
        raise KeyboardInterrupt                              # main() came to its end by itself: a signal told it to


def now():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Products(TorchDispatchMode):
    """Notes the matrix products inside: {(operation, ((shape, strides, type) of each operand)): how often}. Attention is made of them meanwhile."""
    OPS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default}

    def __init__(self):
        super().__init__()
        self.seen, self.plain = collections.Counter(), sdpa_kernel(SDPBackend.MATH)

    def __enter__(self):
        self.plain.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.plain.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        plain = torch.ops.aten.addmm.default if func is torch.ops.aten.addmm.out else func       # one product, wherever its result goes
        if plain in self.OPS:
            self.seen[plain, tuple((x.shape, x.stride(), x.dtype) for x in args)] += 1
        return func(*args, **(kwargs or {}))


def alone(products):
    """Seconds that these products take by themselves, each as often as it was seen."""
    taken = 0.0
    for (func, operands), times in products.items():
        spans = [1 + sum((n - 1) * step for n, step in zip(shape, strides)) for shape, strides, _ in operands]
        tensors = [torch.randn(span, device=DEVICE).to(dtype).as_strided(shape, strides) for span, (shape, strides, dtype) in zip(spans, operands)]
        func(*tensors)
        began = now()
        for _ in range(times):
            func(*tensors)
        taken += now() - began
    return taken


def top(prof, most):
    """[(operation, share of all time spent in operations)] of a profile, the largest first."""
    cuda, events = DEVICE.type == "cuda", prof.key_averages()
    if cuda:                                                 # the kernels alone: the operations that started them claim their time too
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    return [(op[:60], t / sum(spent.values())) for op, t in sorted(spent.items(), key=lambda e: -e[1])[:most]]


def steps(names=tuple(METHODS), repeats=5, profiled=False, **fields):
    """A demo's step, whole, and the sum of its matrix products alone: how close is the step to its limit? Attention counts as the products it is
    made of, whose scores go to memory, as those of the fused kernel do not: so a step may come nearer to this limit than to the true one."""
    for name in names if DEVICE.type == "cpu" else [n for n in names if n != "lcl"]:              # no mode can look into FlexAttention
        taken, limit, where = [], [], []

        def protocol(batch, losses):
            yield                                            # the optimizer makes its state
            with Products() as products:
                yield
            for _ in range(repeats):
                began = now()
                yield
                taken.append(now() - began)
                limit.append(alone(products.seen))
            if profiled:
                with profile() as prof:
                    yield
                where.extend(top(prof, 8))
        drive(name, demo(name, compile=False, **fields), protocol)
        t = statistics.median(taken)
        yield f"{name} step of {1000 * t:.0f} ms: its matrix products alone / all of it", statistics.median(limit) / t, ">= 0.6"
        for op, share in where:
            yield f"{name} step, share of {op}", share, "-"


def seconds(routes, repeats=3):
    """{name: median seconds}, the routes taken in turn, after one round that does not count. A route that returns a float has timed itself."""
    taken = {name: [] for name in routes}
    for turn in range(repeats + 1):
        for name, route in routes.items():
            began = now()
            told = route()
            taken[name] += [told if isinstance(told, float) else now() - began] * (turn > 0)
    return {name: statistics.median(t) for name, t in taken.items()}


def forward_and_backward(module, *args):
    def route():
        module.zero_grad(set_to_none=True)
        with common.autocast(SimpleNamespace(precision="auto"), DEVICE):
            out = module(*args)
        out.float().square().mean().backward()
    return route


def mug_encoder():
    """Encoder of the visible quarter beside the whole, ViT-B/16 at 224."""
    model, images = ViT(224, 16, 768, 12, 12, fixed=True).to(DEVICE), torch.randn(4, 3, 224, 224, device=DEVICE)
    keep = torch.rand(4, 196, device=DEVICE).argsort(1)[:, :49]
    t = seconds({"quarter": forward_and_backward(model, images, keep), "whole": forward_and_backward(model, images)})
    yield "MUG encoder, ratio 0.75 / ratio 0", t["quarter"] / t["whole"], "<= 0.35"


def lcl_packing():
    """Rows of 2,048 tokens, images of 49: how full they are, and useful tokens a second through the language model."""
    index = data.Index(data.expand(DOCS))
    cfg = lcl.Config(image_size=112, context=2048, text_dim=128, text_depth=2, text_heads=2, vocab_size=8192)
    tokenizer, documents = data.Tokenizer.train(data.first_captions(index), cfg.vocab_size), []
    for i in range(len(index)):
        try:
            documents.append(lcl.example(index[i], data.rng_for(0, i), cfg, tokenizer))
        except data.Skip:
            pass
    fill = {}
    for pack in (True, False):
        cfg.pack, full = pack, []
        for start in range(0, len(documents) - 63, 64):
            full.append((lcl.pack(documents[start:start + 64], cfg)["doc"] >= 0).float().mean().item())
        fill[pack] = statistics.mean(full)
    yield "LCL fill of packed rows, real documents, 64 at a time", fill[True], ">= 0.85"
    yield "LCL fill of padded rows", fill[False], "-"
    blocks = torch.nn.ModuleList(common.Block(cfg.text_dim, cfg.text_heads) for _ in range(2)).to(DEVICE)
    routes, useful = {}, {}
    for pack in (True, False):
        cfg.pack = pack
        batch = lcl.pack(documents[:8], cfg)
        x, useful[pack] = torch.randn(*batch["ids"].shape, cfg.text_dim, device=DEVICE), (batch["doc"] >= 0).sum().item()
        mask = lcl.same_document(batch["doc"].to(DEVICE))
        routes[pack] = forward_and_backward(_Trunk(blocks), x, mask)
        fill[pack] = (batch["doc"] >= 0).float().mean().item()
    t = seconds(routes)
    gain = (useful[True] / t[True]) / (useful[False] / t[False])
    yield "LCL useful tokens a second, packed / padded, over the ratio of their fill", gain / (fill[True] / fill[False]), ">= 0.85"


class _Trunk(torch.nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x, mask):
        return common.run_blocks(self.blocks, x, mask)


def m3i_mixture():
    """One pass over a mixture of two images beside a masked pass for each, masked patches replaced (as a CNN must) or left out (as a ViT can)."""
    model, images = ViT(224, 16, 768, 12, 12).to(DEVICE), torch.randn(4, 3, 224, 224, device=DEVICE)
    keep = torch.rand(8, 196, device=DEVICE).argsort(1)[:, :98]
    t = seconds({"mixture": forward_and_backward(model, images), "replaced": forward_and_backward(model, images.repeat(2, 1, 1, 1)),
                 "left out": forward_and_backward(model, images.repeat(2, 1, 1, 1), keep)})
    yield "M3I encoder, one mixture / two masked passes, masked patches replaced", t["mixture"] / t["replaced"], "<= 0.6"
    yield "M3I encoder, one mixture / two masked passes, masked patches left out", t["mixture"] / t["left out"], "-"


def timix_mixed_pass():
    """What mixing adds to a step on clean pairs and region images: all of it, and what is not an encoder pass. ViT-S, the released proportions."""
    cfg = timix.Config(dim=384, heads=6, text_dim=384, text_heads=6, batch=16, block=16)
    model = timix.TiMix(cfg).to(DEVICE)
    n, L, R = model.vision.grid, cfg.context, cfg.batch // 2
    pictures = lambda rows: torch.randint(0, 256, (rows, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8, device=DEVICE)
    words = lambda *rows: torch.randint(8, 1000, (*rows, L), device=DEVICE)
    true = lambda *shape: torch.ones(*shape, dtype=torch.bool, device=DEVICE)
    batch = dict(images=pictures(cfg.batch), tokens=words(cfg.batch), valid=true(cfg.batch, L), region_images=pictures(R),
                 region_tokens=words(R, cfg.entries), region_valid=true(R, cfg.entries, L), region_patches=true(R, cfg.entries, n * n),
                 region_used=true(R, cfg.entries))
    noise = torch.rand(cfg.batch, 2 * L + 2 * cfg.block + n * n)

    def step(mixing):
        model.zero_grad(set_to_none=True)
        sum(timix.losses(model, batch, noise, common.generator(0), cfg, 1.0, mixing)[0].values()).backward()

    def mixing():
        mix = timix.text_aware_mix(batch["images"], noise[:, -n * n:].to(DEVICE), n // 2, cfg.block)
        timix.soft_labels(cfg.targets, mix, cfg.block, noise[:, :cfg.batch].to(DEVICE), noise[:, :cfg.batch].to(DEVICE))
    t = seconds({"clean": lambda: step(False), "mixed": lambda: step(True), "mixing": mixing})
    yield "TiMix, mixing alone (scores to images and labels) / step", t["mixing"] / t["mixed"], "<= 0.03"
    yield "TiMix, mixed pass / clean step", t["mixed"] / t["clean"] - 1, "<= 0.6"


# ---- the contrastive loss ----

def plain_loss(image, text, temperature, smoothing):
    """The loss as it is usually written: this rank's rows of both matrices."""
    own = common.rank() * len(image) + torch.arange(len(image), device=image.device)
    i2t, t2i = image @ common.gather(text).T / temperature, text @ common.gather(image).T / temperature
    return F.cross_entropy(i2t, own, label_smoothing=smoothing) + F.cross_entropy(t2i, own, label_smoothing=smoothing)


@contextlib.contextmanager
def as_rank(r, ranks, tables, columns=None):
    """Let this process pass for rank r of `ranks`, without the others. tables: [(own rows, the rows of all)], what gathering finds; columns (G,): the
    log-sum-exp of the columns over all rows, which two all-reduces would bring (none: they bring nothing, where only time and memory count)."""
    def all_gather(x):                                       # a copy, as a real one makes a tensor of its own
        return next(whole for own, whole in tables if own is x).detach().clone()

    def all_reduce(x, op=None):                              # the largest, then the sum of exp(column - largest)
        if columns is not None:
            x.copy_(columns) if op else x.fill_(1)

    def in_turn(x):                                          # in one buffer, as a real one; the others' rows are elsewhere and not counted
        buffer = torch.empty_like(x)
        for part in next(part for (own, _), part in zip(tables, parts) if own is x):
            yield buffer.copy_(part)
    parts, ours = [whole.detach().chunk(ranks) for _, whole in tables], {"rank": lambda: r, "world": lambda: ranks}
    fake = SimpleNamespace(all_reduce=all_reduce, ReduceOp=SimpleNamespace(MAX=1))
    passed = dict(all_gather=all_gather, reduce_scatter=lambda x: x.chunk(ranks)[r].clone(), in_turn=in_turn,
                  sum_at=lambda at, x: x if at == r else 0)
    with mock.patch.multiple(common, **passed, **ours), mock.patch.multiple(align, dist=fake, **ours):
        yield


class Memory:
    """The bytes that live at most inside, without those before: on the CPU counted by storages (m3i.Peak), on CUDA told by the allocator."""
    def __enter__(self):
        self.mode, self.before = m3i.Peak() if DEVICE.type != "cuda" else contextlib.nullcontext(), 0
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.mode.__enter__()
        return self

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        self.most = torch.cuda.max_memory_allocated() - self.before if DEVICE.type == "cuda" else self.mode.most


def pairs_of(B, D, ranks, r=0):
    """Unit embeddings of a global batch, and rank r's rows of them as leaves: [(own image, all images), (own text, all texts)], temperature."""
    tables = []
    for seed in (0, 1):
        whole = common.unit(torch.randn(B, D, generator=common.generator(seed))).to(DEVICE)
        tables.append((whole.chunk(ranks)[r].clone().requires_grad_(), whole))
    return tables, torch.tensor(0.07, device=DEVICE, requires_grad=True)


def routes_of(tables, temperature, chunk):
    """The two losses, forward and backward, with ALIGN's smoothing."""
    (image, _), (text, _) = tables

    def route(loss, *rest):
        image.grad = text.grad = temperature.grad = None
        value = loss(image, text, temperature, 0.1, *rest)
        value.backward()
        return value
    return {"ours": lambda: route(align.contrastive_loss, chunk), "plain": lambda: route(plain_loss)}


def contrast(sizes=((4096, 512), (16384, 512), (8192, 1024)), chunk=256, repeats=5, two=True):
    """One of 8 ranks, its B / 8 rows against B columns, then 2 real ones."""
    if DEVICE.type == "cuda":
        sizes = (*sizes, (32768, 512), (65536, 512), (65536, 1024))
    for B, D in sizes:
        tables, temperature = pairs_of(B, D, 8)
        routes = routes_of(tables, temperature, chunk)
        with as_rank(0, 8, tables):
            most = {}
            for name, route in routes.items():
                with Memory() as memory:
                    route()
                most[name] = memory.most
            with Products() as products:
                routes["ours"]()
            t = seconds({**routes, "products": lambda: alone(products.seen)}, repeats)
        what = f"contrastive_loss, {B} pairs, width {D}, one of 8 ranks, {chunk} rows at a time"
        yield f"{what}: memory ({most['ours'] / 2 ** 20:.0f} MiB) / plain's", most["ours"] / most["plain"], "<= 1/8"
        yield f"{what}: time / plain's", t["ours"] / t["plain"], "<= 1.3"
        yield f"{what}: time / its 4 products alone, one of them recomputed", t["ours"] / t["products"], "<= 1.6"
    if two and DEVICE.type == "cpu":
        yield from on_two_ranks(4096, 512, chunk)


def rank_of_two(B, D, chunk):
    """On a rank: the loss over the real group, and as as_rank() would have it: {route: seconds}, relative differences of value and gradients."""
    tables, temperature = pairs_of(B, D, 2, common.rank())
    (image, images), (text, texts) = tables
    columns = torch.cat([(images @ part.T / temperature.detach()).logsumexp(0) for part in texts.split(256)])
    real, found = routes_of(tables, temperature, chunk)["ours"], []

    def emulated():
        with as_rank(common.rank(), 2, tables, columns):
            return real()
    for route in (real, emulated):
        value = route().detach()
        found.append([value, image.grad])                    # the gradient of the texts is the sum of both ranks': an emulated rank has its own part
    return seconds({"real": real, "emulated": emulated}, 2), [((a - b).norm() / b.norm()).item() for a, b in zip(*found)]


def on_two_ranks(B, D, chunk):
    from conftest import Pool                                # processes as the tests have them
    pool = Pool(2)
    try:
        told = pool(rank_of_two, B, D, chunk)
    finally:
        pool.close()
    what = f"contrastive_loss, {B} pairs, width {D}, on 2 processes"
    yield f"{what}: time / one of 2 emulated", max(t["real"] for t, _ in told) / max(t["emulated"] for t, _ in told), "-"
    for i, part in enumerate(("value", "gradient of the images")):
        yield f"{what}: {part}, relative difference to the emulation, in millionths", 1e6 * max(d[i] for _, d in told), "<= 10"


# ---- the loader ----

_raws = []


def keep(raws, size):
    _raws[:] = [raws, size]


def bare(part):
    """Pillow alone: decode and resize every n-th of the kept images, starting with the i-th."""
    (i, n), (raws, size) = part, _raws
    near = round(size * 346 / 289)
    for raw in raws[i::n]:
        image = Image.open(io.BytesIO(raw))
        image.draft("RGB", (near, near))
        np.asarray(image.convert("RGB").resize((size, size), Image.BILINEAR))


def rate(batches, skip):
    """Images a second of an iterator over batches, after the first `skip`, in which its workers start."""
    sizes, ends = zip(*((len(batch), time.perf_counter()) for batch in batches))
    skip = max(1, min(skip, len(sizes) // 2))
    return sum(sizes[skip:]) / (ends[-1] - ends[skip - 1])


def of_loader(index, size, batch, workers, images):
    """Batches of our Loader, ALIGN's view."""
    plan = data.Plan(index.starts, batch, 0, 16)
    source = data.Rows(index, plan, functools.partial(data.view, near=round(size * 346 / 289), size=size))
    loader = data.Loader(data.Batches([source], batch), 0, SimpleNamespace(workers=workers, steps=images // batch), torch.device("cpu"))
    for _ in range(images // batch):
        yield next(loader)["image"]
    loader.close()


def real_pairs():
    """Index of the real shards beside the project, else of the small world's, and what to call them."""
    folder = world()                                         # its cache folder takes the index, too
    real = os.path.isdir(os.path.dirname(PAIRS))
    return data.Index(data.expand(PAIRS if real else f"{folder}/pairs")), "real" if real else "built-in"


def enlarged(index, images, times):
    """Index of a shard of these images at so many times their sides: those beside the project are smaller than pictures on the web."""
    path = f"{world()}/{times}.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(images):
            raw, image = io.BytesIO(), index[i].image()
            image.resize((image.width * times, image.height * times), Image.BICUBIC).save(raw, "JPEG", quality=90)
            data.add(tar, f"{i:06d}.jpg", raw.getvalue())
    return data.Index([path])


def loader(sizes=((96, 1), (224, 1), (224, 3)), images=1024, repeats=3):
    """In this process and with one worker beside Pillow in one process, with as many workers as cores beside as many processes."""
    found, kind = real_pairs()
    images, cores = min(images, len(found)), common.cores()
    for size, times in sizes:
        index = found if times == 1 else enlarged(found, images, times)
        raws = list(filter(None, (index[i].image_bytes() for i in range(images))))
        width = statistics.median(Image.open(io.BytesIO(raw)).width for raw in raws)
        for n in sorted({0, 1, cores}):
            rates, peers = collections.defaultdict(list), max(1, n)
            with multiprocessing.Pool(peers, keep, (raws, size)) as pool:
                for turn in range(repeats + 1):
                    began = time.perf_counter()
                    pool.map(bare, [(i, peers) for i in range(peers)], chunksize=1)
                    alone = len(raws) / (time.perf_counter() - began)
                    ours = rate(of_loader(index, size, 32, n, images), 2 * n)
                    rates["alone"] += [alone] * (turn > 0)
                    rates["ours"] += [ours] * (turn > 0)
            ours, alone = (statistics.median(rates[who]) for who in ("ours", "alone"))
            yield (f"loader, {n} worker(s), {kind} pairs, {width:.0f} px wide, to {size} px ({ours:.0f} images/s) / Pillow alone in {peers} "
                   "process(es)", ours / alone, ">= 0.90" if n else "-")


# ---- memory, time to quality ----

def step_memory(batches=(64, 256), **fields):
    """What a step of ALIGN's demo keeps at most, beside the plain one; and a billion parameters."""
    for batch in batches:
        most = {}
        for name, how in (("plain", {}), ("--grad-checkpoint", {"grad_checkpoint": True}), (f"--micro {batch // 8}", {"micro": batch // 8}),
                          ("both", {"grad_checkpoint": True, "micro": batch // 8})):
            def protocol(*_):
                yield                                        # the optimizer makes its state
                with Memory() as found:
                    yield
                most[name] = found.most
            drive("align", demo("align", batch=batch, **how, **fields), protocol)
            yield f"align step, batch {batch}, {name}: memory ({most[name] / 2 ** 20:.0f} MiB) / plain", most[name] / most["plain"], "-"
    if not fields:
        yield billion()


def billion(batch=64, micro=32):
    """M3I's ViT of 1.02 B parameters, counted by its own dry run: no weight is made."""
    cfg = m3i.Config(**dict(zip(("dim", "depth", "heads"), common.SIZES["g"])), patch=14, batch=batch, micro=micro, grad_checkpoint=True,
                     precision="bf16", data=["-"], classes=1000)
    total = m3i.memory(cfg, torch.device("cpu"))["total"]
    what = f"m3i ViT-g/14, {batch} rows a GPU, --micro {micro} --grad-checkpoint: memory ({total / 2 ** 30:.0f} GiB) / 80 GiB"
    return what, total / 2 ** 30 / 80, "<= 1"


def quality(share=0.8):
    """ALIGN's demo as it is, evaluated every 20 steps; the clock stands still meanwhile."""
    spent, reached = [], []
    folder = os.path.dirname(world())                        # index and vocabulary are made anew, as the demo does; its world is there before

    def evaluate(model, tokenizer, cfg, device):
        start = time.perf_counter()
        rows = evaluation.zeroshot(model, tokenizer, data.expand(f"{full}/labels", "test"), cfg, device)
        spent.append(time.perf_counter() - start)
        if dict(row[:2] for row in rows)["zeroshot_seen"] >= share:
            reached.append(start - began - sum(spent[:-1]))
            raise Done
        return {}
    with quiet():
        full = data.make_world(root=folder)
        began = time.perf_counter()
        with mock.patch.object(evaluation, "evaluate", evaluate), mock.patch.object(align, "draw"), contextlib.suppress(Done):
            align.main(align.Config(**{**align.DEMO, "data": [f"{full}/pairs"], "out": f"{folder}/quality", "eval_every": 20, "fresh": True}))
    yield f"align demo, seconds until {share:.0%} zero-shot on seen pairs ({len(spent)} evaluations not counted)", *(reached or [math.inf]), "half"


def long_runs():
    """20,000 loader batches, then 2,000 tiny steps, of their workers too: does anything grow? The last quarter beside the first."""
    def probe():                                             # of this process and its workers
        own, kilobytes, files, threads = os.getpid(), 0, 0, 0
        with open(f"/proc/{own}/task/{own}/children") as f:
            pids = [str(own), *f.read().split()]
        for pid in pids:
            with open(f"/proc/{pid}/status") as f:
                status = dict(line.split(":", 1) for line in f)
            kilobytes, threads = kilobytes + int(status["VmRSS"].split()[0]), threads + int(status["Threads"])
            files += len(os.listdir(f"/proc/{pid}/fd"))
        return kilobytes, files, threads

    def rows(name, seen):
        quarter = len(seen) // 4
        for what, column in zip(("resident memory", "open files", "threads"), zip(*seen)):
            ratio = statistics.mean(column[-quarter:]) / statistics.mean(column[:quarter])
            yield f"{name}, {what}: last quarter / first, {column[-1]:,} at the end", ratio, "<= 1.05"

    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        shards = data.make_world(root=folder, scenes=2000, parts=("pairs",)) + "/pairs"
        cfg = align.Config(data=[shards], val=[shards], out=f"{folder}/run", image_size=16, patch=8, dim=16, depth=1, heads=2, text_dim=16,
                           text_depth=1, text_heads=2, context=16, vocab_size=300, batch=4, steps=20_000, workers=1, eval_every=-1, save_every=100)
        index = data.Index(data.expand(cfg.data))
        source = data.Rows(index, data.Plan(index.starts, cfg.batch, 0, 64), functools.partial(align.example, cfg=cfg, tokenizer=data.Tokenizer()))
        batches, seen = data.Loader(data.Batches([source], cfg.batch), 0, cfg, torch.device("cpu")), []
        for step in range(cfg.steps):
            next(batches)
            seen += [probe()] if step % 100 == 50 else []
        batches.close()
        yield from rows("20,000 loader batches", seen)
        following, seen = common.Log.next, []
        common.Log.next = lambda log, batches: seen.append(probe()) or following(log, batches)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            align.main(replace(cfg, steps=2000))
        common.Log.next = following
        yield from rows("2,000 steps", seen)


# ---- peers ----

def peer(name):
    """A package that is no requirement of the project, so it is never imported by name."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"--peers needs open_clip_torch and webdataset, in an environment of their own ({error})", file=sys.stderr)
        sys.exit(2)


def beside_webdataset(size=96, images=1536, repeats=3):
    """The same shards, decoder and view, without and with one worker."""
    wds, (index, kind) = peer("webdataset"), real_pairs()
    near, images = round(size * 346 / 289), min(images, len(index))

    def decoded(sample):
        return data.view(data.Sample(sample["__key__"], {"jpg": sample["jpg"]}), rng, near, size)

    def of_webdataset(workers):
        source = wds.WebDataset(index.paths, shardshuffle=len(index.paths)).shuffle(1000, initial=100).map(decoded).batched(32, partial=False)
        source = wds.WebLoader(source, batch_size=None, num_workers=workers)
        for batch, _ in zip(source, range(images // 32)):
            yield torch.as_tensor(batch["image"])
    rng = np.random.default_rng(0)
    for n in (0, 1):
        rates = {"ours": [], "theirs": []}
        for turn in range(repeats + 1):
            rates["ours"] += [rate(of_loader(index, size, 32, n, images), 4)] * (turn > 0)
            rates["theirs"] += [rate(of_webdataset(n), 4)] * (turn > 0)
        ours, theirs = map(statistics.median, rates.values())
        yield f"loader, {n} worker(s), {kind} pairs to {size} px: {ours:.0f} images/s / webdataset's {theirs:.0f}", ours / theirs, ">= 1.3"


def beside_open_clip(batch=256, width=128, depth=4, size=48, patch=8, context=16, vocab=512, repeats=5):
    """Both towers, the loss, backward and an AdamW step at the same widths; compiled on CUDA. Theirs is causal over text, ours masks padding."""
    open_clip, heads = peer("open_clip"), width // 64
    clip = open_clip.model.CLIP(embed_dim=width, vision_cfg=dict(image_size=size, layers=depth, width=width, patch_size=patch, head_width=64),
                                text_cfg=dict(context_length=context, vocab_size=vocab, width=width, heads=heads, layers=depth))
    cfg = align.Config(image_size=size, patch=patch, dim=width, depth=depth, heads=heads, text_dim=width, text_depth=depth, text_heads=heads,
                       context=context, vocab_size=vocab, temperature=0.07)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=DEVICE)
    tokens, valid = torch.randint(1, vocab, (batch, context), device=DEVICE), torch.ones(batch, context, dtype=torch.bool, device=DEVICE)
    floating, routes, score = (images.float() / 255 - 0.5) / 0.5, {}, open_clip.loss.ClipLoss()
    ours = lambda model: align.contrastive_loss(*model(images, tokens, valid), model.temperature)
    theirs = lambda model: score(*model(floating, tokens))
    for name, model, loss in (("ours", align.ALIGN(cfg), ours), ("theirs", clip, theirs)):
        model = model.to(DEVICE)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        routes[name] = functools.partial(_step, common.compiled(model, cfg, DEVICE), loss, opt, cfg)
    t = seconds(routes, repeats)
    yield (f"align step, width {width}, {depth} layers, {size} px, batch {batch}: {batch / t['ours']:.0f} pairs/s / "
           f"open_clip's {batch / t['theirs']:.0f}"), t["theirs"] / t["ours"], ">= 1.4"
    if DEVICE.type == "cuda" and width < 768:
        yield from beside_open_clip(256, 768, 12, 224, 16, 77, 49_408)


def _step(model, loss, opt, cfg):
    opt.zero_grad(set_to_none=True)
    with common.autocast(cfg, DEVICE):
        value = loss(model)
    value.backward()
    opt.step()


# ---- GPU ----

# script, size, batch of one GPU (halved where it does not fit), goal: share of the ceiling
PAPER = (("align", "b", 512, ">= 0.55"), ("align", "l", 256, ">= 0.60"), ("mug", "b", 512, ">= 0.45"), ("lcl", "b", 128, ">= 0.45"),
         ("timix", "b", 128, ">= 0.45"), ("m3i", "b", 256, ">= 0.45"))


def ceiling(n=8192, times=20):
    """Flops a second of a bf16 product of two n x n matrices."""
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))

    def products():
        for _ in range(times):
            a @ b
    return times * 2 * n ** 3 / seconds({"products": products})["products"]


def paper(name, size, batch, **fields):
    """Config of a paper's recipe at a size, on the small world's data."""
    cfg = demo(name)
    where = {field: getattr(cfg, field) for field in ("data", "docs", "labels") if getattr(cfg, field, None)}
    return configured(name, {**dict(zip(("dim", "depth", "heads"), common.SIZES[size])), **where, "batch": batch, **fields})


def gpu(sizes=PAPER, n=8192, repeats=5, run=10, **fields):
    """Steps at paper sizes, bf16 and compiled: counted flops a second over the ceiling measured in the same call, their costs, where time goes."""
    for name, size, batch, goal in sizes:
        left = batch
        while left:
            try:
                yield from gpu_rows(name, paper(name, size, left, **{"precision": "bf16", **fields}), size, goal, n, repeats, run)
                break
            except torch.OutOfMemoryError:
                print(f"{name} {size}: a batch of {left} does not fit; half of it", file=sys.stderr)
            left //= 2
            afresh()


def afresh():
    """No model of before in memory, nor what was compiled for it, or shapes would be taken for variable."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()


def gpu_rows(name, cfg, size, goal, n, repeats, run):
    found, began = SimpleNamespace(taken=[], limit=[]), now()

    def protocol(batch, losses):
        ready = now()
        yield
        found.start, found.first, found.loss = now() - began, now() - ready, losses[0].item()
        counted = replace(cfg, classes=len(data.PAIRS)) if name == "m3i" else cfg
        found.flops = FLOPS[name](counted, batch, True) if name == "lcl" else FLOPS[name](counted, batch)
        for _ in range(2):                                   # what is still to be compiled or tuned
            yield
        with Memory() as memory:
            yield
        found.memory = memory.most + memory.before
        for _ in range(repeats):                             # several steps at a time: the host runs ahead of the device, as in training
            start = now()
            for _ in range(run):
                yield
            found.taken.append((now() - start) / run)
            found.limit.append(ceiling(n))
        with profile() as prof:
            yield
            now()
        found.top = top(prof, 8)

    def first_loss(batch, losses):
        yield
        found.exact = losses[0].item()

    def own_products(batch, losses):
        yield
        with Products() as products:
            yield
        found.alone = alone(products.seen)
    drive(name, cfg, protocol)
    afresh()
    step, limit = statistics.median(found.taken), statistics.median(found.limit)
    what = f"{name} ViT-{size.upper()}/{cfg.patch} {cfg.image_size} px, batch {cfg.batch}"
    yield (f"{what}: {found.flops / 1e12:.3g} Tflop in {1000 * step:.0f} ms / bf16 products of {n} x {n} ({limit / 1e12:.3g} Tflop/s)",
           found.flops / step / limit, goal)
    yield f"{what}: {'documents' if name == 'lcl' else 'images'} a second", cfg.batch / step, "-"
    yield f"{what}: peak memory, GiB", found.memory / 2 ** 30, "-"
    yield f"{what}: first step, compiling included, seconds", found.first, "-"
    yield f"{what}: from main() to the end of the first step, seconds", found.start, "-"
    for op, share in found.top:
        yield f"{what}: share of {op}", share, "-"
    plain = replace(cfg, micro=max(1, cfg.batch // 8), compile=None if name == "lcl" else False)     # float32 needs the room
    drive(name, replace(plain, precision="fp32"), first_loss)
    afresh()
    yield f"{what}: loss of the first step, bf16 / fp32 - 1", found.loss / found.exact - 1, "-"
    if name != "lcl" or DEVICE.type == "cpu":                # no mode can look into FlexAttention
        drive(name, plain, own_products)
        afresh()
        yield f"{what}: its own products alone, the forward's twice (--micro {plain.micro}) / step", found.alone / step, "-"


SUBJECTS = {"mug": mug_encoder, "lcl": lcl_packing, "m3i": m3i_mixture, "timix": timix_mixed_pass, "step": steps, "contrast": contrast,
            "loader": loader, "memory": step_memory, "plan": bench_plan.plan, "start": bench_plan.first_step,
            "gradients": bench_gradients.averaging_behind_backward, "link": bench_gradients.averaging_over_a_link, "quality": quality,
            "long": long_runs, "large": lambda: contrast(((32768, 512), (65536, 512)), repeats=1, two=False)}
LONG = ("large", "quality", "long", "link")                  # minutes each, or root's: only when named


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--profile", action="store_true", help="with `step`: its most expensive operations")
    parser.add_argument("--peers", action="store_true", help="beside open_clip and webdataset")
    parser.add_argument("--gpu", action="store_true", help="the papers' sizes on a GPU")
    args = parser.parse_args()
    if unknown := set(args.subjects) - SUBJECTS.keys():
        parser.error(f"{', '.join(unknown)}: choose of {', '.join(SUBJECTS)}")
    if args.gpu and DEVICE.type != "cuda":
        print("no GPU here: --gpu needs one that torch can use", file=sys.stderr)
        sys.exit(2)
    if "link" in args.subjects and (os.geteuid() or not (shutil.which("ip") and shutil.which("tc"))):
        print("link joins two network namespaces: it needs root and iproute2's ip and tc", file=sys.stderr)
        sys.exit(2)
    for package in ("open_clip", "webdataset") * args.peers:
        peer(package)
    tables = {name: SUBJECTS[name] for name in args.subjects or [s for s in SUBJECTS if s not in LONG]}
    if args.profile and "step" in tables:
        tables["step"] = functools.partial(steps, profiled=True)
    if args.peers or args.gpu:
        tables = {**({"gpu": gpu} if args.gpu else {}), **({"open_clip": beside_open_clip, "webdataset": beside_webdataset} if args.peers else {}),
                  **{name: tables[name] for name in args.subjects}}
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    precision = "bf16" if common.fast_bf16(DEVICE) else "fp32"
    print(f"{name}, torch {torch.__version__}, {precision}")
    for subject, rows in tables.items():
        print(f"\n{subject}\n\n| subject | measured | goal |\n|---|---|---|")
        for what, value, goal in rows():
            print(f"| {what} | {value:.3f} | {goal} |", flush=True)


if __name__ == "__main__":
    main()
