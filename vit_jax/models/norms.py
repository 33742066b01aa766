"""The norms that a ViT may have: all of them are called by one name, `norm`. Each is traced once for all blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.errors import unknown


class LayerNorm(nn.LayerNorm):
    """flax's, over the last axis: (x − mean) / sqrt(variance + eps) · scale + bias."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        scale, bias = _parameter(self, "scale", nn.initializers.ones, x), _parameter(self, "bias", nn.initializers.zeros, x)
        return layer_norm(x, scale, bias, eps=self.epsilon, dtype=self.dtype)


class RMSNorm(nn.RMSNorm):
    """flax's, over the last axis: x / sqrt(mean(x²) + eps) · scale, without mean and bias (https://arxiv.org/abs/1910.07467)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        return rms_norm(x, _parameter(self, "scale", nn.initializers.ones, x), eps=self.epsilon, dtype=self.dtype)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def make_norm(kind: str, eps: float, dtype: Any, name: str) -> nn.Module:
    """A norm over the last axis. UserError for what is none of `NORMS`."""
    if kind not in NORMS:
        raise unknown("norm", kind, NORMS)
    return NORMS[kind](epsilon=eps, dtype=dtype, name=name)


@functools.partial(jax.jit, static_argnames=("eps", "dtype"), inline=True)
def layer_norm(
    x: Float[Array, "*batch d"], scale: Float[Array, " d"], bias: Float[Array, " d"], *, eps: float, dtype: Any
) -> Float[Array, "*batch d"]:
    """The statistics are of float32, all in flax's order, whose bits these are: the variance is mean(x²) − mean(x)²."""
    wide = x.astype(jnp.promote_types(dtype, jnp.float32))
    mean, mean_of_squares = (y.mean(-1) for y in (wide, jax.lax.square(wide)))
    variance = jnp.maximum(0.0, mean_of_squares - jax.lax.square(mean))
    mean, variance = (jnp.expand_dims(statistic, -1) for statistic in (mean, variance))
    y = (x - mean) * (jax.lax.rsqrt(variance + eps) * _over_last(scale, x))
    return (y + _over_last(bias, x)).astype(dtype)


@functools.partial(jax.jit, static_argnames=("eps", "dtype"), inline=True)
def rms_norm(x: Float[Array, "*batch d"], scale: Float[Array, " d"], *, eps: float, dtype: Any) -> Float[Array, "*batch d"]:
    """Likewise without mean and bias."""
    wide = x.astype(jnp.promote_types(dtype, jnp.float32))
    mean_of_squares = jnp.expand_dims(jax.lax.square(wide).mean(-1), -1)
    return (x * (jax.lax.rsqrt(mean_of_squares + eps) * _over_last(scale, x))).astype(dtype)


def _over_last(parameter: Float[Array, " d"], x: Float[Array, "*batch d"]) -> Float[Array, "*ones d"]:
    return parameter.reshape((1,) * (x.ndim - 1) + parameter.shape)


def _parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, x: Array) -> Float[Array, " d"]:
    if module.has_variable("params", name):  # `param` would trace how it is drawn to compare shapes
        return module.get_variable("params", name)
    return module.param(name, init, x.shape[-1:])
