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
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import common
import data
from common import Stream, UserError
from conftest import BOXES, RGB, ROOT, painted_sample
from data import Index, Sample, ShuffledOrder, Skip

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


TYPES = {"folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "device": tarfile.CHRTYPE}


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    """members: [(name, bytes, or a key of TYPES for what is no file)] -> path"""
    with tarfile.open(path, "w", format=format) as tar:
        for name, value in members:
            info = tarfile.TarInfo(name)
            if value in TYPES:
                info.type = TYPES[value]
                info.linkname = "elsewhere"
                tar.addfile(info)
            else:
                data.add_file(tar, name, value)
    return str(path)


def encoded(image, kind="PNG", **options):
    raw = io.BytesIO()
    image.save(raw, kind, **options)
    return raw.getvalue()


def noise(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(width, height):
    """Slow waves: an image that looks the same after any careful resampling."""
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    return Image.fromarray(np.uint8(127 + 120 * waves))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


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


@pytest.mark.parametrize("pattern, names", [
    ("{8..11}", "8 9 10 11"), ("{08..11}", "08 09 10 11"), ("{10..09}", "10 09"),
    ("{2..0}", "2 1 0"), ("{a,b}{0..1}", "a0 a1 b0 b1"),
])
def test_braces_are_expanded_as_in_a_shell(pattern, names):
    assert data.expand_braces(pattern) == names.split()


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


# ---- text files ----

LINES = ["red circle", "crème\u2028brûlée", "a\x0bb\x0cc\x85d", "猫"]


@pytest.mark.parametrize("mark, end", [(b"", "\n"), (b"\xef\xbb\xbf", "\r\n")])
def test_lines_end_at_newlines_alone_and_a_byte_order_mark_is_dropped(tmp_path, mark, end):
    text = end.join([*LINES, "", ""])  # empty lines at the end are no lines
    (tmp_path / "classes.txt").write_bytes(mark + text.encode())
    assert data.read_lines_near([f"{tmp_path}/0.tar"], "classes.txt") == LINES


@pytest.mark.parametrize("text, encoding", [("crème", "cp1252"), ("cream", "utf-16-le")])
def test_text_that_is_not_utf8_is_refused(tmp_path, text, encoding):
    (tmp_path / "classes.txt").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match="classes.txt is not UTF-8"):
        data.read_class_names([f"{tmp_path}/0.tar"])


def test_an_empty_line_of_a_class_list_is_refused_with_its_number(tmp_path):
    (tmp_path / "classes.txt").write_text("one\n \nthree\n")
    with pytest.raises(UserError, match="classes.txt, line 2 is empty"):
        data.read_lines_near([f"{tmp_path}/0.tar"], "classes.txt")


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


# ---- index ----

TOY = []  # three samples of a JPEG (3,000 bytes), a record and a text
for k in range(3):
    letter = bytes([65 + k])
    TOY += [(f"{k}.jpg", 3000 * letter), (f"{k}.json", 2 * letter), (f"{k}.txt", 2 * letter)]


def test_neighbors_with_one_key_are_a_sample_until_a_suffix_is_repeated(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("Zebra.JPG", b"1"), ("Zebra.Seg.PNG", b"2"),
                                          ("ant.Txt", b"3"), ("Ant.txt", b"4"), ("Ant.TXT", b"5")])
    index = Index([path])
    assert samples_of(index) == [("Zebra", {"jpg": b"1", "seg.png": b"2"}), ("ant", {"txt": b"3"}),
                                 ("Ant", {"txt": b"4"}), ("Ant", {"txt": b"5"})]
    assert index.notes == {path: {data.REPEATED: 1}}
    with pytest.raises(IndexError):
        index[4]


def test_members_that_belong_to_no_sample_are_left_out_and_odd_ones_are_counted(tmp_path):
    path = write_tar(tmp_path / "0.tar", [
        ("__meta__", b"{}"), ("folder.d", "folder"), ("0.jpg", b"pixels"),
        ("0.txt", "link"), ("README", b"!"), ("0.json", b"{}"), ("._0.jpg", b"macOS"),
        (".DS_Store", b"macOS"), ("__MACOSX/0.jpg", b"macOS"), ("1.txt", "device"),
        (".ipynb_checkpoints/0.jpg", b"copy"), ("./1.jpg", b"more")])
    index = Index([path])
    assert samples_of(index) == [("0", {"jpg": b"pixels", "json": b"{}"}),
                                 ("./1", {"jpg": b"more"})]
    assert index.warnings() == [f"{path}: links left out (1), hidden files left out (4)"]


