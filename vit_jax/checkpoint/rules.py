"""How a family of checkpoints names and shapes its parameters: one table of rules, used for reading and for writing.

A rule says which arrays of ours become which of theirs, and how. "{i}" in a name stands for the number of the block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vit_jax.errors import UserError, printable

Arrays = Sequence[np.ndarray]
Flat = dict[str, np.ndarray]


@dataclass(frozen=True)
class Transform:
    """Two inverse functions between our arrays and theirs; `heads` is the number of attention heads."""

    read: Callable[[Arrays, int], Arrays]  # theirs → ours
    write: Callable[[Arrays], Arrays]  # ours → theirs


@dataclass(frozen=True)
class Rule:
    """Our names, their names, and the transform between the two; applied where all names of one side are present."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform


def rule(ours: str | tuple[str, ...], theirs: str, transform: Transform | None = None) -> Rule:
    """A rule for one array of theirs, unchanged unless a transform is given."""
    return Rule((ours,) if isinstance(ours, str) else ours, (theirs,), transform or SAME)


def dense(ours: str, theirs: str) -> list[Rule]:
    """A linear layer: torch keeps (out, in) where we keep (in, out)."""
    return [rule(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSED), rule(f"{ours}/bias", f"{theirs}.bias")]


def joined(ours: str, *theirs: str) -> list[Rule]:
    """Linear layers of the same inputs, such as a SwiGLU's gate and value, which are one of ours, one after the other."""
    kinds = (("kernel", "weight"), ("bias", "bias"))
    return [Rule((f"{ours}/{our}",), tuple(f"{name}.{their}" for name in theirs), JOINED) for our, their in kinds]


def norm(ours: str, theirs: str) -> list[Rule]:
    """A LayerNorm."""
    return [rule(f"{ours}/scale", f"{theirs}.weight"), rule(f"{ours}/bias", f"{theirs}.bias")]


def patch_embedding(theirs: str) -> list[Rule]:
    """A convolution: torch keeps (out, in, h, w) where we keep (h, w, in, out)."""
    return [rule("embedding/kernel", f"{theirs}.weight", CONVOLUTION), rule("embedding/bias", f"{theirs}.bias")]


def projection(ours: str, theirs: str) -> list[Rule]:
    """Query, key or value: ours are (d, heads, d / heads)."""
    return [rule(f"{ours}/kernel", f"{theirs}.weight", HEADS), rule(f"{ours}/bias", f"{theirs}.bias", HEADS_BIAS)]


def packed_projections(ours: str, theirs: str, names: Sequence[str] = ("query", "key", "value"), dot: str = ".") -> list[Rule]:
    """Query, key and value, or some of them, as one linear layer of their widths together, in this order."""
    kernels, biases = (tuple(f"{ours}/{n}/{kind}" for n in names) for kind in ("kernel", "bias"))
    of_kernels, of_biases = _PACKED[len(names)]
    return [rule(kernels, f"{theirs}{dot}weight", of_kernels), rule(biases, f"{theirs}{dot}bias", of_biases)]


def packed_attention(ours: str, theirs: str) -> list[Rule]:
    """torch's `nn.MultiheadAttention`."""
    packed = packed_projections(ours, f"{theirs}.in_proj", dot="_")
    return [*packed, *output(f"{ours}/out", f"{theirs}.out_proj")]


def qkv_attention(ours: str, theirs: str) -> list[Rule]:
    """timm's attention."""
    return [*packed_projections(ours, f"{theirs}.qkv"), *output(f"{ours}/out", f"{theirs}.proj")]


def output(ours: str, theirs: str) -> list[Rule]:
    """The linear layer behind the heads: ours is (heads, d / heads, d)."""
    return [rule(f"{ours}/kernel", f"{theirs}.weight", HEADS_OUT), rule(f"{ours}/bias", f"{theirs}.bias")]


def attention(
    ours: str, theirs: str, out: str | None = None, names: Sequence[str] = ("q_proj", "k_proj", "v_proj")
) -> list[Rule]:
    """Query, key and value as a linear layer each, and the one behind the heads."""
    pairs = zip(("query", "key", "value"), names, strict=True)
    apart = [r for name, their in pairs for r in projection(f"{ours}/{name}", f"{theirs}.{their}")]
    return [*apart, *output(f"{ours}/out", out or f"{theirs}.out_proj")]


