"""Writes image and text towers as transformers' CLIP, SigLIP and SigLIP 2, and as OpenCLIP."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint import hf_pixels, image_text, timm
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.family import THEIR_ACTIVATIONS, Written
from vit_jax.checkpoint.image_text import CLIP, OPENCLIP, OPENCLIP_SIGLIP, SIGLIP, SIGLIP2, Layout
from vit_jax.checkpoint.image_text_files import LEGACY_END, RESIZE, TOKENS
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat
from vit_jax.errors import UserError
from vit_jax.models.layers import Encoder
from vit_jax.models.text import TextTransformer
from vit_jax.models.two_towers import TwoTowers
from vit_jax.models.vit import VisionTransformer


def write_image_text(opened: Opened, to: str) -> Written:
    """Two towers for transformers ("hf") or "openclip". Raises UserError for what these cannot express."""
    description = opened.description
    layout = _layout_for(description, to)
    image, text = description.model["image"]["transformer"], description.model["text"]
    flat, most = dict(opened.flat), description.model.get("temperature_max")
    if most is not None:
        flat["t"] = np.minimum(flat["t"], np.float32(math.log(most)))
    theirs = image_text.write(layout, flat, blocks=(image["num_layers"], text["num_layers"]))
    files = _openclip_files(description, layout, theirs) if to == "openclip" else _hf_files(description, layout)
    return Written(theirs, files, TOKENS[layout.name])


# What a layout has to say of a model's fields: others it cannot express.
_PLAIN = {"resnet": None, "representation_size": None, "fc_norm": False, "position_embedding": "learned", "num_registers": 0}
_ENCODER = {"layer_scale": False, "qk_norm": False}
_OF_CLIP = {
    "model": {"text_model": "text_transformer", "bias_init": None},
    "image": _PLAIN | {"classifier": "token", "patch_bias": False, "head_bias": False},
    "image.transformer": _ENCODER | {"norm_pre": True},
    "text": {"causal": True, "pool": "end", "head_bias": False},
}
_OF_SIGLIP = {
    "model": {"text_model": "text_transformer"},
    "image": _PLAIN | {"classifier": "map", "patch_bias": True},
    "image.transformer": _ENCODER | {"norm_pre": False},
    "text": {"causal": False, "pool": "last", "head_bias": True},
}
_OF_OPENCLIP = {
    **_OF_CLIP,
    "model": {"text_model": "text_transformer"},
}
_OF_OPENCLIP_SIGLIP = {
    **_OF_SIGLIP,
    "image.transformer": _OF_SIGLIP["image.transformer"] | {"norm_eps": 1e-6},
}


def _layout_for(description: Description, to: str) -> Layout:
    """The layout that a model is written in. Raises UserError for what it cannot express."""
    model = description.model
    fields = {
        "model": _complete(TwoTowers, model),
        "image": _complete(VisionTransformer, model["image"]),
        "image.transformer": _complete(Encoder, model["image"]["transformer"]),
        "text": _complete(TextTransformer, model["text"]) if model.get("text_model") != "bert" else {},
    }
    is_clip = fields["image"]["classifier"] != "map"
    of_clip, of_siglip = (OPENCLIP, OPENCLIP_SIGLIP) if to == "openclip" else (CLIP, SIGLIP)
    layout = of_clip if is_clip else of_siglip
    if layout is SIGLIP and description.resize == RESIZE[SIGLIP2.name]:
        layout = SIGLIP2
    expected = {CLIP.name: _OF_CLIP, OPENCLIP.name: _OF_OPENCLIP, OPENCLIP_SIGLIP.name: _OF_OPENCLIP_SIGLIP}
    faults = _differences(fields, expected.get(layout.name, _OF_SIGLIP))
    image, text = fields["image.transformer"], fields["text"]
    acts = {image["activation"], text.get("activation")}
    if not acts <= set(THEIR_ACTIVATIONS) or (layout is OPENCLIP and len(acts) > 1 and "quick_gelu" in acts):
        faults.append(f"the activations {' and '.join(map(str, sorted(acts, key=str)))}")
    if layout is OPENCLIP_SIGLIP and not faults:
        faults += _not_in_timm(description)
    if layout in (SIGLIP, SIGLIP2) and model.get("bias_init") is None:
        faults.append("scores without a bias")
    if layout is OPENCLIP and text.get("end_token") not in (None, text.get("vocab_size", 0) - 1):
        faults.append(f"text.end_token={text['end_token']}, which is not the highest token")
    if len(set(description.grid)) > 1 or len(set(model["image"]["patches"]["size"])) > 1:
        faults.append("a grid or patches that are no squares")
    if faults:
        raise UserError(f"{layout.name} cannot express {', '.join(faults)}: convert with --to=npz")
    return layout


_TIMM_SIZES = {
    (768, 12, 12, 3072): ("base", {16: (224, 256, 384, 512), 32: (256,)}),
    (1024, 24, 16, 4096): ("large", {16: (256, 384, 512)}),
    (1152, 27, 16, 4304): ("so400m", {14: (224, 378, 384), 16: (256, 384, 512)}),
    (1536, 40, 16, 6144): ("giantopt", {16: (256, 384)}),
}
"""timm's image towers of SigLIP by width, blocks, heads and width of the MLPs: sides of their images, by their patches."""


