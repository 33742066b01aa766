"""Decoded images in a file that processes share and map into memory: what one of them decodes, all others need not.

It is safe to kill a process, and a machine, at any moment. A place in the file is written once and never again, and what
stands there is believed only when its checksum fits, which every process finds out for itself when it first reads it.
"""

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from vit_jax.data.host.decode import MAX_PIXELS

ENTRY = np.dtype(
    [("offset", "<i8"), ("check", "<u8"), ("stamp", "<u8"), ("h", "<i4"), ("w", "<i4"), ("extra", "<i4"), ("unused", "<i4")]
)
"""Where an image lies, its checksum, what tells its file from another, its size, and how many bytes follow its pixels."""
ALIGNED = 64
GROWTH = 64 << 20
"""The file grows by so many bytes at least, and an eighth; what is not written takes no space on the disk."""


class PixelFile:
    """Images uint8 (h w 3), each with some more bytes, by number; `index` and `pixels` in a folder.

    Raises OSError for a folder that cannot be written.
    """

    def __init__(self, folder: Path, count: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._count = folder, count
        self._lock = threading.Lock()
        self._lock_file = _open(self, folder / "lock")
        self.open()

    def open(self, *, anew: bool = False) -> None:
        """Opens the files, or makes new ones where there are none, where they are damaged, and if told to begin `anew`."""
        index, pixels, size = self._folder / "index", self._folder / "pixels", (1 + self._count) * ENTRY.itemsize
        with self._locked():
            if anew or not (pixels.is_file() and index.is_file() and index.stat().st_size == size):
                # Not the old ones emptied: another process may be reading them.
                for path in (index, pixels):
                    path.unlink(missing_ok=True)
            self._index, self._pixels = _open(self, index), _open(self, pixels)
            os.truncate(self._index, size)
            entries = mmap.mmap(self._index, size, access=mmap.ACCESS_READ)
            self._shared = np.frombuffer(entries, ENTRY)  # the first holds, as its offset, where the next image is written
            self._believed = np.zeros(1 + self._count, ENTRY)  # by this process, which has checked them
            self._reserve(self._first_free(), 0)
            self._map = mmap.mmap(self._pixels, 0, access=mmap.ACCESS_READ)

    @property
    def disk_bytes(self) -> int:
        """The size of the file, of which some may not be written yet."""
        return os.fstat(self._pixels).st_size

    @property
    def written(self) -> np.ndarray:
        """The numbers of the images that are there."""
        return np.flatnonzero(self._shared["h"][1:] > 0)

    @property
    def used_bytes(self) -> int:
        """Where the next image is written: read from the file, as a map may lag behind where machines share a disk."""
        return int(np.frombuffer(os.pread(self._index, ENTRY.itemsize, 0), ENTRY)[0]["offset"])

    def get(self, number: int, stamp: Callable[[], int]) -> tuple[UInt8[np.ndarray, "h w 3"], bytes] | None:
        """An image and the bytes beside it; None if it is not there, is damaged, or was written with another stamp."""
        entry = self._believed[1 + number]
        known = entry["h"] > 0
        if not known:
            entry = self._shared[1 + number].copy()
        offset, h, w, extra = (int(entry[name]) for name in ("offset", "h", "w", "extra"))
        stop, mapped = offset + 3 * h * w + extra, self._map
        if offset < 0 or not 0 < h * w <= MAX_PIXELS or extra < 0 or stop > self.disk_bytes:
            return None
        if stop > len(mapped):  # it has grown; who holds a part of the old map keeps it
            self._map = mapped = mmap.mmap(self._pixels, 0, access=mmap.ACCESS_READ)
        pixels, beside = np.frombuffer(mapped, np.uint8, 3 * h * w, offset), mapped[stop - extra : stop]
        if not known:
            if entry["stamp"] != stamp() or entry["check"] != _checksum(number, entry, pixels, beside):
                return None
            self._believed[1 + number] = entry
        return pixels.reshape(h, w, 3), beside

    def put(self, number: int, pixels: UInt8[np.ndarray, "h w 3"], beside: bytes, stamp: int) -> None:
        """Writes an image. OSError where the disk is full: the image is then not there."""
        entry, flat = np.zeros((), ENTRY), np.ascontiguousarray(pixels).reshape(-1)
        entry["h"], entry["w"], _ = pixels.shape
        entry["extra"], entry["stamp"] = len(beside), stamp
        entry["check"] = _checksum(number, entry, flat, beside)
        with self._locked():
            entry["offset"] = offset = self.used_bytes
            self._reserve(offset, flat.size + len(beside))
        _write(self._pixels, flat.data, offset)
        _write(self._pixels, memoryview(beside), offset + flat.size)
        _write(self._index, memoryview(entry.tobytes()), (1 + number) * ENTRY.itemsize)

    def _reserve(self, start: int, size: int) -> None:
        """Notes that the next image is to be written behind these bytes, for which there must be room in the map."""
        first = np.zeros((), ENTRY)
        first["offset"] = end = -(-(start + size) // ALIGNED) * ALIGNED
        if end >= self.disk_bytes:
            os.truncate(self._pixels, end + max(GROWTH, end // 8))
        _write(self._index, memoryview(first.tobytes()), 0)

    def _first_free(self) -> int:
        """Behind what is noted, and behind all images: a machine that lost power may have lost the note alone."""
        entries, size = self._shared[1:], self.disk_bytes
        stops = entries["offset"] + 3 * entries["h"].astype(np.int64) * entries["w"] + entries["extra"]
        stops = stops[(stops >= 0) & (stops <= size)]
        return max(self.used_bytes if 0 <= self.used_bytes <= size else size, int(stops.max(initial=0)))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread of one process at a time."""
        with self._lock:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock_file, fcntl.LOCK_UN)


def _open(owner: PixelFile, path: Path) -> int:
    """A descriptor that is closed when its owner goes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    weakref.finalize(owner, os.close, descriptor)
    return descriptor


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _checksum(number: int, entry: np.void, pixels: UInt8[np.ndarray, " n"], beside: bytes) -> int:
    """64 bits: the sum of the pixels' words, which takes a tenth of a CRC's time, and a CRC of everything else."""
    whole = pixels.size // 8 * 8
    rest = struct.pack("<qQiii", number, *(int(entry[name]) for name in ("stamp", "h", "w", "extra")))
    crc = zlib.crc32(rest + pixels[whole:].tobytes() + beside)
    return (int(pixels[:whole].view(np.uint64).sum(dtype=np.uint64)) + (crc << 32)) % 2**64
