"""Object detection: images to a set of boxes with classes, trained by matching them to the true ones (DETR).

An image is resized into `config.image_size` with its aspect kept and padded with zeros on the right and below to a canvas: of
that size, so that one program is compiled for images of all sizes, or to the smallest of a few that holds it.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int
from PIL import Image, ImageDraw, ImageFont

from vit_jax.checkpoint import Description
from vit_jax.checkpoint.classes import match_classes
from vit_jax.checkpoint.fit import check_fit, check_shape
from vit_jax.checkpoint.opened import Opened
from vit_jax.data.canvases import Size
from vit_jax.data.features import ExampleError
from vit_jax.data.host.view import Picture
from vit_jax.data.letterbox import Sizes
from vit_jax.errors import UserError
from vit_jax.models.detr import Outputs
from vit_jax.tasks import backbone, images, matching
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Batch, Context, Loss, Model, Params, Shown, Task

NEEDS = ("image", "boxes")
DETECTORS = ("DETR", "YOLOS", "TokenDetector")
"""Keys of `models.ARCHITECTURES`."""
TOWERS = ("backbone",)
"""What `config.pretrained` may name a source of its own for: a ViT, or a ResNet of torchvision, timm or transformers."""
Apply = Callable[..., Outputs]
MOST_CANVASES = 6
"""For each a training step is compiled, and a program for evaluation."""
COLORS = ("#ff3b30", "#34c759", "#0a84ff", "#ffcc00", "#ff2d92", "#5ac8fa", "#af52de", "#ff9500")


def make_task(
    setup: Setup,
    *,
    short_sides: tuple = (),
    canvases: tuple = (),
    crop: float = 0.0,
    max_boxes: int = 100,
    label_weight: float = 1.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    no_object_weight: float = 0.1,
) -> Task:
    """Images to boxes, by a model of `models.detr`.

    Args:
      short_sides: to which an image's shorter side is resized in training, one drawn for each image; the last one is for
        evaluation. () resizes to as much as `config.image_size` holds.
      canvases: (height, width) to which images are padded that fit, instead of `config.image_size`, which holds all others.
      crop: chance of a random window, see `Sizes`.
      max_boxes: places for the objects of an image; no more than the model has candidates.
      the weights: see `matching.Weights`.
    """
    if "boxes" not in setup.features:
        raise UserError(f"{setup.settings.dataset} offers {', '.join(setup.features)}: detection needs boxes for each image")
    names = setup.features["boxes"].names
    settings = setup.settings
    if (kind := settings.model_type if settings.model else setup.origin and setup.origin.model_type) not in DETECTORS:
        raise UserError(f"a {kind} is no detector, which {', '.join(DETECTORS)} are: it can be the start of one's backbone")
    model = setup.build_model(num_classes=len(names))
    mean, std = setup.normalisation
    sizes = Sizes(tuple(settings.image_size), tuple(short_sides), crop, flip=settings.pp.flip)
    apply, candidates = make_apply(model, sizes.image_size), make_count(model.module)
    fitting = sizes.canvases(_checked_canvases(canvases))
    weights = matching.Weights(label_weight, l1_weight, giou_weight, no_object_weight)
    options = {"type": "detect", "short_sides": list(short_sides), "max_boxes": max_boxes}
    options |= {"canvases": [list(size) for size in canvases]} if canvases else {}
    return Task(
        model=model,
        needs=NEEDS,
        train_example=make_train_example(sizes, max_boxes),
        eval_example=make_eval_example(sizes),
        init=make_init(model.module, sizes.image_size),
        loss=make_loss(apply, mean, std, weights),
        totals=make_totals(candidates),
        predict=make_predict(apply, mean, std, functools.partial(candidates, sizes.image_size) if fitting else None),
        evaluators=("detect",),
        describe=lambda: {"class_names": names, "task": options},
        show=make_show(names),
        preview=make_preview(names),
        load=make_load(model, sizes.image_size),
        towers=TOWERS,
        canvases=fitting,
    )


def _checked_canvases(canvases: Sequence[Any]) -> list[Size]:
    """Raises UserError for what is no short list of (height, width)."""
    pairs = [tuple(size) for size in canvases if isinstance(size, tuple | list)]
    good = [size for size in pairs if len(size) == 2 and all(type(side) is int and side > 0 for side in size)]
    if len(good) < len(canvases) or len(canvases) > MOST_CANVASES:
        raise UserError(
            f"config.task.canvases={tuple(canvases)} must be at most {MOST_CANVASES} pairs (height, width) in pixels, such as "
            "((800, 1333), (1333, 800)): a program is compiled for each"
        )
    return good


def check_usable(description: Description, source: Any) -> None:
    """Raises UserError for a checkpoint that is no detector."""
    if description.model_type not in DETECTORS:
        raise UserError(f"{source} is a {description.model_type}, no detector: train one on it (configs/detect.py)")


def make_init(model: nn.Module, image_size: tuple[int, int]) -> Callable[[jax.Array], Params]:
    """key → fresh parameters of a detector of normalised images."""
    return lambda key: model.init(key, jnp.zeros((1, *image_size, 3)))["params"]


def make_train_example(sizes: Sizes, max_boxes: int) -> Callable[..., dict[str, np.ndarray]]:
    """(example, rng=, exif_rotated=, canvas=None) → image, `extent` (h, w) of its valid pixels, boxes, box_labels, box_valid.

    The image is padded to the canvas, of `image_size` if None. Crowds are left out, and what lies outside of the view. Boxes
    are parts of the extent: center, width, height.
    """

    def train_example(
        example: Mapping[str, Any], *, rng: np.random.Generator, exif_rotated: bool, canvas: Size | None = None
    ) -> dict[str, np.ndarray]:
        picture = Picture.read(example["image"], exif_rotated=exif_rotated)
        view = sizes.draw(picture.size, rng, canvas)
        corners, kept = view.boxes(example["boxes"])
        kept &= ~example["box_crowd"]
        if (count := int(kept.sum())) > max_boxes:
            raise ExampleError(f"has {count} objects, config.task.max_boxes allows {max_boxes}: raise it, up to the candidates")
        height, width = view.size
        corners = corners[kept] / [width, height, width, height]
        boxes = np.zeros((max_boxes, 4), np.float32)
        boxes[:count] = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
        labels = np.zeros(max_boxes, np.int32)
        labels[:count] = example["box_labels"][kept]
        valid = np.arange(max_boxes) < count
        return _padded(view.image(picture), canvas or sizes.image_size) | {
            "boxes": boxes,
            "box_labels": labels,
            "box_valid": valid,
        }

    return train_example


def make_eval_example(sizes: Sizes) -> Callable[..., dict[str, np.ndarray]]:
    """(example, exif_rotated=, canvas=None) → image and `extent`, of the whole image, padded as in training."""

    def eval_example(example: Mapping[str, Any], *, exif_rotated: bool, canvas: Size | None = None) -> dict[str, np.ndarray]:
        picture = Picture.read(example["image"], exif_rotated=exif_rotated)
        return _padded(sizes.fixed(picture.size, canvas).image(picture), canvas or sizes.image_size)

    return eval_example


def _padded(image: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    padded = np.zeros((*size, 3), np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    return {"image": padded, "extent": np.array(image.shape[:2], np.int32)}


def make_count(model: nn.Module) -> Callable[[Size], int]:
    """(h, w) of an image → how many candidates a model has for its objects."""

    @functools.cache
    def count(size: Size) -> int:
        shapes = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, *size, 3)))
        return shapes[0]["logits"].shape[2]

    return count


def make_totals(candidates: Callable[[Size], int]) -> Callable[[Batch], dict[str, Array]]:
    """batch → what its losses are divided by: the number of boxes, and of the model's candidates, see `make_count`."""

    def totals(batch: Batch) -> dict[str, Array]:
        count = jnp.asarray(len(batch["image"]) * candidates(batch["image"].shape[1:3]), jnp.float32)
        return {"boxes": batch["box_valid"].sum(dtype=jnp.float32), "candidates": count}

    return totals


