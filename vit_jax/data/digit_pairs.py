"""Pictures to try captions on: two of the bundled digits on each, and a sentence that says which, and where."""

from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.digit_canvas import two_colors
from vit_jax.data.digit_scenes import resized_ink
from vit_jax.data.digit_sentences import NAMES
from vit_jax.data.digits import DrawnDigits
from vit_jax.data.features import Boxes, Image, Text

SIDE = 32
COUNTS = {"train": 20_000, "test": 500}
VOCAB = Path(__file__).with_name("digit_pair_words.txt")
"""WordPiece: every word of the sentences."""
_SIZES = 9, 13
_APART = 4
"""By so many pixels two digits lie farther apart on one axis than on the other, so that only one relation is true."""
_RELATIONS = "above", "left of"
"""By axis: of the first digit to the second."""


class DigitPairsSource(DrawnDigits):
    """Images of 32x32 pixels with two bright digits on dark paper, in several sizes and colours. See `DrawnDigits`.

    There are 20,000 to train on, 500 to test.

    `text` is one sentence in the order of reading, such as "a three left of a seven" or "an eight above a one". `boxes` are
    (left, top, right, bottom) of the ink of the digits that it names, in its order, `box_labels` these digits.
    """

    name, counts = "digit_pairs", COUNTS

    def __init__(self, split: str):
        super().__init__(split)
        self.features = {"image": Image(), "text": Text(VOCAB), "boxes": Boxes(NAMES["en"])}

    def __getitem__(self, index: int) -> dict[str, Any]:
        _, rng = self._number_and_rng(index)
        digits = [self._digits[int(i)] for i in rng.integers(len(self._digits), size=2)]
        inks = [resized_ink(digit["image"], int(rng.integers(*_SIZES))) for digit in digits]
        axis, corners = _places(rng, [ink.shape for ink in inks])
        paper, color = sorted(two_colors(rng), key=np.mean)
        ink = np.zeros((SIDE, SIDE, 1), np.float32)
        for (top, left), part in zip(corners, inks, strict=True):
            ink[top : top + part.shape[0], left : left + part.shape[1], 0] = part
        labels = [digit["label"] for digit in digits]
        ends = [corner + part.shape for corner, part in zip(corners, inks, strict=True)]
        return {
            "image": (paper + (color - paper) * ink).round().astype(np.uint8),
            "text": (f"{_named(labels[0])} {_RELATIONS[axis]} {_named(labels[1])}",),
            "boxes": np.concatenate([corners[:, ::-1], np.array(ends)[:, ::-1]], axis=1).astype(np.float32),
            "box_labels": np.array(labels, np.int32),
            "box_crowd": np.zeros(2, bool),
        }


def _named(digit: int) -> str:
    name = NAMES["en"][digit]
    return f"{'an' if name[0] in 'aeiou' and name != 'one' else 'a'} {name}"


def _places(rng: np.random.Generator, sizes: list[tuple[int, int]]) -> tuple[int, np.ndarray]:
    """(the axis on which they lie apart, (top, left) of both), the first one above or left of the other."""
    shapes = np.array(sizes)
    while True:
        corners = np.stack([rng.integers(0, SIDE - shape + 1) for shape in shapes])
        first, second = corners + shapes / 2
        away = np.abs(second - first)
        axis = int(away.argmax())
        if away[axis] - away[1 - axis] >= _APART and corners[0, axis] + shapes[0, axis] < corners[1, axis]:
            return axis, corners
