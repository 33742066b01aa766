"""The training of a segmenter that predicts masks with classes, by matching them to those of an image: EoMT's.

At first a query sees, in the last blocks, only the patches of its own mask. With one block after the other this mask is given
up, so that the trained model is a plain ViT (https://arxiv.org/abs/2503.19108).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt

from vit_jax.data.device import augment
from vit_jax.models.eomt import Eomt
from vit_jax.tasks import mask_loss
from vit_jax.tasks.mask_loss import Matching
from vit_jax.tasks.task import Batch, Context, Loss, Params

_ANNEALING = 8  # what a key is folded with, so that points and augmentation draw other numbers


def make_totals(model: Eomt) -> Callable[[Batch], dict[str, Array]]:
    """batch → what its losses are divided by: how many classes its images show, and of the model's candidates."""

    def totals(batch: Batch) -> dict[str, Array]:
        targets = mask_loss.targets_of(batch["segmentation"], classes=model.num_classes, places=model.num_queries)
        candidates = jnp.asarray(len(targets.valid) * model.num_queries, jnp.float32)
        return {"masks": targets.valid.sum(dtype=jnp.float32), "candidates": candidates}

    return totals


def make_loss(
    model: Eomt, recolor: Callable, mean: Sequence[float], std: Sequence[float], *, total_steps: int, matching: Matching
) -> Callable[[Params, Context, Batch, jax.Array], Loss]:
    """`mask_loss.mask_loss` of the objects before each of the last blocks and behind them."""

    def loss(params: Params, context: Context, batch: Batch, key: jax.Array) -> Loss:
        inputs = augment.normalize(recolor(batch["image"], batch["seed"]), mean, std)
        masked = annealed(context.step / total_steps, model.num_blocks)
        sees_all = draw_seeing_all(batch["seed"], masked, model.num_queries)
        how = {"train": True, "rngs": {"dropout": key}, "method": "stages"}
        masks, classes = model.apply({"params": params}, inputs, sees_all, **how)
        targets = mask_loss.targets_of(batch["segmentation"], classes=model.num_classes, places=model.num_queries)
        drawn = mask_loss.draw_points(batch["seed"], len(masks), matching.points)
        totals = {"num_masks": context.totals["masks"], "num_candidates": context.totals["candidates"]}
        parts = mask_loss.mask_loss(masks, classes, targets, drawn, **totals, matching=matching)
        return Loss(sum(parts), {f"loss_{name}": x for name, x in parts._asdict().items()})

    return loss


def annealed(progress: Float[Array, ""], num_blocks: int) -> Float[Array, " l"]:
    """The chance that a query's sight is masked in each of the last blocks, after so large a part of all steps.

    It falls from 1 to 0, as (1 − t)^0.9, within a sixth of the steps: from a sixth on in the first of these blocks, from two
    thirds on in the last one.
    """
    start = jnp.linspace(1, 4, num_blocks) / 6
    return (1 - jnp.clip((progress - start) * 6, 0, 1)) ** 0.9


def draw_seeing_all(seeds: UInt[Array, " b"], masked: Float[Array, " l"], queries: int) -> Bool[Array, "l b q"]:
    """Which queries see all patches in each of the last blocks, drawn for each image by its seed."""

    def draw(seed: UInt[Array, ""]) -> Float[Array, "l q"]:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), _ANNEALING), (len(masked), queries))

    return jax.vmap(draw, out_axes=1)(seeds) >= masked[:, None, None]
