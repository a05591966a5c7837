"""The toy data, read back by other means than it was written with."""
import collections
import io
import json
import os
import re
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
import m3i

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


@pytest.fixture(scope="module")
def pairs(toy_data):
    """(record, {suffix: bytes}) of the training scenes."""
    samples = read_shards(f"{toy_data}/pairs")
    return [(json.loads(members["json"]), members) for _, members in samples]


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


def test_a_part_that_is_there_is_kept_and_an_interrupted_making_leaves_none(
        toy_data, tmp_path, monkeypatch):
    def write_toy_part(folder, *args):
        data.write_lines(f"{folder}/train-00000.tar", ["half of it"])
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "write_toy_part", write_toy_part)
    sizes = {"scenes": 256, "documents": 128}
    root = os.path.dirname(toy_data)
    assert data.make_toy_data(root, **sizes, parts=data.TOY_PARTS) == toy_data
    for changes in ({"seed": 1}, {"noise": 0.5}, {"scenes": 257}):  # are another folder
        with pytest.raises(KeyboardInterrupt):
            data.make_toy_data(root, **{**sizes, **changes})
    with pytest.raises(KeyboardInterrupt):
        data.make_toy_data(str(tmp_path), parts=["docs"])
    assert list(tmp_path.rglob("*.tar")) == [] and list(tmp_path.rglob("docs")) == []


def test_a_run_without_data_gets_the_toy_data(monkeypatch):
    def make_toy_data(parts):
        return "+".join(parts)

    monkeypatch.setattr(data, "make_toy_data", make_toy_data)
    cfg = data.use_toy_data(m3i.Config(), data="pairs", labels="labels")
    assert cfg.data == ["pairs+labels/pairs"] and cfg.labels == ["pairs+labels/labels"]
    assert cfg.val == [*cfg.data, *cfg.labels]
    cfg = m3i.Config(labels=["x.tar"])
    assert data.use_toy_data(cfg) is cfg


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
    for record, members in pairs:
        boxes = record["boxes"]
        assert ("cls" in members) == (len(boxes) == 1)
        if "cls" in members:
            assert boxes[0]["text"].endswith(f" {classes[int(members['cls'])]}")
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


def is_at(place, thing):
    """Is the center in this third of the width and of the height?"""
    return (("left" in place) == (thing.cx < 28) and ("right" in place) == (thing.cx > 36)
            and ("top" in place) == (thing.cy < 28) and ("bottom" in place) == (thing.cy > 36))


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
    wrong = {"left of": "right of", "above": "below", "small": "large", "dotted": "striped",
             "top": "bottom", "two": "three"}
    noticed = set()
    for record, _ in pairs:
        things = things_of(record)
        assert len(set(record["caption"])) == 4
        for caption in record["caption"]:
            assert is_true(caption, things) and len(caption.split()) <= 24, caption
            for word in set(re.findall("|".join(wrong), caption)):
                assert not is_true(caption.replace(word, wrong[word], 1), things)
                noticed.add(word)
    assert len(pairs) == 256 and noticed == set(wrong)


def yes_if(condition):
    return "yes" if condition else "no"


def right_answers(things):
    """{question: its answer}, of all questions that have exactly one."""
    names = [thing.name for thing in things]
    colors = [thing.color for thing in things]
    shapes = [thing.shape for thing in things]
    answers = {"how many objects are there?": str(len(things))}
    for color in colors:
        answers[f"how many {color} objects are there?"] = str(colors.count(color))
    for color, shape in data.PAIRS:
        answers[f"is there a {color} {shape}?"] = yes_if(f"{color} {shape}" in names)
    for a in things:
        answers[f"what size is the {a.name}?"] = a.size
        answers[f"what pattern has the {a.name}?"] = a.texture or "plain"
        for size in ("small", "large"):
            answers[f"is the {a.name} {size}?"] = yes_if(a.size == size)
        if shapes.count(a.shape) == 1:
            answers[f"what color is the {a.shape}?"] = a.color
        if colors.count(a.color) == 1:
            answers[f"what shape is the {a.color} object?"] = a.shape
        for how in HOW.split("|"):
            for b in things:
                answers[f"is the {a.name} {how} the {b.name}?"] = yes_if(stands(a, how, b))
            standing = [b.name for b in things if stands(b, how, a)]
            if len(standing) == 1:
                answers[f"what is {how} the {a.name}?"] = standing[0]
    return answers


def test_every_question_has_the_one_right_answer_and_yes_is_as_likely_as_no(pairs):
    counts = collections.Counter()
    for record, _ in pairs:
        answers = right_answers(things_of(record))
        for qa in record["qa"]:
            assert qa["answer"] == answers[qa["question"]], qa
            counts[qa["answer"]] += 1
    assert counts["yes"] + counts["no"] == 256
    assert abs(counts["yes"] - counts["no"]) < 4 * 16  # deviation 16


# ---- pixels ----

def test_masks_and_pixels_under_the_boxes_are_what_the_boxes_say(pairs):
    for record, members in pairs[:150]:
        image = np.array(Image.open(io.BytesIO(members["jpg"])))
        mask = np.array(Image.open(io.BytesIO(members["seg.png"])))
        rest = mask.copy()
        for box, thing in zip(record["boxes"], things_of(record)):
            area = (slice(box["y"], box["y"] + box["h"]), slice(box["x"], box["x"] + box["w"]))
            inside = mask[area] > 0
            assert set(mask[area][inside]) == {1 + data.SHAPE_NAMES.index(thing.shape)}
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()  # the box is tight
            rgb = np.median(image[area][inside], 0)
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
