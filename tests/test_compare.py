"""The command line: results of one checkpoint, reports on several, what is refused, quiet ends."""
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import align
import common
import data
import eval as evaluation
import mug
from conftest import ROOT, refused, tiny_config

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def save_untrained(cfg, model):
    os.makedirs(cfg.out)
    optimizer = torch.optim.SGD(model.parameters())
    common.save(cfg, model, optimizer, 0, data.Tokenizer().dumps())
    return f"{cfg.out}/last.pt"


@pytest.fixture(scope="module")
def two(toy_data, tmp_path_factory):
    """Checkpoints of an ALIGN, which reads texts, and of a MUG, which writes them; untrained."""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    cfg = tiny_config("align", toy_data, folder / "a")
    first = save_untrained(cfg, align.ALIGN(cfg))
    cfg = tiny_config("mug", toy_data, folder / "b")
    return first, save_untrained(cfg, mug.MUG(cfg))


@pytest.fixture(scope="module")
def small_labels(toy_data, tmp_path_factory):
    """100 training and 60 held-out toy images with classes."""
    folder = tmp_path_factory.mktemp("small") / "labels"
    folder.mkdir()
    for name in ("classes.txt", "unseen.txt", "zeroshot_classification_templates.txt"):
        shutil.copy(f"{toy_data}/labels/{name}", folder)
    for part, n in (("train", 100), ("test", 60)):
        index = data.open_index(f"{toy_data}/labels", part)
        with data.tarfile.open(folder / f"{part}-0.tar", "w") as tar:
            for i in range(n):
                for suffix, content in index[i].members.items():
                    data.add(tar, f"{i:03d}.{suffix}", content)
    return str(folder)


def results(folder):
    return [json.loads(line) for line in open(f"{folder}/eval.jsonl")]


# ---- one checkpoint ----

def test_a_command_prints_a_line_of_json_a_result_and_adds_them_to_a_file(
        two, small_labels, tmp_path, capsys):
    argv = ["knn", two[0], "--data", small_labels, "--out", str(tmp_path)]
    evaluation.main(argv)
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert [row["metric"] for row in rows] == ["knn", "knn_mean_per_class", "knn_majority"]
    assert rows[0].items() >= {"protocol": "knn", "split": small_labels, "seed": 0}.items()
    assert "most frequent answer" in lines[-2]
    evaluation.main(argv)
    assert results(tmp_path) == rows * 2


def test_random_init_measures_new_weights_of_the_same_sizes(two, small_labels, tmp_path):
    for seed in ("0", "1"):
        evaluation.main(["knn", two[0], "--data", small_labels, "--out", str(tmp_path),
                         "--random-init", "--seed", seed])
    metrics = [row["metric"] for row in results(tmp_path)]
    assert metrics == ["knn_random", "knn_mean_per_class_random", "knn_majority"] * 2
    torch.manual_seed(0)  # as in the fixture
    model, tokenizer, cfg, _ = evaluation.load_model(two[0], CPU)
    for name, x in evaluation.untrained(model, cfg, CPU, seed=0).state_dict().items():
        assert torch.equal(x, model.state_dict()[name])  # these weights are those of seed 0
    assert not torch.equal(evaluation.untrained(model, cfg, CPU, seed=1).vision.cls_token,
                           model.vision.cls_token)


# ---- several checkpoints ----

@pytest.fixture
def quick_probes(monkeypatch):
    """Probes have tests of their own, and take seconds."""
    def nearest(train, labels, test, *others):
        return evaluation.knn(train.flatten(1).float(), labels, test.flatten(1).float(), k=1)

    monkeypatch.setattr(evaluation, "linear_probe", nearest)
    monkeypatch.setattr(evaluation, "attentive_probe", nearest)


def read_report(folder):
    """compare.json, and the cells of compare.md."""
    with open(f"{folder}/compare.json") as f:
        report = json.load(f)
    table = []
    for line in open(f"{folder}/compare.md"):
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return report, table


def test_a_report_holds_what_each_checkpoint_can_do_and_the_numbers_of_single_commands(
        two, toy_data, small_labels, tmp_path, quick_probes):
    pairs = f"{toy_data}/pairs"
    evaluation.main(["compare", *two, "--data", pairs, small_labels, "--out", str(tmp_path)])
    report, table = read_report(tmp_path)
    assert list(report["checkpoints"].values()) == ["ALIGN a", "MUG b"]
    assert report["failures"] == []
    header, _, *rows = table
    assert header == ["data", "metric", "n", "ALIGN a", "MUG b"]
    assert {len(row) for row in rows} == {5}
    cells = {row[1]: row for row in rows}
    for metric in ("i2t_r1", "zeroshot_seen", "attentive"):
        assert cells[metric][3] != "-", metric
    for metric in ("knn", "linear"):  # with their baselines in the same cell
        assert "(untrained encoder" in cells[metric][3], metric
    for metric in ("cider", "nats_per_token", "named_seen", "linear", "attentive"):
        assert cells[metric][4] != "-", metric
    assert cells["i2t_r1"][4] == cells["cider"][3] == "-"
    for task, folder in (("retrieval", pairs), ("knn", small_labels)):
        out = tmp_path / task
        evaluation.main([task, two[0], "--data", folder, "--out", str(out)])
        for row in results(out):
            if not evaluation.is_baseline(row["metric"], cells):
                value = evaluation.format_value(row["metric"], row["value"])
                assert cells[row["metric"]][3].split(" (")[0] == value


