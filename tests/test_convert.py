"""Converters: what of each layout reaches a reader, and what a record that cannot be used costs."""
import io
import json
import os
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError


def image_bytes(shade, kind="JPEG"):
    raw = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 20, 30)).save(raw, kind)
    return raw.getvalue()


def shade_of(sample):
    """Which image this is: files are copied as they are."""
    return {image_bytes(10 * k): k for k in range(1, 26)}[sample.members["jpg"]]


def coco_name(i):
    return f"COCO_train2014_{i:012d}.jpg"


@pytest.fixture
def folder(tmp_path):
    """A folder with three images of their own shades in images/train2014."""
    for i in (1, 2, 3):
        write(tmp_path / "images" / "train2014" / coco_name(i), image_bytes(10 * i))
    return tmp_path


def write(path, raw):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)


def write_json(folder, name, value):
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return str(folder / name)


def convert(folder, layout, *sources, images="images", **options):
    """The samples that data.convert writes, in order. They must pass data.check."""
    data.convert(layout, list(sources), str(folder / images), str(folder / "out"), **options)
    split = "train" if options.get("split", "train") == "train" else "test"
    paths = data.expand(str(folder / "out"), split)
    assert data.check(paths) is False
    index = data.Index(paths)
    return [index[i] for i in range(len(index))]


def dropped(capsys):
    """The report's {reason: (how often, places)}."""
    lines = re.findall(r"^ *(\d+) dropped: (.*) \((.*?)\)$", capsys.readouterr().out, re.M)
    return {reason: (int(count), places) for count, reason, places in lines}


def coco(annotations, **lists):
    images = [{"id": i, "file_name": coco_name(i)} for i in (3, 1, 2)]
    return {"images": images, "annotations": annotations, **lists}


# ---- captions ----

def test_coco_captions_become_one_sample_per_image(folder, capsys):
    file = write_json(folder, "captions.json", coco([
        {"id": 5, "image_id": 1, "caption": " A dog.\n"},
        {"id": 6, "image_id": 3, "caption": "A cat."},
        {"id": 7, "image_id": 1, "caption": "One dog. "},
        {"id": 8, "image_id": 2, "caption": "  "},
    ]))
    samples = convert(folder, "captions", file)
    assert [sample.key for sample in samples] == ["000000000", "000000001"]
    assert [(shade_of(sample), sample.json) for sample in samples] == [
        (1, {"caption": ["A dog.", "One dog."], "image_id": 1}),
        (3, {"caption": ["A cat."], "image_id": 3}),
    ]
    place = f"{folder}/images/train2014/{coco_name(2)}"
    assert dropped(capsys) == {"caption that is empty or no text": (1, place),
                               "image without a caption": (1, place)}


@pytest.mark.parametrize("split, shades", [("train", [1, 2]), ("test", [3])])
def test_karpathys_training_part_is_train_and_restval(folder, split, shades):
    rows = []
    for i, part in ((1, "train"), (2, "restval"), (3, "test")):
        sentences = [{"raw": f" {part} {k}", "tokens": []} for k in (1, 2)]
        rows.append({"filepath": "train2014", "filename": coco_name(i), "cocoid": i, "split": part,
                     "sentences": sentences})
    del rows[0]["filepath"]  # Flickr30k's rows have none
    write(folder / "images" / "val2014" / coco_name(2), image_bytes(90))  # the path tells
    file = write_json(folder, "dataset.json", {"dataset": "coco", "images": rows})
    samples = convert(folder, "captions", file, split=split)
    assert [shade_of(sample) for sample in samples] == shades
    parts = [rows[shade - 1]["split"] for shade in shades]
    assert [s.captions() for s in samples] == [[f"{part} 1", f"{part} 2"] for part in parts]
    with pytest.raises(UserError, match="--split val: the images of .* are of test, train"):
        convert(folder, "captions", file, split="val")


