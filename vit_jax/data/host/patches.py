"""Images that keep their shapes: each as large as a number of patches lets it be, cut into them (SigLIP 2's NaFlex, NaViT)."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt8

from vit_jax.data.host.crop import inception_box, random_resized_box
from vit_jax.data.host.decode import decode
from vit_jax.data.host.resize import Box
from vit_jax.data.host.view import Picture, View

DRAWN = {"inception": inception_box, "random_resized": random_resized_box}
"""How training chooses a window, by `config.pp.crop_method`; of a square, which is then stretched to the image."""


class Patches(NamedTuple):
    """The (n, p) pixels of an image's patches, rows of them, then zeros; and the grid (h, w) that they are."""

    pixels: Shaped[np.ndarray, "n p"]
    grid: Int[np.ndarray, "2"]


def grid_within(size: tuple[float, float], patch: tuple[int, int], most: int, *, enlarge: bool = True) -> tuple[int, int]:
    """(h, w) in patches of an image of this size, scaled so that they are as many as they can be, but not above `most`.

    Without `enlarge` an image of fewer keeps its size. Both sides are rounded up to whole patches, so that the shape changes a
    little. The scale is bisected to 1e-5, as in SigLIP 2 (https://arxiv.org/abs/2502.14786), of which the grids are.
    """

    def at(scale: float) -> tuple[int, int]:
        return tuple(max(1, math.ceil(length * scale / p)) for length, p in zip(size, patch, strict=True))

    if not enlarge and math.prod(at(1.0)) <= most:
        return at(1.0)
    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(at(middle)) <= most else (low, middle)
    return at(low)


def eval_patches(
    image: bytes | np.ndarray,
    *,
    exif_rotated: bool,
    patch: tuple[int, int],
    max_patches: int,
    enlarge: bool = True,
    interpolation: str = "bilinear",
    antialias: bool = False,
) -> Patches:
    """The whole image, as `decode` takes it, as a model sees it in evaluation: float32, 0..255, unrounded."""
    pixels = decode(image, exif_rotated=exif_rotated)
    how = {"enlarge": enlarge, "interpolation": interpolation, "antialias": antialias}
    view = _view(pixels.shape[:2], Box(0, 0, *pixels.shape[:2]), patch, max_patches, **how)
    return cut(view.image(pixels, rounded=False), patch, max_patches)


def train_patches(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    exif_rotated: bool,
    patch: tuple[int, int],
    max_patches: int,
    crop_method: str,
    area: tuple[float, float],
    flip: bool,
    enlarge: bool = True,
    interpolation: str = "bilinear",
    antialias: bool = False,
    scaled_decoding: bool = True,
) -> Patches:
    """A random window, about as wide for its height as the image, and with `flip` mirrored every second time: uint8."""
    picture = Picture.read(image, exif_rotated=exif_rotated)
    (h, w), side = picture.size, max(picture.size)
    top, left, height, width = DRAWN[crop_method]((side, side), rng, area)
    window = Box(top * h / side, left * w / side, height * h / side, width * w / side)
    how = {"enlarge": enlarge, "interpolation": interpolation, "antialias": antialias}
    view = _view(picture.size, window, patch, max_patches, **how)
    view = dataclasses.replace(view, mirrored=bool(rng.random() < 0.5)) if flip else view
    return cut(view.image(picture.decoded([view], scaled=scaled_decoding)), patch, max_patches)


def cut(image: UInt8[np.ndarray, "H W c"] | Float32[np.ndarray, "H W c"], patch: tuple[int, int], max_patches: int) -> Patches:
    """An image of whole patches as rows of them."""
    (p, q), (height, width, c) = patch, image.shape
    h, w = height // p, width // q
    pixels = np.zeros((max_patches, p * q * c), image.dtype)
    pixels[: h * w] = image.reshape(h, p, w, q, c).swapaxes(1, 2).reshape(h * w, -1)
    return Patches(pixels, np.array([h, w], np.int32))


def shrunk(found: Patches, patch: tuple[int, int], most: int, **how: Any) -> Patches:
    """An image made smaller, so that it has at most so many patches; `how` is a `View`'s. It keeps its place for more."""
    image = joined(found, patch)
    view = _view(image.shape[:2], Box(0, 0, *image.shape[:2]), patch, most, enlarge=False, **how)
    return cut(view.image(image), patch, len(found.pixels))


def joined(patches: Patches, patch: tuple[int, int]) -> Shaped[np.ndarray, "H W 3"]:
    """Undoes `cut`."""
    (h, w), (p, q) = patches.grid, patch
    return patches.pixels[: h * w].reshape(h, w, p, q, -1).swapaxes(1, 2).reshape(h * p, w * q, -1)


def _view(size: tuple[int, int], window: Box, patch: tuple[int, int], most: int, *, enlarge: bool, **how: Any) -> View:
    grid = grid_within((window.height, window.width), patch, most, enlarge=enlarge)
    return View(size, window, tuple(n * p for n, p in zip(grid, patch, strict=True)), **how)
