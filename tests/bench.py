"""Speed and memory, each number beside a limit or a peer that is measured in the same run.

    python tests/bench.py                # all subjects but compile: about five minutes on 2 cores
    python tests/bench.py loader loss    # some of them
    python tests/bench.py compile        # torch.compile for real: half a minute a script
    python tests/bench.py --peers        # a step beside open_clip's, which must be installed
    python tests/bench.py --gpu          # steps at the papers' sizes, compiled and eager
    python tests/bench.py step --tiny    # only to see that it runs

The last column is value / beside: of times and memory less is better, of images a second more.
Times are medians of repeats, after one that does not count. Memory is what was allocated at most,
without what was there before. A step is one of a script's own main(), at demo size, on its first
batch again and again. Everything but --gpu runs on the CPU.

Reading order: run_steps (how a script's steps are measured), the subjects, main.
"""
import argparse
import contextlib
import gc
import importlib
import importlib.util
import io
import itertools
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
import tracemalloc
import typing
import weakref
from dataclasses import replace
from functools import partial
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._dynamo.utils import counters, get_compilation_metrics
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import align
import common
import data
import eval as evaluation
import lcl
import m3i
import mug
import timix

SCRIPTS = {"align": align, "mug": mug, "lcl": lcl, "timix": timix, "m3i": m3i}
DATA = {  # which part of the toy data each field of Config takes
    "align": {"data": "pairs"},
    "mug": {"data": "pairs"},
    "lcl": {"docs": "docs"},
    "timix": {"data": "pairs"},
    "m3i": {"data": "pairs", "labels": "labels"},
}
CPU = torch.device("cpu")
MIB = 2**20


class Row(typing.NamedTuple):
    case: str
    value: float
    unit: str
    beside: float = None  # the peer's value
    peer: str = ""


# ---- how to measure ----

def now():
    """Seconds on a clock, after all that a GPU has still to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(fn):
    start = now()
    fn()
    return now() - start


def median_in_turn(routes, repeats):
    """{name: function that gives a number} -> {name: median of its numbers}, taken in turn."""
    numbers = {name: [] for name in routes}
    for _ in range(repeats + 1):
        for name, route in routes.items():
            numbers[name].append(route())
    return {name: statistics.median(values[1:]) for name, values in numbers.items()}


def median_seconds(routes, repeats):
    """{name: function} -> {name: median of the seconds that it takes}, taken in turn."""
    timed = {name: partial(seconds_of, route) for name, route in routes.items()}
    return median_in_turn(timed, repeats)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside; peak: the most that lived at a time."""

    def __init__(self):
        super().__init__()
        self.current = 0
        self.peak = 0
        self.known = weakref.WeakSet()

    def add(self, n_bytes):
        self.current += n_bytes
        self.peak = max(self.peak, self.current)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if kwargs is None:
            kwargs = {}
        result = op(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result


class MatrixProducts(TorchDispatchMode):
    """Counts the matrix products inside. Attention is made of two of them meanwhile, which its
    fused kernel would hide.

    counts: {(operation, (shape, strides) of each operand): how often}.
    """
    OPERATIONS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default,
                  torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)

    def __init__(self):
        super().__init__()
        self.counts = {}
        self.unfused_attention = sdpa_kernel(SDPBackend.MATH)

    def __enter__(self):
        self.unfused_attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.unfused_attention.__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in self.OPERATIONS:
            product = op, tuple((x.shape, x.stride()) for x in args)
            self.counts[product] = self.counts.get(product, 0) + 1
        if kwargs is None:
            kwargs = {}
        return op(*args, **kwargs)

    def seconds_alone(self):
        """Seconds that these products take by themselves, of random matrices."""
        seconds = 0.0
        for (op, operands), times in self.counts.items():
            matrices = []
            for shape, strides in operands:
                n = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides))
                matrices.append(torch.randn(n).as_strided(shape, strides))
            op(*matrices)  # the first one is slower
            start = now()
            for _ in range(times):
                op(*matrices)
            seconds += now() - start
        return seconds


# ---- a script's own steps ----

