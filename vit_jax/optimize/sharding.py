"""How a mesh shares out the state: by a table of rules outside the models."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from vit_jax.errors import UserError, unknown

Rule = tuple[str, str | Sequence[str | None]]

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)

_TENSOR_RULES = (  # heads and hidden units are shared out (Megatron-LM, https://arxiv.org/abs/1909.08053)
    (r"/(query|key|value)/kernel$", (FSDP, TENSOR, None)),
    (r"/(query|key|value)/bias$", (TENSOR, None)),
    (r"/MultiHeadDotProductAttention_\d/out/kernel$", (TENSOR, None, FSDP)),
    (r"/MlpBlock_\d/Dense_0/kernel$", (FSDP, TENSOR)),
    (r"/MlpBlock_\d/Dense_0/bias$", (TENSOR,)),
    (r"/MlpBlock_\d/Dense_1/kernel$", (TENSOR, FSDP)),
)
_WHOLE = tuple((f"^(params|ema|frozen)/.*{p}", [a if a == TENSOR else None for a in axes]) for p, axes in _TENSOR_RULES)
RULES: dict[str, tuple[Rule, ...]] = {
    "fsdp": (*_TENSOR_RULES, ("", FSDP)),
    "zero": (*_WHOLE, ("^(params|ema|frozen)/", ()), *_TENSOR_RULES, ("", FSDP)),
}
"""By name, how a mesh shards: (regular expression searched in a path of the state such as
`params/Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel`, `opt_state/…`, `ema/…`, `grads/…`; axes by dimension). The
first match counts. Instead of axes by dimension an axis alone stands for the largest dimension that it divides, in
anything but a vector. "fsdp" shards all of the state (ZeRO-3), "zero" gradients and optimiser only (ZeRO-2,
https://arxiv.org/abs/1910.02054)."""


def spec_of(path: str, shape: tuple[int, ...], rules: Sequence[Rule], sizes: Mapping[str, int]) -> PartitionSpec:
    """How an array at a path of the state is sharded on a mesh with axes of these sizes, see `RULES`."""
    axes = next((axes for pattern, axes in rules if re.search(pattern, path)), ())
    if isinstance(axes, str):
        fitting = [i for i, n in enumerate(shape) if n % sizes[axes] == 0] if len(shape) > 1 else []
        largest = max(fitting, key=lambda i: shape[i], default=None)
        axes = [axes if i == largest else None for i in range(len(shape))]
    elif len(axes) != len(shape):  # a rule for other shapes, such as those of a factored optimiser state
        axes = []
    parts = [sizes[axis] if axis else 1 for axis in axes]
    spec = [axis if k > 1 and n % k == 0 else None for axis, k, n in zip(axes, parts, shape, strict=False)]
    while spec and spec[-1] is None:  # as JAX writes the shardings of results: equal ones must compare equal
        spec.pop()
    return PartitionSpec(*spec)


def path_of(prefix: str, keys: tuple) -> str:
    """The path of a leaf, with a prefix in front: params/head/kernel."""
    names = (getattr(k, "name", getattr(k, "key", getattr(k, "idx", None))) for k in keys)
    return "/".join([*([prefix] if prefix else []), *map(str, names)])


def check_rule(rule: Any) -> None:
    """Raises UserError for what is no rule of a pattern and axes."""
    try:
        pattern, axes = rule
        re.compile(pattern)
        named = [axes] if isinstance(axes, str) else [axis for axis in axes if axis is not None]
    except (TypeError, ValueError, re.error) as e:
        raise UserError(f"the sharding rule {rule!r} must be (pattern, axes), such as ('head/.*', 'fsdp')") from e
    if len(set(named)) < len(named):
        raise UserError(f"the sharding rule {rule!r} names an axis twice")
    for axis in named:
        if axis not in AXES:
            raise unknown(f"axis of the sharding rule for {pattern!r}", axis, AXES)
