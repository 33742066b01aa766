"""Image classification: what is optimised, what is predicted, and how it is shown."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.checkpoint import Description
from vit_jax.data.features import ExampleError
from vit_jax.errors import UserError, printable
from vit_jax.models import vit
from vit_jax.tasks import images, rows, shapes
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Batch, Context, Loss, Model, Params, Shown, Task

Logits = Float[Array, "b classes"]
NEEDS = ("image", "label")


def make_task(setup: Setup) -> Task:
    """Images to classes, as `config.loss`, `config.augment` and `config.label_smoothing` say."""
    names = class_names(setup)
    model = build_model(setup, len(names) or None)  # without classes: a model of features alone
    if "unpooled" in (classifier := model.fields.get("classifier", "")):
        raise UserError(f"this model scores every token ({classifier}); images are classified as a whole, by token or gap")
    settings = setup.settings
    mean, std = setup.normalisation
    prepare = images.make_prepare(settings, len(names), mean, std)
    return Task(
        model=model,
        needs=NEEDS,
        train_example=make_train_example(shapes.train_fields(settings, model), len(names)),
        eval_example=make_eval_example(shapes.eval_fields(settings, model), len(names)),
        init=make_init(model.module, settings.image_size),
        loss=make_loss(model.module, prepare, loss=settings.loss),
        predict=make_predict(model.module, loss=settings.loss, mean=mean, std=std),
        evaluators=("classify",),
        describe=lambda: {"class_names": names, "head": settings.loss},
        show=make_show(names),
        preview=make_preview(
            prepare,
            names,
            mean,
            std,
            floor=settings.label_smoothing / max(1, len(names)),
            pictures=functools.partial(shapes.pictures, settings=settings, model=model),
        ),
        load=images.make_load(model, settings.image_size),
        head_inputs=make_head_inputs(model.module, mean=mean, std=std),
        collate=rows.make_collate(settings, model),
        totals=rows.totals,
    )


def build_model(setup: Setup, num_classes: int | None) -> Model:
    """The recipe's model. The head of a ViT that is to be fitted reads `config.head_fit.layers` blocks, where it can."""
    model, head_fit = setup.build_model(num_classes=num_classes), setup.settings.head_fit
    fields = model.fields
    pooled = model.type == "ViT" and fields.get("classifier", "token") in vit.POOLED and not fields.get("representation_size")
    if not head_fit.views or head_fit.layers == 1 or not pooled or "head_layers" in fields:
        return model
    return setup.build_model(num_classes=num_classes, head_layers=min(head_fit.layers, fields["transformer"]["num_layers"]))


def check_usable(description: Description, source: Any) -> None:
    """Raises UserError for a checkpoint that cannot predict."""
    fields = description.model
    if not fields.get("num_classes"):
        raise UserError(f"{source} has no head: it cannot classify before it is fine-tuned (configs/vit.py)")
    if not description.class_names and fields.get("head_bias") is False:  # see checkpoint.image_tower
        raise UserError(
            f"{source} is the image tower of a CLIP without its text tower: its head gives embeddings of "
            f"{fields['num_classes']} numbers, no classes. `features` writes what it sees of images; to name them by words "
            "give the whole model, both towers, to `zeroshot`; fine-tuned it classifies (configs/vit.py)"
        )


def class_names(setup: Setup) -> tuple[str, ...]:
    """The classes that the data offers. UserError for data without."""
    for field in ("label", "labels"):
        if field in setup.features:
            return tuple(setup.features[field].names)
    raise UserError(f"{setup.settings.dataset} offers {', '.join(setup.features)}: a classifier needs a label for each image")


def make_init(model: nn.Module, image_size: tuple[int, int]) -> Callable[[jax.Array], Params]:
    """key → fresh parameters of a model of normalised images."""
    return lambda key: model.init(key, jnp.zeros((1, *image_size, 3)))["params"]


def make_train_example(train_fields: shapes.Fields, num_classes: int) -> Callable[..., dict[str, np.ndarray]]:
    """(example, rng=, exif_rotated=) → image, label. An example with several labels is a UserError."""

    def train_example(example: Mapping[str, Any], *, rng: np.random.Generator, exif_rotated: bool) -> dict[str, np.ndarray]:
        if "labels" in example:
            raise ExampleError("may have several labels: such a dataset can be evaluated, not trained on")
        label = _checked_label(example["label"], num_classes)
        return train_fields(example["image"], rng=rng, exif_rotated=exif_rotated) | {"label": label}

    return train_example


