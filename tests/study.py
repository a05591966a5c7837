"""The papers' central claims as small controlled experiments on the toy data.

    python tests/study.py --list         # claims, arms, expected minutes
    python tests/study.py                # all runs that have not been made, then the report
    python tests/study.py T --seeds 1    # of one claim, with seed 0 alone
    python tests/study.py --run T text 0 # one run; if it is finished, it is evaluated again
    python tests/study.py --report       # tables of what has been run, and study.png

An arm is a script and settings, on top of its demo and of MODELS. The script's own main() trains it
with one thread, on a GPU if there is one, in float32 and not compiled; then eval.py evaluates it on
held-out toy data. A finished run is a line of tests/results/study.jsonl, so a study goes on where
it stopped. Different claims or runs may be started side by side, a core each.

The rule, written down before the runs: arms are compared seed by seed. A difference is shown if the
95 % interval of its mean (Student's t) lies above 0, reversed if below, else not shown; a claim of
equality is equal if the interval lies inside the margin. An arm that shall beat the best of several
is compared with each. While seeds are missing, a comparison is open. Seeds draw weights and order;
the data are the same.
"""
import argparse
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field, replace

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch
from PIL import Image, ImageDraw

import common
import data
import eval as evaluation

PATH = "tests/results/study.jsonl"
MODELS = {  # settings that replace those of the demos
    "align": dict(text_depth=2),
    "mug": dict(recon_weight=0.3),
    "timix": dict(text_depth=2, fusion_depth=2),
}
RATES = {  # tried on seed 0, before anything else, by R and, for documents, by R2; of M3I's, the
    # lowest was the best
    "align": (1.5e-3, 3e-3, 6e-3),
    "mug": (1e-3, 2e-3, 4e-3),
    "lcl": (5e-4, 1e-3, 2e-3, 4e-3),
    "timix": (5e-4, 1e-3, 2e-3),
    "m3i": (2e-3, 4e-3, 8e-3, 1.6e-2),
}
CHOSEN_RATES = {"align": 3e-3, "mug": 2e-3, "lcl": 2e-3, "timix": 1e-3, "m3i": 2e-3}
T_CRITICAL = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 1 to 9 degrees
TASKS = {  # {metric: task of eval.py}, where they have different names
    "i2t_r1": "retrieval", "t2i_r1": "retrieval", "zeroshot_seen": "zeroshot",
    "zeroshot_unseen": "zeroshot", "miou": "segment",
}


# ---- claims ----

@dataclass
class Arm:
    script: str
    settings: dict = field(default_factory=dict)  # in which it differs from the demo
    toy: dict = field(default_factory=dict)  # options of data.make_toy_data, for training
    share: float = 1.0  # of the claim's steps
    first: "Arm" = None  # trained before, to start from its encoder
    runs_of: str = None  # the claim whose runs of this name serve here, too


@dataclass
class Claim:
    text: str
    samples: int
    batch: int
    seeds: int
    minutes: float  # of a run, roughly, with one thread
    sources: dict  # {field of Config: part of the toy data}
    metrics: list  # on held-out data; the first one is judged
    arms: dict
    comparisons: tuple = ()  # (arm, its reference)
    logged: tuple = ()  # metrics of training
    margin: float = None  # of a claim of equality


ON_PAIRS = {  # what keeps a script to pairs of image and caption
    "align": {}, "mug": {}, "lcl": {}, "timix": dict(boxes=False), "m3i": dict(w_class=0.0),
}
FEW = dict(scenes=250)
TERMS = ("class", "text", "intra", "inter")  # of M3I


def terms(*names, **options):
    """An arm of M3I. Its --lr is for 256 rows: twice R's gives half of R's rows the same rate."""
    weights = {f"w_{name}": float(name in names) for name in TERMS}
    return Arm("m3i", dict(weights, lr=2 * CHOSEN_RATES["m3i"]), **options)


