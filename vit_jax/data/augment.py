"""What happens to a batch of images on the device: random flips when training, and normalisation always."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt, UInt8

MEAN = 127.5
STD = 127.5
"""Of the 0..255 pixels, for every channel: all Google ViTs see images in [-1, 1]."""


def random_flip(images: UInt8[Array, "b h w c"], seeds: UInt[Array, " b"]) -> UInt8[Array, "b h w c"]:
    """Mirrors each image left to right with probability 1/2, decided by its own seed."""
    flip = jax.vmap(lambda seed: jax.random.bernoulli(jax.random.key(seed)))(seeds)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def normalize(
    images: Array, mean: float | Sequence[float] = MEAN, std: float | Sequence[float] = STD
) -> Float[Array, "b h w c"]:
    """(x − mean) / std in float32; mean and std are one number, or one for each channel."""
    mean, std = (jnp.asarray(x, jnp.float32) for x in (mean, std))
    return (images.astype(jnp.float32) - mean) / std
