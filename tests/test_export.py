"""Encoders that leave as timm names them and come back: an independent reader, resized positions, files that do not fit, the four scripts."""
import importlib, json, struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import align
import common
import data
import eval as E
from common import UserError, ViT


def read(path):
    """safetensors from its specification, with struct and numpy; the code under test uses neither."""
    raw = path.read_bytes()
    size, = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8:8 + size])
    meta, found, end = header.pop("__metadata__"), {}, 0
    assert size % 8 == 0 and all(isinstance(v, str) for v in meta.values())
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end and entry["dtype"] == "F32"      # no gap, no overlap
        found[name], end = np.frombuffer(raw[8 + size + start:8 + size + stop], "<f4").reshape(entry["shape"]), stop
    assert 8 + size + end == len(raw)
    return found, meta


def vit(image_size=16, patch=8, dim=16, depth=2, heads=2, seed=0, **more):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViT(image_size, patch, dim, depth, heads, **more)


def plain(vision):
    return {name: x.detach().clone() for name, x in vision.state_dict().items()}


def saved(path, state):
    torch.save(state, path)
    return str(path)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def trained(tiny, tmp_path):
    model = align.Model(tiny)
    (tmp_path / "run").mkdir()
    common.save(tiny, model, torch.optim.SGD(model.parameters()), 0, data.Tokenizer().dumps(), SimpleNamespace())
    return model, f"{tiny.out}/last.pt"


def test_an_exported_encoder_holds_timms_names_in_float32_and_says_what_it_needs(trained, tmp_path):
    model, checkpoint = trained
    E.main(["export", checkpoint, "--out", str(tmp_path / "new" / "vit.safetensors")])
    tensors, meta = read(tmp_path / "new" / "vit.safetensors")
    block = [f"blocks.0.{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")]
    assert set(tensors) == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", *block, "norm.weight", "norm.bias"}
    assert all(np.array_equal(x, model.vision.state_dict()[name].numpy()) for name, x in tensors.items())
    assert [meta[k] for k in ("method", "image_size", "patch", "heads", "pooling")] == ["ALIGN", "16", "8", "2", "avg"]
    assert json.loads(meta["mean"]) == json.loads(meta["std"]) == [0.5] * 3
    E.main(["export", checkpoint, "--out", str(tmp_path / "vit.pt")])
    state = torch.load(tmp_path / "vit.pt", weights_only=True)
    assert same(state["model"], plain(model.vision)) and state["metadata"] == meta


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_encoder_comes_back_bit_for_bit(trained, tmp_path, suffix):
    model, checkpoint = trained
    E.main(["export", checkpoint, "--out", str(tmp_path / f"vit.{suffix}")])
    fresh = vit(depth=1, seed=1)
    common.init_encoder(fresh, str(tmp_path / f"vit.{suffix}"))
    assert same(plain(fresh), plain(model.vision))
    assert common.encoder_sizes(str(tmp_path / f"vit.{suffix}")) == {"dim": 16, "depth": 1, "heads": 2, "patch": 8}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s},
                                  lambda s: {"module._orig_mod." + k: v for k, v in s.items()}, lambda s: {**s, "head.weight": torch.zeros(9, 16)},
                                  lambda s: {k: v.bfloat16().float() if "norm" in k else v.double() for k, v in s.items()}])
def test_files_of_others_are_read_however_they_wrap_their_weights(tmp_path, wrap):
    source, fresh = vit(), vit(seed=1)
    common.init_encoder(fresh, saved(tmp_path / "a.pth", wrap(plain(source))))
    assert same(plain(fresh), plain(source))


