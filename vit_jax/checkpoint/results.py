"""What a run leaves in its workdir for others to open."""

import os
from pathlib import Path

from vit_jax.checkpoint import lora_file
from vit_jax.errors import UserError

RESULTS = "model.npz", lora_file.FILE


def find_npz(source: str | os.PathLike) -> str | os.PathLike:
    """What the run of a workdir left behind; any other source as it is. UserError for the workdir of a run that goes on."""
    folder = Path(source).expanduser()
    for name in RESULTS:
        if (folder / name).is_file():
            return folder / name
    if (folder / "train.log").is_file():
        raise UserError(f"{source} holds no {RESULTS[0]}: the run there has not finished; continue it, or name a file")
    return source
