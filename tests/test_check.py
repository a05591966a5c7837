"""data.py check and index: each bad shard and sample has its line."""
import functools
import io
import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

import common
import data
from conftest import encoded


def encode(array, kind):
    return encoded(Image.fromarray(np.asarray(array, np.uint8)), kind)


JPEG = encode(np.full((6, 8, 3), 90), "JPEG")
MASK = encode(np.full((6, 8), 1), "PNG")


def record(**fields):
    return {"json": json.dumps(fields).encode()}


def write_shard(folder, samples, split="train"):
    """samples: {key: {suffix: bytes}}. -> path"""
    data.write_shards([samples.items()], str(folder), split)
    return f"{folder}/{split}-00000.tar"


def check(capsys, *paths):
    """The lines on what is wrong, of which the exit code must know, without the summary."""
    with pytest.raises(SystemExit) as end:
        data.main(["check", *map(str, paths)])
    *lines, summary = capsys.readouterr().out.splitlines()
    assert end.value.code == (1 if lines else 0)
    assert summary.endswith(f"{len(lines)} wrong" if lines else "nothing wrong")
    return lines


def test_toy_data_of_every_kind_check_clean_and_fill_no_cache(
        toy_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert check(capsys, f"{toy_data}/{{pairs,docs}}/train-*.tar", f"{toy_data}/labels") == []
    assert not list(tmp_path.iterdir())


def test_real_shards_check_clean(shared, capsys):
    assert check(capsys, f"{shared}/labels/test-*.tar", f"{shared}/docs/train-00000.tar") == []


GOOD = {"jpg": JPEG, "txt": b"a dog"}
BOX = {"x": 1, "y": 1, "w": 2, "h": 2, "text": "a"}
SENTENCE = {"image_name": "0.0.jpg", "matched_text_index": 0}
SECOND = {"image_name": "0.1.jpg", "matched_text_index": 1}


@pytest.mark.parametrize("sample, reason", [
    ({"jpg": JPEG[:-60], "txt": b"a"}, "unreadable image"),
    ({"jpg": encode(np.ones((6, 8, 3)), "GIF"), "txt": b"a"}, "unreadable image"),
    ({"txt": b"a"}, "no image"),
    ({"jpg": JPEG, **record(caption=math.nan)}, "no caption"),
    ({"jpg": JPEG, **record(caption=["", " "])}, "empty caption"),
    ({"jpg": JPEG, "txt": "dog".encode("utf-16-le")}, "text not UTF-8"),
    ({"jpg": JPEG, "json": b"[]"}, "unreadable json"),
    ({"jpg": JPEG, "json": 10_000 * b"[" + 10_000 * b"]"}, "unreadable json"),
    ({"jpg": JPEG, "cls": b"dog"}, "unreadable class"),
    ({"jpg": JPEG, "cls": b"-1"}, "unreadable class"),
    ({"jpg": JPEG, "cls": b"%d" % 2**31}, "unreadable class"),
    ({"jpg": JPEG, "cls": b"2"}, "class 2, but 2 names of classes"),
    ({"jpg": JPEG, "seg.png": MASK[:50]}, "unreadable mask"),
    ({"jpg": JPEG, "seg.png": encode(np.ones((6, 8, 3)), "PNG")}, "unreadable mask"),
    ({"jpg": JPEG, "seg.png": encode(np.ones((3, 4)), "PNG")}, "mask of another size"),
    ({"jpg": JPEG, "seg.png": encode(np.full((6, 8), 2), "PNG")},
     "class 2, but 2 names of classes"),
    ({"jpg": JPEG, **record(boxes=[BOX, {**BOX, "x": 9}, {**BOX, "text": ""}])},
     "2 of 3 boxes malformed, outside or without a text"),
    ({"jpg": JPEG, **record(boxes=3)}, "no box"),
    (record(text_list=["a"]), "no document"),
    (record(text_list=["a"], image_info=[SENTENCE]), "no image left"),
    ({**record(text_list=["a"], image_info=[SENTENCE, {"image_name": "0.0.jpg"}]), "0.jpg": JPEG},
     "malformed entry of image_info"),
    ({**record(text_list=["a", "b"], image_info=[SENTENCE, SECOND]), "0.jpg": JPEG, "1.jpg": b"?"},
     "unreadable image 1.jpg"),
])
def test_check_says_what_is_wrong_with_which_sample(tmp_path, capsys, sample, reason):
    path = write_shard(tmp_path, {"before": GOOD, "0": sample, "after": GOOD, "1": sample})
    (tmp_path / "classes.txt").write_text("unlabeled\nground\n")
    assert check(capsys, path) == [f"{path}: 0: {reason}", f"{path}: 1: {reason}"]


def test_what_can_be_used_is_not_wrong(tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("unlabeled\nground\n")
    path = write_shard(tmp_path, {
        "0": {"jpg": JPEG, "cls": b"1", "seg.png": MASK},
        "1": {"jpg": JPEG, "seg.png": encode(np.full((6, 8), 255), "PNG")},  # Pascal VOC's border
        "2": {"jpg": JPEG, **record(boxes=[])},  # an image without an object
        "__MACOSX/3": GOOD,
    })
    assert check(capsys, path) == []


def test_check_and_index_take_all_parts_and_check_names_every_bad_shard(tmp_path, capsys):
    good = write_shard(tmp_path, {"0": GOOD, "1": GOOD})
    bad = write_shard(tmp_path, {"0": {"jpg": JPEG, "txt": b""}, "1": GOOD}, "test")
    data.main(["index", str(tmp_path)])
    assert "2 shards, 4 samples" in capsys.readouterr().out
    with open(good, "r+b") as f:
        f.truncate(3000)
    (tmp_path / "train-00001.tar").write_bytes(b"<html>")
    empty, cut, page = check(capsys, tmp_path)
    assert empty == f"{bad}: 0: empty caption" and cut.startswith(f"{good}: cut short")
    assert page.startswith(f"{tmp_path}/train-00001.tar: ") and "not a tar" in page


def test_an_unusable_list_of_classes_does_not_hide_the_samples(tmp_path, capsys):
    path = write_shard(tmp_path, {"0": {"jpg": b"?", "cls": b"1"}})
    (tmp_path / "classes.txt").write_text("dog\n\ncat\n")
    lines = check(capsys, path)
    assert len(lines) == 2
    assert "classes.txt, line 2 is empty" in lines[0]
    assert lines[1] == f"{path}: 0: unreadable image"


def test_names_that_the_terminal_cannot_print_are_replaced(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "caf\u00e9", {"\u732b\n\x1b": {"txt": b"a"}})
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(SystemExit, match="1"):
        common.run_command(functools.partial(data.main, ["check", path]))
    line = f"{tmp_path}/caf\\xe9/train-00000.tar: \\u732b??: no image\n"
    assert raw.getvalue().startswith(line.encode())
