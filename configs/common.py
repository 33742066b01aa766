"""What all recipes share: every field with its default, and presets by dataset."""

import dataclasses
import types
import typing

import ml_collections
from ml_collections import config_dict

from vit_jax.data.splits import split_range
from vit_jax.errors import UserError
from vit_jax.settings import Settings, nested


def get_config() -> ml_collections.ConfigDict:
    """A recipe with every field of `vit_jax.settings.Settings` at its default; the model is still to be chosen."""
    return ml_collections.ConfigDict(_fields(Settings))


def with_dataset(config: ml_collections.ConfigDict, dataset: str) -> ml_collections.ConfigDict:
    """Sets the dataset and what `PRESETS` has for it; any other dataset is read as it is, for 500 steps."""
    config.dataset = dataset
    config.update(PRESETS.get(dataset, {"total_steps": 500, "warmup_steps": 100}))
    return config


def use_imagenet(config: ml_collections.ConfigDict, *, train: str = "train[:99%]") -> None:
    """ImageNet-1k at 224 px as a model is trained on it from nothing: crops, evaluation, and how often.

    Validation images are resized to 256 px on the shorter side and cropped in the middle. Where `train` leaves out the last
    percent, that is `minival`: choose hyper-parameters by it, not by the validation images.
    """
    config.dataset = "imagenet2012"
    config.pp.update({"train": train, "test": "validation", "crop": 224, "eval_resize": 256})
    if train != "train":
        config.evaluators = {"minival": {"type": "classify", "split": "train[99%:]"}}
    config.pretrained_dir = ""
    config.accum_steps = 1
    config.progress_every = 50
    config.eval_every = 2_500


def use_torchvision_crops(config: ml_collections.ConfigDict) -> None:
    """Random windows as torchvision and timm cut and resize them, for what was trained with them."""
    config.pp.update({"crop_method": "random_resized", "area": (0.08, 1.0), "interpolation": "bicubic", "antialias": True})


def use_captions(config: ml_collections.ConfigDict, dataset: str) -> None:
    """Images with sentences at 224 px. Little is cut off, and nothing is mirrored, as sentences tell left from right."""
    config.dataset = dataset or "shards"
    config.pp.update({"train": "train[:99%]", "test": "train[99%:]", "crop": 224, "flip": False})
    config.pp.update({"crop_method": "random_resized", "area": (0.9, 1.0), "interpolation": "bicubic", "antialias": True})
    config.pretrained_dir = ""
    config.accum_steps = 1
    config.progress_every = 50
    config.eval_every = 2_500
    config.checkpoint_every = 2_500


def use_scenes(config: ml_collections.ConfigDict) -> None:
    """Scenes of 64 px to learn from nothing on two CPU cores, with AdamW: set the ViT by `scene_vit`."""
    config.pretrained_dir = ""
    config.pp.update({"train": "train", "test": "test", "crop": 64, "flip": False})
    config.optimizer = "adamw"
    config.weight_decay = 1e-4
    config.grad_norm_clip = 1.0
    config.batch = 32
    config.batch_eval = 100
    config.accum_steps = 1
    config.total_steps = 2_500
    config.warmup_steps = 200
    config.eval_every = 500
    config.progress_every = 50


def scene_vit() -> dict:
    """The fields of a small ViT on the stem of a ResNet, of which every token is of use."""
    transformer = {"num_layers": 4, "mlp_dim": 256, "num_heads": 4, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    return {
        "patches": {"size": (2, 2)},
        "hidden_size": 128,
        "resnet": {"num_layers": (), "width_factor": 1},
        "classifier": "unpooled",
        "transformer": transformer,
    }


def steps(config: ml_collections.ConfigDict, epochs: float) -> int:
    """How many steps of `config.batch` make up so many epochs of `config.pp.train` of a dataset in `SIZES`."""
    _, part = split_range(config.pp.train, SIZES[config.dataset])
    return int(epochs * len(part) / config.batch)


def number(text: str, kind: type[int] | type[float], what: str) -> float:
    """A number in a recipe's argument."""
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{what} must be a number, not {text!r}") from None


SIZES = {
    "imagenet2012": {"train": 1_281_167},
    "imagenet21k": {"full": 14_197_122},
    "oxford_flowers102": {"train": 1_020},
    "oxford_iiit_pet": {"train": 3_680},
}
"""How many examples the datasets have for training, by split."""

CLIP_MEAN, CLIP_STD = (122.7709, 116.7460, 104.0937), (68.5005, 66.6322, 70.3232)
"""Of the 0..255 pixels, by channel, of the images that CLIP was trained on."""

_CIFAR = {"total_steps": 10_000, "pp": {"train": "train[:98%]", "test": "test", "crop": 384}}
_DIGITS = {
    "pp": {"train": "train", "test": "test", "crop": 16, "area": (0.7, 1.0), "flip": False},
    "base_lr": 0.1,
    "batch": 64,
    "batch_eval": 64,
    "accum_steps": 1,
    "total_steps": 500,
    "progress_every": 50,
    "warmup_steps": 50,
}
PRESETS = {
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "imagenet2012": {"total_steps": 20_000, "pp": {"train": "train[:99%]", "test": "validation", "crop": 384}},
    "digits": _DIGITS,
    "digits_0to4": _DIGITS,
}


def _fields(cls: type) -> dict:
    """Names and defaults; None becomes a placeholder that knows its type, so that the command line can set it."""
    types_of = typing.get_type_hints(cls)
    fields = {
        field.name: _placeholder(types_of[field.name]) if field.default is None else field.default
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING
    }
    fields |= {f.name: ml_collections.ConfigDict() for f in dataclasses.fields(cls) if f.default_factory is dict}
    return fields | {name: ml_collections.ConfigDict(_fields(kind)) for name, kind in nested(cls).items()}


def _placeholder(annotation: types.UnionType) -> config_dict.FieldReference:
    kinds = [t for t in typing.get_args(annotation) if t is not type(None)]
    return config_dict.placeholder(kinds[0] if len(kinds) == 1 else object)
