"""Writes the features of images to a file: one vector an image, or a grid of them; or draws them.

python -m vit_jax.features --model=hf://facebook/dinov2-base --out=features.npz photos/
python -m vit_jax.features --model=runs/photos --out=features.safetensors --kind=both --size=224 a.jpg b.jpg
python -m vit_jax.features --model=hf://facebook/dinov2-base --pca=pictures photos/
"""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save as to_safetensors
from tqdm import tqdm

from vit_jax import arguments, pictures, predictor
from vit_jax.checkpoint import pixels
from vit_jax.data.host import inputs
from vit_jax.data.host.decode import decode
from vit_jax.data.listing import find_images, shown, some
from vit_jax.errors import UserError, command
from vit_jax.files import read_regular, write_atomically
from vit_jax.finite import finite_rows
from vit_jax.run import runtime
from vit_jax.tools import look

SUFFIXES = (".npz", ".safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `names` (in .safetensors JSON in the metadata) and what `--kind` asks for.

    Returns 1 if an image was left out, or its features are not finite.
    """
    parser = arguments.parser(__doc__)
    arguments.add_shared(parser, "images", "--model")
    parser.add_argument("--out", metavar="FILE", help=f"what to write: {' or '.join(SUFFIXES)}")
    parser.add_argument("--pca", metavar="DIR", help="write pictures in which patches of like features have like colours")
    parser.add_argument(
        "--kind", choices=predictor.KINDS, default="cls", help="one vector an image (default), a grid of them, or both"
    )
    arguments.add_shared(parser, "--size", "--batch", "--tome")
    pixels.add_pixel_arguments(parser)
    args = parser.parse_args(argv)
    if not (args.out or args.pca):
        raise UserError("nothing is to be written: give --out=FILE for numbers, or --pca=DIR for pictures")
    out, size = args.out and arguments.output_file(args.out, SUFFIXES), args.size and predictor.parse_size(args.size)
    if args.batch < 1:
        raise UserError(f"--batch={args.batch} must be at least 1")
    runtime.set_up()
    paths = list(find_images(args.images))
    how = {"head": False, "tome": args.tome, "batch_size": min(args.batch, len(paths)), **pixels.pixel_options(args)}
    loaded = predictor.load(args.model, size=size, **how)
    kind = args.kind if args.out else "patches"
    read, outputs = _extract(loaded, paths, "both" if args.pca and kind == "cls" else kind)
    failures = len(paths) - len(read)
    if failures:
        print(f"{failures} of {len(paths)} images could not be read and are left out", file=sys.stderr)
    finite = finite_rows(outputs) if read else np.zeros(0, bool)
    if bad := [shown(path) for path, fine in zip(read, finite, strict=True) if not fine]:
        failures += len(bad)
        print(f"{len(bad)} of {len(read)} images have features that are not finite: {some(bad)}", file=sys.stderr)
    if args.pca and finite.any():
        fine = [path for path, is_fine in zip(read, finite, strict=True) if is_fine]
        _draw(loaded, fine, outputs["patches"][finite], Path(args.pca).expanduser())
    if read and args.out:
        outputs = {name: outputs[name] for name in predictor.KINDS[kind]}
        _write(out, [str(path) for path in read], outputs)
        arrays = ", ".join(f"{name} {'x'.join(map(str, x.shape))}" for name, x in outputs.items())
        has_cls = "cls" in loaded.params.get("img", loaded.params)
        note = "" if has_cls or "cls" not in outputs else " (cls is the mean of the patches: no class token)"
        print(f"wrote {out}: {arrays}{note}")
    return 1 if failures else 0


def _extract(loaded: predictor.Predictor, paths: Sequence[Path], kind: str) -> tuple[list[Path], dict[str, np.ndarray]]:
    """The images that could be read, and their features; the others are named on stderr."""
    read: list[Path] = []
    outputs: dict[str, np.ndarray] = {}

    def failed(path: Path, why: str) -> None:
        bar.update()
        tqdm.write(f"error: {shown(path)}: {why}", file=sys.stderr)

    with tqdm(total=len(paths), unit="image", disable=None) as bar:
        images = inputs.read_files(paths, ahead=loaded.batch_size, failed=failed)
        while batch := list(itertools.islice(images, loaded.batch_size)):
            bar.update(len(batch))
            for name, x in loaded.features([image for _, image in batch], kind=kind).items():
                if name not in outputs:
                    outputs[name] = np.empty((len(paths), *x.shape[1:]), np.float32)
                outputs[name][len(read) : len(read) + len(x)] = x
            read += [path for path, _ in batch]
    return read, {name: x[: len(read)] for name, x in outputs.items()}


def _draw(loaded: predictor.Predictor, paths: Sequence[Path], patches: np.ndarray, folder: Path) -> None:
    """A picture of each image, the colours of which mean the same in all."""
    foreground, colours = look.feature_colours(patches)
    for i, (path, x) in enumerate(zip(paths, colours, strict=True)):
        picture = look.feature_picture(decode(read_regular(path), exif_rotated=True), x, loaded)
        pictures.write(picture, folder / f"{i}_{path.stem}.png")
    print(f"wrote {len(paths)} pictures to {shown(folder)}: {foreground.mean():.0%} of the patches are foreground")


def _write(out: Path, names: list[str], arrays: dict[str, np.ndarray]) -> None:
    if out.suffix.lower() == ".npz":
        write_atomically(out, lambda f: np.savez(f, names=np.array(names), **arrays))
    else:
        blob = to_safetensors(arrays, metadata={"names": json.dumps(names)})
        write_atomically(out, lambda f: f.write(blob))


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
