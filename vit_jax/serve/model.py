"""What is asked of a loaded model, one call at a time: decoding, computing, and an answer with all that was wished for."""

import base64
import contextlib
import functools
import inspect
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

from vit_jax.data.host.decode import ImageError, decode, header_size
from vit_jax.errors import UserError, printable
from vit_jax.finite import check_outputs
from vit_jax.predictor import TEXTS, Outputs, Predictor
from vit_jax.serve import batching, payload
from vit_jax.serve.payload import Refused
from vit_jax.tasks import classify, prompts
from vit_jax.tasks.task import Example, Shown
from vit_jax.tools import look

MOST_LABELS, LONGEST_LABEL = 1000, 500


class Picture(NamedTuple):
    """A decoded image as the model sees it, and the (h, w) that it had."""

    example: Example
    size: tuple[int, int]


class Model:
    """A predictor, what it computes in batches of a few sizes, and the `options` of its answers.

    All methods may be called in threads: `read` and `answer` in any, the others, which compute, in one.
    """

    def __init__(self, predictor: Predictor, batch: int):
        self.predictor, self._sizes = predictor, batching.sizes(batch)
        self.options = payload.known(inspect.signature(predictor.task.show))
        self.embed = functools.lru_cache(16)(self._embed)
        self._score = jax.jit(functools.partial(prompts.score, predictor.task, head=predictor.description.head))

    def compile(self) -> None:
        """Runs every program once, so that no request waits for a compiler. UserError for a model that gives no numbers.

        Afterwards `options` tells of attention, maps and labels, where the model has them.
        """
        predictor, size = self.predictor, self.predictor.image_size
        sizes = predictor.task.canvases.sizes if predictor.task.canvases else (size,)
        for n, canvas in itertools.product(self._sizes, sizes):
            example = predictor.example(np.zeros((*canvas, 3), np.uint8))
            check_outputs(outputs := predictor.predict_examples([example], n), predictor.source)
        with contextlib.suppress(UserError):  # a model that looks at nothing
            predictor.attention_of_example(example)
            self.options["attention"] = False
        if predictor.task.show({name: x[0] for name, x in outputs.items()}, size).maps:
            self.options["maps"] = False
        with contextlib.suppress(UserError):  # a model that reads nothing
            for n in TEXTS if predictor.description.head == "sigmoid" else TEXTS[1:]:  # a softmax has two labels or more
                predictor.embed_texts(["a"] * n)
            self.options |= {"labels": (), **payload.known(inspect.signature(classify.make_show(())))}

    def read(self, name: str, data: bytes, max_pixels: int) -> Picture:
        """Decodes an image as `predict` does. UserError for what is none, and for one of too many pixels."""
        try:
            height, width = header_size(data)
            if height * width > max_pixels:
                raise ImageError(f"the image is {width} x {height} pixels, allowed are {max_pixels:,} in all")
            pixels = decode(data, exif_rotated=True)
            return Picture(self.predictor.example(pixels), pixels.shape[:2])
        except UserError as e:
            raise UserError(f"image {printable(name)}: {e}") from e

    def compute(self, examples: Sequence[Example]) -> tuple[int, list[Outputs]]:
        """(the size of the batch, the outputs of each)."""
        size = next(size for size in self._sizes if size >= len(examples))
        outputs = self.predictor.predict_examples(examples, size)
        return size, [{name: x[i] for name, x in outputs.items()} for i in range(len(examples))]

    def attention(self, picture: Picture) -> dict[str, Any]:
        """Attention rollout by patch, and the part of the image that the patches stand for: left, top, right, bottom."""
        grid = self.predictor.attention_of_example(picture.example)
        top, left, height, width = look.seen_box(picture.size, self.predictor)
        parts = look.share(self.predictor, grid.shape)
        box = (left, top, left + width * parts[1], top + height * parts[0])
        return {"map": grid.astype(float).tolist(), "box": [round(x, 1) for x in box]}

    def _embed(self, labels: tuple[str, ...]) -> Float[np.ndarray, "labels d"]:
        """Labels that were typed, as embeddings, of which the last are remembered."""
        if len(labels) > MOST_LABELS or max(map(len, labels)) > LONGEST_LABEL:
            raise UserError(f"there may be {MOST_LABELS} labels, of {LONGEST_LABEL} characters each")
        return self.predictor.embed_labels(labels)

    def shows(self, options: dict[str, Any], labels: tuple[str, ...] = ()) -> Callable[..., Shown]:
        """(outputs, (h, w)) → Shown. UserError for options that mean nothing here."""
        if not labels:
            return self.predictor.show(options)
        labels = tuple(label.strip() for label in labels)
        predictor, ztxt, show = self.predictor, self.embed(labels), classify.make_show(labels)

        def shown(outputs: Outputs, size: tuple[int, int]) -> Shown:
            found = self._score(predictor.params, outputs["zimg"][None], ztxt)
            return show({name: np.asarray(x[0]) for name, x in found.items()}, size, **options)

        return shown


def answer(show: Callable[..., Shown], outputs: Outputs, size: tuple[int, int], maps: bool) -> dict[str, Any]:
    """What `predict --json` says of an image of this (h, w), which are told too, and maps as PNG in base64.

    Raises Refused for numbers that are none.
    """
    try:
        check_outputs({name: x[None] for name, x in outputs.items()}, "the model")
    except UserError as e:
        raise Refused(500, str(e)) from e
    shown = show(outputs, size)
    pictures = {"maps": {name: _png(picture) for name, picture in shown.maps.items()}} if maps else {}
    return {"width": size[1], "height": size[0], **shown.json, **pictures}


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
