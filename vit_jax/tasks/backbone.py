"""What tasks without labels have in common: they leave a ViT without a head, of which features are wanted."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vit_jax.checkpoint.family import POSITION_RULES
from vit_jax.checkpoint.resize import weights
from vit_jax.data.device import augment
from vit_jax.tasks import classify, images
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Batch, Loss, Model, Params, Task

NEEDS = ("image",)
Grid = tuple[int, int]


def features_task(setup: Setup, model: Model, kind: str) -> Task:
    """What a trained backbone without a head does, for a task of this type: `features` (b, d), its class token or the mean."""
    mean, std = setup.normalisation
    eval_image = images.eval_image(setup.settings)

    def eval_example(example: Mapping[str, Any], *, exif_rotated: bool) -> dict[str, np.ndarray]:
        label = {"label": np.int32(example["label"])} if "label" in example else {}
        return {"image": eval_image(example["image"], exif_rotated=exif_rotated)} | label

    def predict(params: Params, batch: Batch) -> dict[str, Array]:
        return {"features": images.image_features(model.module, params, augment.normalize(batch["image"], mean, std))["cls"]}

    def preview(batch: dict[str, np.ndarray], key: jax.Array | None) -> tuple[np.ndarray, list[str]]:
        return images.pixels(batch["image"]), [""] * len(batch["image"])

    return Task(
        model=model,
        needs=NEEDS,
        train_example=eval_example,
        eval_example=eval_example,
        init=classify.make_init(model.module, setup.settings.image_size),
        loss=lambda params, context, batch, key: Loss(jnp.zeros(())),
        predict=predict,
        evaluators=(),
        describe=lambda: {"class_names": (), "task": {"type": kind}},
        show=images.make_show_vector("features", "features"),
        preview=preview,
        load=images.make_load(model, setup.settings.image_size),
    )


def at_grid(params: Params, grid: Grid, new: Grid, rule: str) -> Params:
    """A ViT's parameters with its learned positions of a grid of patches resampled to another, see `checkpoint.resize`."""

    def resample(patches: Float[Array, "h w d"]) -> Float[Array, "i j d"]:
        rows, columns = (jnp.asarray(weights(old, to, rule), jnp.float32) for old, to in zip(grid, new, strict=True))
        return jnp.einsum("ih,hwd,jw->ijd", rows, patches, columns, precision="highest")

    return params if grid == new else _with_positions(params, grid, resample)


def on_part(params: Params, grid: Grid, part: Grid) -> Params:
    """A ViT's parameters with its learned positions of the upper left part of a grid of patches, which are as they were."""
    return params if grid == part else _with_positions(params, grid, lambda patches: patches[: part[0], : part[1]])


def _with_positions(params: Params, grid: Grid, change: Callable[[Float[Array, "h w d"]], Float[Array, "i j d"]]) -> Params:
    if "posembed_input" not in params["Transformer"]:
        return params
    table = params["Transformer"]["posembed_input"]["pos_embedding"]
    first, d = table.shape[1] - math.prod(grid), table.shape[2]
    patches = change(table[0, first:].reshape(*grid, d))
    table = jnp.concatenate([table[:, :first], patches.reshape(1, -1, d)], axis=1)
    return {**params, "Transformer": {**params["Transformer"], "posembed_input": {"pos_embedding": table}}}


def position_rule(setup: Setup, model: Model) -> str:
    """How learned positions are resampled: as the origin says, and from nothing as DINOv2 does."""
    if setup.origin:
        return setup.origin.resize
    return POSITION_RULES["DINOv2 with registers" if model.fields.get("num_registers") else "DINOv2"]


def cover(
    pictures: Float[np.ndarray, "b H W 3"], hidden: Bool[np.ndarray, "b h w"], patch: tuple[int, int]
) -> Float[np.ndarray, "b H W 3"]:
    """The pictures with grey in place of hidden patches."""
    covered = np.array(pictures)
    where = hidden.repeat(patch[0], axis=1).repeat(patch[1], axis=2)
    covered[:, : where.shape[1], : where.shape[2]][where] = 127
    return covered
