"""What happens to images as a recipe says: on the host, in training and in evaluation, and on the devices."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, UInt8

from vit_jax import checkpoint, models
from vit_jax.checkpoint.classes import match_classes
from vit_jax.checkpoint.segmenters import backbone_of
from vit_jax.data.device import augment, mix
from vit_jax.data.host import view
from vit_jax.data.host.decode import decode
from vit_jax.errors import UserError
from vit_jax.models.packed import Pack
from vit_jax.settings import Settings
from vit_jax.tasks.task import Batch, Model, Params, Shown

Numbers = Sequence[float]
Prepare = Callable[[Batch, jax.Array], tuple[Float[Array, "b h w 3"], Float[Array, "b classes"]]]


def normalisation(settings: Settings, origin: checkpoint.Description | None) -> tuple[Numbers, Numbers]:
    """Mean and standard deviation by channel of the 0..255 pixels: as a recipe sets them, else as the origin expects."""
    mean, std = (origin.mean, origin.std) if origin else ([augment.MEAN] * 3, [augment.STD] * 3)
    return settings.pp.mean or mean, settings.pp.std or std


def train_image(settings: Settings) -> Callable:
    """(encoded image or array, rng=, exif_rotated=) → uint8 image of the model's size: what the host does in training."""
    pp = settings.pp
    return functools.partial(
        view.train_image,
        crop=settings.image_size,
        resize_to=pp.resize,
        crop_method=pp.crop_method,
        area=tuple(pp.area),
        interpolation=pp.interpolation,
        antialias=pp.antialias,
        scaled_decoding=pp.scaled_decoding,
    )


def eval_image(settings: Settings) -> Callable:
    """(encoded image or array, exif_rotated=) → float32 image of the model's size: what the host does in evaluation."""
    options = preprocessing(settings)

    def evaluated(image: Any, *, exif_rotated: bool):
        return view.eval_image(decode(image, exif_rotated=exif_rotated), crop=settings.image_size, **options)

    return evaluated


def preprocessing(settings: Settings) -> dict[str, Any]:
    """The keywords of `view.eval_image` that do not follow from the model."""
    pp = settings.pp
    names = ("interpolation", "antialias", "floor_cut")
    more = {"max_patches": pp.max_patches, "enlarge": pp.enlarge} if pp.max_patches else {}
    return {"resize_to": pp.eval_resize} | {name: getattr(pp, name) for name in names} | more


def pixels_of_origin(settings: Settings, origin: checkpoint.Description) -> dict[str, Any]:
    """What of `config.pp` makes other pixels of a photo than the origin's own files say, and what these say, by field."""
    usual = {"resize_to": None, "interpolation": "bilinear", "antialias": False, "floor_cut": False, "enlarge": True}
    said = usual | origin.preprocessing
    ours = preprocessing(settings)
    if said["resize_to"] == ours["resize_to"] is None:  # nothing is cut
        ours.pop("floor_cut")
    return {name.replace("resize_to", "eval_resize"): said.get(name) for name in ours if ours[name] != said.get(name)}


def make_augment(settings: Settings) -> Callable:
    """(uint8 images, seeds) → uint8 images: flips and colours, on the devices."""
    a = settings.augment
    return augment.make_augment(
        flip=settings.pp.flip, color_jitter=a.color_jitter, randaug=a.randaug, three_augment=a.three_augment
    )


def make_prepare(settings: Settings, num_classes: int, mean: Numbers, std: Numbers) -> Prepare:
    """What the devices do to training images and labels before the model sees them, see `prepare`."""
    a = settings.augment
    mixing = {"mixup": a.mixup, "cutmix": a.cutmix, "mix_prob": a.mix_prob, "switch_prob": a.switch_prob}
    return prepare(
        num_classes,
        augmented=None if settings.pp.max_patches else make_augment(settings),
        erased=functools.partial(augment.random_erasing, probability=a.erasing) if a.erasing else None,
        mixed=mix.make_mix(**mixing) if a.mixup or a.cutmix else None,
        label_smoothing=settings.label_smoothing,
        mean=mean,
        std=std,
    )


def prepare(
    num_classes: int,
    *,
    augmented: Callable | None = None,
    erased: Callable | None = None,
    mixed: Callable | None = None,
    label_smoothing: float = 0.0,
    mean: Numbers = (augment.MEAN,) * 3,
    std: Numbers = (augment.STD,) * 3,
) -> Prepare:
    """(training batch, key) → (normalised images as the model sees them, targets that sum to one).

    Args:
      augmented: (uint8 images, seeds) → uint8 images; erased: (normalised images, seeds) → normalised images;
      mixed: (normalised images, targets, key) → the same; None leaves each out. They act in this order.
      mean, std: of the 0..255 pixels, by channel.
    """

    def prepared(batch: Batch, key: jax.Array) -> tuple[Float[Array, "b h w 3"], Float[Array, "b classes"]]:
        images = augmented(batch["image"], batch["seed"]) if augmented else batch["image"]
        images = inputs({**batch, "image": images}, mean, std)
        if erased:
            images = erased(images, batch["seed"])
        targets = mix.smooth(batch["label"].reshape(-1), num_classes, label_smoothing)
        return mixed(images, targets, key) if mixed else (images, targets)

    return prepared


