"""What is known about a parameter file: `model.json` beside it, or else its own names and shapes."""

import dataclasses
import functools
import math
import os
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from vit_jax import models
from vit_jax.checkpoint.entries import Entries, parse_json
from vit_jax.checkpoint.resize import RULES
from vit_jax.data.host.resize import INTERPOLATIONS
from vit_jax.errors import UserError, printable
from vit_jax.files import write_json
from vit_jax.models import bert
from vit_jax.models.two_towers import TEXT_MODELS, TwoTowers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A model and what must be known to use it: the content of `model.json`.

    Attributes:
      model_name: for people to read.
      model_type, model: what `models.build` takes; the fields include num_classes.
      image_size, grid: (h, w) of the images in pixels, and of their patches; None where the file does not tell.
      mean, std: of the 0..255 pixels, by channel.
      class_names: in the order of the logits; () without a head.
      resize: the rule for position embeddings on another grid, see `resize.resize`.
      preprocessing: keywords of `view.eval_view` beside the crop, which is image_size; or with max_patches, where images keep
        their shapes, of `patches.eval_patches`.
      head: what a logit means, "softmax" (one class an image) or "sigmoid" (each class for itself).
      text: what makes tokens of texts, {"tokenizer": a key of `data.host.text.TOKENIZERS`, "vocab": a file beside this one,
        "max_len": tokens a text} and options of that tokenizer; {} for a model without a text tower.
      task: what the model was trained for, {"type": …} and the task's own entries.
      dataset, step, metrics: the training run, where there was one.
    """

    model_name: str | None = None
    model_type: str
    model: Mapping[str, Any]
    image_size: tuple[int, int] | None
    grid: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    resize: str = "bilinear"
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    head: str = "softmax"
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"type": "classify"})
    dataset: str | None = None
    step: int | None = None
    metrics: Mapping[str, float] | None = None

    def __post_init__(self):
        for name in _TUPLES:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))

    def check_sizes(self, flat: Mapping[str, Any], where: str | os.PathLike) -> None:
        """Raises UserError for sizes that the arrays of the file leave no room for: nothing of such a model is made."""
        widest = max(_HARMLESS, *(n for x in flat.values() for n in x.shape))
        counts = ("num_layers", "num_blocks")
        for name, size in flatten_dict(dict(self.model), sep=".").items():
            most = len(flat) if name.split(".")[-1] in counts else widest
            if isinstance(size, int) and size > most:
                raise UserError(
                    f"{path_beside(where)}: model.{printable(name)} is {size:,}, and the parameters of {where} leave room for "
                    f"at most {most:,}: this is the description of another file"
                )
        image = models.architecture_of(self.model_type).vit_fields(self.model)
        pairs = [tuple(image.get("patches", {}).get("size") or (1, 1)), self.image_size or (1, 1)]
        if (
            "patches" in image
            and not image.get("resnet")
            and math.prod(n // p for p, n in zip(*pairs, strict=True)) > _MOST_PATCHES
        ):
            raise UserError(f"{path_beside(where)}: images of {self.image_size} cut into patches of {pairs[0]} are too many")

    @property
    def native_size(self) -> tuple[int, int]:
        """(h, w) that the position embeddings are for, which need not be the size of the images."""
        architecture = models.architecture_of(self.model_type)
        if self.grid is None or tuple(architecture.grid(self.model, self.image_size)) == self.grid:
            return self.image_size
        patch = architecture.vit_fields(self.model)["patches"]["size"]
        return tuple(p * n for p, n in zip(patch, self.grid, strict=True))

    def to_json(self) -> dict[str, Any]:
        """A JSON object, of which `from_json` makes an equal description."""
        entries = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in entries.items() if value is not None or name in ("image_size", "grid")}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str | os.PathLike) -> "Description":
        """The description in a JSON object that `where` holds; entries of other programs are ignored.

        Raises UserError if something is missing, of another kind, or out of bounds.
        """
        fields = dataclasses.fields(cls)
        required = {field.name for field in fields if field.default is field.default_factory}
        if missing := required - set(content):
            raise UserError(f"{where} does not describe a model: it lacks {', '.join(sorted(missing))}")
        entries = Entries(content, where)
        model_type = entries.text("model_type", allowed=tuple(models.ARCHITECTURES))
        task = entries.object("task", {"type": "classify"})
        if "type" not in task:
            raise entries.wrong("task", 'an object with a "type"')
        task.text("type")
        return cls(
            model_name=entries.text("model_name", None),
            model_type=model_type,
            model=_model_fields(entries.object("model"), models.architecture_of(model_type)),
            image_size=entries.size("image_size", None),
            grid=entries.size("grid", None, most=1 << 20),
            mean=entries.numbers("mean"),
            std=entries.numbers("std", low=1e-3),
            class_names=entries.names("class_names"),
            resize=entries.text("resize", "bilinear", RULES),
            preprocessing=_preprocessing(entries.object("preprocessing", {})),
            head=entries.text("head", "softmax", HEADS),
            text=_text(entries.object("text", {})),
            task=task.content,
            dataset=entries.text("dataset", None),
            step=entries.whole("step", None, low=0, high=1 << 62),
            metrics=entries.object("metrics").content if "metrics" in entries else None,
        )


def _model_fields(entries: Entries, architecture: models.Architecture) -> dict[str, Any]:
    """The fields of a model, each of the kind that its class says. Names and what is missing are for `models.build`."""
    _check_kinds(entries, architecture.cls)
    nested = {name: entries.object(name) for name in architecture.nested if name in entries}
    for name, inside in nested.items():
        _check_kinds(inside, architecture.nested[name])
    if "patches" in entries:
        entries.object("patches").size("size", None)
    if architecture.cls is TwoTowers:
        return dict(entries.content) | _towers(entries)
    if architecture.backbone.startswith("body.") and "vit" in (body := entries.object("body")):
        _model_fields(body.object("vit"), models.architecture_of("ViT"))
    width, heads = entries.get("hidden_size"), nested["transformer"].get("num_heads") if "transformer" in nested else None
    if width and heads and width % heads:
        raise nested["transformer"].wrong("num_heads", f"a divisor of hidden_size={width}")
    return dict(entries.content)


def _towers(entries: Entries) -> dict[str, Any]:
    """The fields of an image and a text tower, each of the kind that its class says."""
    text = entries.object("text")
    kind = entries.text("text_model", "text_transformer", tuple(TEXT_MODELS))
    _check_kinds(text, TEXT_MODELS[kind])
    if kind == "bert" and isinstance(text.get("config"), dict):
        config = text.object("config")
        config.known(tuple(bert.SIZES["base"]), "size of BERT")
        for name in config.content:
            config.whole(name, low=1)
    elif kind == "bert":
        text.text("config", None, tuple(bert.SIZES))
    widths = entries.get("out_dim")
    pair = widths if isinstance(widths, list) else [widths] * 2
    if len(pair) != 2 or not all(n is None or (type(n) is int and 0 < n <= _HARMLESS) for n in pair):
        raise entries.wrong("out_dim", "a whole number, null, or two of them: the width of each tower's embeddings")
    entries.number("temperature_init", None, 1e-6, 1e6)
    entries.number("temperature_max", None, 1e-6, 1e6)
    entries.number("bias_init", None, -1e6, 1e6)
    return {"image": _model_fields(entries.object("image"), models.architecture_of("ViT")), "text": dict(text.content)}


_MAY_BE_0 = ("num_registers", "num_encoder_layers", "window_size")


def _check_kinds(entries: Entries, cls: type) -> None:
    for name, kind in typing.get_type_hints(cls).items():
        if name in ("parent", "name") or name not in entries.content:
            continue
        if name not in entries and type(None) not in typing.get_args(kind):
            raise entries.wrong(name, "there, or left out")
        if kind in (int, int | None):
            entries.whole(name, None, low=0 if kind == (int | None) or name in _MAY_BE_0 else 1)
        elif kind is float:
            is_rate = name.endswith("_rate") or name == "stochastic_depth"
            low, high = (0, 0.999) if is_rate else (1e-12, 1) if name == "norm_eps" else (-1e6, 1e6)
            entries.number(name, None, low, high)
        elif kind is bool:
            entries.flag(name, None)
        elif kind in (str, str | None):
            entries.text(name, None)
        elif name == "dtype":
            entries.text(name, None, _DTYPES)
        elif name == "constrain":
            raise entries.wrong(name, "left out")
        elif name == "global_blocks" and not all(type(i) is int for i in _listed(entries.get(name))):
            raise entries.wrong(name, "a list of whole numbers")
        elif name == "num_layers" and not _are_units(entries.get(name)):
            raise entries.wrong(name, "a list of at most 8 whole numbers from 1 to 200")


def _listed(value: Any) -> list[Any]:
    """The items of a list; what is none counts as one item."""
    return value if isinstance(value, list) else [value]


def _are_units(value: Any) -> bool:
    """Whether it is the number of units of each stage of a ResNet."""
    return isinstance(value, list) and len(value) <= 8 and all(type(n) is int and 0 < n <= 200 for n in value)


def _preprocessing(entries: Entries) -> dict[str, Any]:
    """Keywords of `view.eval_view`."""
    entries.known(("resize_to", "interpolation", "antialias", "floor_cut", "max_patches", "enlarge"), "entry of preprocessing")
    is_side = isinstance(entries.get("resize_to"), int)
    read = {
        "resize_to": entries.whole("resize_to", None, high=1 << 14) if is_side else entries.size("resize_to", None),
        "interpolation": entries.text("interpolation", None, tuple(INTERPOLATIONS)),
        "antialias": entries.flag("antialias", None),
        "floor_cut": entries.flag("floor_cut", None),
        "max_patches": entries.whole("max_patches", None, low=0, high=_MOST_PATCHES),
        "enlarge": entries.flag("enlarge", None),
    }
    if read["interpolation"] == "bicubic" and not read["antialias"]:
        raise entries.wrong("antialias", "true for bicubic interpolation")
    return {name: read[name] for name in entries.content}


_TOKENIZER_OPTIONS = {
    "bert": (),
    "sentencepiece": ("lower", "strip_punctuation", "pad_token"),
    "clip": ("pad_token",),
    "gpt2": (),
}


def _text(entries: Entries) -> dict[str, Any]:
    """The tokenizer's name, file, length and options; {} where there is none."""
    if not entries.content:
        return {}
    kind = entries.text("tokenizer", allowed=tuple(_TOKENIZER_OPTIONS))
    entries.known(("tokenizer", "vocab", "max_len", *_TOKENIZER_OPTIONS[kind]), "entry of text")
    vocab = entries.text("vocab")
    if vocab != Path(vocab).name or vocab in ("", ".."):
        raise entries.wrong("vocab", "the name of a file in the same folder")
    read = {
        "tokenizer": kind,
        "vocab": vocab,
        "max_len": entries.whole("max_len", low=2, high=1 << 14),
        "lower": entries.flag("lower", None),
        "strip_punctuation": entries.flag("strip_punctuation", None),
        "pad_token": entries.whole("pad_token", None, low=0),
    }
    return {name: read[name] for name in entries.content}


