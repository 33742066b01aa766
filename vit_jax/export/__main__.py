"""Writes a trained model as a file that other programs run: ONNX or StableHLO, and what must be known of it as JSON beside.

python -m vit_jax.export --model=runs/photos photos.onnx --to=onnx
python -m vit_jax.export --model=runs/photos photos.onnx --to=onnx --preprocess --int8
python -m vit_jax.export --model=runs/photos photos.onnx --to=onnx --int8=static --calibrate=photos/
python -m vit_jax.export --model=runs/says says.stablehlo --to=stablehlo
python -m vit_jax.export --model=hf://facebook/dinov2-base dino.stablehlo --to=stablehlo --dtype=float16

The file takes any number of images of the model's size. It is run before it gets its name, and left out if its outputs
are not the model's.
"""

import argparse
from collections.abc import Sequence

from vit_jax import arguments, predictor
from vit_jax.checkpoint import pixels
from vit_jax.errors import command
from vit_jax.export import files, onnx_graph
from vit_jax.export.program import DTYPES
from vit_jax.run import runtime


def main(argv: Sequence[str] | None = None) -> int:
    """Writes OUT and OUT.json."""
    args = _parser().parse_args(argv)
    how = {name: getattr(args, name) for name in ("to", "dtype", "int8", "calibrate")}
    files.check(args.out, **how)
    runtime.set_up()
    size = args.size and predictor.parse_size(args.size)
    options = {"model_name": args.model_name, "tome": args.tome, "vocab": args.vocab, **pixels.pixel_options(args)}
    loaded = predictor.load(args.model, size=size, head=None, **options)
    files.write(loaded, args.out, preprocess=args.preprocess, **how)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser(__doc__)
    parser.add_argument("out", metavar="OUT", help="the file to write, such as photos.onnx or photos.stablehlo")
    arguments.add_shared(parser, "--model", "--model_name", "--size", "--tome", "--vocab")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="onnx or stablehlo")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of kernels and layers (default float32)")
    parser.add_argument(
        "--int8",
        nargs="?",
        const=onnx_graph.FASTEST,
        choices=onnx_graph.QUANTISERS,
        help="kernels of 8 bits in ONNX; without a word dynamic, the fastest on CPUs",
    )
    parser.add_argument("--calibrate", metavar="FOLDER", help="images like those to come, for --int8=static")
    parser.add_argument("--preprocess", action="store_true", help="take uint8 images, and normalise them inside")
    pixels.add_pixel_arguments(parser)
    return parser


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
