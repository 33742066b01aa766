"""EoMT as transformers saves it (`EomtForUniversalSegmentation`), in and out."""

from pathlib import Path

import numpy as np

from vit_jax.checkpoint import rules
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import folder_of, read_object
from vit_jax.checkpoint.family import ATTENTION, BLOCK, IMAGENET, POSITIONS, Written, count_blocks, square_side
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat, Rule, Transform, rule
from vit_jax.errors import UserError

# Only patches have positions there: that of our class token is zeros when it is read, and added to the token when written.
_POSITIONS = Transform(
    lambda arrays, heads: [np.concatenate([np.zeros_like(arrays[0][:1]), arrays[0]])[None]], lambda arrays: [arrays[0][0, 1:]]
)
# Ours is (in, 2, 2, out), theirs (in, out, 2, 2), with one bias for all four places.
_UPSCALING = Transform(
    lambda arrays, heads: [arrays[0].transpose(0, 2, 3, 1)], lambda arrays: [arrays[0].transpose(0, 3, 1, 2)]
)
_REPEATED = Transform(lambda arrays, heads: [np.tile(arrays[0], (2, 2, 1))], lambda arrays: [arrays[0][0, 0]])
_SWITCH = "attn_mask_probs"
_LOSS = "criterion.empty_weight"


def _rules(doublings: int) -> tuple[Rule, ...]:
    block, attention, theirs = f"backbone/{BLOCK}", f"backbone/{ATTENTION}", "layers.{i}"
    table = [
        rule("backbone/cls", "embeddings.cls_token"),
        rule("backbone/register_tokens", "embeddings.register_tokens"),
        rule(f"backbone/{POSITIONS}", "embeddings.position_embeddings.weight", _POSITIONS),
        rule("backbone/embedding/kernel", "embeddings.patch_embeddings.projection.weight", rules.CONVOLUTION),
        rule("backbone/embedding/bias", "embeddings.patch_embeddings.projection.bias"),
        *rules.block(block, theirs, rules.attention(attention, f"{theirs}.attention"), ("norm1", "norm2")),
        *(rule(f"{block}/ls{k}/gamma", f"{theirs}.layer_scale{k}.lambda1") for k in (1, 2)),
        *rules.norm("backbone/Transformer/encoder_norm", "layernorm"),
        rule("query", "query.weight"),
        *(r for k in range(3) for r in rules.dense(f"mask_head_{k}", f"mask_head.fc{k + 1}")),
        *rules.dense("class_predictor", "class_predictor"),
    ]
    for k in range(doublings):
        ours, theirs = f"doubling_{k}", f"upscale_block.block.{k}"
        table += [
            rule(f"{ours}/conv1/kernel", f"{theirs}.conv1.weight", _UPSCALING),
            rule(f"{ours}/conv1/bias", f"{theirs}.conv1.bias", _REPEATED),
            rule(f"{ours}/conv2/kernel", f"{theirs}.conv2.weight", rules.CONVOLUTION),
            *rules.norm(f"{ours}/norm", f"{theirs}.layernorm2d"),
        ]
    return tuple(table)


