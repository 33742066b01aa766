"""Byte-pair encoding as CLIP and GPT-2 have it: bytes as letters, and models of `tokenizers` from the files of both."""

import functools
import gzip
from pathlib import Path

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from vit_jax.errors import UserError

_CLIP_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
_MOST_BYTES = 1 << 24
"""OpenAI's own has 3 million."""
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
"""Bytes that stand for themselves in byte-pair encoding."""


def openai_vocabulary(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Words and merges from the file of OpenAI's release, which holds the merges alone."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
        data = f.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise UserError(f"{path} holds more than {_MOST_BYTES:,} bytes: that is no vocabulary of CLIP")
    lines = data.decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49_152 - 256 - 2 + 1] if line]
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), CLIP_START, CLIP_END]
    return {word: i for i, word in enumerate(words)}, merges


def byte_letters() -> list[str]:
    """The letter that stands for each byte, printable bytes first, as GPT-2 numbers them."""
    return [chr(b) for b in _PRINTABLE] + [chr(256 + i) for i in range(256 - len(_PRINTABLE))]


@functools.cache
def _letter_bytes() -> dict[str, int]:
    """The byte that each letter stands for."""
    others = [b for b in range(256) if b not in _PRINTABLE]
    return {letter: b for letter, b in zip(byte_letters(), [*_PRINTABLE, *others], strict=True)}


def from_letters(letters: str) -> str:
    """The text whose bytes these letters stand for; others are spaces."""
    return bytes(_letter_bytes().get(letter, 32) for letter in letters).decode(errors="replace")


def read_json(path: Path) -> tokenizers.Tokenizer:
    """A `tokenizer.json` of Hugging Face, which neither pads nor cuts."""
    model = tokenizers.Tokenizer.from_file(str(path))
    model.no_padding()
    model.no_truncation()
    return model


def size(model: tokenizers.Tokenizer) -> int:
    """How many rows an embedding needs for its tokens, whose numbers may have holes."""
    return max(model.get_vocab(with_added_tokens=True).values()) + 1


def clip_model(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's encoding from its words and merges."""
    pieces = models.BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=CLIP_END)
    model = tokenizers.Tokenizer(pieces)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    model.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_CLIP_WORD), "removed", invert=True)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.add_special_tokens([CLIP_START, CLIP_END])
    return model
