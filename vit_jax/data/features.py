"""A source of examples, and what it offers: `source.features` describes each field of its examples."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vit_jax.data.host.decode import header_size
from vit_jax.errors import UserError


@dataclass(frozen=True)
class Image:
    """`image`: encoded bytes, or uint8 (h w c)."""


@dataclass(frozen=True)
class Label:
    """`label`: the number of one of these classes."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Labels:
    """`labels`: the numbers of some of these classes, or none."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Boxes:
    """`boxes`: float32 (n, 4), x0 y0 x1 y1 in pixels of the upright image; `box_labels`: (n,), numbers of these classes;
    `box_crowd`: bool (n,), what an evaluation ignores and training leaves out.
    """

    names: tuple[str, ...]


@dataclass(frozen=True)
class Segmentation:
    """`segmentation`: uint8 (h w), the number of a class for each pixel of the upright image; 255 is ignored.

    `colors`: (r, g, b) of each class, for pictures; () where none are given.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Text:
    """`text`: one or more sentences, a tuple of strings. `vocab`: the file of a vocabulary that comes with the data."""

    vocab: Path | None = None


Feature = Image | Label | Labels | Boxes | Segmentation | Text


class ExampleError(UserError):
    """What is wrong with an example, as the rest of a sentence that begins with its name: "has label 12"."""


class Source(Protocol):
    """Examples by number: `source[i]` is a dict of what `features` describes, such as {"image": bytes, "label": 3}."""

    features: Mapping[str, Feature]  # by field
    exif_rotated: bool  # whether images are to be turned upright as their EXIF tag says

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that the examples have, in the order of their numbers; () where there are none."""
        return next((feature.names for feature in self.features.values() if hasattr(feature, "names")), ())

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def size(self, index: int) -> tuple[int, int]:
        """(h, w) of an example's upright image, from what is known of it or from its header. Raises ImageError."""
        return header_size(self[index]["image"], exif_rotated=self.exif_rotated)

    def texts(self, index: int) -> tuple[str, ...]:
        """The sentences of an example, where there are some; without reading its image, where a source can do that."""
        return tuple(self[index]["text"])

    def fingerprint(self) -> dict[str, str | int]:
        """What the order of a run depends on, each part short enough to be kept: what differs tells what has changed.

        Cheap: no image is read. Equal on every machine that holds the same data.
        """
        return {"count": len(self), "classes": digest(self.class_names)}

    def where(self, index: int) -> str:
        """Returns how an error names the example: the path of its file, or 'digits train, example 17'."""
        ...

    def path(self, index: int) -> str | None:
        """The file of the example, None if it has none of its own."""
        return None


def digest(values: Iterable[object]) -> str:
    """16 hexadecimal digits that tell one sequence of texts or numbers from another."""
    digits = hashlib.blake2s(digest_size=8)
    for value in values:
        digits.update(f"{value}\0".encode("utf-8", "surrogatepass"))
    return digits.hexdigest()


_SIDE = 512  # no crop is larger than this image of `example`


def example(features: Mapping[str, Feature]) -> dict[str, Any]:
    """The smallest example that has these fields, for whoever needs shapes alone."""
    fields: dict[type, dict[str, Any]] = {
        Image: {"image": np.zeros((_SIDE, _SIDE, 3), np.uint8)},
        Label: {"label": 0},
        Labels: {"labels": (0,)},
        Boxes: {"boxes": np.zeros((0, 4), np.float32), "box_labels": np.zeros(0, np.int32), "box_crowd": np.zeros(0, bool)},
        Segmentation: {"segmentation": np.zeros((_SIDE, _SIDE), np.uint8)},
        Text: {"text": ("",)},
    }
    return {name: value for feature in features.values() for name, value in fields[type(feature)].items()}
