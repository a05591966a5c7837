"""Fixtures: a cache and a world of their own for the session, a tiny run, and pools of gloo processes that live as long as the session."""
import os, queue, socket, sys, tempfile, traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
_cache = tempfile.TemporaryDirectory(prefix="vlp-cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name                   # before anything indexes: never the user's cache

import pytest
import torch
import torch.multiprocessing as mp

import align
import data

SHARED = os.path.join(os.path.dirname(ROOT), "shared", "data")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    return data.make_world(root=str(tmp_path_factory.mktemp("world")), scenes=256, parts=("pairs", "labels"))


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
    import common
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
