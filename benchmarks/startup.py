"""Seconds from the start of a process to its first finished training step, with an empty folder of programs and a full one.

    python -m benchmarks.startup [--model=ViT-B_16] [--batch=8] [--size=224] [--rounds=2]
        [--peers=reference,timm] [--name=startup]

Ours is the real command, `python -m vit_jax.main` with configs/pretrain.py on a folder of 32 JPEGs, and the times are those
at which its output arrives; peers import, build and take one step of `benchmarks.peers`, without data. Prints a table and
writes it to benchmarks/results/NAME.md, the data to NAME.json.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import peers, side_by_side
from benchmarks.side_by_side import Worker

COLUMNS = ("imports, data, model", "tracing", "compiling or loading", "first step", "the rest", "in all", "later step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B_16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", default="reference,timm")
    parser.add_argument("--name", default="startup", help="of the files in benchmarks/results")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            _write_images(Path(folder) / "images", args.size)
            for name in ("ours, nothing compiled before", "ours, second start"):
                found.setdefault(name, []).append(ours(Path(folder), args.model, args.batch, args.size))
        for peer in args.peers.split(",") if args.peers else ():
            found.setdefault(peer, []).append(theirs(peer, args.model, args.batch, args.size))
    rows = [[name, *(_median(turns, column) for column in COLUMNS)] for name, turns in found.items()]
    title = f"Seconds to the first finished step, {args.model}, batch {args.batch}, {args.size} px, float32"
    note = (
        f"Medians of {args.rounds} turns. Of a first step all memory is new to the process. The rest: parameters "
        "are drawn and placed, images read."
    )
    facts = side_by_side.environment()
    side_by_side.save(args.name, title, [side_by_side.table(["", *COLUMNS], rows), note], {"turns": found}, facts)


def ours(folder: Path, model: str, batch: int, size: int) -> dict[str, float]:
    """Seconds by column, of the command whose compiled programs are kept in `folder`."""
    recipe = {"batch": batch, "accum_steps": 1, "total_steps": 3, "warmup_steps": 1, "progress_every": 1, "pp.crop": size}
    recipe["compilation_cache"] = folder / "programs"
    started = time.perf_counter()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vit_jax.main", f"--workdir={tempfile.mkdtemp(dir=folder)}"),
            f"--config=configs/pretrain.py:{model},{folder / 'images'}",
            *(f"--config.{name}={value}" for name, value in recipe.items()),
        ],
        cwd=side_by_side.REPOSITORY,
        env=os.environ | {"JAX_LOG_COMPILES": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds, steps, ready, said = dict.fromkeys(COLUMNS, 0.0), [], 0.0, []
    for line in process.stdout:
        now = time.perf_counter() - started
        said.append(line)
        if line.startswith("model "):
            seconds["imports, data, model"] = now
        elif seconds["imports, data, model"] and (match := re.search(r"Finished (.*) in ([\d.e-]+) sec", line)):
            ready = now
            column = "compiling or loading" if match[1].startswith("XLA compilation") else "tracing"
            seconds[column] += float(match[2])
        elif re.match(r"step \d+/", line):
            steps.append(now)
            if len(steps) == 1:
                seconds |= {"first step": now - ready, "in all": now}
            if len(steps) == 3:
                break
    process.kill()
    process.wait()
    if len(steps) < 3:
        raise side_by_side.Failed("".join(said[-20:]))
    seconds["the rest"] = seconds["in all"] - sum(seconds[column] for column in COLUMNS[:4])
    return seconds | {"later step": (steps[2] - steps[0]) / 2}


def theirs(peer: str, model: str, batch: int, size: int) -> dict[str, float]:
    """Seconds until a worker of `benchmarks.peers` has taken a step, and of a later one."""
    started = time.perf_counter()
    work = {"mode": "train", "model": model, "batch": batch, "size": size, "dtype": "float32"}
    worker = Worker("benchmarks.peers", work | peers.job(peer))
    worker.seconds(1)
    in_all = time.perf_counter() - started
    later = worker.seconds(2)
    worker.close()
    return {"in all": in_all, "later step": later}


def _median(turns: list[dict[str, float]], column: str) -> str:
    return f"{statistics.median(turn[column] for turn in turns):.1f}" if column in turns[0] else ""


def _write_images(folder: Path, size: int) -> None:
    rng = np.random.default_rng(0)
    for split, label in ((split, label) for split in ("train", "test") for label in "ab"):
        (folder / split / label).mkdir(parents=True)
        for i in range(16 if split == "train" else 4):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / split / label / f"{i}.jpg")


if __name__ == "__main__":
    main()
