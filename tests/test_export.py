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


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- export ----

def read_safetensors(path):
    """By its specification, with struct and numpy; the code under test uses neither."""
    raw = path.read_bytes()
    size, = struct.unpack("<Q", raw[:8])
    assert size % 8 == 0
    header = json.loads(raw[8:8 + size])
    meta = header.pop("__metadata__")
    assert all(isinstance(value, str) for value in meta.values())
    tensors = {}
    end = 0
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end and entry["dtype"] == "F32"  # no gap, no overlap
        values = np.frombuffer(raw[8 + size + start:8 + size + stop], "<f4")
        tensors[name] = values.reshape(entry["shape"])
        end = stop
    assert 8 + size + end == len(raw)
    return tensors, meta


def test_an_exported_encoder_is_the_vit_in_float32_and_says_what_it_needs(toy_data, tmp_path):
    cfg = tiny_config("align", toy_data, tmp_path)
    model = align.ALIGN(cfg)
    common.save(cfg, model, torch.optim.SGD(model.parameters()), 0, data.Tokenizer().dumps())
    path = tmp_path / "new" / "vit.safetensors"
    evaluation.main(["export", f"{cfg.out}/last.pt", "--out", str(path)])
    tensors, meta = read_safetensors(path)
    expected = weights(model.vision)  # test_models.py shows that the names are timm's
    assert tensors.keys() == expected.keys()
    for name, x in tensors.items():
        assert np.array_equal(x, expected[name].numpy()), name
    assert meta["heads"] == "2"
    assert json.loads(meta["mean"]) == json.loads(meta["std"]) == [0.5] * 3


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_encoder_comes_back_to_the_bit(tmp_path, suffix):
    source = make_vit()
    path = str(tmp_path / f"vit.{suffix}")
    evaluation.export(source, path)
    fresh = make_vit(seed=1)
    evaluation.init_encoder(fresh, path)
    assert_same(weights(fresh), weights(source))


# ---- files of others ----

@pytest.mark.parametrize("wrap", [
    lambda s: {"model": {**s, "head.weight": torch.zeros(9, 16)}, "epoch": 3},
    lambda s: {"module._orig_mod." + name: x.double() for name, x in s.items()},
], ids=["model and classifier", "prefixes and double"])
def test_files_are_read_however_they_wrap_their_weights(tmp_path, wrap):
    source = weights(make_vit())
    fresh = make_vit(seed=1)
    evaluation.init_encoder(fresh, saved(tmp_path / "a.pth", wrap(source)))
    assert_same(weights(fresh), source)


def test_half_precision_safetensors_are_read(tmp_path):
    x = torch.arange(6.0).view(2, 3).bfloat16()
    header = {"w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
    body = x.view(torch.uint8).numpy().tobytes()
    (tmp_path / "half.safetensors").write_bytes(safetensors(header, body))
    tensors, _ = evaluation.read_safetensors(tmp_path / "half.safetensors")
    assert torch.equal(tensors["w"], x)


# ---- positions and the class token ----

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
    torch.testing.assert_close(x, 3 - x.flip(1))  # centered: neither edge is pinned


def test_a_class_token_that_one_side_lacks_is_left_out_or_stays_as_initialized(tmp_path):
    with_token = make_vit()
    without = make_vit(cls=False, seed=1)
    evaluation.init_encoder(without, saved(tmp_path / "a.pt", weights(with_token)))
    assert torch.equal(without.pos_embed, with_token.pos_embed[:, 1:])
    fresh = make_vit(seed=2)
    before = weights(fresh)
    evaluation.init_encoder(fresh, saved(tmp_path / "b.pt", weights(without)))
    assert torch.equal(fresh.cls_token, before["cls_token"])
    assert torch.equal(fresh.pos_embed[:, :1], before["pos_embed"][:, :1])
    assert torch.equal(fresh.pos_embed[:, 1:], without.pos_embed)


# ---- number of heads ----

def test_heads_come_from_the_file_or_a_well_known_size_and_are_never_guessed(tmp_path):
    def heads(dim, depth, meta):
        tensors = {"patch_embed.proj.weight": torch.zeros(dim, 3, 8, 8)}
        tensors.update({f"blocks.{i}.attn.qkv.weight": torch.zeros(1) for i in range(depth)})
        return evaluation.encoder_sizes(tensors, meta)["heads"]

    assert heads(16, 2, {"heads": "4"}) == 4
    assert heads(768, 12, {}) == 12 and heads(1280, 32, {}) == 16  # ViT-B; MAE's ViT-H
    assert heads(768, 11, {}) is heads(1408, 40, {}) is None


# ---- refused ----

def safetensors(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def one_tensor(shape, n_bytes):
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}
    return safetensors(header, bytes(n_bytes))


@pytest.mark.parametrize("name,content,message", [
    ("a.safetensors", b"\xff" * 100, "no safetensors header"),
    ("a.safetensors", one_tensor([2], 4), "w lies outside the file"),
    ("a.safetensors", one_tensor([2], 8), "no patch_embed.proj.weight"),
    ("a.pt", b"not a torch file", "cannot be read"),
    ("a.pt", None, "No such file"),
    ("a.pt", SimpleNamespace(x=1), "SimpleNamespace, not tensors alone"),
])
def test_what_is_no_encoder_file_gets_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    line = refused(partial(evaluation.init_encoder, make_vit()), str(path))
    assert message in line and str(path) in line


def test_a_damaged_file_is_not_mistaken_for_a_sound_one(tmp_path):
    state = weights(make_vit())
    path = saved(tmp_path / "a.pt", state)
    with open(path, "r+b") as f:
        raw = bytearray(f.read())
        raw[raw.index(state["pos_embed"].numpy().tobytes())] ^= 1
        f.seek(0)
        f.write(raw)
    assert "it is damaged" in refused(partial(evaluation.init_encoder, make_vit()), path)


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
    line = refused(partial(evaluation.init_encoder, make_vit(**here)), path)
    assert message in line and path in line


# ---- the scripts ----

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
    fixed_positions = model.vision.pos_embed.detach().clone()
    assert evaluation.init_model(cfg, model) is None
    for parameter, x in source.state_dict().items():
        if parameter != "pos_embed":
            assert torch.equal(model.vision.state_dict()[parameter], x), parameter
    expected = fixed_positions  # sine and cosine stay
    if model.vision.pos_embed.requires_grad:
        expected = torch.cat(evaluation.resize_positions(source.pos_embed.detach(), 2), 1)
    torch.testing.assert_close(model.vision.pos_embed.detach(), expected)