def make_apply(model: Model, image_size: Size) -> Apply:
    """(parameters, normalised images, valid pixels, **how) → the model's outputs, of images up to this size.

    A smaller canvas is the upper left part of a larger one: learned positions of a ViT below are those of this part.
    """

    def apply(params: Params, pixels: Float[Array, "b H W 3"], valid: Bool[Array, "b H W"] | None, **how: Any) -> Outputs:
        if "vit" in model.fields.get("body", {}):
            grids = (images.patch_grid(model, size) for size in (image_size, pixels.shape[1:3]))
            params = {**params, "backbone": backbone.on_part(params["backbone"], *grids)}
        return model.module.apply({"params": params}, pixels, valid, **how)

    return apply


def make_loss(
    apply: Apply, mean: Sequence[float], std: Sequence[float], weights: matching.Weights
) -> Callable[[Params, Context, Batch, jax.Array], Loss]:
    """The set loss of all layers, divided by the counts of the whole batch, see `matching.set_loss`."""

    def loss(params: Params, context: Context, batch: Batch, key: jax.Array) -> Loss:
        pixels, valid = images.inputs(batch, mean, std), images.valid_pixels(batch)
        outputs = apply(params, pixels, valid, train=True, rngs={"dropout": key})
        targets = matching.Targets(batch["boxes"], batch["box_labels"], batch["box_valid"])
        totals = {"num_boxes": context.totals["boxes"], "num_candidates": context.totals["candidates"]}
        parts = matching.set_loss(outputs["logits"], outputs["boxes"], targets, **totals, weights=weights)
        return Loss(sum(parts), {f"loss_{name}": x for name, x in parts._asdict().items()})

    return loss


