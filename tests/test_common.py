"""common.py: ranks, seeds, schedule, command line, checkpoints, log."""
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import align
import common
from common import Stream, UserError, parse, rank
from conftest import ROOT, refused, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- ranks ----

def two_gradients():
    a = nn.Parameter(torch.zeros(2, 3))
    b = nn.Parameter(torch.zeros(2))
    unused = nn.Parameter(torch.zeros(2))
    a.grad = torch.full((2, 3), 1.0 + rank())
    b.grad = torch.tensor([1.0, 2.0]) * rank()
    common.average_gradients([a, unused, b])
    return a.grad, b.grad, unused.grad


def test_gradients_become_their_mean_over_ranks(run_on_ranks):
    for a, b, unused in run_on_ranks(4, two_gradients):
        assert torch.equal(a, torch.full((2, 3), 2.5))
        assert torch.equal(b, torch.tensor([1.5, 3.0])) and unused is None


def gathered(weights):
    x = torch.full((2, 1), 1.0 + rank(), dtype=torch.float64, requires_grad=True)
    out = common.all_gather_with_grad(x)
    (out[:, 0] * weights * (1 + rank())).sum().backward()
    return out.detach(), x.grad


def test_gathering_keeps_rank_order_and_sums_gradients_over_ranks(run_on_ranks):
    weights = torch.arange(4, dtype=torch.float64)
    for r, (out, grad) in enumerate(run_on_ranks(2, gathered, weights)):
        assert out.flatten().tolist() == [1, 1, 2, 2]
        expected = (1 + 2) * weights[2 * r:2 * r + 2]  # the losses of both ranks depend on it
        assert torch.equal(grad[:, 0], expected)


def made_in_turn(path):
    def make():
        existed = os.path.exists(path)
        open(path, "a").close()
        return existed
    return common.main_process_first(make)


def refused_on_rank_0():
    def make():
        raise UserError("no such file")
    try:
        common.main_process_first(make)
    except UserError as error:
        return str(error)


def test_rank_0_makes_files_before_the_others_and_its_refusal_is_everybodys(run_on_ranks, tmp_path):
    assert run_on_ranks(4, made_in_turn, str(tmp_path / "file")) == [False, True, True, True]
    assert run_on_ranks(4, refused_on_rank_0) == ["no such file"] * 4


@pytest.mark.parametrize("batch,micro,group,message", [
    (8, 3, 0, "--micro 3.*8 rows.*try 1"), (8, 0, 3, "--group 3.*even"), (8, 0, 6, "--group 6")])
def test_rows_that_do_not_divide_are_refused(batch, micro, group, message):
    common.check_batch(8, 4, 4)
    with pytest.raises(UserError, match=message):
        common.check_batch(batch, micro, group)


def test_a_batch_that_ranks_do_not_divide_is_refused_with_one_that_they_do(monkeypatch):
    monkeypatch.setattr(common, "world_size", lambda: 8)
    with pytest.raises(UserError, match="--batch 100.*8 ranks: try 104"):
        common.check_batch(100)