@contextlib.contextmanager
def quiet():
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def config(name, folder, recipe=None, **changes):
    """Config of a script on the toy data in `folder`: its demo, or another recipe."""
    fields = dict(SCRIPTS[name].DEMO if recipe is None else recipe)
    for field, part in DATA[name].items():
        fields[field] = [f"{folder}/{part}"]
    fields.update(changes)
    # the rate does not change what a step costs, but no loss must leave the finite numbers
    fields.update(out=f"{folder}/{name}", fresh=True, workers=0, eval_every=-1, lr=1e-6)
    return SCRIPTS[name].Config(**fields)


def run_steps(cfg, n, watch=None, same_batch=True, device=CPU):
    """n steps of a script's own main() -> seconds of each, and the last batch.

    Its loader is replaced by one that gives the first batch again and again, or, without
    same_batch, one after the other: between two batches lies a step. watch: a context manager
    around the second step; the first makes the optimizer's state.
    """
    make_loader = data.loader
    seconds = []
    batch = None

    def timed_loader(dataset, start_step, steps, workers, device):
        nonlocal batch
        batches = make_loader(dataset, start_step, steps, workers, device)
        for step in range(steps):
            if batch is None or not same_batch:
                batch = next(batches)
            context = contextlib.nullcontext()
            if step == 1 and watch is not None:
                context = watch
            with context:
                start = now()
                yield batch
                seconds.append(now() - start)

    cfg = replace(cfg, steps=n + 1)  # a step has ended when the next batch is asked for
    has_cuda = device.type == "cuda"
    with (quiet(), mock.patch.object(data, "loader", timed_loader),
          mock.patch.object(common, "save"),
          mock.patch.object(torch.cuda, "is_available", return_value=has_cuda)):
        SCRIPTS[cfg.method.lower()].main(cfg)
    if len(seconds) < n:
        raise KeyboardInterrupt  # main() has ended early: a signal
    return seconds, batch


def step_seconds(configs, n, rounds):
    """{name: Config} -> {name: median seconds of a step}: in turn n steps of each, `rounds` times,
    without the first of the n."""
    seconds = {name: [] for name in configs}
    for _ in range(rounds):
        for name, cfg in configs.items():
            taken, _ = run_steps(cfg, n)
            seconds[name] += taken[1:]
    return {name: statistics.median(taken) for name, taken in seconds.items()}


# ---- subjects: each yields rows; folder: of the toy data, and for files ----

def measure_step(folder, repeats=5, **fields):
    """Training steps beside the same matrix products alone.

    The unfused products of attention write its scores to memory, so that a step may come nearer to
    this limit than to the true one.
    """
    for name in SCRIPTS:
        products = MatrixProducts()
        seconds, _ = run_steps(config(name, folder, **fields), 2 + repeats, products)
        alone = [products.seconds_alone() for _ in range(repeats)]
        yield Row(f"{name}.py", 1000 * statistics.median(seconds[2:]), "ms",
                  1000 * statistics.median(alone), "its products")


def write_pictures(path, n, short_side):
    """A shard of n JPEGs as the web has them: 4 to 3, upright or not, some 2 bits for a pixel."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            size = (short_side * 4 // 3, short_side)  # width, height
            if i % 2:
                size = size[::-1]
            coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
            pixels = np.array(coarse.resize(size, Image.BICUBIC)).astype(int)
            pixels += rng.integers(-12, 13, (*pixels.shape[:2], 1))
            raw = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(raw, "JPEG", quality=85)
            data.add(tar, f"{i:06d}.jpg", raw.getvalue())


def picture_row(sample, rng, size):
    """ALIGN's view, without the caption."""
    image = sample.image(min_size=round(size * 346 / 289))
    return {"images": data.resize_and_crop(image, size, rng)}


def images_per_second(batches, skip):
    """Of an iterator over batches, after the first `skip`, in which its workers start."""
    for _ in range(skip):
        next(batches)
    start = time.perf_counter()
    n_images = sum(len(batch["images"]) for batch in batches)
    return n_images / (time.perf_counter() - start)


