"""Every layout by a tiny example of its form (formats 3 to 8): the records that reach a reader, what is dropped, and what stops a conversion."""
import base64, io, json, os, tarfile

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError
from data import Index


def image_bytes(shade, kind="JPEG", size=(8, 6)):
    out = io.BytesIO()
    Image.new("RGB", size, (shade, 20, 30)).save(out, kind)
    return out.getvalue()


def coco_name(i, part="train2014"):
    return f"COCO_{part}_{i:012d}.jpg"


@pytest.fixture
def place(tmp_path):
    """An image folder with a sub-folder: images 1 to 3, each of its own shade."""
    (tmp_path / "images" / "train2014").mkdir(parents=True)
    for i in (1, 2, 3):
        (tmp_path / "images" / "train2014" / coco_name(i)).write_bytes(image_bytes(10 * i))
    return tmp_path


def save(place, name, fields):
    (place / name).write_text(fields if isinstance(fields, str) else json.dumps(fields), encoding="utf-8")
    return str(place / name)


def converted(place, capsys, layout, sources, images="images", **how):
    """The samples of what convert writes, which must check clean, and its report."""
    data.convert(layout, sources, images and str(place / images), str(place / "out"), **how)
    said = capsys.readouterr().out
    paths = data.expand([str(place / "out")], "test" if how.get("split", "train") != "train" else "train")
    index = Index(paths)
    assert not data.check(paths) and "nothing wrong" in capsys.readouterr().out
    assert [os.path.basename(p) for p in paths] == [f"{how.get('split', 'train')}-{k:05d}.tar" for k in range(len(paths))]
    assert not [name for name in os.listdir(place / "out") if name.endswith(".part")]
    samples = [index[i] for i in range(len(index))]
    assert [s.key for s in samples] == [f"{k:09d}" for k in range(len(samples))]
    return samples, said


def shade(sample):                                           # which image it is: its bytes are those of the folder
    return next(k for k in range(1, 100) if image_bytes(10 * k) == sample.members["jpg"])


# ---- captions ----

def test_coco_captions_become_one_sample_per_image_with_stripped_captions(place, capsys):
    file = save(place, "captions.json", {"info": {}, "images": [{"id": i, "file_name": coco_name(i)} for i in (3, 1, 2)], "annotations": [
        {"id": 5, "image_id": 1, "caption": " A dog.\n"}, {"id": 6, "image_id": 3, "caption": "A cat."},
        {"id": 7, "image_id": 1, "caption": "One dog. "}, {"id": 8, "image_id": 2, "caption": "  "},
        {"id": 9, "image_id": 3, "caption": None}, {"id": 10, "image_id": 77, "caption": "Lost."}]})
    samples, said = converted(place, capsys, "captions", [file])
    assert [(shade(s), s.json) for s in samples] == [(1, {"caption": ["A dog.", "One dog."], "image_id": 1}),
                                                     (3, {"caption": ["A cat."], "image_id": 3})]
    assert [line.split(maxsplit=2)[0::2] for line in said.splitlines()[1:]] == [
        ["2", "empty caption"], ["1", "annotation of an image that the file does not list"], ["1", "image without a caption"]]
    assert said.startswith(f"{place}/out: 2 images\n") and samples[0].captions() == ["A dog.", "One dog."]


@pytest.mark.parametrize("split, want", [("train", [1, 2]), ("test", [3]), ("val", None)])
def test_karpathys_training_part_is_train_and_restval(place, capsys, split, want):
    rows = [{"filepath": "train2014", "filename": coco_name(i), "cocoid": i, "split": part,
             "sentences": [{"raw": f" {part} {k}", "tokens": []} for k in (1, 2)]} for i, part in ((1, "train"), (2, "restval"), (3, "test"))]
    del rows[0]["filepath"]                                  # Flickr's files have none
    file = save(place, "dataset.json", {"dataset": "coco", "images": rows})
    if want is None:
        with pytest.raises(UserError, match=f"--split val: the images of {file} are of 'test', 'train'"):
            converted(place, capsys, "captions", [file], split=split)
        return
    samples, _ = converted(place, capsys, "captions", [file], split=split)
    assert [shade(s) for s in samples] == want
    assert [s.json["caption"] for s in samples] == [[f"{part} 1", f"{part} 2"] for part in (("train", "restval") if want[0] == 1 else ("test",))]


