"""Scenes to try detection and segmentation on: the bundled digits, in several sizes and colours, on parts of two photos.

Digits and photos are real, the layout is synthetic. Boxes and masks are exact.
"""

from functools import cache
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from vit_jax.data.digits import DrawnDigits
from vit_jax.data.features import Boxes, Image, Segmentation

SIDE = 64
COUNTS = {"train": 20_000, "test": 500}
_MOST = 5
_SIZES = 14, 30
_INK = 0.3
_OF_TEST = 0.7
"""The share of a photo's width from which on it is for testing."""


class DigitScenesSource(DrawnDigits):
    """Scenes of 64x64 pixels with 1 to 5 digits that do not overlap, 14 to 29 pixels high: 20,000 to train on, 500 to test.

    See `DrawnDigits`; of the photos, too, the test scenes have other parts. `boxes` are (left, top, right, bottom) of the
    ink, `box_labels` the digits.
    """

    name, counts = "digit_scenes", COUNTS

    def __init__(self, split: str):
        super().__init__(split)
        self.features = {"image": Image(), "boxes": Boxes(self._digits.class_names)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: x for name, x in self._scene(index).items() if name != "segmentation"}

    def _scene(self, index: int) -> dict[str, Any]:
        """`image`, what belongs to `boxes`, and `segmentation`: 0 without ink, d + 1 where that of digit d is."""
        _, rng = self._number_and_rng(index)
        scene = 0.6 * _background(rng, self._split).astype(np.float32)
        classes = np.zeros((SIDE, SIDE), np.uint8)
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        for _ in range(rng.integers(1, _MOST + 1)):
            digit = self._digits[int(rng.integers(len(self._digits)))]
            ink = resized_ink(digit["image"], int(rng.integers(*_SIZES)))
            box = _free_place(rng, ink.shape, boxes)
            color = rng.uniform(160, 255, 3).astype(np.float32)
            if box:
                left, top, right, bottom = box
                part = scene[top:bottom, left:right]
                part += (color - part) * ink[..., None]
                classes[top:bottom, left:right][ink > _INK] = digit["label"] + 1
                boxes.append(box)
                labels.append(digit["label"])
        return {
            "image": scene.round().astype(np.uint8),
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "box_labels": np.array(labels, np.int32),
            "box_crowd": np.zeros(len(boxes), bool),
            "segmentation": classes,
        }


class DigitMasksSource(DigitScenesSource):
    """The same scenes with masks for boxes: the class "background" and the ten digits, at every pixel."""

    name = "digit_masks"

    def __init__(self, split: str):
        super().__init__(split)
        self.features = {"image": Image(), "segmentation": Segmentation(("background", *self._digits.class_names))}

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = self._scene(index)
        return {name: scene[name] for name in self.features}


@cache
def _photos() -> tuple[UInt8[np.ndarray, "h w 3"], ...]:
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


def _background(rng: np.random.Generator, split: str) -> UInt8[np.ndarray, "s s 3"]:
    """A square of a photo, of its left part for training and of its right part for testing."""
    photo = _photos()[rng.integers(len(_photos()))]
    height, width, _ = photo.shape
    border = int(width * _OF_TEST)
    first, last = (0, border) if split == "train" else (border, width)
    side = rng.integers(SIDE, 150)
    top, left = rng.integers(0, height - side), rng.integers(first, last - side)
    square = cv2.resize(photo[top : top + side, left : left + side], (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return square[:, ::-1] if rng.random() < 0.5 else square


def resized_ink(digit: UInt8[np.ndarray, "8 8 1"], side: int) -> Float32[np.ndarray, "h w"]:
    """How much ink there is, 0 to 1, cut to where there is some."""
    ink = cv2.resize(digit[..., 0].astype(np.float32) / 255, (side, side), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    rows, columns = np.nonzero(ink > _INK)
    return ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _free_place(
    rng: np.random.Generator, size: tuple[int, int], boxes: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """A box of this size that touches none of the others; None if ten attempts find none."""
    height, width = size
    for _ in range(10):
        top, left = int(rng.integers(0, SIDE - height + 1)), int(rng.integers(0, SIDE - width + 1))
        right, bottom = left + width, top + height
        if all(left >= r or right <= x or top >= b or bottom <= y for x, y, r, b in boxes):
            return left, top, right, bottom
    return None
