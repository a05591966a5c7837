"""Faults in real processes: what a run promises when it is killed, preempted, resized, starved of disk or fed a NaN. Linux.

    python tests/faults.py                       # all of them, a quarter of an hour on two cores
    python tests/faults.py elastic disk          # some: kill elastic preemption dead_rank disk worker numbers long
    python tests/faults.py kill --kills 4 --scripts mug.py

One line for each; exit code 1 if anything differs from a run left alone, or from what was promised. Every wait has a limit.
"""
import argparse, contextlib, functools, json, os, pathlib, random, resource, shutil, signal, subprocess, sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import common
import torch

import data

STEPS = 60
SMALL = "--dim 32 --depth 1 --heads 2 --text-dim 32 --text-heads 2 --eval-every -1 --log-every 1 --precision fp32".split()
BATCH = {"align.py": 64, "mug.py": 64, "lcl.py": 8, "timix.py": 32, "m3i.py": 32}
STARTED, WRONG = [], []

# A script of ours, run by another that writes down which sample stood where, what was saved and how each rank ended, and can poison rank 1.
WITNESS = f"""
import importlib, os, sys
sys.path.insert(0, {ROOT!r})
import common, data
module = importlib.import_module(sys.argv.pop(1)[:-3])
rank, poison, out = int(os.environ.get("RANK", 0)), int(os.environ.get("POISON", 0)), sys.argv[sys.argv.index("--out") + 1]

def note(*words):
    with open(out + ".notes", "a") as f:
        f.write(" ".join(map(str, words)) + chr(10))

sample, save = data.Plan.sample, common.save
data.Plan.sample = lambda plan, *at: [i := sample(plan, *at), note("sample", plan.seed, *at, i)][0]
common.save = lambda cfg, model, opt, step, *rest: [save(cfg, model, opt, step, *rest), note("save", rank, step)]
if poison and rank == 1:
    loss, calls = module.contrastive_loss, []
    module.contrastive_loss = lambda *args: calls.append(1) or loss(*args) * (float("nan") if len(calls) > poison else 1)
note("start", rank, os.getpid())
try:
    common.guard(lambda: module.main(common.parse(module.Config, module.DEMO)))
except SystemExit as end:
    note("exit", rank, end.code)
    raise
"""


def start(out, *flags, script="align.py", ranks=1, launcher=(), witness=True, **env):
    """A run in the background; what it prints goes to OUT.txt, what the witness saw to OUT.notes."""
    launch = [os.path.join(os.path.dirname(sys.executable), "torchrun"), "--standalone", "--nproc_per_node", str(ranks), *launcher]
    command = [*(launch if ranks > 1 else [sys.executable]), *(["witness.py", script] if witness else [os.path.join(ROOT, script)])]
    recipe = ["--steps", str(STEPS), "--save-every", "3", "--workers", "1", "--batch", str(BATCH[script]), *SMALL, *flags, "--out", out]
    with open(out + ".txt", "a") as output:
        STARTED.append(subprocess.Popen(command + recipe, stdout=output, stderr=output, env={**os.environ, **env}))
    return STARTED[-1]


def children(pid):
    """Processes under this one, parents before children."""
    own = [int(p) for p in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]
    return own + [p for child in own for p in children(child)]


def alive(pid):
    """Is it running? A zombie is not."""
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()[:1] not in ("", "Z")


def send(number, pids):
    for pid in filter(alive, pids):
        os.kill(pid, number)


