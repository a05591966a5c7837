"""Faults in real processes: what a run promises when it is killed, stopped, resized or starved.

    python tests/faults.py                         # all of them, about ten minutes on two cores
    python tests/faults.py kill-in-save dead-rank  # some

Each fault meets a small run of align.py on toy data in a temporary folder. Afterwards the same
command is given again, and must end with the weights, the optimizer state and the losses of a run
that was left alone, to the bit. Prints a line for each fault: its name, what happens and what must
follow, ok or FAILED. Exit code 1 if one failed. Every wait has a limit. Linux only: reads /proc.
"""
import argparse
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import common
import data

STEPS = 150
SAVE_EVERY = 10
NAN_STEP = 57
# many unused ids make a checkpoint of 8 MB, so that a save takes long enough to be hit
FLAGS = f"""--steps {STEPS} --save-every {SAVE_EVERY} --log-every 1 --eval-every -1 --workers 1
    --batch 32 --lr 3e-3 --warmup 10 --image-size 32 --patch 8 --dim 32 --depth 1 --heads 2
    --context 16 --vocab-size 20000 --text-dim 32 --text-depth 1 --text-heads 2""".split()

# align.py, which also says how each rank exits, and gives rank 1 a NaN if the environment says so
WITNESS = f"""
import os, sys
sys.path.insert(0, {ROOT!r})
import align, common

contrastive_loss = align.contrastive_loss
calls = 0

def poisoned_loss(*args):
    global calls
    calls += 1
    loss = contrastive_loss(*args)
    return loss * float("nan") if calls == {NAN_STEP} + 1 else loss

if "NAN" in os.environ and os.environ["RANK"] == "1":
    align.contrastive_loss = poisoned_loss
try:
    common.run(align.main, align.Config, align.DEMO, "")
except SystemExit as end:
    print(f"rank {{os.environ['RANK']}} exits with {{end.code}}", flush=True)
    raise
"""


# ---- processes ----

def is_running(pid):
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"  # zombie, dead


def children(pid):
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += [int(child) for child in path.read_text().split()]
    return found


def descendants(pid):
    """Processes below this one, parents before children."""
    found = [pid]
    for parent in found:
        found += children(parent)
    return found[1:]


def wait_until(condition, what, limit=300, pause=0.02):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit, f"waited {limit} s for {what}"
        time.sleep(pause)


def wait_for_end_of(pids):
    def have_ended():
        return not any(is_running(pid) for pid in pids)

    wait_until(have_ended, f"the end of {pids}", limit=60)


