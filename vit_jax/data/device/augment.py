"""What happens to images on the device: random changes when training, and normalisation always.

Every random choice follows from the example's own seed, whatever batch, place or device the example is in, and every
operation draws from a key of its own, so that turning one on changes no other's choices.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt, UInt8

from vit_jax.data.device.randaugment import MAX_MAGNITUDE, blend, randaugment
from vit_jax.errors import UserError

MEAN = 127.5
STD = 127.5
"""Of the 0..255 pixels, for every channel: all Google ViTs see images in [-1, 1]."""

RANDAUG, THREE_AUGMENT, JITTER, ERASING = range(1, 5)
"""What is folded into an example's key for each operation. Not 0, which would give the bits that the flip draws."""

BLUR = (0.1, 2.0)
"""Standard deviation of 3-Augment's blur, in pixels: drawn uniformly from this range."""
BLUR_RADIUS = 6

ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10


def make_augment(
    *,
    flip: bool,
    color_jitter: float = 0.0,
    randaug: tuple[int, int] | None = None,
    three_augment: bool = False,
) -> Callable[[UInt8[Array, "b h w 3"], UInt[Array, " b"]], UInt8[Array, "b h w 3"]]:
    """(images, seeds) → images: flip, RandAugment, 3-Augment and colour jitter in this order, each where asked for.

    Args:
      color_jitter: strength of `jitter`; 0 for none.
      randaug: (layers, magnitude of 10) of RandAugment; None or () for none.
      three_augment: `one_of_three`. DeiT III lets a jitter of 0.3 follow.
    """
    if color_jitter < 0:
        raise UserError(f"a colour jitter of {color_jitter} makes no sense: allowed are 0 and more, such as 0.3")
    layers, magnitude = _layers_and_magnitude(randaug) if randaug else (0, 0)

    def augment_one(image: UInt8[Array, "h w 3"], seed: UInt[Array, ""]) -> UInt8[Array, "h w 3"]:
        key = jax.random.key(seed)
        if layers:
            image = randaugment(image, jax.random.fold_in(key, RANDAUG), layers, magnitude)
        if three_augment:
            image = one_of_three(image, jax.random.fold_in(key, THREE_AUGMENT))
        if color_jitter:
            image = jitter(image, jax.random.fold_in(key, JITTER), color_jitter)
        return image

    def augment(images: UInt8[Array, "b h w 3"], seeds: UInt[Array, " b"]) -> UInt8[Array, "b h w 3"]:
        return jax.vmap(augment_one)(random_flip(images, seeds) if flip else images, seeds)

    return augment


def _layers_and_magnitude(randaug: Sequence[float]) -> tuple[int, float]:
    if len(randaug) != 2 or randaug[0] < 1 or randaug[0] != int(randaug[0]) or not 0 <= randaug[1] <= MAX_MAGNITUDE:
        raise UserError(
            f"randaug={tuple(randaug)} must be (layers, magnitude), such as (2, 10): "
            f"one layer or more, a magnitude from 0 to {MAX_MAGNITUDE}"
        )
    return int(randaug[0]), randaug[1]


def random_flip(images: UInt8[Array, "b h w c"], seeds: UInt[Array, " b"]) -> UInt8[Array, "b h w c"]:
    """Mirrors each image left to right with probability 1/2, decided by its own seed."""
    flip = jax.vmap(lambda seed: jax.random.bernoulli(jax.random.key(seed)))(seeds)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def one_of_three(image: UInt8[Array, "h w 3"], key: jax.Array) -> UInt8[Array, "h w 3"]:
    """3-Augment of DeiT III (https://arxiv.org/abs/2204.07118): grey, solarized or blurred, one as likely as another."""
    which, u = jax.random.uniform(key, (2,))
    blurred = gaussian_blur(image, BLUR[0] + u * (BLUR[1] - BLUR[0]))
    return jax.lax.select_n(jnp.floor(3 * which).astype(jnp.int32), grayscale(image), solarize(image), blurred)


def jitter(image: UInt8[Array, "h w 3"], key: jax.Array, strength: float) -> UInt8[Array, "h w 3"]:
    """Changes brightness, contrast and saturation in random order, as torchvision's ColorJitter does with Pillow.

    Each blends the image with black, with its own mean grey, or with its own greys, by a factor of its own from
    U(max(0, 1 − strength), 1 + strength).
    """
    order_key, factor_key = jax.random.split(key)
    factors = jax.random.uniform(factor_key, (3,), minval=max(0.0, 1 - strength), maxval=1 + strength)

    def change(image: UInt8[Array, "h w 3"], what: Array) -> tuple[UInt8[Array, "h w 3"], None]:
        return enhance(image, what, factors[what]), None

    return jax.lax.scan(change, image, jax.random.permutation(order_key, 3))[0]


