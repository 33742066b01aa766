"""Images with sentences in tar files, as WebDataset lays them out: `key.jpg` and `key.txt` or `key.json` of each pair.

Where each member lies is read once, together with all texts, which are checked, and kept as an index. Then any pair is read
from its place, in any order, on any number of threads.
"""

import hashlib
import json
import logging
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.features import Image, Text, digest
from vit_jax.data.listing import IMAGE_SUFFIXES, MOVED, shown
from vit_jax.data.splits import InFiles, chosen, files_by_split
from vit_jax.errors import UserError, printable
from vit_jax.files import open_regular, write_atomically

log = logging.getLogger("vit_jax")

OFFERS = "text"
"""What shards have beside images."""
LARGEST_TEXT = 1 << 20
"""In bytes: no caption is longer."""
_FIELDS = ("text", "caption")
_BRACES = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)")


class Index(NamedTuple):
    """Where the pairs of a shard lie: their keys, (n, 2) offset and size of images and of texts, and which texts are JSON."""

    keys: np.ndarray
    images: np.ndarray
    texts: np.ndarray
    is_json: np.ndarray


Members = dict[str, dict[str, tuple[int, int]]]
"""Offset and size by key and kind: "image", and those of `Layout.kinds`."""


class Layout(NamedTuple):
    """What is read of a shard.

    Attributes:
      index: a NamedTuple of arrays, with `keys` and `images`.
      dtypes: the kinds of these arrays, in NumPy's letters: "i" is that of (n, 2) places, others are (n,).
      name: the end of the file that keeps an index.
      kinds: what is read besides images, by suffix.
      needed: what a shard must hold, in words.
      make: (file, members, name of the shard) → index; it checks what belongs to a key.
    """

    index: type
    dtypes: str
    name: str
    kinds: Mapping[str, str]
    needed: str
    make: Callable[[Any, Members, str], Any]


class InShards(InFiles):
    """Examples that lie in shards, of which an index tells the places."""

    exif_rotated = True

    def __init__(self, shards: list[Path], split: str, layout: Layout):
        self._shards, self._indices = shards, indices_of(shards, layout)
        super().__init__([len(index.keys) for index in self._indices], split)

    def where(self, index: int) -> str:
        shard, i = self._place(index)
        return f"{shown(self._shards[shard])}: {printable(self._indices[shard].keys[i].decode(errors='replace'))}"

    def _of_each(self, name: str) -> Iterator[Any]:
        """What an array of the indices holds of each example."""
        places = (self._place(i) for i in range(len(self)))
        return (getattr(self._indices[shard], name)[i] for shard, i in places)

    def _members(self, index: int, *kinds: str) -> list[bytes]:
        """What the shard holds of an example, by the names of the places in its index."""
        shard, i = self._place(index)
        try:
            with open_regular(self._shards[shard]) as f:
                return [_read_at(f, *getattr(self._indices[shard], kind)[i]) for kind in kinds]
        except OSError as error:
            raise UserError(f"{self.where(index)} cannot be read: {error.strerror}{MOVED}") from error


