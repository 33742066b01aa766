"""Several training images in one row of patches (`config.pp.pack`), as in NaViT (https://arxiv.org/abs/2307.06304).

A batch of b examples lies in r = b / pack rows of `max_patches`, of up to s = 2 pack images each: `image` (r, n, p), `grid`
(r, s, 2), 0 x 0 where there is no image, and `label` and `seed` (r, s). All b are always there, so that one program is compiled
and every step sees the examples that it sees without rows. Evaluation has a row for every image, with the same result.
"""

import functools
import logging
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from vit_jax.data.host import patches
from vit_jax.models import packed
from vit_jax.settings import Settings
from vit_jax.tasks import shapes
from vit_jax.tasks.task import Batch, Context, Model

log = logging.getLogger("vit_jax")


def make_collate(settings: Settings, model: Model) -> Callable[[Batch], Batch]:
    """See `Task.collate`."""
    pp = settings.pp
    if not pp.pack:
        return lambda batch: batch
    how = {"interpolation": pp.interpolation, "antialias": pp.antialias}
    return functools.partial(collate, pack=pp.pack, patch=shapes.patch_of(model), **how)


def collate(batch: Batch, *, pack: int, patch: tuple[int, int], **how: str | bool) -> Batch:
    """A batch of images, each in a row of its own, in rows of several; `how` is that of `patches.shrunk`.

    Where they are too many patches, the largest images are made smaller, to a tenth less of them until all find a place.
    """
    b, n, _ = batch["image"].shape
    found = [patches.Patches(*x) for x in zip(batch["image"], batch["grid"], strict=True)]
    most, together = n, packed.rows_of([x.grid.prod() for x in found], n, 2 * pack)
    if len(together) > b // pack:
        _tell(b, b // pack)
    while len(together) > b // pack:
        most = max(n // pack, most * 9 // 10)  # with n // pack, they always do
        grids = [patches.grid_within(x.grid * patch, patch, most, enlarge=False) for x in found]
        together = packed.rows_of([h * w for h, w in grids], n, 2 * pack)
    found = [patches.shrunk(x, patch, most, **how) if x.grid.prod() > most else x for x in found]
    rows = {
        name: np.zeros((b // pack, 2 * pack, *x.shape[1:]), x.dtype)
        for name, x in batch.items()
        if name not in ("image", "grid")
    }
    rows["image"] = np.zeros((b // pack, *batch["image"].shape[1:]), batch["image"].dtype)
    rows["grid"] = np.zeros((b // pack, 2 * pack, 2), np.int32)
    for row, members in enumerate(together):
        pixels = np.concatenate([found[i].pixels[: found[i].grid.prod()] for i in members])
        rows["image"][row, : len(pixels)] = pixels
        for name in rows.keys() - {"image"}:
            values = [found[i].grid for i in members] if name == "grid" else batch[name][members]
            rows[name][row, : len(members)] = values
    return rows


def totals(batch: Batch) -> dict[str, Float[Array, ""]]:
    """See `Task.totals`: how many images a packed batch has."""
    return {"images": _there(batch).sum(dtype=jnp.float32)} if _is_packed(batch) else {}


def mean(values: Num[Array, " b"], batch: Batch, context: Context) -> Float[Array, ""]:
    """The mean of what a model makes of every image; of a packed batch over those that are there."""
    if not _is_packed(batch):
        return values.mean(dtype=jnp.float32)
    return jnp.where(_there(batch).reshape(-1), values, 0).sum(dtype=jnp.float32) / context.totals["images"]


@functools.cache  # once
def _tell(images: int, rows: int) -> None:
    log.info("photos   %d do not fit into %d rows as they are: the largest are made smaller, see config.pp.pack", images, rows)


def _is_packed(batch: Batch) -> bool:
    return "grid" in batch and batch["grid"].ndim == 3


def _there(batch: Batch) -> Array:
    return batch["grid"].prod(axis=-1) > 0
