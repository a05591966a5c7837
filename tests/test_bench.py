"""bench.py tells the truth: its counted flops are those of the real steps, its emulated ranks compute what real ones do, its meters measure."""
import importlib, os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import align
import bench
import common
import data
import m3i

# Every width another number, so that none can stand for another.
SMALL = {"align": dict(text_dim=32, context=12), "mug": dict(pixel_dim=40, text_dim=32, context=12), "lcl": dict(text_dim=40, context=96),
         "timix": dict(text_dim=32, embed=20, context=12), "m3i": dict(text_dim=32, context=12)}
for name in SMALL:
    SMALL[name].update(batch=16, image_size=32, dim=48, depth=2, vocab_size=300)


@pytest.fixture(scope="module", autouse=True)
def small_world(tiny_world, tmp_path_factory):
    """The session's world and a few documents, as bench.world() has them; a vocabulary without merges; one thread, which small tensors like best."""
    folder = data.make_world(root=str(tmp_path_factory.mktemp("bench")), scenes=256, documents=40, parts=("docs",))
    for part in ("pairs", "labels"):
        os.symlink(f"{tiny_world}/{part}", f"{folder}/{part}")
    data.Tokenizer().save(f"{folder}/vocab.json")
    before, bench.world, threads = bench.world, lambda: folder, torch.get_num_threads()
    for fields in SMALL.values():
        fields["vocab"] = f"{folder}/vocab.json"
    torch.set_num_threads(1)
    yield folder
    bench.world = before
    torch.set_num_threads(threads)


class Counter(FlopCounterMode):
    """Counts without asking which module a product is in, which fails under no_grad."""
    def __init__(self):
        super().__init__(display=False)
        self.mod_tracker = Anywhere()


class Anywhere:
    parents = {"Global"}
    __enter__ = lambda self: self
    __exit__ = lambda self, *error: None


def first_step(name, noting=False, **fields):
    """A real step's flops as torch counts them, with attention made of matrix products; noting: also the products of the next one, as bench notes
    them; config and batch."""
    cfg, found = bench.demo(name, **{**SMALL[name], **fields}), SimpleNamespace()

    def protocol(batch, losses):
        with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
            yield
        found.flops, found.batch = counter.get_total_flops(), batch
        if noting:
            with bench.Products() as products:
                yield
            found.products = products.seen
    bench.drive(name, cfg, protocol)
    found.cfg = replace(cfg, classes=64) if name == "m3i" else cfg
    return found


@pytest.mark.parametrize("name, fields", [
    ("align", {}), ("align", dict(cls=False, micro=0, chunk=0)), ("mug", {}), ("mug", dict(mask_ratio=0.5, cap_weight=0.0)), ("lcl", {}),
    ("lcl", dict(objective="gen+reg", pack=False)), ("timix", {}), ("timix", dict(base="clip", mix="random", tap=2, entries=3)),
    ("timix", dict(mix="none")), ("m3i", {}), ("m3i", dict(unit=2, keep=0.3, only="intra", target="pixels")), ("m3i", dict(only="text", keep=1.0))])
def test_counted_flops_are_those_of_the_real_step(name, fields):
    found = first_step(name, **fields)
    assert bench.FLOPS[name](found.cfg, found.batch) == found.flops              # exact: nothing is estimated


def test_the_products_that_are_timed_are_all_of_the_step_s():
    found = first_step("mug", noting=True)
    flops = lambda a, b: 2 * torch.Size(a).numel() * b[-1]
    assert sum(times * flops(*(shape for shape, _, _ in operands[-2:])) for (_, operands), times in found.products.items()) == found.flops
    assert isinstance(bench.alone(found.products), float)


