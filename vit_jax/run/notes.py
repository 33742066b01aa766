"""`start.json`: what a run began with, so that it can go on, or refuse to, when it is started again.

A copy lies beside the checkpoints, which the run would be lost without: either of them may be damaged or deleted.
"""

import logging
from pathlib import Path
from typing import Any

from vit_jax.checkpoint import checksums
from vit_jax.errors import UserError
from vit_jax.files import write_atomically
from vit_jax.optimize import parallel

log = logging.getLogger("vit_jax")

FILE = "start.json"


def read(workdir: Path) -> dict[str, Any]:
    """The notes, {} if there are none. A damaged file is set aside and named; UserError if there is no copy of it."""
    damaged: dict[Path, str] = {}
    notes: dict[str, Any] = {}
    for path in _paths(workdir):
        try:
            notes = checksums.read_json(path)
            break
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as e:
            damaged[path] = getattr(e, "strerror", None) or str(e)
    if damaged and not notes:
        (path, reason), *_ = damaged.items()
        raise UserError(
            f"{path}, which tells what the run began with, is damaged ({reason}), and there is no copy in checkpoints/: "
            "bring one back, or give the run a --workdir of its own"
        )
    for path, reason in damaged.items() if parallel.is_main() else ():
        aside = path.with_name(path.name + ".damaged")
        try:
            path.rename(aside)
        except OSError as e:
            raise UserError(f"{path} is damaged ({reason}) and cannot be renamed ({e.strerror}): move it away") from e
        log.warning("%s is damaged (%s): set aside as %s, its copy is used", path, reason, aside.name)
    return notes


def write(workdir: Path, notes: dict[str, Any]) -> None:
    """Replaces the notes and, once there is a folder of checkpoints, their copy there."""
    for path in _paths(workdir):
        if path.parent.is_dir():
            write_atomically(path, lambda f: f.write(checksums.dumps(notes).encode()))


def _paths(workdir: Path) -> tuple[Path, Path]:
    return workdir / FILE, workdir / "checkpoints" / FILE
