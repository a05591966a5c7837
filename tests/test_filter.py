"""ALIGN's filter rules: both sides of each threshold, what counts as a copy, what is written."""
import io
import json
import os
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError

# thresholds under which the rules that count on nothing but their own subject drop nothing
LOOSE = {"min_side": 0, "max_ratio": 1e9, "min_words": 0, "max_words": 10**6}


def encode(image, kind="PNG", **options):
    raw = io.BytesIO()
    image.save(raw, kind, **options)
    return raw.getvalue()


def flat(width, height, shade=0):
    return encode(Image.new("RGB", (width, height), (shade, shade, shade)))


def waves(seed, size=(96, 64)):
    """A smooth picture of its own, as photographs are when they are made small."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size[1], :size[0]]
    image = np.zeros((size[1], size[0], 3))
    for _ in range(6):
        across, down, phase = rng.uniform(-3, 3, 3)
        wave = np.sin(2 * np.pi * (across * x / size[0] + down * y / size[1]) + phase)
        image += wave[..., None] * rng.uniform(-1, 1, 3)
    return Image.fromarray(np.uint8(128 + 40 * image.clip(-3, 3)))


def write_shards(folder, records, per_shard=1000):
    """Shards of (image bytes, text, list of texts or record)."""
    folder.mkdir()
    for first in range(0, len(records), per_shard):
        with tarfile.open(folder / f"train-{first // per_shard:05d}.tar", "w") as tar:
            for i, (raw, text) in enumerate(records[first:first + per_shard], first):
                data.add_file(tar, f"k{i}.png", raw)
                if isinstance(text, str):
                    data.add_file(tar, f"k{i}.txt", text.encode())
                else:
                    record = text if isinstance(text, dict) else {"caption": text}
                    data.add_file(tar, f"k{i}.json", json.dumps(record).encode())
    return data.expand(str(folder))


@pytest.fixture
def filtered(tmp_path, capsys):
    """filtered(records) -> numbers of the samples left, {rule or reason: how many it dropped}."""
    def run(records, against=(), **thresholds):
        number = len(os.listdir(tmp_path))
        paths = write_shards(tmp_path / f"in{number}", records)
        data.filter_pairs(paths, str(tmp_path / f"out{number}"), against, **thresholds)
        counts = re.findall(r"^ +(\d+) ([\w ]+):", capsys.readouterr().out, re.M)
        index = data.Index(data.expand(str(tmp_path / f"out{number}")))
        left = [int(index[i].key[1:]) for i in range(len(index))]
        return left, {rule: int(count) for count, rule in counts if int(count)}
    return run


# ---- thresholds (paper s3); the defaults are the paper's ----

@pytest.mark.parametrize("rule, too_small, large_enough", [
    ("I2", (200, 300), (201, 300)), ("I2", (300, 200), (300, 201)),
    ("I3", (603, 201), (602, 201)), ("I3", (201, 603), (201, 602)),
])
def test_the_shorter_side_must_exceed_200_pixels_and_a_third_of_the_longer_one(
        filtered, rule, too_small, large_enough):
    records = [(flat(*too_small), "a b c 0"), (flat(*large_enough), "a b c 1")]
    assert filtered(records) == ([1], {rule: 1})


def test_the_sides_are_the_originals_where_img2dataset_gives_them(filtered):
    records = []
    for i, width in enumerate((201, 200, None)):
        record = {"caption": "a b c", "original_width": width, "original_height": 300}
        records.append((flat(8, 8, 9 * i), record))
    assert filtered(records) == ([0], {"I2": 2})


def test_a_text_must_have_3_to_20_unigrams(filtered):
    texts = [" ".join(["word"] * n) for n in (2, 3, 20, 21)]
    texts += ["A dog's snow-white , ... !", "A dog's snow-white", "one-two two"]
    records = [(flat(250, 250, i), text) for i, text in enumerate(texts)]
    assert filtered(records) == ([1, 2, 4, 5], {"T3": 3, "left": 3})


def test_a_text_may_be_shared_by_10_images_but_not_by_11(filtered):
    texts = ["shared by ten"] * 10 + ["shared by eleven"] * 11 + ["of one image"] * 12
    # the last twelve samples show one image; the first text's eleventh is too small to count
    records = [(flat(250, 250, min(i, 21)), text) for i, text in enumerate(texts)]
    records.append((flat(100, 250), "shared by ten"))
    assert filtered(records) == ([*range(10), *range(21, 33)], {"I2": 1, "T1": 11, "left": 11})


def test_an_image_may_have_1000_texts_but_not_1001(filtered):
    texts = [f"text number {i}" for i in range(1001)]
    images = [flat(250, 250, shade) for shade in (1, 2, 2)]  # the second in two samples
    records = list(zip(images, [texts[:1000] + texts[:9], texts[:500], texts[500:]]))
    assert filtered(records, max_images=1000) == ([0], {"I4": 2})


def test_a_rare_bigram_of_frequent_words_is_enough(filtered):
    texts = ["red dog red", "red dog red", "red red dog"]
    records = [(flat(250, 250, i), text) for i, text in enumerate(texts)]
    # counts: red 6, dog 3, "red dog" 3, "dog red" 2, "red red" 1
    assert filtered(records, most_frequent=4) == ([0, 1], {"T2": 1, "left": 1})


# ---- copies of evaluation images ----

def test_copies_of_evaluation_images_are_found_and_other_images_are_not(tmp_path, filtered):
    records = []
    for i in range(5):
        copy = np.asarray(waves(i).resize((48, 32), Image.BICUBIC))
        noise = np.random.default_rng(i).normal(0, 6, copy.shape)
        copy = Image.fromarray(np.uint8((copy + noise).clip(0, 255)))
        records.append((encode(copy.convert("L")), f"text {i}"))
    records += [(encode(waves(i)), f"text {i}") for i in range(100, 140)]
    held_out = [(encode(waves(i), "JPEG", quality=70), {}) for i in range(5)]  # without texts
    against = write_shards(tmp_path / "eval", held_out + [(b"no image", {})])
    assert filtered(records, against, **LOOSE) == ([*range(5, 45)], {"I5": 5})


def picture_of_bits(bits):
    """A 9 x 8 picture: a pixel is brighter than its right neighbor where bits (8, 8) are 1."""
    steps = np.where(bits, -1, 1)
    return Image.fromarray(np.uint8(128 + np.pad(steps, ((0, 0), (1, 0))).cumsum(1)))


@pytest.mark.parametrize("distance, left", [(3, [0, 1]), (4, [1])])
def test_images_are_copies_if_they_differ_in_at_most_distance_bits(
        tmp_path, filtered, distance, left):
    bits = np.random.default_rng(1).integers(0, 2, (8, 8))
    records = []
    for n in (4, 5):
        other = bits.copy()
        other.flat[[3, 17, 31, 40, 63][:n]] ^= 1
        records.append((encode(picture_of_bits(other)), f"text {n}"))
    against = write_shards(tmp_path / "eval", [(encode(picture_of_bits(bits)), "a")])
    assert filtered(records, against, **LOOSE, distance=distance)[0] == left


# ---- what is written ----

def test_samples_are_copied_as_they_are_and_shards_keep_apart(tmp_path):
    records = []
    for i in range(7):
        text = {"caption": f"text {i}", "other": [1, None]} if i % 2 else f"text  {i}"
        records.append((encode(waves(i, (40, 30) if i == 6 else (96, 64))), text))
    paths = write_shards(tmp_path / "in", records, per_shard=2)
    data.filter_pairs(paths, str(tmp_path / "out"), **{**LOOSE, "min_side": 50})
    before = data.Index(paths)
    after = data.Index(data.expand(str(tmp_path / "out")))
    assert after.starts.tolist() == [0, 2, 4, 6]  # the fourth shard would be empty
    assert [before[i].members for i in range(6)] == [after[i].members for i in range(6)]


def test_of_several_captions_those_that_fail_go(tmp_path, filtered):
    good = ["this one is fine", "so  is this"]
    records = [(encode(waves(0)), {"captions": ["one", *good], "boxes": []}),
               (encode(waves(1)), ["one", "two words"])]
    assert filtered(records, min_side=0) == ([0], {"T3": 3, "left": 1})
    sample = data.Index(data.expand(str(tmp_path / "out0")))[0]
    assert sample.json == {"caption": ["this one is fine", "so is this"], "boxes": []}


def test_what_cannot_be_used_is_dropped_and_counted(filtered):
    records = [(encode(waves(0)), "a good text"), (b"?", "a good text"), (encode(waves(1)), {}),
               (encode(waves(2)), " ")]
    assert filtered(records, min_side=0) == (
        [0], {"unreadable image": 1, "no caption": 1, "empty caption": 1})


def test_an_occupied_folder_and_an_empty_result_are_refused(tmp_path):
    paths = write_shards(tmp_path / "in", [(flat(250, 250), "a good text")])
    with pytest.raises(UserError, match="already holds train-"):  # never onto its own source
        data.filter_pairs(paths, str(tmp_path / "in"))
    with pytest.raises(UserError, match="none of 1 samples is left"):
        data.filter_pairs(paths, str(tmp_path / "new"), min_side=250)
    assert os.listdir(tmp_path / "new") == []


def test_the_command_takes_thresholds_and_shards_of_an_evaluation_set(tmp_path, capsys):
    paths = write_shards(tmp_path / "in", [(encode(waves(i)), f"a picture {i}") for i in range(3)])
    held_out = write_shards(tmp_path / "eval", [(encode(waves(1)), "x")])
    data.main(["filter", *paths, "--against", *held_out, "--out", str(tmp_path / "out"),
               "--min-side", "10", "--distance", "0", "--split", "test"])
    assert "2 of 3 samples kept" in capsys.readouterr().out
    assert os.listdir(tmp_path / "out") == ["test-00000.tar"]