def test_what_a_packed_document_does_not_see_is_not_counted():
    found = first_step("lcl")
    docs, (R, L), D, depth = found.batch["doc"], found.batch["ids"].shape, found.cfg.text_dim, found.cfg.text_depth
    pairs = sum(n * (n + 1) // 2 for row in docs for n in torch.bincount(row[row >= 0]).tolist())
    saved = bench.lcl_flops(found.cfg, found.batch) - bench.lcl_flops(found.cfg, found.batch, packed=True)
    assert saved == pytest.approx(3 * depth * 2 * 2 * D * (R * L * L - pairs))


def test_a_driven_script_takes_its_own_steps_on_one_batch_and_leaves_nothing():
    told, cfg = [], bench.demo("align", **SMALL["align"], lr=0.01, warmup=0)

    def protocol(batch, losses):
        for _ in range(6):
            yield
            told.append(losses[-1].item())
    before = (common.Log.next, common.Log.step)
    bench.drive("align", cfg, protocol)
    assert len(told) == 6 and told[-1] < 0.9 * told[0]                           # it learns these sixteen pairs
    assert not os.path.exists(f"{cfg.out}/last.pt") and before == (common.Log.next, common.Log.step)


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_mean_of_eight_emulated_ranks_is_the_loss_of_the_whole_batch(chunk):
    B, D, ranks = 48, 5, 8
    (whole, all_images), (_, all_texts) = bench.pairs_of(B, D, 1)[0]
    tau = torch.tensor(0.07)
    want = align.contrastive_loss(whole, all_texts, tau, 0.1)
    want.backward()
    columns, found, plain, grads = (all_images @ all_texts.T / tau).logsumexp(0), [], [], []
    for r in range(ranks):
        tables, temperature = bench.pairs_of(B, D, ranks, r)
        routes = bench.routes_of(tables, temperature, chunk)
        with bench.as_rank(r, ranks, tables, columns):
            plain.append(routes["plain"]().item())
            found.append(routes["ours"]().item())
        grads.append(tables[0][0].grad)
    assert sum(found) / ranks == pytest.approx(want.item(), rel=1e-5) and sum(plain) / ranks == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat(grads) / ranks, whole.grad, rtol=1e-4, atol=1e-6)
    assert common.world() == 1


def measured(route):
    with bench.Memory() as memory:
        route()
    return memory.most


def test_chunks_need_less_memory_than_both_matrices():
    tables, temperature = bench.pairs_of(1024, 8, 2)
    routes = bench.routes_of(tables, temperature, 64)
    with bench.as_rank(0, 2, tables):
        most = {name: measured(route) for name, route in routes.items()}
    assert most["plain"] > 4 * 512 * 1024 * 4 and most["ours"] < most["plain"] / 4


def test_peak_counts_what_lives_at_a_time():
    def route():
        a = torch.zeros(1000)
        b = a + 1                                            # two
        del a
        c = b.view(10, 100).T * 2                            # two again: a view is nothing new
        del b, c
        torch.zeros(500)
    if bench.DEVICE.type == "cpu":
        assert measured(route) == 8000


def test_seconds_takes_a_route_s_word_for_its_time():
    assert bench.seconds({"a": lambda: 2.5, "b": lambda: None}, 1)["a"] == 2.5


