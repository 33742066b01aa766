"""A ViT computed as google-research/vision_transformer computes it, to measure what our own way gains.

The same parameters, names and function as `vit_jax.models`' plain ViTs, from flax's stock layers: a convolution for the
patches, `nn.MultiHeadDotProductAttention` with its separate products and softmax, everything in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.models import zoo


class Block(nn.Module):
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        y = nn.LayerNorm(name="LayerNorm_0")(x)
        x = x + nn.MultiHeadDotProductAttention(self.num_heads, name="MultiHeadDotProductAttention_1")(y, y)
        y = nn.LayerNorm(name="LayerNorm_2")(x)
        return x + Mlp(self.mlp_dim, name="MlpBlock_3")(y)


class Mlp(nn.Module):
    mlp_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return nn.Dense(x.shape[-1], name="Dense_1")(nn.gelu(nn.Dense(self.mlp_dim, name="Dense_0")(x)))


class Encoder(nn.Module):
    num_layers: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = Positions(name="posembed_input")(x)
        for i in range(self.num_layers):
            x = Block(self.mlp_dim, self.num_heads, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class Positions(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:]))


class ReferenceViT(nn.Module):
    """A plain ViT with a class token: float32 images to logits."""

    hidden_size: int
    patch: int
    transformer: dict[str, Any]
    num_classes: int

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b classes"]:
        p, d = self.patch, self.hidden_size
        x = nn.Conv(d, (p, p), (p, p), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, d)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, d))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        x = Encoder(**self.transformer, name="Transformer")(x)
        return nn.Dense(self.num_classes, name="head")(x[:, 0])


def model(name: str, num_classes: int) -> ReferenceViT:
    """`name` is a plain ViT of `vit_jax.models.zoo`."""
    fields = zoo.VIT[name]
    transformer = {key: fields["transformer"][key] for key in ("num_layers", "mlp_dim", "num_heads")}
    return ReferenceViT(fields["hidden_size"], fields["patches"]["size"][0], transformer, num_classes)


def make_update(vit: ReferenceViT, optimizer: optax.GradientTransformation):
    """(params, opt_state, images, labels) → (params, opt_state, loss), pmapped, state donated."""

    def loss(params, images, labels):
        logits = vit.apply({"params": params}, images)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, axis=-1))

    def update(params, opt_state, images, labels):
        value, grads = jax.value_and_grad(loss)(params, images, labels)
        grads = jax.lax.pmean(grads, "batch")
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, jax.lax.pmean(value, "batch")

    return jax.pmap(update, axis_name="batch", donate_argnums=(0, 1))
