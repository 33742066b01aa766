"""What a user hands over as images: paths, bytes, PIL images or arrays; one, or several."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vit_jax.data.host.decode import ImageError, decode, from_pillow
from vit_jax.errors import UserError
from vit_jax.files import read_regular


def read_images(images: Any) -> list[UInt8[np.ndarray, "h w 3"]]:
    """RGB pixels, upright, of one image or of several.

    An image is the path of a file, encoded bytes, a PIL image, or an array of 0..255: (h w), (h w 1), (h w 3) or (h w 4),
    whose alpha is dropped; an array of four axes is several images. Raises UserError for anything else, and for none.
    """
    if is_one(images):
        images = [images]
    if not isinstance(images, Iterable):
        raise UserError(f"{_kind(images)} is no image: give paths, bytes, PIL images or uint8 arrays (h w 3)")
    pixels = [_read(image, i) for i, image in enumerate(images)]
    if not pixels:
        raise UserError("there are no images: the list is empty")
    return pixels


def read_files(
    paths: Sequence[Path], *, ahead: int, failed: Callable[[Path, str], None]
) -> Iterator[tuple[Path, UInt8[np.ndarray, "h w 3"]]]:
    """The images of files that can be read, upright and in order, decoded on several threads `ahead` at a time.

    `failed` is told each other path, and what is wrong with it.
    """

    def read(path: Path) -> np.ndarray | str:
        try:
            return decode(read_regular(path), exif_rotated=True)
        except OSError as e:
            return e.strerror or str(e)
        except UserError as e:
            return str(e)

    with ThreadPoolExecutor(min(ahead, os.cpu_count() or 1)) as pool:
        for i in range(0, len(paths), ahead):
            part = paths[i : i + ahead]
            for path, image in zip(part, pool.map(read, part), strict=True):
                if isinstance(image, str):
                    failed(path, image)
                else:
                    yield path, image


def is_one(images: Any) -> bool:
    """Whether this is one image, not several."""
    return isinstance(images, str | os.PathLike | bytes | Image.Image) or _axes(images) in (2, 3)


def _read(image: Any, index: int) -> UInt8[np.ndarray, "h w 3"]:
    try:
        if isinstance(image, str | os.PathLike):
            return decode(read_regular(Path(image).expanduser()), exif_rotated=True)
        if isinstance(image, bytes):
            return decode(image, exif_rotated=True)
        if isinstance(image, Image.Image):
            return from_pillow(image)
        return _from_array(image)
    except OSError as e:
        raise ImageError(f"image {index}: {image}: {e.strerror or e}") from e
    except UserError as e:
        name = f"{image}: " if isinstance(image, str | os.PathLike) else ""
        raise ImageError(f"image {index}: {name}{e}") from e


def _from_array(image: Any) -> UInt8[np.ndarray, "h w 3"]:
    if _axes(image) is None:
        raise ImageError(f"{_kind(image)} is no image: give a path, bytes, a PIL image or a uint8 array (h w 3)")
    array = np.asarray(image)
    if array.dtype.kind == "f":
        raise ImageError(
            f"an array of {array.dtype} does not tell whether white is 1 or 255: give uint8 of 0..255, "
            "such as (255 * x).round().astype(np.uint8)"
        )
    if array.dtype.kind in "iu" and array.dtype != np.uint8 and array.size and 0 <= array.min() and array.max() <= 255:
        array = array.astype(np.uint8)
    return decode(array[..., :3] if array.shape[2:] == (4,) else array, exif_rotated=False)


def _axes(image: Any) -> int | None:
    """How many axes an array has, None for anything else."""
    return image.ndim if hasattr(image, "ndim") and hasattr(image, "dtype") else None


def _kind(x: Any) -> str:
    return f"a {type(x).__name__}"
