"""Boxes in Pascal VOC's XML, as VOC itself, labelImg and Roboflow lay it out."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from vit_jax.data.boxes import Picture, Read
from vit_jax.data.image_files import check_image
from vit_jax.data.listing import read_file, read_text, shown, visible
from vit_jax.data.splits import TEST_NAMES
from vit_jax.errors import UserError, listed, printable

FOLDERS = (("Annotations", "JPEGImages"), ("annotations", "images"))
"""Where the XML files and the images are: of VOC, and as many others have it."""


def splits(root: Path) -> dict[str, Read]:
    """What reads each split.

    The folders `FOLDERS`, and ImageSets/Main/{train,val}.txt with the names of a split's images, without which all are for
    training; or XML files beside the images in the folders {train,valid,test}, or at the top.
    """
    for annotations, images in FOLDERS:
        if files := {file.stem: file for file in sorted((root / annotations).glob("*.xml"))}:
            lists = sorted((root / "ImageSets" / "Main").glob("*.txt"))
            stems = {file.stem: read_text(file).split() for file in lists if "_" not in file.stem}
            of_split = {
                name: {stem: root / annotations / f"{stem}.xml" for stem in names} for name, names in stems.items()
            } or {"train": files}
            return _readers(of_split, root / images)
    below = {name: _beside_images(root / name) for name in ("train", *TEST_NAMES)}
    if not below["train"]:
        below = {"train": _beside_images(root)}
    return _readers({name: files for name, files in below.items() if files})


def _beside_images(folder: Path) -> dict[str, Path]:
    """The XML files of a folder by the name that they share with an image there."""
    names = {entry.name for entry in visible(os.fspath(folder))} if folder.is_dir() else set()
    stems = sorted(name.removesuffix(".xml") for name in names if name.endswith(".xml"))
    return {stem: folder / f"{stem}.xml" for stem in stems if names.intersection(_images_of(stem))}


def _images_of(stem: str) -> tuple[str, ...]:
    return tuple(f"{stem}{suffix}" for suffix in (".jpg", ".png", ".jpeg", ".JPG"))


def _readers(of_split: Mapping[str, Mapping[str, Path]], images: Path | None = None) -> dict[str, Read]:
    training = next((of_split[name] for name in of_split if name.startswith("train")), None)
    return {name: partial(_read, files, training or files, images) for name, files in of_split.items()}


def _read(files: Mapping[str, Path], training: Mapping[str, Path], images: Path | None) -> tuple[list[Picture], list[str]]:
    """Classes are all that occur in the training images, by the alphabet. VOC counts pixels from 1, the last included."""
    trees = {file: _xml(file) for file in dict.fromkeys([*training.values(), *files.values()])}
    names = sorted({_text(o, "name", shown(file)) for file in training.values() for o in trees[file].iter("object")})
    pictures = []
    for stem, file in files.items():
        tree = trees[file]
        candidates = [(images or file.parent) / n for n in (tree.findtext("filename") or f"{stem}.jpg", *_images_of(stem))]
        picture = Picture(next((p for p in candidates if p.is_file()), candidates[0]))
        check_image(picture.path, shown(file), "annotation")
        picture.size = _size(tree, file)
        for number, o in enumerate(tree.iter("object"), 1):
            _add_object(picture, o, names, f"{shown(file)}, object {number}")
        pictures.append(picture)
    return pictures, names


def _size(tree: ElementTree.Element, file: Path) -> tuple[float, ...]:
    try:
        return tuple(float(_text(tree, f"size/{side}", shown(file))) for side in ("height", "width"))
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{shown(file)}: its size holds something that is no number: {printable(e)}") from e


def _add_object(picture: Picture, o: ElementTree.Element, names: Sequence[str], where: str) -> None:
    label = _text(o, "name", where)
    if label not in names:
        raise UserError(f"{where}: training has no class {printable(label)!r}, only {listed(names)}")
    try:
        left, top, right, bottom = (float(_text(o, f"bndbox/{side}", where)) for side in ("xmin", "ymin", "xmax", "ymax"))
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{where}: its bndbox holds something that is no number: {printable(e)}") from e
    corners = (left - 1, top - 1, right, bottom)
    picture.add(corners, names.index(label), picture.size, where, o.findtext("difficult", "0").strip() == "1")


def _xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(read_file(file))
    except ElementTree.ParseError as e:
        raise UserError(f"{shown(file)} is no valid XML: {e}") from e
    except UserError as e:
        raise UserError(f"{e}{'' if file.exists() else '; ImageSets/Main lists it'}") from e


def _text(element: ElementTree.Element, name: str, where: str) -> str:
    text = element.findtext(name)
    if not text:
        raise UserError(f"{where} has no <{name}>")
    return text.strip()
