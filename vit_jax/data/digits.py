"""The handwritten digits that come with scikit-learn."""

from collections.abc import Mapping
from functools import cache

import numpy as np

from vit_jax.data.features import Image, Label, Source, digest
from vit_jax.data.splits import split_range


class DigitsSource(Source):
    """Handwritten digits of 8x8 pixels that come with scikit-learn: 1,437 for training, 360 for testing, stratified.

    `digits_0to4` keeps the classes 0 to 4 only. Images are uint8 (8 8 1), 0..255. Their order is fixed and mixed.
    """

    exif_rotated = False

    def __init__(self, dataset: str, split: str):
        names = tuple("01234" if dataset == "digits_0to4" else "0123456789")
        self.features = {"image": Image(), "label": Label(names)}
        splits = {}
        for name, (images, labels) in _digits().items():
            kept = labels < len(names)
            splits[name] = images[kept], labels[kept]
        name, part = split_range(split, {name: len(labels) for name, (_, labels) in splits.items()})
        self._images, self._labels = (array[part.start : part.stop] for array in splits[name])
        self._name = f"{dataset} {split}"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self._images[index], "label": int(self._labels[index])}

    def where(self, index: int) -> str:
        return f"{self._name}, example {index}"

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"labels": digest(self._labels)}


class DrawnDigits(Source):
    """Images that are drawn with the bundled digits when they are asked for: a kind has a `name` and, by split, `counts`.

    An image depends on its number and split alone, and those of the test split are made of other digits.
    """

    exif_rotated = False
    name: str
    counts: Mapping[str, int]

    def __init__(self, split: str):
        self._split, self._part = split_range(split, self.counts)
        self._digits = DigitsSource("digits", self._split)

    def __len__(self) -> int:
        return len(self._part)

    def _number_and_rng(self, index: int) -> tuple[int, np.random.Generator]:
        number = self._part[index]
        return number, np.random.default_rng([number, list(self.counts).index(self._split)])

    def where(self, index: int) -> str:
        return f"{self.name} {self._split}, example {self._part[index]}"

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"split": self._split, "first": self._part.start}


@cache
def _digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns images uint8 (b 8 8 1) and labels (b,) of `train` and `test`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    parts = train_test_split(images, digits.target, test_size=360, stratify=digits.target, random_state=0)
    train_images, test_images, train_labels, test_labels = parts
    return {"train": (train_images, train_labels), "test": (test_images, test_labels)}