def block(
    ours: str, theirs: str, attends: Sequence[Rule], norms: Sequence[str], mlp: Sequence[str | None] = ("mlp.fc1", "mlp.fc2")
) -> list[Rule]:
    """A block of a transformer: the rules of its attention, and how its two LayerNorms and its MLP's two layers are called.

    None stands for a layer with rules of its own.
    """
    return [
        *attends,
        *(r for k, name in zip((0, 2), norms, strict=True) for r in norm(f"{ours}/LayerNorm_{k}", f"{theirs}.{name}")),
        *(r for k, name in enumerate(mlp) if name for r in dense(f"{ours}/MlpBlock_3/Dense_{k}", f"{theirs}.{name}")),
    ]


def read(rules: Sequence[Rule], theirs: Mapping[str, np.ndarray], *, blocks: int, heads: int, where: str) -> Flat:
    """Their arrays under our names. Raises UserError for arrays that no rule knows, or whose shapes fit no rule."""
    ours: Flat = {}
    used: set[str] = set()
    for r in _expanded(rules, blocks):
        if all(name in theirs for name in r.theirs):
            given = [theirs[name] for name in r.theirs]
            try:
                ours |= dict(zip(r.ours, r.transform.read(given, heads), strict=True))
            except (ValueError, IndexError) as e:
                shapes = ", ".join(f"{name} {x.shape}" for name, x in zip(r.theirs, given, strict=True))
                raise UserError(f"{where}: {shapes} does not fit a model of {heads} heads: {e}") from e
            used.update(r.theirs)
    if unused := _listed(theirs, used):
        raise UserError(f"{where} holds parameters that this family does not know: {unused}")
    return ours


def write(rules: Sequence[Rule], ours: Mapping[str, np.ndarray], *, blocks: int, where: str) -> Flat:
    """Our arrays under their names. Raises UserError for arrays that the family has no place for."""
    theirs: Flat = {}
    used: set[str] = set()
    for r in _expanded(rules, blocks):
        if all(name in ours for name in r.ours):
            arrays = r.transform.write([ours[name] for name in r.ours])
            theirs |= {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in zip(r.theirs, arrays, strict=True)}
            used.update(r.ours)
    if unused := _listed(ours, used):
        raise UserError(f"{where} has no place for {unused}")
    return theirs


def _listed(flat: Mapping[str, np.ndarray], used: set[str]) -> str:
    unused = sorted(set(flat) - used)
    more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
    return ", ".join(f"{printable(name)} {flat[name].shape}" for name in unused[:8]) + more


def _expanded(rules: Sequence[Rule], blocks: int):
    for r in rules:
        if "{i}" not in r.theirs[0]:
            yield r
            continue
        for i in range(blocks):
            numbered = (tuple(name.replace("{i}", str(i)) for name in names) for names in (r.ours, r.theirs))
            yield Rule(*numbered, r.transform)


def _one(read: Callable[[np.ndarray, int], np.ndarray], write: Callable[[np.ndarray], np.ndarray]) -> Transform:
    return Transform(lambda arrays, heads: [read(arrays[0], heads)], lambda arrays: [write(arrays[0])])


def _split_heads(kernel: np.ndarray, heads: int) -> np.ndarray:
    return kernel.T.reshape(kernel.shape[1], heads, -1)


def _join_heads(kernel: np.ndarray) -> np.ndarray:
    return kernel.reshape(kernel.shape[0], -1).T


SAME = _one(lambda x, _: x, lambda x: x)
TRANSPOSED = _one(lambda x, _: x.T, lambda x: x.T)
ROW = _one(lambda x, _: x[0], lambda x: x[None])
CONVOLUTION = _one(lambda x, _: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
HEADS = _one(_split_heads, _join_heads)
HEADS_BIAS = _one(lambda x, heads: x.reshape(heads, -1), lambda x: x.reshape(-1))
HEADS_OUT = _one(lambda x, heads: x.T.reshape(heads, -1, x.shape[0]), lambda x: x.reshape(-1, x.shape[-1]).T)
JOINED = Transform(
    lambda arrays, heads: [np.concatenate([x.T for x in arrays], axis=-1)],
    lambda arrays: [x.T for x in np.split(arrays[0], 2, axis=-1)],
)


def _packed(n: int) -> tuple[Transform, Transform]:
    """n projections as one: of the kernels and of the biases."""
    kernels = Transform(
        lambda arrays, heads: [_split_heads(part, heads) for part in np.split(arrays[0], n)],
        lambda arrays: [np.concatenate([_join_heads(x) for x in arrays])],
    )
    biases = Transform(
        lambda arrays, heads: [part.reshape(heads, -1) for part in np.split(arrays[0], n)],
        lambda arrays: [np.concatenate([x.reshape(-1) for x in arrays])],
    )
    return kernels, biases


_PACKED = {n: _packed(n) for n in (2, 3)}
