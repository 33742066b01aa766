"""What keeps a teacher from saying the same of everything: Sinkhorn-Knopp, or a centre that follows the mean of its scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.tasks.task import Devices

METHODS = ("sinkhorn", "centre")


def sinkhorn(
    scores: Float[Array, "n k"],
    weight: Float[Array, " n"],
    temperature: float | Float[Array, ""],
    devices: Devices,
    *,
    iterations: int = 3,
) -> Float[Array, "n k"]:
    """Probabilities of the prototypes, such that over the rows of all devices every prototype is about as likely (SwAV).

    exp(scores / temperature) is divided by the sums of its columns and of its rows in turn (https://arxiv.org/abs/2006.09882).

    Args:
      weight: 1 for rows that count, 0 for others, whose result is 0.
    """
    k = scores.shape[1]
    q = jnp.exp(scores / temperature) * weight[:, None]
    q /= devices.sum(q.sum())
    count = devices.sum(weight.sum())
    for _ in range(iterations):
        q /= jnp.maximum(devices.sum(q.sum(axis=0)), _TINY) * k
        q /= jnp.maximum(q.sum(axis=1, keepdims=True), _TINY) * count
    return q * count


def centred(
    scores: Float[Array, "n k"], centre: Float[Array, " k"], temperature: float | Float[Array, ""]
) -> Float[Array, "n k"]:
    """softmax((scores − centre) / temperature)."""
    return jax.nn.softmax((scores - centre) / temperature)


def moved(
    centre: Float[Array, " k"],
    scores: Float[Array, "n k"],
    weight: Float[Array, " n"],
    devices: Devices,
    *,
    momentum: float = 0.9,
) -> Float[Array, " k"]:
    """momentum · centre + (1 − momentum) · mean of the scores over the rows of all devices that count."""
    mean = devices.sum(weight @ scores) / jnp.maximum(devices.sum(weight.sum()), 1)
    return momentum * centre + (1 - momentum) * mean


_TINY = jnp.finfo(jnp.float32).tiny
