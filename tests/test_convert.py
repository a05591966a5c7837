"""Converters: what of each layout reaches a reader, and what a record that cannot be used costs."""
import json
import os
import re

import pytest
from PIL import Image

import data
from common import UserError
from conftest import encoded


def image_bytes(shade):
    return encoded(Image.new("RGB", (8, 6), (shade, 20, 30)), "JPEG")


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
    lines = re.findall(r"^ *(\d+) dropped: (.*) \(first: (.*)\)$", capsys.readouterr().out, re.M)
    return {reason: (int(count), places) for count, reason, places in lines}


def coco(annotations, names=None, **lists):
    """names: {image id: file name}"""
    if names is None:
        names = {i: coco_name(i) for i in (3, 1, 2)}
    images = [{"id": i, "file_name": name} for i, name in names.items()]
    return {"images": images, "annotations": annotations, **lists}


def one_caption(folder):
    """The path of COCO's captions with one caption, of image 1."""
    return write_json(folder, "one.json", coco([{"id": 1, "image_id": 1, "caption": "a"}]))


# ---- captions ----

def test_coco_captions_become_one_sample_per_image(folder, capsys):
    file = write_json(folder, "captions.json", coco([
        {"id": 5, "image_id": 1, "caption": " A dog.\n"},
        {"id": 6, "image_id": 3, "caption": "A cat."},
        {"id": 7, "image_id": 1, "caption": "One dog. "},
        {"id": 8, "image_id": 2, "caption": "  "},
        {"id": 9, "image_id": 4, "caption": "A cow."},
    ]))
    samples = convert(folder, "captions", file)
    assert [sample.key for sample in samples] == ["000000000", "000000001"]
    assert [(shade_of(sample), sample.json) for sample in samples] == [
        (1, {"caption": ["A dog.", "One dog."], "image_id": 1}),
        (3, {"caption": ["A cat."], "image_id": 3}),
    ]
    assert dropped(capsys) == {"annotation with no usable caption": (1, "id 8, image_id 2"),
                               "annotation with an unknown image_id": (1, "id 9, image_id 4")}


@pytest.mark.parametrize("split, shades", [("train", [1, 2]), ("test", [3])])
def test_karpathys_training_part_is_train_and_restval(folder, split, shades, capsys):
    rows = []
    for i, part in ((1, "train"), (2, "restval"), (3, "test")):
        sentences = [{"raw": raw, "tokens": []} for raw in (f" {i} 1", " ", f"{i} 2")]
        rows.append({"filepath": "train2014", "filename": coco_name(i), "cocoid": i, "split": part,
                     "sentences": sentences})
    del rows[0]["filepath"]  # Flickr30k's rows have none
    write(folder / "images" / "val2014" / coco_name(2), image_bytes(90))  # the path tells
    file = write_json(folder, "dataset.json", {"dataset": "coco", "images": rows})
    samples = convert(folder, "captions", file, split=split)
    assert [shade_of(sample) for sample in samples] == shades
    assert [s.captions() for s in samples] == [[f"{i} 1", f"{i} 2"] for i in shades]
    of_first = f"filename {coco_name(shades[0])}"
    assert dropped(capsys) == {"sentence with no usable raw": (len(shades), of_first)}


# ---- boxes, questions ----

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 90, "name": "brush"}, {"id": 1, "name": "person"},
              {"id": 20, "name": " dog\n"}]


def box(annotation_id, category=1, bbox=(0, 1, 2, 3), image=1, **fields):
    return {"id": annotation_id, "image_id": image, "category_id": category, "bbox": bbox, **fields}


def test_coco_instances_keep_crowds_and_images_without_an_object(folder, capsys):
    instances = coco([
        box(1, 90, [1.5, 2, 3, 4], image=2, area=7.5, iscrowd=0, segmentation=[[1, 2, 3, 4]]),
        box(2, 1, [0, 0, 8, 6], image=2, area=30, iscrowd=1),
        box(3, 20, ["0", "1", "2", "3e0"]),
    ], categories=CATEGORIES)
    image = instances["images"][0]
    image["coco_url"] = "host/train2014/" + image.pop("file_name")  # as LVIS has it
    file = write_json(folder, "instances.json", instances)
    samples = convert(folder, "instances", file, split="val")
    assert [(sample.json["image_id"], sample.json["boxes"]) for sample in samples] == [
        (3, []),
        (1, [{"x": 0, "y": 1, "w": 2, "h": 3, "text": "dog", "area": 6, "iscrowd": 0}]),
        (2, [{"x": 1.5, "y": 2, "w": 3, "h": 4, "text": "brush", "area": 7.5, "iscrowd": 0},
             {"x": 0, "y": 0, "w": 8, "h": 6, "text": "person", "area": 30, "iscrowd": 1}]),
    ]
    # in the order of the ids, which have holes
    assert (folder / "out" / "classes.txt").read_text() == "person\ndog\nbrush\n"
    assert dropped(capsys) == {"categories of one name, which are one class": (2, "18 dog")}


