"""Pictures, by what can be read back from their pixels."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import eval as evaluation

pytestmark = pytest.mark.usefixtures("one_thread")
STRANGE = "犬が走る 🐶👩‍👧 שלום e\u0301 \u202e\u200b\x00\ud83d\n\ttail"


def count_pixels(picture, color):
    rgb = ImageColor.getrgb(color)
    return (np.asarray(picture.convert("RGB")) == rgb).all(-1).sum()


def noise(height, width):
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


# ---- sheets ----

def test_a_sheet_frames_the_right_cell_only(tmp_path):
    black = torch.zeros(3, 28, 28).byte()
    array = noise(40, 30).permute(1, 2, 0).numpy()
    cells = [(black, "black", "green"), (array, "", None), (None, "query", None)]
    evaluation.sheet(cells, tmp_path / "s.png", columns=3, title="three cells", size=112)
    page = Image.open(tmp_path / "s.png").convert("RGB")
    assert page.size == (3 * 126 + 14, 44 + 112 + 6 + 15 + 14)  # one line of caption
    assert count_pixels(page, "green") == 120**2 - 112**2  # the frame lies around the picture
    assert count_pixels(page.crop((0, 0, 133, page.height)), "green") == 120**2 - 112**2
    assert count_pixels(page.crop((14, 44, 126, 156)), "black") == 112**2


def test_captions_fit_their_lines_and_show_where_they_were_cut():
    text = "a small dog and a very large cat sleep on one blue sofa " * 3
    lines = evaluation.wrap(text, 112, 4)
    assert len(lines) == 4 and lines[-1].endswith("…")
    assert all(evaluation.FONT.getlength(line) <= 112 for line in lines)
    assert evaluation.wrap("a dog", 112, 4) == ["a dog"]
    assert "".join(evaluation.wrap("x" * 40, 60, 99)) == "x" * 40  # no spaces to break at


def test_letters_that_the_font_lacks_are_codes_not_boxes():
    assert evaluation.wrap("caf\xe9 \u72ac \U0001f436", 900, 1) == ["caf\\xe9 \\u72ac \\U0001f436"]
    assert evaluation.wrap("a-z, 0 & \u201cquoted\u201d", 900, 1) == ["a-z, 0 & \u201cquoted\u201d"]


@pytest.mark.parametrize("text", [STRANGE, "w" * 10**6])
def test_no_caption_breaks_a_picture(tmp_path, text):
    cells = [(noise(9, 9), text, "red"), (None, text, "red")]
    evaluation.sheet(cells, tmp_path / "s.png", 2, title="title")
    assert Image.open(tmp_path / "s.png").width == 2 * 126 + 14


# ---- overlays ----

def test_a_heat_map_is_brightest_where_the_map_is_highest():
    heat = torch.zeros(7, 7)
    heat[2, 5] = 3
    picture = evaluation.overlay(Image.new("RGB", (350, 350), "grey"), heat).convert("L")
    pixels = np.asarray(picture)
    y, x = np.unravel_index(pixels.argmax(), pixels.shape)
    assert (x, y) == pytest.approx((275, 125), abs=5)
    assert evaluation.overlay(noise(30, 30), heat).size == (210, 210)  # 7 x
    flat = evaluation.overlay(Image.new("RGB", (350, 350), "grey"), torch.zeros(7, 7))
    assert len(np.unique(np.asarray(flat).reshape(-1, 3), axis=0)) == 1


# ---- curves ----

BLUE = "#1f5fa8"


def draw_curves(folder, records, fields, tail=""):
    log = folder / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    evaluation.curves(log, folder / "c.png", fields)
    return Image.open(folder / "c.png")


def test_curves_leave_out_nulls_gaps_nan_and_a_line_cut_by_a_kill(tmp_path):
    records = []
    for step in range(100):
        t = None if step % 2 else 0.07
        records.append({"step": step, "loss": 5 / (step + 1), "temperature": t})
    records[7]["loss"] = math.nan
    records[8]["loss"] = math.inf
    del records[9]["loss"]
    fields = ["loss", "temperature", "absent"]
    page = draw_curves(tmp_path, records, fields, tail='{"step": 100, "lo')
    assert page.size == (2 * 470, 14 + 2 * 200)
    assert count_pixels(page.crop((0, 0, 470, 214)), BLUE) > 300
    assert count_pixels(page.crop((0, 214, 470, 414)), BLUE) == 0  # "absent: no values"


def test_a_curve_rises_from_its_least_to_its_largest_value(tmp_path):
    records = [{"step": step, "loss": step} for step in range(11)]
    page = draw_curves(tmp_path, records, ["loss"])
    blue = (np.asarray(page) == ImageColor.getrgb(BLUE)).all(-1)
    rows, columns = np.nonzero(blue)
    assert np.corrcoef(columns, rows)[0, 1] < -0.99  # a straight line upwards
    assert (columns.min(), columns.max()) == pytest.approx((70, 454), abs=2)
    assert (rows.min(), rows.max()) == pytest.approx((38, 184), abs=2)


@pytest.mark.parametrize("values", [[], [3.5], [2, 2, 2]])
def test_any_short_log_can_be_drawn(tmp_path, values):
    records = [{"step": step, "loss": value} for step, value in enumerate(values)]
    assert draw_curves(tmp_path, records, ["loss"]).size == (470, 214)
