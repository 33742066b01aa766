"""MLP-Mixer: "MLP-Mixer: An all-MLP Architecture for Vision" (https://arxiv.org/abs/2105.01601)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.models import residual, zoo
from vit_jax.models.architecture import Architecture
from vit_jax.models.layers import REMAT, MlpBlock, PatchEmbed, rematerialised


class MixerBlock(nn.Module):
    """Mixes the tokens of every channel, then the channels of every token, each around a residual."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], kept: Sequence[residual.Kept] = (None, None), train: bool = False
    ) -> Float[Array, "b n d"]:
        """`kept` is as in `layers.EncoderBlock`; nothing else depends on `train`."""

        def mix_tokens(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
            y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="LayerNorm_0")(x).swapaxes(1, 2)
            return MlpBlock(mlp_dim=self.tokens_mlp_dim, dtype=self.dtype, name="token_mixing")(y).swapaxes(1, 2)

        def mix_channels(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
            y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="LayerNorm_1")(x)
            return MlpBlock(mlp_dim=self.channels_mlp_dim, dtype=self.dtype, name="channel_mixing")(y)

        x = residual.add(x, mix_tokens, kept[0])
        return residual.add(x, mix_channels, kept[1])


class MlpMixer(nn.Module):
    """Images to logits without attention. The number of tokens, and so the resolution, is part of the parameters.

    Attributes:
      patches: {"size": (height, width)} of a patch in pixels; images are padded with zeros to whole patches.
      hidden_dim: the width d; num_blocks: the depth; tokens_mlp_dim, channels_mlp_dim: widths of the two MLPs.
      num_classes: size of the head; None or 0 for none.
      stochastic_depth: chance of the last block to leave out a branch for an example in training, growing from 0 at the
        first. Unlike big_vision's Mixer, branches that stay are scaled up, as everywhere here.
      remat: what the backward pass computes again, see `layers.Encoder`.
      dtype: what every layer computes in; model_name: for messages only.
    """

    patches: Mapping[str, Any]
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    num_classes: int | None = 1000
    stochastic_depth: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32
    model_name: str | None = None

    def setup(self):
        self.stem = PatchEmbed(width=self.hidden_dim, patch_size=tuple(self.patches["size"]), padding="SAME", dtype=self.dtype)
        self.blocks = [
            rematerialised(MixerBlock, self.remat)(
                tokens_mlp_dim=self.tokens_mlp_dim,
                channels_mlp_dim=self.channels_mlp_dim,
                dtype=self.dtype,
                name=f"MixerBlock_{i}",
            )
            for i in range(self.num_blocks)
        ]
        self.pre_head_layer_norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)
        if self.num_classes:
            self.head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.zeros)

    def __call__(self, images: Float[Array, "b H W c"], *, train: bool = False) -> Float[Array, "b classes"]:
        """Logits of normalised images, or the mean token without `num_classes`. Only stochastic depth needs "dropout" keys."""
        x = self.features(images, train=train)["patches"].mean(axis=1)
        return self.head(x) if self.num_classes else x

    def features(self, images: Float[Array, "b H W c"], *, train: bool = False) -> dict[str, Any]:
        """The same keys as `VisionTransformer.features`; a Mixer has neither class token nor registers."""
        x = self.stem(images)
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)
        rates = residual.rates(self.stochastic_depth, self.num_blocks)
        kept = residual.draw(self.make_rng("dropout") if train and self.stochastic_depth else None, rates, b)
        layers = []
        for i, block in enumerate(self.blocks):
            x = block(x, kept[i], train)
            layers.append(x)
        x = self.pre_head_layer_norm(x)
        return {"cls": None, "registers": x[:, :0], "patches": x, "map": x.reshape(b, h, w, d), "layers": tuple(layers)}


ARCHITECTURE = Architecture(
    cls=MlpMixer,
    sizes=zoo.MIXER,
    num_layers=lambda fields: fields["num_blocks"],
    first=r"stem/.*",
    block=r"MixerBlock_(\d+)/.*",
    last=r"(pre_head_layer_norm|head)/.*",
    depth="num_blocks",
    choices={"remat": REMAT},
    options=("stochastic_depth",),
    cut=lambda fields: None,
    grid=lambda fields, image_size: tuple(-(-n // p) for n, p in zip(image_size, fields["patches"]["size"], strict=True)),
)
