"""tests/bench.py measures what it says: every subject gives rows, its meters count right."""
import contextlib
import itertools
import math
import os
import sys
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import common
import data

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(toy_data, tmp_path_factory):
    """The session's toy data in a folder of its own, as every subject gets it."""
    folder = tmp_path_factory.mktemp("bench")
    for part in ("pairs", "labels", "docs"):
        os.symlink(f"{toy_data}/{part}", folder / part)
    return str(folder)


@pytest.fixture
def small_align(folder):
    return bench.config("align", folder, batch=16, **bench.MODEL)


# ---- subjects ----

@pytest.mark.parametrize("name", [name for name in bench.SUBJECTS if name != "compile"])
def test_every_subject_gives_rows_at_tiny_sizes(name, folder):
    rows = list(bench.SUBJECTS[name](folder, **bench.TINY[name]))
    assert rows
    for row in rows:
        assert math.isfinite(row.value) and row.value > 0, row
        assert row.beside is None or row.beside > 0, row
        assert len(bench.table_line(name, row)) <= 100, row


def test_gpu_compares_scripts_compiled_and_eager(folder, monkeypatch):
    calls = []

    def compiled(fn, compile, device):
        calls.append(compile)
        return fn

    monkeypatch.setattr(common, "compiled", compiled)
    monkeypatch.setattr(torch.cuda, "is_available", Mock(return_value=False))
    recipes = {name: bench.SCRIPTS[name].DEMO for name in ("align", "lcl")}
    rows = list(bench.measure_gpu(folder, **{**bench.TINY["gpu"], "recipes": recipes}))
    assert [row.case.split(".py")[0] for row in rows] == ["align", "lcl"]
    assert set(calls) == {True, False}


def align_counts(folder, monkeypatch, compiled):
    """Graph breaks and recompilations of align.py whose model is compiled so."""
    monkeypatch.setattr(bench, "SCRIPTS", {"align": bench.align})
    monkeypatch.setattr(common, "compiled", compiled)
    rows = list(bench.measure_compile(folder, **bench.TINY["compile"]))
    return [row.value for row in rows if not row.unit]


def test_graph_breaks_and_recompilations_are_counted(folder, monkeypatch):
    def compiled(fn, compile, device):
        return torch.compile(fn, backend="eager") if compile else fn

    def compiled_badly(fn, compile, device):
        sizes = itertools.count(4)

        def broken(images, tokens, valid):
            torch._dynamo.graph_break()
            return fn(images, tokens, valid)

        broken = compiled(broken, compile, device)

        def call(*rows):
            n = next(sizes)  # another number of rows each time
            return broken(*[x[:n] for x in rows])

        return call

    assert align_counts(folder, monkeypatch, compiled) == [0, 0]
    graph_breaks, recompilations = align_counts(folder, monkeypatch, compiled_badly)
    assert graph_breaks > 0 and recompilations > 0


# ---- meters ----

@pytest.mark.parametrize("name", ["align", "mug", "lcl"])
def test_the_products_that_are_timed_are_all_of_a_step(name, folder):
    products = bench.MatrixProducts()
    counter = FlopCounterMode(display=False)

    @contextlib.contextmanager
    def both():
        with products, counter:
            yield

    bench.run_steps(bench.config(name, folder, batch=16, **bench.MODEL), 2, both())
    flops = 0
    for (_, operands), times in products.counts.items():
        left, right = [shape for shape, _ in operands[-2:]]
        flops += times * 2 * math.prod(left) * right[-1]
    assert flops == counter.get_total_flops() > 0


def test_peak_memory_counts_what_lives_at_a_time():
    with bench.PeakMemory() as meter:
        a = torch.zeros(1000)
        b = a + 1  # two of 4,000 bytes
        del a
        c = b.view(10, 100).T * 2  # two again: a view is nothing new
        del b, c
        torch.zeros(500)
    assert meter.peak == 8000


def test_chunks_need_less_memory_than_both_matrices():
    rows = bench.measure_loss(None, sizes=(512,), width=8, chunk=32, repeats=1)
    memory = {row.case: row for row in rows if row.unit == "MiB"}
    assert memory["512 pairs, --chunk 0, memory"].beside > 2 * 512 * 512 * 4 / 2**20
    chunked = memory["512 pairs, --chunk 32, memory"]
    assert chunked.value < chunked.beside / 4


def test_a_median_leaves_out_the_first_round_and_takes_routes_in_turn():
    calls = []

    def route(name, numbers):
        calls.append(name)
        return next(numbers)

    routes = {"a": bench.partial(route, "a", iter([100, 1, 2, 9])),
              "b": bench.partial(route, "b", iter([100, 5, 3, 4]))}
    assert bench.median_in_turn(routes, repeats=3) == {"a": 2, "b": 4}
    assert calls == ["a", "b"] * 4


def test_a_rate_leaves_out_the_batches_in_which_workers_start(monkeypatch):
    clock = [0.0]

    def batches():
        for seconds in (50, 50, 2, 2):
            clock[0] += seconds
            yield {"images": [0] * 8}

    def perf_counter():
        return clock[0]

    monkeypatch.setattr(bench.time, "perf_counter", perf_counter)
    assert bench.images_per_second(batches(), skip=2) == 16 / 4


# ---- a script's own steps ----

def test_steps_are_those_of_main_on_one_batch_and_leave_no_checkpoint(small_align, monkeypatch):
    losses = []
    call = common.Log.__call__

    def catch(log, step, batch, lr, loss, grad_norm, terms):
        losses.append(loss.item())
        call(log, step, batch, lr, loss, grad_norm, terms)

    monkeypatch.setattr(common.Log, "__call__", catch)
    loader = data.loader
    seconds, batch = bench.run_steps(small_align, 4)
    assert len(seconds) == 4 and len(batch["images"]) == 16
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-3)  # one batch, and hardly any rate
    assert not os.path.exists(f"{small_align.out}/last.pt") and data.loader is loader
    losses.clear()
    bench.run_steps(small_align, 4, same_batch=False)
    assert max(losses) > 1.001 * min(losses)


# ---- the command line ----

@pytest.mark.parametrize("argument, words", [
    ("spede", "spede is no subject: choose step loader"),
    ("--gpu", "no GPU"),
    ("--peers", "pip install open_clip_torch"),
])
def test_what_cannot_be_measured_is_one_line(argument, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", argument])
    monkeypatch.setattr(torch.cuda, "is_available", Mock(return_value=False))
    monkeypatch.setattr(bench.importlib.util, "find_spec", Mock(return_value=None))
    with pytest.raises(common.UserError, match=words):
        bench.main()
    assert not capsys.readouterr().out


def test_without_arguments_all_subjects_but_compile_are_measured(monkeypatch, capsys):
    def one_row(folder):
        yield bench.Row("a case", 3.0, "ms", 2.0, "a peer")

    monkeypatch.setattr(bench, "SUBJECTS", dict.fromkeys(bench.SUBJECTS, one_row))
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    monkeypatch.setattr(data, "make_toy_data", Mock(return_value=""))
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ["XDG_CACHE_HOME"])  # main sets another
    bench.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == [s for s in bench.SUBJECTS if s != "compile"]
    assert lines[0].split()[1:] == ["a", "case", "3", "ms", "a", "peer", "2", "1.50"]
