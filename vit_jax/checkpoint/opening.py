"""Opens a checkpoint of any family: `open_checkpoint(source)` gives our parameters and a description of the model."""

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import models
from vit_jax.checkpoint import describe, detectors, google, huggingface, lora_file, readers, rules, timm
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.family import Facts, Family
from vit_jax.checkpoint.hub import fetch
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat
from vit_jax.errors import UserError, printable

GOOGLE = Family("Google npz", lambda swiglu: (), google.facts, normalize=google.normalize)
log = logging.getLogger("vit_jax")


def open_checkpoint(source: str | os.PathLike) -> Opened:
    """Reads a local path, or an address that `hub.fetch` knows, of any family; a LoRA adapter together with its base.

    Raises UserError for all others.
    """
    path, arrays = _read(source)
    if not lora_file.is_adapter(arrays):
        return _open(path, arrays)
    adapter = lora_file.read_adapter(path, arrays)
    return Opened(path, lora_file.FAMILY, lora_file.merge(adapter, _open_base(adapter)), adapter.description)


def _open_base(adapter: lora_file.Adapter) -> Flat:
    """The parameters of an adapter's base."""
    try:
        path, arrays = _read(adapter.base, online=False)
        if lora_file.is_adapter(arrays):
            raise lora_file.no_base(path)
        return _open(path, arrays).flat
    except UserError as e:
        moved = f'If it has moved, say where to in "base" of {adapter.path.with_suffix(".json")}'
        raise UserError(f"{adapter.path} belongs to {adapter.base}, which cannot be opened: {e}\n{moved}") from e


def _read(source: str | os.PathLike, *, online: bool = True) -> tuple[Path, Flat]:
    path = fetch(source, online=online)
    path = next((path / name for name in ("model.npz", lora_file.FILE) if os.path.isfile(path / name)), path)
    return path, readers.read(path)


def _understood(open_: Callable[[Path, Flat], Opened]) -> Callable[[Path, Flat], Opened]:
    """Makes a UserError of what parameters of other shapes than any model's raise where they are taken apart."""

    @functools.wraps(open_)
    def run(path: Path, arrays: Flat) -> Opened:
        if empty := [name for name, x in arrays.items() if not x.size]:
            shape = arrays[empty[0]].shape
            raise UserError(f"{path}: {printable(empty[0])} has the shape {shape}: no parameter of a model is empty")
        try:
            return open_(path, arrays)
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as e:
            why = f"{type(e).__name__}: {printable(e)}"
            raise UserError(f"{path}: its parameters, or their shapes, are those of no model known here ({why})") from e

    return run


@_understood
def _open(path: Path, arrays: Flat) -> Opened:
    if detector := detectors.open_detector(path, arrays):
        return detector
    theirs = {_bare(name): x for name, x in arrays.items()}
    family = _detect(theirs, path)
    theirs = family.normalize(theirs)
    if family is GOOGLE:
        known = describe.read(path) if path.suffix == ".npz" else None
        return Opened(path, family.name, theirs, known or _description(_facts(family, theirs, {}, path), path))
    facts = _facts(family, theirs, _config_beside(path), path)
    transformer = facts.model["transformer"]
    ours = rules.read(
        family.rules(transformer["activation"] == "swiglu"),
        family.fold(theirs, facts),
        blocks=transformer["num_layers"],
        heads=transformer["num_heads"],
        where=str(path),
    )
    return Opened(path, family.name, ours, _description(facts, path))


def _facts(family: Family, theirs: Flat, config: Mapping[str, Any], path: Path) -> Facts:
    try:
        return family.facts(theirs, config)
    except KeyError as e:
        raise UserError(f"{path} looks like {family.name}, but {e} is missing from its parameters or its config.json") from e
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except (TypeError, ValueError, AttributeError, IndexError) as e:
        raise UserError(f"{path} looks like {family.name}, but its shapes or its config.json make no sense: {e}") from e


def _bare(name: str) -> str:
    for prefix in ("module.", "backbone."):
        name = name.removeprefix(prefix)
    return name


def _detect(names: Mapping[str, np.ndarray], path: Path) -> Family:
    def holds(*parts: str) -> bool:
        return any(any(part in name for part in parts) for name in names)

    if holds("embeddings.patch_embeddings.projection"):
        return huggingface.DINOV2 if holds("layer_scale1") else huggingface.VIT
    if "patch_embed.proj.weight" in names:
        return timm.DINOV2 if holds("mask_token", "register_tokens", "mlp.w12") else timm.TIMM
    if holds("encoderblock", "MixerBlock_", "bbox_embed/"):
        return GOOGLE
    sample = ", ".join(sorted(names)[:5])
    raise UserError(
        f"{path} is of no family known here (Google or big_vision npz, transformers' ViT, DeiT and DINOv2, timm's ViT, "
        f"official DINOv2, DETR, YOLOS): its parameters are called {sample} …"
    )


def _config_beside(path: Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    config = _json(folder / "config.json")
    return config | {"preprocessor": _json(folder / "preprocessor_config.json")} if config else {}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is no valid JSON: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _description(facts: Facts, path: Path) -> Description:
    model, classes = facts.model, facts.model["num_classes"]
    names = facts.class_names
    if classes and names is None:
        names = describe.imagenet_class_names() if classes == 1000 else [f"class {i}" for i in range(classes)]
    size = facts.image_size
    grid = models.architecture_of(facts.model_type).grid(model, size) if size else None
    return Description(
        model_name=path.stem,
        model_type=facts.model_type,
        model=model,
        image_size=size,
        grid=grid,
        resize=facts.resize,
        mean=facts.mean,
        std=facts.std,
        class_names=names or (),
    )
