"""The ResNet in front of a hybrid ViT: weight-standardised convolutions and group norm, as in Big Transfer (BiT)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.errors import UserError

Dtype = Any
_GROUPS = 32
"""Of channels, for every group norm."""


class StdConv(nn.Module):
    """A convolution without bias whose kernel is standardised over its inputs: (w − mean) / (std + 1e-5).

    The padding is XLA's SAME, which for stride 2 is asymmetric and differs from torch's.
    """

    features: int
    kernel_size: tuple[int, int]
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/s w/s d"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.kernel_size, x.shape[-1], self.features))
        kernel = (kernel - kernel.mean((0, 1, 2))) / (kernel.std((0, 1, 2)) + 1e-5)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def _group_norm(dtype: Dtype, name: str, **kwargs) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=_GROUPS, epsilon=1e-6, dtype=dtype, name=name, **kwargs)


class ResidualUnit(nn.Module):
    """Bottleneck: 1x1, 3x3 (which carries the stride) and 1x1 convolutions around a shortcut, ReLU after the sum."""

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/s w/s d"]:
        residual = x
        if x.shape[-1] != 4 * self.features or self.stride != 1:
            residual = StdConv(4 * self.features, (1, 1), self.stride, self.dtype, name="conv_proj")(x)
            residual = _group_norm(self.dtype, "gn_proj")(residual)
        y = StdConv(self.features, (1, 1), dtype=self.dtype, name="conv1")(x)
        y = nn.relu(_group_norm(self.dtype, "gn1")(y))
        y = StdConv(self.features, (3, 3), self.stride, self.dtype, name="conv2")(y)
        y = nn.relu(_group_norm(self.dtype, "gn2")(y))
        y = StdConv(4 * self.features, (1, 1), dtype=self.dtype, name="conv3")(y)
        y = _group_norm(self.dtype, "gn3", scale_init=nn.initializers.zeros)(y)
        return nn.relu(residual + y)


class ResNetStage(nn.Module):
    """`num_units` residual units; the first one changes width and resolution."""

    num_units: int
    features: int
    stride: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/s w/s d"]:
        for i in range(self.num_units):
            x = ResidualUnit(self.features, self.stride if i == 0 else 1, self.dtype, name=f"unit{i + 1}")(x)
        return x


def stride(num_layers: Sequence[int]) -> int:
    """How many pixels of an image a cell of the map stands for, along each side."""
    return 4 * 2 ** max(0, len(num_layers) - 1)


class ResNet(nn.Module):
    """Stem and stages: a feature map at 1/4 of the image's resolution, halved again by every stage but the first.

    `num_layers` counts the units of each stage; () leaves the stem alone. `width_factor` multiplies all widths, the first of
    which is int(64 · width_factor).
    """

    num_layers: Sequence[int]
    width_factor: float = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        width = int(64 * self.width_factor)
        if width < _GROUPS or width % _GROUPS:
            raise UserError(
                f"resnet.width_factor={self.width_factor} makes {width} channels, which must be a multiple of {_GROUPS}: "
                "use a multiple of 0.5"
            )
        x = StdConv(width, (7, 7), 2, self.dtype, name="conv_root")(x)
        x = nn.relu(_group_norm(self.dtype, "gn_root")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, num_units in enumerate(self.num_layers):
            x = ResNetStage(num_units, width * 2**i, 1 if i == 0 else 2, self.dtype, name=f"block{i + 1}")(x)
        return x
