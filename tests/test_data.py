"""Shards, order, pixels, tokens and the built-in world against hand-worked values, slow references and an independent reader of captions."""
import collections
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import re
import signal
import struct
import tarfile
import time
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import UserError
from conftest import PAINT, SHAPES, painted
from data import Index, Plan, Sample, Skip, Tokenizer

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


FOLDER, LINK, DEVICE = ((kind,) for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE))


def write_tar(path, members, **how):                         # [(name, bytes or one of the three above)]
    with tarfile.open(path, "w", **{"format": tarfile.USTAR_FORMAT, **how}) as tar:
        for name, value in members:
            info = tarfile.TarInfo(name)
            if isinstance(value, tuple):
                info.type, info.linkname, value = *value, "elsewhere", b""
            info.size = len(value)
            tar.addfile(info, io.BytesIO(value))
    return str(path)


def encoded(image, kind="PNG", **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(width=8, height=8, seed=0):
    return Image.fromarray(noise(width, height, seed))


def smooth(width, height):                                   # slow waves: what survives any careful resampling
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    return Image.fromarray(np.uint8(127 + 120 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)))


def reason(read, *args, **how):
    with pytest.raises(Skip) as skip:
        read(*args, **how)
    assert str(skip.value) in data.REASONS
    return str(skip.value)


@contextlib.contextmanager
def at_most(seconds):                                        # an endless loop becomes a failure. Not an OSError: scan() takes those for damage
    def ring(*_):
        raise AssertionError(f"not done after {seconds} s")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- which files ----

@pytest.mark.parametrize("pattern, want", [                  # formats 11.11; bash agrees with every line
    ("{8..11}", "8 9 10 11"), ("{08..11}", "08 09 10 11"), ("{a,b}-{0..1}", "a-0 a-1 b-0 b-1"), ("{0..10}", "0 1 2 3 4 5 6 7 8 9 10"),
    ("{000..2}", "000 001 002"), ("x{7..7}y", "x7y"), ("{,a}b", "b ab"), ("{x}", "{x}"), ("plain", "plain")])
def test_braces_expand_as_in_a_shell(pattern, want):
    assert data.braces(pattern) == want.split()


@pytest.fixture
def folder(tmp_path):
    for name in ("a-0", "a-1", "b-0", "b-1"):
        write_tar(tmp_path / f"{name}.tar", [])
    return tmp_path


def names(paths):
    return [os.path.relpath(p, os.path.dirname(paths[0])) for p in paths]


def test_expand_joins_sources_braces_and_globs_and_keeps_their_order(folder):
    found = data.expand([f"{folder}/b-{{0,1}}.tar::{folder}/a-*.tar", f"{folder}/b-0.tar"])
    assert names(found) == ["b-0.tar", "b-1.tar", "a-0.tar", "a-1.tar"]                      # the last is named twice and read once
    assert data.expand(f"{folder}/a-0.tar") == [f"{folder}/a-0.tar"]                         # a string is a list of one


@pytest.mark.parametrize("layout", ["{0}-{1}.tar", "{0}/{1}.tar"])
@pytest.mark.parametrize("held", ["test", "val"])
def test_a_folder_falls_into_its_training_and_its_held_out_part(tmp_path, layout, held):
    for part in ("train", held):
        for k in (0, 1):
            path = tmp_path / layout.format(part, k)
            path.parent.mkdir(exist_ok=True)
            write_tar(path, [])
    for split, part in (("train", "train"), ("test", held)):
        assert data.expand(str(tmp_path), split) == [str(tmp_path / layout.format(part, k)) for k in (0, 1)]


def test_a_folder_without_parts_is_wholly_training_and_wholly_held_out(folder):
    assert names(data.expand(str(folder))) == names(data.expand([str(folder)], "test")) == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]


def test_training_shards_are_never_given_out_as_held_out_ones(tmp_path):
    write_tar(tmp_path / "train-0.tar", [])
    with pytest.raises(UserError, match="no such test shards"):
        data.expand(str(tmp_path), "test")


@pytest.mark.parametrize("pattern, shown", [("{00..02}.tar", "/01.tar"), ("nothing*.tar", "nothing*.tar"), ("no/such/folder", "no/such/folder"),
                                            ("00.tar::99.tar", "/99.tar"), ("{5..3}.tar", "{5..3}.tar")])
def test_a_pattern_without_a_match_is_an_error_that_shows_what_it_became(tmp_path, pattern, shown):
    for name in ("00", "02"):
        write_tar(tmp_path / f"{name}.tar", [])
    with pytest.raises(UserError) as error:
        data.expand("::".join(f"{tmp_path}/{p}" for p in pattern.split("::")))
    assert shown in str(error.value)


def test_a_file_whose_name_is_a_glob_means_itself(tmp_path):
    path = write_tar(tmp_path / "x[1]*.tar", [])
    write_tar(tmp_path / "x1z.tar", [])                      # what the glob would have found
    assert data.expand(path) == [path]
    (tmp_path / "set[1]").mkdir()
    inside = write_tar(tmp_path / "set[1]" / "0.tar", [])
    assert data.expand(os.path.dirname(inside)) == [inside]


def test_class_names_stand_beside_the_shards_or_one_folder_up(tmp_path):
    (tmp_path / "test").mkdir()
    shard = write_tar(tmp_path / "test" / "0.tar", [])
    assert data.beside([shard], "classes.txt", "classnames.txt") is None
    (tmp_path / "classnames.txt").write_text("up\n")
    assert data.beside([shard], "classes.txt", "classnames.txt") == ["up"]
    (tmp_path / "test" / "classes.txt").write_text("great white shark\n\n  été \n", encoding="utf-8")
    assert data.beside([shard], "classes.txt", "classnames.txt") == ["great white shark", "été"]


# ---- where every sample is ----

@pytest.mark.parametrize("name, want", [                     # formats 11.10 and 1.2
    ("a/b.seg.png", ("a/b", "seg.png")), ("x.JPG", ("x", "jpg")), ("noext", (None, None)), ("__meta__", (None, None)),
    ("2024-01-01T10.30.jpg", ("2024-01-01T10", "30.jpg")), ("v1.0/x.jpg", ("v1.0/x", "jpg")), ("a/.hidden.jpg", (None, None)),
    ("v1.0/noext", (None, None)), ("./0.Seg.PNG", ("./0", "seg.png"))])
def test_a_name_is_cut_at_the_first_dot_after_the_last_slash(name, want):
    assert data.split_name(name) == want


def test_members_that_are_no_files_of_a_sample_are_passed_over(tmp_path):
    index = Index([write_tar(tmp_path / "0.tar", [
        ("__meta__", b"{}"), ("folder.d", FOLDER), ("0.jpg", b"pixels"), ("0.txt", LINK), ("README", b"!"), ("0.json", b"{}"),
        ("1.txt", DEVICE), ("1.jpg", b"more")])])
    assert [(index[i].key, index[i].members) for i in range(len(index))] == [("0", {"jpg": b"pixels", "json": b"{}"}), ("1", {"jpg": b"more"})]
    assert index.first_key == "0" and index.notes == {}


def test_suffixes_are_lower_case_and_keys_keep_case_and_order(tmp_path):
    index = Index([write_tar(tmp_path / "0.tar", [("Zebra.JPG", b"1"), ("Zebra.Seg.PNG", b"2"), ("ant.Txt", b"3"), ("Ant.txt", b"4")])])
    assert [(index[i].key, index[i].members) for i in range(3)] == [("Zebra", {"jpg": b"1", "seg.png": b"2"}), ("ant", {"txt": b"3"}), ("Ant", {"txt": b"4"})]


