"""Classifies by the nearest neighbours among features, as DINO and DINOv2 evaluate (https://arxiv.org/abs/2304.07193)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vit_jax.errors import UserError
from vit_jax.evaluators import passes
from vit_jax.run.experiment import Experiment

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_CELLS = 1 << 26  # numbers in the largest intermediate array of a chunk: 256 MiB


def make_evaluator(
    experiment: Experiment,
    *,
    train: str | None = None,
    test: str | None = None,
    dataset: str | None = None,
    k: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> Callable[[Any], dict[str, float]]:
    """parameters → the shares of right answers `knn_10`, `knn_20`, … for each k that the training split can fill.

    `train` holds the neighbours (`config.pp.train` if not said otherwise) and `test` the questions (`config.pp.test`),
    both without augmentation. A head is ignored.
    """
    _check(k, temperature)
    train_source, test_source = passes.open_pair(experiment, train, test, dataset)
    if (n := len(train_source)) < min(k):
        where = f"{train or experiment.settings.pp.train} of {dataset or experiment.settings.dataset}"
        raise UserError(f"{where} has {n} images: kNN needs {min(k)} or more")
    features = passes.make_features(experiment)

    def evaluator(params: Any) -> dict[str, float]:
        known, labels = features(params, train_source)
        asked, truth = features(params, test_source)
        predicted = knn(known, labels, asked, train_source.num_classes, k, temperature)
        return {f"knn_{k}": float(np.mean(predicted_labels == truth)) for k, predicted_labels in predicted.items()}

    return evaluator


def knn(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    num_classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[int, Int[np.ndarray, " m"]]:
    """Predictions for the rows of `test`, by k; a k above the n training rows is left out.

    The k rows of `train` with the largest cosine similarity s vote for their labels with the weight exp(s / temperature);
    the class with the largest sum wins. Of equal similarities the earlier row counts first, of equal sums the lower class.
    """
    _check(ks, temperature)
    n, d = train.shape
    ks = tuple(k for k in ks if k <= n)
    if not ks or not len(test):
        return {k: np.zeros(0, np.int32) for k in ks}
    size = max(1, min(1024, len(test), _CELLS // max(n, max(ks) * num_classes)))
    train, labels = _unit(jnp.asarray(train)), jnp.asarray(train_labels, jnp.int32)
    predicted_labels = []
    for i in range(0, len(test), size):
        chunk = np.zeros((size, d), np.float32)
        chunk[: len(test) - i] = test[i : i + size]
        predicted_labels.append(_predict(train, labels, chunk, num_classes, ks, temperature))
    return {k: np.concatenate([part[k] for part in predicted_labels])[: len(test)] for k in ks}


@functools.partial(jax.jit, static_argnums=(3, 4))
def _predict(
    train: Float[Array, "n d"],
    labels: Int[Array, " n"],
    test: Float[Array, "m d"],
    num_classes: int,
    ks: tuple[int, ...],
    temperature: float,
) -> dict[int, Int[Array, " m"]]:
    similarity = jnp.einsum("md,nd->mn", _unit(test), train, precision="highest")
    nearest, index = jax.lax.top_k(similarity, max(ks))
    weights = jnp.exp((nearest - nearest[:, :1]) / temperature)  # relative to the nearest: nothing can overflow
    votes = weights[:, :, None] * jax.nn.one_hot(labels[index], num_classes)
    return {k: votes[:, :k].sum(axis=1).argmax(axis=-1) for k in ks}


def _unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows of length 1; a row of zeros stays one."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _check(ks: Sequence[int], temperature: float) -> None:
    if min(ks, default=0) < 1 or temperature <= 0:
        raise UserError(f"k of {tuple(ks)} and a temperature of {temperature}: all must be positive, and one k or more")
