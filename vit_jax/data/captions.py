"""Images with sentences: a list of pairs in a file, COCO's JSON, or a text file beside each image.

`open_folder` tells the layouts apart. All pairs are read and checked at the start: an image that is missing, a caption without
words are errors that name file and line.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.data import coco, listing
from vit_jax.data.features import Image, Text, digest
from vit_jax.data.image_files import ImageFiles, check_image
from vit_jax.data.listing import shown
from vit_jax.data.rows import rows_of, text_of
from vit_jax.data.splits import TEST_NAMES, chosen, part_of
from vit_jax.errors import UserError, printable

OFFERS = "text"
"""What such a folder has beside images."""
LISTS = ("captions.jsonl", "captions.csv", "captions.tsv")
"""Files with the pairs of a folder, each with the fields `image` and `text`."""

Read = Callable[[], dict[Path, list[str]]]


class CaptionSource(ImageFiles):
    """Images with one or more sentences each, in the order of their first mention."""

    def __init__(self, captions: Mapping[Path, Sequence[str]]):
        super().__init__(list(captions))
        self.features = {"image": Image(), "text": Text()}
        self._texts = [tuple(texts) for texts in captions.values()]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": listing.read_file(self._images[index], listing.MOVED), "text": self._texts[index]}

    def texts(self, index: int) -> tuple[str, ...]:
        return self._texts[index]

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"texts": digest(self._texts)}


def open_folder(path: str, split: str) -> CaptionSource | None:
    """The examples of a split, or part of it, of a folder {train,test}/…; None for a folder without captions.

    Each of the two folders holds `captions.jsonl`, `.csv` or `.tsv`, whose `text` is a sentence (in .jsonl also a list of them)
    and whose `image` is a path relative to the file; or `name.txt` beside every `name.jpg`, one sentence a line. An image may
    be listed several times. Or it is COCO's folder, with `annotations/captions_{train2017,val2017}.json` and folders of images
    of these names, or those in a folder `images`. `test` may also be called `val`, `valid` or `validation`; a folder without
    it, or with the captions at its top, offers its parts alone: `train[:90%]` and `train[90%:]`.

    Raises UserError for a split that is not there, and for whatever is wrong with a pair.
    """
    root = Path(path)
    splits = _coco_splits(root) or _folder_splits(root)
    if not splits:
        return None
    captions = list(chosen(splits, split, root, "captions")().items())
    part = part_of(split, len(captions))
    return CaptionSource(dict(captions[part.start : part.stop]))


def _coco_splits(root: Path) -> dict[str, Read]:
    """What reads each split of COCO's folder; {} for other folders."""
    annotated = coco.annotated(root, "captions")
    return {name: functools.partial(_read_coco, file, folders) for name, (file, folders) in annotated.items()}


def _folder_splits(root: Path) -> dict[str, Read]:
    """What reads each split of a folder with captions in it, or in its folder for training; {} for other folders."""
    below = {name: root / name for name in ("train", *TEST_NAMES) if _has_captions(root / name)}
    if "train" not in below or any((root / name).exists() for name in LISTS):
        below = {"train": root} if _has_captions(root) else {}
    return {name: functools.partial(_read, folder) for name, folder in below.items()}


def _has_captions(folder: Path) -> bool:
    """Whether a folder holds a list, or an image with its own text file.

    A note beside an image does not count where class folders hold others: `train`, or two folders of images without any text.
    """
    if not folder.is_dir():
        return False
    names = {entry.name for entry in listing.visible(os.fspath(folder))}
    if names & set(LISTS):
        return True
    if not any(_is_image(name) and os.path.splitext(name)[0] + ".txt" in names for name in names):
        return False
    below = {name: listing.list_images(os.fspath(folder), name).images for name in listing.folders(os.fspath(folder))}
    of_classes = [name for name, images in below.items() if images]
    if len(of_classes) < 2 and "train" not in of_classes:
        return True
    return any((folder / name).with_suffix(".txt").exists() for images in below.values() for name in images)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in listing.IMAGE_SUFFIXES


