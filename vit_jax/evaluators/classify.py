"""Accuracy and loss of a split of any dataset that has the classes of the training set."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.evaluators import passes
from vit_jax.run.experiment import Experiment
from vit_jax.tasks import classify

LOWER_IS_BETTER = ("loss",)


def make_score(experiment: Experiment, source: sources.Source) -> Callable[[Any], tuple[dict[str, float], float]]:
    """parameters → (`accuracy` and `loss`, images per second and device).

    For a dataset with several labels an image see `multi_label_sums`.
    """
    source = passes.with_classes_of(experiment.train_source, source)
    predict, loss = experiment.task.predict, experiment.settings.loss

    def sums_of(params: Any, batch: passes.Batch) -> dict[str, Array]:
        logits = predict(params, batch)["logits"]
        if "labels" in batch:
            return multi_label_sums(logits, batch["labels"], batch["valid"], loss=loss)
        return one_label_sums(logits, batch["label"], batch["valid"], loss=loss)

    run = passes.make_sums(experiment, source, sums_of)

    def score(params: Any) -> tuple[dict[str, float], float]:
        sums, rate = run(params)
        if not sums["count"]:
            raise UserError(f"none of the {len(source)} images to be scored has a label, the first being {source.where(0)}")
        return {name: float(sums[of] / sums["count"]) for name, of in (("accuracy", "correct"), ("loss", "loss"))}, rate

    return score


make_evaluator = passes.of_split(make_score)


def one_label_sums(
    logits: Float[Array, "b classes"], label: Int[Array, " b"], valid: Bool[Array, " b"], *, loss: str
) -> dict[str, Float[Array, ""]]:
    """Sums over the valid images: `loss` as in training, `correct` where the highest logit is the label's, `count`."""
    losses = classify.LOSSES[loss](logits, jax.nn.one_hot(label, logits.shape[-1]))
    correct = jnp.argmax(logits, axis=-1) == label
    return {"loss": jnp.sum(losses * valid), "correct": jnp.sum(correct & valid), "count": jnp.sum(valid)}


def multi_label_sums(
    logits: Float[Array, "b classes"], labels: Bool[Array, "b classes"], valid: Bool[Array, " b"], *, loss: str
) -> dict[str, Float[Array, ""]]:
    """Sums over the images that have a label, as ImageNet-ReaL counts (https://arxiv.org/abs/2006.07159).

    `correct`: the class with the highest logit is among the labels. `loss`: "sigmoid" as in training; "softmax" is the
    mean of −log p over the labels of an image, where big_vision takes their sum.
    """
    counted = valid & labels.any(axis=-1)
    correct = jnp.take_along_axis(labels, jnp.argmax(logits, axis=-1)[:, None], axis=-1)[:, 0]
    targets = labels.astype(jnp.float32)
    if loss == "softmax":
        targets /= jnp.maximum(targets.sum(axis=-1, keepdims=True), 1)
    losses = classify.LOSSES[loss](logits, targets)
    return {"loss": jnp.sum(losses * counted), "correct": jnp.sum(correct & counted), "count": jnp.sum(counted)}
