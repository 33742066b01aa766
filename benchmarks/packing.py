"""What it gains that several photos of different sizes share a row of tokens (`config.pp.pack`).

    python -m benchmarks.packing [--model=ti16] [--patches=256] [--packs=2,4,8] [--batch=32] [--steps=3] [--seed=0]

Random pictures of log-uniformly drawn sides from 32 to 256 px (aspect 1:2 to 2:1), trained on as a recipe says, with windows of
0.5 to 1 of each. Prints by `pack`, 0 for a row each: rows and tokens of a batch, the share of them that is filling, the share
of patches that is lost as photos are made smaller, and milliseconds of a step by photo, the best of so many: on a CPU the time
of all its cores together, which other work on the machine changes little.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from configs import pretrain
from vit_jax import train
from vit_jax.run import experiment as experiments
from vit_jax.run import runtime, start
from vit_jax.run.signals import GracefulExit
from vit_jax.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ti16")
    parser.add_argument("--patches", type=int, default=256, help="of a row")
    parser.add_argument("--packs", default="2,4,8")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    runtime.set_up()
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), 256, np.random.default_rng(args.seed))
        before = None
        for pack in (0, *map(int, args.packs.split(","))):
            found = measure(folder, args, pack)
            before = before or found
            print(
                f"pack={pack}: {found['rows']} rows, {found['tokens']:,} tokens, {found['filling']:.1%} filling, "
                f"{1 - found['patches'] / before['patches']:.1%} of the patches lost, "
                f"{found['ms']:.1f} ms a photo, {before['ms'] / found['ms']:.2f} times as many photos a second",
                flush=True,
            )


def write_photos(folder: Path, count: int, rng: np.random.Generator) -> None:
    """Noise in two classes."""
    for i in range(count):
        side, aspect = np.exp(rng.uniform(np.log(32), np.log(256))), np.exp(rng.uniform(-0.5, 0.5) * np.log(2))
        pixels = rng.integers(0, 256, (round(side * aspect), round(side / aspect), 3), np.uint8)
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.png")


def measure(folder: str, args: argparse.Namespace, pack: int) -> dict[str, float]:
    """Counts by batch, and ms by photo, of a run with so many photos a row."""
    config = pretrain.get_config(f"{args.model},{folder}")
    config.pp.update({"max_patches": args.patches, "enlarge": False, "pack": pack, "area": (0.5, 1.0)})
    config.augment.randaug = ()
    config.update({"batch": args.batch, "accum_steps": 1, "total_steps": args.steps, "seed": args.seed})
    experiment = experiments.build(Settings.from_config(config))
    state, update = start.new_state(experiment), experiments.make_update(experiment)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds, patches = [], []
    batches = itertools.islice(train._train_batches(experiment, 0, GracefulExit()), args.steps + 1)
    for batch in list(batches):
        grids, n = np.asarray(batch["grid"]).reshape(-1, 2), batch["image"].shape[-2]
        rows = batch["image"].size // batch["image"].shape[-1] // n
        patches.append(grids.prod(axis=1).sum())
        begin = clock()
        state, metrics = update(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(clock() - begin)
    share = np.mean(patches) / (rows * n)
    ms = 1000 * min(seconds[1:]) / args.batch  # the first compiles
    return {"rows": rows, "tokens": rows * n, "filling": 1 - share, "patches": np.mean(patches), "ms": ms}


if __name__ == "__main__":
    main()
