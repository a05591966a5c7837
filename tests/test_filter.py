"""ALIGN's filter rules: both sides of every threshold, what the difference hash takes for a copy, what reaches the new shards; and bench."""
import io, json, os, re

import numpy as np
import pytest
from PIL import Image

import data
from common import UserError
from data import Index

OFF = dict(min_side=0, max_ratio=1e9, min_words=0, max_words=10 ** 6)     # with the defaults of the rules that count, nothing is dropped


def waves(seed, size=(96, 64)):                              # a smooth picture of its own, as photographs are when they are made small
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size[1], :size[0]] / np.array(size[::-1])[:, None, None]
    grid = sum(np.sin(2 * np.pi * (a * x + b * y) + c)[..., None] * d for a, b, c, d in zip(*rng.uniform(-3, 3, (3, 6)), rng.uniform(-1, 1, (6, 3))))
    return Image.fromarray(np.uint8(128 + 40 * grid.clip(-3, 3)))


def encoded(image, kind="PNG", **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def shards(folder, records, per_shard=1000):
    """Shards of (image bytes, text or list of texts or fields of the json)."""
    folder.mkdir()
    for start in range(0, len(records), per_shard):
        with data.tarfile.open(folder / f"train-{start // per_shard:05d}.tar", "w") as tar:
            for i, (raw, text) in enumerate(records[start:start + per_shard], start):
                data.add(tar, f"k{i}.png", raw)
                if isinstance(text, str):
                    data.add(tar, f"k{i}.txt", text.encode())
                else:
                    data.add(tar, f"k{i}.json", json.dumps(text if isinstance(text, dict) else {"caption": text}).encode())
    return data.expand(str(folder))


def filtered(tmp_path, capsys, records, against=(), **how):
    """Keys of the samples that stay, and {rule: number} of the report."""
    data.filter_pairs(shards(tmp_path / "in", records), str(tmp_path / "out"), against, **how)
    said = capsys.readouterr().out
    index = Index(data.expand(str(tmp_path / "out")))
    assert not data.check(index.paths) and f"{len(index)} of {len(records)} samples kept" in said
    counts = {rule: int(n) for n, rule in re.findall(r"^ +(\d+) (\w+):", said, re.M)}
    assert counts.keys() == {"I2", "I3", "I4", "I5", "T1", "T2", "T3", "left"}               # each rule is reported, also where it dropped nothing
    return [int(index[i].key[1:]) for i in range(len(index))], {rule: n for rule, n in counts.items() if n}


def flat(width, height, shade=0):
    return encoded(Image.new("RGB", (width, height), (shade, shade, shade)))


# ---- thresholds (paper s3), on both sides; the defaults are the paper's ----

def test_the_shorter_side_must_exceed_200_pixels(tmp_path, capsys):
    records = [(flat(*size), f"a b c {i}") for i, size in enumerate([(200, 300), (201, 300), (300, 200), (300, 201)])]
    assert filtered(tmp_path, capsys, records) == ([1, 3], {"I2": 2})


def test_the_sides_must_be_in_a_ratio_below_3(tmp_path, capsys):
    records = [(flat(*size), f"a b c {i}") for i, size in enumerate([(603, 201), (602, 201), (201, 603), (201, 602)])]
    assert filtered(tmp_path, capsys, records) == ([1, 3], {"I3": 2})


def test_the_sides_are_those_of_the_original_where_img2dataset_tells_them(tmp_path, capsys):
    original = lambda w, h: {"caption": "a b c", "width": 8, "height": 8, "original_width": w, "original_height": h}
    fields = [original(201, 300), original(200, 300), original(None, 300), {"caption": "a b c"}]
    records = [(flat(8, 8, 9 * i), f) for i, f in enumerate(fields)]
    assert filtered(tmp_path, capsys, records) == ([0], {"I2": 3})


def test_a_text_must_have_3_to_20_unigrams(tmp_path, capsys):
    texts = [" ".join(["word"] * n) for n in (2, 3, 20, 21)] + ["A dog's snow-white , ... !", "A dog's snow-white", "one-two two"]
    records = [(flat(250, 250, i), text) for i, text in enumerate(texts)]
    assert filtered(tmp_path, capsys, records) == ([1, 2, 4, 5], {"T3": 3, "left": 3})


def test_a_text_may_be_shared_by_10_images_but_not_by_11(tmp_path, capsys):
    texts = ["shared by ten"] * 10 + ["shared by eleven"] * 11 + ["of one image"] * 12
    records = [(flat(250, 250, min(i, 21)), text) for i, text in enumerate(texts)]           # the last twelve are one image
    assert filtered(tmp_path, capsys, records) == ([*range(10), *range(21, 33)], {"T1": 11, "left": 11})


def test_an_image_may_have_1000_texts_but_not_1001(tmp_path, capsys):
    few, many = ([f"text number {i} {name}" for i in range(n)] for n, name in ((1000, "few"), (1001, "many")))
    one, two = flat(250, 250, 1), flat(250, 250, 2)          # the second in two samples
    records = [(one, few + few[:9]), (two, many[:1000]), (two, many[1000:])]
    assert filtered(tmp_path, capsys, records) == ([0], {"I4": 2})


@pytest.mark.parametrize("most, kept", [(7, [0, 1, 2]), (6, [0, 2]), (5, [0, 2]), (4, [])])
def test_a_text_with_a_token_that_is_not_among_the_most_frequent_goes(tmp_path, capsys, most, kept):
    # a, red, dog: 3 times; "a red", "red dog": twice; "a dog", "dog red": once
    records = [(flat(250, 250, i), text) for i, text in enumerate(["a red dog", "A dog, red", "a red  dog"])]
    if kept:
        assert filtered(tmp_path, capsys, records, most_frequent=most) == (kept, {"T2": 1, "left": 1} if most < 7 else {})
        return
    with pytest.raises(UserError, match="none of 3 samples is left"):
        filtered(tmp_path, capsys, records, most_frequent=most)
    assert f"       3 T2: texts with a token outside the {most} most frequent" in capsys.readouterr().out


def test_a_rare_bigram_of_frequent_words_is_enough(tmp_path, capsys):
    records = [(flat(250, 250, i), text) for i, text in enumerate(["red dog red", "red dog red", "red red dog"])]
    # counts: red 6, dog 3, "red dog" 3, "dog red" 2, "red red" 1
    assert filtered(tmp_path, capsys, records, most_frequent=4) == ([0, 1], {"T2": 1, "left": 1})


def test_equally_frequent_tokens_are_taken_in_their_order_not_in_that_of_the_shards(tmp_path, capsys):
    for name, texts, want in (("one", ["a b", "d e"], [0]), ("two", ["d e", "a b"], [1])):
        (tmp_path / name).mkdir()
        records = [(flat(250, 250, i), text) for i, text in enumerate(texts)]                # a, "a b", b, then d, "d e", e: once each
        assert filtered(tmp_path / name, capsys, records, most_frequent=3, min_words=0)[0] == want


def test_rules_that_count_look_at_what_the_rules_for_single_images_left(tmp_path, capsys):
    records = [(flat(250 if i < 10 else 100, 250, i), "shared by eleven") for i in range(11)]
    assert filtered(tmp_path, capsys, records) == ([*range(10)], {"I2": 1})
    (tmp_path / "raw").mkdir()                               # but tokens are counted in the raw data, whose five most frequent are the cat's
    records = [(flat(250, 250, 1), "a red dog"), (flat(250, 250, 2), "red dog"), *((flat(100, 250, i), "big old cat") for i in range(9))]
    with pytest.raises(UserError, match="none of 11"):
        filtered(tmp_path / "raw", capsys, records, most_frequent=5, min_words=2)


# ---- copies of evaluation images ----

def copies(image):
    noisy = np.asarray(image) + np.random.default_rng(0).normal(0, 6, (image.height, image.width, 3))
    return {"identical": image, "half": image.resize((image.width // 2, image.height // 2), Image.BICUBIC), "larger": image.resize((333, 222)),
            "squashed": image.resize((64, 64)), "noisy": Image.fromarray(noisy.clip(0, 255).astype(np.uint8)),
            "darker": image.point(lambda v: 0.8 * v), "grey": image.convert("L")}


@pytest.mark.parametrize("how", ["identical", "half", "larger", "squashed", "noisy", "darker", "grey"])
def test_a_copy_of_an_evaluation_image_is_found_and_other_images_are_not(tmp_path, capsys, how):
    records = [(encoded(copies(waves(i))[how]), f"text {i}") for i in range(5)] + [(encoded(waves(i)), f"text {i}") for i in range(100, 140)]
    held = [(encoded(waves(i), "JPEG", quality=70), {}) for i in range(5)]                   # without texts
    against = shards(tmp_path / "eval", held + [(b"no image", {})])
    assert filtered(tmp_path, capsys, records, against, **OFF) == ([*range(5, 45)], {"I5": 5})


def test_copies_are_found_among_textbook_photographs_and_strangers_are_not(shared):
    index = Index(data.expand(f"{shared}/pairs/test-00000.tar"))
    images = [index[i].image() for i in range(0, 200, 2)]
    code = lambda images: np.array([data.difference_hash(image) for image in images])
    own = code(images)
    near = np.bitwise_count(own[:, None] ^ own) <= 4
    assert near.sum() <= len(own) + 2
    for how in ("half", "squashed", "noisy"):
        assert (np.bitwise_count(code([copies(image)[how] for image in images]) ^ own) <= 4).mean() >= 0.95, how


def columns(*brighter):                                      # 9 x 8 pixels, which stay as they are: is each brighter than its neighbour?
    rows = [np.cumsum([128] + [-1 if bit else 1 for bit in row]) for row in brighter]
    return Image.fromarray(np.array(rows, np.uint8))


def test_the_difference_hash_by_hand():
    rows = np.random.default_rng(0).integers(0, 2, (8, 8))
    bits = np.unpackbits(np.array([data.difference_hash(columns(*rows))]).view(np.uint8)).reshape(8, 8)
    assert np.array_equal(bits, rows)


@pytest.mark.parametrize("distance, kept", [(4, [1]), (3, [0, 1]), (5, [])])
def test_images_that_differ_in_as_many_bits_as_allowed_are_the_same(tmp_path, capsys, distance, kept):
    rows = np.random.default_rng(1).integers(0, 2, (8, 8))
    records = []
    for bits in (4, 5):
        other = rows.copy()
        other.flat[[3, 17, 31, 40, 63][:bits]] ^= 1
        records.append((encoded(columns(*other)), f"text {bits}"))
    against = shards(tmp_path / "eval", [(encoded(columns(*rows)), "a")])
    if kept:
        assert filtered(tmp_path, capsys, records, against, **OFF, distance=distance)[0] == kept
    else:
        with pytest.raises(UserError, match="none of 2"):
            filtered(tmp_path, capsys, records, against, **OFF, distance=distance)


# ---- what reaches the new shards ----

def test_samples_are_copied_as_they_are_and_shards_keep_apart(tmp_path, capsys):
    records = [(encoded(waves(i)), {"caption": f"text {i}", "other": [1, None]} if i % 2 else f"text  {i}") for i in range(7)]
    kept, _ = filtered(tmp_path, capsys, records[:6] + [(encoded(waves(9, (40, 30))), "small")], **{**OFF, "min_side": 50})
    assert kept == [0, 1, 2, 3, 4, 5]
    before, after = Index(data.expand(str(tmp_path / "in"))), Index(data.expand(str(tmp_path / "out")))
    assert [before[i].members for i in range(6)] == [after[i].members for i in range(6)]
    data.filter_pairs(shards(tmp_path / "four", records, per_shard=2), str(tmp_path / "five"), **OFF)
    assert sorted(os.listdir(tmp_path / "five")) == [f"train-{k:05d}.tar" for k in range(4)]
    assert Index(data.expand(str(tmp_path / "five"))).starts.tolist() == [0, 2, 4, 6, 7]


def test_of_several_captions_those_that_fail_go(tmp_path, capsys):
    records = [(encoded(waves(0)), {"caption": ["one", "this one is fine", "so  is this"], "boxes": []}), (encoded(waves(1)), ["one", "two words"])]
    assert filtered(tmp_path, capsys, records, min_side=0) == ([0], {"T3": 3, "left": 1})
    sample = Index(data.expand(str(tmp_path / "out")))[0]
    assert sample.json == {"caption": ["this one is fine", "so is this"], "boxes": []} and sample.members["png"] == records[0][0]


def test_what_cannot_be_used_is_dropped_and_counted(tmp_path, capsys):
    records = [(encoded(waves(0)), "a good text"), (b"?", "a good text"), (encoded(waves(1)), {}), (encoded(waves(2)), " ")]
    data.filter_pairs(shards(tmp_path / "in", records), str(tmp_path / "out"), min_side=0)
    said = capsys.readouterr().out
    assert all(f"       1 {reason}\n" in said for reason in ("unreadable image", "no caption", "empty caption"))
    assert "1 of 4 samples kept" in said and "I1 is not applied" in said


def test_an_occupied_or_an_empty_result_is_told(tmp_path, capsys):
    records = [(flat(250, 250), "a good text")]
    filtered(tmp_path, capsys, records)
    with pytest.raises(UserError, match="already holds train-"):
        data.filter_pairs(data.expand(str(tmp_path / "in")), str(tmp_path / "out"))
    with pytest.raises(UserError, match="already holds train-"):                             # never onto its own source
        data.filter_pairs(data.expand(str(tmp_path / "in")), str(tmp_path / "in"))
    with pytest.raises(UserError, match="none of 1 samples is left"):
        data.filter_pairs(data.expand(str(tmp_path / "in")), str(tmp_path / "new"), min_side=250)
    assert not os.listdir(tmp_path / "new")


def test_the_command_runs_with_every_flag(tmp_path, capsys):
    paths = shards(tmp_path / "in", [(encoded(waves(i)), f"a picture {i}") for i in range(3)])
    held = shards(tmp_path / "held", [(encoded(waves(1)), "x")])
    flags = "--min-side 10 --max-ratio 2.5 --max-texts 9 --max-images 2 --min-words 1 --max-words 9 --most-frequent 99 --distance 0 --split test"
    data.main(["filter", *paths, "--against", *held, "--out", str(tmp_path / "out"), *flags.split()])
    said = capsys.readouterr().out
    assert "2 of 3 samples kept" in said and "       1 I5: images within 0 bits of one of 1 evaluation images" in said
    assert os.listdir(tmp_path / "out") == ["test-00000.tar"]


def test_a_flag_that_is_not_written_out_is_an_error(tmp_path):
    with pytest.raises(UserError, match="unrecognized arguments: --min-sid"):
        data.main(["filter", *shards(tmp_path / "in", [(flat(9, 9), "a")]), "--out", str(tmp_path / "out"), "--min-sid", "3"])


# ---- bench ----

def test_bench_names_a_rate_for_pillow_and_for_every_number_of_workers(tmp_path, capsys):
    paths = shards(tmp_path / "in", [(encoded(waves(i)), "a") for i in range(24)] + [(b"?", "a")])
    data.main(["bench", *paths, "--workers", "0", "1", "--repeats", "1", "--image-size", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "24 images to 32 px, median of 1"
    found = [re.fullmatch(r" *(Pillow alone|--workers \d) +(\d+) images/s +([\d.]+) x Pillow alone", line) for line in lines[1:]]
    assert [m[1] for m in found] == ["Pillow alone", "--workers 0", "--workers 1"]
    for m in found:                                          # the ratio is that of the rates
        assert float(m[3]) == pytest.approx(int(m[2]) / int(found[0][2]), abs=0.02)


@pytest.mark.parametrize("how", [{"repeats": 0}, {"image_size": 0}, {"workers": (-1,)}, {"images": 0}])
def test_bench_refuses_what_cannot_be_timed(tmp_path, how):
    with pytest.raises(UserError, match="too few to time anything"):
        data.bench(shards(tmp_path / "in", [(encoded(waves(i)), "a") for i in range(16)]), **how)
