"""Shards, samples, views, order and loader against hand-worked values and slow references."""
import collections
import gzip
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import common
import data
from common import Stream, UserError
from conftest import BOXES, RGB, ROOT, encoded, painted_sample
from data import Index, Sample, ShuffledOrder, Skip

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def write_tar(path, members):
    """members: [(name, bytes)] -> path"""
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            data.add_file(tar, name, raw)
    return str(path)


def smooth(width, height):
    """Slow waves: an image that looks the same after any careful resampling."""
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    return Image.fromarray(np.uint8(127 + 120 * waves))


def reason(read, *args, **options):
    """Why a sample is skipped."""
    with pytest.raises(Skip) as skip:
        read(*args, **options)
    assert str(skip.value) in data.REASONS
    return str(skip.value)


def samples_of(index):
    return [(index[i].key, index[i].members) for i in range(len(index))]


# ---- which files ----

def test_sources_braces_and_globs_are_joined_in_order_and_each_file_is_named_once(tmp_path):
    for name in ("a-09", "a-10", "b-09", "b-10"):
        write_tar(tmp_path / f"{name}.tar", [])
    (tmp_path / "c-10.tar").symlink_to("b-10.tar")
    (tmp_path / "._a-0.tar").write_bytes(b"macOS")
    patterns = [f"{tmp_path}/{{b,a}}-{{09..10}}.tar::{tmp_path}/*.tar", f"{tmp_path}/b-09.tar"]
    names = [os.path.basename(path) for path in data.expand(patterns)]
    assert names == ["b-09.tar", "b-10.tar", "a-09.tar", "a-10.tar"]
    assert data.expand_braces("{8..10}") == ["8", "9", "10"]
    assert data.expand_braces("{10..09}") == ["10", "09"]


@pytest.mark.parametrize("train, test", [
    ("cc3m-train-0000.tar", "cc3m-validation-00.tar"), ("train2017/0.tar", "imagenetVal-0.tar"),
    ("COCOTrain0.tar", "TESTset0.tar"),
])
def test_words_in_the_names_tell_the_parts_of_a_folder_apart(tmp_path, train, test):
    for name in (train, test):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, [])
    assert data.expand(str(tmp_path)) == [f"{tmp_path}/{train}"]
    assert data.expand(str(tmp_path), "test") == [f"{tmp_path}/{test}"]


def test_a_folder_without_such_words_is_in_both_parts(tmp_path):
    paths = [write_tar(tmp_path / f"{name}.tar", []) for name in ("constrained", "latest")]
    assert data.expand(str(tmp_path)) == data.expand(str(tmp_path), "test") == paths


@pytest.mark.parametrize("names, line", [
    (["train-0.tar", "extra-0.tar"], "extra-0.tar: neither train, val nor test"),
    (["train-val-0.tar", "train-0.tar"], "named both training and held-out"),
    (["train-0.tar"], "has the word val or test in its name"),
    (["test-0.tar.gz"], "are compressed, such as .*/test-0.tar.gz: unpack them"),
    (["test-0.jpg"], "no tar files in"),
])
def test_a_folder_whose_names_leave_the_held_out_part_open_is_refused(tmp_path, names, line):
    for name in names:
        write_tar(tmp_path / name, [])
    with pytest.raises(UserError, match=line):
        data.expand(str(tmp_path), "test")


def test_lines_end_at_newlines_alone_and_a_byte_order_mark_is_dropped(tmp_path):
    lines = ["crème\u2028brûlée", "a\x0bb\x0cc\x85d", "猫"]
    text = "\ufeff" + "\r\n".join([*lines, "", ""])  # empty lines at the end are no lines
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert data.read_class_names([f"{tmp_path}/0.tar"]) == lines


