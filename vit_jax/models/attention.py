"""Multi-head attention with the parameter names and shapes of the published checkpoints."""

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
            logits = jnp.einsum("bqkd,bskd->bkqs", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
            weights = nn.Dropout(self.dropout_rate, deterministic=False)(jax.nn.softmax(logits)).astype(v.dtype)
            y = jnp.einsum("bkqs,bskd->bqkd", weights, v)
        else:
            y = jax.nn.dot_product_attention(q, k, v)
        return dense(d, axis=(-2, -1), name="out")(y)
