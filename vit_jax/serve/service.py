"""A loaded model that answers many at a time: images are decoded in a pool of threads and computed in batches."""

import asyncio
import contextlib
import inspect
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.host.decode import ImageError, decode, header_size
from vit_jax.errors import UserError, printable
from vit_jax.finite import check_outputs
from vit_jax.predictor import Outputs, Predictor
from vit_jax.serve import batching, payload
from vit_jax.serve.limits import Limits
from vit_jax.serve.metrics import Metrics
from vit_jax.serve.payload import Refused
from vit_jax.tasks.task import Example, Shown
from vit_jax.tools import look


class Picture(NamedTuple):
    """A decoded image as the model sees it, and the (h, w) that it had."""

    example: Example
    size: tuple[int, int]


class Service:
    """A model, its queue and what it has done. It answers within `async with service`, after `compile`."""

    def __init__(self, predictor: Predictor, limits: Limits = Limits()):  # noqa: B008  it is frozen
        self.predictor, self.limits, self.metrics = predictor, limits, Metrics()
        self.options = {
            name: parameter.default for name, parameter in list(inspect.signature(predictor.task.show).parameters.items())[2:]
        }
        self._sizes = batching.sizes(limits.batch)
        self._requests = 0

    async def __aenter__(self) -> "Service":
        self._pool = ThreadPoolExecutor(os.cpu_count(), "decode")
        limits = self.limits
        self.batcher = batching.Batcher(self._compute, most=limits.batch, wait=limits.wait, room=limits.queue)
        await self.batcher.__aenter__()
        return self

    async def __aexit__(self, *_) -> None:
        await self.batcher.__aexit__()
        self._pool.shutdown()

    def compile(self) -> None:
        """Runs every program once, so that no request waits for a compiler. UserError for a model that gives no numbers."""
        example = self.predictor.example(np.zeros((*self.predictor.image_size, 3), np.uint8))
        for size in self._sizes:
            check_outputs(self.predictor.predict_examples([example], size), self.predictor.source)
        with contextlib.suppress(UserError):  # a model without attention
            self.predictor.attention_of_example(example)
            self.options["attention"] = False

    def describe(self) -> dict[str, Any]:
        """What a client needs to know of the model."""
        description = self.predictor.description
        return {
            "model": printable(description.model_name or description.model_type),
            "task": description.task.get("type", "classify"),
            "image_size": list(self.predictor.image_size),
            "classes": len(description.class_names),
            "options": self.options,
            "max_bytes": self.limits.max_bytes,
            "max_pixels": self.limits.max_pixels,
        }

    async def answer(self, asked: payload.Asked) -> list[dict[str, Any]]:
        """One answer an image, as `predict --json` gives them, with its width and height.

        Raises UserError for what is no image or option, Refused for a full queue and for results that are none.
        """
        options = payload.options(asked.options, self.options)
        attention = options.pop("attention", False)
        show = self.predictor.show(options)
        loop = asyncio.get_running_loop()
        pictures = await asyncio.gather(*(loop.run_in_executor(self._pool, self._read, *image) for image in asked.images))
        try:
            outputs = await self.batcher.submit([picture.example for picture in pictures])
        except batching.Full as e:
            raise Refused(503, "too many images wait: try again in a second") from e
        results = []
        for (name, _), picture, of_image in zip(asked.images, pictures, outputs, strict=True):
            height, width = picture.size
            results.append({"image": name, "width": width, "height": height, **_shown(show, of_image, picture.size)})
            if attention:
                results[-1]["attention"] = await loop.run_in_executor(self.batcher.thread, self._attention, picture)
        return results

    def _read(self, name: str, data: bytes) -> Picture:
        try:
            height, width = header_size(data)
            if height * width > self.limits.max_pixels:
                raise ImageError(f"the image is {width} x {height} pixels, allowed are {self.limits.max_pixels:,} in all")
            pixels = decode(data, exif_rotated=True)
            return Picture(self.predictor.example(pixels), pixels.shape[:2])
        except UserError as e:
            raise UserError(f"image {printable(name)}: {e}") from e

    def _compute(self, examples: Sequence[Example]) -> list[Outputs]:
        size = next(size for size in self._sizes if size >= len(examples))
        outputs = self.predictor.predict_examples(examples, size)
        self.metrics.batch(size, len(examples))
        return [{name: x[i] for name, x in outputs.items()} for i in range(len(examples))]

    def _attention(self, picture: Picture) -> dict[str, Any]:
        """Attention rollout by patch, and the part of the image that the patches stand for: left, top, right, bottom."""
        grid = self.predictor.attention_of_example(picture.example)
        top, left, height, width = look.seen_box(picture.size, self.predictor)
        parts = look.share(self.predictor, grid.shape)
        box = (left, top, left + width * parts[1], top + height * parts[0])
        return {"map": grid.astype(float).tolist(), "box": [round(x, 1) for x in box]}


def _shown(show: Callable[..., Shown], outputs: Outputs, size: tuple[int, int]) -> dict[str, Any]:
    try:
        check_outputs({name: x[None] for name, x in outputs.items()}, "the model")
    except UserError as e:
        raise Refused(500, str(e)) from e
    return show(outputs, size).json