def test_class_names_stand_beside_the_shards_or_one_folder_up_and_must_agree(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    shards = [f"{tmp_path}/a/0.tar", f"{tmp_path}/b/0.tar"]
    assert data.read_class_names(shards) is None
    (tmp_path / "classnames.txt").write_text("up\n")
    assert data.read_class_names(shards) == ["up"]
    (tmp_path / "b" / "classes.txt").write_text(" great white shark \n")
    assert data.read_class_names(shards[1:]) == ["great white shark"]
    with pytest.raises(UserError, match="/classnames.txt and .*b/classes.txt differ"):
        data.read_class_names(shards)
    (tmp_path / "b" / "classes.txt").write_bytes("crème".encode("cp1252"))
    with pytest.raises(UserError, match="b/classes.txt is not UTF-8"):
        data.read_class_names(shards)


# ---- index ----

TOY = []  # three samples of a JPEG (3,000 bytes), a record and a text
for k in range(3):
    letter = bytes([65 + k])
    TOY += [(f"{k}.jpg", 3000 * letter), (f"{k}.json", 2 * letter), (f"{k}.txt", 2 * letter)]


def test_neighbors_with_one_key_are_a_sample_until_a_suffix_is_repeated(tmp_path):
    long = "päivä/猫🐱" + "k" * 130  # does not fit into a plain header
    path = write_tar(tmp_path / "0.tar", [
        ("Zebra.JPG", 300 * b"1"), ("Zebra.Seg.PNG", b"2"), (f"{long}.txt", b"3"),
        (f"{long}.json", b"4"), ("ant.Txt", b"5"), ("Ant.txt", b"6"), ("Ant.TXT", b"7")])
    index = Index([path])
    assert samples_of(index) == [
        ("Zebra", {"jpg": 300 * b"1", "seg.png": b"2"}), (long, {"txt": b"3", "json": b"4"}),
        ("ant", {"txt": b"5"}), ("Ant", {"txt": b"6"}), ("Ant", {"txt": b"7"})]
    assert index.notes == {path: {data.REPEATED: 1}}
    with pytest.raises(IndexError):
        index[5]


def test_members_that_belong_to_no_sample_are_left_out_and_odd_ones_are_counted(tmp_path):
    path = write_tar(tmp_path / "0.tar", [
        ("__meta__", b"{}"), ("0.jpg", b"pixels"), ("README", b"!"), ("0.json", b"{}"),
        ("._0.jpg", b"macOS"), (".DS_Store", b"macOS"), ("__MACOSX/0.jpg", b"macOS"),
        (".ipynb_checkpoints/0.jpg", b"copy"), ("./1.jpg", b"more")])
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("./1.txt")
            info.type = kind
            tar.addfile(info)
    index = Index([path])
    assert samples_of(index) == [("0", {"jpg": b"pixels", "json": b"{}"}),
                                 ("./1", {"jpg": b"more"})]
    assert index.warnings() == [f"{path}: hidden files left out (4), links left out (1)"]


@pytest.mark.parametrize("suffix", ["txt", "jpg"])
def test_samples_lost_to_dots_in_their_names_are_counted(tmp_path, suffix):
    files = [(f"frame_2024.05.01_{i:04d}.{suffix}", b"x") for i in range(20)]
    path = write_tar(tmp_path / "0.tar", files)
    index = Index([path])
    assert len(index) == 1
    assert index.warnings() == [f"{path}: samples lost, as keys end at the first dot of a file "
                                "name: rename the files (19)"]


def test_every_cut_is_counted_or_harmless_and_what_lies_before_it_is_used(tmp_path):
    raw = open(write_tar(tmp_path / "0.tar", TOY), "rb").read()
    ends = [5632, 11264, 16896]  # of the samples: 512 + 3072 and twice 512 + 512 bytes each
    for cut in range(600, len(raw), 97):
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(raw[:cut])
        scan = data.scan(str(path))
        n_whole = sum(end <= cut for end in ends)
        assert len(scan.samples) >= n_whole
        assert (scan.members["sample"] < n_whole).sum() == 3 * n_whole
        is_harmless = cut >= ends[-1] + 512  # in the zeros at the end
        assert scan.notes == ({} if is_harmless else {data.CUT: 1})


def test_bad_archives_are_named_and_the_others_are_used(tmp_path):
    good = write_tar(tmp_path / "1.tar", TOY)
    raw = open(good, "rb").read()
    page = tmp_path / "0.tar"
    page.write_text("<html>404 Not Found</html>\n" * 100)
    compressed = tmp_path / "2.tar"
    compressed.write_bytes(gzip.compress(raw))
    empty = write_tar(tmp_path / "3.tar", [])
    joined = tmp_path / "4.tar"
    joined.write_bytes(raw + raw)
    damaged = tmp_path / "5.tar"  # the header of 1.txt does not pass for the end
    damaged.write_bytes(raw[:10240] + 20 * b"\x01" + raw[10260:])
    index = Index([str(page), good, str(compressed), empty, str(joined), str(damaged)])
    assert index.starts.tolist() == [0, 0, 3, 3, 3, 6, 8] and index[2].members["txt"] == b"CC"
    assert index.notes == {str(page): {data.NOT_TAR: 1}, str(compressed): {data.COMPRESSED: 1},
                           str(joined): {data.JOINED: 1}, str(damaged): {data.CUT: 1}}
    with pytest.raises(UserError, match="no sample"):
        Index([empty])
    with pytest.raises(UserError, match="6.tar cannot be read .No such file"):
        Index([good, str(tmp_path / "6.tar")])


def test_the_cache_is_used_until_a_shard_changes(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / "0.tar", TOY), write_tar(tmp_path / "1.tar", TOY[:3])]
    whole = samples_of(Index(paths))
    monkeypatch.setattr(data, "scan", None)  # to call it is a TypeError
    assert samples_of(Index(paths)) == whole
    with pytest.raises(TypeError):
        Index(paths[::-1])  # another order is another index
    os.utime(paths[0], ns=(10**18, 10**18))
    with pytest.raises(TypeError):
        Index(paths)


