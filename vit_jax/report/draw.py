"""Curves as SVG, pictures as data URIs: what a page holds without any other file. Colours come from the page's style."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from vit_jax.report.collect import Curve

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 26
"""Around the axes, in pixels."""
SIDE = 160
"""The longer side of a picture, in pixels."""
_RIGHT, _WRONG = (37, 99, 201), (201, 84, 20)


def compact(x: float) -> str:
    """A number for an axis: 0.25, 1.5k, 1e-05."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{suffix}"
    return f"{x:.3g}"


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`."""
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(curve: Curve) -> str:
    """The lines of a curve over the steps, in the order of their names; line i has the class `line li`."""
    steps = np.concatenate([s for s, _ in curve.lines.values()])
    values = np.concatenate([v for _, v in curve.lines.values()])
    at_y = ticks(float(values.min()), float(values.max()))
    low, high = float(steps.min()), float(max(steps.max(), steps.min() + 1))
    at_x = [x for x in ticks(low, high) if low <= x <= high and x == round(x)]
    x_of, y_of = _scale(low, high, LEFT, WIDTH - RIGHT), _scale(at_y[0], at_y[-1], HEIGHT - BOTTOM, TOP)
    parts = [_axes(at_x, at_y, x_of, y_of)]
    for i, (s, v) in enumerate(curve.lines.values()):
        points = [(x_of(float(x)), y_of(float(y))) for x, y in zip(s, v, strict=True)]
        parts.append(f'<polyline class="line l{i % 6}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        if len(points) <= 12:
            parts += [f'<circle class="dot l{i % 6}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points]
    last = ", ".join(f"{name} ends at {v[-1]:.4g}" for name, (_, v) in curve.lines.items())
    return _svg(parts, f"{curve.title} over the steps {compact(low)} to {compact(high)}: {last}")


def reliability(bins: Mapping[str, Float[np.ndarray, " bins"]], ece: float) -> str:
    """Accuracy by confidence as bars on the diagonal of a model that is always as sure as it is right."""
    n, total = len(bins["count"]), bins["count"].sum()
    x_of, y_of = _scale(0, 1, LEFT, WIDTH - RIGHT), _scale(0, 1, HEIGHT - BOTTOM, TOP)
    quarters = [0, 0.25, 0.5, 0.75, 1]
    parts = [_axes(quarters, quarters, x_of, y_of)]
    for i in np.flatnonzero(bins["count"]):
        count = bins["count"][i]
        accuracy, confidence = bins["correct"][i] / count, bins["confidence"][i] / count
        left, width = x_of(i / n) + 1, (WIDTH - LEFT - RIGHT) / n - 2
        top, opacity = y_of(accuracy), 0.35 + 0.65 * math.sqrt(count / total)
        words = f"{count:.0f} images with confidence {confidence:.3f} on average: accuracy {accuracy:.3f}"
        parts.append(
            f'<rect class="column" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{y_of(0) - top:.1f}" '
            f'opacity="{opacity:.2f}"><title>{words}</title></rect>'
        )
        parts.append(f'<circle class="dot l1" cx="{x_of(confidence):.1f}" cy="{y_of(accuracy):.1f}" r="3"/>')
    parts.append(f'<line class="ideal" x1="{x_of(0)}" y1="{y_of(0)}" x2="{x_of(1)}" y2="{y_of(1)}"/>')
    return _svg(parts, f"Accuracy by confidence in {n} bins; the expected calibration error is {ece:.4f}")


def heat_map(heat: Int[np.ndarray, "cells cells"]) -> str:
    """A data URI: a pixel a cell, of strength √(share of its row), which shows rare ones; right and wrong differ in colour."""
    share = heat / np.maximum(heat.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(len(heat), dtype=bool)
    pixels = np.where(diagonal[..., None], _RIGHT, _WRONG)
    rgba = np.concatenate([pixels, np.rint(255 * np.sqrt(share))[..., None]], axis=-1).astype(np.uint8)
    return _uri(Image.fromarray(rgba), "PNG")


def thumbnail(pixels: UInt8[np.ndarray, "h w 3"]) -> tuple[str, bool]:
    """(data URI, whether it is so small that its pixels are to be seen)."""
    picture = Image.fromarray(pixels)
    if small := max(picture.size) <= 48:
        return _uri(picture, "PNG"), small
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX if max(picture.size) > 8 * SIDE else Image.Resampling.LANCZOS)
    return _uri(picture, "JPEG", quality=80), small


def _uri(picture: Image.Image, kind: str, **options: int) -> str:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _scale(low: float, high: float, start: float, end: float):
    return lambda x: start + (x - low) / (high - low) * (end - start)


def _axes(at_x: Sequence[float], at_y: Sequence[float], x_of, y_of) -> str:
    parts = []
    for y in at_y:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{compact(y)}</text>')
    for x in at_x:
        parts.append(f'<text x="{x_of(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{compact(x)}</text>')
    return "".join(parts)


def _svg(parts: Sequence[str], words: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(words)}">{"".join(parts)}</svg>'
