"""Images with classes in Parquet files, as the datasets library of Hugging Face writes them: columns of images and of labels.

An image is a struct of `bytes` and `path`, a label a number whose names stand in the file's metadata, as a ClassLabel. A
group of rows is read when one of its rows is wanted, and kept with others up to `KEPT` bytes. Images alone need no label.
"""

import contextlib
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vit_jax.data.features import Image, Label, digest
from vit_jax.data.host.decode import ImageError
from vit_jax.data.listing import MOVED, shown
from vit_jax.data.splits import InFiles, chosen, files_by_split, hold_out, taken
from vit_jax.errors import UserError, printable
from vit_jax.files import open_regular

OFFERS = "label"
KEPT = 1 << 30
"""Bytes of groups of rows that are kept."""


class ParquetSource(InFiles):
    """The rows of some files, in their order. UserError for files without an image or, if `labelled`, a label with names."""

    exif_rotated = True

    def __init__(self, files: list[Path], split: str, *, labelled: bool = True):
        groups, counts, columns = [], [], None
        for n, file in enumerate(files):
            with _opened(file) as table:
                found = _columns(table, file, labelled)
                groups += [(n, i) for i in range(table.metadata.num_row_groups)]
                counts += [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]
            if found != (columns := columns or found):
                raise UserError(f"{shown(file)} has other columns or classes than {shown(files[0])}")
        super().__init__(counts, split)
        self._image, self._label, names = columns
        self.features = {"image": Image()} | ({"label": Label(names)} if labelled else {})
        self._files, self._groups = files, groups
        self._kept: OrderedDict[int, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, row = self._place(index)
        try:
            image, *labels = (column[row].as_py() for column in self._rows(group))
        except ValueError as e:
            raise ImageError(f"{self.where(index)} is damaged: {printable(e)}") from e
        if not (isinstance(image, dict) and image.get("bytes")):
            raise ImageError(f"{self.where(index)} has no bytes of an image: write the dataset with its images embedded")
        if not labels:
            return {"image": image["bytes"]}
        (label,) = labels
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise UserError(f"{self.where(index)} has label {label}, allowed are 0 to {self.num_classes - 1}")
        return {"image": image["bytes"], "label": int(label)}

    def where(self, index: int) -> str:
        group, row = self._place(index)
        file, number = self._groups[group]
        return f"{shown(self._files[file])}: row {row} of group {number}"

    def fingerprint(self) -> dict[str, str | int]:
        names = [(file.name, file.stat().st_size) for file in self._files]
        return super().fingerprint() | {"names": digest(names), "first": self._part[0]}

    def only(self, rows: Sequence[int]) -> "ParquetSource":
        """This source with some of its rows."""
        self._part = rows
        return self

    def _rows(self, group: int) -> list[Any]:
        """The columns of a group, kept or read anew."""
        with self._lock:
            if group in self._kept:
                self._kept.move_to_end(group)
                return self._kept[group][0]
        file, number = self._groups[group]
        with _opened(self._files[file]) as opened:
            names = [name for name in (self._image, self._label) if name is not None]
            table = opened.read_row_group(number, columns=names)
        columns = [table[name] for name in names]
        with self._lock:
            self._kept[group] = columns, table.nbytes
            while sum(size for _, size in self._kept.values()) > KEPT and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return columns


def open_folder(path: str, split: str) -> ParquetSource | None:
    """The rows of `train-*.parquet`, `test-*.parquet` in a folder or its folder `data`, or in its folders `train` and `test`.

    None for a folder without these. Raises UserError for a split that is not there, and as ParquetSource does.
    """
    found = files_by_split(Path(path), ".parquet")
    return ParquetSource(chosen(found, split, Path(path), "files"), split) if found else None


def open_images(path: str, split: str) -> ParquetSource | None:
    """The images alone of such a folder. Without files for testing a tenth of the rows is, by a hash of places."""
    found = files_by_split(Path(path), ".parquet")
    if not found:
        return None
    if found.keys() != {"train"}:
        return ParquetSource(chosen(found, split, Path(path), "files"), split, labelled=False)
    source = ParquetSource(found["train"], "train", labelled=False)
    order = sorted(range(len(source)), key=lambda i: hashlib.blake2s(f"{i}".encode(), digest_size=8).digest())
    return source.only(taken({name: sorted(rows) for name, rows in hold_out(order).items()}, split))


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as e:
        raise UserError(f"{shown(file)}: Parquet files need pyarrow: pip install pyarrow") from e
    try:
        with open_regular(file) as f:
            yield parquet.ParquetFile(f)
    except (ArrowException, OSError, OverflowError) as e:
        if getattr(e, "errno", None):
            raise UserError(f"{shown(file)} cannot be read: {e.strerror}{MOVED}") from e
        raise UserError(f"{shown(file)} is no Parquet file, or is damaged: {printable(e)}") from e


def _columns(table: Any, file: Path, labelled: bool) -> tuple[str, str | None, tuple[str, ...]]:
    """(column of images, column of labels or None, names of the classes)."""
    schema = table.schema_arrow
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: x for name, x in described.items() if isinstance(x, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(f"{shown(file)} does not say what its columns are: write it by datasets' to_parquet") from None
    images = [name for name, x in kinds.items() if x.get("_type") == "Image" and name in schema.names]
    labels = [name for name, x in kinds.items() if x.get("_type") == "ClassLabel" and name in schema.names]
    if not labelled and len(images) == 1:
        return images[0], None, ()
    if len(images) != 1 or len(labels) != 1:
        has = ", ".join(f"{printable(name)} ({printable(str(x.get('_type')))})" for name, x in kinds.items())
        needed = "one column of kind Image and one of kind ClassLabel" if labelled else "one column of kind Image"
        raise UserError(f"{shown(file)} needs {needed}; it has {has or 'none'}")
    names = kinds[labels[0]].get("names")
    if not isinstance(names, list) or len(names) < 2:
        raise UserError(f"{shown(file)}: column {printable(labels[0])} has no names of two classes or more")
    return images[0], labels[0], tuple(map(str, names))
