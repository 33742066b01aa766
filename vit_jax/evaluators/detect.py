"""COCO's average precision of a detector, on a split of any dataset with boxes of the training set's classes."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vit_jax.data import sources
from vit_jax.data.host.decode import header_size
from vit_jax.errors import UserError
from vit_jax.evaluators import average_precision, passes
from vit_jax.run import signals
from vit_jax.run.experiment import Experiment
from vit_jax.tasks.detect import in_pixels


def make_score(experiment: Experiment, source: sources.Source) -> Callable[[Any], tuple[dict[str, float], float]]:
    """parameters → (the twelve numbers of `average_precision.NAMES`, images per second and device).

    Boxes are measured in pixels of the upright image, at most 100 an image; what there are no objects for is left out.
    """
    if "boxes" not in source.features:
        raise UserError(f"its images, such as {source.where(0)}, have no boxes: average precision needs them")
    source = passes.with_classes_of(experiment.train_source, source)
    rows = passes.make_rows(experiment, experiment.task.predict)
    truths_and_sizes = functools.cache(functools.partial(_truths, source))

    def score(params: Any) -> tuple[dict[str, float], float]:
        started = time.perf_counter()
        outputs = rows(params, source)
        rate = len(source) / (time.perf_counter() - started) / jax.device_count()
        truths, sizes = truths_and_sizes()
        found = [
            average_precision.Found(in_pixels(outputs["boxes"][i], size), outputs["labels"][i], outputs["scores"][i])
            for i, size in enumerate(sizes)
        ]
        metrics = average_precision.average_precision(truths, found, source.num_classes)
        return {name: value for name, value in metrics.items() if not np.isnan(value)}, rate

    return score


make_evaluator = passes.of_split(make_score)


def _truths(source: sources.Source) -> tuple[list[average_precision.Truth], list[tuple[int, int]]]:
    """The objects of all images, and the sizes (h, w) of these."""
    truths, sizes = [], []
    for example in signals.watch(source[i] for i in range(len(source))):
        truths.append(average_precision.Truth(example["boxes"], example["box_labels"], example["box_crowd"]))
        sizes.append(header_size(example["image"], exif_rotated=source.exif_rotated))
    return truths, sizes
