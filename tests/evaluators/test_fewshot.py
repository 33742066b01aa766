"""Few-shot regression: against scikit-learn's Ridge, drawings, the choice of l2, and digits by hand."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from tests.evaluators import small
from vit_jax.errors import UserError
from vit_jax.evaluators import fewshot


def clusters(n, *, d, classes, seed=0):
    """Overlapping clusters of features of different scales: (features, labels)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    x = rng.normal(size=(classes, d))[labels] + 1.5 * rng.normal(size=(n, d))
    return (3 + x * np.geomspace(0.01, 100, d)).astype(np.float32), labels


def ridge(x, labels, classes, l2):
    """(features → scores) of scikit-learn, by a singular value decomposition in float64."""
    x = x.astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5

    def columns(x):
        return np.column_stack([(x - mean) / std, np.full(len(x), 100.0)])

    targets = np.where(np.arange(classes) == labels[:, None], 1.0, -1.0)
    model = Ridge(alpha=l2, fit_intercept=False, solver="svd").fit(columns(x), targets)
    return model.coef_, lambda x: model.predict(columns(x.astype(np.float64)))


@pytest.mark.parametrize("n", [4, 24, 25, 200], ids=["few", "one row short", "as many as columns", "many"])
@pytest.mark.parametrize("l2", [2.0**-10, 1.0, 2.0**10, 2.0**19])
def test_weights_are_those_of_scikit_learns_ridge(n, l2):
    x, labels = clusters(n, d=24, classes=5)
    expected, _ = ridge(x, labels, 5, l2)
    weights = fewshot.fit(x, labels, 5).weights(l2)
    assert weights.shape == (25, 5)
    # Both in float64. XᵀX has an eigenvalue of n · 10⁴, of which 1e-16 is lost: that is up to 1e-9 of an l2 of 0.001.
    np.testing.assert_allclose(weights, expected.T, rtol=1e-7, atol=1e-8 * np.abs(expected).max())


def test_accuracies_are_those_of_scikit_learns_ridge():
    x, y = clusters(450, d=24, classes=5)
    train, labels, test, truth = x[:300], y[:300], x[300:], y[300:]
    found = fewshot.fewshot(train, labels, test, truth, 5, shots=(1, 3, 30), l2=(0.25, 1024.0), seeds=2)
    for shots, by_l2 in found.items():
        for l2, accuracy in by_l2.items():
            expected = []
            for seed in range(2):
                rng = np.random.default_rng(seed)
                chosen = [i for label in range(5) for i in rng.permutation(np.flatnonzero(labels == label))[:shots]]
                _, scores = ridge(train[chosen], labels[chosen], 5, l2)
                expected.append(np.mean(scores(test).argmax(axis=1) == truth))
            assert accuracy == pytest.approx(np.mean(expected), abs=1e-12)
    assert found[30][1024.0] > found[1][1024.0] + 0.1


def test_a_class_gives_what_it_has_and_no_class_can_give_more():
    train, labels = clusters(60, d=8, classes=3)
    labels[:] = np.repeat([0, 1, 2], (2, 7, 51))
    found = fewshot.fewshot(train, labels, train, labels, 4, shots=(1, 51, 52), l2=(1.0,))
    assert list(found) == [1, 51]  # of a class without images there are simply none
    whole = fewshot.fit(train, labels, 4).weights(1.0)
    x = np.pad((train - train.mean(axis=0, dtype=float)) / (train.std(axis=0, dtype=float) + 1e-5), ((0, 0), (0, 1)),
               constant_values=100)  # fmt: skip
    assert found[51][1.0] == np.mean((x @ whole).argmax(axis=1) == labels)


def test_digits_are_scored_as_by_hand_and_the_best_l2_is_told(tmp_path):
    e, params = small.experiment(tmp_path)
    data = *small.features(e, params, e.train_source), *small.features(e, params, e.test_source), 10
    l2 = (2.0**-5, 1.0, 2.0**10, 2.0**19)
    metrics = fewshot.make_evaluator(e, shots=(1, 5, 100), l2=l2, seeds=2)(e.parallelism.place(params))
    by_hand = fewshot.fewshot(*data, shots=(1, 5), l2=l2, seeds=2)
    assert metrics.keys() == {f"fewshot_{n}shot{what}" for n in (1, 5) for what in ("", "_l2")}
    for n, by_l2 in by_hand.items():
        assert metrics[f"fewshot_{n}shot"] == max(by_l2.values()) == by_l2[metrics[f"fewshot_{n}shot_l2"]]
        assert len(set(by_l2.values())) > 1
    fixed = fewshot.make_evaluator(e, shots=(5,), l2=(1024.0,), seeds=2)(e.parallelism.place(params))
    assert fixed == {"fewshot_5shot": by_hand[5][1024.0]}


@pytest.mark.parametrize("wrong", [{"shots": (0, 5)}, {"l2": ()}, {"l2": (0.0, 1.0)}, {"seeds": 0}])
def test_options_without_sense_are_refused(wrong, tmp_path):
    e, _ = small.experiment(tmp_path)
    with pytest.raises(UserError, match="all must be positive"):
        fewshot.make_evaluator(e, **wrong)
