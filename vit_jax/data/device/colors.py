"""Colours of a view for self-supervision: jitter, grey, blur and solarising, each with a chance of its own (BYOL, DINO)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt, UInt8

from vit_jax.data.device.augment import BLUR, enhance, gaussian_blur, grayscale, solarize

VIEW = 16
"""What is folded into an example's key for its first view, counting up; augment.py has the numbers below."""


def make_recolor(
    *, jitter: Sequence[float], jitter_prob: float, grey_prob: float, blur_prob: float, solarize_prob: float
) -> Callable[[UInt8[Array, "b n h w 3"], UInt[Array, " b"], int], UInt8[Array, "b n h w 3"]]:
    """(n views of each image, seeds of the images, number of the first view) → the views, each changed by itself.

    Args:
      jitter: strengths of brightness, contrast, saturation and hue, see `jitter_with_hue`.
    """

    def recolor_one(image: UInt8[Array, "h w 3"], key: jax.Array) -> UInt8[Array, "h w 3"]:
        jitter_key, blur_key, chance_key = jax.random.split(key, 3)
        chance = jax.random.uniform(chance_key, (4,))
        if jitter_prob and any(jitter):
            image = jnp.where(chance[0] < jitter_prob, jitter_with_hue(image, jitter_key, jitter), image)
        if grey_prob:
            image = jnp.where(chance[1] < grey_prob, grayscale(image), image)
        if blur_prob:
            sigma = jax.random.uniform(blur_key, minval=BLUR[0], maxval=BLUR[1])
            image = jnp.where(chance[2] < blur_prob, gaussian_blur(image, sigma), image)
        if solarize_prob:
            image = jnp.where(chance[3] < solarize_prob, solarize(image), image)
        return image

    def recolor(images: UInt8[Array, "b n h w 3"], seeds: UInt[Array, " b"], first: int) -> UInt8[Array, "b n h w 3"]:
        def of_views(views: UInt8[Array, "n h w 3"], seed: UInt[Array, ""]) -> UInt8[Array, "n h w 3"]:
            numbers = VIEW + first + jnp.arange(len(views))
            return jax.vmap(lambda view, i: recolor_one(view, jax.random.fold_in(jax.random.key(seed), i)))(views, numbers)

        return jax.vmap(of_views)(images, seeds) if images.shape[1] else images

    return recolor


def jitter_with_hue(image: UInt8[Array, "h w 3"], key: jax.Array, strengths: Sequence[float]) -> UInt8[Array, "h w 3"]:
    """Brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter.

    The first three change by a factor from U(max(0, 1 − s), 1 + s), the hue by U(−s, s) of the circle.
    """
    order_key, factor_key = jax.random.split(key)
    low = jnp.array([*(max(0.0, 1 - s) for s in strengths[:3]), -strengths[3]])
    high = jnp.array([*(1 + s for s in strengths[:3]), strengths[3]])
    factors = jax.random.uniform(factor_key, (4,), minval=low, maxval=high)

    def change(image: UInt8[Array, "h w 3"], what: Array) -> tuple[UInt8[Array, "h w 3"], None]:
        enhanced = enhance(image, jnp.minimum(what, 2), factors[what])
        return (jnp.where(what == 3, shift_hue(image, factors[3]), enhanced) if strengths[3] else enhanced), None

    ops = 4 if strengths[3] else 3
    return jax.lax.scan(change, image, jax.random.permutation(order_key, ops))[0]


def shift_hue(image: UInt8[Array, "h w 3"], shift: Float[Array, ""]) -> UInt8[Array, "h w 3"]:
    """Turns the hue by `shift` of the circle; value and saturation stay (the HSV of colorsys, without its roundings)."""
    rgb = image.astype(jnp.float32) / 255
    value, low = rgb.max(axis=-1), rgb.min(axis=-1)
    spread = value - low
    r, g, b = ((value - rgb[..., i]) / jnp.maximum(spread, 1e-12) for i in range(3))
    sixth = jnp.where(value == rgb[..., 0], b - g, jnp.where(value == rgb[..., 1], 2 + r - b, 4 + g - r))
    hue = sixth / 6 + shift
    # the channel n is value − spread · max(0, min(k, 4 − k, 1)), where k = (n + 6 · hue) mod 6
    k = (jnp.array([5.0, 3.0, 1.0]) + 6 * hue[..., None]) % 6
    channels = value[..., None] - spread[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)
    return jnp.round(255 * channels).astype(jnp.uint8)