class ShardSource(InShards):
    """The pairs of some shards, in their order."""

    def __init__(self, shards: list[Path], split: str):
        super().__init__(shards, split, PAIRS)
        self.features = {"image": Image(), "text": Text()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, text = self._members(index, "images", "texts")
        return {"image": image, "text": self._said(index, text)}

    def texts(self, index: int) -> tuple[str, ...]:
        return self._said(index, *self._members(index, "texts"))

    def fingerprint(self) -> dict[str, str | int]:
        keys = (key for index in self._indices for key in index.keys.tolist())
        sizes = (size for index in self._indices for places in (index.images, index.texts) for size in places[:, 1].tolist())
        parts = {"names": digest(keys), "sizes": digest(sizes), "first": self._part.start}
        return super().fingerprint() | parts

    def _said(self, index: int, text: bytes) -> tuple[str, ...]:
        shard, i = self._place(index)
        return _sentences(text, bool(self._indices[shard].is_json[i]), self.where(index))


def is_pattern(dataset: str) -> bool:
    """Whether a dataset is named as tar files: `name.tar` or `name-{000..012}.tar`."""
    return dataset.endswith((".tar", ".tar.gz", ".tgz"))


def open_pattern(pattern: str, split: str) -> ShardSource:
    """The pairs of `name.tar` or `name-{000..012}.tar`, see `named`.

    Raises UserError for a shard that is not there, for what is no tar file, and for whatever is wrong with a pair.
    """
    return ShardSource(named(pattern, split), split)


def named(pattern: str, split: str) -> list[Path]:
    """The files of `name.tar` or `name-{000..012}.tar`: all make up `train`, of which parts are for testing."""
    if not pattern.endswith(".tar"):
        raise UserError(f"{printable(pattern)}: nothing can be read from its place in a compressed file: unpack it to .tar")
    if split.partition("[")[0] != "train":
        raise UserError(
            f"{printable(pattern)} is all for training: name parts, such as --config.pp.train='train[:99%]' and"
            f" --config.pp.test='train[99%:]', not {split!r}"
        )
    return [Path(name) for name in _expanded(pattern)]


def open_folder(path: str, split: str) -> ShardSource | None:
    """The pairs of the shards `train-*.tar`, `test-*.tar` in a folder, or in its folders `train` and `test`.

    None for a folder without these. Raises UserError as `open_pattern` does.
    """
    found = files_by_split(Path(path), ".tar")
    return ShardSource(chosen(found, split, Path(path), "shards"), split) if found else None


def _expanded(pattern: str) -> Iterator[str]:
    """`name-{08..10}.tar` → name-08.tar, name-09.tar, name-10.tar; a name without braces as it is."""
    match = _BRACES.fullmatch(pattern)
    if match is None:
        yield pattern
        return
    before, first, last, after = match.groups()
    if int(last) < int(first):
        raise UserError(f"{printable(pattern)}: {{{first}..{last}}} holds no number: the first is to be the smaller one")
    for number in range(int(first), int(last) + 1):
        for start in _expanded(before):
            yield f"{start}{number:0{len(first)}}{after}"


def indices_of(shards: list[Path], layout: Layout) -> list[Any]:
    """The index of each shard."""
    with ThreadPoolExecutor() as executor:
        return list(executor.map(lambda shard: _index(shard, layout), shards))


def _index(shard: Path, layout: Layout) -> Any:
    """The index of a shard: the one that is kept, if it is of this very file, or a new one."""
    try:
        with open_regular(shard) as f:
            status = os.fstat(f.fileno())
            of_file = np.array([status.st_size, status.st_mtime_ns])
            kept = (shard.with_name(f".{shard.name}.{layout.name}.npz"), _cached(shard, layout))
            for path in kept:
                if (index := _kept(path, of_file, layout)) is not None:
                    return index
            members = _listed(f, shard, status.st_size, layout)
            index = layout.make(f, members, shown(shard))
    except OSError as e:
        raise UserError(f"{shown(shard)} cannot be read: {e.strerror}") from e
    except UserError as e:
        raise (e if str(e).startswith(shown(shard)) else UserError(f"{shown(shard)}: {e}")) from e
    for path in kept:
        try:
            write_atomically(path, lambda f: np.savez(f, of_file=of_file, **index._asdict()))
            break
        except OSError:  # where nothing can be written
            continue
    return index


def _cached(shard: Path, layout: Layout) -> Path:
    """Where the index is kept if it cannot be beside the shard."""
    cache = os.environ.get("VIT_JAX_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vit_jax")
    name = hashlib.blake2s(os.fsencode(shard.absolute()), digest_size=16).hexdigest()
    return Path(cache).expanduser() / "shards" / f"{name}.{layout.name}.npz"


def _kept(path: Path, of_file: np.ndarray, layout: Layout) -> Any:
    """An index that was written for a file of this size and time; None if there is none."""
    try:
        with open_regular(path) as f:
            arrays = dict(np.load(f, allow_pickle=False))
        if np.array_equal(arrays.pop("of_file"), of_file) and _is_sound(index := layout.index(**arrays), of_file[0], layout):
            return index
    except Exception:  # of zipfile's, zlib's and NumPy's many kinds: there is none, or it is damaged and made anew
        pass
    return None


def _is_sound(index: Any, size: int, layout: Layout) -> bool:
    """Whether the arrays of an index fit together, and their places into a file of this size."""
    for x, kind in zip(index, layout.dtypes, strict=True):
        if x.dtype.kind != kind or not x.dtype.isnative or x.shape != (len(index.keys), 2)[: 2 if kind == "i" else 1]:
            return False
        if kind == "U" and x.view(np.uint32).max() > sys.maxunicode:  # which no text may hold
            return False
        if kind == "i" and not (((0 <= x) & (x <= size)).all() and (x.sum(axis=1) <= size).all()):
            return False
    return True


def _listed(f: Any, shard: Path, size: int, layout: Layout) -> Members:
    """Reads where the members lie."""
    found: Members = {}
    ignored: Counter[str] = Counter()
    try:
        with tarfile.open(fileobj=f, mode="r:") as tar:
            for member in tar:
                key, kind = _key_and_kind(member.name, layout.kinds)
                if kind is None or member.isdir():
                    ignored.update([] if member.isdir() else [_suffix(member.name)])
                    continue
                where = f"{shown(shard)}: {printable(member.name)}"
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise UserError(f"{where} is a link, a device or a sparse file: only regular files are read")
                if member.offset_data + member.size > size:
                    raise UserError(f"{where} is cut off: fetch the file anew")
                if kind in found.setdefault(key, {}):
                    raise UserError(f"{where} is the second {kind} of its key: keep one of them")
                found[key][kind] = member.offset_data, member.size
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as e:
        raise (e if isinstance(e, UserError) else UserError(f"{shown(shard)} is no tar file, or is cut off: {e}")) from e
    if not found:
        raise UserError(f"{shown(shard)} holds no {layout.needed}")
    if ignored:
        kinds = ", ".join(f"{n:,} {printable(suffix, 20)}" for suffix, n in ignored.most_common(10))
        log.info("%s: ignored %d members: %s", shown(shard), ignored.total(), kinds)
    return found


def _pairs(f: Any, pairs: Members, shard: str) -> Index:
    for key, members in pairs.items():
        _check_pair(f, members, f"{shard}: {printable(key)}")
    texts = [members.get("txt", members.get("json")) for members in pairs.values()]
    return Index(
        keys=keys_of(pairs),
        images=places_of(pairs),
        texts=np.array(texts, np.int64),
        is_json=np.array(["txt" not in members for members in pairs.values()]),
    )


IMAGES_NEEDED = f"an image ({', '.join(IMAGE_SUFFIXES[:5])} …)"
PAIRS = Layout(Index, "Siib", "index", {".txt": "txt", ".json": "json"}, f"pairs of {IMAGES_NEEDED} and .txt or .json", _pairs)


def keys_of(members: Members) -> np.ndarray:
    """The keys, (n,) bytes."""
    return np.array([key.encode("utf-8", "surrogateescape") for key in members])


def places_of(members: Members) -> np.ndarray:
    """(n, 2) offset and size of the images."""
    return np.array([kinds["image"] for kinds in members.values()], np.int64)


def _key_and_kind(name: str, kinds: Mapping[str, str]) -> tuple[str, str | None]:
    """What the members of an example share, and "image" or one of `kinds`; None for other suffixes, from the first dot on."""
    folder, base = os.path.split(name)
    stem, suffix = base.partition(".")[0], _suffix(base)
    kind = "image" if suffix in IMAGE_SUFFIXES else kinds.get(suffix)
    return os.path.join(folder, stem), kind if stem else None


def _suffix(name: str) -> str:
    return "." + os.path.basename(name).partition(".")[2].lower()


def _check_pair(f: Any, members: dict[str, tuple[int, int]], where: str) -> None:
    """Raises UserError for a text without an image, an image without a text, and a text without words."""
    _sentences(beside_image(f, members, "text", "txt", where), "txt" not in members, where)


def beside_image(f: Any, members: Mapping[str, tuple[int, int]], what: str, kind: str, where: str) -> bytes:
    """What an example has beside its image, as `kind` or json. UserError where one of both is missing, or it is too long."""
    if "image" not in members:
        raise UserError(f"{where} has a {what} without an image: add it, or remove the {what}")
    place = members.get(kind, members.get("json"))
    if place is None:
        raise UserError(
            f"{where} has an image without a {what}: add .{kind} or .json, or remove it; images alone are unlabelled:SHARDS"
        )
    if place[1] > LARGEST_TEXT:
        raise UserError(f"{where}: its {what} has {place[1]:,} bytes, allowed are {LARGEST_TEXT:,}")
    return _read_at(f, *place)


def _read_at(f: Any, offset: int, size: int) -> bytes:
    f.seek(offset)
    return f.read(size)


def _sentences(data: bytes, is_json: bool, where: str) -> tuple[str, ...]:
    """The sentences of a pair: the lines of a text, or `text` or `caption` of an object, a sentence or a list of them."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: its text is not in UTF-8: {e}") from e
    if is_json:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: its text is no JSON: {e}") from e
        field = next((name for name in _FIELDS if isinstance(row, dict) and name in row), None)
        texts = row[field] if field else None
        texts = texts if isinstance(texts, list) else [texts]
        if not texts or not all(isinstance(x, str) for x in texts):
            has = f"{field}={printable(row[field], 60)}" if field else "neither"
            raise UserError(f"{where}: its JSON needs text or caption, a sentence or a list of them; it has {has}")
    else:
        texts = text.split("\n")
    if not (sentences := tuple(x.strip() for x in texts if x.strip())):
        raise UserError(f"{where}: its text is empty: write one, or remove the pair")
    return sentences
