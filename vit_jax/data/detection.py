"""Folders of images with boxes, in the layouts that people have: COCO's JSON, YOLO's text files, Pascal VOC's XML.

`open_folder` tells them apart. All annotations are read and checked at the start: a box without an area, with NaN or
outside of its image, an image that is missing, a class without a name are errors that name file and annotation.
"""

import logging
from pathlib import Path

from vit_jax.data import coco, voc, yolo
from vit_jax.data.boxes import DetectionSource
from vit_jax.data.listing import shown
from vit_jax.data.splits import chosen, part_of
from vit_jax.errors import UserError, printable

OFFERS = "boxes"
"""What such a folder has beside images."""
LAYOUTS = (coco, yolo, voc)
"""Whose `splits(folder)` are functions that read a split; {} for a folder of another layout."""

log = logging.getLogger("vit_jax")


def open_folder(path: str, split: str) -> DetectionSource | None:
    """The examples of a split, or part of it, of a folder in one of the `LAYOUTS`; None for any other folder.

    Raises UserError for a split that is not there, and for whatever is wrong with an annotation.
    """
    root = Path(path)
    for layout in LAYOUTS:
        if splits := layout.splits(root):
            read = chosen(splits, split, root, "boxes")
            try:
                pictures, class_names = read()
            except UserError:
                raise
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as e:
                raise UserError(f"{shown(root)}: the annotations for {split!r} are damaged: {printable(repr(e))}") from e
            if beyond := [where for picture in pictures for where in picture.beyond]:
                log.warning(
                    "%s: %d of %d boxes reach far beyond their image and are cut at its edge, such as %s. Are their numbers in "
                    "the order that this layout has?",
                    *(shown(root), len(beyond), sum(len(picture.corners) for picture in pictures), beyond[0]),
                )
            part = part_of(split, len(pictures))
            return DetectionSource(pictures[part.start : part.stop], class_names)
    return None
