"""The page: hostile names stay text, links lead to files, and a large report is light and quick."""

import html.parser
import time
import urllib.parse

import numpy as np
import pytest

from tests.report.test_collect import answers
from vit_jax.report import collect, draw, page

VOID = {"meta", "img", "br"}


class Reader(html.parser.HTMLParser):
    """What a browser makes of a page: tags with their attributes, and its text. Tags must be closed in order."""

    def __init__(self, content: str):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def content(n: int, classes: int, **changes) -> page.Content:
    """A page with all of its parts, with noise for photos."""
    rng = np.random.default_rng(0)
    findings = collect.find(**answers(n, classes), names=[f"class {i}" for i in range(classes)])
    photos = rng.integers(0, 256, (6, 400, 300, 3), np.uint8)
    pictures = {
        int(i): page.Picture(*draw.thumbnail(photos[i % 6]), f"photos/{i}.jpg", f"photos/{i}.jpg")
        for i in [*findings.mistakes, *findings.hits]
    }
    steps = np.arange(10, 20_010, 10)
    series = {name: (steps, rng.random(len(steps))) for name in ("train_loss", "train_accuracy", "lr", "train_grad_norm")}
    fields = {
        "title": "run",
        "about": {"model": "ViT"},
        "metrics": {"accuracy_test": 0.5, "loss_test": 1.25},
        "curves": collect.curves(series),
        "recipe": {"batch": 8, "seed": 0},
        "defaults": {"batch": 512, "seed": 0},
        "findings": findings,
        "pictures": pictures,
        "samples": [[page.Picture(*draw.thumbnail(photos[j]), f"cat {j}") for j in range(5)]] * 4,
        "throughput": {"devices": "1 × cpu"},
    }
    return page.Content(**fields | changes)


SECTIONS = ("scores", "curves", "confusion", "classes", "mistakes", "hits", "calibration", "inputs", "throughput", "recipe")


def test_every_part_is_there_with_words_for_every_picture():
    read = Reader(page.render(content(500, 7)))
    assert tuple(a["id"] for tag, a in read.tags if tag == "section") == SECTIONS
    assert [a["href"] for tag, a in read.tags if tag == "a"][: len(SECTIONS)] == [f"#{name}" for name in SECTIONS]
    assert all(a["alt"] and a["src"].startswith("data:image/") for tag, a in read.tags if tag == "img")
    assert all(a["aria-label"] for tag, a in read.tags if tag == "svg")
    assert "script" not in {tag for tag, _ in read.tags}


def test_of_what_is_not_known_nothing_is_said():
    read = Reader(page.render(page.Content(title="empty", about={})))
    assert not [tag for tag, _ in read.tags if tag == "section"]


def test_names_from_outside_stay_text():
    evil = "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "a\nb\u202e\udcff", "</style>${title}"
    given = content(200, 4)
    findings = collect.find(**answers(200, 4), names=evil)
    bad = page.Picture("data:image/png;base64,", False, evil[1], page.link(f"/x/{evil[1]}\udcff javascript:", page.Path("/y")))
    pictures = dict.fromkeys(given.pictures, bad)
    samples, about = [[bad._replace(name=evil[0])]], {evil[0]: evil[3]}
    curve = collect.Curve(evil[1], {evil[0]: (np.arange(3), np.arange(3.0))})
    read = Reader(
        page.render(
            page.Content(
                evil[0], about, {evil[1]: 0.5}, [curve], {evil[0]: evil[1]}, {}, findings, pictures, samples, {evil[2]: evil[3]}
            )
        )
    )
    assert "script" not in {tag for tag, _ in read.tags}
    assert not [a for _, a in read.tags if any(name.startswith("on") for name in a)]
    assert evil[0] in read.words and "a\\nb\\u202e\\udcff" in "".join(read.words)


def test_a_link_leads_from_the_page_to_the_file(tmp_path):
    name = "ö # 100%?\udcff:.jpg"
    address = page.link(tmp_path / "photos" / name, tmp_path / "run")
    assert address.startswith("../photos/") and urllib.parse.unquote(address, errors="surrogateescape") == f"../photos/{name}"
    assert page.link(None, tmp_path) is None


@pytest.mark.parametrize("classes", [1000, 21_841])
def test_many_classes_take_seconds_and_are_light(classes, tmp_path):
    started = time.perf_counter()
    path = page.write(content(50_000, classes), tmp_path)
    assert time.perf_counter() - started < 20  # 1 s alone on two cores
    assert path.stat().st_size < 10e6
    assert path.read_text().count('class="interval"') == min(classes, page.MOST_CLASSES)