@pytest.mark.parametrize("table", ["members", "samples", "keys", "json"])
def test_a_cache_that_was_cut_short_is_made_anew(tmp_path, table):
    path = write_tar(tmp_path / "0.tar", TOY)
    index = Index([path])
    whole = samples_of(index)
    file = f"{index.cache}.{table}"
    for n_bytes in (0, os.path.getsize(file) - 1):
        os.truncate(file, n_bytes)
        assert samples_of(Index([path])) == whole
    os.remove(file)
    assert samples_of(Index([path])) == whole


def test_many_shards_are_scanned_by_other_processes_which_get_an_index_as_its_paths(tmp_path):
    paths = []
    want = []
    for k in range(50):
        members = [(f"{k}_{i}.{k}.png", b"%d" % i) for i in range(k % 4)]
        paths.append(write_tar(tmp_path / f"{k}.tar", members))
        want += [(f"{k}_{i}", {f"{k}.png": b"%d" % i}) for i in range(k % 4)]
    index = Index(paths)
    assert samples_of(index) == want
    packed = pickle.dumps(index)
    assert b"png" not in packed and samples_of(pickle.loads(packed)) == want


def test_scanning_a_shard_keeps_no_more_of_its_members_than_the_tables(tmp_path):
    path = write_tar(tmp_path / "0.tar", [(f"{i}.txt", b"") for i in range(3000)])
    tracemalloc.start()
    data.scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # bytes, 1e6 of a buffer; tarfile's own list would take 3e6


def test_a_shard_that_is_rewritten_or_goes_is_skipped_and_never_mixed_with_the_index(tmp_path):
    path = write_tar(tmp_path / "0.tar", TOY)
    index = Index([path])
    write_tar(path, TOY[::-1])
    os.utime(path, ns=(10**18, 10**18))
    assert reason(index.__getitem__, 0) == "shard changed"
    os.remove(path)
    assert reason(index.__getitem__, 0) == "shard gone"


# ---- sample ----

