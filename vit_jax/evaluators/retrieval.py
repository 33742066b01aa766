"""Finds the sentences of an image among those of all images, and the images of a sentence."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vit_jax.errors import UserError
from vit_jax.evaluators import embeddings, passes
from vit_jax.run.experiment import Experiment

KS = (1, 5, 10)
_CELLS = 1 << 24  # scores of a chunk: 64 MiB


def make_evaluator(
    experiment: Experiment, *, split: str | None = None, dataset: str | None = None, k: Sequence[int] = KS
) -> Callable[[Any], dict[str, float]]:
    """parameters → `image_to_text_1`, `text_to_image_1` and so on for each k, see `recalls`.

    Args:
      split, dataset: `config.pp.test` of `config.dataset` if not said otherwise; each image has one or more sentences.
    """
    source = passes.open_split(experiment, split, dataset)
    if "text" not in source.features:
        raise UserError(f"{source.where(0)} has no sentences: name a split or dataset with captions")
    if min(k, default=0) < 1:
        raise UserError(f"k of {tuple(k)}: all must be positive, and one k or more")
    of_images, of_texts = embeddings.make_of_images(experiment), embeddings.make_of_texts(experiment)

    def evaluator(params: Any) -> dict[str, float]:
        numbers: dict[str, int] = {}
        pairs = [(i, numbers.setdefault(text, len(numbers))) for i in range(len(source)) for text in source.texts(i)]
        zimg, ztxt = of_images(params, source)["zimg"], of_texts(params, list(numbers))
        return recalls(zimg, ztxt, np.array(pairs), k)

    return evaluator


def recalls(
    zimg: Float[np.ndarray, "n d"], ztxt: Float[np.ndarray, "m d"], pairs: Int[np.ndarray, "p 2"], ks: Sequence[int] = KS
) -> dict[str, float]:
    """Recall at k, both ways; a k for which all candidates would be found is left out.

    `image_to_text_k` is the share of images for which one of their sentences is among the k nearest; `text_to_image_k` the
    share of sentences, counted once for every image that has them, for which one of their images is. A wrong candidate that
    is as near as the right one counts as nearer, so that a model that tells nothing apart finds nothing.

    Args:
      ztxt: the embeddings of sentences that differ.
      pairs: (image, sentence) for every sentence of every image.
    """
    image, text = np.unique(pairs, axis=0).T
    ranks = {"image_to_text": _ranks(zimg, ztxt, image, text), "text_to_image": _ranks(ztxt, zimg, text, image)[text]}
    candidates = {"image_to_text": len(ztxt), "text_to_image": len(zimg)}
    return {f"{way}_{k}": float(np.mean(rank < k)) for k in ks for way, rank in ranks.items() if k < candidates[way]}


def _ranks(
    asked: Float[np.ndarray, "n d"], known: Float[np.ndarray, "m d"], row: Int[np.ndarray, " p"], column: Int[np.ndarray, " p"]
) -> Int[np.ndarray, " n"]:
    """For each row of `asked` how many wrong rows of `known` are no farther than the nearest right one, some rows at a time."""
    ranks, size = np.empty(len(asked), np.int64), max(1, _CELLS // len(known))
    for start in range(0, len(asked), size):
        scores = asked[start : start + size] @ known.T
        here = (row >= start) & (row < start + size)
        right = np.zeros(scores.shape, bool)
        right[row[here] - start, column[here]] = True
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        ranks[start : start + size] = ((scores >= best) & ~right).sum(axis=1)
    return ranks
