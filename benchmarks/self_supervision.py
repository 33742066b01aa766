"""Measures what is learnt without labels: neighbours among the features of DINOv2's teacher and of MAE's encoder.

    pip install scikit-image
    python benchmarks/self_supervision.py [--recipes=dinov2,mae] [--seeds=3] [--steps=300] [--out=runs/self_supervision]

The images are crops of 17 photographs that scikit-image and scikit-learn ship, and the question is which photograph a crop is
of. Crops for training lie in the left 60 % of a photograph, those for testing in the right 40 %, so that none shares a pixel
with another's. Labels are for the neighbours alone: a crop's 10 nearest among those for training vote. Prints a Markdown table
of accuracies of the pixels, of the untrained networks, and of the trained ones, with mean and standard deviation over seeds.
Runs that are finished in --out are not repeated.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # configs/ is not part of the installed package

from benchmarks.side_by_side import table
from benchmarks.small_data import spread
from configs import dinov2, mae
from vit_jax.evaluators.knn import knn, make_evaluator
from vit_jax.run import experiment as experiments
from vit_jax.settings import Settings
from vit_jax.train import train_and_evaluate

K = 10
SIZE = 16
"""Of the images that the models see, in pixels; the crops are kept at twice that."""

PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("immunohistochemistry", "moon", "page", "retina", "rocket", "stereo_motorcycle"),
)
"""scikit-image's; scikit-learn adds a temple and a flower."""

CROPS = {"train": 150, "test": 60}
"""How many of each photograph."""


def main() -> int:
    """Runs what is not done yet and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="dinov2,mae")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/self_supervision"))
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
    folder = args.out / "photographs"
    if not folder.exists():
        write_crops(folder)
    rows = []
    for name in args.recipes.split(","):
        config = recipe(name, folder, args.steps)
        if not rows:
            rows.append(["the pixels", "", f"{of_pixels(config):.1f}", ""])
        rows.append([f"{name}, untrained", "0", *spread([untrained(config, seed) for seed in range(args.seeds)])])
        scores = [trained(config, args.out / name / str(args.steps), seed) for seed in range(args.seeds)]
        rows.append([f"{name}, trained", f"{args.steps:,}", *spread(scores)])
    print(table(["features", "steps", "mean ± std", "each seed"], rows))
    return 0


def recipe(name: str, folder: Path, steps: int) -> ml_collections.ConfigDict:
    """configs/NAME.py for these images, with colours that change less: much of a photograph is in them."""
    config = {"dinov2": dinov2, "mae": mae}[name].get_config(f"micro4,{folder}")
    config.pp.crop = SIZE
    if name == "dinov2":
        config.task.update({"local_size": SIZE // 2, "jitter": (0.2, 0.2, 0.1, 0.02), "grey_prob": 0.0})
    config.evaluators = {"knn": {"k": (K,)}}
    config.total_steps, config.eval_every = steps, min(steps, 100)
    config.warmup_steps, config.checkpoint_every = steps // 10, steps
    return config


def of_pixels(config: ml_collections.ConfigDict) -> float:
    """The accuracy in percent of neighbours among the images as a model sees them."""
    built = experiments.build(Settings.from_config(config))
    pixels, labels = [], []
    for source in (built.train_source, built.test_source):
        examples = [built.task.eval_example(source[i], exif_rotated=source.exif_rotated) for i in range(len(source))]
        pixels.append(np.stack([example["image"].ravel() / 255 - 0.5 for example in examples]))
        labels.append(np.array([example["label"] for example in examples]))
    predicted = knn(pixels[0], labels[0], pixels[1], built.train_source.num_classes, (K,))
    return 100 * float(np.mean(predicted[K] == labels[1]))


def untrained(config: ml_collections.ConfigDict, seed: int) -> float:
    """The accuracy in percent of neighbours among the features of a network with fresh parameters."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    built = experiments.build(Settings.from_config(config))
    params = built.init_params()
    params = built.parallelism.place(params.get("backbone", params), "params")
    return 100 * make_evaluator(built, k=(K,))(params)[f"knn_{K}"]


def trained(config: ml_collections.ConfigDict, folder: Path, seed: int) -> float:
    """The same of what training leaves behind."""
    config.seed = seed
    workdir = folder / str(seed)
    log = workdir / "metrics.jsonl"
    scores = {}
    if not (workdir / "model.npz").exists():
        with contextlib.redirect_stdout(sys.stderr):  # what a run says of itself; the table alone goes to stdout
            train_and_evaluate(config, workdir)
    for line in map(json.loads, log.read_text().splitlines()):
        scores |= {line["step"]: line[f"knn_{K}"]} if f"knn_{K}" in line else {}
    shown = ", ".join(f"{step}: {100 * score:.1f}" for step, score in scores.items())
    print(f"{workdir}: {shown} %", file=sys.stderr, flush=True)
    return 100 * scores[config.total_steps]


def write_crops(folder: Path) -> None:
    """Writes {train,test}/PHOTOGRAPH/*.png: windows of 32 to 96 pixels, resized to twice `SIZE`."""
    try:
        from skimage import data
    except ImportError:
        sys.exit("most of the photographs come with scikit-image: pip install scikit-image")
    from sklearn.datasets import load_sample_images

    photographs = {name: getattr(data, name)() for name in PHOTOGRAPHS}
    photographs |= dict(zip(("temple", "flower"), load_sample_images().images, strict=True))
    rng = np.random.default_rng(0)
    for split, count in CROPS.items():
        for name, pixels in photographs.items():
            photograph = Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")
            target = folder / split / name
            target.mkdir(parents=True)
            width, height = photograph.size
            left, right = (0, int(0.6 * width)) if split == "train" else (int(0.6 * width), width)
            for i in range(count):
                side = int(rng.integers(32, min(96, right - left, height) + 1))
                x, y = int(rng.integers(left, right - side + 1)), int(rng.integers(0, height - side + 1))
                crop = photograph.crop((x, y, x + side, y + side))
                crop.resize((2 * SIZE, 2 * SIZE), Image.Resampling.BILINEAR).save(target / f"{i:03}.png")


if __name__ == "__main__":
    sys.exit(main())
