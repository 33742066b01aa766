"""A source whose classes have other numbers than its files say."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vit_jax.data.features import Boxes, Label, Labels, Segmentation, Source

FIELDS = {Label: "label", Labels: "labels", Boxes: "box_labels", Segmentation: "segmentation"}


class RenumberedSource(Source):
    """The examples of another source, with class `numbers[i]` where that has i, and these class names.

    What is no class, such as the 255 of a segmentation, stays as it is.
    """

    def __init__(self, source: Source, numbers: Sequence[int], class_names: Sequence[str]):
        names, self.exif_rotated = tuple(class_names), source.exif_rotated
        self.features = {
            field: type(feature)(names) if hasattr(feature, "names") else feature for field, feature in source.features.items()
        }
        self._source, self._numbers = source, np.array(numbers)
        self._fields = [FIELDS[type(feature)] for feature in self.features.values() if type(feature) in FIELDS]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._source[index]
        return example | {name: self._renumbered(example[name]) for name in self._fields if name in example}

    def size(self, index: int) -> tuple[int, int]:
        return self._source.size(index)

    def where(self, index: int) -> str:
        return self._source.where(index)

    def path(self, index: int) -> str | None:
        return self._source.path(index)

    def _renumbered(self, labels: Any) -> Any:
        old = np.asarray(labels, int)
        known = (old >= 0) & (old < len(self._numbers))
        new = np.where(known, self._numbers[np.where(known, old, 0)], old)
        if isinstance(labels, np.ndarray):
            return new.astype(labels.dtype)
        return tuple(new.tolist()) if new.ndim else int(new)
