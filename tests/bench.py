"""Time and memory of what this project does, beside a limit or a peer measured in the same run.

    python tests/bench.py                # all but the next two: twelve minutes on two cores
    python tests/bench.py --peers        # a step of ALIGN beside one of open_clip's CLIP
    python tests/bench.py --gpu          # steps at the papers' sizes, compiled beside eager
    python tests/bench.py --gpu align    # of some scripts alone
    python tests/bench.py loader loss    # some of it
    python tests/bench.py --tiny         # only to see that it runs

Each line: what, ours, the other, ours / other: less is better. Times are medians, mostly of calls
in turn; the products of a step are a mean over another run.
A step is one of a script's own main(), at demo size, without its wait for data. Memory is the most
that was allocated at a time. Everything but --gpu runs on the CPU. The loader is compared with
webdataset only where that is installed; --peers needs open_clip_torch.

Measured on two cores with AVX-512, torch 2.13.0:

    align.py, a step                                    129 ms  its products    104 ms    1.25
    mug.py, a step                                      131 ms  its products     99 ms    1.32
    lcl.py, a step                                      235 ms  its products    200 ms    1.18
    timix.py, a step                                    181 ms  its products    152 ms    1.19
    m3i.py, a step                                      210 ms  its products    168 ms    1.25
    loader, a picture of 400 px to 224, 1 worker(s)    1.53 ms  Pillow         1.38 ms    1.10
    loader, a picture of 400 px to 224, 2 worker(s)   0.827 ms  Pillow        0.703 ms    1.18
    loader, a picture of 400 px to 224                 1.44 ms  webdataset     1.47 ms    0.98
    index of 10 x 10,000 members                        1.53 s  tarfile          1.5 s    1.02
    order of 10,000,000 samples, resumed               11.8 ms  start          11.5 ms    1.03
    loss of 4,096 pairs, --chunk 0                      941 ms  two matrices    904 ms    1.04
    loss of 4,096 pairs, --chunk 256                    798 ms  two matrices    1.16 s    0.69
    loss of 4,096 pairs, --chunk 256, memory          47.5 MiB  two matrices   512 MiB    0.09
    lcl.py, a step with rows of 512 tokens              252 ms  not packed      594 ms    0.42
    encoder 768 x 12, a quarter of 4 images             562 ms  all patches     2.08 s    0.27
    timix.py, a step                                    213 ms  not mixed       153 ms    1.39
    m3i.py, a step without image terms                 71.7 ms  not mixed      70.1 ms    1.02
    align.py, batch 256, --micro 32                   43.5 MiB  no flag        265 MiB    0.16
    align.py, batch 256, --grad-checkpoint             122 MiB  no flag        265 MiB    0.46
    align.py, batch 256, --chunk 32                    264 MiB  no flag        265 MiB    1.00
    align.py, batch 256, all three                      26 MiB  no flag        265 MiB    0.10
    recall, 5,000 images, 25,010 texts                  647 ms  topk            349 ms    1.85
    query of 1,000,000 x 128                             53 ms  its product    51.5 ms    1.03
    align.py, compiled                                  123 ms  eager           123 ms    1.01
    mug.py, compiled                                    123 ms  eager           126 ms    0.97
    lcl.py, compiled                                    228 ms  eager           232 ms    0.99
    timix.py, compiled                                  200 ms  eager           180 ms    1.11
    m3i.py, compiled                                    216 ms  eager           228 ms    0.95

On another machine of two cores, by --peers:

    ALIGN's demo with AdamW, a step                     172 ms  open_clip       183 ms    0.94

On an NVIDIA H100, torch 2.11, by --gpu (TiMix compiled and LCL have not been run):

    align.py, 224 px, batch 128, compiled              81.4 ms  eager           104 ms    0.78
    mug.py, 224 px, batch 128, compiled                41.5 ms  eager          56.9 ms    0.73
    m3i.py, 224 px, batch 128, compiled                 191 ms  eager           205 ms    0.93
    timix.py, 256 px, batch 128, eager                  209 ms

Compiled functions have no graph break; LCL and TiMix recompile twice, M3I once; the first step
takes 7 to 55 s. Two workers and the process that takes their batches share two cores, unlike
Pillow's processes; and the kernel makes each page of a batch's shared memory anew.
"""
import argparse
import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
import typing
from dataclasses import replace
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

import align
import common
import data
import eval as evaluation

SCRIPTS = {name: importlib.import_module(name) for name in ("align", "mug", "lcl", "timix", "m3i")}
REPEATS = 3


