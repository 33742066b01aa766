"""Turns a checkpoint of any family into the layout of another library, and checks that it is the same model.

python -m vit_jax.convert runs/photos photos_hf --to=hf
python -m vit_jax.convert hf://timm/vit_base_patch16_224.augreg_in21k B_16.npz --to=npz
"""

import functools
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vit_jax import arguments, checkpoint, models
from vit_jax.checkpoint import pixels
from vit_jax.checkpoint.export import FORMATS
from vit_jax.data.host import patches
from vit_jax.data.host.view import eval_image
from vit_jax.errors import command, listed, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Converts, then reads the written files back and compares both models, and both ways that a photo takes to them."""
    parser = arguments.parser(__doc__)
    arguments.add_shared(parser, "source")
    parser.add_argument("destination", help="a folder, or for npz a file")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the layout to write")
    parser.add_argument("--head", metavar="FILE", help="a segmentation head for the ViT of source, as DINOv2 publishes it")
    pixels.add_pixel_arguments(parser)
    args = parser.parse_args(argv)
    opened = pixels.with_pixels(checkpoint.open_checkpoint(args.source), **pixels.pixel_options(args))
    opened = checkpoint.open_with_head(opened, args.head) if args.head else opened
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
    if args.to in ("dinov2", "dinov3", "mmseg", "segmenter"):
        print("photos      the layout tells nothing of them: whoever reads it decides how they are resized and normalised")
        return 0
    return _check_photo(opened, again, args.to)


def _check_photo(opened: checkpoint.Opened, again: checkpoint.Opened, to: str) -> int:
    """Compares what both files make of a photo of another size, and says what the other library does otherwise by itself."""
    before, after = opened.description, again.description
    height, width = (round(1.7 * n) + 3 for n in before.image_size)
    size = (height, 2 * width if before.preprocessing.get("max_patches") else width)  # a square tells nothing of kept shapes
    photo = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    fixed = {name: after.preprocessing.get(name, False) for name in ("antialias", "floor_cut")}
    seen = [_pixels(photo, before, **fixed), _pixels(photo, after), _pixels(photo, before)]
    name = "x".join(map(str, size))
    if before.head != after.head or seen[0].shape != seen[1].shape or not np.abs(seen[0] - seen[1]).max() < 1e-4:
        print(f"error: {to} makes something else of a photo of {name} px", file=sys.stderr)
        return 1
    print(f"photos      one of {name} px reaches both models as the same pixels")
    if (difference := float(np.abs(seen[2] - seen[1]).mean())) > 1e-3:
        shrunk = not before.preprocessing.get("antialias")
        why = "photos are shrunk with antialiasing" if shrunk else "the middle is cut out at pixels rounded down"
        print(f"            but in {to} {why}: on noise they differ by {difference:.2g} standard deviations")
    return 0


def _pixels(photo: np.ndarray, description: checkpoint.Description, **changes: bool) -> np.ndarray:
    """What the model sees of a photo."""
    how = {**description.preprocessing, **changes}
    if how.get("max_patches"):
        patch = models.architecture_of(description.model_type).vit_fields(description.model)["patches"]["size"]
        options = {name: how[name] for name in ("interpolation", "antialias", "max_patches", "enlarge") if name in how}
        seen = patches.joined(patches.eval_patches(photo, exif_rotated=False, patch=patch, **options), patch)
    else:
        seen = eval_image(photo, crop=description.image_size, **how)
    return (seen - np.float32(description.mean)) / np.float32(description.std)


def summary(opened: checkpoint.Opened) -> list[str]:
    """A few lines on what is inside a checkpoint."""
    d = opened.description
    model, names = d.model, d.class_names
    count = sum(math.prod(x.shape) for x in opened.flat.values())
    size = "x".join(map(str, d.image_size)) if d.image_size else "unknown"
    grid = "x".join(map(str, d.grid)) if d.grid else "unknown"
    parts = [("model", d.model_type, {k: v for k, v in model.items() if k not in ("image", "text", "text_model", "pp")})]
    if d.model_type == "TwoTowers":
        parts += [("images", "ViT", model["image"]), ("texts", model.get("text_model", "text_transformer"), model["text"])]
    lines = [
        f"source      {opened.path}",
        f"family      {opened.family}",
        *(line for part in parts for line in _told(*part)),
        f"parameters  {count:,}",
        f"image       {size} px, patches {grid}, mean {_short(d.mean)}, std {_short(d.std)} of 255",
    ]
    classes = listed(names)
    if d.preprocessing:
        lines.append(f"photos      {', '.join(f'{name}={value}' for name, value in d.preprocessing.items() if value)}")
    if d.head != "softmax" and names:
        lines.append("head        a sigmoid for each class: probabilities do not sum to 1")
    if d.text:
        told = ", ".join(f"{name}={value}" for name, value in d.text.items() if name not in ("tokenizer", "vocab"))
        lines.append(f"tokens      {d.text['tokenizer']} by {printable(d.text['vocab'])}, {told}")
    nothing = {"TwoTowers": "images are compared with texts", "Captioner": "it writes", "AttendingLSTM": "it writes"}
    without = f"none: {nothing[d.model_type]}" if d.model_type in nothing else "none, features only"
    return [*lines, f"classes     {f'{len(names)}: {classes}' if names else without}"]


def _told(name: str, kind: str, fields: Mapping[str, Any]) -> list[str]:
    """Lines with the fields of a model, or of a tower, that are set."""
    inner = fields.get("transformer", {})
    fields = {k: v for k, v in fields.items() if k not in ("model_name", "transformer", "num_classes")} | dict(inner)
    told = ", ".join(f"{k}={v}" for k, v in fields.items() if v not in (None, False, 0, "softmax", (), []))
    return textwrap.wrap(f"{name:11} {kind}: {told}", 100, subsequent_indent=" " * 12, break_on_hyphens=False)


def compare(a: checkpoint.Opened, b: checkpoint.Opened) -> float:
    """The largest difference of the two on one random image, relative to the largest number: logits, or else features.

    Of two towers it is that of the embeddings of the image and of a random text, of a captioner that of a random sentence.
    """
    rng, d = np.random.default_rng(0), a.description
    inputs: tuple[Any, ...] = (rng.normal(size=(1, *d.native_size, 3)).astype(np.float32),)
    if d.model_type == "TwoTowers":
        text = d.model["text"]
        inputs += (rng.integers(1, text.get("vocab_size", _LEAST), (1, min(text.get("max_len") or _LEAST, _LEAST))),)
    if "vocabulary" in d.model:
        inputs += (rng.integers(0, d.model["vocabulary"], (1, min(d.model.get("max_length", _LEAST), _LEAST))),)
    pairs = zip(*(_outputs(opened, *inputs) for opened in (a, b)), strict=True)
    return float(np.max([np.abs(x - y).max() / max(1e-6, np.abs(x).max()) for x, y in pairs]))


_LEAST = 16  # tokens a text, and in a vocabulary, that every text tower has


def _outputs(opened: checkpoint.Opened, image: np.ndarray, tokens: np.ndarray | None = None) -> list[np.ndarray]:
    """What a model makes of them. Raises UserError for parameters that do not fit it."""
    d = opened.description
    model = models.build(d.model_type, d.model)
    inputs = {"images": image} | ({} if tokens is None else {"tokens": tokens})
    wanted = jax.eval_shape(functools.partial(model.init, **inputs), jax.random.key(0))["params"]
    checkpoint.check_fit(opened.params, wanted, opened.path)
    method = "features" if tokens is None and not d.model.get("num_classes") else "__call__"
    output = jax.jit(functools.partial(model.apply, method=method))({"params": opened.params}, **inputs)
    parts = [output["patches"], output["cls"]] if method == "features" else jax.tree.leaves(output)
    return [np.asarray(part) for part in parts if part is not None]


def _short(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in dict.fromkeys(values))


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