def test_a_flat_list_holds_a_caption_or_several_in_each_row(place, capsys):
    rows = [{"image": f"somewhere/train2014/{coco_name(1)}", "caption": "one", "image_id": "coco_1"}, {"image": coco_name(2), "caption": ["a", "b "]},
            {"image": f"train2014/{coco_name(1)}", "caption": "two"}]
    samples, _ = converted(place, capsys, "captions", [save(place, "flat.json", rows)])
    assert [(shade(s), s.json) for s in samples] == [(1, {"caption": ["one", "two"]}), (2, {"caption": ["a", "b"]})]


@pytest.mark.parametrize("text", ["a/1.jpg#0\tTwo dogs, one ball.\n{0}#0\tA cat, a dog\n{0}#1\tA .jpg, framed \nodd\n",
                                  "image,caption\n{0},A cat, a dog\n{0},A .jpg, framed\n\nodd\n{1},Two dogs, one ball.\n"])
def test_flickrs_two_forms_say_the_same(place, capsys, text):
    (place / "images" / "a").mkdir()
    (place / "images" / "a" / "1.jpg").write_bytes(image_bytes(90))
    samples, said = converted(place, capsys, "flickr30k", [save(place, "captions.txt", text.format(coco_name(3), "a/1.jpg"))])
    assert {shade(s): s.json["caption"] for s in samples} == {3: ["A cat, a dog", "A .jpg, framed"], 9: ["Two dogs, one ball."]}
    assert "     1 dropped: line that is neither NAME.jpg#number" in said


# ---- boxes, questions, masks, classes ----

def test_coco_instances_keep_crowds_and_images_without_an_object(place, capsys):
    boxes = [{"id": 1, "image_id": 2, "category_id": 90, "bbox": [1.5, 2, 3, 4], "area": 7.5, "iscrowd": 0, "segmentation": [[1, 2, 3, 4]]},
             {"id": 2, "image_id": 2, "category_id": 1, "bbox": [0, 0, 8, 6], "area": 30, "iscrowd": 1},
             {"id": 3, "image_id": 1, "category_id": 18, "bbox": [0, 1, 2, 3]}]
    names = [{"id": 18, "name": "dog"}, {"id": 90, "name": "brush"}, {"id": 1, "name": "person"}]
    images = [{"id": i, "file_name": coco_name(i)} for i in (1, 2, 3)]
    file = save(place, "instances.json", {"images": images, "annotations": boxes, "categories": names})
    samples, said = converted(place, capsys, "instances", [file], split="val")
    assert [s.json["boxes"] for s in samples] == [
        [{"x": 0, "y": 1, "w": 2, "h": 3, "text": "dog", "area": 6, "iscrowd": 0}],
        [{"x": 1.5, "y": 2, "w": 3, "h": 4, "text": "brush", "area": 7.5, "iscrowd": 0},
         {"x": 0, "y": 0, "w": 8, "h": 6, "text": "person", "area": 30, "iscrowd": 1}], []]
    assert [s.json["image_id"] for s in samples] == [1, 2, 3] and "3 images, 3 classes" in said
    assert (place / "out" / "classes.txt").read_text() == "person\ndog\nbrush\n"             # in the order of the ids, which have holes