def test_a_repeated_suffix_begins_a_new_sample_and_is_counted(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.jpg", b"a"), ("0.txt", b"b"), ("0.JPG", b"c"), ("0.txt", b"d"), ("1.jpg", b"e")])
    index = Index([path])
    assert [index[i].members for i in range(len(index))] == [{"jpg": b"a", "txt": b"b"}, {"jpg": b"c", "txt": b"d"}, {"jpg": b"e"}]
    assert index.notes == {path: {"duplicate suffix": 1}}


TOY = [(f"{k}.{suffix}", bytes([65 + k]) * size) for k in range(3) for suffix, size in (("jpg", 3000), ("json", 2), ("txt", 2))]   # formats 11.9


def scanned(path):
    """[(last byte, key, members)] of what a scan finds, and its notes."""
    rows, _, notes = data.scan(path)
    with open(path, "rb") as f:
        raw = f.read()
    return [(at + span, *data.unpack(raw[at:at + span])) for at, span in rows], notes


def test_a_whole_archive_has_no_notes(tmp_path):
    path = write_tar(tmp_path / "0.tar", TOY)
    found, notes = scanned(path)
    assert notes == {} and [f[1:] for f in found] == [(str(k), {"jpg": bytes([65 + k]) * 3000, "json": bytes([65 + k]) * 2, "txt": bytes([65 + k]) * 2})
                                                      for k in range(3)]
    assert [f[0] for f in found] == [5632, 11264, 16896]     # 512 + 3072 and twice 512 + 512 each


@pytest.mark.parametrize("where, before", [(4000, 0), (6000, 1), (9000, 1), ("second header", 0)])
def test_each_golden_damage_is_flagged_and_what_lies_before_it_is_delivered(tmp_path, where, before):
    path, raw = str(tmp_path / "0.tar"), bytearray(open(write_tar(tmp_path / "0.tar", TOY), "rb").read())
    if where == "second header":
        raw[3584 + 150] ^= 0x55                              # in its checksum
    with open(path, "wb") as f:
        f.write(raw if where == "second header" else raw[:where])
    index = Index([path])
    assert index.notes == {path: {"cut shard": 1}}
    assert len(index) == max(before, 1) and index[0].members["jpg"] == b"A" * 3000
    assert (index[0].members.get("txt") == b"AA") == (before == 1)


def test_every_cut_is_flagged_or_harmless(tmp_path):
    raw = open(write_tar(tmp_path / "0.tar", TOY), "rb").read()
    whole = scanned(str(tmp_path / "0.tar"))[0]
    silent = 0
    for cut in range(0, len(raw), 97):
        (tmp_path / "cut.tar").write_bytes(raw[:cut])
        rows, _, notes = data.scan(str(tmp_path / "cut.tar"))
        before = [w for w in whole if w[0] <= cut]           # what lies wholly before the cut is delivered
        assert [(at + span, *data.unpack(raw[:cut][at:at + span])) for at, span in rows[:len(before)]] == before
        if not notes:
            silent += 1
            assert len(rows) == len(before) == 3 and cut >= 16896 + 512
    assert 0 < silent < (len(raw) - 16896) / 97              # only cuts in the zeros behind the last sample


def test_a_damaged_last_header_does_not_pass_for_the_end(tmp_path):
    path = write_tar(tmp_path / "0.tar", TOY)
    with open(path, "r+b") as f:
        f.seek(15872)                                        # 2.txt
        f.write(bytes(20))
    found, notes = scanned(path)
    assert notes == {"cut shard": 1} and "txt" not in found[-1][2]


def test_a_web_page_is_named_and_the_other_shards_are_read(tmp_path):
    page = tmp_path / "0.tar"
    page.write_text("<html>404 Not Found</html>\n" * 100)
    good = write_tar(tmp_path / "1.tar", TOY)
    index = Index([str(page), good])
    assert index.notes == {str(page): {"not a tar": 1}} and len(index) == 3 and index[2].members["txt"] == b"CC"
    assert index.starts.tolist() == [0, 0, 3]


@pytest.mark.parametrize("name, target", [("0.tar.gz", "0.tar"), ("0.tar", "0.tar.unpacked")])
def test_a_compressed_shard_is_refused_with_the_command_that_unpacks_it(tmp_path, name, target):
    path = tmp_path / name
    path.write_bytes(gzip.compress(open(write_tar(tmp_path / "plain", TOY), "rb").read()))
    with pytest.raises(UserError) as error:
        Index([str(path)])
    command = re.search(r"gzip -dc (\S+) > (\S+)", str(error.value))
    assert command.groups() == (str(path), str(tmp_path / target))


def test_stats_beside_a_shard_are_compared_and_a_difference_shows_both_numbers(tmp_path):
    paths = [write_tar(tmp_path / f"{k}.tar", TOY) for k in range(3)]
    for k, text in enumerate(('{"successes": 3}', '{"successes": 5}', '{"count":')):
        (tmp_path / f"{k}_stats.json").write_text(text)
    assert Index(paths).notes == {paths[1]: {"_stats.json declares 5 samples, found 3": 1}, paths[2]: {"unreadable _stats.json": 1}}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["k" * 130, "päivä/猫🐱", "日" * 60, "d" * 90 + "/" + "k" * 90])
def test_long_and_foreign_names_are_read_in_both_dialects(tmp_path, format, key):
    index = Index([write_tar(tmp_path / "0.tar", [("0.txt", b"zero"), (f"{key}.jpg", b"one" * 300), (f"{key}.seg.png", b"two"), ("2.txt", b"three")],
                             format=format)])
    assert [(index[i].key, index[i].members) for i in range(len(index))] == [
        ("0", {"txt": b"zero"}), (key, {"jpg": b"one" * 300, "seg.png": b"two"}), ("2", {"txt": b"three"})]


def test_a_sample_may_begin_with_a_short_name_and_go_on_with_a_long_one(tmp_path):
    key = "k" * 96                                           # with .txt it fits the 100 bytes of a header, with .seg.png it does not
    index = Index([write_tar(tmp_path / "0.tar", [(f"{key}.txt", b"one"), (f"{key}.seg.png", b"two")], format=tarfile.GNU_FORMAT)])
    assert len(index) == 1 and index[0].key == key and index[0].members == {"txt": b"one", "seg.png": b"two"}


def test_the_prefix_field_of_a_header_belongs_to_the_name(tmp_path):
    key = "p" * 90 + "/" + "k" * 60                          # USTAR splits it between two fields
    index = Index([write_tar(tmp_path / "0.tar", [(f"{key}.txt", b"one"), (f"{key}.json", b"{}")])])
    assert len(index) == 1 and index[0].key == key and index.first_key == key


def test_a_name_that_is_no_unicode_is_indexed_and_can_be_printed(tmp_path, capsys):
    path = write_tar(tmp_path / "0.tar", [("caf\udce9.txt", b"one"), ("caf\udce9.jpg", b"")])       # a Latin-1 file system's name
    assert len(Index([path])) == 1
    data.main(["index", path])
    assert "1 samples" in capsys.readouterr().out


def test_a_header_with_a_negative_size_is_damage_and_not_an_endless_loop(tmp_path):
    def header(name, size):
        raw = bytearray(tarfile.TarInfo(name).tobuf())
        raw[124:136] = struct.pack(">Iq", 0xffffffff, size) if size else raw[124:136]
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw)
        return bytes(raw)
    path = tmp_path / "0.tar"
    path.write_bytes(header("a.jpg", 0) + header("b.jpg", 0) + header("c.jpg", -1024) + bytes(4096))        # the third leads back to the second
    with at_most(2):
        rows, _, notes = data.scan(str(path))
    assert notes == {"cut shard": 1} and len(rows) <= 3


def test_a_header_says_what_tarfile_says_of_it_damaged_or_not():
    def theirs(block):
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        return info.name, info.size, info.type in (tarfile.REGTYPE, tarfile.AREGTYPE)

    def outcome(read, block):
        try:
            return read(block)
        except (tarfile.TarError, ValueError):               # int() has its own word for what is no octal number
            return "damaged"
    rng, seen = np.random.default_rng(0), set()
    for turn in range(4000):
        info = tarfile.TarInfo(["a.jpg", "d/é.txt", "n" * 90 + "/" + "m" * 90 + ".json", "x/", ""][turn % 5])
        info.size, info.type = int(rng.integers(2 ** rng.integers(1, 42 if turn % 2 else 33))), [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, b"L", b"x"][turn % 7 % 5]
        block = bytearray(info.tobuf([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT][turn % 2], "utf-8", "surrogateescape")[-512:])
        for at in rng.choice([*range(100), *range(124, 136), *range(148, 157), *range(345, 512)], turn % 3):     # what is not used may be anything
            block[at] = rng.choice([0, 32, 45, 48, 55, 56, 95, 128, 255, rng.integers(256)])
        if turn % 4:                                         # with a checksum that fits the damage
            block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
        block = bytes(block)[:rng.integers(513) if turn % 50 == 0 else 512]
        assert outcome(data.header, block) == outcome(theirs, block), block
        seen.add(str(outcome(theirs, block))[-6:])
    assert {"maged", "True)", "alse)"} <= {s[-5:] for s in seen}


def test_an_empty_shard_adds_nothing_and_shifts_nothing(tmp_path):
    paths = [write_tar(tmp_path / f"{k}.tar", members) for k, members in enumerate(([], TOY, [], TOY[:3]))]
    index = Index(paths)
    assert index.starts.tolist() == [0, 0, 3, 3, 4] and index.notes == {} and index.first_key == "0"
    assert [index[i].members["txt"] for i in range(4)] == [b"AA", b"BB", b"CC", b"AA"]


def test_a_shard_that_is_gone_or_a_folder_is_told_by_name(tmp_path):
    good, folder = write_tar(tmp_path / "0.tar", TOY), tmp_path / "1.tar"
    for why in ("No such file", "Is a directory"):
        with pytest.raises(UserError, match=f"1.tar cannot be read .{why}"):
            Index([good, str(folder)])
        folder.mkdir(exist_ok=True)
    assert Index([good]).summary() == f"1 shards, {len(Index([good])):,} samples, {os.path.getsize(good) / 1e9:.2f} GB, first key 0"


def test_the_captions_of_a_vocabulary_cost_one_read_of_a_sample(tmp_path, monkeypatch):
    index, reads, pread = Index([write_tar(tmp_path / "0.tar", [(f"{k}.txt", b"%d" % k) for k in range(3)])]), [], os.pread
    monkeypatch.setattr(data.os, "pread", lambda *args: reads.append(args) or pread(*args))
    assert data.first_captions(index) == ["0", "1", "2"] and len(reads) == 3


@pytest.mark.parametrize("members", [[], [("README", b"no dot")]])
def test_no_sample_at_all_is_an_error(tmp_path, members):
    with pytest.raises(UserError, match="no sample"):
        Index([write_tar(tmp_path / "0.tar", members)])


def test_a_second_index_reads_the_cache_and_any_change_of_a_file_its_headers(tmp_path, monkeypatch):
    scans, scan = [], data.scan
    monkeypatch.setattr(data, "scan", lambda path: scans.append(path) or scan(path))
    path, other = write_tar(tmp_path / "0.tar", TOY), write_tar(tmp_path / "1.tar", TOY[:3])
    os.utime(path, ns=(10 ** 18, 10 ** 18))
    first = Index([path, other])
    assert len(scans) == 2
    second = Index([path, other])
    assert len(scans) == 2
    assert second.rows.tolist() == first.rows.tolist() and second.first_key == first.first_key and second.starts.tolist() == [0, 3, 4]
    os.utime(path, ns=(10 ** 18, 10 ** 18 + 1))
    Index([path, other])
    assert len(scans) == 4
    write_tar(path, TOY[:6], format=tarfile.GNU_FORMAT)      # another content of the same size and time is the one change that is not seen
    with open(path, "ab") as f:
        f.write(bytes(512))
    os.utime(path, ns=(10 ** 18, 10 ** 18 + 1))
    assert len(Index([path, other])) == 3 and len(scans) == 6
    Index([other, path])                                     # another order is another index
    assert len(scans) == 8


