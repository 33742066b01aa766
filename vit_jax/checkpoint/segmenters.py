"""Segmenters of others: DINOv2's linear head in mmsegmentation's names, and Segmenter, each on its ViT.

    mmseg       backbone.* in DINOv2's names, decode_head.{bn,conv_seg}.*; DINOv2 publishes the head in a file of its own
    segmenter   encoder.* in timm's names, decoder.*

A head alone is joined to its ViT by `with_head`.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax.checkpoint import rules, timm
from vit_jax.checkpoint.family import Written, count_blocks
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat, Rule, Transform, rule
from vit_jax.errors import UserError

OpenViT = Callable[[Path, Flat], Opened]
_BACKBONE = "backbone/"
_WRAPPERS = re.compile(r"^((model|module|state_dict)\.)+(?=(backbone|decode_head|encoder|decoder)\.)")
# One place a patch: ours are (in, 1, 1, classes) where a convolution has (classes, in, 1, 1).
_PLACES = Transform(lambda arrays, heads: [arrays[0].transpose(1, 2, 3, 0)], lambda arrays: [arrays[0].transpose(3, 0, 1, 2)])
_PLACES_BIAS = Transform(lambda arrays, heads: [arrays[0][None, None]], lambda arrays: [arrays[0][0, 0]])

LINEAR: tuple[Rule, ...] = (
    *rules.norm("bn", "decode_head.bn"),
    rule("bn/mean", "decode_head.bn.running_mean"),
    rule("bn/var", "decode_head.bn.running_var"),
    rule("conv_seg/kernel", "decode_head.conv_seg.weight", _PLACES),
    rule("conv_seg/bias", "decode_head.conv_seg.bias", _PLACES_BIAS),
)
SEGMENTER: tuple[Rule, ...] = (
    *rules.dense("proj_dec", "decoder.proj_dec"),
    rule("cls_emb", "decoder.cls_emb"),
    *rules.block(
        "mask_block_{i}",
        "decoder.blocks.{i}",
        rules.qkv_attention("mask_block_{i}/MultiHeadDotProductAttention_1", "decoder.blocks.{i}.attn"),
        ("norm1", "norm2"),
    ),
    *rules.norm("decoder_norm", "decoder.decoder_norm"),
    rule("proj_patch", "decoder.proj_patch"),
    rule("proj_classes", "decoder.proj_classes"),
    *rules.norm("mask_norm", "decoder.mask_norm"),
)


def open_segmenter(path: Path, arrays: Flat, open_vit: OpenViT) -> Opened | None:
    """The segmenter in a file's arrays; None for other models. Raises UserError for a head without its ViT."""
    theirs = _unwrapped(arrays)
    if "decode_head.conv_seg.weight" in theirs:
        body = _below(theirs, "backbone.")
        if not body:
            raise UserError(
                f"{path} holds a segmentation head alone: join it to its ViT by vit-jax convert VIT OUT --to=npz --head={path}"
            )
        return _joined(open_vit(path, body), path, theirs)
    if "decoder.cls_emb" not in theirs or "decoder.mask_norm.weight" not in theirs:
        return None
    body = {name: x for name, x in _below(theirs, "encoder.").items() if not name.startswith(("head.", "head_dist."))}
    vit = open_vit(path, body)
    transformer = {**vit.description.model["transformer"], "norm_eps": 1e-5}  # torch's, in encoder and decoder
    model = {**vit.description.model, "transformer": transformer}
    vit = dataclasses.replace(vit, description=dataclasses.replace(vit.description, model=model))
    width, num_layers = theirs["decoder.proj_patch"].shape[0], count_blocks(theirs, "decoder.blocks.")
    heads = max(1, width // 64)
    flat = rules.read(SEGMENTER, _kept(theirs, "decoder."), blocks=num_layers, heads=heads, where=str(path))
    fields = {
        "width": width,
        "num_heads": heads,
        "mlp_dim": theirs["decoder.blocks.0.mlp.fc1.weight"].shape[0] if num_layers else width,
        "num_layers": num_layers,
    }
    return _described(vit, path, "Segmenter", "Segmenter", flat, fields, flat["cls_emb"].shape[1])


def with_head(vit: Opened, path: Path, arrays: Flat) -> Opened:
    """A ViT with the head in the arrays of another file, in mmsegmentation's names. Raises UserError for other files."""
    theirs = _unwrapped(arrays)
    if "decode_head.conv_seg.weight" not in theirs:
        raise UserError(f"{path} holds no decode_head.conv_seg.weight: a segmentation head as DINOv2 publishes it is meant")
    if vit.description.model_type != "ViT":
        raise UserError(f"{vit.path} is a {vit.description.model_type}: a segmentation head needs the ViT it was trained on")
    return _joined(vit, path, theirs)


def write_linear(opened: Opened) -> Written:
    """A ViT with a linear head, in mmsegmentation's names. Raises UserError for one that these have no place for."""
    vit = backbone_of(opened)
    backbone = timm.DINOV2.write(vit.description, vit.flat)
    return backbone._replace(arrays={f"backbone.{name}": x for name, x in backbone.arrays.items()} | _head(opened))


def write_segmenter(opened: Opened) -> Written:
    """A Segmenter in its names. Raises UserError for one that these have no place for."""
    vit = backbone_of(opened)
    transformer, model = vit.description.model["transformer"], vit.description.model
    fixed = {
        "transformer.norm_eps": (transformer.get("norm_eps", 1e-6), 1e-5),
        "transformer.activation": (transformer.get("activation", "gelu_tanh"), "gelu"),
        "transformer.num_heads": (transformer["num_heads"], max(1, model["hidden_size"] // 64)),
        "position_embedding": (model.get("position_embedding", "learned"), "learned"),
        "norm_eps": (opened.description.model.get("norm_eps", 1e-5), 1e-5),
        "activation": (opened.description.model.get("activation", "gelu"), "gelu"),
    }
    if wrong := [f"{name}={has} and not {theirs}" for name, (has, theirs) in fixed.items() if has != theirs]:
        raise UserError(f"Segmenter's layout has no place for {', '.join(wrong)}: use --to=npz")
    encoder = timm.TIMM.arrays(transformer, vit.flat)
    return Written({f"encoder.{name}": x for name, x in encoder.items()} | _head(opened))


def backbone_of(opened: Opened) -> Opened:
    """The ViT of a segmenter."""
    model = {**opened.description.model["body"]["vit"], "num_classes": None}
    described = dataclasses.replace(opened.description, model_type="ViT", model=model, class_names=())
    return dataclasses.replace(opened, flat=opened.under(_BACKBONE), description=described)


def _head(opened: Opened) -> Flat:
    """The arrays of a segmenter's head in their names. Raises UserError for a head that these have no place for."""
    fields = opened.description.model
    if fields.get("places", 1) != 1:
        raise UserError(f"this head tells of {fields['places']} places a side of each patch, others' of one: use --to=npz")
    ours = {name: x for name, x in opened.flat.items() if not name.startswith((_BACKBONE, "extras/"))}
    if opened.description.model_type == "Segmenter":
        if fields["num_heads"] != max(1, fields["width"] // 64):
            raise UserError(f"Segmenter's heads are of width 64, this one has {fields['num_heads']}: use --to=npz")
        return rules.write(SEGMENTER, ours, blocks=fields.get("num_layers", 2), where="Segmenter")
    counted = {"decode_head.bn.num_batches_tracked": np.zeros((), np.int64)}
    return rules.write(LINEAR, ours, blocks=0, where="mmsegmentation") | counted


def _joined(vit: Opened, path: Path, theirs: Flat) -> Opened:
    """A ViT with a linear head."""
    head = {name: x for name, x in _kept(theirs, "decode_head.").items() if not name.endswith("num_batches_tracked")}
    weight, width = head["decode_head.conv_seg.weight"], vit.description.model["hidden_size"]
    if weight.ndim != 4 or weight.shape[2:] != (1, 1) or weight.shape[1] % width:
        raise UserError(f"{path}: decode_head.conv_seg.weight {weight.shape} is no 1x1 convolution of tokens of width {width}")
    flat = rules.read(LINEAR, head, blocks=0, heads=1, where=str(path))
    fields = {"num_layers": weight.shape[1] // width}
    return _described(vit, path, "DINOv2 with a linear head", "LinearSegmenter", flat, fields, weight.shape[0])


def _described(vit: Opened, path: Path, family: str, kind: str, head: Flat, fields: dict, classes: int) -> Opened:
    flat = {f"{_BACKBONE}{name}": x for name, x in vit.flat.items() if not name.startswith(("extras/", "head/", "head_dist/"))}
    model = {"body": {"vit": {**vit.description.model, "num_classes": None}}, "num_classes": classes, **fields}
    described = dataclasses.replace(
        vit.description,
        model_name=path.stem,
        model_type=kind,
        model=model,
        class_names=tuple(f"class {i}" for i in range(classes)),
        head="softmax",
        preprocessing={},
        task={"type": "segment"},
    )
    return Opened(path, family, flat | head, described)


def _unwrapped(arrays: Flat) -> Flat:
    return {_WRAPPERS.sub("", name): x for name, x in arrays.items()}


def _kept(theirs: Flat, prefix: str) -> Flat:
    return {name: x for name, x in theirs.items() if name.startswith(prefix)}


def _below(theirs: Flat, prefix: str) -> Flat:
    return {name.removeprefix(prefix): x for name, x in _kept(theirs, prefix).items()}