@pytest.mark.parametrize("members, captions", [
    ({"txt": "\ufeffa\u2028red\u3000 circle\r\n\r\n".encode()}, ["a red circle"]),
    ({"txt": 10**6 * b"x"}, [10_000 * "x"]),
    ({"json": b'{"captions": ["one", "two"]}'}, ["one", "two"]),
    ({"json": b'\xef\xbb\xbf{"caption": [null, "", "one", 3]}'}, ["one"]),
    ({"json": b'{"caption": null, "captions": "one", "similarity": NaN}'}, ["one"]),
    ({"json": b'{"caption": "one"}', "txt": b"the text goes first"}, ["the text goes first"]),
])
def test_captions_are_the_text_or_a_string_or_list_of_the_record(members, captions):
    sample = Sample("k", members)
    assert sample.captions() == captions and sample.has_caption()


def test_every_caption_of_a_list_gets_its_turn():
    sample = Sample("k", {"json": b'{"caption": ["a", "b", "c"]}'})
    counts = collections.Counter(sample.caption(np.random.default_rng(i)) for i in range(300))
    assert set(counts) == {"a", "b", "c"} and min(counts.values()) > 70  # 100, deviation 8


def test_in_evaluation_sets_each_line_is_a_caption():
    sample = Sample("k", {"txt": "one\u2028dog\n\n two  dogs\r\n".encode()})
    assert sample.captions(lines=True) == ["one dog", "two dogs"]
    assert sample.captions() == ["one dog two dogs"]


def test_sixteen_bits_keep_their_high_byte():
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    pixels = np.asarray(Sample("k", {"png": encoded(Image.fromarray(deep))}).image())
    # Pillow's convert("RGB") gives 255 for all but the darkest
    assert np.array_equal(pixels, np.repeat((deep // 256)[..., None], 3, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_masks_and_boxes_are_turned_upright_by_exif(orientation):
    sample = painted_sample(orientation=orientation)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(sample.image_bytes()))))
    classes = np.asarray(painted_sample().image())[..., 0] % 200  # stored as the image is
    sample.members["seg.png"] = encoded(Image.fromarray(classes))
    assert np.array_equal(sample.image(), want) and sample.size() == sample.image().size
    assert np.array_equal(sample.mask(), want[..., 0] % 200)
    for x, y, w, h, text in sample.boxes():
        rows, columns = (want == RGB[text]).all(2).nonzero()
        assert (x, y) == (columns.min(), rows.min())
        assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_an_image_whose_metadata_are_damaged_keeps_its_pixels(kind):
    pixels = Sample("k", {"jpg": encoded(smooth(24, 16), kind)}).image()
    raw = encoded(smooth(24, 16), kind, exif=b"Exif\0\0" + 20 * b"X", dpi=(72, 72))
    assert np.array_equal(Sample("k", {"jpg": raw}).image(), pixels)
    if kind == "PNG":  # whose chunks have checksums
        for name in (b"eXIf", b"pHYs"):
            start = raw.index(name) + 8
            raw = raw[:start] + b"??" + raw[start + 2:]
            assert np.array_equal(Sample("k", {"jpg": raw}).image(), pixels)


def test_a_bomb_is_refused_by_its_header_without_decoding(monkeypatch):
    allowed = encoded(Image.new("1", (5000, 5000)))[:100]  # cut: decoding it would fail
    assert reason(Sample("k", {"png": allowed}).image) == "unreadable image"
    bomb = encoded(Image.new("1", (5001, 5000)))[:100]
    assert reason(Sample("k", {"png": bomb}).image) == "too many pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow itself raises at twice as many
    assert reason(Sample("k", {"png": bomb}).image) == "too many pixels"


@pytest.mark.parametrize("height, min_size, size", [(200, 64, (320, 100)), (640, 80, (80, 80))])
def test_a_jpeg_is_decoded_at_a_fraction_with_both_sides_at_least_min_size(height, min_size, size):
    page = smooth(640, height)
    image = Sample("k", {"jpg": encoded(page, "JPEG", quality=95)}).image(min_size)
    assert image.size == size
    error = np.asarray(image).astype(int) - np.asarray(page.resize(size, Image.BOX)).astype(int)
    assert np.abs(error).mean() < 2