@pytest.mark.parametrize("naming", [coco_name, lambda i: f"{i:012d}.jpg"])
def test_vqa_keeps_the_ten_answers_and_takes_the_most_common(place, capsys, naming):
    for i in (1, 2, 3):
        os.rename(place / "images" / "train2014" / coco_name(i), place / "images" / naming(i))
    questions = [{"question_id": 10 * i + k, "image_id": i, "question": f"What {i}{k}?"} for i, k in ((2, 1), (1, 1), (2, 2), (3, 1))]
    given = ["yes"] * 3 + ["no"] * 7
    answers = [{"question_id": n, "image_id": n // 10, "question_type": "what", "answer_type": "yes/no", "multiple_choice_answer": "no",
                "answers": [{"answer_id": i, "answer": a, "answer_confidence": "yes"} for i, a in enumerate(given)]} for n in (21, 11, 22)]
    file = save(place, "q.json", {"data_subtype": "train2014", "questions": questions})
    answers = save(place, "a.json", {"data_subtype": "train2014", "annotations": answers})
    samples, said = converted(place, capsys, "vqa", [file], annotations=[answers])
    qa = {"answer": "no", "answers": given, "answer_type": "yes/no"}
    assert [(shade(s), s.json) for s in samples] == [(2, {"qa": [{"question": f"What 2{k}?", **qa, "question_id": 20 + k} for k in (1, 2)]}),
                                                     (1, {"qa": [{"question": "What 11?", **qa, "question_id": 11}]})]
    assert "     1 dropped: question without an answer" in said


@pytest.mark.parametrize("table", [True, False])
def test_ade20k_keeps_masks_as_they_are_and_names_line_0_unlabeled(place, capsys, table):
    (place / "annotations" / "training").mkdir(parents=True)
    masks = {}
    for i in (1, 2):
        (place / "images" / f"ADE_train_{i}.jpg").write_bytes(image_bytes(10 * i))
        out = io.BytesIO()
        Image.fromarray(np.full((6, 8), 149 + i, np.uint8)).save(out, "PNG")
        masks[i] = out.getvalue()
        (place / "annotations" / "training" / f"ADE_train_{i}.png").write_bytes(masks[i])
    if table:
        save(place, "objectInfo150.csv", "Idx,Ratio,Train,Val,Stuff,Name\n2,0.1,6046,612,1,building;edifice\n1,0.2,11664,1172,1,wall\n")
    samples, _ = converted(place, capsys, "ade20k", [str(place / "annotations" / "training")])
    assert [(shade(s), s.members.keys(), s.members["seg.png"]) for s in samples] == [(i, {"jpg", "seg.png"}, masks[i]) for i in (1, 2)]
    assert not table and not (place / "out" / "classes.txt").exists() or (place / "out" / "classes.txt").read_text() == "unlabeled\nwall\nbuilding\n"


def test_an_image_folder_numbers_its_sorted_classes_and_says_what_it_cannot_read(tmp_path, capsys):
    for i, name in enumerate(("n02/deep/b.JPEG", "n02/a.png", "n10/1.jpg", "n01/1.jpg", "n10/2.bmp", "stray.jpg", ".git/x.jpg", "n01/notes.txt")):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(image_bytes(10 * i + 10, "PNG" if name.endswith("png") else "JPEG"))
    samples, said = converted(tmp_path, capsys, "folder", [str(tmp_path / "train")], None)
    assert sorted((s.label(), *sorted(s.members)) for s in samples) == [(0, "cls", "jpg"), (1, "cls", "jpeg"), (1, "cls", "png"), (2, "cls", "jpg")]
    assert next(s.members["jpeg"] for s in samples if "jpeg" in s.members) == image_bytes(10)
    assert (tmp_path / "out" / "classes.txt").read_text() == "n01\nn02\nn10\n" and "4 images, 3 classes" in said
    assert all(f" {line}\n" in said + "\n" for line in ("1 dropped: file that is not read: .bmp", "1 dropped: file that is not read: .txt",
                                                        "2 dropped: image outside the class folders"))


