"""Google's .npz files: what their names and shapes say of the model. Our own layout is theirs.

Files of big_vision differ in a few forms, which `normalize` undoes: prefixes, position embeddings outside `Transformer` and
of the patches alone, and encoder blocks stacked along a first axis.
"""

import math
import re
from typing import Any

import numpy as np

from vit_jax.checkpoint.family import POSITION_RULES, POSITIONS, Facts, square_side, vit_fields
from vit_jax.checkpoint.npz import canonical
from vit_jax.checkpoint.rules import Flat
from vit_jax.models import resnet

RULE = POSITION_RULES["Google npz"]
_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/")


def normalize(flat: Flat) -> Flat:
    """A file's flat names and arrays → the published layout with old layer names."""
    for prefix in ("opt/target/", "params/", "img/"):
        if any(name.startswith(prefix) for name in flat):
            flat = {name.removeprefix(prefix): x for name, x in flat.items() if name.startswith(prefix)}
    flat = canonical(unstack(flat))
    if "pos_embedding" in flat:
        table = flat.pop("pos_embedding")
        slot = [np.zeros_like(table[:, :1])] if "cls" in flat else []
        flat[POSITIONS] = np.concatenate([*slot, table], axis=1)
    return flat


def facts(flat: Flat, *_: Any) -> Facts:
    """Everything but the class names stands in the shapes; where the grid can be square, it is."""
    classes = flat["head/kernel"].shape[-1] if "head/kernel" in flat else None
    if "stem/kernel" in flat:
        return _mixer_facts(flat, classes)
    p, q, _, d = flat["embedding/kernel"].shape
    query = flat["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"]
    units: dict[int, set[str]] = {}
    for match in filter(None, (re.match(r"block(\d+)/(unit\d+)/", name) for name in flat)):
        units.setdefault(int(match[1]), set()).add(match[2])
    hybrid = "conv_root/kernel" in flat
    backbone = {
        "num_layers": tuple(len(units[i]) for i in sorted(units)),
        "width_factor": _whole(flat["conv_root/kernel"].shape[-1] / 64) if hybrid else 1,
    }
    pooled = "map" if "MAPHead_0/probe" in flat else "token" if "cls" in flat else "gap"
    model = vit_fields(
        num_classes=classes,
        hidden_size=d,
        patches={"size": (p, q)},
        resnet=backbone if hybrid else None,
        representation_size=flat["pre_logits/kernel"].shape[-1] if "pre_logits/kernel" in flat else None,
        classifier=pooled,
        position_embedding="learned" if POSITIONS in flat else "sincos2d",
        transformer={
            "num_layers": len({match[1] for match in map(_BLOCK.match, flat) if match}),
            "mlp_dim": flat["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"].shape[-1],
            "num_heads": query.shape[1],
        },
    )
    stride = resnet.stride(units) if hybrid else 1
    if POSITIONS not in flat:
        return Facts(model, (224, 224), RULE)
    n = flat[POSITIONS].shape[1] - ("cls" in flat)
    side = math.isqrt(n)
    return Facts(model, (side * p * stride, side * q * stride) if side * side == n else None, RULE)


def _whole(x: float) -> float:
    return int(x) if x == int(x) else x


def _mixer_facts(flat: Flat, classes: int | None) -> Facts:
    p, q, _, d = flat["stem/kernel"].shape
    tokens, tokens_mlp_dim = flat["MixerBlock_0/token_mixing/Dense_0/kernel"].shape
    side = square_side(tokens, "the file")
    model = {
        "model_name": None,
        "patches": {"size": (p, q)},
        "num_classes": classes,
        "hidden_dim": d,
        "num_blocks": len({name.split("/")[0] for name in flat if name.startswith("MixerBlock_")}),
        "tokens_mlp_dim": tokens_mlp_dim,
        "channels_mlp_dim": flat["MixerBlock_0/channel_mixing/Dense_0/kernel"].shape[-1],
    }
    return Facts(model, (side * p, side * q), RULE, model_type="Mixer")


def unstack(flat: Flat) -> Flat:
    """`Transformer/encoderblock/NAME` of shape (blocks, …) → `Transformer/encoderblock_i/NAME`."""
    result = {}
    for name, x in flat.items():
        before, found, after = name.partition("/encoderblock/")
        result |= {f"{before}/encoderblock_{i}/{after}": part for i, part in enumerate(x)} if found else {name: x}
    return result
