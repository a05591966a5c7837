"""Pictures, by what can be read back from their pixels."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import eval as evaluation

pytestmark = pytest.mark.usefixtures("one_thread")
STRANGE = "\u05e9 e\u0301 \u202e\u200b\x00\ud83d\n\ttail"


def count_pixels(picture, color):
    rgb = ImageColor.getrgb(color)
    return (np.asarray(picture.convert("RGB")) == rgb).all(-1).sum()


def noise(height, width):
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


# ---- sheets ----

def test_a_sheet_frames_the_right_cell_only(tmp_path):
    black = torch.zeros(3, 28, 28).byte()
    array = noise(40, 30).permute(1, 2, 0).numpy()
    cells = [(black, "black", "green"), (array, "", None), (None, STRANGE, None)]
    evaluation.sheet(cells, tmp_path / "s.png", columns=3, title="three cells", size=112)
    page = Image.open(tmp_path / "s.png").convert("RGB")
    assert page.size == (3 * 126 + 14, 44 + 112 + 6 + 15 + 14)  # one line of caption
    assert count_pixels(page, "green") == 120**2 - 112**2  # the frame lies around the picture
    assert count_pixels(page.crop((0, 0, 133, page.height)), "green") == 120**2 - 112**2
    assert count_pixels(page.crop((14, 44, 126, 156)), "black") == 112**2


def test_letters_that_the_font_lacks_are_codes_and_captions_fit_their_lines():
    assert evaluation.wrap("caf\xe9 \u72ac \U0001f436", 900, 1) == ["caf\\xe9 \\u72ac \\U0001f436"]
    lines = evaluation.wrap("a small dog and a very large cat sleep on one blue sofa " * 3, 112, 4)
    assert len(lines) == 4 and lines[-1].endswith("…")
    assert all(evaluation.FONT.getlength(line) <= 112 for line in lines)


# ---- overlays ----

def test_a_heat_map_is_brightest_where_the_map_is_highest():
    heat = torch.zeros(7, 7)
    heat[2, 5] = 3
    picture = evaluation.overlay(Image.new("RGB", (350, 350), "grey"), heat).convert("L")
    pixels = np.asarray(picture)
    y, x = np.unravel_index(pixels.argmax(), pixels.shape)
    assert (x, y) == pytest.approx((275, 125), abs=5)
    assert evaluation.overlay(noise(30, 30), heat).size == (210, 210)  # 7 x


# ---- curves ----

BLUE = "#1f5fa8"


def draw_curves(folder, records, fields, tail=""):
    log = folder / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    evaluation.curves(log, folder / "c.png", fields)
    return Image.open(folder / "c.png")


def test_curves_leave_out_what_is_no_number_and_a_line_cut_by_a_kill(tmp_path):
    values = [5.0, math.nan, 4.0, math.inf, 3.0, None, 2.0]
    records = [{"step": step, "loss": value, "flat": 1} for step, value in enumerate(values)]
    fields = ["loss", "flat", "absent"]
    page = draw_curves(tmp_path, records, fields, tail='{"step": 100, "lo')
    assert page.size == (2 * 470, 14 + 2 * 200)
    assert count_pixels(page.crop((0, 0, 470, 214)), BLUE) > 300
    assert count_pixels(page.crop((470, 0, 940, 214)), BLUE) > 300
    assert count_pixels(page.crop((0, 214, 470, 414)), BLUE) == 0  # "absent: no values"


def test_a_curve_rises_from_its_least_to_its_largest_value(tmp_path):
    records = [{"step": step, "loss": step} for step in range(11)]
    page = draw_curves(tmp_path, records, ["loss"])
    blue = (np.asarray(page) == ImageColor.getrgb(BLUE)).all(-1)
    rows, columns = np.nonzero(blue)
    assert np.corrcoef(columns, rows)[0, 1] < -0.99  # a straight line upwards
    assert (columns.min(), columns.max()) == pytest.approx((70, 454), abs=2)
    assert (rows.min(), rows.max()) == pytest.approx((38, 184), abs=2)
