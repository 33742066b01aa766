"""Images with boxes as a source of examples, whatever layout they come from."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data.features import Boxes, Image, digest
from vit_jax.data.host.decode import ImageError, header_size
from vit_jax.data.image_files import ImageFiles
from vit_jax.data.listing import read_file, shown
from vit_jax.errors import UserError, printable

_FAR = 0.1  # of a side of the image: so far a box may reach beyond it unnoticed

Read = Callable[[], tuple[list["Picture"], list[str]]]
"""Reads and checks a split: its pictures and the names of the classes."""


@dataclass
class Picture:
    """An image and its objects: corners in pixels, classes, and which are crowds (or VOC's difficult ones).

    Of a `relative` picture corners are parts of its width and height, which nobody has read yet; another's `size` (h, w) is
    that of its annotations. `beyond` says which boxes reach far beyond the image.
    """

    path: Path
    relative: bool = False
    size: tuple[float, float] | None = None
    beyond: list[str] = field(default_factory=list)
    corners: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)

    def add(self, corners: Sequence[float], label: int, size: tuple[float, float], where: str, crowd: bool = False) -> None:
        """Adds a box of an image of `size` (h, w), clipped to it. Raises UserError with `where` if nothing is left."""
        if not all(math.isfinite(x) for x in corners):
            raise UserError(f"{where}: the box {list(corners)} has numbers that are not finite: correct or remove it")
        left, top, right, bottom = corners
        if right <= left or bottom <= top:
            raise UserError(f"{where}: the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) has no area: remove it")
        height, width = size
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            raise UserError(
                f"{where}: the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) lies outside of its image, which is"
                f" {width:g} pixels wide and {height:g} high"
            )
        self.size = None if self.relative else size
        far = max(-left / width, -top / height, right / width - 1, bottom / height - 1)
        if far > _FAR:
            self.beyond.append(f"{where}: from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) of {width:g} x {height:g}")
        self.corners.append((max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)))
        self.labels.append(label)
        self.crowds.append(crowd)


class DetectionSource(ImageFiles):
    """Pictures as examples: `image` (encoded bytes), `boxes` (n, 4), `box_labels` (n,) and `box_crowd` (n,).

    Boxes are (left, top, right, bottom) in pixels of the upright image. Crowds are for the evaluation, which ignores what
    is found there; training leaves them out.
    """

    def __init__(self, pictures: Sequence[Picture], class_names: Sequence[str]):
        super().__init__([picture.path for picture in pictures])
        self.features = {"image": Image(), "boxes": Boxes(tuple(class_names))}
        self._pictures = pictures

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self._pictures[index]
        image = read_file(picture.path)
        boxes = np.array(picture.corners, np.float32).reshape(-1, 4)
        if len(boxes):
            boxes *= _scale(picture, image)
        return {
            "image": image,
            "boxes": boxes,
            "box_labels": np.array(picture.labels, np.int32),
            "box_crowd": np.array(picture.crowds, bool),
        }

    def size(self, index: int) -> tuple[int, int]:
        """As annotated, where that is more than nothing; of others the header is read."""
        picture = self._pictures[index]
        if picture.size and all(1 <= side < math.inf for side in picture.size):
            return round(picture.size[0]), round(picture.size[1])
        return header_size(read_file(picture.path), exif_rotated=True)

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"boxes": digest((picture.corners, picture.labels) for picture in self._pictures)}


def _scale(picture: Picture, image: bytes) -> np.ndarray:
    """What makes pixels of a picture's corners.

    Raises UserError for boxes that were drawn on an image of another size, or on one that was not turned upright.
    """
    try:
        height, width = header_size(image, exif_rotated=True)
    except ImageError:  # the loader's to report: it knows what to do about it
        return np.ones(4, np.float32)
    if picture.relative:
        return np.array([width, height, width, height], np.float32)
    if (height, width) != picture.size:
        turned = " as its EXIF tag turns it upright" if header_size(image) == picture.size else ""
        raise UserError(
            f"{shown(picture.path)} is {width} x {height} pixels (width x height){turned}, and its boxes are annotated for "
            f"{picture.size[1]:g} x {picture.size[0]:g}: annotate the images as they are, or change both together"
        )
    return np.ones(4, np.float32)


def check_names(names: Sequence[Any], file: Path) -> list[str]:
    """The names of classes, which may be numbers. UserError for anything else."""
    for name in names:
        if not isinstance(name, str | int | float) or not str(name).strip():
            raise UserError(f"{shown(file)}: a class is called {printable(repr(name), 60)}: each must have a name")
    return [str(name) for name in names]
