"""Targets of training examples, and batches mixed with themselves."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax.errors import UserError

Mix = Callable[
    [Float[Array, "b h w c"], Float[Array, "b classes"], jax.Array], tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]
]


def smooth(labels: Int[Array, " b"], num_classes: int, label_smoothing: float = 0.0) -> Float[Array, "b classes"]:
    """Targets 1 − ε + ε/C for the true class and ε/C for the others (https://arxiv.org/abs/1512.00567)."""
    _check("label_smoothing", label_smoothing, 1.0)
    return jax.nn.one_hot(labels, num_classes) * (1 - label_smoothing) + label_smoothing / num_classes


def make_mix(*, mixup: float, cutmix: float, mix_prob: float = 1.0, switch_prob: float = 0.5) -> Mix:
    """(images, targets, key) → the same, each example mixed with its counterpart in the reversed batch, as timm's do.

    λ ~ Beta(α, α) is drawn once for the batch. Mixup (https://arxiv.org/abs/1710.09412): λ x + (1 − λ) x'. CutMix
    (https://arxiv.org/abs/1905.04899): a box of the share 1 − λ is that of x'; where the border cuts it, λ becomes what
    is really left of x. Targets are mixed by the same λ.

    Args:
      mixup, cutmix: α of each; 0 for none. With both, `switch_prob` is the probability of CutMix.
      mix_prob: probability that the batch is mixed at all.
    """
    _check("mixup", mixup)
    _check("cutmix", cutmix)
    _check("mix_prob", mix_prob, 1.0)
    _check("switch_prob", switch_prob, 1.0)
    if not mixup and not cutmix:
        raise UserError("mixup=0 and cutmix=0 mix nothing: give one of them an alpha, such as mixup=0.2 or cutmix=1.0")
    if not (mixup and cutmix):
        switch_prob = 1.0 if cutmix else 0.0

    def mix(images: Float[Array, "b h w c"], targets: Float[Array, "b classes"], key: jax.Array):
        _, h, w, _ = images.shape
        mix_key, switch_key, beta_key, place_key = jax.random.split(key, 4)
        cut = jax.random.bernoulli(switch_key, switch_prob)
        alpha = jnp.where(cut, cutmix or mixup, mixup or cutmix)
        drawn = jax.random.beta(beta_key, alpha, alpha)
        drawn = jnp.where(jax.random.bernoulli(mix_key, mix_prob), drawn, 1.0)
        y, x = jax.random.randint(place_key, (2,), 0, jnp.array([h, w]))
        kept = jnp.where(cut, ~box((h, w), drawn, (y, x)), drawn)  # of each pixel
        lam = jnp.where(cut, kept.mean(), drawn)
        return _blend(images, kept[..., None].astype(images.dtype)), _blend(targets, lam)

    return mix


def box(size: tuple[int, int], lam: Float[Array, ""], centre: tuple[Int[Array, ""], Int[Array, ""]]) -> Bool[Array, "h w"]:
    """CutMix's box: √(1 − λ) of the height and width, rounded down, around `centre` (y, x); the border cuts it."""

    def within(length: int, middle: Int[Array, ""]) -> Bool[Array, " length"]:
        cut = (length * jnp.sqrt(1 - lam)).astype(jnp.int32)
        i = jnp.arange(length)
        return (i >= middle - cut // 2) & (i < middle + (cut + 1) // 2)

    return within(size[0], centre[0])[:, None] & within(size[1], centre[1])


def _blend(x: Float[Array, "b ..."], kept: Float[Array, "..."]) -> Float[Array, "b ..."]:
    return kept * x + (1 - kept) * x[::-1]


def _check(name: str, value: float, most: float = math.inf) -> None:
    if not 0 <= value <= most or math.isinf(value):
        allowed = "0 and more" if most == math.inf else f"0 to {most:g}"
        raise UserError(f"{name}={value} makes no sense: allowed are {allowed}")
