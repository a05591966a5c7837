"""Fixtures and helpers that several test files share."""
import contextlib
import importlib
import io
import json
import os
import queue
import socket
import sys
import tempfile
import traceback
from dataclasses import replace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")
sys.path.insert(0, ROOT)
_cache = tempfile.TemporaryDirectory(prefix="vlp-cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name  # before anything is indexed: never the user's cache

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

import common
import data

WITH_GPUS = dict(os.environ)  # the environment of a process that is to use them
N_GPUS = torch.cuda.device_count()
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all others run on the CPU, where sums are reproducible

SCRIPTS = ["align", "mug", "lcl", "timix", "m3i"]

# models of a few thousand parameters, for runs of a few steps
TINY = dict(
    image_size=16, patch=8, dim=16, depth=2, heads=2, vocab_size=300, batch=16, steps=8, lr=3e-3,
    warmup=2, workers=0, precision="fp32", save_every=4, log_every=1, eval_every=-1,
)
TINY_OF = {
    "align": dict(text_dim=16, text_depth=1, text_heads=2, context=16, temperature=0.07,
                  flip=False),
    "mug": dict(text_dim=16, text_depth=1, cross_depth=1, text_heads=2, pixel_dim=16,
                pixel_depth=1, pixel_heads=2, context=16, mask_ratio=0.5, flip=False),
    "lcl": dict(text_dim=16, text_depth=1, text_heads=2, context=128),
    "timix": dict(text_dim=16, text_depth=1, fusion_depth=1, text_heads=2, embed=16, context=16,
                  group=4, flip=False, augment=False, texts_per_region=2, caption_as_region=False),
    "m3i": dict(text_dim=16, text_depth=1, text_heads=2, context=16, group=4, mask_unit=1,
                projector_depth=1, decoder_depth=1, color=False, flip=False),
}
PARTS = {"lcl": {"docs": "docs"}, "m3i": {"data": "pairs", "labels": "labels"}}


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", r"ignore:::PIL\.")  # odd metadata; data.py says so


def tiny_config(name, toy_data, out, **changes):
    """A Config of the script `name` that trains on toy data in seconds."""
    script = importlib.import_module(name)
    fields = {**TINY, **TINY_OF[name], "out": str(out)}
    for field, part in PARTS.get(name, {"data": "pairs"}).items():
        fields[field] = [f"{toy_data}/{part}"]
    return script.Config(**{**fields, **changes})


# ---- data ----

@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Folder with pairs/, labels/ and docs/ of 256 toy scenes."""
    root = str(tmp_path_factory.mktemp("toy"))
    return data.make_toy_data(root, scenes=256, documents=128, parts=("pairs", "labels", "docs"))


@pytest.fixture(scope="session")
def shared():
    """The folder of real shards beside the project."""
    if not os.path.isdir(SHARED):
        pytest.skip("no ../shared/data beside the project")
    return SHARED


BOXES = [
    {"x": 6, "y": 5, "w": 20, "h": 14, "text": "red"},
    {"x": 50, "y": 30, "w": 33, "h": 29, "text": "green"},
    {"x": 30, "y": 8, "w": 9, "h": 40, "text": "blue"},
]
RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def encoded(image, kind="PNG", **options):
    """The bytes of a file of a PIL image."""
    raw = io.BytesIO()
    image.save(raw, kind, **options)
    return raw.getvalue()


def painted_sample(boxes=BOXES, size=(96, 64), orientation=None, **fields):
    """A data.Sample: a gray image whose boxes are filled with the colors of their texts.

    size: width, height. orientation: EXIF tag. fields: more of its json.
    """
    pixels = np.full((size[1], size[0], 3), 128, np.uint8)
    for box in boxes:
        rows = slice(box["y"], box["y"] + box["h"])
        columns = slice(box["x"], box["x"] + box["w"])
        pixels[rows, columns] = RGB[box["text"]]
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    raw = encoded(Image.fromarray(pixels), exif=exif)
    fields = json.dumps({"boxes": boxes, **fields})
    return data.Sample("key", {"jpg": raw, "json": fields.encode()})


# ---- ranks ----

@pytest.fixture(scope="module")
def one_thread():
    """For tiny models, and for sums to the bit, which depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _serve(rank, world, port, tasks, results):
    """One process of a pool: joins the group as torchrun would have it, then runs what it gets."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    common.init_distributed()
    while True:
        task = tasks.get()
        if task is None:
            return
        fn, *args = task
        try:
            results.put((rank, True, fn(*args)))
        except BaseException:  # UserError, SystemExit, a failed assert: the test shows them all
            results.put((rank, False, traceback.format_exc()))


class Pool:
    """pool(fn, *args) runs a module-level function on every rank; -> results in rank order."""

    def __init__(self, world):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = mp.get_context("spawn")
        self.tasks = [context.Queue() for _ in range(world)]
        self.results = context.Queue()
        self.processes = []
        for rank in range(world):
            args = (rank, world, port, self.tasks[rank], self.results)
            process = context.Process(target=_serve, args=args)  # no daemon: it may have workers
            process.start()
            self.processes.append(process)

    def __call__(self, fn, *args):
        for tasks in self.tasks:
            tasks.put((fn, *args))
        answers = {}
        while len(answers) < len(self.tasks):
            try:
                rank, ok, value = self.results.get(timeout=300)
            except queue.Empty:
                rank, ok, value = "?", False, f"no answer; ranks {sorted(answers)} are done"
            if not ok:  # the others may wait for this one: the pool is of no more use
                self.kill()
                raise AssertionError(f"rank {rank}:\n{value}")
            answers[rank] = value
        return [answers[rank] for rank in range(len(self.tasks))]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join(10)
        self.processes = []

    def close(self):
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(10)


@pytest.fixture(scope="session")
def run_on_ranks():
    """run_on_ranks(world, fn, *args): pools start on first use and are shared by all tests."""
    pools = {}

    def run_on(world, fn, *args):
        if world not in pools or not pools[world].processes:
            pools[world] = Pool(world)
        return pools[world](fn, *args)

    yield run_on
    for pool in pools.values():
        pool.close()


# ---- runs ----

def run(main, cfg):
    """-> rows of the log, last checkpoint, metrics on rank 0; None on the others."""
    torch.manual_seed(99 + common.rank())  # what the process did before must not matter
    result = main(cfg)
    if common.rank() > 0:
        return None
    with open(f"{cfg.out}/log.jsonl") as f:
        rows = [json.loads(line) for line in f]
    return rows, common.read_checkpoint(f"{cfg.out}/last.pt"), result


def first_gradients(name, cfg):
    """Gradients of the first step of a script, caught where its optimizer would use them."""
    script = importlib.import_module(name)
    optimizer_class = getattr(script, "Lamb", torch.optim.AdamW)
    step = optimizer_class.step
    caught = []

    def catch(optimizer):
        for group in optimizer.param_groups:
            caught.extend(p.grad.clone() for p in group["params"] if p.grad is not None)

    optimizer_class.step = catch
    try:
        script.main(replace(cfg, steps=1, fresh=True))
    finally:
        optimizer_class.step = step
    return caught


def refused(main, cfg):
    """The one line with which a run is refused."""
    with pytest.raises(common.UserError) as caught:
        main(cfg)
    line = str(caught.value)
    assert "\n" not in line
    return line


def values(terms):
    """{name: 0-dim tensor} as numbers."""
    return {name: x.item() for name, x in terms.items()}


def close(value, rel=1e-10):
    """Equal up to the rounding of float64."""
    return pytest.approx(value, rel=rel, abs=1e-12)


def gradients(model, loss):
    """{name: gradient, or None} of the trainable parameters."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return dict(zip(named, found))


def assert_same_gradients(a, b, rtol=1e-9, atol=1e-12):
    """a, b: {name: gradient}; None counts as zero."""
    for name in a.keys() | b.keys():
        x = a.get(name)
        y = b.get(name)
        if x is None and y is None:
            continue
        x = torch.zeros_like(y) if x is None else x
        y = torch.zeros_like(x) if y is None else y
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}")


@contextlib.contextmanager
def signal_at_step(number, step):
    """Send a signal to this process when the log is called for `step`."""
    call = common.Log.__call__

    def call_and_signal(log, current, *args):
        if current == step:
            os.kill(os.getpid(), number)
        return call(log, current, *args)

    common.Log.__call__ = call_and_signal
    try:
        yield
    finally:
        common.Log.__call__ = call


