"""Faults in real processes: what a run promises when it is killed, stopped, resized or starved.

    python tests/faults.py                         # all of them, some minutes on two cores
    python tests/faults.py kill-in-save dead-rank  # some

Each fault meets a small run of align.py on toy data in a temporary folder. Afterwards the same
command is given again, and must end with the weights, the optimizer state and the losses of a run
that was left alone, to the bit. Prints a line for each fault: its name, what happens and what must
follow, ok or FAILED. Exit code 1 if one failed. Every wait ends when its event comes, or after five
minutes. Linux only: reads /proc.
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
LIMIT = 300  # seconds, of any wait
# many unused ids make a checkpoint of 8 MB, so that a save takes long enough to be hit
FLAGS = f"""--data toy/pairs --workers 1 --steps {STEPS} --save-every {SAVE_EVERY} --log-every 1
    --eval-every -1 --batch 32 --lr 3e-3 --warmup 10 --image-size 32 --patch 8 --dim 32 --depth 1
    --heads 2 --context 16 --vocab-size 20000 --text-dim 32 --text-depth 1 --text-heads 2""".split()
TORCHRUN = """-m torch.distributed.run --standalone --nproc_per_node 2 --redirects 3
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1""".split()

# align.py, which says how each rank exits, and gives rank 1 a NaN if the environment asks for it
PROGRAM = f"""
import os, sys
sys.path.insert(0, {ROOT!r})
import align, common

rank = os.environ.get("RANK", "0")
contrastive_loss = align.contrastive_loss
calls = 0

def poisoned_loss(*args):
    global calls
    calls += 1
    loss = contrastive_loss(*args)
    return loss * float("nan") if calls == {NAN_STEP} + 1 else loss

if "NAN" in os.environ and rank == "1":
    align.contrastive_loss = poisoned_loss
try:
    common.run(align.main, align.Config, align.DEMO, "")
except SystemExit as end:
    print(f"rank {{rank}} exits with {{end.code}}", flush=True)
    raise
"""


# ---- processes ----

def is_running(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # empty: it has ended
    except OSError:
        return False


def descendants(pid):
    """Processes below this one, parents before children."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found += [int(child) for child in path.read_text().split()]
    return found[1:]


def wait_until(condition, what, run=None, pause=0.02):
    """run: one that must not end before."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < LIMIT, f"waited {LIMIT} s for {what}"
        assert run is None or run.process.poll() is None, f"the run ended before {what}"
        time.sleep(pause)


def wait_for_end_of(pids):
    def have_ended():
        return not any(is_running(pid) for pid in pids)

    wait_until(have_ended, f"the end of {pids}")


class Run:
    """A start of the training run in `out`, with torchrun if there are 2 ranks."""

    def __init__(self, out, ranks=1, **environment):
        self.out = out
        self.logs = Path(tempfile.mkdtemp(dir="."))
        command = [sys.executable]
        name = "stdout.log"
        if ranks == 2:
            command += [*TORCHRUN, "--log-dir", self.logs]
            name = "torchrun.txt"  # the ranks have their own std*.log
        with open(self.logs / name, "w") as output:
            self.process = subprocess.Popen(
                [*command, "program.py", *FLAGS, "--out", out],
                stdout=output, stderr=output, env={**os.environ, **environment})
        self.pid = self.process.pid

    def output(self):
        """What the ranks print, one after another, without torchrun's own reports."""
        paths = sorted(self.logs.rglob("std*.log"))
        return "".join(path.read_text(errors="replace") for path in paths)

    def errors(self):
        """The lines that a user would read as an error."""
        return re.findall(r"^.*(?:Error|error|Traceback).*$", self.output(), re.MULTILINE)

    def end(self):
        """Wait for its end. -> exit code"""
        return self.process.wait(LIMIT)

    def make_steps(self, n):
        """Wait until it has made n more steps."""
        step = steps_in_log(self.out) + n

        def is_in_log():
            return steps_in_log(self.out) >= step

        wait_until(is_in_log, f"step {step}", self)

    def kill(self):
        """SIGKILL to the process that was started, which must have been alive."""
        self.process.kill()
        assert self.end() == -signal.SIGKILL, "the run ended before it was killed"

    def must_fail(self, text):
        """It must end with exit code 2 and one line."""
        code = self.end()
        errors = self.errors()
        assert code == 2, f"exit code {code}"
        assert len(errors) == 1 and text in errors[0], f"it prints {errors}"


# ---- what a run leaves ----

def steps_in_log(out):
    path = Path(out, "log.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


def losses(out):
    rows = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS)), "steps lack in the log, or repeat"
    return [row["loss"] for row in rows]


def saved_step(out):
    return common.read_checkpoint(f"{out}/last.pt")["step"]


def saved_tensors(out):
    """{number: bytes} of the tensors in the checkpoint, first the model's, then the optimizer's."""
    with zipfile.ZipFile(f"{out}/last.pt") as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        return {name.partition("/data/")[2]: archive.read(name) for name in names}


@functools.cache
def left_alone(ranks):
    """Folder of a run to which nothing happens."""
    out = f"alone-{ranks}"
    run = Run(out, ranks)
    assert run.end() == 0, f"a run without a fault failed: {run.output()[-300:]!r}"
    return out


