"""Segmenters: images to the scores of every class at every place, by a head on any ViT.

`LinearSegmenter`: one linear map on the tokens of the last layers, as DINOv2 is scored (https://arxiv.org/abs/2304.07193).
`Segmenter`: class tokens that attend to the patches with them (https://arxiv.org/abs/2105.05633).

Both return logits (b, h·p, w·p, classes), for p x p `places` of each of the h x w patches: 1 as published, where bilinear
interpolation does the rest; more for shapes that are finer than patches.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.errors import UserError
from vit_jax.models import on_vit, vit
from vit_jax.models.architecture import Architecture
from vit_jax.models.batchnorm_resnet import FrozenBatchNorm
from vit_jax.models.layers import ACTIVATIONS, EncoderBlock
from vit_jax.models.linear import Linear

Logits = Float[Array, "b h*p w*p classes"]


class Backbone(nn.Module):
    """The maps of the patch tokens of a `VisionTransformer`'s last `num_layers` blocks, each normalised, side by side."""

    fields: Mapping[str, Any]
    num_layers: int = 1
    dtype: Any = jnp.float32

    def setup(self):
        self.vit = vit.VisionTransformer(**{**self.fields, "num_classes": None}, dtype=self.dtype)
        nn.share_scope(self, self.vit)

    def __call__(self, images: Float[Array, "b H W 3"], *, train: bool = False) -> Float[Array, "b h w n*d"]:
        features = self.vit.features(images, train=train, norm_layers=True)
        if not 1 <= self.num_layers <= len(features["layers"]):
            raise UserError(f"a segmenter of the last {self.num_layers} layers, on a ViT of {len(features['layers'])}")
        b, h, w, _ = features["map"].shape
        return jnp.concatenate([x[:, -h * w :].reshape(b, h, w, -1) for x in features["layers"][-self.num_layers :]], axis=-1)


class LinearSegmenter(nn.Module):
    """Backbone → BatchNorm → a linear map: DINOv2's segmentation head, of the last 1 or 4 layers.

    The BatchNorm is frozen: its statistics, scale and bias are parameters without a gradient. A published head brings its
    own. A head that is trained here keeps mean 0 and variance 1, because its tokens come out of a LayerNorm, and the linear
    map expresses any scale and bias. So the loss stays a sum over examples, equal on any number of devices and
    micro-batches, and training sees what prediction sees.

    Attributes:
      body: {"vit": fields of `VisionTransformer`}.
      num_layers: how many of its last layers are read.
      places: p, see above.
      model_name: for messages only.
    """

    body: Mapping[str, Any]
    num_classes: int
    num_layers: int = 1
    places: int = 1
    dtype: Any = jnp.float32
    model_name: str | None = None

    def setup(self):
        self.backbone = Backbone(self.body["vit"], self.num_layers, self.dtype)
        self.bn = FrozenBatchNorm(self.dtype)
        features = (self.places, self.places, self.num_classes)
        self.conv_seg = Linear(features, kernel_init=nn.initializers.normal(0.01), dtype=self.dtype)

    def __call__(self, images: Float[Array, "b H W 3"], *, train: bool = False) -> Logits:
        x = self.conv_seg(self.bn(self.backbone(images, train=train)))
        return spread(x).astype(jnp.float32)


class Segmenter(nn.Module):
    """Backbone → Transformer over the patches and one token for each class, which are then compared: "Segmenter".

    A score is the cosine between a patch (or a place of it) and a class, normalised over the classes.

    Attributes:
      body: {"vit": fields of `VisionTransformer`}.
      num_layers, width, num_heads, mlp_dim: of the mask Transformer; the published ones are as wide as the ViT.
      places: p, see above.
      the others: see `layers.EncoderBlock`.
      model_name: for messages only.
    """

    body: Mapping[str, Any]
    num_classes: int
    width: int
    num_heads: int
    mlp_dim: int
    num_layers: int = 2
    places: int = 1
    dropout_rate: float = 0.0
    activation: str = "gelu"
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32
    model_name: str | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b H W 3"], *, train: bool = False) -> Logits:
        x = Backbone(self.body["vit"], 1, self.dtype, name="backbone")(images, train=train)
        b, h, w, _ = x.shape
        d, p = self.width, self.places
        patches = Linear((d,), kernel_init=nn.initializers.normal(0.02), dtype=self.dtype, name="proj_dec")(x)
        classes = self.param("cls_emb", nn.initializers.truncated_normal(0.02), (1, self.num_classes, d)).astype(self.dtype)
        x = jnp.concatenate([patches.reshape(b, h * w, d), jnp.broadcast_to(classes, (b, *classes.shape[1:]))], axis=1)

        # Patches and classes look at each other.
        same = ("mlp_dim", "num_heads", "dropout_rate", "activation", "norm_eps", "dtype")
        fields = {name: getattr(self, name) for name in same} | {"attention_dropout_rate": self.dropout_rate}
        for i in range(self.num_layers):
            x = EncoderBlock(**fields, name=f"mask_block_{i}")(x, train=train)
        x = nn.LayerNorm(self.norm_eps, self.dtype, name="decoder_norm")(x)

        # How much each place is like each class.
        init = nn.initializers.normal(d**-0.5)
        proj_patch, proj_classes = (self.param(f"proj_{n}", init, (d, k * d)) for n, k in (("patch", p * p), ("classes", 1)))
        patches = (x[:, : h * w] @ proj_patch.astype(x.dtype)).reshape(b, h, w, p, p, d).astype(jnp.float32)
        classes = (x[:, h * w :] @ proj_classes.astype(x.dtype)).astype(jnp.float32)
        masks = jnp.einsum("bhwpqd,bcd->bhwpqc", _of_length_one(patches), _of_length_one(classes))
        return nn.LayerNorm(self.norm_eps, name="mask_norm")(spread(masks))


def spread(x: Float[Array, "b h w p p c"]) -> Logits:
    """The places of every patch, where they lie in the image."""
    b, h, w, p, _, c = x.shape
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * p, w * p, c)


def at_pixels(scores: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b H W c"]:
    """Scores in between, bilinear, where corners of images lie on each other (torch's align_corners=False)."""
    return jax.image.resize(scores, (scores.shape[0], *size, scores.shape[-1]), "bilinear", antialias=False)


def _of_length_one(x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def architecture(cls: type[nn.Module], first: str, last: str) -> Architecture:
    """The blocks are those of the mask Transformer."""
    how = {"block": r"mask_block_(\d+)/.*", "choices": {"activation": ACTIVATIONS}}
    return on_vit.architecture(cls, "segmenter", first=first, last=last, **how)


LINEAR = architecture(LinearSegmenter, "", "(bn|conv_seg)/.*")
SEGMENTER = architecture(Segmenter, "proj_dec/.*|cls_emb", "(decoder_norm|mask_norm)/.*|proj_patch|proj_classes")
