"""COCO's average precision, by pycocotools, of boxes that are kept in memory."""

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAMES = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR_1",
    "AR_10",
    "AR_100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
"""COCO's twelve numbers: AP is the mean over IoU thresholds .5, .55 … .95; small is below 32² pixels, large above 96²."""


class Truth(NamedTuple):
    """The objects of an image; what is found in a crowd counts neither as right nor as wrong."""

    boxes: Float[np.ndarray, "n 4"]  # left, top, right, bottom in pixels
    labels: Int[np.ndarray, " n"]
    crowds: Bool[np.ndarray, " n"]


class Found(NamedTuple):
    """What a model found in an image."""

    boxes: Float[np.ndarray, "m 4"]
    labels: Int[np.ndarray, " m"]
    scores: Float[np.ndarray, " m"]


def average_precision(truths: Sequence[Truth], found: Sequence[Found], num_classes: int) -> dict[str, float]:
    """COCO's twelve numbers by `NAMES`, of images in the same order; NaN where there is no such object."""
    # Numbers of annotations start at 1: pycocotools takes 0 for "matched to nothing".
    images = [{"id": i} for i in range(len(truths))]
    objects = [
        {"image_id": i, "category_id": int(label), "bbox": _with_size(box), "area": _area(box), "iscrowd": int(crowd)}
        for i, truth in enumerate(truths)
        for box, label, crowd in zip(truth.boxes, truth.labels, truth.crowds, strict=True)
    ]
    results = [
        {
            "image_id": i,
            "category_id": int(label),
            "bbox": _with_size(box),
            "area": _area(box),
            "score": float(score),
            "iscrowd": 0,
        }
        for i, one in enumerate(found)
        for box, label, score in zip(one.boxes, one.labels, one.scores, strict=True)
    ]
    categories = [{"id": c} for c in range(num_classes)]
    sets = []
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        for annotations in (objects, results):
            coco = COCO()
            numbered = [annotation | {"id": k} for k, annotation in enumerate(annotations, 1)]
            coco.dataset = {"images": images, "categories": categories, "annotations": numbered}
            coco.createIndex()
            sets.append(coco)
        evaluation = COCOeval(*sets, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(x) if x >= 0 else float("nan") for name, x in zip(NAMES, evaluation.stats, strict=True)}


def _with_size(corners: Float[np.ndarray, " 4"]) -> list[float]:
    left, top, right, bottom = map(float, corners)
    return [left, top, right - left, bottom - top]


def _area(corners: Float[np.ndarray, " 4"]) -> float:
    _, _, width, height = _with_size(corners)
    return width * height
