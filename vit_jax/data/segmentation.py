"""Images with masks, which have the number of a class at every pixel: folders of both, as ADE20K's or Pascal VOC's.

`open_folder` tells them apart. Which files belong together is checked at the start; a mask of another size than its image,
or with a class that has no name, is an error that names it when it is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vit_jax.data.features import Image, Segmentation
from vit_jax.data.host.decode import decode_indices
from vit_jax.data.host.view import IGNORED
from vit_jax.data.image_files import ImageFiles
from vit_jax.data.listing import is_file, list_images, read_file, read_text, shown
from vit_jax.data.splits import TEST_NAMES, part_of
from vit_jax.errors import UserError, printable, unknown

OFFERS = "segmentation"
"""What such a folder has beside images."""
MASKS = ("masks", "annotations")
"""What the folder beside `images` may be called."""
TABLES = ("classes.json", "classes.txt", "objectInfo150.txt")
_LOOKED_AT = 8  # so many masks, evenly spaced, are looked at when a folder is opened
_TRAIN_NAMES, _TEST_NAMES = ("train", "training"), (*TEST_NAMES, "testing")
VOC = tuple(
    "background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,pottedplant,"
    "sheep,sofa,train,tvmonitor".split(",")
)


@dataclass(frozen=True)
class Classes:
    """What the numbers in masks mean.

    Attributes:
      names: in the order of their numbers.
      colors: (r, g, b) of each, for pictures and for masks in RGB; () where none are given.
      reduce_zero_label: the masks count the classes from 1, and 0 is ignored, as in ADE20K.
      values: what stands for each class in the masks, if not its number: (0, 255) for background and object.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...] = ()
    reduce_zero_label: bool = False
    values: tuple[int, ...] = ()


class SegmentationSource(ImageFiles):
    """Pairs of files as examples: `image` (encoded bytes) and `segmentation` (h, w), of the upright image; 255 is ignored."""

    def __init__(self, pairs: Sequence[tuple[Path, Path]], classes: Classes):
        super().__init__([image for image, _ in pairs])
        self.features = {"image": Image(), "segmentation": Segmentation(classes.names, classes.colors)}
        self._masks, self._classes = [mask for _, mask in pairs], classes

    def __getitem__(self, index: int) -> dict[str, Any]:
        mask = self._masks[index]
        indices = class_indices(read_file(mask), self._classes, image=self.where(index), mask=shown(mask))
        return {"image": read_file(self._images[index]), "segmentation": indices}


def class_indices(data: bytes, classes: Classes, *, image: str, mask: str) -> UInt8[np.ndarray, "h w"]:
    """The numbers of the classes in an encoded mask, 255 for what is ignored. UserError names the image and its mask."""
    try:
        pixels = decode_indices(data, colors=bool(classes.colors))
    except UserError as e:
        raise type(e)(f"{mask}: {e}") from e
    if pixels.ndim == 3 or classes.values:
        try:
            return _of_colors(pixels, classes.colors) if pixels.ndim == 3 else _of_values(pixels, classes.values)
        except LookupError as e:
            stands = f"{image} has pixels of {e.args[0]} in its mask {mask}, which stands for no class"
            raise UserError(f"{stands}: name it in the table of classes") from e
    indices = pixels
    if classes.reduce_zero_label:
        indices = np.where(indices == 0, np.uint8(IGNORED), indices - np.uint8(indices != IGNORED))
    counts = np.bincount(indices.ravel(), minlength=256)
    if beyond := np.flatnonzero(counts[len(classes.names) : IGNORED]).tolist():
        number = beyond[0] + len(classes.names)
        raise UserError(
            f"{image} has {counts[number]:,} pixels of class {number} in its mask {mask}, and only classes 0 to "
            f"{len(classes.names) - 1} have a name (255 is ignored): name it in the table of classes"
        )
    return indices


def _of_values(pixels: UInt8[np.ndarray, "h w"], values: Sequence[int]) -> UInt8[np.ndarray, "h w"]:
    """The classes whose `values` the pixels have; 255 is ignored where it is none of them. LookupError with any other."""
    table = np.full(256, IGNORED, np.uint8)
    table[list(values)] = np.arange(len(values))
    if others := _held(pixels) - {*values, IGNORED}:
        raise LookupError(min(others))
    return table[pixels]