def test_an_index_travels_to_another_process_as_its_paths(tmp_path):
    index = Index([write_tar(tmp_path / "0.tar", TOY)])
    assert index[1].key == "1"                               # holds an open file by now, which cannot travel
    packed = pickle.dumps(index)
    twin = pickle.loads(packed)
    assert len(packed) < 500 and twin.fds == {} and twin[2].members == index[2].members


def test_few_files_stay_open_however_many_shards_are_read(tmp_path):
    index = Index([write_tar(tmp_path / f"{k}.tar", [(f"{k}.txt", b"%d" % k)]) for k in range(150)])
    assert [int(index[i].members["txt"]) for i in [*range(150), *range(150)]] == 2 * [*range(150)]
    assert len(index.fds) <= 128


# ---- what is in a sample ----

def test_missing_parts_have_their_own_reasons():
    empty = Sample("k", {})
    assert [reason(read) for read in (empty.image, empty.captions, empty.label)] == ["no image", "no caption", "no class"]
    assert reason(Sample("k", {"cls": b"cat"}).label) == "no class" and Sample("k", {"cls": b" 7\n"}).label() == 7


@pytest.mark.parametrize("raw, want", [(b"  a\tred \n bicycle ", "a red bicycle"), ("été \u3000 猫".encode(), "été 猫"), (b"x" * 10 ** 6, "x" * 10_000)])
def test_white_space_collapses_and_a_megabyte_is_cut(raw, want):
    assert Sample("k", {"txt": raw}).captions() == [want]


@pytest.mark.parametrize("fields, want", [({"caption": "one"}, ["one"]), ({"caption": ["one", "", 3, None, "two"]}, ["one", "two"])])
def test_a_caption_in_the_json_may_be_a_string_or_a_list(fields, want):
    assert Sample("k", {"json": json.dumps(fields).encode()}).captions() == want
    assert Sample("k", {"json": json.dumps(fields).encode(), "txt": b"the text goes first"}).captions() == ["the text goes first"]


@pytest.mark.parametrize("members, want", [
    ({"txt": b""}, "empty caption"), ({"txt": b" \n\t"}, "empty caption"), ({"json": b'{"caption": ["", " "]}'}, "empty caption"),
    ({"json": b"{}"}, "no caption"), ({"json": b'{"caption": NaN}'}, "no caption"), ({"json": b'["caption"]'}, "no caption"),
    ({"json": b'{"caption": {"en": "x"}}'}, "no caption"), ({"json": b"{"}, "unreadable json"), ({"json": b"\xff\xfe\xff"}, "unreadable json"),
    ({"json": b"[" * 10_000 + b"]" * 10_000}, "unreadable json"), ({"json": b'{"caption":' * 10_000 + b"1" + b"}" * 10_000}, "unreadable json")])
def test_a_caption_that_is_none_has_its_reason(members, want):
    assert reason(Sample("k", members).captions) == want


def test_a_number_that_is_none_elsewhere_in_the_json_does_no_harm():
    assert Sample("k", {"json": b'{"caption": "fine", "similarity": NaN, "width": Infinity}'}).captions() == ["fine"]


def test_every_caption_of_a_list_gets_its_turn():
    sample = Sample("k", {"json": b'{"caption": ["a", "b", "c"]}'})
    drawn = collections.Counter(sample.caption(np.random.default_rng(i)) for i in range(300))
    assert drawn.keys() == {"a", "b", "c"} and min(drawn.values()) > 70                      # 100 each, standard deviation 8


def test_in_evaluation_tars_each_line_is_a_caption():
    assert Sample("k", {"txt": b"one dog\n\n two  dogs\r\n"}).captions(lines=True) == ["one dog", "two dogs"]
    assert Sample("k", {"txt": b"one dog\n\n two  dogs\r\n"}).captions() == ["one dog two dogs"]


def test_png_palette_and_lossless_webp_decode_to_the_very_pixels():
    pixels = noise(9, 7)
    assert np.array_equal(np.asarray(Sample("k", {"png": encoded(Image.fromarray(pixels))}).image()), pixels)
    assert np.array_equal(np.asarray(Sample("k", {"webp": encoded(Image.fromarray(pixels), "WEBP", lossless=True)}).image()), pixels)
    few = Image.fromarray(pixels).quantize(16)
    got = Sample("k", {"png": encoded(few)}).image()
    assert few.mode == "P" and got.mode == "RGB" and np.array_equal(np.asarray(got), np.asarray(few.convert("RGB")))
    grey = Image.fromarray(pixels[..., 0])
    assert np.array_equal(np.asarray(Sample("k", {"png": encoded(grey)}).image()), np.repeat(pixels[..., :1], 3, 2))


