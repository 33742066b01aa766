"""Images without classes: every one below a folder, however it is sorted, or in tar, Parquet or Arrow files."""

import hashlib
import os
from typing import Any

from vit_jax.data import class_shards, listing, tables
from vit_jax.data.features import Image, Source, digest
from vit_jax.data.splits import hold_out, taken
from vit_jax.errors import UserError

PREFIX = "unlabelled:"


def open_unlabelled(name: str, split: str) -> Source:
    """The images alone of tar, Parquet or Arrow files, see `open_images` of class_shards and tables, or of a folder."""
    path = os.path.expanduser(name)
    return class_shards.open_images(path, split) or tables.open_images(path, split) or UnlabelledSource(name, split)


class UnlabelledSource(Source):
    """All images below a folder; `test` is a tenth of them, or one, by a hash of their names. Links are followed.

    The order is that of the hash. Raises UserError for a folder with fewer than two images.
    """

    exif_rotated = True

    def __init__(self, folder: str, split: str):
        self._root = os.path.expanduser(folder)
        self.features = {"image": Image()}
        if not os.path.isdir(self._root):
            raise UserError(f"dataset {PREFIX}{folder}: no such folder")
        found = listing.list_images(self._root)
        names = sorted(found.images, key=_hash)
        if len(names) < 2:
            report = found.report()
            raise UserError(
                f"{listing.shown(self._root)} holds {len(names)} images, two or more are needed{report and f': {report}'}"
            )
        self._names = taken(hold_out(names), split)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": listing.read_file(os.path.join(self._root, self._names[index]))}

    def where(self, index: int) -> str:
        return listing.shown(os.path.join(self._root, self._names[index]))

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"names": digest(self._names)}


def _hash(name: str) -> bytes:
    return hashlib.blake2s(name.replace(os.sep, "/").encode("utf-8", "surrogateescape"), digest_size=8).digest()
