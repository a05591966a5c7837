"""The toy data, read back by other means than it was written with."""
import collections
import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data

HOW = "left of|right of|above|below"
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4}
THING = re.compile(
    r"(?:a )?(?:(?P<size>small|large) )?(?:(?P<texture>striped|dotted) )?"
    rf"(?P<name>(?P<color>{'|'.join(data.COLORS)}) (?P<shape>{'|'.join(data.SHAPES)}))"
    r"(?P<place> (?:at the (?:top|bottom)(?: left| right)?|on the (?:left|right)|in the middle))?"
    r"\b")


def read_shards(folder, split="train"):
    """(key, {suffix: bytes}) of every sample, by Python's own tarfile."""
    samples = {}
    for path in data.expand(folder, split):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".", 1)
                samples.setdefault((path, key), {})[suffix] = tar.extractfile(member).read()
    return [(key, members) for (_, key), members in samples.items()]


def pixels_of(raw):
    return np.asarray(Image.open(io.BytesIO(raw)))


@pytest.fixture(scope="module")
def pairs(toy_data):
    """Records, image and mask (H, W[, 3]) and class or None of the training scenes."""
    rows = []
    for _, members in read_shards(f"{toy_data}/pairs"):
        label = int(members["cls"]) if "cls" in members else None
        rows.append(SimpleNamespace(record=json.loads(members["json"]), label=label,
                                    image=pixels_of(members["jpg"]),
                                    mask=pixels_of(members["seg.png"])))
    return rows


def lines_of(path):
    with open(path) as f:
        return f.read().splitlines()


# ---- making it ----

@pytest.mark.parametrize("stream", ["pairs/train", "docs/train"])
def test_the_bytes_depend_on_the_arguments_alone(toy_data, tmp_path, stream):
    data.write_toy_shard(f"{tmp_path}/0.tar", stream, range(20), seed=0, noise=0.0, scenes=256)
    raw = (tmp_path / "0.tar").read_bytes().rstrip(b"\0")  # without the end of the archive
    with open(f"{toy_data}/{stream}-00000.tar", "rb") as f:
        assert f.read(len(raw)) == raw and len(raw) > 20 * 1024


def interrupted_part(folder, *args):
    """In place of data.write_toy_part."""
    data.write_lines(f"{folder}/train-00000.tar", ["half of it"])
    raise KeyboardInterrupt


def test_an_interrupted_making_leaves_no_part_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "write_toy_part", interrupted_part)
    with pytest.raises(KeyboardInterrupt):
        data.make_toy_data(str(tmp_path), documents=5, parts=("docs",))
    assert list(tmp_path.rglob("*.tar")) == [] and list(tmp_path.rglob("docs")) == []


def test_a_part_that_is_there_is_kept_and_other_arguments_are_another_folder(toy_data, monkeypatch):
    monkeypatch.setattr(data, "write_toy_part", interrupted_part)
    root = os.path.dirname(toy_data)
    assert data.make_toy_data(root, scenes=256, documents=128, parts=data.TOY_PARTS) == toy_data
    for changes in ({"seed": 1}, {"noise": 0.5}, {"scenes": 257}):
        with pytest.raises(KeyboardInterrupt):
            data.make_toy_data(root, **{"scenes": 256, "documents": 128, **changes})


def test_a_run_without_data_gets_the_toy_data(monkeypatch):
    @dataclass
    class Cfg:
        data: list = None
        labels: list = None
        val: list = None

    def make_toy_data(parts):
        assert parts == ("pairs", "labels")
        return "toy"

    monkeypatch.setattr(data, "make_toy_data", make_toy_data)
    both = data.use_toy_data(Cfg(), data="pairs", labels="labels")
    assert both == Cfg(["toy/pairs"], ["toy/labels"], ["toy/pairs", "toy/labels"])
    assert data.use_toy_data(Cfg(labels=["x.tar"])) == Cfg(labels=["x.tar"])


# ---- classes ----