@pytest.mark.parametrize("mode, value", [(np.uint8, 0), ("palette", 0), (np.uint16, 255)])
def test_255_is_unlabeled_in_eight_bits_and_a_class_in_sixteen(mode, value):
    classes = np.arange(24).reshape(4, 6)
    classes[0, 0] = 255
    stored = Image.fromarray(classes.astype(np.uint8 if mode == "palette" else mode))
    if mode == "palette":
        stored.putpalette(list(range(256)) * 3)
    sample = painted_sample([], size=(6, 4))
    sample.members["seg.png"] = encoded(stored)
    assert sample.mask().tolist() == [[value, *classes[0, 1:]], *classes[1:].tolist()]


def with_boxes(records, name="boxes"):
    record = json.dumps({name: records}).encode()
    return Sample("k", {**painted_sample().members, "json": record})


def test_boxes_and_segments_are_read_alike_and_cut_at_the_edges():
    records = [{"x": -5, "y": 60, "w": 20, "h": 20, "text": "  one \n two ", "id": 3},
               {"bbox": [90.5, 1, 50, 2.5], "name": "edge"}]
    boxes = [(0, 60, 15, 4, "one two", 3), (90.5, 1, 5.5, 2.5, "edge", None)]
    for name in ("boxes", "segments"):
        assert with_boxes(records, name).boxes("id") == boxes


def test_malformed_boxes_are_left_out():
    good = BOXES[0]
    bad = [None, "bbox", {"bbox": [], "name": "a"}, {"x": 1, "text": "a"}]
    for changes in ({"text": ""}, {"text": 5}, {"w": 0}, {"x": "left"}, {"y": 64}, {"y": -14},
                    {"w": math.nan}, {"x": 10**400}, {"x": -math.inf, "w": math.inf}):
        bad.append({**good, **changes})
    for record in bad:
        assert reason(with_boxes([record]).boxes) == "no box", record
    assert with_boxes([*bad, good]).boxes() == [(6, 5, 20, 14, "red")]


# ---- documents ----

def document_sample(**record):
    images = {f"{i}.png": encoded(Image.new("RGB", (2, 2), (i, 0, 0))) for i in range(4)}
    return Sample("k", {"json": json.dumps(record).encode(), **images})


def read_document(sample, seed=0, **options):
    """Sentences, and numbers in the place of images."""
    segments = sample.document(np.random.default_rng(seed), **options)
    return [s if isinstance(s, str) else s.getpixel((0, 0))[0] for s in segments]


def matched(name, i, similarity=None):
    return {"image_name": f"k.{name}.png", "matched_text_index": i, "matched_sim": similarity}


def test_matched_images_stand_before_or_after_their_sentences_by_lcls_rules():
    info = [matched(2, 2, 0.3), matched(0, 0, 0.24), matched(1, 1, 0.23), matched(9, 1), None,
            matched(3, 7), {"image_name": "k.3.png"}, matched(3, 3)]
    sample = document_sample(text_list=["a", "b", "c", "d"], image_info=info)
    assert read_document(sample, image_first=1.0) == [0, "a", "b", 2, "c", 3, "d"]
    assert read_document(sample, image_first=0.0) == ["a", 0, "b", "c", 2, "d", 3]
    assert read_document(sample, image_first=1.0, max_images=1) == [0, "a", "b", "c", "d"]
    assert read_document(sample, min_similarity=0.3, image_first=1.0) == ["a", "b", 2, "c", 3, "d"]
    first = [read_document(sample, seed)[0] == 0 for seed in range(200)]
    assert 70 < sum(first) < 130


def test_one_of_the_images_of_a_sentence_is_drawn():
    sample = document_sample(text_list=["a"], image_info=[matched(0, 0), matched(1, 0)])
    counts = collections.Counter(read_document(sample, seed, image_first=1.0)[0]
                                 for seed in range(200))
    assert set(counts) == {0, 1} and min(counts.values()) > 70


