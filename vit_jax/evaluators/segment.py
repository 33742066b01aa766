"""How well the pixels of a split are told apart: mean IoU, IoU by class and pixel accuracy, from one confusion matrix."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Num

from vit_jax.data import sources
from vit_jax.data.host.view import IGNORED
from vit_jax.errors import UserError
from vit_jax.evaluators import passes
from vit_jax.models.segment import at_pixels
from vit_jax.run.experiment import Experiment


def make_score(experiment: Experiment, source: sources.Source) -> Callable[[Any], tuple[dict[str, float], float]]:
    """parameters → (`scores`, images per second and device). Every image counts once, by the pixels of its view."""
    if "segmentation" not in source.features:
        raise UserError(f"its images, such as {source.where(0)}, have no masks: nothing can be compared")
    source = passes.with_classes_of(experiment.train_source, source)
    predict, count = experiment.task.predict, source.num_classes

    def sums_of(params: Any, batch: passes.Batch) -> dict[str, Array]:
        truth = batch["segmentation"]
        found = jnp.argmax(at_pixels(predict(params, batch)["logits"], truth.shape[1:]), axis=-1)
        return {"confusion": confusion(truth, found, batch["valid"], count)}

    run = passes.make_sums(experiment, source, sums_of)

    def score(params: Any) -> tuple[dict[str, float], float]:
        sums, rate = run(params)
        return scores(sums["confusion"], source.class_names), rate

    return score


make_evaluator = passes.of_split(make_score)


def confusion(
    truth: Integer[Array, "b h w"], found: Integer[Array, "b h w"], valid: Integer[Array, " b"], classes: int
) -> Integer[Array, "classes classes"]:
    """How many pixels of each class (row) were found to be of each (column), in valid images, where there is a class."""
    counted = (truth != IGNORED) & valid[:, None, None]
    place = jnp.where(counted, truth.astype(jnp.int32) * classes + found, classes * classes)
    return jnp.bincount(place.ravel(), length=classes * classes + 1)[:-1].reshape(classes, classes)


def scores(confused: Num[np.ndarray, "classes classes"], names: tuple[str, ...]) -> dict[str, float]:
    """`mIoU`, `pixel_accuracy`, and `IoU/NAME` of every class.

    IoU is what truth and prediction share of a class, of what they have together. A class that neither has is left out. To a
    name that several classes have their numbers are added.
    """
    shared: Float[np.ndarray, " classes"] = np.diag(confused).astype(np.float64)
    together = confused.sum(axis=0) + confused.sum(axis=1) - shared
    if not together.any():
        raise UserError("no pixel of the images to be scored has a class")
    iou = {i: float(s / t) for i, (s, t) in enumerate(zip(shared, together, strict=True)) if t}
    means = {"mIoU": float(np.mean(list(iou.values()))), "pixel_accuracy": float(shared.sum() / confused.sum())}
    return means | {f"IoU/{names[i]}" + f" ({i})" * (names.count(names[i]) > 1): value for i, value in iou.items()}
