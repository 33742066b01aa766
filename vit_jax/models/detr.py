"""Detectors: images to a set of boxes with classes, found without anchors or suppression.

`Detr`: "End-to-End Object Detection with Transformers" (https://arxiv.org/abs/2005.12872), on a ResNet or any ViT.
`Yolos`: "You Only Look at One Sequence" (https://arxiv.org/abs/2106.00666), a ViT with detection tokens.
`TokenDetector`: a box for every patch token, as in OWL-ViT (https://arxiv.org/abs/2205.06230).

All return {"logits": (l b q classes+1), "boxes": (l b q 4)}: l layers that are trained, the last of which is the result,
q candidates; the last class is "no object"; boxes are (center x, center y, width, height) as parts of the image's valid area.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vit_jax.errors import UserError
from vit_jax.models import batchnorm_resnet, positions, vit
from vit_jax.models.architecture import Architecture, Fields
from vit_jax.models.batchnorm_resnet import SIZES, BatchNormResNet
from vit_jax.models.decoder import Stack
from vit_jax.models.layers import ACTIVATIONS, EncoderBlock, PatchEmbed
from vit_jax.models.linear import Linear

Outputs = dict[str, Array]
MapAndValid = tuple[Float[Array, "b h w c"], Bool[Array, "b h w"]]


class ResNetBackbone(nn.Module):
    """The last map of a `BatchNormResNet`, of which these are the fields, and which of its cells are valid."""

    fields: Mapping[str, Any]
    dtype: Any = jnp.float32

    def setup(self):
        self.resnet = BatchNormResNet(**self.fields, dtype=self.dtype)
        nn.share_scope(self, self.resnet)

    def __call__(self, images: Float[Array, "b H W 3"], valid: Bool[Array, "b H W"], *, train: bool = False) -> MapAndValid:
        x = self.resnet(images)
        return x, positions.downsample(valid, x.shape[1:3])


class ViTBackbone(nn.Module):
    """The map of a `VisionTransformer`'s patch tokens, normalised, of which these are the fields; its head is left out."""

    fields: Mapping[str, Any]
    dtype: Any = jnp.float32

    def setup(self):
        self.vit = vit.VisionTransformer(**{**self.fields, "num_classes": None}, dtype=self.dtype)
        nn.share_scope(self, self.vit)

    def __call__(self, images: Float[Array, "b H W 3"], valid: Bool[Array, "b H W"], *, train: bool = False) -> MapAndValid:
        x = self.vit.features(images, train=train)["map"]
        return x, positions.downsample(valid, x.shape[1:3])


BODIES: dict[str, type[nn.Module]] = {"resnet": ResNetBackbone, "vit": ViTBackbone}


def make_backbone(body: Mapping[str, Any], dtype: Any) -> nn.Module:
    """(images, valid pixels) → (map, valid cells), from {a key of `BODIES`: the fields of that model}."""
    if len(body) != 1 or (kind := next(iter(body))) not in BODIES:
        raise UserError(f"the body of a detector must be one of {', '.join(BODIES)} with its fields, not {dict(body)}")
    return BODIES[kind](body[kind], dtype)


class MLP(nn.Module):
    """Linear layers with ReLU in between, all as wide as the input but the last."""

    features: int
    num_layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b features"]:
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's for a linear layer
        for i in range(self.num_layers):
            last = i == self.num_layers - 1
            width = self.features if last else x.shape[-1]
            x = Linear((width,), activation="relu" if i else None, kernel_init=init, dtype=self.dtype, name=f"Dense_{i}")(x)
        return x