def test_shards_of_an_image_folder_mix_its_classes(tmp_path, capsys):
    for k in range(40):
        (tmp_path / "train" / f"{k // 20}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / f"{k // 20}" / f"{k}.jpg").write_bytes(image_bytes(6 * k))
    samples, _ = converted(tmp_path, capsys, "folder", [str(tmp_path / "train")], None, per_shard=20)
    assert 4 < sum(s.label() for s in samples[:20]) < 16 and len({s.members["jpg"] for s in samples}) == 40


def test_a_validation_folder_must_have_the_same_classes(tmp_path, capsys):
    for name in ("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(image_bytes(10))
    converted(tmp_path, capsys, "folder", [str(tmp_path / "train")], None)
    with pytest.raises(UserError, match=r"classes.txt lists other classes \(2, here 1\)"):
        data.convert("folder", [str(tmp_path / "val")], None, str(tmp_path / "out"), split="val")
    (tmp_path / "val" / "b").mkdir()
    with pytest.raises(UserError, match="no image in the class folder b"):
        data.convert("folder", [str(tmp_path / "val")], None, str(tmp_path / "out"), split="val")
    (tmp_path / "val" / "b" / "9.png").write_bytes(image_bytes(10, "PNG"))
    assert [s.label() for s in converted(tmp_path, capsys, "folder", [str(tmp_path / "val")], None, split="val")[0]] in ([0, 1], [1, 0])


# ---- documents ----

def test_open_flamingos_tars_hold_their_images(tmp_path, capsys):
    encoded = lambda raw: base64.b64encode(raw).decode()
    doc = {"url": "u", "text_list": ["one", "two"], "image_info": [
        {"image_name": "x.jpg", "matched_text_index": 1, "matched_sim": 0.3, "image_base64": encoded(image_bytes(10))},
        {"image_name": "gone.jpg", "matched_text_index": 0},
        {"image_name": "y.png", "matched_text_index": 0, "image_base64": encoded(image_bytes(20, "PNG"))},
        {"matched_text_index": 0, "image_base64": "!"}]}
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        for name, text in (("5f.json", json.dumps(doc)), ("60.json", "{"), ("61.json", json.dumps({"text_list": [], "image_info": []}))):
            data.add(tar, name, text.encode())
    samples, said = converted(tmp_path, capsys, "flamingo", [str(tmp_path / "000.tar")], None)
    assert len(samples) == 1 and samples[0].members.keys() == {"json", "0.jpg", "1.png"} and samples[0].members["0.jpg"] == image_bytes(10)
    assert samples[0].json["image_info"] == [{"image_name": "000000000.0.jpg", "matched_text_index": 1, "matched_sim": 0.3},
                                             {"image_name": "000000000.1.png", "matched_text_index": 0}]
    assert all(line in said for line in ("1 documents", "2 dropped: image without bytes", "1 dropped: line that is no JSON object",
                                         "1 dropped: document without an image"))
    with open(tmp_path / "000.tar", "r+b") as f:
        f.truncate(-(-len(f.read().rstrip(b"\0")) // 512) * 512)           # without the end mark; tarfile alone would say nothing
    data.convert("flamingo", [str(tmp_path / "000.tar")], None, str(tmp_path / "cut"))
    assert "1 dropped: cut shard" in capsys.readouterr().out


# ---- what is wrong with the input ----

@pytest.mark.parametrize("images, missing, told", [(10, 1, None), (9, 1, None), (8, 1, "1 of 9 images"), (1, 2, "2 of 3 images")])
def test_a_missing_image_is_listed_and_more_than_a_tenth_stop_it(tmp_path, capsys, images, missing, told):
    (tmp_path / "images").mkdir()
    for i in range(images):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(image_bytes(10))
    rows = [{"image": f"lost-{i}.jpg", "caption": "a"} for i in range(missing)] * 2 + [{"image": f"{i}.jpg", "caption": "a"} for i in range(images)]
    file = save(tmp_path, "flat.json", rows)
    if told:
        with pytest.raises(UserError, match=rf"{told} are not under --images .*, more than a tenth \(the first: 'lost-0.jpg'") as error:
            converted(tmp_path, capsys, "captions", [file])
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        return
    samples, said = converted(tmp_path, capsys, "captions", [file])
    assert len(samples) == images and (tmp_path / "out" / "missing-train.txt").read_text() == "lost-0.jpg\n"
    assert f"     1 dropped: image not found in the folder (as jpg, png or webp, once): listed in {tmp_path}/out/missing-train.txt" in said


def test_two_images_of_one_name_are_told_apart_by_their_folders_or_not_taken(tmp_path, capsys):
    for name in ("cat/1.jpg", "dog/1.jpg", "2.jpg", "dog/2.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(image_bytes({"c": 10, "d": 20, "2": 30}[name[0]]))
    rows = [{"image": name, "caption": name} for name in ("dog/1.jpg", "x/cat/1.jpg", "2.jpg")]
    samples, _ = converted(tmp_path, capsys, "captions", [save(tmp_path, "flat.json", rows)])
    assert {s.json["caption"][0]: shade(s) for s in samples} == {"dog/1.jpg": 2, "x/cat/1.jpg": 1, "2.jpg": 3}
    with pytest.raises(UserError, match="1 of 1 images are not under --images"):             # 1.jpg could be either
        data.convert("captions", [save(tmp_path, "flat.json", [{"image": "1.jpg", "caption": "a"}])], str(tmp_path / "images"), str(tmp_path / "new"))


def test_no_annotation_reaches_an_image_outside_the_folder(place):
    (place / "secret.jpg").write_bytes(image_bytes(10))
    for name in ("../secret.jpg", str(place / "secret.jpg")):
        with pytest.raises(UserError, match="1 of 1 images are not under --images"):
            data.convert("captions", [save(place, "flat.json", [{"image": name, "caption": "a"}])], str(place / "images"), str(place / "out"))


GOOD_IMAGE = {"id": 1, "file_name": coco_name(1)}


@pytest.mark.parametrize("layout, fields, told", [
    ("captions", {"foo": 1, "bar": 2}, r"expected the keys images and annotations \(COCO\), .*, found the keys bar, foo"),
    ("captions", [{"image": "a", "text": "b"}], "expected the keys image, caption, found the keys image, text"),
    ("captions", ["a"], "expected the keys image, caption, found a str"),
    ("captions", 3, "found a int"),
    ("captions", {"images": [{"filename": "a", "split": "train"}]}, "expected the keys filename, split, sentences, found the keys filename, split"),
    ("captions", {"images": [GOOD_IMAGE], "annotations": [{"image_id": 1, "bbox": 0}]},
     "expected the keys caption, found the keys bbox, image_id"),
    ("captions", {"images": [{"id": [1], "file_name": "x"}], "annotations": []}, "is not what --from captions expects"),
    ("captions", '{"images": [', "cannot be read as JSON"), ("captions", "[" * 100_000, "cannot be read as JSON"),
    ("instances", {"images": [GOOD_IMAGE], "annotations": []}, "expected the keys categories, images, annotations, found the keys"),
    ("instances", {"images": [GOOD_IMAGE], "annotations": [{"image_id": 1, "category_id": 5, "bbox": [1] * 4}], "categories": []}, "5 is not among"),
    ("instances", {"images": [GOOD_IMAGE], "annotations": [{"image_id": 1, "category_id": 5, "bbox": 1}], "categories": []}, "is not what --from"),
    ("vqa", {"questions": []}, "expected the keys questions, data_subtype, found the keys questions"),
    ("vqa", {"questions": [{"question_id": 1, "image_id": "x", "question": "a?"}], "data_subtype": "a"}, "is not what --from vqa expects"),
    ("flickr30k", "one\ntwo\n", "no image of 1 file.s. could be converted: is --from flickr30k right"),
    ("flickr30k", None, "is not what --from flickr30k expects"), ("ade20k", None, "is not what --from ade20k expects"),
    ("captions", None, "cannot be read as JSON")])
def test_a_file_of_another_schema_is_told_with_the_keys_expected_and_found(place, capsys, layout, fields, told):
    file = save(place, "x.json", fields) if fields is not None else str(place / "gone.json")
    answers = save(place, "a.json", {"annotations": [{"question_id": 1, "answer_type": "other", "answers": [{"answer": "a"}]}]})
    with pytest.raises(UserError, match=told) as error:
        data.convert(layout, [file], str(place / "images"), str(place / "out"), annotations=[answers])
    assert "\n" not in str(error.value) and not list(place.glob("out/*.tar*"))


@pytest.mark.parametrize("layout, how, told", [
    ("vqa", {}, "--from vqa needs --annotations"), ("captions", {"images": None}, "--images .not given. is no folder"),
    ("captions", {"images": "nowhere"}, "--images nowhere is no folder"), ("captions", {"per_shard": 0}, "--per-shard 0"),
    ("folder", {"sources": ["a", "b"]}, "takes one folder"), ("mmc4", {"images": None}, "--images .not given. is no folder"),
    ("mmc4", {"url_map": "gone"}, "gone cannot be read as JSON")])
def test_a_flag_that_is_missing_or_wrong_is_told(place, layout, how, told):
    with pytest.raises(UserError, match=told):
        data.convert(layout, **{"sources": [save(place, "x.json", [])], "images": str(place / "images"), "out": str(place / "out"), **how})


# ---- writing ----

def test_an_interrupted_conversion_leaves_no_shard_and_a_second_one_goes_through(place, capsys, monkeypatch):
    file, add, calls = save(place, "flat.json", [{"image": coco_name(i), "caption": "a"} for i in (1, 2, 3)]), data.add, []

    def interrupted(*args):
        calls.append(sorted(os.listdir(place / "out")))
        if len(calls) == 5:                                  # in the third of three shards
            raise KeyboardInterrupt
        add(*args)
    monkeypatch.setattr(data, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        converted(place, capsys, "captions", [file], per_shard=1)
    assert calls[-1] == [f"train-{k:05d}.tar.part" for k in range(3)] and not os.listdir(place / "out")
    monkeypatch.undo()
    assert len(converted(place, capsys, "captions", [file], per_shard=1)[0]) == 3


def test_a_folder_that_holds_shards_is_left_alone_and_another_split_may_join_it(place, capsys):
    file = save(place, "flat.json", [{"image": coco_name(1), "caption": "a"}])
    converted(place, capsys, "captions", [file])
    before = (place / "out" / "train-00000.tar").read_bytes()
    with pytest.raises(UserError, match="already holds train-"):
        data.convert("captions", [file], str(place / "images"), str(place / "out"))
    converted(place, capsys, "captions", [file], split="test")
    assert sorted(os.listdir(place / "out")) == ["test-00000.tar", "train-00000.tar"]
    assert (place / "out" / "train-00000.tar").read_bytes() == before == (place / "out" / "test-00000.tar").read_bytes()


def test_a_folder_that_cannot_be_written_to_is_told(place):
    save(place, "file", "")
    with pytest.raises(UserError, match="stopped while writing --out"):
        rows = [{"image": coco_name(1), "caption": "a"}]
        data.convert("captions", [save(place, "flat.json", rows)], str(place / "images"), str(place / "file" / "out"))


def test_the_command_takes_files_flags_and_a_split(place, capsys):
    file = save(place, "flat.json", [{"image": coco_name(1), "caption": "a"}])
    data.main(f"convert {file} --from captions --images {place}/images --out {place}/out --split val --per-shard 5".split())
    assert os.listdir(place / "out") == ["val-00000.tar"] and "1 images" in capsys.readouterr().out
