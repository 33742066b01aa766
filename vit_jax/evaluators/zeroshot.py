"""Names images by the texts of their classes, for which the model was not trained (https://arxiv.org/abs/2103.00020)."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.evaluators import embeddings, passes
from vit_jax.run.experiment import Experiment
from vit_jax.tasks import prompts


def make_evaluator(
    experiment: Experiment,
    *,
    split: str | None = None,
    dataset: str | None = None,
    labels: str | None = None,
    templates: str = "none",
) -> Callable[[Any], dict[str, float]]:
    """parameters → `zeroshot`, the share of images that lie nearest to the text of their own class.

    Args:
      split, dataset: `config.pp.test` of `config.dataset` if not said otherwise; its images have one label each.
      labels: as `prompts.read_labels` takes them, in the order of the classes; the class names if not said otherwise.
      templates: as `prompts.read_templates` takes them.
    """
    source = passes.open_labelled(experiment, split, dataset)
    names = prompts.read_labels(labels) if labels else prompts.readable(source.class_names)
    if len(names) != source.num_classes:
        raise UserError(f"labels={labels} are {len(names)}, and {source.where(0)} is one of {source.num_classes} classes")
    prompts.check_labels(names, where=labels or "the class names")
    sentences = prompts.read_templates(templates)
    of_images, of_texts = embeddings.make_of_images(experiment, "label"), embeddings.make_of_texts(experiment)

    def evaluator(params: Any) -> dict[str, float]:
        ztxt = prompts.embed_labels(functools.partial(of_texts, params), names, sentences)
        found = of_images(params, source)
        return {"zeroshot": float(np.mean((found["zimg"] @ ztxt.T).argmax(axis=1) == found["label"]))}

    return evaluator
