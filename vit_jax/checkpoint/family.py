"""What every family of checkpoints has in common: what is said of its model, and how its tokens are folded into ours."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vit_jax.checkpoint import rules
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import Entries
from vit_jax.checkpoint.rules import Flat, Rule
from vit_jax.errors import UserError

BLOCK = "Transformer/encoderblock_{i}"
ATTENTION = f"{BLOCK}/MultiHeadDotProductAttention_1"
POSITIONS = "Transformer/posembed_input/pos_embedding"
PROBE = "MAPHead_0/MultiHeadDotProductAttention_0"
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Ours by transformers' names."""
THEIR_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
HALF = ((127.5,) * 3, (127.5,) * 3)
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""Mean and standard deviation of the 0..255 pixels, by channel."""


@dataclass(frozen=True)
class Facts:
    """What a file says of its model.

    Attributes:
      model: the fields of `models.build`.
      image_size: (h, w) that the position embeddings are for; None if unknown.
      resize: the rule for position embeddings, see `POSITION_RULES`.
      input_size: (h, w) that photos become, where that is another size.
      assumed: what the file does not say and is taken for granted, to be told.
      the others: see `describe.Description`.
    """

    model: dict[str, Any]
    image_size: tuple[int, int] | None
    resize: str
    mean: tuple[float, ...] = HALF[0]
    std: tuple[float, ...] = HALF[1]
    class_names: tuple[str, ...] | None = None
    model_type: str = "ViT"
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    head: str = "softmax"
    input_size: tuple[int, int] | None = None
    assumed: tuple[str, ...] = ()


POSITION_RULES = {
    "Google npz": "bilinear",
    "Hugging Face ViT": "bicubic",
    "Hugging Face DINOv2": "bicubic",
    "Hugging Face DINOv2 with registers": "bicubic_antialias",
    "timm ViT": "bicubic_antialias",
    "DeiT III": "bicubic",
    "DINOv2": "bicubic_offset",
    "DINOv2 with registers": "bicubic_antialias",
}
"""How each project resamples position embeddings to another grid, see `resize.resize`: files of a kind follow it."""


class Written(NamedTuple):
    """A model in the layout of others.

    Attributes:
      arrays: by their names.
      files: the JSON content of the files beside, by name.
      tokens: the kind of tokenizer whose files go along, see `token_files`.
    """

    arrays: Flat
    files: Mapping[str, Any] = {}
    tokens: str | None = None


@dataclass(frozen=True)
class Family:
    """One project's layout of a ViT.

    Attributes:
      rules: the table, which depends on whether the MLPs are SwiGLU.
      facts: (their flat names and arrays, their config.json, their preprocessor_config.json) → what they say of the model.
      normalize: undoes prefixes and variants, so that the table's names remain.
      fold, unfold: between their tokens in front of the patches and ours (`fold_tokens`).
      export: (our description, our flat parameters) → their config files by name; None if the family is only read.
      rename: (their name, our flat parameters) → the name with the prefix that it has in such a file.
    """

    name: str
    rules: Callable[[bool], tuple[Rule, ...]]
    facts: Callable[[Flat, Entries, Entries], Facts]
    normalize: Callable[[Flat], Flat] = dict
    fold: Callable[[Flat, Facts], Flat] = lambda flat, facts: flat
    unfold: Callable[[Flat], Flat] = dict
    export: Callable[[Description, Flat], dict[str, Any]] | None = None
    rename: Callable[[str, Flat], str] = lambda name, ours: name

    def write(self, description: Description, flat: Flat) -> Written:
        """A ViT in this layout. Raises UserError for what it has no place for."""
        files = self.export(description, flat)
        return Written(self.arrays(description.model["transformer"], flat), files)

    def arrays(self, transformer: Mapping[str, Any], flat: Flat) -> Flat:
        """The parameters of a ViT with these fields, under the names of this layout."""
        ours = self.unfold(flat)
        table = self.rules(transformer.get("activation") == "swiglu")
        theirs = rules.write(table, ours, blocks=transformer["num_layers"], where=self.name)
        return {self.rename(name, ours): x for name, x in theirs.items()}


def vit_fields(**changes: Any) -> dict[str, Any]:
    """Model fields with every optional one at the published default; `transformer` is merged."""
    transformer = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0} | changes.pop("transformer")
    base = {"model_name": None, "classifier": "token", "representation_size": None, "resnet": None}
    return base | changes | {"transformer": transformer}


def fold_tokens(flat: Flat, *, cls: str, registers: str, positions: str, patches: int, drop_cls: bool) -> Flat:
    """Brings the tokens in front of the patches into our form: positions for the class token and the patches alone.

    A position embedding belongs to its token for good, so a register's can be added to the register itself, and a class
    token that no head reads (`drop_cls`) is one more register. A class token without a position gets one of zeros.
    """
    flat = dict(flat)
    table = flat[positions]
    extra = table.shape[1] - patches
    count = (cls in flat) + (flat[registers].shape[1] if registers in flat else 0)
    if extra not in (0, int(cls in flat), count):
        raise UserError(f"{table.shape[1]} position embeddings fit neither {patches} patches nor {patches + count} tokens")
    if registers in flat and extra == count > int(cls in flat):
        first = int(cls in flat)
        flat[registers] = flat[registers] + table[:, first:count]
        table = np.concatenate([table[:, :first], table[:, count:]], axis=1)
        extra = first
    if drop_cls and cls in flat:
        token = flat.pop(cls) + (table[:, :1] if extra else 0)
        flat[registers] = np.concatenate([token, *([flat[registers]] if registers in flat else [])], axis=1)
        table = table[:, extra:]
    elif cls in flat and not extra:
        table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    flat[positions] = table
    return flat


def with_mask_token(ours: Flat) -> Flat:
    """DINOv2 learns a token for masked patches, which no use of the model needs: zeros where ours has none."""
    d = ours["cls"].shape[-1]
    return {"extras/mask_token": np.zeros((1, d), ours["cls"].dtype)} | ours


def with_packed_biases(flat: Flat) -> Flat:
    """Projections without a bias are those with one of zeros: adds it where queries, keys and values are packed."""
    weights = {name: len(x) for name, x in flat.items() if name.endswith(".attn.qkv.weight")}
    return {name.replace("weight", "bias"): np.zeros(n, np.float32) for name, n in weights.items()} | flat


def without_zero_biases(ours: Flat) -> Flat:
    """Leaves out the biases of queries, keys and values, if all of them are zeros."""
    biases = [name for name in ours if re.search(r"encoderblock_\d+/.*/(query|key|value)/bias$", name)]
    left_out = () if any(ours[name].any() for name in biases) else biases
    return {name: x for name, x in ours.items() if name not in left_out}


def square_side(n: int, where: str) -> int:
    """The side of a square of n patches. Raises UserError if there is none."""
    side = round(n**0.5)
    if side * side != n:
        raise UserError(f"{where} holds {n} patch positions, which are no square, and no config that tells their grid")
    return side


def count_blocks(flat: Mapping[str, Any], before: str) -> int:
    """How many blocks are numbered behind `before`, as in `blocks.11.norm1.weight`."""
    numbers = {int(name.removeprefix(before).split(".")[0]) for name in flat if name.startswith(before)}
    if numbers != set(range(len(numbers))):
        raise UserError(f"the blocks are numbered {sorted(numbers)}: some are missing")
    return len(numbers)
