"""What all recipes share: every field with its default, and presets by dataset."""

import dataclasses
import types
import typing

import ml_collections
from ml_collections import config_dict

from vit_jax.settings import Preprocessing, Settings


def get_config() -> ml_collections.ConfigDict:
    """A recipe with every field of `vit_jax.settings.Settings` at its default; the model is still to be chosen."""
    config = ml_collections.ConfigDict(_fields(Settings))
    config.pp = ml_collections.ConfigDict(_fields(Preprocessing))
    config.model = ml_collections.ConfigDict()
    return config


def with_dataset(config: ml_collections.ConfigDict, dataset: str) -> ml_collections.ConfigDict:
    """Sets the dataset and what `PRESETS` has for it; any other dataset is read as it is, for 500 steps."""
    config.dataset = dataset
    config.update(PRESETS.get(dataset, {"total_steps": 500, "warmup_steps": 100}))
    return config


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
    return {
        field.name: _placeholder(types_of[field.name]) if field.default is None else field.default
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING
    }


def _placeholder(annotation: types.UnionType) -> config_dict.FieldReference:
    (kind,) = (t for t in typing.get_args(annotation) if t is not type(None))
    return config_dict.placeholder(kind)
