"""A picture of what a recipe makes of its training images.

    python -m vit_jax.preview --config=small_data:micro4,digits --out=grid.png
    python -m vit_jax.preview --config=photos:PHOTOS --config.augment.randaug=(2,10) --out=grid.png --rows=4 --columns=6

A row is an image of the training split: first as it is evaluated, then as it is trained on, drawn anew in every column:
cropped on the host, changed on the device, and mixed with another image of its column where the recipe mixes. Below
stand the classes with the two largest targets, and those targets. `--config.seed` takes other images and draws.
"""

import math
import os
from collections.abc import Sequence

import numpy as np
from absl import flags
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from vit_jax import overrides, pictures, tasks
from vit_jax.data import memory, sources
from vit_jax.errors import UserError
from vit_jax.files import COMPILED_PROGRAMS
from vit_jax.pictures import GAP, LINE, fitted
from vit_jax.report.samples import augmented
from vit_jax.run import runtime
from vit_jax.run.start import find_origin
from vit_jax.settings import Settings
from vit_jax.tasks.setup import Setup

_OUT = flags.DEFINE_string("out", None, "The picture to write, such as grid.png.")
_ROWS = flags.DEFINE_integer("rows", 6, "How many images.", lower_bound=1)
_COLUMNS = flags.DEFINE_integer("columns", 8, "How many pictures of each, the original among them.", lower_bound=1)

SIDE = 128, 224
"""Smaller pictures are enlarged to at least the first of these, larger ones reduced to the second, in pixels."""


def preview(settings: Settings, *, rows: int = 6, columns: int = 8) -> Image.Image:
    """The picture of a recipe."""
    needs = tasks.needs(settings)
    source = sources.get_source(settings.dataset, settings.pp.train, needs=needs, **settings.tfds_folders)
    source = memory.kept(source, **settings.caching)  # as in training: it decides at which scale photos are decoded
    task = tasks.make(Setup(settings, source.features, find_origin(settings)))
    return draw(augmented(task, source, settings, rows=rows, columns=columns))


def draw(grid: Sequence[tuple[UInt8[np.ndarray, "b h w 3"], Sequence[str]]]) -> Image.Image:
    """A picture of columns, each of images and what to write below them."""
    rows, h, w, _ = grid[0][0].shape
    scale = math.ceil(SIDE[0] / min(h, w)) if min(h, w) < SIDE[0] else min(1.0, SIDE[1] / min(h, w))
    height, width = round(h * scale), round(w * scale)
    cell_height, cell_width = height + LINE + GAP, width + GAP
    canvas = Image.new("RGB", (GAP + len(grid) * cell_width, GAP + rows * cell_height), "white")
    pen, font = ImageDraw.Draw(canvas), pictures.font()
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    for column, (images, captions) in enumerate(grid):
        for row, (image, text) in enumerate(zip(images, captions, strict=True)):
            left, top = GAP + column * cell_width, GAP + row * cell_height
            canvas.paste(Image.fromarray(image).resize((width, height), resampling), (left, top))
            pen.text((left, top + height + 1), fitted(text, font, width), fill="black", font=font)
    return canvas


def main() -> None:
    """Writes the picture."""
    out, config = _OUT.value, overrides.CONFIG.value
    if config is None or out is None:
        raise UserError(f"--{'config' if config is None else 'out'} is missing: --config=FILE[:ARG] --out=grid.png")
    if os.path.splitext(out)[1].lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out={out}: name a picture that ends in .png, .jpg or .webp")
    runtime.set_up(config.get("compilation_cache", COMPILED_PROGRAMS))
    picture = preview(Settings.from_config(config), rows=_ROWS.value, columns=_COLUMNS.value)
    try:
        picture.save(out)
    except OSError as e:
        raise UserError(f"--out={out} cannot be written: {e.strerror or e}") from e
    print(f"wrote {out}, {picture.width} x {picture.height} pixels")


def cli() -> None:
    """The console command."""
    overrides.run(main, __doc__, ("out", "rows", "columns"))
