"""DETR and YOLOS: the official DETR files, and those of transformers, with its own or timm's names in the ResNet.

Whether a DETR is dilated (DC5) is told by no shape: by transformers' config.json, and of an official file by its name.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.checkpoint import batchnorm_resnet, huggingface, rules
from vit_jax.checkpoint.family import count_blocks
from vit_jax.checkpoint.rules import Flat, Rule, rule
from vit_jax.errors import UserError, unknown


def _layers(prefix: str, attention: Any, names: Mapping[str, Mapping[str, str]], mlp: tuple[str, str]) -> list[Rule]:
    table = []
    for stack, of in names.items():
        ours, theirs = f"{stack}/layer_{{i}}", f"{prefix}{stack}.layers.{{i}}"
        for name, their in of.items():
            make = attention if name.endswith("attention") else rules.norm
            table += make(f"{ours}/{name}", f"{theirs}.{their}")
        for k, name in enumerate(mlp):
            table += rules.dense(f"{ours}/mlp/Dense_{k}", f"{theirs}.{name}")
    return table


def _mlp(ours: str, theirs: str) -> list[Rule]:
    return [r for k in range(3) for r in rules.dense(f"{ours}/Dense_{k}", f"{theirs}.layers.{k}")]


def _input_projection(theirs: str) -> list[Rule]:
    """A 1x1 convolution, which is a matrix here."""
    return [rule("input_proj/kernel", f"{theirs}.weight", _POINTWISE), rule("input_proj/bias", f"{theirs}.bias")]


_POINTWISE = rules.Transform(lambda x, heads: [x[0][:, :, 0, 0].T], lambda x: [x[0].T[:, :, None, None]])
_OFFICIAL_NAMES = {
    "encoder": {"self_attention": "self_attn", "self_attention_norm": "norm1", "mlp_norm": "norm2"},
    "decoder": {
        "self_attention": "self_attn",
        "self_attention_norm": "norm1",
        "cross_attention": "multihead_attn",
        "cross_attention_norm": "norm2",
        "mlp_norm": "norm3",
    },
}
_TRANSFORMERS_NAMES = {
    "encoder": {
        "self_attention": "self_attn",
        "self_attention_norm": "self_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
    },
    "decoder": {
        "self_attention": "self_attn",
        "self_attention_norm": "self_attn_layer_norm",
        "cross_attention": "encoder_attn",
        "cross_attention_norm": "encoder_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
    },
}
_OFFICIAL = (
    *batchnorm_resnet.torchvision("backbone.0.body."),
    *_input_projection("input_proj"),
    rule("query_embed", "query_embed.weight"),
    *_layers("transformer.", rules.packed_attention, _OFFICIAL_NAMES, ("linear1", "linear2")),
    *rules.norm("encoder/norm", "transformer.encoder.norm"),
    *rules.norm("decoder/norm", "transformer.decoder.norm"),
    *rules.dense("class_embed", "class_embed"),
    *_mlp("bbox_embed", "bbox_embed"),
)
_TRANSFORMERS = (
    *_input_projection("model.input_projection"),
    rule("query_embed", "model.query_position_embeddings.weight"),
    *_layers("model.", rules.attention, _TRANSFORMERS_NAMES, ("fc1", "fc2")),
    *rules.norm("decoder/norm", "model.decoder.layernorm"),
    *rules.dense("class_embed", "class_labels_classifier"),
    *_mlp("bbox_embed", "bbox_predictor"),
)
_BACKBONE = "model.backbone.conv_encoder.model"
_YOLOS = (
    rule("cls", "vit.embeddings.cls_token"),
    rule("queries", "vit.embeddings.detection_tokens"),
    rule("pos_embedding", "vit.embeddings.position_embeddings"),
    rule("mid_pos_embedding", "vit.encoder.mid_position_embeddings"),
    *rules.patch_embedding("vit.embeddings.patch_embeddings.projection"),
    *huggingface.block("block_{i}", "block_{i}/MultiHeadDotProductAttention_1", "vit.encoder.layer.{i}"),
    *rules.norm("encoder_norm", "vit.layernorm"),
    *_mlp("class_embed", "class_labels_classifier"),
    *_mlp("bbox_embed", "bbox_predictor"),
)
TABLES: dict[str, tuple[Rule, ...]] = {
    "detr": _OFFICIAL,
    "detr-hf": (*batchnorm_resnet.transformers(f"{_BACKBONE}."), *_TRANSFORMERS),
    "detr-hf-timm": (*batchnorm_resnet.torchvision(f"{_BACKBONE}."), *_TRANSFORMERS),
    "yolos": _YOLOS,
}
"""Layouts by name."""


def layout(theirs: Mapping[str, np.ndarray]) -> str | None:
    """The key of `TABLES` that such names belong to; None for other models."""
    marks = {
        "detr": "backbone.0.body.conv1.weight",
        "detr-hf": f"{_BACKBONE}.embedder.embedder.convolution.weight",
        "detr-hf-timm": f"{_BACKBONE}.conv1.weight",
        "yolos": "vit.embeddings.detection_tokens",
    }
    return next((name for name, mark in marks.items() if mark in theirs), None)


def read(theirs: Flat, config: Mapping[str, Any], *, where: str) -> tuple[str, dict[str, Any], Flat]:
    """(layout, fields of the model, our arrays) of a file's arrays and its config.json, {} if there is none.

    The fields are those of `detr.Yolos` or of `detr.Detr`.
    Raises UserError for other models, and for what these cannot express.
    """
    theirs = {name: x for name, x in theirs.items() if not name.endswith("num_batches_tracked")}
    kind = layout(theirs)
    if kind is None:
        raise UserError(f"{where} is neither DETR nor YOLOS")
    try:
        fields = _yolos_fields(theirs, config) if kind == "yolos" else _detr_fields(theirs, config, kind, where)
    except KeyError as e:
        raise UserError(f"{where} looks like {kind}, but {e} is missing from its parameters or its config.json") from e
    blocks = fields["num_layers"] if kind == "yolos" else _most_blocks(fields)
    return kind, fields, rules.read(TABLES[kind], theirs, blocks=blocks, heads=fields["num_heads"], where=where)


def write(ours: Flat, fields: Mapping[str, Any], to: str) -> Flat:
    """Our arrays in the layout `to`, a key of `TABLES`. Raises UserError for what it has no place for."""
    if to not in TABLES:
        raise unknown("layout", to, TABLES)
    blocks = fields["num_layers"] if to == "yolos" else _most_blocks(fields)
    return rules.write(TABLES[to], ours, blocks=blocks, where=to)


def _most_blocks(fields: Mapping[str, Any]) -> int:
    return max(*fields["body"]["resnet"]["num_layers"], fields["num_encoder_layers"], fields["num_decoder_layers"])


def _detr_fields(theirs: Flat, config: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    official = kind == "detr"
    prefix = "transformer." if official else "model."
    conv1, stage, numbered = {
        "detr": ("backbone.0.body.conv1.weight", "backbone.0.body.layer", 1),
        "detr-hf": (f"{_BACKBONE}.embedder.embedder.convolution.weight", f"{_BACKBONE}.encoder.stages.", 0),
        "detr-hf-timm": (f"{_BACKBONE}.conv1.weight", f"{_BACKBONE}.layer", 1),
    }[kind]
    after = ".layers." if kind == "detr-hf" else "."
    if official:
        heads, dilated = 8, "dc5" in re.split(r"[\W_]+", where.lower())
        linear, queries, classes = "linear1", "query_embed.weight", "class_embed.bias"
    else:
        heads, dilated = int(config["encoder_attention_heads"]), bool(config.get("dilation"))
        linear, queries, classes = "fc1", "model.query_position_embeddings.weight", "class_labels_classifier.bias"
        _check_config(config, where)
    n, width = theirs[queries].shape
    units = tuple(count_blocks(theirs, f"{stage}{i + numbered}{after}") for i in range(4))
    return {
        "body": {"resnet": {"num_layers": units, "width": theirs[conv1].shape[0], "dilated": dilated}},
        "num_classes": len(theirs[classes]) - 1,
        "num_queries": n,
        "width": width,
        "num_heads": heads,
        "mlp_dim": theirs[f"{prefix}encoder.layers.0.{linear}.weight"].shape[0],
        "num_encoder_layers": count_blocks(theirs, f"{prefix}encoder.layers."),
        "num_decoder_layers": count_blocks(theirs, f"{prefix}decoder.layers."),
        "norm_first": f"{prefix}encoder.norm.weight" in theirs,
    }


def _check_config(config: Mapping[str, Any], where: str) -> None:
    backbone = config.get("backbone_config") or {}
    faults = {
        f"position_embedding_type={config.get('position_embedding_type')}": config.get("position_embedding_type", "sine")
        != "sine",
        f"activation_function={config.get('activation_function')}": config.get("activation_function", "relu") != "relu",
        f"layer_type={backbone.get('layer_type')}": backbone.get("layer_type", "bottleneck") != "bottleneck",
        "downsample_in_bottleneck": backbone.get("downsample_in_bottleneck"),
        "downsample_in_first_stage": backbone.get("downsample_in_first_stage"),
        "another number of heads in the decoder": config["encoder_attention_heads"] != config["decoder_attention_heads"],
    }
    if wrong := [name for name, fault in faults.items() if fault]:
        raise UserError(f"{where} is a DETR with {', '.join(wrong)}, which is not supported")


def _yolos_fields(theirs: Flat, config: Mapping[str, Any]) -> dict[str, Any]:
    d, _, patch, _ = theirs["vit.embeddings.patch_embeddings.projection.weight"].shape
    return {
        "image_size": tuple(config["image_size"]),
        "num_classes": len(theirs["class_labels_classifier.layers.2.bias"]) - 1,
        "num_queries": theirs["vit.embeddings.detection_tokens"].shape[1],
        "patch_size": patch,
        "width": d,
        "num_layers": count_blocks(theirs, "vit.encoder.layer."),
        "num_heads": int(config["num_attention_heads"]),
        "mlp_dim": theirs["vit.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "mid_positions": "vit.encoder.mid_position_embeddings" in theirs,
        "norm_eps": float(config["layer_norm_eps"]),
    }
