"""Writes a trained model as a file that other programs run: ONNX or StableHLO, and what must be known of it as JSON beside.

python -m vit_jax.export --model=runs/photos photos.onnx --to=onnx
python -m vit_jax.export --model=runs/photos photos.onnx --to=onnx --preprocess --int8=dynamic
python -m vit_jax.export --model=runs/photos photos.onnx --to=onnx --int8=static --calibrate=photos/
python -m vit_jax.export --model=hf://facebook/dinov2-base dino.stablehlo --to=stablehlo --dtype=float16

The file takes any number of images of the model's size. It is run before it gets its name, and left out if its outputs
are not the model's.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vit_jax import arguments, predictor
from vit_jax.checkpoint import pixels
from vit_jax.data.host.decode import decode
from vit_jax.data.listing import find_images, shown
from vit_jax.errors import UserError, command, unknown
from vit_jax.export import onnx_graph, stablehlo
from vit_jax.export.program import DTYPES, Program, difference, random_pixels, reference
from vit_jax.files import json_text, read_regular, write_atomically
from vit_jax.finite import check_outputs
from vit_jax.run import runtime

FORMATS = {"onnx": onnx_graph, "stablehlo": stablehlo}
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "int8": 0.3}
"""How far the largest difference may go, relative to the largest output where that is above 1."""
MOST_CALIBRATED = 128
"""Images that scales are found on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes OUT and OUT.json."""
    args = _parser().parse_args(argv)
    out = _check(args)
    runtime.set_up()
    size = args.size and predictor.parse_size(args.size)
    loaded = predictor.load(args.model, size=size, model_name=args.model_name, head=None, **pixels.pixel_options(args))
    program = Program(loaded, args.dtype, args.preprocess)
    facts = program.facts() | ({"int8": args.int8} if args.int8 else {})
    if args.to == "onnx":
        images = _calibration(program, args.calibrate) if args.calibrate else ()
        data = _onnx(program, args.int8, images, facts)
    else:
        data = stablehlo.to_bytes(program)
    tolerance = TOLERANCES["int8" if args.int8 else args.dtype]

    def write(file: BinaryIO) -> None:
        file.write(data)
        found = _compare(program, lambda x: FORMATS[args.to].run(data, x))
        print(f"largest difference from the model on random images {found:.1e}, allowed are {tolerance:.0e}", flush=True)
        if not found <= tolerance:
            raise UserError(f"{shown(out)} is not written: it computes something else than {loaded.source}")

    write_atomically(out, write)
    beside = out.with_name(f"{out.name}.json")
    write_atomically(beside, lambda file: file.write((json_text(facts, indent=2) + "\n").encode()))
    print(f"wrote {shown(out)}, {len(data) / 1e6:.1f} MB, and {shown(beside)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser(__doc__)
    parser.add_argument("out", metavar="OUT", help="the file to write, such as photos.onnx or photos.stablehlo")
    arguments.add_shared(parser, "--model", "--model_name", "--size")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="onnx or stablehlo")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of kernels and layers (default float32)")
    parser.add_argument(
        "--int8", choices=onnx_graph.QUANTISERS, help="kernels of 8 bits in ONNX: computed in float32 (weights), or in 8 bits"
    )
    parser.add_argument("--calibrate", metavar="FOLDER", help="images like those to come, for --int8=static")
    parser.add_argument("--preprocess", action="store_true", help="take uint8 images, and normalise them inside")
    pixels.add_pixel_arguments(parser)
    return parser


def _check(args: argparse.Namespace) -> Path:
    """The file to be written. UserError for options that do not go together, and for missing libraries, before any work."""
    if args.to not in FORMATS:
        raise unknown("format", args.to, FORMATS)
    out = arguments.output_file(args.out, [f".{args.to}"], "OUT")
    if args.int8 and (args.to != "onnx" or args.dtype != "float32"):
        raise UserError(f"--int8={args.int8} is for --to=onnx and --dtype=float32, of which kernels of 8 bits are made")
    if (args.int8 == "static") != (args.calibrate is not None):
        raise UserError("--int8=static and --calibrate=FOLDER go together: scales of activations are found on its images")
    missing = [name for name in FORMATS[args.to].NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        commands = " && ".join(f"pip install {FORMATS[args.to].NEEDED[name]}" for name in missing)
        raise UserError(f"--to={args.to} needs {', '.join(missing)}: {commands}")
    return out


def _onnx(program: Program, int8: str | None, images: Sequence[np.ndarray], facts: dict[str, Any]) -> bytes:
    model = onnx_graph.convert(program)
    if int8:
        model = onnx_graph.quantise(model, int8, images)
    onnx_graph.add_facts(model, facts)
    return onnx_graph.to_bytes(model)


def _calibration(program: Program, folder: str) -> list[np.ndarray]:
    """Images of a folder, evenly chosen, each as a batch that the program takes."""
    paths = list(find_images([folder]))
    chosen = paths[:: -(-len(paths) // MOST_CALIBRATED)]
    images = [program.predictor.example(decode(read_regular(path), exif_rotated=True))["image"] for path in chosen]
    return [program.inputs(np.clip(np.rint(x), 0, 255).astype(np.uint8)[None]) for x in images]


def _compare(program: Program, run: Callable[[np.ndarray], Any]) -> float:
    """The largest difference of the file's outputs from the model's, for one image and for three."""
    drawn = random_pixels(program.predictor.image_size, 3)
    expected = reference(program.predictor)(drawn)
    check_outputs(expected, program.predictor.source)
    of_one = {name: y[:1] for name, y in expected.items()}
    inputs = program.inputs(drawn)
    return float(max(difference(run(inputs[:1]), of_one), difference(run(inputs), expected)))


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    sys.exit(cli())
