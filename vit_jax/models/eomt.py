"""EoMT: "Your ViT is Secretly an Image Segmentation Model" (https://arxiv.org/abs/2503.19108).

Learned queries join the tokens of a ViT before its last blocks. What comes out of them is compared with the patches, upscaled,
to give a mask each, and is classified.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vit_jax.models import vit
from vit_jax.models.architecture import Architecture
from vit_jax.models.linear import Linear, activate
from vit_jax.models.segment import architecture, at_pixels, spread


class DepthwiseConv(nn.Module):
    """A 3x3 convolution of each channel alone, zeros around: nine products, added.

    XLA's own, of as many groups as channels, takes six times as long on a CPU, its gradients eight times.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        _, h, w, d = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 1, d))
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return sum(x[:, i : i + h, j : j + w] * kernel[i, j, 0] for i in range(3) for j in range(3))


class Doubling(nn.Module):
    """Twice the resolution: a 2x2 convolution transposed, GELU, a 3x3 convolution of each channel alone, LayerNorm."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b 2*h 2*w d"]:
        d = x.shape[-1]
        x = activate(spread(Linear((2, 2, d), dtype=self.dtype, name="conv1")(x)), "gelu")
        return nn.LayerNorm(1e-6, self.dtype, name="norm")(DepthwiseConv(dtype=self.dtype, name="conv2")(x))


class Eomt(nn.Module):
    """Images to masks with classes, and from these to scores by class at every pixel.

    Attributes:
      body: {"vit": fields of `VisionTransformer`}.
      num_classes: without "no object", which is the last one of `objects`.
      num_blocks: before so many of the last blocks the queries join.
      num_doublings: of the patches' resolution, before masks are made.
      model_name: for messages only.
    """

    body: Mapping[str, Any]
    num_classes: int
    num_queries: int = 100
    num_blocks: int = 4
    num_doublings: int = 2
    dtype: Any = jnp.float32
    model_name: str | None = None

    def setup(self):
        self.backbone = vit.VisionTransformer(**{**self.body["vit"], "num_classes": None}, dtype=self.dtype)
        d = self.body["vit"]["hidden_size"]
        self.query = self.param("query", nn.initializers.normal(1.0), (self.num_queries, d))
        self.doubling = [Doubling(self.dtype) for _ in range(self.num_doublings)]
        self.mask_head = [Linear((d,), activation="gelu" if i else None, dtype=self.dtype) for i in range(3)]
        self.class_predictor = Linear((self.num_classes + 1,), dtype=self.dtype)

    def objects(
        self, images: Float[Array, "b H W 3"], *, train: bool = False
    ) -> tuple[Float[Array, "b h w q"], Float[Array, "b q classes+1"]]:
        """Logits of the mask of every query, and of its class."""
        return self._predict(*self.backbone.with_queries(images, self.query, self.num_blocks, train=train))

    def stages(
        self, images: Float[Array, "b H W 3"], sees_all: Bool[Array, "l b q"], *, train: bool = False
    ) -> tuple[Float[Array, "l+1 b h w q"], Float[Array, "l+1 b q classes+1"]]:
        """The `objects` before each of the l blocks with queries, and behind the last one.

        A query sees, in the next block, the patches where its mask is above 0, or, where `sees_all` says so, all of them.
        """
        outputs: list[tuple[Array, Array]] = []

        def look(queries: Float[Array, "b q d"], patches: Float[Array, "b h w d"]) -> Bool[Array, "b q h w"]:
            everything = sees_all[len(outputs)]
            outputs.append(self._predict(queries, patches))
            masks = at_pixels(outputs[-1][0], patches.shape[1:3])
            return (masks.transpose(0, 3, 1, 2) > 0) | everything[:, :, None, None]

        outputs.append(self._predict(*self.backbone.with_queries(images, self.query, self.num_blocks, look=look, train=train)))
        masks, classes = zip(*outputs, strict=True)
        return jnp.stack(masks), jnp.stack(classes)

    def _predict(
        self, queries: Float[Array, "b q d"], patches: Float[Array, "b h w d"]
    ) -> tuple[Float[Array, "b h w q"], Float[Array, "b q classes+1"]]:
        classes, masks = self.class_predictor(queries), queries
        for layer in self.mask_head:
            masks = layer(masks)
        for double in self.doubling:
            patches = double(patches)
        return jnp.einsum("bhwd,bqd->bhwq", patches, masks).astype(jnp.float32), classes.astype(jnp.float32)

    def __call__(self, images: Float[Array, "b H W 3"], *, train: bool = False) -> Float[Array, "b h w classes"]:
        """The sum over the queries of how probably a place is in the mask, times how probably that is of the class."""
        masks, classes = self.objects(images, train=train)
        return jnp.einsum("bhwq,bqc->bhwc", jax.nn.sigmoid(masks), jax.nn.softmax(classes)[..., :-1])


EOMT: Architecture = architecture(Eomt, "query", r"(doubling_\d|mask_head_\d|class_predictor)/.*")