def loader_rate(index, size, batch, steps, workers):
    order = data.ShuffledOrder(index.starts, batch, seed=0)
    rows = data.TrainingSet(index, order, partial(picture_row, size=size))
    dataset = data.BatchDataset([rows], batch)
    skip = 2 + 2 * workers
    return images_per_second(data.loader(dataset, 0, skip + steps, workers, CPU), skip)


def webdataset_rate(index, size, batch, steps):
    """webdataset's pipeline over the same shards in one process, with our decoder and view."""
    webdataset = importlib.import_module("webdataset")  # no package that the project needs
    rng = np.random.default_rng(0)

    def row(sample):
        return picture_row(data.Sample(sample["__key__"], {"jpg": sample["jpg"]}), rng, size)

    shards = webdataset.WebDataset(index.paths, shardshuffle=False).repeat()
    batches = shards.shuffle(1000).map(row).batched(batch)
    return images_per_second(itertools.islice(batches, 2 + steps), skip=2)


def decode(raws, size):
    """Pillow alone: JPEGs to the same view, cropped at the center -> seconds."""
    start = time.perf_counter()
    for raw in raws:
        image = Image.open(io.BytesIO(raw))
        image.draft("RGB", (round(size * 346 / 289), round(size * 346 / 289)))
        x = image.width * (1 - 289 / 346) / 2
        y = image.height * (1 - 289 / 346) / 2
        box = (x, y, image.width - x, image.height - y)
        np.asarray(image.resize((size, size), Image.BILINEAR, box=box))
    return time.perf_counter() - start


def pillow_rate(pool, raws, size, processes):
    parts = [(raws[i::processes], size) for i in range(processes)]
    return len(raws) / max(pool.starmap(decode, parts, chunksize=1))


def measure_loader(folder, n=256, short_side=400, size=224, batch=32, steps=24, repeats=3):
    """The loader beside bare Pillow in as many processes, on pictures of web size; and beside
    webdataset if that is installed."""
    path = f"{folder}/pictures.tar"
    write_pictures(path, n, short_side)
    index = data.Index([path])
    raws = [index[i].image_bytes() for i in range(n)]
    case = f"{short_side} px to {size}"
    for workers in sorted({1, common.cpu_count()}):
        with multiprocessing.Pool(workers) as pool:
            rates = median_in_turn({
                "ours": partial(loader_rate, index, size, batch, steps, workers),
                "Pillow": partial(pillow_rate, pool, raws, size, workers),
            }, repeats)
        yield Row(f"{case}, {workers} worker(s)", rates["ours"], "images/s", rates["Pillow"],
                  "Pillow")
    if importlib.util.find_spec("webdataset") is None:
        return
    rates = median_in_turn({
        "ours": partial(loader_rate, index, size, batch, steps, workers=0),
        "webdataset": partial(webdataset_rate, index, size, batch, steps),
    }, repeats)
    yield Row(f"{case}, in one process", rates["ours"], "images/s", rates["webdataset"],
              "webdataset")


def make_index(paths):
    """Index shards of which nothing is cached."""
    with tempfile.TemporaryDirectory() as cache:
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=cache):
            data.Index(paths)


def read_headers(paths):
    for path in paths:
        with tarfile.open(path) as tar:
            for _ in tar:
                pass


