"""The embeddings of a split's images, and of any texts, by a model of both."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vit_jax.data.features import Source, Text
from vit_jax.errors import UserError
from vit_jax.evaluators import passes
from vit_jax.run.experiment import Experiment

Params = Any


class Sentences(Source):
    """Texts alone, one an example."""

    features = {"text": Text()}
    exif_rotated = False

    def __init__(self, sentences: Sequence[str]):
        self._sentences = sentences

    def __len__(self) -> int:
        return len(self._sentences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": (self._sentences[index],)}

    def where(self, index: int) -> str:
        return f"the text {self._sentences[index]!r}"


def make_of_images(experiment: Experiment, *fields: str) -> Callable[[Params, Source], dict[str, np.ndarray]]:
    """(parameters on the devices, source) → `zimg` (n, d), each of length 1, and these fields of its examples, in its order."""
    predict, evaluated = experiment.task.predict, experiment.task.eval_example

    def eval_example(example: dict[str, Any], *, exif_rotated: bool) -> dict[str, np.ndarray]:
        image = evaluated({"image": example["image"]}, exif_rotated=exif_rotated)
        return image | {name: np.asarray(example[name]) for name in fields}

    def run(params: Params, batch: passes.Batch) -> passes.Batch:
        of_image = {name: batch[name] for name in ("image", "grid") if name in batch}
        return {"zimg": predict(params, of_image)["zimg"]} | {name: batch[name] for name in fields}

    return passes.make_rows(_with_examples(experiment, eval_example), run)


def make_of_texts(experiment: Experiment) -> Callable[[Params, Sequence[str]], Float[np.ndarray, "n d"]]:
    """(parameters on the devices, texts) → their embeddings, each of length 1. UserError for a task that reads no texts."""
    predict, tokenize = experiment.task.predict, experiment.task.tokenize
    if tokenize is None:
        raise UserError(
            "this task reads no texts: images and words are compared by the task contrast, with config.task.vocab, the "
            "vocabulary of its text tower"
        )

    def eval_example(example: dict[str, Any], *, exif_rotated: bool) -> dict[str, np.ndarray]:
        return {"tokens": tokenize(example["text"])[0]}

    def run(params: Params, batch: passes.Batch) -> passes.Batch:
        return {"ztxt": predict(params, {"tokens": batch["tokens"]})["ztxt"]}

    rows = passes.make_rows(_with_examples(experiment, eval_example), run)
    return lambda params, texts: rows(params, Sentences(texts))["ztxt"]


def _with_examples(experiment: Experiment, eval_example: Callable) -> Experiment:
    return dataclasses.replace(experiment, task=dataclasses.replace(experiment.task, eval_example=eval_example))
