"""Says what is in images.

python -m vit_jax.predict --model=runs/photos --top=3 new_photo.jpg more_photos/
python -m vit_jax.predict --model=hf://google/vit-base-patch16-224 --json cat.jpg
python -m vit_jax.predict --model=runs/words --labels="a cat,a dog" cat.jpg
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vit_jax import arguments, pictures, predictor
from vit_jax.checkpoint import pixels
from vit_jax.data.host import inputs
from vit_jax.data.listing import find_images, shown
from vit_jax.errors import UserError, command
from vit_jax.files import json_text
from vit_jax.run import runtime
from vit_jax.tasks import prompts
from vit_jax.tasks.task import Shown


def main(argv: Sequence[str] | None = None, *, doc: str = __doc__, by_labels: bool = False) -> int:
    """Prints a table, or one JSON object an image; returns 1 if some image could not be read.

    Args:
      doc: explains the command.
      by_labels: --labels must be given.
    """
    args = _parser(doc, by_labels).parse_args(argv)
    if args.templates is not None and args.labels is None:
        raise UserError(f"--templates={args.templates} needs --labels, which are put into them")
    draw = args.draw and arguments.output_folder(args.draw, "--draw")
    labels = None if args.labels is None else prompts.read_labels(args.labels)
    templates = prompts.read_templates("none" if args.templates is None else args.templates)
    if args.batch < 1 or (args.top is not None and args.top < 1):
        raise UserError(f"--top={args.top} and --batch={args.batch} must be at least 1")
    runtime.set_up()
    found = [(argument, list(find_images([argument]))) for argument in args.images]
    paths = [path for _, images in found for path in images]
    size = args.size and predictor.parse_size(args.size)
    how = {"model_name": args.model_name, "vocab": args.vocab, "tome": args.tome, **pixels.pixel_options(args)}
    loaded = predictor.load(args.model, size=size, batch_size=min(args.batch, len(paths)), **how)
    if labels is not None:
        loaded = loaded.with_labels(labels, templates=templates)
    given = {"top": args.top, "threshold": args.threshold}
    show = loaded.show({name: value for name, value in given.items() if value is not None})
    class_names = loaded.description.class_names
    truth, answers = {}, {}
    if args.errors:
        from vit_jax import report  # with all that training needs

        truth = report.known_labels(found, loaded.task, class_names)
    width, count = max(len(shown(path)) for path in paths), 0
    for path, image, outputs in _predicted(loaded, paths):
        prediction = show(outputs, image.shape[:2])
        _print(path, prediction.json if args.json else prediction.text, width=width)
        if draw:
            _draw(draw, f"{count}_{path.stem}", image, prediction)
        if truth:
            answers[path] = outputs["probabilities"]
        count += 1
    if answers:
        about = {"model": args.model, "images": " ".join(map(shown, args.images))}
        written = report.of_predictions(answers, truth, class_names, Path(args.errors).expanduser(), about)
        print(f"wrote {shown(written)}", file=sys.stderr)
    if failures := len(paths) - count:
        print(f"{failures} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if failures else 0


def _parser(doc: str, by_labels: bool) -> argparse.ArgumentParser:
    parser = arguments.parser(doc)
    arguments.add_shared(parser, "images", "--model")
    parser.add_argument(
        "--labels",
        required=by_labels,
        help="what may be in the images, for a model of images and texts: 'a cat,a dog', a file with one label a line, or "
        f"one of {', '.join(prompts.LABELS)}",
    )
    parser.add_argument(
        "--templates",
        help=f"sentences that each label is put into: {', '.join(prompts.TEMPLATES)} (default none), a file with one a line, "
        f"or a single one such as 'a photo of a {prompts.PLACE}'",
    )
    parser.add_argument("--top", type=int, help="how many answers to show, of a classifier (default 5)")
    if by_labels:
        parser.set_defaults(model_name=None, threshold=None, draw=None, errors=None)
    else:
        arguments.add_shared(parser, "--model_name")
        parser.add_argument("--threshold", type=float, help="the least score that is shown, of a detector (default 0.5)")
        parser.add_argument(
            "--draw", metavar="DIR", help="write pictures with what was found, and masks, of a task that has them"
        )
        parser.add_argument(
            "--errors", metavar="DIR", help="write DIR/report.html: of images in folders called as their classes"
        )
    arguments.add_shared(parser, "--json", "--size", "--batch", "--tome", "--vocab")
    pixels.add_pixel_arguments(parser)
    return parser


def _predicted(
    loaded: predictor.Predictor, paths: Sequence[Path]
) -> Iterator[tuple[Path, UInt8[np.ndarray, "h w 3"], dict[str, np.ndarray]]]:
    """(path, image, outputs) of every image that can be read; the others are named on stderr."""
    count = loaded.batch_size * (len(loaded.task.canvases.sizes) if loaded.task.canvases else 1)  # to fill some of each
    images = inputs.read_files(paths, ahead=count, failed=_complain)
    while batch := list(itertools.islice(images, count)):
        outputs = loaded([image for _, image in batch])
        for row, (path, image) in enumerate(batch):
            yield path, image, {name: x[row] for name, x in outputs.items()}


def _complain(path: Path, why: str) -> None:
    print(f"error: {shown(path)}: {why}", file=sys.stderr)


def _draw(folder: Path, name: str, image: UInt8[np.ndarray, "h w 3"], prediction: Shown) -> None:
    if prediction.draw is None:
        raise UserError("--draw: the task of this model has nothing to draw")
    drawn = {"": prediction.draw(Image.fromarray(image))} | {f"_{end}": x for end, x in prediction.maps.items()}
    for end, picture in drawn.items():
        pictures.write(picture, folder / f"{name}{end}.png")


def _print(path: Path, prediction: dict[str, Any] | list[str], *, width: int) -> None:
    """A JSON object in a line, or the lines of a table of which the first names the image."""
    if isinstance(prediction, dict):
        print(json_text({"image": str(path)} | prediction, encoding=sys.stdout.encoding), flush=True)
        return
    for i, line in enumerate(prediction):
        print(f"{'' if i else shown(path):{width}}  {line}", flush=True)


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