def inputs(batch: Batch, mean: Numbers, std: Numbers) -> Float[Array, "b H W 3"] | Pack:
    """The normalised images of a batch as a model takes them, 0 on padding: a `Pack` where they have shapes of their own, see
    `shapes`.
    """
    if "grid" not in batch:
        pixels, valid = augment.normalize(batch["image"], mean, std), valid_pixels(batch)
        return pixels if valid is None else pixels * valid[..., None]
    b, n, p = batch["image"].shape
    pixels = augment.normalize(batch["image"].reshape(b, n, p // 3, 3), mean, std)
    return Pack(pixels.reshape(b, n, p), batch["grid"].reshape(b, -1, 2))


def load_backbone(
    opened: checkpoint.Opened, body: Mapping[str, Any], init_params: Params, image_size: tuple[int, int]
) -> Params:
    """The parameters of the ViT with the fields `body`, the `backbone` of a model, from a file of one, or of a model on one."""
    if "vit" in opened.description.model.get("body", {}):
        opened = backbone_of(opened)
    grid = models.architecture_of("ViT").grid(body, image_size)
    how = {"init_params": init_params["backbone"], "model_config": body, "grid": grid}
    return checkpoint.load_pretrained(pretrained_path=opened, **how)


def make_load(model: Model, image_size: tuple[int, int]) -> Callable[..., Params]:
    """See `Task.load`: the parameters of a file, at this size of the images."""

    def load(sources: Mapping[str, checkpoint.Opened], init_params: Params, *, classes: Sequence[str] | None = None) -> Params:
        opened, columns = sources[""], None
        if classes is not None:
            columns = match_classes(opened.description.class_names, classes, where=str(opened.path))
        return checkpoint.load_pretrained(
            pretrained_path=opened,
            init_params=init_params,
            model_config=model.fields,
            grid=patch_grid(model, image_size),
            keep_head=classes is not None,
            columns=columns,
        )

    return load


def patch_grid(model: Model, image_size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the patches that the model cuts such an image into."""
    return models.architecture_of(model.type).grid(model.fields, image_size)


def valid_pixels(batch: Batch) -> Bool[Array, "b H W"] | None:
    """Which pixels of images are no padding, of which the `extent` (h, w) of each tells; None where there is none."""
    if "extent" not in batch:
        return None
    height, width = batch["image"].shape[1:3]
    rows = jnp.arange(height) < batch["extent"][:, :1]
    columns = jnp.arange(width) < batch["extent"][:, 1:]
    return rows[:, :, None] & columns[:, None]


def image_features(
    model: nn.Module, params: Any, images: Float[Array, "b H W c"], valid: Bool[Array, "b H W"] | None = None
) -> dict[str, Float[Array, "b ..."]]:
    """Features of normalised images, in float32, after the last LayerNorm.

    That norm is the encoder's: a model with `fc_norm` has none there, and its tokens come as the last block leaves them.

    Args:
      valid: False on padding, for a model that heeds it.

    Returns:
      cls: (b, d), the class token, or the mean of the patches for a model that has none;
      patches: (b, h, w, d), without class, distillation and register tokens. DINOv2's classification feature is cls
        and the mean of these, side by side.
    """
    if isinstance(images, Pack):
        raise UserError("features are of images of one size: set max_patches=0, or give --size=H,W")
    if not hasattr(model, "features"):
        raise UserError(f"a {type(model).__name__} has no features of images: give a ViT, Mixer, DETR or one of two towers")
    options = {} if valid is None else {"valid": valid}
    outputs = model.apply({"params": params}, images, **options, train=False, method="features")
    patches = outputs["map"].astype(jnp.float32)
    cls = patches.mean(axis=(1, 2)) if outputs["cls"] is None else outputs["cls"].astype(jnp.float32)
    return {"cls": cls, "patches": patches}


def pixels(images: Float[np.ndarray, "b h w 3"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Rounded, to be looked at."""
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def side_by_side(images: UInt8[np.ndarray, "n h w 3"], *, least: int = 128, gap: int = 4) -> UInt8[np.ndarray, "H W 3"]:
    """Images in a row, with white between them; small ones are enlarged by a whole number, to a side of `least` pixels."""
    scale = -(-least // min(images.shape[1:3])) if min(images.shape[1:3]) < least else 1
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    images = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return np.concatenate(list(images), axis=1)[:, :-gap]


def make_show_vector(output: str, name: str) -> Callable[..., Shown]:
    """(outputs, size) → a vector that the task gives as `output`: the first numbers as text, all of them as JSON, as `name`."""

    def show(outputs: Mapping[str, np.ndarray], size: tuple[int, int]) -> Shown:
        x = outputs[output]
        return Shown([f"{name} " + " ".join(f"{v:.3f}" for v in x[:6]) + " …"], {name: [float(v) for v in x]})

    return show