def until(condition, process=None, limit=300):
    """Wait for something that must come while the process lives. Returns the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + limit, f"waited {limit} s in vain"
        assert process is None or process.poll() is None, f"the run ended early with code {process.returncode}"
        time.sleep(0.05)
    return time.monotonic() - began


def finish(process, limit=900):
    """Its exit code."""
    until(lambda: process.poll() is not None, limit=limit)
    return process.returncode


def read(path):
    return pathlib.Path(path).read_text(errors="replace") if os.path.exists(path) else ""


def log(out):
    return [json.loads(line) for line in read(f"{out}/log.jsonl").splitlines(True) if line.endswith("\n")]


def notes(out, kind):
    """What the witness wrote under this word: tuples of integers, in the order of time."""
    return [tuple(map(int, line.split()[1:])) for line in read(out + ".notes").splitlines() if line.startswith(kind + " ")]


def step_of(out):
    with contextlib.suppress(FileNotFoundError):
        return common.read_checkpoint(f"{out}/last.pt")["step"]
    return 0


@functools.cache
def alone(script="align.py", ranks=1):
    """Folder of a run that nothing happens to."""
    out = f"{script}-alone-{ranks}"
    assert finish(start(out, script=script, ranks=ranks)) == 0, read(out + ".txt")[-500:]
    return out


def expect(right, what):
    WRONG.extend([what] * (not right))


def expect_equal(out, alone):
    """Has this run left the same weights, optimizer and log as one left alone, and no odd files?"""
    ours, theirs = (common.read_checkpoint(f"{folder}/last.pt") for folder in (out, alone))
    unlike = [name for name, tensor in theirs["model"].items() if not torch.equal(tensor, ours["model"][name])]
    moments = [[v for state in s["optimizer"]["state"].values() for v in state.values() if isinstance(v, torch.Tensor)] for s in (ours, theirs)]
    expect(not unlike, f"{out}: {len(unlike)} of {len(theirs['model'])} tensors differ")
    expect(all(map(torch.equal, *moments)), f"{out}: the optimizer's state differs")
    expect([row["step"] for row in log(out)] == list(range(theirs["step"])) and ours["step"] == theirs["step"], f"{out}: the steps differ")
    expect(not [name for name in os.listdir(out) if name.endswith(".tmp")], f"{out}: odd files")


def kill_once(process, out, rng, saving):
    """SIGKILL while one of the next checkpoints is being written, or a few steps further on. Returns whether the run was still going."""
    began, saves, writing, step = time.time(), rng.randrange(4), f"{out}/last.pt.tmp", step_of(out) + rng.randrange(9)
    while process.poll() is None and (saving or len(log(out)) <= step):
        if saving and os.path.exists(writing) and os.path.getmtime(writing) > began:             # not what an earlier kill left
            if not saves:
                break
            saves -= 1
            time.sleep(0.05)                                 # this one may finish
        time.sleep(0.001 if saving else rng.uniform(0, 0.3))
    going = process.poll() is None
    process.kill()
    process.wait(60)
    return going


def kill(args):
    """SIGKILL at random moments and while saving, restart: equal to the bit, nothing of a dead run counted twice."""
    rng, told, scripts = random.Random(args.seed), [], args.scripts or list(BATCH)
    for n, script in enumerate(scripts):
        alone(script)
        out, kills, saving = f"{script}-killed", 0, 0
        while kills < (args.kills + n) // len(scripts):
            while_saving = kills % 2 == 1
            if not kill_once(start(out, script=script, witness=False), out, rng, while_saving):
                break                                        # it was done before
            kills, saving = kills + 1, saving + while_saving
        expect(finish(start(out, script=script, witness=False)) == 0, f"{script} ended with an error")
        expect_equal(out, alone(script))
        told.append(f"{script} {kills} ({saving} while saving)")
    return "kills: " + ", ".join(told)


def elastic(args):
    """1 process, then 2, then 4, then 1: the same samples in the same rows, the same losses over 50 steps after each change."""
    told, recipe = [], ["--steps", "220", "--lr", "2e-3", "--save-every", "1000"]
    for script in args.scripts or ["align.py", "timix.py"]:
        one, out, changes = f"{script}-whole", f"{script}-elastic", []
        finish(start(one, *recipe, script=script))
        for ranks, end in (1, 51), (2, 103), (4, 155):
            process = start(out, *recipe, script=script, ranks=ranks)
            until(lambda: len(log(out)) >= end, process)
            send(signal.SIGTERM, [process.pid])
            finish(process)
            changes.append(step_of(out))
        finish(start(out, *recipe, script=script))
        losses = list(zip((row["loss"] for row in log(out)), (row["loss"] for row in log(one)), strict=True))
        off = [max(abs(a / b - 1) for a, b in losses[change:change + 50]) for change in changes]
        rows, unlike = set(notes(one, "sample")), set(notes(one, "sample")) ^ set(notes(out, "sample"))
        expect(len(losses) == 220 and not unlike, f"{script}: {len(losses)} steps, {len(unlike)} rows of the plan differ")
        expect(max(off) <= 1e-4, f"{script}: the losses differ by {max(off):.1e}")
        told.append(f"{script} on 1, 2, 4, 1 ranks, changed after steps {changes}: {len(unlike)} of {len(rows)} samples lost or moved, losses within "
                    + ", ".join(f"{x:.0e}" for x in off))
    return "; ".join(told)


def preemption(args):
    """A signal to torchrun and to the loader workers: all ranks finish one step, save once, exit 0; the same command goes on. A second signal, 5 s
    later, in the middle of a long step: gone at once."""
    launcher, out, codes = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"], "preempted", []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        before = step_of(out)
        process = start(out, ranks=2, launcher=launcher)
        until(lambda: len(log(out)) >= before + 8, process)
        workers = [pid for _, rank in notes(out, "start")[-2:] for pid in children(rank)]
        send(number, [*workers, process.pid])
        codes.append(finish(process, 60))
        step, saves, ends = step_of(out), dict(notes(out, "save")[-2:]), dict(notes(out, "exit")[-2:])
        expect(len(workers) == 2 and step < STEPS, f"{number.name}: {len(workers)} loader workers at step {step}")
        expect(saves == {0: step, 1: step} and log(out)[-1]["step"] == step - 1, f"{number.name}: saved {saves}, checkpoint of {step}")
        expect(ends == {0: 0, 1: 0}, f"{number.name}: ranks exit {ends}")
    expect(finish(start(out, ranks=2, launcher=launcher)) == 0, "the same command went wrong")
    expect_equal(out, alone(ranks=2))
    process = start("stuck", "--batch", "20000", "--workers", "0", ranks=2)
    until(lambda: f"0/{STEPS}" in read("stuck.txt"), process)
    ranks = [pid for _, pid in notes("stuck", "start")]
    time.sleep(3)
    send(signal.SIGTERM, [process.pid])
    time.sleep(6)
    expect(all(map(alive, ranks)), "one signal was enough to break off a step")
    send(signal.SIGTERM, ranks)
    gone = until(lambda: not any(map(alive, ranks)), limit=60)
    finish(process, 60)
    expect(gone < 3 and not notes("stuck", "save"), f"gone {gone:.1f} s after the second signal, saves {notes('stuck', 'save')}")
    return f"3 signals, ranks exit 0, torchrun {codes}; gone {gone:.1f} s after a second signal in the middle of a step"


def dead_rank(args):
    """SIGKILL to one rank of two, then SIGSTOP: the other ends within --timeout and saves nothing; torchrun names the dead one, or starts anew."""
    taken = []
    for number in (signal.SIGKILL, signal.SIGSTOP):
        out = f"dead-{number.name}"
        process = start(out, "--timeout", "20", "--save-every", "1000", ranks=2)
        until(lambda: len(log(out)) >= 10, process)
        pid = dict(notes(out, "start"))
        send(number, [pid[1]])
        taken.append(until(lambda: not alive(pid[0]), limit=120))
        expect(finish(process, 120) != 0, f"{number.name}: torchrun exits 0")
        expect(taken[-1] < 25, f"{number.name}: the other lived on for {taken[-1]:.0f} s")
        expect(not notes(out, "save") and step_of(out) == 0, f"{number.name}: saved")
    report = read("dead-SIGKILL.txt").partition("Root Cause")[2]
    expect("(local_rank: 1)" in report and "-9" in report, "torchrun does not name the dead rank")
    out = "restarted"
    process = start(out, "--timeout", "20", ranks=2, launcher=["--max-restarts", "1"])
    until(lambda: len(log(out)) >= 20, process)
    send(signal.SIGKILL, [dict(notes(out, "start"))[1]])
    expect(finish(process) == 0 and len(notes(out, "start")) == 4, f"{len(notes(out, 'start'))} ranks started, torchrun exits {process.returncode}")
    expect_equal(out, alone(ranks=2))
    return f"the other ends {taken[0]:.1f} s after a SIGKILL, {taken[1]:.1f} s after a SIGSTOP (--timeout 20); with --max-restarts the run goes on"


def disk(args):
    """No room while saving: told, the last good checkpoint stays, training goes on and tries again. A damaged last.pt: the one before serves."""
    process, out, refused = start("full", "--workers", "0"), "full", lambda: read("full.txt").count("was not written")
    until(lambda: len(log(out)) >= 10, process)
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))     # more than the log, less than a checkpoint
    until(lambda: refused() >= 1, process)
    at = step_of(out)                                        # raises if it is damaged
    until(lambda: refused() >= 4, process)
    kept, done = step_of(out), log(out)[-1]["step"] + 1
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
    expect(kept == at >= 6 and done >= kept + 9, f"checkpoint of step {kept}, of {at} when the disk was full, {done} steps done")
    expect(finish(process) == 0, "the run that had no room went wrong")
    expect_equal(out, alone())
    for name, damage in ("cut", lambda raw: raw[:len(raw) // 2]), ("flipped", lambda raw: raw[:5000] + bytes([raw[5000] ^ 4]) + raw[5001:]):
        shutil.copytree(alone(), name)
        path = pathlib.Path(name, "last.pt")
        path.write_bytes(damage(path.read_bytes()))
        expect(finish(start(name)) == 0 and "unreadable checkpoint" in read(name + ".txt"), f"{name}: went wrong, or not told")
        expect(f"from step {STEPS - 3}" in read(name + ".txt"), f"{name}: not from the checkpoint before")
        expect_equal(name, alone())
    return f"{refused()} saves refused, {done - kept} steps done meanwhile; 2 damaged checkpoints, the one before served"


def worker(args):
    """SIGKILL to a loader worker: one line, exit code 2."""
    taken = []
    for turn in range(3):
        out = f"worker{turn}"
        process = start(out, "--workers", "2", "--steps", "2000", witness=False)
        until(lambda: len(log(out)) >= 10, process)
        send(signal.SIGKILL, children(process.pid)[turn % 2:][:1])
        taken.append(f"{until(lambda: process.poll() is not None, limit=60):.1f}")
        text = read(out + ".txt")
        expect(process.returncode == 2 and "error: a loader worker died" in text and "Traceback" not in text,
               f"exit code {process.returncode}, last line {text.splitlines()[-1]}")
    return f"3 killed, the run ends after {', '.join(taken)} s"


def numbers(args):
    """A NaN in one rank's loss: all ranks stop together and name the step and the last good checkpoint."""
    code = finish(start("nan", ranks=2, POISON="20"))
    told, ends = {line for line in read("nan.txt").splitlines() if "error: " in line}, dict(notes("nan", "exit"))
    saved = common.read_checkpoint("nan/last.pt")
    expect(len(told) == 1 and "at step 20; last good checkpoint: nan/last.pt of step 18" in told.pop() and ends[0] == 2, f"ranks exit {ends}: {told}")
    expect(code != 0 and "Traceback" not in read("nan.txt").partition("elastic")[0], f"torchrun exits {code}, or a traceback of ours")
    expect(saved["step"] == 18 and all(t.isfinite().all() for t in saved["model"].values()), f"checkpoint of step {saved['step']}")
    return f"log ends with step {log('nan')[-1]['step']}, checkpoint of step {saved['step']}, ranks exit {ends}"


