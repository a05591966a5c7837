"""A mistake that a user is likely to make ends with one line: what, value, remedy."""
import gzip
import os
import shutil
import tarfile
from dataclasses import replace

import pytest
import torch

import align
import common
import data
import eval as evaluation
from conftest import refused, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cfg(toy_data, tmp_path):
    return tiny_config("align", toy_data, tmp_path / "run")


def says(line, *parts):
    for part in parts:
        assert str(part) in line, line


# ---- training data ----

@pytest.mark.parametrize("pattern,expanded", [
    ("nix/{00..03}.tar", "nix/00.tar"), ("nix/{a,b}-{8..9}.tar", "nix/a-8.tar"),
    ("nix/*.tar", "nix/*.tar"), ("nix", "nix")])
def test_a_pattern_without_a_match_is_shown_with_what_it_became(cfg, pattern, expanded):
    says(refused(align.main, replace(cfg, data=[pattern])), pattern, expanded)


def test_a_wrong_val_pattern_is_said_before_the_training(cfg):
    says(refused(align.main, replace(cfg, val=["nix/*.tar"], eval_every=0)), "nix/*.tar")
    assert not os.path.exists(f"{cfg.out}/last.pt")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100])
def test_what_is_no_tar_is_named(cfg, tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    says(refused(align.main, replace(cfg, data=[f"{tmp_path}/x.tar"])), "x.tar")


def test_a_compressed_shard_is_said_to_be_unpacked(cfg, toy_data, tmp_path):
    with open(f"{toy_data}/pairs/train-00000.tar", "rb") as f:
        (tmp_path / "x.tar").write_bytes(gzip.compress(f.read()))
    says(refused(align.main, replace(cfg, data=[f"{tmp_path}/x.tar"])), "x.tar", "gzip -d")


def test_data_without_captions_are_told_what_a_caption_is(cfg, toy_data):
    line = refused(align.main, replace(cfg, data=[f"{toy_data}/labels"]))
    says(line, "caption", "KEY.txt")


def test_a_batch_larger_than_the_data_is_said(cfg):
    says(refused(align.main, replace(cfg, batch=9999)), "--batch 9999", "256")


def test_held_out_classes_without_names_are_said_before_the_training(cfg, toy_data, tmp_path):
    os.makedirs(tmp_path / "up/bare")
    shutil.copy(f"{toy_data}/labels/test-00000.tar", tmp_path / "up/bare/test-00000.tar")
    bare = replace(cfg, val=[f"{tmp_path}/up/bare"], eval_every=0)
    says(refused(align.main, bare), "classes.txt")
    assert not os.path.exists(f"{cfg.out}/last.pt")


def test_shards_without_a_readable_image_are_said(cfg, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i in range(40):
            for suffix, raw in [("jpg", b"no image"), ("txt", b"a caption")]:
                data.add(tar, f"{i:04d}.{suffix}", raw)
    line = refused(align.main, replace(cfg, data=[f"{tmp_path}/x.tar"]))
    says(line, "none of the 40 samples", "data.py check")


# ---- sizes and vocabulary ----

@pytest.mark.parametrize("change,parts", [
    (dict(image_size=50, patch=16), ["--image-size 50", "--patch 16", "48"]),
    (dict(heads=3), ["16", "3 heads"]), (dict(text_heads=3), ["16", "3 heads"]),
    (dict(micro=5), ["--micro 5", "16 rows"]), (dict(precision="fp16"), ["--precision fp16"])])
def test_a_value_that_does_not_fit_is_said_with_its_flag(cfg, change, parts):
    says(refused(align.main, replace(cfg, **change)), *parts)


def test_a_vocabulary_larger_than_the_model_is_said_with_both_sizes(cfg, tmp_path):
    path = str(tmp_path / "v.json")
    data.Tokenizer([[8 + i, 9 + i] for i in range(136)]).save(path)
    says(refused(align.main, replace(cfg, vocab=path)), path, "400", "--vocab-size 300")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"special": 8}', b"\xff\xfe\x80PK\x03\x04",
                                     b'{"special": 8, "merges": [[9999, 8]]}'])
def test_a_damaged_vocabulary_is_named_with_the_way_to_a_good_one(cfg, tmp_path, content):
    (tmp_path / "v.json").write_bytes(content)
    line = refused(align.main, replace(cfg, vocab=f"{tmp_path}/v.json"))
    says(line, f"{tmp_path}/v.json")


# ---- checkpoints in evaluation ----

@pytest.mark.parametrize("content", [b"", b"not a checkpoint\n", b"PK\x03\x04 cut", None])
def test_what_is_no_checkpoint_cannot_be_evaluated(tmp_path, content):
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(common.UserError, match="x.pt"):
        evaluation.load_model(str(path), torch.device("cpu"))
