"""common.py: ranks, seeds, schedule, command line, checkpoints, log."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import align
import common
from common import Stream, UserError, rank
from conftest import ROOT, refused, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- ranks ----

def made_in_turn(path):
    def make():
        existed = os.path.exists(path)
        open(path, "a").close()
        return existed
    return common.main_process_first(make)


def refused_on_rank_0():
    def make():
        raise UserError("no such file")
    with pytest.raises(UserError) as caught:
        common.main_process_first(make)
    return str(caught.value)


def test_rank_0_makes_files_before_the_others_and_its_refusal_is_everybodys(run_on_ranks, tmp_path):
    assert run_on_ranks(4, made_in_turn, str(tmp_path / "file")) == [False, True, True, True]
    assert run_on_ranks(4, refused_on_rank_0) == ["no such file"] * 4


def test_rows_that_ranks_or_groups_do_not_divide_are_refused_with_a_remedy(monkeypatch):
    common.check_batch(8, 4)
    with pytest.raises(UserError, match="--group 3 must be even.* 8 rows.*try --group 4"):
        common.check_batch(8, 3)
    monkeypatch.setattr(common, "world_size", lambda: 8)
    with pytest.raises(UserError, match="--batch 100.*8 ranks: try 104"):
        common.check_batch(100)


def test_world_size_alone_is_one_line_unless_it_is_1(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    common.init_distributed()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK is not: start with torchrun"):
        common.init_distributed()


# ---- seeds ----

def test_no_two_streams_seeds_and_steps_share_their_numbers():
    keys = [(stream, seed, step) for stream in Stream for seed in range(3) for step in range(20)]
    assert len({int(common.rng(*key).integers(2**62)) for key in keys}) == len(keys)
    assert len({common.generator(*key).initial_seed() for key in keys}) == len(keys)


# ---- precision and schedule ----

def test_precision_on_the_cpu_is_float32_and_bf16_is_refused():
    cpu = torch.device("cpu")
    x = torch.ones(2, 2)
    with common.autocast("auto", cpu):
        assert (x @ x).dtype == torch.float32
    with pytest.raises(UserError, match="--precision bf16"):
        common.autocast("bf16", cpu)


def test_the_rate_rises_over_the_warmup_and_falls_as_half_a_cosine():
    for step, share in [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.5), (40, 0.75)]:
        assert common.cosine_lr(step, 100, 10, 2.0) == pytest.approx(2.0 * share)
    assert common.cosine_lr(9, 100, 10_000, 1.0) == 1.0  # a tenth of the run is the most
    assert common.cosine_lr(0, 9, 10, 1.0) == 1.0


def test_compiling_without_a_compiler_names_the_flag(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--no-compile"):
        common.compiled(len, True, torch.device("cpu"))
    assert common.compiled(len, None, torch.device("cpu")) is len


# ---- command line ----

def parsed(*argv):
    return common.parse(align.Config, align.DEMO, align.__doc__, list(argv))


def test_without_data_the_demo_and_then_the_size_stand_between_defaults_and_flags():
    cfg = parsed("--lr", "0.5", "--no-compile")
    assert (cfg.lr, cfg.dim, cfg.context, cfg.compile) == (0.5, 128, 16, False)
    cfg = parsed("--data", "a", "b")
    assert (cfg.data, cfg.dim, cfg.flip) == (["a", "b"], 768, True)
    cfg = parsed("--size", "s", "--heads", "12")
    assert (cfg.dim, cfg.depth, cfg.heads) == (384, 12, 12)


@pytest.mark.parametrize("argv,message", [
    (["--size", "x"], "--size.*x"), (["--step", "5"], "--step"),
    (["--save-every", "0"], "--save-every 0")])
def test_a_wrong_flag_or_value_is_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parsed(*argv)
    assert "\n" not in str(caught.value)


# ---- checkpoints ----

@pytest.fixture
def cfg(toy_data, tmp_path):
    return tiny_config("align", toy_data, tmp_path / "run")


def save(cfg, step=4):
    os.makedirs(cfg.out, exist_ok=True)
    model = align.ALIGN(cfg)
    common.save(cfg, model, align.Lamb(model.parameters()), step, "the vocabulary")


def resumed_step(cfg):
    model = align.ALIGN(cfg)
    step, _ = common.resume_from(cfg, model, align.Lamb(model.parameters()))
    return step


def test_a_damaged_checkpoint_ends_with_a_line_that_names_a_way_out(cfg):
    save(cfg)
    path = Path(cfg.out, "last.pt")
    weights = common.read_checkpoint(path)["model"]["vision.pos_embed"].numpy().tobytes()
    with_another_bit = bytes([weights[0] ^ 4]) + weights[1:]
    path.write_bytes(path.read_bytes().replace(weights, with_another_bit))
    with pytest.raises(UserError, match="last.pt.*--fresh"):
        resumed_step(cfg)
    assert resumed_step(replace(cfg, fresh=True)) == 0


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_that_would_run_code_is_refused_and_nothing_runs(tmp_path):
    torch.save({"payload": Payload(str(tmp_path / "executed"))}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="it holds io.open, not tensors alone"):
        common.read_checkpoint(tmp_path / "last.pt")
    assert not os.path.exists(tmp_path / "executed")


@pytest.mark.parametrize("error, line", [
    (OSError(28, "No space left on device"), "step 8 could not be written"),
    (RuntimeError("DataLoader worker (pid 3) is killed"), "^DataLoader worker"),
])
def test_a_save_that_fails_keeps_the_checkpoint_before(cfg, monkeypatch, error, line):
    save(cfg, 4)

    def fail(state, f):
        f.write(b"begun")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises((UserError, RuntimeError), match=line):
            save(cfg, 8)
    assert os.listdir(cfg.out) == ["last.pt"] and resumed_step(cfg) == 4


def test_other_settings_are_refused_by_name_and_both_values(cfg):
    save(cfg)
    with pytest.raises(UserError, match=r"--lr 0\.003 -> 0\.5, --seed 0 -> 7.*--fresh"):
        resumed_step(replace(cfg, lr=0.5, seed=7))
    free = dict(data=["x"], val=["y"], workers=3, save_every=7, log_every=7, eval_every=7,
                compile=True, micro=2, grad_checkpoint=True)
    assert resumed_step(replace(cfg, **free)) == 4
    state = common.read_checkpoint(f"{cfg.out}/last.pt")
    torch.save({**state, "method": "MUG"}, f"{cfg.out}/last.pt")
    with pytest.raises(UserError, match="run of MUG, not of ALIGN"):
        resumed_step(cfg)


# ---- one start at a time ----

def test_a_second_start_in_the_same_folder_is_refused_until_the_first_is_gone(tmp_path):
    def start():
        code = f"import common; common.lock_folder({str(tmp_path)!r})"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr

    with common.lock_folder(tmp_path):
        assert "UserError" in start() and "is in use by another run" in start()
    assert start() == ""


def test_a_file_in_place_of_the_folder_is_refused(cfg, tmp_path):
    (tmp_path / "note").write_text("x")
    assert f"{tmp_path}/note" in refused(align.main, replace(cfg, out=f"{tmp_path}/note"))


def test_a_changed_script_is_said_until_fresh(cfg, capsys):
    model = align.ALIGN(cfg)
    os.makedirs(cfg.out)
    with open(f"{cfg.out}/config.json", "w") as f:
        json.dump({"script_hash": "that of the script as it was"}, f)
    common.write_config(cfg, model, 5)
    assert "script has changed" in capsys.readouterr().out
    common.write_config(cfg, model, 0)
    common.write_config(cfg, model, 5)
    assert "script has changed" not in capsys.readouterr().out


# ---- log ----

REASONS = ("no image", "empty caption")


@pytest.fixture
def log(cfg):
    os.makedirs(cfg.out)
    before = signal.getsignal(signal.SIGTERM)
    log = common.Log(replace(cfg, steps=100, log_every=5, save_every=8), 0, REASONS, {"no image"})
    yield log
    log.close()
    assert signal.getsignal(signal.SIGTERM) == before


def log_step(log, step, skipped=(0, 0), loss=2.0, grad_norm=1.0):
    batch = {"skipped": torch.tensor(skipped), "data_wait": 0.1}
    terms = {"con": torch.tensor(3.0)}
    log(step, batch, 0.5, torch.tensor(loss), torch.tensor(grad_norm), terms)


def logged(log):
    with open(log.path) as f:
        return [json.loads(line) for line in f]


def test_a_line_is_written_every_log_every_steps_at_saves_and_at_the_end(log):
    for step in range(100):
        log_step(log, step)
    steps = [row["step"] for row in logged(log)]
    assert steps == sorted({*range(4, 100, 5), *range(7, 100, 8), 99})
    row = logged(log)[0]
    assert (row["loss"], row["con"], row["lr"], row["grad_norm"]) == (2.0, 3.0, 0.5, 1.0)
    assert row["images_per_s"] > 0


def test_a_gradient_that_is_not_finite_ends_the_run_and_names_the_last_checkpoint(log):
    for step in range(9):
        log_step(log, step)
    with pytest.raises(UserError, match="at step 9.*--lr.*last.pt of step 8"):
        log_step(log, 9, grad_norm=float("inf"))
    assert logged(log)[-1]["grad_norm"] is None


def logged_on_ranks(cfg, signalled, loss):
    """Does a signal or a loss of rank 1 stop this rank, or with which line?"""
    log = common.Log(cfg, 0, REASONS, {"no image"})
    log.signalled = signalled and rank() == 1
    try:
        log_step(log, 3, loss=loss if rank() == 1 else 2.0)
    except UserError as error:
        return str(error)
    finally:
        log.close()
    return log.stop


def test_what_one_rank_sees_stops_all(run_on_ranks, cfg):
    os.makedirs(cfg.out)
    assert run_on_ranks(2, logged_on_ranks, cfg, False, 2.0) == [False, False]
    assert run_on_ranks(2, logged_on_ranks, cfg, True, 2.0) == [True, True]
    first, second = run_on_ranks(2, logged_on_ranks, cfg, False, math.nan)
    assert first == second and "loss nan" in first


def test_more_than_a_tenth_unreadable_ends_the_run_and_soft_reasons_do_not(log):
    for step in range(80):
        log_step(log, step, skipped=(0, 16))
    with pytest.raises(UserError, match="could not be read.*data.py check"):
        for step in range(80, 100):
            log_step(log, step, skipped=(16, 0))


def test_lines_from_the_checkpoint_on_and_one_cut_short_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = '{"step": 1}\n{"step": 2}\n'
    for rest in ('{"step": 3}\n{"step": 4}\n', '{"st'):
        path.write_text(lines + rest)
        common.cut_log(path, 3)
        assert path.read_text() == lines
    common.cut_log(path, 0)
    assert path.read_text() == ""
