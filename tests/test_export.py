"""Encoders that leave under timm's names and come back: another reader, resized positions, files
that do not fit, the five scripts."""
import importlib
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import align
import common
import data
import eval as evaluation
from common import UserError, ViT
from conftest import SCRIPTS, tiny_config

CPU = torch.device("cpu")
BLOCK = [f"blocks.{{}}.{part}.{kind}" for kind in ("weight", "bias") for part in
         ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
OTHERS = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
          "norm.weight", "norm.bias"]

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


@pytest.fixture
def trained(toy_data, tmp_path):
    """An ALIGN and the path of its checkpoint."""
    cfg = tiny_config("align", toy_data, tmp_path / "run")
    (tmp_path / "run").mkdir()
    torch.manual_seed(0)
    model = align.ALIGN(cfg)
    optimizer = torch.optim.SGD(model.parameters())
    common.save(cfg, model, optimizer, 0, data.Tokenizer().dumps())
    return model, f"{cfg.out}/last.pt"


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


def test_an_exported_encoder_holds_timms_names_in_float32_and_says_what_it_needs(trained, tmp_path):
    model, checkpoint = trained
    path = tmp_path / "new" / "vit.safetensors"
    evaluation.main(["export", checkpoint, "--out", str(path)])
    tensors, meta = read_safetensors(path)
    assert set(tensors) == {name.format(i) for name in BLOCK for i in range(2)} | set(OTHERS)
    for name, x in tensors.items():
        assert np.array_equal(x, model.vision.state_dict()[name].numpy()), name
    assert meta["heads"] == "2"
    assert json.loads(meta["mean"]) == json.loads(meta["std"]) == [0.5] * 3


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_encoder_comes_back_to_the_bit(trained, tmp_path, suffix):
    model, checkpoint = trained
    path = str(tmp_path / f"vit.{suffix}")
    evaluation.main(["export", checkpoint, "--out", path])
    fresh = make_vit(seed=1)
    evaluation.init_encoder(fresh, path)
    assert_same(weights(fresh), weights(model.vision))


# ---- files of others ----

@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s, "epoch": 3},
    lambda s: {"module._orig_mod." + name: x for name, x in s.items()},
    lambda s: {**s, "head.weight": torch.zeros(9, 16), "head.bias": torch.zeros(9)},
    lambda s: {name: x.double() for name, x in s.items()},
], ids=["model", "prefixes", "classifier", "double"])
def test_files_are_read_however_they_wrap_their_weights(tmp_path, wrap):
    source = make_vit()
    fresh = make_vit(seed=1)
    evaluation.init_encoder(fresh, saved(tmp_path / "a.pth", wrap(weights(source))))
    assert_same(weights(fresh), weights(source))


def test_half_precision_safetensors_are_read(tmp_path):
    source = weights(make_vit())
    formats = [("BF16", lambda x: x.bfloat16()), ("F16", lambda x: x.half()), ("F32", lambda x: x)]
    header = {}
    body = b""
    expected = {}
    for i, (name, x) in enumerate(source.items()):
        kind, convert = formats[i % 3]
        x = convert(x)
        expected[name] = x.float()
        raw = x.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": kind, "shape": list(x.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    (tmp_path / "half.safetensors").write_bytes(safetensors(header, body))
    fresh = make_vit(seed=1)
    evaluation.init_encoder(fresh, str(tmp_path / "half.safetensors"))
    assert_same(weights(fresh), expected)


# ---- positions and the class token ----

@pytest.mark.parametrize("grid", [2, 4, 9])
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
    if grid == 4:
        assert torch.equal(patches, table[:, 1:])


def test_a_class_token_that_only_the_file_has_is_left_out(tmp_path):
    source = make_vit()
    fresh = make_vit(cls=False, seed=1)
    evaluation.init_encoder(fresh, saved(tmp_path / "a.pt", weights(source)))
    assert torch.equal(fresh.pos_embed, source.pos_embed[:, 1:]) and fresh.cls_token is None


def test_a_class_token_that_the_file_lacks_stays_as_initialized(tmp_path):
    source = make_vit(cls=False)
    fresh = make_vit(seed=1)
    before = weights(fresh)
    evaluation.init_encoder(fresh, saved(tmp_path / "a.pt", weights(source)))
    assert torch.equal(fresh.cls_token, before["cls_token"])
    assert torch.equal(fresh.pos_embed[:, :1], before["pos_embed"][:, :1])
    assert torch.equal(fresh.pos_embed[:, 1:], source.pos_embed)