class Row(typing.NamedTuple):
    what: str
    ours: float
    unit: str
    name: str = ""  # of the other, or a remark
    other: float = None


# ---- how to measure ----

def timed(fn, *args):
    """A function that calls fn(*args) and returns the seconds it takes."""
    def seconds():
        start = time.perf_counter()
        fn(*args)
        return time.perf_counter() - start

    return seconds


def compare(what, ours, name, other):
    """Row of the medians of two functions that return seconds, called in turn. What they return
    the first time does not count."""
    ours_seconds = []
    other_seconds = []
    for _ in range(1 + REPEATS):
        ours_seconds.append(ours())
        other_seconds.append(other())
    return Row(what, statistics.median(ours_seconds[1:]), "s",
               name, statistics.median(other_seconds[1:]))


def tensor_memory(fn, *args):
    """MiB of tensors that fn(*args) has held at most."""
    with torch.profiler.profile(profile_memory=True) as profile:
        fn(*args)
    current = 0
    peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()  # negative where it is freed
            peak = max(peak, current)
    return peak / 2**20


# ---- a script's own steps ----

def config(name, folder, recipe=None, **changes):
    """Config of a script on the toy data in `folder`: its demo, or another recipe."""
    fields = dict(SCRIPTS[name].DEMO if recipe is None else recipe, steps=6)
    if name == "lcl":
        fields["docs"] = [f"{folder}/docs"]
    else:
        fields["data"] = [f"{folder}/pairs"]
    if name == "m3i":
        fields["labels"] = [f"{folder}/labels"]
    fields.update(changes, out=f"{folder}/{name}", fresh=True, workers=0, log_every=1,
                  save_every=10**9, eval_every=-1)
    return SCRIPTS[name].Config(**fields)


