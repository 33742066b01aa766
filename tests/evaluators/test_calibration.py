"""Calibration: a case worked by hand, the edges of the bins, and digits by plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluators import small
from vit_jax.errors import UserError
from vit_jax.evaluators import calibration


def ece(confidence, correct, mask=None, bins=15):
    mask = np.ones(len(confidence), bool) if mask is None else np.array(mask)
    sums = calibration.bin_sums(jnp.array(confidence, jnp.float32), jnp.array(correct), jnp.array(mask), bins)
    return calibration.expected_calibration_error(**{name: np.asarray(x, np.float64) for name, x in sums.items()})


def test_a_case_worked_by_hand():
    # Five bins. (0.4, 0.6]: confidences 0.5, 0.6, one of two right: |1 − 1.1| = 0.1. (0.6, 0.8]: 0.65, 0.7, 0.8, all right:
    # |3 − 2.15| = 0.85. (0.8, 1]: 0.9, 0.9, 1.0, two right: |2 − 2.8| = 0.8. Altogether 1.75 of 8 examples.
    confidence = [0.5, 0.6, 0.65, 0.7, 0.8, 0.9, 0.9, 1.0]
    correct = [True, False, True, True, True, False, True, True]
    assert ece(confidence, correct, bins=5) == pytest.approx(1.75 / 8, abs=1e-7)
    # In one bin: |6 − 6.05| of 8.
    assert ece(confidence, correct, bins=1) == pytest.approx(0.05 / 8, abs=1e-7)
    # Without the masked ones, 0.5 and 1.0, in five bins: 0.6 + 0.85 + 0.8 of 6.
    mask = [False, True, True, True, True, True, True, False]
    assert ece(confidence, correct, mask, bins=5) == pytest.approx((0.6 + 0.85 + 0.8) / 6, abs=1e-7)


def test_a_bin_has_its_upper_edge():
    edges = np.arange(16) / 15
    sums = calibration.bin_sums(jnp.array(edges, jnp.float32), jnp.ones(16, bool), jnp.ones(16, bool), 15)
    assert sums["count"].tolist() == [2] + [1] * 14  # 0 goes to the first bin too
    above = jnp.nextafter(jnp.array(edges[:-1], jnp.float32), 1)
    assert calibration.bin_sums(above, jnp.ones(15, bool), jnp.ones(15, bool), 15)["count"].tolist() == [1] * 15


def loops(probabilities, labels):
    """The definition, one example at a time."""
    bins = [[] for _ in range(15)]
    for p, label in zip(probabilities, labels, strict=True):
        number = next(i for i in range(15) if i / 15 < p.max() <= (i + 1) / 15)
        bins[number].append((p.max(), p.argmax() == label))
    total = 0.0
    for members in filter(None, bins):
        confidence, correct = zip(*members, strict=True)
        total += len(members) / len(labels) * abs(np.mean(correct) - np.mean(confidence))
    return total


@pytest.mark.parametrize(
    ("loss", "parallelism", "batch"), [("softmax", "pmap", 8), ("sigmoid", "pmap", 37), ("softmax", "mesh", 8)]
)
def test_digits_are_scored_as_by_loops(loss, parallelism, batch, tmp_path):
    e, params = small.experiment(tmp_path, loss=loss, parallel=parallelism, batch_eval=batch)
    logits, labels = small.logits(e, params, e.test_source)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probabilities = softmax if loss == "softmax" else 1 / (1 + np.exp(-logits))
    metrics = calibration.make_evaluator(e)(e.parallelism.place(params))
    assert metrics == {"ece": pytest.approx(loops(probabilities, labels), abs=1e-6)}
    assert metrics["ece"] > 0.1


def test_what_cannot_be_scored_is_refused(tmp_path):
    e, _ = small.experiment(tmp_path)
    with pytest.raises(UserError, match="bins=0"):
        calibration.make_evaluator(e, bins=0)
    with pytest.raises(UserError, match="other classes: .* 5 are the same by name"):
        calibration.make_evaluator(e, dataset="digits_0to4")
