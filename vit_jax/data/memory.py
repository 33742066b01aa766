"""A dataset's images, decoded once and kept: a small one's in memory, a large one's in a file that is mapped into memory."""

import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
from jaxtyping import UInt8

from vit_jax.data import features
from vit_jax.data.features import Boxes, Segmentation, Source
from vit_jax.data.host.decode import ImageError, decode, header_size
from vit_jax.data.host.resize import cover, resize
from vit_jax.data.listing import shown
from vit_jax.data.pixel_file import PixelFile
from vit_jax.errors import UserError

SAMPLE = 64
"""So many images, evenly spaced, tell how large a dataset is."""
COMPARED = 8
"""So many images of a file, evenly spaced, tell whether it is still that of the source."""

log = logging.getLogger("vit_jax")


def kept(source: Source, *, cache_gb: float, cache_dir: str = "", cache_side: int = 0) -> Source:
    """The source, with images that stay decoded.

    With `cache_dir` they are kept in a file in this folder, see `OnDisk`. Without it they are kept in memory, if all of them
    take at most `cache_gb` GB. This depends on the sizes in the headers alone, never on the machine: what is kept is decoded
    in full, whatever its crops need, so that pixels follow from the config. Sources of arrays stay as they are.
    Raises UserError for a folder that cannot be used.
    """
    if not cache_dir and not cache_gb:
        return source
    needed = _decoded_bytes(source, cache_side)
    if needed is None:
        return source
    if cache_dir:
        return OnDisk(source, Path(cache_dir).expanduser(), cache_side, needed)
    if needed > cache_gb * 1e9:
        return source
    log.info("data     %s training images are kept in memory (%.1f GB)", f"{len(source):,}", needed / 1e9)
    return InMemory(source)


class _Kept(Source):
    """What is kept of a source, and the rest of it."""

    def __init__(self, source: Source):
        self.features, self.exif_rotated = source.features, source.exif_rotated
        self.where, self.fingerprint = source.where, source.fingerprint
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def size(self, index: int) -> tuple[int, int]:
        return self._source.size(index)


class InMemory(_Kept):
    """A source whose images are decoded when they are first asked for, and kept. Those that cannot be decoded stay encoded."""

    def __init__(self, source: Source):
        super().__init__(source)
        self._examples: list[dict[str, Any] | None] = [None] * len(source)  # threads that meet here write the same

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._examples[index] is None:
            example = self._source[index]
            try:
                pixels = decode(example["image"], exif_rotated=self.exif_rotated)
            except ImageError:  # the loader's to report: it knows what to do about it
                return example
            self._examples[index] = example | {"image": pixels}
        return self._examples[index]


