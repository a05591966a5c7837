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
from common import UserError

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


def files_below(folder):
    """{place: bytes}"""
    files = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            with open(path, "rb") as f:
                files[os.path.relpath(path, folder)] = f.read()
    return files


# ---- making it ----

@pytest.mark.parametrize("stream", ["pairs/train", "pairs/test", "labels/train", "docs/train"])
def test_the_bytes_depend_on_the_arguments_alone(toy_data, tmp_path, stream):
    data.write_toy_shard(f"{tmp_path}/0.tar", stream, range(20), seed=0, noise=0.0, scenes=256)
    raw = (tmp_path / "0.tar").read_bytes().rstrip(b"\0")  # without the end of the archive
    with open(f"{toy_data}/{stream}-00000.tar", "rb") as f:
        assert f.read(len(raw)) == raw and len(raw) > 20 * 1024


def test_an_interrupted_making_leaves_no_part_behind(tmp_path, monkeypatch):
    toy_record = data.toy_record

    def interrupted(stream, number, **options):
        if (stream, number) == ("docs/test", 3):
            raise KeyboardInterrupt
        return toy_record(stream, number, **options)

    monkeypatch.setattr(data, "toy_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.make_toy_data(str(tmp_path), documents=5, parts=("docs",))
    assert files_below(tmp_path) == {}
    monkeypatch.setattr(data, "toy_record", toy_record)
    folder = data.make_toy_data(str(tmp_path), documents=5, parts=("docs",))
    assert set(files_below(folder)) == {"docs/train-00000.tar", "docs/test-00000.tar"}


def test_a_part_that_is_there_is_kept_and_other_arguments_are_another_folder(toy_data, monkeypatch):
    class Made(Exception):
        pass

    def write_toy_part(*args):
        raise Made

    monkeypatch.setattr(data, "write_toy_part", write_toy_part)
    root = os.path.dirname(toy_data)
    assert data.make_toy_data(root, scenes=256, documents=128, parts=data.TOY_PARTS) == toy_data
    for changes in ({"seed": 1}, {"noise": 0.5}, {"scenes": 257}):
        with pytest.raises(Made):
            data.make_toy_data(root, **{"scenes": 256, "documents": 128, **changes})


def test_a_run_without_data_gets_the_toy_data_and_a_mistyped_val_is_an_error(monkeypatch, capsys):
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
    assert data.use_toy_data(Cfg()) == Cfg(["toy/pairs"], None, ["toy/pairs", "toy/labels"])
    assert "--data takes your shards" in capsys.readouterr().out
    assert data.use_toy_data(Cfg(labels=["x.tar"])) == Cfg(labels=["x.tar"])
    with pytest.raises(UserError, match="nowhere: no such test shards"):
        data.use_toy_data(Cfg(data=["x.tar"], val=["nowhere"]))


# ---- classes ----

def test_the_unseen_pairs_hold_each_color_and_each_shape_once(toy_data):
    unseen = [line.split() for line in lines_of(f"{toy_data}/labels/unseen.txt")]
    assert sorted(color for color, _ in unseen) == sorted(data.COLORS)
    assert sorted(shape for _, shape in unseen) == sorted(data.SHAPES)
    classes = lines_of(f"{toy_data}/labels/classes.txt")
    assert len(set(classes)) == 64 and {" ".join(pair) for pair in unseen} < set(classes)


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
    assert labels == set(classes) - set(unseen)
    assert sum(name in texts for name in classes) > 50
    assert not any(name in texts for name in unseen)


def test_the_zero_shot_part_has_sixteen_of_each_class(toy_data):
    samples = read_shards(f"{toy_data}/labels", "test")
    counts = collections.Counter(int(members["cls"]) for _, members in samples)
    assert counts == {label: 16 for label in range(64)}


def test_class_numbers_are_lines_of_the_class_list(toy_data, pairs):
    classes = lines_of(f"{toy_data}/labels/classes.txt")
    singles = [row for row in pairs if len(row.record["boxes"]) == 1]
    assert len(singles) > 80
    for row in pairs:
        boxes = row.record["boxes"]
        assert (row.label is None) == (len(boxes) > 1)
        assert row.label is None or boxes[0]["text"].endswith(f" {classes[row.label]}")
    n_right = 0
    for _, members in read_shards(f"{toy_data}/labels", "test")[:128]:  # here only pixels can tell
        image = pixels_of(members["jpg"]).astype(int)
        areas = {}
        for color, rgb in data.COLORS.items():
            areas[color] = (np.abs(image - 0.95 * np.array(rgb)).max(-1) < 32).sum()
        n_right += max(areas, key=areas.get) == classes[int(members["cls"])].split()[0]
    assert n_right > 120


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
    """Is every word of a caption true of the things? (Backgrounds are not judged.)"""
    body = re.sub(r",? on a (grey|brown|dark|khaki) background$", "", caption)
    form = THING.sub("#", body)
    match = re.fullmatch(
        rf"(?:a picture of |(one) )?#|(?:a picture of )?#(?: and #)+|# (?:{HOW}|with) #"
        rf"|# and # (?:{HOW}) it|(two|three|four) objects: #(?:, #)* and #", form)
    assert match, f"{caption}: {form}"
    named = []
    for words in THING.finditer(body):
        known = [thing for thing in things if thing.name == words["name"]]
        if len(known) != 1:
            return False
        thing = known[0]
        if words["size"] not in (None, thing.size) or words["texture"] not in (None, thing.texture):
            return False
        if words["place"] and not is_at(words["place"], thing):
            return False
        named.append(thing)
    if len({thing.name for thing in named}) < len(named):
        return False
    how = re.search(HOW, form)
    if how:
        a, b = named[::-1] if form.endswith(" it") else named
        if not stands(a, how[0], b):
            return False
    if match.lastindex is None:  # no number in it
        return True
    return COUNTS[match[match.lastindex]] == len(things) == len(named)


def test_every_caption_is_true_of_its_boxes(pairs):
    words = (rf"{HOW}|with|objects|top|bottom|middle|on the left|background|striped|dotted|small"
             "|large")
    counts = collections.Counter()
    for row in pairs:
        captions = row.record["caption"]
        assert len(set(captions)) == 4
        for caption in captions:
            assert is_true(caption, things_of(row.record)), (caption, row.record["boxes"])
            assert len(caption.split()) <= 24
            counts.update(re.findall(words, caption))
    assert len(pairs) == 256 and len(counts) == 15  # all of it was there to be judged


def test_the_reader_of_captions_notices_false_ones(pairs):
    swaps = [("left of", "right of"), ("above", "below"), ("small", "large"),
             ("striped", "dotted"), ("top", "bottom")]
    wrong = {**dict(swaps), **{b: a for a, b in swaps}, "two": "three", "three": "four"}
    noticed = set()
    for row in pairs:
        for caption in row.record["caption"]:
            for word in set(re.findall("|".join(wrong), caption)):
                assert not is_true(caption.replace(word, wrong[word], 1), things_of(row.record))
                noticed.add(word)
    assert noticed == set(wrong)


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


def test_every_question_has_the_one_right_answer(pairs):
    answers = collections.Counter()
    kinds = set()
    for row in pairs:
        for qa in row.record["qa"]:
            assert qa["answer"] == right_answer(qa["question"], things_of(row.record)), qa
            answers[qa["answer"]] += 1
            kinds.add(" ".join(qa["question"].split()[:2]))
    assert kinds == {"is there", "is the", "how many", "what size", "what pattern", "what color",
                     "what shape", "what is"}
    # always "yes" is right half of the time
    assert abs(answers["yes"] - answers["no"]) < 4 * (answers["yes"] + answers["no"])**0.5


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


def test_objects_stay_apart_and_away_from_the_border():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4):
        for _ in range(20):
            area = np.zeros((data.SIDE, data.SIDE), int)
            for x, y, side in zip(*data.layout(rng, n)):
                assert data.MARGIN <= min(x, y) and max(x, y) + side <= data.SIDE - data.MARGIN
                area[y:y + side + 1, x:x + side + 1] += 1  # a pixel between them
            assert area.max() == 1


