"""Vision Transformer, plain and hybrid: "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.errors import UserError
from vit_jax.models.layers import Encoder, PatchEmbed
from vit_jax.models.resnet import ResNet

CLASSIFIERS = ("token", "gap", "unpooled", "token_unpooled")


class ClassifierHead(nn.Module):
    """Pools the tokens, maps them through an optional tanh layer (`pre_logits`), and scores the classes (`head`).

    `classifier`: "token" reads the class token, "gap" the mean over all tokens; "unpooled" and "token_unpooled" keep
    them all. Without `num_classes` the result is the representation before `head`.
    """

    num_classes: int | None
    representation_size: int | None = None
    classifier: str = "token"
    bias_init: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b *n classes"]:
        if self.classifier == "token":
            x = tokens[:, 0]
        elif self.classifier == "gap":
            x = tokens.mean(axis=1)
        elif self.classifier in CLASSIFIERS:
            x = tokens
        else:
            raise UserError(f"unknown classifier {self.classifier!r}: use one of {', '.join(CLASSIFIERS)}")
        if self.representation_size:
            x = jnp.tanh(nn.Dense(self.representation_size, dtype=self.dtype, name="pre_logits")(x))
        if self.num_classes:
            bias_init = nn.initializers.constant(self.bias_init)
            zeros = nn.initializers.zeros
            x = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=zeros, bias_init=bias_init, name="head")(x)
        return x


class VisionTransformer(nn.Module):
    """Images to logits: [ResNet →] patches → [class token] → encoder → head.

    Attributes:
      num_classes: size of the head; None or 0 for none.
      patches: {"size": (height, width)} of a patch, in pixels or, after a ResNet, in its cells.
      transformer: keywords of `layers.Encoder`: num_layers, mlp_dim, num_heads, dropout_rate, attention_dropout_rate.
      hidden_size: the width d of the tokens.
      resnet: keywords of `resnet.ResNet` (num_layers, width_factor) for a hybrid.
      representation_size, classifier, head_bias_init: see `ClassifierHead`.
      dtype: what every layer computes in, e.g. "bfloat16"; parameters stay float32.
      model_name: name of the architecture, for messages only.
    """

    patches: Mapping[str, Any]
    transformer: Mapping[str, Any]
    hidden_size: int
    num_classes: int | None = 1000
    resnet: Mapping[str, Any] | None = None
    representation_size: int | None = None
    classifier: str = "token"
    head_bias_init: float = 0.0
    dtype: Any = jnp.float32
    model_name: str | None = None

    def setup(self):
        if self.resnet is not None:
            self.backbone = ResNet(**self.resnet, dtype=self.dtype)
            nn.share_scope(self, self.backbone)
        self.embedding = PatchEmbed(self.hidden_size, tuple(self.patches["size"]), dtype=self.dtype)
        if self.classifier in ("token", "token_unpooled"):
            self.cls = self.param("cls", nn.initializers.zeros, (1, 1, self.hidden_size))
        self.Transformer = Encoder(**self.transformer, dtype=self.dtype)
        self.classifier_head = ClassifierHead(
            self.num_classes, self.representation_size, self.classifier, self.head_bias_init, self.dtype
        )
        nn.share_scope(self, self.classifier_head)

    def __call__(self, images: Float[Array, "b H W c"], *, train: bool = False) -> Float[Array, "b *n classes"]:
        """Logits of normalised images; "dropout" keys are needed when `train` and a dropout rate is above 0."""
        tokens, _, _ = self._encode(images, train)
        return self.classifier_head(tokens)

    def features(self, images: Float[Array, "b H W c"], *, train: bool = False) -> dict[str, Any]:
        """What the encoder makes of the images, for probes, dense tasks and pictures.

        Returns:
          cls: (b, d), the class token, or None if the model has none;
          registers: (b, 0, d), as no model here has register tokens;
          patches: (b, h·w, d) and map: (b, h, w, d), the patch tokens in rows and as a grid;
          layers: for every block its tokens (b, n, d) with the class token in front, before the last LayerNorm.
        """
        tokens, (h, w), layers = self._encode(images, train)
        b, n, d = tokens.shape
        first = n - h * w
        return {
            "cls": tokens[:, 0] if first else None,
            "registers": tokens[:, first:first],
            "patches": tokens[:, first:],
            "map": tokens[:, first:].reshape(b, h, w, d),
            "layers": layers,
        }

    def _encode(self, images: Float[Array, "b H W c"], train: bool):
        x = images.astype(self.dtype)
        if self.resnet is not None:
            x = self.backbone(x)
        x = self.embedding(x)
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)
        if self.classifier in ("token", "token_unpooled"):
            x = jnp.concatenate([jnp.broadcast_to(self.cls.astype(x.dtype), (b, 1, d)), x], axis=1)
        tokens, layers = self.Transformer(x, train=train)
        return tokens, (h, w), layers
