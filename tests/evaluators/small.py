"""A tiny model with random parameters and a hundred digits, and what it makes of them without the loader."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests import tiny
from vit_jax.data import sources
from vit_jax.data.host.decode import decode
from vit_jax.run import experiment as experiments
from vit_jax.settings import Settings


def config(**overrides):
    """37 test images in batches of 8: the last one is padded."""
    return tiny.config(**{"trainer": "evaluate", "pretrained_dir": None} | overrides)


def experiment(workdir: Path, **overrides) -> tuple[experiments.Experiment, Any]:
    """(experiment, parameters), with a head that is not zero."""
    e = experiments.build(Settings.from_config(config(**overrides)))
    params = jax.device_get(jax.jit(e.task.model.module.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"])
    params["head"]["kernel"] = (
        np.random.default_rng(0).normal(scale=0.3, size=params["head"]["kernel"].shape).astype(np.float32)
    )
    return e, params


def images_and_labels(source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images and labels of all examples."""
    examples = [source[i] for i in range(len(source))]
    images = np.stack([decode(x["image"], exif_rotated=False) for x in examples]).astype(np.float32)
    return images / 127.5 - 1, np.array([x["label"] for x in examples])


def features(e: experiments.Experiment, params: Any, source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
    """The class token and label of all examples, computed in float64, in which the order of sums does not matter."""
    images, labels = images_and_labels(source)
    with jax.enable_x64():
        exact, params = e.task.model.module.clone(dtype="float64"), jax.tree.map(np.float64, params)
        found = jax.jit(lambda p, x: exact.apply({"params": p}, x, method="features")["cls"])(params, np.float64(images))
        return np.asarray(found), labels


def logits(e: experiments.Experiment, params: Any, source: sources.Source) -> tuple[np.ndarray, np.ndarray]:
    """Logits in float64 and labels of all examples, computed in one piece."""
    images, labels = images_and_labels(source)
    found = jax.jit(lambda p, x: e.task.model.module.apply({"params": p}, x))(params, images)
    return np.asarray(found, np.float64), labels