# ---- noise, seeds, documents ----

def test_noise_changes_about_its_share_of_captions_and_nothing_else():
    clean = [data.toy_record("pairs/train", i, scenes=100) for i in range(100)]
    noisy = [data.toy_record("pairs/train", i, noise=0.5, scenes=100) for i in range(100)]
    captions = [record["json"]["caption"] for record in clean]
    n_swapped = 0
    n_junk = 0
    for a, b in zip(clean, noisy):
        assert a["jpg"].tobytes() == b["jpg"].tobytes() and a.keys() == b.keys()
        assert {**a["json"], "caption": None} == {**b["json"], "caption": None}
        wrong = b["json"]["caption"]
        if wrong == a["json"]["caption"]:
            continue
        if wrong in captions:
            n_swapped += 1
        else:
            assert len(wrong) == 1 and not THING.search(wrong[0])
            n_junk += 1
    assert 35 <= n_swapped + n_junk <= 65  # 50, deviation 5
    assert n_swapped > 10 < n_junk
    held_out = data.toy_record("pairs/test", 3, noise=1.0, scenes=100)
    assert held_out["json"] == data.toy_record("pairs/test", 3, scenes=100)["json"]


def test_seeds_and_parts_draw_numbers_of_their_own():
    images = [data.toy_record(stream, number, seed)["jpg"].tobytes()
              for stream in ("pairs/train", "pairs/test", "labels/train")
              for number in (0, 1) for seed in (0, 1)]
    assert len(set(images)) == 12


def test_documents_name_their_pictures_and_the_sentences_about_them(toy_data):
    n_chatter = 0
    n_asides = 0
    documents = read_shards(f"{toy_data}/docs")
    assert len(documents) == 128
    for key, members in documents:
        record = json.loads(members["json"])
        texts = record["text_list"]
        names = [info["image_name"] for info in record["image_info"]]
        places = [info["matched_text_index"] for info in record["image_info"]]
        assert names == [f"{key}.{suffix}" for suffix in members if suffix != "json"]
        assert 2 <= len(names) <= 3 and places == sorted(set(places)) and places[-1] < len(texts)
        for info in record["image_info"]:
            assert 0.23 <= info["matched_sim"] <= 0.4
        for place in places:  # a sentence about the picture: a caption
            assert THING.search(texts[place].lower()) and texts[place] not in data.CHATTER
            assert not re.match("The |We can see", texts[place])
        asides = [text for text in texts if " in the first picture was " in text]
        assert len(set(asides)) <= 1
        n_chatter += any(text in data.CHATTER for text in texts)
        n_asides += len(asides) > 0
    assert n_chatter > 40 and n_asides > 20
