"""What is known about a parameter file: `model.json` beside it, or else its own names and shapes."""

import functools
import json
import math
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError
from vit_jax.files import write_atomically


def path_beside(npz_path: str | os.PathLike) -> Path:
    """Where the description of an .npz lies: `NAME.json`, or `model.json` if that describes no `model.npz`."""
    npz_path = Path(npz_path)
    own, shared = npz_path.with_suffix(".json"), npz_path.with_name("model.json")
    return shared if not own.exists() and not npz_path.with_name("model.npz").exists() else own


def write(npz_path: str | os.PathLike, description: Mapping[str, Any]) -> None:
    """Writes `NAME.json` beside `NAME.npz`: everything `read` gives back."""
    text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    write_atomically(Path(npz_path).with_suffix(".json"), lambda f: f.write(text.encode()))


def read(npz_path: str | os.PathLike) -> dict[str, Any] | None:
    """The description beside an .npz, or None.

    Keys: model_name, model_type, model (the model's fields, num_classes included), image_size [h, w], grid [h, w],
    mean and std (of the 0..255 pixels, by channel), class_names; where known also resize (the rule for position
    embeddings), preprocessing (keywords of `preprocess.eval_image`), dataset, step, metrics.
    """
    path = path_beside(npz_path)
    if not path.is_file():
        return None
    try:
        description = json.loads(path.read_text())
        missing = {"model_type", "model", "image_size", "grid", "mean", "std", "class_names"} - set(description)
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is no valid JSON description of a model: {e}") from e
    if missing:
        raise UserError(f"{path} does not describe a model: it lacks {', '.join(sorted(missing))}")
    return description


@functools.cache
def imagenet_class_names() -> list[str]:
    """The 1,000 classes of ILSVRC 2012 in their usual order."""
    return resources.files("vit_jax.checkpoint").joinpath("imagenet_classes.txt").read_text().splitlines()


def summary(flat: Mapping[str, Any]) -> str:
    """'86,567,656 parameters, width 768, 12 blocks, 1000 classes' from flat names and arrays."""
    facts = [f"{sum(math.prod(x.shape) for x in flat.values()):,} parameters"]
    for stem in ("embedding", "stem"):
        if (kernel := flat.get(f"{stem}/kernel")) is not None and len(kernel.shape) == 4:
            facts += [f"patches of {kernel.shape[0]}x{kernel.shape[1]}", f"width {kernel.shape[-1]}"]
    blocks = {p for name in flat for p in name.split("/") if p.startswith(("encoderblock_", "MixerBlock_"))}
    facts += [f"{len(blocks)} block{'s' * (len(blocks) != 1)}"]
    if (head := flat.get("head/kernel")) is not None and head.ndim == 2:
        facts += [f"{head.shape[1]} classes"]
    return ", ".join(facts)