class Run:
    """A start of the training run in `out`, with torchrun if there are several ranks."""
    started = []

    def __init__(self, out, ranks=1, script=f"{ROOT}/align.py", torchrun_flags=(), **environment):
        self.out = out
        self.logs = Path(f"logs-{len(Run.started)}")
        self.logs.mkdir()
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                        str(ranks), "--redirects", "3", "--log-dir", self.logs, *torchrun_flags]
        command += [script, "--data", *data.expand("toy-*/pairs"), *FLAGS, "--out", out]
        name = "torchrun.txt" if ranks > 1 else "stdout.log"
        with open(self.logs / name, "w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, **environment})
        self.pid = self.process.pid
        Run.started.append(self)

    def output(self):
        """What the ranks print, one after another, without torchrun's own reports."""
        paths = sorted(self.logs.rglob("std*.log"))
        return "".join(path.read_text(errors="replace") for path in paths)

    def errors(self):
        """The lines that a user would read as an error."""
        return re.findall(r"^.*(?:Error|error|Traceback).*$", self.output(), re.MULTILINE)

    def end(self, limit=300):
        """Wait for its end. -> exit code"""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run has not ended after {limit} s") from None

    def reach(self, condition, what, pause=0.02):
        """Wait for something that must happen before the run ends."""
        def has_happened():
            if condition():
                return True
            assert self.process.poll() is None, f"the run ended before {what}"
            return False

        wait_until(has_happened, what, pause=pause)

    def reach_step(self, step):
        def is_in_log():
            return steps_in_log(self.out) > step

        self.reach(is_in_log, f"step {step}")

    def rank_pid(self, rank):
        """The process of a rank, which torchrun has started."""
        for pid in children(self.pid):
            if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                return pid
        raise AssertionError(f"rank {rank} has no process")

    def kill(self):
        """SIGKILL to the process that was started, which must have been alive."""
        self.process.kill()
        assert self.end() == -signal.SIGKILL, "the run ended before it was killed"

    def clean_up(self):
        """End what is still there after a failure."""
        if self.process.poll() is None:
            for pid in [*descendants(self.pid), self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


# ---- what a run leaves ----

def log_rows(out):
    try:
        lines = Path(out, "log.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_in_log(out):
    rows = log_rows(out)
    return rows[-1]["step"] + 1 if rows else 0


def saved_step(out):
    return common.read_checkpoint(f"{out}/last.pt")["step"]


@functools.cache
def left_alone(ranks):
    """Folder of a run to which nothing happens."""
    out = f"alone-{ranks}"
    run = Run(out, ranks)
    assert run.end() == 0, f"a run without a fault failed: {run.output()[-300:]!r}"
    return out


def finish(out, ranks=1):
    """Give the same command again: it must go on, and end as the run that was left alone."""
    run = Run(out, ranks)
    assert run.end() == 0, f"the same command failed: {run.output()[-300:]!r}"
    assert "going on from step" in run.output(), "the same command started from the beginning"
    expect_same_end(out, ranks)


def expect_same_end(out, ranks):
    """Weights, optimizer and losses must be to the bit those of the run that was left alone."""
    reference = left_alone(ranks)
    assert saved_step(out) == STEPS, f"the checkpoint is of step {saved_step(out)}"
    assert saved_tensors(out) == saved_tensors(reference), "weights or optimizer state differ"
    assert losses(out) == losses(reference), "the losses in the log differ"
    assert not list(Path(out).glob("*.tmp")), "a .tmp file is left"


def saved_tensors(out):
    """{number: bytes} of the tensors in the checkpoint, first the model's, then the optimizer's."""
    with zipfile.ZipFile(f"{out}/last.pt") as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        return {name.partition("/data/")[2]: archive.read(name) for name in names}


def losses(out):
    rows = log_rows(out)
    assert [row["step"] for row in rows] == list(range(STEPS)), "steps lack in the log, or repeat"
    return [row["loss"] for row in rows]


# ---- the faults: what happens: what must follow ----

def kill_in_step():
    """SIGKILL after steps 30, 60 and 90: loader workers end, the run goes on to the bit"""
    out = "killed"
    for step in (30, 60, 90):
        run = Run(out)
        run.reach_step(step)
        workers = descendants(run.pid)
        assert len(workers) == 1, f"{len(workers)} loader workers instead of 1"
        run.kill()
        wait_for_end_of(workers)
    finish(out)


def kill_in_save():
    """SIGKILL while last.pt.tmp is written: last.pt is whole, the run goes on to the bit"""
    out = "killed-in-save"
    unfinished = Path(out, "last.pt.tmp")
    for _ in range(10):  # a save may end before the signal comes
        run = Run(out)
        run.reach_step(2 * SAVE_EVERY)
        run.reach(unfinished.exists, "a save", pause=0.001)
        run.kill()
        if unfinished.exists():
            break
    assert unfinished.exists(), "all saves ended before the signal"
    step = saved_step(out)
    assert step % SAVE_EVERY == 0, f"a checkpoint of step {step}"
    finish(out)


def stop(out, number, to_torchrun, torchrun_flags=()):
    """Stop 2 ranks by a signal to torchrun or to rank 1 alone. -> torchrun's exit code"""
    before = steps_in_log(out)
    run = Run(out, 2, "witness.py", torchrun_flags)
    run.reach_step(before + 20)
    pids = descendants(run.pid)
    os.kill(run.pid if to_torchrun else run.rank_pid(1), number)
    code = run.end(60)
    wait_for_end_of(pids)
    text = run.output()
    exits = sorted(re.findall(r"rank \d exits with \w+", text))
    assert exits == ["rank 0 exits with 0", "rank 1 exits with 0"], f"{exits}, torchrun {code}"
    assert run.errors() == [], f"it prints {run.errors()}"
    step = saved_step(out)
    assert f"stopped at step {step}: the same command goes on" in text, "it does not say so"
    assert step < STEPS and steps_in_log(out) == step, f"saved step {step}, log is of another"
    return code


def term():
    """SIGTERM to torchrun of 2 ranks: they save and exit with 0, the run goes on to the bit"""
    stop("terminated", signal.SIGTERM, to_torchrun=True)
    finish("terminated", ranks=2)


def usr1():
    """SIGUSR1 to one rank of 2, then to torchrun --signals-to-handle SIGUSR1: the ranks save and
    exit with 0, the run goes on to the bit"""
    out = "preempted"
    code = stop(out, signal.SIGUSR1, to_torchrun=False)
    assert code == 0, f"all ranks exit with 0, torchrun with {code}"
    stop(out, signal.SIGUSR1, True, ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"])
    finish(out, ranks=2)


def full_disk():
    """no space left for a checkpoint: one line, exit code 2, the run goes on to the bit"""
    out = "full"
    run = Run(out)
    run.reach_step(3 * SAVE_EVERY)
    new_file = Path(out, "last.pt.tmp")

    def fill_disk():
        try:
            new_file.symlink_to("/dev/full")  # every write to it gives ENOSPC
        except FileExistsError:  # a save is going on
            return False
        return True

    run.reach(fill_disk, "the disk was full", pause=0.001)
    assert run.end() == 2, f"exit code {run.process.returncode}"
    errors = run.errors()
    assert len(errors) == 1 and "No space left on device" in errors[0], f"it prints {errors}"
    assert not new_file.is_symlink(), "last.pt.tmp is left"
    finish(out)


def dead_worker():
    """SIGKILL to a loader worker: one line, exit code 2, the run goes on to the bit"""
    out = "without-worker"
    run = Run(out)
    run.reach_step(30)
    os.kill(descendants(run.pid)[0], signal.SIGKILL)
    assert run.end(60) == 2, f"exit code {run.process.returncode}"
    errors = run.errors()
    assert len(errors) == 1 and "fewer --workers" in errors[0], f"it prints {errors}"
    finish(out)


def dead_rank():
    """SIGKILL to rank 1 of 2, then to rank 0: the other ends within a minute with at most one
    line, the run goes on to the bit"""
    out = "without-rank"
    for rank in (1, 0):
        before = steps_in_log(out)
        run = Run(out, ranks=2)
        run.reach_step(before + 20)
        pids = descendants(run.pid)
        os.kill(run.rank_pid(rank), signal.SIGKILL)
        wait_for_end_of(pids)
        assert run.end(60) != 0, "torchrun exits with 0"
        # a loader worker of the killed rank may print that its rank is gone
        errors = [line for line in run.errors() if f"[rank{rank}]" not in line]
        assert len(errors) <= 1, f"rank {1 - rank} prints {len(errors)} lines, {errors[:3]}"
    finish(out, ranks=2)


def nan():
    """NaN in the loss of rank 1 of 2: the ranks exit with 2, at most a line each, last.pt is sound,
    the run goes on to the bit"""
    out = "nan"
    run = Run(out, 2, "witness.py", NAN="1")
    code = run.end()
    errors = run.errors()
    step = NAN_STEP // SAVE_EVERY * SAVE_EVERY
    line = (f"error: loss nan, gradient norm nan at step {NAN_STEP}: try a lower --lr; "
            f"last checkpoint: {out}/last.pt of step {step}")
    assert errors in ([line], [line, line]), f"it prints {errors}"
    assert "rank 0 exits with 2" in run.output() and code != 0, f"torchrun exits with {code}"
    assert saved_step(out) == step, f"the checkpoint is of step {saved_step(out)}"
    finish(out, ranks=2)


def changed_ranks():
    """stopped and gone on with 1, 2, then 1 rank: losses within 1e-4 of those of 1 rank"""
    out = "resized"
    run = Run(out)
    run.reach_step(50)
    run.process.terminate()
    assert run.end(60) == 0, f"exit code {run.process.returncode}"
    assert stop(out, signal.SIGTERM, to_torchrun=False) == 0, "torchrun failed"
    assert Run(out).end() == 0, "the third start failed"
    pairs = zip(losses(out), losses(left_alone(1)))
    error = max(abs(loss / reference - 1) for loss, reference in pairs)
    assert error <= 1e-4, f"losses differ by {error:.1e}"


def second_start():
    """a second start in the --out of a run: one line, exit code 2, the first is not
    disturbed"""
    out = "shared"
    first = Run(out)
    first.reach_step(30)
    first.process.send_signal(signal.SIGSTOP)  # or it might end before the second has started
    second = Run(out)
    code = second.end(120)
    errors = second.errors()
    assert code == 2 and len(errors) == 1, f"exit code {code}, it prints {errors}"
    assert "is in use by another run" in errors[0], errors[0]
    first.process.send_signal(signal.SIGCONT)
    assert first.end() == 0, "the first start failed"
    expect_same_end(out, ranks=1)


# ---- command line ----

FAULTS = {}
for function in (kill_in_step, kill_in_save, term, usr1, full_disk, dead_worker, dead_rank, nan,
                 changed_ranks, second_start):
    FAULTS[function.__name__.replace("_", "-")] = function


def meet(name):
    """Let a fault happen and print its line. -> Did it go as promised?"""
    start = time.monotonic()
    try:
        FAULTS[name]()
        verdict = "ok"
    except (AssertionError, ValueError, OSError) as error:
        verdict = f"FAILED: {error}"
    finally:
        for run in Run.started:
            run.clean_up()
    seconds = time.monotonic() - start
    what = " ".join(FAULTS[name].__doc__.split())
    print(f"{name}: {what}: {verdict} [{seconds:.0f} s]", flush=True)
    return verdict == "ok"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(FAULTS))
    names = parser.parse_args().names
    for name in names:
        if name not in FAULTS:
            parser.error(f"{name}: choose from {' '.join(FAULTS)}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        os.environ["OMP_NUM_THREADS"] = "1"  # sums to the bit depend on the number of threads
        Path("witness.py").write_text(WITNESS)
        data.make_toy_data(".", scenes=512, parts=("pairs",))
        results = [meet(name) for name in names or FAULTS]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
