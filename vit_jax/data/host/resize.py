"""Resizing as TensorFlow does it, and as Pillow does it, in NumPy.

The published checkpoints were trained with TensorFlow's resizer: `resize` equals `tf.image.resize` to 1e-4 on the scale
[-1, 1], as TensorFlow rounds positions to float32, and OpenCV does not. What was trained with torch (DeiT, timm) saw
Pillow's antialiased resizing: `antialias`.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Shaped
from PIL import Image

from vit_jax.errors import UserError, unknown

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class Box(NamedTuple):
    """A part of an image, in pixels of which the first covers 0 to 1."""

    top: float
    left: float
    height: float
    width: float


def resize(
    image: Shaped[np.ndarray, "h w 3"],
    size: tuple[int, int],
    *,
    box: Box | None = None,
    interpolation: str = "bilinear",
    antialias: bool = False,
) -> Shaped[np.ndarray, "h2 w2 3"]:
    """Resizes the image, or the part of it in `box`, to (h2, w2) with half-pixel centres; the range stays.

    As it stands, like `tf.image.resize`: bilinear, float32. With `antialias`, which takes and returns uint8, like Pillow,
    and so torchvision and timm: bit for bit the same, and `interpolation` may be "bicubic", too. The edges of `box` may
    lie within pixels; none that it does not touch counts.
    """
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation", interpolation, INTERPOLATIONS)
    if interpolation != "bilinear" and not antialias:
        raise UserError(f"interpolation={interpolation!r} needs antialias=True")
    height, width = size
    top, left, h, w = box or Box(0, 0, *image.shape[:2])
    image = image[math.floor(top) : math.ceil(top + h), math.floor(left) : math.ceil(left + w)]
    y, x = top % 1, left % 1
    if antialias:
        how = {"resample": INTERPOLATIONS[interpolation], "box": (x, y, x + w, y + h)}
        return np.asarray(Image.fromarray(image).resize((width, height), **how))
    image = image.astype(np.float32)  # on uint8 OpenCV interpolates with 11 bits
    if image.shape[:2] == (h, w):
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    step_y, step_x = h / height, w / width
    positions = np.array([[step_x, 0, x + (step_x - 1) / 2], [0, step_y, y + (step_y - 1) / 2]])
    how = {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, "borderMode": cv2.BORDER_REPLICATE}
    return cv2.warpAffine(image, positions, (width, height), **how)


def cover(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """The smallest (h, w) of the aspect of `size` that covers (h, w) of `box`: of a square, the shorter side is its own.

    The other side is rounded down, as torchvision does.
    """
    (h, w), (height, width) = size, box
    return (height, int(height * w / h)) if height * w >= width * h else (int(width * h / w), width)


def cut(image: Shaped[np.ndarray, "h w 3"], box: Box) -> Shaped[np.ndarray, "h2 w2 3"]:
    """Returns a box of whole pixels as a view."""
    return image[box.top : box.top + box.height, box.left : box.left + box.width]
