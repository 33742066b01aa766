"""Image classification: what is optimised, and what is measured."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.data import augment

Params = Any
Batch = dict[str, Array]
Metrics = dict[str, Float[Array, ""]]


class Task(NamedTuple):
    """loss(params, batch, rng) → (mean loss, metrics); evaluate(params, batch) → sums over the unmasked examples."""

    loss: Callable[[Params, Batch, jax.Array], tuple[Float[Array, ""], Metrics]]
    evaluate: Callable[[Params, Batch], Metrics]


def make_task(
    model: nn.Module,
    *,
    flip: bool = True,
    mean: Sequence[float] = (augment.MEAN,) * 3,
    std: Sequence[float] = (augment.STD,) * 3,
) -> Task:
    """Softmax cross-entropy over the classes, computed in float32, and accuracy.

    Args:
      model: normalised images (b h w 3) → logits (b classes).
      flip: mirror training images at random.
      mean, std: of the 0..255 pixels, by channel.
    """

    def loss(params: Params, batch: Batch, rng: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        images = augment.random_flip(batch["image"], batch["seed"]) if flip else batch["image"]
        logits = model.apply({"params": params}, augment.normalize(images, mean, std), train=True, rngs={"dropout": rng})
        losses, correct = _score(logits, batch["label"])
        return losses.mean(), {"loss": losses.mean(), "accuracy": correct.mean(dtype=jnp.float32)}

    def evaluate(params: Params, batch: Batch) -> Metrics:
        logits = model.apply({"params": params}, augment.normalize(batch["image"], mean, std), train=False)
        losses, correct = _score(logits, batch["label"])
        mask = batch["mask"]
        return {"loss": jnp.sum(losses * mask), "correct": jnp.sum(correct & mask), "count": jnp.sum(mask)}

    return Task(loss, evaluate)


def summarize(sums: dict[str, float]) -> dict[str, float]:
    """Sums over all examples → the metrics' published names."""
    return {"accuracy_test": sums["correct"] / sums["count"], "loss_test": sums["loss"] / sums["count"]}


def _score(logits: Float[Array, "b classes"], labels: Array) -> tuple[Float[Array, " b"], Array]:
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, jnp.argmax(logits, axis=-1) == labels