def test_no_unseen_pair_is_shown_or_named_in_training(toy_data):
    classes = lines_of(f"{toy_data}/labels/classes.txt")
    unseen = lines_of(f"{toy_data}/labels/unseen.txt")
    labels = set()
    texts = ""
    for part in data.TOY_PARTS:
        for _, members in read_shards(f"{toy_data}/{part}"):
            texts += members.get("json", b"").decode() + "\n"
            if "cls" in members:
                labels.add(classes[int(members["cls"])])
    assert len(set(classes)) == 64 and labels == set(classes) - set(unseen)
    assert sum(name in texts for name in classes) > 50
    assert not any(name in texts for name in unseen)


def test_class_numbers_are_lines_of_the_class_list(toy_data, pairs):
    classes = lines_of(f"{toy_data}/labels/classes.txt")
    for row in pairs:
        boxes = row.record["boxes"]
        assert (row.label is None) == (len(boxes) > 1)
        assert row.label is None or boxes[0]["text"].endswith(f" {classes[row.label]}")
    samples = read_shards(f"{toy_data}/labels", "test")
    counts = collections.Counter(int(members["cls"]) for _, members in samples)
    assert counts == {label: 16 for label in range(64)}


# ---- captions and questions, by a reader of their grammar ----

def things_of(record):
    """The boxes of a record, each with the words of its text and its center."""
    things = []
    for box in record["boxes"]:
        words = THING.fullmatch(box["text"]).groupdict()
        things.append(SimpleNamespace(**words, cx=box["x"] + box["w"] / 2,
                                      cy=box["y"] + box["h"] / 2))
        assert words["size"] and not words["place"]
    return things


def stands(a, how, b):
    dx = a.cx - b.cx
    dy = a.cy - b.cy
    return {"left of": dx < -abs(dy), "right of": dx > abs(dy), "above": dy < -abs(dx),
            "below": dy > abs(dx)}[how]


def is_third(x, low, high):
    """Is x in the low, high or (neither) middle third? A margin of 2 pixels is nobody's."""
    if low:
        return x < 28
    if high:
        return x > 36
    return 26 < x < 38


def is_at(place, thing):
    return (is_third(thing.cx, "left" in place, "right" in place)
            and is_third(thing.cy, "top" in place, "bottom" in place))


def is_true(caption, things):
    """Is what the caption says of objects, their relation and number true of the things?"""
    named = []
    for words in THING.finditer(caption):
        known = [thing for thing in things if thing.name == words["name"]]
        if len(known) != 1 or known[0] in named:
            return False
        thing = known[0]
        if words["size"] not in (None, thing.size) or words["texture"] not in (None, thing.texture):
            return False
        if words["place"] and not is_at(words["place"], thing):
            return False
        named.append(thing)
    how = re.search(HOW, caption)
    if how:
        a, b = named[::-1] if " it" in caption else named
        if not stands(a, how[0], b):
            return False
    number = re.match("(one|two|three|four) ", caption)
    return number is None or COUNTS[number[1]] == len(things) == len(named)


def test_every_caption_is_true_of_its_boxes_and_would_be_false_with_another_word(pairs):
    swaps = [("left of", "right of"), ("above", "below"), ("small", "large"),
             ("striped", "dotted"), ("top", "bottom")]
    wrong = {**dict(swaps), **{b: a for a, b in swaps}, "two": "three", "three": "four"}
    noticed = set()
    for row in pairs:
        things = things_of(row.record)
        captions = row.record["caption"]
        assert len(set(captions)) == 4
        for caption in captions:
            assert is_true(caption, things), (caption, row.record["boxes"])
            assert len(caption.split()) <= 24
            for word in set(re.findall("|".join(wrong), caption)):
                assert not is_true(caption.replace(word, wrong[word], 1), things)
                noticed.add(word)
    assert len(pairs) == 256 and noticed == set(wrong)