def test_sixteen_bits_keep_their_high_byte():
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    got = np.asarray(Sample("k", {"png": encoded(Image.fromarray(deep))}).image())
    assert np.array_equal(got, np.repeat((deep // 256)[..., None], 3, 2))                    # a plain convert("RGB") gives 255 for all but one


def test_a_cmyk_jpeg_has_the_colours_of_its_inks():
    page = Image.new("CMYK", (32, 16), (0, 255, 255, 0))     # magenta and yellow: red
    page.paste((255, 255, 0, 0), (16, 0, 32, 16))            # cyan and magenta: blue
    raw = encoded(page, "JPEG", quality=95)
    assert Image.open(io.BytesIO(raw)).mode == "CMYK"
    got = np.asarray(Sample("k", {"jpg": raw}).image()).astype(int)
    assert np.abs(got[8, 4] - (255, 0, 0)).max() < 12 and np.abs(got[8, 28] - (0, 0, 255)).max() < 12


TURNS = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1),
         7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}                            # the eight orientations, as the EXIF standard draws them


@pytest.mark.parametrize("orientation", TURNS)
def test_every_exif_orientation_comes_out_upright(orientation):
    exif, pixels = Image.Exif(), noise(6, 4)
    exif[0x0112] = orientation
    got = np.asarray(Sample("k", {"png": encoded(Image.fromarray(pixels), exif=exif)}).image())
    assert np.array_equal(got, TURNS[orientation](pixels))


def test_a_camera_held_upright_by_hand():
    stored, exif = Image.new("RGB", (400, 200), (255, 0, 0)), Image.Exif()
    stored.paste((0, 0, 255), (200, 0, 400, 200))            # stored: red left, blue right
    exif[0x0112] = 6                                         # to be turned clockwise: red above, blue below
    got = Sample("k", {"jpg": encoded(stored, "JPEG", exif=exif)}).image(near=64)            # also when decoded small
    top, bottom = (np.asarray(got)[y, got.width // 2].astype(int) for y in (got.height // 4, 3 * got.height // 4))
    assert got.height == 2 * got.width and np.abs(top - (255, 0, 0)).max() < 12 and np.abs(bottom - (0, 0, 255)).max() < 12


def png_of_size(width, height):                              # a header alone; decoding it would fail for want of data
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("width, height", [(10_000, 10_000), (60_000, 60_000), (25_000_001, 1)])    # the second makes Pillow raise by itself
def test_a_bomb_is_refused_by_its_header_without_decoding(width, height):
    assert reason(Sample("k", {"png": png_of_size(width, height)}).image) == "too many pixels"


def test_just_below_the_limit_the_header_is_not_what_refuses():
    assert reason(Sample("k", {"png": png_of_size(5000, 5000)}).image) == "unreadable image"


@pytest.mark.parametrize("raw", [b"", b"\xff\xd8", b"<html>", encoded(picture(), "GIF"), encoded(picture(), "TIFF"), encoded(picture(64, 64), "JPEG")[:-300],
                                 encoded(picture(64, 64))[:-300]])
def test_what_is_no_whole_jpeg_png_or_webp_is_unreadable(raw):
    assert reason(Sample("k", {"jpg": raw}).image) == "unreadable image"


def test_damaged_bytes_give_an_image_or_a_skip_and_nothing_else():
    exif, draw = Image.Exif(), random.Random(0)
    exif[0x0112], exif[0x010F] = 6, "maker"
    whole = [encoded(smooth(24, 18), kind, **how) for kind, how in (("JPEG", {"exif": exif}), ("PNG", {"exif": exif}), ("WEBP", {"exif": exif}),
                                                                     ("JPEG", {"progressive": True}))]
    read = collections.Counter()
    for turn in range(320):
        raw = bytearray(whole[turn % 4])
        for _ in range(draw.randint(1, 6)):
            raw[draw.randrange(min(len(raw), 250))] = draw.randrange(256)
        with contextlib.suppress(Skip):
            read[Sample("k", {"jpg": bytes(raw)}).image(near=draw.choice((None, 8))).mode] += 1
    assert read.keys() == {"RGB"} and 20 < read["RGB"] < 300                                 # both outcomes happened


@pytest.mark.parametrize("width, height, near, want", [(640, 200, 64, (320, 100)), (640, 640, 80, (80, 80)), (640, 640, 81, (160, 160)),
                                                       (60, 40, 64, (60, 40)), (640, 480, None, (640, 480))])
def test_a_jpeg_is_decoded_at_a_fraction_with_both_sides_at_least_near(width, height, near, want):
    page = smooth(width, height)
    got = Sample("k", {"jpg": encoded(page, "JPEG", quality=95)}).image(near=near)
    assert got.size == want
    assert np.abs(np.asarray(got).astype(int) - np.asarray(page.resize(want, Image.BOX)).astype(int)).mean() < 2


# ---- boxes of a sample ----

def boxes_of(sample):
    return [tuple(b) for b in sample.boxes(*sample.image().size)]


def test_boxes_and_segments_are_read_alike_and_cut_at_the_edges():
    listed = [{"x": -5, "y": 60, "w": 20, "h": 20, "text": "  one \n two "}, {"bbox": [90.5, 1, 50, 2.5], "name": "edge"}]
    want = [(0, 60, 15, 4, "one two"), (90.5, 1, 5.5, 2.5, "edge")]
    for fields in ({"boxes": listed}, {"segments": listed}, {"boxes": listed, "segments": [{"bbox": [0, 0, 9, 9], "name": "other"}]}):
        assert boxes_of(Sample("k", {**painted().members, "json": json.dumps(fields).encode()})) == want


def test_malformed_boxes_are_left_out():
    good, big = SHAPES[0], {"x": 3, "y": 3, "w": 1e300, "h": 9, "text": "wide"}
    bad = [None, 7, "bbox", [1, 2, 3, 4], {}, {**good, "text": None}, {**good, "text": ""}, {**good, "text": 5},
           {**good, "text": ["red"]}, {**good, "w": 0}, {**good, "h": -3}, {**good, "x": "left"}, {**good, "x": None}, {**good, "y": 64},
           {**good, "x": 96}, {**good, "x": float("nan")}, {**good, "w": float("nan")}, {**good, "y": -14}, {**good, "x": float("-inf"), "w": float("inf")}, {"bbox": [1, 2, 3], "name": "a"},
           {"bbox": 5, "name": "a"}, {**good, "x": 10 ** 400}, {k: v for k, v in good.items() if k != "h"}]
    sample = lambda listed: Sample("k", {**painted().members, "json": json.dumps({"boxes": listed}).encode()})
    for one in bad:
        with pytest.raises(Skip, match="no box"):
            boxes_of(sample([one]))
    assert boxes_of(sample([*bad, good, big])) == [(6, 5, 20, 14, "red"), (3, 3, 93, 9, "wide")]
    assert len(boxes_of(sample([{**good, "text": "a" * 10 ** 6}]))[0][4]) == data.MAX_CAPTION
    for listed in ({}, "boxes", None, 5):
        with pytest.raises(Skip, match="no box"):
            boxes_of(sample(listed))
    assert Sample("k", {"jpg": b"no image", "json": sample([good]).members["json"]}).boxes(96, 64) == [(6, 5, 20, 14, "red")]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_follow_the_pixels_through_every_orientation(orientation, kind):
    sample = painted(orientation=orientation, kind=kind)
    image = np.asarray(sample.image()).astype(int)
    assert image.shape[:2] == ((96, 64) if orientation > 4 else (64, 96))
    for x, y, w, h, text in boxes_of(sample):
        ys, xs = (np.abs(image - PAINT[text]).max(2) < 80).nonzero()
        assert (x, y, w, h) == (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)
    cut = {**SHAPES[0], "x": -4, "y": 55}                    # cut where it was measured, then turned
    (_, _, w, h, _), = boxes_of(Sample("k", {**sample.members, "json": json.dumps({"boxes": [cut]}).encode()}))
    assert (h, w) == (16, 9) if orientation > 4 else (w, h) == (16, 9)


def test_orientations_that_do_not_exist_turn_nothing():
    text = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI4sI", 1, 0x0112, 2, 2, b"6\0\0\0", 0)
    for raw in (painted(orientation=9).members["jpg"], text):
        if raw is text:
            raw = io.BytesIO()
            Image.new("RGB", (96, 64)).save(raw, "JPEG", exif=text)
            raw = raw.getvalue()
        sample = Sample("k", {"jpg": raw, "json": painted().members["json"]})
        assert sample.image().size == (96, 64) and boxes_of(sample)[0] == (6, 5, 20, 14, "red")


# ---- views ----

def test_squash_without_rng_is_the_centre_of_346_squared_pixels():
    pixels = noise(346, 346)                                 # nothing to resize: 28 = (346 - 289) // 2 pixels go on the left and on top
    assert np.array_equal(data.squash(Image.fromarray(pixels), 289), pixels[28:317, 28:317].transpose(2, 0, 1))


@pytest.mark.parametrize("width, height, size", [(400, 300, 32), (61, 500, 32), (200, 200, 64)])
def test_squash_equals_resizing_everything_and_then_cropping(width, height, size):
    full = {32: 38, 64: 77}[size]                            # round(size * 346 / 289)
    whole = np.asarray(smooth(width, height).resize((full, full), Image.BILINEAR)).astype(int)
    at = (full - size) // 2
    got = data.squash(smooth(width, height), size).astype(int)
    assert np.abs(got - whole[at:at + size, at:at + size].transpose(2, 0, 1)).max() <= 1


def test_random_crops_reach_every_corner_and_the_flip_mirrors():
    x, y = np.meshgrid(np.arange(19), np.arange(19))         # 16 * 346 / 289 = 19.2: again nothing to resize, and pixels tell where they were
    pixels = np.stack([10 * x, 10 * y, 0 * x], -1).astype(np.uint8)
    image, seen = Image.fromarray(pixels), collections.Counter()
    for seed in range(300):
        view = data.squash(image, 16, np.random.default_rng(seed), flip=True)
        mirrored = bool(view[0, 0, 0] > view[0, 0, -1])
        left, top = view[0].min() // 10, view[1].min() // 10
        want = pixels[top:top + 16, left:left + 16].transpose(2, 0, 1)
        assert np.array_equal(view, want[..., ::-1] if mirrored else want)
        seen.update([("left", int(left)), ("top", int(top)), ("mirrored", mirrored)])
        assert np.array_equal(view, data.squash(image, 16, np.random.default_rng(seed), flip=True))
        plain = data.squash(image, 16, np.random.default_rng(seed))
        assert plain[0, 0, 0] < plain[0, 0, -1]              # no flip unless asked for
    assert {k for k, n in seen.items() if n > 40} == {(side, k) for side in ("left", "top") for k in range(4)} | {("mirrored", False), ("mirrored", True)}


def test_centre_leaves_a_square_of_the_right_size_as_it_is():
    pixels = noise(32, 32)
    assert np.array_equal(data.centre(Image.fromarray(pixels), 32), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("width, height", [(192, 64), (64, 192), (67, 64)])
def test_centre_is_the_middle_of_the_image_with_its_short_side_resized(width, height):
    k = 32 / min(width, height)
    whole = smooth(width, height).resize((round(width * k), round(height * k)), Image.BICUBIC)
    left, top = (whole.width - 32) / 2, (whole.height - 32) / 2
    want = np.asarray(whole.crop((int(left), int(top), int(left) + 32, int(top) + 32))).astype(int)
    assert np.abs(data.centre(smooth(width, height), 32).transpose(1, 2, 0) - want).max() <= (6 if width == 67 else 1)   # 67: half a pixel aside


# ---- which sample at which step ----

SIZES = (7, 0, 12, 5, 16)                                    # 40 samples in five shards, one of them empty
STARTS = np.cumsum((0, *SIZES))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """An index whose sample i has the key i."""
    root = tmp_path_factory.mktemp("numbered")
    return Index([write_tar(root / f"{s}.tar", [(f"{i:06d}.txt", b"caption %d" % i) for i in range(STARTS[s], STARTS[s + 1])]) for s in range(len(SIZES))])


def number(sample, rng):
    return {"n": np.int64(sample.key), "draw": rng.random()}


def run(batches, steps, first=0, workers=0):
    loader = data.Loader(batches, first, SimpleNamespace(workers=workers, steps=steps), CPU)
    out = [next(loader) for _ in range(first, steps)]
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()
    return out


def joined(index, plan, steps, example=number, world=1, workers=0):
    """{name: (steps, global batch, ...)}: the ranks' rows side by side; of "skipped", their sum."""
    ranks = [run(data.Batches([data.Rows(index, plan, example)], plan.batch, rank, world), steps, workers=workers) for rank in range(world)]
    return {name: torch.stack([sum(p) if name == "skipped" else torch.cat(p) for p in zip(*([b[name] for b in r] for r in ranks))]) for name in ranks[0][0]}


class Digest(np.random.bit_generator.ISeedSequence):
    """What rng_for() seeds numpy's generator with, spelt out."""
    def __init__(self, *key):
        digest = hashlib.blake2b(f"[{', '.join(map(str, key))}]".encode(), digest_size=32).digest()
        self.words = [int.from_bytes(digest[i:i + 8], "little") for i in range(0, 32, 8)]

    def generate_state(self, n, dtype):
        assert (n, dtype) == (4, np.uint64)
        return np.array(self.words, dtype)


def drawing(*key):
    return np.random.Generator(np.random.PCG64(Digest(*key)))


def test_streams_of_random_numbers_are_told_apart_by_every_integer_of_their_key():
    keys = [(1, 2), (1, 2, 0), (12,), (1, 3), (2, 1), (-1, 2), (2 ** 70,)]
    first = {data.rng_for(*key).random() for key in keys}
    assert len(first) == len(keys) and first == {drawing(*key).random() for key in keys}
    assert data.rng_for(np.int64(1), 2).random() == data.rng_for(1, 2).random() == data.rng_for(1, np.int32(2)).random()


def slow_order(starts, seed, epoch, window):
    """The rule, spelt out: shards permuted, and each window of them shuffled."""
    order, out = drawing(1, seed, epoch).permutation(len(starts) - 1), []
    for w, at in enumerate(range(0, len(order), window)):
        ids = np.array([i for s in order[at:at + window] for i in range(starts[s], starts[s + 1])], int)
        drawing(2, seed, epoch, w).shuffle(ids)
        out += ids.tolist()
    return out


@pytest.mark.parametrize("window", [1, 2, 3, 5, 99])
@pytest.mark.parametrize("seed, epoch", [(0, 0), (0, 1), (7, 12)])
def test_the_order_is_the_rule_spelt_out(window, seed, epoch):
    plan = Plan(STARTS, 8, seed, window)
    order = [plan.sample(epoch, p) for p in range(40)]
    assert order == slow_order(STARTS, seed, epoch, window) and sorted(order) == [*range(40)]
    assert order == [plan.sample(epoch, p) for p in reversed(range(40))][::-1]               # asked from the end, nothing remembered misleads
    assert [plan.position(s, r) for s, r in ((0, 0), (4, 7), (5, 0), (11, 3))] == [(0, 0), (0, 39), (1, 0), (2, 11)]


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(slow_order(STARTS, seed, epoch, 2)) for seed in range(3) for epoch in range(3)}
    plans = {tuple(Plan(STARTS, 8, seed, 2).sample(epoch, p) for p in range(40)) for seed in range(3) for epoch in range(3)}
    assert len(plans) == 9 and plans == orders


def test_with_a_window_of_one_the_samples_of_a_shard_stay_together_but_not_in_line():
    plan = Plan(STARTS, 8, 0, 1)
    order = [plan.sample(0, p) for p in range(40)]
    shard = np.searchsorted(STARTS, order, side="right") - 1
    assert np.count_nonzero(np.diff(shard)) == 3             # four shards that are not empty: three changes
    assert all((np.diff([i for i, s in zip(order, shard) if s == k]) < 0).any() for k in set(shard))
    mixed = np.searchsorted(STARTS, [Plan(STARTS, 8, 0, 5).sample(0, p) for p in range(40)], side="right")
    assert np.count_nonzero(np.diff(mixed)) > 12             # a window of all shards mixes them


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_ranks_and_workers_together_read_each_sample_once_per_epoch_in_plan_order(numbered, world, workers):
    got = joined(numbered, Plan(numbered.starts, 8, 3, 2), 10, world=world, workers=workers)
    want = [slow_order(STARTS, 3, epoch, 2) for epoch in (0, 1)]
    assert got["n"].flatten().tolist() == want[0] + want[1] and got["skipped"].sum() == 0
    assert [sorted(got["n"][s:s + 5].flatten().tolist()) for s in (0, 5)] == [[*range(40)]] * 2


def test_the_tail_that_fills_no_batch_waits_for_another_epoch(numbered):
    got = joined(numbered, Plan(numbered.starts, 12, 3, 2), 6)["n"]                          # 40 = 3 * 12 + 4
    assert got[:3].flatten().tolist() == slow_order(STARTS, 3, 0, 2)[:36] and got[3:].flatten().tolist() == slow_order(STARTS, 3, 1, 2)[:36]


def test_a_run_resumed_at_any_step_reads_what_it_would_have_read(numbered):
    plan = Plan(numbered.starts, 8, 3, 2)
    whole = run(data.Batches([data.Rows(numbered, plan, number)], 8, 1, 2), 9)
    for first in (1, 4, 5, 8):                               # 5 steps are an epoch
        rest = run(data.Batches([data.Rows(Index(numbered.paths), Plan(numbered.starts, 8, 3, 2), number)], 8, 1, 2), 9, first=first, workers=first == 4)
        assert len(rest) == 9 - first
        for a, b in zip(whole[first:], rest):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_larger_than_the_data_is_an_error_and_one_as_large_is_an_epoch():
    with pytest.raises(UserError, match="--batch 41 .*40 samples"):
        Plan(STARTS, 41, 0, 2)
    assert Plan(STARTS, 40, 0, 2).steps_per_epoch == 1


def test_ten_million_samples_are_planned_without_listing_them():
    starts = np.arange(0, 10 ** 7 + 1, 1000)
    tracemalloc.start()
    got = Plan(starts, 4096, 5, 4).sample(7, 5_001_234)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6                                        # bytes; the epoch would be 80 MB
    order = drawing(1, 5, 7).permutation(10_000)                       # position 5,001,234 is the 1,235th of window 1250
    ids = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in order[5000:5004]])
    drawing(2, 5, 7, 1250).shuffle(ids)
    assert got == ids[1234]


# ---- filling ----

def failing(bad, why="no image"):
    def example(sample, rng):
        if int(sample.key) in bad:
            raise Skip(why)
        return number(sample, rng)
    return example


def counts(skipped):
    return {r: int(n) for r, n in zip(data.REASONS, skipped) if n}


@pytest.mark.parametrize("positions", [[5], [7], [8, 9, 10], [39], [39, 0], [38, 39, 0, 1]])
@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (4, 0), (1, 1)])
def test_a_position_that_cannot_be_read_is_filled_by_the_next_and_nothing_shifts(numbered, world, workers, positions):
    order = slow_order(STARTS, 3, 0, 2)
    got = joined(numbered, Plan(numbered.starts, 8, 3, 2), 5, failing({order[p] for p in positions}), world, workers)
    want, tries = list(order), 0
    for p in positions:
        q = p
        while q % 40 in positions:                           # the last position of an epoch goes on at its first
            q, tries = q + 1, tries + 1
        want[p] = order[q % 40]
    assert got["n"].flatten().tolist() == want
    assert counts(got["skipped"].sum(0)) == {"no image": tries}
    assert len(set(zip(want, got["draw"].flatten().tolist()))) == len(set(want))             # a sample that fills in draws what it draws in its own place


