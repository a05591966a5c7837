"""Subjects of tests/bench.py: the plan of 10^8 samples, and the time to a first step."""
import contextlib, json, os, statistics, subprocess, sys, tempfile, time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import numpy as np

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
    """What one process does: open the index, first batch of an epoch, first batch in the middle of a later one, 400 batches in order."""
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

    def look(plan, step):
        for row in range(batch):
            with contextlib.suppress(data.Skip):             # there is nothing in the shards
                index[plan.sample(*plan.position(step, row))]
    timed("start", lambda: look(plan, 0))
    middle = plan.steps_per_epoch * 3 + plan.steps_per_epoch // 2
    timed("resume", lambda: look(data.Plan(index.starts, batch, 0, 64), middle))
    taken = []
    for step in [*range(1, 201), *range(middle + 1, middle + 201)]:
        began = time.perf_counter()
        look(plan, step)
        taken.append(time.perf_counter() - began)
    found.update(first=statistics.mean(taken[1:200]), second=statistics.mean(taken[201:]), resident=resident(), before=before)
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
        yield f"{name}: index opened and an epoch's first batch of 4,096, seconds", t["open"] + t["start"], "<= 2"
        yield f"{name}: index opened and the first batch after a resume in the middle of epoch 3, seconds", t["open"] + t["resume"], "<= 2"
        yield f"{name}: resident memory, GiB", t["resident"], "<= 1.5"
        yield f"{name}: a batch in the middle of an epoch / one at its start", t["second"] / t["first"], "0.8 .. 1.25"


def first_step(repeats=3):
    """From `python align.py` to the end of its first step, on an existing world and index: all of it, and the parts of it that take longest."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = f"""if True:
        import json, sys, time
        sys.path.insert(0, {root!r})
        began, seen = float(sys.argv[1]), []
        mark = lambda name: seen.append((name, time.time() - began))
        import torch; mark("import torch")
        import align, common, data; mark("other imports")
        def marked(owner, name, label):
            do = getattr(owner, name)
            def done(*args, **how):
                made = do(*args, **how)
                mark(label)
                return made
            setattr(owner, name, done)
        marked(data, "open_index", "world and index")
        marked(data, "vocabulary", "vocabulary")
        marked(common, "restore", "model and optimizer")
        marked(common.Log, "next", "loader and first batch")
        def stop(*args):
            mark("forward, backward, update")
            print("seen", json.dumps(seen))
            sys.exit()
        common.Log.step = stop
        align.main(align.Config(**{{**align.DEMO, "data": [sys.argv[2]], "out": sys.argv[3], "fresh": True, "eval_every": -1}}))
        """
    taken = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        shards = data.make_world(root=folder, parts=("pairs",)) + "/pairs"
        data.Index(data.expand([shards]))
        for turn in range(repeats):
            out = subprocess.run([sys.executable, "-c", code, str(time.time()), shards, f"{folder}/run{turn}"], capture_output=True, text=True)
            seen, before = json.loads(out.stdout[out.stdout.index("seen ") + 5:]), 0
            for name, at in seen:
                taken.setdefault(name, []).append(at - before)
                before = at
            taken.setdefault("all", []).append(before)
    yield "ALIGN's demo, command to the end of its first step, seconds", statistics.median(taken.pop("all")), "<= 6"
    for name, times in taken.items():
        yield f"- {name}", statistics.median(times), "-"
