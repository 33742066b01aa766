"""Classifies by the nearest neighbours among features, as DINO and DINOv2 evaluate (https://arxiv.org/abs/2304.07193)."""

import contextlib
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from vit_jax import experiment, parallel
from vit_jax import workdir as workdirs
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.data import augment, sources
from vit_jax.errors import UserError
from vit_jax.evaluate import batches_of
from vit_jax.features import image_features
from vit_jax.metrics import logging_to
from vit_jax.settings import Settings

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_CELLS = 1 << 26  # numbers in the largest intermediate array of a chunk: 256 MiB

log = logging.getLogger("vit_jax")


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
    if min(ks, default=0) < 1 or temperature <= 0:
        raise UserError(f"k of {tuple(ks)} and a temperature of {temperature}: all must be positive, and one k or more")
    n, d = train.shape
    ks = tuple(k for k in ks if k <= n)
    if not ks or not len(test):
        return {k: np.zeros(0, np.int32) for k in ks}
    size = max(1, min(1024, len(test), _CELLS // max(n, max(ks) * num_classes)))
    train, labels = _unit(jnp.asarray(train)), jnp.asarray(train_labels, jnp.int32)
    found = []
    for i in range(0, len(test), size):
        chunk = np.zeros((size, d), np.float32)
        chunk[: len(test) - i] = test[i : i + size]
        found.append(_predict(train, labels, chunk, num_classes, ks, temperature))
    return {k: np.concatenate([part[k] for part in found])[: len(test)] for k in ks}


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


def evaluate_knn(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, float]:
    """Scores the features of what a training run with this config would start from, and trains nothing.

    `pp.train` holds the neighbours and `pp.test` the questions, both without augmentation. A head is of no use here: the
    file may have none, or one for other classes. Returns the shares of right answers `knn_10`, `knn_20`, … for each of
    `KS` that the training set can fill.
    """
    s = Settings.from_config(config)
    directory = workdirs.make(workdir)
    with logging_to(directory):
        e = experiment.build(s, directory)
        if len(e.train_source) < min(KS):
            raise UserError(f"{s.pp.train} of {s.dataset} has {len(e.train_source)} images: kNN needs {min(KS)} or more")
        experiment.log_setup(e)
        with contextlib.closing(Checkpointer(directory / "checkpoints", keep=s.keep)) as checkpointer:
            state = experiment.start(e, checkpointer)
        if state is None:
            raise UserError(f"nothing to evaluate: {directory} holds no checkpoint and --config.pretrained is not set")
        params = parallel.replicate(state.params)
        train, train_labels = source_features(e, params, e.train_source)
        test, test_labels = source_features(e, params, e.test_source)
        predicted = knn(train, train_labels, test, e.train_source.num_classes)
        metrics = {f"knn_{k}": float(np.mean(labels == test_labels)) for k, labels in predicted.items()}
        log.info("  ".join(f"{name} {value:.5g}" for name, value in metrics.items()))
        return metrics


def source_features(
    e: experiment.Experiment, params: Any, source: sources.Source
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """`cls` of `features.image_features` and label of every example of a source, once each, in no promised order.

    Args:
      params: replicated over the devices; a head is ignored.
    """
    mean, std = experiment.normalisation(e.origin)

    def run(params, batch):
        found = image_features(e.model, params, augment.normalize(batch["image"], mean, std))
        return {"cls": found["cls"], "label": batch["label"], "mask": batch["mask"]}

    compute = parallel.pmap_apply(run)
    parts: list[dict[str, np.ndarray]] = []
    running = None
    for batch in batches_of(e, source):
        dispatched = compute(params, batch)
        parts += _on_host(running)
        running = dispatched
    parts += _on_host(running)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in ("cls", "label", "mask")}
    whole = multihost_utils.process_allgather(whole, tiled=True)
    keep = whole["mask"]
    if keep.sum() != len(source):
        raise AssertionError(f"computed features of {keep.sum()} of {len(source)} examples")
    return whole["cls"][keep], whole["label"][keep]


def _on_host(sharded: dict[str, Array] | None) -> list[dict[str, np.ndarray]]:
    """(devices, b, …) → (devices · b, …), in a list; an empty one of None."""
    return [{name: np.concatenate(jax.device_get(x)) for name, x in sharded.items()}] if sharded else []
