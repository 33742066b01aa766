"""Digits that are to be found before they can be read: one on each canvas, at any place, in any size and colours.

The digits are the bundled ones, the rest is drawn. Nearest neighbours of the pixels say little of them.
"""

from typing import Any

import cv2
import numpy as np

from vit_jax.data.digits import DigitsSource
from vit_jax.data.features import Image, Label, Source
from vit_jax.data.splits import split_range

SIDE = 32
COUNTS = {"train": 10_000, "test": 1_000}
_SIZES = 14, 25


class DigitCanvasSource(Source):
    """Images of 32x32 pixels with one digit of 14 to 24 pixels and its class: 10,000 to train on, 1,000 to test.

    Test images are made of other digits than those for training. An image depends on its number alone.
    """

    exif_rotated = False

    def __init__(self, split: str):
        self._split, self._part = split_range(split, COUNTS)
        self._digits = DigitsSource("digits", self._split)
        self.features = {"image": Image(), "label": Label(self._digits.class_names)}

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self._part[index]
        rng = np.random.default_rng([number, list(COUNTS).index(self._split)])
        digit = self._digits[number % len(self._digits)]
        side = int(rng.integers(*_SIZES))
        top, left = rng.integers(0, SIDE - side, 2, endpoint=True)
        ink = np.zeros((SIDE, SIDE, 1), np.float32)
        resized = cv2.resize(digit["image"][..., 0].astype(np.float32) / 255, (side, side), interpolation=cv2.INTER_CUBIC)
        ink[top : top + side, left : left + side, 0] = resized.clip(0, 1)
        paper, color = _two_colors(rng)
        return {"image": (paper + (color - paper) * ink).round().astype(np.uint8), "label": digit["label"]}

    def where(self, index: int) -> str:
        return f"digit_canvas {self._split}, example {self._part[index]}"

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"split": self._split, "first": self._part.start}


def _two_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Of paper and ink, the one brighter than the other by 80 of 255 or more."""
    while True:
        paper, color = rng.uniform(0, 255, (2, 3)).astype(np.float32)
        if abs(paper.mean() - color.mean()) >= 80:
            return paper, color
