"""Numbers that are none: which parameters and which rows of an output hold NaN or infinity."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Shaped

from vit_jax.errors import UserError, listed, printable

_LARGEST = float(np.finfo(np.float32).max)  # beyond it a float64 becomes infinite where the model computes


def non_finite(flat: Mapping[str, np.ndarray]) -> dict[str, int]:
    """By name, of parameters that hold values that are not finite in float32, how many they are."""
    return {name: int(x.size - np.count_nonzero(_finite(x))) for name, x in flat.items() if not _all_finite(x)}


def check_parameters(flat: Mapping[str, np.ndarray], where: str) -> None:
    """Raises UserError that names the first parameters which are not finite, and how many there are."""
    if not (bad := non_finite(flat)):
        return
    first, *others = bad
    text = f"{bad[first]:,} of the {flat[first].size:,} values of {printable(first)} are not finite"
    if others:
        text += f", nor are all of {len(others)} more parameters ({listed(others, most=3)})"
    raise UserError(f"{where}: {text}; use an earlier checkpoint")


def finite_rows(outputs: Mapping[str, Shaped[np.ndarray, "b ..."]]) -> Bool[np.ndarray, "b"]:
    """Of what a model gives for b examples, by name: for which of them all numbers are finite."""
    rows = [_finite(x).reshape(len(x), -1).all(1) for x in map(np.asarray, outputs.values())]
    return np.logical_and.reduce(rows)


def check_outputs(outputs: Mapping[str, Shaped[np.ndarray, "b ..."]], model: str) -> None:
    """Raises UserError if what `model` (its path, say) gives for b examples holds NaN or infinity: that is no answer."""
    fine = finite_rows(outputs)
    if not fine.all():
        raise UserError(
            f"{model} gives NaN or infinity for {np.count_nonzero(~fine):,} of {len(fine):,} examples, which is no answer: its "
            "parameters, or the mean and std beside them, are those of no working model"
        )


def check_metrics(metrics: Mapping[str, float], model: str) -> None:
    """Raises UserError if a measurement of `model` is NaN or infinity: outputs that are none score nothing."""
    if bad := [name for name, value in metrics.items() if not np.isfinite(value)]:
        raise UserError(
            f"{model} cannot be scored: {', '.join(bad)} came out as NaN or infinity, so that its other metrics mean nothing "
            "either: its parameters, or the mean and std beside them, are those of no working model"
        )


def _is_float(x: np.ndarray) -> bool:
    return x.dtype.kind == "f" or x.dtype.name == "bfloat16"


def _finite(x: np.ndarray) -> Bool[np.ndarray, "..."]:
    if not _is_float(x):
        return np.ones(x.shape, bool)
    return np.abs(x) <= _LARGEST if x.itemsize > 4 else np.isfinite(x)


def _all_finite(x: np.ndarray) -> bool:
    """A minimum or maximum of anything with a NaN is one; unlike a comparison of all values, they take no memory."""
    with np.errstate(invalid="ignore"):
        return not _is_float(x) or not x.size or (-_LARGEST <= float(x.min()) and float(x.max()) <= _LARGEST)
