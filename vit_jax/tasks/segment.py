"""Semantic segmentation: images to a class for every pixel.

A view is drawn once and applied to image and mask alike. An image of any size is seen whole, resized to
`config.image_size`, or through windows of that size which slide over it. Scores are counted on the pixels of what is seen.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Integer, UInt8
from PIL import Image

from vit_jax.checkpoint import Description
from vit_jax.checkpoint.classes import match_classes
from vit_jax.checkpoint.fit import check_shape
from vit_jax.checkpoint.opened import Opened
from vit_jax.data.device import augment
from vit_jax.data.host import view
from vit_jax.data.host.resize import Box
from vit_jax.data.host.view import IGNORED, Picture, View
from vit_jax.errors import UserError, printable
from vit_jax.models.segment import at_pixels
from vit_jax.options import checked
from vit_jax.settings import Settings
from vit_jax.tasks import images, mask_classification, mask_loss
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Batch, Context, Loss, Model, Params, Shown, Task

NEEDS = ("image", "segmentation")
SEGMENTERS = ("LinearSegmenter", "Segmenter", "EoMT")
"""Keys of `models.ARCHITECTURES`."""
_OF_CLASSES = {r"(conv_seg|class_predictor)/(kernel|bias)": -1, r"cls_emb": 1, r"mask_norm/(scale|bias)": 0}
"""Parameters that have an entry for each class, and on which axis; EoMT's "no object" comes behind them."""
_MOVES = ("randaug", "erasing", "mixup", "cutmix")

