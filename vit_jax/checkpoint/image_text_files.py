"""Opens the files of other projects' image and text towers, with what lies beside them: sizes, pixels, tokens."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from vit_jax.checkpoint import hf_pixels, image_text, timm, token_files
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import Entries, folder_of, read_object
from vit_jax.checkpoint.family import ACTIVATIONS, HALF, POSITIONS, count_blocks, square_side, vit_fields
from vit_jax.checkpoint.image_text import CLIP, OPENCLIP, OPENCLIP_SIGLIP, SIGLIP, SIGLIP2, Layout
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat
from vit_jax.checkpoint.two_towers import describe_towers
from vit_jax.errors import UserError, printable

log = logging.getLogger("vit_jax")

RESIZE = {
    CLIP.name: "bicubic",
    SIGLIP.name: "bicubic",
    SIGLIP2.name: "bilinear_antialias",
    OPENCLIP.name: "bicubic_antialias",
    OPENCLIP_SIGLIP.name: "bicubic_antialias",
}
"""How each project resamples position embeddings."""
_OPENAI = ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305))
_OF_ONE_TOWER = ("vision_model.embeddings.", "text_model.embeddings.", "visual.conv1.", "visual.trunk.")
LEGACY_END = 2  # what CLIP's first files on Hugging Face call the end: there it is the highest token of a text
TOKENS = {CLIP.name: "clip", SIGLIP.name: "siglip", SIGLIP2.name: "siglip2", OPENCLIP.name: "openclip"}
TOKENS |= {OPENCLIP_SIGLIP.name: "siglip"}


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the shapes do not tell of both towers."""

    heads: tuple[int, int]
    activations: tuple[str, str]
    norm_eps: tuple[float, float]
    end_token: int | None = None


def open_image_text(path: Path, arrays: Flat) -> Opened | None:
    """The two towers in a file's arrays, with the config.json beside it; None for other models. Raises UserError."""
    layout = image_text.layout_of(arrays)
    if layout is None:
        if alone := next((name for name in arrays if name.startswith(_OF_ONE_TOWER)), None):
            raise UserError(f"{path} has {printable(alone)}, but not both towers of a CLIP or SigLIP: give the file of both")
        return None
    folder = folder_of(path)
    theirs = {name: x for name, x in arrays.items() if not name.endswith(("position_ids", "attn_mask"))}
    blocks = count_blocks(theirs, layout.image_blocks), count_blocks(theirs, layout.text_blocks)
    read_sizes = {OPENCLIP.name: _openclip_sizes, OPENCLIP_SIGLIP.name: _openclip_siglip_sizes}
    sizes = read_sizes.get(layout.name, _hf_sizes)(folder, theirs)
    flat = image_text.read(layout, theirs, blocks=blocks, heads=sizes.heads, where=str(path))
    return Opened(path, layout.name, flat, _description(layout, flat, sizes, blocks, path, folder))


def _hf_sizes(folder: Path, theirs: Flat) -> _Sizes:
    """Entries that config.json leaves out have the defaults of transformers' classes."""
    config = read_object(folder / "config.json")
    if not config.content:
        raise UserError(f"{folder} holds no config.json, which tells the heads of both towers: put it beside the parameters")
    is_clip = "text_projection.weight" in theirs
    image, text = config.object("vision_config", {}), config.object("text_config", {})
    act, eps = ("quick_gelu", 1e-5) if is_clip else ("gelu_pytorch_tanh", 1e-6)
    end = text.whole("eos_token_id", 49_407, low=0) if is_clip else None
    return _Sizes(
        heads=(image.whole("num_attention_heads", 12), text.whole("num_attention_heads", 8 if is_clip else 12)),
        activations=tuple(ACTIVATIONS[part.text("hidden_act", act, tuple(ACTIVATIONS))] for part in (image, text)),
        norm_eps=tuple(part.number("layer_norm_eps", eps, 1e-16, 1) for part in (image, text)),
        end_token=None if end == LEGACY_END else end,
    )


