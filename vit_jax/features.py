"""Writes the features of images to a file: one vector an image, or a grid of them.

python -m vit_jax.features --model=hf://facebook/dinov2-base --out=features.npz photos/
python -m vit_jax.features --model=runs/photos --out=features.safetensors --kind=both --size=224 a.jpg b.jpg
"""

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float
from safetensors.numpy import save as to_safetensors
from tqdm import tqdm

from vit_jax import arguments, checkpoint, models
from vit_jax.data.device import augment
from vit_jax.data.host.decode import decode
from vit_jax.data.host.view import eval_image
from vit_jax.data.listing import find_images, shown
from vit_jax.errors import UserError, command
from vit_jax.files import read_regular, write_atomically
from vit_jax.run import runtime, workdir

KINDS = {"cls": ("cls",), "patches": ("patches",), "both": ("cls", "patches")}
SUFFIXES = (".npz", ".safetensors")


@dataclass(frozen=True)
class Extractor:
    """A model without its head, ready to use.

    `image_size` is (h, w); mean and std are of the 0..255 pixels, by channel; `preprocessing` are keywords of
    `data.host.view.eval_image`.
    """

    model: nn.Module
    params: dict[str, Any]
    image_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    has_cls: bool
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def _run(self) -> Callable:
        def run(params, images, kind):
            outputs = image_features(self.model, params, augment.normalize(images, self.mean, self.std))
            return {name: outputs[name] for name in KINDS[kind]}

        return jax.jit(run, static_argnums=2)

    def __call__(
        self, images: Sequence[np.ndarray], *, kind: str = "cls", batch_size: int = 8
    ) -> dict[str, Float[np.ndarray, "b ..."]]:
        """What `image_features` makes of decoded uint8 images (h w 3) of any sizes, without what `kind` leaves out.

        Batches are padded, so that one size compiles.
        """
        outputs = []
        for i in range(0, len(images), batch_size):
            batch = [eval_image(image, crop=self.image_size, **self.preprocessing) for image in images[i : i + batch_size]]
            padding = [np.zeros_like(batch[0])] * (batch_size - len(batch))
            result = jax.device_get(self._run(self.params, np.stack(batch + padding), kind))
            outputs.append({name: x[: len(batch)] for name, x in result.items()})
        return {name: np.concatenate([part[name] for part in outputs]) for name in KINDS[kind]}


def image_features(model: nn.Module, params: Any, images: Float[Array, "b H W c"]) -> dict[str, Float[Array, "b ..."]]:
    """Features of normalised images, in float32, after the last LayerNorm.

    That norm is the encoder's: a model with `fc_norm` has none there, and its tokens come as the last block leaves them.

    Returns:
      cls: (b, d), the class token, or the mean of the patches for a model that has none;
      patches: (b, h, w, d), without class, distillation and register tokens. DINOv2's classification feature is cls
        and the mean of these, side by side.
    """
    outputs = model.apply({"params": params}, images, train=False, method="features")
    patches = outputs["map"].astype(jnp.float32)
    cls = patches.mean(axis=(1, 2)) if outputs["cls"] is None else outputs["cls"].astype(jnp.float32)
    return {"cls": cls, "patches": patches}


