"""Writes an opened checkpoint in any family's layout."""

import os
from pathlib import Path

from safetensors.numpy import save as to_safetensors

from vit_jax.checkpoint import describe, detectors, huggingface, image_text_export, npz, rules, timm, token_files
from vit_jax.checkpoint.opened import Opened
from vit_jax.errors import UserError, unknown
from vit_jax.files import json_text, write_atomically

FORMATS = ("npz", "hf", "timm", "dinov2", "openclip")
_FILES = {"npz": ".npz", "dinov2": ".safetensors"}


def write_checkpoint(opened: Opened, destination: str | os.PathLike, to: str) -> Path:
    """Writes the checkpoint and returns the path that `open_checkpoint` would take.

    Args:
      destination: a folder; for npz also a file that ends with .npz, for dinov2 one that ends with .safetensors.
        What lies there under the names to be written is replaced.
      to: "npz" (ours and Google's, with its `model.json`), "hf" (transformers), "timm", "dinov2" (the official names), or
        "openclip". The vocabulary of a model that reads texts goes along.

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
    if to in ("hf", "openclip") and opened.description.model_type == "TwoTowers":
        return image_text_export.write_image_text(opened, destination, to)
    if opened.description.model_type != "ViT" or to == "openclip":
        raise UserError(f"{to} has no layout for a {opened.description.model_type} here: use --to=npz")
    if opened.description.image_size is None:
        raise UserError(f"{opened.path} has position embeddings that are no square, and no model.json tells their grid")
    transformer = opened.description.model["transformer"]
    layer_scale = bool(transformer.get("layer_scale"))
    family = {"hf": huggingface.DINOV2 if layer_scale else huggingface.VIT, "timm": timm.TIMM, "dinov2": timm.DINOV2}[to]
    table = family.rules(transformer.get("activation") == "swiglu")
    files = family.export(opened.description, opened.flat)
    ours = family.unfold(opened.flat)
    theirs = rules.write(table, ours, blocks=transformer["num_layers"], where=family.name)
    theirs = {family.rename(name, ours): x for name, x in theirs.items()}
    path = destination if destination.suffix == ".safetensors" else destination / "model.safetensors"
    blob = to_safetensors(theirs, metadata={"format": "pt"})
    write_atomically(path, lambda f: f.write(blob))
    for name, content in files.items():
        text = json_text(content, indent=2) + "\n"
        write_atomically(path.with_name(name), lambda f, text=text: f.write(text.encode()))
    return path
