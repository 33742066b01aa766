"""Residual branches, x + f(x), and stochastic depth: training leaves them out for random examples (arXiv 1603.09382)."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vit_jax.errors import UserError, unknown

MODES = ("mask", "subset")
Kept = Float[Array, "b"] | Int[Array, "s"] | None
KeptOfBlocks = Float[Array, "l 2 b"] | list[tuple[Kept, Kept]]


def rates(last: float, num_blocks: int, *, uniform: bool = False) -> list[float]:
    """Every block's chance to lose a branch: a line from 0 to `last`; with `uniform` the same for all, as DeiT III has it."""
    if not 0 <= last < 1:
        raise UserError(f"stochastic_depth={last} must be from 0 to below 1, such as 0.1")
    return [last if uniform else last * i / max(1, num_blocks - 1) for i in range(num_blocks)]


def draw(key: PRNGKeyArray | None, rates: Sequence[float], b: int, mode: str = "mask") -> KeptOfBlocks:
    """For every block what is kept of its two branches, for `add`; everything without a key.

    "mask" draws for every example 0, with the block's rate, or 1 / (1 - rate). "subset" is DINOv2's form
    (https://arxiv.org/abs/2304.07193): the places of b - floor(b · rate) random examples, a number that DINOv2 rounds down.
    The batch is all that one program computes: on a mesh such examples move between devices.
    """
    if mode not in MODES:
        raise unknown("stochastic_depth_mode", mode, MODES)
    if key is None:
        return [(None, None)] * len(rates)
    if mode == "mask":
        keep = 1 - jnp.asarray(rates)[:, None, None]
        return jax.random.bernoulli(key, keep, (len(rates), 2, b)) / keep
    sizes = [b - math.floor(b * rate) for rate in rates]
    keys = jax.random.split(key, (len(rates), 2))
    return [
        (None, None) if s == b else tuple(jax.random.choice(k, b, (s,), replace=False) for k in pair)
        for s, pair in zip(sizes, keys, strict=True)
    ]


def add(
    x: Float[Array, "b n d"], branch: Callable[[Float[Array, "s n d"]], Float[Array, "s n d"]], kept: Kept
) -> Float[Array, "b n d"]:
    """x + branch(x) for the examples that are kept, where branch(x) is scaled to keep its mean; x for the others.

    `kept` is a factor for each example, or the places of those that `branch` is computed for at all; None keeps all.
    """
    if kept is None:
        return x + branch(x)
    if jnp.issubdtype(kept.dtype, jnp.integer):
        return x.at[kept].add(x.shape[0] / kept.shape[0] * branch(x[kept]), unique_indices=True)
    return x + kept.astype(x.dtype)[:, None, None] * branch(x)