# ---- views ----

# ALIGN's view of 346 squared pixels has nothing to resize, and goes by 28 = (346 - 289) // 2
@pytest.mark.parametrize("view, size, image_size, resized, left, top", [
    (data.resize_and_crop, 289, (346, 346), (346, 346), 28, 28),
    (data.resize_and_crop, 24, (61, 500), (29, 29), 2, 2),
    (data.center_crop, 32, (192, 64), (96, 32), 32, 0),
    (data.center_crop, 32, (64, 192), (32, 96), 0, 32),
])
def test_a_view_is_a_square_of_the_image_resized_as_a_whole(
        view, size, image_size, resized, left, top):
    image = smooth(*image_size)
    whole = np.asarray(image.resize(resized, Image.BICUBIC)).astype(int)
    want = whole[top:top + size, left:left + size].transpose(2, 0, 1)
    assert np.abs(view(image, size) - want).max() <= 1


def test_random_crops_reach_every_corner_and_the_flip_mirrors():
    x, y = np.meshgrid(np.arange(19), np.arange(19))  # 16 * 346 / 289 = 19.2: nothing to resize
    pixels = np.stack([10 * x, 10 * y, 0 * x], -1).astype(np.uint8)  # which tell where they were
    image = Image.fromarray(pixels)
    counts = collections.Counter()
    for seed in range(300):
        view = data.resize_and_crop(image, 16, np.random.default_rng(seed), flip=True)
        is_mirrored = bool(view[0, 0, 0] > view[0, 0, -1])
        left = int(view[0].min()) // 10
        top = int(view[1].min()) // 10
        want = pixels[top:top + 16, left:left + 16].transpose(2, 0, 1)
        assert np.array_equal(view, want[..., ::-1] if is_mirrored else want)
        counts.update([("left", left), ("top", top), ("mirrored", is_mirrored)])
    assert len(counts) == 4 + 4 + 2 and min(counts.values()) > 40  # 75, deviation 8


def test_random_boxes_lie_inside_and_have_the_wanted_area_and_shape():
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(300):
        x, y, w, h = data.random_box(rng, 300, 200, 0.25)
        assert 0 <= x and 0 <= y and x + w <= 300 and y + h <= 200
        assert 0.74 < w / h < 1.35
        areas.append(w * h / 60000)
    assert 0.24 < min(areas) < 0.3 and 0.8 < max(areas) <= 1
    assert data.random_box(rng, 1000, 10, 0.9) == (493, 0, 13, 10)  # central: no such box exists


# ---- order ----

SIZES = (7, 0, 12, 5, 16)  # 40 samples in five shards, one of them empty
STARTS = np.cumsum((0, *SIZES))


def slow_order(starts, seed, epoch, window=64):
    """The rule, spelled out: shards permuted, and each window of them shuffled."""
    shards = common.rng(Stream.SHARDS, seed, epoch).permutation(len(starts) - 1)
    order = []
    for w, first in enumerate(range(0, len(shards), window)):
        samples = []
        for shard in shards[first:first + window]:
            samples += range(starts[shard], starts[shard + 1])
        samples = np.array(samples, int)
        common.rng(Stream.WINDOW, seed, epoch, w).shuffle(samples)
        order += samples.tolist()
    return order


@pytest.mark.parametrize("seed, epoch, window", [(0, 0, 64), (7, 12, 1), (7, 12, 3)])
def test_the_order_is_the_rule_spelled_out(monkeypatch, seed, epoch, window):
    monkeypatch.setattr(data, "WINDOW", window)
    order = ShuffledOrder(STARTS, 8, seed)
    samples = [order.sample(epoch, position) for position in range(40)]
    assert samples == slow_order(STARTS, seed, epoch, window)
    assert sorted(samples) == list(range(40))
    backwards = [order.sample(epoch, position) for position in reversed(range(40))]
    assert samples == backwards[::-1]  # what is remembered does not mislead
    assert [order(5 * epoch + 1, row) for row in range(8)] == samples[8:16]


