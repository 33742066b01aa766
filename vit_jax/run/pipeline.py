"""What happens to images as a recipe says: on the host, in training and in evaluation, and on the devices."""

import functools
from collections.abc import Callable
from typing import Any

from vit_jax.data.device import augment, mix
from vit_jax.data.host import view
from vit_jax.settings import Settings
from vit_jax.tasks import classify


def make_prepare(settings: Settings, num_classes: int, mean: list[float], std: list[float]) -> classify.Prepare:
    """What the devices do to training images and labels before the model sees them."""
    a = settings.augment
    mixing = {"mixup": a.mixup, "cutmix": a.cutmix, "mix_prob": a.mix_prob, "switch_prob": a.switch_prob}
    return classify.make_prepare(
        num_classes,
        augmented=augment.make_augment(
            flip=settings.pp.flip, color_jitter=a.color_jitter, randaug=a.randaug, three_augment=a.three_augment
        ),
        erased=functools.partial(augment.random_erasing, probability=a.erasing) if a.erasing else None,
        mixed=mix.make_mix(**mixing) if a.mixup or a.cutmix else None,
        label_smoothing=settings.label_smoothing,
        mean=mean,
        std=std,
    )


def train_transform(settings: Settings) -> Callable:
    """(encoded image or array, generator, exif_rotated=) → uint8 image of the model's size: what the host does in training."""
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


def eval_transform(settings: Settings) -> Callable:
    """decoded image → float32 image of the model's size: what the host does in evaluation."""
    return functools.partial(view.eval_image, crop=settings.image_size, **preprocessing(settings))


def preprocessing(settings: Settings) -> dict[str, Any]:
    """The keywords of `view.eval_image` that do not follow from the model."""
    return {
        "resize_to": settings.pp.eval_resize,
        "interpolation": settings.pp.interpolation,
        "antialias": settings.pp.antialias,
    }