def open_eomt(path: Path, arrays: Flat) -> Opened | None:
    """The EoMT in a file's arrays, with the `config.json` beside it; None for other models. Raises UserError."""
    if not {"query.weight", "class_predictor.weight", "mask_head.fc1.weight"} <= arrays.keys():
        return None
    config = read_object(folder_of(path) / "config.json")
    if np.any(arrays.get(_SWITCH, 0)):
        raise UserError(
            f"{path}: {_SWITCH} are above 0, so that attention is masked as in the midst of training; "
            "finish its training, which sets them to 0: here attention sees everything"
        )
    if (activation := config.text("hidden_act", "gelu")) != "gelu":
        raise UserError(f"{path}: hidden_act={activation} in config.json is not supported, only gelu")
    width, _, p, q = arrays["embeddings.patch_embeddings.projection.weight"].shape
    layers, doublings = count_blocks(arrays, "layers."), _count_doublings(arrays)
    heads = config.whole("num_attention_heads", max(1, width // 64))
    classes = arrays["class_predictor.weight"].shape[0] - 1
    theirs = {name: x for name, x in arrays.items() if name not in (_SWITCH, _LOSS)}
    flat = rules.read(_rules(doublings), theirs, blocks=layers, heads=heads, where=str(path))
    side = square_side(len(arrays["embeddings.position_embeddings.weight"]), str(path))
    transformer = {
        "num_layers": layers,
        "num_heads": heads,
        "mlp_dim": arrays["layers.0.mlp.fc1.weight"].shape[0],
        "activation": "gelu",
        "norm_eps": config.number("layer_norm_eps", 1e-6, 1e-12, 1),
        "layer_scale": True,
        "dropout_rate": 0.0,
        "attention_dropout_rate": 0.0,
    }
    body = {
        "hidden_size": width,
        "patches": {"size": (p, q)},
        "num_registers": arrays["embeddings.register_tokens"].shape[1],
        "classifier": "token",
        "transformer": transformer,
    }
    labels = config.object("id2label", {}).content
    return Opened(
        path,
        "Hugging Face EoMT",
        flat,
        Description(
            model_name=path.stem,
            model_type="EoMT",
            model={
                "body": {"vit": body},
                "num_classes": classes,
                "num_queries": len(arrays["query.weight"]),
                "num_blocks": config.whole("num_blocks", 4),
                "num_doublings": doublings,
            },
            image_size=(side * p, side * q),
            grid=(side, side),
            mean=IMAGENET[0],
            std=IMAGENET[1],
            class_names=tuple(str(labels.get(str(i), f"class {i}")) for i in range(classes)),
            task={"type": "segment"},
        ),
    )


def _count_doublings(arrays: Flat) -> int:
    prefix = "upscale_block.block."
    return count_blocks(arrays, prefix) if any(name.startswith(prefix) for name in arrays) else 0


def write_eomt(opened: Opened) -> Written:
    """An EoMT in transformers' names. Raises UserError for a ViT that it has no place for."""
    fields, names = opened.description.model, opened.description.class_names
    body = fields["body"]["vit"]
    transformer, grid, (p, q) = body["transformer"], opened.description.grid, body["patches"]["size"]
    faults = {
        "a grid that is not square": grid[0] != grid[1] or p != q,
        "an activation other than gelu": transformer.get("activation", "gelu_tanh") != "gelu",
        "no LayerScale": not transformer.get("layer_scale"),
        "no learned positions": body.get("position_embedding", "learned") != "learned",
        "an MLP that is no whole number of times as wide": bool(transformer["mlp_dim"] % body["hidden_size"]),
        "a ResNet": bool(body.get("resnet")),
    }
    if wrong := [name for name, fault in faults.items() if fault]:
        raise UserError(f"transformers' EoMT has no place for {', '.join(wrong)}: convert with --to=npz")
    doublings, num_blocks = fields.get("num_doublings", 2), fields.get("num_blocks", 4)
    ours = {name: x for name, x in opened.flat.items() if not name.startswith("extras/")}
    ours["backbone/cls"] = ours["backbone/cls"] + ours[f"backbone/{POSITIONS}"][:, :1]
    theirs = rules.write(_rules(doublings), ours, blocks=transformer["num_layers"], where="transformers' EoMT")
    config = {
        "model_type": "eomt",
        "architectures": ["EomtForUniversalSegmentation"],
        "hidden_size": body["hidden_size"],
        "num_hidden_layers": transformer["num_layers"],
        "num_attention_heads": transformer["num_heads"],
        "mlp_ratio": transformer["mlp_dim"] // body["hidden_size"],
        "layer_norm_eps": transformer.get("norm_eps", 1e-6),
        "hidden_act": "gelu",
        "image_size": grid[0] * p,
        "patch_size": p,
        "num_register_tokens": body.get("num_registers", 0),
        "num_queries": fields.get("num_queries", 100),
        "num_blocks": num_blocks,
        "num_upscale_blocks": doublings,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    of_training = {_SWITCH: np.zeros(num_blocks, np.float32), _LOSS: np.array([1.0] * len(names) + [0.1], np.float32)}
    return Written(theirs | of_training, {"config.json": config})