def test_a_protocol_that_cannot_run_is_a_row_with_its_reason_and_costs_nothing_else(
        two, small_labels, tmp_path, quick_probes):
    folder = tmp_path / "labels"
    shutil.copytree(small_labels, folder)
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a %s\n")
    evaluation.main(["compare", two[0], "--data", str(folder), "--out", str(tmp_path)])
    report, table = read_report(tmp_path)
    rows = {row[1]: row for row in table}
    assert rows["zeroshot"][2:] == ["-", "-"] and rows["knn"][3] != "-"
    assert "template 'a photo of a %s'" in (tmp_path / "compare.md").read_text()
    assert [failure["protocol"] for failure in report["failures"]] == ["zeroshot"]


def test_an_unforeseen_error_of_one_protocol_is_a_row_too(
        two, small_labels, tmp_path, quick_probes, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(evaluation, "attentive", fail)
    evaluation.main(["compare", two[1], "--data", small_labels, "--out", str(tmp_path)])
    report, _ = read_report(tmp_path)
    assert report["failures"][0]["reason"] == "RuntimeError: out of memory"
    assert "knn" in {row["metric"] for row in report["results"]}


def test_two_checkpoints_of_one_name_have_different_columns(two, tmp_path):
    model, _, _, _ = evaluation.load_model(two[0], CPU)
    assert evaluation.column_title(model, two[0], "1234abcd", {}) == "ALIGN a"
    assert evaluation.column_title(model, two[0], "1234abcd", {"x": "ALIGN a"}) == "ALIGN a 1234"


def test_the_first_record_suggests_the_heads(two, toy_data, small_labels, shared):
    assert evaluation.heads_for(data.expand(small_labels, "test")) == ["finetune"]
    toy_pairs = data.expand(f"{toy_data}/pairs", "test")
    assert evaluation.heads_for(toy_pairs) == ["segment", "detect", "vqa"]
    for folder, heads in (("labels", ["finetune"]), ("nlvr", ["vqa"]), ("pairs", []),
                          ("seg", ["segment", "detect"])):
        assert evaluation.heads_for(data.expand(f"{shared}/{folder}", "test")) == heads


# ---- refused ----

@pytest.mark.parametrize("argv,message", [
    (["zeroshot", "MUG"], "needs encode_text, which MUG of"),
    (["caption", "ALIGN"], "does not have: it can do zeroshot, retrieval, knn"),
    (["export", "ALIGN", "--out", "x.onnx"], "--out x.onnx"),
    (["export", "ALIGN"], "--out"),
    (["knn", "ALIGN", "--text", "x"], "--text"),
    (["zeroshoot", "ALIGN"], "zeroshoot"),
    (["knn", "typo.pt"], "typo.pt cannot be read"),
    (["knn", "ALIGN", "--data", "typo/"], "typo/"),
    (["knn", __file__], "cannot be read"),
    ([], "COMMAND"),
])
def test_what_a_command_cannot_do_gets_one_line(two, argv, message):
    paths = {"ALIGN": two[0], "MUG": two[1]}
    assert message in refused(evaluation.main, [paths.get(word, word) for word in argv])


def test_help_lists_every_command_and_each_command_its_flags(capsys):
    for argv, words in ((["-h"], evaluation.HELP), (["search", "-h"], ["--minus", "[1 2]"]),
                        (["knn", "-h"], ["--random-init", "--data PATH", "DINO"])):
        with pytest.raises(SystemExit):
            evaluation.main(argv)
        text = capsys.readouterr().out
        for word in words:
            assert word in text, word


# ---- processes and terminals ----

def run_process(command):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True,
                          timeout=60, env=env)


def test_a_mistake_ends_a_process_with_one_line_and_code_2_also_with_asserts_off():
    done = run_process(f"'{sys.executable}' -O eval.py knn requirements.txt")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_ends_a_process_quietly(two, small_labels):
    command = f"'{sys.executable}' eval.py knn {two[0]} --data {small_labels} | head -c 1"
    done = run_process(f"{command}; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


def exit_code(main):
    with pytest.raises(SystemExit) as caught:
        common.run_command(main)
    return caught.value.code


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert exit_code(lambda: common.print0("a result")) == 0
    assert exit_code(lambda: list(evaluation.progress([1], "reading", 1))) == 0


def test_what_the_terminal_cannot_print_is_printed_as_codes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert exit_code(lambda: common.print0("caf\xe9/test-0.tar")) == 0
    assert raw.getvalue() == b"caf\\xe9/test-0.tar\n"
