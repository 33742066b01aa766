"""Images and texts in one space: LiT (https://arxiv.org/abs/2111.07991), SigLIP (https://arxiv.org/abs/2303.15343), CLIP.

An image tower and a text tower each make one vector of length 1; the dot product of two says how well they go together.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vit_jax.errors import UserError, unknown
from vit_jax.models import bert, vit, zoo
from vit_jax.models.architecture import Architecture, Fields, check_fields
from vit_jax.models.bert import BertModel
from vit_jax.models.packed import Pack
from vit_jax.models.text import TextTransformer
from vit_jax.models.vit import VisionTransformer

TEXT_MODELS = {"bert": BertModel, "text_transformer": TextTransformer}
_OF_SHAPES_OR_TRAINING = {
    *("config", "num_classes", "width", "num_layers", "mlp_dim", "vocab_size", "max_len", "head_bias"),
    *("dropout_rate", "remat", "scan", "constrain", "dtype", "parent", "name"),
}


class TwoTowers(nn.Module):
    """Embeds images (`img`) and texts (`txt`), and holds the temperature (`t`) and perhaps a bias (`b`) of their scores.

    Attributes:
      image: fields of `vit.VisionTransformer`; its num_classes is out_dim's first.
      text: fields of the text tower; its num_classes is out_dim's second.
      text_model: "bert" or "text_transformer".
      out_dim: width of the embeddings, or one for each tower; None leaves out that tower's head.
      temperature_init, bias_init: exp(t) and b of fresh parameters; without bias_init there is no b. With b the model's
        scores are those of a sigmoid (SigLIP), without of a softmax (LiT, CLIP).
      temperature_max: exp(t) stops there, as CLIP's does at 100; None for no limit.
      pp: what the texts and images go through first: tokenizer_name, max_len, size, see `vit_jax.preprocess`.
      model_name: name of the architecture; of its published files, too.
      remat, scan, constrain: of the blocks of both towers, see `layers.Encoder`; a BERT has remat alone.
      dtype: what every layer computes in; parameters stay float32.
    """

    image: Mapping[str, Any]
    text: Mapping[str, Any]
    text_model: str = "text_transformer"
    out_dim: int | tuple[int | None, int | None] = 128
    temperature_init: float = 1.0
    bias_init: float | None = None
    temperature_max: float | None = None
    pp: Mapping[str, Any] | None = None
    model_name: str | None = None
    remat: str = "none"
    scan: bool = False
    constrain: Callable[[Array], Array] = lambda x: x
    dtype: Any = jnp.float32

    def setup(self):
        dim_image, dim_text = self.out_dim if isinstance(self.out_dim, list | tuple) else (self.out_dim,) * 2
        of_blocks = {"remat": self.remat, "scan": self.scan, "constrain": self.constrain}
        cls = _text_class(self.text_model)
        known = {name: value for name, value in of_blocks.items() if name in cls.__dataclass_fields__}
        self.txt = cls(**{"dtype": self.dtype, **known, **self.text, "num_classes": dim_text})
        transformer = of_blocks | dict(self.image["transformer"])
        fields = {"dtype": self.dtype, **self.image, "transformer": transformer, "num_classes": dim_image}
        self.img = VisionTransformer(**fields)
        self.t = self.param("t", nn.initializers.constant(jnp.log(self.temperature_init)), (1,))
        if self.bias_init is not None:
            self.b = self.param("b", nn.initializers.constant(self.bias_init), (1,))

    def __call__(
        self,
        *,
        images: Float[Array, "b H W c"] | Pack | None = None,
        tokens: Int[Array, "b n"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b d"] | None, Float[Array, "b d"] | None, dict[str, Array]]:
        """(zimg, ztxt, out): the embeddings, None for what is not given, and "t", perhaps "b", and the vectors' lengths.

        The images of a `packed.Pack` give (b · s, d), row by row.
        """
        t = self.t if self.temperature_max is None else at_most(self.t, math.log(self.temperature_max))
        out = {"t": jnp.exp(t)} | ({} if self.bias_init is None else {"b": self.b})
        zimg = ztxt = None
        if tokens is not None:
            ztxt, out["txt/norm"] = _normalized(self.txt(tokens, train=train))
        if images is not None:
            zimg, out["img/norm"] = _normalized(self.img(images, train=train))
        if zimg is not None and ztxt is not None:
            _check_widths(zimg, ztxt)
        return zimg, ztxt, out

    def features(self, images: Float[Array, "b H W c"], *, train: bool = False) -> dict[str, Any]:
        """What the image tower's encoder makes of images, see `vit.VisionTransformer.features`."""
        return self.img.features(images, train=train)

    # What users of the reference call. These import what stands above models: nothing in `models` needs them.

    def load_variables(self, path: str | os.PathLike | None = None) -> dict[str, Any]:
        """{"params": …} of a file, or of the published one of this name: that of the current folder, or else fetched."""
        from vit_jax.checkpoint import open_checkpoint

        return {"params": open_checkpoint(self._published(".npz") if path is None else path).params}

    @property
    def vocab_path(self) -> str:
        """The published vocabulary: in the current folder if it is there, or else its address."""
        suffixes = {"bert": ".txt", "sentencepiece": ".model"}
        return self._published(suffixes[self._texts_and_sizes()["tokenizer_name"]])

    def get_tokenizer(self) -> Callable[[Sequence[str]], Int[Any, "b n"]]:
        """Texts to tokens, see `preprocess.get_tokenizer`."""
        from vit_jax import preprocess

        pp = self._texts_and_sizes()
        return preprocess.get_tokenizer(pp["tokenizer_name"])(vocab_path=self.vocab_path, max_len=pp["max_len"])

    def get_image_preprocessing(self, crop: bool = False) -> Callable[..., Float[Any, "b s s 3"]]:
        """uint8 images of any sizes to what the model sees, see `preprocess.PreprocessImages`."""
        from vit_jax import preprocess

        return preprocess.PreprocessImages(size=self._texts_and_sizes()["size"], crop=crop)

    def get_pp(self, crop: bool = False) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """Both for an example with "image" and "text", see `preprocess.get_pp`."""
        from vit_jax import preprocess

        return preprocess.get_pp(vocab_path=self.vocab_path, crop=crop, **self._texts_and_sizes())

    def _texts_and_sizes(self) -> Mapping[str, Any]:
        if self.pp is None:
            raise UserError(f"{self.model_name or 'this model'} is no published LiT: it has no pp. Use checkpoint.texts")
        return self.pp

    def _published(self, suffix: str) -> str:
        if self.model_name not in zoo.LIT:
            raise UserError(f"{self.model_name or 'this model'} is not published; those that are: {', '.join(zoo.LIT)}")
        name = f"{self.model_name}{suffix}"
        return name if os.path.isfile(name) else f"{zoo.LIT_BUCKET}/{name}"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def at_most(x: Float[Array, "*n"], limit: float) -> Float[Array, "*n"]:
    """min(x, limit), with a gradient that brings x down from the limit, and none that drives it further up."""
    return jnp.minimum(x, limit)


