"""DINO's loss (https://arxiv.org/abs/2104.14294): the student says of one view what the teacher says of another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dino_loss(
    student_global: Float[Array, "b 2 k"],
    student_local: Float[Array, "b n k"],
    teacher: Float[Array, "b 2 k"],
    *,
    temperature: float = 0.1,
) -> Float[Array, ""]:
    """The mean cross-entropy over all pairs of a teacher's view and another one of the student's, 2 + 2·n an image.

    Args:
      student_global, student_local: scores of the prototypes, which `temperature` divides.
      teacher: probabilities of the prototypes; a global view is compared with the other one.
    """
    b, n, _ = student_local.shape
    of_global, of_local = (jax.nn.log_softmax(x / temperature) for x in (student_global, student_local))
    across = -jnp.einsum("bvk,bvk->", teacher[:, ::-1], of_global)
    down = -jnp.einsum("btk,bnk->", teacher, of_local)
    return (across + down) / (b * (2 + 2 * n))
