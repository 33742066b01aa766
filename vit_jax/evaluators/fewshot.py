"""Few-shot linear regression on frozen features, as big_vision's `fewshot_lsr` does it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from vit_jax.errors import UserError
from vit_jax.evaluators import passes
from vit_jax.run.experiment import Experiment

SHOTS = (1, 5, 10, 25)
L2 = tuple(2.0**i for i in range(-10, 20))
BIAS = 100.0  # the constant feature, so large that its weight is hardly regularised


def make_evaluator(
    experiment: Experiment,
    *,
    train: str | None = None,
    test: str | None = None,
    dataset: str | None = None,
    shots: Sequence[int] = SHOTS,
    l2: Sequence[float] = L2,
    seeds: int = 3,
) -> Callable[[Any], dict[str, float]]:
    """parameters → accuracies `fewshot_1shot`, `fewshot_5shot`, …, each the mean over `seeds` drawings of the shots.

    Of several `l2` the best one counts, and is given as `fewshot_5shot_l2`. It is chosen on the test images, as
    big_vision's sweep did, so that the score is an optimistic one; (1024,), its present choice, chooses nothing.
    Features of all of `train` (`config.pp.train` if not said otherwise) are computed: of a large set, name a part.
    """
    if min(shots, default=0) < 1 or min(l2, default=0) <= 0 or seeds < 1:
        raise UserError(f"shots={tuple(shots)}, l2={tuple(l2)}, seeds={seeds}: all must be positive, and one or more each")
    train_source, test_source = passes.open_pair(experiment, train, test, dataset)
    features = passes.make_features(experiment)

    def evaluator(params: Any) -> dict[str, float]:
        training, testing = features(params, train_source), features(params, test_source)
        scores = fewshot(*training, *testing, train_source.num_classes, shots, l2, seeds)
        metrics = {}
        for n, by_l2 in scores.items():
            best = max(by_l2, key=lambda value: (by_l2[value], value))
            metrics[f"fewshot_{n}shot"] = by_l2[best]
            if len(l2) > 1:
                metrics[f"fewshot_{n}shot_l2"] = best
        return metrics

    return evaluator


def fewshot(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    num_classes: int,
    shots: Sequence[int] = SHOTS,
    l2: Sequence[float] = L2,
    seeds: int = 1,
) -> dict[int, dict[float, float]]:
    """{shots: {l2: accuracy on the test rows, the mean over `seeds` drawings}}.

    A drawing shuffles the rows of each class by its number; the first `shots` are learnt from, fewer where a class has
    not as many. More shots than any class has are left out, and a UserError if none are left.
    """
    most = np.bincount(train_labels).max()
    if min(shots) > most:
        raise UserError(f"few-shot regression on shots={tuple(shots)}: no class has more than {most} images to learn from")
    test, test_labels = jnp.asarray(test, jnp.float32), jnp.asarray(test_labels)
    accuracies = {n: dict.fromkeys(l2, 0.0) for n in shots if n <= most}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        rows = [rng.permutation(np.flatnonzero(train_labels == label)) for label in range(num_classes)]
        for n, by_l2 in accuracies.items():
            chosen = np.concatenate([of_class[:n] for of_class in rows])
            regression = fit(train[chosen], train_labels[chosen], num_classes)
            for value in by_l2:
                correct = _count_correct(test, test_labels, regression.mean, regression.std, regression.weights(value))
                by_l2[value] += int(correct) / len(test) / seeds
    return accuracies


class Regression(NamedTuple):
    """Ridge regression for every strength of regularisation at once."""

    mean: Float64[np.ndarray, " d"]
    std: Float64[np.ndarray, " d"]
    left: Float64[np.ndarray, "d+1 r"]
    eigenvalues: Float64[np.ndarray, " r"]
    right: Float64[np.ndarray, "r classes"]

    def weights(self, l2: float) -> Float64[np.ndarray, "d+1 classes"]:
        """The weights of standardised features and, last, of the constant feature `BIAS`."""
        return (self.left / (self.eigenvalues + l2)) @ self.right


def fit(x: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], num_classes: int) -> Regression:
    """W = argmin ‖XW − Y‖² + l2 ‖W‖² in closed form, in float64.

    X are the features, standardised, beside a column of `BIAS`; Y is 1 for the class of a row and −1 for the others. With
    the eigenvalues Λ and eigenvectors Q of XᵀX, W = Q (Λ + l2)⁻¹ QᵀXᵀY; with those of XXᵀ, which is the smaller matrix
    of few examples, W = XᵀQ (Λ + l2)⁻¹ QᵀY.
    """
    x = x.astype(np.float64)
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5
    x = np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)
    y = 2 * np.eye(num_classes)[labels] - 1
    n, d = x.shape
    if n >= d:
        eigenvalues, q = np.linalg.eigh(x.T @ x)
        left, right = q, q.T @ (x.T @ y)
    else:
        eigenvalues, q = np.linalg.eigh(x @ x.T)
        left, right = x.T @ q, q.T @ y
    return Regression(mean, std, left, np.maximum(eigenvalues, 0), right)  # zeros may come out a little negative


@jax.jit
def _count_correct(
    x: Float[Array, "m d"],
    labels: Int[Array, " m"],
    mean: Float[Array, " d"],
    std: Float[Array, " d"],
    weights: Float[Array, "d+1 classes"],
) -> Int[Array, ""]:
    """How many rows of x the regression puts into their class; in float32, where a GPU may be."""
    scores = jnp.matmul((x - mean) / std, weights[:-1], precision="highest") + BIAS * weights[-1]
    return jnp.sum(scores.argmax(axis=-1) == labels)
