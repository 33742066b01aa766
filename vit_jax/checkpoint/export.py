"""Writes an opened checkpoint in any family's layout."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.numpy import save as to_safetensors

from vit_jax import models
from vit_jax.checkpoint import (
    describe,
    detectors,
    dinov3,
    dinov3_official,
    encoder_decoder,
    eomt,
    huggingface,
    image_text_export,
    image_tower,
    mae,
    npz,
    segmenters,
    timm,
    token_files,
)
from vit_jax.checkpoint.family import Family, Written
from vit_jax.checkpoint.opened import Opened
from vit_jax.errors import UserError, unknown
from vit_jax.files import write_atomically, write_json


def _as(family: Family) -> Callable[[Opened], Written]:
    return lambda opened: family.write(opened.description, opened.flat)


def _as_transformers(opened: Opened) -> Written:
    model, transformer = opened.description.model, opened.description.model["transformer"]
    of_siglip = model.get("classifier") == "map" and not model.get("num_classes")
    of_clip = transformer.get("norm_pre") and not opened.description.class_names and not model.get("head_bias", True)
    if of_siglip or of_clip:
        return image_tower.write_image_tower(opened)
    family = huggingface.DINOV2 if transformer.get("layer_scale") else huggingface.VIT
    return _as(dinov3.FAMILY if transformer.get("rope_theta") else family)(opened)


WRITERS: dict[str, dict[str, Callable[[Opened], Written]]] = {
    "hf": {
        "ViT": _as_transformers,
        "MAE": partial(mae.write_autoencoder, to="hf"),
        "DETR": detectors.write_detector,
        "YOLOS": detectors.write_detector,
        "EoMT": eomt.write_eomt,
        "Captioner": encoder_decoder.write_captioner,
        "TwoTowers": partial(image_text_export.write_image_text, to="hf"),
    },
    "timm": {"ViT": _as(timm.TIMM), "MAE": partial(mae.write_autoencoder, to="timm")},
    "openclip": {"TwoTowers": partial(image_text_export.write_image_text, to="openclip")},
    "dinov2": {"ViT": _as(timm.DINOV2)},
    "dinov3": {"ViT": dinov3_official.write_official},
    "mmseg": {"LinearSegmenter": segmenters.write_linear},
    "segmenter": {"Segmenter": segmenters.write_segmenter},
}
"""What writes a model type in a layout of others."""
FORMATS = ("npz", *WRITERS)
_FILES = {"npz": ".npz"} | dict.fromkeys(("dinov2", "dinov3", "mmseg", "segmenter"), ".safetensors")


def write_checkpoint(opened: Opened, destination: str | os.PathLike, to: str) -> Path:
    """Writes the checkpoint and returns the path that `open_checkpoint` would take.

    Args:
      destination: a folder; for npz also a file that ends with .npz, for the last four .safetensors.
        What lies there under the names to be written is replaced.
      to: "npz" (ours and Google's, with its `model.json`), "hf" (transformers), "timm", "openclip", "dinov2" and "dinov3" (the
        official names), "mmseg" (a linear segmenter) or "segmenter", see `segmenters`. The vocabulary of a model that reads
        texts goes along.

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
    model_type = opened.description.model_type
    if model_type not in WRITERS[to]:
        raise UserError(f"{to} has no layout for a {model_type} here: use --to=npz")
    _check_transformer(opened, to)
    if opened.description.image_size is None:
        raise UserError(f"{opened.path} has position embeddings that are no square, and no model.json tells their grid")
    written = WRITERS[to][model_type](opened)
    name = "open_clip_model.safetensors" if to == "openclip" else "model.safetensors"
    path = destination if destination.suffix == ".safetensors" else destination / name
    blob = to_safetensors(written.arrays, metadata={"format": "pt"})
    write_atomically(path, lambda f: f.write(blob))
    for name, content in written.files.items():
        write_json(path.with_name(name), content)
    if written.tokens:
        token_files.write(opened, path.parent, written.tokens)
    return path


def _check_transformer(opened: Opened, to: str) -> None:
    """Raises UserError for attention that is no softmax over all tokens, and norms that are none of the layout's."""
    description = opened.description
    transformer = models.architecture_of(description.model_type).vit_fields(description.model).get("transformer") or {}
    usual = {"attention": "softmax"} | ({} if to == "timm" else {"norm": "layer"})
    if unlike := [f"transformer.{name}={transformer[name]}" for name, x in usual.items() if transformer.get(name, x) != x]:
        raise UserError(f"{to} cannot express {' and '.join(unlike)}: convert with --to=npz")
