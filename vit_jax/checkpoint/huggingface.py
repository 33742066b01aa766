"""Hugging Face transformers' ViT, DeiT and DINOv2, in the names and shapes that `save_pretrained` writes."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.checkpoint import hf_pixels, rules
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import Entries
from vit_jax.checkpoint.family import (
    ACTIVATIONS,
    ATTENTION,
    BLOCK,
    HALF,
    IMAGENET,
    POSITION_RULES,
    POSITIONS,
    THEIR_ACTIVATIONS,
    Facts,
    Family,
    count_blocks,
    fold_tokens,
    vit_fields,
    with_mask_token,
)
from vit_jax.checkpoint.rules import Flat, Rule, rule
from vit_jax.errors import UserError

_DIST = "embeddings.distillation_token"
_PREFIX = re.compile(r"^(vit|deit|dinov2|dinov2_with_registers)\.")


def block(
    ours: str,
    attention: str,
    theirs: str,
    norms: Sequence[str] = ("layernorm_before", "layernorm_after"),
    mlp: Sequence[str] = ("intermediate.dense", "output.dense"),
) -> list[Rule]:
    """A block of transformers' ViT, or of another with its attention."""
    out, names = f"{theirs}.attention.output.dense", ("query", "key", "value")
    return rules.block(ours, theirs, rules.attention(attention, f"{theirs}.attention.attention", out, names), norms, mlp)


def _rules(*names: Sequence[str]) -> tuple[Rule, ...]:
    theirs = "encoder.layer.{i}"
    return (
        rule("cls", "embeddings.cls_token"),
        rule("dist", "embeddings.distillation_token"),
        rule("register_tokens", "embeddings.register_tokens"),
        rule("extras/mask_token", "embeddings.mask_token"),
        rule(POSITIONS, "embeddings.position_embeddings"),
        *rules.patch_embedding("embeddings.patch_embeddings.projection"),
        *block(BLOCK, ATTENTION, theirs, *names),
        *(rule(f"{BLOCK}/ls{k}/gamma", f"{theirs}.layer_scale{k}.lambda1") for k in (1, 2)),
        *rules.norm("Transformer/encoder_norm", "layernorm"),
        *rules.dense("head", "classifier"),
    )


_VIT = (
    *_rules(),
    *rules.dense("pre_logits", "pooler.dense"),
    *rules.dense("head_dist", "distillation_classifier"),
)


def _dinov2_rules(swiglu: bool) -> tuple[Rule, ...]:
    return _rules(("norm1", "norm2"), ("mlp.weights_in", "mlp.weights_out") if swiglu else ("mlp.fc1", "mlp.fc2"))


def _strip(flat: Flat) -> Flat:
    """Without the model's prefix, which only models with a head have; `cls_classifier` is DeiT's word for the head."""
    return {_PREFIX.sub("", name).replace("cls_classifier.", "classifier."): x for name, x in flat.items()}


def _vit_facts(flat: Flat, config: Entries, preprocessor: Entries) -> Facts:
    pooler = flat.get("pooler.dense.weight")
    if pooler is not None:
        config.text("pooler_act", "tanh", ("tanh",))
    fields = {
        "representation_size": None if pooler is None else pooler.shape[0],
        "classifier": "distilled" if _DIST in flat and not _ignores_dist(flat) else "token",
        "num_registers": int(_ignores_dist(flat)),
    }
    transformer = {"mlp_dim": flat["encoder.layer.0.output.dense.weight"].shape[1]}
    usual = IMAGENET if config.text("model_type") == "deit" else HALF
    return _facts(flat, config, preprocessor, fields, transformer, POSITION_RULES["Hugging Face ViT"], usual)


def _ignores_dist(flat: Flat) -> bool:
    """DeiTForImageClassification has a distillation token that no head reads: a register."""
    return _DIST in flat and "classifier.weight" in flat and "distillation_classifier.weight" not in flat


def _fold_vit(flat: Flat, facts: Facts) -> Flat:
    if not _ignores_dist(flat):
        return flat
    cls, positions = "embeddings.cls_token", "embeddings.position_embeddings"
    patches = flat[positions].shape[1] - 2
    flat = fold_tokens(flat, cls=cls, registers=_DIST, positions=positions, patches=patches, drop_cls=False)
    return flat | {"embeddings.register_tokens": flat.pop(_DIST)}


