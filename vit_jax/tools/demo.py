"""Pretrains a small ViT, fine-tunes it, and names images it has not seen, by the commands that a user would type.

    python -m vit_jax.demo
    python -m vit_jax.demo --workdir=runs/demo --seed=1

Everything is written below the workdir, where it replaces what an earlier demo left. It took 133 to 160 s on 2 CPU cores.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vit_jax.arguments import as_typed, parser
from vit_jax.errors import command

FEW = 10
"""How many labelled images of each digit there are where labels are few."""
EXPECTED, EXPECTED_GAIN = 0.97, 0.05
"""The accuracy after fine-tuning on all labels, and what pretraining gains with few: see tests/tools/test_demo.py."""

_FINETUNE = "--config=small_data:micro4,digits --config.total_steps=900"
_FEW = "--config=small_data:micro4,digits --config.total_steps=60 --config.warmup_steps=10 --config.dataset={root}/images"
RUNS = {  # folder: what vit_jax.main is told
    "pretrain": "--config=pretrain:micro4,digits_0to4 --config.total_steps=500",
    "finetune": f"{_FINETUNE} --config.pretrained={{root}}/pretrain",
    "scratch": _FINETUNE,
    "few": f"{_FEW} --config.pretrained={{root}}/pretrain",
    "few_scratch": _FEW,
}
TITLES = {
    "pretrain": "pretraining, digits 0 to 4",
    "finetune": "fine-tuning, all labels",
    "scratch": "  the same steps from nothing",
    "few": f"fine-tuning, {FEW} labels a digit",
    "few_scratch": "  the same steps from nothing",
}


def arguments(name: str, root: str, seed: int) -> list[str]:
    """What vit_jax.main is told for one of `RUNS`."""
    return [f"--workdir={root}/{name}", *RUNS[name].format(root=root).split(), f"--config.seed={seed}"]


def accuracy(name: str, root: str) -> float:
    """The share of the held-out digits that a run's model names rightly."""
    return _last(Path(root, name, "metrics.jsonl"), "accuracy_test")


def write_images(folder: Path) -> None:
    """Writes digits of 8x8 pixels as grey PNG files: train/DIGIT, `FEW` of each, and test/DIGIT, all that are held out."""
    import numpy as np
    from PIL import Image

    from vit_jax.data.sources import get_source

    for split, most in (("train", FEW), ("test", None)):
        source, written = get_source("digits", split), dict.fromkeys(range(10), 0)
        for example in (source[i] for i in range(len(source))):
            label = example["label"]
            if most is None or written[label] < most:
                written[label] += 1
                path = folder / split / source.class_names[label] / f"{written[label]:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.squeeze(example["image"], -1)).save(path)


def run(module: str, *arguments: str) -> None:
    """Prints a command and runs it; one that fails ends the demo with its exit code."""
    print(f"$ python -m vit_jax.{module} {' '.join(arguments)}", flush=True)
    if code := subprocess.run([sys.executable, "-m", f"vit_jax.{module}", *arguments]).returncode:
        sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the whole demo."""
    options = parser(__doc__)
    options.add_argument("--workdir", default="runs/demo", help="where everything is written (default runs/demo)")
    options.add_argument("--seed", type=int, default=0, help="of all randomness (default 0)")
    args = options.parse_args(argv)
    root, started = args.workdir, time.perf_counter()
    for name in (*RUNS, "images"):
        shutil.rmtree(Path(root, name), ignore_errors=True)

    def train(name: str) -> None:
        run("main", *arguments(name, root, args.seed))

    _say("1. Pretrain from nothing on handwritten digits, 0 to 4 only")
    train("pretrain")
    _say("2. Fine-tune that model on all ten digits, as one fine-tunes a published one; then the same steps from nothing")
    train("finetune")
    train("scratch")
    _say(f"3. Both where labels are few: from a folder of PNG files, {FEW} of each digit")
    write_images(Path(root, "images"))
    train("few")
    train("few_scratch")
    _say("4. Name an image of each digit that no training has seen")
    folders = sorted(Path(root, "images", "test").iterdir())
    run("predict", f"--model={root}/finetune", "--top=2", *(str(folder / "001.png") for folder in folders))
    _summary(root, time.perf_counter() - started)
    return 0


def _summary(root: str, seconds: float) -> None:
    print(f"\n{'':31}{'held-out accuracy':>18}{'training images/s':>19}   files")
    for name, title in TITLES.items():
        rate = _last(Path(root, name, "metrics.jsonl"), "img_sec_core_train")
        print(f"{title:31}{accuracy(name, root):>18.1%}{rate:>19,.0f}   {root}/{name}")
    gain = accuracy("few", root) - accuracy("few_scratch", root)
    print(f"\nWhy one pretrains: where labels are few, it names {100 * gain:.0f} more of a hundred digits rightly.")
    if accuracy("finetune", root) < EXPECTED or gain < EXPECTED_GAIN:
        expected = f"{EXPECTED:.0%} with all labels, {100 * EXPECTED_GAIN:.0f} more with few"
        print(f"That is less than expected ({expected}): please report it.")
    print(f"\n{seconds:.0f} s in all. Next, your own photos, one folder a class (see README.md):")
    print(as_typed("  python -m vit_jax.main --workdir=runs/photos --config=photos:PHOTOS --config.pretrained=SOURCE"))


def _last(path: Path, name: str) -> float:
    values = [line[name] for line in map(json.loads, path.read_text().splitlines()) if name in line]
    return values[-1]


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def cli() -> None:
    """The console command."""
    command(main)
