"""What is known about a parameter file: `model.json` beside it, or else its own names and shapes."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError
from vit_jax.files import json_text, write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A model and what must be known to use it: the content of `model.json`.

    Attributes:
      model_name: for people to read.
      model_type, model: what `models.build` takes; the fields include num_classes.
      image_size, grid: (h, w) of the images in pixels, and of their patches; None where the file does not tell.
      mean, std: of the 0..255 pixels, by channel.
      class_names: in the order of the logits; () without a head.
      resize: the rule for position embeddings on another grid, see `resize.resize`.
      preprocessing: keywords of `preprocess.eval_image`.
      head: what a logit means, "softmax" (one class an image) or "sigmoid" (each class for itself).
      task: what the model was trained for, {"type": …} and the task's own entries.
      dataset, step, metrics: the training run, where there was one.
    """

    model_name: str | None = None
    model_type: str
    model: Mapping[str, Any]
    image_size: tuple[int, int] | None
    grid: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    resize: str = "bilinear"
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: str = "softmax"
    task: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"type": "classify"})
    dataset: str | None = None
    step: int | None = None
    metrics: Mapping[str, float] | None = None

    def __post_init__(self):
        for name in _TUPLES:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))

    def to_json(self) -> dict[str, Any]:
        """A JSON object, of which `from_json` makes an equal description."""
        entries = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in entries.items() if value is not None or name in ("image_size", "grid")}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str | os.PathLike) -> "Description":
        """The description in a JSON object that `where` holds; entries of other programs are ignored.

        Raises UserError if something is missing.
        """
        fields = dataclasses.fields(cls)
        required = {field.name for field in fields if field.default is field.default_factory}
        if missing := required - set(content):
            raise UserError(f"{where} does not describe a model: it lacks {', '.join(sorted(missing))}")
        return cls(**{field.name: content[field.name] for field in fields if field.name in content})


_TUPLES = ("image_size", "grid", "mean", "std", "class_names")


def path_beside(npz_path: str | os.PathLike) -> Path:
    """Where the description of an .npz lies: `NAME.json`, or `model.json` if that describes no `model.npz`."""
    npz_path = Path(npz_path)
    own, shared = npz_path.with_suffix(".json"), npz_path.with_name("model.json")
    return shared if not own.exists() and not npz_path.with_name("model.npz").exists() else own


def write(npz_path: str | os.PathLike, description: Description, **entries: Any) -> None:
    """Writes `NAME.json` beside `NAME.npz`: everything `read` gives back, and more entries of the JSON object."""
    text = json_text(description.to_json() | entries, indent=2) + "\n"
    write_atomically(Path(npz_path).with_suffix(".json"), lambda f: f.write(text.encode()))


def read(npz_path: str | os.PathLike) -> Description | None:
    """The description beside an .npz, or None. Raises UserError for one that is damaged."""
    content = read_json(npz_path)
    return None if content is None else Description.from_json(content, path_beside(npz_path))


def read_json(npz_path: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON object beside an .npz as it stands there, or None."""
    path = path_beside(npz_path)
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is no valid JSON description of a model: {e}") from e


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
