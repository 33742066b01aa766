"""Images of many shapes, padded to the smallest of a few canvases: each batch is of images of about one shape.

A program is compiled for each canvas. Which examples come is what it would be otherwise; only their order changes, within
windows of `WINDOW` batches, and that is a pure function of (seed, window).
"""

import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from vit_jax.data.features import Source
from vit_jax.data.host.decode import ImageError

Size = tuple[int, int]
Rows = Int[np.ndarray, " b"]

WINDOW = 16
"""So many batches are sorted together: of these at most one less than there are canvases have images of several shapes."""


@dataclass(frozen=True)
class Canvases:
    """What a task pads its images to, and how large these are before.

    Attributes:
      sizes: (h, w) by area. The last holds every image.
      drawn: ((h, w) of an image, rng) → (h, w) of the view that training draws of it from the same generator.
      fixed: (h, w) of an image → (h, w) of what evaluation sees of it.
    """

    sizes: tuple[Size, ...]
    drawn: Callable[[Size, np.random.Generator], Size]
    fixed: Callable[[Size], Size]

    def smallest(self, size: Size) -> Size:
        """The smallest canvas that holds a view of (h, w)."""
        return next(canvas for canvas in self.sizes if holds(canvas, size))

    def of_image(self, size: Size) -> Size:
        """The canvas of an image of (h, w) in evaluation."""
        return self.smallest(self.fixed(size))

    def train_batches(
        self, view_at: Callable[[int], Size], *, batch_size: int, seed: int, start_step: int
    ) -> Iterator[tuple[Size, Rows]]:
        """(canvas, positions) of every batch from `start_step` on; `view_at` gives (h, w) of the view at a position."""
        for window in itertools.count(start_step // WINDOW):
            first = window * WINDOW * batch_size
            views = np.array([view_at(first + i) for i in range(WINDOW * batch_size)])
            # From wide to high, so that a batch with images of two neighbours is hardly larger than theirs
            chosen = [self.smallest(view) for view in views]
            by_shape = sorted(range(len(views)), key=lambda i: (chosen[i][0] / chosen[i][1], chosen[i]))
            batches = np.random.default_rng((seed, window)).permutation(np.reshape(by_shape, (WINDOW, batch_size)))
            for rows in batches[max(0, start_step - window * WINDOW) :]:
                yield self.smallest(views[rows].max(axis=0)), first + rows

    def eval_batches(self, source: Source, batch_size: int) -> Iterator[tuple[Size, Rows]]:
        """(canvas, numbers of the examples whose images belong on it) of every batch, filled up with `len(source)`."""
        of_images = [self.of_image(size_of(source, i)) for i in range(len(source))]
        for canvas in self.sizes:
            rows = np.array([i for i, of in enumerate(of_images) if of == canvas], int)
            rows = np.pad(rows, (0, -len(rows) % batch_size), constant_values=len(source))
            yield from ((canvas, part) for part in rows.reshape(-1, batch_size))


def holds(canvas: Size, size: Size) -> bool:
    """Whether a view of (h, w) fits on a canvas."""
    return all(side <= most for side, most in zip(size, canvas, strict=True))


_KNOWN: weakref.WeakKeyDictionary[Source, dict[int, Size]] = weakref.WeakKeyDictionary()


def size_of(source: Source, index: int) -> Size:
    """(h, w) of an example's image, (1, 1) of one that is damaged: what comes of that is the loader's to say.

    Each is asked for once, as it may be read from a file, and every evaluation wants all.
    """
    known = _KNOWN.setdefault(source, {})
    if index not in known:
        try:
            known[index] = source.size(index)
        except ImageError:
            known[index] = 1, 1
    return known[index]
