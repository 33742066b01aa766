"""Whether a captioner looks at what it names: how much of its attention falls into the box of the object that a word names."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from vit_jax.data import sources
from vit_jax.data.host.decode import header_size
from vit_jax.errors import UserError
from vit_jax.evaluators import passes
from vit_jax.evaluators.caption import OUTPUTS, written_by
from vit_jax.run.experiment import Experiment


def make_evaluator(
    experiment: Experiment, *, split: str | None = None, dataset: str | None = None
) -> Callable[[Any], dict[str, float]]:
    """parameters → `attention_in_box`, and `box_area`, what attention that falls everywhere alike would give.

    Both are means over all words that are the class of exactly one box of their image, each word of a written sentence
    weighed alike.

    Args:
      split, dataset: `config.pp.test` of `config.dataset` if not said otherwise; it has boxes, and images are seen whole.
    """
    source = passes.open_split(experiment, split, dataset)
    if "boxes" not in source.features:
        raise UserError(f"{source.where(0)} has no boxes: name a split or dataset with boxes of the things in the sentences")
    if experiment.task.write is None:
        raise UserError("the model writes no sentences: the evaluator grounding is for the task caption")
    if experiment.settings.pp.eval_resize is not None:
        raise UserError("config.pp.eval_resize cuts off a part of the image, and so of its boxes: leave it out")
    rows = passes.make_rows(experiment, written_by(experiment, (*OUTPUTS, "attention")))
    names = source.features["boxes"].names

    def evaluator(params: Any) -> dict[str, float]:
        outputs = rows(params, source)
        inside, areas = [], []
        for i, one in enumerate(experiment.task.write(outputs)):
            boxes = _boxes(source, i)
            for word, places in one.words():
                of_word = [box for label, box in boxes if names[label] == word]
                if len(of_word) == 1:
                    inside.append(share(outputs["attention"][i, places].mean(axis=0), of_word[0]))
                    left, top, right, bottom = of_word[0]
                    areas.append((right - left) * (bottom - top))
        if not inside:
            return {"attention_in_box": 0.0, "box_area": 0.0}
        return {"attention_in_box": float(np.mean(inside)), "box_area": float(np.mean(areas))}

    return evaluator


def share(attention: Float[np.ndarray, "h w"], box: Float[np.ndarray, "4"]) -> float:
    """How much of the attention, which is spread evenly over each patch, lies in a box: left, top, right, bottom in 0..1."""
    left, top, right, bottom = box
    inside = (_covered(n, *ends) for n, ends in zip(attention.shape, ((top, bottom), (left, right)), strict=True))
    rows, columns = inside
    return float(rows @ attention @ columns / attention.sum())


def _covered(n: int, start: float, stop: float) -> Float[np.ndarray, " n"]:
    """The share of each of n equal parts of 0..1 that lies between start and stop."""
    edges = np.arange(n + 1) / n
    return (np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start)).clip(0) * n


def _boxes(source: sources.Source, index: int) -> list[tuple[int, Float[np.ndarray, "4"]]]:
    """(class, box as parts of the image) of each object of an example."""
    example = source[index]
    height, width = header_size(example["image"], exif_rotated=source.exif_rotated)
    boxes = np.asarray(example["boxes"], np.float64) / [width, height, width, height]
    return list(zip(example["box_labels"].tolist(), boxes, strict=True))
