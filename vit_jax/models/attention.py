"""Multi-head attention with the parameter names and shapes of the published checkpoints."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.errors import UserError


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
        inputs = x if inputs is None else inputs
        d = x.shape[-1]
        if d % self.num_heads:
            raise UserError(f"a width of {d} cannot be shared out to {self.num_heads} heads: choose a multiple")
        dense = partial(nn.DenseGeneral, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)
        q, k, v = (
            dense((self.num_heads, d // self.num_heads), name=name)(y)
            for name, y in (("query", x), ("key", inputs), ("value", inputs))
        )
        if self.qk_norm_eps is not None:
            q, k = (nn.LayerNorm(self.qk_norm_eps, self.dtype, name=f"{n}_ln")(x) for n, x in (("query", q), ("key", k)))
        if train and self.dropout_rate > 0:
            y = attend(q, k, v, nn.Dropout(self.dropout_rate, deterministic=False))
        elif jax.default_backend() == "cpu":
            y = attend(q, k, v)
        else:
            y = jax.nn.dot_product_attention(q, k, v)
        return dense(d, axis=(-2, -1), name="out")(y)


def attend(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    dropout: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "b n k d"]:
    """softmax(q·kᵀ / √d)·v as a CPU does it fastest: with the heads in front, and divided by the softmax's sums at the end.

    `dropout` is applied to the weights (b k n m).
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q * (1 / math.sqrt(q.shape[-1])), k, v))
    logits = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    # The largest cancels out: it has no gradient.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    y = jnp.matmul(dropout(weights).astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (y / weights.sum(axis=-1, keepdims=True)).astype(v.dtype).swapaxes(1, 2)
