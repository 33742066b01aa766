"""KoLeo spreads features over the sphere, by an estimate of their entropy (https://arxiv.org/abs/1806.03198)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.dino_head import unit
from vit_jax.tasks.task import Devices

EPS = 1e-8


def koleo_loss(x: Float[Array, "b d"], devices: Devices) -> Float[Array, ""]:
    """−mean log of the distance from each feature, at length 1, to the nearest among those of all devices."""
    x = unit(x, EPS)
    everything = devices.all_examples(x)
    own = devices.device_index() * len(x) + jnp.arange(len(x))
    similarity = (x @ everything.T).at[jnp.arange(len(x)), own].set(-jnp.inf)
    nearest = everything[similarity.argmax(axis=1)]
    return -jnp.log(jnp.linalg.norm(x - nearest + EPS, axis=1) + EPS).mean()
