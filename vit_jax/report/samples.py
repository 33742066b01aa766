"""What a recipe makes of some of its training images."""

import functools
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import UInt8

from vit_jax.data import loader, sources
from vit_jax.data.host.decode import ImageError
from vit_jax.settings import Settings
from vit_jax.tasks.task import Task

Column = tuple[UInt8[np.ndarray, "b h w 3"], list[str]]


def augmented(task: Task, source: sources.Source, settings: Settings, *, rows: int, columns: int) -> list[Column]:
    """Columns of images and what to write below them: first as they are evaluated, then as they are trained on, drawn anew
    in every column. `settings.seed` takes other images and draws; bad ones are passed over if `settings.bad_images` is skip.
    """
    chosen: dict[int, dict[str, np.ndarray]] = {}
    for i in map(int, np.random.default_rng(settings.seed).permutation(len(source))):
        try:
            chosen[i] = loader.load(source, i, task.eval_example)
        except ImageError as e:
            if settings.bad_images != "skip":
                raise
            bad = e
        if len(chosen) == rows:
            break
    if not chosen:
        raise bad
    grid = [task.preview(_stacked(chosen.values()), None)]
    for column in range(1, columns):
        rngs = [np.random.default_rng((settings.seed, column, row)) for row in range(len(chosen))]
        examples = [
            loader.load(source, i, functools.partial(task.train_example, rng=rng))
            | {"seed": rng.integers(2**32, dtype=np.uint32)}
            for i, rng in zip(chosen, rngs, strict=True)
        ]
        grid.append(task.preview(_stacked(examples), jax.random.fold_in(jax.random.key(settings.seed), column)))
    return grid


def _stacked(examples: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    examples = list(examples)
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
