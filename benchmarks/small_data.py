"""Measures configs/small_data.py against plain recipes, and LoRA against full fine-tuning, on images that libraries ship.

    pip install scikit-image
    python benchmarks/small_data.py [--tables=recipes,lora,dtypes] [--seeds=5] [--out=runs/small_data]

The bundled digits, and a folder of textures: crops of 16x16 pixels of scikit-image's brick, grass and gravel, side by side
so that none overlaps another, the left half of each photograph for training and the right half for testing. Prints Markdown
tables of held-out accuracies. Runs that are finished in --out are not repeated, so it can be interrupted. 51 runs, half a
minute to two minutes each on 2 CPU cores.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # configs/ is not part of the installed package

from benchmarks.side_by_side import table
from configs import lora_finetune, pretrain, small_data, vit
from vit_jax import checkpoint
from vit_jax.train import train_and_evaluate

Config = ml_collections.ConfigDict
SIZE = 16
STEPS = {"digits": 1_000, "textures": 500}
TEXTURES = ("brick", "grass", "gravel")


def main() -> int:
    """Runs what is not done yet and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/small_data"))
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
    for name in args.tables.split(","):
        print(TABLES[name](args.out, args.seeds))
    return 0


def from_nothing(out: Path, seeds: int) -> str:
    """The table of recipes that start from nothing."""
    textures = out / "textures"
    if not textures.exists():
        write_textures(textures)
    recipes: dict[str, Callable[[str], Config]] = {"none": none, "pretrain": plain, "small_data": small_data.get_config}
    rows = []
    for dataset, folder in (("digits", "digits"), ("textures", str(textures))):
        for name, recipe in recipes.items():
            config = recipe(f"micro4,{folder}")
            config.pp.crop = SIZE
            config.total_steps = STEPS[dataset]
            scores = run_seeds(config, out / dataset / name, seeds)
            rows.append([dataset, name, f"{config.total_steps:,}", *spread(scores)])
    return table(["dataset", "recipe", "steps", "mean ± std", "each seed"], rows)


def none(arg: str) -> Config:
    """configs/pretrain.py without crops and flips."""
    config = plain(arg)
    config.pp.area, config.pp.flip = (1.0, 1.0), False
    return config


def plain(arg: str) -> Config:
    """configs/pretrain.py as it is for digits, on any images: Inception crops of half of them at least, and their flips."""
    config = pretrain.get_config("micro4,digits")
    _, config.dataset = arg.split(",")
    config.pp.flip = config.dataset != "digits"
    return config


def lora(out: Path, seeds: int) -> str:
    """The table of fine-tuning from one model, which knows the digits 0 to 4 at 12 px, on all ten at 16 px."""
    base = pretrain.get_config("micro4,digits_0to4")
    base.pp.crop = 12
    run_seeds(base, out / "base", 1)
    recipes = {"vit (all parameters)": vit, "lora_finetune (rank 8)": lora_finetune}
    rows = []
    for title, recipe in recipes.items():
        config = recipe.get_config("micro4,digits")
        config.pretrained = str(out / "base" / "0")
        config.total_steps = STEPS["digits"]
        folder = out / recipe.__name__.rpartition(".")[2]
        scores = run_seeds(config, folder, seeds)
        rows.append([title, trained_share(folder / "0"), f"{config.total_steps:,}", *spread(scores)])
    return table(["recipe", "trained", "steps", "mean ± std", "each seed"], rows)


def dtypes(out: Path, seeds: int) -> str:
    """The table of what the model computes in: the same recipe in float32 and in bfloat16."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        config = plain("micro4,digits")
        config.dtype, config.pp.crop, config.total_steps = dtype, SIZE, STEPS["digits"] // 2
        rows.append([dtype, f"{config.total_steps:,}", *spread(run_seeds(config, out / "dtypes" / dtype, seeds))])
    return table(["dtype", "steps", "mean ± std", "each seed"], rows)


def trained_share(workdir: Path) -> str:
    """How many parameters a run has trained, and which part of the model's that is."""
    total = sum(x.size for x in jax.tree.leaves(checkpoint.open_checkpoint(workdir).params))
    if not (workdir / "adapter.npz").exists():
        return f"{total:,} (100 %)"
    with np.load(workdir / "adapter.npz") as arrays:
        trained = sum(x.size for x in arrays.values())
    return f"{trained:,} ({trained / total:.1%})"


def run_seeds(config: Config, folder: Path, seeds: int) -> list[float]:
    """Trains with seeds 0, 1, …; returns the held-out accuracies in percent."""
    scores = []
    for seed in range(seeds):
        config.seed = seed
        config.eval_every = config.checkpoint_every = config.total_steps
        workdir = folder / str(seed)
        log = workdir / "metrics.jsonl"
        if not log.exists() or "accuracy_test" not in log.read_text():
            with contextlib.redirect_stdout(sys.stderr):  # what a run says of itself; the tables alone go to stdout
                train_and_evaluate(config, workdir)
        metrics: dict[str, float] = {}
        for line in log.read_text().splitlines():
            metrics |= json.loads(line)
        scores.append(100 * metrics["accuracy_test"])
        print(f"{workdir}: {scores[-1]:.2f} %", file=sys.stderr, flush=True)
    return scores


def spread(scores: list[float]) -> tuple[str, str]:
    """("98.4 ± 0.2", "98.3, 98.5"): the mean with the sample's standard deviation, and every score."""
    deviation = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{deviation}", ", ".join(f"{score:.1f}" for score in scores)


def write_textures(folder: Path) -> None:
    """Writes {train,test}/{brick,grass,gravel}/*.png: 512 grey crops each."""
    try:
        from skimage import data
    except ImportError:
        sys.exit("the textures come with scikit-image: pip install scikit-image")
    for name in TEXTURES:
        photograph = getattr(data, name)()
        h, w = photograph.shape
        for split, half in (("train", photograph[:, : w // 2]), ("test", photograph[:, w // 2 :])):
            target = folder / split / name
            target.mkdir(parents=True)
            for y in range(0, h, SIZE):
                for x in range(0, w // 2, SIZE):
                    Image.fromarray(half[y : y + SIZE, x : x + SIZE]).save(target / f"{y:03}_{x:03}.png")


TABLES = {"recipes": from_nothing, "lora": lora, "dtypes": dtypes}


if __name__ == "__main__":
    sys.exit(main())
