"""Reading what is a file and no pipe or device; writing so that a reader sees the old content or the new one, never a part."""

import contextlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from vit_jax.errors import UserError

COMPILED_PROGRAMS = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vit_jax", "xla")
"""The folder where compiled programs are kept, unless `config.compilation_cache` says otherwise."""


def read_regular(path: str | os.PathLike, most: int = 1 << 31) -> bytes:
    """The content of a regular file (or of the one that a link leads to) of at most `most` bytes.

    Never waits for a pipe and never reads a device without end.

    Raises:
      UserError: for a pipe, a device, or a file that is too large; the message does not name the path.
      OSError: for a folder, a socket, or a file that is not there or cannot be read.
    """
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        if size > most:
            raise UserError(f"the file has {size:,} bytes, allowed are {most:,}")
        return f.read(min(most, size + 1))  # it takes memory for as many bytes as it may read


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file, opened to be read; the errors of `read_regular` for anything else."""
    # O_NONBLOCK: a pipe that nobody writes to would otherwise hold `open` for ever. It changes nothing for a file.
    f = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    mode = os.fstat(f.fileno()).st_mode
    if not stat.S_ISREG(mode):
        f.close()
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a device"
        raise UserError(f"this is {kind}, not a file: only regular files are read")
    return f


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, puts it on the disk, and renames it to `path`.

    An OSError names `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), os.fspath(path)) from e
    finally:
        with contextlib.suppress(OSError):  # its folder is none
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON for people to read, see `write_atomically` and `json_text`."""
    text = json_text(content, indent=2) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))


def is_still(path: Path, descriptor: int) -> bool:
    """Whether an open file is the one at `path`: it may have been deleted or moved meanwhile."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def json_text(content: Any, *, encoding: str | None = "utf-8", indent: int | None = None) -> str:
    """JSON for people to read, where `encoding` and what it holds allow it: else everything but ASCII is escaped.

    Names of files need not be valid text, and may hold what moves a terminal's cursor. Escaped they are printable, and
    `json.loads` gives back what they were.
    """
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(content, indent=indent)
    return text if all(line.isprintable() for line in text.split("\n")) else json.dumps(content, indent=indent)