def test_a_flat_list_holds_a_caption_or_several_in_each_row(folder):
    file = write_json(folder, "flat.json", [
        {"image": f"somewhere/train2014/{coco_name(1)}", "caption": "one", "image_id": "coco_1"},
        {"image": coco_name(2), "caption": ["a", "b "]},
        {"image": f"train2014/{coco_name(1)}", "caption": "two"},
    ])
    samples = convert(folder, "captions", file)
    assert [(shade_of(s), s.json) for s in samples] == [
        (1, {"caption": ["one", "two"]}), (2, {"caption": ["a", "b"]})]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_of_a_json_file_is_no_part_of_it(folder, encoding):
    file = folder / "flat.json"
    text = json.dumps([{"image": coco_name(1), "caption": "cr\u00e8me"}], ensure_ascii=False)
    file.write_bytes(text.encode(encoding))
    assert convert(folder, "captions", str(file))[0].captions() == ["cr\u00e8me"]
    file.write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match="flat.json is not UTF-8"):
        convert(folder, "captions", str(file))


# ---- boxes, questions ----

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 90, "name": "brush"}, {"id": 1, "name": "person"}]


def box(annotation_id, category=1, bbox=(0, 1, 2, 3), image=1, **fields):
    return {"id": annotation_id, "image_id": image, "category_id": category, "bbox": bbox, **fields}


def test_coco_instances_keep_crowds_and_images_without_an_object(folder):
    file = write_json(folder, "instances.json", coco([
        box(1, 90, [1.5, 2, 3, 4], image=2, area=7.5, iscrowd=0, segmentation=[[1, 2, 3, 4]]),
        box(2, 1, [0, 0, 8, 6], image=2, area=30, iscrowd=1),
        box(3, 18),
    ], categories=CATEGORIES))
    samples = convert(folder, "instances", file, split="val")
    assert [(sample.json["image_id"], sample.json["boxes"]) for sample in samples] == [
        (3, []),
        (1, [{"x": 0, "y": 1, "w": 2, "h": 3, "text": "dog", "area": 6, "iscrowd": 0}]),
        (2, [{"x": 1.5, "y": 2, "w": 3, "h": 4, "text": "brush", "area": 7.5, "iscrowd": 0},
             {"x": 0, "y": 0, "w": 8, "h": 6, "text": "person", "area": 30, "iscrowd": 1}]),
    ]
    # in the order of the ids, which have holes
    assert (folder / "out" / "classes.txt").read_text() == "person\ndog\nbrush\n"


@pytest.mark.parametrize("bad", [
    box(99, bbox=[]), box(99, bbox=[1, 2, 3, 4, 5]), box(99, bbox=None), box(99, bbox={"x": 1}),
    box(99, bbox=[1, 2, 3, None]), box(99, bbox=[1, 2, float("nan"), 4]),
    box(99, bbox=[1, 2, 0, 4]), box(99, bbox=[1, 2, "a", 4]),
    box(99, bbox=[1, 2, 10**400, 4]), box(99, category=[1]), box(99, category=7),
    box(99, image=None), box(99, image=77), {"id": 99}, {"id": 99, "image_id": {}}, None, [99],
])
def test_a_box_that_cannot_be_used_is_dropped_and_named(folder, capsys, bad):
    file = write_json(folder, "x.json", coco([box(5), bad, box(6)], categories=CATEGORIES))
    samples = convert(folder, "instances", file)
    assert [len(sample.json["boxes"]) for sample in samples] == [0, 2, 0]
    report = dropped(capsys)
    reason, = report
    assert reason.startswith("annotation with ")
    assert report[reason] == (1, "id 99" if isinstance(bad, dict) else "?")


def test_numbers_of_a_box_may_be_text(folder):
    file = write_json(
        folder, "x.json", coco([box(5, bbox=["4", "4.5", "2", "1e0"])], categories=CATEGORIES))
    found = convert(folder, "instances", file)[1].json["boxes"][0]
    assert (found["x"], found["y"], found["w"], found["h"], found["area"]) == (4, 4.5, 2, 1, 2)


def test_categories_of_one_name_are_one_class(folder, capsys):
    categories = [{"id": 0, "name": "fish"}, {"id": 1, "name": " fish\n"}, {"id": 2, "name": "eel"}]
    file = write_json(folder, "x.json", coco([box(5), box(6, 0)], categories=categories))
    samples = convert(folder, "instances", file)
    assert [b["text"] for b in samples[1].json["boxes"]] == ["fish", "fish"]
    assert (folder / "out" / "classes.txt").read_text() == "fish\neel\n"
    assert dropped(capsys) == {
        "category with the name of another, which makes them one class": (1, "id 1")}