def python_memory(fn, *args):
    """Bytes that Python and numpy have allocated at most in fn(*args)."""
    tracemalloc.start()
    fn(*args)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def measure_index(folder, n_members=10_000, repeats=3):
    """Indexing of ten shards of small members beside tarfile's own loop over them."""
    paths = [f"{folder}/small-{i}.tar" for i in range(10)]
    for path in paths:
        with tarfile.open(path, "w") as tar:
            for i in range(n_members // 2):
                data.add(tar, f"{i:06d}.jpg", bytes(100))
                data.add(tar, f"{i:06d}.txt", b"a caption")
    seconds = median_seconds({
        "ours": partial(make_index, paths),
        "tarfile": partial(read_headers, paths),
    }, repeats)
    case = f"10 shards of {n_members:,} members"
    yield Row(case, seconds["ours"], "s", seconds["tarfile"], "tarfile")
    yield Row(f"{case}, memory", python_memory(make_index, paths) / MIB, "MiB",
              python_memory(make_index, paths[:1]) / MIB, "1 shard")


def made_up_scan(path, n_samples):
    """What data.scan would find in a shard of samples of two files each."""
    members = np.zeros(2 * n_samples, data.MEMBER)
    members["sample"] = np.arange(2 * n_samples) // 2
    members["suffix"] = np.arange(2 * n_samples) % 2
    samples = np.zeros(n_samples, data.SAMPLE)
    samples["member"] = 2 * np.arange(n_samples)
    samples["key"] = 8 * np.arange(n_samples)
    return data.Scan(members, samples, b"00000000" * n_samples, ["jpg", "txt"], {})


def first_batch(paths, step, batch):
    """What a start does before it decodes: open the index, find the samples of a batch, read their
    files (which are empty here)."""
    index = data.Index(paths)
    order = data.ShuffledOrder(index.starts, batch, seed=0)
    for row in range(batch):
        index[order(step, row)]


def measure_order(folder, n_shards=1000, per_shard=10_000, batch=4096):
    """Start, and resume in a later epoch, in an order of 10^7 samples, whose shards are made up.

    The index takes 0.9 GB in the temporary folder.
    """
    def map_here(fn, *columns, **options):  # other processes would not know the patched scan
        return map(fn, *columns)

    epoch = n_shards * per_shard // batch  # steps
    with tempfile.TemporaryDirectory(dir=folder) as shards:
        paths = [f"{shards}/{i:06d}.tar" for i in range(n_shards)]
        for path in paths:
            open(path, "wb").close()
        with (mock.patch.dict(os.environ, XDG_CACHE_HOME=shards),
              mock.patch.object(data, "scan", partial(made_up_scan, n_samples=per_shard)),
              mock.patch.object(data, "parallel_map", map_here)):
            data.Index(paths)
            seconds = median_seconds({
                "start": partial(first_batch, paths, 0, batch),
                "resume": partial(first_batch, paths, 3 * epoch + epoch // 2, batch),
            }, repeats=3)
    case = f"{n_shards * per_shard:,} samples"
    yield Row(f"{case}, start", seconds["start"], "s")
    yield Row(f"{case}, resume in epoch 3", seconds["resume"], "s", seconds["start"], "start")


def two_matrices(image, text, temperature, label_smoothing):
    """The contrastive loss as it is usually written."""
    labels = torch.arange(len(image))
    image_to_text = image @ text.T / temperature
    text_to_image = text @ image.T / temperature
    return (F.cross_entropy(image_to_text, labels, label_smoothing=label_smoothing)
            + F.cross_entropy(text_to_image, labels, label_smoothing=label_smoothing))


def measure_loss(folder, sizes=(1024, 2048, 4096), width=512, chunk=256, repeats=3):
    """align.contrastive_loss, forward and backward, beside the plain form."""
    for n in sizes:
        image = common.l2_normalize(torch.randn(n, width)).requires_grad_()
        text = common.l2_normalize(torch.randn(n, width)).requires_grad_()
        temperature = torch.tensor(0.07, requires_grad=True)

        def forward_and_backward(fn):
            for x in (image, text, temperature):
                x.grad = None
            fn(image, text, temperature, label_smoothing=0.1).backward()

        routes = {"plain": partial(forward_and_backward, two_matrices)}
        for rows in (0, chunk):
            fn = partial(align.contrastive_loss, chunk=rows)
            routes[f"--chunk {rows}"] = partial(forward_and_backward, fn)
        seconds = median_seconds(routes, repeats)
        memory = {}
        for name, route in routes.items():
            with PeakMemory() as meter:
                route()
            memory[name] = meter.peak / MIB
        for name in (f"--chunk {rows}" for rows in (0, chunk)):
            yield Row(f"{n:,} pairs, {name}", 1000 * seconds[name], "ms", 1000 * seconds["plain"],
                      "two matrices")
            yield Row(f"{n:,} pairs, {name}, memory", memory[name], "MiB", memory["plain"],
                      "two matrices")


def measure_packing(folder, context=512, rounds=2, **fields):
    """LCL's rows with several documents in each beside rows of one, of the same batch."""
    configs = {}
    fill = {}
    for pack in (True, False):
        configs[pack] = config("lcl", folder, **fields, context=context, pack=pack)
        _, batch = run_steps(configs[pack], 1)
        fill[pack] = 100 * (batch["document"] >= 0).float().mean().item()
    seconds = step_seconds(configs, n=3, rounds=rounds)
    yield Row(f"rows of {context} tokens, filled to", fill[True], "%", fill[False], "not packed")
    yield Row("lcl.py step", 1000 * seconds[True], "ms", 1000 * seconds[False], "not packed")


def measure_masked(folder, image_size=224, dim=768, depth=12, heads=12, n=4, repeats=2):
    """MUG's encoder, forward and backward, on a quarter of the patches beside all of them."""
    model = common.ViT(image_size, 16, dim, depth, heads)
    images = torch.randn(n, 3, image_size, image_size)
    n_patches = model.grid**2
    quarter = torch.rand(n, n_patches).argsort(1)[:, :n_patches // 4]

    def forward_and_backward(ids_keep):
        model.zero_grad()
        model(images, ids_keep).square().mean().backward()

    seconds = median_seconds({
        "quarter": partial(forward_and_backward, quarter),
        "all": partial(forward_and_backward, None),
    }, repeats)
    yield Row(f"width {dim}, {depth} blocks, {n} images of {image_size} px",
              1000 * seconds["quarter"], "ms", 1000 * seconds["all"], "all patches")


def measure_mixture(folder, rounds=2, **fields):
    """A step of TiMix and one of M3I (text and class alone) beside the same without mixing."""
    timix_cfg = config("timix", folder, **fields, mix_until=1.0)
    m3i_cfg = config("m3i", folder, **fields, w_intra=0.0, w_inter=0.0)
    pairs = [
        {"mixed": timix_cfg, "plain": replace(timix_cfg, mix="none")},
        {"mixed": m3i_cfg, "plain": replace(m3i_cfg, keep=1.0)},
    ]
    for configs in pairs:
        seconds = step_seconds(configs, n=4, rounds=rounds)
        yield Row(f"{configs['mixed'].method.lower()}.py step", 1000 * seconds["mixed"], "ms",
                  1000 * seconds["plain"], "not mixed")


def measure_memory(folder, batch=256, rows=32, **fields):
    """What a step of ALIGN's demo allocates at most, with the flags that save memory."""
    flags = {
        "": {},
        f"--micro {rows}": dict(micro=rows),
        "--grad-checkpoint": dict(grad_checkpoint=True),
        f"--chunk {rows}": dict(chunk=rows),
        "all three": dict(micro=rows, grad_checkpoint=True, chunk=rows),
    }
    peaks = {}
    for name, changes in flags.items():
        meter = PeakMemory()
        run_steps(config("align", folder, **fields, **changes, batch=batch), 2, meter)
        peaks[name] = meter.peak / MIB
    for name in list(flags)[1:]:
        yield Row(f"align.py step, batch {batch}, {name}", peaks[name], "MiB", peaks[""],
                  "no flag")


def measure_metrics(folder, n_images=5000, n_texts=25_010, n_search=10**6, repeats=3):
    """Recall of COCO's size beside topk both ways; a query beside its product alone."""
    similarity = torch.randn(n_texts, n_images)
    owner = (torch.arange(n_texts) % n_images).sort().values

    def topk_both_ways():
        similarity.topk(10, 0)
        similarity.topk(10, 1)

    features = torch.randn(n_search, 128)
    query = torch.randn(128)
    seconds = median_seconds({
        "recall": partial(evaluation.recall_at_k, similarity, owner),
        "topk": topk_both_ways,
        "query": partial(evaluation.nearest_images, features, query, 20),
        "product": partial(torch.mv, features, query),
    }, repeats)
    yield Row(f"recall, {n_images:,} images, {n_texts:,} texts", seconds["recall"], "s",
              seconds["topk"], "topk")
    yield Row(f"query of {n_search:,} x 128", seconds["query"], "s", seconds["product"],
              "its product")


def measure_compile(folder, **fields):
    """Six steps of each script on six batches, compiled by inductor with nothing cached."""
    for name in SCRIPTS:
        cfg = config(name, folder, **fields)
        eager, _ = run_steps(cfg, 5, same_batch=False)
        torch.compiler.reset()
        counters.clear()
        before = len(get_compilation_metrics())
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
                compiled, _ = run_steps(replace(cfg, compile=True), 5, same_batch=False)
        recompilations = [m for m in get_compilation_metrics()[before:] if m.recompile_reason]
        yield Row(f"{name}.py, first step", compiled[0], "s")
        yield Row(f"{name}.py, later step", 1000 * statistics.median(compiled[1:]), "ms",
                  1000 * statistics.median(eager[1:]), "eager")
        yield Row(f"{name}.py, graph breaks", sum(counters["graph_break"].values()), "")
        yield Row(f"{name}.py, recompilations", len(recompilations), "")


# ---- --peers and --gpu ----

def measure_peers(folder, size=48, width=128, depth=3, batch=128, repeats=5):
    """ALIGN's step beside that of open_clip's CLIP: both towers, loss, backward and AdamW.

    Of one size, in float32. CLIP's text tower is causal, ours masks the padding; CLIP has a class
    token.
    """
    open_clip = importlib.import_module("open_clip")  # no package that the project needs
    heads = width // 64
    clip = open_clip.model.CLIP(
        embed_dim=width,
        vision_cfg=dict(image_size=size, patch_size=8, layers=depth, width=width, head_width=64),
        text_cfg=dict(context_length=16, vocab_size=512, layers=depth, width=width, heads=heads))
    model = align.ALIGN(align.Config(
        image_size=size, patch=8, dim=width, depth=depth, heads=heads, text_dim=width,
        text_depth=depth, text_heads=heads, context=16, vocab_size=512, temperature=0.07))
    clip_loss = open_clip.loss.ClipLoss()
    images = torch.randn(batch, 3, size, size)
    tokens = torch.randint(1, 512, (batch, 16))
    valid = torch.ones_like(tokens, dtype=torch.bool)

    def our_loss():
        return align.contrastive_loss(*model(images, tokens, valid), model.temperature)

    def their_loss():
        return clip_loss(*clip(images, tokens))

    def train(optimizer, loss):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    ours = common.adamw(model, wd=0.1, betas=(0.9, 0.98))
    theirs = common.adamw(clip, wd=0.1, betas=(0.9, 0.98))
    seconds = median_seconds({
        "ours": partial(train, ours, our_loss),
        "theirs": partial(train, theirs, their_loss),
    }, repeats)
    yield Row(f"width {width}, {depth} + {depth} blocks, {size} px, batch {batch}",
              1000 * seconds["ours"], "ms", 1000 * seconds["theirs"], "open_clip")


# the papers' sizes (ViT-B), at batches that a GPU of 24 GB should hold
PAPERS = {
    "align": dict(batch=128),
    "mug": dict(batch=128),
    "lcl": dict(batch=4),  # eager FlexAttention keeps all scores
    "timix": dict(batch=64, group=64),
    "m3i": dict(batch=64),
}


def measure_gpu(folder, recipes=PAPERS, n=8, **fields):
    """Steps in bfloat16 at the papers' sizes, compiled beside eager."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, recipe in recipes.items():
        cfg = config(name, folder, recipe, **fields)
        seconds = {}
        for compile in (True, False):
            gc.collect()  # the model before
            torch.compiler.reset()
            torch.cuda.empty_cache()
            taken, _ = run_steps(replace(cfg, compile=compile), n, device=device)
            seconds[compile] = statistics.median(taken[2:])
        yield Row(f"{name}.py, {cfg.image_size} px, batch {cfg.batch}, compiled",
                  1000 * seconds[True], "ms", 1000 * seconds[False], "eager")


# ---- the table ----

SUBJECTS = {
    "step": measure_step, "loader": measure_loader, "index": measure_index,
    "order": measure_order, "loss": measure_loss, "packing": measure_packing,
    "masked": measure_masked, "mixture": measure_mixture, "memory": measure_memory,
    "metrics": measure_metrics, "compile": measure_compile,
}
OPTIONS = {"peers": measure_peers, "gpu": measure_gpu}  # --peers, --gpu

MODEL = dict(image_size=16, patch=8, dim=16, depth=1, heads=2, text_dim=16, text_heads=2,
             vocab_size=300)
TINY = {  # arguments of each with --tiny
    "step": dict(repeats=1, batch=16, **MODEL),
    "loader": dict(n=32, short_side=40, size=16, batch=8, steps=4, repeats=1),
    "index": dict(n_members=100, repeats=1),
    "order": dict(n_shards=20, per_shard=50, batch=16),
    "loss": dict(sizes=(32, 64), width=8, chunk=16, repeats=1),
    "packing": dict(context=256, rounds=1, batch=16, **MODEL),
    "masked": dict(image_size=32, dim=16, depth=1, heads=2, n=2, repeats=1),
    "mixture": dict(rounds=1, batch=16, **MODEL),
    "memory": dict(batch=16, rows=4, **MODEL),
    "metrics": dict(n_images=50, n_texts=250, n_search=1000, repeats=1),
    "compile": dict(batch=16, **MODEL),
    "peers": dict(size=16, width=64, depth=1, batch=8, repeats=1),
    "gpu": dict(recipes={name: script.DEMO for name, script in SCRIPTS.items()}, n=3, batch=16,
                **MODEL),
}


def chosen(args):
    """{name: function} of what the command line names. UserError if it cannot be measured."""
    for name in args.subjects:
        if name not in SUBJECTS:
            raise common.UserError(f"{name} is no subject: choose {' '.join(SUBJECTS)}")
    if args.peers and importlib.util.find_spec("open_clip") is None:
        raise common.UserError("--peers needs open_clip: pip install open_clip_torch")
    if args.gpu and not torch.cuda.is_available():
        raise common.UserError("--gpu finds no GPU that torch can use: leave it out")
    names = list(args.subjects)
    for option in OPTIONS:
        if getattr(args, option):
            names.append(option)
    if not names:
        names = [name for name in SUBJECTS if name != "compile"]
    functions = {**SUBJECTS, **OPTIONS}
    return {name: functions[name] for name in names}


def number(x):
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def table_line(subject, row):
    beside = ""
    ratio = ""
    if row.beside is not None:
        beside = f"{row.peer} {number(row.beside)}"
        ratio = f"{row.value / row.beside:.2f}"
    return (f"{subject:8} {row.case:44} {number(row.value):>7} {row.unit:9} {beside:20} "
            f"{ratio:>5}")


def main():
    parser = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=" ".join(SUBJECTS))
    parser.add_argument("--tiny", action="store_true", help="at sizes that take no time")
    parser.add_argument("--peers", action="store_true", help="beside open_clip")
    parser.add_argument("--gpu", action="store_true", help="at the papers' sizes on a GPU")
    args = parser.parse_args()
    functions = chosen(args)
    print(f"torch {torch.__version__}, {common.cpu_count()} cores, "
          f"{torch.get_num_threads()} threads")
    print(f"{'subject':8} {'case':44} {'value':>7} {'unit':9} {'beside':20} ratio", flush=True)
    scenes = 256 if args.tiny else 1000
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        os.environ["XDG_CACHE_HOME"] = root  # of indexes
        parts = ("pairs", "labels", "docs")
        with quiet():
            folder = data.make_toy_data(root, scenes, scenes // 2, parts=parts)
        for name, measure in functions.items():
            for row in measure(folder, **(TINY[name] if args.tiny else {})):
                print(table_line(name, row), flush=True)


if __name__ == "__main__":
    common.run_command(main)
