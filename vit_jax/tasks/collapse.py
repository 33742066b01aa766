"""Whether a teacher still tells images apart: self-distillation has the trivial solution that it says the same of all."""

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.dino_head import unit
from vit_jax.tasks.task import Context, Metrics, TrainingFailed

COLLAPSED, EARLIEST = 0.05, 50
"""The teacher's information below which it says the same of every image, see `spread`, and the last step that is not asked."""


def spread(taught: Float[Array, "b 2 k"], features: Float[Array, "b 2 d"], context: Context) -> Metrics:
    """`teacher_information`, which tells of a collapse, `teacher_entropy` and `feature_spread`, all from 0 to 1.

    The entropy of what is said of an image is 0 for one prototype and 1 for all alike. That of the batch's mean, less it,
    is the information on the image: 0 where the same is said of all, be it one prototype or all alike. The spread is the root
    mean square distance of the teacher's features, at length 1, to their mean: 0 where all are the same, 1 where they differ.
    """

    def entropy_of(p: Float[Array, "*b k"]) -> Float[Array, "*b"]:
        return -(p * jnp.log(p + 1e-12)).sum(axis=-1) / math.log(p.shape[-1])

    entropy = entropy_of(taught).mean()
    information = entropy_of(context.devices.mean(taught.mean(axis=(0, 1)))) - entropy
    x = unit(features).reshape(-1, features.shape[-1])
    mean = context.devices.mean(x.mean(axis=0))
    apart = jnp.sqrt(jnp.maximum(0, 1 - (mean * mean).sum()))
    return {"teacher_entropy": entropy, "teacher_information": information, "feature_spread": apart}


def make_check(beginning: int) -> Callable[[int, Mapping[str, float]], None]:
    """See `Task.check`: once the first steps are over, the teacher must tell images apart; a new one may not do so."""

    def check(step: int, metrics: Mapping[str, float]) -> None:
        if step > beginning and metrics["teacher_information"] < COLLAPSED:
            seen = ", ".join(f"{name} {metrics[name]:.2g}" for name in ("teacher_information", "teacher_entropy"))
            raise TrainingFailed(
                f"step {step}: the teacher has collapsed, it says the same of every image ({seen}); training stops. In a new "
                "--workdir, try a lower --config.base_lr, more --config.warmup_steps, a larger --config.batch, or "
                "--config.task.centring=sinkhorn"
            )

    return check
