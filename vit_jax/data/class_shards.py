"""Images with classes, and images alone, in tar files as WebDataset lays them out: `key.jpg` with `key.cls` or `key.json`.

A class is a number or a name: the text of .cls, or `label` or `cls` in .json. Examples are in the order of a hash of
their keys, which mixes the classes, so that parts of a split have all of them.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data import shards
from vit_jax.data.features import Image, Label, digest
from vit_jax.data.listing import read_text, shown
from vit_jax.data.shards import InShards, Layout, Members
from vit_jax.data.splits import chosen, files_by_split, hold_out, taken
from vit_jax.errors import UserError, printable

OFFERS = "label"
CLASSES = "classes.txt"
"""The names of numbered classes, one a line, beside the shards."""
MOST_CLASSES = 1_000_000
LONGEST = 200
"""In characters: no name of a class is longer."""


class LabelIndex(NamedTuple):
    """Where the images of a shard lie, and their classes as the shard has them, (n,) texts."""

    keys: np.ndarray
    images: np.ndarray
    labels: np.ndarray


class ImageIndex(NamedTuple):
    """Where the images of a shard lie."""

    keys: np.ndarray
    images: np.ndarray


class ClassShardSource(InShards):
    """The images of some shards; their classes are those of `training`, of which they are some or all."""

    def __init__(self, files: list[Path], split: str, training: list[Path]):
        super().__init__(files, split, WITH_CLASSES)
        indices = self._indices if files == training else shards.indices_of(training, WITH_CLASSES)
        names, self._numbers = _class_names((label for index in indices for label in index.labels.tolist()), training[0])
        self.features = {"image": Image(), "label": Label(names)}
        self._part = _by_hash(self._indices)[self._part.start : self._part.stop]

    def __getitem__(self, index: int) -> dict[str, Any]:
        (image,), label = self._members(index, "images"), self._label(index)
        if (number := self._numbers.get(label)) is None:
            raise UserError(f"{self.where(index)} is of class {printable(label)}, which no shard for training has")
        return {"image": image, "label": number}

    def fingerprint(self) -> dict[str, str | int]:
        keys, labels = (digest(self._of_each(name)) for name in ("keys", "labels"))
        sizes = digest(size for _, size in self._of_each("images"))
        return super().fingerprint() | {"names": keys, "labels": labels, "sizes": sizes}

    def _label(self, index: int) -> str:
        shard, i = self._place(index)
        return str(self._indices[shard].labels[i])


class ImageShardSource(InShards):
    """The images of some shards, without classes. Of `train` alone a tenth, or one, is for testing, by a hash of their keys."""

    def __init__(self, files: list[Path], split: str, *, holds_out: bool):
        super().__init__(files, "all" if holds_out else split, IMAGES)
        self.features = {"image": Image()}
        order = _by_hash(self._indices)
        self._part = taken(hold_out(order), split) if holds_out else order[self._part.start : self._part.stop]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._members(index, "images")[0]}

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"names": digest(self._of_each("keys"))}


def open_pattern(pattern: str, split: str) -> ClassShardSource:
    """The images with classes of `name.tar` or `name-{000..012}.tar`, see `shards.named`."""
    files = shards.named(pattern, split)
    return ClassShardSource(files, split, files)


def open_folder(path: str, split: str) -> ClassShardSource | None:
    """The same of `train-*.tar`, `test-*.tar` in a folder, or in its folders `train` and `test`; None for a folder without."""
    found = files_by_split(Path(path), ".tar")
    return ClassShardSource(chosen(found, split, Path(path), "shards"), split, found["train"]) if found else None


def open_images(name: str, split: str) -> ImageShardSource | None:
    """The images alone of a pattern or a folder of shards, None if it is neither, see ImageShardSource."""
    if shards.is_pattern(name):
        return ImageShardSource(shards.named(name, "train"), split, holds_out=True)
    if not (found := files_by_split(Path(name), ".tar")):
        return None
    if found.keys() == {"train"}:
        return ImageShardSource(found["train"], split, holds_out=True)
    return ImageShardSource(chosen(found, split, Path(name), "shards"), split, holds_out=False)


def _by_hash(indices: list[Any]) -> np.ndarray:
    """The numbers of all examples in the order of a hash of their keys, which is fixed."""
    hashes = [hashlib.blake2s(key, digest_size=8).digest() for index in indices for key in index.keys.tolist()]
    return np.argsort(np.array(hashes, "S8").view(">u8") if hashes else np.zeros(0), kind="stable")


def _class_names(labels: Iterable[str], shard: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """(names of the classes, number by what a shard has). UserError for numbers beside names, and fewer than two classes."""
    known, beside = set(labels), shard.parent / CLASSES
    numbers = {label for label in known if label.isdecimal() and label.isascii()}
    if numbers and numbers != known:
        both = f"{min(numbers)} and {printable(min(known - numbers))}"
        raise UserError(
            f"{shown(shard.parent)}: some classes are numbers from 0 on, and others names ({both}): use one of them"
        )
    names = tuple(sorted(known))
    if numbers:
        count = max(map(int, numbers)) + 1
        if count > MOST_CLASSES:
            raise UserError(f"{shown(shard.parent)} has class {count - 1:,}, allowed are 0 to {MOST_CLASSES - 1:,}")
        names = tuple(map(str, range(count)))
        if beside.exists():
            names = tuple(line.strip() for line in read_text(beside).splitlines() if line.strip())
            if len(names) < count:
                raise UserError(f"{shown(beside)} names {len(names)} classes, and the shards have class {count - 1}")
    if len(names) < 2:
        raise UserError(f"{shown(shard.parent)} has one class only, {printable(names[0])}: two or more are needed")
    by_label = {label: int(label) for label in map(str, range(len(names)))} | {label: int(label) for label in numbers}
    return names, by_label if numbers else {name: i for i, name in enumerate(names)}


def _with_classes(f: Any, members: Members, shard: str) -> LabelIndex:
    labels = [_label_of(f, kinds, f"{shard}: {printable(key)}") for key, kinds in members.items()]
    return LabelIndex(shards.keys_of(members), shards.places_of(members), np.array(labels))


def _images(f: Any, members: Members, shard: str) -> ImageIndex:
    return ImageIndex(shards.keys_of(members), shards.places_of(members))


def _label_of(f: Any, kinds: dict[str, tuple[int, int]], where: str) -> str:
    """The class of an example. UserError for a class without an image, an image without a class, and what is no class."""
    data = shards.beside_image(f, kinds, "class", "cls", where)
    try:
        label: Any = data.decode("utf-8-sig").strip()
        if "cls" not in kinds:
            row = json.loads(label)
            label = row.get("label", row.get("cls")) if isinstance(row, dict) else None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: its class cannot be read: {printable(e)}") from e
    text = str(label) if isinstance(label, int | str) and not isinstance(label, bool) else ""
    if not text.strip() or "\0" in text or len(text) > LONGEST:
        raise UserError(
            f"{where} has class {printable(label, 60) or 'none'}: .cls, or label or cls in .json, is a number or a name"
        )
    return text.strip()


WITH_CLASSES = Layout(
    LabelIndex,
    "SiU",
    "classes",
    {".cls": "cls", ".json": "json"},
    f"pairs of {shards.IMAGES_NEEDED} and .cls or .json",
    _with_classes,
)
IMAGES = Layout(ImageIndex, "Si", "images", {}, shards.IMAGES_NEEDED, _images)