def _timm_name(description: Description) -> str | None:
    """What timm calls an image tower, which is all that OpenCLIP says of one; None for others."""
    image, patch, side = _sizes(description)
    encoder = image["transformer"]
    sizes = image["hidden_size"], *(encoder[name] for name in ("num_layers", "num_heads", "mlp_dim"))
    name, sides = _TIMM_SIZES.get(sizes, ("", {}))
    return f"vit_{name}_patch{patch}_siglip_{side}" if side in sides.get(patch, ()) else None


def _not_in_timm(description: Description) -> list[str]:
    name, activation = _timm_name(description), description.model["image"]["transformer"]["activation"]
    if name is None:
        return ["an image tower of sizes for which timm has no SigLIP"]
    theirs = "gelu_tanh" if timm.SIGLIP_TANH.search(name) else "gelu"
    faults = [] if activation == theirs else [f"image.transformer.activation={activation}, for which {name} has {theirs}"]
    if _complete(TextTransformer, description.model["text"])["activation"] not in ("gelu", "gelu_tanh"):
        faults.append(f"text.activation={description.model['text']['activation']}")
    widths = description.model.get("out_dim")
    if (widths[0] if isinstance(widths, list | tuple) else widths) is not None:
        faults.append("a projection of the image tower")
    return faults


def check_image_tower(description: Description, layout: Layout) -> None:
    """Raises UserError for a ViT that a layout cannot express as its image tower alone."""
    model = description.model
    fields = {"image": _complete(VisionTransformer, model), "image.transformer": _complete(Encoder, model["transformer"])}
    expected = _OF_CLIP if layout is CLIP else _OF_SIGLIP
    faults = _differences(fields, {name: expected[name] for name in fields})
    if fields["image.transformer"]["activation"] not in THEIR_ACTIVATIONS:
        faults.append(f"the activation {fields['image.transformer']['activation']}")
    if len(set(description.grid)) > 1 or len(set(model["patches"]["size"])) > 1:
        faults.append("a grid or patches that are no squares")
    if faults:
        raise UserError(f"{layout.name} cannot express {', '.join(faults)}: convert with --to=npz")


def _differences(fields: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{where}.{name}={fields[where].get(name)}"
        for where, wanted in expected.items()
        for name, value in wanted.items()
        if fields[where].get(name) != value
    ]