CLAIMS = {  # in the order in which they run
    "R": Claim(
        "the learning rate of each method, chosen on held-out data",
        samples=64_000, batch=128, seeds=1, minutes=5, sources={"data": "pairs"},
        metrics=["linear", "knn"],
        arms={f"{script}-{rate:g}": Arm(script, dict(ON_PAIRS[script], lr=rate))
              for script, rates in RATES.items() for rate in rates}),
    "R2": Claim(
        "the learning rate of LCL on documents, chosen on held-out data",
        samples=25_600, batch=64, seeds=1, minutes=6, sources={"docs": "docs"},
        metrics=["attentive", "linear"],
        arms={f"lcl-{rate:g}": Arm("lcl", dict(lr=rate)) for rate in RATES["lcl"]}),
    "T": Claim(
        "TiMix: mixing by text is data efficient (250 scenes)",
        samples=25_600, batch=64, seeds=5, minutes=5, sources={"data": "pairs"},
        metrics=["i2t_r1", "t2i_r1"],
        arms={
            **{mix: Arm("timix", dict(mix=mix), FEW)
               for mix in ("none", "cutmix", "random", "text")},
            # a step of text took 1.08 times as long as one of none (seed 0, on an H200)
            "none-equal-time": Arm("timix", dict(mix="none"), FEW, share=1.08),
            "none-20000": Arm("timix", dict(mix="none")),
            "text-20000": Arm("timix", dict(mix="text")),
        },
        comparisons=(("text", "none"), ("text", "random"), ("text", "none-equal-time"))),
    "L1": Claim(
        "LCL: both losses together, on documents",
        samples=25_600, batch=64, seeds=5, minutes=7, sources={"docs": "docs"},
        metrics=["attentive", "linear"], logged=("spread", "cosine"),
        arms={name: Arm("lcl", dict(objective=name, lr=1e-3))  # chosen by R2
              for name in ("lcl", "con", "gen", "gen+reg")},
        comparisons=(("lcl", "con"), ("lcl", "gen"))),
    "G": Claim(
        "MUG: pixels and captions together",
        samples=64_000, batch=128, seeds=4, minutes=11, sources={"data": "pairs"},
        metrics=["linear", "knn", "finetune", "miou"],  # trained heads: on 2,000 labels
        arms={
            "contrast": Arm("align"),
            "pixels": Arm("mug", dict(cap_weight=0.0)),
            "captions": Arm("mug", dict(recon_weight=0.0)),
            "MUG": Arm("mug"),
            "MUG-0.1": Arm("mug", dict(recon_weight=0.1)),  # the demo's; added after the verdict
            "LCL": Arm("lcl", ON_PAIRS["lcl"]),
            "TiMix": Arm("timix", ON_PAIRS["timix"]),
            "M3I": Arm("m3i", ON_PAIRS["m3i"]),
            "random-weights": Arm("align", dict(lr=0.0), share=0.0),  # one step at rate 0
        },
        comparisons=(("MUG", "contrast"), ("MUG", "pixels"), ("MUG", "captions"),
                     ("contrast", "pixels"))),
    "M": Claim(
        "M3I: all targets in one stage",
        samples=32_000, batch=64, seeds=4, minutes=5,
        sources={"data": "pairs", "labels": "labels"}, metrics=["linear", "knn"],
        arms={
            **{name: terms(name) for name in TERMS},
            "all": terms(*TERMS),
            "two-stages": terms("class", "text", share=0.5,
                                first=terms("intra", "inter", share=0.5)),
        },
        comparisons=[("all", name) for name in (*TERMS, "two-stages")]),
    "A": Claim(
        "ALIGN: scale makes up for noise, 40 % of the captions being wrong",
        samples=64_000, batch=128, seeds=4, minutes=4, sources={"data": "pairs"},
        metrics=["zeroshot_seen", "zeroshot_unseen", "i2t_r1"],
        arms={
            "clean-2500": Arm("align", toy=dict(scenes=2500)),
            **{f"noisy-{n}": Arm("align", toy=dict(scenes=n, noise=0.4))
               for n in (2500, 5000, 10_000, 20_000)},
            # added after the verdict: 500 steps are few for captions of which many are wrong
            "clean-2500-long": Arm("align", toy=dict(scenes=2500), share=4.0),
            **{f"noisy-{n}-long": Arm("align", toy=dict(scenes=n, noise=0.4), share=4.0)
               for n in (2500, 20_000)},
        },
        comparisons=(("noisy-20000", "clean-2500"),)),
    "L2": Claim(
        "LCL: as good as contrast on pairs, within 3 points",
        samples=64_000, batch=128, seeds=5, minutes=5, sources={"data": "pairs"},
        metrics=["linear", "knn"], margin=0.03,
        arms={"lcl": Arm("lcl", dict(image_first=0.5)),  # random order
              "contrast": Arm("align", runs_of="G")},
        comparisons=(("lcl", "contrast"),)),
}


# ---- runs ----

def n_steps(claim, arm):
    return max(1, round(arm.share * claim.samples / claim.batch))


def config(claim, arm, seed, out, init=None):
    """The Config of an arm; makes its toy data."""
    script = importlib.import_module(arm.script)
    training = data.make_toy_data("runs", parts=tuple(claim.sources.values()), **arm.toy)
    settings = {**script.DEMO, **MODELS.get(arm.script, {}), "lr": CHOSEN_RATES[arm.script],
                **arm.settings}
    for source, part in claim.sources.items():
        settings[source] = [f"{training}/{part}"]
    settings.update(
        out=out, init=init, seed=seed, workers=0, eval_every=-1, precision="fp32", compile=False,
        batch=claim.batch, steps=n_steps(claim, arm))
    return replace(script.Config(), **settings)


