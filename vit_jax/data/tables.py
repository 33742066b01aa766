"""Images with classes in tables of the datasets library of Hugging Face, Parquet or Arrow: columns of images and of labels.

An image is a struct of `bytes` and `path`, a label a number whose names stand in the file's metadata, as a ClassLabel. A
group of rows is read when one of its rows is wanted, and kept with others up to `KEPT` bytes. Images alone need no label.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vit_jax.data.features import Image, Label, digest
from vit_jax.data.host.decode import ImageError
from vit_jax.data.listing import MOVED, read_text, shown
from vit_jax.data.splits import TEST_NAMES, InFiles, chosen, files_by_split, hold_out, taken
from vit_jax.errors import UserError, printable
from vit_jax.files import open_regular

OFFERS = "label"
KEPT = 1 << 30
"""Bytes of groups of rows that are kept."""


class ParquetFile:
    """The groups of rows of a Parquet file, each read when it is wanted."""

    kind = "Parquet file"

    def __init__(self, path: Path):
        self.path = path
        with self._opened() as table:
            self.schema = table.schema_arrow
            self.counts = [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]

    def group(self, number: int, columns: Sequence[str]) -> Any:
        """Some columns of a group, as a table."""
        with self._opened() as table:
            return table.read_row_group(number, columns=columns)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        with _reading(self.path, self.kind), open_regular(self.path) as f:
            from pyarrow import parquet

            yield parquet.ParquetFile(f)


class ArrowFile:
    """The batches of rows of an Arrow stream, mapped into memory: the system reads what is wanted, and forgets it again."""

    kind = "Arrow stream"

    def __init__(self, path: Path):
        self.path = path
        with _reading(path, self.kind):
            import pyarrow

            open_regular(path).close()
            # The batches keep the map; closing the file gives its descriptor back.
            with pyarrow.memory_map(str(path)) as f, pyarrow.ipc.open_stream(f) as stream:
                self.schema, self._batches = stream.schema, list(stream)
        self.counts = [batch.num_rows for batch in self._batches]

    def group(self, number: int, columns: Sequence[str]) -> Any:
        """Some columns of a batch, of which places and texts, but no images, are read and checked."""
        with _reading(self.path, self.kind):
            batch = self._batches[number].select(columns)
            batch.validate(full=True)
            return batch


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Errors of pyarrow and of the system become UserErrors that name the file."""
    try:
        from pyarrow import ArrowException
    except ImportError as e:
        raise UserError(f"{shown(path)}: a {kind} needs pyarrow: pip install pyarrow") from e
    try:
        yield
    except (ArrowException, OSError, OverflowError) as e:
        if getattr(e, "errno", None):
            raise UserError(f"{shown(path)} cannot be read: {e.strerror}{MOVED}") from e
        raise UserError(f"{shown(path)} is no {kind}, or is damaged: {printable(e)}") from e


