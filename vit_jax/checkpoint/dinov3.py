"""transformers' DINOv3 (https://arxiv.org/abs/2508.10104): rotary positions, registers, some projections without bias."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint import hf_pixels, rules
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import Entries
from vit_jax.checkpoint.family import ATTENTION, BLOCK, IMAGENET, Facts, Family, count_blocks, vit_fields
from vit_jax.checkpoint.rules import Flat, Rule, rule
from vit_jax.errors import UserError

_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}


def _rules(swiglu: bool) -> tuple[Rule, ...]:
    theirs, first = "layer.{i}", f"{BLOCK}/MlpBlock_3/Dense_0"
    attends = rules.attention(ATTENTION, f"{theirs}.attention", f"{theirs}.attention.o_proj")
    mlp = None if swiglu else "mlp.up_proj", "mlp.down_proj"
    return (
        rule("cls", "embeddings.cls_token"),
        rule("register_tokens", "embeddings.register_tokens"),
        rule("extras/mask_token", "embeddings.mask_token", rules.ROW),
        *rules.patch_embedding("embeddings.patch_embeddings"),
        *rules.block(BLOCK, theirs, attends, ("norm1", "norm2"), mlp),
        *(rules.joined(first, f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj") if swiglu else ()),
        *(rule(f"{BLOCK}/ls{k}/gamma", f"{theirs}.layer_scale{k}.lambda1") for k in (1, 2)),
        *rules.norm("Transformer/encoder_norm", "norm"),
    )


def _facts(flat: Flat, config: Entries, preprocessor: Entries) -> Facts:
    for name in ("proj_bias", "mlp_bias"):
        if not config.flag(name, True):
            raise config.wrong(name, "true: these layers have a bias here")
    swiglu = "layer.0.mlp.gate_proj.weight" in flat
    activation = config.text("hidden_act", "gelu", ("silu",) if swiglu else ("gelu",))
    d, _, p, q = flat["embeddings.patch_embeddings.weight"].shape
    registers = flat["embeddings.register_tokens"].shape[1] if "embeddings.register_tokens" in flat else 0
    model = vit_fields(
        num_classes=None,
        hidden_size=d,
        patches={"size": (p, q)},
        classifier="token",
        num_registers=registers,
        position_embedding="none",
        transformer={
            "num_layers": count_blocks(flat, "layer."),
            "num_heads": config.whole("num_attention_heads"),
            "mlp_dim": flat["layer.0.mlp.down_proj.weight"].shape[1],
            "activation": "swiglu" if swiglu else activation,
            "norm_eps": config.number("layer_norm_eps", 1e-5, low=1e-16, high=1),
            "layer_scale": True,
            "rope_theta": config.number("rope_theta", 100.0, low=1, high=1e9),
        },
    )
    facts = Facts(model, config.size("image_size", (224, 224)), "bilinear", *IMAGENET)
    if not preprocessor.content:
        return dataclasses.replace(facts, assumed=("no preprocessor_config.json lies beside it: ImageNet's mean and std",))
    pixels = hf_pixels.read(preprocessor, "dinov3_vit")
    how = {"mean": pixels.mean, "std": pixels.std, "preprocessing": pixels.preprocessing, "input_size": pixels.size}
    return dataclasses.replace(facts, **how)


def _with_biases(flat: Flat, facts: Facts) -> Flat:
    """Projections without a bias are those with one of zeros."""
    blocks, zeros = range(facts.model["transformer"]["num_layers"]), np.zeros(facts.model["hidden_size"], np.float32)
    return {f"layer.{i}.attention.{name}.bias": zeros for i in blocks for name in _PROJECTIONS.values()} | flat


def _without_zeros(ours: Flat) -> Flat:
    """What `_with_biases` adds is left out; a token for masked patches is added where ours has none."""
    left_out = tuple(f"/{name}/bias" for name in _PROJECTIONS if not _has_bias(ours, name))
    mask = {"extras/mask_token": np.zeros((1, ours["cls"].shape[-1]), np.float32)}
    return mask | {name: x for name, x in ours.items() if not name.endswith(left_out)}


def _has_bias(ours: Flat, projection: str) -> bool:
    return any(x.any() for name, x in ours.items() if name.endswith(f"/{projection}/bias"))


def _export(description: Description, ours: Flat) -> dict[str, Any]:
    """config.json and preprocessor_config.json. Raises UserError for what transformers' DINOv3 cannot express."""
    model, transformer = description.model, description.model["transformer"]
    check_expressible(model, "transformers' dinov3_vit")
    swiglu = transformer.get("activation") == "swiglu"
    config = {
        "model_type": "dinov3_vit",
        "architectures": ["DINOv3ViTModel"],
        "hidden_size": model["hidden_size"],
        "num_hidden_layers": transformer["num_layers"],
        "num_attention_heads": transformer["num_heads"],
        "intermediate_size": transformer["mlp_dim"],
        "image_size": description.native_size[0],
        "patch_size": model["patches"]["size"][0],
        "num_channels": 3,
        "num_register_tokens": model.get("num_registers", 0),
        "hidden_act": "silu" if swiglu else "gelu",
        "use_gated_mlp": swiglu,
        "layer_norm_eps": transformer.get("norm_eps", 1e-6),
        "rope_theta": transformer["rope_theta"],
        **{f"{name}_bias": _has_bias(ours, name) for name in _PROJECTIONS},
        **dict.fromkeys(("proj_bias", "mlp_bias"), True),
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
    }
    return {"config.json": config, "preprocessor_config.json": hf_pixels.write(description, "dinov3_vit")}


def check_expressible(model: Mapping[str, Any], layout: str) -> None:
    """Raises UserError for a ViT that is no DINOv3."""
    transformer = model["transformer"]
    faults = {
        "a head": model.get("num_classes"),
        "learned positions": model.get("position_embedding", "learned") != "none",
        "no LayerScale": not transformer.get("layer_scale"),
        "qk_norm": transformer.get("qk_norm"),
        "tanh GELU": transformer.get("activation", "gelu_tanh") == "gelu_tanh",
        "patches that are not square": len(set(model["patches"]["size"])) > 1,
        f"classifier={model.get('classifier')}": model.get("classifier") not in ("token", "cls_mean"),
        "fc_norm": model.get("fc_norm"),
        "a ResNet": model.get("resnet"),
    }
    if wrong := [name for name, fault in faults.items() if fault]:
        raise UserError(f"{layout} cannot express {', '.join(wrong)}: convert with --to=npz")


FAMILY = Family("Hugging Face DINOv3", _rules, _facts, fold=_with_biases, unfold=_without_zeros, export=_export)
