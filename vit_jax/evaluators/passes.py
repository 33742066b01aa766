"""A pass over a split: every example on the devices once, without augmentation."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vit_jax.checkpoint.classes import match_classes
from vit_jax.data import loader, sources
from vit_jax.data.renumbered import RenumberedSource
from vit_jax.errors import UserError
from vit_jax.finite import check_outputs
from vit_jax.run import signals
from vit_jax.run.experiment import Experiment
from vit_jax.tasks import images

Params = Any
Batch = dict[str, Array]


def open_split(experiment: Experiment, split: str | None, dataset: str | None, *, needs: Sequence[str] = ()) -> sources.Source:
    """A split of a dataset; None stands for `config.pp.test` and `config.dataset`, () for what the task itself `needs`."""
    settings = experiment.settings
    asked = dataset or settings.dataset, split or settings.pp.test
    own = {settings.pp.train: experiment.train_source, settings.pp.test: experiment.test_source}.get(asked[1])
    if dataset is None and own is not None and all(name in own.features or f"{name}s" in own.features for name in needs):
        return own
    return sources.get_source(*asked, needs=needs or experiment.task.needs, **settings.tfds_folders)


def open_labelled(experiment: Experiment, split: str | None, dataset: str | None) -> sources.Source:
    """`open_split` of a dataset with one label an image, which the task itself need not read."""
    source = open_split(experiment, split, dataset, needs=("image", "label"))
    if "labels" in source.features:
        raise UserError(f"{source.where(0)} may have several labels: only an evaluator of type classify can score it")
    if "label" not in source.features:
        raise UserError(
            f"{source.where(0)} has no class, by which this evaluator scores: name data that has, in its options,"
            ' such as config.evaluators = {"knn": {"dataset": "FOLDER"}}'
        )
    return source


def of_split(make_score: Callable[..., Callable]) -> Callable[..., Callable[[Any], dict[str, float]]]:
    """`make_evaluator` of a module whose `make_score(experiment, source)` gives parameters → (metrics, images per second)."""

    def make_evaluator(
        experiment: Experiment, *, split: str | None = None, dataset: str | None = None
    ) -> Callable[[Any], dict[str, float]]:
        """parameters → metrics of a split, of `config.pp.test` of `config.dataset` if not said otherwise."""
        score = make_score(experiment, open_split(experiment, split, dataset))
        return lambda params: score(params)[0]

    return make_evaluator


def open_pair(
    experiment: Experiment, train: str | None, test: str | None, dataset: str | None
) -> tuple[sources.Source, sources.Source]:
    """Two splits with the same classes and one label an image: to learn from, and to be tested on."""
    train_source = open_labelled(experiment, train or experiment.settings.pp.train, dataset)
    return train_source, with_classes_of(train_source, open_labelled(experiment, test, dataset))


def with_classes_of(known: sources.Source, source: sources.Source) -> sources.Source:
    """`source` with the classes and numbers of `known`, matched by name; UserError unless they are the same, in any order."""
    if known.class_names == source.class_names:
        return source
    try:
        numbers = match_classes(known.class_names, source.class_names, where="the model")
    except UserError as error:
        raise UserError(f"an evaluator's images, such as {source.where(0)}, have other classes: {error}") from error
    return RenumberedSource(source, numbers, known.class_names)


def make_sums(
    experiment: Experiment, source: sources.Source, function: Callable[[Params, Batch], dict[str, Array]]
) -> Callable[[Params], tuple[dict[str, Any], float]]:
    """parameters on the devices → (sums of `function` over all examples, images per second and device).

    `function(params, batch)` sums over the valid examples of a batch. Batches add up in float64, in which counts are
    exact. The first batch may compile and is not timed, unless it is the only one.
    """

    def seen(params: Params, batch: Batch) -> dict[str, Array]:
        return {"seen": jnp.sum(batch["valid"])} | function(params, batch)

    score, size = experiment.parallelism.eval_sums(seen), batch_size(experiment, source)

    def run(params: Params) -> tuple[dict[str, Any], float]:
        started, untimed = time.perf_counter(), 0
        sums: dict[str, Any] = {}
        running = None
        for batch in batches_of(experiment, source):
            dispatched = score(params, batch)
            _add(experiment, sums, running)
            if running is None and len(source) > size:
                jax.block_until_ready(dispatched)
                started, untimed = time.perf_counter(), size
            running = dispatched
        _add(experiment, sums, running)
        if (count := sums.pop("seen")) != len(source):
            raise AssertionError(f"counted {count} of {len(source)} examples")
        return sums, (len(source) - untimed) / (time.perf_counter() - started) / jax.device_count()

    return run


def make_rows(
    experiment: Experiment, function: Callable[[Params, Batch], dict[str, Array]]
) -> Callable[[Params, sources.Source], dict[str, np.ndarray]]:
    """(parameters on the devices, source) → what `function` makes of every example, (n, …), in the source's order.

    `function(params, batch)` gives arrays by example. The result is the same in all processes, and for any number of
    devices. UserError for rows that are not finite.
    """

    def numbered(params: Params, batch: Batch) -> dict[str, Array]:  # on canvases examples come in another order
        return function(params, batch) | {name: batch[name] for name in ("index",) if name in batch}

    compute = experiment.parallelism.eval_examples(numbered)

    def rows(params: Params, source: sources.Source) -> dict[str, np.ndarray]:
        parts: list[dict[str, np.ndarray]] = []
        running = None
        for batch in batches_of(experiment, source):
            dispatched = compute(params, batch)
            if running is not None:
                parts.append(_in_order(experiment.parallelism.gather(running)))
            running = dispatched
        parts.append(_in_order(experiment.parallelism.gather(running)))
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(outputs.pop("index"), kind="stable") if "index" in outputs else slice(None)
        outputs = {name: x[order][: len(source)] for name, x in outputs.items()}
        check_outputs(outputs, "the model")
        return outputs

    return rows


def make_features(
    experiment: Experiment,
) -> Callable[[Params, sources.Source], tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]]:
    """(parameters on the devices, source) → `cls` of `images.image_features`, and label, in the source's order.

    A head is ignored.
    """
    mean, std = images.normalisation(experiment.settings, experiment.origin)
    model = experiment.task.model.module

    def run(params: Params, batch: Batch) -> Batch:
        inputs = images.inputs(batch, mean, std)
        features = images.image_features(model, params, inputs, images.valid_pixels(batch))
        return {"cls": features["cls"], "label": batch["label"]}

    rows = make_rows(experiment, run)

    def features(params: Params, source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
        found = rows(params, source)
        return found["cls"], found["label"]

    return features


def batches_of(experiment: Experiment, source: sources.Source) -> Iterator[Batch]:
    """The examples of a source on the devices, each once; the last batch padded. With canvases in an order of their own."""
    batches = loader.eval_batches(
        source,
        experiment.task.eval_example,
        batch_size=batch_size(experiment, source),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        canvases=experiment.task.canvases,
    )
    return signals.watch(experiment.parallelism.prefetch(batches, experiment.settings.prefetch))


def batch_size(experiment: Experiment, source: sources.Source) -> int:
    """`config.batch_eval`, or as much of it as the source can fill, rounded up to a multiple of the devices."""
    devices = jax.device_count()
    return -(-min(experiment.settings.batch_eval, len(source)) // devices) * devices


def _add(experiment: Experiment, sums: dict[str, Any], on_devices: Batch | None) -> None:
    for name, value in experiment.parallelism.read(on_devices or {}).items():
        sums[name] = sums.get(name, 0) + value.astype(np.float64)


def _in_order(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A gathered batch in the source's order: the processes took turns with its examples, and stand one after another."""
    n = jax.process_count()
    return {name: x.reshape(n, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape) for name, x in batch.items()}