def test_the_tail_that_fills_no_batch_waits_for_another_epoch():
    order = ShuffledOrder(STARTS, 12, 3)  # 40 = 3 * 12 + 4
    samples = [order(step, row) for step in range(6) for row in range(12)]
    assert samples == slow_order(STARTS, 3, 0)[:36] + slow_order(STARTS, 3, 1)[:36]
    assert ShuffledOrder(STARTS, 40, 3).steps_per_epoch == 1


def test_ten_million_samples_are_ordered_without_listing_them():
    starts = np.arange(0, 10**7 + 1, 1000)
    tracemalloc.start()
    ShuffledOrder(starts, 4096, 5).sample(7, 5_001_234)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6  # bytes; the epoch would be 80 MB


# ---- batches ----

@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """An index whose sample i has the key i."""
    folder = str(tmp_path_factory.mktemp("numbered"))
    samples = [(f"{i:06d}", {"txt": b"a caption"}) for i in range(40)]
    shards = [samples[first:end] for first, end in zip(STARTS, STARTS[1:])]
    data.write_shards(shards, folder, "train")
    return Index(data.expand(folder))


def number(sample, rng):
    return {"n": np.int64(sample.key), "draw": rng.random()}


def all_ranks(index, steps, example=number, world_size=1, workers=0, start_step=0):
    """{name: (steps, global batch of 8)} of all ranks; of "skipped" (steps, reasons) the sum."""
    rows = data.TrainingSet(index, ShuffledOrder(index.starts, 8, 3), example)
    parts = collections.defaultdict(list)  # of each rank
    for rank in range(world_size):
        dataset = data.BatchDataset([rows], 8, rank, world_size)
        batches = list(data.loader(dataset, start_step, steps, workers, CPU))
        for name in ("n", "draw", "skipped"):
            parts[name].append(torch.stack([b[name] for b in batches]))
    skipped = sum(parts.pop("skipped"))
    return {**{name: torch.cat(part, 1) for name, part in parts.items()}, "skipped": skipped}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world_size, workers", [(4, 0), (2, 3)])
def test_ranks_and_workers_read_each_sample_once_an_epoch(numbered, world_size, workers):
    batches = all_ranks(numbered, 10, world_size=world_size, workers=workers)
    first, second = batches["n"].flatten().view(2, 40).tolist()
    assert first == slow_order(STARTS, 3, 0) and second == slow_order(STARTS, 3, 1)
    assert sorted(first) == sorted(second) == list(range(40)) and batches["skipped"].sum() == 0
    draws = [common.rng(Stream.SAMPLE, 3, 0, n).random() for n in first]
    assert batches["draw"].flatten()[:40].tolist() == draws


def test_a_run_resumed_at_any_step_reads_what_it_would_have_read(numbered):
    whole = all_ranks(numbered, 9)
    for start_step, workers in ((5, 0), (8, 1)):
        rest = all_ranks(Index(numbered.paths), 9, start_step=start_step, workers=workers)
        assert torch.equal(rest["n"], whole["n"][start_step:])
        assert torch.equal(rest["draw"], whole["draw"][start_step:])


def without(numbers):
    def example(sample, rng):
        if int(sample.key) in numbers:
            raise Skip("no image")
        return number(sample, rng)
    return example


# three rows want the samples at 8, 9 and 10, and skip 3, 2 and 1; an epoch's last is followed by
# its first
@pytest.mark.parametrize("bad, substitute, n_skipped", [
    ([8, 9, 10], 11, 3 + 2 + 1), ([38, 39, 0, 1], 2, 4 + 3 + 2 + 1)])