def test_rate_leaves_out_the_start(monkeypatch):
    clock = iter([5.0, 6.0, 8.0, 10.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.rate([[0] * 4] * 4, 2) == 2.0               # eight images in the four seconds after the second batch


def test_every_subject_of_a_tiny_size_yields_rows():
    rows = [*bench.steps(("align",), 1, True, **SMALL["align"]), *bench.contrast(((64, 8),), 4, 1, False), *bench.loader(((16, 1), (16, 2)), 128, 1)]
    rows += bench.step_memory((16,), **{k: v for k, v in SMALL["align"].items() if k != "batch"})
    assert all(isinstance(what, str) and value > 0 and isinstance(goal, str) for what, value, goal in rows)
    kept = {what.split(", ")[2].split(":")[0]: value for what, value, _ in rows if what.startswith("align step, batch")}
    assert kept["plain"] == 1 and kept["both"] < kept["--grad-checkpoint"] < 1 and kept["--micro 2"] < 1


def test_a_billion_parameters_are_counted_by_the_dry_run(monkeypatch):
    seen = []
    monkeypatch.setattr(m3i, "memory", lambda cfg, device: seen.append(cfg) or {"total": 40 * 2 ** 30})
    assert bench.billion(64, 32)[1] == 0.5 and (seen[0].dim, seen[0].depth, seen[0].patch, seen[0].micro) == (1536, 36, 14, 32)


@pytest.mark.parametrize("name", ["lcl", "m3i"])
def test_gpu_rows_can_be_had_anywhere(name):
    fields = {**SMALL[name], "heads": 4, "depth": 1, "text_depth": 1, "text_heads": 2, "patch": 8, "precision": "fp32"}
    batch = fields.pop("batch")
    fields.update({"projector_depth": 1, "decoder_depth": 1, "unit": 1, "block": 8} if name == "m3i" else {})
    rows = {what.split(": ", 1)[1]: value for what, value, _ in bench.gpu(((name, "ti", batch, ">= 0"),), 16, 1, 1, **fields)}
    assert rows["loss of the first step, bf16 / fp32 - 1"] == pytest.approx(0, abs=1e-5)       # fp32 both; --micro changes nothing
    assert sum("share of" in what for what in rows) == 8 and all(value > 0 for what, value in rows.items() if "loss" not in what)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    def rows(name, cfg, *_):
        if cfg.batch > 128:
            raise torch.OutOfMemoryError
        yield name, cfg.batch, "-"
    monkeypatch.setattr(bench, "gpu_rows", rows)
    assert list(bench.gpu((("align", "b", 512, "-"),))) == [("align", 128, "-")]


@pytest.mark.parametrize("name, size, batch, _", bench.PAPER)
def test_paper_sizes_are_runnable_configs(name, size, batch, _):
    cfg = bench.paper(name, size, batch)
    common.check_rows(cfg)
    assert (cfg.dim, cfg.depth, cfg.heads) == common.SIZES[size] and cfg.image_size in (224, 256) and cfg.compile is None
    with torch.device("meta"):
        bench.METHODS[name].Model(cfg)


def test_quality_stops_the_clock_while_it_is_judged(monkeypatch):
    clock, scores = [0.0], iter([0.1, 0.5, 0.81, 0.9])

    def judge(*_):
        clock[0] += 100
        return [("zeroshot_seen", next(scores), 896), ("zeroshot_unseen", 0.99, 128)]

    def train(cfg):
        for _ in range(4):
            clock[0] += 5
            bench.evaluation.evaluate(None, None, cfg, None)
    monkeypatch.setattr(bench.evaluation, "zeroshot", judge)
    monkeypatch.setattr(data, "expand", lambda *_: [])
    monkeypatch.setattr(align, "main", train)
    monkeypatch.setattr(data, "make_world", lambda root: root)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    (what, value, _), = bench.quality()
    assert value == 15 and "3 evaluations" in what


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(bench.sys, "argv", ["bench.py", *args])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    return ended.value.code, capsys.readouterr()


def test_without_a_gpu_gpu_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(bench, "DEVICE", torch.device("cpu"))
    code, said = run(monkeypatch, capsys, "--gpu")
    assert code == 2 and said.err.startswith("no GPU here") and said.err.count("\n") == 1 and not said.out


def test_without_root_link_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    code, said = run(monkeypatch, capsys, "link")
    assert code == 2 and said.err.startswith("link joins") and said.err.count("\n") == 1 and not said.out


def test_without_peers_peers_ends_with_one_line(monkeypatch, capsys):
    def missing(name):
        raise ImportError(f"No module named {name}")
    monkeypatch.setattr(importlib, "import_module", missing)
    code, said = run(monkeypatch, capsys, "--peers")
    assert code == 2 and "open_clip" in said.err and said.err.count("\n") == 1 and not said.out


def test_an_unknown_subject_is_an_error(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "spede")
    assert code == 2 and "spede" in said.err
