"""Digits that are to be found before they can be read: one on each canvas, at any place, in any size and colours.

The digits are the bundled ones, the rest is drawn. Nearest neighbours of the pixels say little of them.
"""

from typing import Any

import cv2
import numpy as np

from vit_jax.data.digits import DrawnDigits
from vit_jax.data.features import Image, Label

SIDE = 32
COUNTS = {"train": 10_000, "test": 1_000}
_SIZES = 14, 25


class DigitCanvasSource(DrawnDigits):
    """Images of 32x32 pixels with one digit of 14 to 24 pixels and its class: 10,000 to train on, 1,000 to test.

    See `DrawnDigits`.
    """

    name, counts = "digit_canvas", COUNTS

    def __init__(self, split: str):
        super().__init__(split)
        self.features = {"image": Image(), "label": Label(self._digits.class_names)}

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, rng = self._number_and_rng(index)
        digit = self._digits[number % len(self._digits)]
        side = int(rng.integers(*_SIZES))
        top, left = rng.integers(0, SIDE - side, 2, endpoint=True)
        ink = np.zeros((SIDE, SIDE, 1), np.float32)
        resized = cv2.resize(digit["image"][..., 0].astype(np.float32) / 255, (side, side), interpolation=cv2.INTER_CUBIC)
        ink[top : top + side, left : left + side, 0] = resized.clip(0, 1)
        paper, color = two_colors(rng)
        return {"image": (paper + (color - paper) * ink).round().astype(np.uint8), "label": digit["label"]}


def two_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Of paper and ink, the one brighter than the other by 80 of 255 or more."""
    while True:
        paper, color = rng.uniform(0, 255, (2, 3)).astype(np.float32)
        if abs(paper.mean() - color.mean()) >= 80:
            return paper, color