@pytest.mark.parametrize("workers", [0, 1])
def test_when_no_sample_can_be_used_the_run_ends_with_one_line(numbered, workers):
    loader = data.Loader(data.Batches([data.Rows(numbered, Plan(numbered.starts, 8, 3, 2), failing(range(40)))], 8), 0,
                         SimpleNamespace(workers=workers, steps=5), CPU)
    with pytest.raises(UserError, match="none of the 40 samples can be used .*'no image': 40"):
        next(loader)
    loader.close()


def test_a_killed_loader_worker_is_told_in_one_line_with_the_next_batch_and_not_in_the_middle_of_a_step(numbered):
    loader = data.Loader(data.Batches([data.Rows(numbered, Plan(numbered.starts, 8, 3, 2), number)], 8), 0, SimpleNamespace(workers=1, steps=1000), CPU)
    next(loader)
    loader.iterator._workers[0].kill()
    time.sleep(0.5)                                          # where torch's own handler would have raised
    with pytest.raises(UserError, match="a loader worker died .*-9.*--workers"):
        for _ in range(9):
            next(loader)
    loader.close()


def test_a_shard_that_vanishes_is_filled_and_counted(tmp_path):
    paths = [write_tar(tmp_path / f"{s}.tar", [(f"{i}.txt", b"x") for i in range(4 * s, 4 * s + 4)]) for s in range(3)]
    index = Index(paths)
    os.remove(paths[1])
    assert reason(index.__getitem__, 4) == "shard gone" and index[3].key == "3" and index[8].key == "8"
    order, plan = slow_order([0, 4, 8, 12], 0, 0, 3), Plan(index.starts, 4, 0, 3)
    want = [next(order[q % 12] for q in range(p, p + 12) if not 4 <= order[q % 12] < 8) for p in range(12)]
    tries = sum(next(k for k in range(12) if not 4 <= order[(p + k) % 12] < 8) for p in range(12))
    got = joined(index, plan, 3)
    assert got["n"].flatten().tolist() == want and counts(got["skipped"].sum(0)) == {"shard gone": tries} and tries >= 4


def test_a_shard_that_shrinks_or_changes_after_indexing_is_cut_samples(tmp_path):
    path = write_tar(tmp_path / "0.tar", TOY)
    index = Index([path])
    assert index[2].members["txt"] == b"CC"
    with open(path, "r+b") as f:
        f.seek(5632)
        f.write(b"\x01" * 512)                               # header of 1.jpg
        f.truncate(14000)                                    # in the pixels of 2.jpg
    assert index[0].members["txt"] == b"AA" and [reason(index.__getitem__, i) for i in (1, 2)] == ["cut sample"] * 2


def test_a_shard_rewritten_under_the_index_gives_a_cut_sample_and_never_one_made_of_two(tmp_path):
    path = write_tar(tmp_path / "0.tar", TOY)
    index = Index([path])
    for members in ([(f"folder{k}", FOLDER) for k in range(12)], [("0.jpg", b"D" * 3000), ("1.txt", b"of another picture"), ("2.txt", b"")]):
        write_tar(path, members)
        assert reason(index.__getitem__, 0) == "cut sample"


def test_bad_samples_of_every_kind_are_counted_and_a_bad_encoding_is_delivered(tmp_path):
    good = encoded(picture())
    members = {"jpg": good, "txt": b"fine"}, {"jpg": b"", "txt": b"no bytes"}, {"txt": b"no image"}, {"jpg": good, "txt": b" "}, \
        {"jpg": good, "txt": b"caf\xe9 ol\xc3\xa9"}, {"jpg": good, "json": b"{"}, {"jpg": png_of_size(9999, 9999), "txt": b"bomb"}, {"jpg": good}
    index = Index([write_tar(tmp_path / "0.tar", [(f"{k}.{s}", raw) for k, m in enumerate(members) for s, raw in m.items()])])
    texts = {}

    def example(sample, rng):
        texts[sample.key] = sample.caption(rng)
        sample.image()
        return {"n": np.int64(sample.key)}

    got = joined(index, Plan(index.starts, 8, 1, 1), 1, example)
    order = slow_order([0, 8], 1, 0, 1)
    want = [next(order[q % 8] for q in range(p, p + 8) if order[q % 8] in (0, 4)) for p in range(8)]
    passed = collections.Counter(order[q % 8] for p in range(8) for q in range(p, p + next(k for k in range(8) if order[(p + k) % 8] in (0, 4))))
    assert got["n"].flatten().tolist() == want and texts["4"] == "caf\ufffd olé"
    assert counts(got["skipped"][0]) == {"caption not UTF-8": want.count(4), "unreadable image": passed[1], "no image": passed[2], "empty caption": passed[3],
                                         "unreadable json": passed[5], "too many pixels": passed[6], "no caption": passed[7]}