def test_a_ranks_cores_are_its_share_of_those_lent_and_never_none(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    for local_ranks, cores in [(1, 6), (4, 1), (8, 1)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
        assert common.cpu_count() == cores


JOIN = """
import common
try:
    common.init_distributed()
except common.UserError as error:
    print(error)
    raise SystemExit(2)
"""


@pytest.mark.parametrize("size,code", [("1", 0), ("2", 2)])
def test_world_size_alone_is_one_line_unless_it_is_1(size, code):
    command = [sys.executable, "-c", JOIN]
    env = {**os.environ, "WORLD_SIZE": size}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code:
        assert "RANK" in done.stdout and "torchrun" in done.stdout


# ---- seeds ----

def test_no_two_streams_seeds_and_steps_share_their_numbers():
    keys = [(stream, seed, step) for stream in Stream for seed in range(3) for step in range(20)]
    assert len({int(common.rng(*key).integers(2**62)) for key in keys}) == len(keys)
    assert len({common.generator(*key).initial_seed() for key in keys}) == len(keys)


@pytest.mark.parametrize("world", [2, 4])
def test_noise_of_all_ranks_in_order_is_that_of_one_rank(monkeypatch, world):
    whole = common.batch_noise(3, 5, 8, 2)
    parts = []
    for r in range(world):
        monkeypatch.setattr(common, "world_size", lambda: world)
        monkeypatch.setattr(common, "rank", lambda: r)
        torch.rand(r)  # what was drawn before does not matter
        parts.append(common.batch_noise(3, 5, 8, 2))
    assert torch.equal(torch.cat(parts), whole)


def test_partners_are_mutual_and_nobodys_own():
    rows = torch.arange(12)
    partners = common.partner(rows, 4)
    assert partners.tolist() == [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8]
    assert torch.equal(common.partner(partners, 4), rows)


# ---- precision and schedule ----

def test_precision_on_the_cpu_is_float32_and_bf16_is_refused():
    cpu = torch.device("cpu")
    x = torch.ones(2, 2)
    for precision in ("auto", "fp32"):
        with common.autocast(precision, cpu):
            assert (x @ x).dtype == torch.float32
    with pytest.raises(UserError, match="--precision bf16"):
        common.autocast("bf16", cpu)
    with pytest.raises(UserError, match="--precision fp16.*bf16"):
        common.autocast("fp16", cpu)


@pytest.mark.parametrize("step,share", [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.5), (40, 0.75)])
def test_the_rate_rises_over_the_warmup_and_falls_as_half_a_cosine(step, share):
    assert common.cosine_lr(step, 100, 10, 2.0) == pytest.approx(2.0 * share)


def test_warmup_takes_at_most_a_tenth_of_the_run_and_may_be_absent():
    assert common.cosine_lr(9, 100, 10_000, 1.0) == 1.0
    for steps in (1, 2, 9):
        assert common.cosine_lr(0, steps, 10, 1.0) == 1.0


def test_compiling_without_a_compiler_names_the_flag(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="--no-compile"):
        common.compiled(len, True, torch.device("cpu"))
    assert common.compiled(len, None, torch.device("cpu")) is len


# ---- command line ----

def parsed(*argv):
    return parse(align.Config, align.DEMO, align.__doc__, list(argv))


def test_without_data_the_demo_stands_between_defaults_and_flags():
    cfg = parsed("--lr", "0.5", "--no-compile")
    assert (cfg.lr, cfg.dim, cfg.context, cfg.compile) == (0.5, 128, 16, False)
    cfg = parsed("--data", "a", "b")
    assert (cfg.data, cfg.dim, cfg.flip) == (["a", "b"], 768, True)


def test_size_sets_what_is_not_given():
    cfg = parsed("--size", "s", "--heads", "12")
    assert (cfg.dim, cfg.depth, cfg.heads) == (384, 12, 12)


@pytest.mark.parametrize("argv,message", [
    (["--size", "x"], "--size x.*ti s b l h 1b"), (["--seed", "-1"], "--seed -1"),
    (["--batch", "0"], "--batch 0"), (["--lr", "fast"], "--lr.*fast"), (["--data"], "--data"),
    (["--steps", "1.5"], "--steps.*1.5"), (["--flip", "yes"], "yes"), (["--lrr", "1"], "--lrr.*-h"),
    (["--save-every", "0"], "--save-every 0"), (["--step", "5"], "--step")])
def test_a_wrong_flag_or_value_is_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parsed(*argv)
    assert "\n" not in str(caught.value)


def test_help_says_default_demo_and_owner_of_each_setting(capsys):
    with pytest.raises(SystemExit):
        parsed("-h")
    text = " ".join(capsys.readouterr().out.split())
    assert "--label-smoothing FLOAT paper s5 [0.1]" in text
    assert "[16384; demo 128]" in text and "python align.py" in text


@pytest.mark.parametrize("argv,code,line", [
    (["align.py", "--data", "nowhere/*.tar"], 2, "nowhere"),
    (["align.py", "--unknown"], 2, "--unknown")])
def test_a_script_ends_with_one_line_and_code_2(argv, code, line, tmp_path):
    done = subprocess.run([sys.executable, f"{ROOT}/{argv[0]}", *argv[1:]], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert line in done.stderr


# ---- checkpoints ----

@pytest.fixture
def cfg(toy_data, tmp_path):
    return tiny_config("align", toy_data, tmp_path / "run")


def saved(cfg, step=4):
    """A checkpoint of an ALIGN after `step` updates; -> model, optimizer."""
    os.makedirs(cfg.out, exist_ok=True)
    torch.manual_seed(step)
    model = align.ALIGN(cfg)
    optimizer = align.Lamb(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    common.save(cfg, model, optimizer, step, "the vocabulary")
    return model, optimizer


def resumed(cfg):
    model = align.ALIGN(cfg)
    optimizer = align.Lamb(model.parameters())
    step, vocab = common.resume_from(cfg, model, optimizer)
    return model, optimizer, step, vocab


def test_a_checkpoint_comes_back_as_it_was_written(cfg):
    model, optimizer = saved(cfg, 5)
    other, other_optimizer, step, vocab = resumed(cfg)
    assert (step, vocab) == (5, "the vocabulary")
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
        for key, x in optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(other_optimizer.state[b][key]))


def test_a_new_folder_starts_at_step_0(cfg):
    assert resumed(cfg)[2:] == (0, None)


def flip_a_bit(path):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    with open(path, "rb") as f:
        raw = bytearray(f.read())
    name = largest.filename.encode()
    raw[raw.index(name, largest.header_offset) + len(name) + largest.file_size // 2] ^= 4
    with open(path, "wb") as f:
        f.write(raw)


def cut_in_half(path):
    os.truncate(path, os.path.getsize(path) // 2)


def empty(path):
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, empty])
def test_a_damaged_checkpoint_ends_with_a_line_that_names_a_way_out(cfg, damage):
    saved(cfg)
    damage(f"{cfg.out}/last.pt")
    with pytest.raises(UserError, match="last.pt.*--fresh"):
        resumed(cfg)
    assert resumed(replace(cfg, fresh=True))[2] == 0


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["pickle", "torch", "legacy torch"])
def test_a_checkpoint_that_would_run_code_is_refused_and_nothing_runs(cfg, how, tmp_path):
    os.makedirs(cfg.out)
    state = {"method": "ALIGN", "config": asdict(cfg), "step": 1}
    state["payload"] = Payload(str(tmp_path / "executed"))
    with open(f"{cfg.out}/last.pt", "wb") as f:
        if how == "pickle":
            pickle.dump(state, f)
        else:
            torch.save(state, f, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(UserError):
        resumed(cfg)
    assert not os.path.exists(tmp_path / "executed")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file data/0")])
def test_a_full_disk_keeps_the_checkpoint_before_and_ends_the_run(cfg, error, monkeypatch):
    saved(cfg, 4)

    def fail(state, f):
        f.write(b"begun")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(UserError, match="step 8 could not be written"):
            saved(cfg, 8)
    assert os.listdir(cfg.out) == ["last.pt"] and resumed(cfg)[2] == 4


def test_fresh_starts_anew_but_not_after_a_restart_by_torchrun(cfg, monkeypatch):
    saved(cfg)
    fresh = replace(cfg, fresh=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resumed(fresh)[2] == 4
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert resumed(fresh)[2] == 0


def test_other_settings_are_refused_by_name_and_both_values(cfg):
    saved(cfg)
    with pytest.raises(UserError, match=r"--lr 0\.003 -> 0\.5, --seed 0 -> 7.*--fresh"):
        resumed(replace(cfg, lr=0.5, seed=7))
    free = dict(data=["x"], val=["y"], workers=3, save_every=7, log_every=7, eval_every=7,
                compile=True, micro=2, grad_checkpoint=True)
    assert resumed(replace(cfg, **free))[2] == 4


def test_a_folder_of_another_method_is_refused(cfg):
    saved(cfg)
    state = common.read_checkpoint(f"{cfg.out}/last.pt")
    torch.save({**state, "method": "MUG"}, f"{cfg.out}/last.pt")
    with pytest.raises(UserError, match="run of MUG, not of ALIGN"):
        resumed(cfg)


# ---- one start at a time ----

HOLD = """
import common, sys, time
class cfg:
    out = sys.argv[1]
@common.owns_output_folder
def main(cfg):
    print("mine", flush=True)
    time.sleep(60)
try:
    main(cfg)
except common.UserError as error:
    print(error)
"""


def test_a_second_start_in_the_same_folder_is_refused_until_the_first_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "mine\n"
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "in use by another run" in second.stdout and second.stdout.count("\n") == 1
        first.send_signal(signal.SIGKILL)
        first.wait()
        third = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert third.stdout.readline() == "mine\n"
        third.kill()
        third.wait()
    finally:
        first.kill()


def test_a_file_in_place_of_the_folder_is_refused(cfg, tmp_path):
    (tmp_path / "note").write_text("x")
    assert f"{tmp_path}/note" in refused(align.main, replace(cfg, out=f"{tmp_path}/note"))


def test_a_changed_script_is_said_until_fresh(cfg, monkeypatch, capsys):
    model = align.ALIGN(cfg)
    os.makedirs(cfg.out)
    common.write_config(cfg, model, 0)
    common.write_config(cfg, model, 5)
    assert "script has changed" not in capsys.readouterr().out
    monkeypatch.setattr(common, "script_hash", lambda model: "other")
    for _ in range(2):
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
    log = common.Log(replace(cfg, steps=100, log_every=5, save_every=8), 0, REASONS, {"no image"})
    yield log
    log.close()


def log_step(log, step, loss=2.0, skipped=(0, 0), grad_norm=1.0):
    batch = {"skipped": torch.tensor(skipped), "data_wait": 0.1}
    log(step, batch, 0.5, torch.tensor(loss), torch.tensor(grad_norm), {"con": torch.tensor(3.0)})


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
    assert row["samples"] == 5 * log.cfg.batch and row["images_per_s"] > 0


@pytest.mark.parametrize("bad", [dict(loss=float("nan")), dict(grad_norm=float("inf"))])
def test_what_is_not_finite_ends_the_run_and_names_the_last_checkpoint(log, bad):
    for step in range(9):
        log_step(log, step)
    with pytest.raises(UserError, match="at step 9.*--lr.*last.pt of step 8"):
        log_step(log, 9, **bad)
    assert logged(log)[-1]["step"] == 9 and None in logged(log)[-1].values()


def test_more_than_a_tenth_unreadable_ends_the_run_and_soft_reasons_do_not(log):
    for step in range(80):
        log_step(log, step, skipped=(0, 16))
    with pytest.raises(UserError, match="could not be read.*data.py check"):
        for step in range(80, 100):
            log_step(log, step, skipped=(16, 0))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_becomes_the_wish_to_stop_at_the_next_line(log, number):
    os.kill(os.getpid(), number)
    log_step(log, 0)
    assert not log.stop
    log_step(log, 4)
    assert log.stop


def test_closing_the_log_gives_the_signals_back(cfg):
    os.makedirs(cfg.out)
    before = signal.getsignal(signal.SIGTERM)
    log = common.Log(cfg, 0, REASONS, set())
    assert signal.getsignal(signal.SIGTERM) != before
    log.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_lines_beyond_the_checkpoint_and_broken_ones_are_cut(tmp_path):
    path = str(tmp_path / "log.jsonl")
    lines = ['{"step": 1}', '{"step": 2}', "{", '{"step": 3}', '{"st']
    with open(path, "w") as f:
        f.write("\n".join(lines))
    common.cut_log(path, 3)
    with open(path) as f:
        assert f.read() == '{"step": 1}\n{"step": 2}\n'
    common.cut_log(path, 0)
    assert os.path.getsize(path) == 0
