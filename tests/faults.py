"""Kills runs with SIGKILL at random moments and while they save, restarts them, and compares with a run left alone: equal to the bit.

    python tests/faults.py                       # 20 kills over all scripts, some minutes
    python tests/faults.py --kills 4 mug.py

Nothing of a dead run may be counted twice or taken for a checkpoint; exit code 1 if anything differs.
"""
import argparse, json, os, random, signal, subprocess, sys, tempfile, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import common
import torch

import data

STEPS = 60
SMALL = f"--steps {STEPS} --save-every 3 --dim 32 --depth 1 --heads 2 --text-dim 32 --text-heads 2 --eval-every -1 --workers 1".split()
SCRIPTS = {"align.py": ["--batch", "64"], "mug.py": ["--batch", "64"], "lcl.py": ["--batch", "8"], "timix.py": ["--batch", "32"], "m3i.py": ["--batch", "32"]}


def start(script, out, root):
    command = [sys.executable, os.path.join(ROOT, script), *SMALL, *SCRIPTS[script], "--out", out]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-500:]


def kill(process, out, rng, saving):
    """SIGKILL while a checkpoint is being written, or at a random moment. Returns whether the run was still going."""
    began, saves, writing = time.time(), rng.randrange(8), f"{out}/last.pt.tmp"
    deadline = began + rng.uniform(3, 8)
    while process.poll() is None and (saving or time.time() < deadline):
        if saving and os.path.exists(writing) and os.path.getmtime(writing) > began:             # not what an earlier kill left
            if not saves:
                break
            saves -= 1
            time.sleep(0.05)                                 # this one may finish
        time.sleep(0.001)
    going = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return going


def differences(out, alone):
    """What a killed and restarted run left otherwise than one left alone."""
    ours, theirs = (common.read_checkpoint(f"{folder}/last.pt") for folder in (out, alone))
    found = [name for name, tensor in theirs["model"].items() if not torch.equal(tensor, ours["model"][name])]
    moments = [[v for state in s["optimizer"]["state"].values() for v in state.values() if isinstance(v, torch.Tensor)] for s in (ours, theirs)]
    found += ["optimizer state"] * (not all(map(torch.equal, *moments)))
    with open(f"{out}/log.jsonl") as f:
        steps = [json.loads(line)["step"] for line in f]
    found += ["steps in log.jsonl"] * (steps != list(range(STEPS)))
    return found + [name for name in os.listdir(out) if name.endswith(".tmp")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), choices=[*SCRIPTS, []], metavar="SCRIPT")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, wrong = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as root:
        data.make_world(root=os.path.join(root, "runs"), parts=("pairs", "labels", "docs"))
        for n, script in enumerate(args.scripts):
            alone, out = f"{root}/{script}-alone", f"{root}/{script}-killed"
            finish(start(script, alone, root))
            kills, saving = 0, 0
            while kills < (args.kills + n) // len(args.scripts):
                while_saving = kills % 2 == 1
                if not kill(start(script, out, root), out, rng, while_saving):
                    break                                    # it was done before
                kills, saving = kills + 1, saving + while_saving
            finish(start(script, out, root))
            found = differences(out, alone)
            wrong += len(found)
            print(f"{script}: {kills} kills, {saving} of them while saving: {', '.join(found) or 'equal to the bit'}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