def make_predict(
    apply: Apply, mean: Sequence[float], std: Sequence[float], most: Callable[[], int] | None = None
) -> Callable[[Params, Batch], dict[str, Array]]:
    """(parameters, evaluation batch) → scores (b q), labels (b q) and boxes (b q 4), corners as parts of the image.

    With `most` there are as many as it says, the last with scores of 0: so many as on the largest canvas.
    """

    def predict(params: Params, batch: Batch) -> dict[str, Array]:
        pixels, valid = images.inputs(batch, mean, std), images.valid_pixels(batch)
        outputs = apply(params, pixels, valid, train=False)
        found = matching.best_boxes(outputs["logits"][-1], outputs["boxes"][-1], jnp.ones((pixels.shape[0], 2)))
        more = most() - found["scores"].shape[1] if most else 0
        if not more:
            return found
        return {name: jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2))) for name, x in found.items()}

    return predict


def in_pixels(boxes: Float[np.ndarray, "*n 4"], size: tuple[int, int]) -> Float[np.ndarray, "*n 4"]:
    """Corners as parts of an image → in its pixels, within the image; `size` is (h, w)."""
    height, width = size
    return np.clip(boxes, 0, 1) * np.array([width, height, width, height], np.float32)


def make_load(model: Model, image_size: tuple[int, int]) -> Callable[..., Params]:
    """See `Task.load`: a detector of the same architecture, or a ViT, a model on one, or a ResNet, whose backbone is taken."""

    def load(sources: Mapping[str, Opened], init_params: Params, *, classes: Sequence[str] | None = None) -> Params:
        params = init_params
        for tower, opened in sorted(sources.items()):  # that of a whole model comes before that of its backbone
            if not tower and opened.description.model_type == model.type:
                params = _with_head(opened, flatten_dict(init_params, sep="/"), classes)
            else:
                params = {**params, "backbone": _backbone(opened, model.fields.get("body", {}), params, image_size)}
        return params

    return load


def _backbone(opened: Opened, body: Mapping[str, Any], params: Params, image_size: tuple[int, int]) -> Params:
    """The backbone's parameters from a file. UserError for another kind of model, or another size of it."""
    if "vit" in body and opened.description.model_type != "BatchNormResNet":
        return images.load_backbone(opened, body["vit"], params, image_size)
    if "resnet" in body and opened.description.model_type == "BatchNormResNet":
        check_fit(opened.params, params["backbone"], opened.path)
        return opened.params
    wanted = {"vit": "a ViT", "resnet": "a ResNet"}.get(next(iter(body), ""), "no backbone")
    raise UserError(
        f"{opened.path} is a {opened.description.model_type}, and this detector stands on {wanted}: give a detector or "
        "backbone of the same kind"
    )


