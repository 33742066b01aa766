"""What is drawn: round numbers at the axes, points where they belong, and colours that tell right from wrong."""

import base64
import io
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from vit_jax.report import collect, draw


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.5, 1]), (0.3, 2.1, [0, 0.5, 1, 1.5, 2, 2.5]), (-3, 12, [-5, 0, 5, 10, 15]), (7, 7, [6, 6.5, 7, 7.5, 8])],
)
def test_ticks_are_round_and_hold_everything(low, high, expected):
    assert draw.ticks(low, high) == pytest.approx(expected)


def test_numbers_are_short():
    assert [draw.compact(x) for x in (0, 0.25, 1e-5, 999, 1000, 1500, 12_000, 3_400_000, -20_000)] == (
        ["0", "0.25", "1e-05", "999", "1k", "1.5k", "12k", "3.4M", "-20k"]
    )


def test_a_chart_has_a_line_for_each_name_and_says_what_it_shows():
    lines = {"train_loss": (np.array([1, 5, 9]), np.array([4.0, 2.0, 0.0])), "<loss>": (np.array([9]), np.array([1.0]))}
    svg = draw.line_chart(collect.Curve("loss", lines))
    xml.etree.ElementTree.fromstring(svg)
    points = [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]*)"', svg)[0].split()]
    right, bottom = draw.WIDTH - draw.RIGHT, draw.HEIGHT - draw.BOTTOM
    assert points == [(draw.LEFT, draw.TOP), ((draw.LEFT + right) / 2, (draw.TOP + bottom) / 2), (right, bottom)]
    assert svg.count("<circle") == 4 and "&lt;loss&gt; ends at 1" in svg and 'role="img"' in svg


def test_a_reliable_model_stands_on_the_line():
    bins = {"count": np.array([0.0, 4, 4]), "confidence": np.array([0.0, 2, 3.6]), "correct": np.array([0.0, 2, 3.6])}
    svg = draw.reliability(bins, 0.0)
    xml.etree.ElementTree.fromstring(svg)
    line = dict(re.findall(r'(\w\d)="([\d.]+)"', svg[svg.index('class="ideal"') :]))
    x1, y1, x2, y2 = (float(line[name]) for name in ("x1", "y1", "x2", "y2"))
    dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(dots) == 2
    for x, y in dots:
        assert (float(x) - x1) / (x2 - x1) == pytest.approx((float(y) - y1) / (y2 - y1), abs=1e-3)


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_a_heat_map_is_strong_where_answers_are():
    rgba = pixels(draw.heat_map(np.array([[9, 1, 0], [0, 0, 0], [0, 5, 5]])))
    assert rgba.shape == (3, 3, 4) and rgba[0, 0, 2] > rgba[0, 0, 0] and rgba[0, 1, 0] > rgba[0, 1, 2]
    alpha = rgba[..., 3] / 255
    np.testing.assert_allclose(alpha**2, [[0.9, 0.1, 0], [0, 0, 0], [0, 0.5, 0.5]], atol=0.004)


def test_small_pictures_stay_as_they_are_and_large_ones_become_small():
    digit = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    uri, pixelated = draw.thumbnail(digit)
    np.testing.assert_array_equal(pixels(uri), digit)
    photo, smooth = draw.thumbnail(np.full((300, 3000, 3), 100, np.uint8))
    assert pixelated and not smooth and pixels(photo).shape == (16, 160, 3)