Predict = Callable[[Params, Batch], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class Seen:
    """How an image is seen in evaluation and prediction.

    Attributes:
      window: (h, w) of the images that the model gets.
      canvas: None if the whole image is resized to `window`. Otherwise it is resized into (h, w) pixels with its aspect
        kept, and windows slide over these, at most `stride` pixels apart; their scores are averaged where they overlap.
    """

    window: tuple[int, int]
    canvas: tuple[int, int] | None = None
    stride: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return self.canvas or self.window

    def view(self, size: tuple[int, int], **how: Any) -> View:
        """The view of a whole image of `size` (h, w), which lies at the left and top of `self.size`."""
        if self.canvas is None:
            return View(size, Box(0, 0, *size), self.window, **how)
        scale = min(most / side for most, side in zip(self.canvas, size, strict=True))
        fitted = (max(1, min(most, round(scale * side))) for most, side in zip(self.canvas, size, strict=True))
        return View(size, Box(0, 0, *size), tuple(fitted), **how)

    def corners(self) -> Integer[np.ndarray, "windows 2"]:
        """(top, left) of every window."""
        rows, columns = (
            [*range(0, side - width, self.stride), side - width] for side, width in zip(self.size, self.window, strict=True)
        )
        return np.array([(top, left) for top in rows for left in columns])


def make_task(
    setup: Setup, *, canvas: tuple = (), stride: int = 0, colors: tuple = (), matching: Mapping[str, float] = {}
) -> Task:
    """Images to classes by pixel, by a model of `models.segment`.

    Args:
      canvas: (h, w) over which windows of `config.image_size` slide in evaluation, see `Seen`; () for whole images.
      stride: from window to window, in pixels; 0 for two thirds of a window.
      colors: (r, g, b) of each class in pictures; () for the data's, or VOC's.
      matching: of EoMT alone: those of `mask_loss.Matching`.
    """
    settings = setup.settings
    if "segmentation" not in setup.features:
        raise UserError(f"{settings.dataset} offers {', '.join(setup.features)}: segmentation needs a mask for each image")
    if moving := [name for name in _MOVES if getattr(settings.augment, name)]:
        raise UserError(f"config.augment.{moving[0]} moves or mixes pixels, of which the masks know nothing: leave it out")
    feature = setup.features["segmentation"]
    names, model = feature.names, setup.build_model(num_classes=len(feature.names))
    if model.type not in SEGMENTERS:
        raise UserError(f"config.model_type={model.type} gives no class to pixels: {', '.join(SEGMENTERS)} do")
    colors = tuple(tuple(color) for color in colors or feature.colors) or palette(len(names))
    if len(colors) != len(names):
        raise UserError(f"config.task.colors has {len(colors)} colours, there are {len(names)} classes")
    mean, std = setup.normalisation
    seen = _seen(settings, canvas, stride)
    a = settings.augment
    recolor = augment.make_augment(flip=False, color_jitter=a.color_jitter, three_augment=a.three_augment)
    of_task = {"loss": make_loss(model.module, recolor, mean, std), "totals": totals}
    if model.type == "EoMT":
        matched_by = mask_loss.Matching(**checked(mask_loss.Matching, matching, "config.task.matching"))
        how = {"total_steps": settings.total_steps, "matching": matched_by}
        of_task["loss"] = mask_classification.make_loss(model.module, recolor, mean, std, **how)
        of_task["totals"] = mask_classification.make_totals(model.module)
    elif matching:
        raise UserError(f"config.task.matching is for EoMT, {model.type} matches no masks: leave it out")
    options = {"type": "segment", "canvas": list(canvas), "stride": stride, "colors": [list(color) for color in colors]}
    return Task(
        model=model,
        needs=NEEDS,
        train_example=make_train_example(settings),
        eval_example=make_eval_example(seen, settings, mean),
        init=lambda key: model.module.init(key, jnp.zeros((1, *settings.image_size, 3)))["params"],
        **of_task,
        predict=make_predict(model.module, seen, mean, std),
        evaluators=("segment",),
        describe=lambda: {"class_names": names, "task": options},
        show=make_show(names, colors, seen),
        preview=make_preview(names, colors, recolor),
        load=make_load(model, settings.image_size),
    )


def check_usable(description: Description, source: Any) -> None:
    """Raises UserError for a checkpoint that is no segmenter."""
    if description.model_type not in SEGMENTERS:
        raise UserError(f"{source} is a {description.model_type}, no segmenter: train one on it (configs/segment.py)")


def _seen(settings: Settings, canvas: Sequence[int], stride: int) -> Seen:
    window = settings.image_size
    if settings.pp.eval_resize is not None:
        raise UserError("config.pp.eval_resize cuts off what a mask has: images are segmented whole, leave it out")
    if not canvas:
        return Seen(window)
    if len(canvas) != 2 or not all(type(n) is int and n >= w for n, w in zip(canvas, window, strict=True)) or stride < 0:
        raise UserError(f"config.task.canvas={tuple(canvas)} must be (height, width), and hold a window of {window}")
    return Seen(window, tuple(canvas), stride or max(1, 2 * min(window) // 3))


# Examples


def make_train_example(settings: Settings) -> Callable[..., dict[str, np.ndarray]]:
    """(example, rng=, exif_rotated=) → image and segmentation of one random view, 255 where it shows no class."""
    pp = settings.pp
    how = {"crop": settings.image_size, "resize_to": pp.resize, "area": tuple(pp.area), "flip": pp.flip}
    how |= {name: getattr(pp, name) for name in ("crop_method", "interpolation", "antialias")}

    def train_example(example: Mapping[str, Any], *, rng: np.random.Generator, exif_rotated: bool) -> dict[str, np.ndarray]:
        picture = Picture.read(example["image"], exif_rotated=exif_rotated)
        drawn = view.draw_view(picture.size, rng, **how)
        image = drawn.image(picture.decoded([drawn], scaled=pp.scaled_decoding))
        return {"image": image, "segmentation": drawn.segmentation(example["segmentation"])}

    return train_example


def make_eval_example(seen: Seen, settings: Settings, mean: Sequence[float]) -> Callable[..., dict[str, np.ndarray]]:
    """(example, exif_rotated=) → image and, where the example has one, segmentation of the whole; a canvas is filled up."""
    how = {name: getattr(settings.pp, name) for name in ("interpolation", "antialias")}

    def eval_example(example: Mapping[str, Any], *, exif_rotated: bool) -> dict[str, np.ndarray]:
        picture = Picture.read(example["image"], exif_rotated=exif_rotated)
        whole = seen.view(picture.size, **how)
        (height, width), full = whole.size, {"image": np.tile(np.float32(mean), (*seen.size, 1))}
        full["image"][:height, :width] = whole.image(picture.decoded([whole], scaled=False), rounded=False)
        if "segmentation" in example:
            full["segmentation"] = np.full(seen.size, IGNORED, np.uint8)
            full["segmentation"][:height, :width] = whole.segmentation(example["segmentation"])
        return full

    return eval_example


# Training and prediction


def totals(batch: Batch) -> dict[str, Array]:
    """How many pixels have a class."""
    return {"pixels": (batch["segmentation"] != IGNORED).sum(dtype=jnp.float32)}


def make_loss(
    model: nn.Module, recolor: Callable, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Params, Context, Batch, jax.Array], Loss]:
    """Cross-entropy of every pixel that has a class, its mean over the whole batch; the share of pixels that are right."""

    def loss(params: Params, context: Context, batch: Batch, key: jax.Array) -> Loss:
        inputs = augment.normalize(recolor(batch["image"], batch["seed"]), mean, std)
        labels = batch["segmentation"].astype(jnp.int32)
        logits = model.apply({"params": params}, inputs, train=True, rngs={"dropout": key})
        logits = at_pixels(logits, labels.shape[1:])
        known, count = labels != IGNORED, jnp.maximum(context.totals["pixels"], 1)
        of_label = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[..., None], axis=-1)[..., 0]
        losses = jax.nn.logsumexp(logits, axis=-1) - of_label
        correct = (jnp.argmax(logits, axis=-1) == labels) & known
        return Loss((losses * known).sum() / count, {"pixel_accuracy": correct.sum(dtype=jnp.float32) / count})

    return loss


def make_predict(model: nn.Module, seen: Seen, mean: Sequence[float], std: Sequence[float]) -> Predict:
    """(parameters, evaluation batch) → logits (b h w classes): of the model's places, or of all pixels of a canvas."""

    def predict(params: Params, batch: Batch) -> dict[str, Array]:
        images = augment.normalize(batch["image"], mean, std)
        if seen.canvas is None:
            return {"logits": model.apply({"params": params}, images, train=False)}
        return {"logits": slide(lambda window: model.apply({"params": params}, window, train=False), images, seen)}

    return predict


def slide(scores: Callable[[Array], Array], images: Float[Array, "b H W 3"], seen: Seen) -> Float[Array, "b H W c"]:
    """The mean of the scores that every pixel gets from the windows that it lies in, computed one window after another."""
    b, (height, width), corners = len(images), seen.window, seen.corners()
    shape = jax.eval_shape(scores, jax.ShapeDtypeStruct((b, height, width, 3), images.dtype)).shape
    counts = np.zeros((*seen.size, 1), np.float32)
    for top, left in corners:
        counts[top : top + height, left : left + width] += 1

    def add(total: Array, corner: Array) -> tuple[Array, None]:
        start = (0, corner[0], corner[1], 0)
        window = scores(jax.lax.dynamic_slice(images, start, (b, height, width, 3)))
        before = jax.lax.dynamic_slice(total, start, (b, height, width, shape[-1]))
        return jax.lax.dynamic_update_slice(total, before + at_pixels(window, seen.window), start), None

    total, _ = jax.lax.scan(add, jnp.zeros((b, *seen.size, shape[-1])), jnp.asarray(corners))
    return total / counts


# What is loaded, and what is shown


def make_load(model: Model, image_size: tuple[int, int]) -> Callable[..., Params]:
    """See `Task.load`: a segmenter of the same architecture, or a ViT that becomes the backbone of one."""
    body = model.fields["body"]["vit"]

    def load(sources: Mapping[str, Opened], init_params: Params, *, classes: Sequence[str] | None = None) -> Params:
        opened = sources[""]
        backbone = images.load_backbone(opened, body, init_params, image_size)
        head = {name: x for name, x in init_params.items() if name != "backbone"}
        if opened.description.model_type in SEGMENTERS:
            head = _head(opened, flatten_dict(head, sep="/"), classes)
        return {**head, "backbone": backbone}

    return load


def _head(opened: Opened, fresh: dict[str, Array], classes: Sequence[str] | None) -> Params:
    """The head of a segmenter; its parameters by class start anew, or are those of `classes`."""
    columns = None
    if classes is not None:
        columns = match_classes(opened.description.class_names, classes, where=str(opened.path))
    head = {}
    for name, x in fresh.items():
        axis = next((axis for pattern, axis in _OF_CLASSES.items() if re.fullmatch(pattern, name)), None)
        given = opened.flat.get(name)
        if axis is not None and given is not None:
            more = range(len(opened.description.class_names), given.shape[axis])
            given = x if columns is None else np.take(given, [*columns, *more], axis)
        check_shape(name, given, x, opened.path)
        head[name] = given
    return unflatten_dict(head, sep="/")


def labels_at(logits: Float[np.ndarray, "h w c"], size: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    """The class with the highest score at every pixel of an image of `size`; one class after another, to save memory."""
    best, labels = np.full(size, -np.inf, np.float32), np.zeros(size, np.uint8)
    for number in range(logits.shape[-1]):
        score = cv2.resize(np.ascontiguousarray(logits[..., number]), size[::-1], interpolation=cv2.INTER_LINEAR)
        higher = score > best
        best[higher], labels[higher] = score[higher], number
    return labels


def make_show(names: Sequence[str], colors: Sequence[tuple[int, int, int]], seen: Seen) -> Callable[..., Shown]:
    """(outputs, size of the upright image) → the share of it that each class has; the classes, drawn over it and as indices."""

    def show(outputs: Mapping[str, np.ndarray], size: tuple[int, int]) -> Shown:
        logits, whole = outputs["logits"], seen.view(size).size
        rows, columns = (round(n * part / all_) for n, part, all_ in zip(logits.shape, whole, seen.size, strict=False))
        labels = labels_at(logits[: max(1, rows), : max(1, columns)], size)
        counts = np.bincount(labels.ravel(), minlength=len(names))
        order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
        areas = [
            {"label": names[i], "index": i, "pixels": int(counts[i]), "share": float(counts[i] / labels.size)} for i in order
        ]
        lines = [f"{x['share']:7.2%}  {printable(x['label'])}" for x in areas]
        indexed = Image.fromarray(labels, "L")
        indexed.putpalette(np.array(colors, np.uint8).ravel().tolist())
        return Shown(lines, {"areas": areas}, lambda image: draw(image, labels, colors), {"classes": indexed})

    return show


def draw(image: Image.Image, labels: UInt8[np.ndarray, "h w"], colors: Sequence[tuple[int, int, int]]) -> Image.Image:
    """The picture under the colours of its classes, half of each; what is black or ignored is left as it is."""
    table = np.zeros((256, 3), np.float32)
    table[: len(colors)] = colors
    over, pixels = table[labels], np.asarray(image.convert("RGB"), np.float32)
    mixed = np.where(over.any(axis=-1, keepdims=True), (pixels + over) / 2, pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Pascal VOC's colours: bits 0, 3, 6 … of a number make red, from the highest bit on; 1, 4, 7 … green, 2, 5, 8 … blue."""
    return tuple(
        tuple(sum((number >> (3 * i + channel) & 1) << (7 - i) for i in range(8)) for channel in range(3))
        for number in range(count)
    )


def make_preview(
    names: Sequence[str], colors: Sequence[tuple[int, int, int]], recolor: Callable
) -> Callable[[dict[str, np.ndarray], jax.Array | None], tuple[np.ndarray, list[str]]]:
    """See `Task.preview`: images under the colours of their classes, and which these are."""
    recolor = jax.jit(recolor)

    def preview(batch: dict[str, np.ndarray], key: jax.Array | None) -> tuple[np.ndarray, list[str]]:
        pixels = images.pixels(batch["image"] if key is None else np.asarray(recolor(batch["image"], batch["seed"])))
        drawn = [
            np.asarray(draw(Image.fromarray(x), labels, colors))
            for x, labels in zip(pixels, batch["segmentation"], strict=True)
        ]
        found = [np.unique(labels[labels < len(names)]) for labels in batch["segmentation"]]
        return np.stack(drawn), [", ".join(printable(names[i]) for i in numbers) for numbers in found]

    return preview