def _dinov2_facts(flat: Flat, config: Entries, preprocessor: Entries) -> Facts:
    registers = flat["embeddings.register_tokens"].shape[1] if "embeddings.register_tokens" in flat else 0
    swiglu = "encoder.layer.0.mlp.weights_out.weight" in flat
    last = flat[f"encoder.layer.0.mlp.{'weights_out' if swiglu else 'fc2'}.weight"]
    transformer = {"layer_scale": True, "mlp_dim": last.shape[1]} | ({"activation": "swiglu"} if swiglu else {})
    fields = {"classifier": "cls_mean", "num_registers": registers}
    rule = POSITION_RULES[f"Hugging Face DINOv2{' with registers' if registers else ''}"]
    return _facts(flat, config, preprocessor, fields, transformer, rule, IMAGENET)


def _facts(
    flat: Flat, config: Entries, preprocessor: Entries, fields: dict, transformer: dict, resize: str, normalisation: tuple
) -> Facts:
    activation = config.text("hidden_act", "gelu", tuple(ACTIVATIONS))
    if "image_size" in config.content and config.get("image_size") is None:
        raise config.wrong("image_size", "a number of pixels")
    d, _, p, q = flat["embeddings.patch_embeddings.projection.weight"].shape
    classes = flat["classifier.weight"].shape[0] if "classifier.weight" in flat else None
    model = vit_fields(
        num_classes=classes,
        hidden_size=d,
        patches={"size": (p, q)},
        **fields,
        transformer={
            "num_layers": count_blocks(flat, "encoder.layer."),
            "num_heads": config.whole("num_attention_heads"),
            "activation": ACTIVATIONS[activation],
            "norm_eps": config.number("layer_norm_eps", low=1e-16, high=1),
        }
        | transformer,
    )
    facts = Facts(
        model,
        config.size("image_size"),
        resize,
        *normalisation,
        class_names=_label_names(config, classes) if classes else None,
        head=_head(config),
    )
    if not preprocessor.content:
        assumed = "no preprocessor_config.json lies beside it: mean, std, and whole images resized, are assumed"
        return dataclasses.replace(facts, assumed=(assumed,))
    pixels = hf_pixels.read(preprocessor, config.text("model_type"))
    how = {"mean": pixels.mean, "std": pixels.std, "preprocessing": pixels.preprocessing, "input_size": pixels.size}
    return dataclasses.replace(facts, **how)


def _label_names(config: Entries, classes: int) -> tuple[str, ...] | None:
    """The names in `id2label`, by number; None where there are none, or not for every column of the head."""
    if "id2label" not in config:
        return None
    labels = config.object("id2label")
    if len(labels.content) != classes:
        return None
    return tuple(labels.text(str(i)) for i in range(classes))


def _head(config: Entries) -> str:
    """What transformers' loss makes of a logit."""
    problems = {"multi_label_classification": "sigmoid", "single_label_classification": "softmax"}
    problem = config.text("problem_type", "single_label_classification")
    if problem not in problems:
        raise config.wrong("problem_type", f"one of {', '.join(problems)}: a head of another kind does not classify")
    return problems[problem]


def _number_or_list(size: Sequence[int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _export(description: Description, ours: Flat) -> dict[str, Any]:
    """config.json and preprocessor_config.json of transformers. Raises UserError for what its ViT cannot express."""
    model, transformer = description.model, description.model["transformer"]
    dinov2 = bool(transformer.get("layer_scale"))
    distilled = "dist" in ours
    kind = ("dinov2_with_registers" if model.get("num_registers") else "dinov2") if dinov2 else "deit" if distilled else "vit"
    _check_expressible(model, description.grid, kind)
    names, head = description.class_names, "head/kernel" in ours
    size = description.native_size
    if not dinov2 and tuple(size) != tuple(description.image_size):
        raise UserError(
            f"transformers' {kind} takes images of {size} alone, as its position embeddings are for, and this model has "
            f"{description.image_size}: convert with --to=npz"
        )
    config = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind][head]],
        "hidden_size": model["hidden_size"],
        "num_hidden_layers": transformer["num_layers"],
        "num_attention_heads": transformer["num_heads"],
        "image_size": _number_or_list(size),
        "patch_size": _number_or_list(model["patches"]["size"]),
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": THEIR_ACTIVATIONS.get(transformer.get("activation", "gelu_tanh"), "gelu"),
        "layer_norm_eps": transformer.get("norm_eps", 1e-6),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
    }
    if dinov2:
        config |= {"mlp_ratio": _ratio(model), "use_swiglu_ffn": transformer.get("activation") == "swiglu"}
        config |= {"layerscale_value": 1.0, "drop_path_rate": 0.0}
        config |= {"num_register_tokens": model["num_registers"]} if model.get("num_registers") else {}
    else:
        config |= {"intermediate_size": transformer["mlp_dim"]}
    if head:
        config |= {
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
    if head and description.head == "sigmoid":
        config |= {"problem_type": "multi_label_classification"}
    return {"config.json": config, "preprocessor_config.json": hf_pixels.write(description, kind)}


_ARCHITECTURES = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTModel", "DeiTForImageClassificationWithTeacher"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
}