@pytest.mark.parametrize("suffixes", [["jpg", "txt"], ["jpg"]])
def test_samples_lost_to_dots_in_their_names_are_counted(tmp_path, suffixes):
    names = [f"frame_2024.05.01_{i:04d}.{suffix}" for i in range(20) for suffix in suffixes]
    path = write_tar(tmp_path / "0.tar", [(name, b"x") for name in names])
    index = Index([path])
    assert len(index) == 1
    assert index.warnings() == [f"{path}: samples lost, as keys end at the first dot of a file "
                                "name: rename the files (19)"]


def test_every_cut_is_counted_or_harmless_and_what_lies_before_it_is_used(tmp_path):
    raw = open(write_tar(tmp_path / "0.tar", TOY), "rb").read()
    ends = [5632, 11264, 16896]  # of the samples: 512 + 3072 and twice 512 + 512 bytes each
    silent = 0
    for cut in range(600, len(raw), 97):
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(raw[:cut])
        scan = data.scan(str(path))
        n_whole = sum(end <= cut for end in ends)
        assert len(scan.samples) >= n_whole
        assert (scan.members["sample"] < n_whole).sum() == 3 * n_whole
        if not scan.notes:
            silent += 1
            assert len(scan.samples) == 3 and cut >= ends[-1] + 512  # in the zeros at the end
        else:
            assert scan.notes in ({data.CUT: 1}, {data.NOT_TAR: 1})
    assert 0 < silent < (len(raw) - ends[-1]) / 97


@pytest.mark.parametrize("start, n_bytes", [(3584 + 150, 1), (15872, 20)])
def test_a_damaged_header_does_not_pass_for_the_end(tmp_path, start, n_bytes):
    path = write_tar(tmp_path / "0.tar", TOY)
    with open(path, "r+b") as f:
        f.seek(start)  # the second header's checksum, or the last header's name
        f.write(n_bytes * b"\x01")
    index = Index([path])
    assert index.notes == {path: {data.CUT: 1}} and index[0].members["jpg"] == 3000 * b"A"


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
    index = Index([str(page), good, str(compressed), empty, str(joined)])
    assert index.starts.tolist() == [0, 0, 3, 3, 3, 6] and index[2].members["txt"] == b"CC"
    assert index.notes == {str(page): {data.NOT_TAR: 1}, str(compressed): {data.COMPRESSED: 1},
                           str(joined): {data.JOINED: 1}}
    with pytest.raises(UserError, match="no sample"):
        Index([empty])
    with pytest.raises(UserError, match="5.tar cannot be read .No such file"):
        Index([good, str(tmp_path / "5.tar")])


@pytest.mark.parametrize("format, key", [
    (tarfile.PAX_FORMAT, "päivä/猫🐱" + "k" * 130),
    (tarfile.GNU_FORMAT, "k" * 93),  # .jpg fits into a header, .seg.png does not
])
def test_long_and_foreign_names_are_read_in_all_dialects(tmp_path, format, key):
    members = [("0.txt", b"zero"), (f"{key}.jpg", 300 * b"one"), (f"{key}.seg.png", b"two"),
               ("2.txt", b"three")]
    index = Index([write_tar(tmp_path / "0.tar", members, format)])
    assert samples_of(index) == [("0", {"txt": b"zero"}),
                                 (key, {"jpg": 300 * b"one", "seg.png": b"two"}),
                                 ("2", {"txt": b"three"})]


def test_the_cache_is_used_until_a_shard_changes(tmp_path, monkeypatch):
    class Scanned(Exception):
        pass

    def scan(path):
        raise Scanned

    paths = [write_tar(tmp_path / "0.tar", TOY), write_tar(tmp_path / "1.tar", TOY[:3])]
    whole = samples_of(Index(paths))
    monkeypatch.setattr(data, "scan", scan)
    assert samples_of(Index(paths)) == whole
    with pytest.raises(Scanned):
        Index(paths[::-1])  # another order is another index
    os.utime(paths[0], ns=(10**18, 10**18))
    with pytest.raises(Scanned):
        Index(paths)