def test_half_precision_safetensors_are_read(tmp_path):
    source, body, header = plain(vit()), b"", {}
    for i, (name, x) in enumerate(source.items()):
        kind, x = (("BF16", x.bfloat16().view(torch.int16)), ("F16", x.half()), ("F32", x))[i % 3]
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [len(body), len(body) + len(x.numpy().tobytes())]}
        body += x.numpy().tobytes()
    text = json.dumps(header).encode()
    (tmp_path / "half.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    fresh = vit(seed=1)
    common.init_encoder(fresh, str(tmp_path / "half.safetensors"))
    for i, (name, x) in enumerate(source.items()):
        assert torch.equal(fresh.state_dict()[name], (x.bfloat16().float(), x.half().float(), x)[i % 3]), name


# -- positions and the class token --

@pytest.mark.parametrize("grid", [2, 4, 5, 9])
def test_positions_are_resized_as_a_picture_and_the_class_tokens_stays(grid):
    ramp = torch.arange(4.).repeat(4, 1)
    table = torch.cat([torch.full((1, 1, 3), 7.), torch.stack([ramp, ramp.T, torch.ones(4, 4)], 2).view(1, 16, 3)], 1)
    lead, patches = common.resized_positions(table, grid)
    assert torch.equal(lead, table[:, :1]) and patches.shape == (1, grid ** 2, 3)
    x, y, one = patches[0].T.view(3, grid, grid)
    torch.testing.assert_close(one, torch.ones(grid, grid))
    torch.testing.assert_close(x, y.T)                       # columns stay columns
    assert (x - x[0]).abs().max() < 1e-5 and (x[0].diff() > 0).all()
    torch.testing.assert_close(x, 3 - x.flip(1))             # centred: neither corner is pinned to an edge
    if grid == 4:
        assert torch.equal(patches, table[:, 1:])            # the same grid: untouched


def test_a_coarser_grid_hears_every_patch():
    table = torch.randn(1, 65, 3, requires_grad=True)
    common.resized_positions(table, 1)[1].sum().backward()
    assert (table.grad[0, 1:] != 0).all() and not table.grad[0, 0].any()                     # antialiased: else the central 16 alone


def test_a_class_token_that_only_one_side_has_is_left_as_it_starts_or_out(tmp_path):
    with_cls, without = vit(), vit(cls=False, seed=2)
    a, b = saved(tmp_path / "a.pt", plain(with_cls)), saved(tmp_path / "b.pt", plain(without))
    fresh = vit(cls=False, seed=1)
    common.init_encoder(fresh, a)
    assert torch.equal(fresh.pos_embed, with_cls.pos_embed[:, 1:]) and fresh.cls_token is None
    fresh, before = vit(seed=1), plain(vit(seed=1))
    common.init_encoder(fresh, b)
    assert torch.equal(fresh.cls_token, before["cls_token"]) and torch.equal(fresh.pos_embed[:, :1], before["pos_embed"][:, :1])
    assert torch.equal(fresh.pos_embed[:, 1:], without.pos_embed) and torch.equal(fresh.norm.weight, without.norm.weight)
    bare = {**plain(with_cls), "pos_embed": with_cls.pos_embed[:, 1:].detach()}              # a token without a position of its own
    common.init_encoder(fresh, saved(tmp_path / "c.pt", bare))
    assert torch.equal(fresh.cls_token, with_cls.cls_token) and not fresh.pos_embed[:, 0].any()


def test_fixed_positions_stay_what_the_method_says(tmp_path):
    source, fresh = vit(image_size=32), vit(fixed=True, seed=1)
    common.init_encoder(fresh, saved(tmp_path / "a.pt", plain(source)))
    assert torch.equal(fresh.pos_embed, vit(fixed=True, seed=3).pos_embed) and torch.equal(fresh.cls_token, source.cls_token)


# -- refused --

def safetensors(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize("name, content, told", [
    ("a.safetensors", b"\xff" * 100, "no safetensors header"), ("a.safetensors", b"", "cannot be read"), ("a.safetensors", safetensors(b"[1, 2]"), "cannot be read"),
    ("a.safetensors", safetensors(b"{not json}"), "cannot be read"), ("a.safetensors", safetensors({"w": {"dtype": "I4"}}), "cannot be read"),
    ("a.safetensors", safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4)), "w lies outside the file"),
    ("a.safetensors", safetensors({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)), "cannot be read"),
    ("a.safetensors", safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "no patch_embed.proj.weight"),
    ("a.pt", b"not a torch file", "cannot be read"), ("a.pt", None, "No such file"), ("a.pt", {"method": "MUG", "model": {}}, "eval.py export makes"),
    ("a.pt", [1, 2], "cannot be read"), ("a.pt", {"model": 3}, "cannot be read"), ("a.pt", SimpleNamespace(x=1), "cannot be read")])
