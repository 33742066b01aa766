"""A trained model, ready to use: `load(source)` gives a Predictor for images of any size, whatever its task."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from vit_jax import checkpoint, models, tasks
from vit_jax.checkpoint import Description, describe, pixels
from vit_jax.checkpoint.classes import find_classes
from vit_jax.checkpoint.fit import warn_of_empty_head
from vit_jax.checkpoint.results import find_npz
from vit_jax.checkpoint.texts import find_vocabulary, open_tokenizer
from vit_jax.data.host.text import Tokenizer
from vit_jax.errors import UserError, printable, unknown
from vit_jax.finite import check_outputs
from vit_jax.models import attention_maps, cores, token_merging
from vit_jax.tasks import images, prompts
from vit_jax.tasks.task import Example, Params, Shown, Task

Pixels = UInt8[np.ndarray, "h w 3"]
Outputs = dict[str, np.ndarray]
ATTENTION = ("mean", "rollout", "relevance")
KINDS = {"cls": ("cls",), "patches": ("patches",), "both": ("cls", "patches")}
TEXTS = 1, 8, 64
"""How many texts are computed at a time, with what fills them up: a program is compiled for each."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A task with trained parameters.

    `source` names it in errors. It computes in batches of `batch_size`, the last one padded, so that one program is compiled.
    `open_tokenizer` gives what makes tokens of texts. Each block merges `tome` tokens, see `models.token_merging`; where the
    model looks is shown of all.
    """

    task: Task = dataclasses.field(repr=False)
    params: Params = dataclasses.field(repr=False)
    description: Description
    source: str = "the model"
    batch_size: int = 8
    open_tokenizer: Callable[[], Tokenizer] | None = dataclasses.field(default=None, repr=False)
    tome: int = 0

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the images as the model sees them."""
        return self.description.image_size

    def __call__(self, pictures: Sequence[Pixels]) -> Outputs:
        """What `Task.predict` makes of decoded images of any sizes, (n, …). UserError for results that are not finite."""
        if (canvases := self.task.canvases) is None:
            outputs = self._batched(self._predict, pictures)
        else:  # first all that are on the first canvas
            order = sorted(range(len(pictures)), key=lambda i: canvases.of_image(pictures[i].shape[:2]))
            outputs = self._batched(self._predict, [pictures[i] for i in order], self.example)
            outputs = {name: x[np.argsort(order)] for name, x in outputs.items()}
        check_outputs(outputs, self.source)
        return outputs

    def example(self, picture: Pixels) -> Example:
        """What the model sees of a decoded image of any size: arrays of fixed shapes, or on the smallest of its canvases."""
        canvases = self.task.canvases
        given = {} if canvases is None else {"canvas": canvases.of_image(picture.shape[:2])}
        return self.task.eval_example({"image": picture}, exif_rotated=False, **given)

    def largest_example(self, picture: Pixels) -> Example:
        """The same in arrays of one shape: on the largest canvas."""
        return self.task.eval_example({"image": picture}, exif_rotated=False)

    def predict_examples(self, examples: Sequence[Example], size: int) -> Outputs:
        """What `Task.predict` makes of at most `size` examples, (n, …): one program for all that say the same `size`."""
        return self._filled_up(self._predict, examples, size)

    def features(self, pictures: Sequence[Pixels], *, kind: str = "cls") -> Outputs:
        """`cls` (n, d), `patches` (n, h, w, d) or both of decoded images of any sizes, see `images.image_features`."""
        return self._batched(functools.partial(self._features, kind=kind), pictures)

    def show(self, options: Mapping[str, Any]) -> Callable[..., Shown]:
        """`Task.show` with some of its options: (outputs of one image, its (h, w)) → Shown. UserError for other options."""
        known = list(inspect.signature(self.task.show).parameters)[2:]
        if unused := [name for name in options if name not in known]:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"option {unused[0]} means nothing to the task of this model: {has}")
        return functools.partial(self.task.show, **options)

    def attention(self, pictures: Sequence[Pixels], *, method: str = "rollout", **options: Any) -> Float[np.ndarray, "n h w"]:
        """Where the model looks in decoded images of any sizes, by patch: "mean", "rollout" or "relevance" for a class.

        `options` are those of `attention_maps`.
        """
        if method not in ATTENTION:
            raise unknown("method", method, ATTENTION)
        return self.attention_maps(pictures, names=(method,), **options)[method]

    def attention_maps(
        self,
        pictures: Sequence[Pixels],
        *,
        names: Sequence[str] = (),
        target: int | str | None = None,
        fuse: str = "mean",
        discard: float = 0.0,
    ) -> Outputs:
        """What `models.attention_maps.maps` finds in decoded images, or only `names` of it.

        Args:
          target: the class, by name or number, that `relevance` is for; the most probable one of every image if None.
          fuse, discard: how heads become one, and what share of the weights `rollout` leaves out, see there.

        Raises:
          UserError: for a Mixer, a detector, a class that there is not, and results that are not finite.
        """
        outputs = self._batched(self._attention_with(names, target, fuse=fuse, discard=discard), pictures)
        check_outputs(outputs, self.source)
        return outputs

    def attention_of_example(self, example: Example) -> Float[np.ndarray, "h w"]:
        """Attention rollout, as `attention` gives it, of what `example` has made of an image."""
        how = {"fuse": "mean", "discard": 0.0}
        return self._filled_up(self._attention_with(("rollout",), **how), [example], 1)["rollout"][0]

    def _attention_with(self, names: Sequence[str], target: int | str | None = None, **how: Any) -> Callable:
        attention_maps.image_tower(self.task.model.module, self.params)
        if self.description.preprocessing.get("max_patches"):
            size = ",".join(map(str, self.image_size))
            raise UserError(f"{self.source} keeps the shapes of photos: to see its attention give one size, --size={size}")
        if ("relevance" in names or target is not None) and not self.description.class_names:
            raise UserError(f"{self.source} has no head, and so no classes to explain: use mean or rollout")
        chosen = np.int32(-1 if target is None else self._class_number(target))
        return functools.partial(self._attention, target=chosen, names=tuple(names), **how)

    def _class_number(self, target: int | str) -> int:
        """The class that is meant by a name or a number. UserError for one that there is not."""
        names = self.description.class_names
        if isinstance(target, str) and (found := find_classes(names, [target])[0]) is not None:
            return found
        if not str(target).isdecimal():
            raise unknown("class", str(target), names)
        if int(target) >= len(names):
            raise UserError(f"class {target}: there are {len(names)} classes, numbered from 0")
        return int(target)

    @functools.cached_property
    def _attention(self) -> Callable:
        def run(params: Params, batch: dict[str, Any], *, target: Any, names: tuple[str, ...], **how: Any) -> dict[str, Any]:
            inputs = images.inputs(batch, self.description.mean, self.description.std)
            score = (lambda: self.task.predict(params, batch)["logits"]) if self.description.class_names else None
            tower = attention_maps.image_tower(self.task.model.module, params)
            found = attention_maps.maps(*tower, inputs, target=jnp.broadcast_to(target, len(inputs)), score=score, **how)
            return {name: found[name] for name in names or found}

        return jax.jit(run, static_argnames=("names", "fuse", "discard"))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What makes tokens of texts. UserError for a model that reads none, and where its vocabulary is not to be found."""
        if self.open_tokenizer is None:
            raise UserError(f"{self.source} reads no texts")
        return self.open_tokenizer()

    def embed_images(self, pictures: Sequence[Pixels]) -> Float[np.ndarray, "n d"]:
        """The embeddings of decoded images of any sizes, each of length 1. UserError for a model of images alone."""
        if self.description.model_type != "TwoTowers":
            raise UserError(f"{self.source} is a {self.description.model_type}: take a model of images and texts")
        return self(pictures)["zimg"]

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """The embeddings of texts, each of length 1. UserError for a text without words, and as `tokenizer` raises it."""
        if isinstance(texts, str) or not len(texts):
            raise UserError("texts are given as a list, of one or more")
        if empty := [i for i, text in enumerate(texts, 1) if not text.strip()]:
            raise UserError(f"text {empty[0]} of {len(texts)} is empty: give words")
        examples = [{"tokens": tokens} for tokens in self.tokenizer(texts)]
        size = next((size for size in TEXTS if size >= len(examples)), TEXTS[-1])
        parts = [self.predict_examples(examples[i : i + size], size)["ztxt"] for i in range(0, len(examples), size)]
        outputs = np.concatenate(parts)
        check_outputs({"ztxt": outputs}, self.source)
        return outputs

    def embed_labels(
        self, labels: Sequence[str], *, templates: Sequence[str] = (prompts.PLACE,)
    ) -> Float[np.ndarray, "labels d"]:
        """The embeddings of what `with_labels` compares images with; it raises the same UserErrors."""
        prompts.check_labels(labels)
        prompts.check_templates(templates)
        if len(labels) == 1 and self.description.head == "softmax":
            raise UserError(
                f"{printable(labels[0])!r} is the only label, and of a softmax the probability of one alone is always 1: "
                "give two or more, such as 'a cat,something else'"
            )
        return prompts.embed_labels(self.embed_texts, labels, templates)

    def with_labels(self, labels: Sequence[str], *, templates: Sequence[str] = (prompts.PLACE,)) -> "Predictor":
        """A model of images and texts as a classifier of images by any words; each label is put into all the templates.

        The probabilities are those of a softmax over the labels, or a sigmoid of each, as the model was trained.
        UserError for a model that reads no texts, labels that are empty or given twice, and templates without `{}`.
        """
        labels = tuple(label.strip() for label in labels)
        ztxt = self.embed_labels(labels, templates=templates)
        return dataclasses.replace(
            self,
            task=prompts.make_classifier(self.task, ztxt, labels, head=self.description.head),
            description=dataclasses.replace(self.description, class_names=labels),
        )

    @functools.cached_property
    def _predict(self) -> Callable:
        return jax.jit(token_merging.merging(self.tome)(self.task.predict))

    @functools.cached_property
    def _features(self) -> Callable:
        def run(params: Params, batch: dict[str, Any], *, kind: str) -> dict[str, Any]:
            inputs = images.inputs(batch, self.description.mean, self.description.std)
            with token_merging.merging(self.tome):
                outputs = images.image_features(self.task.model.module, params, inputs, images.valid_pixels(batch))
            return {name: outputs[name] for name in KINDS[kind]}

        return jax.jit(run, static_argnames="kind")

    def _batched(
        self, function: Callable, pictures: Sequence[Pixels], make_example: Callable[[Pixels], Example] | None = None
    ) -> Outputs:
        make_example, parts = make_example or self.largest_example, []
        for i in range(0, len(pictures), self.batch_size):
            examples = [make_example(picture) for picture in pictures[i : i + self.batch_size]]
            parts.append(self._filled_up(function, examples, self.batch_size))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _filled_up(self, function: Callable, examples: Sequence[Example], size: int) -> Outputs:
        """What the function makes of examples, which on several canvases are several batches."""
        shapes = [[x.shape for x in example.values()] for example in examples]
        if others := [i for i, shape in enumerate(shapes) if shape != shapes[0]]:
            order = [i for i in range(len(examples)) if i not in others] + others
            parts = [self._filled_up(function, [examples[i] for i in part], size) for part in (order[: -len(others)], others)]
            return {name: np.concatenate([part[name] for part in parts])[np.argsort(order)] for name in parts[0]}
        length = size // cores.parts(size)
        n = -(-len(examples) // length)  # parts of nothing but zeros are left out
        batch = {name: _padded([x[name] for x in examples], n * length) for name in examples[0]}
        outputs = cores.by_parts(lambda part: jax.device_get(function(self.params, part)), batch, n)
        return {name: np.concatenate([x[name] for x in outputs])[: len(examples)] for name in outputs[0]}


def load(
    source: str | os.PathLike,
    *,
    size: tuple[int, int] | None = None,
    model_name: str | None = None,
    head: bool | None = True,
    batch_size: int = 8,
    interpolation: str | None = None,
    vocab: str | os.PathLike | None = None,
    tome: int = 0,
    **changes: Any,
) -> Predictor:
    """The model in a workdir, or in anything that `checkpoint.open_checkpoint` reads.

    `model.json` or `config.json` beside the parameters describe it; without one the architecture and its resolution are
    read from names and shapes, and 1,000 classes are taken for ImageNet's.

    Args:
      size: (h, w) of the images, if not the file's own; position embeddings are resampled by the rule of its family.
      model_name: insists on an architecture.
      head: False leaves the head out, for features alone; None takes it where there is one.
      interpolation: resizes photos so, antialiased, whatever the file says.
      vocab: the vocabulary of a model that reads texts, where it does not lie beside the parameters.
      tome: how many tokens each block merges with others, which is faster and less exact, see `models.token_merging`.
      changes: fields of the description to be set, such as mean and std.

    Raises:
      UserError: for a size or `tome` that this model cannot have, and a file that does not fit what is said of it.
    """
    opened = pixels.with_pixels(checkpoint.open_checkpoint(find_npz(source)), interpolation=interpolation)
    description = dataclasses.replace(opened.description, **changes)
    if model_name:
        description = _insisted(description, model_name)
    if head is None:
        head = bool(description.model.get("num_classes", True))
    if head:
        tasks.check_usable(description, source)
    else:
        headless = {name: None for name in ("num_classes", "representation_size") if name in description.model}
        description = dataclasses.replace(description, model={**description.model, **headless}, class_names=())
    if size is None and description.image_size is None:
        raise UserError(
            f"{source} has position embeddings that are no square, and no model.json tells their grid, so that it "
            "does not tell the size of its images: give --size=H,W in pixels"
        )
    described = describe.path_beside(opened.path)
    if (count := description.model.get("num_classes") or 0) != len(description.class_names):
        raise UserError(f"{described} names {len(description.class_names)} classes, the head of {opened.path} has {count}")

    if size is None and head is False and description.preprocessing.get("max_patches"):
        size = description.image_size  # features are of one grid
    if size is not None:
        _check_whole_patches(size, description)
        description = _at_size(description, size)
    task = tasks.of_description(description, find_vocabulary(opened, vocab=vocab) if tasks.writes(description) else None)
    token_merging.check(task.model.module, tome)
    params = _fitted(opened, task, description, head=head, resized=size is not None)
    of_texts = functools.partial(open_tokenizer, dataclasses.replace(opened, flat={}), vocab=vocab)
    return Predictor(task, jax.device_put(params), description, str(opened.path), batch_size, of_texts, tome)


def _fitted(opened: checkpoint.Opened, task: Task, description: Description, *, head: bool, resized: bool) -> Params:
    """The parameters of a file for a task, which may have no head and images of another size than it."""
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    if head and not resized and tuple(description.image_size) == tuple(description.native_size):
        checkpoint.check_fit(opened.params, shapes, opened.path)
        warn_of_empty_head(opened.flat, opened.path)
        return opened.params
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)  # takes no memory
    return task.load({"": opened}, zeros, classes=description.class_names if head else None)


def _insisted(description: Description, model_name: str) -> Description:
    """The description with the fields of a named architecture, but for its head."""
    known = models.architecture_of(models.model_type_of(model_name)).cls.__dataclass_fields__
    kept = {name: description.model.get(name) for name in ("num_classes", "representation_size") if name in known}
    kind, fields = models.named(model_name, **kept)
    return dataclasses.replace(description, model_type=kind, model=fields, model_name=model_name)


def parse_size(text: str) -> tuple[int, int]:
    """'224' or '224,448' as (h, w)."""
    numbers = text.split(",")
    if len(numbers) > 2 or not all(number.strip().isdecimal() and int(number) for number in numbers):
        raise UserError(f"--size={text} must be a side in pixels, such as 224, or height and width, such as 224,448")
    return int(numbers[0]), int(numbers[-1])


def _check_whole_patches(size: tuple[int, int], description: Description) -> None:
    """Raises UserError for a size of which a plain ViT would cut off the edges."""
    patch = models.architecture_of(description.model_type).cut(description.model)
    if patch and any(length % p for length, p in zip(size, patch, strict=True)):
        near = ",".join(str(max(1, round(length / p)) * p) for length, p in zip(size, patch, strict=True))
        sizes = "x".join(map(str, size)), "x".join(map(str, patch))
        raise UserError(f"images of {sizes[0]} px are no whole number of patches of {sizes[1]} px: use --size={near}")


def _at_size(description: Description, size: tuple[int, int]) -> Description:
    """The description for images of this size, and so of one shape: of a centre crop, the same part is seen at any size."""
    how = {name: value for name, value in description.preprocessing.items() if name not in ("max_patches", "enlarge")}
    if how.get("resize_to"):
        factor, sides = min(size) / min(description.image_size), how["resize_to"]
        how["resize_to"] = round(sides * factor) if isinstance(sides, int) else tuple(round(n * factor) for n in sides)
    return dataclasses.replace(description, image_size=size, grid=None, preprocessing=how)


def _padded(arrays: list[np.ndarray], n: int) -> np.ndarray:
    """Stacks them, with zeros up to n."""
    return np.stack(arrays + [np.zeros_like(arrays[0])] * (n - len(arrays)))
