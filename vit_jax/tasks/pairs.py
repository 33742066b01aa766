"""Contrastive losses of images and texts: of all pairs in a batch, those that belong together are to score highest.

Every loss is the mean over the batch of all devices. A device compares its own examples with those of all devices, some rows of
the table of scores at a time, so that the whole table, which grows with the square of the batch, is never in memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.models.two_towers import scores
from vit_jax.tasks import images
from vit_jax.tasks.task import Batch, Context, Devices, Loss, Params

ROWS = 1024
"""At most so many rows of the table of scores are computed at a time."""
Embeddings = tuple[Float[Array, "b d"], Float[Array, "b d"]]
"""Of images and of their texts, in the same order, each of length 1."""


def softmax_loss(embeddings: Embeddings, out: dict[str, Array], devices: Devices, *, rows: int = ROWS) -> Loss:
    """Which text is this image's, and which image this text's: the mean of both cross-entropies (CLIP, LiT).

    Args:
      out: "t", the temperature that multiplies the scores; see `two_towers.scores`.

    https://arxiv.org/abs/2103.00020, https://arxiv.org/abs/2111.07991
    """

    def of_rows(images: Array, texts: Array, own: Array, all_images: Array, all_texts: Array) -> tuple[Array, Array, Array]:
        by_image, by_text = scores(images, all_texts, out), scores(texts, all_images, out)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        value = (cross_entropy(by_image, own) + cross_entropy(by_text, own)) / 2
        return value, by_image.argmax(axis=1) == own, by_text.argmax(axis=1) == own

    value, text_found, image_found = _mean_of_rows(of_rows, embeddings, devices, rows)
    return Loss(value, {"text_found": text_found, "image_found": image_found})


def sigmoid_loss(embeddings: Embeddings, out: dict[str, Array], devices: Devices, *, rows: int = ROWS) -> Loss:
    """Whether each image and each text belong together: the sum over the texts of the binary cross-entropy (SigLIP).

    Args:
      out: "t" and "b", the temperature and the bias of the scores; see `two_towers.scores`.

    https://arxiv.org/abs/2303.15343
    """

    def of_rows(images: Array, texts: Array, own: Array, all_images: Array, all_texts: Array) -> tuple[Array, Array]:
        by_image = scores(images, all_texts, out)
        together = jax.nn.one_hot(own, len(all_texts))
        value = optax.sigmoid_binary_cross_entropy(by_image, together).sum(axis=1)
        return value, by_image.argmax(axis=1) == own

    value, text_found = _mean_of_rows(of_rows, embeddings, devices, rows)
    return Loss(value, {"text_found": text_found})


LOSSES: dict[str, Callable[..., Loss]] = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def make_embed(model: nn.Module, mean: Any, std: Any) -> Callable[[Params, Context, Batch, jax.Array], Embeddings]:
    """See `Task.embed`: the batch's `image` and `tokens`, through both towers of a `two_towers.TwoTowers`."""

    def embed(params: Params, context: Context, batch: Batch, key: jax.Array) -> Embeddings:
        inputs = {"images": images.inputs(batch, mean, std), "tokens": batch["tokens"]}
        zimg, ztxt, _ = model.apply({"params": params}, **inputs, train=True, rngs={"dropout": key})
        return zimg, ztxt

    return embed


def make_loss_of(model: nn.Module, *, loss: str = "softmax") -> Callable[[Params, Context, Embeddings], Loss]:
    """See `Task.loss_of`: one of `LOSSES`, with the model's own temperature and bias."""

    def loss_of(params: Params, context: Context, embeddings: Embeddings) -> Loss:
        _, _, out = model.apply({"params": params})
        result = LOSSES[loss](embeddings, out, context.devices)
        return result._replace(metrics=result.metrics | {"temperature": out["t"][0]})

    return loss_of


def _mean_of_rows(of_rows: Callable, embeddings: Embeddings, devices: Devices, rows: int) -> tuple[Float[Array, ""], ...]:
    """The means over this device's examples of what `of_rows` says of each.

    Args:
      of_rows: (embeddings of some images, and of their texts, their numbers among all examples, all images, all texts) →
        arrays by example. Nothing of it is kept for the backward pass, which computes it again.
    """
    everything = devices.all_examples(embeddings)
    b = len(embeddings[0])
    own = devices.device_index() * b + jnp.arange(b)
    parts = next(n for n in range(1, b + 1) if b % n == 0 and b // n <= rows)
    if parts == 1:
        results = of_rows(*embeddings, own, *everything)
    else:  # every part takes rows of all devices of a mesh, as micro-batches do
        inputs = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), (*embeddings, own))
        results = jax.lax.map(jax.checkpoint(lambda part: of_rows(*part, *everything)), inputs)
    return tuple(x.mean(dtype=jnp.float32) for x in results)
