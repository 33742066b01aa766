"""Vision Transformer, plain and hybrid: "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929)."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vit_jax.errors import UserError, unknown
from vit_jax.models import residual, resnet, zoo
from vit_jax.models.architecture import Architecture, Fields
from vit_jax.models.classifier_head import CLASSIFIERS, ClassifierHead
from vit_jax.models.layers import ACTIVATIONS, ATTENTIONS, REMAT, Encoder, Joining, PatchEmbed
from vit_jax.models.norms import NORMS
from vit_jax.models.packed import Pack, Segments
from vit_jax.models.resnet import ResNet

POSITION_EMBEDDINGS = ("learned", "sincos2d", "none")
Queries, Map = Float[Array, "b q d"], Float[Array, "b h w d"]
Hidden = tuple[Bool[Array, "b h w"], Float[Array, "#b d"]]
POOLED = ("token", "gap", "distilled", "cls_mean")  # without parameters, so that a head may read several blocks
_WITH_CLS = ("token", "distilled", "cls_mean", "token_unpooled")


class VisionTransformer(nn.Module):
    """Images to logits: [ResNet →] patches → [class token] → encoder → head.

    Attributes:
      num_classes: size of the head; None or 0 for none.
      patches: {"size": (height, width)} of a patch, in pixels or, after a ResNet, in its cells.
      transformer: keywords of `layers.Encoder`: num_layers, mlp_dim, num_heads, dropout_rate, attention_dropout_rate,
        activation, norm, norm_eps, layer_scale, layer_scale_init, qk_norm, stochastic_depth, stochastic_depth_uniform,
        stochastic_depth_mode, norm_pre, rope_theta, attention, window_size, global_blocks, and, which do not change the
        model, remat and scan.
      hidden_size: the width d of the tokens.
      resnet: keywords of `resnet.ResNet` (num_layers, width_factor) for a hybrid.
      representation_size, classifier, head_bias_init, fc_norm: see `ClassifierHead`.
      head_layers: the last blocks whose tokens, each pooled behind the last LayerNorm, the head reads side by side, as the
        linear probe of DINOv2 does.
      patch_bias, head_bias: whether the patch embedding and the head have a bias.
      position_embedding: "learned", "sincos2d" (fixed, of the patches alone), or "none", as with transformer.rope_theta.
      num_registers: extra tokens without a position, behind the class token.
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
    head_layers: int = 1
    head_bias_init: float = 0.0
    patch_bias: bool = True
    head_bias: bool = True
    fc_norm: bool = False
    position_embedding: str = "learned"
    num_registers: int = 0
    dtype: Any = jnp.float32
    model_name: str | None = None

    def setup(self):
        if self.resnet is not None:
            self.backbone = ResNet(**self.resnet, dtype=self.dtype)
            nn.share_scope(self, self.backbone)
        patch_size = tuple(self.patches["size"])
        self.embedding = PatchEmbed(self.hidden_size, patch_size, use_bias=self.patch_bias, dtype=self.dtype)
        zeros, small = nn.initializers.zeros, nn.initializers.normal(0.02)
        if self.classifier in _WITH_CLS:
            self.cls = self.param("cls", zeros, (1, 1, self.hidden_size))
        if self.classifier == "distilled":
            self.dist = self.param("dist", zeros, (1, 1, self.hidden_size))
        if self.num_registers:
            self.registers = self.param("register_tokens", small, (1, self.num_registers, self.hidden_size))
        if self.position_embedding not in POSITION_EMBEDDINGS:
            raise unknown("position_embedding", self.position_embedding, POSITION_EMBEDDINGS)
        learned = self.position_embedding == "learned"
        self.Transformer = Encoder(
            **self.transformer, add_position_embedding=learned, final_norm=not self.fc_norm, dtype=self.dtype
        )
        pools = self.classifier in POOLED and not self.representation_size
        if not 1 <= self.head_layers <= (most := self.Transformer.num_layers) or (self.head_layers > 1 and not pools):
            only = f"{' or '.join(POOLED)}, without representation_size"
            raise UserError(f"head_layers={self.head_layers} must be from 1 to {most}, or 1 unless classifier is {only}")
        self.classifier_head = ClassifierHead(
            num_classes=self.num_classes,
            representation_size=self.representation_size,
            classifier=self.classifier,
            use_bias=self.head_bias,
            bias_init=self.head_bias_init,
            fc_norm=self.fc_norm,
            norm=self.Transformer.norm,
            norm_eps=self.Transformer.norm_eps,
            num_heads=self.Transformer.num_heads,
            mlp_dim=self.Transformer.mlp_dim,
            activation=self.Transformer.activation,
            dtype=self.dtype,
        )
        nn.share_scope(self, self.classifier_head)

    def __call__(self, images: Float[Array, "b H W c"] | Pack, *, train: bool = False) -> Float[Array, "b *n classes"]:
        """Logits of normalised images; "dropout" keys are needed when `train` and a rate is above 0.

        Of a `packed.Pack`, for which there must be parameters already, they are (b · s, classes), row by row.
        """
        if isinstance(images, Pack):
            tokens, num_prefix, segments, layers = self._encode_pack(images, train, **self._head_needs())
            y = self.classifier_head(tokens, num_prefix, segments=segments, earlier=layers[-self.head_layers : -1])
            return y.reshape(-1, y.shape[-1])
        tokens, (h, w), layers = self._encode(images, train, **self._head_needs())
        return self.classifier_head(tokens, tokens.shape[1] - h * w, earlier=layers[-self.head_layers : -1])

    def head_logits(
        self, images: Float[Array, "b H W c"], *, train: bool = False
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b classes"]]:
        """Logits of the class token and of the distillation token, of which `__call__` gives the mean."""
        if self.classifier != "distilled" or not self.num_classes:
            raise UserError(f"classifier {self.classifier!r} of {self.num_classes} classes has no two heads: use 'distilled'")
        tokens, _, layers = self._encode(images, train, **self._head_needs())
        return self.classifier_head(tokens, apart=True, earlier=layers[-self.head_layers : -1])

    def features(
        self,
        images: Float[Array, "b H W c"],
        *,
        train: bool = False,
        hidden: Hidden | None = None,
        norm_layers: bool = False,
    ) -> dict[str, Any]:
        """What the encoder makes of the images, for probes, dense tasks and pictures.

        Args:
          hidden: which patches the model does not see, and the token that it sees instead, before positions are added.

        Returns:
          cls: (b, d), the class token, or None if the model has none;
          registers: (b, r, d), r of them, often 0;
          patches: (b, h·w, d) and map: (b, h, w, d), the patch tokens in rows and as a grid;
          layers: for every block all its tokens (b, n, d), before the last LayerNorm or, with `norm_layers`, after it.
        """
        tokens, (h, w), layers = self._encode(images, train, with_layers=True, norm_layers=norm_layers, hidden=hidden)
        b, n, d = tokens.shape
        first, registers = n - h * w, self.num_registers
        patches = tokens[:, first:]
        start = 1 if self.classifier in _WITH_CLS else 0
        return {
            "cls": tokens[:, 0] if self.classifier in _WITH_CLS else None,
            "registers": tokens[:, start : start + registers],
            "patches": patches,
            "map": patches.reshape(b, h, w, d),
            "layers": layers,
        }

    def with_queries(
        self,
        images: Float[Array, "b H W c"],
        queries: Float[Array, "q d"],
        num_blocks: int,
        *,
        look: Callable[[Queries, Map], Bool[Array, "b q h w"]] | None = None,
        train: bool = False,
    ) -> tuple[Queries, Map]:
        """What becomes of tokens that join before the last `num_blocks` blocks, and the map of the patches, normalised.

        `look` says, of both as they are before each of these blocks, which patches a query sees in it; without it, all.
        """
        first = self.Transformer.num_layers - num_blocks
        if not 0 <= first < self.Transformer.num_layers:
            raise UserError(f"queries join before the last {num_blocks} blocks, of a ViT of {self.Transformer.num_layers}")

        def parts(tokens: Float[Array, "b n d"], grid: tuple[int, int]) -> tuple[Queries, Map]:
            return tokens[:, : len(queries)], tokens[:, -math.prod(grid) :].reshape(len(tokens), *grid, -1)

        def mask(tokens: Float[Array, "b n d"], grid: tuple[int, int]) -> Bool[Array, "b 1 n n"]:
            b, n, _ = tokens.shape
            seen = look(*parts(tokens, grid)).reshape(b, len(queries), -1)
            return jnp.ones((b, 1, n, n), bool).at[:, 0, : len(queries), -math.prod(grid) :].set(seen)

        batch = jnp.broadcast_to(queries, (len(images), *queries.shape))
        tokens, grid, _ = self._encode(images, train, joining=Joining(first, batch, mask if look else None))
        return parts(tokens, grid)

    def _head_needs(self) -> dict[str, bool]:
        return {"with_layers": True, "norm_layers": True} if self.head_layers > 1 else {}

    def _encode(
        self,
        images: Float[Array, "b H W c"],
        train: bool,
        *,
        hidden: Hidden | None = None,
        seen: Int[Array, "b m"] | None = None,
        **how: Any,
    ):
        x = images.astype(self.dtype)
        if self.resnet is not None:
            x = self.backbone(x)
        x = self.embedding(x)
        if hidden is not None:
            x = jnp.where(hidden[0][..., None], hidden[1].astype(x.dtype), x)
        b, h, w, d = x.shape
        x = x.reshape(b, h * w, d)
        if self.position_embedding == "sincos2d":
            x = x + sincos2d(h, w, d).astype(x.dtype)

        def batch_of(tokens):
            return jnp.broadcast_to(tokens.astype(x.dtype), (b, *tokens.shape[1:]))

        names = ["cls"] * (self.classifier in _WITH_CLS) + ["dist"] * (self.classifier == "distilled")
        x = jnp.concatenate([*(batch_of(getattr(self, name)) for name in names), x], axis=1)
        registers = batch_of(self.registers) if self.num_registers else None
        tokens, outputs = self.Transformer(x, registers, num_prefix=len(names), grid=(h, w), seen=seen, train=train, **how)
        return tokens, (h, w), outputs

    def _encode_pack(
        self, pack: Pack, train: bool, **how: Any
    ) -> tuple[Float[Array, "b n d"], int, Segments, tuple[Float[Array, "b n d"], ...]]:
        """All images' tokens: class tokens, registers, patches; how many stand in front; whose they are; behind each block."""
        if self.resnet is not None or self.position_embedding != "learned":
            raise UserError("images of different sizes need a ViT without a ResNet, with position_embedding='learned'")
        (b, n, _), s, (p, q) = pack.patches.shape, pack.grids.shape[1], self.patches["size"]
        x = self.embedding(pack.patches.reshape(b, n * p, q, -1).astype(self.dtype)).reshape(b, n, -1)

        def of_images(tokens: Float[Array, "1 r d"], count: int) -> Float[Array, "b s*r d"]:
            return jnp.broadcast_to(jnp.tile(tokens.astype(x.dtype), (1, count, 1)), (b, count * tokens.shape[1], x.shape[-1]))

        has_cls = self.classifier in _WITH_CLS
        if has_cls:
            x = jnp.concatenate([of_images(self.cls, s), x], axis=1)
        registers = of_images(self.registers, s) if self.num_registers else None
        numbers = np.concatenate([np.arange(s)] * has_cls + [np.repeat(np.arange(s), self.num_registers)])
        in_front = jnp.broadcast_to(numbers, (b, len(numbers)))
        segments = Segments(jnp.concatenate([in_front, pack.segments()], axis=1), s)

        def resample(table: Float[Array, "1 m d"]) -> Float[Array, "b n d"]:
            patches = pack.positions(table, int(has_cls))
            return jnp.concatenate([of_images(table[:, :1], s), patches], axis=1) if has_cls else patches

        how |= {"num_prefix": s * has_cls, "mask": segments.mask(), "resample": resample}
        tokens, layers = self.Transformer(x, registers, train=train, **how)
        return tokens, len(numbers), segments, layers


def sincos2d(h: int, w: int, d: int, temperature: float = 10_000.0) -> Float[Array, "1 n d"]:
    """Fixed position embeddings of a grid: sines and cosines of x, then of y, at d/4 frequencies (MoCo v3, big_vision)."""
    if d % 4:
        raise UserError(f"sincos2d needs a hidden_size that is a multiple of 4, not {d}")
    y, x = jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij")
    omega = temperature ** -(jnp.arange(d // 4) / max(1, d // 4 - 1))
    y, x = (jnp.einsum("n,d->nd", place.reshape(-1).astype(jnp.float32), omega) for place in (y, x))
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)[None]


def _cut(fields: Fields) -> tuple[int, int] | None:
    return None if fields.get("resnet") else tuple(fields["patches"]["size"])


def _grid(fields: Fields, image_size: tuple[int, int]) -> tuple[int, int]:
    """A ResNet pads to whole cells of its map, the patches of which are cut."""
    stride = resnet.stride(fields["resnet"]["num_layers"]) if fields.get("resnet") else 1
    return tuple(-(-length // stride) // p for length, p in zip(image_size, fields["patches"]["size"], strict=True))


ARCHITECTURE = Architecture(
    cls=VisionTransformer,
    sizes=zoo.VIT,
    num_layers=lambda fields: fields["transformer"]["num_layers"],
    first=r"(embedding|cls|dist|register_tokens|conv_root|gn_root|block\d+|Transformer/(posembed_input|norm_pre))(/.*)?",
    block=r"Transformer/encoderblock_(\d+)/.*",
    last=r"(Transformer/encoder_norm|fc_norm|MAPHead_0|pre_logits|head|head_dist)/.*",
    nested={"transformer": Encoder, "resnet": ResNet},
    blocks="transformer",
    depth="num_layers",
    choices={
        "classifier": CLASSIFIERS,
        "position_embedding": POSITION_EMBEDDINGS,
        "transformer.activation": ACTIVATIONS,
        "transformer.norm": NORMS,
        "transformer.attention": ATTENTIONS,
        "transformer.stochastic_depth_mode": residual.MODES,
        "transformer.remat": REMAT,
    },
    options=(
        "head_bias_init",
        "fc_norm",
        "position_embedding",
        "num_registers",
        "transformer.activation",
        "transformer.norm",
        "transformer.norm_eps",
        "transformer.layer_scale",
        "transformer.layer_scale_init",
        "transformer.qk_norm",
        "transformer.attention",
        "transformer.window_size",
        "transformer.global_blocks",
        "transformer.stochastic_depth",
        "transformer.stochastic_depth_uniform",
        "transformer.stochastic_depth_mode",
    ),
    cut=_cut,
    grid=_grid,
)