class Detr(nn.Module):
    """Backbone → 1x1 projection → Transformer, whose decoder turns `num_queries` learned queries into boxes.

    Attributes:
      body: {"resnet": fields of `BatchNormResNet`} or {"vit": fields of `VisionTransformer`}.
      num_classes: without "no object".
      model_name: for messages only.
      the others: see `decoder.Stack`. The encoder may have no layers, after a ViT.
    """

    body: Mapping[str, Any]
    num_classes: int = 91
    num_queries: int = 100
    width: int = 256
    num_heads: int = 8
    mlp_dim: int = 2048
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    norm_first: bool = False
    activation: str = "relu"
    dropout_rate: float = 0.1
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32
    model_name: str | None = None

    def setup(self):
        same = ("width", "num_heads", "mlp_dim", "norm_first", "activation", "dropout_rate", "norm_eps", "dtype")
        fields = {name: getattr(self, name) for name in same}
        self.backbone = make_backbone(self.body, self.dtype)
        self.input_proj = Linear((self.width,), kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)
        self.encoder = Stack(self.num_encoder_layers, **fields, final_norm=self.norm_first)
        self.decoder = Stack(self.num_decoder_layers, **fields, cross=True, final_norm=True)
        self.query_embed = self.param("query_embed", nn.initializers.normal(1.0), (self.num_queries, self.width))
        self.class_embed = Linear((self.num_classes + 1,), kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)
        self.bbox_embed = MLP(4, dtype=self.dtype)

    def __call__(
        self, images: Float[Array, "b H W 3"], valid: Bool[Array, "b H W"] | None = None, *, train: bool = False
    ) -> Outputs:
        """`valid` is False on the padding of an image, at its right and bottom; "dropout" keys are needed when `train`."""
        memory, cells, places = self._encode(images, valid, train)
        mask = cells.reshape(len(cells), 1, 1, -1)
        queries = self.query_embed[None].astype(self.dtype)
        start = jnp.zeros((len(cells), self.num_queries, self.width), self.dtype)
        states = self.decoder(start, memory, memory_mask=mask, places=queries, memory_places=places, train=train)
        states = jnp.stack(states)
        return _outputs(self.class_embed(states), self.bbox_embed(states))

    def features(
        self, images: Float[Array, "b H W 3"], valid: Bool[Array, "b H W"] | None = None, *, train: bool = False
    ) -> dict[str, Any]:
        """What the decoder looks at: `map` (b, h, w, d), `patches` (b, h·w, d), and `cls` (b, d), their mean where valid."""
        memory, cells, _ = self._encode(images, valid, train)
        weights = cells.reshape(len(cells), -1, 1).astype(memory.dtype)
        mean = (memory * weights).sum(axis=1) / weights.sum(axis=1)
        return {"cls": mean, "map": memory.reshape(*cells.shape, self.width), "patches": memory}

    def _encode(
        self, images: Float[Array, "b H W 3"], valid: Bool[Array, "b H W"] | None, train: bool
    ) -> tuple[Float[Array, "b n d"], Bool[Array, "b h w"], Float[Array, "b n d"]]:
        """The cells of an image related to each other, which of them are valid, and their positions, added in every layer."""
        valid = jnp.ones(images.shape[:3], bool) if valid is None else valid
        x, cells = self.backbone(images, valid, train=train)
        b, h, w, _ = x.shape
        places = positions.sine_of_image(cells, self.width).reshape(b, h * w, -1)
        memory = self.input_proj(x).reshape(b, h * w, -1)
        if self.num_encoder_layers:
            memory = self.encoder(memory, mask=cells.reshape(b, 1, 1, h * w), places=places, train=train)[-1]
        return memory, cells, places


