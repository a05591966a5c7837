"""Several checkpoints and several data sets: the report, the mean, the bars."""
import json, shutil

import pytest
import torch
from PIL import Image

import align
import eval as E
import mug
from common import UserError


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def two(tiny_world, tmp_path_factory):
    """An ALIGN with a text tower and a MUG with a decoder, hardly trained."""
    folder, common_fields = tmp_path_factory.mktemp("two"), dict(data=[f"{tiny_world}/pairs"], image_size=16, patch=8, dim=16, depth=1, heads=2, text_dim=16,
                                                                 text_depth=1, text_heads=2, context=24, vocab_size=300, batch=16, steps=2, workers=0,
                                                                 precision="fp32", eval_every=-1, flip=False)
    align.main(align.Config(out=f"{folder}/a", **common_fields))
    mug.main(mug.Config(out=f"{folder}/b", pixel_dim=16, pixel_depth=1, pixel_heads=2, cross_depth=1, scale=1.0, **common_fields))
    return f"{folder}/a/last.pt", f"{folder}/b/last.pt"


def results(out):
    return [json.loads(line) for line in open(f"{out}/eval.jsonl")]


def test_a_report_holds_what_each_checkpoint_can_do_and_the_same_numbers_as_the_single_commands(two, tiny_world, tmp_path, monkeypatch):
    for probe in ("linear_probe", "attentive_probe"):        # these have tests of their own, and take seconds
        monkeypatch.setattr(E, probe, lambda train, labels, test, *_: E.knn(train.flatten(1), labels, test.flatten(1), 1))
    where = ["--data", f"{tiny_world}/pairs", f"{tiny_world}/labels", "--out", str(tmp_path)]
    E.main(["compare", *two, *where])
    report = json.load(open(tmp_path / "compare.json"))
    assert list(report["checkpoints"].values()) == ["ALIGN a", "MUG b"]
    done = {name: {r["protocol"] for r in report["results"] if r["checkpoint"] == digest} for digest, name in report["checkpoints"].items()}
    assert done == {"ALIGN a": {"retrieval", "zeroshot", "knn", "linear", "attentive"}, "MUG b": {"caption", "knn", "linear", "attentive"}}
    header, rule, *rows = [[c.strip() for c in line.strip().strip("|").split("|")] for line in open(tmp_path / "compare.md")]
    assert header == ["data", "metric", "n", "ALIGN a", "MUG b"] and set(map(len, rows)) == {5}
    cells = {row[1]: row for row in rows}
    assert cells["i2t_r1"][4] == "-" != cells["i2t_r1"][3] and cells["cider"][3] == "-" and cells["knn"][0] == "labels"
    for task, part in (("retrieval", "pairs"), ("knn", "labels"), ("attentive", "labels")):
        E.main([task, two[0], "--data", f"{tiny_world}/{part}", "--out", str(tmp_path / task)])
        for r in results(tmp_path / task):
            assert r in report["results"] and cells[r["metric"]][3] == E.shown(r["metric"], r["value"])
    with Image.open(tmp_path / "compare.png") as page:
        assert page.width == 860


def test_several_folders_are_several_data_sets_and_end_with_their_plain_mean(two, tiny_world, tmp_path):
    labels = f"{tiny_world}/labels"
    shutil.copytree(labels, tmp_path / "other")
    (tmp_path / "other/unseen.txt").unlink()                 # there all classes are scored together
    E.main(["zeroshot", two[0], "--data", labels, str(tmp_path / "other"), "--out", str(tmp_path)])
    *rows, mean = results(tmp_path)
    first, second = ([r for r in rows if r["split"] == s] for s in (labels, str(tmp_path / "other")))
    whole = second[0]
    assert whole["metric"] == "zeroshot" and len(first) == 6 and len(second) == 3
    seen, unseen = (next(r for r in first if r["metric"] == f"zeroshot_{s}") for s in ("seen", "unseen"))
    assert seen["n"] * seen["value"] + unseen["n"] * unseen["value"] == pytest.approx(whole["n"] * whole["value"])
    assert (mean["metric"], mean["n"]) == ("mean", 2) and mean["value"] == pytest.approx(whole["value"])
    E.main(["retrieval", two[0], "--data", *[f"{tiny_world}/pairs"] * 2, "--out", str(tmp_path / "r")])
    found = {r["metric"]: r["value"] for r in results(tmp_path / "r")}
    assert found["mean"] == pytest.approx((found["i2t_r1"] + found["t2i_r1"]) / 2)
    E.main(["knn", two[1], "--data", labels, "--out", str(tmp_path / "k")])
    assert [r["metric"] for r in results(tmp_path / "k")] == ["knn", "knn_mean_per_class"]   # one data set: no mean


def test_maes_protocol_has_a_name_of_its_own_and_belongs_to_linear(two, tiny_world, tmp_path):
    E.main(["linear", two[1], "--data", f"{tiny_world}/labels", "--protocol", "mae", "--out", str(tmp_path)])
    assert [r["metric"] for r in results(tmp_path)] == ["linear_mae", "linear_mae_mean_per_class"]
    with pytest.raises(UserError, match="--protocol belongs to linear, not to knn"):
        E.main(["knn", two[1], "--data", f"{tiny_world}/labels", "--protocol", "mae"])


@pytest.mark.parametrize("argv, told", [(["zeroshot", "B"], "is a MUG: it can do knn, linear, attentive, caption, finetune, segment, detect, vqa$"), (["export", "A", "B", "--out", "x.pt"], "one checkpoint"),
                                        (["export", "A"], "FILE.safetensors"), (["export", "A", "--out", "x.onnx"], "x.onnx")])
def test_what_a_command_cannot_do_is_told(two, argv, told):
    with pytest.raises(UserError, match=told):
        E.main([{"A": two[0], "B": two[1]}.get(a, a) for a in argv])


def test_bars_are_as_long_as_their_values(tmp_path):
    E.bars({"all": [1.0, 0.25], "one": [None, 0.5], "none": [None, float("nan")]}, ["a", "b"], tmp_path / "b.png", "title")
    page = Image.open(tmp_path / "b.png").convert("RGB")
    colours = [(31, 95, 168), (224, 142, 43)]
    runs = [sum(page.getpixel((x, y)) == colour for x in range(230, 800)) for y in range(90, page.height - 24) for colour in colours]
    assert {r for r in runs if r} == {561, 141, 281}         # 560 pixels are 100 %
