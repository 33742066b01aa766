"""timm's ViTs, and the official DINOv2 files, whose names differ from timm's in a few places only."""

import dataclasses
import logging
import math
import re
from typing import Any

import numpy as np

from vit_jax.checkpoint import rules
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import Entries
from vit_jax.checkpoint.family import (
    ATTENTION,
    BLOCK,
    HALF,
    IMAGENET,
    POSITION_RULES,
    POSITIONS,
    PROBE,
    Facts,
    Family,
    count_blocks,
    fold_tokens,
    square_side,
    vit_fields,
    with_mask_token,
    with_packed_biases,
    without_zero_biases,
)
from vit_jax.checkpoint.rules import Flat, Rule, rule
from vit_jax.errors import UserError, printable

log = logging.getLogger("vit_jax")

_UNTOLD = re.compile("tips|radio|base_patch16_gap")  # other activations, heads or epsilons than other ViTs
SIGLIP_TANH = re.compile(r"base_patch32_siglip|large_patch16_siglip_(gap_)?512|so400m_patch16_siglip|giantopt_.*siglip")
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "gelu_approx": "gelu_tanh", "quick_gelu": "quick_gelu"}


def _rules(registers: str, mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")) -> tuple[Rule, ...]:
    theirs = "blocks.{i}"
    return (
        rule("cls", "cls_token"),
        rule("dist", "dist_token"),
        rule("register_tokens", registers),
        rule(POSITIONS, "pos_embed"),
        *rules.patch_embedding("patch_embed.proj"),
        *rules.norm("Transformer/norm_pre", "norm_pre"),
        *rules.block(BLOCK, theirs, rules.qkv_attention(ATTENTION, f"{theirs}.attn"), ("norm1", "norm2"), mlp),
        *rules.norm(f"{ATTENTION}/query_ln", f"{theirs}.attn.q_norm"),
        *rules.norm(f"{ATTENTION}/key_ln", f"{theirs}.attn.k_norm"),
        *(rule(f"{BLOCK}/ls{k}/gamma", f"{theirs}.ls{k}.gamma") for k in (1, 2)),
        *rules.norm("Transformer/encoder_norm", "norm"),
        rule("MAPHead_0/probe", "attn_pool.latent"),
        *rules.projection(f"{PROBE}/query", "attn_pool.q"),
        *rules.packed_projections(PROBE, "attn_pool.kv", ("key", "value")),
        *rules.output(f"{PROBE}/out", "attn_pool.proj"),
        *rules.norm("MAPHead_0/LayerNorm_0", "attn_pool.norm"),
        *rules.dense("MAPHead_0/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1"),
        *rules.dense("MAPHead_0/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2"),
        *rules.norm("fc_norm", "fc_norm"),
        *rules.dense("pre_logits", "pre_logits.fc"),
        *rules.dense("head", "head"),
        *rules.dense("head_dist", "head_dist"),
        rule("extras/mask_token", "mask_token"),
    )


TABLE = _rules("reg_token")  # a SwiGLU's gate and value are packed in fc1 there
_DINOV2 = _rules("register_tokens")
_DINOV2_SWIGLU = _rules("register_tokens", ("mlp.w12", "mlp.w3"))


def _sizes(flat: Flat, heads: int | None) -> dict[str, Any]:
    """Model fields that the shapes tell; without `heads`, those of the published models of this width."""
    d, _, p, q = flat["patch_embed.proj.weight"].shape
    second = next(flat[n] for n in ("blocks.0.mlp.fc2.weight", "blocks.0.mlp.w3.weight") if n in flat)
    first = next(flat[n] for n in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.w12.weight") if n in flat)
    swiglu = first.shape[0] == 2 * second.shape[1]
    heads = heads or _published_heads(d)
    if heads < 1 or d % heads:
        raise UserError(f"a ViT of width {d}, and no config.json beside it tells how many heads it has")
    return {
        "hidden_size": d,
        "patches": {"size": (p, q)},
        **({} if "patch_embed.proj.bias" in flat else {"patch_bias": False}),
        "transformer": {
            "num_layers": count_blocks(flat, "blocks."),
            "num_heads": heads,
            "mlp_dim": second.shape[1],
            "activation": "swiglu" if swiglu else "gelu",
            **({} if "blocks.0.norm1.bias" in flat else {"norm": "rms"}),
            "norm_eps": 1e-6,
            "layer_scale": "blocks.0.ls1.gamma" in flat,
            "qk_norm": "blocks.0.attn.q_norm.weight" in flat,
            "norm_pre": "norm_pre.weight" in flat,
        },
    }


def _named_heads(architecture: str, d: int) -> int | None:
    """The heads of timm's models of width d that are others than `_published_heads` has them."""
    if architecture.startswith("test_vit"):
        return d // 32
    return 16 if "giantopt" in architecture or "base_patch16_gap" in architecture else None


def _published_heads(d: int) -> int:
    return 16 if d in (1152, 1280, 1408, 1664) else d // 64  # so400m, H, g and G; the others have heads of 64


def _timm_facts(flat: Flat, config: Entries, _: Entries) -> Facts:
    args = config.object("model_args", {})
    cfg = config.object("pretrained_cfg") if "pretrained_cfg" in config else config
    architecture = config.text("architecture", "")
    if not args.content and _UNTOLD.search(architecture):
        raise UserError(f"{printable(architecture)} is another model than its shapes tell, and config.json lacks model_args")
    sizes = _sizes(flat, args.whole("num_heads", _named_heads(architecture, flat["patch_embed.proj.weight"].shape[0])))
    transformer = sizes["transformer"]
    activation = args.get("act_layer") or _activation(architecture)
    norm = "rmsnorm" if "norm" in transformer else "layernorm"
    if args.get("norm_layer") not in (None, norm):
        raise args.wrong("norm_layer", f"{norm}, as the parameters are, without options")
    of_clip = "_clip_" in architecture or (transformer["norm_pre"] and not architecture)
    if of_clip and norm == "layernorm":
        transformer["norm_eps"] = 1e-5
    if transformer["activation"] == "gelu" and activation not in (None, *_ACTIVATIONS):
        raise UserError(f"act_layer={activation!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    if transformer["activation"] == "gelu" and activation:
        transformer["activation"] = _ACTIVATIONS[activation]
    usual = "avg" if "fc_norm.weight" in flat else "map" if "attn_pool.latent" in flat else "token"
    pool = args.get("global_pool") or config.get("global_pool") or usual
    if pool not in ("token", "avg", "map", "") or args.get("pool_include_prefix"):
        raise UserError(f"pooling by {pool!r}, or over all tokens, is not supported, only 'token', 'map' and 'avg' of patches")
    if pool == "map" and any(name in flat for name in ("cls_token", "reg_token")):
        raise UserError("global_pool='map' asks for patches alone there, here for all tokens: with others it is not supported")
    distilled = "dist_token" in flat
    pooled = "map" if pool == "map" else "gap" if pool == "avg" or "cls_token" not in flat else "token"
    classifier = "distilled" if distilled else pooled
    registers = flat["reg_token"].shape[1] if "reg_token" in flat else 0
    model = vit_fields(
        **sizes,
        num_classes=flat["head.weight"].shape[0] if "head.weight" in flat else None,
        representation_size=flat["pre_logits.fc.weight"].shape[0] if "pre_logits.fc.weight" in flat else None,
        classifier=classifier,
        fc_norm="fc_norm.weight" in flat,
        num_registers=registers + (classifier == "gap" and "cls_token" in flat),
    )
    size = _image_size(flat, args, cfg, sizes["patches"]["size"], ("cls_token" in flat) + distilled, registers)
    usual = IMAGENET if distilled else HALF
    mean, std = cfg.numbers("mean", None), cfg.numbers("std", None, low=1e-6)
    told = f"{_pixels(usual)} are assumed; --mean and --std, or config.pp's, set others (DeiT, DINO, MAE: ImageNet's)"
    assumed = () if mean and std else (f"no config.json tells mean and std: {told}",)
    if not config.content:
        usual_heads = f"{transformer['num_heads']} heads and {transformer['activation']}, as published models have them"
        assumed += (f"it tells neither heads nor activation: {usual_heads}, are assumed",)
    return Facts(
        model,
        size,
        POSITION_RULES["timm ViT"],
        tuple(255 * x for x in mean) if mean else usual[0],
        tuple(255 * x for x in std) if std else usual[1],
        config.names("label_names", None) or cfg.names("label_names", None),
        preprocessing=_preprocessing(cfg, size) if "input_size" in cfg else {},
        assumed=assumed,
    )


def _activation(architecture: str) -> str | None:
    """What a name of timm says of the activation where nothing else does."""
    return "quick_gelu" if "quickgelu" in architecture else "gelu_tanh" if SIGLIP_TANH.search(architecture) else None


def _pixels(normalisation: tuple) -> str:
    return " and ".join(" ".join(f"{x:g}" for x in dict.fromkeys(part)) for part in normalisation)


def _named_as_timm(flat: Flat) -> Flat:
    """The official DeiT III keeps LayerScale as gamma_1 and gamma_2 of a block."""
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): x for name, x in flat.items()}


def _deit3_facts(flat: Flat, config: Entries, preprocessor: Entries) -> Facts:
    facts = _timm_facts(flat, config, preprocessor)
    if not facts.assumed:
        return facts
    assumed = ("ImageNet's mean and std are assumed, as in its code", *facts.assumed[1:])
    return dataclasses.replace(facts, mean=IMAGENET[0], std=IMAGENET[1], resize=POSITION_RULES["DeiT III"], assumed=assumed)


def _image_size(flat: Flat, args: Entries, cfg: Entries, patch: tuple[int, int], first: int, registers: int) -> tuple[int, int]:
    """The size that the position embeddings are for: as told, if they fit, or else a square."""
    size = args.size("img_size", None)
    if "input_size" in cfg:
        told = cfg.get("input_size")
        if not isinstance(told, list) or len(told) != 3:
            raise cfg.wrong("input_size", "channels, height and width")
        size = size or Entries({"input_size": told[1:]}, cfg.where, cfg.prefix).size("input_size")
    positions = flat["pos_embed"].shape[1]
    prefix = {0, first, first + registers}
    (p, q) = patch
    if size is None or (size[0] // p) * (size[1] // q) not in {positions - n for n in prefix}:
        side = next((n for n in (positions - k for k in sorted(prefix, reverse=True)) if round(n**0.5) ** 2 == n), positions)
        size = (square_side(side, "the file") * p, square_side(side, "the file") * q)
    return size


def _preprocessing(cfg: Entries, size: tuple[int, int]) -> dict[str, Any]:
    """What timm's evaluation does to a photo: the shorter side resized to size / crop_pct, the middle cut out, or squashed."""
    interpolation = cfg.text("interpolation", "bicubic", ("bilinear", "bicubic"))
    mode = cfg.text("crop_mode", "center", ("center", "squash"))
    share = cfg.number("crop_pct", 0.875, 0.05, 1.0)
    scaled = tuple(math.floor(n / share) for n in size)
    resize_to = (None if scaled == size else scaled) if mode == "squash" else min(scaled)
    return {"resize_to": resize_to, "interpolation": interpolation, "antialias": True}


def _crop(description: Description) -> dict[str, Any]:
    """The entries of timm's pretrained_cfg that `_preprocessing` reads. Raises UserError for what they cannot say."""
    size, how = description.image_size, description.preprocessing
    resize_to = how.get("resize_to")
    entries = {"interpolation": how.get("interpolation", "bilinear")}
    if resize_to is None:
        return entries | {"crop_pct": 1.0, "crop_mode": "squash"}
    is_side = isinstance(resize_to, int)
    share = min(size) / ((resize_to if is_side else min(resize_to)) + 0.5)
    entries |= {"crop_pct": share, "crop_mode": "center" if is_side else "squash"}
    if _preprocessing(Entries(entries, "timm"), size)["resize_to"] != resize_to:
        raise UserError(f"timm cannot resize to {resize_to} and cut out {size[0]}x{size[1]}: convert with --to=npz")
    return entries


def _fold(flat: Flat, facts: Facts) -> Flat:
    p, q = facts.model["patches"]["size"]
    patches = (facts.image_size[0] // p) * (facts.image_size[1] // q)
    flat = with_packed_biases(flat)
    if "dist_token" in flat:
        return flat
    return fold_tokens(
        flat,
        cls="cls_token",
        registers="reg_token",
        positions="pos_embed",
        patches=patches,
        drop_cls=facts.model["classifier"] == "gap",
    )


def _dinov2_facts(flat: Flat, config: Entries, _: Entries) -> Facts:
    sizes = _sizes(flat, config.whole("num_attention_heads", None))
    p, q = sizes["patches"]["size"]
    side = square_side(flat["pos_embed"].shape[1] - 1, "the file")
    registers = flat["register_tokens"].shape[1] if "register_tokens" in flat else 0
    model = vit_fields(**sizes, num_classes=None, classifier="cls_mean", num_registers=registers)
    return Facts(model, (side * p, side * q), POSITION_RULES[f"DINOv2{' with registers' if registers else ''}"], *IMAGENET)


def _unchunk(flat: Flat) -> Flat:
    """Training checkpoints of DINOv2 number blocks as `blocks.CHUNK.i.…`, and hold the heads of its losses."""
    kept = {name: x for name, x in flat.items() if not name.startswith(("dino_head.", "ibot_head."))}
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): x for name, x in kept.items()}


def _export_timm(description: Description, ours: Flat) -> dict[str, Any]:
    """config.json as on the hub, for `timm.create_model("local-dir:FOLDER")`. Raises UserError for what timm cannot express."""
    _check_timm(description, has_head="head/kernel" in ours)
    model, transformer = description.model, description.model["transformer"]
    classifier = model.get("classifier", "token")
    p = model["patches"]["size"]
    size, d = description.native_size, model["hidden_size"]
    pool = {"gap": "avg", "map": "map"}.get(classifier, "token")
    activation = transformer.get("activation", "gelu_tanh")
    plain = "vit_base_patch32_clip_224" if transformer.get("norm_pre") else "vit_base_patch16_224"
    architecture = {"swiglu": "vit_giant_patch14_dinov2"}.get(activation, plain)
    hidden = transformer["mlp_dim"] * (2 if activation == "swiglu" else 1)
    args = {
        "img_size": size,
        "patch_size": p[0] if p[0] == p[1] else tuple(p),
        "embed_dim": d,
        "depth": transformer["num_layers"],
        "num_heads": transformer["num_heads"],
        "mlp_ratio": hidden / d if int(d * (hidden / d)) == hidden else (hidden + 0.5) / d,  # timm rounds down
        "class_token": "cls" in ours,
        "global_pool": pool,
        "fc_norm": bool(model.get("fc_norm")),
        "qkv_bias": len(without_zero_biases(ours)) == len(ours),
        "qk_norm": bool(transformer.get("qk_norm")),
        **({"norm_layer": "rmsnorm"} if transformer.get("norm") == "rms" else {}),
        "init_values": 1e-5 if transformer.get("layer_scale") else None,
        "reg_tokens": model.get("num_registers", 0),
    } | ({} if activation == "swiglu" else {"act_layer": activation})
    cfg = {
        "input_size": (3, *size),
        "mean": [x / 255 for x in description.mean],
        "std": [x / 255 for x in description.std],
        **_crop(description),
        "num_classes": model.get("num_classes") or 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if classifier == "distilled" else "head",
    }
    return {
        "config.json": {
            "architecture": "deit_base_distilled_patch16_224" if classifier == "distilled" else architecture,
            "num_classes": model.get("num_classes") or 0,
            "num_features": d,
            "global_pool": pool,
            "label_names": list(description.class_names),
            "model_args": args,
            "pretrained_cfg": cfg,
        }
    }


def _check_timm(description: Description, *, has_head: bool) -> None:
    model, transformer = description.model, description.model["transformer"]
    classifier = model.get("classifier", "token")
    faults = {
        f"classifier={classifier}": classifier not in ("token", "gap", "map", "distilled", "cls_mean"),
        "norm_pre with a bias in front, or neither": bool(transformer.get("norm_pre")) == model.get("patch_bias", True),
        "a head without a bias": not model.get("head_bias", True) and has_head,
        "registers beside a distillation token": classifier == "distilled" and model.get("num_registers"),
        "registers that a probe sees": classifier == "map" and model.get("num_registers"),
        "a head on several blocks": model.get("head_layers", 1) > 1 and has_head,
        "resnet": model.get("resnet") is not None,
        "pre_logits": model.get("representation_size"),
        "a head of sigmoids, one a class": description.head == "sigmoid" and has_head,
        "a head on class token and mean": classifier == "cls_mean" and has_head,
        f"position_embedding={model.get('position_embedding')}": model.get("position_embedding", "learned") != "learned",
    }
    of_clip = transformer.get("norm_pre") and transformer.get("norm", "layer") == "layer"
    eps, usual = transformer.get("norm_eps", 1e-6), 1e-5 if of_clip else 1e-6
    if eps != usual:
        log.warning("timm's norm epsilon is %g, that of this model %g", usual, eps)
    if wrong := [name for name, fault in faults.items() if fault]:
        raise UserError(f"timm's VisionTransformer cannot express {', '.join(wrong)}: convert with --to=npz")


def _unfold(ours: Flat) -> Flat:
    """In timm every token in front has a position, if the class token has: registers get one of zeros."""
    ours = without_zero_biases({name: x for name, x in ours.items() if not name.startswith("extras/")})
    if "register_tokens" in ours:
        first = int("cls" in ours)
        positions = ours[POSITIONS]
        table = [positions[:, :first], np.zeros_like(ours["register_tokens"]), positions[:, first:]]
        ours[POSITIONS] = np.concatenate(table, axis=1)
    return ours


def _export_dinov2(description: Description, ours: Flat) -> dict[str, Any]:
    """The official files tell nothing of themselves; heads that are not of width 64 are told by a config.json beside."""
    model, transformer = description.model, description.model["transformer"]
    faults = {
        "no class token": "cls" not in ours,
        "no LayerScale": not transformer.get("layer_scale"),
        "a head": "head/kernel" in ours,
        "no learned positions": POSITIONS not in ours,
        "tanh GELU": transformer.get("activation", "gelu_tanh") == "gelu_tanh",
        "quick GELU": transformer.get("activation") == "quick_gelu",
        "norm_pre": transformer.get("norm_pre"),
        f"classifier={model.get('classifier')}": model.get("classifier") == "map",
        "q/k norm": transformer.get("qk_norm"),
        "fc_norm": model.get("fc_norm"),
        "a LayerNorm epsilon that is not 1e-6": transformer.get("norm_eps", 1e-6) != 1e-6,
        "a grid that is not square": len(set(description.grid)) > 1,
        "patches that are not square": len(set(model["patches"]["size"])) > 1,
    }
    if wrong := [name for name, fault in faults.items() if fault]:
        raise UserError(f"DINOv2's official layout has no place for a model with {', '.join(wrong)}")
    heads = transformer["num_heads"]
    return {} if heads == _published_heads(model["hidden_size"]) else {"config.json": {"num_attention_heads": heads}}


TIMM = Family("timm ViT", lambda swiglu: TABLE, _timm_facts, fold=_fold, unfold=_unfold, export=_export_timm)
DEIT3 = dataclasses.replace(TIMM, name="DeiT III", normalize=_named_as_timm, facts=_deit3_facts, export=None)
DINOV2 = Family(
    "DINOv2",
    lambda swiglu: _DINOV2_SWIGLU if swiglu else _DINOV2,
    _dinov2_facts,
    normalize=_unchunk,
    unfold=with_mask_token,
    export=_export_dinov2,
)
