"""The plan of 10^8 samples, and the time to a first step (to be merged into tests/bench.py)."""
import functools, json, os, resource, statistics, subprocess, sys, tempfile, time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import numpy as np
import torch

import data


def synthetic(folder, shards, per_shard):
    """Paths of so many empty files, and the cached index that says what they would hold: nothing is read from a shard before a sample is."""
    os.environ["XDG_CACHE_HOME"] = folder
    paths = [f"{folder}/{k:06d}.tar" for k in range(shards)]
    for path in paths:
        open(path, "wb").close()

    def build(index, cache):
        os.makedirs(cache, exist_ok=True)
        rows = np.lib.format.open_memmap(index.file + ".npy", "w+", data.ROW, (shards * per_shard,))
        for at in range(0, len(rows), 10 ** 7):
            part = np.arange(at, min(at + 10 ** 7, len(rows)))
            rows["shard"][at:at + len(part)], rows["offset"][at:at + len(part)] = part // per_shard, part % per_shard * 20480
            rows["span"][at:at + len(part)] = 20480
        rows.flush()
        with open(index.file + ".json", "w") as f:
            json.dump([list(range(0, len(rows) + 1, per_shard)), "0", {}], f)
    build, data.Index.build = data.Index.build, build
    try:
        data.Index(paths)
    finally:
        data.Index.build = build
    return paths


def plan_rank(paths, batch=4096):
    """What one process does: open the index, first batch of an epoch, first batch in the middle of a later one, 200 batches in order."""
    resident = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 2 ** 20
    before, found = resident(), {}

    def timed(name, work):
        began = time.perf_counter()
        made = work()
        found[name] = time.perf_counter() - began
        return made
    index = timed("open", lambda: data.Index(paths))
    timed("summary", index.summary)
    plan = data.Plan(index.starts, batch, 0, 64)
    look = lambda plan, step: [index.rows[plan.sample(*plan.position(step, row))].item() for row in range(batch)]
    timed("start", lambda: look(plan, 0))
    middle = plan.steps_per_epoch * 3 + plan.steps_per_epoch // 2
    timed("resume", lambda: look(data.Plan(index.starts, batch, 0, 64), middle))
    taken = []
    for step in [*range(1, 101), *range(middle + 1, middle + 101)]:
        began = time.perf_counter()
        look(plan, step)
        taken.append(time.perf_counter() - began)
    found.update(first=statistics.mean(taken[1:100]), second=statistics.mean(taken[101:]), worst=max(taken[1:100] + taken[101:]), resident=resident(), before=before)
    return found


def plan():
    """10^8 samples: an epoch's start, a resume in the middle of a later one, memory; a batch's cost there and at the start."""
    for shards, per_shard in ((10_000, 10_000), (100_000, 1000)):
        with tempfile.TemporaryDirectory() as folder:
            synthetic(folder, shards, per_shard)
            code = (f"import sys, json; sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r}); import bench_plan; "
                    f"print(json.dumps(bench_plan.plan_rank([f'{folder}/{{k:06d}}.tar' for k in range({shards})])))")
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": folder})
            t, name = json.loads(out.stdout), f"plan, {shards:,} shards of {per_shard:,}"
        print(t, file=sys.stderr)
        yield f"{name}: index opened and an epoch's first batch of 4,096, seconds", t["open"] + t["start"], "<= 2"
        yield f"{name}: index opened and the first batch after a resume in the middle of epoch 3, seconds", t["open"] + t["resume"], "<= 2"
        yield f"{name}: resident memory, GiB", t["resident"], "<= 1.5"
        yield f"{name}: a batch in the middle of an epoch / one at its start", t["second"] / t["first"], "0.8 .. 1.25"


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {os.cpu_count()} cores\n\n| subject | measured | goal |\n|---|---|---|")
    for row in plan():
        print(f"| {row[0]} | {row[1]:.3f} | {row[2]} |", flush=True)
