"""What images and texts go through before a model of both: `get_pp`, `PreprocessImages`, `get_tokenizer`.

The names are those of the reference. It all runs in NumPy: no TensorFlow is needed.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from vit_jax.checkpoint.hub import fetch
from vit_jax.data.host import text
from vit_jax.data.host.text import BertTokenizer, ClipTokenizer, SentencepieceTokenizer
from vit_jax.errors import UserError, unknown

__all__ = ["BertTokenizer", "ClipTokenizer", "PreprocessImages", "SentencepieceTokenizer", "get_pp", "get_tokenizer"]


def get_tokenizer(tokenizer_name: str) -> Callable[..., Callable[[Sequence[str]], Int32[np.ndarray, "b n"]]]:
    """The tokenizer called "bert", "sentencepiece" or "clip", to be called with vocab_path= and max_len=.

    `vocab_path` is a local file, or an address that `hub.fetch` knows, such as gs://vit_models/lit/LiT-B16B.txt.
    """
    if tokenizer_name not in text.TOKENIZERS:
        raise unknown("tokenizer", tokenizer_name, text.TOKENIZERS)

    def make(vocab_path: str | os.PathLike, max_len: int, **options: Any):
        return text.make(tokenizer_name, fetch(vocab_path), max_len, **options)

    return make


@dataclass(frozen=True)
class PreprocessImages:
    """Resizes uint8 images to size x size, bilinearly and rounded down to whole numbers, and maps 0..255 to [-1, 1].

    With `crop` the shorter side becomes `size`, and the middle is cut out.
    """

    size: int
    crop: bool = False

    def __call__(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float32[np.ndarray, "b s s 3"]:
        return np.stack([self.one(image) for image in images])

    def one(self, image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "s s 3"]:
        """A single image."""
        image = np.asarray(image)
        if image.dtype != np.uint8:
            raise UserError(f"an image must be uint8, 0 to 255, not {image.dtype}")
        h, w = image.shape[:2]
        if self.crop:
            ratio = np.float32(self.size) / np.float32(min(h, w))
            h, w = (int(np.round(np.float32(n) * ratio)) for n in (h, w))
            top, left = (h - self.size) // 2, (w - self.size) // 2
            image = _resize(image, (h, w))[top : top + self.size, left : left + self.size]
        else:
            image = _resize(image, (self.size, self.size))
        return -1 + image.astype(np.uint8).astype(np.float32) / 255 * 2


def get_pp(
    *, tokenizer_name: str, vocab_path: str | os.PathLike, max_len: int, size: int, crop: bool = False
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function of an example: its "image" is prepared, its "text" becomes "tokens"; what is not there stays so."""
    tokenizer = get_tokenizer(tokenizer_name)(vocab_path=vocab_path, max_len=max_len)
    prepare = PreprocessImages(size=size, crop=crop)

    def pp(example: Mapping[str, Any]) -> dict[str, Any]:
        example = dict(example)
        if "image" in example:
            example["image"] = prepare.one(example["image"])
        if "text" in example:
            example["tokens"] = tokenizer([example["text"]])[0]
        return example

    return pp


def _resize(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> Float32[np.ndarray, "h2 w2 3"]:
    """Bilinear, with the rounding of TensorFlow's kernel: whole numbers are cut off next, where the last bit counts."""
    (top, bottom, y), (left, right, x) = (_taps(old, new) for old, new in zip(image.shape[:2], size, strict=True))
    rows = []
    for row in (top, bottom):
        first, second = (image[row][:, column].astype(np.float32) for column in (left, right))
        rows.append(first + (second - first) * x[:, None])
    return rows[0] + (rows[1] - rows[0]) * y[:, None, None]


def _taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, Float32[np.ndarray, "n"]]:
    """For each new place the two old ones, and how far it lies between them."""
    places = (np.arange(new, dtype=np.float32) + np.float32(0.5)) * (np.float32(old) / np.float32(new)) - np.float32(0.5)
    below = np.floor(places)
    first, second = np.clip(below, 0, None), np.clip(np.ceil(places), None, old - 1)
    return first.astype(int), second.astype(int), places - below