def train(arm, cfg):
    """-> the checkpoint. UserError if a signal stopped the run."""
    importlib.import_module(arm.script).main(cfg)
    checkpoint = f"{cfg.out}/last.pt"
    if common.read_checkpoint(checkpoint)["step"] < cfg.steps:
        raise common.UserError(f"{cfg.out} is stopped: the same command goes on from there")
    return checkpoint


def evaluate(task, checkpoint, seed, device):
    """{metric: value} as on eval.py's command line without --data."""
    model, tokenizer, cfg = evaluation.load_model(checkpoint, device)
    part = "labels" if task in evaluation.ON_LABELS else "pairs"
    paths = data.expand(f"{data.make_toy_data('runs')}/{part}", "test")
    if task in evaluation.HEADS:
        args = argparse.Namespace(data=None, seed=seed)
        rows = evaluation.HEADS[task](model, tokenizer, paths, cfg, device, args)
    else:
        rows = evaluation.PROTOCOLS[task](model, tokenizer, paths, cfg, device)
    return {metric: value for metric, value, _ in rows}


def run(key, name, seed):
    """Train and evaluate an arm, and write its line."""
    claim = CLAIMS[key]
    arm = claim.arms[name]
    out = f"runs/study/{key}/{name}-{seed}"
    device = common.init_distributed()  # of one rank
    init = None
    if arm.first is not None:
        checkpoint = train(arm.first, config(claim, arm.first, seed, f"{out}/first"))
        init = f"{out}/init.safetensors"
        evaluation.export(evaluation.load_model(checkpoint, device)[0].vision, init)
    cfg = config(claim, arm, seed, out, init)
    checkpoint = train(arm, cfg)
    with open(f"{out}/log.jsonl") as f:
        log = [json.loads(row) for row in f]
    metrics = {metric: log[-1][metric] for metric in claim.logged if metric in log[-1]}
    for task in {TASKS.get(metric, metric): None for metric in claim.metrics}:
        metrics.update(evaluate(task, checkpoint, seed, device))
    # of training alone (its last stage), with its saves, also of a run that was interrupted
    seconds = cfg.steps * cfg.batch * statistics.mean(1 / row["images_per_s"] for row in log)
    commit = ""
    with contextlib.suppress(OSError):  # no git
        git = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    line = {
        "claim": key, "arm": name, "seed": seed, "steps": cfg.steps, "seconds": seconds,
        "command": f"python tests/study.py --run {key} {name} {seed}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "metrics": metrics, "commit": commit,
    }
    with open(PATH, "a") as f:
        f.write(json.dumps(line) + "\n")


def run_missing(key, seeds):
    """The runs of a claim that have no line yet."""
    for seed in seeds:
        for name, arm in CLAIMS[key].arms.items():
            where = arm.runs_of or key
            if (where, name, seed) not in read_results():  # read anew: others may run beside
                print(f"\n{where}, {name}, seed {seed}", flush=True)
                run(where, name, seed)


# ---- report ----

def read_results():
    """{(claim, arm, seed): its last line}, without lines that were cut short."""
    results = {}
    if os.path.exists(PATH):
        with open(PATH) as f:
            for text in f:
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    results[line["claim"], line["arm"], line["seed"]] = line
    return results


def values_of(results, key, name, metric, seeds):
    """{seed: value} of the finished runs of an arm."""
    key = CLAIMS[key].arms[name].runs_of or key
    lines = {seed: results[key, name, seed] for seed in seeds if (key, name, seed) in results}
    return {seed: line["metrics"][metric] for seed, line in lines.items()
            if metric in line["metrics"]}


def judge(results, key, arm, reference, seeds):
    """By the rule at the top -> comparison, mean difference, ends of its interval, verdict.

    None before two seeds.
    """
    claim = CLAIMS[key]
    values = values_of(results, key, arm, claim.metrics[0], seeds)
    others = values_of(results, key, reference, claim.metrics[0], seeds)
    differences = [values[seed] - others[seed] for seed in values if seed in others]
    n = len(differences)
    if n < 2:
        return None
    mean = statistics.mean(differences)
    half = T_CRITICAL[n - 2] * statistics.stdev(differences) / n**0.5
    low = mean - half
    high = mean + half
    outcome = "not shown"
    if n < claim.seeds or n < len(seeds):
        outcome = "open"
    elif claim.margin is not None:
        if -claim.margin < low and high < claim.margin:
            outcome = "equal"
    elif low > 0:
        outcome = "shown"
    elif high < 0:
        outcome = "reversed"
    return f"{key}: {arm} minus {reference}", mean, low, high, outcome