def test_images_may_be_named_by_windows_or_by_a_url(folder):
    lists = coco([box(5), box(6, image=2), box(7, image=3)], categories=CATEGORIES)
    lists["images"] = [
        {"id": 1, "file_name": f"images\\train2014\\{coco_name(1)}"},
        {"id": 2, "coco_url": f"https://a.org/train2014/{coco_name(2)}"},  # LVIS
        {"id": 3, "file_name": None},
    ]
    samples = convert(folder, "instances", write_json(folder, "x.json", lists))
    assert [shade_of(sample) for sample in samples] == [1, 2]


@pytest.mark.parametrize("naming", [coco_name, "{:012d}.jpg".format])
def test_vqa_keeps_the_ten_answers_and_takes_the_most_common(folder, capsys, naming):
    for i in (1, 2, 3):
        os.rename(folder / "images" / "train2014" / coco_name(i), folder / "images" / naming(i))
    questions = []
    for i, k in ((2, 1), (1, 1), (2, 2), (3, 1)):
        questions.append({"question_id": 10 * i + k, "image_id": i, "question": f"What {i}{k}?"})
    given = ["yes"] * 3 + ["no"] * 7
    answers = [{"question_id": 12, "answers": []}, {"question_id": 13, "answers": [3]}]
    for number in (21, 11, 22):
        answers.append({"question_id": number, "answer_type": "yes/no",
                        "answers": [{"answer": answer} for answer in given]})
    file = write_json(folder, "q.json", {"data_subtype": "train2014", "questions": questions})
    answers = write_json(folder, "a.json", {"annotations": answers})
    samples = convert(folder, "vqa", file, annotations=[answers])
    qa = {"answer": "no", "answers": given, "answer_type": "yes/no"}
    assert [(shade_of(sample), sample.json["qa"]) for sample in samples] == [
        (2, [{"question": "What 21?", **qa, "question_id": 21},
             {"question": "What 22?", **qa, "question_id": 22}]),
        (1, [{"question": "What 11?", **qa, "question_id": 11}]),
    ]
    assert dropped(capsys) == {
        "annotation with no usable answers": (1, "question_id 12"),
        "annotation with no usable answer": (1, "question_id 13"),
        "question with no answer": (1, "question_id 31"),
    }


# ---- masks, folders of classes ----

@pytest.mark.parametrize("name, table", [
    ("objectInfo150.csv", "Idx,Ratio,Name\n2,0.1,building;edifice\n1,0.2,wall\n"),
    ("objectInfo150.txt", "Idx\tRatio\tName\n1\t0.2\twall\n2\t0.1\tbuilding, edifice\n"),
    (None, None),
])
def test_ade20k_keeps_masks_as_they_are_and_names_class_0_unlabeled(tmp_path, name, table):
    masks = {}
    for i in (1, 2):
        raw = io.BytesIO()
        Image.fromarray(np.full((6, 8), i, np.uint8)).save(raw, "PNG")
        masks[i] = raw.getvalue()
        write(tmp_path / "annotations" / "training" / f"ADE_train_{i}.png", masks[i])
        write(tmp_path / "images" / f"ADE_train_{i}.jpg", image_bytes(10 * i))
    write(tmp_path / "annotations" / "training" / "._ADE_train_1.png", b"macOS")
    if name:
        (tmp_path / name).write_text(table)
    samples = convert(tmp_path, "ade20k", str(tmp_path / "annotations" / "training"))
    assert [(shade_of(sample), sample.members["seg.png"]) for sample in samples] == [
        (1, masks[1]), (2, masks[2])]
    classes = tmp_path / "out" / "classes.txt"
    assert classes.exists() == bool(name)
    if name:
        assert classes.read_text() == "unlabeled\nwall\nbuilding\n"


def make_class_folders(root, *places):
    for i, place in enumerate(places, 1):
        write(root / place, image_bytes(10 * i))


def classes_of(samples):
    """{shade: class}"""
    return {shade_of(sample): sample.label() for sample in samples}


def convert_folder(folder, name="train", **options):
    return convert(folder, "folder", str(folder / name), images=name, **options)


