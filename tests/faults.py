"""Faults in real processes: what a run promises when it is killed, stopped, resized or starved.

    python tests/faults.py                         # all of them, some minutes on two cores
    python tests/faults.py kill_in_save dead_rank  # some

Each fault meets a small run of align.py on toy data in a temporary folder. Afterwards the same
command is given again, and must end with the weights, the optimizer state and the losses of a run
that was left alone, to the bit; with another number of ranks, nearly. Prints a line for each fault:
its name, what happens and what must follow, ok or FAILED. Exit code 1 if one failed. Linux only:
reads /proc.
"""
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

import align
import common
import data

STEPS = 150
SAVE_EVERY = 10
NAN_STEP = 59  # a save follows it
LIMIT = 300  # seconds, of any wait
# many unused ids make a checkpoint of 8 MB, so that a save takes long enough to be hit
FLAGS = f"""--data toy/pairs --workers 1 --steps {STEPS} --save-every {SAVE_EVERY} --log-every 1
    --eval-every -1 --batch 32 --lr 3e-3 --warmup 10 --image-size 32 --patch 8 --dim 32 --depth 1
    --heads 2 --context 16 --vocab-size 20000 --text-dim 32 --text-depth 1 --text-heads 2""".split()
TORCHRUN = """-m torch.distributed.run --standalone --redirects 3
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1""".split()


# ---- a run: this file is also the program of each rank ----

def train():
    """align.py, which says with which code it exits; the rank NAN_RANK gets a NaN in its loss."""
    rank = os.environ["RANK"]
    if os.environ.get("NAN_RANK") == rank:
        contrastive_loss = align.contrastive_loss
        steps = itertools.count()

        def loss_with_nan(*args):
            factor = float("nan") if next(steps) == NAN_STEP else 1
            return factor * contrastive_loss(*args)

        align.contrastive_loss = loss_with_nan
    try:
        common.run(align.main, align.Config, align.DEMO, "")
    except SystemExit as end:
        print(f"rank {rank} exits with {end.code}", flush=True)
        raise


class Run:
    """A start of the training in the folder `out`."""

    def __init__(self, out, ranks=1, **environment):
        self.out = out
        self.logs = Path(tempfile.mkdtemp(dir="."))
        command = [sys.executable, *TORCHRUN, "--nproc_per_node", str(ranks),
                   "--log-dir", self.logs, __file__, "train", *FLAGS, "--out", out]
        self.torchrun = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, **environment})

    def make_steps(self, n):
        """Wait until it has made n more steps. -> pids: of rank 0, of rank 1, of their workers"""
        wait_until(has_made, self.out, steps_in_log(self.out) + n)
        return descendants(self.torchrun.pid)

    def end(self):
        """Wait for its end. -> exit code of torchrun"""
        return self.torchrun.wait(LIMIT)

    def output(self):
        """What the ranks print, one after another, without torchrun's own reports."""
        paths = sorted(self.logs.rglob("std*.log"))
        return "".join(path.read_text(errors="replace") for path in paths)

    def errors(self):
        """The lines that a user would read as an error."""
        return re.findall(r"^.*(?:Error|error|Traceback).*$", self.output(), re.MULTILINE)

    def exit_codes(self):
        """Of the ranks that were not killed."""
        return re.findall(r"^rank \d exits with (\w+)$", self.output(), re.MULTILINE)


# ---- processes ----

