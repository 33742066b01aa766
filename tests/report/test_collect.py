"""The numbers of a report: by scikit-learn, by the formula, by the evaluator of calibration, and read from damaged files."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from vit_jax.evaluators import calibration
from vit_jax.report import collect


def answers(n: int, classes: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Labels, predictions of which a half is right, and how sure these are."""
    rng = np.random.default_rng(seed)
    label, other = rng.integers(0, classes, (2, n))
    confidence = rng.uniform(1 / classes, 1, n).astype(np.float32)
    return {"label": label, "predicted": np.where(rng.random(n) < 0.5, label, other), "confidence": confidence}


def test_the_confusion_matrix_is_scikit_learns_and_blocks_add_it_up():
    rows = answers(5000, 130)
    peer = confusion_matrix(rows["label"], rows["predicted"], labels=range(130))
    found = collect.find(**rows, names=[str(i) for i in range(130)])
    np.testing.assert_array_equal(collect.confusion(rows["label"], rows["predicted"], 130, 130), peer)
    np.testing.assert_array_equal(found.correct, peer.diagonal())
    np.testing.assert_array_equal(found.count, peer.sum(axis=1))
    block = np.arange(130) * 100 // 130
    blocks = np.zeros((100, 100), int)
    np.add.at(blocks, (block[:, None], block), peer)
    np.testing.assert_array_equal(found.heat, blocks)
    off = peer - np.diag(peer.diagonal())
    assert [n for *_, n in found.pairs] == sorted(off.ravel(), reverse=True)[: collect.MOST_PAIRS]
    assert all(off[i, j] == n for i, j, n in found.pairs)


def test_intervals_solve_wilsons_equation():
    count, correct = np.array([1, 1, 7, 36, 36, 50_000, 0]), np.array([0, 1, 3, 27, 36, 40_000, 0])
    low, high = collect.wilson(correct, count)
    for k, n, ends in zip(correct[:-1], count[:-1], zip(low, high, strict=True), strict=False):
        for p in ends:  # the ends are where the share that was seen lies 1.96 standard deviations away
            assert (k / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, rel=1e-5, abs=1e-12)
        assert ends[0] <= k / n <= ends[1]
    assert (low[-1], high[-1]) == (0, 1)


def test_bins_and_error_are_those_of_the_evaluator():
    rows = answers(999, 7)
    edges = np.arange(16, dtype=np.float32) / np.float32(15)
    rows["confidence"][:16] = edges
    found = collect.find(**rows, names="abcdefg")
    right = rows["label"] == rows["predicted"]
    sums = calibration.bin_sums(*map(jnp.asarray, (rows["confidence"], right, np.ones(999, bool))), 15)
    for name, value in sums.items():
        np.testing.assert_allclose(found.bins[name], value, rtol=1e-6)
    assert found.ece == pytest.approx(calibration.expected_calibration_error(**sums), abs=1e-6)


def test_the_surest_mistakes_and_the_least_sure_hits_stand_first():
    rows = {"label": np.array([0, 0, 1, 1, 0]), "predicted": np.array([0, 1, 1, 0, 0])}
    found = collect.find(**rows, confidence=np.array([0.9, 0.6, 0.7, 0.8, 0.55]), names="ab")
    assert found.mistakes.tolist() == [3, 1] and found.hits.tolist() == [4, 2, 0]


def test_metrics_are_read_whatever_is_damaged_and_joined_by_quantity(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert collect.read_metrics(path) == {}
    records = [
        {"step": 2, "train_loss": 2.0},
        {"step": 1, "train_loss": 3.0},
        {"step": 2, "loss_test": 2.5, "loss_test_ema": math.nan},
        {"step": 2, "train_loss": 1.0, "val2/loss": 7, "ece": 0.1},
    ]
    lines = [json.dumps(record) for record in records]
    path.write_bytes("\n".join([*lines, "[1]", '{"step": "x"}', '{"step": 3, "train']).encode() + b"\xff")
    series = collect.read_metrics(path)
    assert {name: (s.tolist(), v.tolist()) for name, (s, v) in series.items()} == {
        "train_loss": ([1, 2], [3.0, 1.0]),
        "loss_test": ([2], [2.5]),
        "val2/loss": ([2], [7.0]),
        "ece": ([2], [0.1]),
    }
    (curve,) = collect.curves(series)
    assert curve.title == "loss" and list(curve.lines) == ["train_loss", "loss_test", "val2/loss"]


def test_long_curves_keep_their_ends_and_their_mean():
    steps = np.arange(10, 100_010, 10)
    values = 1 / steps + np.random.default_rng(0).normal(0, 1e-3, len(steps))
    s, v = collect.thinned(steps, values)
    assert len(s) == len(v) == collect.MOST_POINTS and (np.diff(s) > 0).all()
    assert (s[0], s[-1], v[0], v[-1]) == (steps[0], steps[-1], values[0], values[-1])
    np.testing.assert_allclose(np.average(v[1:-1], weights=np.diff(s[:-1])), values[1:-1].mean(), rtol=0.02)
