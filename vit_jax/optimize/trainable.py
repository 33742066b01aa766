"""Which parameters are trained: those that a pattern names, or small matrices beside frozen kernels (LoRA).

Both divide a tree of parameters into a trained and a frozen one, and `join` gives the model its tree back. What is frozen
has no gradient and no optimiser state, so that it stays bit for bit the same.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError, unknown

Params = dict[str, Any]
Names = Sequence[str]

_SCALE = "lora/scale"


def split(params: Mapping[str, Any], *, train: Names = (".*",), freeze: Names = ()) -> tuple[Params, Params]:
    """Divides parameters (nested, of arrays or shapes) into (trained, frozen).

    Args:
      train, freeze: regular expressions for whole flat names, such as "head/.*". Trained is what matches one of `train`
        and none of `freeze`.

    Raises:
      UserError: for a pattern that matches nothing, or if nothing is left to train.
    """
    flat = _flat(params)
    trained = _matching(flat, train) - _matching(flat, freeze)
    if not trained:
        raise UserError(f"nothing is left to train: train={list(train)}, freeze={list(freeze)}")
    return _divide(flat, trained)


def add_lora(
    params: Mapping[str, Any],
    key: jax.Array,
    *,
    rank: int,
    alpha: float,
    targets: Names = (".*/(query|value)/kernel",),
    train: Names = ("head/.*",),
) -> tuple[Params, Params]:
    """Freezes a model but for low-rank changes of some kernels: W + alpha/rank · A·B (https://arxiv.org/abs/2106.09685).

    A kernel is the matrix of its linear map, from its input axes to its output axes: A is (inputs…, rank), drawn from
    U(−1/√inputs, 1/√inputs) as the paper's code does, and B is (rank, outputs…), zero, so that the model starts as it was.

    Args:
      targets: regular expressions for the flat names of the kernels to change.
      train: likewise, for parameters that are trained themselves, under their own names.

    Returns:
      trained: {"lora": {…the layer's path…: {"a": A, "b": B}}} and what matches `train`.
      frozen: all the rest, and alpha/rank as "lora/scale".

    Raises:
      UserError: for a pattern that matches nothing, a target that is no kernel or is also in `train`, and a rank above the
        number of a kernel's inputs or outputs.
    """
    if rank < 1 or not 0 < alpha < math.inf:
        raise UserError(f"LoRA needs a rank of at least 1 and an alpha above 0, not rank={rank}, alpha={alpha}")
    flat = _flat(params)
    kernels, others = sorted(_matching(flat, targets)), _matching(flat, train)
    if not kernels:
        raise UserError("LoRA has no targets: name kernels, such as .*/(query|value)/kernel")
    if both := sorted(others.intersection(kernels)):
        raise UserError(f"{both[0]} cannot both be trained itself and be a target of LoRA: narrow one of the patterns")
    lora = {}
    for name, k in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
        inputs, outputs = _sides(name, flat[name].shape, rank)
        bound = math.prod(inputs) ** -0.5
        layer = name.removesuffix("/kernel")
        lora[f"lora/{layer}/a"] = jax.random.uniform(k, (*inputs, rank), minval=-bound, maxval=bound)
        lora[f"lora/{layer}/b"] = jnp.zeros((rank, *outputs))
    trained, frozen = _divide(flat, others)
    return trained | unflatten_dict(lora, sep="/"), frozen | {"lora": {"scale": scale(alpha, rank)}}


def scale(alpha: float, rank: int) -> np.float32:
    """alpha/rank, the factor of A·B."""
    return np.float32(alpha / rank)


def join(trained: Params, frozen: Params | None = None) -> Params:
    """The model's own tree: what is trained and what is frozen, with W + scale · A·B for the kernels of LoRA.

    Pure and jittable. The products are in full float32 on every device, as in `merge`; they and the gradient of a whole
    kernel exist for as long as a step needs them.
    """
    return _join(trained, frozen, functools.partial(jnp.tensordot, axes=1, precision="highest"))


def merge(trained: Params, frozen: Params | None = None) -> Params:
    """`join` of arrays on the host, in NumPy: the parameters of a plain model, to be written to a file."""
    return _join(jax.device_get(trained), jax.device_get(frozen), functools.partial(np.tensordot, axes=1))


def describe(trained: Params, frozen: Params | None = None) -> str:
    """How much is trained, and what that saves; for arrays or shapes."""
    own, rest = _flat(trained), _flat(frozen or {})
    lora = {name: x for name, x in own.items() if name.startswith("lora/")}
    counts = {name: math.prod(x.shape) for name, x in own.items()}
    count, added = sum(counts.values()), sum(counts[name] for name in lora)
    total = count - added + sum(math.prod(x.shape) for name, x in rest.items() if name != _SCALE)
    line = f"{count:,} parameters are trained, {count / total:.2%} of the model's {total:,}"
    if lora:
        a = [x for name, x in lora.items() if name.endswith("/a")]
        line += f": LoRA of rank {a[0].shape[-1]} on {len(a)} kernels has {added:,}"
    return f"{line}\nAdam's two moments in float32 take {8e-6 * count:,.1f} MB instead of {8e-6 * total:,.1f} MB"


def _join(trained: Params, frozen: Params | None, product: Callable[[Any, Any], Any]) -> Params:
    if not frozen:
        return trained
    flat = _flat(frozen) | _flat(trained)
    factor = flat.pop(_SCALE, None)
    for layer in [name.removesuffix("/a") for name in flat if re.fullmatch("lora/.*/a", name)]:
        kernel = f"{layer.removeprefix('lora/')}/kernel"
        flat[kernel] = flat[kernel] + factor * product(flat.pop(f"{layer}/a"), flat.pop(f"{layer}/b"))
    return unflatten_dict(flat, sep="/")


def _sides(name: str, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The input and output axes of a kernel: (d, k, d/k) of query, key and value, (k, d/k, d) of out, all others (…, d)."""
    if not name.endswith("/kernel"):
        raise UserError(f"LoRA changes kernels, and a target matches {name}: let the pattern end with /kernel")
    i = 1 if len(shape) == 3 and not name.endswith("/out/kernel") else len(shape) - 1
    inputs, outputs = shape[:i], shape[i:]
    if rank > (most := min(math.prod(inputs), math.prod(outputs))):
        raise UserError(f"LoRA of rank {rank} on {name} {tuple(shape)}: its rank is at most {most}, choose a smaller one")
    return inputs, outputs


def _divide(flat: Mapping[str, Any], trained: set[str]) -> tuple[Params, Params]:
    parts = ({n: x for n, x in flat.items() if (n in trained) is side} for side in (True, False))
    return tuple(unflatten_dict(part, sep="/") for part in parts)


def _matching(names: Iterable[str], patterns: Names) -> set[str]:
    """The names that match one of the patterns. UserError for a pattern without a match, which proposes near patterns."""
    found = set()
    for pattern in patterns:
        try:
            matches = {name for name in names if re.fullmatch(pattern, name)}
        except (re.error, TypeError) as e:
            raise UserError(f"{pattern!r} is no regular expression: {e}") from e
        if not matches:
            known = {re.sub(r"(encoderblock_|MixerBlock_|block|unit)\d+", r"\1.*", name) for name in names}
            raise unknown("parameter pattern", pattern, known | {re.sub("^.*/(.*/)", r".*/\1", name) for name in known})
        found |= matches
    return found


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict(dict(params), sep="/")
