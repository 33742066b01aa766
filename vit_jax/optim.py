"""Learning-rate schedules and optimisers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError, unknown

DECAY_TYPES = ("cosine", "linear")
OPTIMIZERS = ("sgd", "adamw")


def make_schedule(
    base_lr: float, total_steps: int, *, warmup_steps: int = 0, decay_type: str = "cosine", linear_end: float = 1e-5
) -> optax.Schedule:
    """Linear warm-up to `base_lr`, then a cosine to 0 or a line to `linear_end`.

    With progress p = clip((step − warmup) / (total − warmup), 0, 1) the rate is base·(1 + cos πp)/2, or
    linear_end + (base − linear_end)·(1 − p), times min(1, step / warmup).
    """
    if decay_type not in DECAY_TYPES:
        raise unknown("decay_type", decay_type, DECAY_TYPES)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        progress = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
        if decay_type == "cosine":
            rate = base_lr * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        else:
            rate = linear_end + (base_lr - linear_end) * (1.0 - progress)
        return rate * jnp.minimum(1.0, step / warmup_steps) if warmup_steps else rate

    return schedule


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    grad_norm_clip: float | None = None,
    weight_decay: float = 0.0,
    dtype: Any = jnp.float32,
) -> optax.GradientTransformation:
    """Clipping by the global norm, then SGD with momentum 0.9, or AdamW with decoupled decay of the matrices.

    Args:
      dtype: of SGD's momentum or of Adam's first moment.
      weight_decay: AdamW's, times the learning rate; it spares everything that is not a `kernel`.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    clip = [optax.clip_by_global_norm(grad_norm_clip)] if grad_norm_clip else []
    if name == "adamw":
        optimizer = optax.adamw(learning_rate, weight_decay=weight_decay, mask=matrices, mu_dtype=dtype)
    elif weight_decay:
        raise UserError(f"weight_decay={weight_decay} needs --config.optimizer=adamw; sgd here is the published one, without")
    else:
        optimizer = optax.sgd(learning_rate, momentum=0.9, accumulator_dtype=dtype)
    return optax.chain(*clip, optimizer)


def matrices(params: Any) -> Any:
    """A tree of booleans: True for the kernels of linear maps and convolutions, False for all else."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
