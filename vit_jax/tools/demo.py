"""`make demo`: pretrain a small ViT, fine-tune it, and name images it has not seen, by the commands a user would type."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from vit_jax.data.sources import get_source

ROOT = Path("runs/demo")
REQUIRED = 0.97  # of the held-out digits, after fine-tuning

PRETRAIN = f"--workdir={ROOT}/pretrain --config=configs/pretrain.py:micro4,digits_0to4 --config.pp.crop=12"
FINETUNE = "--config=configs/vit.py:micro4,digits --config.total_steps=400"


def main() -> int:
    """Runs the whole demo; returns 1 if the fine-tuned model is worse than it should be."""
    started = time.perf_counter()
    shutil.rmtree(ROOT, ignore_errors=True)
    _say("1. Pretrain from nothing on handwritten digits, 0 to 4 only, at 12 px")
    _run("main", PRETRAIN)
    _say("2. Fine-tune that file on all ten digits at 16 px, as one fine-tunes a published checkpoint")
    _run("main", f"--workdir={ROOT}/finetune {FINETUNE} --config.pretrained={ROOT}/pretrain/model.npz")
    _say("3. For comparison, the same steps from scratch")
    _run("main", f"--workdir={ROOT}/scratch {FINETUNE} --config.pretrained_dir=")
    _say(f"4. Name held-out digits, written to {ROOT}/held_out as PNG files called after what they show")
    write_held_out(ROOT / "held_out")
    _run("predict", f"--model={ROOT}/finetune --top=2 {ROOT}/held_out")
    return _summary(time.perf_counter() - started)


def write_held_out(folder: Path) -> None:
    """Writes the first held-out image of every digit to `folder` as an 8x8 grey PNG."""
    source = get_source("digits", "test")
    folder.mkdir(parents=True)
    for example in (source[i] for i in range(len(source))):
        path = folder / f"a_{source.class_names[example['label']]}.png"
        if not path.exists():
            Image.fromarray(np.squeeze(example["image"], -1)).save(path)


def _run(module: str, arguments: str) -> None:
    command = [sys.executable, "-m", f"vit_jax.{module}", *shlex.split(arguments)]
    print(f"$ python -m vit_jax.{module} {arguments}", flush=True)
    result = subprocess.run(command)
    if result.returncode:
        sys.exit(result.returncode)


def _summary(seconds: float) -> int:
    rows = {"pretrain": "pretraining, digits 0 to 4", "finetune": "fine-tuning, all digits", "scratch": "the same from scratch"}
    print(f"\n{'':28}{'held-out accuracy':>18}{'training images/s':>19}   files")
    accuracy = {}
    for name, title in rows.items():
        lines = [json.loads(line) for line in (ROOT / name / "metrics.jsonl").read_text().splitlines()]
        rates = [line["img_sec_core_train"] for line in lines if "img_sec_core_train" in line]
        accuracy[name] = next(line["accuracy_test"] for line in reversed(lines) if "accuracy_test" in line)
        print(f"{title:28}{accuracy[name]:>18.1%}{np.median(rates):>19,.0f}   {ROOT / name}")
    print(f"\n{seconds:.0f} s in all. Next, your own photos, one folder a class (see README.md):")
    print("  python -m vit_jax.main --workdir=runs/photos --config=configs/photos.py:PHOTOS --config.pretrained=SOURCE")
    if accuracy["finetune"] < REQUIRED:
        print(f"error: {accuracy['finetune']:.1%} after fine-tuning is below the expected {REQUIRED:.0%}", file=sys.stderr)
        return 1
    return 0


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def cli() -> None:
    """The console command."""
    sys.exit(main())