def test_an_image_folder_numbers_its_sorted_classes_and_counts_what_it_leaves_out(tmp_path, capsys):
    make_class_folders(
        tmp_path / "train", "n02/deep/b.jpg", "n10/1.jpg", "n01/1.JPG", "n10/2.bmp", "stray.jpg",
        "n01/notes.txt", ".git/x.jpg", "__MACOSX/n02/._b.jpg", "n02/.ipynb_checkpoints/b.jpg",
        "n02/._b.jpg")
    assert classes_of(convert_folder(tmp_path)) == {1: 1, 2: 2, 3: 0}
    assert (tmp_path / "out" / "classes.txt").read_text() == "n01\nn02\nn10\n"
    assert dropped(capsys) == {
        "hidden file or folder": (4, ".git, __MACOSX, n02/._b.jpg, n02/.ipynb_checkpoints"),
        "file that is not read: .bmp": (1, "n10/2.bmp"),
        "file that is not read: .txt": (1, "n01/notes.txt"),
        "image outside the class folders": (1, "stray.jpg"),
    }


def test_links_neither_multiply_files_nor_end_a_conversion(tmp_path, capsys):
    root = tmp_path / "train"
    make_class_folders(root, "dog/1.jpg", "dog/2.jpg", "owl/1.jpg")
    write(tmp_path / "elsewhere" / "4.jpg", image_bytes(40))
    os.symlink(root, root / "dog" / "loop")
    os.symlink(root, root / "all")
    os.symlink(root / "dog", root / "cat")  # the dog's own folder gives the class
    os.symlink("me", root / "me")
    os.symlink(root / "owl" / "1.jpg", root / "dog" / "0.jpg")  # the owl is no dog
    os.symlink(tmp_path / "gone.jpg", root / "owl" / "2.jpg")
    os.symlink(tmp_path / "elsewhere", root / "yak")
    assert classes_of(convert_folder(tmp_path)) == {1: 0, 2: 0, 3: 1, 4: 2}
    assert (tmp_path / "out" / "classes.txt").read_text() == "dog\nowl\nyak\n"
    assert dropped(capsys) == {
        "link to a folder that is read already": (3, "all, cat, dog/loop"),
        "file that is not read: .": (1, "me"),
        "image or mask that cannot be read (No such file or directory)": (1, f"{root}/owl/2.jpg"),
    }


def test_shards_of_an_image_folder_mix_its_classes(tmp_path):
    for k in range(24):
        write(tmp_path / "train" / f"{k // 12}" / f"{k}.jpg", image_bytes(10 * k + 10))
    labels = [sample.label() for sample in convert_folder(tmp_path, per_shard=12)]
    assert 2 < sum(labels[:12]) < 10 and sum(labels) == 12