def _with_head(opened: Opened, fresh: dict[str, Array], classes: Sequence[str] | None) -> Params:
    """The parameters of a detector, with a fresh class head, or with the columns for `classes` of its own."""
    heads = [name for name in fresh if re.fullmatch("class_embed/.*", name)]
    last = {name for name in heads if name.rpartition("/")[0] == max(head.rpartition("/")[0] for head in heads)}
    given = dict(opened.flat)
    if classes is not None:
        names = opened.description.class_names
        known = [i for i, name in enumerate(names) if name != "N/A"]  # COCO's numbers have holes
        columns = match_classes([names[i] for i in known], classes, where=str(opened.path))
        chosen = [*(known[i] for i in columns), len(names)]
        given |= {name: given[name][..., chosen] for name in last}
    wanted = {name: x for name, x in fresh.items() if classes is not None or name not in last}
    for name, x in wanted.items():
        check_shape(name, given.get(name), x, opened.path)
    return unflatten_dict(fresh | {name: given[name] for name in wanted}, sep="/")


def make_show(names: Sequence[str]) -> Callable[..., Shown]:
    """(outputs, size of the upright image, threshold=0.5) → label, score and corners in pixels of what is likelier."""

    def show(outputs: Mapping[str, np.ndarray], size: tuple[int, int], *, threshold: float = 0.5) -> Shown:
        order = np.argsort(-outputs["scores"], kind="stable")
        order = order[outputs["scores"][order] > threshold]
        corners = in_pixels(outputs["boxes"][order], size)
        found = [
            {"label": names[label], "score": float(score), "box": [round(float(x), 1) for x in box]}
            for label, score, box in zip(outputs["labels"][order], outputs["scores"][order], corners, strict=True)
        ]
        lines = [f"{x['score']:7.2%}  {x['label']:16}  " + " ".join(f"{n:7.1f}" for n in x["box"]) for x in found]
        return Shown(lines or ["nothing found"], {"objects": found}, lambda image: draw(image, found, names))

    return show


def draw(image: Image.Image, found: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Image.Image:
    """The picture with boxes, each with its label and score, one colour a class."""
    image = image.convert("RGB")
    canvas = ImageDraw.Draw(image)
    thick = max(1, round(min(image.size) / 200))
    font = ImageFont.load_default(max(10, round(min(image.size) / 16)))
    for one in found:
        color = COLORS[list(names).index(one["label"]) % len(COLORS)]
        canvas.rectangle(one["box"], outline=color, width=thick)
        text = f"{one['label']}: {one['score']:.0%}" if "score" in one else one["label"]
        _, _, right, bottom = canvas.textbbox((0, 0), text, font=font)
        x, y = max(0, min(one["box"][0], image.width - right - 3)), max(0, one["box"][1] - bottom - 2)
        canvas.rectangle((x, y, x + right + 2, y + bottom + 2), fill=color)
        canvas.text((x + 1, y), text, fill="black", font=font)
    return image


def make_preview(
    names: Sequence[str],
) -> Callable[[dict[str, np.ndarray], jax.Array | None], tuple[np.ndarray, list[str]]]:
    """See `Task.preview`: images with their true boxes, and which classes they have."""

    def preview(batch: dict[str, np.ndarray], key: jax.Array | None) -> tuple[np.ndarray, list[str]]:
        drawn, captions = [], []
        for i, pixels in enumerate(batch["image"]):
            found = _true_objects({name: x[i] for name, x in batch.items()}, names) if "boxes" in batch else []
            drawn.append(np.asarray(draw(Image.fromarray(np.asarray(pixels, np.uint8)), found, names)))
            captions.append(", ".join(sorted({one["label"] for one in found})))
        return np.stack(drawn), captions

    return preview


def _true_objects(example: Mapping[str, np.ndarray], names: Sequence[str]) -> list[dict[str, Any]]:
    corners = np.asarray(matching.to_corners(jnp.asarray(example["boxes"])))
    boxes: Int[np.ndarray, "n 4"] = in_pixels(corners, tuple(example["extent"])).round().astype(int)
    valid = example["box_valid"]
    labels = example["box_labels"]
    return [{"label": names[k], "box": box.tolist()} for k, box in zip(labels[valid], boxes[valid], strict=True)]
