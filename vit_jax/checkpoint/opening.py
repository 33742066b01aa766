"""Opens a checkpoint of any family: `open_checkpoint(source)` gives our parameters and a description of the model."""

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from vit_jax import models
from vit_jax.checkpoint import (
    batchnorm_resnet,
    bert_text,
    describe,
    detectors,
    dinov3,
    dinov3_official,
    encoder_decoder,
    eomt,
    google,
    huggingface,
    image_text_files,
    image_tower,
    lora_file,
    mae,
    readers,
    rules,
    segmenters,
    timm,
    two_towers,
    wrappers,
)
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import Entries, folder_of, read_object
from vit_jax.checkpoint.family import POSITIONS, Facts, Family
from vit_jax.checkpoint.hub import fetch
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat
from vit_jax.errors import UserError, printable

GOOGLE = Family("Google npz", lambda swiglu: (), google.facts, normalize=google.normalize)
log = logging.getLogger("vit_jax")
_MOST_TIMES = 32


def open_checkpoint(source: str | os.PathLike) -> Opened:
    """Reads a local path, or an address that `hub.fetch` knows, of any family; a LoRA adapter together with its base.

    Raises UserError for all others.
    """
    path, arrays = _read(source)
    if not lora_file.is_adapter(arrays):
        return _open(path, arrays)
    adapter = lora_file.read_adapter(path, arrays)
    return Opened(path, lora_file.FAMILY, lora_file.merge(adapter, _open_base(adapter)), adapter.description)


def open_with_head(vit: Opened, source: str | os.PathLike) -> Opened:
    """A ViT with the linear segmentation head of another file, see `segmenters.with_head`."""
    return segmenters.with_head(vit, *_read(source))


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
    if path.is_dir() and (saved := sorted(p for p in path.glob("checkpoint_*") if wrappers.FLAX.fullmatch(p.name))):
        path = max(saved, key=lambda p: int(p.name.split("_")[1]))
    return path, wrappers.read_flax(path) if wrappers.FLAX.fullmatch(path.name) else readers.read(path)


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
    if masks := eomt.open_eomt(path, arrays):
        return masks
    if captioner := encoder_decoder.open_captioner(path, arrays):
        return captioner
    if segmenter := segmenters.open_segmenter(path, arrays, _open):
        return segmenter
    if towers := two_towers.open_towers(path, arrays):
        return towers
    if autoencoder := mae.open_autoencoder(path, arrays, _open):
        return autoencoder
    if tower := image_tower.open_image_tower(path, arrays):
        return tower
    theirs = wrappers.unwrap(arrays, path)
    if towers := image_text_files.open_image_text(path, theirs):
        return towers
    if bert := bert_text.open_bert(path, theirs):
        return bert
    if resnet := batchnorm_resnet.open_resnet(path, theirs):
        return resnet
    family = _detect(theirs, path)
    theirs = family.normalize(theirs)
    folder = folder_of(path)
    if family is GOOGLE:
        known = describe.read(path) if path.suffix == ".npz" else None
        if known:
            known.check_sizes(theirs, path)
        return Opened(path, family.name, theirs, known or _description(_facts(family, theirs, folder, path), path))
    facts = _facts(family, theirs, folder, path)
    transformer = facts.model["transformer"]
    ours = rules.read(
        family.rules(transformer["activation"] == "swiglu"),
        family.fold(theirs, facts),
        blocks=transformer["num_layers"],
        heads=transformer["num_heads"],
        where=str(path),
    )
    if facts.assumed:
        log.warning("opened   %s (%s): %s", path, family.name, "; ".join(facts.assumed))
    _check_grid(ours, facts, path)
    _check_input(facts, path)
    return Opened(path, family.name, ours, _description(facts, path))


def _facts(family: Family, theirs: Flat, folder: Path, path: Path) -> Facts:
    none = Entries({}, path)
    files = (none, none)
    if family is not GOOGLE:
        files = read_object(folder / "config.json"), read_object(folder / "preprocessor_config.json")
    try:
        return family.facts(theirs, *files)
    except KeyError as e:
        raise UserError(f"{path} looks like {family.name}, but {e} is missing from its parameters or its config.json") from e
    except UserError as e:
        raise (e if str(folder) in str(e) else UserError(f"{path}: {e}")) from e
    except (TypeError, ValueError, AttributeError, IndexError, StopIteration) as e:
        raise UserError(f"{path} looks like {family.name}, but its shapes or its config.json make no sense: {e}") from e


def _check_grid(ours: Flat, facts: Facts, path: Path) -> None:
    """Raises UserError unless the position embeddings, where there are any, are those of images of the size that is told."""
    if POSITIONS not in ours:
        return
    count = ours[POSITIONS].shape[1] - ("cls" in ours) - ("dist" in ours)
    size, patch = facts.image_size, facts.model["patches"]["size"]
    if math.prod(n // p for n, p in zip(size, patch, strict=True)) != count:
        sizes = (f"{h}x{w}" for h, w in (size, patch))
        raise UserError(
            f"{path} holds {count} position embeddings of patches, which are not those of {' px cut into '.join(sizes)}"
        )


def _check_input(facts: Facts, path: Path) -> None:
    """Raises UserError for photos that are to become far larger than what the parameters are for, which would take hours."""
    if facts.image_size and facts.input_size and max(facts.input_size) > _MOST_TIMES * max(facts.image_size):
        asked, own = ("x".join(map(str, size)) for size in (facts.input_size, facts.image_size))
        raise UserError(
            f"{path}: the file beside it asks for images of {asked} px, and the model is for {own}: allowed are "
            f"{_MOST_TIMES} times as many"
        )


def _detect(names: Mapping[str, np.ndarray], path: Path) -> Family:
    def holds(*parts: str) -> bool:
        return any(any(part in name for part in parts) for name in names)

    if "embeddings.patch_embeddings.weight" in names and holds("attention.q_proj."):
        return dinov3.FAMILY
    if dinov3_official.PERIODS in names:
        return dinov3_official.FAMILY
    if holds("embeddings.patch_embeddings.projection"):
        return huggingface.DINOV2 if holds("layer_scale1") else huggingface.VIT
    if "patch_embed.proj.weight" in names:
        if holds(".gamma_1"):
            return timm.DEIT3
        is_dinov2 = holds("register_tokens", "mlp.w12") or ("mask_token" in names and holds("ls1.gamma"))
        return timm.DINOV2 if is_dinov2 else timm.TIMM
    if holds("encoderblock", "MixerBlock_", "bbox_embed/", "layer1_0/"):
        return GOOGLE
    sample = ", ".join(sorted(names)[:5])
    raise UserError(
        f"{path} is of no family known here (Google or big_vision npz, transformers' ViT, DeiT and DINOv2, timm's ViT, "
        f"official DINOv2 and DINOv3, DETR, YOLOS, CLIP, SigLIP, OpenCLIP): its parameters are called {sample} …"
    )


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
        image_size=facts.input_size or size,
        grid=grid,
        resize=facts.resize,
        preprocessing=facts.preprocessing,
        head=facts.head,
        mean=facts.mean,
        std=facts.std,
        class_names=names or (),
    )
