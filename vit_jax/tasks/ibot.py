"""iBOT's loss (https://arxiv.org/abs/2111.07832): the student says of a masked patch what the teacher, who sees it, says."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def ibot_loss(
    student: Float[Array, "b m k"], teacher: Float[Array, "b m k"], weight: Float[Array, "b m"], *, temperature: float = 0.1
) -> Float[Array, ""]:
    """The sum of weight · cross-entropy over the masked patches, divided by the number of global views, 2·b.

    Args:
      student: scores of the prototypes, which `temperature` divides; teacher: probabilities.
      weight: 1 / (masked patches of the view), and 0 for places that are left over.
    """
    cross_entropy = -jnp.einsum("bmk,bmk->bm", teacher, jax.nn.log_softmax(student / temperature))
    return (weight * cross_entropy).sum() / (2 * len(weight))