def enhance(image: UInt8[Array, "h w 3"], what: Array, factor: Array) -> UInt8[Array, "h w 3"]:
    """Pillow's ImageEnhance: Brightness, Contrast or Color (`what` = 0, 1, 2); exact but for roundings of the blend."""
    grey = grayscale(image)
    h, w, _ = image.shape
    mean = (jnp.sum(grey[..., 0], dtype=jnp.int32) + h * w // 2) // (h * w)
    mean = jnp.full_like(image, mean.astype(jnp.uint8))
    return blend(jax.lax.select_n(what, jnp.zeros_like(image), mean, grey), image, factor)


def grayscale(image: UInt8[Array, "h w 3"]) -> UInt8[Array, "h w 3"]:
    """0.299 r + 0.587 g + 0.114 b in every channel, with the 16 bits that Pillow's conversion to "L" has for the weights."""
    luma = jnp.sum(image.astype(jnp.int32) * jnp.array([19595, 38470, 7471]), axis=-1, keepdims=True)
    return jnp.broadcast_to(((luma + 2**15) >> 16).astype(jnp.uint8), image.shape)


def solarize(image: UInt8[Array, "..."]) -> UInt8[Array, "..."]:
    """Inverts what is 128 or brighter."""
    return jnp.where(image < 128, image, 255 - image)


def gaussian_blur(image: UInt8[Array, "h w 3"], sigma: Float[Array, ""]) -> UInt8[Array, "h w 3"]:
    """Convolves with a Gaussian of `sigma` ≤ 2 pixels; beyond the border stand the outermost pixels.

    The Gaussian itself, cut off at 6 pixels; Pillow's, which DeiT III used, is three boxes of the same variance.
    """
    offsets = jnp.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    weights = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    blurred = image.astype(jnp.float32)
    for axis in (0, 1):
        padding = [(BLUR_RADIUS, BLUR_RADIUS) if i == axis else (0, 0) for i in range(3)]
        padded = jnp.pad(blurred, padding, mode="edge")
        shifted = (jax.lax.slice_in_dim(padded, i, i + image.shape[axis], axis=axis) for i in range(len(offsets)))
        blurred = sum(weight * x for weight, x in zip(weights, shifted, strict=True))
    return jnp.round(blurred).astype(jnp.uint8)


def random_erasing(images: Float[Array, "b h w c"], seeds: UInt[Array, " b"], *, probability: float) -> Float[Array, "b h w c"]:
    """Fills a random box of normalised images with noise N(0, 1), as timm's RandomErasing(mode="pixel").

    https://arxiv.org/abs/1708.04896. With `probability`: area 2 to 33 % of the image, log of height / width uniform;
    the first of 10 such boxes that is smaller than the image, at a random place; none if no box is.
    """
    if not 0 <= probability <= 1:
        raise UserError(f"a probability of erasing of {probability} makes no sense: allowed are 0 to 1")

    def erase(image: Float[Array, "h w c"], seed: UInt[Array, ""]) -> Float[Array, "h w c"]:
        noise_key, box_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), ERASING))
        inside = _box_to_erase(image.shape[:2], box_key, probability)
        return jnp.where(inside[..., None], jax.random.normal(noise_key, image.shape, image.dtype), image)

    return jax.vmap(erase)(images, seeds)


def _box_to_erase(size: tuple[int, int], key: jax.Array, probability: float) -> Array:
    """Which pixels (h w) to erase: those of one box, or none."""
    h, w = size
    shape_key, place_key = jax.random.split(key)
    area, aspect = jax.random.uniform(shape_key, (2, ERASING_ATTEMPTS))
    area = h * w * (ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0]))
    aspect = ERASED_ASPECT[0] * (ERASED_ASPECT[1] / ERASED_ASPECT[0]) ** aspect
    heights, widths = (jnp.round(jnp.sqrt(x)).astype(jnp.int32) for x in (area * aspect, area / aspect))
    fits = (heights < h) & (widths < w)
    height, width = heights[jnp.argmax(fits)], widths[jnp.argmax(fits)]
    whether, y, x = jax.random.uniform(place_key, (3,))
    top, left = jnp.floor(y * (h - height + 1)), jnp.floor(x * (w - width + 1))
    y, x = jnp.mgrid[:h, :w]
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return inside & fits.any() & (whether < probability)


def normalize(
    images: Array, mean: float | Sequence[float] = MEAN, std: float | Sequence[float] = STD
) -> Float[Array, "b h w c"]:
    """(x − mean) / std in float32; mean and std are one number, or one for each channel."""
    mean, std = (jnp.asarray(x, jnp.float32) for x in (mean, std))
    return (images.astype(jnp.float32) - mean) / std