def test_a_sample_keeps_its_crop_on_any_rank_and_batch_and_gets_another_in_another_epoch(tmp_path):
    index = Index([write_tar(tmp_path / f"{s}.tar", [(f"{k}.png", encoded(picture(24, 24, k))) for k in range(8 * s, 8 * s + 8)]) for s in range(2)])

    def example(sample, rng):
        return {"n": np.int64(sample.key), "view": data.squash(sample.image(), 16, rng, flip=True)}

    def views(batch, world, epoch, seed=3):
        got = joined(index, Plan(index.starts, batch, seed, 1), 32 // batch, example, world)
        half = slice(16 // batch * epoch, 16 // batch * (epoch + 1))
        return dict(zip(got["n"][half].flatten().tolist(), got["view"][half].flatten(0, 1)))

    first = views(8, 1, 0)
    assert first.keys() == set(range(16))
    for other in (views(8, 2, 0), views(4, 1, 0), views(16, 4, 0)):
        assert all(torch.equal(first[n], other[n]) for n in range(16))
    for other in (views(8, 1, 1), views(8, 1, 0, seed=4)):   # 32 views a sample: one in 32 is the same by chance
        assert sum(not torch.equal(first[n], other[n]) for n in range(16)) > 10


# ---- tokenizer ----

A, B, C, D = (Tokenizer().first_byte + ord(c) for c in "abcd")
TEXTS = ["the cat sat on the mat, the cat!", "a cat and the hat -- that hat", "мир миру мир", "猫猫猫 aaaa aaaaaa", "on on on the the\n\n\nthe", "sat sat   sat"]


def any_text(draw, length):
    ranges = (0, 0x80), (0x80, 0x800), (0x300, 0x370), (0x590, 0x700), (0x4e00, 0x9fff), (0xe000, 0x10000), (0x1f300, 0x1fa00), (0x20000, 0x2a000), (0x10000, 0x110000)
    return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(length)))


@pytest.mark.parametrize("merges", [0, 24])
def test_any_text_comes_back_as_it_was(merges):
    tokenizer, draw = Tokenizer.train(TEXTS, 264 + merges), random.Random(0)
    assert len(tokenizer.merges) == merges
    for text in [any_text(draw, 40) for _ in range(300)] + ["", "\0", " \t\r\n \x1c\x85\u2028", "e\u0301\u202e", "👩‍👩‍👧 שלום", " leading", "trailing "]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and all(8 <= i < tokenizer.vocab_size for i in ids)


def test_without_merges_the_ids_are_the_bytes_behind_the_special_ones():
    assert Tokenizer().encode("aé") == [8 + 97, 8 + 0xc3, 8 + 0xa9] and Tokenizer().vocab_size == 8 + 256
    assert Tokenizer.train(TEXTS, 264).merges == []


def test_the_example_of_wikipedia():
    # aaabdaaabac: Z = aa; then Y = ab and Za tie at 2, and the smaller ids win; then X = ZY: XdXac
    tokenizer = Tokenizer.train(["aaabdaaabac"], 1000)
    assert tokenizer.merges == [(A, A), (A, B), (264, 265)]
    assert tokenizer.encode("aaabdaaabac") == [266, D, 266, A, C] and tokenizer.bytes[266] == b"aaab"
    assert Tokenizer.train(["aaabdaaabac"], 266).merges == [(A, A), (A, B)]                  # as many as there is room for


def slow_merge(ids, pair, new):
    for i in range(len(ids) - 1):
        if (ids[i], ids[i + 1]) == pair:
            return ids[:i] + [new] + slow_merge(ids[i + 2:], pair, new)
    return ids


def slow_train(texts, vocab_size):
    words, merges = [[8 + b for b in w.encode()] for t in texts for w in re.findall(r" ?\w+| ?[^\w\s]+|\s", t)], []
    while 264 + len(merges) < vocab_size:
        found = collections.Counter(p for w in words for p in zip(w, w[1:]))
        if not found or max(found.values()) < 2:
            break
        merges.append(min(found, key=lambda p: (-found[p], p)))
        words = [slow_merge(w, merges[-1], 263 + len(merges)) for w in words]
    return merges


@pytest.mark.parametrize("texts, size", [(TEXTS, 1000), (TEXTS, 280), (["aaaaaaa", "aaaa aaa", "ababab bababa"], 1000), (["abab" * 9, "baba" * 7, "aab" * 5], 1000)])
def test_training_agrees_with_counting_everything_anew_for_each_merge(texts, size):
    assert Tokenizer.train(texts, size).merges == slow_train(texts, size)


def test_training_on_random_strings_agrees_too():
    draw = random.Random(1)
    texts = ["".join(draw.choice("aab c") for _ in range(draw.randrange(1, 60))) for _ in range(40)]
    merges = slow_train(texts, 360)
    assert len(merges) > 50 and Tokenizer.train(texts, 360).merges == merges and Tokenizer.train(texts, 300).merges == merges[:36]


def test_encoding_applies_the_merges_in_the_order_they_were_learned():
    draw = random.Random(2)
    texts = TEXTS + ["".join(draw.choice("aabc ") for _ in range(draw.randrange(1, 60))) for _ in range(40)]
    tokenizer = Tokenizer.train(texts[:30], 1000)
    for text in texts:
        want = []
        for w in re.findall(r" ?\w+| ?[^\w\s]+|\s", text):
            ids = [8 + b for b in w.encode()]
            for i, pair in enumerate(tokenizer.merges):
                ids = slow_merge(ids, pair, 264 + i)
            want += ids
        assert tokenizer.encode(text) == tokenizer.encode(text) == want                      # the second comes from its cache


def test_no_string_becomes_a_special_token():
    tokenizer = Tokenizer.train(TEXTS, 300)
    for text in ("<|endoftext|>", "[MASK]", "<pad><bos></s>", "[PAD] [CLS]", "<image>", "".join(map(chr, range(8))), "\ufffd"):
        assert min(tokenizer.encode(text)) >= len(Tokenizer.SPECIAL) == 8 and tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_vanish_from_decoded_text_and_broken_bytes_are_marked():
    assert Tokenizer().decode([Tokenizer.BOS, A, Tokenizer.MASK, B, Tokenizer.EOS, Tokenizer.PAD]) == "ab"
    assert Tokenizer().decode(torch.tensor([A, 8 + 0xc3])) == "a\ufffd"


@pytest.mark.parametrize("text, length, want, n", [("ab", 6, [1, A, B, 2, 0, 0], 4), ("abcd", 4, [1, A, B, 2], 4), ("abcd", 6, [1, A, B, C, D, 2], 6), ("", 4, [1, 2, 0, 0], 2)])
def test_padding_is_marked_and_a_cut_keeps_the_end_token(text, length, want, n):
    tokens, valid = Tokenizer().pad(text, length)
    assert tokens.tolist() == want and valid.tolist() == [k < n for k in range(length)] and tokens.dtype == np.int64
    assert (Tokenizer.PAD, Tokenizer.BOS, Tokenizer.EOS) == (0, 1, 2)


def test_half_a_surrogate_pair_is_encoded_and_read_back_as_damage():
    ids = Tokenizer.train(["a\ud83d b\ud83d"] * 2, 300).encode("a\ud83d")
    assert ids and Tokenizer.train(["a\ud83d b\ud83d"] * 2, 300).decode(ids).startswith("a\ufffd")


def test_a_saved_vocabulary_is_the_same_one(tmp_path):
    tokenizer, path = Tokenizer.train(TEXTS, 320), str(tmp_path / "vocab.json")
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.merges == tokenizer.merges and [loaded.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert os.listdir(tmp_path) == ["vocab.json"] and Tokenizer.loads(tokenizer.dumps()).merges == tokenizer.merges


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"{}", b'{"special": 7, "merges": []}', b'{"special": 8, "merges": [[1, 2, 3]]}',
                                 b'{"special": 8, "merges": [["a", "b"]]}', b'{"special": 8, "merges": [[264, 105]]}', b'{"special": 8, "merges": 3}',
                                 b'{"special": 8, "merges": [[105, 105], [999, 105]]}', b"PK\x03\x04\x80\xff\x00", b'{"special": 8, "merges": [[-1, -2]]}'])
def test_a_damaged_vocabulary_is_refused_in_one_line(tmp_path, raw):
    (tmp_path / "vocab.json").write_bytes(raw)
    with pytest.raises(UserError, match="vocab.json is not a vocabulary"):
        Tokenizer.load(str(tmp_path / "vocab.json"))


def test_a_vocabulary_is_trained_once_then_read_and_must_fit(tmp_path, numbered):
    cfg = SimpleNamespace(out=str(tmp_path), vocab="", vocab_size=270)
    made = data.vocabulary(cfg, numbered, None)
    assert made.merges == slow_train([f"caption {i}" for i in range(40)], 270)
    cfg = SimpleNamespace(out="nowhere", vocab=str(tmp_path / "vocab.json"), vocab_size=270)
    assert data.vocabulary(cfg, None, None).merges == data.vocabulary(cfg, None, {"vocab": made.dumps()}).merges == made.merges
    cfg.vocab_size = 269
    with pytest.raises(UserError, match="270 ids, more than --vocab-size 269"):
        data.vocabulary(cfg, None, None)
    cfg.vocab = str(tmp_path / "absent.json")
    with pytest.raises(UserError, match="absent.json: no such file"):
        data.vocabulary(cfg, None, None)


@pytest.mark.parametrize("before", [[], [[]]])               # also if the very first shard is empty
def test_a_first_shard_without_captions_is_an_error(tmp_path, before):
    shards = [*before, [("0.jpg", b"x"), ("1.jpg", b"x")], [("2.jpg", b"x")]]
    index = Index([write_tar(tmp_path / f"{k}.tar", members) for k, members in enumerate(shards)])
    with pytest.raises(UserError, match="no caption in the first shard"):
        data.first_captions(index)


