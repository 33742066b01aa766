"""Untrained models to be served, and photos for them."""

import io

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from vit_jax import tasks
from vit_jax.checkpoint import Description
from vit_jax.predictor import Predictor

VIT = {
    "hidden_size": 16,
    "patches": {"size": (4, 4)},
    "transformer": {"num_layers": 1, "mlp_dim": 16, "num_heads": 2},
}
PIXELS = {"image_size": (16, 24), "grid": (4, 6), "mean": [110.0, 120.0, 130.0], "std": [50.0, 60.0, 70.0]}
CLASSES = ("ape", "bear", "cat", "dög", "<eel>")


def predictor(**description) -> Predictor:
    """A model with random parameters, none of them 0."""
    description = Description(**PIXELS | {"class_names": CLASSES} | description)
    task = tasks.of_description(description)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(task.init, jax.random.key(0))
    flat = {name: rng.normal(0, 0.3, x.shape).astype(np.float32) for name, x in flatten_dict(shapes, sep="/").items()}
    positive = {name: np.abs(x) for name, x in flat.items() if name.endswith("var")}
    return Predictor(task, unflatten_dict(flat | positive, sep="/"), description)


def classifier(**description) -> Predictor:
    """Of five classes."""
    return predictor(model_type="ViT", model=VIT | {"num_classes": len(CLASSES)}, **description)


def detector() -> Predictor:
    """Of 24 boxes."""
    fields = {"body": {"vit": VIT}, "num_classes": len(CLASSES)}
    return predictor(model_type="TokenDetector", model=fields, task={"type": "detect"})


def segmenter() -> Predictor:
    """Of a class for every pixel."""
    fields = {"body": {"vit": VIT}, "num_classes": len(CLASSES), "places": 1}
    return predictor(model_type="LinearSegmenter", model=fields, task={"type": "segment"})


def photo(seed: int, kind: str = "PNG", size: tuple[int, int] = (20, 30)) -> bytes:
    """An encoded image of noise, (h, w) pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
