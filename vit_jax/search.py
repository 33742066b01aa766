"""Finds the photos of a folder that a sentence describes, or that look like another image.

python -m vit_jax.search --model=runs/words photos/ "a red bicycle in snow"
python -m vit_jax.search --model=runs/words photos/ cat.jpg --top=20 --out=sheet.png

The model is one of images and texts. The embeddings of the photos are kept in a hidden file in their folder, one for each
model, so that only new and changed photos are computed the next time.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float
from PIL import Image, ImageOps
from tqdm import tqdm

from vit_jax import arguments, pictures, predictor
from vit_jax.checkpoint import pixels
from vit_jax.data import embedding_index
from vit_jax.data.embedding_index import Index
from vit_jax.data.host.decode import decode
from vit_jax.data.listing import IMAGE_SUFFIXES, find_images, shown
from vit_jax.errors import UserError, command, printable
from vit_jax.files import json_text, read_regular
from vit_jax.predictor import Predictor
from vit_jax.run import runtime

Found = list[tuple[str, float]]
"""Names of photos relative to the folder, and their scores, the best first."""
SIDE, COLUMNS = 200, 5
"""Of a sheet: the side of a photo in pixels, and photos in a row."""
_NAMED = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the photos with their scores, the cosine of the angle between the embeddings of both."""
    parser = arguments.parser(__doc__)
    parser.add_argument("folder", help="the photos, in it and in the folders below it")
    parser.add_argument("query", nargs="+", help="a sentence, or an image file")
    arguments.add_shared(parser, "--model")
    parser.add_argument("--top", type=int, default=10, help="how many photos to show (default 10)")
    parser.add_argument("--out", metavar="FILE", help="draw a sheet of what is found, such as sheet.png")
    arguments.add_shared(parser, "--json", "--batch", "--vocab")
    pixels.add_pixel_arguments(parser)
    args = parser.parse_args(argv)
    folder, out = Path(args.folder).expanduser(), args.out and arguments.output_file(args.out, (".png",))
    if args.top < 1 or args.batch < 1:
        raise UserError(f"--top={args.top} and --batch={args.batch} must be at least 1")
    if not folder.is_dir():
        raise UserError(f"{shown(folder)} is no folder: name the folder of the photos first, then what to look for")
    runtime.set_up()
    loaded = predictor.load(args.model, batch_size=args.batch, vocab=args.vocab, **pixels.pixel_options(args))
    query = " ".join(args.query)
    z = embed_query(loaded, query)
    found = open_index(loaded, folder).nearest(z, args.top)
    for name, score in found:
        path = folder / name
        row = json_text({"image": str(path), "score": score}, encoding=sys.stdout.encoding)
        print(row if args.json else f"{score:6.3f}  {shown(path)}", flush=True)
    if out:
        pictures.write(draw(folder, found, query), out)
        print(f"wrote {shown(out)}", file=sys.stderr)
    return 0


def embed_query(loaded: Predictor, query: str) -> Float[np.ndarray, " d"]:
    """The embedding of the image file that a query names, or else of its words."""
    path = Path(query).expanduser()
    if os.path.isfile(path):
        try:
            return loaded.embed_images([decode(read_regular(path), exif_rotated=True)])[0]
        except (UserError, OSError) as e:
            raise UserError(f"{shown(path)}: {e}") from e
    if query.lower().endswith(IMAGE_SUFFIXES):
        raise UserError(f"no such image: {shown(path)}")
    return loaded.embed_texts([query])[0]


def open_index(loaded: Predictor, folder: Path) -> Index:
    """The index of all photos in and below a folder, as they are now; what happens to it is said on stderr.

    Raises UserError for a folder without photos that can be read.
    """
    names = [os.path.relpath(path, folder) for path in find_images([os.fspath(folder)])]
    model = model_key(loaded)
    path = folder / f".vit_jax_index_{model[:8]}.npz"
    try:
        known = embedding_index.load(path, model=model)
    except UserError as e:
        print(f"{e}: it is made anew", file=sys.stderr)
        known = None
    with tqdm(total=len(names), unit="photo", disable=None) as bar:
        keep = functools.partial(_keep, path, model)
        index, changes = embedding_index.update(
            known, folder, names, loaded.embed_images, batch=loaded.batch_size, keep=keep, step=bar.update
        )
    for name, why in list(changes.unreadable.items())[:_NAMED]:
        print(f"error: {shown(folder / name)}: {printable(why)}", file=sys.stderr)
    if bad := len(changes.unreadable):
        more = f", {bad - _NAMED:,} of them not named here" if bad > _NAMED else ""
        print(f"{bad:,} of {len(names):,} photos cannot be read and are left out{more}", file=sys.stderr)
    if index is None:
        raise UserError(f"{shown(folder)} holds no photo that can be read")
    if changes.embedded or changes.gone:
        print(f"index: {changes.embedded:,} photos are new, {changes.gone:,} are gone, {len(index):,} in all", file=sys.stderr)
    return index


def model_key(loaded: Predictor) -> str:
    """Hexadecimal digits that tell one embedding of images from another: the image tower, and what photos go through first."""
    about, digits = loaded.description, hashlib.blake2b(digest_size=16)
    fields = (about.model, about.image_size, about.mean, about.std, sorted(about.preprocessing.items()))
    digits.update(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, x in sorted(flatten_dict(jax.device_get(loaded.params.get("img", loaded.params)), sep="/").items()):
        digits.update(f"{name} {x.dtype} {x.shape}".encode())
        digits.update(np.ascontiguousarray(x).data)
    return digits.hexdigest()


def draw(folder: Path, found: Found, query: str) -> Image.Image:
    """A sheet of the photos, each with its score and name."""
    cells = []
    for name, score in found:
        photo = Image.fromarray(decode(read_regular(folder / name), exif_rotated=True))
        small = ImageOps.contain(photo, (SIDE, SIDE), Image.Resampling.LANCZOS)
        cells.append((f"{score:.3f} {printable(os.path.basename(name))}", ImageOps.pad(small, (SIDE, SIDE), color="white")))
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    return pictures.sheet(rows, printable(query))


def _keep(path: Path, model: str, index: Index) -> None:
    """Writes an index where that is possible; a folder that cannot be written is searched all the same."""
    try:
        embedding_index.save(index, path, model=model)
    except OSError as e:
        print(
            f"{shown(path)} cannot be written, so that the next search computes all again: {e.strerror or e}", file=sys.stderr
        )


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
