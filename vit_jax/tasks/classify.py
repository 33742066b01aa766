"""Image classification: what is optimised, and what is measured."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.data.device import augment, mix
from vit_jax.optimize import trainable

Params = Any
Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]
Prepare = Callable[[Batch, jax.Array], tuple[Float[Array, "b h w 3"], Float[Array, "b classes"]]]


class Task(NamedTuple):
    """What training and evaluation need of a task.

    loss: (trained params, frozen, batch, rng) → (mean loss, metrics), where `frozen` are trees by name that are not trained,
    `frozen["model"]` the rest of the model's parameters;
    evaluate: (the model's params, batch) → sums over the valid examples.
    """

    loss: Callable[[Params, dict[str, Params], Batch, jax.Array], tuple[Float[Array, ""], Metrics]]
    evaluate: Callable[[Params, Batch], Metrics]


def make_prepare(
    num_classes: int,
    *,
    augmented: Callable | None = None,
    erased: Callable | None = None,
    mixed: Callable | None = None,
    label_smoothing: float = 0.0,
    mean: Sequence[float] = (augment.MEAN,) * 3,
    std: Sequence[float] = (augment.STD,) * 3,
) -> Prepare:
    """(training batch, key) → (normalised images as the model sees them, targets that sum to one).

    Args:
      augmented: (uint8 images, seeds) → uint8 images; erased: (normalised images, seeds) → normalised images;
      mixed: (normalised images, targets, key) → the same; None leaves each out. They act in this order.
      mean, std: of the 0..255 pixels, by channel.
    """

    def prepare(batch: Batch, key: jax.Array) -> tuple[Float[Array, "b h w 3"], Float[Array, "b classes"]]:
        images = augmented(batch["image"], batch["seed"]) if augmented else batch["image"]
        images = augment.normalize(images, mean, std)
        if erased:
            images = erased(images, batch["seed"])
        targets = mix.smooth(batch["label"], num_classes, label_smoothing)
        return mixed(images, targets, key) if mixed else (images, targets)

    return prepare


def make_task(
    model: nn.Module,
    prepare: Prepare,
    *,
    loss: str = "softmax",
    mean: Sequence[float] = (augment.MEAN,) * 3,
    std: Sequence[float] = (augment.STD,) * 3,
) -> Task:
    """Cross-entropy with the targets of `prepare`, in float32, and accuracy.

    "softmax" is −Σ t log softmax(z); "sigmoid" the sum over the classes of the binary one (https://arxiv.org/abs/2006.07159).

    Args:
      model: normalised images (b h w 3) → logits (b classes).
    """

    def training_loss(params: Params, frozen: dict[str, Params], batch: Batch, rng: jax.Array):
        mix_key, dropout_key = jax.random.split(rng)
        images, targets = prepare(batch, mix_key)
        variables = {"params": trainable.join(params, frozen.get("model"))}
        logits = model.apply(variables, images, train=True, rngs={"dropout": dropout_key})
        value = LOSSES[loss](logits.astype(jnp.float32), targets).mean()
        correct = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
        return value, {"loss": value, "accuracy": correct.mean(dtype=jnp.float32)}

    return Task(training_loss, make_evaluate(model, loss=loss, mean=mean, std=std))


def make_evaluate(
    model: nn.Module, *, loss: str = "softmax", mean: Sequence[float], std: Sequence[float]
) -> Callable[[Params, Batch], Metrics]:
    """(params, evaluation batch) → sums over the valid examples: `loss`, `correct`, `count`."""

    def evaluate(params: Params, batch: Batch) -> Metrics:
        logits = model.apply({"params": params}, augment.normalize(batch["image"], mean, std), train=False)
        targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        losses = LOSSES[loss](logits.astype(jnp.float32), targets)
        correct, valid = jnp.argmax(logits, axis=-1) == batch["label"], batch["valid"]
        return {"loss": jnp.sum(losses * valid), "correct": jnp.sum(correct & valid), "count": jnp.sum(valid)}

    return evaluate


def _sigmoid_cross_entropy(logits: Float[Array, "b classes"], targets: Float[Array, "b classes"]) -> Float[Array, " b"]:
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


LOSSES = {"softmax": optax.softmax_cross_entropy, "sigmoid": _sigmoid_cross_entropy}
