"""The parts every model here is built from: patch embedding, position embedding, MLP, encoder block, encoder.

Shapes: b batch, h w grid, c channels, n tokens, d width, k heads. Parameters are float32; `dtype` is what a layer computes in.
Submodules carry the names of the published checkpoints, which number a block's layers across the block
(`LayerNorm_0`, `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3`).
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.errors import UserError, unknown
from vit_jax.models.attention import MultiHeadDotProductAttention

Dtype = Any
ACTIVATIONS = ("gelu_tanh", "gelu", "swiglu")


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
    """Dense → activation → Dense, each followed by dropout; the width is kept.

    `activation`: "gelu_tanh" as in all Google ViTs, "gelu" (the erf form, as in torch's), or "swiglu", where Dense_0 makes
    a gate and a value of `mlp_dim` each: silu(gate) · value.
    """

    mlp_dim: int
    dropout_rate: float = 0.0
    activation: str = "gelu_tanh"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], *, train: bool = False) -> Float[Array, "b n d"]:
        init = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.normal(1e-6)}
        d = x.shape[-1]
        hidden = 2 * self.mlp_dim if self.activation == "swiglu" else self.mlp_dim
        x = nn.Dense(hidden, dtype=self.dtype, name="Dense_0", **init)(x)
        if self.activation == "swiglu":
            gate, value = jnp.split(x, 2, axis=-1)
            x = nn.silu(gate) * value
        elif self.activation in ACTIVATIONS:
            x = nn.gelu(x, approximate=self.activation == "gelu_tanh")
        else:
            raise unknown("activation", self.activation, ACTIVATIONS)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Dense(d, dtype=self.dtype, name="Dense_1", **init)(x)
        return nn.Dropout(self.dropout_rate, deterministic=not train)(x)


class LayerScale(nn.Module):
    """Multiplies every channel by a learned factor, 1e-5 at first (https://arxiv.org/abs/2103.17239)."""

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x * self.param("gamma", nn.initializers.constant(1e-5), (x.shape[-1],)).astype(x.dtype)


class EncoderBlock(nn.Module):
    """x + MHA(LN(x)), then x + MLP(LN(x)): the pre-LN Transformer block of ViT (equations 2 and 3 of the paper).

    With `layer_scale` both branches are scaled, by `ls1` and `ls2`, before they are added; with `qk_norm` every head's
    queries and keys are normalised.
    """

    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    layer_scale: bool = False
    qk_norm: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], *, train: bool = False) -> Float[Array, "b n d"]:
        y = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="LayerNorm_0")(x)
        y = MultiHeadDotProductAttention(
            self.num_heads,
            self.attention_dropout_rate,
            self.norm_eps if self.qk_norm else None,
            self.dtype,
            name="MultiHeadDotProductAttention_1",
        )(y, train=train)
        y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        x = x + (LayerScale(name="ls1")(y) if self.layer_scale else y)
        y = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="LayerNorm_2")(x)
        y = MlpBlock(self.mlp_dim, self.dropout_rate, self.activation, self.dtype, name="MlpBlock_3")(y, train=train)
        return x + (LayerScale(name="ls2")(y) if self.layer_scale else y)


class Encoder(nn.Module):
    """Position embedding, `num_layers` encoder blocks, a last LayerNorm.

    Returns the normalised tokens and, for those who look inside, every block's output before that norm.

    Attributes:
      add_position_embedding: whether every token gets a learned embedding for its place.
      final_norm: False leaves the last LayerNorm to whoever pools the tokens.
      the others: see `EncoderBlock`.
    """

    num_layers: int
    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    layer_scale: bool = False
    qk_norm: bool = False
    add_position_embedding: bool = True
    final_norm: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        registers: Float[Array, "b r d"] | None = None,
        *,
        num_prefix: int = 0,
        train: bool = False,
    ) -> tuple[Float[Array, "b n+r d"], tuple[Float[Array, "b n+r d"], ...]]:
        """`registers` join behind the first `num_prefix` tokens, without a position embedding, as in DINOv2."""
        if self.add_position_embedding:
            x = AddPositionEmbs(name="posembed_input")(x)
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if registers is not None:
            x = jnp.concatenate([x[:, :num_prefix], registers.astype(x.dtype), x[:, num_prefix:]], axis=1)
        layers = []
        for i in range(self.num_layers):
            x = EncoderBlock(
                self.mlp_dim,
                self.num_heads,
                self.dropout_rate,
                self.attention_dropout_rate,
                self.activation,
                self.norm_eps,
                self.layer_scale,
                self.qk_norm,
                self.dtype,
                name=f"encoderblock_{i}",
            )(x, train=train)
            layers.append(x)
        if self.final_norm:
            x = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="encoder_norm")(x)
        return x, tuple(layers)
