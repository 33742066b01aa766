"""`preprocessor_config.json` of transformers: from a photo to what the model sees, read and written whole.

Resizing is Pillow's, which antialiases; the middle is cut out at half pixels rounded down.
"""

from dataclasses import dataclass
from typing import Any

from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import Entries
from vit_jax.errors import UserError

_RESAMPLES = {2: "bilinear", 3: "bicubic"}
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_SQUARE, _SHORTEST = {"height": 224, "width": 224}, {"shortest_edge": 224}
# What a processor does where its file is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {"size": _SQUARE, "resample": 2, "do_center_crop": False} | _HALF,
    "DeiT": {"size": {"height": 256, "width": 256}, "crop_size": _SQUARE, "resample": 3, "do_center_crop": True} | _HALF,
    "Beit": {"size": _SQUARE, "crop_size": _SQUARE, "resample": 3, "do_center_crop": False} | _HALF,
    "Bit": {"size": _SHORTEST, "crop_size": _SQUARE, "resample": 3, "do_center_crop": True} | _CLIP,
    "DINOv3ViT": {"size": _SQUARE, "resample": 2, "do_center_crop": False} | _IMAGENET,
    "CLIP": {"size": _SHORTEST, "crop_size": _SQUARE, "resample": 3, "do_center_crop": True} | _CLIP,
    "Siglip": {"size": _SQUARE, "resample": 3, "do_center_crop": False} | _HALF,
}
_PROCESSOR_OF = {"vit": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit"}
_PROCESSOR_OF |= {"clip": "CLIP", "siglip": "Siglip", "dinov3_vit": "DINOv3ViT"}
_READ = ("size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize")
_READ += ("image_mean", "image_std", "image_processor_type", "feature_extractor_type", "default_to_square")
# These say nothing of the pixels of an image in RGB.
_FREE = ("do_convert_rgb", "processor_class", "data_format", "input_data_format", "return_tensors", "device", "num_channels")
_FREE += (
    "_valid_processor_keys",
    "valid_processor_keys",
    "disable_grouping",
    "transformers_version",
    "auto_map",
    "_commit_hash",
)


@dataclass(frozen=True)
class Pixels:
    """What a photo goes through: resized and cut to `size` (h, w) by `preprocessing`, then normalised."""

    size: tuple[int, int]
    preprocessing: dict[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read(entries: Entries, model_type: str) -> Pixels:
    """What the file says, or its processor does where it is silent. Raises UserError for what has no counterpart here."""
    name = entries.text("image_processor_type", None) or entries.text("feature_extractor_type", None)
    kind = name or f"{_PROCESSOR_OF.get(model_type, 'ViT')}ImageProcessor"
    for suffix in ("Pil", "Fast", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(suffix)
    if kind not in _DEFAULTS:
        raise entries.wrong("image_processor_type", f"that of {', '.join(_DEFAULTS)}, whose pixels are known here")
    for other, value in entries.content.items():
        if other not in (*_READ, *_FREE) and value not in (None, False):
            raise entries.wrong(other, "left out or false: it changes the pixels in a way that is not known here")
    entries = Entries(_DEFAULTS[kind] | {k: v for k, v in entries.content.items() if v is not None}, entries.where)
    if not entries.flag("do_resize", True):
        raise entries.wrong("do_resize", "true: a photo of any size must become one of the model's")
    resample = entries.whole("resample", low=0, high=5)
    if resample not in _RESAMPLES:
        raise entries.wrong("resample", "2 (bilinear) or 3 (bicubic)")
    size, resize_to = _geometry(entries, kind)
    how = {"resize_to": resize_to, "interpolation": _RESAMPLES[resample], "antialias": True, "floor_cut": True}
    factor = entries.number("rescale_factor", 1 / 255, 1e-6, 1e3) if entries.flag("do_rescale", True) else 1.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if entries.flag("do_normalize", True):
        mean, std = entries.numbers("image_mean"), entries.numbers("image_std", low=1e-6)
    return Pixels(size, how, tuple(x / factor for x in mean), tuple(x / factor for x in std))


def _geometry(entries: Entries, kind: str) -> tuple[tuple[int, int], Any]:
    """((h, w) of what the model sees, `resize_to` of `view.eval_view`)."""
    shortest, size = _size(entries, "size", entries.flag("default_to_square", kind not in ("Bit", "CLIP", "Siglip")))
    if not entries.flag("do_center_crop"):
        if shortest:
            raise entries.wrong("size", "a height and width where do_center_crop is false: images would have any shape")
        return size, None
    _, crop = _size(entries, "crop_size", True)
    if shortest and crop[0] != crop[1]:
        raise entries.wrong("crop_size", "square where size has a shortest_edge")
    smallest = (shortest, shortest) if shortest else size
    if smallest[0] < crop[0] or smallest[1] < crop[1]:
        raise entries.wrong("crop_size", "no larger than size: a black border is not known here")
    return crop, shortest or (None if size == crop else size)


def _size(entries: Entries, name: str, square: bool) -> tuple[int | None, tuple[int, int] | None]:
    """(the shortest edge, None) or (None, (h, w))."""
    value = entries.get(name)
    if isinstance(value, dict):
        inside = entries.object(name)
        if set(value) == {"shortest_edge"}:
            return inside.whole("shortest_edge", high=1 << 14), None
        if set(value) == {"height", "width"}:
            return None, (inside.whole("height", high=1 << 14), inside.whole("width", high=1 << 14))
        raise entries.wrong(name, "of height and width, or of shortest_edge")
    size = entries.size(name)
    return (None, size) if square or isinstance(value, list) else (size[0], None)


def write(description: Description, model_type: str) -> dict[str, Any]:
    """The file's content. Raises UserError for preprocessing that transformers cannot express."""
    size, how = description.image_size, description.preprocessing
    resize_to, edge = how.get("resize_to"), lambda hw: {"height": hw[0], "width": hw[1]}
    if isinstance(resize_to, int) and size[0] != size[1]:
        raise UserError(
            f"transformers cannot resize to a shorter side of {resize_to} and cut out {size[0]}x{size[1]}, which is no square: "
            "convert with --to=npz"
        )
    target = {"shortest_edge": resize_to} if isinstance(resize_to, int) else edge(resize_to or size)
    # Of both processors only Bit's resizes the shorter side in every version; DeiT's and ViT's are for whole images.
    kind = "Bit" if isinstance(resize_to, int) else "DeiT" if model_type == "deit" else "ViT"
    crop = {"do_center_crop": True, "crop_size": edge(size)} if resize_to else {"do_center_crop": False}
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": True,
        "size": target,
        "resample": next(number for number, name in _RESAMPLES.items() if name == how.get("interpolation", "bilinear")),
        **crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [x / 255 for x in description.mean],
        "image_std": [x / 255 for x in description.std],
    }
