"""From answers and metrics to the numbers of a report."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from vit_jax.evaluators import calibration

MOST_CELLS = 100
"""A confusion matrix of more classes than this is drawn in blocks of them."""
MOST_PAIRS, MOST_PICTURES, MOST_POINTS, BINS = 20, 24, 300, 15
Z95 = 1.959963984540054
"""95 % of a normal distribution lie within so many standard deviations."""
_WORDS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "update_norm": "norm of the update",
    "img_sec_core": "images a second and device",
    "ece": "expected calibration error",
    "checkpoint_stall_sec": "seconds that saving held training up",
}
"""Quantities, in the order in which they are looked at."""


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps: its lines by name, each (steps, values)."""

    title: str
    lines: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Findings:
    """What the answers of a classifier come to.

    Attributes:
      label, predicted, confidence: by example; the last is the probability of the predicted class.
      heat: examples by block of classes, actual by predicted; with at most `MOST_CELLS` classes a block is a class.
      pairs: (actual, predicted, examples) of the classes that are confused most often.
      count, correct, low, high: by class: examples, those that are right, and the ends of Wilson's interval of 95 %.
      mistakes, hits: numbers of the most confident wrong examples and of the least confident right ones.
      bins: `count`, `confidence` and `correct` by bin of the confidence, as sums.
      ece: the expected calibration error of these bins.
    """

    names: Sequence[str]
    label: Int[np.ndarray, " n"]
    predicted: Int[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]
    heat: Int[np.ndarray, "cells cells"]
    pairs: list[tuple[int, int, int]]
    count: Int[np.ndarray, " classes"]
    correct: Int[np.ndarray, " classes"]
    low: Float[np.ndarray, " classes"]
    high: Float[np.ndarray, " classes"]
    mistakes: Int[np.ndarray, " m"]
    hits: Int[np.ndarray, " h"]
    bins: dict[str, Float[np.ndarray, " bins"]]
    ece: float


def make_answers(predict: Callable[..., dict[str, Array]]) -> Callable[[Any, dict[str, Array]], dict[str, Array]]:
    """(parameters, batch) → `label`, `predicted` and `confidence`, the probability of the predicted class, by example."""

    def answers(params: Any, batch: dict[str, Array]) -> dict[str, Array]:
        p = predict(params, batch)["probabilities"]
        return {"label": batch["label"], "predicted": p.argmax(axis=-1), "confidence": p.max(axis=-1)}

    return answers


def find(
    label: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], confidence: Float[np.ndarray, " n"], names: Sequence[str]
) -> Findings:
    """All that a report says of n answers of a classifier with these classes."""
    classes, right = len(names), label == predicted
    count, correct = np.bincount(label, minlength=classes), np.bincount(label[right], minlength=classes)
    low, high = wilson(correct, count)
    by_confidence = np.argsort(confidence, kind="stable")
    bins = calibration_bins(confidence, right, BINS)
    return Findings(
        names=names,
        label=label,
        predicted=predicted,
        confidence=confidence,
        heat=confusion(label, predicted, classes, min(classes, MOST_CELLS)),
        pairs=confused_pairs(label, predicted, classes),
        count=count,
        correct=correct,
        low=low,
        high=high,
        mistakes=by_confidence[~right[by_confidence]][::-1][:MOST_PICTURES],
        hits=by_confidence[right[by_confidence]][:MOST_PICTURES],
        bins=bins,
        ece=calibration.expected_calibration_error(**bins),
    )


def confusion(
    label: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int, cells: int
) -> Int[np.ndarray, "cells cells"]:
    """Examples by block of actual and of predicted classes, of which each has as equally many classes as can be."""
    rows, columns = (np.asarray(x, np.int64) * cells // classes for x in (label, predicted))
    return np.bincount(rows * cells + columns, minlength=cells * cells).reshape(cells, cells)


def confused_pairs(
    label: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int, most: int = MOST_PAIRS
) -> list[tuple[int, int, int]]:
    """(actual, predicted, examples) of different classes, the most frequent first."""
    wrong = label != predicted
    pairs, counts = np.unique(label[wrong].astype(np.int64) * classes + predicted[wrong], return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:most]
    return [(int(pairs[i] // classes), int(pairs[i] % classes), int(counts[i])) for i in largest]


def wilson(
    correct: Int[np.ndarray, "..."], count: Int[np.ndarray, "..."]
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """The ends of Wilson's interval of 95 % for a share, 0 and 1 where nothing was counted (doi:10.2307/2276774)."""
    n = np.maximum(count, 1)
    p = correct / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    counted = np.asarray(count) > 0
    return np.where(counted, np.maximum(centre - half, 0), 0.0), np.where(counted, np.minimum(centre + half, 1), 1.0)


def calibration_bins(
    confidence: Float[np.ndarray, " n"], right: np.ndarray, bins: int
) -> dict[str, Float[np.ndarray, " bins"]]:
    """The sums of `evaluators.calibration.bin_sums` in float64, without a device."""
    edges = np.linspace(0, 1, bins + 1).astype(np.float32)
    index = np.clip(np.searchsorted(edges, confidence.astype(np.float32), side="left") - 1, 0, bins - 1)
    weights = {"count": np.ones(len(index)), "confidence": confidence.astype(np.float64), "correct": right.astype(np.float64)}
    return {name: np.bincount(index, weights=w, minlength=bins) for name, w in weights.items()}


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(steps, finite values) of each scalar in `metrics.jsonl`; of a step that stands there twice the later value counts."""
    series: dict[str, dict[int, float]] = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
            values = {str(name): float(value) for name, value in record.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # cut off where a run was killed
        for name, value in values.items():
            if np.isfinite(value):
                series.setdefault(name, {})[step] = value
    ordered = {name: sorted(values.items()) for name, values in series.items()}
    return {name: (np.array([s for s, _ in pairs]), np.array([v for _, v in pairs])) for name, pairs in ordered.items()}


def curves(series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[Curve]:
    """Lines of one quantity together, such as train_loss, loss_test and loss_test_ema, of those with two points at least."""
    grouped: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name, (steps, values) in series.items():
        grouped.setdefault(quantity(name), {})[name] = thinned(steps, values)
    order = [name for name in _WORDS if name in grouped] + sorted(grouped.keys() - _WORDS.keys())
    drawn = [name for name in order if any(len(steps) > 1 for steps, _ in grouped[name].values())]
    return [Curve(_WORDS.get(name, name), grouped[name]) for name in drawn]


def quantity(name: str) -> str:
    """'loss' of train_loss, loss_test, loss_test_ema and val2/loss."""
    name = name.rpartition("/")[2].removesuffix("_ema")
    return re.sub("_(train|test)$", "", name).removeprefix("train_") or name


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points: the last step and the mean value of each of as many stretches, the very ends as they are."""
    if len(steps) <= most:
        return steps, values
    cuts = np.linspace(1, len(steps) - 1, most - 1).astype(int)
    means = np.add.reduceat(values[: cuts[-1]], cuts[:-1]) / np.diff(cuts)
    return np.r_[steps[0], steps[cuts[1:] - 1], steps[-1]], np.r_[values[0], means, values[-1]]
