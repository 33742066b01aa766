"""Masked autoencoder (https://arxiv.org/abs/2111.06377): a ViT sees some of the patches, a light decoder draws the others."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from vit_jax.errors import UserError
from vit_jax.models import vit
from vit_jax.models.architecture import Architecture, Fields
from vit_jax.models.layers import Encoder
from vit_jax.models.packed import patchify as patchify
from vit_jax.models.vit import VisionTransformer

INIT = nn.initializers.normal(0.02)


class Decoder(nn.Module):
    """Tokens of the patches that are seen → pixels of all: those that are not seen begin as one learned token.

    Attributes:
      patch: (height, width) of a patch in pixels.
      width, num_layers, num_heads, mlp_dim: of the blocks.
      activation, norm_eps: see `layers.EncoderBlock`.
    """

    patch: tuple[int, int]
    width: int = 512
    num_layers: int = 8
    num_heads: int = 16
    mlp_dim: int = 2048
    activation: str = "gelu"
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "b 1+m d"], seen: Int[Array, "b m"], n: int, *, train: bool = False
    ) -> Float[Array, "b n p"]:
        """The pixels of `n` patches, p of each (row, column, channel); `tokens` are the class token and those at `seen`."""
        x = nn.Dense(self.width, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype, name="embed")(tokens)
        b, m = seen.shape
        unseen = self.param("mask_token", INIT, (1, 1, self.width)).astype(x.dtype)
        everything = jnp.broadcast_to(unseen, (b, n, self.width)).at[jnp.arange(b)[:, None], seen].set(x[:, 1:])
        x, _ = Encoder(
            num_layers=self.num_layers,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout_rate=0.0,
            attention_dropout_rate=0.0,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            name="Transformer",
        )(jnp.concatenate([x[:, :1], everything], axis=1), train=train)
        p, q = self.patch
        return nn.Dense(p * q * 3, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype, name="predict")(x[:, 1:])


class MaskedAutoencoder(VisionTransformer):
    """A `VisionTransformer` with a class token and learned positions, and `decoder`: keywords of `Decoder`.

    Positions are those of `fixed_positions`, which training leaves as they are.
    """

    decoder: Mapping[str, Any] = FrozenDict()

    def setup(self):
        super().setup()
        self.decode = Decoder(patch=tuple(self.patches["size"]), name="decoder", **{"dtype": self.dtype, **self.decoder})

    def __call__(self, images: Float[Array, "b H W c"], *, train: bool = False) -> Float[Array, "b n p"]:
        """The pixels of all patches as drawn from all of them."""
        b, height, width, _ = images.shape
        p, q = self.patches["size"]
        everything = jnp.broadcast_to(jnp.arange((height // p) * (width // q)), (b, (height // p) * (width // q)))
        return self.reconstruct(images, everything, train=train)

    def reconstruct(
        self, images: Float[Array, "b H W c"], seen: Int[Array, "b m"], *, train: bool = False
    ) -> Float[Array, "b n p"]:
        """The pixels of all patches, p of each, as drawn from those at `seen`, which are all that the encoder gets."""
        tokens, (h, w), _ = self._encode(images, train, seen=seen)
        return self.decode(tokens, seen, h * w, train=train)


def unpatchify(pixels: Float[Array, "b n p"], grid: tuple[int, int], patch: tuple[int, int]) -> Float[Array, "b H W c"]:
    """Undoes `patchify` for images of whole patches."""
    (h, w), (p, q) = grid, patch
    return pixels.reshape(-1, h, w, p, q, pixels.shape[-1] // (p * q)).swapaxes(2, 3).reshape(len(pixels), h * p, w * q, -1)


def fixed_positions(grid: tuple[int, int], d: int) -> Float[np.ndarray, "1 1+n d"]:
    """Sines and cosines of x, then of y, at d/4 frequencies 10,000^(-4i/d); zeros for the class token (MAE's code)."""
    if d % 4:
        raise UserError(f"the positions of a masked autoencoder need widths that are multiples of 4, not {d}")
    y, x = (place.reshape(-1, 1) for place in np.meshgrid(*map(np.arange, grid), indexing="ij"))
    omega = 10_000.0 ** (-np.arange(d // 4) / (d // 4))
    table = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    return np.concatenate([np.zeros((1, d)), table])[None].astype(np.float32)


def _check(fields: Fields) -> None:
    if fields.get("classifier", "token") != "token" or fields.get("position_embedding", "learned") != "learned":
        raise UserError("a masked autoencoder has a class token, and positions in its file: classifier=token")
    if fields.get("num_classes") or fields.get("resnet") or fields.get("num_registers"):
        raise UserError("a masked autoencoder has neither classes nor a ResNet nor registers")


ARCHITECTURE = Architecture(
    cls=MaskedAutoencoder,
    sizes={},  # those of `vit`, with a decoder
    num_layers=lambda fields: {"": fields["transformer"]["num_layers"]},
    first=vit.ARCHITECTURE.first,
    block=vit.ARCHITECTURE.block,
    last=vit.ARCHITECTURE.last,
    nested={**vit.ARCHITECTURE.nested, "decoder": Decoder},
    blocks="transformer",
    choices={**vit.ARCHITECTURE.choices, "decoder.activation": vit.ARCHITECTURE.choices["transformer.activation"]},
    check=_check,
    cut=vit.ARCHITECTURE.cut,
    grid=vit.ARCHITECTURE.grid,
)
