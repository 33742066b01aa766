"""Multi-head attention with the parameter names and shapes of the published checkpoints."""

import functools
import logging
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.errors import UserError
from vit_jax.models.linear import Linear, linear

log = logging.getLogger("vit_jax")
_WORTH_SHARING = 2**22
"""Multiplications in q·kᵀ from which on a product is shared out to cores."""
_MOST_PARTS = 4
"""Every part is compiled by itself: with 8 a step of S/16 takes 10 s to compile, with 2 it takes 6."""


class MultiHeadDotProductAttention(nn.Module):
    """softmax(q·kᵀ / √head_dim)·v for every head, between linear maps `query`, `key`, `value` and `out`.

    Kernels are (d, k, d/k) for the three inputs and (k, d/k, d) for the output, as in flax's module of this name.
    The softmax is computed in float32 whatever `dtype` is. `qk_norm_eps` is the epsilon of a LayerNorm over every head's
    query and key (`query_ln`, `key_ln`), None for none.
    """

    num_heads: int
    dropout_rate: float = 0.0
    qk_norm_eps: float | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], inputs: Float[Array, "b m d"] | None = None, *, train: bool = False
    ) -> Float[Array, "b n d"]:
        """Attends from `x` to `inputs`, or to `x` itself."""
        d = x.shape[-1]
        if d % self.num_heads:
            raise UserError(f"a width of {d} cannot be shared out to {self.num_heads} heads: choose a multiple")
        maps = [Linear((self.num_heads, d // self.num_heads), dtype=self.dtype, name=n) for n in ("query", "key", "value")]
        if inputs is None and jax.default_backend() != "cpu":
            q, k, v = project(x, maps)
        else:
            query, key, value = maps
            source = x if inputs is None else inputs
            q, k, v = query(x), key(source), value(source)
        if self.qk_norm_eps is not None:
            q, k = (nn.LayerNorm(self.qk_norm_eps, self.dtype, name=f"{n}_ln")(x) for n, x in (("query", q), ("key", k)))
        if train and self.dropout_rate > 0:
            ones = jnp.ones((len(q), self.num_heads, q.shape[1], k.shape[1]))
            y = attend(q, k, v, nn.Dropout(self.dropout_rate, deterministic=False)(ones))
        elif cudnn_takes(q.dtype.name, q.shape[-1]):
            y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        else:
            y = attend(q, k, v)
        return Linear((d,), 2, dtype=self.dtype, name="out")(y)


def project(x: Float[Array, "b n d"], maps: list[Linear]) -> tuple[Float[Array, "b n k h"], ...]:
    """Queries, keys and values by one product, of stacked kernels: a GPU or TPU is better used by a large product.

    On a CPU that is no faster, and the stacks take memory.
    """
    kernels, biases = zip(*(f.parameters(x.shape[-1:]) for f in maps), strict=True)
    kernel, bias = jnp.stack(kernels, axis=1), jnp.stack(biases)
    return tuple(jnp.moveaxis(linear(*nn.dtypes.promote_dtype(x, kernel, bias, dtype=maps[0].dtype)), 2, 0))


@functools.cache
def cudnn_takes(dtype: str, head_dim: int) -> bool:
    """Whether this device has cuDNN's attention for such heads, which keeps no n x n weights in memory; logged where tried.

    It wants bfloat16 or float16, heads whose size is a multiple of 8, and Ampere or later: whether it works is tried.
    """
    if jax.default_backend() != "gpu" or dtype == "float32":
        return False
    shape = jax.ShapeDtypeStruct((1, 16, 1, head_dim), dtype)
    try:
        attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        jax.jit(jax.grad(lambda *qkv: attention(*qkv).sum(dtype=jnp.float32), (0, 1, 2))).lower(*[shape] * 3).compile()
    except Exception as e:  # of many kinds: the version, the GPU, the shape
        log.info("model    attention by XLA: cuDNN refused heads of %d in %s (%s)", head_dim, dtype, str(e).partition("\n")[0])
        return False
    log.info("model    attention by cuDNN, heads of %d in %s", head_dim, dtype)
    return True


def attend(
    q: Float[Array, "b n k h"],
    k: Float[Array, "b m k h"],
    v: Float[Array, "b m k h"],
    dropout_mask: Float[Array, "b k n m"] | None = None,
) -> Float[Array, "b n k h"]:
    """(softmax(q·kᵀ / √h) ∘ mask)·v, of which XLA makes more than of `jax.nn.dot_product_attention`.

    Heads are in front, and the sums divide at the end. The n x m weights are not kept for the backward pass, but computed
    again, as in https://arxiv.org/abs/2205.14135; its products take the dtype of q, where autodiff's would be float32.
    On CPUs, where a product by heads runs on one core, several cores have each their part of the batch.
    """
    n = min(_cores(), _MOST_PARTS, len(q)) if q.size * k.shape[1] >= _WORTH_SHARING else 1
    parts = [[None] * n if x is None else jnp.array_split(x, n) for x in (q, k, v, dropout_mask)]
    return jnp.concatenate([_attend(*part) for part in zip(*parts, strict=True)])


def _cores() -> int:
    """Of the machine, for each of this process's devices; 1 where they are no CPUs."""
    return max(1, (os.cpu_count() or 1) // jax.local_device_count()) if jax.default_backend() == "cpu" else 1


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, dropout_mask: Array | None) -> Array:
    return _forward(q, k, v, dropout_mask)[0]


def _forward(q: Array, k: Array, v: Array, dropout_mask: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
    q, k, v = _by_head(q), _by_head(k), _by_head(v)
    logits = _logits(q, k)
    largest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    sums = weights.sum(axis=-1, keepdims=True)
    weights = (weights if dropout_mask is None else weights * dropout_mask).astype(v.dtype)
    y = jnp.matmul(weights, v, preferred_element_type=jnp.float32)
    y = _by_head((y / sums).astype(v.dtype))
    return y, (q, k, v, dropout_mask, y, largest, sums)


def _backward(saved: tuple[Array | None, ...], dy: Float[Array, "b n k h"]) -> tuple[Array | None, ...]:
    """All n x m arrays are transposed here, (b k m n): XLA would find products of the forward pass, and keep them instead."""
    q, k, v, dropout_mask, y, largest, sums = saved
    ddropout_mask = None if dropout_mask is None else jnp.zeros_like(dropout_mask)  # it is drawn, not learnt
    dropout_mask = None if dropout_mask is None else _transposed(dropout_mask)
    matmul = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    mean = jnp.einsum("bnkh,bnkh->bkn", dy, y, preferred_element_type=jnp.float32)[..., None, :]
    dy = _by_head(dy)
    weights = jnp.exp(_logits(k, q) - _transposed(largest)) / _transposed(sums)
    dweights = matmul(v, _transposed(dy))
    masked, dweights = (weights, dweights) if dropout_mask is None else (weights * dropout_mask, dweights * dropout_mask)
    dlogits = (weights * (dweights - mean) / math.sqrt(q.shape[-1])).astype(q.dtype)
    gradients = matmul(_transposed(dlogits), k), matmul(dlogits, q), matmul(masked.astype(q.dtype), dy)
    return *(_by_head(x.astype(q.dtype)) for x in gradients), ddropout_mask


_attend.defvjp(_forward, _backward)


def _logits(q: Float[Array, "b k n h"], k: Float[Array, "b k m h"]) -> Float[Array, "b k n m"]:
    return jnp.matmul(q * (1 / math.sqrt(q.shape[-1])), _transposed(k), preferred_element_type=jnp.float32)


def _transposed(x: Float[Array, "b k n m"]) -> Float[Array, "b k m n"]:
    return x.swapaxes(-1, -2)


def _by_head(x: Float[Array, "b n k h"]) -> Float[Array, "b k n h"]:
    """Swaps tokens and heads; its own inverse."""
    return x.swapaxes(1, 2)