def right_answer(question, things):
    """The answers that fit, joined with commas: one if the question is a good one."""
    by_name = {thing.name: thing for thing in things}
    match = re.fullmatch(r"is there a (\w+ \w+)\?", question)
    if match:
        return "yes" if match[1] in by_name else "no"
    match = re.fullmatch(r"is the (\w+ \w+) (small|large)\?", question)
    if match:
        return "yes" if by_name[match[1]].size == match[2] else "no"
    match = re.fullmatch(rf"is the (\w+ \w+) ({HOW}) the (\w+ \w+)\?", question)
    if match:
        return "yes" if stands(by_name[match[1]], match[2], by_name[match[3]]) else "no"
    match = re.fullmatch(r"how many (?:(\w+) )?objects are there\?", question)
    if match:
        return str(sum(match[1] in (None, thing.color) for thing in things))
    match = re.fullmatch(r"what size is the (\w+ \w+)\?", question)
    if match:
        return by_name[match[1]].size
    match = re.fullmatch(r"what pattern has the (\w+ \w+)\?", question)
    if match:
        return by_name[match[1]].texture or "plain"
    match = re.fullmatch(r"what color is the (\w+)\?", question)
    if match:
        return ",".join(thing.color for thing in things if thing.shape == match[1])
    match = re.fullmatch(r"what shape is the (\w+) object\?", question)
    if match:
        return ",".join(thing.shape for thing in things if thing.color == match[1])
    match = re.fullmatch(rf"what is ({HOW}) the (\w+ \w+)\?", question)
    here = by_name[match[2]]
    return ",".join(t.name for t in things if t is not here and stands(t, match[1], here))


def test_every_question_has_the_one_right_answer_and_yes_is_as_likely_as_no(pairs):
    answers = collections.Counter()
    for row in pairs:
        for qa in row.record["qa"]:
            assert qa["answer"] == right_answer(qa["question"], things_of(row.record)), qa
            answers[qa["answer"]] += 1
    assert answers["yes"] + answers["no"] == 256
    assert abs(answers["yes"] - answers["no"]) < 4 * 16  # deviation 16


# ---- pixels ----

def test_masks_and_pixels_under_the_boxes_are_what_the_boxes_say(pairs):
    for row in pairs[:150]:
        rest = row.mask.copy()
        for box, thing in zip(row.record["boxes"], things_of(row.record)):
            area = (slice(box["y"], box["y"] + box["h"]), slice(box["x"], box["x"] + box["w"]))
            inside = row.mask[area] > 0
            assert set(row.mask[area][inside]) == {1 + data.SHAPE_NAMES.index(thing.shape)}
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()  # the box is tight
            rgb = np.median(row.image[area][inside], 0)
            distances = {name: np.abs(rgb - known).sum() for name, known in data.COLORS.items()}
            assert thing.texture or min(distances, key=distances.get) == thing.color
            assert (thing.size == "large") == (max(box["w"], box["h"]) > 23)
            rest[area] = 0
        assert not rest.any()


# ---- noise, documents ----

def test_noise_changes_about_its_share_of_captions_and_nothing_else():
    n_swapped = 0
    n_junk = 0
    for i in range(100):
        clean = data.toy_record("pairs/train", i, scenes=100)
        noisy = data.toy_record("pairs/train", i, noise=0.5, scenes=100)
        assert clean["jpg"].tobytes() == noisy["jpg"].tobytes()
        caption = noisy["json"].pop("caption")
        if caption != clean["json"].pop("caption"):
            n_junk += len(caption) == 1  # boilerplate
            n_swapped += len(caption) == 4  # of another scene
        assert clean["json"] == noisy["json"]
    assert 35 <= n_swapped + n_junk <= 65  # 50, deviation 5
    assert n_swapped > 10 < n_junk
    held_out = data.toy_record("pairs/test", 3, noise=1.0, scenes=100)
    assert held_out["json"] == data.toy_record("pairs/test", 3, scenes=100)["json"]


def test_documents_name_their_pictures_and_the_sentences_about_them(toy_data):
    documents = read_shards(f"{toy_data}/docs")
    assert len(documents) == 128
    for key, members in documents:
        record = json.loads(members["json"])
        texts = record["text_list"]
        names = [info["image_name"] for info in record["image_info"]]
        places = [info["matched_text_index"] for info in record["image_info"]]
        assert names == [f"{key}.{suffix}" for suffix in members if suffix != "json"]
        assert 2 <= len(names) <= 3 and places == sorted(set(places))
        for place in places:  # a sentence about the picture: a caption
            assert THING.search(texts[place].lower()) and texts[place] not in data.CHATTER
            assert not re.match("The |We can see", texts[place])
