"""Windows of the grid of patches, in which ViTDet (https://arxiv.org/abs/2203.16527) attends in most of its blocks.

A window is a square of `size` x `size` patches; the last ones of a row or column hold fewer where the grid does not divide.
A patch sees the patches of its window. The tokens in front of the patches (class token, registers, queries that join), of which
ViTDet has none, see everything and are seen by all, so that every kind of head works.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class Windows(NamedTuple):
    """How a grid (h, w) of patches, which are the last of all tokens, is cut into windows of at most size x size."""

    grid: tuple[int, int]
    size: int

    @property
    def window(self) -> tuple[int, int]:
        """(s, t) of a window: no larger than the grid."""
        return min(self.size, self.grid[0]), min(self.size, self.grid[1])

    @property
    def count(self) -> tuple[int, int]:
        """How many windows there are in a column and in a row of the grid."""
        return tuple(math.ceil(length / side) for length, side in zip(self.grid, self.window, strict=True))

    def cut(self, patches: Float[Array, "b n k d"]) -> Float[Array, "b*windows s*t k d"]:
        """The patches of every window, those of one example behind each other; what is missing is filled with zeros."""
        (h, w), (s, t), (rows, columns) = self.grid, self.window, self.count
        k, d = patches.shape[2:]
        x = patches.reshape(-1, h, w, k, d)
        x = jnp.pad(x, ((0, 0), (0, rows * s - h), (0, columns * t - w), (0, 0), (0, 0)))
        return x.reshape(-1, rows, s, columns, t, k, d).swapaxes(2, 3).reshape(-1, s * t, k, d)

    def join(self, windows: Float[Array, "b*windows s*t k d"]) -> Float[Array, "b n k d"]:
        """Undoes `cut`."""
        (h, w), (s, t), (rows, columns) = self.grid, self.window, self.count
        k, d = windows.shape[2:]
        x = windows.reshape(-1, rows, columns, s, t, k, d).swapaxes(2, 3).reshape(-1, rows * s, columns * t, k, d)
        return x[:, :h, :w].reshape(-1, h * w, k, d)

    def valid(self) -> Bool[np.ndarray, "windows s*t"]:
        """Where a window holds a patch, and no filling."""
        (s, t), (rows, columns) = self.window, self.count
        h, w = self.grid
        places = (np.arange(rows * s) < h)[:, None] & (np.arange(columns * t) < w)
        places = places.reshape(rows, s, columns, t)
        return places.swapaxes(1, 2).reshape(rows * columns, s * t)

    def mask(self, num_prefix: int) -> Bool[np.ndarray, "n n"]:
        """Who sees whom among `num_prefix` tokens and the patches behind them, as one table."""
        (h, w), (s, t) = self.grid, self.window
        of_patch = (np.arange(h) // s)[:, None] * w + np.arange(w) // t
        number = np.concatenate([np.full(num_prefix, -1), of_patch.reshape(-1)])
        anywhere = number < 0
        return (number[:, None] == number) | anywhere[:, None] | anywhere
