"""A set of predicted boxes and a set of true ones: which belongs to which, and how far they are apart (DETR).

Shapes: b batch, q candidates, n places for objects, of which `valid` says which are taken. Boxes are
(center x, center y, width, height), parts of the image, unless they are called corners.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


class Targets(NamedTuple):
    """The objects of a batch."""

    boxes: Float[Array, "b n 4"]
    labels: Int[Array, "b n"]
    valid: Bool[Array, "b n"]


class Weights(NamedTuple):
    """What a distance counts in the matching and in the loss; `no_object` is the weight of that class."""

    label: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1


DETR = Weights()


class SetLoss(NamedTuple):
    """Sums over all layers of weighted losses, each divided by what it is normalised by."""

    label: Float[Array, ""]
    l1: Float[Array, ""]
    giou: Float[Array, ""]


def to_corners(boxes: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
    """(center x, center y, width, height) → (left, top, right, bottom)."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return jnp.concatenate([center - size / 2, center + size / 2], axis=-1)


def giou(a: Float[Array, "*b 4"], b: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """IoU − (hull − union) / hull of corners (https://arxiv.org/abs/1902.09630): between −1 and 1."""

    def area(corners: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
        return jnp.prod(jnp.maximum(corners[..., 2:] - corners[..., :2], 0), axis=-1)

    both = area(jnp.concatenate([jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])], axis=-1))
    hull = area(jnp.concatenate([jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])], axis=-1))
    union = area(a) + area(b) - both
    # Boxes without an area, such as padding, give 0 instead of NaN, in the gradient too.
    iou = both / jnp.where(union > 0, union, 1)
    return iou - jnp.where(hull > 0, (hull - union) / jnp.where(hull > 0, hull, 1), 0)


def costs(
    logits: Float[Array, "b q c"], boxes: Float[Array, "b q 4"], targets: Targets, weights: Weights = DETR
) -> Float[Array, "b q n"]:
    """−p(class) + L1 − GIoU, weighted, between every candidate and every object."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    of_class = jnp.take_along_axis(probabilities, targets.labels[:, None], axis=-1)
    l1 = jnp.abs(boxes[:, :, None] - targets.boxes[:, None]).sum(axis=-1)
    overlap = giou(to_corners(boxes)[:, :, None], to_corners(targets.boxes)[:, None])
    return weights.l1 * l1 - weights.label * of_class - weights.giou * overlap


def match(cost: Float[Array, "b q n"], valid: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """The candidate of every object, such that the sum of costs is least; −1 for padding, and objects beyond q.

    Padding costs the same everywhere and more than any object, so that it changes nothing.
    """
    cost = jnp.nan_to_num(jax.lax.stop_gradient(cost), nan=1e6, posinf=1e6, neginf=-1e6)
    padding = jnp.abs(cost).max(axis=(1, 2), keepdims=True) + 1
    cost = jnp.where(valid[:, None], cost, padding)

    def assign(cost: Float[Array, "q n"]) -> Int[Array, " n"]:
        candidates, objects = optax.assignment.hungarian_algorithm(cost)
        return jnp.full(cost.shape[1], -1).at[objects].set(candidates)

    return jnp.where(valid, jax.vmap(assign)(cost), -1)


def set_loss(
    logits: Float[Array, "l b q c"],
    boxes: Float[Array, "l b q 4"],
    targets: Targets,
    *,
    num_boxes: Float[Array, ""],
    num_candidates: Float[Array, ""],
    weights: Weights = DETR,
) -> SetLoss:
    """DETR's loss: every layer is matched by itself, and all layers count alike.

    label: `label_loss`; l1 and giou: |box − true box| and 1 − GIoU of the matched ones, divided by the number of boxes.

    Args:
      num_boxes, num_candidates: of the whole batch, on all devices: the losses of its parts sum to its loss. No image may
        have more objects than candidates.
    """
    layers, b, q, classes = logits.shape
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)).reshape(layers * b, *x.shape[1:]), targets)
    flat_logits, flat_boxes = logits.reshape(layers * b, q, classes), boxes.reshape(layers * b, q, 4)
    chosen = match(costs(flat_logits, flat_boxes, repeated, weights), repeated.valid)
    matched = chosen >= 0
    label = label_loss(
        flat_logits,
        chosen,
        repeated.labels,
        num_objects=num_boxes,
        num_candidates=num_candidates,
        no_object=weights.no_object,
    )

    # The boxes of the matched candidates.
    mine = jnp.take_along_axis(flat_boxes, jnp.maximum(chosen, 0)[..., None], axis=1)
    l1 = jnp.abs(mine - repeated.boxes).sum(axis=-1) * matched
    apart = (1 - giou(to_corners(mine), to_corners(repeated.boxes))) * matched
    count = jnp.maximum(num_boxes, 1)
    return SetLoss(weights.label * label, weights.l1 * l1.sum() / count, weights.giou * apart.sum() / count)


def label_loss(
    logits: Float[Array, "b q c"],
    chosen: Int[Array, "b n"],
    labels: Int[Array, "b n"],
    *,
    num_objects: Float[Array, ""],
    num_candidates: Float[Array, ""],
    no_object: float,
) -> Float[Array, ""]:
    """Cross-entropy of all candidates, Σ w·nll / Σ w, where w is `no_object` for those without an object.

    Args:
      chosen: the candidate of every object, −1 for padding, see `match`; labels: the objects' classes. The last class is
        "no object".
      num_objects, num_candidates: see `set_loss`.
    """
    b, q, classes = logits.shape
    # What is not matched is written to place q, which does not exist.
    places = jnp.arange(b)[:, None], jnp.where(chosen >= 0, chosen, q)
    labels = jnp.full((b, q), classes - 1).at[places].set(labels, mode="drop")
    w = jnp.where(labels == classes - 1, no_object, 1.0)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (w * nll).sum() / (num_objects + no_object * (num_candidates - num_objects))


def best_boxes(logits: Float[Array, "b q c"], boxes: Float[Array, "b q 4"], size: Int[Array, "b 2"]) -> dict[str, Array]:
    """Post-processing: every candidate's likeliest class and its box in pixels.

    Args:
      size: (height, width) of the images that the boxes are parts of.

    Returns:
      scores (b q), the probability of the class; labels (b q); boxes (b q 4), corners.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)[..., :-1]
    height, width = size[:, 0, None], size[:, 1, None]
    scale = jnp.stack([width, height, width, height], axis=-1)
    return {
        "scores": probabilities.max(axis=-1),
        "labels": probabilities.argmax(axis=-1),
        "boxes": to_corners(boxes) * scale,
    }