@pytest.mark.parametrize("table", ["members", "samples", "keys", "json"])
def test_a_cache_that_was_cut_short_is_made_anew(tmp_path, table):
    path = write_tar(tmp_path / "0.tar", TOY)
    index = Index([path])
    whole = samples_of(index)
    file = f"{index.cache}.{table}"
    raw = open(file, "rb").read()
    for n_bytes in (0, 1, len(raw) - 1):
        os.truncate(file, n_bytes)
        assert samples_of(Index([path])) == whole
        assert open(file, "rb").read() == raw
    os.remove(file)
    assert samples_of(Index([path])) == whole


def test_many_shards_are_scanned_by_other_processes_with_the_same_result(tmp_path):
    paths = []
    want = []
    for k in range(50):
        members = [(f"{k}_{i}.{k}.png", b"%d" % i) for i in range(k % 4)]
        paths.append(write_tar(tmp_path / f"{k}.tar", members))
        want += [(f"{k}_{i}", {f"{k}.png": b"%d" % i}) for i in range(k % 4)]
    assert samples_of(Index(paths)) == want


def test_an_index_travels_to_another_process_as_its_paths(tmp_path):
    index = Index([write_tar(tmp_path / "0.tar", TOY)])
    packed = pickle.dumps(index)
    assert len(packed) < 500 and samples_of(pickle.loads(packed)) == samples_of(index)


def test_memory_does_not_grow_with_what_tarfile_knows_of_the_members(tmp_path):
    peaks = []
    for n in (1000, 4000):
        path = write_tar(tmp_path / f"{n}.tar", [(f"{i:06d}.txt", b"") for i in range(n)])
        tracemalloc.start()
        Index([path])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 3000 * 200  # bytes; tarfile's own list takes 1,000 a member


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


