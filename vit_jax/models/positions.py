"""Where a token stands, as a vector: sines and cosines of its place in a sequence or in an image."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_jax.errors import UserError, unknown

LAYOUTS = ("interleaved", "halves")


def sinusoid(
    places: Float[Array, "*n"] | Int[Array, "*n"], d: int, *, layout: str = "interleaved", temperature: float = 10_000.0
) -> Float[Array, "*n d"]:
    """Sines and cosines of place / temperature^(2i/d), i < d/2 (https://arxiv.org/abs/1706.03762, section 3.5).

    `layout`: "interleaved" as in the paper, sin and cos in turn; "halves" all sines in front, as in Marian.
    """
    if d % 2:
        raise UserError(f"sines and cosines need an even width, not {d}")
    frequencies = jnp.asarray(temperature ** (-2 * np.arange(d // 2) / d), jnp.float32)
    angles = jnp.asarray(places, jnp.float32)[..., None] * frequencies
    if layout == "halves":
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    if layout == "interleaved":
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*angles.shape[:-1], d)
    raise unknown("layout of position embeddings", layout, LAYOUTS)


def sine_of_image(valid: Bool[Array, "b h w"], d: int) -> Float[Array, "b h w d"]:
    """DETR's positions (https://arxiv.org/abs/2005.12872): d/2 numbers for y, then d/2 for x, interleaved.

    A place is counted from 1 among the valid ones of its column or row and divided by their number, so that the last
    valid place is 2π, however much padding follows.
    """
    if d % 4:
        raise UserError(f"positions of an image need a width that is a multiple of 4, not {d}")

    def along(axis: int) -> Float[Array, "b h w d/2"]:
        place = jnp.cumsum(valid, axis=axis, dtype=jnp.float32)
        last = jnp.take(place, jnp.array([-1]), axis)
        return sinusoid(place / (last + 1e-6) * (2 * math.pi), d // 2)

    return jnp.concatenate([along(1), along(2)], axis=-1)


def axial_rotation(grid: tuple[int, int], d: int, theta: float) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]:
    """Cosines and sines of the angles by which DINOv3 (https://arxiv.org/abs/2508.10104) turns a patch's queries and keys.

    A patch's middle lies at (y, x) in [-1, 1]; the angles are 2π · y / theta^(4i/d), i < d/4, then those of x, and both again.
    """
    if d % 4:
        raise UserError(f"rotary positions need heads of a width that is a multiple of 4, not {d}")
    sides = [2 * (np.arange(n) + 0.5) / n - 1 for n in grid]
    places = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = 2 * math.pi * places * theta ** (-4 * np.arange(d // 4) / d)
    angles = np.tile(angles.reshape(len(places), d // 2), 2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Float[Array, "b n k d"], grid: tuple[int, int], theta: float) -> Float[Array, "b n k d"]:
    """Turns the heads of the patches, which are last among the n tokens, by `axial_rotation`; the others stay."""
    first = x.shape[1] - math.prod(grid)
    cos, sin = (a[:, None].astype(x.dtype) for a in axial_rotation(grid, x.shape[-1], theta))
    patches = x[:, first:]
    left, right = jnp.split(patches, 2, axis=-1)
    turned = patches * cos + jnp.concatenate([-right, left], axis=-1) * sin
    return jnp.concatenate([x[:, :first], turned], axis=1)


def downsample(valid: Bool[Array, "b H W"], size: tuple[int, int]) -> Bool[Array, "b h w"]:
    """The nearest pixel of every cell: pixel floor(i·H/h), which is what torch's `nearest` takes."""
    rows, columns = (np.arange(new) * old // new for old, new in zip(valid.shape[1:], size, strict=True))
    return valid[:, rows][:, :, columns]


def resample(grid: Float[Array, "h w d"], size: tuple[int, int]) -> Float[Array, "i j d"]:
    """A grid of learned positions at another size, as torch's bicubic interpolation (a = −0.75, replicated border)."""
    if grid.shape[:2] == size:
        return grid
    rows, columns = (_bicubic(old, new) for old, new in zip(grid.shape[:2], size, strict=True))
    return jnp.einsum("ih,hwd,jw->ijd", rows, grid, columns, precision="highest")


def _bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """How much of each old place goes into each new one."""
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old), np.float32)
    for tap in range(-1, 3):
        source = np.floor(centers).astype(int) + tap
        x = np.abs(centers - source)
        near, far = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
        np.add.at(weights, (np.arange(new), np.clip(source, 0, old - 1)), np.where(x <= 1, near, far))
    return weights