# ---- the built-in world, read back by other means than it was written with ----

def stream(pattern):
    """(key, {suffix: bytes}) of every sample, by Python's own tarfile."""
    out = collections.OrderedDict()
    for path in data.expand(pattern):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                out.setdefault((path, key), {})[suffix] = tar.extractfile(member).read()
    return [(key, members) for (_, key), members in out.items()]


@pytest.fixture(scope="module")
def scenes(tiny_world):
    """(fields of the json, mask, image, class or None) of the training scenes."""
    return [(json.loads(m["json"]), np.asarray(Image.open(io.BytesIO(m["seg.png"]))), np.asarray(Image.open(io.BytesIO(m["jpg"]))), int(m["cls"]) if "cls" in m else None)
            for _, m in stream(f"{tiny_world}/pairs/train-*.tar")]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return data.make_world(str(tmp_path_factory.mktemp("documents")), documents=30, parts=("docs",))


def lines(path):
    with open(path) as f:
        return f.read().splitlines()


def tree(folder):
    found = {}
    for at, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(at, name), "rb") as f:
                found[os.path.relpath(os.path.join(at, name), folder)] = f.read()
    return found


@pytest.mark.parametrize("part, split", [("pairs", "train"), ("pairs", "test"), ("labels", "train"), ("labels", "test")])
def test_the_world_is_the_same_bytes_whoever_writes_it(tiny_world, tmp_path, part, split):
    data.write_shard(str(tmp_path / "0.tar"), f"{part}/{split}", range(40), seed=0, noise=0.0, scenes=256)
    mine = (tmp_path / "0.tar").read_bytes().rstrip(b"\0")   # without the end of the archive
    with open(f"{tiny_world}/{part}/{split}-00000.tar", "rb") as f:
        assert f.read(len(mine)) == mine and len(mine) > 40 * 1024


def test_an_interrupted_making_leaves_no_part_and_one_worker_makes_the_same_as_two(documents, tmp_path, monkeypatch):
    class Interrupt(Exception):
        pass

    def record(stream, number, **world):
        if (stream, number) == ("docs/test", 3):
            raise Interrupt
        return {"json": {}}

    with monkeypatch.context() as patch:
        patch.setattr(data, "record", record)
        with pytest.raises(Interrupt):
            data.make_world(str(tmp_path), documents=30, parts=("docs",))
    assert tree(tmp_path) == {} and [os.listdir(d) for d in tmp_path.iterdir()] in ([], [[]])
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    again = data.make_world(str(tmp_path), documents=30, parts=("docs",))
    assert tree(again) == tree(documents) and set(tree(again)) == {"docs/train-00000.tar", "docs/test-00000.tar"}
    assert os.path.basename(again) == os.path.basename(documents)


def test_a_part_that_is_there_is_not_made_again_and_other_arguments_are_another_world(documents, monkeypatch):
    monkeypatch.setattr(data, "write_shard", None)           # nobody could make anything
    assert data.make_world(os.path.dirname(documents), documents=30, parts=("docs",)) == documents
    with pytest.raises(TypeError):
        data.make_world(os.path.dirname(documents), documents=30, seed=1, parts=("docs",))


def test_the_unseen_pairs_hold_each_colour_and_each_shape_once(tiny_world):
    unseen = [line.split() for line in lines(f"{tiny_world}/labels/unseen.txt")]
    assert sorted(c for c, _ in unseen) == sorted(data.COLOURS) and sorted(s for _, s in unseen) == sorted(data.OUTLINES)
    assert set(lines(f"{tiny_world}/labels/unseen.txt")) < set(lines(f"{tiny_world}/labels/classes.txt"))


def test_no_unseen_pair_is_told_or_shown_in_training(tiny_world, documents):
    classes, unseen = lines(f"{tiny_world}/labels/classes.txt"), lines(f"{tiny_world}/labels/unseen.txt")
    numbers, texts, told = collections.Counter(), "", collections.Counter()
    for pattern in (f"{tiny_world}/pairs/train-*.tar", f"{tiny_world}/labels/train-*.tar", f"{documents}/docs/train-*.tar"):
        for _, members in stream(pattern):
            texts += members.get("json", b"").decode() + "\n"
            if "cls" in members:
                numbers[classes[int(members["cls"])]] += 1
    assert len(numbers) == 56 and not numbers.keys() & set(unseen)
    told.update(m for m in re.findall(r"\b(\w+ \w+)", texts) if m in classes)
    told.update(m for m in re.findall(r"\b\w+ (\w+ \w+)", texts) if m in classes)
    assert len(told) > 50 and not any(re.search(rf"\b{pair}\b", texts) for pair in unseen)


def test_the_zero_shot_part_has_sixteen_of_each_class(tiny_world):
    found = collections.Counter(int(m["cls"]) for _, m in stream(f"{tiny_world}/labels/test-*.tar"))
    assert found == {c: 16 for c in range(64)} and len(set(lines(f"{tiny_world}/labels/classes.txt"))) == 64


def hue(pixels):
    """Name of the colour nearest to the median of some pixels."""
    return min(data.COLOURS, key=lambda c: np.abs(np.median(pixels, 0) - data.COLOURS[c]).sum())


def test_class_numbers_are_lines_of_the_class_file(tiny_world, scenes):
    classes = lines(f"{tiny_world}/labels/classes.txt")
    single = [(f["boxes"][0]["text"], cls) for f, _, _, cls in scenes if len(f["boxes"]) == 1]
    assert len(single) > 80 and all(text.endswith(f" {classes[cls]}") for text, cls in single)
    assert all((cls is None) == (len(f["boxes"]) > 1) for f, _, _, cls in scenes)
    right = 0
    for _, members in stream(f"{tiny_world}/labels/test-*.tar")[:128]:                       # here only the pixels can tell
        image = np.asarray(Image.open(io.BytesIO(members["jpg"]))).astype(int)
        near = {c: (np.abs(image - 0.95 * np.array(rgb)).max(-1) < 32).sum() for c, rgb in data.COLOURS.items()}
        right += max(near, key=near.get) == classes[int(members["cls"])].split()[0]
    assert right > 120


THING = re.compile(rf"(?:a )?(?:(?P<size>small|large) )?(?:(?P<texture>striped|dotted) )?(?P<name>(?P<colour>{'|'.join(data.COLOURS)}) (?P<shape>{'|'.join(data.OUTLINES)}))"
                   r"(?P<place> (?:at the (?:top|bottom)(?: left| right)?|on the (?:left|right)|in the middle))?\b")
HOW = "left of|right of|above|below"


def things(fields):
    """The boxes, each with the words of its text and its centre."""
    out = []
    for box in fields["boxes"]:
        words = THING.fullmatch(box["text"])
        out.append(SimpleNamespace(**words.groupdict(), cx=box["x"] + box["w"] / 2, cy=box["y"] + box["h"] / 2))
        assert out[-1].size and not out[-1].place
    return out


def stands(a, how, b):
    dx, dy = a.cx - b.cx, a.cy - b.cy
    return {"left of": dx < -abs(dy), "right of": dx > abs(dy), "above": dy < -abs(dx), "below": dy > abs(dx)}[how]


def at(place, cx, cy):
    across = cx < 28 if "left" in place else cx > 36 if "right" in place else 26 < cx < 38
    return across and (cy < 28 if "top" in place else cy > 36 if "bottom" in place else 26 < cy < 38)


def true(caption, boxes):
    """Is every word of the caption true of the boxes? (Backgrounds are not judged here.)"""
    body = re.sub(r",? on a (grey|brown|dark|khaki) background$", "", caption)
    said, named = list(THING.finditer(body)), []
    form = THING.sub("#", body)
    number = re.fullmatch(rf"(?:a picture of |(one) )?#|(?:a picture of )?#(?: and #)+|# (?:{HOW}|with) #|# and # (?:{HOW}) it|(two|three|four) objects: #(?:, #)* and #", form)
    assert number, f"{caption}: {form}"
    for words in said:
        found = [b for b in boxes if b.name == words["name"]]
        if len(found) != 1 or words["size"] not in (None, found[0].size) or words["texture"] not in (None, found[0].texture):
            return False
        if words["place"] and not at(words["place"], found[0].cx, found[0].cy):
            return False
        named += found
    count = number[1] or number[2]
    how = re.search(HOW, form)
    first, second = (1, 0) if form.endswith(" it") else (0, 1)
    return (not count or {"one": 1, "two": 2, "three": 3, "four": 4}[count] == len(boxes) == len(named)) and len({b.name for b in named}) == len(named) \
        and (not how or stands(named[first], how[0], named[second]))


def test_every_caption_is_true_of_its_boxes(scenes):
    forms = collections.Counter()
    for fields, _, _, _ in scenes:
        texts, boxes = fields["caption"], things(fields)
        assert len(texts) == len(set(texts)) == 4 and max(len(t.split()) for t in texts) <= 24
        for text in texts:
            assert true(text, boxes), (text, fields["boxes"])
            forms.update(re.findall(rf"{HOW}|with|objects|top|bottom|middle|on the left|background|striped|dotted|small|large", text))
    assert len(scenes) >= 200 and len(forms) == 15           # all of it was there to be judged


def test_the_reader_of_captions_notices_false_ones(scenes):
    caught = collections.Counter()
    swap = {"left of": "right of", "above": "below", "right of": "left of", "below": "above", "small": "large", "large": "small", "striped": "dotted",
            "dotted": "striped", "top": "bottom", "bottom": "top", "two": "three", "three": "four"}
    for fields, _, _, _ in scenes[:150]:
        for text in fields["caption"]:
            for word in set(re.findall("|".join(swap), text)):
                assert not true(text.replace(word, swap[word], 1), things(fields)), text
                caught[word] += 1
    assert caught.keys() == swap.keys()


