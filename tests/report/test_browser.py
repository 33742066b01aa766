"""The page in a browser: all parts are drawn, on a wide screen and on a phone, by day and by night."""

import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.report.test_page import SECTIONS, content
from vit_jax.report import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no chromium: `apt-get install chromium` brings one")
MARGIN = 14  # pixels at the edges of a narrow page that nothing may reach


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return page.write(content(500, 7), tmp_path_factory.mktemp("page")).as_uri()


def browse(folder, *arguments: str) -> str:
    """What the browser prints."""
    options = ["--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}", *arguments]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []
    return subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120, check=True).stdout


def pixels(folder, address: str, width: int, height: int, *options: str) -> np.ndarray:
    """A picture of the page, int (height, width, 3)."""
    browse(folder, f"--window-size={width},{height}", f"--screenshot={folder / 'shot.png'}", *options, address)
    return np.asarray(Image.open(folder / "shot.png").convert("RGB")).astype(int)


def count(shot: np.ndarray, *color: int) -> int:
    """How many pixels have about this colour."""
    return int((np.abs(shot - color).max(axis=-1) <= 12).sum())


def test_a_wide_page_shows_all_parts(address, tmp_path):
    dom = browse(tmp_path, "--dump-dom", address)
    assert tuple(re.findall(r'<section id="(\w+)">', dom)) == SECTIONS
    shot = pixels(tmp_path, address, 1200, 4200)
    assert tuple(shot[2, 2]) == (255, 255, 255)
    assert count(shot, 37, 99, 201) > 3000  # curves, links and intervals
    assert count(shot, 201, 84, 20) > 200  # the dots of the calibration
    left = shot[:, : shot.shape[1] // 2]
    assert count(left, 146, 177, 228) + count(left, 233, 187, 161) > 100  # cells of the confusion matrix
    drawn = (shot != 255).any(axis=(1, 2))
    assert (
        drawn[4000:].any() and max(map(len, "".join("01"[not row] for row in drawn[:4000]).split("0"))) < 100
    )  # no hole between the parts


def test_on_a_phone_by_night_nothing_reaches_beyond_the_edge(address, tmp_path):
    shot = pixels(tmp_path, address, 390, 9000, "--blink-settings=preferredColorScheme=0")
    assert tuple(shot[2, 2]) == (20, 23, 27)
    assert (shot[:, -MARGIN:] == shot[2, 2]).all() and (shot[:, :MARGIN] == shot[2, 2]).all()
    assert count(shot, 231, 234, 238) > 2000 and count(shot, 110, 162, 245) > 2000  # text and curves in their light colours
