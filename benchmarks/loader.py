"""From JPEGs to random crops on the device: images a second of ours, of Pillow and of the reference's tf.data pipeline.

    python -m benchmarks.loader [--tensorflow=/path/to/python] [--turbojpeg=/path/to/libturbojpeg.so] [--cpu] [--name=…]

The JPEGs are in memory: crops of scikit-learn's photos, 500 x 400 pixels, and 3000 x 2000. `--tensorflow` is an interpreter
with TensorFlow, which is none of our dependencies, `--turbojpeg` version 3 of a library that the system may have, see
`vit_jax/data/host/part.py`. With `--cpu`, for a machine that does other work, too, seconds are those of all CPUs, user and
system; without it the last table is about training steps on JPEGs and on data that is on the device already. Prints the
tables and writes them to benchmarks/results/NAME.md, the data to NAME.json.
"""

import argparse
import io
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import side_by_side

NOTES = {
    "tf.data": "float32",
    "pil": "2 threads, antialiased",
    "ours, parts": "what a crop needs, by libturbojpeg",
    "ours, kept in memory": "as decoded once before",
    "ours, cache_dir": "the same, from a mapped file",
    "ours, no scaled decoding": "as TensorFlow decodes",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensorflow", help="an interpreter that has it")
    parser.add_argument("--turbojpeg", help="the file of libturbojpeg 3")
    parser.add_argument("--cpu", action="store_true", help="count seconds of the CPUs, not of the clock; no training")
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--model", default="ViT-B_16")
    parser.add_argument("--steps", type=int, default=7, help="of training")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3, help="of a turn")
    parser.add_argument("--name", default="loader_cpu", help="of the files in benchmarks/results")
    args = parser.parse_args()
    parts = {"ours, parts": {"variables": {"VIT_JAX_TURBOJPEG": args.turbojpeg}}} if args.turbojpeg else {}
    tf_data = {"tf.data": {"way": "tf.data", "python": args.tensorflow}} if args.tensorflow else {}
    pil = {"pil": {"way": "pil"}}
    tables, data = [], {}
    with tempfile.TemporaryDirectory() as folder:
        small = _write(Path(folder), 500, 400, args.photos)
        large = _write(Path(folder), 3000, 2000, max(1, args.photos // 8))
        kept = {"ours, kept in memory": {"kept": True}, "ours, cache_dir": {"folder": str(Path(folder) / "cache")}}
        loading = {
            "500 x 400": (small, 64, {"ours": {}} | parts | kept | pil | tf_data),
            "3000 x 2000": (large, 16, {"ours": {}, "ours, no scaled decoding": {"scaled": False}} | parts | pil | tf_data),
        }
        for size, (photos, batch, jobs) in loading.items():
            jobs = {
                name: {"way": "ours", "photos": photos, "batch": batch, "cpu": args.cpu} | job for name, job in jobs.items()
            }
            found, failed = side_by_side.alternate("benchmarks.loader_ways", jobs, rounds=args.rounds, seconds=args.seconds)
            tables += [f"JPEGs of {size} pixels, batches of {batch} crops of 224:", _table(found, failed, batch)]
            data[size] = {name: {"images_per_second": batch / m.median, "seconds": m.seconds} for name, m in found.items()}
        if not args.cpu:
            lines, data["training"] = _training(small, args.model, args.steps)
            tables += lines
    tables += [
        "± is half the distance of the outer quartiles of the turns." + ("" if tf_data else " tf.data was not measured.")
    ]
    tables += ["Seconds are those of all CPUs, user and system, as the machine did other work, too."] if args.cpu else []
    side_by_side.save(args.name, "From JPEGs to crops on the device", tables, data, side_by_side.environment())


def _training(photos: str, model: str, turns: int) -> tuple[list[str], dict[str, Any]]:
    """What to print of training steps on JPEGs and on data on the device, and the numbers."""
    job = {"way": "train", "photos": photos, "batch": 8, "model": model}
    jobs = {"JPEGs": job | {"data": "loader"}, "on the device": job | {"data": "device"}}
    steps, failed = side_by_side.alternate("benchmarks.loader_ways", jobs, rounds=turns, seconds=0)
    if failed:
        raise SystemExit(f"training failed: {failed}")
    on_jpegs, on_device = (8 / steps[name].median for name in jobs)
    rows = [[name, f"{8 / m.median:.3f}", f"{m.spread:.1%}"] for name, m in steps.items()]
    told = (
        f"Training {model}, float32, batch 8, on JPEGs of 500 x 400: {on_jpegs / on_device:.1%} of the rate on data that"
        " is on the device:"
    )
    numbers = {name: {"images_per_second": 8 / m.median, "seconds": m.seconds} for name, m in steps.items()}
    return [told, side_by_side.table(["data", "images/s", "±"], rows)], numbers


def _write(folder: Path, width: int, height: int, count: int) -> str:
    """A file with so many JPEGs of quality 90, and its path."""
    from sklearn.datasets import load_sample_images

    photos, rng, jpegs = load_sample_images().images, np.random.default_rng(0), []
    for i in range(count):
        photo = Image.fromarray(photos[i % 2])
        zoom = rng.uniform(0.8, 1) * min(photo.width / width, photo.height / height)
        w, h = zoom * width, zoom * height
        left, top = rng.uniform(0, photo.width - w), rng.uniform(0, photo.height - h)
        file = io.BytesIO()
        part = photo.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        part.save(file, "JPEG", quality=90)
        jpegs.append(file.getvalue())
    path = folder / f"{width}x{height}"
    path.write_bytes(pickle.dumps(jpegs))
    return str(path)


def _table(found: Mapping[str, side_by_side.Measured], failed: Mapping[str, str], batch: int) -> str:
    rows: list[list[Any]] = []
    for name, measured in found.items():
        ratio = measured.median / found["ours"].median
        note = NOTES.get(name, "") + ("" if measured.facts["on_device"] else ", without the transfer: no JAX there")
        rows.append([name, f"{batch / measured.median:,.0f}", f"{measured.spread:.1%}", f"{ratio:.2f}", note])
    rows += [[name, "failed", "", "", why[:100]] for name, why in failed.items()]
    return side_by_side.table(["way", "images/s", "±", "ours / way", ""], rows)


if __name__ == "__main__":
    main()
