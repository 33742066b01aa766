"""ResNet v1.5 with frozen BatchNorm, the backbone of DETR: "Deep Residual Learning" (https://arxiv.org/abs/1512.03385).

v1.5 has the stride of a stage in the 3x3 convolution. Paddings are torch's, symmetric, unlike XLA's SAME.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.models.architecture import Architecture

SIZES = {"R50": (3, 4, 6, 3), "R101": (3, 4, 23, 3)}
"""Blocks of every stage, by the names of the published models."""


class FrozenBatchNorm(nn.Module):
    """(x − mean) / √(var + 1e-5) · scale + bias, all four of which are kept from an earlier training and have no gradient."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        initial = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        own = (jax.lax.stop_gradient(self.param(name, init, x.shape[-1:])) for name, init in initial.items())
        scale, bias, mean, var = own
        factor = scale * jax.lax.rsqrt(var + 1e-5)
        return x * factor.astype(self.dtype) + (bias - mean * factor).astype(self.dtype)


def _convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k l c d"], strides: Sequence[int], padding: Any, **options: Any
) -> Float[Array, "b h/s w/s d"]:
    """`jax.lax.conv_general_dilated`; of 1x1 a matrix product, whose gradient takes XLA's CPU a fifth of the time."""
    if kernel.shape[:2] != (1, 1):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]


def _conv(features: int, size: int, stride: int = 1, dilation: int = 1, *, dtype: Any, name: str) -> nn.Conv:
    margin = dilation * (size // 2)
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        [(margin, margin)] * 2,
        kernel_dilation=(dilation, dilation),
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        dtype=dtype,
        conv_general_dilated=_convolve,
        name=name,
    )


class Bottleneck(nn.Module):
    """1x1, 3x3 (with stride and dilation) and 1x1 convolutions around a shortcut, ReLU after the sum."""

    features: int
    stride: int = 1
    dilation: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/s w/s 4*d"]:
        conv, norm = partial(_conv, dtype=self.dtype), partial(FrozenBatchNorm, self.dtype)
        shortcut = x
        if x.shape[-1] != 4 * self.features or self.stride != 1:
            shortcut = norm(name="bn_proj")(conv(4 * self.features, 1, self.stride, name="conv_proj")(x))
        y = nn.relu(norm(name="bn1")(conv(self.features, 1, name="conv1")(x)))
        y = nn.relu(norm(name="bn2")(conv(self.features, 3, self.stride, self.dilation, name="conv2")(y)))
        return nn.relu(shortcut + norm(name="bn3")(conv(4 * self.features, 1, name="conv3")(y)))


class BatchNormResNet(nn.Module):
    """Images to a feature map at 1/32 of their size, at 1/16 with `dilated` (DC5: the last stage dilates instead).

    Attributes:
      num_layers: blocks of each of the four stages.
      width: of the stem; a stage has 4, 8, 16 and 32 times as many channels.
      freeze_stem: stem and first stage have no gradient, as in DETR.
    """

    num_layers: Sequence[int] = SIZES["R50"]
    width: int = 64
    dilated: bool = False
    freeze_stem: bool = True
    dtype: Any = jnp.float32

    def features(self, images: Float[Array, "b H W 3"], *, train: bool = False) -> dict[str, Any]:
        """`map` (b, h, w, c), `patches` (b, h·w, c), and `cls`, which is None."""
        x = self(images)
        return {"cls": None, "map": x, "patches": x.reshape(len(x), -1, x.shape[-1])}

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        x = _conv(self.width, 7, 2, dtype=self.dtype, name="conv1")(images.astype(self.dtype))
        x = nn.relu(FrozenBatchNorm(self.dtype, name="bn1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1)] * 2)
        for stage, blocks in enumerate(self.num_layers):
            last = stage == len(self.num_layers) - 1
            for i in range(blocks):
                stride = 2 if i == 0 and stage > 0 and not (last and self.dilated) else 1
                dilation = 2 if i > 0 and last and self.dilated else 1
                features = self.width * 2**stage
                x = Bottleneck(features, stride, dilation, self.dtype, name=f"layer{stage + 1}_{i}")(x)
            if stage == 0 and self.freeze_stem:
                x = jax.lax.stop_gradient(x)
        return x


ARCHITECTURE = Architecture(
    cls=BatchNormResNet,
    sizes={},
    num_layers=lambda fields: 0,
    first=r"(conv1|bn1|layer\d_\d+)/.*",
    block=r"(\d+)(?!)",  # none of them: a rate or a rule for each is of no use
    last=r"(?!)",
    cut=lambda fields: None,
    grid=lambda fields, size: tuple(-(-length // (16 if fields.get("dilated") else 32)) for length in size),
)
