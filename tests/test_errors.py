"""A mistake that a user is likely to make ends with one line: what, value, remedy."""
import os
from dataclasses import replace

import pytest

import align
import eval as evaluation
from conftest import refused, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cfg(toy_data, tmp_path):
    return tiny_config("align", toy_data, tmp_path / "run")


@pytest.mark.parametrize("change,parts", [
    (dict(data=["nix/{a,b}-{8..9}.tar"]), ["nix/{a,b}-{8..9}.tar", "nix/a-8.tar"]),
    (dict(val=["nix/*.tar"], eval_every=0), ["nix/*.tar"]),
    (dict(batch=9999), ["--batch", "9999", "256"]),
    (dict(image_size=50, patch=16), ["--image-size 50", "--patch 16", "48"]),
    (dict(text_heads=3), ["16", "3 heads"]),
    (dict(precision="fp16"), ["--precision fp16"]),
])
def test_a_value_that_cannot_be_used_is_said_before_the_training(cfg, change, parts):
    line = refused(align.main, replace(cfg, **change))
    assert all(part in line for part in parts), line
    assert not os.path.exists(f"{cfg.out}/last.pt")


def test_data_without_captions_are_told_what_a_caption_is(cfg, toy_data):
    line = refused(align.main, replace(cfg, data=[f"{toy_data}/labels/test-00000.tar"]))
    assert "caption" in line and "KEY.txt" in line


def test_held_out_shards_that_are_also_trained_on_are_named(cfg, toy_data, capsys):
    mixed = replace(cfg, data=[f"{toy_data}/pairs/*.tar"], val=[f"{toy_data}/pairs"])
    evaluation.check_held_out(mixed)
    said = capsys.readouterr().out
    assert "1 of the held-out shards are also trained on" in said
    assert f"{toy_data}/pairs/test-00000.tar" in said
    evaluation.check_held_out(replace(mixed, data=[f"{toy_data}/pairs"]))
    assert "warning" not in capsys.readouterr().out