def make_eval_example(eval_fields: shapes.Fields, num_classes: int) -> Callable[..., dict[str, np.ndarray]]:
    """(example, exif_rotated=) → image and label, or labels (classes,), or no label where the example has none."""

    def eval_example(example: Mapping[str, Any], *, exif_rotated: bool) -> dict[str, np.ndarray]:
        answer: dict[str, np.ndarray] = {}
        if "labels" in example:
            answer["labels"] = np.zeros(num_classes, bool)
            answer["labels"][[_checked_label(label, num_classes) for label in example["labels"]]] = True
        elif "label" in example:
            answer["label"] = _checked_label(example["label"], num_classes)
        return eval_fields(example["image"], exif_rotated=exif_rotated) | answer

    return eval_example


def make_loss(
    model: nn.Module, prepare: images.Prepare, *, loss: str = "softmax"
) -> Callable[[Params, Context, Batch, jax.Array], Loss]:
    """Cross-entropy with the targets of `prepare`, in float32, and accuracy.

    "softmax" is −Σ t log softmax(z); "sigmoid" the sum over the classes of the binary one (https://arxiv.org/abs/2006.07159).

    Args:
      model: normalised images (b h w 3) → logits (b classes).
    """

    def training_loss(params: Params, context: Context, batch: Batch, key: jax.Array) -> Loss:
        mix_key, dropout_key = jax.random.split(key)
        inputs, targets = prepare(batch, mix_key)
        logits = model.apply({"params": params}, inputs, train=True, rngs={"dropout": dropout_key})
        losses = LOSSES[loss](logits.astype(jnp.float32), targets)
        correct = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
        return Loss(rows.mean(losses, batch, context), {"accuracy": rows.mean(correct, batch, context)})

    return training_loss


def make_predict(
    model: nn.Module, *, loss: str, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Params, Batch], dict[str, Array]]:
    """(parameters, batch with `image`) → `logits` and `probabilities`, (b, classes) in float32."""

    def predict(params: Params, batch: Batch) -> dict[str, Array]:
        inputs = images.inputs(batch, mean, std)
        logits = model.apply({"params": params}, inputs, train=False).astype(jnp.float32)
        return {"logits": logits, "probabilities": PROBABILITIES[loss](logits)}

    return predict


def make_head_inputs(
    model: nn.Module, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Params, Batch], Float[Array, "b *heads d"]]:
    """(parameters, batch with `image`) → what the head makes logits of, in float32."""
    headless = model.clone(num_classes=None)

    def head_inputs(params: Params, batch: Batch) -> Float[Array, "b *heads d"]:
        return headless.apply({"params": params}, images.inputs(batch, mean, std), train=False).astype(jnp.float32)

    return head_inputs


def make_show(names: Sequence[str]) -> Callable[..., Shown]:
    """(outputs, size, top=5) → the most probable classes."""

    def show(outputs: Mapping[str, np.ndarray], size: tuple[int, int], *, top: int = 5) -> Shown:
        p = outputs["probabilities"]
        best = np.argsort(-p, kind="stable")[:top]
        predictions = [{"label": names[i], "index": int(i), "probability": float(p[i])} for i in best]
        return Shown([f"{x['probability']:7.2%}  {printable(x['label'])}" for x in predictions], {"predictions": predictions})

    return show


def make_preview(
    prepare: images.Prepare,
    names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    floor: float,
    pictures: Callable[[dict[str, np.ndarray]], np.ndarray],
) -> Callable[[dict[str, np.ndarray], jax.Array | None], tuple[np.ndarray, list[str]]]:
    """See `Task.preview`: images, each with the two largest targets above `floor`, which smoothing gives to every class."""
    prepare, names = jax.jit(prepare), [printable(name) for name in names]

    def preview(batch: dict[str, np.ndarray], key: jax.Array | None) -> tuple[np.ndarray, list[str]]:
        if key is None or "grid" in batch:
            return pictures(batch), [names[label] for label in batch["label"]]
        inputs, targets = prepare(batch, key)
        captions = [caption(target, names, floor) for target in np.asarray(targets)]
        return images.pixels(np.asarray(inputs) * std + mean), captions

    return preview


def caption(target: Float[np.ndarray, " classes"], names: Sequence[str], floor: float) -> str:
    """'cat 0.72, dog 0.24': the two largest targets, as far as they are above `floor`."""
    largest = np.argsort(-target, kind="stable")[:2]
    return ", ".join(f"{names[i]} {target[i]:.2f}" for i in largest if target[i] > floor + 0.005)


def _checked_label(label: int, num_classes: int) -> np.int32:
    if not 0 <= label < num_classes:
        raise ExampleError(f"has label {label}, allowed are 0 to {num_classes - 1}")
    return np.int32(label)


def _sigmoid_cross_entropy(logits: Logits, targets: Logits) -> Float[Array, " b"]:
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


LOSSES: dict[str, Callable[[Logits, Logits], Float[Array, " b"]]] = {
    "softmax": optax.softmax_cross_entropy,
    "sigmoid": _sigmoid_cross_entropy,
}
PROBABILITIES: dict[str, Callable[[Logits], Logits]] = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