def long(args):
    """bench.py's long runs: memory, open files and threads stay flat."""
    out = subprocess.run([sys.executable, os.path.join(ROOT, "tests", "bench.py"), "long"], capture_output=True, text=True, timeout=3000).stdout
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if "last quarter" in line]
    expect(len(rows) == 6 and all(float(row[1]) <= 1.05 for row in rows), "grows")
    return ", ".join(f"{row[0].partition(':')[0]} {row[1]}" for row in rows)


FAULTS = {f.__name__: f for f in (kill, elastic, preemption, dead_rank, disk, worker, numbers, long)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", choices=[*FAULTS, []], metavar="FAULT")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--scripts", nargs="+", choices=BATCH, help="for kill (default: all) and elastic (align.py timix.py)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = os.path.join(folder, "cache")
        with open("witness.py", "w") as f:
            f.write(WITNESS)
        data.make_world(parts=("pairs", "labels", "docs"))
        for name in args.faults or FAULTS:
            began, told = time.monotonic(), "broken off"
            try:
                told = FAULTS[name](args)
            except (AssertionError, ValueError, subprocess.TimeoutExpired) as error:
                WRONG.append(f"{type(error).__name__}: {error}")
            finally:
                send(signal.SIGKILL, [pid for p in STARTED if p.poll() is None for pid in [*children(p.pid), p.pid]])
            print(f"{name}: {told}: {'WRONG: ' + ', '.join(WRONG) if WRONG else 'as promised'} [{time.monotonic() - began:.0f} s]", flush=True)
            bad += len(WRONG)
            WRONG.clear()
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