def test_boxes_that_cannot_be_used_are_dropped_and_named(folder, capsys):
    bad = [box(90, bbox=[]), box(91, bbox=[1, 2, 3, None]), box(92, bbox=[1, 2, float("nan"), 4]),
           box(93, category=[1]), box(94, category=7), [95]]
    file = write_json(folder, "x.json", coco([box(5), *bad, box(6)], categories=CATEGORIES[:3]))
    samples = convert(folder, "instances", file)
    assert [len(sample.json["boxes"]) for sample in samples] == [0, 2, 0]
    assert dropped(capsys) == {
        "annotation with a bbox that is not four numbers": (2, "id 90, image_id 1"),
        "annotation with a bbox without width or height": (1, "id 92, image_id 1"),
        "annotation with no usable category_id": (1, "id 93, image_id 1"),
        "annotation with an unknown category_id": (1, "id 94, image_id 1"),
        "annotation with no usable image_id": (1, "[95]"),
    }


def test_vqa_keeps_the_ten_answers_and_takes_the_most_common(folder, capsys):
    questions = [{"question_id": number, "image_id": number // 10, "question": f"What {number}?"}
                 for number in (21, 11, 22, 31)]
    file = write_json(folder, "q.json", {"data_subtype": "train2014", "questions": questions})
    given = ["yes"] * 3 + ["no"] * 7
    answers = [{"question_id": 12, "answers": []}]
    for number in (21, 11, 22):
        answers.append({"question_id": number, "answer_type": "yes/no",
                        "answers": [{"answer": answer} for answer in given]})
    answers = write_json(folder, "a.json", {"annotations": answers})
    samples = convert(folder, "vqa", file, annotations=[answers])
    assert [shade_of(sample) for sample in samples] == [2, 1]
    assert [qa["question_id"] for sample in samples for qa in sample.json["qa"]] == [21, 22, 11]
    assert samples[1].json["qa"] == [{"question": "What 11?", "answer": "no", "answers": given,
                                      "answer_type": "yes/no", "question_id": 11}]
    assert dropped(capsys) == {
        "annotation with no usable answers": (1, "question_id 12"),
        "question with an unknown question_id": (1, "question_id 31, image_id 3"),
    }


# ---- masks, folders of classes ----

@pytest.mark.parametrize("name, table", [
    ("objectInfo150.csv", "Idx,Ratio,Name\n1,0.2,wall\n2,0.1,building;edifice\n"),
    ("objectInfo150.txt", "Idx\tRatio\tName\n1\t0.2\twall\n2\t0.1\tbuilding, edifice\n"),
])
def test_ade20k_keeps_masks_as_they_are_and_names_class_0_unlabeled(tmp_path, name, table):
    mask = encoded(Image.new("L", (8, 6), 2))
    write(tmp_path / "annotations" / "training" / "ADE_train_1.png", mask)
    write(tmp_path / "annotations" / "training" / "._ADE_train_1.png", b"macOS")
    write(tmp_path / "images" / "ADE_train_1.jpg", image_bytes(10))
    (tmp_path / name).write_text(table)
    sample, = convert(tmp_path, "ade20k", str(tmp_path / "annotations" / "training"))
    assert sample.members == {"jpg": image_bytes(10), "seg.png": mask}
    assert (tmp_path / "out" / "classes.txt").read_text() == "unlabeled\nwall\nbuilding\n"


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
        ".git/x.jpg", "__MACOSX/n02/._b.jpg", "n02/.ipynb_checkpoints/b.jpg", "n02/._b.jpg")
    assert classes_of(convert_folder(tmp_path)) == {1: 1, 2: 2, 3: 0}
    assert (tmp_path / "out" / "classes.txt").read_text() == "n01\nn02\nn10\n"
    counts = {reason: count for reason, (count, _) in dropped(capsys).items()}
    assert counts == {"hidden file or folder": 4, "file that is no image: .bmp": 1,
                      "image outside the class folders": 1}


def test_links_neither_multiply_files_nor_end_a_conversion(tmp_path, capsys):
    root = tmp_path / "train"
    make_class_folders(root, "dog/1.jpg", "dog/2.jpg", "owl/1.jpg")
    os.symlink(root, root / "dog" / "loop")
    os.symlink(root / "dog", root / "cat")
    os.symlink(root / "owl" / "1.jpg", root / "dog" / "0.jpg")  # the owl is no dog
    os.symlink(tmp_path / "gone.jpg", root / "owl" / "2.jpg")
    assert classes_of(convert_folder(tmp_path)) == {1: 0, 2: 0, 3: 1}
    assert dropped(capsys) == {
        "link to a folder": (2, f"{root}/cat"),
        "image with a file that cannot be read (No such file or directory)":
            (1, f"{root}/owl/2.jpg")}


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
    write(tmp_path / "val" / "b" / "9.jpg", image_bytes(90))
    assert classes_of(convert_folder(tmp_path, "val", split="val")) == {3: 0, 9: 1}


