"""Shows where a Vision Transformer looks: heat maps over photos, as PNG files.

python -m vit_jax.attention --model=runs/photos --out=looks cat.jpg more_photos/
python -m vit_jax.attention --model=hf://google/vit-base-patch16-224 --out=looks --class=tabby --discard=0.9 cat.jpg
python -m vit_jax.attention --model=runs/words --out=looks --labels="a cat,a dog" --class="a cat" cat.jpg
python -m vit_jax.attention --model=hf://google/vit-base-patch16-224 --position=position.png --filters=filters.png

For every photo a sheet: what the model sees, the heads of the last layer as one and apart, attention rollout (arXiv
2005.00928), and how relevant each patch is for a class (arXiv 2103.15679). Colours go from the least of a map to its largest.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vit_jax import arguments, pictures, predictor
from vit_jax.checkpoint import pixels
from vit_jax.data.host.decode import decode
from vit_jax.data.listing import find_images, shown
from vit_jax.errors import UserError, command, printable
from vit_jax.files import read_regular
from vit_jax.models import attention_maps
from vit_jax.run import runtime
from vit_jax.tasks import prompts
from vit_jax.tools import look


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the pictures; returns 1 if some image could not be read."""
    args = _parser().parse_args(argv)
    _check(args)
    runtime.set_up()
    paths = list(find_images(args.images))
    how = {"model_name": args.model_name, "batch_size": 1, "head": None, "vocab": args.vocab, **pixels.pixel_options(args)}
    loaded = predictor.load(args.model, size=args.size and predictor.parse_size(args.size), **how)
    if args.labels is not None:
        templates = prompts.read_templates("none" if args.templates is None else args.templates)
        loaded = loaded.with_labels(prompts.read_labels(args.labels), templates=templates)
    if args.position:
        _write(look.position_picture(look.position_similarity(loaded)), args.position)
    if args.filters:
        _write(look.filters_picture(look.filters(loaded)), args.filters)
    options = {"target": args.target, "fuse": args.heads, "discard": args.discard}
    outs = [args.out / f"{i}_{path.stem}.png" for i, path in enumerate(paths)]
    drawn = [_draw(loaded, path, out, options, layers=args.layers) for path, out in zip(paths, outs, strict=True)]
    if failures := drawn.count(False):
        print(f"{failures} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser(__doc__)
    parser.add_argument("images", **arguments.SHARED["images"] | {"nargs": "*"})
    arguments.add_shared(parser, "--model", "--model_name")
    parser.add_argument("--out", metavar="DIR", help="the folder to write a picture of each image to")
    parser.add_argument("--layers", action="store_true", help="another picture of each image: every head of every layer")
    parser.add_argument(
        "--class", dest="target", metavar="NAME_OR_NUMBER", help="what relevance is for (default: the top answer)"
    )
    parser.add_argument("--labels", help="classes in any words, of a model of images and texts: see predict")
    parser.add_argument("--templates", help="sentences that each label is put into: see predict")
    arguments.add_shared(parser, "--vocab")
    parser.add_argument("--heads", choices=attention_maps.FUSED, default="mean", help="how heads become one (default mean)")
    parser.add_argument("--discard", type=float, default=0.0, help="share of the weights that rollout sets to 0 (default 0)")
    parser.add_argument("--position", metavar="PNG", help="draw how similar the position embeddings are to each other")
    parser.add_argument("--filters", metavar="PNG", help="draw the first principal components of the patch filters")
    arguments.add_shared(parser, "--size")
    pixels.add_pixel_arguments(parser)
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together or cannot be, before any work."""
    if not (args.images or args.position or args.filters):
        raise UserError("there is nothing to draw: name images and --out=DIR, or --position=PNG or --filters=PNG")
    if bool(args.images) != bool(args.out):
        raise UserError("images and --out=DIR go together: the folder is where their pictures are written")
    if args.out:
        args.out = arguments.output_folder(args.out, "--out")
    if not 0 <= args.discard < 1:
        raise UserError(f"--discard={args.discard} must be from 0 to below 1, such as 0.9")
    if args.templates is not None and args.labels is None:
        raise UserError(f"--templates={args.templates} needs --labels, which are put into them")
    for name in ("position", "filters"):
        if path := getattr(args, name):
            setattr(args, name, arguments.output_file(path, (".png",), f"--{name}"))


def _draw(loaded: predictor.Predictor, path: Path, out: Path, options: dict[str, Any], *, layers: bool) -> bool:
    """Writes the pictures of an image; False if it cannot be read, which is said on stderr."""
    try:
        picture = decode(read_regular(path), exif_rotated=True)
    except (UserError, OSError) as e:
        print(f"error: {shown(path)}: {e}", file=sys.stderr)
        return False
    found = {name: x[0] for name, x in loaded.attention_maps([picture], **options).items()}
    _write(look.attention_sheet(loaded, picture, found, printable(path.name)), out)
    if layers:
        _write(look.layers_sheet(loaded, picture, found, printable(path.name)), out.with_stem(f"{out.stem}_layers"))
    return True


def _write(picture: Image.Image, out: Path) -> None:
    pictures.write(picture, out)
    print(f"wrote {shown(out)}, {picture.width} x {picture.height} pixels")


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