def train(cfg):
    """Run a script's main() -> seconds of each step, of which the first two are warm-up."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        SCRIPTS[cfg.method.lower()].main(cfg)
    with open(f"{cfg.out}/log.jsonl") as f:
        rows = [json.loads(line) for line in f]
    if len(rows) < cfg.steps:
        raise KeyboardInterrupt  # main() has saved and returned early
    return [cfg.batch / row["images_per_s"] * (1 - row["data_wait"]) for row in rows]


def median_step(cfg):
    return statistics.median(train(cfg)[2:])


# ---- measurements: each yields rows; folder: of the toy data, and for files ----

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_flash_attention_for_cpu_backward")


def measure_step(folder, **fields):
    """Training steps beside the time that they spend in matrix products and attention."""
    for name in SCRIPTS:
        cfg = config(name, folder, **fields)
        with torch.profiler.profile() as profile:
            train(cfg)
        microseconds = 0
        for event in profile.key_averages():
            if event.key in PRODUCTS:
                microseconds += event.self_cpu_time_total
        yield Row(f"{name}.py, a step", median_step(cfg), "s",
                  "its products", microseconds / 1e6 / cfg.steps)


def web_picture(short_side):
    """A JPEG as the web has them: 4 to 3, some 2 bits for a pixel."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (short_side // 8, short_side // 6, 3), np.uint8)
    raw = io.BytesIO()
    image = Image.fromarray(noise).resize((short_side * 4 // 3, short_side), Image.BICUBIC)
    image.save(raw, "JPEG", quality=85)
    return raw.getvalue()


def picture_row(sample, rng, size):
    return {"images": data.resize_and_crop(sample.image(min_size=size), size, rng, full=1.0)}


def pillow_picture(raw, size):
    """The same by Pillow alone."""
    image = Image.open(io.BytesIO(raw))
    image.draft("RGB", (size, size))
    np.asarray(image.resize((size, size), Image.BILINEAR))


def pillow_loader(pool, raws, size):
    seconds = timed(pool.map, partial(pillow_picture, size=size), raws)
    return seconds() / len(raws)


def seconds_per_picture(batches, skip):
    """Of an iterator over batches, after the first `skip`, in which its workers start."""
    for _ in range(skip):
        next(batches)
    start = time.perf_counter()
    n = sum(len(batch["images"]) for batch in batches)
    return (time.perf_counter() - start) / n


def our_loader(index, size, workers):
    order = data.ShuffledOrder(index.starts, batch=32, seed=0)
    rows = data.TrainingSet(index, order, partial(picture_row, size=size))
    dataset = data.BatchDataset([rows], 32)
    skip = 2 + 2 * workers
    batches = data.loader(dataset, 0, skip + 24, workers, torch.device("cpu"))
    return seconds_per_picture(batches, skip)


def webdataset_loader(index, size):
    """webdataset over the same shard, in one process, with our decoder and view."""
    webdataset = importlib.import_module("webdataset")  # no package that the project needs
    rng = np.random.default_rng(0)

    def row(sample):
        return picture_row(data.Sample(sample["__key__"], {"jpg": sample["jpg"]}), rng, size)

    samples = webdataset.WebDataset(index.paths, shardshuffle=False).repeat().shuffle(1000)
    batches = samples.map(row).batched(32)
    return seconds_per_picture(itertools.islice(batches, 26), skip=2)


def measure_loader(folder, n=256, short_side=400, size=224):
    """A picture of web size beside bare Pillow in as many processes, and beside webdataset."""
    raw = web_picture(short_side)
    path = f"{folder}/pictures.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(n):
            data.add_file(tar, f"{i:06d}.jpg", raw)
    index = data.Index([path])
    what = f"loader, a picture of {short_side} px to {size}"
    for workers in sorted({1, common.cpu_count()}):
        with multiprocessing.Pool(workers) as pool:
            yield compare(f"{what}, {workers} worker(s)", partial(our_loader, index, size, workers),
                          "Pillow", partial(pillow_loader, pool, [raw] * n, size))
    ours = partial(our_loader, index, size, 0)
    if importlib.util.find_spec("webdataset"):
        yield compare(what, ours, "webdataset", partial(webdataset_loader, index, size))
    else:
        yield Row(what, ours(), "s", "webdataset is not installed")


def index_anew(paths):
    for path in paths:
        os.utime(path)  # so that no cached index is of these shards
    data.Index(paths)


def read_headers(paths):
    for path in paths:
        with tarfile.open(path) as tar:
            for _ in tar:
                pass


def measure_index(folder, shards=10, members=10_000):
    """Indexing of small members beside tarfile's own loop over them."""
    paths = [f"{folder}/small-{i}.tar" for i in range(shards)]
    for path in paths:
        with tarfile.open(path, "w") as tar:
            for i in range(members // 2):
                data.add_file(tar, f"{i:06d}.jpg", bytes(100))
                data.add_file(tar, f"{i:06d}.txt", b"a caption")
    yield compare(f"index of {shards} x {members:,} members", timed(index_anew, paths),
                  "tarfile", timed(read_headers, paths))


def measure_order(folder, shards=1000, per_shard=10_000, batch=4096):
    """The order of a global batch at a resumed step of the fourth epoch beside the first step."""
    starts = np.arange(shards + 1) * per_shard

    def order_batch(step):
        order = data.ShuffledOrder(starts, batch, seed=0)
        for row in range(batch):
            order(step, row)

    resumed = int(3.5 * starts[-1] / batch)
    yield compare(f"order of {starts[-1]:,} samples, resumed", timed(order_batch, resumed),
                  "start", timed(order_batch, 0))


def two_matrices(image, text, temperature, label_smoothing):
    """The contrastive loss as it is usually written."""
    labels = torch.arange(len(image))
    image_to_text = image @ text.T / temperature
    text_to_image = text @ image.T / temperature
    return (F.cross_entropy(image_to_text, labels, label_smoothing=label_smoothing)
            + F.cross_entropy(text_to_image, labels, label_smoothing=label_smoothing))


def measure_loss(folder, n=4096, dim=512, rows=256):
    """align.contrastive_loss, forward and backward, beside the plain form."""
    image = common.l2_normalize(torch.randn(n, dim)).requires_grad_()
    text = common.l2_normalize(torch.randn(n, dim)).requires_grad_()
    temperature = torch.tensor(0.07, requires_grad=True)

    def forward_and_backward(fn):
        loss = fn(image, text, temperature, label_smoothing=0.1)
        torch.autograd.grad(loss, [image, text, temperature])

    for chunk in (0, rows):
        loss = partial(align.contrastive_loss, chunk=chunk)
        what = f"loss of {n:,} pairs, --chunk {chunk}"
        yield compare(what, timed(forward_and_backward, loss),
                      "two matrices", timed(forward_and_backward, two_matrices))
        yield Row(f"{what}, memory", tensor_memory(forward_and_backward, loss), "MiB",
                  "two matrices", tensor_memory(forward_and_backward, two_matrices))


def measure_packing(folder, context=512, **fields):
    """LCL's rows with several documents in each beside rows of one, of the same batch."""
    packed = config("lcl", folder, **fields, context=context)
    yield compare(f"lcl.py, a step with rows of {context} tokens", partial(median_step, packed),
                  "not packed", partial(median_step, replace(packed, pack=False)))


def measure_masked(folder, image_size=224, dim=768, depth=12, heads=12, n=4):
    """MUG's encoder, forward and backward, on a quarter of the patches beside all of them."""
    model = common.ViT(image_size, 16, dim, depth, heads)
    images = torch.randn(n, 3, image_size, image_size)
    n_patches = model.grid**2
    quarter = torch.rand(n, n_patches).argsort(1)[:, :n_patches // 4]

    def forward_and_backward(ids_keep):
        model.zero_grad()
        model(images, ids_keep).square().mean().backward()

    yield compare(f"encoder {dim} x {depth}, a quarter of {n} images",
                  timed(forward_and_backward, quarter),
                  "all patches", timed(forward_and_backward, None))


def measure_mixture(folder, **fields):
    """A step of TiMix and one of M3I (text and class alone) beside the same without mixing."""
    mixed = config("timix", folder, **fields, mix_until=1.0)
    yield compare("timix.py, a step", partial(median_step, mixed),
                  "not mixed", partial(median_step, replace(mixed, mix="none")))
    mixed = config("m3i", folder, **fields, w_intra=0.0, w_inter=0.0)
    yield compare("m3i.py, a step without image terms", partial(median_step, mixed),
                  "not mixed", partial(median_step, replace(mixed, keep=1.0)))


def measure_memory(folder, batch=256, rows=32, steps=2, **fields):
    """What two steps of ALIGN's demo hold at most, with the flags that save memory."""
    flags = {
        f"--micro {rows}": dict(micro=rows),
        "--grad-checkpoint": dict(grad_checkpoint=True),
        f"--chunk {rows}": dict(chunk=rows),
        "all three": dict(micro=rows, grad_checkpoint=True, chunk=rows),
    }
    cfg = config("align", folder, **fields, batch=batch, steps=steps)
    without = tensor_memory(train, cfg)
    for name, changes in flags.items():
        yield Row(f"align.py, batch {batch}, {name}", tensor_memory(train, replace(cfg, **changes)),
                  "MiB", "no flag", without)


def measure_metrics(folder, n_images=5000, n_texts=25_010, n_search=10**6):
    """Recall of COCO's size beside topk both ways; a query beside its product alone."""
    similarity = torch.randn(n_texts, n_images)
    owner = (torch.arange(n_texts) % n_images).sort().values

    def topk_both_ways():
        similarity.topk(10, 0)
        similarity.topk(10, 1)

    yield compare(f"recall, {n_images:,} images, {n_texts:,} texts",
                  timed(evaluation.recall_at_k, similarity, owner), "topk", timed(topk_both_ways))

    features = torch.randn(n_search, 128)
    query = torch.randn(128)
    yield compare(f"query of {n_search:,} x 128",
                  timed(evaluation.nearest_images, features, query, 20),
                  "its product", timed(torch.mv, features, query))


def compare_compiled(what, cfg):
    """Steps compiled by torch.compile beside eager ones, and what its frontend counts."""
    eager = median_step(replace(cfg, compile=False))
    yield Row(f"{what}, eager", eager, "s")  # printed before the slow part
    torch.compiler.reset()
    counters.clear()
    clear_compilation_metrics()
    seconds = train(replace(cfg, compile=True))
    recompilations = [m for m in get_compilation_metrics() if m.recompile_reason]
    yield Row(f"{what}, compiled", statistics.median(seconds[2:]), "s", "eager", eager)
    yield Row(f"{what}, slowest compiled", max(seconds), "s")
    yield Row(f"{what}, graph breaks", sum(counters["graph_break"].values()), "")
    yield Row(f"{what}, recompilations", len(recompilations), "")


def measure_compile(folder, **fields):
    for name in SCRIPTS:
        yield from compare_compiled(f"{name}.py", config(name, folder, **fields))


def measure_gpu(folder, scripts, **fields):
    """The papers' sizes (ViT-B) in bfloat16, at batches that 80 GB of memory should hold."""
    for name in scripts:
        batch = 16 if name == "lcl" else 128  # of documents of 2,048 tokens, or images
        cfg = config(name, folder, {}, **{**fields, "batch": batch})
        yield from compare_compiled(f"{name}.py, {cfg.image_size} px, batch {batch}", cfg)


def measure_peers(folder, batch=128):
    """A step of ALIGN's demo beside one of open_clip's CLIP of the same size, both in float32 and
    with AdamW. CLIP's text tower is causal, ours masks the padding; CLIP has a class token."""
    open_clip = importlib.import_module("open_clip")  # no package that the project needs
    cfg = align.Config(**align.DEMO)
    clip = open_clip.model.CLIP(
        embed_dim=cfg.dim,
        vision_cfg=dict(image_size=cfg.image_size, patch_size=cfg.patch, layers=cfg.depth,
                        width=cfg.dim, head_width=cfg.dim // cfg.heads),
        text_cfg=dict(context_length=cfg.context, vocab_size=cfg.vocab_size,
                      layers=cfg.text_depth, width=cfg.text_dim, heads=cfg.text_heads))
    clip_loss = open_clip.loss.ClipLoss()
    model = align.ALIGN(cfg)
    images = torch.randn(batch, 3, cfg.image_size, cfg.image_size)
    tokens = torch.randint(1, cfg.vocab_size, (batch, cfg.context))
    valid = torch.ones_like(tokens, dtype=torch.bool)

    def our_loss():
        return align.contrastive_loss(*model(images, tokens, valid), model.temperature)

    def their_loss():
        return clip_loss(*clip(images, tokens))

    def step(loss, optimizer):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    ours = common.adamw(model, wd=0.1, betas=(0.9, 0.98))
    theirs = common.adamw(clip, wd=0.1, betas=(0.9, 0.98))
    yield compare("ALIGN's demo with AdamW, a step", timed(step, our_loss, ours),
                  "open_clip", timed(step, their_loss, theirs))


# ---- the table ----

SUBJECTS = {
    "step": measure_step, "loader": measure_loader, "index": measure_index,
    "order": measure_order, "loss": measure_loss, "packing": measure_packing,
    "masked": measure_masked, "mixture": measure_mixture, "memory": measure_memory,
    "metrics": measure_metrics, "compile": measure_compile,
}

MODEL = dict(image_size=16, patch=8, dim=16, depth=1, heads=2, text_dim=16, text_heads=2,
             vocab_size=300, batch=16, steps=3)
TINY = {  # what --tiny makes smaller
    "step": MODEL, "packing": MODEL, "mixture": MODEL, "memory": {**MODEL, "rows": 4},
    "compile": MODEL, "gpu": {**MODEL, "image_size": 32},
    "loader": dict(n=32, short_side=40, size=16),
    "index": dict(members=100),
    "order": dict(shards=20, per_shard=50, batch=16),
    "loss": dict(n=64, dim=8, rows=16),
    "masked": dict(image_size=32, dim=16, depth=1, heads=2, n=2),
    "metrics": dict(n_images=50, n_texts=250, n_search=1000),
    "peers": dict(batch=8),
}


def number(x, unit):
    if unit == "s" and x < 1:
        x = 1000 * x
        unit = "ms"
    digits = f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    return f"{digits} {unit}".rstrip()


def table_line(row):
    line = f"{row.what:48} {number(row.ours, row.unit):>9}"
    if row.other is None:
        return f"{line}  {row.name}".rstrip()
    return f"{line}  {row.name:12} {number(row.other, row.unit):>9} {row.ours / row.other:7.2f}"


def main():
    parser = common.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT",
                        help=f"{' '.join(SUBJECTS)}; with --gpu {' '.join(SCRIPTS)}")
    parser.add_argument("--peers", action="store_true", help="beside open_clip")
    parser.add_argument("--gpu", action="store_true", help="at the papers' sizes on a GPU")
    parser.add_argument("--tiny", action="store_true", help="at sizes that take no time")
    args = parser.parse_args()
    known = list(SCRIPTS if args.gpu else SUBJECTS)
    for name in args.subjects:
        if name not in known:
            parser.error(f"{name} is no subject, choose from {' '.join(known)}")
    if args.peers and importlib.util.find_spec("open_clip") is None:
        raise common.UserError("--peers needs open_clip: pip install open_clip_torch")
    if args.gpu and not torch.cuda.is_available():
        raise common.UserError("--gpu finds no GPU that torch can use: leave it out")
    if not args.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.gpu:
        functions = {"gpu": partial(measure_gpu, scripts=args.subjects or SCRIPTS)}
    else:
        functions = {name: SUBJECTS[name] for name in args.subjects}
    if args.peers:
        functions["peers"] = measure_peers

    print(f"torch {torch.__version__}, {common.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        os.environ["XDG_CACHE_HOME"] = root  # of indexes
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{root}/inductor"  # nothing is compiled before
        os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler says nothing
        folder = data.make_toy_data(root, 1000, 500, parts=("pairs", "labels", "docs"))
        for name, measure in (functions or SUBJECTS).items():
            for row in measure(folder, **(TINY[name] if args.tiny else {})):
                print(table_line(row), flush=True)


if __name__ == "__main__":
    common.run_command(main)
