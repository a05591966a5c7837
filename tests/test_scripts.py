"""Whole runs of the five scripts: any number of ranks is one run, a restart changes no bit."""
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import common
import data
from conftest import (
    N_GPUS, ROOT, SCRIPTS, WITH_GPUS, first_gradients, refused, run, signal_at_step, tiny_config)

pytestmark = pytest.mark.usefixtures("one_thread")

TERMS = {
    "align": {"temperature"},
    "mug": {"pixels", "caption"},
    "lcl": {"gen", "con"},
    "timix": {"itc", "itm", "mlm", "pta", "mix"},
    "m3i": {"intra", "inter", "text", "class"},
}


def main_of(name):
    return importlib.import_module(name).main


def distance(a, b):
    """Largest relative distance of two lists of tensors."""
    assert len(a) == len(b) > 0
    return max(((x - y).norm() / y.norm().clamp(min=1e-12)).item() for x, y in zip(a, b))


@pytest.fixture(scope="module", params=SCRIPTS)
def whole(request, toy_data, tmp_path_factory):
    """name, config, log rows, checkpoint, metrics: 20 steps on one rank, evaluation, pictures."""
    name = request.param
    out = tmp_path_factory.mktemp(name)
    cfg = tiny_config(name, toy_data, out / "run", steps=20, save_every=6, eval_every=0,
                      val=[f"{toy_data}/pairs", f"{toy_data}/labels"])
    return name, cfg, *run(main_of(name), cfg)


# ---- one run ----

def test_a_run_logs_its_terms_evaluates_and_draws(whole):
    name, cfg, rows, state, result = whole
    assert [row["step"] for row in rows] == list(range(20))
    assert TERMS[name] <= set().union(*rows)
    assert state["step"] == 20 and state["method"] == cfg.method
    assert {"knn", "linear", "knn_random", "linear_random"} <= result.keys()
    pictures = list(Path(cfg.out).glob("*.png"))
    assert len(pictures) > 1
    for picture in pictures:
        with data.Image.open(picture) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20, picture  # not blank


def run_apart(cfg, **options):
    """A script's main in a process of its own -> its output; options of subprocess.run."""
    name = cfg.method.lower()
    code = f"import {name}; {name}.main({name}.{cfg!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_script_runs_beside_common_and_data_alone(whole, tmp_path):
    name, cfg, *_ = whole
    for file in (name, "common", "data"):
        shutil.copy(f"{ROOT}/{file}.py", tmp_path)
    cfg = replace(cfg, out="out", steps=2, eval_every=-1, val=None)
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    run_apart(cfg, cwd=tmp_path, env=env)
    assert (tmp_path / "out/last.pt").exists()


def test_a_finished_run_started_again_only_evaluates_and_says_so(whole, capsys):
    name, cfg, rows, state, _ = whole
    again, state_again, _ = run(main_of(name), replace(cfg, val=None))
    assert again == rows
    assert_same_state(state, state_again)
    assert "finished" in capsys.readouterr().out


# ---- ranks ----

@pytest.mark.parametrize("world", [2, 4])
def test_losses_of_20_steps_are_those_of_one_rank(whole, run_on_ranks, world):
    name, cfg, rows, *_ = whole
    cfg = replace(cfg, out=f"{cfg.out}-{world}-ranks", eval_every=-1)
    sharded, _, _ = run_on_ranks(world, run, main_of(name), cfg)[0]
    for row, other in zip(rows, sharded, strict=True):
        for term in TERMS[name] | {"loss"}:
            assert (term in other) == (term in row)  # a mixture is not in every step
            if term in row:
                assert other[term] == pytest.approx(row[term], rel=1e-4), term


@pytest.mark.parametrize("world", [2, 4])
def test_first_gradients_are_those_of_one_rank(whole, run_on_ranks, world):
    name, cfg, *_ = whole
    cfg = replace(cfg, out=f"{cfg.out}-gradients", eval_every=-1)
    alone = first_gradients(name, cfg)
    cfg = replace(cfg, out=f"{cfg.out}-{world}")
    for grads in run_on_ranks(world, first_gradients, name, cfg):
        assert distance(grads, alone) < 1e-5


# ---- GPU ----

@pytest.mark.skipif(N_GPUS == 0, reason="no GPU")
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 0.05)])
def test_losses_of_compiled_steps_on_a_gpu_are_those_of_the_cpu(
        name, precision, tolerance, toy_data, tmp_path):
    # heads of 16 dimensions: FlexAttention takes no smaller ones
    cfg = tiny_config(name, toy_data, tmp_path / "cpu", steps=3, dim=32, text_dim=32)
    rows, _, _ = run(main_of(name), cfg)
    cfg = replace(cfg, out=str(tmp_path / "gpu"), precision=precision)
    output = run_apart(cfg, cwd=ROOT, env=WITH_GPUS)
    with open(tmp_path / "gpu/log.jsonl") as f:
        on_gpu = [json.loads(line) for line in f]
    assert " on CPU" not in output
    for row, other in zip(rows, on_gpu, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=tolerance)


# ---- restart ----