def descendants(pid):
    """Processes below this one, parents before children."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found += [int(child) for child in path.read_text().split()]
    return found[1:]


def have_ended(pids):
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{pid}/cmdline").read_bytes():  # empty: a zombie
                return False
    return True


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def wait_until(condition, *args, pause=0.02):
    """Wait until condition(*args) is true."""
    start = time.monotonic()
    while not condition(*args):
        assert time.monotonic() - start < LIMIT, f"waited {LIMIT} s: {condition.__name__} {args}"
        time.sleep(pause)


# ---- what a run leaves ----

def steps_in_log(out):
    path = Path(out, "log.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


def has_made(out, step):
    return steps_in_log(out) >= step


def losses(out):
    rows = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS)), "steps lack in the log, or repeat"
    return [row["loss"] for row in rows]


def checkpoint(out):
    return common.read_checkpoint(f"{out}/last.pt")


def finish(out, ranks=1):
    """Give the same command again: it must go on, and end with the weights, the optimizer state and
    the losses of the run that was left alone, to the bit."""
    run = Run(out, ranks)
    assert run.end() == 0, f"the same command failed: {run.output()[-300:]!r}"
    assert "going on from step" in run.output(), "the same command started from the beginning"
    state = checkpoint(out)
    assert state["step"] == STEPS, f"the checkpoint is of step {state['step']}"
    reference = checkpoint(f"alone-{ranks}")
    for part in ("model", "optimizer"):
        torch.testing.assert_close(state[part], reference[part], rtol=0, atol=0)
    assert losses(out) == losses(f"alone-{ranks}"), "the losses in the log differ"
    assert not list(Path(out).glob("*.tmp")), "a .tmp file is left"


# ---- the faults: what happens: what must follow ----

def kill_in_step(out):
    """SIGKILL to a run of one rank, three times: loader workers end, the run goes on to the bit"""
    for _ in range(3):
        run = Run(out)
        rank, worker = run.make_steps(25)
        kill(rank)
        assert run.end() != 0, "the run ended before it was killed"
        wait_until(have_ended, [worker])
    finish(out)


def kill_in_save(out):
    """SIGKILL while last.pt.tmp is written: last.pt is whole, the run goes on to the bit"""
    unfinished = Path(out, "last.pt.tmp")
    for _ in range(10):  # a save may end before the signal comes
        run = Run(out)
        rank, _ = run.make_steps(SAVE_EVERY + 3)
        wait_until(unfinished.exists, pause=0.001)
        kill(rank)
        run.end()
        if unfinished.exists():
            break
    assert unfinished.exists(), "all saves ended before the signal"
    step = checkpoint(out)["step"]
    assert 0 < step < STEPS and step % SAVE_EVERY == 0, f"a checkpoint of step {step}"
    finish(out)


def stop(out, ranks, number, rank=None):
    """Stop a run by a signal to torchrun, or to one rank alone: it must save and exit with 0."""
    run = Run(out, ranks)
    pids = run.make_steps(25)
    os.kill(run.torchrun.pid if rank is None else pids[rank], number)
    run.end()
    wait_until(have_ended, pids)
    assert run.exit_codes() == ranks * ["0"], f"exit codes of the ranks: {run.exit_codes()}"
    assert run.errors() == [], f"it prints {run.errors()}"
    step = checkpoint(out)["step"]
    assert step < STEPS and steps_in_log(out) == step, f"saved step {step}, log is of another"
    line = f"stopped at step {step}: the same command goes on"
    assert line in run.output(), "it does not say so"


def term_and_usr1(out):
    """SIGTERM to torchrun of 2 ranks, and SIGUSR1, as from Slurm, when they have gone on: each time
    they save and exit with 0, the run goes on to the bit"""
    stop(out, 2, signal.SIGTERM)
    stop(out, 2, signal.SIGUSR1)
    finish(out, ranks=2)


def changed_ranks(out):
    """stopped and gone on with 1, 2, then 1 rank: losses within 1e-4 of those of 1 rank"""
    stop(out, 1, signal.SIGTERM)
    stop(out, 2, signal.SIGUSR1, rank=1)
    run = Run(out)
    assert run.end() == 0 and "going on from step" in run.output(), "the third start failed"
    for loss, reference in zip(losses(out), losses("alone-1")):
        assert abs(loss / reference - 1) <= 1e-4, f"a loss of {loss} instead of {reference}"


def must_fail(run, text, ranks=1):
    """The ranks must exit with code 2, each with at most a line, which has this text."""
    run.end()
    assert set(run.exit_codes()) == {"2"}, f"exit codes of the ranks: {run.exit_codes()}"
    errors = run.errors()
    assert 1 <= len(errors) <= ranks, f"it prints {errors}"
    assert all(text in line for line in errors), f"it prints {errors}"


def full_disk(out):
    """no space left for a checkpoint: one line, exit code 2, the run goes on to the bit"""
    stop(out, 1, signal.SIGTERM)
    Path(out, "last.pt.tmp").symlink_to("/dev/full")  # every write to it gives ENOSPC
    must_fail(Run(out), "No space left on device")
    finish(out)


def dead_worker(out):
    """SIGKILL to a loader worker: one line, exit code 2, the run goes on to the bit"""
    run = Run(out)
    _, worker = run.make_steps(3 * SAVE_EVERY + 3)  # no save is going on
    kill(worker)
    must_fail(run, "fewer --workers")
    finish(out)


def dead_rank(out):
    """SIGKILL to rank 1 of 2, then to rank 0: the other ends with at most one line, the run goes
    on to the bit"""
    for rank in (1, 0):
        run = Run(out, ranks=2)
        pids = run.make_steps(20)
        kill(pids[rank])
        wait_until(have_ended, pids)
        assert run.end() != 0, "torchrun exits with 0"
        # a loader worker of the killed rank may print that its rank is gone
        errors = [line for line in run.errors() if f"[rank{rank}]" not in line]
        assert len(errors) <= 1, f"rank {1 - rank} prints {len(errors)} lines, {errors[:3]}"
    finish(out, ranks=2)


def nan(out):
    """NaN in the loss of rank 1 of 2: the ranks exit with 2, at most a line each, last.pt is sound,
    the run goes on to the bit"""
    step = NAN_STEP // SAVE_EVERY * SAVE_EVERY
    text = f"at step {NAN_STEP}: try a lower --lr; last checkpoint: {out}/last.pt of step {step}"
    must_fail(Run(out, ranks=2, NAN_RANK="1"), text, ranks=2)
    assert checkpoint(out)["step"] == step, f"the checkpoint is of step {checkpoint(out)['step']}"
    finish(out, ranks=2)


# ---- command line ----

FAULTS = {fault.__name__: fault for fault in (
    kill_in_step, kill_in_save, term_and_usr1, changed_ranks, full_disk, dead_worker, dead_rank,
    nan)}


def meet(name):
    """Let a fault happen, in a folder of its name, and print its line. -> Is all as promised?"""
    start = time.monotonic()
    verdict = "ok"
    try:
        FAULTS[name](name)
    except Exception as error:
        verdict = f"FAILED: {error}"
    for pid in descendants(os.getpid()):  # what a failure has left
        with contextlib.suppress(ProcessLookupError):
            kill(pid)
    what = " ".join(FAULTS[name].__doc__.split())
    print(f"{name}: {what}: {verdict} [{time.monotonic() - start:.0f} s]", flush=True)
    return verdict == "ok"


def main(names):
    for name in names:
        if name not in FAULTS:
            sys.exit(f"{name} is no fault: choose from {' '.join(FAULTS)}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        os.environ["OMP_NUM_THREADS"] = "1"  # sums to the bit depend on the number of threads
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(LIMIT)  # until torchrun kills, else 30
        os.rename(data.make_toy_data(".", scenes=512, parts=("pairs",)), "toy")
        for ranks in (1, 2):
            run = Run(f"alone-{ranks}", ranks)
            assert run.end() == 0, f"a run without a fault fails:\n{run.output()}"
        results = [meet(name) for name in names]
    sys.exit(not all(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]  # the rest are the flags of align.py
        train()
    else:
        main(sys.argv[1:] or list(FAULTS))
