"""The page: one HTML file with its style and its pictures in it, no script, and nothing from elsewhere.

Names of classes and files come from outside: all text goes through `text`, which makes it visible and escapes it.
"""

import json
import os
import string
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.errors import printable
from vit_jax.files import write_atomically
from vit_jax.report import collect, draw
from vit_jax.report.style import STYLE
from vit_jax.run.writer import format_metric

FILE = "report.html"
MOST_NAMED, MOST_ROWS, MOST_CLASSES = 20, 25, 2000
"""A confusion matrix of more classes is a picture; of more rows a table shows the rest when it is asked to, and of more
classes the best are left out."""

PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1>$about</header>
<nav aria-label="Contents">$contents</nav>
<main>
$body
</main>
</body>
</html>
""")


class Picture(NamedTuple):
    """A thumbnail as a data URI, whether its pixels are to be seen, what stands below it, and where it leads."""

    uri: str
    pixelated: bool
    name: str
    link: str | None = None


@dataclass(frozen=True)
class Content:
    """What a page has to tell; of what is empty it says nothing.

    Attributes:
      metrics: the last value of each.
      recipe, defaults: fields by dotted name, as they are and as they would be.
      pictures: by number of an example.
      samples: by row.
    """

    title: str
    about: Mapping[str, str]
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Sequence[collect.Curve] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    findings: collect.Findings | None = None
    pictures: Mapping[int, Picture] = field(default_factory=dict)
    samples: Sequence[Sequence[Picture]] = ()
    throughput: Mapping[str, str] = field(default_factory=dict)


def pictures(findings: collect.Findings, picture_of: Callable[[int], Picture]) -> dict[int, Picture]:
    """The pictures of the examples that are to be shown, by their numbers."""
    return {i: picture_of(i) for i in map(int, [*findings.mistakes, *findings.hits])}


def write(content: Content, folder: Path) -> Path:
    """Writes `report.html` into the folder; OSError if it cannot be."""
    path = folder / FILE
    write_atomically(path, lambda f: f.write(render(content).encode()))
    return path


def render(content: Content) -> str:
    """The page as HTML."""
    found = content.findings
    sections = [
        ("scores", "Scores", _scores(content)),
        ("curves", "Curves", _curves(content.curves)),
        ("confusion", "Confusion", found and _confusion(found)),
        ("classes", "Classes", found and _classes(found)),
        (
            "mistakes",
            "Mistakes",
            found and _gallery(found.mistakes, content, "Wrong, the most confident first.", "There is none."),
        ),
        ("hits", "Hits", found and _gallery(found.hits, content, "Right, the least confident first.", "There is none.")),
        ("calibration", "Calibration", found and _calibration(found)),
        ("inputs", "Inputs", _samples(content.samples)),
        ("throughput", "Throughput", _pairs(content.throughput)),
        ("recipe", "Recipe", _recipe(content)),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    return PAGE.substitute(
        title=text(content.title),
        style=STYLE,
        about=_pairs(content.about),
        contents=" ".join(f'<a href="#{name}">{title}</a>' for name, title, _ in shown),
        body="\n".join(f'<section id="{name}"><h2>{title}</h2>{body}</section>' for name, title, body in shown),
    )


def text(value: object, most: int = 200) -> str:
    """Text from outside as HTML: control characters made visible, a long middle left out, escaped."""
    return escape(printable(value, most))


def link(path: str | os.PathLike | None, folder: Path) -> str | None:
    """The address of a file as a page in `folder` leads to it, None for none. It moves with both."""
    if path is None:
        return None
    return urllib.parse.quote(os.fsencode(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))))


def percent(share: float) -> str:
    """98.3 %."""
    return f"{100 * share:.1f} %"


def _scores(content: Content) -> str:
    cards = []
    if found := content.findings:
        right, total = int(found.correct.sum()), int(found.count.sum())
        low, high = collect.wilson(np.array(right), np.array(total))
        cards.append((percent(right / total), f"accuracy: {right:,} of {total:,} images; 95 % interval {_interval(low, high)}"))
        cards.append((f"{found.ece:.3f}", "expected calibration error"))
    body = "".join(f'<div class="card"><b>{value}</b><span>{words}</span></div>' for value, words in cards)
    last = {name: format_metric(name, value) for name, value in content.metrics.items()}
    table = f"<details{' open' if not cards else ''}><summary>the last value of all {len(last)} metrics</summary>"
    return (body and f'<div class="cards">{body}</div>') + (f"{table}{_pairs(last)}</details>" if last else "")


def _curves(curves: Sequence[collect.Curve]) -> str:
    figures = []
    for curve in curves:
        keys = "".join(
            f'<span class="key"><i class="l{i % 6}"></i>{text(name)} {text(format_metric(name, float(values[-1])))}</span>'
            for i, (name, (_, values)) in enumerate(curve.lines.items())
        )
        figures.append(f"<figure><h3>{text(curve.title)}</h3>{draw.line_chart(curve)}<figcaption>{keys}</figcaption></figure>")
    first, rest = "".join(figures[:6]), "".join(figures[6:])
    more = rest and f'<details><summary>{len(figures) - 6} more</summary><div class="curves">{rest}</div></details>'
    return first and f'<p>Over the steps; the numbers are the last values.</p><div class="curves">{first}</div>{more}'


def _confusion(found: collect.Findings) -> str:
    names, classes = [text(name, 60) for name in found.names], len(found.names)
    if classes <= MOST_NAMED:
        share = found.heat / np.maximum(found.heat.sum(axis=1, keepdims=True), 1)
        head = "".join(f'<th scope="col"><span>{name}</span></th>' for name in names)
        rows = []
        for i, name in enumerate(names):
            cells = "".join(
                f'<td class="{"right" if i == j else "wrong"}" style="--v:{share[i, j] ** (1 if i == j else 0.5):.2f}">'
                f"{found.heat[i, j] or ''}</td>"
                for j in range(classes)
            )
            rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
        matrix = f'<div class="wide"><table class="matrix"><tr><td></td>{head}</tr>{"".join(rows)}</table></div>'
        words = "A row is a class, a column what the model takes it for. Right answers are blue, mistakes orange."
    else:
        size = f"{classes:,} classes" + (f" in {len(found.heat)} blocks" if len(found.heat) < classes else "")
        words = f"From top to bottom the {size}, from left to right what the model takes them for. Right is blue, wrong orange."
        matrix = f'<img class="heat" src="{draw.heat_map(found.heat)}" alt="Confusion matrix of {size}">'
    rows = [(names[i], names[j], f"{n:,}", percent(n / found.count[i])) for i, j, n in found.pairs]
    pairs = _table(("is", "taken for", "images", "of its class"), rows, numbers=2) if rows else "<p>Nothing is confused.</p>"
    return f'<p>{words}</p><div class="beside"><div>{matrix}</div><div><h3>Most confused</h3>{pairs}</div></div>'


def _classes(found: collect.Findings) -> str:
    share = found.correct / np.maximum(found.count, 1)
    order = np.lexsort((-found.count, share, found.count == 0))
    rows = []
    for i in order[:MOST_CLASSES]:
        low, high = float(found.low[i]), float(found.high[i])
        bar = (
            f'<span class="interval"><i style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
            f'<b style="left:{100 * share[i]:.1f}%"></b></span>'
        )
        seen = found.count[i] > 0
        numbers = (percent(share[i]), _interval(low, high), bar) if seen else ("no images", "", "")
        rows.append((text(found.names[i], 60), f"{found.count[i]:,}", *numbers))
    head = ("class", "images", "accuracy", "95 % interval", '<span class="scale">0 to 100 %</span>')
    which = f"The worst {MOST_CLASSES:,} of {len(order):,} classes" if len(order) > MOST_CLASSES else "The worst"
    words = f"{which} first. The interval is Wilson's: few images leave it wide."
    return f"<p>{words}</p>{_table(head, rows, numbers=4)}"


def _gallery(chosen: Iterable[int], content: Content, order: str, nothing: str) -> str:
    found, figures = content.findings, []
    for i in map(int, chosen):
        if i not in content.pictures:
            continue
        picture, actual, said = content.pictures[i], found.names[found.label[i]], found.names[found.predicted[i]]
        wrong = found.label[i] != found.predicted[i]
        words = f"<b>{text(said, 40)}</b> {percent(found.confidence[i])}" + (f"<br>is {text(actual, 40)}" if wrong else "")
        alt = f"{said}, {percent(found.confidence[i])}" + (f", is {actual}" if wrong else "")
        figures.append(_figure(picture, words + f"<small>{text(_tail(picture.name))}</small>", alt))
    return f'<p>{order}</p><div class="gallery">{"".join(figures)}</div>' if figures else f"<p>{nothing}</p>"


def _calibration(found: collect.Findings) -> str:
    words = (
        "A bar is a bin of confidence, its height the accuracy, the stronger the more images it has; the dot is at "
        "the mean confidence. On the line the model is right as often as it is sure; below the line it is too sure. The "
        f"expected calibration error, the mean distance from the line, is <b>{found.ece:.4f}</b>."
    )
    bins, n = found.bins, len(found.bins["count"])
    rows = []
    for i in np.flatnonzero(bins["count"]):
        count = bins["count"][i]
        confidence, right = (f"{bins[name][i] / count:.3f}" for name in ("confidence", "correct"))
        rows.append((f"{i / n:.3f} to {(i + 1) / n:.3f}", f"{count:,.0f}", confidence, right))
    table = _table(("confidence", "images", "mean confidence", "accuracy"), rows, numbers=3)
    chart = f"<figure>{draw.reliability(found.bins, found.ece)}<figcaption>accuracy, by confidence</figcaption></figure>"
    return f'<p>{words}</p><div class="beside">{chart}<details><summary>as a table</summary>{table}</details></div>'


def _samples(rows: Sequence[Sequence[Picture]]) -> str:
    if not rows:
        return ""
    figures = [
        _figure(picture, text(picture.name, 60), f"{'trained' if j else 'evaluated'}: {picture.name}")
        for row in rows
        for j, picture in enumerate(row)
    ]
    words = "A row is an image: first as it is evaluated, then as it is trained on, drawn anew each time."
    return f'<p>{words}</p><div class="wide"><div class="samples" style="--n:{len(rows[0])}">{"".join(figures)}</div></div>'


def _recipe(content: Content) -> str:
    if not content.recipe:
        return ""
    written = {name: _value(value) for name, value in content.recipe.items()}
    defaults = {name: _value(value) for name, value in content.defaults.items()}
    changed = {name: value for name, value in written.items() if defaults.get(name) != value}
    everything = f"<details><summary>all {len(written)} fields</summary>{_pairs(written)}</details>"
    return f"<p>Fields that differ from their defaults.</p>{_pairs(changed)}{everything}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _figure(picture: Picture, words: str, alt: str) -> str:
    kind = ' class="pixels"' if picture.pixelated else ""
    image = f'<img{kind} src="{picture.uri}" alt="{text(alt)}" loading="lazy">'
    image = f'<a href="{escape(picture.link)}">{image}</a>' if picture.link else image
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"


def _pairs(pairs: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value, 1000)}</dd></div>" for name, value in pairs.items())
    return rows and f"<dl>{rows}</dl>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int) -> str:
    """A table of HTML; the last `numbers` columns hold numbers. Of a long one the first rows, and all when it is asked."""
    first_number = len(head) - numbers
    kinds = ["" if j < first_number else ' class="n"' for j in range(len(head))]
    top = "<tr>" + "".join(f'<th scope="col"{kind}>{name}</th>' for kind, name in zip(kinds, head, strict=True)) + "</tr>"

    def table(part: Sequence[Sequence[str]]) -> str:
        lines = ("<tr>" + "".join(f"<td{k}>{x}</td>" for k, x in zip(kinds, row, strict=True)) + "</tr>" for row in part)
        return f'<div class="wide"><table>{top}{"".join(lines)}</table></div>'

    rest = rows[MOST_ROWS:]
    return table(rows[:MOST_ROWS]) + (f"<details><summary>{len(rest):,} more</summary>{table(rest)}</details>" if rest else "")


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _tail(name: str) -> str:
    """The end of a path, which tells most."""
    return "/".join(name.split("/")[-2:])