def load_extractor(source: str | os.PathLike, *, size: tuple[int, int] | None = None) -> Extractor:
    """The model in a workdir, or in anything that `checkpoint.open_checkpoint` reads; a head is left out.

    Args:
      size: (h, w) of the images, if not the file's own; position embeddings are resampled by the rule of its family.

    Raises:
      UserError: for a size that is no whole number of patches, or that this model cannot have.
    """
    opened = checkpoint.open_checkpoint(workdir.find_npz(source))
    description = opened.description
    fields = {**description.model, "num_classes": None}
    if "representation_size" in fields:
        fields["representation_size"] = None
    architecture = models.architecture_of(description.model_type)
    model = architecture.build(fields)
    if size is None and description.image_size is None:
        raise UserError(f"{source} does not tell the size of its images: give --size=H,W in pixels")
    if size is not None and (patch := architecture.cut(fields)):
        _check_whole_patches(size, patch)
    image_size = tuple(size or description.image_size)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_size, 3)))["params"]
    params = checkpoint.load_pretrained(
        pretrained_path=opened,
        init_params=jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes),  # takes no memory
        model_config=fields,
        grid=architecture.grid(fields, image_size),
    )
    how = dict(description.preprocessing)
    if how.get("resize_to"):  # the same part of the image, at any size
        how["resize_to"] = round(how["resize_to"] * min(image_size) / min(description.image_size))
    mean, std, has_cls = description.mean, description.std, "cls" in params
    return Extractor(model, jax.tree.map(jnp.asarray, params), image_size, mean, std, has_cls, how)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `names` (in .safetensors JSON in the metadata) and what `--kind` asks for; returns 1 if an image was left out."""
    parser = arguments.parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, or folders of them")
    parser.add_argument("--model", required=True, metavar="SOURCE", help="a workdir, file, folder, gs://, https:// or hf://")
    parser.add_argument("--out", required=True, metavar="FILE", help=f"what to write: {' or '.join(SUFFIXES)}")
    parser.add_argument("--kind", choices=KINDS, default="cls", help="one vector an image (default), a grid of them, or both")
    parser.add_argument("--size", metavar="H[,W]", help="pixels to resize to (default: what the model is made for)")
    parser.add_argument("--batch", type=int, default=8, help="images computed at a time (default 8)")
    args = parser.parse_args(argv)
    out, size = _writable(args.out), args.size and _size(args.size)
    if args.batch < 1:
        raise UserError(f"--batch={args.batch} must be at least 1")
    runtime.set_up()
    paths = list(find_images(args.images))
    extractor = load_extractor(args.model, size=size)
    read, outputs = _extract(extractor, paths, args.kind, min(args.batch, len(paths)))
    failures = len(paths) - len(read)
    if failures:
        print(f"{failures} of {len(paths)} images could not be read and are left out", file=sys.stderr)
    if read:
        _write(out, [str(path) for path in read], outputs)
        arrays = ", ".join(f"{name} {'x'.join(map(str, x.shape))}" for name, x in outputs.items())
        note = "" if extractor.has_cls or "cls" not in outputs else " (cls is the mean of the patches: no class token)"
        print(f"wrote {out}: {arrays}{note}")
    return 1 if failures else 0


def _extract(
    extractor: Extractor, paths: Sequence[Path], kind: str, batch_size: int
) -> tuple[list[Path], dict[str, np.ndarray]]:
    """The images that could be read, and their features; the others are named on stderr."""
    read: list[Path] = []
    outputs: dict[str, np.ndarray] = {}
    with tqdm(total=len(paths), unit="image", disable=None) as bar:
        decoded = _decoded(paths, batch_size, bar)
        while batch := list(itertools.islice(decoded, batch_size)):
            for name, x in extractor([image for _, image in batch], kind=kind, batch_size=batch_size).items():
                if name not in outputs:
                    outputs[name] = np.empty((len(paths), *x.shape[1:]), np.float32)
                outputs[name][len(read) : len(read) + len(x)] = x
            read += [path for path, _ in batch]
    return read, {name: x[: len(read)] for name, x in outputs.items()}


def _decoded(paths: Sequence[Path], ahead: int, bar: tqdm) -> Iterator[tuple[Path, np.ndarray]]:
    """Images that can be decoded, in order, on several threads, `ahead` at a time."""

    def read(path: Path) -> np.ndarray | str:
        try:
            return decode(read_regular(path), exif_rotated=True)
        except (UserError, OSError) as e:
            return str(e)

    with ThreadPoolExecutor(min(ahead, os.cpu_count() or 1)) as pool:
        for i in range(0, len(paths), ahead):
            part = paths[i : i + ahead]
            for path, image in zip(part, pool.map(read, part), strict=True):
                bar.update()
                if isinstance(image, str):
                    tqdm.write(f"error: {shown(path)}: {image}", file=sys.stderr)
                else:
                    yield path, image


def _write(out: Path, names: list[str], arrays: dict[str, np.ndarray]) -> None:
    if out.suffix == ".npz":
        write_atomically(out, lambda f: np.savez(f, names=np.array(names), **arrays))
    else:
        blob = to_safetensors(arrays, metadata={"names": json.dumps(names)})
        write_atomically(out, lambda f: f.write(blob))


def _writable(out: str) -> Path:
    """The path to write, checked before any work; its folder is made."""
    path = Path(out).expanduser()
    if path.suffix not in SUFFIXES:
        raise UserError(f"--out={out} must end with {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"--out={out} is a folder: name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out={out}: its folder cannot be made: {e}") from e
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--out={out}: nothing can be written in {path.parent}")
    return path


def _size(text: str) -> tuple[int, int]:
    numbers = text.split(",")
    if len(numbers) > 2 or not all(number.strip().isdecimal() and int(number) for number in numbers):
        raise UserError(f"--size={text} must be a side in pixels, such as 224, or height and width, such as 224,448")
    return int(numbers[0]), int(numbers[-1])


def _check_whole_patches(size: tuple[int, int], patch: tuple[int, int]) -> None:
    if any(length % p for length, p in zip(size, patch, strict=True)):
        near = ",".join(str(max(1, round(length / p)) * p) for length, p in zip(size, patch, strict=True))
        sizes = "x".join(map(str, size)), "x".join(map(str, patch))
        raise UserError(f"images of {sizes[0]} px are no whole number of patches of {sizes[1]} px: use --size={near}")


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