def test_a_validation_folder_must_have_the_same_classes(tmp_path):
    make_class_folders(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    convert_folder(tmp_path)
    with pytest.raises(UserError, match=r"classes.txt lists other classes \(2, here 1\)"):
        convert_folder(tmp_path, "val", split="val")
    (tmp_path / "val" / "b").mkdir()
    with pytest.raises(UserError, match="val/b is a class folder without an image"):
        convert_folder(tmp_path, "val", split="val")
    write(tmp_path / "val" / "b" / "9.jpg", image_bytes(90))
    assert classes_of(convert_folder(tmp_path, "val", split="val")) == {3: 0, 9: 1}


# ---- documents ----

def test_mmc4_documents_keep_the_images_that_are_there(folder, capsys):
    entries = [
        {"image_name": coco_name(2), "matched_text_index": 1, "matched_sim": 0.3, "raw_url": "u"},
        {"image_name": "gone.jpg", "matched_text_index": 0},
        {"image_name": coco_name(1), "matched_text_index": 0},
        {"image_name": coco_name(1), "matched_text_index": 2},
        {"image_name": coco_name(1)}, None,
    ]
    documents = [
        {"text_list": [], "image_info": []},
        {"url": "d", "text_list": ["one\u2028half", "two"], "image_info": entries, "other": 1},
        {"text_list": ["no images"]},
    ]
    lines = [json.dumps(document, ensure_ascii=False) for document in documents]
    with zipfile.ZipFile(folder / "docs.jsonl.zip", "w") as archive:
        archive.writestr("__MACOSX/._docs.jsonl", b"\0\1\2\n")
        archive.writestr("docs.jsonl", "\ufeff" + "\r\n".join([*lines, "{", ""]))
    samples = convert(folder, "mmc4", str(folder / "docs.jsonl.zip"))
    assert len(samples) == 1
    assert samples[0].members["0.jpg"] == image_bytes(20)
    assert samples[0].members["1.jpg"] == image_bytes(10)
    assert samples[0].json == {"url": "d", "text_list": ["one\u2028half", "two"], "image_info": [
        {"image_name": "000000000.0.jpg", "matched_text_index": 1, "matched_sim": 0.3,
         "raw_url": "u"},
        {"image_name": "000000000.1.jpg", "matched_text_index": 0}]}
    place = f"{folder}/docs.jsonl.zip"
    assert dropped(capsys) == {
        "document without an image": (1, f"{place}:1"),
        "image not found, or found in several places": (1, "gone.jpg"),
        "entry of image_info with a matched_text_index outside text_list": (1, f"{place}:2"),
        "entry of image_info with no usable matched_text_index": (1, f"{place}:2"),
        "entry of image_info with no usable image_name": (1, f"{place}:2"),
        "line without text_list and image_info, or texts and images": (1, f"{place}:3"),
        "line that is no JSON in UTF-8": (1, f"{place}:4"),
    }


def test_texts_and_images_in_turn_keep_their_order(folder):
    row = {
        "texts": [None, "A paragraph.\n\nAnother.", None, "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"],
        "images": [f"https://a.org/{coco_name(2)}", None, coco_name(1), None],
        "metadata": "[]",
    }
    (folder / "x.jsonl").write_text(json.dumps(row) + "\n")
    sample = convert(folder, "mmc4", str(folder / "x.jsonl"))[0]
    assert sample.json == {"texts": [None, "A paragraph.\n\nAnother.", None],
                           "images": ["000000000.0.jpg", None, "000000000.1.jpg"]}
    assert sample.members["0.jpg"] == image_bytes(20)


def test_a_file_named_by_two_urls_is_that_of_the_first_alone(folder, capsys):
    urls = [f"https://a.org/{coco_name(1)}", f"https://b.org/{coco_name(1)}"]
    rows = [{"texts": ["a", None], "images": [None, url]} for url in urls]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(convert(folder, "mmc4", str(folder / "x.jsonl"))) == 1
    assert dropped(capsys)["image not found, or found in several places"] == (1, urls[1])


def test_a_cut_archive_costs_what_it_holds_and_not_the_other_files(folder, capsys):
    document = {"text_list": ["a"],
                "image_info": [{"image_name": coco_name(1), "matched_text_index": 0}]}
    with zipfile.ZipFile(folder / "cut.jsonl.zip", "w") as archive:
        archive.writestr("docs.jsonl", json.dumps(document))
    os.truncate(folder / "cut.jsonl.zip", 100)
    (folder / "good.jsonl").write_text(json.dumps(document))
    files = [str(folder / "cut.jsonl.zip"), str(folder / "good.jsonl")]
    assert len(convert(folder, "mmc4", *files)) == 1
    assert "1 dropped: rest of a file that cannot be read" in capsys.readouterr().out


# ---- names ----

def test_images_of_one_name_are_told_apart_by_their_folders_or_not_taken(tmp_path, capsys):
    images = tmp_path / "images"
    make_class_folders(images, "cat/1.jpg", "dog/1.jpg", "2.jpg", "dog/2.jpg", "dog/v1.2.x.jpg")
    names = ["dog/1.jpg", "x/cat/1.jpg", "2.jpg", "1.jpg", "v1.2.x.jpg", "none.jpg", "none.jpg"]
    rows = [{"image": name, "caption": name} for name in names]
    samples = convert(tmp_path, "captions", write_json(tmp_path, "flat.json", rows))
    assert {sample.json["caption"][0]: shade_of(sample) for sample in samples} == {
        "dog/1.jpg": 2, "x/cat/1.jpg": 1, "2.jpg": 3, "v1.2.x.jpg": 5}
    assert all("." not in sample.key for sample in samples)
    assert dropped(capsys) == {
        "image not found, or found in several places": (2, "1.jpg, none.jpg")}


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "{}/secret.jpg", "..\\secret.jpg", "", "/", ".."])
def test_no_name_reaches_an_image_outside_the_folder(folder, name):
    write(folder / "secret.jpg", image_bytes(10))
    rows = [{"image": name.format(folder), "caption": "a"}, {"image": coco_name(2), "caption": "b"}]
    samples = convert(folder, "captions", write_json(folder, "flat.json", rows))
    assert [shade_of(sample) for sample in samples] == [2]


