"""A trained model in Python: `vit_jax.load(source).predict("cat.jpg")`, and `vit_jax.fine_tune("photos/", pretrained=…)`."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, ArrayLike, Float
from PIL import Image

from vit_jax import predictor, recipes
from vit_jax.data.host.inputs import is_one, read_images
from vit_jax.errors import listed
from vit_jax.models import token_merging
from vit_jax.tasks import prompts
from vit_jax.tasks.task import Params


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of one image; `print(prediction)` shows it as a table.

    Attributes:
      answers: what `vit-jax predict --json` prints: of a classifier {"predictions": [{"label", "index", "probability"}]},
        the most probable first; of a detector {"objects": [{"label", "score", "box"}]}, with corners in pixels.
      outputs: the arrays behind it, such as "logits" and "probabilities", (classes,).
      picture: the image with what was found drawn into it, None where a task has nothing to draw.
    """

    answers: dict[str, Any]
    outputs: dict[str, np.ndarray] = dataclasses.field(repr=False)
    picture: Image.Image | None
    text: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model of any task. Images are paths, encoded bytes, PIL images or arrays of 0..255, one or several."""

    predictor: predictor.Predictor

    def __repr__(self) -> str:
        described, names = self.predictor.description, self.class_names
        count = sum(x.size for x in jax.tree.leaves(self.params))
        facts = [f"{described.model_name or described.model_type} of {self.predictor.source}", f"{count:,} parameters"]
        if self.image_size:
            facts.append(f"images of {'x'.join(map(str, self.image_size))} pixels")
        if names:
            facts.append(f"{len(names):,} classes: {listed(names, most=3)}")
        return f"<{', '.join(facts)}>"

    @property
    def params(self) -> Params:
        """The parameters, a nested dict of arrays."""
        return self.predictor.params

    @property
    def module(self) -> nn.Module:
        """The Flax module: `module.apply({"params": params}, images)`, of normalised images (b h w 3)."""
        return self.predictor.task.model.module

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in the order of the logits, () of a model without a head."""
        return self.predictor.description.class_names

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of images as the module sees them."""
        return self.predictor.image_size

    def predict(self, images: Any, **options: Any) -> Prediction | list[Prediction]:
        """A prediction of one image, or a list of them of several.

        Args:
          options: those of the task: `top=5` of a classifier, `threshold=0.5` of a detector.

        Raises:
          UserError: for what is no image, and an option that the task does not have.
        """
        pictures = read_images(images)
        show = self.predictor.show(options)
        outputs = self.predictor(pictures)
        found = []
        for i, pixels in enumerate(pictures):
            of_image = {name: x[i] for name, x in outputs.items()}
            shown = show(of_image, pixels.shape[:2])
            picture = shown.draw(Image.fromarray(pixels)) if shown.draw else None
            found.append(Prediction(shown.json, of_image, picture, "\n".join(shown.text)))
        return found[0] if is_one(images) else found

    def probabilities(self, images: Any) -> Float[np.ndarray, "n classes"]:
        """A classifier's probability of each of `class_names`."""
        return self.predictor(read_images(images))["probabilities"]

    def features(self, images: Any, kind: str = "cls") -> Float[np.ndarray, "n d"] | Float[np.ndarray, "n h w d"]:
        """One vector an image ("cls": the class token, or the mean of a model without one), or a grid of them ("patches")."""
        return self.predictor.features(read_images(images), kind=kind)[kind]

    def attention(self, images: Any, method: str = "rollout", **options: Any) -> Float[np.ndarray, "n h w"]:
        """Where a ViT looks, by patch: "rollout", "mean" of the last layer, or "relevance" for a class, `target="cat"`.

        `options` are those of `Predictor.attention_maps`.
        """
        return self.predictor.attention(read_images(images), method=method, **options)

    def with_labels(self, labels: Sequence[str], *, templates: Sequence[str] = (prompts.PLACE,)) -> "Model":
        """A model of images and texts that says which of these labels fit an image, see `Predictor.with_labels`."""
        return Model(self.predictor.with_labels(labels, templates=templates))

    def embed_images(self, images: Any) -> Float[np.ndarray, "n d"]:
        """The embeddings of images, each of length 1, by a model of images and texts."""
        return self.predictor.embed_images(read_images(images))

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """The embeddings of texts, each of length 1, in the same space: the product of two tells how well they go together."""
        return self.predictor.embed_texts(texts)

    def export(self, out: str | os.PathLike, **options: Any) -> Path:
        """Writes the model as `out`, NAME.onnx or, with `to="stablehlo"`, NAME.stablehlo, for other programs.

        `options` are those of `export.files.write`: `dtype="float16"`, `int8="dynamic"`, `preprocess=True`.
        """
        from vit_jax.export import files

        return files.write(self.predictor, out, **options)

    def logits(self, inputs: ArrayLike) -> Float[Array, "b classes"]:
        """What the module makes of normalised images (b h w 3)."""
        with token_merging.merging(self.predictor.tome):
            return self.module.apply({"params": self.params}, jnp.asarray(inputs), train=False)


def load(source: str | os.PathLike, **options: Any) -> Model:
    """The model of a workdir, file, folder, gs://…, https://… or hf://OWNER/NAME; the options are those of `predictor.load`.

    A file without a head, such as hf://facebook/dinov2-base, is opened with `head=False`.
    """
    return Model(predictor.load(source, **options))


def fine_tune(
    data: str | os.PathLike,
    *,
    pretrained: str | os.PathLike,
    workdir: str | os.PathLike | None = None,
    recipe: str = "photos",
    **fields: Any,
) -> Model:
    """Trains a model on a folder of images or a dataset, as `vit-jax train --config=RECIPE:DATA` does, and returns it.

    Args:
      pretrained: where to start, any source.
      workdir: where all is written, by default runs/NAME of the data. The same call continues what it holds.
      recipe: a name of `vit-jax recipes`, or a Python file.
      fields: of the recipe: `total_steps=100, pp={"crop": 64}`.
    """
    from vit_jax.train import train_and_evaluate

    config = recipes.load(recipe, os.fspath(data))
    config.pretrained = os.fspath(pretrained)
    config.update(fields)
    workdir = Path(workdir or Path("runs", Path(data).resolve().name))
    train_and_evaluate(config, workdir)
    return load(workdir)
