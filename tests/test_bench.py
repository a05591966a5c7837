"""tests/bench.py measures what it says: every measurement gives rows, its meters count right."""
import math
import os
from functools import partial

import pytest
import torch

import bench
import common
import data

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(toy_data, tmp_path):
    """The session's toy data in a folder of its own, as every measurement gets it."""
    for part in ("pairs", "labels", "docs"):
        os.symlink(f"{toy_data}/{part}", tmp_path / part)
    return str(tmp_path)


@pytest.mark.parametrize("name", [name for name in bench.SUBJECTS if name != "compile"])
def test_every_subject_gives_rows_at_tiny_sizes(name, folder, monkeypatch):
    monkeypatch.setattr(bench, "REPEATS", 1)
    rows = list(bench.SUBJECTS[name](folder, **bench.TINY[name]))
    assert rows
    for row in rows:
        assert math.isfinite(row.ours) and row.ours > 0, row
        assert row.other is None or row.other > 0, row
        assert len(bench.table_line(row)) <= 100, row


def test_a_median_leaves_out_the_first_call():
    ours = partial(next, iter([100, 1, 2, 9]))
    other = partial(next, iter([100, 5, 3, 4]))
    row = bench.compare("what", ours, "other", other)
    assert (row.ours, row.other) == (2, 4)


def test_memory_is_of_the_tensors_that_live_at_a_time():
    def work():
        a = torch.zeros(1000)
        b = a + 1  # two of 4,000 bytes
        del a
        c = b.view(10, 100).T * 2  # two again: a view is nothing new
        del b, c
        torch.zeros(500)

    assert 8000 <= bench.tensor_memory(work) * 2**20 < 8100  # the 1 and the 2 take some bytes


def test_chunks_need_less_memory_than_both_matrices():
    whole, chunked = [row for row in bench.measure_loss(None, 512, 8, 32) if row.unit == "MiB"]
    assert whole.other > 2 * 512 * 512 * 4 / 2**20
    assert chunked.ours < whole.other / 4


def test_graph_breaks_and_recompilations_are_counted(folder, monkeypatch):
    sizes = iter(range(4, 16))

    def compiled(fn, compile, device):
        def broken(images, tokens, valid):
            torch._dynamo.graph_break()
            return fn(images, tokens, valid)

        def call(*rows):
            n = next(sizes)  # another number of rows each time
            return broken(*[x[:n] for x in rows])

        if not compile:
            return fn
        broken = torch.compile(broken, backend="eager")
        return call

    monkeypatch.setattr(common, "compiled", compiled)
    cfg = bench.config("align", folder, **bench.MODEL)
    counts = {row.what: row.ours for row in bench.compare_compiled("align", cfg)}
    assert counts["align, graph breaks"] > 0
    assert counts["align, recompilations"] > 0


def test_what_is_no_subject_is_one_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "spede"])
    with pytest.raises(common.UserError, match="spede is no subject, choose from step loader"):
        bench.main()


def test_scripts_are_chosen_for_the_gpu(monkeypatch, capsys):
    def measure(folder, scripts, **fields):
        yield bench.Row(f"of {' and '.join(scripts)}", 1.0, "s")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "measure_gpu", measure)
    monkeypatch.setattr(data, "make_toy_data", lambda root, *args, **kwargs: root)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which main() changes
    monkeypatch.setattr("sys.argv", ["bench.py", "--tiny", "--gpu", "mug", "lcl"])
    bench.main()
    assert "of mug and lcl " in capsys.readouterr().out
