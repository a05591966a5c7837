"""tests/study.py: arms differ in what a claim says, verdicts follow a rule, stopped runs go on."""
import dataclasses
import importlib
import json
import math
import signal

import numpy as np
import pytest
import torch

import align
import common
import data
import study
from conftest import TINY, TINY_OF, close, signal_at_step

# Fields in which an arm differs from the first arm of the same script
DIFFERENCES = {
    "R": {f"{script}-{rate:g}": {"lr"} for script in study.RATES
          for rate in study.RATES[script][1:]},
    "R2": {f"lcl-{rate:g}": {"lr"} for rate in study.RATES["lcl"][1:]},
    "T": {"cutmix": {"mix"}, "random": {"mix"}, "text": {"mix"}, "none-equal-time": {"steps"},
          "none-20000": {"data"}, "text-20000": {"data", "mix"}},
    "L1": {"con": {"objective"}, "gen": {"objective"}, "gen+reg": {"objective"}},
    "G": {"captions": {"cap_weight", "recon_weight"}, "MUG": {"cap_weight"},
          "MUG-0.1": {"cap_weight", "recon_weight"}, "random-weights": {"lr", "steps"}},
    "M": {"text": {"w_class", "w_text"}, "intra": {"w_class", "w_intra"},
          "inter": {"w_class", "w_inter"}, "all": {"w_text", "w_intra", "w_inter"},
          "two-stages": {"w_text", "steps", "init"}},
    "A": {"noisy-2500": {"data"}, "noisy-5000": {"data"}, "noisy-10000": {"data"},
          "noisy-20000": {"data"}, "clean-2500-long": {"steps"},
          "noisy-2500-long": {"data", "steps"}, "noisy-20000-long": {"data", "steps"}},
    "L2": {},
}
SHARED = ["image_size", "patch", "dim", "depth", "heads", "data", "docs", "labels", "val", "batch",
          "steps", "seed", "precision", "compile", "eval_every"]


@pytest.fixture
def results(monkeypatch, tmp_path):
    """results({arm: values of seeds 0, 1, ...}, claim) writes study.jsonl and reads it again.
    The folders of the toy data have names, and are not made."""
    def folder_name(root, parts=(), **options):
        return f"{root}/toy{options}"

    def write(values, key="T", end=""):
        text = ""
        for name, of_seeds in values.items():
            for seed, value in enumerate(of_seeds):
                where = study.CLAIMS[key].arms[name].runs_of or key
                line = {"claim": where, "arm": name, "seed": seed, "seconds": 100 * value,
                        "metrics": dict.fromkeys(study.CLAIMS[key].metrics, value)}
                text += json.dumps(line) + "\n"
        (tmp_path / "study.jsonl").write_text(text + end)
        return study.read_results()

    monkeypatch.setattr(data, "make_toy_data", folder_name)
    monkeypatch.setattr(study, "PATH", str(tmp_path / "study.jsonl"))
    return write


def different(a, b, names):
    return {name for name in names if getattr(a, name, None) != getattr(b, name, None)}


@pytest.mark.parametrize("key", study.CLAIMS)
def test_arms_differ_in_what_the_claim_says_and_in_nothing_else(key, results):
    claim = study.CLAIMS[key]
    first = {}  # of each script
    for name, arm in claim.arms.items():
        script = importlib.import_module(arm.script)
        demo = dataclasses.replace(script.Config(), **script.DEMO)
        cfg = study.config(claim, arm, 3, name, "an encoder" if arm.first else None)
        fields = {field.name for field in dataclasses.fields(cfg)}
        expected = DIFFERENCES[key].get(name, set())
        reference = first.setdefault(arm.script, cfg)
        assert different(cfg, reference, fields - {"out"}) == expected, name
        of_any_script = next(iter(first.values()))
        assert different(cfg, of_any_script, SHARED) <= expected, name
        assert cfg is reference or cfg.out != reference.out
        of_study = {*arm.settings, *study.MODELS.get(arm.script, {}), *SHARED,
                    "out", "lr", "workers", "init"}
        assert not different(cfg, demo, fields - of_study), name


def test_two_stages_take_as_many_steps_as_one_and_each_target_once():
    claim = study.CLAIMS["M"]
    second = claim.arms["two-stages"]
    stages = (second.first, second)
    steps = [study.n_steps(claim, stage) for stage in stages]
    assert sum(steps) == study.n_steps(claim, claim.arms["all"])
    for term in study.TERMS:
        assert sum(stage.settings[f"w_{term}"] for stage in stages) == 1


@pytest.mark.parametrize("i", range(len(study.T_CRITICAL)))
def test_critical_values_enclose_95_percent(i):
    n = i + 1  # t = sqrt(n) tan(angle), where the angle's density is cos(angle)^(n - 1)
    angle = (np.arange(10**6) + 0.5) / 10**6 * math.pi / 2
    density = np.cos(angle) ** i
    inside = angle < math.atan(study.T_CRITICAL[i] / math.sqrt(n))
    assert density[inside].sum() / density.sum() == pytest.approx(0.95, abs=5e-5)