def assert_same_state(a, b):
    for part in ("model", "optimizer"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def without_speed(rows):
    speed = ("images_per_s", "data_wait", "skipped")
    return [{key: value for key, value in row.items() if key not in speed} for row in rows]


def test_stopped_by_a_signal_and_started_again_it_is_the_same_run_to_the_bit(whole):
    name, cfg, rows, state, _ = whole
    cfg = replace(cfg, out=f"{cfg.out}-stopped", eval_every=-1)
    with signal_at_step(signal.SIGTERM, 8):
        _, stopped, result = run(main_of(name), cfg)
    assert stopped["step"] == 9 and result == {}
    again, state_again, _ = run(main_of(name), cfg)
    assert without_speed(again) == without_speed(rows)
    assert_same_state(state, state_again)


# ---- the same step in other ways ----

@pytest.mark.parametrize("change", [{"micro": 4}, {"grad_checkpoint": True}, {"chunk": 3}])
def test_saving_memory_leaves_the_gradients_as_they_are(whole, change):
    name, cfg, *_ = whole
    if not hasattr(cfg, next(iter(change))):
        pytest.skip(f"{name}.py has no such flag")
    cfg = replace(cfg, out=f"{cfg.out}-memory", eval_every=-1)
    plain = first_gradients(name, cfg)
    assert distance(first_gradients(name, replace(cfg, **change)), plain) < 1e-5


def test_compiled_functions_have_no_graph_break_and_the_same_gradients(whole, monkeypatch):
    name, cfg, *_ = whole
    cfg = replace(cfg, out=f"{cfg.out}-compiled", eval_every=-1)
    plain = first_gradients(name, cfg)
    compiled = []

    def compile_whole_graph(fn, compile, device):
        compiled.append(fn)
        return torch.compile(fn, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(common, "compiled", compile_whole_graph)
    assert distance(first_gradients(name, cfg), plain) < 1e-5
    assert compiled


# ---- --init ----

def parsed(name, *argv):
    script = importlib.import_module(name)
    return common.parse(script.Config, script.DEMO, script.__doc__, list(argv))


def weights_at_start(name, cfg):
    script = importlib.import_module(name)
    torch.manual_seed(1)
    model = getattr(script, cfg.method)(cfg)
    _, vocab = common.resume_from(cfg, model, None)
    return model.state_dict(), vocab


def test_init_takes_weights_vocabulary_and_sizes_of_the_same_method(whole, tmp_path):
    name, cfg, _, state, _ = whole
    fields = {field: [str(tmp_path)] for field in common.training_fields(cfg)}
    argv = [x for field, paths in fields.items() for x in (common.flag(field), *paths)]
    new = parsed(name, "--init", f"{cfg.out}/last.pt", "--out", f"{tmp_path}/new", *argv)
    for field in cfg.model_fields:
        assert getattr(new, field) == getattr(cfg, field), field
    assert new.lr == type(cfg)().lr  # the recipe is not taken over
    if hasattr(cfg, "classes"):
        new = replace(new, classes=state["config"]["classes"])
    weights, vocab = weights_at_start(name, new)
    assert vocab == state["vocab"]
    for key, x in state["model"].items():
        assert torch.equal(weights[key], x), key


def test_init_takes_the_encoder_of_another_method(whole, toy_data, tmp_path):
    name, cfg, _, state, _ = whole
    other = "mug" if name == "align" else "align"
    new = tiny_config(other, toy_data, tmp_path, init=f"{cfg.out}/last.pt")
    weights, vocab = weights_at_start(other, new)
    assert vocab is None
    for key, x in state["model"].items():
        if key.startswith("vision.") and "pos_embed" not in key:
            assert torch.equal(weights[key], x), key


def test_init_refuses_other_sizes_and_another_vocabulary_of_the_same_size(whole, tmp_path):
    name, cfg, _, state, _ = whole
    last = f"{cfg.out}/last.pt"
    with pytest.raises(common.UserError, match="--dim 32.*has 16"):
        parsed(name, "--init", last, "--dim", "32")
    tokenizer = data.Tokenizer.loads(state["vocab"])
    merges = tokenizer.merges[:-1] + [tokenizer.merges[0][::-1]]
    other = data.Tokenizer(merges)
    assert other.vocab_size == tokenizer.vocab_size
    other.save(f"{tmp_path}/other.json")
    new = replace(cfg, init=last, vocab=f"{tmp_path}/other.json", out=f"{tmp_path}/new")
    assert f"{tmp_path}/other.json" in refused(main_of(name), new)


# ---- many ranks decide together ----

def test_evaluation_gives_the_same_numbers_on_any_number_of_ranks(run_on_ranks, toy_data, tmp_path):
    cfg = tiny_config("align", toy_data, tmp_path / "run", steps=2, eval_every=0,
                      val=[f"{toy_data}/pairs", f"{toy_data}/labels"])
    _, _, alone = run(main_of("align"), cfg)
    _, _, sharded = run_on_ranks(4, run, main_of("align"), cfg)[0]
    assert sharded == alone


def test_two_processes_under_torchrun_train_evaluate_and_end_with_code_0(toy_data, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", f"{ROOT}/mug.py", "--val", f"{toy_data}/pairs", "--steps", "3"]
    cfg = tiny_config("mug", toy_data, tmp_path / "run")
    for name in ("data", "out", *cfg.model_fields, "batch"):
        value = getattr(cfg, name)
        command += [common.flag(name), value[0] if name == "data" else str(value)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.path.exists(f"{cfg.out}/result.json")
    assert "Traceback" not in done.stderr
