"""Embeddings of the photos in a folder, kept in a file and brought up to date by content."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from vit_jax.data.host.decode import decode
from vit_jax.errors import UserError, printable
from vit_jax.files import read_regular, write_atomically

Pixels = UInt8[np.ndarray, "h w 3"]
KEEP_EVERY = 60.0
"""Seconds after which what has been embedded is written."""
_FORMAT = 1
_DIGEST = 16


@dataclass(frozen=True)
class Index:
    """Photos by name.

    Attributes:
      names: paths relative to the folder.
      stamps: size in bytes, and time of the last change in ns.
      digests: of the contents.
      embeddings: each of length 1.
    """

    names: tuple[str, ...]
    stamps: Int[np.ndarray, "n 2"]
    digests: UInt8[np.ndarray, "n 16"]
    embeddings: Float[np.ndarray, "n d"]

    def __len__(self) -> int:
        return len(self.names)

    def nearest(self, z: Float[np.ndarray, " d"], top: int) -> list[tuple[str, float]]:
        """(name, cosine) of the `top` photos nearest to an embedding of length 1, the nearest first; of equals the earlier."""
        scores = self.embeddings @ z
        least = np.partition(scores, -top)[-top] if top < len(scores) else -np.inf
        rows = np.flatnonzero(scores >= least)
        best = rows[np.argsort(-scores[rows], kind="stable")[:top]]
        return [(self.names[i], float(scores[i])) for i in best]


@dataclass(frozen=True)
class Changes:
    """How many photos an update has embedded, how many names are gone, and why other photos cannot be read, by name."""

    embedded: int
    gone: int
    unreadable: dict[str, str]


class _Photo(NamedTuple):
    stamp: tuple[int, int]
    digest: bytes
    z: Float[np.ndarray, " d"] | None


def update(
    known: Index | None,
    folder: Path,
    names: Sequence[str],
    embed: Callable[[Sequence[Pixels]], Float[np.ndarray, "n d"]],
    *,
    batch: int,
    keep: Callable[[Index], object],
    step: Callable[[int], object] = lambda count: None,
) -> tuple[Index | None, Changes]:
    """The index of the photos called `names` in a folder, None if none of them can be read.

    A file whose name, size and time of change are known is taken to be the same. Of any other the content tells whether it
    is new, so that photos may be moved, copied and touched.

    Args:
      embed: decoded images of any sizes → their embeddings, each of length 1.
      batch: images embedded at a time.
      keep: is given the index where it has changed, once a minute and in the end, also after an error or Ctrl-C.
      step: is told of every few photos.
    """
    photos = _photos(known)
    current = {name: photos[name] for name in names if name in photos and photos[name].stamp == _stamp(folder / name)}
    stale = [name for name in names if name not in current]
    gone = len(photos.keys() - set(names))
    step(len(current))
    by_content = {photo.digest: photo.z for photo in photos.values()}
    embedded, unreadable = 0, {}
    kept, last = time.monotonic(), len(current)
    try:
        with ThreadPoolExecutor(min(batch, os.cpu_count() or 1)) as pool:
            for part in (stale[i : i + batch] for i in range(0, len(stale), batch)):
                read = dict(zip(part, pool.map(lambda name: _read(folder / name, by_content), part), strict=True))
                unreadable |= {name: found for name, found in read.items() if isinstance(found, str)}
                pixels = [found[1] for found in read.values() if not isinstance(found, str) and found[0].z is None]
                z = iter(embed(pixels) if pixels else ())
                for name, found in read.items():
                    if not isinstance(found, str):
                        photo = found[0]
                        current[name] = photo if photo.z is not None else photo._replace(z=next(z))
                embedded += len(pixels)
                step(len(part))
                if time.monotonic() - kept > KEEP_EVERY:
                    keep(_index(current, names))
                    kept, last = time.monotonic(), len(current)
    finally:
        if len(current) > last or (gone and current):
            keep(_index(current, names))
    if known is not None and not stale and not gone:
        return known, Changes(0, 0, {})
    return _index(current, names) if current else None, Changes(embedded, gone, unreadable)


def save(index: Index, path: Path, *, model: str) -> None:
    """Writes an index; `model` says whose embeddings they are."""
    arrays = {
        "format": np.array(_FORMAT),
        "model": np.array(model),
        "names": np.frombuffer(b"\0".join(map(os.fsencode, index.names)), np.uint8),
        "stamps": index.stamps,
        "digests": index.digests,
        "embeddings": index.embeddings,
    }
    write_atomically(path, lambda f: np.savez(f, **arrays))


def load(path: Path, *, model: str) -> Index | None:
    """The index in a file, None where there is none. UserError for one that is damaged, or of another model."""
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise UserError(f"{path} cannot be read: it is no file")
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as arrays:
            if int(arrays["format"]) != _FORMAT or str(arrays["model"]) != model:
                raise UserError(f"{path} is an index of another model or format")
            names = arrays["names"].astype(np.uint8, casting="equiv").tobytes()
            index = Index(
                tuple(map(os.fsdecode, names.split(b"\0"))),
                arrays["stamps"].astype(np.int64, casting="equiv"),
                arrays["digests"].astype(np.uint8, casting="equiv"),
                arrays["embeddings"].astype(np.float32, casting="equiv"),
            )
    except UserError:
        raise
    except Exception as e:  # of zipfile's, zlib's and NumPy's many kinds
        raise UserError(f"{path} cannot be read: {printable(e)}") from e
    n, shapes = len(index), (index.stamps.shape, index.digests.shape, index.embeddings.shape[:1])
    if shapes != ((n, 2), (n, _DIGEST), (n,)) or index.embeddings.ndim != 2 or not np.isfinite(index.embeddings).all():
        raise UserError(f"{path} cannot be read: its arrays do not fit each other")
    return index


def _photos(index: Index | None) -> dict[str, _Photo]:
    if index is None:
        return {}
    stamps, digests = index.stamps.tolist(), (digest.tobytes() for digest in index.digests)
    rows = zip(index.names, stamps, digests, index.embeddings, strict=True)
    return {name: _Photo(tuple(stamp), digest, z) for name, stamp, digest, z in rows}


def _index(photos: Mapping[str, _Photo], names: Sequence[str]) -> Index:
    """The photos in the order of `names`."""
    names = tuple(name for name in names if name in photos)
    rows = [photos[name] for name in names]
    return Index(
        names,
        np.array([photo.stamp for photo in rows], np.int64),
        np.frombuffer(b"".join(photo.digest for photo in rows), np.uint8).reshape(-1, _DIGEST),
        np.stack([photo.z for photo in rows]),
    )


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _read(path: Path, by_content: Mapping[bytes, Float[np.ndarray, " d"]]) -> tuple[_Photo, Pixels | None] | str:
    """A photo with its embedding if its content is known, else with its pixels; or why it cannot be read."""
    try:
        stamp = _stamp(path)
        data = read_regular(path)
        digest = hashlib.blake2b(data, digest_size=_DIGEST).digest()
        if digest in by_content:
            return _Photo(stamp, digest, by_content[digest]), None
        return _Photo(stamp, digest, None), decode(data, exif_rotated=True)
    except OSError as e:
        return e.strerror or str(e)
    except UserError as e:
        return str(e)
