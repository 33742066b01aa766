"""Images that keep their shapes (`config.pp.max_patches`): a batch has `image` (b, n, p), patches, and `grid` (b, 2)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from vit_jax import models
from vit_jax.data.host import patches
from vit_jax.errors import UserError, unknown
from vit_jax.settings import Settings
from vit_jax.tasks import images
from vit_jax.tasks.task import Model

Fields = Callable[..., dict[str, np.ndarray]]
"""(encoded image or array, exif_rotated=, in training rng=) → what an example holds of it."""


def train_fields(settings: Settings, model: Model) -> Fields:
    """What the host does to an image in training: one of the model's size, or with `max_patches` of its own shape."""
    pp = settings.pp
    if not pp.max_patches:
        whole = images.train_image(settings)
        return lambda image, **how: {"image": whole(image, **how)}
    options = _options(settings, model)
    options |= {name: getattr(pp, name) for name in ("crop_method", "flip", "scaled_decoding")} | {"area": tuple(pp.area)}
    return lambda image, **how: _fields(patches.train_patches(image, **how, **options))


def eval_fields(settings: Settings, model: Model) -> Fields:
    """The same in evaluation."""
    if not settings.pp.max_patches:
        whole = images.eval_image(settings)
        return lambda image, **how: {"image": whole(image, **how)}
    options = _options(settings, model)
    return lambda image, **how: _fields(patches.eval_patches(image, **how, **options))


def pictures(batch: dict[str, np.ndarray], settings: Settings, model: Model) -> UInt8[np.ndarray, "b h w 3"]:
    """The images of a batch to look at; those of different shapes are fitted into the model's usual size."""
    if "grid" not in batch:
        return images.pixels(batch["image"])
    patch, (height, width) = patch_of(model), settings.image_size
    whole = (patches.joined(patches.Patches(*x), patch) for x in zip(batch["image"], batch["grid"], strict=True))
    fitted = (ImageOps.pad(Image.fromarray(images.pixels(x)), (width, height), color="grey") for x in whole)
    return np.stack([np.asarray(x) for x in fitted])


def _fields(found: patches.Patches) -> dict[str, np.ndarray]:
    return {"image": found.pixels, "grid": found.grid}


def _options(settings: Settings, model: Model) -> dict[str, Any]:
    """Keywords of both functions. Raises UserError for what does not go with images of different shapes."""
    pp, a = settings.pp, settings.augment
    fixed = {f"augment.{name}": getattr(a, name) for name in ("color_jitter", "randaug", "three_augment", "erasing")}
    fixed |= {f"augment.{name}": getattr(a, name) for name in ("mixup", "cutmix")}
    fixed |= {f"pp.{name}": getattr(pp, name) for name in ("resize", "eval_resize")}
    if wrong := [f"config.{name}={value}" for name, value in fixed.items() if value]:
        raise UserError(f"config.pp.max_patches={pp.max_patches} keeps the shapes of images: it does not go with {wrong[0]}")
    if pp.crop_method not in patches.DRAWN:
        raise unknown("crop_method of images that keep their shapes", pp.crop_method, patches.DRAWN)
    how = {"enlarge": pp.enlarge, "interpolation": pp.interpolation, "antialias": pp.antialias}
    return {"patch": patch_of(model), "max_patches": pp.max_patches, **how}


def patch_of(model: Model) -> tuple[int, int]:
    """(h, w) of the patches of a ViT in pixels. UserError for a model that cuts images in another way."""
    fields = models.architecture_of(model.type).vit_fields(model.fields)
    if "transformer" not in fields or fields.get("resnet"):
        raise UserError(f"config.pp.max_patches is for a ViT, which a {model.type} with these fields is not")
    return tuple(fields["patches"]["size"])