def _complete(cls: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with the defaults of a module."""
    return {name: field.default for name, field in cls.__dataclass_fields__.items()} | dict(fields)


def _hf_files(description: Description, layout: Layout) -> dict[str, Any]:
    """config.json and preprocessor_config.json."""
    model, is_clip = description.model, layout is CLIP
    text, kind = _complete(TextTransformer, model["text"]), _kind(layout)
    width = model["out_dim"][1] if isinstance(model["out_dim"], list | tuple) else model["out_dim"]
    config = {
        "model_type": kind,
        "architectures": [{"clip": "CLIPModel", "siglip": "SiglipModel"}.get(kind, "Siglip2Model")],
        "text_config": {
            "model_type": f"{kind}_text_model",
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["max_len"],
            **_encoder_config(text["width"], text),
            **({"eos_token_id": LEGACY_END if text["end_token"] is None else text["end_token"]} if is_clip else {}),
            "projection_dim" if is_clip else "projection_size": width,
        },
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            **image_config(description, layout),
            **({"projection_dim": width} if is_clip else {}),
        },
    } | ({"projection_dim": width} if is_clip else {})
    return {"config.json": config, "preprocessor_config.json": preprocessor(description, layout)}


def _kind(layout: Layout) -> str:
    """How transformers calls it."""
    return {CLIP.name: "clip", SIGLIP.name: "siglip"}.get(layout.name, "siglip2")


def _sizes(description: Description) -> tuple[Mapping[str, Any], int, int]:
    """The fields of the ViT that sees the images, its patch and the images that its positions are for, in pixels a side."""
    image = description.model.get("image", description.model)
    return image, image["patches"]["size"][0], description.native_size[0]


def image_config(description: Description, layout: Layout) -> dict[str, Any]:
    """What config.json says of the image tower."""
    image, patch, side = _sizes(description)
    return {
        "patch_size": patch,
        **({"num_patches": (side // patch) ** 2} if layout is SIGLIP2 else {"image_size": side}),
        **_encoder_config(image["hidden_size"], _complete(Encoder, image["transformer"])),
    }


def preprocessor(description: Description, layout: Layout) -> dict[str, Any]:
    """preprocessor_config.json."""
    kind, (_, patch, side) = _kind(layout), _sizes(description)
    pixels = hf_pixels.write(description, kind)
    pixels["image_processor_type"] = {"clip": "CLIPImageProcessor"}.get(kind, "SiglipImageProcessor")
    if layout is not SIGLIP2:
        return pixels
    if not description.preprocessing.get("enlarge", True):
        raise UserError(f"{layout.name} enlarges small photos, which this model does not: convert with --to=npz")
    pixels = {name: x for name, x in pixels.items() if name not in ("size", "crop_size", "do_center_crop")}
    most = description.preprocessing.get("max_patches") or (side // patch) ** 2
    return pixels | {"image_processor_type": "Siglip2ImageProcessor", "patch_size": patch, "max_num_patches": most}


def _encoder_config(width: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": fields["mlp_dim"],
        "num_hidden_layers": fields["num_layers"],
        "num_attention_heads": fields["num_heads"],
        "hidden_act": THEIR_ACTIVATIONS[fields["activation"]],
        "layer_norm_eps": fields["norm_eps"],
        "attention_dropout": 0.0,
    }


def _openclip_files(description: Description, layout: Layout, theirs: Flat) -> dict[str, Any]:
    """open_clip_config.json, as on the hub."""
    model, how = description.model, description.preprocessing
    size, text = description.image_size, _complete(TextTransformer, model["text"])
    if how.get("resize_to") not in (None, min(size)) or len(set(size)) > 1:
        raise UserError("OpenCLIP resizes photos to the size of the model, or their shorter side: convert with --to=npz")
    towers = _openclip_towers if layout is OPENCLIP else _openclip_siglip_towers
    image_config, text_config = towers(description)
    config = {
        "embed_dim": theirs["text_projection"].shape[1] if layout is OPENCLIP else len(theirs["text.text_projection.weight"]),
        **({"quick_gelu": True} if text["activation"] == "quick_gelu" else {}),
        **({"init_logit_bias": model["bias_init"]} if "logit_bias" in theirs else {}),
        **({} if layout is OPENCLIP else {"custom_text": True}),
        "vision_cfg": {"image_size": description.native_size[0], **image_config},
        "text_cfg": {
            "context_length": text["max_len"],
            "vocab_size": text["vocab_size"],
            "width": text["width"],
            "heads": text["num_heads"],
            "layers": text["num_layers"],
            "mlp_ratio": _ratio(text["mlp_dim"], text["width"]),
            **text_config,
        },
    }
    pixels = {
        "mean": [x / 255 for x in description.mean],
        "std": [x / 255 for x in description.std],
        "interpolation": how.get("interpolation", "bilinear"),
        "resize_mode": "shortest" if how.get("resize_to") else "squash",
    }
    return {"open_clip_config.json": {"model_cfg": config, "preprocess_cfg": pixels}}


def _openclip_towers(description: Description) -> tuple[dict[str, Any], dict[str, Any]]:
    """What only OpenCLIP's own image tower and a text tower beside it have to say."""
    image, patch, _ = _sizes(description)
    encoder, width = _complete(Encoder, image["transformer"]), image["hidden_size"]
    sizes = {"layers": encoder["num_layers"], "width": width, "head_width": width // encoder["num_heads"]}
    sizes |= {"mlp_ratio": _ratio(encoder["mlp_dim"], width), "patch_size": patch}
    return sizes | _openclip_options(encoder), _openclip_options(_complete(TextTransformer, description.model["text"]))


def _openclip_siglip_towers(description: Description) -> tuple[dict[str, Any], dict[str, Any]]:
    """What only an image tower of timm and SigLIP's text tower have to say."""
    text = _complete(TextTransformer, description.model["text"])
    image = {
        "timm_model_name": _timm_name(description),
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    return image, {
        "hf_tokenizer_name": "",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        **_openclip_options(text),
    }


def _openclip_options(tower: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a tower's norms and activations that are others than of most."""
    return {
        **({"norm_kwargs": {"eps": tower["norm_eps"]}} if tower["norm_eps"] != 1e-5 else {}),
        **({"act_kwargs": {"approximate": "tanh"}} if tower["activation"] == "gelu_tanh" else {}),
    }


def _ratio(hidden: int, width: int) -> float:
    """That of an MLP, of which OpenCLIP rounds the width down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
