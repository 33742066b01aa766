"""The head of DINO and DINOv2 (https://arxiv.org/abs/2304.07193): how much a token resembles each of many prototypes."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.models.linear import activate


class DinoHead(nn.Module):
    """Three linear maps, d → hidden → hidden → bottleneck, with GELU between; length 1; a score for each prototype.

    Attributes:
      num_prototypes: how many scores there are.
      hidden, bottleneck: widths.
      dtype: what the maps compute in; scores are float32.
    """

    num_prototypes: int
    hidden: int = 2048
    bottleneck: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b prototypes"]:
        for i, width in enumerate((self.hidden, self.hidden, self.bottleneck)):
            x = activate(x, "gelu") if i else x
            x = nn.Dense(width, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype, name=f"Dense_{i}")(x)
        return Prototypes(self.num_prototypes, name="last_layer")(unit(x.astype(jnp.float32)))


class Prototypes(nn.Module):
    """x·kernel, where each prototype, a column of the kernel, has the length that `scale` says (weight normalisation)."""

    num_prototypes: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b prototypes"]:
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's of a linear map
        kernel = self.param("kernel", init, (x.shape[-1], self.num_prototypes))
        scale = self.param("scale", nn.initializers.ones, (self.num_prototypes,))
        return x @ (kernel * (scale / jnp.linalg.norm(kernel, axis=0)))


def unit(x: Float[Array, "*b d"], eps: float = 1e-12) -> Float[Array, "*b d"]:
    """Vectors of length 1; those that are shorter than `eps` are divided by it."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, eps * eps))
