"""What 8 bits and float16 cost and gain: size, speed on the CPU, and accuracy, of exported ONNX files.

    python -m benchmarks.export [--models=ViT-Ti_16,ViT-S_16] [--batches=1,8] [--rounds=9] [--digits=runs/digits]

Size and speed are those of models of random parameters at 224 px; all files of a model take turns in one process, and a
ratio is that of medians. Accuracy is that of a classifier of digits, on the test images of digits, with scales of
`static` found on training images; without `--digits` it is not measured. Prints tables in Markdown.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from tests.export import models as random
from vit_jax import models, predictor
from vit_jax.data import sources
from vit_jax.export import __main__ as export

KINDS = {
    "float32": [],
    "float16": ["--dtype=float16"],
    "int8 dynamic": ["--int8=dynamic"],
    "int8 static": ["--int8=static"],
    "int8 weights": ["--int8=weights"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ViT-Ti_16,ViT-S_16")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--digits", metavar="SOURCE", help="a classifier of digits")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for name in filter(None, args.models.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            write_model(name, Path(folder))
            write_noise(Path(folder, "photos"))
            files = write_files(folder, Path(folder, "files"), Path(folder, "photos"))
            for batch in map(int, args.batches.split(",")):
                print_speed(name, files, batch, args.rounds, args.threads)
    if args.digits:
        print_accuracy(args.digits)


def write_model(name: str, folder: Path) -> None:
    """A checkpoint of random parameters, all of which matter."""
    kind, fields = models.named(name, num_classes=1000)
    random.write(folder, kind, fields, (224, 224))


def write_noise(folder: Path) -> None:
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (240, 240, 3), np.uint8)).save(folder / f"{i}.png")


def write_files(model: str, folder: Path, photos: Path) -> dict[str, Path]:
    """The ONNX files of a model by kind."""
    files = {kind: folder / f"{kind.replace(' ', '_')}.onnx" for kind in KINDS}
    for kind, options in KINDS.items():
        calibrate = [f"--calibrate={photos}"] if "static" in kind else []
        print(kind, end=": ", flush=True)
        export.main([f"--model={model}", str(files[kind]), "--to=onnx", *options, *calibrate])
    return files


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def print_speed(name: str, files: dict[str, Path], batch: int, rounds: int, threads: int) -> None:
    sessions = {kind: open_session(path, threads) for kind, path in files.items()}
    images = np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)
    seconds = {kind: [] for kind in files}
    for _ in range(rounds + 1):
        for kind, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"image": images})
            seconds[kind].append(time.perf_counter() - start)
    medians = {kind: statistics.median(x[1:]) for kind, x in seconds.items()}
    sizes = {kind: path.stat().st_size for kind, path in files.items()}
    print(f"\n| {name}, batch {batch} | MB | smaller | ms | faster |\n|---|---|---|---|---|")
    for kind in files:
        smaller, faster = sizes["float32"] / sizes[kind], medians["float32"] / medians[kind]
        print(f"| {kind} | {sizes[kind] / 1e6:.1f} | {smaller:.2f}x | {1e3 * medians[kind]:.0f} | {faster:.2f}x |")


def print_accuracy(model: str) -> None:
    """Of a classifier of digits, on the images that its training did not see."""
    loaded = predictor.load(model)
    test, train = (sources.get_source("digits", split) for split in ("test", "train"))
    examples = [(loaded.example(x["image"])["image"], x["label"]) for x in (test[i] for i in range(len(test)))]
    mean, std = np.float32(loaded.description.mean), np.float32(loaded.description.std)
    inputs = (np.stack([image for image, _ in examples]) - mean) / std
    labels = np.array([label for _, label in examples])
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for i in range(128):
            Image.fromarray(np.asarray(train[i]["image"])[..., 0]).convert("RGB").save(photos / f"{i}.png")
        files, logits = write_files(model, Path(folder, "files"), photos), {}
        print(f"\n| {len(labels)} test digits | KB | right | as float32 says | logits differ by |\n|---|---|---|---|---|")
        for kind, path in files.items():
            logits[kind] = open_session(path, 2).run(["logits"], {"image": inputs.astype(np.float32)})[0]
            same = (logits[kind].argmax(1) == logits["float32"].argmax(1)).mean()
            right = (logits[kind].argmax(1) == labels).mean()
            worst = np.abs(logits[kind] - logits["float32"]).max()
            print(f"| {kind} | {path.stat().st_size / 1e3:.0f} | {right:.2%} | {same:.2%} | {worst:.3f} |", flush=True)


if __name__ == "__main__":
    main()
