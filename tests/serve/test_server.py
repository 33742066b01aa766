"""The command as it is typed: a page in a browser, and an end that answers what was asked before."""

import os
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.browser import browser, needs_chromium
from tests.serve import malformed, models
from vit_jax.checkpoint import Opened, write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(the process of the command, its address)."""
    made, folder = models.classifier(), tmp_path_factory.mktemp("served")
    flat = {name: np.asarray(x) for name, x in flatten_dict(made.params, sep="/").items()}
    write_checkpoint(Opened(folder, "ours", flat, made.description), folder, "npz")
    command = [sys.executable, "-m", "vit_jax.serve", f"--model={folder}", "--port=0", "--batch=2", "--wait=1000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:") and str(folder) in line
        yield process, line.split()[0]
        process.kill()


@needs_chromium
def test_the_page_names_photos_by_mouse_and_keyboard_on_any_width(server, tmp_path):
    address = server[1]
    for i, name in enumerate(("one.png", "two.jpg", "broken.png")):
        (tmp_path / name).write_bytes(models.photo(i, "JPEG" if i == 1 else "PNG") if i < 2 else b"no image")
    with browser(tmp_path / "profile") as page:
        for width, dark in ((1200, False), (390, True)):
            page.show(address, width=width, dark=dark)
            page.wait_for("document.querySelector('#about').textContent === '5 classes, sees 24 × 16 pixels'")
            page.pick("#files", *tmp_path.glob("*.*g"))
            page.wait_for("document.querySelectorAll('.answer ol, .answer .bad').length === 3")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.querySelectorAll('.answer li').length") == 2 * len(models.CLASSES)
            assert "cannot be decoded" in page.evaluate("document.querySelector('.bad').textContent")
            assert page.evaluate("[...document.images].every(image => image.naturalWidth === 30 && image.alt)")
        page.evaluate("document.querySelector('#attention input').click()")
        page.wait_for("document.querySelectorAll('canvas').length === 2")
        # by keyboard alone: the number of names, and away with a photo
        page.evaluate("document.querySelector('#top input').select()")
        page.call("Input.insertText", text="2")
        page.wait_for("document.querySelectorAll('.answer li').length === 4")
        page.evaluate("document.querySelector('.title button').focus()")
        page.press("Enter")
        assert page.evaluate("document.querySelectorAll('.card').length") == 2
        assert page.evaluate("document.activeElement.ariaLabel").startswith("Remove ")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        said = {x["name"]["value"] for x in nodes if x["role"]["value"] in ("button", "spinbutton", "list")}
        assert {"Camera", "Names", "Results", "Remove all"} <= said
        assert not [address for address in page.addresses if not address.startswith((server[1], "blob:", "data:"))]
        assert all("400 (Bad Request)" in error for error in page.errors), page.errors


def test_at_the_end_what_was_asked_is_answered(server):
    process, address = server

    def ask(count: int) -> bytes:
        body = malformed.multipart(*[('name="image"; filename="a.png"', models.photo(0))] * count)
        request = urllib.request.Request(f"{address}/v1/predict", body, malformed.FORM)
        return urllib.request.urlopen(request, timeout=20).read()

    with ThreadPoolExecutor(1) as thread:
        ask(2)
        answer = thread.submit(ask, 1)  # it waits a second for one more, as two came at a time before
        while b"waiting_images 1" not in urllib.request.urlopen(f"{address}/metrics").read():
            assert not answer.done()
        process.send_signal(signal.SIGTERM)
        assert b"predictions" in answer.result()
    assert process.wait(20) == -signal.SIGTERM
