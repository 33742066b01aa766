"""What is exported: a function of images, and what must be known to use it without this package."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Shaped, UInt8

from vit_jax import tasks
from vit_jax.data.device import augment
from vit_jax.data.host import text
from vit_jax.errors import UserError
from vit_jax.models import token_merging
from vit_jax.predictor import Predictor
from vit_jax.tasks import images

DTYPES = ("float32", "float16")
Outputs = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of images (b, h, w, 3) of the model's size, which are called `image`, to named outputs, (b, …).

    With `preprocess` the images are uint8 and are normalised inside, without it they are float32 and normalised before.
    `dtype` is what the layers compute in and what the kernels are kept in; outputs are float32.
    """

    predictor: Predictor
    dtype: str = "float32"
    preprocess: bool = False

    def __post_init__(self):
        if self.predictor.task.needs[0] != "image":
            raise UserError(f"{self.predictor.source} does not read images: only models of images are exported")
        if self.predictor.description.preprocessing.get("max_patches"):
            size = ",".join(map(str, self.predictor.image_size))
            raise UserError(f"{self.predictor.source} keeps the shapes of photos: give one size to export it, --size={size}")

    @property
    def image_dtype(self) -> Any:
        return jnp.uint8 if self.preprocess else jnp.float32

    def example(self, batch: Any) -> jax.ShapeDtypeStruct:
        """The shape of `batch` images, a number or a symbol."""
        return jax.ShapeDtypeStruct((batch, *self.predictor.image_size, 3), self.image_dtype)

    def function(self, params: Any, interceptor: Callable | None = None) -> Callable[[Shaped[Array, "b h w 3"]], Outputs]:
        """images → outputs, with these parameters inside; the model's modules are called within flax's `interceptor`."""
        description = self.predictor.description
        mean, std = (description.mean, description.std) if self.preprocess else ((0.0,) * 3, (1.0,) * 3)
        model = {**description.model, "dtype": self.dtype}
        task = tasks.of_description(dataclasses.replace(description, model=model, mean=mean, std=std), self.vocabulary)

        def run(pixels: Shaped[Array, "b h w 3"]) -> Outputs:
            if task.evaluators == ("classify",) and not description.class_names:
                inputs = augment.normalize(pixels, mean, std)
                return images.image_features(task.model.module, params, inputs)
            extent = jnp.broadcast_to(jnp.int32(pixels.shape[1:3]), (pixels.shape[0], 2))  # detectors: no part is padding
            outputs = task.predict(params, {"image": pixels.astype(jnp.float32), "extent": extent})
            return {name: y.astype(jnp.float32) if jnp.issubdtype(y.dtype, jnp.floating) else y for name, y in outputs.items()}

        inner = run if interceptor is None else nn.intercept_methods(interceptor)(run)
        return token_merging.merging(self.predictor.tome)(inner)

    @property
    def vocabulary(self) -> Path | None:
        """That of a model that writes."""
        return self.predictor.task.files[0] if self.predictor.task.write else None

    def inputs(self, pixels: UInt8[np.ndarray, "b h w 3"]) -> Shaped[np.ndarray, "b h w 3"]:
        """Images as the program takes them."""
        description = self.predictor.description
        mean, std = np.float32(description.mean), np.float32(description.std)
        return pixels if self.preprocess else (pixels.astype(np.float32) - mean) / std

    def facts(self) -> dict[str, Any]:
        """The content of the JSON file beside, and of the metadata of ONNX."""
        description, params = self.predictor.description, self.predictor.params
        outputs = jax.eval_shape(self.function(params), self.example(1))
        return {
            "model_name": description.model_name,
            "task": description.task["type"],
            "input": {
                "name": "image",
                "dtype": jnp.dtype(self.image_dtype).name,
                "shape": ["batch", *self.predictor.image_size, 3],
                "channels": "RGB, last",
                "values": "0 to 255" if self.preprocess else "(pixel - mean) / std of pixels from 0 to 255",
            },
            "outputs": {name: {"dtype": y.dtype.name, "shape": ["batch", *y.shape[1:]]} for name, y in outputs.items()},
            "mean": description.mean,
            "std": description.std,
            "image_size": self.predictor.image_size,
            "preprocessing": dict(description.preprocessing),
            "head": description.head,
            "class_names": description.class_names,
            "dtype": self.dtype,
            **({"text": self._text()} if self.vocabulary else {}),
        }

    def _text(self) -> dict[str, Any]:
        """What must be known to make words of tokens, but for the tokenizer's file."""
        told = {name: x for name, x in self.predictor.description.text.items() if name != "vocab"}
        kind, max_len = told.pop("tokenizer"), told.pop("max_len")
        words = text.make(kind, self.vocabulary, max_len, **told)
        return {"tokenizer": kind, "start_token": words.start_token, "stop_token": words.stop_token}


def reference(predictor: Predictor) -> Callable[[UInt8[np.ndarray, "b h w 3"]], dict[str, np.ndarray]]:
    """uint8 images of the model's size → what the model makes of them in float32, which every file is compared with."""
    function = jax.jit(Program(predictor, preprocess=True).function(predictor.params))
    return lambda pixels: {name: np.asarray(y) for name, y in function(pixels).items()}


def random_pixels(size: tuple[int, int], count: int) -> UInt8[np.ndarray, "b h w 3"]:
    """Images for a comparison: noise of a few sizes of grain, always the same."""
    rng = np.random.default_rng(0)
    grains = [rng.integers(0, 256, (-(-size[0] // n), -(-size[1] // n), 3), np.uint8) for n in (1, 4, 16)]
    drawn = [grain.repeat(n, 0).repeat(n, 1)[: size[0], : size[1]] for grain, n in zip(grains, (1, 4, 16), strict=True)]
    return np.stack([drawn[i % 3] for i in range(count)])


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> Float[np.ndarray, ""]:
    """The largest difference of any output, in units of the largest number of that output, if that is above 1.

    Of labels and tokens, which are whole numbers, it is the share that is not the same.
    """

    def of_output(x: np.ndarray, y: np.ndarray) -> float:
        if np.issubdtype(y.dtype, np.integer):
            return (x != y).mean()
        return np.abs(np.float64(x) - y).max() / max(1.0, np.abs(np.float64(y)).max())

    return max(of_output(np.asarray(found[name]), y) for name, y in expected.items())