def _openclip_sizes(folder: Path, theirs: Flat) -> _Sizes:
    """Heads are of 64 where no open_clip_config.json says otherwise."""
    model = read_object(folder / "open_clip_config.json").object("model_cfg", {})
    image, text = model.object("vision_cfg", {}), model.object("text_cfg", {})
    if not model.content:
        log.warning("opened   %s: no open_clip_config.json lies beside it: GELU, and heads of 64, are assumed", folder)
    for part in (image, text):
        for name in ("attentional_pool", "final_ln_after_pool", "no_causal_mask", "embed_cls"):
            if part.get(name):
                raise part.wrong(name, "left out: such a model is not known here")
    image.text("pool_type", "tok", ("tok",))
    text.text("pool_type", "argmax", ("argmax",))
    quick = model.flag("quick_gelu", False)
    widths = theirs["visual.class_embedding"].shape[-1], theirs["token_embedding.weight"].shape[-1]
    return _Sizes(
        heads=(
            widths[0] // image.whole("head_width", 64) or 1,
            text.whole("heads", max(1, widths[1] // 64)),
        ),
        activations=(_openclip_activation(image, quick), _openclip_activation(text, quick)),
        norm_eps=(_openclip_eps(image), _openclip_eps(text)),
    )


def _openclip_activation(part: Entries, quick: bool = False) -> str:
    """A tower's, of which `act_kwargs` tells the form of GELU."""
    options = part.object("act_kwargs", {})
    options.known(("approximate",), "option of GELU")
    tanh = options.text("approximate", "none", ("none", "tanh")) == "tanh"
    if quick and options.content:
        raise part.wrong("act_kwargs", "left out where quick_gelu is true, which has no options")
    return "quick_gelu" if quick else "gelu_tanh" if tanh else "gelu"


def _openclip_eps(part: Entries) -> float:
    options = part.object("norm_kwargs", {})
    options.known(("eps",), "option of LayerNorm")
    return options.number("eps", 1e-5, 1e-16, 1)


_SIGLIP_HEADS = {1152: 16, 1536: 16}
"""Of timm's SigLIP towers, by their width; others have heads of 64."""


def _openclip_siglip_sizes(folder: Path, theirs: Flat) -> _Sizes:
    """Of an image tower of timm and a text tower of OpenCLIP, as for its ViT-B-16-SigLIP where no file says otherwise."""
    model = read_object(folder / "open_clip_config.json").object("model_cfg", {})
    image, text = model.object("vision_cfg", {}), model.object("text_cfg", {})
    name = image.text("timm_model_name", "")
    if not name:
        log.warning("opened   %s: no open_clip_config.json names timm's model: GELU in its erf form is assumed", folder)
    image.text("timm_pool", "map", ("map",))
    image.text("timm_proj", "none", ("none", ""))
    text.text("pool_type", "last", ("last",))
    if not text.flag("no_causal_mask", True):
        raise text.wrong("no_causal_mask", "true: such a model is not known here")
    widths = theirs["visual.trunk.attn_pool.latent"].shape[-1], theirs["text.token_embedding.weight"].shape[-1]
    return _Sizes(
        heads=(_SIGLIP_HEADS.get(widths[0], widths[0] // 64 or 1), text.whole("heads", widths[1] // 64 or 1)),
        activations=("gelu_tanh" if timm.SIGLIP_TANH.search(name) else "gelu", _openclip_activation(text)),
        norm_eps=(1e-6, _openclip_eps(text) if text.content else 1e-6),
    )


def _description(layout: Layout, flat: Flat, sizes: _Sizes, blocks: tuple[int, int], path: Path, folder: Path) -> Description:
    image, text = _fields(flat, sizes, blocks)
    p, q = image["patches"]["size"]
    count = flat[f"img/{POSITIONS}"].shape[1] - ("img/cls" in flat)
    native = _native_size(layout, folder, count, (p, q))
    described = describe_towers(
        path,
        flat,
        image=image,
        text=text,
        tokens=token_files.describe(TOKENS[layout.name], folder, text),
        image_size=native,
        mean=HALF[0],
        std=HALF[1],
        resize=RESIZE[layout.name],
    )
    return dataclasses.replace(described, **pixels_of(layout, folder, native, p))


def _fields(flat: Flat, sizes: _Sizes, blocks: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the image and of the text tower."""
    p, q, _, width = flat["img/embedding/kernel"].shape
    is_clip = "img/head/kernel" in flat
    mlps = [flat[f"{block}_0/MlpBlock_3/Dense_0/kernel"].shape[1] for block in _FIRST_BLOCKS]
    image = vit_fields(
        hidden_size=width,
        patches={"size": (p, q)},
        classifier="token" if is_clip else "map",
        **({"patch_bias": False, "head_bias": False} if is_clip else {}),
        transformer={
            "num_layers": blocks[0],
            "num_heads": sizes.heads[0],
            "mlp_dim": mlps[0],
            "activation": sizes.activations[0],
            "norm_eps": sizes.norm_eps[0],
            "norm_pre": is_clip,
        },
    )
    vocab_size, text_width = flat["txt/Embed_0/embedding"].shape
    text = {
        "width": text_width,
        "vocab_size": vocab_size,
        "max_len": flat["txt/pos_embedding"].shape[1],
        "num_layers": blocks[1],
        "num_heads": sizes.heads[1],
        "mlp_dim": mlps[1],
        "activation": sizes.activations[1],
        "norm_eps": sizes.norm_eps[1],
        "causal": is_clip,
        "pool": "end" if is_clip else "last",
        "end_token": sizes.end_token,
        **({"head_bias": False} if is_clip else {}),
    }
    return image, text


_FIRST_BLOCKS = "img/Transformer/encoderblock", "txt/Encoder_0/encoderblock"


def _native_size(layout: Layout, folder: Path, count: int, patch: tuple[int, int]) -> tuple[int, int]:
    """(h, w) that the position embeddings are for. UserError where a config tells another."""
    if layout in (CLIP, SIGLIP):
        size = read_object(folder / "config.json").object("vision_config", {}).size("image_size", (224, 224))
        if (size[0] // patch[0]) * (size[1] // patch[1]) != count:
            raise UserError(
                f"{folder} holds {count} position embeddings of patches, which are not those of {size[0]}x{size[1]} px cut "
                f"into {patch[0]}x{patch[1]} px"
            )
        return size
    side = square_side(count, str(folder))
    return side * patch[0], side * patch[1]


def _pixels_of_any_shape(preprocessor: Entries, native: tuple[int, int], patch: int) -> dict[str, Any]:
    """SigLIP 2's processor keeps an image's shape, and gives it at most so many patches."""
    if preprocessor.whole("patch_size", patch) != patch:
        raise preprocessor.wrong("patch_size", f"{patch}, as in the model")
    ours = ("patch_size", "max_num_patches", "do_pad")
    content = {name: value for name, value in preprocessor.content.items() if name not in ours}
    content |= {"image_processor_type": "SiglipImageProcessor", "size": dict(zip(("height", "width"), native, strict=True))}
    pixels = hf_pixels.read(Entries({"resample": 2} | content, preprocessor.where), "siglip")
    most = preprocessor.whole("max_num_patches", 256, high=1 << 16)
    how = {**pixels.preprocessing, "max_patches": most}
    return {"mean": pixels.mean, "std": pixels.std, "preprocessing": how, "image_size": native}


def pixels_of(layout: Layout, folder: Path, native: tuple[int, int], patch: int) -> dict[str, Any]:
    """What photos go through, as entries of a description."""
    if layout in (OPENCLIP, OPENCLIP_SIGLIP):
        is_clip = layout is OPENCLIP
        how = read_object(folder / "open_clip_config.json").object("preprocess_cfg", {})
        mean, std = how.numbers("mean", None), how.numbers("std", None, low=1e-6)
        usual, (usual_mean, usual_std) = ("shortest", _OPENAI) if is_clip else ("squash", HALF)
        squash = how.text("resize_mode", usual, ("shortest", "squash")) == "squash"
        interpolation = how.text("interpolation", "bicubic", ("bicubic", "bilinear"))
        preprocessing = {"resize_to": None if squash else min(native), "interpolation": interpolation, "antialias": True}
        return {
            "mean": tuple(255 * x for x in mean) if mean else usual_mean,
            "std": tuple(255 * x for x in std) if std else usual_std,
            "preprocessing": preprocessing,
        }
    preprocessor = read_object(folder / "preprocessor_config.json")
    if not preprocessor.content:  # transformers 5 writes that of images into that of both
        preprocessor = read_object(folder / "processor_config.json").object("image_processor", {})
    kind = "clip" if layout is CLIP else "siglip"
    content = dict(preprocessor.content)
    if layout is SIGLIP2:
        return _pixels_of_any_shape(preprocessor, native, patch)
    elif not content:
        edge = {"height": native[0], "width": native[1]}
        content = {"size": {"shortest_edge": min(native)}, "crop_size": edge} if layout is CLIP else {"size": edge}
    pixels = hf_pixels.read(Entries(content, preprocessor.where), kind)
    return {
        "mean": pixels.mean,
        "std": pixels.std,
        "preprocessing": pixels.preprocessing,
        "image_size": pixels.size,
    }