def _of_colors(pixels: UInt8[np.ndarray, "h w 3"], colors: Sequence[tuple[int, int, int]]) -> UInt8[np.ndarray, "h w"]:
    """The classes whose `colors` the pixels have; black is ignored where it is none of them. LookupError with any other."""
    pack = np.array([1 << 16, 1 << 8, 1])
    number_of = {0: IGNORED} | {int(np.dot(color, pack)): i for i, color in enumerate(colors)}
    known = np.array(sorted(number_of))
    packed = pixels @ pack
    place = np.minimum(np.searchsorted(known, packed), len(known) - 1)
    if (others := packed[known[place] != packed]).size:
        raise LookupError(f"the colour {tuple(int(others[0]) >> shift & 255 for shift in (16, 8, 0))}")
    return np.array([number_of[color] for color in known.tolist()], np.uint8)[place]


def _held(pixels: UInt8[np.ndarray, "h w"]) -> set[int]:
    """The numbers that occur in a mask."""
    return set(np.flatnonzero(np.bincount(pixels.ravel())).tolist())


def open_folder(path: str, split: str) -> SegmentationSource | None:
    """The examples of a split, or part of it, of a folder in one of the layouts; None for any other folder.

      images/NAME.jpg and masks/NAME.png, or both with a folder for each split in between: images/train/NAME.jpg,
        masks/train/NAME.png; or train/images and train/masks. ADE20K's is one of them: annotations/training.
      VOC: JPEGImages, SegmentationClass, and ImageSets/Segmentation/{train,val}.txt.

    Masks are PNGs, and belong to the image of the same name, with `_mask` behind it or not. Class names come from
    `classes.txt`, one a line, or `classes.json` with `names` and, if wanted, the other fields of `Classes`. VOC's and ADE20K's
    own (objectInfo150.txt) are known.

    Raises UserError for a split that is not there, a missing mask or image, and a table without names.
    """
    root = Path(path)
    is_voc = (root / "SegmentationClass").is_dir() and (root / "ImageSets" / "Segmentation").is_dir()
    asked = split.partition("[")[0]
    if is_voc:
        lists = {file.stem: file for file in sorted((root / "ImageSets" / "Segmentation").glob("*.txt"))}
        names = read_text(lists[_which(asked, lists, root)]).split()
        pairs = [(root / "JPEGImages" / f"{n}.jpg", root / "SegmentationClass" / f"{n}.png") for n in names]
    else:
        found = _folder_splits(root)
        if not found:
            return None
        pairs = _pairs(root, found, asked)
    for image, mask in pairs:
        if not is_file(image):
            raise UserError(f"{shown(image)} does not exist: add it, or take its name out of the list")
        if not is_file(mask):
            raise UserError(f"{shown(image)} has no mask: add {shown(mask)}, or remove the image")
    part, classes = part_of(split, len(pairs)), class_table(root, Classes(VOC) if is_voc else None)
    _check_some(pairs, classes)
    return SegmentationSource(pairs[part.start : part.stop], classes)


def _folder_splits(root: Path) -> dict[str, tuple[Path, Path]]:
    """{split: (its images, its masks)}, of a folder without splits {"": …}; {} for a folder of another layout."""
    splits = (*_TRAIN_NAMES, *_TEST_NAMES)
    for masks in (name for name in MASKS if (root / "images").is_dir() and _has_masks(root / name)):
        below = [p.name for p in sorted((root / "images").iterdir()) if p.is_dir() and p.name in splits]
        return {name: (root / "images" / name, root / masks / name) for name in below or [""]}
    below = {name: next((root / name / masks for masks in MASKS if _has_masks(root / name / masks)), None) for name in splits}
    return {
        name: (root / name / "images", masks) for name, masks in below.items() if masks and (masks.parent / "images").is_dir()
    }


def _has_masks(folder: Path) -> bool:
    return folder.is_dir() and (any(folder.glob("*.png")) or any(folder.glob("*/*.png")))


