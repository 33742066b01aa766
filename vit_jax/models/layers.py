"""The parts every model here is built from: patch embedding, position embedding, MLP, encoder block, encoder.

Shapes: b batch, h w grid, c channels, n tokens, d width, k heads. Parameters are float32; `dtype` is what a layer computes in.
Submodules carry the names of the published checkpoints, which number a block's layers across the block
(`LayerNorm_0`, `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3`).
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.errors import UserError
from vit_jax.models.attention import MultiHeadDotProductAttention

Dtype = Any


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each one linearly to `width` numbers.

    The same as a convolution whose kernel and stride are both `patch_size`, computed as one matrix product.
    With padding "VALID" pixels that do not fill a patch are dropped; "SAME" adds zeros around the image instead.
    """

    width: int
    patch_size: tuple[int, int]
    padding: str = "VALID"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        b, height, width, c = images.shape
        p, q = self.patch_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, q, c, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        if self.padding == "SAME":
            (top, bottom), (left, right) = (((-s % r) // 2, -s % r - (-s % r) // 2) for s, r in ((height, p), (width, q)))
            images = jnp.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)))
        h, w = images.shape[1] // p, images.shape[2] // q
        if h == 0 or w == 0:
            raise UserError(f"an image of {height}x{width} holds no patch of {p}x{q}: use larger images or smaller patches")
        patches = images[:, : h * p, : w * q].reshape(b, h, p, w, q, c)
        return jnp.einsum("bhpwqc,pqcd->bhwd", patches, kernel) + bias


class AddPositionEmbs(nn.Module):
    """Adds a learned embedding to every token; it belongs to one number of tokens (`checkpoint.adapt` resizes it)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        _, n, d = x.shape
        return x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, n, d)).astype(x.dtype)


class MlpBlock(nn.Module):
    """Dense → GELU (the tanh form, as in all Google ViTs) → Dense, each followed by dropout; the width is kept."""

    mlp_dim: int
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], *, train: bool = False) -> Float[Array, "b n d"]:
        init = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.normal(1e-6)}
        d = x.shape[-1]
        x = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype, name="Dense_0", **init)(x), approximate=True)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Dense(d, dtype=self.dtype, name="Dense_1", **init)(x)
        return nn.Dropout(self.dropout_rate, deterministic=not train)(x)


class EncoderBlock(nn.Module):
    """x + MHA(LN(x)), then x + MLP(LN(x)): the pre-LN Transformer block of ViT (equations 2 and 3 of the paper)."""

    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], *, train: bool = False) -> Float[Array, "b n d"]:
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="LayerNorm_0")(x)
        y = MultiHeadDotProductAttention(
            self.num_heads, self.attention_dropout_rate, self.dtype, name="MultiHeadDotProductAttention_1"
        )(y, train=train)
        x = x + nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="LayerNorm_2")(x)
        return x + MlpBlock(self.mlp_dim, self.dropout_rate, self.dtype, name="MlpBlock_3")(y, train=train)


class Encoder(nn.Module):
    """Position embedding, `num_layers` encoder blocks, a last LayerNorm.

    Returns the normalised tokens and, for those who look inside, every block's output before that norm.
    """

    num_layers: int
    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    add_position_embedding: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], *, train: bool = False
    ) -> tuple[Float[Array, "b n d"], tuple[Float[Array, "b n d"], ...]]:
        if self.add_position_embedding:
            x = AddPositionEmbs(name="posembed_input")(x)
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        layers = []
        for i in range(self.num_layers):
            x = EncoderBlock(
                self.mlp_dim,
                self.num_heads,
                self.dropout_rate,
                self.attention_dropout_rate,
                self.dtype,
                name=f"encoderblock_{i}",
            )(x, train=train)
            layers.append(x)
        return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="encoder_norm")(x), tuple(layers)
