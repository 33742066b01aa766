"""Calibration: whether the model is right as often as it believes to be."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vit_jax.errors import UserError
from vit_jax.evaluators import passes
from vit_jax.run.experiment import Experiment

LOWER_IS_BETTER = ("ece",)


def make_evaluator(
    experiment: Experiment, *, split: str | None = None, dataset: str | None = None, bins: int = 15
) -> Callable[[Any], dict[str, float]]:
    """parameters → `ece`, the expected calibration error, from 0 to 1, see `expected_calibration_error`.

    The confidence is the probability of the predicted class: its softmax, or its sigmoid if `config.loss` is that.
    """
    if bins < 1:
        raise UserError(f"bins={bins} must be at least 1")
    source = passes.with_classes_of(experiment.train_source, passes.open_labelled(experiment, split, dataset))
    predict = experiment.task.predict

    def sums_of(params: Any, batch: passes.Batch) -> dict[str, Array]:
        p = predict(params, batch)["probabilities"]
        return bin_sums(p.max(axis=-1), p.argmax(axis=-1) == batch["label"], batch["valid"], bins)

    run = passes.make_sums(experiment, source, sums_of)
    return lambda params: {"ece": expected_calibration_error(**run(params)[0])}


def bin_sums(
    confidence: Float[Array, " b"], correct: Bool[Array, " b"], valid: Bool[Array, " b"], bins: int
) -> dict[str, Float[Array, " bins"]]:
    """How many valid examples fall into each of the bins (0, 1/bins], …, (1 − 1/bins, 1], and what they sum up to."""
    edges = jnp.asarray(np.linspace(0, 1, bins + 1), jnp.float32)  # jnp's own are not rounded as the numbers i / bins are
    index = jnp.clip(jnp.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    summed = {"count": valid, "confidence": confidence * valid, "correct": correct & valid}
    return {name: jax.ops.segment_sum(x.astype(jnp.float32), index, num_segments=bins) for name, x in summed.items()}


def expected_calibration_error(
    count: Float[np.ndarray, " bins"], confidence: Float[np.ndarray, " bins"], correct: Float[np.ndarray, " bins"]
) -> float:
    """Σ over bins of |correct − confidence|, divided by the number of examples (https://arxiv.org/abs/1706.04599).

    That is the mean distance between accuracy and mean confidence of a bin, weighted by how many examples it has.
    """
    return float(np.abs(correct - confidence).sum() / count.sum())
