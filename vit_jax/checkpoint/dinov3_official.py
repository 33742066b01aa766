"""DINOv3's official files (https://github.com/facebookresearch/dinov3), which tell all of a model but its pixels."""

import re

import numpy as np

from vit_jax.checkpoint import dinov3, rules
from vit_jax.checkpoint.entries import Entries
from vit_jax.checkpoint.family import (
    ATTENTION,
    BLOCK,
    IMAGENET,
    Facts,
    Family,
    Written,
    count_blocks,
    vit_fields,
    with_mask_token,
    with_packed_biases,
    without_zero_biases,
)
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat, Rule, rule
from vit_jax.errors import UserError

PERIODS = "rope_embed.periods"
_UNUSED = re.compile(r"local_cls_norm\.|rope_embed\.|.*\.bias_mask$")
"""Norms of local crops, which are for training alone, and what `_facts` and `_normalize` have read."""


def _rules(swiglu: bool) -> tuple[Rule, ...]:
    mlp, first = f"{BLOCK}/MlpBlock_3", ("w1", "w2") if swiglu else ("fc1",)
    return (
        rule("cls", "cls_token"),
        rule("register_tokens", "storage_tokens"),
        rule("extras/mask_token", "mask_token"),
        *rules.patch_embedding("patch_embed.proj"),
        *rules.norm(f"{BLOCK}/LayerNorm_0", "blocks.{i}.norm1"),
        *rules.qkv_attention(ATTENTION, "blocks.{i}.attn"),
        rule(f"{BLOCK}/ls1/gamma", "blocks.{i}.ls1.gamma"),
        *rules.norm(f"{BLOCK}/LayerNorm_2", "blocks.{i}.norm2"),
        *(rules.joined if swiglu else rules.dense)(f"{mlp}/Dense_0", *(f"blocks.{{i}}.mlp.{x}" for x in first)),
        *rules.dense(f"{mlp}/Dense_1", f"blocks.{{i}}.mlp.{'w3' if swiglu else 'fc2'}"),
        rule(f"{BLOCK}/ls2/gamma", "blocks.{i}.ls2.gamma"),
        *rules.norm("Transformer/encoder_norm", "norm"),
    )


def _normalize(flat: Flat) -> Flat:
    """Biases where their masks say 0 are 0, whatever stands there."""
    masks = {name: flat.get(f"{name}_mask") for name in flat}
    return {name: x if masks[name] is None else np.where(masks[name] == 0, 0, x) for name, x in flat.items()}


def _facts(flat: Flat, config: Entries, _: Entries) -> Facts:
    if any(name.startswith("cls_norm.") for name in flat):
        raise UserError("a norm of the class token alone (cls_norm) is not supported")
    d, _, p, q = flat["patch_embed.proj.weight"].shape
    heads, theta = _rotation(flat[PERIODS], d)
    swiglu = "blocks.0.mlp.w1.weight" in flat
    model = vit_fields(
        num_classes=None,
        hidden_size=d,
        patches={"size": (p, q)},
        classifier="token",
        num_registers=flat["storage_tokens"].shape[1] if "storage_tokens" in flat else 0,
        position_embedding="none",
        transformer={
            "num_layers": count_blocks(flat, "blocks."),
            "num_heads": heads,
            "mlp_dim": flat[f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight"].shape[1],
            "activation": "swiglu" if swiglu else "gelu",
            "norm_eps": 1e-5,
            "layer_scale": True,
            "rope_theta": theta,
        },
    )
    how = {"resize_to": None, "interpolation": "bilinear", "antialias": True}
    told = "it tells no mean and std: ImageNet's are assumed, which models of satellite images (SAT-493M) do not have"
    return Facts(model, (224, 224), "bilinear", *IMAGENET, preprocessing=how, assumed=(told,))


def _rotation(periods: np.ndarray, d: int) -> tuple[int, float]:
    """(heads, theta) of the periods theta^(i/n), where n is a quarter of a head's width."""
    n = len(periods)
    periods = np.asarray(periods, np.float64)
    theta = float(f"{periods[-1] ** (n / (n - 1)):.3g}") if n > 1 and periods[-1] > 1 else 0.0
    if d % (4 * n) or not theta or not np.allclose(periods, theta ** (np.arange(n) / n), rtol=5e-3):
        raise UserError(f"{PERIODS} are not theta^(i/{n}) for any theta: such rotary positions are not supported")
    return d // (4 * n), theta


def _fold(flat: Flat, facts: Facts) -> Flat:
    return with_packed_biases({name: x for name, x in flat.items() if not _UNUSED.match(name)})


FAMILY = Family("DINOv3", _rules, _facts, normalize=_normalize, fold=_fold, unfold=without_zero_biases)


def write_official(opened: Opened) -> Written:
    """A DINOv3 under its official names. Raises UserError for what they have no place for."""
    model, transformer = opened.description.model, opened.description.model["transformer"]
    dinov3.check_expressible(model, "DINOv3's official layout")
    if (eps := transformer.get("norm_eps", 1e-6)) != 1e-5:
        raise UserError(f"DINOv3's official layout has no place for a LayerNorm epsilon of {eps:g}: it is 1e-5 there")
    n = model["hidden_size"] // transformer["num_heads"] // 4
    periods = np.float32(transformer["rope_theta"]) ** (np.arange(n, dtype=np.float32) / n)
    arrays = FAMILY.arrays(transformer, with_mask_token(opened.flat)) | {PERIODS: periods.astype(np.float32)}
    return Written(arrays | _masks(arrays))


def _masks(arrays: Flat) -> Flat:
    """The masks of the biases, unless keys have one."""
    biases = {name: x for name, x in arrays.items() if name.endswith(".qkv.bias")}
    if any(np.split(x, 3)[1].any() for x in biases.values()):
        return {}
    return {f"{name}_mask": np.repeat(np.float32([1, 0, 1]), len(x) // 3) for name, x in biases.items()}
