"""Blocks of patches to be hidden from a model, as BEiT draws them (https://arxiv.org/abs/2106.08254)."""

import math

import numpy as np
from jaxtyping import Bool

ATTEMPTS = 10


def draw_blocks(
    grid: tuple[int, int],
    count: int,
    rng: np.random.Generator,
    *,
    smallest: int = 4,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Bool[np.ndarray, "h w"]:
    """Which patches of a grid (h, w) are hidden: the union of random rectangles, at most `count` patches.

    A rectangle has between `smallest` patches and as many as are still wanted, height / width log-uniform in `aspect`, a
    uniform place, and is taken if it hides something new and not too much. After ten vain attempts in a row no more are drawn.
    """
    h, w = grid
    hidden = np.zeros(grid, bool)
    attempts = 0
    while (room := count - hidden.sum()) > 0 and attempts < ATTEMPTS:
        attempts += 1
        area, ratio = rng.uniform(*sorted((smallest, room))), math.exp(rng.uniform(*map(math.log, aspect)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height >= h or width >= w:
            continue
        top, left = rng.integers(0, h - height, endpoint=True), rng.integers(0, w - width, endpoint=True)
        block = hidden[top : top + height, left : left + width]
        if 0 < block.size - block.sum() <= room:
            block[:] = True
            attempts = 0
    return hidden