class TableSource(InFiles):
    """The rows of some files, in their order. UserError for files without an image or, if `labelled`, a label with names."""

    exif_rotated = True

    def __init__(self, paths: list[Path], split: str, *, labelled: bool = True):
        self._files = [(ArrowFile if path.suffix == ".arrow" else ParquetFile)(path) for path in paths]
        columns = [_columns(file, labelled) for file in self._files]
        for path, found in zip(paths, columns, strict=True):
            if found != columns[0]:
                raise UserError(f"{shown(path)} has other columns or classes than {shown(paths[0])}")
        super().__init__([count for file in self._files for count in file.counts], split)
        self._groups = [(file, number) for file in self._files for number in range(len(file.counts))]
        self._names, classes = columns[0]
        self.features = {"image": Image()} | ({"label": Label(classes)} if labelled else {})
        self._kept: OrderedDict[int, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> dict[str, Any]:
        group, row = self._place(index)
        columns = self._rows(group)
        try:
            image, *labels = (column[row].as_py() for column in columns)
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
        return f"{shown(file.path)}: row {row} of group {number}"

    def fingerprint(self) -> dict[str, str | int]:
        names = [(file.path.name, file.path.stat().st_size) for file in self._files]
        return super().fingerprint() | {"names": digest(names), "first": self._part[0]}

    def only(self, rows: Sequence[int]) -> "TableSource":
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
        rows = file.group(number, self._names)
        columns = [rows[name] for name in self._names]
        with self._lock:
            self._kept[group] = columns, rows.nbytes
            while sum(size for _, size in self._kept.values()) > KEPT and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return columns


def open_folder(path: str, split: str) -> TableSource | None:
    """The rows of a folder's Parquet or Arrow files, see `_files_of`.

    None for a folder without these. Raises UserError for a split that is not there, and as TableSource does.
    """
    found = _files_of(Path(path))
    return TableSource(chosen(found, split, Path(path), "files"), split) if found else None


def open_images(path: str, split: str) -> TableSource | None:
    """The images alone of such a folder. Without files for testing a tenth of the rows is, by a hash of places."""
    found = _files_of(Path(path))
    if not found:
        return None
    if found.keys() != {"train"}:
        return TableSource(chosen(found, split, Path(path), "files"), split, labelled=False)
    source = TableSource(found["train"], "train", labelled=False)
    order = sorted(range(len(source)), key=lambda i: hashlib.blake2s(f"{i}".encode(), digest_size=8).digest())
    return source.only(taken({name: sorted(rows) for name, rows in hold_out(order).items()}, split))


def _files_of(root: Path) -> dict[str, list[Path]]:
    """The files of each split, {} for none.

    They are `train-*.parquet` and the like, see `files_by_split`, or what datasets writes as Arrow: by `save_to_disk` of a
    Dataset, all of which is for training, or of a DatasetDict, or into its cache, as `NAME-train.arrow` and the like.
    """
    if (root / "state.json").is_file() and any(root.glob("*.arrow")):
        return {"train": _saved(root)}
    if (root / "dataset_dict.json").is_file():
        names = _read_json(root / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(isinstance(x, str) and re.fullmatch(r"\w+(\.\w+)*", x) for x in names):
            raise UserError(f"{shown(root / 'dataset_dict.json')} names no splits: save the DatasetDict anew")
        return {name: _saved(root / name) for name in names}
    cached = {
        name: sorted(x for x in root.glob(f"*-{name}*.arrow") if re.search(rf"-{name}(-\d+-of-\d+)?\.arrow$", x.name))
        for name in ("train", *TEST_NAMES)
        if (root / "dataset_info.json").is_file()
    }
    return {name: files for name, files in cached.items() if files} or files_by_split(root, ".parquet")


def _saved(folder: Path) -> list[Path]:
    """The files of a Dataset that was saved to a folder."""
    file = folder / "state.json"
    state = _read_json(file)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(f"{shown(file)}: its rows are chosen by a list of indices: save dataset.flatten_indices() instead")
    try:
        names = [Path(x["filename"]) for x in state["_data_files"]]
    except (KeyError, TypeError):
        names = []
    if not names or not all(name.name == str(name) and name.suffix == ".arrow" for name in names):
        raise UserError(f"{shown(file)} does not name the dataset's .arrow files: save the dataset anew")
    return [folder / name for name in names]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{shown(file)} is no JSON: {printable(e)}") from e
    return content if isinstance(content, dict) else {}


def _columns(file: ParquetFile | ArrowFile, labelled: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the columns of images and, if `labelled`, of labels; names of the classes)."""
    try:
        described = json.loads((file.schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {name: x for name, x in described.items() if isinstance(x, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(f"{shown(file.path)} does not say what its columns are: write it by datasets' to_parquet") from None
    images = [name for name, x in kinds.items() if x.get("_type") == "Image" and name in file.schema.names]
    labels = [name for name, x in kinds.items() if x.get("_type") == "ClassLabel" and name in file.schema.names]
    if not labelled and len(images) == 1:
        return (images[0],), ()
    if len(images) != 1 or len(labels) != 1:
        has = ", ".join(f"{printable(name)} ({printable(str(x.get('_type')))})" for name, x in kinds.items())
        needed = "one column of kind Image and one of kind ClassLabel" if labelled else "one column of kind Image"
        raise UserError(f"{shown(file.path)} needs {needed}; it has {has or 'none'}")
    names = kinds[labels[0]].get("names")
    if not isinstance(names, list) or len(names) < 2:
        raise UserError(f"{shown(file.path)}: column {printable(labels[0])} has no names of two classes or more")
    return (images[0], labels[0]), tuple(map(str, names))
