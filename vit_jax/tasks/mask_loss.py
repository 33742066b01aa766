"""A set of predicted masks with classes and a set of true ones: how far they are apart (Mask2Former, EoMT).

A true object is a class that an image shows, and its mask all pixels of that class. Masks are compared at random points, at
which both are interpolated (https://arxiv.org/abs/2112.01527).

Shapes: b batch, q candidates, n places for objects, of which `valid` says which are taken, p points.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from vit_jax.data.host.view import IGNORED
from vit_jax.errors import UserError
from vit_jax.tasks.matching import label_loss, match

OVERSAMPLED, UNCERTAIN = 3, 0.75
"""The loss looks at the most uncertain of three times as many points, for so large a part of them; the others are random."""
_POINTS = 7  # what a key is folded with, so that augmentation draws other numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matching:
    """At how many points masks are compared, and what a distance counts in the matching and in the loss.

    `no_object` is the weight of that class. Raises UserError for numbers that make no sense.
    """

    points: int = 12_544
    label: float = 2.0
    mask: float = 5.0
    dice: float = 5.0
    no_object: float = 0.1

    def __post_init__(self) -> None:
        for name, x in vars(self).items():
            if x < (least := 4 if name == "points" else 0):
                raise UserError(f"config.task.matching.{name}={x} must be {least} or more")


class Targets(NamedTuple):
    """The objects of a batch, and the class of every pixel."""

    segmentation: Int[Array, "b H W"]
    labels: Int[Array, "b n"]
    valid: Bool[Array, "b n"]


class MaskLoss(NamedTuple):
    """Sums over all stages of weighted losses, each divided by what it is normalised by."""

    label: Float[Array, ""]
    mask: Float[Array, ""]
    dice: Float[Array, ""]


def targets_of(segmentation: UInt[Array, "b H W"], *, classes: int, places: int) -> Targets:
    """The classes that an image shows, the largest first; of more than there are places those are left out."""
    pixels = segmentation.astype(jnp.int32)
    count = jax.vmap(lambda x: jnp.bincount(jnp.where(x == IGNORED, classes, x).ravel(), length=classes + 1)[:-1])(pixels)
    count, labels = jax.lax.top_k(count, min(places, classes))
    return Targets(pixels, labels, count > 0)


def draw_points(seeds: UInt[Array, " b"], stages: int, points: int) -> tuple[Float[Array, "l b p 2"], Float[Array, "l b m 2"]]:
    """(x, y), parts of the image: `points` to match by, and those of which the loss chooses its own, see `mask_loss`."""
    more = math.ceil(OVERSAMPLED * points) + points - int(UNCERTAIN * points)

    def draw(seed: UInt[Array, ""]) -> Float[Array, "l p+m 2"]:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), _POINTS), (stages, points + more, 2))

    drawn = jax.vmap(draw, out_axes=1)(seeds)
    return drawn[:, :, :points], drawn[:, :, points:]


def mask_loss(
    masks: Float[Array, "l b h w q"],
    classes: Float[Array, "l b q c"],
    targets: Targets,
    points: tuple[Float[Array, "l b p 2"], Float[Array, "l b m 2"]],
    *,
    num_masks: Float[Array, ""],
    num_candidates: Float[Array, ""],
    matching: Matching,
) -> MaskLoss:
    """EoMT's loss of logits: every stage is matched by itself, and all stages count alike.

    label: `matching.label_loss`; mask: cross-entropy of the points of a mask, its mean; dice: 1 − 2·|a·b| / (|a| + |b|)
    of probabilities, with 1 added above and below the line. Both are of the matched ones, divided by the number of masks.
    The points are the same for all masks of an image, of which each takes those where it is the least certain; published
    code draws points for each mask.

    Args:
      points: of `draw_points`, parts of the image.
      num_masks, num_candidates: of the whole batch, on all devices: the losses of its parts sum to its loss.
    """
    stages = len(masks)
    masks, classes, match_by, choose_of = (x.reshape(-1, *x.shape[2:]) for x in (masks, classes, *points))
    targets = jax.tree.map(lambda x: jnp.tile(x, (stages, *[1] * (x.ndim - 1))), targets)
    chosen = match(costs(masks, classes, targets, match_by, matching), targets.valid)
    totals = {"num_objects": num_masks, "num_candidates": num_candidates}
    label = label_loss(classes, chosen, targets.labels, **totals, no_object=matching.no_object)

    # The matched masks and the true ones, at the points of each
    mine = jnp.take_along_axis(masks, jnp.maximum(chosen, 0)[:, None, None], axis=-1)
    logits = jnp.swapaxes(at_points(mine, choose_of), 1, 2)
    true = jnp.swapaxes(true_at_points(targets, choose_of), 1, 2)
    picked = _least_certain(logits, match_by.shape[1])
    logits, true = (jnp.take_along_axis(x, picked, axis=-1) for x in (logits, true))

    count, matched = jnp.maximum(num_masks, 1), chosen >= 0
    mask = ((jax.nn.softplus(logits) - logits * true).mean(axis=-1) * matched).sum() / count
    dice = (_dice(jax.nn.sigmoid(logits), true) * matched).sum() / count
    return MaskLoss(matching.label * label, matching.mask * mask, matching.dice * dice)


def costs(
    masks: Float[Array, "b h w q"],
    classes: Float[Array, "b q c"],
    targets: Targets,
    points: Float[Array, "b p 2"],
    matching: Matching,
) -> Float[Array, "b q n"]:
    """−p(class) + cross-entropy + dice, weighted, between every candidate and every object."""
    logits, true = at_points(masks, points), true_at_points(targets, points)
    both = jnp.einsum("bpq,bpn->bqn", logits, true)
    entropy = (jax.nn.softplus(logits).sum(axis=1)[..., None] - both) / points.shape[1]
    share = jax.nn.sigmoid(logits)
    shared = jnp.einsum("bpq,bpn->bqn", share, true)
    dice = 1 - (2 * shared + 1) / (share.sum(axis=1)[..., None] + true.sum(axis=1)[:, None] + 1)
    of_class = jnp.take_along_axis(jax.nn.softmax(classes), targets.labels[:, None], axis=-1)
    return matching.mask * entropy + matching.dice * dice - matching.label * of_class


def at_points(maps: Float[Array, "b h w n"], points: Float[Array, "b p 2"]) -> Float[Array, "b p n"]:
    """Values in between, bilinear, with zeros around the map (torch's grid_sample)."""
    (b, h, w, n), (places, shares) = maps.shape, _corners(points, maps.shape[1:3])
    rows = jnp.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(b, (h + 2) * (w + 2), n)
    around = (jnp.take_along_axis(rows, place[..., None], axis=1) for place in places)
    return sum(x * share[..., None] for x, share in zip(around, shares, strict=True))


def true_at_points(targets: Targets, points: Float[Array, "b p 2"]) -> Float[Array, "b p n"]:
    """How much of each object there is at the points: `at_points` of its mask."""
    places, shares = _corners(points, targets.segmentation.shape[1:])
    pixels = jnp.pad(targets.segmentation, ((0, 0), (1, 1), (1, 1)), constant_values=-1).reshape(len(points), -1)

    def of_corner(place: Int[Array, "b p"], share: Float[Array, "b p"]) -> Float[Array, "b p n"]:
        label = jnp.take_along_axis(pixels, place, axis=1)
        return jnp.where(label[..., None] == targets.labels[:, None], share[..., None], 0)

    return sum(of_corner(place, share) for place, share in zip(places, shares, strict=True)) * targets.valid[:, None]


def _corners(points: Float[Array, "b p 2"], size: tuple[int, int]) -> tuple[list[Int[Array, "b p"]], list[Float[Array, "b p"]]]:
    """The four pixels around each point, as places in a map with a border of one, row by row, and the share of each."""
    height, width = size
    x, y = points[..., 0] * width + 0.5, points[..., 1] * height + 0.5  # from the border's centres on
    left, top = jnp.floor(x), jnp.floor(y)
    places, shares = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            places.append(((top + dy) * (width + 2) + left + dx).astype(jnp.int32))
            shares.append((1 - jnp.abs(y - top - dy)) * (1 - jnp.abs(x - left - dx)))
    return places, shares


def _least_certain(logits: Float[Array, "b n m"], points: int) -> Int[Array, "b n p"]:
    """Which points count: most are those of the candidates where a logit is the nearest to 0, the others the last ones."""
    uncertain = int(UNCERTAIN * points)
    first, m = logits.shape[-1] - (points - uncertain), logits.shape[-1]
    nearest = jax.lax.top_k(-jnp.abs(jax.lax.stop_gradient(logits[..., :first])), uncertain)[1]
    return jnp.concatenate([nearest, jnp.broadcast_to(jnp.arange(first, m), (*logits.shape[:2], m - first))], axis=-1)


def _dice(share: Float[Array, "b n p"], true: Float[Array, "b n p"]) -> Float[Array, "b n"]:
    return 1 - (2 * (share * true).sum(axis=-1) + 1) / (share.sum(axis=-1) + true.sum(axis=-1) + 1)
