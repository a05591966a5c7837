"""The command line: results of one checkpoint, reports on several, what is refused, quiet ends."""
import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial

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
    assert rows[0].items() >= {"protocol": "knn", "split": small_labels, "seed": 0,
                               "random_init": False}.items()
    assert "most frequent answer" in lines[-2]
    evaluation.main(argv)
    assert results(tmp_path) == rows * 2


def test_random_init_measures_new_weights_of_the_same_sizes(two, small_labels, tmp_path):
    for seed in ("0", "1"):
        evaluation.main(["knn", two[0], "--data", small_labels, "--out", str(tmp_path),
                         "--random-init", "--seed", seed])
    assert [row["random_init"] for row in results(tmp_path)] == [True] * 6
    torch.manual_seed(0)  # as in the fixture
    model, _, cfg = evaluation.load_model(two[0], CPU)
    for name, x in evaluation.untrained(model, cfg, CPU, seed=0).state_dict().items():
        assert torch.equal(x, model.state_dict()[name])  # these weights are those of seed 0
    assert not torch.equal(evaluation.untrained(model, cfg, CPU, seed=1).vision.cls_token,
                           model.vision.cls_token)


# ---- several checkpoints ----

@pytest.fixture
def quick_probe(monkeypatch):
    """The linear probe has tests of its own, and takes seconds."""
    monkeypatch.setattr(evaluation, "linear_probe", partial(evaluation.knn, k=1))


def read_table(folder):
    """The cells of compare.md."""
    table = []
    for line in open(f"{folder}/compare.md"):
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return table


def test_a_report_holds_what_each_checkpoint_can_do_and_the_numbers_of_single_commands(
        two, toy_data, small_labels, tmp_path, quick_probe):
    pairs = f"{toy_data}/pairs"
    evaluation.main(["compare", *two, "--data", pairs, small_labels, "--out", str(tmp_path)])
    header, _, *rows = read_table(tmp_path)
    assert header == ["data", "metric", "n", f"ALIGN, {two[0]}", f"MUG, {two[1]}"]
    assert {len(row) for row in rows} == {5}
    cells = {row[1]: row for row in rows}
    assert "(chance" in cells["i2t_r1"][3] and "(chance" in cells["zeroshot_seen"][3]
    assert "(another image" in cells["cider"][4] and cells["nats_per_token"][4] != "-"
    for column in (3, 4):
        assert "(untrained encoder" in cells["knn"][column]
    assert cells["i2t_r1"][4] == cells["cider"][3] == "-"
    values = {(row["metric"], row["checkpoint"]): row["value"] for row in results(tmp_path)}
    for task, folder in (("retrieval", pairs), ("knn", small_labels)):
        out = tmp_path / task
        evaluation.main([task, two[0], "--data", folder, "--out", str(out)])
        for row in results(out):
            assert values[row["metric"], two[0]] == row["value"]


def test_a_protocol_that_cannot_run_is_a_row_with_its_reason_and_costs_nothing_else(
        two, small_labels, tmp_path, quick_probe):
    folder = tmp_path / "labels"
    shutil.copytree(small_labels, folder)
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a %s\n")
    evaluation.main(["compare", two[0], "--data", str(folder), "--out", str(tmp_path)])
    rows = {row[1]: row for row in read_table(tmp_path)}
    assert rows["zeroshot"][2:] == ["-", "-"] and rows["knn"][3] != "-"
    assert "template 'a photo of a %s'" in (tmp_path / "compare.md").read_text()


# ---- refused ----

@pytest.mark.parametrize("argv,message", [
    (["zeroshot", "MUG"], "needs encode_text, which MUG of"),
    (["caption", "ALIGN"], "does not have: it can do zeroshot, retrieval, knn"),
    (["vqa", "ALIGN"], "needs fused, which ALIGN of"),
    (["search", "MUG", "--text", "x"], "search by --image alone"),
    (["export", "ALIGN", "--out", "x.onnx"], "--out x.onnx"),
    (["knn", "ALIGN", "--text", "x"], "--text"),
    (["zeroshoot", "ALIGN"], "zeroshoot"),
    (["knn", "typo.pt"], "typo.pt does not exist"),
    (["knn", "ALIGN", "--data", "typo/"], "typo/"),
    (["knn", __file__], "give last.pt of a run"),
    ([], "COMMAND"),
])
def test_what_a_command_cannot_do_gets_one_line(two, argv, message):
    paths = {"ALIGN": two[0], "MUG": two[1]}
    assert message in refused(evaluation.main, [paths.get(word, word) for word in argv])


def test_help_lists_every_command_and_each_command_its_flags(capsys):
    for argv, words in ((["-h"], evaluation.HELP), (["search", "-h"], ["--minus", "[20]"]),
                        (["detect", "-h"], ["--random-init", "[100; toy data 0.7]"])):
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
