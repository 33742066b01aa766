"""What the canvases of `detr_r50` save: pixels by the loader's own plan, and time by DETR-R50's training step on each of them.

    python -m benchmarks.canvases [--scale=4] [--repeats=3] [--upright=0.25]

Three of four photos are of 4:3, one of 3:2, and a share `upright` of them stands. The plan is that of the recipe: `--batch`
images a step, sides of 480 to 800 pixels, random windows; nothing is decoded. Steps are of one image with sides divided by
`--scale`, and timed as benchmarks.detr does, by computing on all threads; a canvas that stands takes the time of one that lies.
"""

import argparse
import collections
import itertools

import jax
import numpy as np

from benchmarks import detr
from configs import detr_r50
from vit_jax.data.canvases import WINDOW
from vit_jax.tasks.detect import Sizes

PHOTOS = (480, 640), (480, 640), (480, 640), (427, 640)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--upright", type=float, default=0.25)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    # Which canvases come how often
    config = detr_r50.get_config()
    square = (config.pp.crop,) * 2
    canvases = Sizes(square, tuple(config.task.short_sides), config.task.crop, flip=True).canvases(config.task.canvases)

    def view_at(position: int) -> tuple[int, int]:
        rng = np.random.default_rng(position)
        height, width = PHOTOS[rng.integers(len(PHOTOS))]
        return canvases.drawn((width, height) if rng.random() < args.upright else (height, width), rng)

    batches = canvases.train_batches(view_at, batch_size=args.batch, seed=0, start_step=0)
    steps = args.windows * WINDOW
    counts = collections.Counter(canvas for canvas, _ in itertools.islice(batches, steps))

    # What a step takes on each
    print(f"{jax.devices()[0].device_kind}, {args.upright:.0%} upright, sides / {args.scale}, one image")
    shapes = sorted({tuple(sorted(canvas)) for canvas in canvases.sizes})
    seconds = {shape: _seconds(tuple(side // args.scale for side in shape), args.repeats) for shape in shapes}
    ratios = np.zeros(2)
    for canvas in canvases.sizes:
        share, taken = counts[canvas] / steps, seconds[tuple(sorted(canvas))]
        parts = canvas[0] * canvas[1] / square[0] ** 2, taken / seconds[square]
        ratios += np.multiply(share, parts)
        of_square = f"of the square {parts[0]:.2f} of the pixels, {parts[1]:.2f} of the time"
        print(f"{canvas[0]:4} x {canvas[1]:4}  {share:6.1%} of the batches  {taken:6.2f} s, {of_square}")
    print(f"in all {ratios[0]:.2f} of the pixels, {ratios[1]:.2f} of the time")


def _seconds(size: tuple[int, int], repeats: int) -> float:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1, *size, 3)).astype(np.float32)
    boxes = rng.uniform(0.2, 0.4, (1, detr.OBJECTS, 4)).astype(np.float32)
    step = detr.our_functions(images, boxes, rng.integers(1, 90, (1, detr.OBJECTS)))["training step"]
    return detr.best(step, repeats)[1]


if __name__ == "__main__":
    main()