def finish(out, ranks=1):
    """Give the same command again: it must go on, and end with the weights, the optimizer state and
    the losses of the run that was left alone, to the bit."""
    run = Run(out, ranks)
    assert run.end() == 0, f"the same command failed: {run.output()[-300:]!r}"
    assert "going on from step" in run.output(), "the same command started from the beginning"
    reference = left_alone(ranks)
    assert saved_step(out) == STEPS, f"the checkpoint is of step {saved_step(out)}"
    assert saved_tensors(out) == saved_tensors(reference), "weights or optimizer state differ"
    assert losses(out) == losses(reference), "the losses in the log differ"
    assert not list(Path(out).glob("*.tmp")), "a .tmp file is left"


# ---- the faults: what happens: what must follow ----

def kill_in_step():
    """SIGKILL to a run of one rank, three times: loader workers end, the run goes on to the bit"""
    out = "killed"
    for _ in range(3):
        run = Run(out)
        run.make_steps(25)
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
        wait_until(Path(out, "last.pt").exists, "a save", run)
        wait_until(unfinished.exists, "another save", run, pause=0.001)
        run.kill()
        if unfinished.exists():
            break
    assert unfinished.exists(), "all saves ended before the signal"
    step = saved_step(out)
    assert step % SAVE_EVERY == 0, f"a checkpoint of step {step}"
    finish(out)


def stop(out, number, rank=None):
    """Stop 2 ranks by a signal to torchrun, or to one rank alone. -> torchrun's exit code"""
    run = Run(out, ranks=2)
    run.make_steps(20)
    pids = descendants(run.pid)  # first rank 0, then rank 1
    os.kill(run.pid if rank is None else pids[rank], number)
    code = run.end()
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
    stop("terminated", signal.SIGTERM)
    finish("terminated", ranks=2)


def usr1():
    """SIGUSR1 to torchrun of 2 ranks, as from Slurm: the same"""
    stop("preempted", signal.SIGUSR1)
    finish("preempted", ranks=2)


def full_disk():
    """no space left for a checkpoint: one line, exit code 2, the run goes on to the bit"""
    out = "full"
    run = Run(out)
    run.make_steps(3 * SAVE_EVERY)
    new_file = Path(out, "last.pt.tmp")

    def fill_disk():
        try:
            new_file.symlink_to("/dev/full")  # every write to it gives ENOSPC
        except FileExistsError:  # a save is going on
            return False
        return True

    wait_until(fill_disk, "the disk was full", run, pause=0.001)
    run.must_fail("No space left on device")
    assert not new_file.is_symlink(), "last.pt.tmp is left"
    finish(out)


def dead_worker():
    """SIGKILL to a loader worker: one line, exit code 2, the run goes on to the bit"""
    out = "without-worker"
    run = Run(out)
    run.make_steps(3 * SAVE_EVERY + 3)  # no save is going on
    os.kill(descendants(run.pid)[0], signal.SIGKILL)
    run.must_fail("fewer --workers")
    finish(out)


def dead_rank():
    """SIGKILL to rank 1 of 2, then to rank 0: the other ends with at most one line, the run goes
    on to the bit"""
    out = "without-rank"
    for rank in (1, 0):
        run = Run(out, ranks=2)
        run.make_steps(20)
        pids = descendants(run.pid)
        os.kill(pids[rank], signal.SIGKILL)
        wait_for_end_of(pids)
        assert run.end() != 0, "torchrun exits with 0"
        # a loader worker of the killed rank may print that its rank is gone
        errors = [line for line in run.errors() if f"[rank{rank}]" not in line]
        assert len(errors) <= 1, f"rank {1 - rank} prints {len(errors)} lines, {errors[:3]}"
    finish(out, ranks=2)


def nan():
    """NaN in the loss of rank 1 of 2: the ranks exit with 2, at most a line each, last.pt is sound,
    the run goes on to the bit"""
    out = "nan"
    run = Run(out, ranks=2, NAN="1")
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
    run.make_steps(50)
    run.process.terminate()
    assert run.end() == 0, f"exit code {run.process.returncode}"
    code = stop(out, signal.SIGUSR1, rank=1)
    assert code == 0, f"all ranks exit with 0, torchrun with {code}"
    assert Run(out).end() == 0, "the third start failed"
    pairs = zip(losses(out), losses(left_alone(1)))
    error = max(abs(loss / reference - 1) for loss, reference in pairs)
    assert error <= 1e-4, f"losses differ by {error:.1e}"


# ---- command line ----

FAULTS = {}
for function in (kill_in_step, kill_in_save, term, usr1, full_disk, dead_worker, dead_rank, nan,
                 changed_ranks):
    FAULTS[function.__name__.replace("_", "-")] = function


def meet(name):
    """Let a fault happen and print its line. -> Did it go as promised?"""
    start = time.monotonic()
    verdict = "ok"
    try:
        FAULTS[name]()
    except (AssertionError, ValueError, OSError, subprocess.TimeoutExpired) as error:
        verdict = f"FAILED: {error}"
    finally:
        for pid in descendants(os.getpid()):  # what a failure has left
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
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
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(LIMIT)  # until torchrun kills, else 30
        Path("program.py").write_text(PROGRAM)
        os.rename(data.make_toy_data(".", scenes=512, parts=("pairs",)), "toy")
        results = [meet(name) for name in names or FAULTS]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