def _ratio(model: Mapping[str, Any]) -> int:
    """DINOv2's mlp_ratio, a whole number; a SwiGLU's is that of the MLP with as many parameters."""
    transformer = model["transformer"]
    wide = 1.5 if transformer.get("activation") == "swiglu" else 1
    return round(wide * transformer["mlp_dim"] / model["hidden_size"])


def _hidden(ratio: int, d: int, swiglu: bool) -> int:
    return (int(ratio * d * 2 / 3) + 7) // 8 * 8 if swiglu else ratio * d


def _check_expressible(model: Mapping[str, Any], grid: Sequence[int], kind: str) -> None:
    transformer = model["transformer"]
    classifier, dinov2 = model.get("classifier", "token"), kind.startswith("dinov2")
    scored = {"vit": "token", "deit": "distilled"}.get(kind, "cls_mean")
    without_head = ("distilled",) if kind == "deit" else ("token", "cls_mean")
    swiglu, d = transformer.get("activation") == "swiglu", model["hidden_size"]
    faults = {
        f"classifier={classifier}": classifier not in ((scored,) if model.get("num_classes") else without_head),
        "a head on several blocks": model.get("head_layers", 1) > 1 and model.get("num_classes"),
        "resnet": model.get("resnet") is not None,
        "fc_norm": model.get("fc_norm"),
        "qk_norm": transformer.get("qk_norm"),
        "norm_pre": transformer.get("norm_pre"),
        "no bias of patches or head": not (model.get("patch_bias", True) and model.get("head_bias", True)),
        f"position_embedding={model.get('position_embedding')}": model.get("position_embedding", "learned") != "learned",
        "representation_size with a head": model.get("representation_size") and model.get("num_classes"),
        "registers without LayerScale": model.get("num_registers") and not dinov2,
        "SwiGLU without LayerScale": swiglu and not dinov2,
        "pre_logits with LayerScale": model.get("representation_size") and dinov2,
        f"mlp_dim={transformer['mlp_dim']}": dinov2 and transformer["mlp_dim"] != _hidden(_ratio(model), d, swiglu),
        "a grid that is not square with LayerScale": dinov2 and len(set(grid)) > 1,
    }
    if wrong := [name for name, fault in faults.items() if fault]:
        raise UserError(f"transformers' {kind} cannot express {', '.join(wrong)}: convert with --to=timm or --to=npz")


def _rename(name: str, ours: Flat) -> str:
    """Adds the prefix that models with a head have."""
    if "head/kernel" not in ours:
        return name
    layer_scale = any(n.endswith("/ls1/gamma") for n in ours)
    distilled = "dist" in ours
    if name.startswith(("classifier.", "distillation_classifier.")):
        return f"cls_{name}" if distilled and name.startswith("classifier.") else name
    registers = "_with_registers" if "register_tokens" in ours else ""
    return f"{f'dinov2{registers}' if layer_scale else 'deit' if distilled else 'vit'}.{name}"


_BOTH = {"normalize": _strip, "export": _export, "rename": _rename}
VIT = Family("Hugging Face ViT", lambda swiglu: _VIT, _vit_facts, fold=_fold_vit, **_BOTH)
DINOV2 = Family("Hugging Face DINOv2", _dinov2_rules, _dinov2_facts, unfold=with_mask_token, **_BOTH)
