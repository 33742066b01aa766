"""How good written sentences are: `exact_match`, BLEU, ROUGE-L and CIDEr, see `sentence_scores`. Every image counts once."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.evaluators import passes, sentence_scores
from vit_jax.run.experiment import Experiment

OUTPUTS = ("tokens", "lengths")


def make_score(experiment: Experiment, source: sources.Source) -> Callable[[Any], tuple[dict[str, float], float]]:
    """parameters → (metrics, images per second and device).

    `exact_match` is the share of images with a sentence that is word for word one of theirs.
    """
    if "text" not in source.features:
        raise UserError(f"{source.where(0)} has no sentences: name a split or dataset with captions")
    if experiment.task.write is None:
        raise UserError("the model writes no sentences: the evaluator caption is for the task caption")
    rows = passes.make_rows(experiment, written_by(experiment, OUTPUTS))

    def score(params: Any) -> tuple[dict[str, float], float]:
        started = time.perf_counter()
        outputs = rows(params, source)
        rate = len(source) / (time.perf_counter() - started) / jax.device_count()
        written = [sentence_scores.words_of(one.text) for one in experiment.task.write(outputs)]
        truths = [[sentence_scores.words_of(text) for text in source.texts(i)] for i in range(len(source))]
        exact = float(np.mean([words in known for words, known in zip(written, truths, strict=True)]))
        return {"exact_match": exact} | sentence_scores.scores(written, truths), rate

    return score


make_evaluator = passes.of_split(make_score)


def written_by(experiment: Experiment, names: tuple[str, ...]) -> Callable[[Any, passes.Batch], dict[str, Array]]:
    """(parameters, batch) → some outputs of the task."""

    def run(params: Any, batch: passes.Batch) -> dict[str, Array]:
        outputs = experiment.task.predict(params, batch)
        return {name: outputs[name] for name in names}

    return run