def test_fixed_positions_stay(tmp_path):
    fresh = make_vit(sincos_pos=True, seed=1)
    before = fresh.pos_embed.clone()
    path = saved(tmp_path / "a.pt", weights(make_vit(image_size=32)))
    evaluation.init_encoder(fresh, path)
    assert torch.equal(fresh.pos_embed, before)


# ---- number of heads ----

def test_heads_come_from_the_file_or_a_well_known_size_and_are_never_guessed(tmp_path):
    def heads(dim, depth, meta):
        tensors = {"patch_embed.proj.weight": torch.zeros(dim, 3, 8, 8)}
        tensors.update({f"blocks.{i}.attn.qkv.weight": torch.zeros(1) for i in range(depth)})
        return evaluation.encoder_sizes(tensors, meta)["heads"]

    assert heads(16, 2, {"heads": "4"}) == 4
    assert heads(768, 12, {}) == 12 and heads(1280, 32, {}) == 16  # ViT-B; MAE's ViT-H
    assert heads(768, 11, {}) is heads(1408, 40, {}) is None


def test_another_number_of_heads_than_the_files_is_refused(tmp_path):
    path = saved(tmp_path / "a.pt", {"model": weights(make_vit()), "metadata": {"heads": "2"}})
    with pytest.raises(UserError, match="has 2 heads, not 4"):
        evaluation.init_encoder(make_vit(heads=4), path)


# ---- refused ----

def safetensors(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def one_tensor(shape, n_bytes):
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}
    return safetensors(header, bytes(n_bytes))


@pytest.mark.parametrize("name,content,message", [
    ("a.safetensors", b"\xff" * 100, "no safetensors header"),
    ("a.safetensors", safetensors(b"[1, 2]"), "cannot be read"),
    ("a.safetensors", one_tensor([2], 4), "w lies outside the file"),
    ("a.safetensors", one_tensor([2], 8), "no patch_embed.proj.weight"),
    ("a.pt", b"not a torch file", "cannot be read"),
    ("a.pt", None, "No such file"),
    ("a.pt", {"model": 3}, "cannot be read"),
    ("a.pt", SimpleNamespace(x=1), "SimpleNamespace, not tensors alone"),
])
def test_what_is_no_encoder_file_gets_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        evaluation.init_encoder(make_vit(), str(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_damaged_checkpoint_is_not_mistaken_for_a_sound_one(trained):
    model, path = trained
    with open(path, "r+b") as f:
        raw = bytearray(f.read())
        raw[raw.index(model.vision.pos_embed.detach().numpy().tobytes())] ^= 1
        f.seek(0)
        f.write(raw)
    with pytest.raises(UserError, match="is damaged"):
        evaluation.load_model(path, CPU)


@pytest.mark.parametrize("here,there,parts", [
    ({"dim": 32}, {}, ["16", "32"]),
    ({"depth": 3}, {}, ["blocks.2.", "missing"]),
    ({}, {"norm_pre.weight": torch.ones(16)}, ["norm_pre.weight is (16,) there and missing here"]),
], ids=["dim", "depth", "extra"])
def test_a_contradiction_names_both_shapes(tmp_path, here, there, parts):
    path = saved(tmp_path / "a.pt", {**weights(make_vit()), **there})
    with pytest.raises(UserError) as caught:
        evaluation.init_encoder(make_vit(**here), path)
    message = str(caught.value)
    assert "\n" not in message
    for part in [path, *parts]:
        assert part in message


def test_checkpoints_of_other_programs_and_versions_get_one_line(trained, tmp_path):
    _, path = trained
    state = torch.load(path, weights_only=True)
    foreign = saved(tmp_path / "b.pt", {**state, "method": "os"})
    with pytest.raises(UserError, match="a checkpoint of os: known are ALIGN, MUG"):
        evaluation.load_model(foreign, CPU)
    older = saved(tmp_path / "c.pt", {**state, "config": {**state["config"], "no_such": 1}})
    with pytest.raises(UserError, match="written by another version of align.py"):
        evaluation.load_model(older, CPU)
    with pytest.raises(UserError, match="typo.pt does not exist: give last.pt"):
        evaluation.load_model(str(tmp_path / "typo.pt"), CPU)


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
    assert evaluation.init_model(cfg, model) is None
    for parameter, x in source.state_dict().items():
        if parameter != "pos_embed":
            assert torch.equal(model.vision.state_dict()[parameter], x), parameter
    if model.vision.pos_embed.requires_grad:
        expected = torch.cat(evaluation.resize_positions(source.pos_embed.detach(), 2), 1)
        torch.testing.assert_close(model.vision.pos_embed.detach(), expected)
