"""Fixtures: a cache and a world of their own for the session, a tiny run, and pools of gloo processes that live as long as the session.
Below them what the tests of several methods ask alike."""
import contextlib, io, json, os, queue, signal, socket, sys, tempfile, traceback
from dataclasses import replace
from functools import partial

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
_cache = tempfile.TemporaryDirectory(prefix="vlp-cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name                   # before anything indexes: never the user's cache

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

import align
import common
import data

SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")


def pytest_configure(config):                                # data.py says so, but pytest has filters of its own
    config.addinivalue_line("filterwarnings", r"ignore:::PIL\.")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    return data.make_world(root=str(tmp_path_factory.mktemp("world")), scenes=256, parts=("pairs", "labels"))


@pytest.fixture(scope="module")
def one_thread():
    """For tiny models, whose threads would only wait for each other, and for sums to the bit, which depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tiny_world, tmp_path):
    """An ALIGN of a few thousand parameters on the tiny world: seconds for a few steps."""
    return align.Config(data=[f"{tiny_world}/pairs"], out=str(tmp_path / "run"), image_size=16, patch=8, dim=16, depth=1, heads=2, text_dim=16,
                        text_depth=1, text_heads=2, context=16, vocab_size=300, batch=16, steps=8, workers=0, log_every=1, precision="fp32",
                        save_every=4, eval_every=-1, temperature=0.07, lr=1e-2, warmup=2, flip=False)


@pytest.fixture(scope="session")
def shared():
    """The folder of real shards beside the project, where there is one."""
    if not os.path.isdir(SHARED):
        pytest.skip("no ../shared/data beside the project")
    return SHARED


def _serve(rank, world, port, tasks, results):
    """One process of a pool: joins the group as torchrun would have it, then runs what it is sent."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    common.join()
    while (task := tasks.get()) is not None:
        try:
            results.put((rank, True, task[0](*task[1:])))
        except BaseException:                                # UserError, SystemExit, a failed assert: all are told to the test
            results.put((rank, False, traceback.format_exc()))


class Pool:
    """pool(fn, *args) runs a module-level fn on every rank and returns their results in rank order."""
    def __init__(self, world):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = mp.get_context("spawn")
        self.tasks, self.results = [context.Queue() for _ in range(world)], context.Queue()
        self.processes = [context.Process(target=_serve, args=(r, world, port, self.tasks[r], self.results)) for r in range(world)]
        for p in self.processes:                             # not daemons: those may not have loader workers
            p.start()

    def __call__(self, fn, *args):
        found = {}
        for tasks in self.tasks:
            tasks.put((fn, *args))
        while len(found) < len(self.tasks):
            try:
                rank, ok, value = self.results.get(timeout=60)
            except queue.Empty:
                ok, rank, value = False, "?", f"no answer; ranks {sorted(found)} are done"
            if not ok:                                       # the others may wait for this one: the pool is of no more use
                self.close(force=True)
                raise AssertionError(f"rank {rank}:\n{value}")
            found[rank] = value
        return [found[r] for r in range(len(self.tasks))]

    def close(self, force=False):
        for tasks, p in zip(self.tasks, self.processes):
            p.kill() if force else tasks.put(None)
        for p in self.processes:
            p.join(10)
        self.processes = []


@pytest.fixture(scope="session")
def pools():
    """pools(2), pools(4): started on first use (each start costs seconds), shared by all tests."""
    made = {}

    def pool(world):
        if world not in made or not made[world].processes:
            made[world] = Pool(world)
        return made[world]
    yield pool
    for pool in made.values():
        pool.close()


# ---- what the tests of several methods ask alike ----

close = partial(pytest.approx, rel=1e-10, abs=1e-12)


@contextlib.contextmanager
def exact():
    """float() means double(): rounding to float32 on the way would hide small mistakes."""
    plain, torch.Tensor.float = torch.Tensor.float, torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = plain


def numbers(terms):
    return {name: t.item() for name, t in terms.items()}


def gradients(model, loss):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return dict(zip((n for n, _ in named), torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)))


