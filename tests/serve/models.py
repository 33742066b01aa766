"""Untrained models to be served, and photos for them."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from vit_jax import tasks
from vit_jax.checkpoint import Description
from vit_jax.data.digit_pairs import VOCAB
from vit_jax.predictor import Predictor

VIT = {
    "hidden_size": 16,
    "patches": {"size": (4, 4)},
    "transformer": {"num_layers": 1, "mlp_dim": 16, "num_heads": 2},
}
PIXELS = {"image_size": (16, 24), "grid": (4, 6), "mean": [110.0, 120.0, 130.0], "std": [50.0, 60.0, 70.0]}
CLASSES = ("ape", "bear", "cat", "dög", "<eel>")


def predictor(vocab: Path | None = None, **description) -> Predictor:
    """A model with random parameters, none of them 0; `vocab` is the vocabulary of one that writes."""
    description = Description(**PIXELS | {"class_names": CLASSES} | description)
    task = tasks.of_description(description, vocab)
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


def captioner(kind: str) -> Predictor:
    """Of at most seven words that tell two digits."""
    lstm = {"width": 16, "embedding_dim": 16, "attention_dim": 8}
    transformer = {"width": 16, "num_heads": 2, "mlp_dim": 16, "num_layers": 2, "max_length": 7}
    fields = {"body": {"vit": VIT}, "vocabulary": 19, **(transformer if kind == "Captioner" else lstm)}
    told = {"tokenizer": "bert", "vocab": VOCAB.name, "max_len": 8}
    task = {"type": "caption", "beams": 2, "length_penalty": 1.0}
    made = predictor(VOCAB, model_type=kind, model=fields, task=task, text=told, class_names=())
    return dataclasses.replace(made, params=jax.tree.map(jnp.asarray, made.params))


def photo(seed: int, kind: str = "PNG", size: tuple[int, int] = (20, 30)) -> bytes:
    """An encoded image of noise, (h, w) pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()
