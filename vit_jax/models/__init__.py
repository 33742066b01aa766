"""Every architecture by name: `get_model("ViT-B_16", num_classes=10)`."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from vit_jax.errors import UserError, unknown
from vit_jax.models import residual, zoo
from vit_jax.models.layers import ACTIVATIONS, REMAT, Encoder
from vit_jax.models.mixer import MlpMixer
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import CLASSIFIERS, POSITION_EMBEDDINGS, VisionTransformer

MODEL_TYPES: dict[str, type[nn.Module]] = {"ViT": VisionTransformer, "Mixer": MlpMixer}
_NESTED = {"transformer": Encoder, "resnet": ResNet}
_NOT_FIELDS = ("parent", "name", "add_position_embedding", "final_norm")  # the last two follow from the ViT's own fields


def get_model(name: str, **overrides: Any) -> nn.Module:
    """The model called `name` in the table of sizes; an override replaces a field, nested dicts are merged.

    get_model("ViT-B_16", num_classes=10, transformer={"dropout_rate": 0.1}, dtype="bfloat16")
    """
    for model_type, table in (("ViT", zoo.VIT), ("Mixer", zoo.MIXER)):
        if name in table:
            return build(model_type, _merge(table[name], overrides))
    raise unknown("model", name, [*zoo.VIT, *zoo.MIXER])


def build(model_type: str, fields: Mapping[str, Any]) -> nn.Module:
    """A model from its fields as a recipe holds them (`config.model_type`, `config.model`), every name checked."""
    if model_type not in MODEL_TYPES:
        raise unknown("model_type", model_type, MODEL_TYPES)
    cls = MODEL_TYPES[model_type]
    _check_fields(cls, fields, "model")
    for key, module in _NESTED.items():
        if fields.get(key) is not None:
            _check_fields(module, fields[key], f"model.{key}")
    transformer = fields.get("transformer", {})
    for where, name, allowed in (
        (fields, "classifier", CLASSIFIERS),
        (fields, "position_embedding", POSITION_EMBEDDINGS),
        (transformer, "activation", ACTIVATIONS),
        (transformer, "stochastic_depth_mode", residual.MODES),
        (transformer, "remat", REMAT),
        (fields, "remat", REMAT),
    ):
        if name in where and where[name] not in allowed:
            raise unknown(name, where[name], allowed)
    size = fields["patches"].get("size", ())
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"model.patches.size={size} must be (height, width), such as (16, 16)")
    return cls(**fields)


def _merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        value = value.to_dict() if hasattr(value, "to_dict") else value
        nested = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merge(base[key], value) if nested else value
    return merged


def _check_fields(cls: type[nn.Module], fields: Mapping[str, Any], where: str) -> None:
    known = [name for name in cls.__dataclass_fields__ if name not in _NOT_FIELDS]
    for name in fields:
        if name not in known:
            raise unknown(f"field of {where}", name, known)
    missing = [n for n, f in cls.__dataclass_fields__.items() if n in known and _required(f) and n not in fields]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}, which {cls.__name__} needs")


def _required(field) -> bool:
    return field.default is field.default_factory  # both are dataclasses.MISSING