# Five differences with deviation 0.01 * sqrt(2.5): half an interval is 2.776 * 0.01 / sqrt(2)
@pytest.mark.parametrize("key, arm, reference, mean, verdict", [
    ("T", "text", "none", 0.0197, "shown"),
    ("T", "text", "none", 0.0196, "not shown"),
    ("T", "text", "none", -0.0196, "not shown"),
    ("T", "text", "none", -0.0197, "reversed"),
    ("L2", "lcl", "contrast", 0.0103, "equal"),
    ("L2", "lcl", "contrast", 0.0104, "not shown"),
    ("L2", "lcl", "contrast", -0.0104, "not shown"),
])
def test_verdicts_on_both_sides_of_the_rule(key, arm, reference, mean, verdict, results):
    base = [0.5, 0.1, 0.4, 0.2, 0.3]  # pairs differ far more than arms
    values = [b + mean + 0.01 * k for b, k in zip(base, (-2, -1, 0, 1, 2))]
    known = results({reference: base, arm: values}, key)
    _, found, low, high, outcome = study.judge(known, key, arm, reference, range(5))
    half = 2.776 * 0.01 / math.sqrt(2)
    assert (found, low, high) == (close(mean), close(mean - half), close(mean + half))
    assert outcome == verdict


def test_a_report_names_missing_seeds_and_leaves_the_verdict_open(results, capsys):
    cut = '{"claim": "T", "arm": "text", "seed": 4, "metrics": {"i2t'  # as the power failed
    results({"none": [0.1] * 5, "text": [0.3, 0.31, 0.32, 0.33], "random": [0.2]}, end=cut)
    study.main(["T", "--report"])
    report = capsys.readouterr().out
    assert "| none | 10.0 ± 0.0 |" in report
    assert "| text (missing: seed 4) | 31.5 ± 1.3 |" in report
    assert "| random (missing: seed 1, 2, 3, 4) | 20.0 |" in report
    assert "| T: text minus none | +21.5 | +19.4 to +23.6 | open |" in report
    assert "T: text minus random |" not in report  # one pair has no deviation


def small_claim(claim, toy_data, monkeypatch, tmp_path):
    """Put a claim of ALIGN in the place of A, on tiny data and models."""
    monkeypatch.setitem(study.CLAIMS, "A", claim)
    monkeypatch.setattr(study, "MODELS", {})
    monkeypatch.setattr(align, "DEMO", {**TINY, **TINY_OF["align"], "eval_every": 0})
    monkeypatch.setattr(data, "make_toy_data", lambda *args, **options: toy_data)
    monkeypatch.chdir(tmp_path)


def test_a_stopped_study_goes_on_where_it_stopped(toy_data, results, monkeypatch, tmp_path):
    claim = dataclasses.replace(study.CLAIMS["A"], samples=128, batch=16)
    claim.arms = {"clean": study.Arm("align")}
    small_claim(claim, toy_data, monkeypatch, tmp_path)
    command = ["--run", "A", "clean", "0"]
    with signal_at_step(signal.SIGTERM, 5), pytest.raises(common.UserError, match="is stopped"):
        study.main(command)
    assert not study.read_results()  # an interrupted run is not counted
    study.main(command)
    line = study.read_results()["A", "clean", 0]
    assert line["command"] == "python tests/study.py " + " ".join(command)
    assert line["steps"] == 8 and line["seconds"] > 0
    assert 0 <= line["metrics"]["zeroshot_seen"] <= 1


def test_a_second_stage_starts_from_the_encoder_of_the_first(toy_data, results, monkeypatch,
                                                             tmp_path):
    claim = dataclasses.replace(study.CLAIMS["A"], samples=32, batch=16)
    claim.arms = {"two": study.Arm("align", dict(lr=0.0), first=study.Arm("align", dict(seed=7)))}
    small_claim(claim, toy_data, monkeypatch, tmp_path)
    study.main(["--run", "A", "two", "0"])
    first, second = [common.read_checkpoint(f"runs/study/A/two-0/{name}last.pt")["model"]
                     for name in ("first/", "")]
    for name in first:
        same = torch.equal(first[name], second[name])
        assert same == name.startswith("vision."), name


def test_only_what_has_no_line_is_run(results, monkeypatch):
    results({"class": [0.1], "text": [0.2]}, "M")
    started = []
    monkeypatch.setattr(study, "run", lambda *which: started.append(which))
    study.main(["M", "--seeds", "1"])
    assert started == [("M", name, 0) for name in ("intra", "inter", "all", "two-stages")]


@pytest.mark.parametrize("words", [["X"], ["--run", "T", "no-such-arm", "0"],
                                   ["--run", "T", "text", "first"]])
def test_what_is_no_claim_no_arm_or_no_seed_is_one_line(words, results):
    with pytest.raises(common.UserError, match=f"{words[-1]}.*(choose from|--list names)"):
        study.main(words)