def table_row(results, key, name, metrics, seeds):
    """Name of an arm, then mean and standard deviation of each metric over seeds, in percent."""
    judged = values_of(results, key, name, metrics[0], seeds)
    missing = [str(seed) for seed in seeds if seed not in judged]
    cells = [f"{name} (missing: seed {', '.join(missing)})" if missing else name]
    for metric in metrics:
        values = values_of(results, key, name, metric, seeds).values()
        cell = f"{100 * statistics.mean(values):.1f}" if values else "-"
        if len(values) > 1:
            cell += f" ± {100 * statistics.stdev(values):.1f}"
        cells.append(cell)
    return f"| {' | '.join(cells)} |"


def report(results, key, seeds):
    """Print the tables of a claim -> what judge gives."""
    claim = CLAIMS[key]
    metrics = [*claim.metrics, *claim.logged]
    print(f"\n{key}. {claim.text}\n\n| arm, in % | {' | '.join(metrics)} |")
    print("|---" * (1 + len(metrics)) + "|")
    for name in claim.arms:
        print(table_row(results, key, name, metrics, seeds))
    rows = [judge(results, key, *comparison, seeds) for comparison in claim.comparisons]
    rows = [row for row in rows if row is not None]
    if rows:
        print(f"\n| {metrics[0]} | points | 95 % interval | verdict |\n|---|---|---|---|")
    for what, mean, low, high, outcome in rows:
        print(f"| {what} | {100 * mean:+.1f} | {100 * low:+.1f} to {100 * high:+.1f} | {outcome} |")
    return rows


def draw(rows, path):
    """A bar from 0 to the mean of each row of judge, and its interval as a line."""
    least = min(0.0, *[low for _, _, low, _, _ in rows])
    most = max(0.0, *[high for _, _, _, high, _ in rows])
    scale = 400 / (most - least)
    zero = 300 - least * scale
    page = Image.new("RGB", (930, 60 + 30 * len(rows)), "white")
    canvas = ImageDraw.Draw(page)
    canvas.text((14, 12), "Differences in points, 95 % intervals", "black", evaluation.TITLE_FONT)
    for i, (what, mean, low, high, outcome) in enumerate(rows):
        y = 60 + 30 * i
        canvas.text((290, y), what, "black", evaluation.FONT, "rm")
        left, right = sorted((zero, zero + mean * scale))
        canvas.rectangle((left, y - 8, right, y + 8), "silver")
        canvas.line((zero + low * scale, y, zero + high * scale, y), "black", 2)
        text = f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), {outcome}"
        canvas.text((710, y), text, "black", evaluation.FONT, "lm")
    canvas.line((zero, 44, zero, page.height - 14), "black")
    page.save(path)


def show(key, seeds):
    """Print the arms of a claim and what they are expected to take."""
    claim = CLAIMS[key]
    runs = len(seeds) * sum(arm.share for arm in claim.arms.values() if arm.runs_of is None)
    print(f"\n{key}. {claim.text}: {len(seeds)} seeds, {claim.samples:,} samples, "
          f"about {claim.minutes * runs:.0f} minutes")
    for name, arm in claim.arms.items():
        first = f", first {arm.first.settings}" if arm.first is not None else ""
        print(f"    {name:<18}{arm.script:<6}{n_steps(claim, arm):>5} steps  "
              f"{arm.settings} {arm.toy}{first}")
    for arm, reference in claim.comparisons:
        print(f"    judged: {claim.metrics[0]}, {arm} minus {reference}")


def main(argv=None):
    parser = common.Parser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"{' '.join(CLAIMS)} [all]")
    parser.add_argument("--seeds", type=int, choices=range(1, 11), help="[as many as a claim says]")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--run", nargs=3, metavar=("CLAIM", "ARM", "SEED"), help="one run alone")
    modes.add_argument("--list", action="store_true", help="claims, arms, expected minutes")
    modes.add_argument("--report", action="store_true", help="tables of what has been run")
    args = parser.parse_args(argv)
    if args.run:
        key, name, seed = args.run
        if key not in CLAIMS or name not in CLAIMS[key].arms or not seed.isdecimal():
            raise common.UserError(f"--run {key} {name} {seed}: --list names claims and arms")
        run(CLAIMS[key].arms[name].runs_of or key, name, int(seed))
        return
    for key in args.claims:
        if key not in CLAIMS:
            raise common.UserError(f"{key} is no claim: choose from {' '.join(CLAIMS)}")
    if args.list:
        print(__doc__.split("\n\n")[-1])  # the rule
    rows = []
    for key in args.claims or CLAIMS:
        seeds = range(args.seeds or CLAIMS[key].seeds)
        if args.list:
            show(key, seeds)
            continue
        if not args.report:
            run_missing(key, seeds)
        rows += report(read_results(), key, seeds)
    if rows and not args.claims and not args.seeds:
        draw(rows, PATH.replace(".jsonl", ".png"))


if __name__ == "__main__":
    os.chdir(ROOT)  # paths are relative to it
    torch.set_num_threads(1)
    common.run_command(main)
