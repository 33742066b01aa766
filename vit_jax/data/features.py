"""What the examples of a source offer, by field: `source.features = {"image": Image(), "label": Label(names)}`."""

from dataclasses import dataclass


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
    """`boxes`: float32 (n, 4), x0 y0 x1 y1 in pixels of the upright image; `box_labels`: (n,), numbers of these classes."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Segmentation:
    """`segmentation`: uint8 (h w), the number of a class for each pixel; 255 is ignored."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Text:
    """`text`: one or more sentences, a tuple of strings."""


Feature = Image | Label | Labels | Boxes | Segmentation | Text