class _Captions:
    """The sentences of each image, as they are read."""

    def __init__(self):
        self.by_image: dict[Path, list[str]] = {}

    def add(self, path: Path, text: str, where: str, image: str) -> None:
        """Adds a pair. Raises UserError with `where` for an image that is not there, and a text without words."""
        if path not in self.by_image:
            check_image(path, where, "caption")
        if not text.strip():
            raise UserError(f"{where}: the caption of {printable(image)} is empty: write one, or remove the pair")
        self.by_image.setdefault(path, []).append(text.strip())


def _read(folder: Path) -> dict[Path, list[str]]:
    """The sentences of each image of a folder."""
    lists = [folder / name for name in LISTS if (folder / name).exists()]
    if len(lists) > 1:
        raise UserError(f"{shown(folder)} has {' and '.join(file.name for file in lists)}: keep one of them")
    captions = _Captions()
    for where, image, text in _listed(lists[0]) if lists else _beside(folder):
        captions.add(folder / image, text, where, image)
    if not captions.by_image:
        raise UserError(f"{shown(lists[0] if lists else folder)} has no captions")
    return captions.by_image


def _read_coco(file: Path, folders: Sequence[Path]) -> dict[Path, list[str]]:
    """The sentences of each image in COCO's JSON, in the order of its images."""
    text = text_of(file)
    try:
        content = json.loads(text)
        names = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(pair.get("id"), pair["image_id"], pair["caption"]) for pair in content["annotations"]]
        by_name: dict[str, list[tuple[str, str]]] = {name + "": [] for name in names.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        why = printable(repr(e))
        raise UserError(f"{shown(file)} is no COCO file of images, and annotations with image_id and caption: {why}") from e
    for number, image, text in pairs:
        where = f"{shown(file)}: annotation {printable(number, 60)}"
        if not isinstance(image, int | str) or image not in names:
            raise UserError(f"{where} is of image {printable(image, 60)}, which the file does not list")
        if not isinstance(text, str):
            raise UserError(f"{where}: its caption is {printable(text, 60)}, not a sentence")
        by_name[names[image]].append((where, text))
    captions, folder = _Captions(), coco.holding(folders, by_name)
    for name, texts in by_name.items():
        if not texts:
            raise UserError(f"{shown(file)}: {printable(name)} has no caption: write one, or remove the image")
        for where, text in texts:
            captions.add(folder / name, text, where, name)
    if not captions.by_image:
        raise UserError(f"{shown(file)} has no captions")
    return captions.by_image


def _listed(file: Path) -> Iterator[tuple[str, str, str]]:
    """(where it stands, image, text) of every pair in a list."""
    for where, row in rows_of(file):
        image, texts = row.get("image"), row.get("text")
        texts = texts if isinstance(texts, list) else [texts]
        wrong = set() if isinstance(image, str) and image else {"image"}
        wrong |= set() if texts and all(isinstance(text, str) for text in texts) else {"text"}
        if wrong:
            fields = (f"{name}={printable(row[name], 60)}" if name in wrong else printable(str(name)) for name in row)
            has = ", ".join(fields) or "none"
            raise UserError(f"{where}: needs the fields image, a path, and text, a sentence; it has {has}")
        yield from ((where, image, text) for text in texts)


def _beside(folder: Path) -> Iterator[tuple[str, str, str]]:
    """The same of `name.txt` beside `name.jpg`, for the images at the top of a folder and below it."""
    for name in listing.list_images(os.fspath(folder)).images:
        file = (folder / name).with_suffix(".txt")
        if not file.exists():
            raise UserError(f"{shown(folder / name)} has no caption: write {shown(file)}, or remove the image")
        lines = [line for line in text_of(file).split("\n") if line.strip()]
        yield from ((shown(file), name, line) for line in lines or [""])
