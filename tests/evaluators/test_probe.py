"""Linear probe: against scikit-learn's logistic regression, the choice of l2, and digits by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tests.evaluators import small
from vit_jax.errors import UserError
from vit_jax.evaluators import probe


def clusters(n, *, d=16, classes=5, noise=1.5, seed=0):
    """Overlapping clusters of features of different scales: (features, labels)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    x = rng.normal(size=(classes, d))[labels] + noise * rng.normal(size=(n, d))
    return (3 + x * np.geomspace(0.01, 100, d)).astype(np.float32), labels


def standardised(train, test):
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    return (train - mean) / std, (test - mean) / std


def peer(x, labels, l2):
    """scikit-learn's solution in float64, by Newton's method."""
    return LogisticRegression(C=1 / (len(x) * l2), solver="newton-cg", tol=1e-10, max_iter=1000).fit(x, labels)


@pytest.mark.parametrize("l2", [1e-3, 1e-1, 10.0])
def test_the_fit_is_scikit_learns(l2):
    train, labels = clusters(400)
    x, _ = standardised(train, train)
    zero = jnp.zeros((16, 5)), jnp.zeros(5)
    counted = np.arange(400) % 4 > 0
    weights, bias = probe.fit(zero, jnp.asarray(x, jnp.float32), jnp.asarray(labels), counted, l2)
    expected = peer(x[counted], labels[counted], l2)
    # The gradient is brought below 1e-5, in float32; where the loss curves by l2 only, that leaves 1e-5 / l2 of a weight.
    tolerance = 2e-5 / min(l2, 0.1)
    np.testing.assert_allclose(weights, expected.coef_.T, atol=tolerance)
    np.testing.assert_allclose(bias - bias.mean(), expected.intercept_ - expected.intercept_.mean(), atol=tolerance)


def test_the_accuracy_is_scikit_learns_and_l2_is_chosen_on_held_out_rows():
    x, y = clusters(2060, d=40, noise=3, seed=1)
    train, labels, test, truth = x[:60], y[:60], x[60:], y[60:]
    l2 = (1e-4, 1e-2, 1.0, 100.0)
    accuracy, chosen = probe.probe(train, labels, test, truth, 5, l2)
    order = np.random.default_rng(0).permutation(60)
    x, asked = standardised(train, test)
    scores = {value: peer(x[order[12:]], labels[order[12:]], value).score(x[order[:12]], labels[order[:12]]) for value in l2}
    assert scores[chosen] == max(scores.values()) > min(scores.values())
    assert all(scores[value] < scores[chosen] for value in l2 if value > chosen)
    assert accuracy == pytest.approx(peer(x, labels, chosen).score(asked, truth), abs=1.5 / 2000)  # a tie or so
    alone, only = probe.probe(train, labels, test, truth, 5, (1e-2,))
    assert only == 1e-2 and alone == pytest.approx(peer(x, labels, 1e-2).score(asked, truth), abs=1.5 / 2000)


def test_a_separable_set_and_a_constant_feature_do_no_harm():
    train, labels = clusters(200, noise=0.05)
    train[:, 3] = 7.0
    accuracy, _ = probe.probe(train[:100], labels[:100], train[100:], labels[100:], 5)
    assert accuracy == 1


def test_digits_are_scored_as_by_hand(tmp_path):
    e, params = small.experiment(tmp_path)
    data = *small.features(e, params, e.train_source), *small.features(e, params, e.test_source), 10
    metrics = probe.make_evaluator(e, l2=(1e-3, 1e-1))(e.parallelism.place(params))
    accuracy, chosen = probe.probe(*data, (1e-3, 1e-1))
    assert metrics == {"probe": accuracy, "probe_l2": chosen} and 0.3 < accuracy < 1
    assert probe.make_evaluator(e, l2=(chosen,))(e.parallelism.place(params)) == {"probe": accuracy}


def test_options_without_sense_are_refused(tmp_path):
    e, _ = small.experiment(tmp_path)
    with pytest.raises(UserError, match="all must be positive"):
        probe.make_evaluator(e, l2=(0.0, 1.0))
    with pytest.raises(UserError, match="2 images or more"):
        probe.make_evaluator(e, train="train[:1]")