# ---- documents ----

def test_mmc4_documents_keep_the_images_that_are_there(folder, capsys):
    good = {"image_name": coco_name(2), "matched_text_index": 1, "matched_sim": 0.3, "raw_url": "u"}
    entries = [good, {"image_name": "gone.jpg", "matched_text_index": 0},
               {"image_name": coco_name(1), "matched_text_index": 2}, None]
    documents = [
        {"text_list": [], "image_info": []},
        {"url": "d", "text_list": ["one\u2028half", "two"], "image_info": entries, "other": 1},
    ]
    lines = [json.dumps(document, ensure_ascii=False) for document in documents]
    file = folder / "docs.jsonl"
    file.write_bytes(("\ufeff" + "\r\n".join([*lines, "{"])).encode())
    sample, = convert(folder, "mmc4", str(file))
    assert sample.members["0.jpg"] == image_bytes(20)
    assert sample.json == {"url": "d", "text_list": ["one\u2028half", "two"],
                           "image_info": [{**good, "image_name": "000000000.0.jpg"}]}
    assert dropped(capsys) == {
        "line with no image that can be used": (1, f"{file}:1"),
        f"entry of image_info with an {data.NOT_FOUND}": (1, "image_name gone.jpg"),
        "entry of image_info with a matched_text_index outside text_list":
            (1, f"image_name {coco_name(1)}"),
        "entry of image_info with no usable image_name": (1, "None"),
        "line with no JSON in UTF-8": (1, f"{file}:3"),
    }


# ---- names ----

def test_names_reach_one_image_of_the_folder_or_none(tmp_path, capsys):
    make_class_folders(tmp_path / "images", "cat/1.jpg", "dog/1.jpg", "dog/v1.2.x.jpg", "cat/2.jpg")
    write(tmp_path / "images" / "2.jpg", image_bytes(90))
    write(tmp_path / "secret.jpg", image_bytes(100))
    found = {"x\\dog\\1.jpg": 2, "x/cat/1.jpg": 1, "v1.2.x.jpg": 3}
    lost = ["1.jpg", "none.jpg", "cow/2.jpg", "..\\secret.jpg", f"{tmp_path}/secret.jpg", "/"]
    names = dict(enumerate([*found, *lost]))
    rows = [{"image_id": i, "caption": name} for i, name in names.items()]
    samples = convert(tmp_path, "captions", write_json(tmp_path, "x.json", coco(rows, names)))
    assert {sample.json["caption"][0]: shade_of(sample) for sample in samples} == found
    assert dropped(capsys) == {data.NOT_FOUND: (len(lost), "1.jpg")}


# ---- what is wrong with the input ----

@pytest.mark.parametrize("layout, text, message", [
    ("captions", '{"foo": 1}', "does not have the lists images"),
    ("captions", '{"images": []}', "nothing of .* could be converted: is --from captions right"),
    ("captions", "[" * 100_000, "cannot be read as JSON"),
    ("captions", None, "x.json does not exist"),
    ("mmc4", '{"text_list": 1}', "nothing of .* could be converted"),
    ("vqa", "{}", "--from vqa needs --annotations"),
])
def test_a_file_of_another_layout_is_refused_in_one_line(folder, layout, text, message):
    if text is not None:
        (folder / "x.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        convert(folder, layout, f"{folder}/x.json")
    assert "\n" not in str(error.value)
    assert not list(folder.glob("out/*"))


# ---- writing ----

def test_an_interrupted_conversion_leaves_no_shard(tmp_path):
    def shards():
        yield [("0", {"txt": b"a"})]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_shards(shards(), str(tmp_path), "train")
    assert os.listdir(tmp_path) == []


def test_shards_are_never_overwritten_and_another_split_may_join_them(folder, capsys):
    arguments = ["convert", one_caption(folder), "--from", "captions", "--images",
                 f"{folder}/images", "--out", f"{folder}/out"]
    data.main(arguments)
    with pytest.raises(UserError, match="already holds train-"):
        data.main(arguments)
    data.main([*arguments, "--split", "test"])
    shards = [(folder / "out" / f"{split}-00000.tar").read_bytes() for split in ("train", "test")]
    assert shards[0] == shards[1]  # nothing of the time or the user is in them


def test_folders_that_cannot_be_used_are_named(folder):
    file = one_caption(folder)
    with pytest.raises(UserError, match="needs --images FOLDER"):
        data.convert("captions", [file], None, f"{folder}/out")
    with pytest.raises(UserError, match=f"stopped while writing --out {file}/out"):
        data.convert("captions", [file], f"{folder}/images", f"{file}/out")
