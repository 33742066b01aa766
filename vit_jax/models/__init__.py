"""Every architecture by name: `get_model("ViT-B_16", num_classes=10)`."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from vit_jax.errors import unknown
from vit_jax.models import batchnorm_resnet, captioner, detr, eomt, mae, mixer, segment, two_towers, vit
from vit_jax.models.architecture import Architecture
from vit_jax.models.mixer import MlpMixer as MlpMixer
from vit_jax.models.vit import VisionTransformer as VisionTransformer

ARCHITECTURES: dict[str, Architecture] = {
    "ViT": vit.ARCHITECTURE,
    "MAE": mae.ARCHITECTURE,
    "Mixer": mixer.ARCHITECTURE,
    "DETR": detr.DETR,
    "YOLOS": detr.YOLOS,
    "BatchNormResNet": batchnorm_resnet.ARCHITECTURE,
    "TokenDetector": detr.TOKENS,
    "EoMT": eomt.EOMT,
    "LinearSegmenter": segment.LINEAR,
    "Segmenter": segment.SEGMENTER,
    "TwoTowers": two_towers.ARCHITECTURE,
    "Captioner": captioner.CAPTIONER,
    "AttendingLSTM": captioner.LSTM,
}
"""By `config.model_type`. A new kind of model is a file that ends in its `ARCHITECTURE`, and a line here."""


def get_model(name: str, **overrides: Any) -> nn.Module:
    """The model called `name` in the table of sizes; an override replaces a field, nested dicts are merged.

    get_model("ViT-B_16", num_classes=10, transformer={"dropout_rate": 0.1}, dtype="bfloat16")
    """
    return build(*named(name, **overrides))


def named(name: str, **overrides: Any) -> tuple[str, dict[str, Any]]:
    """(model_type, fields) of the model called `name`, see `get_model`."""
    kind = model_type_of(name)
    return kind, _merge(ARCHITECTURES[kind].sizes[name], overrides)


def build(model_type: str, fields: Mapping[str, Any]) -> nn.Module:
    """A model from its fields as a recipe holds them (`config.model_type`, `config.model`), every name checked."""
    return architecture_of(model_type).build(fields)


def architecture_of(model_type: str) -> Architecture:
    """The entry of `ARCHITECTURES`. Raises UserError for an unknown one."""
    if model_type not in ARCHITECTURES:
        raise unknown("model_type", model_type, ARCHITECTURES)
    return ARCHITECTURES[model_type]


def model_type_of(name: str) -> str:
    """The kind of model that the named size belongs to. Raises UserError for an unknown name."""
    names = {size: kind for kind, architecture in ARCHITECTURES.items() for size in architecture.sizes}
    if name not in names:
        raise unknown("model", name, names)
    return names[name]


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        value = value.to_dict() if hasattr(value, "to_dict") else value
        nested = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merge(base[key], value) if nested else value
    return merged
