"""MLP-Mixer: "MLP-Mixer: An all-MLP Architecture for Vision" (https://arxiv.org/abs/2105.01601)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.models.layers import MlpBlock, PatchEmbed


class MixerBlock(nn.Module):
    """Mixes the tokens of every channel, then the channels of every token, each around a residual."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="LayerNorm_0")(x).swapaxes(1, 2)
        x = x + MlpBlock(self.tokens_mlp_dim, dtype=self.dtype, name="token_mixing")(y).swapaxes(1, 2)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="LayerNorm_1")(x)
        return x + MlpBlock(self.channels_mlp_dim, dtype=self.dtype, name="channel_mixing")(y)


class MlpMixer(nn.Module):
    """Images to logits without attention. The number of tokens, and so the resolution, is part of the parameters.

    Attributes:
      patches: {"size": (height, width)} of a patch in pixels; images are padded with zeros to whole patches.
      hidden_dim: the width d; num_blocks: the depth; tokens_mlp_dim, channels_mlp_dim: widths of the two MLPs.
      num_classes: size of the head; None or 0 for none.
      dtype: what every layer computes in; model_name: for messages only.
    """

    patches: Mapping[str, Any]
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    num_classes: int | None = 1000
    dtype: Any = jnp.float32
    model_name: str | None = None

    def setup(self):
        self.stem = PatchEmbed(self.hidden_dim, tuple(self.patches["size"]), padding="SAME", dtype=self.dtype)
        self.blocks = [
            MixerBlock(self.tokens_mlp_dim, self.channels_mlp_dim, self.dtype, name=f"MixerBlock_{i}")
            for i in range(self.num_blocks)
        ]
        self.pre_head_layer_norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.zeros)

    def __call__(self, images: Float[Array, "b H W c"], *, train: bool = False) -> Float[Array, "b classes"]:
        """Logits of normalised images, or the mean token without `num_classes`. A Mixer has no dropout."""
        x = self.features(images, train=train)["patches"].mean(axis=1)
        return self.head(x) if self.num_classes else x

    def features(self, images: Float[Array, "b H W c"], *, train: bool = False) -> dict[str, Any]:
        """The same keys as `VisionTransformer.features`; a Mixer has neither class token nor registers."""
        x = self.stem(images)
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)
        layers = []
        for block in self.blocks:
            x = block(x)
            layers.append(x)
        x = self.pre_head_layer_norm(x)
        return {"cls": None, "registers": x[:, :0], "patches": x, "map": x.reshape(b, h, w, d), "layers": tuple(layers)}
