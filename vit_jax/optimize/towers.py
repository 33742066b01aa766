"""The models within a tree of parameters, by the names alone: one, or several towers under prefixes such as `img/`.

What a name means within its tower is told by the tower's `models.Architecture`.
"""

import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from vit_jax.errors import UserError
from vit_jax.models import ARCHITECTURES
from vit_jax.models.architecture import Architecture

log = logging.getLogger("vit_jax")
Tree = Any
Towers = Mapping[str, Architecture]
"""Kinds of models by the prefix of their parameters, "" or such as "img/"."""
NumLayers = int | Mapping[str, int]
"""The number of blocks of the only tower, or that of each tower by its name, such as {"img": 12}."""
_LORA = "lora/"


def find(names: Iterable[str]) -> Towers:
    """The models in a tree, which the names of their blocks tell. LoRA's parts belong to the block that they change."""
    towers = {}
    for name in names:
        parts = name.removeprefix(_LORA).split("/")
        for i in range(len(parts)):
            inner = "/".join(parts[i:])
            if kind := next((kind for kind in ARCHITECTURES.values() if kind.is_block(inner)), None):
                towers["".join(f"{part}/" for part in parts[:i])] = kind
                break
    return towers


def _place(name: str, towers: Towers) -> tuple[str, str] | None:
    """(prefix of the tower that a parameter belongs to, its name within it), or None."""
    name = name.removeprefix(_LORA)
    prefix = max((prefix for prefix in towers if name.startswith(prefix)), key=len, default=None)
    return None if prefix is None else (prefix, name.removeprefix(prefix))


def in_block(name: str, towers: Towers) -> bool:
    """Whether a parameter belongs to a block of some tower."""
    place = _place(name, towers)
    return place is not None and towers[place[0]].is_block(place[1])


def warn_of_unknown_kernels(names: Iterable[str], towers: Towers, what_follows: str) -> None:
    """A warning of the kernels that no rule gives a layer, if there are any."""

    def known(name: str) -> bool:
        place = _place(name, towers)
        return place is not None and towers[place[0]].layer_of(place[1], 0) is not None

    unknown = tuple(name.removesuffix("/kernel") for name in names if name.endswith("/kernel") and not known(name))
    if unknown:
        _warn_once(unknown, what_follows)


@functools.cache  # however often a step is traced
def _warn_once(layers: tuple[str, ...], what_follows: str) -> None:
    more = f" and {len(layers) - 5} more" if len(layers) > 5 else ""
    log.warning("optim    no architecture's rules know %s%s: %s", ", ".join(layers[:5]), more, what_follows)


def layers_behind(names: Sequence[str], num_layers: NumLayers) -> dict[str, int]:
    """How many layers of its tower lie behind each parameter's own: the exponent of layer decay.

    It is 0 for what follows the blocks, for what no rule knows, and for towers that `num_layers` does not name.
    """
    towers = find(names)
    depths = _depths(towers, num_layers)
    warn_of_unknown_kernels(names, towers, "layer_decay leaves their rate as it is, as of what follows the blocks")

    def behind(name: str) -> int:
        prefix, inner = _place(name, towers) or (None, name)
        if prefix not in depths:
            return 0
        n = depths[prefix]
        layer = towers[prefix].layer_of(inner, n)
        if layer is None:
            return 0
        if layer > n and towers[prefix].is_block(inner):
            raise UserError(f"layer_decay: {name} lies in block {layer - 1} of a model of {n} blocks")
        return n + 1 - layer

    return {name: behind(name) for name in names}


def _depths(towers: Towers, num_layers: NumLayers) -> dict[str, int]:
    if not towers:
        raise UserError("layer_decay finds no block such as Transformer/encoderblock_0 among what is trained")
    if not isinstance(num_layers, int):
        return {f"{name}/" if name else "": n for name, n in num_layers.items()}
    if len(towers) > 1:
        raise UserError(f"layer_decay needs the number of blocks by tower, not {num_layers}, for {', '.join(sorted(towers))}")
    return dict.fromkeys(towers, num_layers)


def parts(names: Iterable[str], towers: Towers) -> list[str]:
    """The blocks and other parts of models that parameters belong to."""

    def part(name: str) -> str:
        lora = _LORA if name.startswith(_LORA) else ""
        prefix, inner = _place(name, towers) or ("", name.removeprefix(_LORA))
        return lora + prefix + re.match("(Transformer/)?[^/]+", inner)[0]

    return list(dict.fromkeys(map(part, names)))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_with_names(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """function(name, leaf) of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, x: function(_name(path), x), tree)


def flat(tree: Tree) -> dict[str, Any]:
    """The leaves by name, such as "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"."""
    return {_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