class OnDisk(_Kept):
    """A source whose examples are written to a file, with decoded images, when they are first asked for.

    With `side` an image whose shorter side is longer is made smaller, to this one. The file lies in a folder whose name
    follows from the source's fingerprint, `side`, and the versions of the decoders, so that other data has another one.
    Some of its images are compared with the source at the start; the size and time of an image's own file always are.
    """

    def __init__(self, source: Source, folder: Path, side: int, needed: float):
        super().__init__(source)
        kinds = [type(feature) for feature in source.features.values()]
        if Segmentation in kinds:
            raise UserError("config.cache_dir keeps images with labels, boxes or sentences, no masks: leave it out")
        if side and Boxes in kinds:
            raise UserError("config.cache_side would make images smaller than their boxes say: leave it out")
        self._side, self._full = side, False
        self._told = threading.Lock()  # taken by the one of the loader's threads that says that the disk is full
        self._like = features.example(source.features)
        about = source.fingerprint() | {"side": side, "simplejpeg": simplejpeg.__version__, "pillow": PIL.__version__}
        self._folder = folder / hashlib.blake2s(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
        try:
            self._file = PixelFile(self._folder, len(source))
            self._check_sample()
            self._check_room(needed)
        except OSError as e:
            raise UserError(f"config.cache_dir={shown(folder)} cannot be used: {e.strerror}: {shown(self._folder)}") from e

    def __getitem__(self, index: int) -> dict[str, Any]:
        if (found := self._file.get(index, lambda: self._stamp(index))) is not None:
            pixels, beside = found
            return {"image": pixels} | self._unpacked(beside)
        example = self._source[index]
        stamp = self._stamp(index)
        try:
            pixels = self._pixels(example)
        except ImageError:  # as above
            return example
        if not self._full:
            try:
                self._file.put(index, pixels, _packed(example), stamp)
            except OSError as e:
                self._full = True
                if self._told.acquire(blocking=False):
                    what = f"{e.strerror}. No more images are kept there, and the others decoded each time"
                    log.warning("%s: %s", shown(self._folder), what)
        return example | {"image": pixels}

    def size(self, index: int) -> tuple[int, int]:
        return _reduced(self._source.size(index), self._side)

    def _check_room(self, needed: float) -> None:
        """Logs what is kept where. UserError if what is missing does not fit on the disk."""
        folder, there = self._folder.parent, len(self._file.written)
        number = f"{len(self):,} training images are kept in {shown(self._folder)}"
        log.info("data     %s (%.3g GB; %s are there)", number, needed / 1e9, f"{there:,}")
        if others := sum(x != self._folder and (x / "pixels").is_file() for x in folder.iterdir()):
            log.info("data     %s holds %d more, of other data or versions: delete what is of no use", shown(folder), others)
        more, free = needed * (1 - there / len(self)), shutil.disk_usage(self._folder).free
        if more > free:
            raise UserError(
                f"config.cache_dir={shown(folder)}: about {more / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free. Name a"
                " folder on a larger disk, or make images smaller, such as by --config.cache_side=256"
            )

    def _pixels(self, example: Mapping[str, Any]) -> UInt8[np.ndarray, "h w 3"]:
        pixels = decode(example["image"], exif_rotated=self.exif_rotated)
        size = _reduced(pixels.shape[:2], self._side)
        return pixels if size == pixels.shape[:2] else resize(pixels, size, interpolation="bicubic", antialias=True)

    def _stamp(self, index: int) -> int:
        """What tells an image's file from another one of its name; 0 where it has none of its own."""
        if not (path := self._source.path(index)):
            return 0
        try:
            status = os.stat(path)
        except OSError:
            return 0
        return (status.st_size << 32 ^ status.st_mtime_ns) % 2**64

    def _unpacked(self, beside: bytes) -> dict[str, Any]:
        """The rest of an example, in the types of the source."""

        def like(known: Any, value: Any) -> Any:
            if isinstance(known, np.ndarray):
                return np.array(value, known.dtype).reshape(-1, *known.shape[1:])
            return tuple(value) if isinstance(known, tuple) else value

        return {name: like(self._like[name], value) for name, value in json.loads(beside).items()}

    def _check_sample(self) -> None:
        """Begins a new file if some of its images are others than those of the source, whose fingerprint does not tell all."""
        written = self._file.written
        for index in written[np.linspace(0, len(written) - 1, min(COMPARED, len(written)), dtype=int)].tolist():
            found = self._file.get(index, lambda index=index: self._stamp(index))
            if found is None:
                continue
            try:
                example = self._source[index]
                same = np.array_equal(found[0], self._pixels(example)) and found[1] == _packed(example)
            except UserError:
                same = False
            if not same:
                log.warning("%s holds others than %s: it is written anew", shown(self._folder), self.where(index))
                self._file.open(anew=True)
                return


def _packed(example: Mapping[str, Any]) -> bytes:
    """All of an example but its image."""
    rest = {name: x.tolist() if hasattr(x, "tolist") else x for name, x in example.items() if name != "image"}
    return json.dumps(rest).encode()


def _reduced(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(h, w) with a shorter side of at most `side`, if it is not 0."""
    return cover(size, (side, side)) if 0 < side < min(size) else size


def _decoded_bytes(source: Source, side: int) -> float | None:
    """About what all images take as uint8, None if they are arrays or none of the sample can be read."""
    sizes = []
    for index in np.linspace(0, len(source) - 1, min(SAMPLE, len(source)), dtype=int):
        try:
            image = source[int(index)]["image"]
            if isinstance(image, np.ndarray):
                return None
            h, w = _reduced(header_size(image), side)
        except UserError:  # training meets it again, or never
            continue
        sizes.append(3 * h * w)
    return len(source) * float(np.mean(sizes)) if sizes else None
