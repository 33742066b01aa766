"""Random windows of an image, drawn as TensorFlow and as torchvision draw them."""

import math

import numpy as np

from vit_jax.data.host.resize import Box
from vit_jax.errors import UserError


def inception_box(
    size: tuple[int, int],
    rng: np.random.Generator,
    area: tuple[float, float] = (0.05, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Returns a random window of an image of (h, w): `area` is its share of the image, `aspect` its width / height.

    This draws as `tf.image.sample_distorted_bounding_box` does with the whole image as box: the aspect uniformly, then
    the height uniformly among those that keep area and image, so that small windows are likelier than in torchvision.
    After 100 vain attempts the whole image is returned. Unlike TensorFlow, a window may include the last row or column.
    """
    h, w = size
    smallest, largest = area[0] * h * w, area[1] * h * w
    for _ in range(100):
        ratio = rng.uniform(*aspect)
        low = round(math.sqrt(smallest / ratio))
        high = min(round(math.sqrt(largest / ratio)), int((w + 0.5) / ratio), h)
        height = int(rng.integers(min(low, high), high, endpoint=True))
        # Rounding can leave the allowed area by a little: one row more or less brings it back.
        if height * round(height * ratio) < smallest:
            height += 1
        if height * round(height * ratio) > largest:
            height -= 1
        width = round(height * ratio)
        if 0 < height <= h and 0 < width <= w and smallest <= height * width <= largest:
            return random_box(size, (height, width), rng)
    return Box(0, 0, h, w)


def random_resized_box(
    size: tuple[int, int],
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Returns a random window of an image of (h, w), drawn as torchvision's and timm's RandomResizedCrop do.

    Its share of the image is uniform in `area`, its width / height log-uniform in `aspect`. After 10 vain attempts it is
    the largest window in the middle whose aspect is allowed.
    """
    h, w = size
    for _ in range(10):
        pixels, ratio = h * w * rng.uniform(*area), math.exp(rng.uniform(*map(math.log, aspect)))
        height, width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < height <= h and 0 < width <= w:
            return random_box(size, (height, width), rng)
    ratio = min(max(w / h, aspect[0]), aspect[1])
    height, width = min(h, round(w / ratio)), min(w, round(h * ratio))
    return Box((h - height) // 2, (w - width) // 2, height, width)


def random_box(size: tuple[int, int], window: tuple[int, int], rng: np.random.Generator) -> Box:
    """Returns a window of (h2, w2) at a uniformly random place of an image of (h, w)."""
    (h, w), (height, width) = size, window
    if height > h or width > w:
        raise UserError(f"a crop of {height} x {width} does not fit into {h} x {w} (h x w): make the crop smaller")
    return Box(int(rng.integers(h - height, endpoint=True)), int(rng.integers(w - width, endpoint=True)), height, width)