class Yolos(nn.Module):
    """A ViT whose `num_queries` detection tokens, behind the patches, become boxes; it knows no padding.

    Position embeddings belong to a grid of `image_size` / `patch_size` and are resampled for other images (bicubic, as
    torch's). With `mid_positions` every block but the last is followed by position embeddings of its own.
    """

    image_size: tuple[int, int]
    num_classes: int = 91
    num_queries: int = 100
    patch_size: int = 16
    width: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_dim: int = 1536
    mid_positions: bool = False
    dropout_rate: float = 0.0
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dtype: Any = jnp.float32
    model_name: str | None = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "b H W 3"], valid: Bool[Array, "b H W"] | None = None, *, train: bool = False
    ) -> Outputs:
        embed = PatchEmbed(width=self.width, patch_size=(self.patch_size,) * 2, dtype=self.dtype, name="embedding")
        x = embed(images.astype(self.dtype))
        b, h, w, d = x.shape
        small, n = nn.initializers.normal(0.02), self.num_queries
        old = tuple(side // self.patch_size for side in self.image_size)
        shape = 1, 1 + old[0] * old[1] + n, d
        cls, queries = (self.param(*p).astype(x.dtype) for p in (("cls", small, (1, 1, d)), ("queries", small, (1, n, d))))
        tokens = [jnp.broadcast_to(cls, (b, 1, d)), x.reshape(b, h * w, d), jnp.broadcast_to(queries, (b, n, d))]
        x = jnp.concatenate(tokens, axis=1)

        def located(x: Float[Array, "b n d"], table: Float[Array, "1 n d"]) -> Float[Array, "b n d"]:
            grid = positions.resample(table[0, 1:-n].reshape(*old, d), (h, w)).reshape(1, h * w, d)
            return x + jnp.concatenate([table[:, :1], grid, table[:, -n:]], axis=1).astype(x.dtype)

        x = located(x, self.param("pos_embedding", small, shape))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if self.mid_positions:
            mid = self.param("mid_pos_embedding", small, (self.num_layers - 1, *shape))
        same = ("mlp_dim", "num_heads", "dropout_rate", "activation", "norm_eps", "dtype")
        fields = {name: getattr(self, name) for name in same} | {"attention_dropout_rate": self.dropout_rate}
        for i in range(self.num_layers):
            x = EncoderBlock(**fields, name=f"block_{i}")(x, train=train)
            if self.mid_positions and i < self.num_layers - 1:
                x = located(x, mid[i])
        x = nn.LayerNorm(self.norm_eps, self.dtype, name="encoder_norm")(x)[None, :, -n:]
        heads = MLP(self.num_classes + 1, dtype=self.dtype, name="class_embed"), MLP(4, dtype=self.dtype, name="bbox_embed")
        return _outputs(*(head(x) for head in heads))


class TokenDetector(nn.Module):
    """Every cell of a backbone's map proposes one box, near its own place: OWL-ViT's heads with classes of our own.

    The box head's output is added to the cell's center and a size of one cell, before the sigmoid.
    """

    body: Mapping[str, Any]
    num_classes: int
    dtype: Any = jnp.float32
    model_name: str | None = None

    def setup(self):
        self.backbone = make_backbone(self.body, self.dtype)
        self.class_embed = Linear((self.num_classes + 1,), dtype=self.dtype)
        self.bbox_embed = MLP(features=4, dtype=self.dtype)

    def __call__(
        self, images: Float[Array, "b H W 3"], valid: Bool[Array, "b H W"] | None = None, *, train: bool = False
    ) -> Outputs:
        valid = jnp.ones(images.shape[:3], bool) if valid is None else valid
        x, valid = self.backbone(images, valid, train=train)
        b, h, w, d = x.shape
        nothing = jnp.where(jnp.arange(self.num_classes + 1) < self.num_classes, -1e4, 0.0)
        logits = jnp.where(valid[..., None], self.class_embed(x), nothing)
        boxes = self.bbox_embed(x) + _cells(valid)
        return _outputs(*(y.reshape(1, b, h * w, -1) for y in (logits, boxes)))


def _cells(valid: Bool[Array, "b h w"]) -> Float[Array, "b h w 4"]:
    """Center and size of every cell as parts of the valid area, before the sigmoid."""
    rows, columns = (valid.any(axis=axis).sum(axis=1)[:, None, None] for axis in (2, 1))
    y, x = jnp.meshgrid(*(jnp.arange(n) + 0.5 for n in valid.shape[1:]), indexing="ij")
    cells = jnp.stack(jnp.broadcast_arrays(x / columns, y / rows, 1 / columns, 1 / rows), axis=-1)
    return jax.scipy.special.logit(jnp.clip(cells, 1e-4, 1 - 1e-4))


def _outputs(logits: Float[Array, "l b q c"], boxes: Float[Array, "l b q 4"]) -> Outputs:
    return {"logits": logits.astype(jnp.float32), "boxes": jax.nn.sigmoid(boxes.astype(jnp.float32))}


def _cut(fields: Fields) -> tuple[int, int] | None:
    return vit.ARCHITECTURE.cut(fields["body"]["vit"]) if "vit" in fields["body"] else None


def _grid(fields: Fields, image_size: tuple[int, int]) -> tuple[int, int]:
    if "vit" in fields["body"]:
        return vit.ARCHITECTURE.grid(fields["body"]["vit"], image_size)
    return batchnorm_resnet.ARCHITECTURE.grid(fields["body"]["resnet"], image_size)


def _detr(name: str, resnet: str, *, dilated: bool = False) -> tuple[str, Fields]:
    body = {"resnet": {"num_layers": SIZES[resnet], "dilated": dilated}}
    return name, {"model_name": name, "body": body, "num_encoder_layers": 6, "num_decoder_layers": 6}


def _yolos(name: str, width: int, num_heads: int, image_size: tuple[int, int], *, mid: bool) -> tuple[str, Fields]:
    return name, {
        "model_name": name,
        "image_size": image_size,
        "width": width,
        "num_heads": num_heads,
        "mlp_dim": 4 * width,
        "num_layers": 12,
        "mid_positions": mid,
    }


_FRONT = r"(backbone|input_proj)/.*"
DETR = Architecture(
    cls=Detr,
    sizes=dict(
        [
            _detr("DETR-R50", "R50"),
            _detr("DETR-R50-DC5", "R50", dilated=True),
            _detr("DETR-R101", "R101"),
            _detr("DETR-R101-DC5", "R101", dilated=True),
        ]
    ),
    num_layers=lambda fields: fields["num_decoder_layers"],
    first=rf"{_FRONT}|query_embed|encoder/.*",
    block=r"decoder/layer_(\d+)/.*",
    last=r"(decoder/norm|class_embed|bbox_embed)/.*",
    cut=_cut,
    grid=_grid,
    backbone="body.vit",
    choices={"activation": ACTIVATIONS},
)
YOLOS = Architecture(
    cls=Yolos,
    sizes=dict(
        [
            _yolos("YOLOS-Ti", 192, 3, (800, 1333), mid=False),
            _yolos("YOLOS-S", 384, 6, (512, 864), mid=True),
            _yolos("YOLOS-B", 768, 12, (800, 1344), mid=True),
        ]
    ),
    num_layers=lambda fields: fields["num_layers"],
    first=r"(embedding/.*|cls|queries|pos_embedding|mid_pos_embedding)",
    block=r"block_(\d+)/.*",
    last=r"(encoder_norm|class_embed|bbox_embed)/.*",
    cut=lambda fields: (fields.get("patch_size", 16),) * 2,
    grid=lambda fields, size: tuple(length // fields.get("patch_size", 16) for length in size),
    choices={"activation": ACTIVATIONS},
)
TOKENS = Architecture(
    cls=TokenDetector,
    sizes={},
    num_layers=lambda fields: 0,
    first=_FRONT,
    block=r"block_(\d+)/.*",
    last=r"(class_embed|bbox_embed)/.*",
    cut=_cut,
    grid=_grid,
    backbone="body.vit",
)
