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

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        factor, shift = self.factor_and_shift(x.shape[-1])
        return x * factor.astype(self.dtype) + shift.astype(self.dtype)

    @nn.compact
    def factor_and_shift(self, c: int) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        """What x is multiplied by, and what is added then."""
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        initial = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        own = (jax.lax.stop_gradient(self.param(name, init, (c,))) for name, init in initial.items())
        scale, bias, mean, var = own
        factor = scale * jax.lax.rsqrt(var + 1e-5)
        return factor, bias - mean * factor


class Kernel(nn.Module):
    """The kernel of a convolution, without the convolution."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Float[Array, "k l c d"]:
        return self.param("kernel", nn.initializers.he_normal(), self.shape)


def _conv_norm(
    x: Float[Array, "b h w c"],
    features: int,
    size: int,
    stride: int = 1,
    dilation: int = 1,
    *,
    dtype: Any,
    conv: str,
    norm: str,
) -> Float[Array, "b h/s w/s d"]:
    """A convolution and a `FrozenBatchNorm` with these names, as one convolution whose kernel is multiplied by the factor."""
    kernel = Kernel((size, size, x.shape[-1], features), name=conv)()
    factor, shift = FrozenBatchNorm(name=norm).factor_and_shift(features)
    kernel, shift = (kernel * factor).astype(dtype), shift.astype(dtype)
    if size == 1:
        return _product(x[:, ::stride, ::stride], kernel[0, 0]) + shift
    margin = dilation * (size // 2)
    how = {"rhs_dilation": (dilation,) * 2, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, [(margin, margin)] * 2, **how) + shift


# Backward passes of which XLA makes faster programs for CPUs. With autodiff's it keeps the sums before each ReLU, and computes
# the ReLU's gradient again for each product that takes it, while it transposes the wider side.


def _settled(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x, which XLA computes once on a CPU, and not again for each of its uses."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


@jax.custom_vjp
def _product(x: Float[Array, "b h w c"], kernel: Float[Array, "c d"]) -> Float[Array, "b h w d"]:
    """A convolution of size 1."""
    return x @ kernel


def _product_backward(saved, dy):
    x, kernel = saved
    narrow, wide = sorted((y.reshape(-1, y.shape[-1]) for y in (x, dy)), key=lambda y: y.shape[-1])
    dkernel = jax.lax.dot_general(narrow, wide, (((0,), (0,)), ((), ())))  # the left one is transposed
    return dy @ kernel.T, _settled(dkernel).T if x.shape[-1] > dy.shape[-1] else dkernel


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


@jax.custom_vjp
def _relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """max(x, 0), of which nothing but the result is kept for the backward pass."""
    return nn.relu(x)


def _relu_forward(x):
    y = nn.relu(x)
    return y, y


def _relu_backward(y, dy):
    return (_settled(jnp.where(y > 0, dy, 0)),)


_relu.defvjp(_relu_forward, _relu_backward)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with stride and dilation) and 1x1 convolutions around a shortcut, ReLU after the sum."""

    features: int
    stride: int = 1
    dilation: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/s w/s 4*d"]:
        conv = partial(_conv_norm, dtype=self.dtype)
        shortcut = x
        if x.shape[-1] != 4 * self.features or self.stride != 1:
            shortcut = conv(x, 4 * self.features, 1, self.stride, conv="conv_proj", norm="bn_proj")
        y = _relu(conv(x, self.features, 1, conv="conv1", norm="bn1"))
        y = _relu(conv(y, self.features, 3, self.stride, self.dilation, conv="conv2", norm="bn2"))
        return _relu(shortcut + conv(y, 4 * self.features, 1, conv="conv3", norm="bn3"))


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
        x = _relu(_conv_norm(images.astype(self.dtype), self.width, 7, 2, dtype=self.dtype, conv="conv1", norm="bn1"))
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
