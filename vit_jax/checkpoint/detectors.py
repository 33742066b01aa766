"""Opens and writes the files of detectors: what `detr` reads, with a description of how the model is used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax import models
from vit_jax.checkpoint import detr
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import folder_of, read_object
from vit_jax.checkpoint.family import IMAGENET, Written
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat
from vit_jax.errors import UserError
from vit_jax.models.batchnorm_resnet import SIZES

_NAMES = {
    "detr": "official DETR",
    "detr-hf": "Hugging Face DETR",
    "detr-hf-timm": "Hugging Face DETR on timm's ResNet",
    "yolos": "Hugging Face YOLOS",
}
_SHORT, _LONG = 800, 1333
"""DETR resizes the shorter side to 800 pixels, or less if the longer one would be above 1333."""


def open_detector(path: Path, arrays: Flat) -> Opened | None:
    """The detector in a file's arrays, with the `config.json` beside it; None for other models. Raises UserError."""
    if detr.layout(arrays) is None:
        return None
    config = read_object(folder_of(path) / "config.json").content
    kind, fields, flat = detr.read(arrays, config, where=str(path))
    model_type = "YOLOS" if kind == "yolos" else "DETR"
    size = fields["image_size"] if kind == "yolos" else (_LONG, _LONG)
    short = min(size) if kind == "yolos" else _SHORT
    description = Description(
        model_name=path.stem,
        model_type=model_type,
        model=fields,
        image_size=size,
        grid=models.architecture_of(model_type).grid(fields, size),
        mean=IMAGENET[0],
        std=IMAGENET[1],
        class_names=_class_names(fields["num_classes"], config.get("id2label") or {}),
        task={"type": "detect", "short_sides": [short]},
    )
    return Opened(path, _NAMES[kind], flat, description)


def write_detector(opened: Opened) -> Written:
    """A detector in transformers' names. Raises UserError for what these have no place for."""
    fields, names = opened.description.model, opened.description.class_names
    is_yolos = opened.description.model_type == "YOLOS"
    labels = {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    dilated = fields.get("body", {}).get("resnet", {}).get("dilated")
    arrays = detr.write(opened.flat, fields, "yolos" if is_yolos else "detr-hf-timm" if dilated else "detr-hf")
    return Written(arrays, {"config.json": (_yolos_config if is_yolos else _detr_config)(fields) | labels})


def _detr_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    if "resnet" not in fields["body"] or fields.get("norm_first"):
        raise UserError("transformers' DETR knows no ViT and no pre-LN: convert with --to=npz")
    resnet = fields["body"]["resnet"]
    width = resnet.get("width", 64)
    body = {
        "use_timm_backbone": False,
        "backbone": None,
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": width,
            "hidden_sizes": [4 * width * 2**i for i in range(4)],
            "depths": list(resnet["num_layers"]),
            "layer_type": "bottleneck",
            "out_features": ["stage4"],
        },
    }
    if resnet.get("dilated"):  # transformers' own ResNet does not dilate, timm's does
        name = next((name for name, units in SIZES.items() if (list(units), 64) == (list(resnet["num_layers"]), width)), None)
        if name is None:
            raise UserError("transformers dilates timm's ResNet-50 and ResNet-101 alone: convert with --to=npz")
        body = {"use_timm_backbone": True, "backbone": name.replace("R", "resnet"), "dilation": True}
    per_side = {
        "attention_heads": fields.get("num_heads", 8),
        "ffn_dim": fields.get("mlp_dim", 2048),
    }
    return {
        "model_type": "detr",
        "architectures": ["DetrForObjectDetection"],
        "use_pretrained_backbone": False,
        **body,
        "d_model": fields.get("width", 256),
        "num_queries": fields.get("num_queries", 100),
        "encoder_layers": fields["num_encoder_layers"],
        "decoder_layers": fields["num_decoder_layers"],
        **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in per_side.items()},
    }


def _yolos_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "yolos",
        "architectures": ["YolosForObjectDetection"],
        "hidden_size": fields["width"],
        "num_hidden_layers": fields["num_layers"],
        "num_attention_heads": fields["num_heads"],
        "intermediate_size": fields["mlp_dim"],
        "image_size": list(fields["image_size"]),
        "patch_size": fields.get("patch_size", 16),
        "num_detection_tokens": fields.get("num_queries", 100),
        "use_mid_position_embeddings": bool(fields.get("mid_positions")),
        "layer_norm_eps": fields.get("norm_eps", 1e-12),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _class_names(count: int, labels: Mapping[str, str]) -> tuple[str, ...]:
    """Names by number, "N/A" where a number stands for nothing; 91 classes without names are COCO's."""
    if labels:
        return tuple(str(labels.get(str(i), "N/A")) for i in range(count))
    if count == len(COCO):
        return COCO
    return tuple(f"class {i}" for i in range(count))


_COCO = """
0 N/A|person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|12 N/A|stop sign|parking meter|
bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|26 N/A|backpack|umbrella|29 N/A|30 N/A|handbag|tie|suitcase|
frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|45 N/A|
wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|
potted plant|bed|66 N/A|dining table|68 N/A|69 N/A|toilet|71 N/A|tv|laptop|mouse|remote|keyboard|cell phone|microwave|oven|
toaster|sink|refrigerator|83 N/A|book|clock|vase|scissors|teddy bear|hair drier|toothbrush
"""
COCO: tuple[str, ...] = tuple("N/A" if n.endswith("N/A") else n for n in _COCO.replace("\n", "").split("|"))
"""COCO's classes by the numbers of its categories, which have holes."""