HEADS = ("softmax", "sigmoid")
_TUPLES = ("image_size", "grid", "mean", "std", "class_names")
_MOST_PATCHES = 1 << 16
_HARMLESS = 1 << 16  # a size that may be wrong, and is then told by name and shape
_DTYPES = ("float32", "bfloat16", "float16")


def path_beside(npz_path: str | os.PathLike) -> Path:
    """Where the description of an .npz lies: `NAME.json`, or `model.json` if that describes no `model.npz`."""
    npz_path = Path(npz_path)
    own, shared = npz_path.with_suffix(".json"), npz_path.with_name("model.json")
    return shared if not own.exists() and not npz_path.with_name("model.npz").exists() else own


def write(npz_path: str | os.PathLike, description: Description, **entries: Any) -> None:
    """Writes `NAME.json` beside `NAME.npz`: everything `read` gives back, and more entries of the JSON object."""
    write_json(Path(npz_path).with_suffix(".json"), description.to_json() | entries)


def read(npz_path: str | os.PathLike) -> Description | None:
    """The description beside an .npz, or None. Raises UserError for one that is damaged."""
    content = read_json(npz_path)
    return None if content is None else Description.from_json(content, path_beside(npz_path))


def read_json(npz_path: str | os.PathLike) -> dict[str, Any] | None:
    """The JSON object beside an .npz as it stands there, or None."""
    path = path_beside(npz_path)
    if not path.is_file():
        return None
    try:
        return dict(parse_json(path))
    except UserError:
        raise
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is no valid JSON description of a model: {e}") from e


@functools.cache
def imagenet_class_names() -> list[str]:
    """The 1,000 classes of ILSVRC 2012 in their usual order."""
    return resources.files("vit_jax.checkpoint").joinpath("imagenet_classes.txt").read_text().splitlines()


def summary(flat: Mapping[str, Any]) -> str:
    """'86,567,656 parameters, width 768, 12 blocks, 1000 classes' from flat names and arrays."""
    facts = [f"{sum(math.prod(x.shape) for x in flat.values()):,} parameters"]
    for stem in ("embedding", "stem"):
        if (kernel := flat.get(f"{stem}/kernel")) is not None and len(kernel.shape) == 4:
            facts += [f"patches of {kernel.shape[0]}x{kernel.shape[1]}", f"width {kernel.shape[-1]}"]
    blocks = {p for name in flat for p in name.split("/") if p.startswith(("encoderblock_", "MixerBlock_"))}
    facts += [f"{len(blocks)} block{'s' * (len(blocks) != 1)}"]
    if (head := flat.get("head/kernel")) is not None and head.ndim == 2:
        facts += [f"{head.shape[1]} classes"]
    return ", ".join(facts)
