"""Files on disk that are checked before they are read: the size and CRC-32 of each, and JSON that holds its own."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax


def dumps(content: dict[str, Any]) -> str:
    """JSON of `content` and its CRC-32."""
    content = json.loads(json.dumps(content))  # as it will be read: keys are text
    crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    return json.dumps({"crc32": crc, "content": content}, sort_keys=True, indent=1)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` with its CRC-32, and waits until it is on the disk."""
    with open(path, "w") as f:
        f.write(dumps(content))
        f.flush()
        os.fsync(f.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """The content of what `dumps` made. OSError if it is not there, ValueError if it is not as it was written."""
    try:
        read = json.loads(path.read_text())
        content, intact = read["content"], zlib.crc32(json.dumps(read["content"], sort_keys=True).encode()) == read["crc32"]
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{path.name} has changed since it was written")
    return content


def check_files(folder: Path, files: dict[str, list[int]]) -> None:
    """Raises ValueError at a file that is not as it was written. Processes share the files out among themselves."""
    for name in sorted(files)[jax.process_index() :: jax.process_count()]:
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        (size, crc), (expected_size, expected_crc) = checksum(folder / name), files[name]
        if size != expected_size:
            raise ValueError(f"{name} has {size:,} bytes instead of {expected_size:,}")
        if crc != expected_crc:
            raise ValueError(f"{name} has changed since it was written")


def checksum(path: Path, sync: bool = False) -> list[int]:
    """[size, CRC-32] of a file, which `sync` makes sure is on the disk."""
    size = crc = 0
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            size, crc = size + n, zlib.crc32(buffer[:n], crc)
        if sync:
            os.fsync(f.fileno())
    return [size, crc]


def files_in(folder: Path) -> Iterable[Path]:
    """All files below a folder, sorted."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def sync_names(folder: Path) -> None:
    """Makes sure that the names in a folder are on the disk, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
