"""Text Transformers: tokens to one vector a text, as the text towers of LiT and SigLIP read them, and CLIP's."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vit_jax.errors import UserError, unknown
from vit_jax.models.layers import Encoder

POOLS = ("last", "end")


class TextTransformer(nn.Module):
    """Embedding and learned positions, the encoder of a ViT, one token's output, a linear map `head`.

    The plain tower of LiT (https://arxiv.org/abs/2111.07991) and SigLIP (https://arxiv.org/abs/2303.15343): every token
    attends to all, padding included, and the last one speaks for the text. With `causal` and another `pool` CLIP's
    (https://arxiv.org/abs/2103.00020).

    Attributes:
      num_classes: width of the result; None or 0 gives the token itself.
      width, num_layers, mlp_dim, num_heads, activation, norm_eps: of the encoder, see `layers.Encoder`.
      dropout_rate: in training.
      vocab_size: how many tokens there are.
      max_len: the longest text; None takes the length that the parameters are first made for.
      causal: whether a token attends to itself and those before it alone.
      pool: whose output is taken: "last" the last token's, or "end" the first of the tokens `end_token`
        (without one: of the highest token of the text, which is how CLIP finds its end).
      head_bias: whether the head has a bias.
      remat, scan, constrain: see `layers.Encoder`.
      dtype: what every layer computes in; parameters stay float32.
    """

    num_classes: int | None
    width: int = 512
    num_layers: int = 12
    mlp_dim: int = 2048
    num_heads: int = 8
    dropout_rate: float = 0.0
    vocab_size: int = 32_000
    max_len: int | None = None
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    causal: bool = False
    pool: str = "last"
    end_token: int | None = None
    head_bias: bool = True
    remat: str = "none"
    scan: bool = False
    constrain: Callable[[Array], Array] = lambda x: x
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b n"], *, train: bool = False) -> Float[Array, "b d"]:
        if self.pool not in POOLS:
            raise unknown("pool", self.pool, POOLS)
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="Embed_0")(tokens)
        x = x + self._positions(tokens.shape[1]).astype(x.dtype)
        encoder = Encoder(
            num_layers=self.num_layers,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=0.0,
            activation=self.activation,
            norm_eps=self.norm_eps,
            add_position_embedding=False,
            remat=self.remat,
            scan=self.scan,
            constrain=self.constrain,
            dtype=self.dtype,
            name="Encoder_0",
        )
        n = tokens.shape[1]
        x, _ = encoder(x, mask=jnp.tril(jnp.ones((n, n), bool)) if self.causal else None, train=train)
        x = self._pooled(x, tokens)
        if not self.num_classes:
            return x
        return nn.Dense(self.num_classes, use_bias=self.head_bias, dtype=self.dtype, name="head")(x)

    def _positions(self, n: int) -> Float[Array, "1 n d"]:
        length = self.max_len or n
        if self.has_variable("params", "pos_embedding"):
            length = self.get_variable("params", "pos_embedding").shape[1]
        if n > length:
            raise UserError(f"a text of {n} tokens is too long for this model, which reads {length}")
        init = nn.initializers.normal(self.width**-0.5)
        return self.param("pos_embedding", init, (1, length, self.width))[:, :n]

    def _pooled(self, x: Float[Array, "b n d"], tokens: Int[Array, "b n"]) -> Float[Array, "b d"]:
        if self.pool == "last":
            return x[:, -1]
        ends = tokens if self.end_token is None else tokens == self.end_token
        return jnp.take_along_axis(x, ends.argmax(axis=1)[:, None, None], axis=1)[:, 0]
