"""What makes scores of a ViT's tokens: pooling, and a linear layer."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.errors import UserError, unknown
from vit_jax.models.attention import MultiHeadDotProductAttention
from vit_jax.models.layers import MlpBlock
from vit_jax.models.norms import make_norm
from vit_jax.models.packed import Segments

CLASSIFIERS = ("token", "gap", "map", "distilled", "cls_mean", "unpooled", "token_unpooled")


class MapHead(nn.Module):
    """Multi-head attention pooling: a learned probe attends to all tokens, then x + MLP(LN(x)) (big_vision)."""

    num_heads: int
    mlp_dim: int
    activation: str = "gelu_tanh"
    norm: str = "layer"
    norm_eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"], segments: Segments | None = None) -> Float[Array, "b *s d"]:
        """With `segments` the probe attends to the tokens of every image by itself."""
        b, _, d = tokens.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, d))
        probe = jnp.broadcast_to(probe.astype(tokens.dtype), (b, 1 if segments is None else segments.count, d))
        attention = MultiHeadDotProductAttention(
            num_heads=self.num_heads, dtype=self.dtype, name="MultiHeadDotProductAttention_0"
        )
        x = attention(probe, tokens, mask=None if segments is None else segments.of_images()[:, None])
        y = make_norm(self.norm, self.norm_eps, self.dtype, "LayerNorm_0")(x)
        mlp = MlpBlock(mlp_dim=self.mlp_dim, activation=self.activation, dtype=self.dtype, name="MlpBlock_0")
        x = x + mlp(y)
        return x[:, 0] if segments is None else x


class ClassifierHead(nn.Module):
    """Pools the tokens, maps them through an optional tanh layer (`pre_logits`), and scores the classes (`head`).

    `classifier`: "token" reads the class token; "gap" the mean over the patches; "cls_mean" both, side by side, as DINOv2
    does; "map" asks a learned probe; "distilled" averages the scores of class and distillation token, as DeiT does;
    "unpooled" and "token_unpooled" keep all tokens. With `fc_norm` a norm follows the pooling. Without `num_classes` the
    result is the representation before `head`; with `apart` it is the pair of scores that "distilled" averages.
    """

    num_classes: int | None
    representation_size: int | None = None
    classifier: str = "token"
    use_bias: bool = True
    bias_init: float = 0.0
    fc_norm: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-6
    num_heads: int = 1
    mlp_dim: int = 1
    activation: str = "gelu_tanh"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        num_prefix: int = 0,
        *,
        earlier: Sequence[Float[Array, "b n d"]] = (),
        apart: bool = False,
        segments: Segments | None = None,
    ) -> Float[Array, "b *n classes"] | tuple[Float[Array, "b classes"], Float[Array, "b classes"]]:
        """With `segments` every image of a row is pooled by itself, (b, s, classes): class tokens are the first s.

        What `earlier` blocks made of the tokens is pooled likewise, and stands in front.
        """
        norm = make_norm(self.norm, self.norm_eps, self.dtype, "fc_norm") if self.fc_norm else lambda x: x
        x = norm(self._pool(tokens, num_prefix, segments))
        if earlier:
            x = jnp.concatenate([*(norm(self._pool(y, num_prefix, segments)) for y in earlier), x], axis=-1)
        if self.representation_size:
            x = jnp.tanh(nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x))
        if not self.num_classes:
            return x
        if self.classifier == "distilled":
            cls, dist = self._dense("head")(x[:, 0]), self._dense("head_dist")(x[:, 1])
            return (cls, dist) if apart else (cls + dist) / 2
        return self._dense("head")(x)

    def _pool(self, tokens: Float[Array, "b n d"], num_prefix: int, segments: Segments | None) -> Float[Array, "b *n d"]:
        if segments is not None:
            return self._pool_each(tokens, num_prefix, segments)
        match self.classifier:
            case "token":
                return tokens[:, 0]
            case "gap":
                return tokens[:, num_prefix:].mean(axis=1)
            case "cls_mean":
                return jnp.concatenate([tokens[:, 0], tokens[:, num_prefix:].mean(axis=1)], axis=-1)
            case "distilled":
                return tokens[:, :2]
            case "map":
                return self._map_head()(tokens)
            case "unpooled" | "token_unpooled":
                return tokens
        raise unknown("classifier", self.classifier, CLASSIFIERS)

    def _pool_each(self, tokens: Float[Array, "b n d"], num_prefix: int, segments: Segments) -> Float[Array, "b s d"]:
        cls = tokens[:, : segments.count]
        match self.classifier:
            case "token":
                return cls
            case "gap":
                return segments.mean(tokens, num_prefix)
            case "cls_mean":
                return jnp.concatenate([cls, segments.mean(tokens, num_prefix)], axis=-1)
            case "map":
                return self._map_head()(tokens, segments)
        raise UserError(f"images of different sizes do not go with classifier={self.classifier!r}: use 'token', 'gap' or 'map'")

    def _map_head(self) -> MapHead:
        sizes = {"num_heads": self.num_heads, "mlp_dim": self.mlp_dim, "norm": self.norm}
        how = {"activation": self.activation, "norm_eps": self.norm_eps, "dtype": self.dtype}
        return MapHead(**sizes, **how, name="MAPHead_0")

    def _dense(self, name: str) -> nn.Dense:
        inits = {"kernel_init": nn.initializers.zeros, "bias_init": nn.initializers.constant(self.bias_init)}
        return nn.Dense(self.num_classes, self.use_bias, self.dtype, **inits, name=name)