at_most.defvjp(lambda x, limit: (at_most(x, limit), x), lambda limit, x, dy: (jnp.where((x < limit) | (dy > 0), dy, 0),))


def _text_class(name: str) -> type[nn.Module]:
    if name not in TEXT_MODELS:
        raise unknown("text_model", name, TEXT_MODELS)
    return TEXT_MODELS[name]


def _normalized(z: Float[Array, "b d"]) -> tuple[Float[Array, "b d"], Float[Array, "b 1"]]:
    """Vectors of length 1 in float32, and how long they were."""
    z = z.astype(jnp.float32)
    norm = jnp.linalg.norm(z, axis=1, keepdims=True)
    return z / (norm + 1e-8), norm


def scores(zimg: Float[Array, "n d"], ztxt: Float[Array, "m d"], out: Mapping[str, Float[Array, "1"]]) -> Float[Array, "n m"]:
    """How well every image goes with every text, before the softmax over either, or the sigmoid where `out` has a "b"."""
    _check_widths(zimg, ztxt)
    return out["t"] * jnp.einsum("nd,md->nm", zimg, ztxt) + out.get("b", 0.0)


def check_same_text(trained: Fields, fields: Fields, where: object) -> None:
    """Raises UserError if the text tower of a model, read from `where`, computes otherwise than that of `fields`.

    What differs in names or shapes of parameters is not told here, and options of training do not count.
    """
    ours, theirs = (_text_class(f.get("text_model", "text_transformer")) for f in (fields, trained))
    if ours is theirs is BertModel:
        heads, wanted = (bert.sizes(f["text"].get("config", "base"))["num_heads"] for f in (trained, fields))
        if heads != wanted:
            raise UserError(
                f"{where} was trained with {heads} heads in its text tower, not {wanted}: set num_heads in its config"
            )
    for field in dataclasses.fields(ours) if ours is theirs else ():
        if field.name in _OF_SHAPES_OR_TRAINING:
            continue
        old, new = (f["text"].get(field.name, field.default) for f in (trained, fields))
        if old != new:
            raise UserError(
                f"{where} was trained with {field.name}={old!r} in its text tower, not {new!r}: "
                f"--config.model.text.{field.name}={old}"
            )


def _check_widths(zimg: Float[Array, "n d"], ztxt: Float[Array, "m d"]) -> None:
    if zimg.shape[-1] != ztxt.shape[-1]:
        raise UserError(f"images become {zimg.shape[-1]} numbers, texts {ztxt.shape[-1]}: out_dim must make them equal")


def _check(fields: Fields) -> None:
    """Raises UserError for a tower whose fields are wrong; the sizes of both heads are out_dim's."""
    vit.ARCHITECTURE.build({"num_classes": None, **fields["image"]})
    text_class = _text_class(fields.get("text_model", "text_transformer"))
    check_fields(text_class, {"num_classes": None, **fields["text"]}, "model.text")
    if fields.get("scan") and text_class is BertModel:
        raise UserError("config.scan=True is not for a text tower of BERT, whose blocks are compiled one by one")


def _num_layers(fields: Fields) -> dict[str, int]:
    text = fields["text"]
    if fields.get("text_model") != "bert":
        count = text.get("num_layers", TextTransformer.num_layers)
    else:
        config = text.get("config", "base")
        count = bert.SIZES[config]["num_layers"] if isinstance(config, str) else config.get("num_layers", 12)
    return {"img": vit.ARCHITECTURE.num_layers(fields["image"]), "txt": count}


ARCHITECTURE = Architecture(
    cls=TwoTowers,
    sizes=zoo.LIT,
    num_layers=_num_layers,
    # the names within a text tower; an image tower's are those of a ViT
    first=r"(Embed_0/.*|pos_embedding|BertEncoder_0/(embedder|layer_norm)/.*)",
    block=r"(?:Encoder_0/encoderblock_|BertEncoder_0/encoder_block/layer_sequence/layers_)(\d+)/.*",
    last=r"(Encoder_0/encoder_norm|head)/.*",
    check=_check,
    backbone="image",
    cut=lambda fields: vit.ARCHITECTURE.cut(fields["image"]),
    grid=lambda fields, image_size: vit.ARCHITECTURE.grid(fields["image"], image_size),
)