def test_what_is_no_encoder_file_is_told_in_one_line(tmp_path, name, content, told):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=told) as error:
        common.init_encoder(vit(), str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("here, there, parts", [(dict(dim=32), dict(), ["(1, 1, 16)", "(1, 1, 32)"]), (dict(depth=3), dict(), ["blocks.2.", "missing", "(16,)"]),
                                                (dict(patch=4), dict(), ["(16, 3, 8, 8)", "(16, 3, 4, 4)"]),
                                                (dict(mlp_ratio=2), dict(), ["blocks.0.mlp.fc1.weight", "(64, 16)", "(32, 16)"]),
                                                (dict(), {"fc_norm.weight": torch.ones(16)}, ["fc_norm.weight is (16,) there and missing here"])])
def test_a_contradiction_names_both_shapes(tmp_path, here, there, parts):
    path = saved(tmp_path / "a.pt", {**plain(vit()), **there})
    with pytest.raises(UserError) as error:
        common.init_encoder(vit(**here), path)
    assert all(part in str(error.value) for part in [path, *parts]) and "\n" not in str(error.value)


def test_heads_come_from_the_metadata_else_they_are_64_wide_and_flags_must_not_contradict(tmp_path):
    told = saved(tmp_path / "told.pt", {"model": plain(vit()), "metadata": {"heads": "2"}})
    untold = saved(tmp_path / "untold.pt", plain(vit(dim=192, heads=3)))
    asked = lambda *argv: common.parse(align.Config, align.DEMO, "", argv)
    sizes = lambda cfg: (cfg.dim, cfg.depth, cfg.heads, cfg.patch)
    assert sizes(asked("--init", told)) == (16, 2, 2, 8) and sizes(asked("--init", untold)) == (192, 2, 3, 8)
    assert sizes(asked("--init", told, "--heads", "4", "--patch", "4")) == (16, 2, 4, 4)
    assert sizes(asked("--init", told, "--size", "ti")) == (192, 12, 3, 8) and asked("--init", told).image_size == align.DEMO["image_size"]
    with pytest.raises(UserError, match="2 heads there and 4 here"):
        common.init_encoder(vit(heads=4), told)
    common.init_encoder(vit(dim=192, heads=6), untold)       # nothing says otherwise


# -- the scripts --

SMALL = dict(context=24, text_dim=16, text_depth=1, text_heads=2, vocab_size=300, batch=8, steps=1, lr=0, wd=0, workers=0, eval_every=-1, image_size=16)
MORE = {"align": {}, "mug": dict(pixel_dim=16, pixel_depth=1, pixel_heads=2, cross_depth=1), "lcl": dict(context=64),
        "m3i": dict(unit=1, block=4, projector_depth=1, decoder_depth=1)}


@pytest.mark.parametrize("script", MORE)
def test_every_script_starts_from_the_file(script, tiny_world, tmp_path):
    source = vit(image_size=24)                              # a finer grid than the script's: positions are resized
    argv = [str(x) for k, v in {**SMALL, **MORE[script]}.items() for x in ("--" + k.replace("_", "-"), v)]
    path, module = saved(tmp_path / "a.pt", {"model": plain(source), "metadata": {"heads": "2"}}), importlib.import_module(script)
    argv += ["--init", path, "--data", f"{tiny_world}/pairs", "--out", str(tmp_path / "run")]
    for _ in range(2):                                       # the second is a resumed run
        module.main(common.parse(module.Config, module.DEMO, "", argv))
    model, *_ = E.load(f"{tmp_path}/run/last.pt")
    for name in source.state_dict():                         # one step at rate 0 changed nothing
        if name != "pos_embed":
            assert torch.equal(model.vision.state_dict()[name], source.state_dict()[name]), name
    if script == "mug":                                      # whose positions are fixed
        assert torch.equal(model.vision.pos_embed[0, 1:], common.sincos(2, 16)) and not model.vision.pos_embed[0, 0].any()
    else:
        torch.testing.assert_close(model.vision.pos_embed.detach(), torch.cat(common.resized_positions(source.pos_embed.detach(), 2), 1))
    if script == "m3i":
        assert same(plain(model.average[0]), plain(model.vision))
    with pytest.raises(UserError, match="--init"):           # part of the recipe
        module.main(common.parse(module.Config, module.DEMO, "", [*argv[:argv.index("--init")], *argv[argv.index("--init") + 2:], "--dim", "16", "--depth", "2",
                                                                   "--heads", "2", "--patch", "8"]))
