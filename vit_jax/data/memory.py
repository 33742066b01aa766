"""A small dataset's images, decoded once and kept in memory."""

import logging
from typing import Any

import numpy as np

from vit_jax.data.features import Source
from vit_jax.data.host.decode import ImageError, decode, header_size
from vit_jax.errors import UserError

SAMPLE = 64
"""So many images, evenly spaced, tell how large a dataset is."""

log = logging.getLogger("vit_jax")


def kept_in_memory(source: Source, gigabytes: float) -> Source:
    """The source, with images that stay in memory once they are decoded if all of them take at most so many GB.

    This depends on the sizes in the headers alone, never on the machine: what is kept is decoded in full, whatever its crops
    need, so that pixels follow from the config. Sources of arrays stay as they are.
    """
    needed = _decoded_bytes(source) if gigabytes else None
    if needed is None or needed > gigabytes * 1e9:
        return source
    log.info("data     %s training images are kept in memory (%.1f GB)", f"{len(source):,}", needed / 1e9)
    return InMemory(source)


class InMemory(Source):
    """A source whose images are decoded when they are first asked for, and kept. Those that cannot be decoded stay encoded."""

    def __init__(self, source: Source):
        self.features, self.exif_rotated = source.features, source.exif_rotated
        self.where, self.fingerprint, self.size = source.where, source.fingerprint, source.size
        self._source = source
        self._examples: list[dict[str, Any] | None] = [None] * len(source)  # threads that meet here write the same

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._examples[index] is None:
            example = self._source[index]
            try:
                pixels = decode(example["image"], exif_rotated=self.exif_rotated)
            except ImageError:  # the loader's to report: it knows what to do about it
                return example
            self._examples[index] = example | {"image": pixels}
        return self._examples[index]


def _decoded_bytes(source: Source) -> float | None:
    """About what all images take as uint8, None if they are arrays or none of the sample can be read."""
    sizes = []
    for index in np.linspace(0, len(source) - 1, min(SAMPLE, len(source)), dtype=int):
        try:
            image = source[int(index)]["image"]
            if isinstance(image, np.ndarray):
                return None
            h, w = header_size(image)
        except UserError:  # training meets it again, or never
            continue
        sizes.append(3 * h * w)
    return len(source) * float(np.mean(sizes)) if sizes else None