def same_gradients(ours, theirs, **tolerance):
    """None is as good as zero: nothing is learned."""
    for name in ours.keys() | theirs.keys():
        a, b = ours.get(name), theirs.get(name)
        a, b = (torch.zeros_like(b) if a is None and b is not None else a), (torch.zeros_like(a) if b is None and a is not None else b)
        if a is not None:
            torch.testing.assert_close(a, b, **(tolerance or dict(rtol=1e-9, atol=1e-12)), msg=name)


def far(a, b):
    """The largest relative distance of two lists of tensors."""
    return max(((x - y).norm() / y.norm().clamp(min=1e-12)).item() for x, y in zip(a, b, strict=True))


def run(main, cfg):
    """-> lines of the log, last checkpoint, metrics; None on ranks other than 0."""
    torch.manual_seed(99 + common.rank())                    # what the process did before must not matter
    result = main(cfg)
    if common.rank() == 0:
        with open(f"{cfg.out}/log.jsonl") as f:
            return [json.loads(line) for line in f], common.read_checkpoint(f"{cfg.out}/last.pt"), result


def first_step(main, cfg):
    """Gradients of the first step, caught where the optimiser would use them."""
    caught, step = [], torch.optim.AdamW.step
    torch.optim.AdamW.step = lambda opt: caught.extend(p.grad.clone() for g in opt.param_groups for p in g["params"])
    try:
        main(replace(cfg, steps=1, out=f"{cfg.out}-first{common.world()}", fresh=True))
    finally:
        torch.optim.AdamW.step = step
    return caught


def resumes_bitwise(main, cfg, log, saved, keys, monkeypatch):
    """Stopped by a signal in the third of its steps and started again, a run logs and saves to the bit what it did without a stop."""
    cfg, following, calls = replace(cfg, out=cfg.out + "-stopped"), common.Log.next, []
    with monkeypatch.context() as m:                         # told with the third batch, read with the fourth
        m.setattr(common.Log, "next", lambda *args: (calls.append(1), len(calls) == 3 and os.kill(os.getpid(), signal.SIGTERM), following(*args))[2])
        assert run(main, cfg)[1]["step"] == 4
    again, state, _ = run(main, cfg)
    assert keys and set(keys) <= {k for r in log for k in r}     # a term may be there in some steps only
    assert [[r.get(k) for k in keys] for r in again] == [[r.get(k) for k in keys] for r in log]
    assert all(torch.equal(v, saved["model"][k]) for k, v in state["model"].items())
    assert all(torch.equal(v[k], saved["optimizer"]["state"][i][k]) for i, v in state["optimizer"]["state"].items() for k in v)


def refused(main, cfg):
    """The one line with which a run is refused."""
    with pytest.raises(common.UserError) as told:
        main(cfg)
    assert "\n" not in str(told.value)
    return str(told.value)


SHAPES = [{"x": 6, "y": 5, "w": 20, "h": 14, "text": "red"}, {"x": 50, "y": 30, "w": 33, "h": 29, "text": "green"},
          {"x": 30, "y": 8, "w": 9, "h": 40, "text": "blue"}]
PAINT = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def painted(boxes=SHAPES, size=(96, 64), orientation=None, kind="PNG", listed=None, **fields):
    """A sample of a grey image with its boxes filled in the colours of their texts."""
    pixels, raw, exif = np.full((size[1], size[0], 3), 128, np.uint8), io.BytesIO(), Image.Exif()
    for b in boxes:
        pixels[b["y"]:b["y"] + b["h"], b["x"]:b["x"] + b["w"]] = PAINT[b["text"]]
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).save(raw, kind, exif=exif, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return data.Sample("k", {"jpg": raw.getvalue(), "json": json.dumps({"boxes": boxes if listed is None else listed, **fields}).encode()})
