"""Writes an opened checkpoint in any family's layout."""

import os
from pathlib import Path
from typing import Any

from safetensors.numpy import save as to_safetensors

from vit_jax.checkpoint import (
    describe,
    detectors,
    dinov3,
    eomt,
    huggingface,
    image_text_export,
    mae,
    npz,
    rules,
    segmenters,
    timm,
    token_files,
)
from vit_jax.checkpoint.family import Family
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat
from vit_jax.errors import UserError, unknown
from vit_jax.files import json_text, write_atomically

FORMATS = ("npz", "hf", "timm", "openclip", "dinov2", "mmseg", "segmenter")
_FILES = {"npz": ".npz"} | dict.fromkeys(("dinov2", "mmseg", "segmenter"), ".safetensors")
_SEGMENTERS = {"mmseg": "LinearSegmenter", "segmenter": "Segmenter"}


def write_checkpoint(opened: Opened, destination: str | os.PathLike, to: str) -> Path:
    """Writes the checkpoint and returns the path that `open_checkpoint` would take.

    Args:
      destination: a folder; for npz also a file that ends with .npz, for the last three .safetensors.
        What lies there under the names to be written is replaced.
      to: "npz" (ours and Google's, with its `model.json`), "hf" (transformers), "timm", "openclip", "dinov2" (the official
        names), "mmseg" (a linear segmenter) or "segmenter", see `segmenters`. The vocabulary of a model that reads texts goes
        along.

    Raises:
      UserError: if the layout has no place for something the model has.
    """
    if to not in FORMATS:
        raise unknown("format", to, FORMATS)
    destination = Path(destination).expanduser()
    if destination.suffix in (".npz", ".safetensors") and destination.suffix != _FILES.get(to):
        allowed = f"a folder or a {_FILES[to]} file" if to in _FILES else "a folder"
        raise UserError(f"--to={to} writes {allowed}, not {destination.name}")
    if to == "npz":
        path = destination if destination.suffix == ".npz" else destination / "model.npz"
        npz.save(opened.flat, path)
        describe.write(path, opened.description)
        token_files.copy_vocabulary(opened, path.parent)
        return path
    if to == "hf" and opened.description.model_type in ("DETR", "YOLOS"):
        return detectors.write_detector(opened, destination)
    if opened.description.image_size is None:
        raise UserError(f"{opened.path} has position embeddings that are no square, and no model.json tells their grid")
    if to in ("hf", "timm") and opened.description.model_type == "MAE":
        theirs, files = mae.write_autoencoder(opened, to)
        return _write(destination / "model.safetensors", theirs, files)
    if to == "hf" and opened.description.model_type == "EoMT":
        return _write(destination / "model.safetensors", *eomt.write_eomt(opened))
    if to in ("hf", "openclip") and opened.description.model_type == "TwoTowers":
        return image_text_export.write_image_text(opened, destination, to)
    if opened.description.model_type != _SEGMENTERS.get(to, "ViT") or to == "openclip":
        raise UserError(f"{to} has no layout for a {opened.description.model_type} here: use --to=npz")
    if to == "mmseg":
        theirs, files = _vit_arrays(segmenters.backbone_of(opened), timm.DINOV2)
        theirs = {f"backbone.{name}": x for name, x in theirs.items()} | segmenters.write_head(opened)
    elif to == "segmenter":
        theirs, files = segmenters.write_whole(opened), {}
    else:
        transformer = opened.description.model["transformer"]
        hf = huggingface.DINOV2 if transformer.get("layer_scale") else huggingface.VIT
        hf = dinov3.FAMILY if transformer.get("rope_theta") else hf
        family = {"hf": hf, "timm": timm.TIMM, "dinov2": timm.DINOV2}[to]
        theirs, files = _vit_arrays(opened, family)
    return _write(destination if destination.suffix == ".safetensors" else destination / "model.safetensors", theirs, files)


def _write(path: Path, theirs: Flat, files: dict[str, Any]) -> Path:
    """Writes arrays, and config files beside them by their names."""
    blob = to_safetensors(theirs, metadata={"format": "pt"})
    write_atomically(path, lambda f: f.write(blob))
    for name, content in files.items():
        text = json_text(content, indent=2) + "\n"
        write_atomically(path.with_name(name), lambda f, text=text: f.write(text.encode()))
    return path


def _vit_arrays(opened: Opened, family: Family) -> tuple[Flat, dict[str, Any]]:
    """The arrays of a ViT in the names of a family, and its config files by name."""
    transformer = opened.description.model["transformer"]
    table = family.rules(transformer.get("activation") == "swiglu")
    files = family.export(opened.description, opened.flat)
    ours = family.unfold(opened.flat)
    theirs = rules.write(table, ours, blocks=transformer["num_layers"], where=family.name)
    return {family.rename(name, ours): x for name, x in theirs.items()}, files