@pytest.mark.parametrize("world_size, workers", [(4, 0), (1, 1)])
def test_a_sample_that_cannot_be_used_is_replaced_by_the_next_and_no_other_row_moves(
        numbered, world_size, workers, bad, substitute, n_skipped):
    order = slow_order(STARTS, 3, 0)
    example = without({order[position] for position in bad})
    batches = all_ranks(numbered, 5, example, world_size, workers)
    want = [order[substitute if position in bad else position] for position in range(40)]
    assert batches["n"].flatten().tolist() == want
    counts = dict(zip(data.REASONS, batches["skipped"].sum(0).tolist()))
    assert counts["no image"] == sum(counts.values()) == n_skipped


def test_when_no_sample_can_be_used_the_run_ends_with_one_line(numbered):
    with pytest.raises(UserError, match="none of the 40 samples can be used .40 no image"):
        all_ranks(numbered, 5, without(range(40)), workers=1)


def test_rows_of_two_kinds_alternate_evenly_and_each_has_its_own_order(numbered):
    cfg = SimpleNamespace(batch=8, seed=3)
    sources, share = data.two_sources(cfg, [numbered, numbered], 0.25, number)
    halves = [data.BatchDataset(sources, 8, rank, 2, share)[0]["n"] for rank in (0, 1)]
    first = slow_order(STARTS, 3, 0)
    second = slow_order(STARTS, 4, 0)
    assert torch.cat(halves).tolist() == [*first[:3], second[0], *first[3:6], second[1]]
    sources, share = data.two_sources(cfg, [None, numbered], 0.25, number)
    assert data.BatchDataset(sources, 8, share=share)[0]["n"].tolist() == second[:8]
    sources, share = data.two_sources(cfg, [numbered, None], 0.25, number)
    assert data.BatchDataset(sources, 8, share=share)[0]["n"].tolist() == first[:8]


# ---- loader ----

class Endless(torch.utils.data.Dataset):
    def __getitem__(self, step):
        return {"step": torch.full((1000,), step), "skipped": torch.zeros(len(data.REASONS))}


def test_a_worker_ignores_signals_to_the_group_and_a_killed_one_is_one_line():
    others = torch.multiprocessing.active_children()  # of other tests
    batches = data.loader(Endless(), 0, 10**6, 1, CPU)
    steps = [int(next(batches)["step"][0]) for _ in range(9)]  # the worker is at work
    worker, = [p for p in torch.multiprocessing.active_children() if p not in others]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker.pid, number)
    steps += [int(next(batches)["step"][0]) for _ in range(50)]
    assert steps == list(range(59))
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a loader worker died .*fewer --workers"):
        for _ in range(1000):
            next(batches)


@pytest.mark.parametrize("last_words", [
    "raise KeyError('a mistake in the step')",
    # an error whose frames hold the loader: its workers live until Python ends
    """multiprocessing.active_children()[0].kill()
        try:
            for _ in batches: pass
        except Exception as error:
            kept = error
        sys.exit('a mistake in the step')"""])
def test_an_exception_in_a_step_ends_the_process_and_its_workers(last_words):
    code = f"""if True:
        import multiprocessing, sys, torch, data
        class Endless(torch.utils.data.Dataset):
            def __getitem__(self, step):
                return {{"step": torch.zeros(9), "skipped": torch.zeros(9)}}
        batches = data.loader(Endless(), 0, 10 ** 6, 2, torch.device("cpu"))
        for _ in range(9):
            next(batches)
        {last_words}
        """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         timeout=60)
    assert run.returncode == 1 and "a mistake in the step" in run.stderr


def test_too_little_shared_memory_is_one_line_before_the_first_step(monkeypatch):
    def statvfs(folder):
        n_bytes = sum(x.nbytes for x in Endless()[0].values())
        # a worker makes two batches, two are in use, one to spare
        return SimpleNamespace(f_frsize=1, f_bavail=5 * n_bytes)

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(os.path, "isdir", "/dev/shm".__eq__)
    data.loader(Endless(), 0, 1, 1, CPU)
    for workers, ranks in ((2, 1), (1, 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        with pytest.raises(UserError, match="/dev/shm has .*--workers 0"):
            data.loader(Endless(), 0, 1, workers, CPU)
