"""BERT (https://arxiv.org/abs/1810.04805) as the text tower of LiT, with the names of the published LiT checkpoints.

Unlike a ViT it is post-LN: every branch is added first and normalised then. Names and the two-dimensional attention kernels
are those of flaxformer, with which LiT was trained.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vit_jax.errors import UserError, unknown
from vit_jax.models.layers import rematerialised
from vit_jax.models.linear import Linear

SIZES = {
    "base": {"hidden_size": 768, "mlp_dim": 3072, "num_layers": 12, "num_heads": 12},
    "large": {"hidden_size": 1024, "mlp_dim": 4096, "num_layers": 24, "num_heads": 16},
}
_NORM_EPS = 1e-12
_SHARED = ("vocab_size", "max_len", "dropout_rate", "activation", "remat", "dtype")
_INIT = nn.initializers.truncated_normal(0.02)


def sizes(config: str | Mapping[str, int]) -> dict[str, int]:
    """Those of a `BertModel.config`. UserError for a name that is none."""
    if isinstance(config, str) and config not in SIZES:
        raise unknown("config of BERT", config, SIZES)
    return dict(SIZES[config]) if isinstance(config, str) else SIZES["base"] | dict(config)


class BertModel(nn.Module):
    """Tokens to one vector a text: BERT, its class token, and a linear map `head` to `num_classes` numbers if given.

    Attributes:
      config: "base", "large", or any of the fields hidden_size, mlp_dim, num_layers, num_heads that differ from base.
      num_classes: width of the result; None or 0 gives the class token as it is.
      vocab_size, max_len: sizes of the tables of words and positions; a text may be shorter.
      dropout_rate: of every branch and of the embeddings, in training.
      activation: of the MLPs, see `layers.MlpBlock`; LiT's is the tanh form of GELU, that of BERT's own files the erf form.
      remat: see `layers.Encoder`.
      dtype: what every layer computes in; parameters stay float32.
    """

    config: str | Mapping[str, int] = "base"
    num_classes: int | None = None
    vocab_size: int = 30_522
    max_len: int = 512
    dropout_rate: float = 0.0
    activation: str = "gelu_tanh"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"], *, train: bool = False) -> Float[Array, "b d"]:
        """The first token of a text must be [CLS]; 0 is padding, which no other token attends to."""
        x = self._encoder(name="BertEncoder_0")(tokens, train=train)[:, 0]
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x) if self.num_classes else x

    def _encoder(self, **kwargs: Any) -> "BertEncoder":
        others = {name: getattr(self, name) for name in _SHARED}
        return BertEncoder(**sizes(self.config), **others, **kwargs)


class BertEncoder(nn.Module):
    """Embeddings of words, positions and segments (always the first), then post-LN Transformer layers."""

    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    vocab_size: int
    max_len: int
    dropout_rate: float = 0.0
    activation: str = "gelu_tanh"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"], *, train: bool = False) -> Float[Array, "b n d"]:
        """The tokens after the last layer; those of padding mean nothing."""
        n = tokens.shape[1]
        if n > self.max_len:
            raise UserError(f"a text of {n} tokens is too long for this BERT, which knows {self.max_len} positions")
        tables = {"token_ids": self.vocab_size, "position_ids": self.max_len, "segment_ids": 2}
        embed = _Embedder(tables, self.hidden_size, self.dtype, name="embedder")
        x = embed(token_ids=tokens, position_ids=jnp.arange(n)[None], segment_ids=jnp.zeros((1, n), int))
        x = nn.LayerNorm(_NORM_EPS, self.dtype, name="layer_norm")(x)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        sizes = {"mlp_dim": self.mlp_dim, "num_heads": self.num_heads, "activation": self.activation}
        layer = partial(rematerialised(_Layer, self.remat), **sizes, dropout_rate=self.dropout_rate, dtype=self.dtype)
        return _EncoderBlock(layer, self.num_layers, name="encoder_block")(x, tokens != 0, train)


class _Embedder(nn.Module):
    """The sum of the embeddings of all ids, each from a table of its own."""

    tables: Mapping[str, int]
    features: int
    dtype: Any

    @nn.compact
    def __call__(self, **ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        embed = partial(nn.Embed, features=self.features, embedding_init=_INIT, dtype=self.dtype)
        return sum(embed(self.tables[name], name=f"embedders_{name}")(x) for name, x in ids.items())


class _EncoderBlock(nn.Module):
    """All layers, under one name more."""

    layer: Callable[..., nn.Module]
    num_layers: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], valid: Bool[Array, "b n"], train: bool) -> Float[Array, "b n d"]:
        return _LayerSequence(self.layer, self.num_layers, name="layer_sequence")(x, valid, train)


class _LayerSequence(nn.Module):
    layer: Callable[..., nn.Module]
    num_layers: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], valid: Bool[Array, "b n"], train: bool) -> Float[Array, "b n d"]:
        for i in range(self.num_layers):
            x = self.layer(name=f"layers_{i}")(x, valid, train)
        return x


class _Layer(nn.Module):
    """x = LN(x + attention(x)), then x = LN(x + MLP(x))."""

    mlp_dim: int
    num_heads: int
    activation: str
    dropout_rate: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], valid: Bool[Array, "b n"], train: bool) -> Float[Array, "b n d"]:
        x = _AttentionBlock(self.num_heads, self.dropout_rate, self.dtype, name="attention_block")(x, valid, train)
        return _MlpBlock(self.mlp_dim, self.activation, self.dropout_rate, self.dtype, name="mlp_block")(x, train)


class _AttentionBlock(nn.Module):
    num_heads: int
    dropout_rate: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], valid: Bool[Array, "b n"], train: bool) -> Float[Array, "b n d"]:
        q, k, v = _Projections(self.num_heads, self.dtype, name="attention_layer")(x)
        y = jax.nn.dot_product_attention(q, k, v, mask=valid[:, None, None])
        y = _linear(x.shape[-1], self.dtype, name="dense_layer")(y.reshape(x.shape))
        y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        return nn.LayerNorm(_NORM_EPS, self.dtype, name="layer_norm")(x + y)


class _Projections(nn.Module):
    """Queries, keys and values of every head."""

    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n k h"], ...]:
        b, n, d = x.shape
        maps = (_linear(d, self.dtype, name=name) for name in ("query", "key", "value"))
        return tuple(f(x).reshape(b, n, self.num_heads, -1) for f in maps)


class _MlpBlock(nn.Module):
    mlp_dim: int
    activation: str
    dropout_rate: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], train: bool) -> Float[Array, "b n d"]:
        y = _Hidden(self.mlp_dim, self.dtype, name="mlp")(x)
        y = _linear(x.shape[-1], self.dtype, name="dense_layer", activation=self.activation)(y)
        y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        return nn.LayerNorm(_NORM_EPS, self.dtype, name="layer_norm")(x + y)


class _Hidden(nn.Module):
    """The wide layer of the MLP; its activation belongs to the layer that follows."""

    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n m"]:
        return _linear(self.mlp_dim, self.dtype, name="dense_layer")(x)


def _linear(width: int, dtype: Any, **kwargs: Any) -> Linear:
    return Linear((width,), kernel_init=_INIT, dtype=dtype, **kwargs)
