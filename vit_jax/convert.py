"""Turns a checkpoint of any family into the layout of another library, and checks that it is the same model.

python -m vit_jax.convert runs/photos photos_hf --to=hf
python -m vit_jax.convert hf://timm/vit_base_patch16_224.augreg_in21k B_16.npz --to=npz
"""

import functools
import math
import sys
from collections.abc import Sequence

import jax
import numpy as np

from vit_jax import arguments, checkpoint, models
from vit_jax.checkpoint.export import FORMATS
from vit_jax.errors import command


def main(argv: Sequence[str] | None = None) -> int:
    """Converts, then reads the written file back and compares both models on a random image."""
    parser = arguments.parser(__doc__)
    parser.add_argument("source", help="a file or folder, or gs://, https://, hf://OWNER/NAME[@REVISION]")
    parser.add_argument("destination", help="a folder, or for npz a file")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the layout to write")
    args = parser.parse_args(argv)
    opened = checkpoint.open_checkpoint(args.source)
    print("\n".join(summary(opened)))
    written = checkpoint.write_checkpoint(opened, args.destination, args.to)
    print(f"wrote       {written}")
    again = checkpoint.open_checkpoint(written)
    if opened.description.image_size is None:
        print("unchecked   the grid of its patches is unknown, so that no image can be run through it")
        return 0
    difference = compare(opened, again)
    print(f"checked     on a random image both models agree to {difference:.1e}")
    if not difference < 1e-4:
        print("error: the written file is another model", file=sys.stderr)
        return 1
    return 0


def summary(opened: checkpoint.Opened) -> list[str]:
    """A few lines on what is inside a checkpoint."""
    d = opened.description
    model, names = d.model, d.class_names
    count = sum(math.prod(x.shape) for x in opened.flat.values())
    size = "x".join(map(str, d.image_size)) if d.image_size else "unknown"
    grid = "x".join(map(str, d.grid)) if d.grid else "unknown"
    fields = {k: v for k, v in model.items() if k not in ("model_name", "transformer", "num_classes")}
    told = {k: v for k, v in (fields | model.get("transformer", {})).items() if v not in (None, False, 0)}
    lines = [
        f"source      {opened.path}",
        f"family      {opened.family}",
        f"model       {d.model_type}: {', '.join(f'{k}={v}' for k, v in told.items())}",
        f"parameters  {count:,}",
        f"image       {size} px, patches {grid}, mean {_short(d.mean)}, std {_short(d.std)} of 255",
    ]
    classes = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return [*lines, f"classes     {f'{len(names)}: {classes}' if names else 'none, features only'}"]


def compare(a: checkpoint.Opened, b: checkpoint.Opened) -> float:
    """The largest difference of the two on one random image, relative to the largest number: logits, or else features."""
    results = []
    for opened in (a, b):
        d = opened.description
        model = models.build(d.model_type, d.model)
        image = np.random.default_rng(0).normal(size=(1, *a.description.image_size, 3)).astype(np.float32)
        wanted = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        checkpoint.check_fit(opened.params, wanted, opened.path)
        method = "__call__" if d.model.get("num_classes") else "features"
        output = jax.jit(functools.partial(model.apply, method=method))({"params": opened.params}, image)
        parts = [output] if method == "__call__" else [output["patches"], output["cls"]]
        results.append(np.concatenate([np.ravel(part) for part in parts if part is not None]))
    return float(np.abs(results[0] - results[1]).max() / max(1e-6, np.abs(results[0]).max()))


def _short(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in dict.fromkeys(values))


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
