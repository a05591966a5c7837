"""The command line: results of one checkpoint, reports on several, search, refusals, quiet ends."""
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import align
import common
import data
import eval as evaluation
import mug
from conftest import ROOT, refused, tiny_config

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def two(toy_data, tmp_path_factory):
    """Checkpoints of an ALIGN, which reads texts, and of a MUG, which writes them; untrained."""
    torch.manual_seed(0)
    paths = []
    for name, method in (("align", align.ALIGN), ("mug", mug.MUG)):
        cfg = tiny_config(name, toy_data, tmp_path_factory.mktemp(name))
        model = method(cfg)
        optimizer = torch.optim.SGD(model.parameters())
        common.save(cfg, model, optimizer, 0, data.Tokenizer().dumps())
        paths.append(f"{cfg.out}/last.pt")
    return paths


@pytest.fixture(scope="module")
def small_labels(toy_data, tmp_path_factory):
    """100 training and 64 held-out toy images with classes, and a template of no use."""
    folder = tmp_path_factory.mktemp("small") / "labels"
    folder.mkdir()
    shutil.copy(f"{toy_data}/labels/classes.txt", folder)
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a %s\n")
    data.write_toy_shard(folder / "train-0.tar", "labels/train", range(100))
    data.write_toy_shard(folder / "test-0.tar", "labels/test", range(64))
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
    evaluation.main([*argv, "--random-init", "--seed", "1"])
    assert results(tmp_path)[:3] == rows
    other = results(tmp_path)[3]
    assert other["seed"] == 1 and other["random_init"] and other["value"] != rows[0]["value"]


def test_a_folder_that_cannot_be_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    argv = ["knn", "no such checkpoint", "--out", str(tmp_path / "file")]
    with pytest.raises(SystemExit, match="2"):
        common.run_command(partial(evaluation.main, argv))
    assert capsys.readouterr().err == f"error: {tmp_path}/file: File exists\n"


def test_random_weights_are_those_of_their_seed(two):
    model, _, cfg = evaluation.load_model(two[0], CPU)
    same, other = [evaluation.untrained(model, cfg, CPU, seed).vision for seed in (0, 1)]
    assert torch.equal(same.cls_token, model.vision.cls_token)  # the fixture's seed is 0
    assert not torch.equal(other.cls_token, model.vision.cls_token)


# ---- several checkpoints ----

def test_a_report_holds_what_each_checkpoint_can_do_and_why_it_cannot_do_the_rest(
        two, toy_data, small_labels, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "linear_probe", partial(evaluation.knn, k=1))  # quicker
    pairs = f"{toy_data}/pairs"
    evaluation.main(["compare", *two, "--data", pairs, small_labels, "--out", str(tmp_path)])
    report = (tmp_path / "compare.md").read_text()
    lines = [line for line in report.splitlines() if line.startswith("|")]
    header, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    assert header == ["data", "metric", "n", f"ALIGN, {two[0]}", f"MUG, {two[1]}"]
    cells = {row[1]: row for row in rows}
    assert "(chance" in cells["i2t_r1"][3] and "(another image" in cells["cider"][4]
    assert "(untrained encoder" in cells["knn"][3] and "(untrained encoder" in cells["knn"][4]
    assert cells["i2t_r1"][4] == cells["cider"][3] == "-"
    assert cells["zeroshot"][2:] == ["-", "-", "-"]
    assert "template 'a photo of a %s'" in report

    values = {(row["metric"], row["checkpoint"]): row["value"] for row in results(tmp_path)}
    evaluation.main(["knn", two[0], "--data", small_labels, "--out", str(tmp_path / "knn")])
    for row in results(tmp_path / "knn"):
        assert values[row["metric"], two[0]] == row["value"]


# ---- search ----

def test_an_image_finds_itself_and_with_texts_what_the_papers_weights_say(
        two, toy_data, tmp_path, capsys):
    pairs = f"{toy_data}/pairs"
    index = data.open_index(pairs, "test")
    query = tmp_path / "query.jpg"
    query.write_bytes(index[300].image_bytes())  # in the second block of images
    argv = ["search", two[0], "--data", pairs, "--out", str(tmp_path), "--k", "5",
            "--image", str(query)]
    evaluation.main(argv)
    line = capsys.readouterr().out.splitlines()[0]
    caption = index[300].captions(lines=True)[0]
    assert line == f"  1.000  {index.paths[0]}: {index[300].key}  {caption}"

    texts = ["a red circle", "a blue bar"]
    evaluation.main([*argv, "--text", texts[0], "--minus", texts[1]])
    model, tokenizer, cfg = evaluation.load_model(two[0], CPU)
    image, _, _, ids = evaluation.embed_pairs(model, tokenizer, index, cfg, CPU)
    text, minus = evaluation.encode_texts(model, tokenizer, texts, cfg, CPU)
    scores = image @ F.normalize(image[300] + 2 * text - 2 * minus, dim=0)  # ALIGN s7
    *lines, last = capsys.readouterr().out.splitlines()
    found = [float(line.split()[0]) for line in lines]
    assert found == pytest.approx(scores.topk(5).values.tolist(), abs=2e-3)
    assert f": {index[int(ids[scores.argmax()])].key} " in lines[0]
    assert last == f"pictures: {tmp_path}/search.png"
    with Image.open(tmp_path / "search.png") as picture:
        assert picture.width == 7 * 126 + 14


# ---- refused ----

@pytest.mark.parametrize("argv,message", [
    (["zeroshot", "MUG"], "needs encode_text, which MUG of"),
    (["caption", "ALIGN"], "does not have: it can do zeroshot, retrieval, knn"),
    (["search", "MUG", "--text", "x"], "search by --image alone"),
    (["search", "ALIGN"], "needs --text, --image"),
    (["search", "ALIGN", "--text", "x", "--k", "0"], "argument --k: 0: at least 1"),
    (["search", "ALIGN", "--image", __file__], "test_compare.py cannot be read"),
    (["export", "ALIGN", "--out", "x.onnx"], "--out x.onnx"),
    (["knn", "typo.pt"], "typo.pt does not exist"),
    (["knn", __file__], "give last.pt of a run"),
])
def test_what_a_command_cannot_do_gets_one_line(two, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for runs/
    paths = {"ALIGN": two[0], "MUG": two[1]}
    assert message in refused(evaluation.main, [paths.get(word, word) for word in argv])


def test_checkpoints_of_other_devices_are_read_but_not_those_of_other_programs(two, tmp_path):
    state = torch.load(two[0], weights_only=True)
    path = f"{tmp_path}/last.pt"
    torch.save({**state, "config": {**state["config"], "precision": "bf16"}}, path)
    _, _, cfg = evaluation.load_model(path, CPU)
    assert cfg.precision == "auto"  # float32 on the CPU
    torch.save({**state, "method": "os"}, path)
    assert "a checkpoint of os: known are ALIGN, MUG" in refused(evaluation.main, ["knn", path])
    torch.save({**state, "config": {**state["config"], "no_such": 1}}, path)
    assert "another version of align.py" in refused(evaluation.main, ["knn", path])


# ---- processes ----

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
