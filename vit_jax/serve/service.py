"""A model that answers many at a time: images are decoded in a pool of threads and computed in batches."""

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

from vit_jax.errors import printable
from vit_jax.predictor import Outputs, Predictor
from vit_jax.serve import batching, payload
from vit_jax.serve.limits import Limits
from vit_jax.serve.metrics import Metrics
from vit_jax.serve.model import Model, answer
from vit_jax.serve.payload import Refused
from vit_jax.tasks.task import Example

T = TypeVar("T")


class Service:
    """A model, its queue and what it has done. It answers within `async with service`, after `model.compile()`."""

    def __init__(self, predictor: Predictor, limits: Limits = Limits()):  # noqa: B008  it is frozen
        self.model, self.limits, self.metrics = Model(predictor, limits.batch), limits, Metrics()

    async def __aenter__(self) -> "Service":
        limits = self.limits
        self._pool = ThreadPoolExecutor(os.cpu_count(), "decode")
        self.batcher = batching.Batcher(self._compute, most=limits.batch, wait=limits.wait, room=limits.queue)
        await self.batcher.__aenter__()
        return self

    async def __aexit__(self, *_) -> None:
        await self.batcher.__aexit__()
        self._pool.shutdown()

    def describe(self) -> dict[str, Any]:
        """What a client needs to know of the model."""
        description = self.model.predictor.description
        return {
            "model": printable(description.model_name or description.model_type),
            "task": description.task.get("type", "classify"),
            "image_size": list(self.model.predictor.image_size),
            "classes": len(description.class_names),
            "options": self.model.options,
            "max_bytes": self.limits.max_bytes,
            "max_pixels": self.limits.max_pixels,
        }

    async def answer(self, asked: payload.Asked) -> list[dict[str, Any]]:
        """One answer an image, as `predict --json` gives them, with its name, and what the options ask for.

        Raises UserError for what is no image or option, Refused for a full queue and for results that are none.
        """
        model, pool, one = self.model, self._pool, self.batcher.thread
        options = payload.options(asked.options, model.options)
        labels, attention, maps = (options.pop(name, ()) for name in ("labels", "attention", "maps"))
        show = await _run(one, model.shows, options, labels) if labels else model.shows(options)
        reading = (_run(pool, model.read, name, data, self.limits.max_pixels) for name, data in asked.images)
        pictures = await asyncio.gather(*reading)
        try:
            outputs = await self.batcher.submit([picture.example for picture in pictures])
        except batching.Full as e:
            raise Refused(503, "too many images wait: try again in a second") from e
        results, slow = [], labels or "maps" in model.options  # of others to change the thread would take longer
        for (name, _), picture, of_image in zip(asked.images, pictures, outputs, strict=True):
            wish = show, of_image, picture.size, bool(maps)
            results.append({"image": name, **(await _run(pool, answer, *wish) if slow else answer(*wish))})
            if attention:
                results[-1]["attention"] = await _run(one, model.attention, picture)
        return results

    def _compute(self, examples: Sequence[Example]) -> list[Outputs]:
        size, outputs = self.model.compute(examples)
        self.metrics.batch(size, len(examples))
        return outputs


async def _run(threads: Executor, function: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, function, *args)
