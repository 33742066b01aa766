"""What merging R tokens in each block gains and costs: images a second of a ViT, and accuracy of a small one on digits.

    python -m benchmarks.tome [--model=ViT-S_16] [--batch=8] [--rounds=10] [--workdir=runs/tome] [--name=tome]

The model has random parameters: how fast it is does not depend on them. All R are programs of one process, which take turns.
The small model, ViT-Micro/4 with 16 patches in 4 blocks, is trained in --workdir, where it is not there yet, by the recipe
`small_data:micro4,digits`. Prints tables and writes them to benchmarks/results/NAME.md, the data to NAME.json.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import side_by_side
from benchmarks.side_by_side import Measured
from configs import small_data
from vit_jax import models
from vit_jax.data.device import augment
from vit_jax.evaluate import evaluate
from vit_jax.models import token_merging
from vit_jax.run import runtime
from vit_jax.train import train_and_evaluate

SIZE, MERGED = 224, (0, 2, 4, 8, 13, 16)
MERGED_OF_DIGITS = (0, 1, 2, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-S_16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workdir", type=Path, default=Path("runs/tome"))
    parser.add_argument("--name", default="tome", help="of the files in benchmarks/results")
    args = parser.parse_args()
    runtime.set_up()
    accuracy = {r: _accuracy(args.workdir, r) for r in MERGED_OF_DIGITS}
    speed = _speed(args.model, args.batch, args.rounds)
    rows = [
        [r, f"{args.batch / wall.median:.2f}", f"{1e3 * cpu.median / args.batch:.1f}", f"{cpu.spread:.1%}"]
        + [f"{speed[0][1].median / cpu.median:.2f}"]
        for r, (wall, cpu) in speed.items()
    ]
    tables = [
        side_by_side.table(["R", f"{args.model}, images/s", "CPU ms an image", "±", "times less than R = 0"], rows),
        f"± is half the distance of the outer quartiles of {args.rounds} turns. Where others compute, too, CPU time counts.",
        side_by_side.table(["R", "accuracy of ViT-Micro/4, %"], [[r, f"{100 * x:.2f}"] for r, x in accuracy.items()]),
    ]
    title = f"Token merging, batch {args.batch}, {SIZE} px, float32, and held-out accuracy on digits at 16 px"
    seconds = {r: {"wall": wall.seconds, "cpu": cpu.seconds} for r, (wall, cpu) in speed.items()}
    data = {"seconds": seconds, "accuracy": accuracy}
    side_by_side.save(args.name, title, tables, data, side_by_side.environment())


def _speed(name: str, batch: int, rounds: int) -> dict[int, tuple[Measured, Measured]]:
    """The seconds that a batch takes by the clock, and of all cores' time, by R."""
    model = models.get_model(name, dtype="float32")
    images = np.random.default_rng(0).integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
    params = jax.jit(model.init)(jax.random.key(0), augment.normalize(images[:1]))["params"]

    def program(r: int):
        classify = token_merging.merging(r)(lambda p, x: model.apply({"params": p}, augment.normalize(x)))
        return jax.jit(classify).lower(params, images).compile()

    programs, seconds = {r: program(r) for r in MERGED}, {r: [] for r in MERGED}
    for i in range(rounds + 1):
        for r in MERGED[:: 1 if i % 2 else -1]:
            started = time.perf_counter(), time.process_time()
            jax.block_until_ready(programs[r](params, images))
            if i:  # the first turn warms up
                seconds[r].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return {r: tuple(Measured(list(times), {}) for times in zip(*of_r, strict=True)) for r, of_r in seconds.items()}


def _accuracy(workdir: Path, r: int) -> float:
    """Of the small model on the digits that it was not trained on."""
    config = small_data.get_config("micro4,digits")
    config.report = False
    if not (workdir / "model.npz").exists():
        train_and_evaluate(config, workdir)
    config.update({"trainer": "evaluate", "tome": r})
    return evaluate(config, workdir)["accuracy_test"]


if __name__ == "__main__":
    main()
