"""A source whose images are files, each with something that was read at the start."""

import os
from collections.abc import Sequence
from pathlib import Path

from vit_jax.data.features import Source, digest
from vit_jax.data.listing import is_file, shown
from vit_jax.errors import UserError


class ImageFiles(Source):
    """Examples by the files of their images, which are photos: upright as their EXIF tag says."""

    exif_rotated = True

    def __init__(self, images: Sequence[Path]):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def where(self, index: int) -> str:
        return shown(self._images[index])

    def path(self, index: int) -> str:
        return os.fspath(self._images[index])

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"names": digest(path.name for path in self._images)}


def check_image(path: Path, where: str, entry: str) -> None:
    """Raises UserError for an image that is not there, which an `entry`, such as an annotation, at `where` names."""
    if not is_file(path):
        raise UserError(f"{where}: its image {shown(path)} does not exist: add it, or remove the {entry}")
