"""Images resized with their aspect kept, in training and in evaluation, to be padded to a canvas."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vit_jax.data.canvases import Canvases, Size, holds
from vit_jax.data.host.resize import Box
from vit_jax.data.host.view import View


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How images are resized: the shorter side to one of `short`, but no side beyond the model's `image_size`.

    With a chance of `crop` the shorter side is first resized to one of `crop_short`, and a window of `crop_sides` pixels
    (least, most) is cut out of it.
    """

    image_size: tuple[int, int]
    short: tuple[int, ...] = ()
    crop: float = 0.0
    crop_short: tuple[int, ...] = (400, 500, 600)
    crop_sides: tuple[int, int] = (384, 600)
    flip: bool = False

    def draw(self, size: Size, rng: np.random.Generator, canvas: Size | None = None) -> View:
        """A random view of an image of `size` (h, w) for training, made smaller where it does not fit on a given canvas."""
        window = Box(0, 0, *size)
        if rng.random() < self.crop:
            scale = min(size) / rng.choice(self.crop_short)
            height, width = (min(scale * rng.integers(self.crop_sides[0], self.crop_sides[1] + 1), side) for side in size)
            window = Box(rng.uniform(0, size[0] - height), rng.uniform(0, size[1] - width), height, width)
        short = int(rng.choice(self.short)) if self.short else min(self.image_size)
        mirrored = bool(self.flip and rng.random() < 0.5)
        return View(size, window, self._resized(window, short, canvas), mirrored=mirrored)

    def fixed(self, size: Size, canvas: Size | None = None) -> View:
        """The whole image, as large as fits."""
        window = Box(0, 0, *size)
        return View(size, window, self._resized(window, max(self.short, default=min(self.image_size)), canvas))

    def canvases(self, smaller: Sequence[Size]) -> Canvases | None:
        """These canvases and that of `image_size`, beyond which none reaches; None where there is no other."""
        within = {tuple(min(side, most) for side, most in zip(size, self.image_size, strict=True)) for size in smaller}
        sizes = tuple(sorted({*within, self.image_size}, key=lambda size: (size[0] * size[1], size)))
        if len(sizes) == 1:
            return None
        return Canvases(sizes, lambda size, rng: self.draw(size, rng).size, lambda size: self.fixed(size).size)

    def _resized(self, window: Box, short: int, canvas: Size | None) -> Size:
        size = _fitted(window, short, self.image_size)
        return size if canvas is None or holds(canvas, size) else _fitted(window, short, canvas)


def _fitted(window: Box, short: int, within: Size) -> Size:
    sides = window.height, window.width
    scale = min(short / min(sides), *(most / side for most, side in zip(within, sides, strict=True)))
    return tuple(max(1, min(most, round(scale * side))) for most, side in zip(within, sides, strict=True))