def turn(pixels, orientation):
    """The eight orientations, as the EXIF standard draws them."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = np.fliplr(pixels)
    if orientation in (3, 4, 7, 8):
        pixels = np.flipud(pixels)
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_and_masks_are_turned_upright_by_exif(orientation):
    pixels = noise(6, 4)
    sample = Sample("k", {
        "png": encoded(Image.fromarray(pixels), exif=turned(orientation)),
        "seg.png": encoded(Image.fromarray(pixels[..., 0] % 200))})
    assert np.array_equal(np.asarray(sample.image()), turn(pixels, orientation))
    assert np.array_equal(sample.mask(), turn(pixels[..., 0] % 200, orientation))
    assert sample.size() == sample.image().size


@pytest.mark.parametrize("is_checked", [True, False])
@pytest.mark.parametrize("name", [b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"pHYs"])
def test_a_png_whose_metadata_is_damaged_keeps_its_pixels(name, is_checked):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 20)
    info.add_text("z", "q" * 50, zip=True)
    info.add_itxt("i", "x" * 20)
    pixels = noise(6, 4)
    raw = encoded(Image.fromarray(pixels), pnginfo=info, exif=turned(1), dpi=(72, 72))
    start = raw.index(name) + 4
    end = start + int.from_bytes(raw[start - 8:start - 4], "big")
    damaged = raw[start - 4:start] + np.random.default_rng(0).bytes(end - start)
    checksum = raw[end:end + 4]
    if is_checked:  # the checksum is right, the content is not
        checksum = zlib.crc32(damaged).to_bytes(4, "big")
    image = Sample("k", {"png": raw[:start - 4] + damaged + checksum + raw[end + 4:]}).image()
    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_an_image_whose_exif_is_damaged_keeps_its_pixels(kind):
    plain = Sample("k", {"jpg": encoded(smooth(24, 16), kind)}).image()
    exif = turned(6).tobytes()
    damaged = encoded(smooth(24, 16), kind, exif=b"Exif\0\0XXXXXXXX" + exif[14:])  # not a TIFF's
    assert np.array_equal(Sample("k", {"jpg": damaged}).image(), plain)


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


# ---- masks and boxes ----

def masked(mask, size=(6, 4), **options):
    raw = encoded(Image.fromarray(noise(*size)), **options)
    return Sample("k", {"png": raw, "seg.png": encoded(mask)})


def test_255_is_unlabeled_in_eight_bits_and_a_class_in_sixteen():
    classes = np.arange(24).reshape(4, 6)
    classes[0, 0] = 255
    want = classes.copy()
    want[0, 0] = 0
    palette = Image.fromarray(classes.astype(np.uint8))
    palette.putpalette(list(range(256)) * 3)
    for mask in (Image.fromarray(classes.astype(np.uint8)), palette):
        assert np.array_equal(masked(mask).mask(), want)
    deep = masked(Image.fromarray(classes.astype(np.uint16))).mask()
    assert np.array_equal(deep, classes) and deep.dtype == np.int32


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
    bad = [None, "bbox", [1, 2, 3, 4], {"bbox": [], "name": "a"}, {"x": 1, "text": "a"}]
    for changes in ({"text": ""}, {"text": 5}, {"w": 0}, {"x": "left"}, {"y": 64}, {"y": -14},
                    {"w": math.nan}, {"x": 10**400}, {"x": -math.inf, "w": math.inf}):
        bad.append({**good, **changes})
    for record in bad:
        assert reason(with_boxes([record]).boxes, 96, 64) == "no box", record
    wide = {"x": 3, "y": 3, "w": 1e300, "h": 9, "text": "wide"}
    assert with_boxes([*bad, good, wide]).boxes() == [(6, 5, 20, 14, "red"),
                                                            (3, 3, 93, 9, "wide")]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_follow_the_pixels_through_every_orientation(orientation):
    sample = painted_sample(orientation=orientation)
    image = sample.image()
    pixels = np.asarray(image).astype(int)
    assert image.size == ((64, 96) if orientation > 4 else (96, 64))
    for x, y, w, h, text in sample.boxes():
        rows, columns = (np.abs(pixels - RGB[text]).max(2) < 80).nonzero()
        assert (x, y) == (columns.min(), rows.min())
        assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)


# ---- documents ----

def document_sample(n_images=4, **record):
    images = {f"{i}.png": encoded(Image.new("RGB", (2, 2), (i, 0, 0))) for i in range(n_images)}
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

# 346 squared pixels: nothing to resize, and 28 = (346 - 289) // 2 of them go left and on top
@pytest.mark.parametrize("width, height, size, full, start", [
    (346, 346, 289, 346, 28), (61, 500, 32, 38, 3)])
def test_one_resize_equals_resizing_everything_and_then_cropping(width, height, size, full, start):
    whole = smooth(width, height).resize((full, full), Image.BILINEAR)
    want = np.asarray(whole).astype(int)[start:start + size, start:start + size]
    view = data.resize_and_crop(smooth(width, height), size).astype(int)
    assert np.abs(view - want.transpose(2, 0, 1)).max() <= 1


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


@pytest.mark.parametrize("width, height, left, top", [(192, 64, 32, 0), (64, 192, 0, 32)])
def test_the_central_crop_is_the_middle_of_the_image_with_its_short_side_resized(
        width, height, left, top):
    image = smooth(width, height)
    whole = np.asarray(image.resize((width // 2, height // 2), Image.BICUBIC)).astype(int)
    want = whole[top:top + 32, left:left + 32].transpose(2, 0, 1)
    assert np.abs(data.center_crop(image, 32) - want).max() <= 1


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
    assert samples[:36] == slow_order(STARTS, 3, 0)[:36]
    assert samples[36:] == slow_order(STARTS, 3, 1)[:36]
    assert ShuffledOrder(STARTS, 40, 3).steps_per_epoch == 1


def test_ten_million_samples_are_ordered_without_listing_them():
    starts = np.arange(0, 10**7 + 1, 1000)
    tracemalloc.start()
    sample = ShuffledOrder(starts, 4096, 5).sample(7, 5_001_234)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6  # bytes; the epoch would be 80 MB
    # position 5,001,234 is number 9,234 of window 78, which begins at 78 * 64,000
    shards = common.rng(Stream.SHARDS, 5, 7).permutation(10_000)[78 * 64:79 * 64]
    samples = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards])
    common.rng(Stream.WINDOW, 5, 7, 78).shuffle(samples)
    assert sample == samples[9234]


# ---- batches ----

@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """An index whose sample i has the key i."""
    folder = tmp_path_factory.mktemp("numbered")
    paths = []
    for shard, n in enumerate(SIZES):
        numbers = range(STARTS[shard], STARTS[shard] + n)
        members = [(f"{i:06d}.txt", b"caption %d" % i) for i in numbers]
        paths.append(write_tar(folder / f"{shard}.tar", members))
    return Index(paths)


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


@pytest.mark.parametrize("positions", [[8, 9, 10], [38, 39, 0, 1]])
@pytest.mark.parametrize("world_size, workers", [(4, 0), (1, 1)])
def test_a_sample_that_cannot_be_used_is_replaced_by_the_next_and_no_other_row_moves(
        numbered, world_size, workers, positions):
    order = slow_order(STARTS, 3, 0)
    want = list(order)
    n_skipped = 0
    for position in positions:
        other = position
        while other % 40 in positions:  # the epoch's last is followed by its first
            other += 1
            n_skipped += 1
        want[position] = order[other % 40]
    example = without({order[p] for p in positions})
    batches = all_ranks(numbered, 5, example, world_size, workers)
    assert batches["n"].flatten().tolist() == want
    counts = dict(zip(data.REASONS, batches["skipped"].sum(0).tolist()))
    assert counts["no image"] == sum(counts.values()) == n_skipped


def test_when_no_sample_can_be_used_the_run_ends_with_one_line(numbered):
    with pytest.raises(UserError, match="none of the 40 samples can be used .40 no image"):
        all_ranks(numbered, 5, without(range(40)), workers=1)


def test_rows_of_two_kinds_alternate_evenly_and_each_has_its_own_order(numbered):
    class Cfg:
        batch = 8
        seed = 3

    sources, share = data.two_sources(Cfg, [numbered, numbered], 0.25, number)
    halves = [data.BatchDataset(sources, 8, rank, 2, share)[0]["n"] for rank in (0, 1)]
    first = slow_order(STARTS, 3, 0)
    second = slow_order(STARTS, 4, 0)
    assert torch.cat(halves).tolist() == [*first[:3], second[0], *first[3:6], second[1]]
    sources, share = data.two_sources(Cfg, [None, numbered], 0.25, number)
    assert data.BatchDataset(sources, 8, share=share)[0]["n"].tolist() == second[:8]
    sources, share = data.two_sources(Cfg, [numbered, None], 0.25, number)
    assert data.BatchDataset(sources, 8, share=share)[0]["n"].tolist() == first[:8]


# ---- loader ----

class Endless(torch.utils.data.Dataset):
    def __getitem__(self, step):
        return {"step": torch.full((1000,), step), "skipped": torch.zeros(len(data.REASONS))}


def start_workers(n):
    """Batches of n workers, and their processes."""
    others = torch.multiprocessing.active_children()  # of other tests
    batches = data.loader(Endless(), 0, 10**6, n, CPU)
    for _ in range(9):  # all workers are at work
        next(batches)
    return batches, [p for p in torch.multiprocessing.active_children() if p not in others]


def test_a_killed_worker_is_one_line():
    batches, (worker,) = start_workers(1)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise in this test
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a loader worker died .*fewer --workers"):
        for _ in range(1000):
            next(batches)
    signal.signal(signal.SIGCHLD, handler)


def test_signals_to_the_group_leave_the_workers_alone_and_close_ends_them():
    batches, workers = start_workers(2)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for worker in workers:
            os.kill(worker.pid, number)
    steps = [int(next(batches)["step"][0]) for _ in range(50)]
    assert steps == list(range(9, 59)) and len(workers) == 2
    batches.close()
    for worker in workers:
        worker.join(5)
        assert not worker.is_alive()


def test_an_exception_in_a_step_ends_the_process_and_its_workers():
    code = """if True:
        import torch, data
        class Endless(torch.utils.data.Dataset):
            def __getitem__(self, step):
                return {"step": torch.zeros(9), "skipped": torch.zeros(9)}
        next(data.loader(Endless(), 0, 10 ** 6, 2, torch.device("cpu")))
        raise KeyError("a mistake in the step")
        """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         timeout=60)
    assert run.returncode == 1 and "a mistake in the step" in run.stderr


def test_too_little_shared_memory_is_one_line_before_the_first_step(monkeypatch):
    n_bytes = sum(x.nbytes for x in Endless()[0].values())

    class Status:
        f_frsize = 1

    def statvfs(folder):
        return Status

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(os.path, "isdir", "/dev/shm".__eq__)
    Status.f_bavail = n_bytes * 5  # a worker makes two, two are in use, one to spare
    data.loader(Endless(), 0, 1, 1, CPU)
    with pytest.raises(UserError, match="/dev/shm has .*--workers 0"):
        data.loader(Endless(), 0, 1, 2, CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="/dev/shm has .*--workers 0"):
        data.loader(Endless(), 0, 1, 1, CPU)
