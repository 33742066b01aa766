"""The norms that a ViT may have: all of them are called by one name, `norm`."""

from typing import Any

from flax import linen as nn

from vit_jax.errors import unknown

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
"""LayerNorm, or x / sqrt(mean(x²) + eps) · scale, without mean and bias (https://arxiv.org/abs/1910.07467)."""


def make_norm(kind: str, eps: float, dtype: Any, name: str) -> nn.Module:
    """A norm over the last axis. UserError for what is none of `NORMS`."""
    if kind not in NORMS:
        raise unknown("norm", kind, NORMS)
    return NORMS[kind](epsilon=eps, dtype=dtype, name=name)