# ---- what is wrong with the input ----

@pytest.mark.parametrize("layout, value, message", [
    ("captions", {"foo": 1}, "neither images and annotations"),
    ("captions", 3, "neither images and annotations"),
    ("captions", ["a"], "nothing of .* could be converted: is --from captions right"),
    ("captions", [], "nothing of .* could be converted"),
    ("captions", "[" * 100_000, "cannot be read as JSON"),
    ("captions", '{"images": [', "cannot be read as JSON"),
    ("captions", coco([box(1)]), "nothing of .* could be converted"),
    ("instances", coco([]), "does not have the lists images, annotations, categories"),
    ("vqa", {"questions": 5}, "does not have the lists questions"),
    ("mmc4", {"text_list": 1}, "nothing of .* could be converted"),
    ("captions", None, "gone.json cannot be read"),
    ("mmc4", None, "nothing of .* could be converted"),
    ("ade20k", None, "nothing of .* could be converted"),
])
def test_a_file_of_another_layout_is_refused_in_one_line(folder, layout, value, message):
    file = folder / "x.json"
    answers = write_json(folder, "a.json", {"annotations": []})
    if value is None:
        file = folder / "gone.json"
    elif isinstance(value, str):
        file.write_text(value)
    else:
        file.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message) as error:
        convert(folder, layout, str(file), annotations=[answers])
    assert "\n" not in str(error.value)
    assert not list(folder.glob("out/*"))


@pytest.mark.parametrize("layout, options, message", [
    ("vqa", {}, "--from vqa needs --annotations"),
    ("captions", {"images": None}, "--from captions needs --images FOLDER"),
    ("captions", {"images": "nowhere"}, "--images nowhere is no folder"),
    ("captions", {"per_shard": 0}, "--per-shard 0"),
    ("folder", {"sources": ["a", "b"]}, "takes one folder"),
])
def test_a_flag_that_is_missing_or_wrong_is_refused(folder, layout, options, message):
    arguments = {"sources": [write_json(folder, "x.json", [])], "images": str(folder / "images"),
                 "out": str(folder / "out"), **options}
    with pytest.raises(UserError, match=message):
        data.convert(layout, **arguments)


# ---- writing ----

def test_an_interrupted_conversion_leaves_no_shard_and_can_be_repeated(folder, monkeypatch):
    rows = [{"image": coco_name(i), "caption": "a"} for i in (1, 2, 3)]
    file = write_json(folder, "flat.json", rows)
    listings = []
    add = data.add

    def interrupted_add(*args):
        listings.append(sorted(os.listdir(folder / "out")))
        if len(listings) == 5:  # in the third of three shards
            raise KeyboardInterrupt
        add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(data, "add", interrupted_add)
        with pytest.raises(KeyboardInterrupt):
            convert(folder, "captions", file, per_shard=1)
    assert listings[-1] == [f"train-{k:05d}.tar.part" for k in range(3)]
    assert os.listdir(folder / "out") == []
    assert len(convert(folder, "captions", file, per_shard=1)) == 3


def test_shards_are_never_overwritten_and_another_split_may_join_them(folder):
    file = write_json(folder, "flat.json", [{"image": coco_name(1), "caption": "a"}])
    convert(folder, "captions", file)
    with pytest.raises(UserError, match="already holds train-"):
        convert(folder, "captions", file)
    convert(folder, "captions", file, split="test")
    shards = [(folder / "out" / f"{split}-00000.tar").read_bytes() for split in ("train", "test")]
    assert shards[0] == shards[1]  # nothing of the time or the user is in them


def test_a_folder_that_cannot_be_written_to_is_named(folder):
    file = write_json(folder, "flat.json", [{"image": coco_name(1), "caption": "a"}])
    with pytest.raises(UserError, match=f"stopped while writing --out {file}/out"):
        data.convert("captions", [file], str(folder / "images"), f"{file}/out")


def test_the_command_takes_files_flags_and_a_split(folder, capsys):
    file = write_json(folder, "flat.json", [{"image": coco_name(1), "caption": "a"}])
    data.main(["convert", file, "--from", "captions", "--images", f"{folder}/images",
               "--out", f"{folder}/out", "--split", "val", "--per-shard", "5"])
    assert os.listdir(folder / "out") == ["val-00000.tar"]
    assert "1 samples" in capsys.readouterr().out
