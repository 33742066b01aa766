"""Images whose classes stand in a list: labels.csv, .tsv or .jsonl, or the metadata of Hugging Face's image folders."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_jax.data.features import Image, Label, digest
from vit_jax.data.image_files import ImageFiles, check_image
from vit_jax.data.listing import MOVED, is_file, read_file, shown
from vit_jax.data.rows import rows_of
from vit_jax.data.splits import TEST_NAMES, chosen, hash_of, hold_out_of_classes, taken
from vit_jax.errors import UserError, listed, printable

OFFERS = "label"
"""What such a folder has beside images."""
LISTS = ("labels.csv", "labels.tsv", "labels.jsonl", "metadata.csv", "metadata.jsonl")
IMAGE, LABEL = ("image", "file_name"), "label"
"""The fields of a list: a path relative to it, and the name of a class, or its number."""

Row = tuple[Path, str]


class ClassListSource(ImageFiles):
    """The images of some rows, each with the number of its class."""

    def __init__(self, rows: Sequence[Row], class_names: Sequence[str]):
        super().__init__([image for image, _ in rows])
        self.features = {"image": Image(), "label": Label(tuple(class_names))}
        number = {name: i for i, name in enumerate(class_names)}
        self._labels = [number[label] for _, label in rows]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": read_file(self._images[index], MOVED), "label": self._labels[index]}

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"labels": digest(self._labels)}


def open_folder(path: str, split: str) -> ClassListSource | None:
    """The examples of a split, or part of it, of a folder with one of the `LISTS`; None for any other folder.

    It lies in the folder, or in its folders `train` and `test`, which may also be called as `TEST_NAMES`. Of a single list a
    tenth is for testing, by a hash of the names, as of a folder of classes. Classes are those of training, by the alphabet, or
    by size if all are numbers.

    Raises UserError for a missing image, a row without a class, fewer than two classes, and a class that training lacks.
    """
    root = Path(path)
    lists = {name: file for name in ("train", *TEST_NAMES) if (file := _list_of(root / name))}
    if "train" not in lists:
        lists = {"train": file} if (file := _list_of(root)) else {}
    if not lists:
        return None
    training = _read(lists["train"])
    names = sorted({label for _, label in training}, key=lambda x: (0, int(x), x) if x.isdecimal() else (1, 0, x))
    if len(names) < 2:
        raise UserError(f"{shown(lists['train'])} has one class only, {printable(names[0])!r}; two or more are needed")
    if len(lists) == 1:
        by_hash = sorted((hash_of(os.path.relpath(image, root)), image, label) for image, label in training)
        trained, held_out = hold_out_of_classes(by_hash, path)
        parts = {"train": trained} | dict.fromkeys(TEST_NAMES, held_out)
        parts = {name: [row[1:] for row in rows] for name, rows in parts.items()}
    else:
        file = chosen(lists, split, root, "labels")
        parts = {split.partition("[")[0]: training if file == lists["train"] else _read(file)}
    rows, known = taken(parts, split), set(names)
    for image, label in rows:
        if label not in known:
            raise UserError(f"{shown(image)}: training has no class {printable(label)!r}, only {listed(names)}")
    return ClassListSource(rows, names)


def _list_of(folder: Path) -> Path | None:
    """The first of the `LISTS` in a folder that tells classes; one with sentences alone is another's."""
    for file in (folder / name for name in LISTS if is_file(folder / name)):
        try:
            _, row = next(rows_of(file), ("", {}))
        except UserError:  # said where nothing else is found: it may be of no meaning
            continue
        if LABEL in row and any(name in row for name in IMAGE):
            return file
    return None


def _read(file: Path) -> list[Row]:
    """All rows of a list, each checked."""
    rows, seen = [], set()
    for where, row in rows_of(file):
        image, label = next((row[name] for name in IMAGE if row.get(name)), None), row.get(LABEL)
        if not isinstance(image, str) or not isinstance(label, str | int) or not str(label).strip():
            raise UserError(
                f"{where}: needs the fields image (or file_name), a path, and label, a class; it has {printable(row)}"
            )
        check_image(file.parent / image, where, "line")
        if image in seen:
            raise UserError(f"{where}: {printable(image)} has a label already: an image has one class")
        seen.add(image)
        rows.append((file.parent / image, str(label).strip()))
    return rows
