"""Encoders that leave under timm's names and come back: another reader, resized positions, files
that do not fit, the five scripts."""
import importlib
import json
import struct
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import align
import common
import data
import eval as evaluation
from common import ViT
from conftest import SCRIPTS, refused, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


def make_vit(image_size=16, patch=8, dim=16, depth=2, heads=2, seed=0, **more):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViT(image_size, patch, dim, depth, heads, **more)


def weights(vision):
    return {name: x.detach().clone() for name, x in vision.state_dict().items()}


def saved(path, state):
    torch.save(state, path)
    return str(path)


def weights_from(path, **sizes):
    """Of a new ViT that starts from a file."""
    vision = make_vit(seed=1, **sizes)
    evaluation.init_encoder(vision, str(path))
    return weights(vision)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- export ----

def read_safetensors(path):
    """By its specification, with none of the code under test."""
    raw = path.read_bytes()
    size, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + size])
    meta = header.pop("__metadata__")
    assert all(isinstance(value, str) for value in meta.values())
    body = np.frombuffer(raw[8 + size:], "<f4").copy()
    tensors = {}
    end = 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end and entry["dtype"] == "F32"  # no gap, no overlap
        tensors[name] = torch.from_numpy(body[start // 4:stop // 4]).view(entry["shape"])
        end = stop
    assert size % 8 == 0 and end == 4 * len(body)
    return tensors, meta


def test_an_exported_encoder_is_the_vit_in_float32_and_comes_back_to_the_bit(toy_data, tmp_path):
    cfg = tiny_config("align", toy_data, tmp_path)
    model = align.ALIGN(cfg)
    common.save(cfg, model, torch.optim.SGD(model.parameters()), 0, data.Tokenizer().dumps())
    expected = weights(model.vision)
    for name in ("vit.safetensors", "vit.pt"):
        path = tmp_path / "new" / name
        evaluation.main(["export", f"{cfg.out}/last.pt", "--out", str(path)])
        assert_same(weights_from(path), expected)
        assert evaluation.read_encoder(str(path))[1]["heads"] == "2"
    tensors, meta = read_safetensors(tmp_path / "new/vit.safetensors")
    assert_same(tensors, expected)  # test_models.py shows that the names are timm's
    assert json.loads(meta["mean"]) == json.loads(meta["std"]) == [0.5] * 3


# ---- files of others ----

def test_a_file_is_read_however_it_wraps_its_weights(tmp_path):
    source = weights(make_vit())
    state = {"module._orig_mod." + name: x.double() for name, x in source.items()}
    state["head.weight"] = torch.zeros(9, 16)
    path = saved(tmp_path / "a.pth", {"model": state, "epoch": 3})
    assert_same(weights_from(path), source)


def safetensors(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_half_precision_safetensors_are_read(tmp_path):
    x = torch.arange(6.0).view(2, 3).bfloat16()
    header = {"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
    body = x.view(torch.uint8).numpy().tobytes()
    (tmp_path / "half.safetensors").write_bytes(safetensors(header, body))
    tensors, _ = evaluation.read_safetensors(tmp_path / "half.safetensors")
    assert torch.equal(tensors["w"], x)


# ---- positions, the class token, heads ----

@pytest.mark.parametrize("grid", [2, 9])
def test_positions_are_resized_as_a_picture_and_the_class_tokens_stays(grid):
    ramp = torch.arange(4.).repeat(4, 1)
    picture = torch.stack([ramp, ramp.T, torch.ones(4, 4)], 2)
    table = torch.cat([torch.full((1, 1, 3), 7.), picture.view(1, 16, 3)], 1)
    cls, patches = evaluation.resize_positions(table, grid)
    assert torch.equal(cls, table[:, :1]) and patches.shape == (1, grid**2, 3)
    x, y, one = patches[0].T.view(3, grid, grid)
    torch.testing.assert_close(one, torch.ones(grid, grid))
    torch.testing.assert_close(x, y.T)  # columns stay columns
    assert (x - x[0]).abs().max() < 1e-5 and (x[0].diff() > 0).all()
    torch.testing.assert_close(x, 3 - x.flip(1))  # centered
    assert x[0, 0].abs() > 0.01  # the corners are not pinned


def test_a_class_token_that_one_side_lacks_is_left_out_or_stays_as_initialized(tmp_path):
    with_token = weights(make_vit())
    without = weights_from(saved(tmp_path / "a.pt", with_token), cls=False)
    assert torch.equal(without["pos_embed"], with_token["pos_embed"][:, 1:])
    found = weights_from(saved(tmp_path / "b.pt", without))
    initial = weights(make_vit(seed=1))
    assert torch.equal(found["cls_token"], initial["cls_token"])
    assert torch.equal(found["pos_embed"][:, :1], initial["pos_embed"][:, :1])
    assert torch.equal(found["pos_embed"][:, 1:], without["pos_embed"])


def test_heads_come_from_the_file_or_a_well_known_size_and_are_never_guessed():
    def heads(dim, depth, meta):
        patches = torch.zeros(dim, 3, 8, 8)
        tensors = {"patch_embed.proj.weight": patches, f"blocks.{depth - 1}.norm1.bias": patches}
        return evaluation.encoder_sizes(tensors, meta)["heads"]

    assert heads(16, 2, {"heads": "4"}) == 4
    assert heads(768, 12, {}) == 12 and heads(1280, 32, {}) == 16  # ViT-B; MAE's ViT-H
    assert heads(768, 11, {}) is heads(1408, 40, {}) is None


# ---- refused ----

ONE_TENSOR = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize("content,message", [
    (b"\xff" * 100, "no safetensors header"),
    (safetensors(ONE_TENSOR, bytes(4)), "w lies outside the file"),
    (safetensors(ONE_TENSOR, bytes(8)), "no patch_embed.proj.weight"),
    (None, "No such file"),
])
def test_what_is_no_encoder_file_gets_one_line(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    line = refused(weights_from, path)
    assert message in line and str(path) in line


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", SimpleNamespace(x=1))
    assert "SimpleNamespace, not tensors alone" in refused(weights_from, path)


@pytest.mark.parametrize("here,there,message", [
    ({"dim": 32}, {}, "cls_token is (1, 1, 16) there and (1, 1, 32) here"),
    ({"depth": 3}, {}, "blocks.2.norm1.weight is missing there and (16,) here"),
    ({}, {"norm_pre.weight": torch.ones(16)}, "norm_pre.weight is (16,) there and missing here"),
    ({"heads": 4}, {}, "has 2 heads, not 4"),
    ({}, {"pos_embed": torch.ones(1, 7, 16)}, "its 7 positions are not those of a square grid"),
], ids=["dim", "depth", "extra", "heads", "grid"])
def test_an_encoder_that_does_not_fit_is_refused_with_both_sizes(tmp_path, here, there, message):
    state = {"model": {**weights(make_vit()), **there}, "metadata": {"heads": "2"}}
    path = saved(tmp_path / "a.pt", state)
    line = refused(partial(weights_from, **here), path)
    assert message in line and path in line


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_starts_from_an_encoder_file(name, toy_data, tmp_path):
    source = make_vit(image_size=24, depth=1)  # a finer grid: positions are resized
    path = saved(tmp_path / "a.pt", {"model": weights(source), "metadata": {"heads": "2"}})
    script = importlib.import_module(name)
    argv = ["--data", f"{toy_data}/pairs", "--init", path]
    sizes = common.parse(script.Config, script.DEMO, "", argv)
    assert (sizes.dim, sizes.depth, sizes.heads, sizes.patch) == (16, 1, 2, 8)

    cfg = tiny_config(name, toy_data, tmp_path, depth=1, init=path)
    model = getattr(script, script.Config.method)(cfg)
    expected = weights(source)
    if model.vision.pos_embed.requires_grad:
        expected["pos_embed"] = torch.cat(evaluation.resize_positions(expected["pos_embed"], 2), 1)
    else:  # sine and cosine stay
        expected["pos_embed"] = model.vision.pos_embed.clone()
    assert evaluation.init_model(cfg, model) is None
    assert_same(weights(model.vision), expected)
