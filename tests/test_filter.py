"""ALIGN's filter rules: both sides of each threshold, what counts as a copy, what is written."""
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError
from conftest import encoded


def flat(width, height, shade=0):
    return encoded(Image.new("RGB", (width, height), (shade, shade, shade)))


def blurry(seed):
    """A smooth picture of its own, as photographs are when they are made small."""
    grid = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((96, 64), Image.BICUBIC)


def write_samples(folder, records, per_shard=1000):
    """Shards of (image bytes, text or record); the keys are numbers. -> paths"""
    samples = []
    for i, (raw, text) in enumerate(records):
        if isinstance(text, str):
            samples.append((str(i), {"png": raw, "txt": text.encode()}))
        else:
            samples.append((str(i), {"png": raw, "json": json.dumps(text).encode()}))
    shards = [samples[i:i + per_shard] for i in range(0, len(samples), per_shard)]
    data.write_shards(shards, str(folder), "train")
    return data.expand(str(folder))


@pytest.fixture
def filtered(tmp_path, capsys):
    """filtered(records) -> numbers of the samples left, {rule or reason: how many it dropped}."""
    def run(records, against=(), **thresholds):
        paths = write_samples(tmp_path / "in", records)
        data.filter_pairs(paths, str(tmp_path / "out"), against, **thresholds)
        counts = re.findall(r"^ +(\d+) ([\w ]+):", capsys.readouterr().out, re.M)
        index = data.Index(data.expand(str(tmp_path / "out")))
        left = [int(index.key(i)) for i in range(len(index))]
        return left, {rule: int(count) for count, rule in counts if int(count)}
    return run


# ---- thresholds (paper s3); the defaults are the paper's ----

def test_the_shorter_side_must_exceed_200_pixels_and_a_third_of_the_longer_one(filtered):
    sizes = [(200, 300), (201, 300), (300, 200), (300, 201),
             (603, 201), (602, 201), (201, 603), (201, 602)]
    records = [(flat(*size), f"a b c {i}") for i, size in enumerate(sizes)]
    assert filtered(records) == ([1, 3, 5, 7], {"I2": 2, "I3": 2})


def test_the_sides_are_the_originals_where_img2dataset_gives_them(filtered):
    record = {"caption": "a b c", "original_height": 300}
    records = [(flat(8, 8, i), {**record, "original_width": width})
               for i, width in enumerate((201, 200, None))]
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
    records = [(flat(250, 250, 1), {"caption": texts[:1000] + texts[:9]}),
               (flat(250, 250, 2), {"caption": texts[:500]}),  # one image in two samples
               (flat(250, 250, 2), {"caption": texts[500:]})]
    assert filtered(records, max_images=1000) == ([0], {"I4": 2})


def test_a_rare_bigram_of_frequent_words_is_enough(filtered):
    texts = ["red dog red", "red dog red", "red red dog"]
    records = [(flat(250, 250, i), text) for i, text in enumerate(texts)]
    # counts: red 6, dog 3, "red dog" 3, "dog red" 2, "red red" 1
    assert filtered(records, most_frequent=4) == ([0, 1], {"T2": 1, "left": 1})


# ---- copies of evaluation images ----

def test_copies_of_evaluation_images_are_found_and_other_images_are_not(tmp_path, filtered):
    records = [(encoded(blurry(i).resize((48, 32)).convert("L"), "JPEG", quality=70), f"a copy {i}")
               for i in range(5)]
    records += [(encoded(blurry(i)), f"another picture {i}") for i in range(100, 140)]
    held_out = [(encoded(blurry(i)), {}) for i in range(5)]  # without texts
    against = write_samples(tmp_path / "eval", held_out + [(b"no image", {})])
    assert filtered(records, against, min_side=0) == ([*range(5, 45)], {"I5": 5})


def picture_of_bits(bits):
    """A 9 x 8 picture: a pixel is brighter than its right neighbor where bits (8, 8) are 1."""
    steps = np.where(bits, -1, 1)
    return Image.fromarray(np.uint8(128 + np.pad(steps, ((0, 0), (1, 0))).cumsum(1)))


@pytest.mark.parametrize("distance, left", [(3, ["0", "1"]), (4, ["1"])])
def test_the_command_drops_images_that_differ_in_at_most_distance_bits(tmp_path, distance, left):
    bits = np.random.default_rng(1).integers(0, 2, (8, 8))
    records = []
    for n in (4, 5):
        other = bits.copy()
        other.flat[[3, 17, 31, 40, 63][:n]] ^= 1
        records.append((encoded(picture_of_bits(other)), f"a text {n}"))
    paths = write_samples(tmp_path / "in", records)
    held_out = write_samples(tmp_path / "eval", [(encoded(picture_of_bits(bits)), "a")])
    data.main(["filter", *paths, "--against", *held_out, "--out", str(tmp_path / "out"),
               "--split", "test", "--min-side", "0", "--distance", str(distance)])
    index = data.Index([tmp_path / "out" / "test-00000.tar"])
    assert [index.key(i) for i in range(len(index))] == left


# ---- what is written ----

def test_samples_are_copied_as_they_are_and_shards_keep_apart(tmp_path):
    records = [(flat(60, 60, i), {"caption": f"a text {i}", "other": [None]}) for i in range(3)]
    records += [(flat(60, 60, i), f"a  text {i}") for i in range(3, 6)]
    records.append((flat(40, 40), "too small"))
    paths = write_samples(tmp_path / "in", records, per_shard=2)
    data.filter_pairs(paths, str(tmp_path / "out"), min_side=50)
    before = data.Index(paths)
    after = data.Index(data.expand(str(tmp_path / "out")))
    assert after.starts.tolist() == [0, 2, 4, 6]  # the fourth shard would be empty
    assert [before[i].members for i in range(6)] == [after[i].members for i in range(6)]


def test_of_several_captions_those_that_fail_go_and_what_cannot_be_used_is_counted(
        tmp_path, filtered):
    good = ["this one is fine", "so  is this"]
    records = [(flat(250, 250), {"captions": ["one", *good], "boxes": []}),
               (flat(250, 250, 1), {"caption": ["one", "two words"]}),
               (b"?", "a good text"), (flat(250, 250, 2), {}), (flat(250, 250, 3), " ")]
    reasons = {"unreadable image": 1, "no caption": 1, "empty caption": 1}
    assert filtered(records) == ([0], {"T3": 3, "left": 1, **reasons})
    sample = data.Index(data.expand(str(tmp_path / "out")))[0]
    assert sample.json == {"caption": ["this one is fine", "so is this"], "boxes": []}


def test_an_occupied_folder_and_an_empty_result_are_refused(tmp_path):
    paths = write_samples(tmp_path / "in", [(flat(250, 250), "a good text")])
    with pytest.raises(UserError, match="already holds train-"):  # never onto its own source
        data.filter_pairs(paths, str(tmp_path / "in"))
    with pytest.raises(UserError, match="none of 1 samples is left"):
        data.filter_pairs(paths, str(tmp_path / "new"), min_side=250)
    assert os.listdir(tmp_path / "new") == []
