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


def has_color(picture, color):
    """-> (H, W) bool"""
    return (np.asarray(picture.convert("RGB")) == ImageColor.getrgb(color)).all(-1)


def test_a_sheet_frames_the_right_cell_only(tmp_path):
    black = torch.zeros(3, 28, 28).byte()
    gray = np.full((40, 30, 3), 128, np.uint8)
    cells = [(black, "black", "green"), (gray, "", None), (None, STRANGE, None)]
    evaluation.sheet(cells, tmp_path / "s.png", columns=3, title="three cells", size=112)
    page = Image.open(tmp_path / "s.png")
    assert page.size == (3 * 126 + 14, 44 + 112 + 6 + 15 + 14)  # one line of caption
    frame = 120**2 - 112**2  # it lies around the picture
    assert has_color(page, "green").sum() == has_color(page, "green")[:, :133].sum() == frame
    assert has_color(page, "black")[44:156, 14:126].all()


def test_a_heat_map_is_brightest_where_the_map_is_highest():
    heat = torch.zeros(7, 7)
    heat[2, 5] = 3
    picture = evaluation.overlay(Image.new("RGB", (50, 50), "grey"), heat).convert("L")
    assert picture.size == (200, 200)  # 4 x
    pixels = np.asarray(picture)
    y, x = np.unravel_index(pixels.argmax(), pixels.shape)
    assert (x, y) == pytest.approx((157, 71), abs=5)


def test_curves_rise_to_the_largest_value_and_leave_out_what_is_no_number(tmp_path):
    losses = [0, math.nan, 2, math.inf, 4, None, 6]
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": i, "loss": x, "flat": 1}) for i, x in enumerate(losses)]
    log.write_text("\n".join([*lines, '{"step": 100, "lo']))  # cut by a kill
    evaluation.curves(log, tmp_path / "c.png", ["loss", "flat", "absent"])
    page = Image.open(tmp_path / "c.png")
    assert page.size == (2 * 470, 14 + 2 * 200)
    blue = has_color(page, "#1f5fa8")
    rows, columns = blue[:214, :470].nonzero()
    assert np.corrcoef(columns, rows)[0, 1] < -0.99  # a straight line upwards
    assert (columns.min(), columns.max()) == pytest.approx((70, 454), abs=2)
    assert (rows.min(), rows.max()) == pytest.approx((38, 184), abs=2)
    assert blue[:214, 470:].sum() > 300 and not blue[214:].any()  # flat; "absent: no values"