def _pairs(root: Path, splits: Mapping[str, tuple[Path, Path]], asked: str) -> list[tuple[Path, Path]]:
    """(image, where its mask must be) of a split."""
    if "" in splits and asked not in _TRAIN_NAMES:
        masks = splits[""][1]
        raise UserError(
            f"{shown(root / 'images')} has no folder for {asked!r}: make images/{asked} and {masks.name}/{asked}, or name"
            " parts, such as --config.pp.train='train[:90%]' and --config.pp.test='train[90%:]'"
        )
    images, masks = splits["" if "" in splits else _which(asked, splits, root)]
    found = list_images(str(images))
    if not found.images:
        raise UserError(f"{shown(images)} holds no images{found.report() and f': {found.report()}'}")
    return [(images / name, _mask_of((masks / name).with_suffix(".png"))) for name in found.images]


def _mask_of(path: Path) -> Path:
    """The mask of this name, or of this name and `_mask` where that is there alone."""
    other = path.with_stem(f"{path.stem}_mask")
    return other if is_file(other) and not is_file(path) else path


def _check_some(pairs: Sequence[tuple[Path, Path]], classes: Classes) -> None:
    """Raises UserError for masks of 0 and 255, as many write an object: nothing but 0 would be learnt."""
    if len(classes.names) == 1 or classes.values or classes.reduce_zero_label:
        return
    some = [pairs[i][1] for i in np.linspace(0, len(pairs) - 1, min(_LOOKED_AT, len(pairs)), dtype=int)]
    held: set[int] = set()
    for mask in some:
        try:
            held |= _held(decode_indices(read_file(mask)))
        except UserError:  # said when it is read
            return
        if held - {0, IGNORED}:
            return
    if held == {0, IGNORED}:
        raise UserError(
            f"{shown(some[0])} and others hold 0 and 255 only, and 255 is ignored. If it stands for a class, say so in a "
            f'classes.json: {{"names": {json.dumps(list(classes.names[:2]))}, "values": [0, 255]}}'
        )


def _which(asked: str, splits: Mapping[str, Any], where: Path) -> str:
    """The split that is meant by a name: itself, or one that is called a little differently."""
    names = next((names for names in (_TRAIN_NAMES, _TEST_NAMES) if asked in names), ())
    if match := next((name for name in (asked, *names) if name in splits), None):
        return match
    raise unknown(f"split of {shown(where)}", asked, map(printable, splits))


def class_table(root: Path, otherwise: Classes | None = None) -> Classes:
    """The table of a folder. UserError where it has none and there is no other, or one that cannot be read."""
    file = next((root / name for name in TABLES if (root / name).is_file()), None)
    if file is None and otherwise:
        return otherwise
    if file is None:
        raise UserError(f"{shown(root)} has no classes.txt: write one, a name a line, in the order of the masks' numbers")
    if file.suffix == ".json":
        table = _json(file)
    elif file.name == "classes.txt":
        table = Classes(tuple(line.strip() for line in read_text(file).split("\n") if line.strip()))
    else:  # a heading, then a row a class, whose last column is its name
        rows = [line for line in read_text(file).split("\n")[1:] if line.strip()]
        table = Classes(tuple(row.split("\t")[-1].strip() for row in rows), reduce_zero_label=True)
    if not 1 <= len(table.names) <= IGNORED:
        raise UserError(f"{shown(file)} names {len(table.names)} classes, allowed are 1 to {IGNORED}, as masks have 8 bits")
    return table


def _json(file: Path) -> Classes:
    text = read_text(file)
    try:
        content = json.loads(text)
        names, colors = content["names"], tuple(tuple(color) for color in content.get("colors", ()))
        reduced, values = content.get("reduce_zero_label", False), tuple(content.get("values", ()))
        fine = isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)
        fine &= isinstance(reduced, bool) and not (reduced and values)
        fine &= len(colors) in (0, len(names)) and all(len(c) == 3 for c in colors)
        fine &= len(values) in (0, len(names)) and len(set(values)) == len(values)
        fine &= all(type(n) is int and n in range(256) for n in (*values, *(n for color in colors for n in color)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine:
        example = '{"names": ["road", "sky"], "colors": [[128, 64, 128], [70, 130, 180]], "values": [0, 255]}'
        raise UserError(f"{shown(file)} is no table of classes such as {example}; all but names may be left out")
    return Classes(tuple(names), colors, reduced, values)