def right_answer(question, boxes):
    words = question.removesuffix("?")
    one = {b.name: b for b in boxes}
    if (m := re.fullmatch(r"is there a (\w+ \w+)", words)):
        return "yes" if m[1] in one else "no"
    if (m := re.fullmatch(r"is the (\w+ \w+) (small|large)", words)):
        return "yes" if one[m[1]].size == m[2] else "no"
    if (m := re.fullmatch(rf"is the (\w+ \w+) ({HOW}) the (\w+ \w+)", words)):
        return "yes" if stands(one[m[1]], m[2], one[m[3]]) else "no"
    if (m := re.fullmatch(r"how many (?:(\w+) )?objects are there", words)):
        return str(sum(m[1] in (None, b.colour) for b in boxes))
    if (m := re.fullmatch(r"what size is the (\w+ \w+)", words)):
        return one[m[1]].size
    if (m := re.fullmatch(r"what pattern has the (\w+ \w+)", words)):
        return one[m[1]].texture or "plain"
    if (m := re.fullmatch(r"what colour is the (\w+)", words)):
        return ",".join(b.colour for b in boxes if b.shape == m[1])
    if (m := re.fullmatch(r"what shape is the (\w+) object", words)):
        return ",".join(b.shape for b in boxes if b.colour == m[1])
    m = re.fullmatch(rf"what is ({HOW}) the (\w+ \w+)", words)
    return ",".join(b.name for b in boxes if b.name != m[2] and stands(b, m[1], one[m[2]]))


def test_every_question_has_the_one_right_answer(scenes):
    kinds = collections.Counter()
    for fields, _, _, _ in scenes:
        for qa in fields["qa"]:
            assert qa["answer"] == right_answer(qa["question"], things(fields)), (qa, fields["boxes"])
            kinds[" ".join(qa["question"].split()[:2]), qa["answer"] if qa["answer"] in ("yes", "no") else "other"] += 1
    assert len(kinds) == 10 and kinds["is there", "yes"] > 10 < kinds["is there", "no"]
    yes, no = (sum(n for (_, answer), n in kinds.items() if answer == a) for a in ("yes", "no"))
    assert abs(yes - no) < 4 * (yes + no) ** 0.5             # answering yes always is right half of the time


def test_masks_and_pixels_under_the_boxes_are_what_the_boxes_say(scenes):
    for fields, mask, image, _ in scenes[:150]:
        rest, coloured = mask.copy(), 0
        for box, thing in zip(fields["boxes"], things(fields)):
            area = slice(box["y"], box["y"] + box["h"]), slice(box["x"], box["x"] + box["w"])
            inside = mask[area] > 0
            assert set(mask[area][inside]) == {1 + list(data.OUTLINES).index(thing.shape)}
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()      # the box is tight
            assert thing.texture or hue(image[area][inside]) == thing.colour, fields["boxes"]
            assert (thing.size == "large") == (max(box["w"], box["h"]) > 21)
            rest[area] = 0
        assert not rest.any()


def test_noise_changes_about_its_share_of_captions_and_nothing_else():
    clean = [data.record("pairs/train", n, scenes=100) for n in range(100)]
    noisy = [data.record("pairs/train", n, noise=0.5, scenes=100) for n in range(100)]
    changed = [n for n in range(100) if clean[n]["json"]["caption"] != noisy[n]["json"]["caption"]]
    assert 35 <= len(changed) <= 65                          # 50, standard deviation 5
    for n in range(100):
        assert noisy[n]["jpg"].tobytes() == clean[n]["jpg"].tobytes() and noisy[n]["seg.png"].tobytes() == clean[n]["seg.png"].tobytes()
        assert {**noisy[n]["json"], "caption": 0} == {**clean[n]["json"], "caption": 0} and noisy[n].keys() == clean[n].keys()
    swapped = [n for n in changed if any(noisy[n]["json"]["caption"] == clean[m]["json"]["caption"] for m in range(100) if m != n)]
    junk = [noisy[n]["json"]["caption"] for n in changed if n not in swapped]
    assert min(len(swapped), len(junk)) > len(changed) / 4
    assert all(len(j) == 1 and not THING.search(j[0]) for j in junk)
    assert data.record("pairs/test", 3, noise=1.0, scenes=100)["json"] == data.record("pairs/test", 3, scenes=100)["json"]   # never the test part


def test_another_seed_is_another_world():
    assert data.record("pairs/train", 0, seed=1)["jpg"].tobytes() != data.record("pairs/train", 0, seed=0)["jpg"].tobytes()
    assert data.record("pairs/train", 0)["jpg"].tobytes() != data.record("pairs/test", 0)["jpg"].tobytes()


def test_documents_name_their_pictures_and_the_sentences_about_them(documents):
    found = stream(f"{documents}/docs/train-*.tar")
    assert len(found) == 30
    chatter = asides = 0
    for key, members in found:
        fields = json.loads(members["json"])
        texts, info = fields["text_list"], fields["image_info"]
        assert [f"{key}.{suffix}" for suffix in members if suffix != "json"] == [i["image_name"] for i in info] and 2 <= len(info) <= 4
        places = [i["matched_text_index"] for i in info]
        assert places == sorted(set(places)) and all(0 <= p < len(texts) for p in places) and all(0.2 <= i["matched_sim"] <= 0.4 for i in info)
        for p in places:                                     # a sentence about a picture: a caption, and no remark on something else
            caption = texts[p][0].lower() + texts[p][1:].removesuffix(".")
            assert THING.search(caption) and texts[p] not in data.CHATTER and not re.match("The |Next comes|We can see", texts[p])
        first = {m[1]: m[2] for m in (re.fullmatch(r"The (\w+ \w+) in the first picture was (small|large)\.", t) for t in texts) if m}
        assert len(first) <= 1                               # one object, told the same way each time
        chatter, asides = chatter + any(t in data.CHATTER for t in texts), asides + len(first)
    assert chatter > 10 and asides > 5


# ---- check and the command line ----

def test_check_finds_nothing_wrong_with_the_world(tiny_world, documents, capsys):
    for pattern in (f"{tiny_world}/pairs/test-*.tar", f"{tiny_world}/labels/test-*.tar", f"{documents}/docs"):
        assert data.check(data.expand(pattern)) is False
    assert capsys.readouterr().out.count("nothing wrong") == 3


@pytest.mark.parametrize("damage, told", [("cut", "cut shard"), ("no pixels", "unreadable image"), ("bomb", "too many pixels"), ("no caption", "no caption"),
                                          ("json", "unreadable json"), ("class", "no class"), ("latin", "caption not UTF-8"), ("twice", "duplicate suffix"),
                                          ("document", "unreadable image"), ("stats", "declares 9 samples, found 3")])
def test_check_names_what_is_wrong_and_where(tmp_path, capsys, damage, told):
    good = encoded(picture())
    members = [(f"{k}.{s}", raw) for k in range(3) for s, raw in (("jpg", good), ("json", b"{}"), ("txt", b"a dog"))]
    change = {"no pixels": (3, ("1.jpg", b"")), "bomb": (3, ("1.jpg", png_of_size(9999, 9999))), "no caption": (5, ("1.x", b"")), "json": (4, ("1.json", b"{")),
              "class": (5, ("1.cls", b"dog")), "latin": (5, ("1.txt", b"caf\xe9")), "twice": (4, ("1.jpg", good))}
    if damage in change:
        members[change[damage][0]] = change[damage][1]
    if damage == "document":
        members[3:6] = [("1.json", b'{"text_list": ["A dog."], "image_info": []}'), ("1.0.jpg", good), ("1.1.jpg", good[:-60])]
    if damage == "stats":
        (tmp_path / "0_stats.json").write_text('{"successes": 9}')
    path, before = write_tar(tmp_path / "0.tar", members), write_tar(tmp_path / "before.tar", [("x.jpg", good), ("x.txt", b"fine")])
    if damage == "cut":
        with open(path, "r+b") as f:
            f.truncate(4000)
    assert data.check([before, path]) is True
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if told in line)
    assert line.split()[0] == "1" and path in line and (damage in ("cut", "twice", "stats") or ", sample 1)" in line)


def test_a_clean_shard_and_its_damaged_copy_differ_in_the_exit_code(tmp_path):
    good = write_tar(tmp_path / "0.tar", [("0.jpg", encoded(picture())), ("0.txt", b"a dog")])
    bad = write_tar(tmp_path / "1.tar", [("0.jpg", b"?"), ("0.txt", b"a dog")])
    for paths, code in (([good], 0), ([good, bad], 1)):
        with pytest.raises(SystemExit) as end:
            data.main(["check", *paths])
        assert end.value.code == code


def test_the_vocabulary_command_writes_what_training_on_the_captions_gives(numbered, tmp_path, capsys):
    data.main(["vocab", *numbered.paths, "--size", "280", "--out", str(tmp_path / "v.json")])
    assert Tokenizer.load(str(tmp_path / "v.json")).merges == slow_train([f"caption {i}" for i in range(40)], 280)
    assert f"{264 + len(slow_train([f'caption {i}' for i in range(40)], 280))} ids" in capsys.readouterr().out


@pytest.mark.parametrize("name, patterns, samples", [("pairs", ["train-00003.tar", "test-00001.tar"], 0), ("labels", ["test-*.tar"], 1000),
                                                     ("docs", ["*.tar"], 492), ("seg", ["*.tar"], 138), ("nlvr", ["*.tar"], 1161)])
def test_the_real_shards_check_clean(shared, capsys, name, patterns, samples):
    paths = data.expand([f"{shared}/{name}/{p}" for p in patterns])
    assert data.check(paths) is False, capsys.readouterr().out
    assert not samples or len(Index(paths)) == samples       # the numbers of the data's README
