"""Tokenizers' files beside other projects' checkpoints: what they say, and which of them go along with a converted model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax.checkpoint.entries import Entries, folder_of, parse_json, read_object
from vit_jax.checkpoint.opened import Opened
from vit_jax.errors import UserError, printable
from vit_jax.files import read_regular, write_atomically, write_json

log = logging.getLogger("vit_jax")

_GEMMA = ("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer", "Siglip2TokenizerFast")
_GEMMA_SIZE = 256_000
_CLIP_END = "<|endoftext|>"
_WORDS = "tokenizer.json", "vocab.json"
_CLASSES = {"clip": "CLIPTokenizer", "siglip": "SiglipTokenizer", "siglip2": "Siglip2Tokenizer", "gpt2": "GPT2Tokenizer"}


def describe(kind: str, folder: Path, text: Mapping[str, Any]) -> dict[str, Any]:
    """`Description.text`: what the files in a folder say, or else what the project does.

    `kind` is "clip", "openclip", "siglip" or "siglip2"; `text` are the fields of the text tower.
    """
    config = read_object(folder / "tokenizer_config.json")
    if kind == "siglip" and (config.get("tokenizer_class") in _GEMMA or text["vocab_size"] >= _GEMMA_SIZE):
        kind = "siglip2"
    if kind == "openclip":
        vocab = _first(folder, *_WORDS, "bpe_simple_vocab_16e6.txt.gz")
        told = {"tokenizer": "clip", "vocab": vocab, "pad_token": 0}
    elif kind == "clip":
        told = {"tokenizer": "clip", "vocab": _first(folder, *_WORDS), "pad_token": _pad_token(folder, config)}
    elif kind == "siglip2":
        vocab = _first(folder, "tokenizer.json", "tokenizer.model")
        told = {"tokenizer": "sentencepiece", "vocab": vocab, "lower": True, "pad_token": 0}
    else:
        lower = config.flag("do_lower_case", True)
        vocab = _first(folder, "spiece.model", "tokenizer.json")
        told = {"tokenizer": "sentencepiece", "vocab": vocab, "lower": lower, "strip_punctuation": True}
    return {name: value for name, value in told.items() if value is not None} | {"max_len": text["max_len"]}


def _first(folder: Path, *names: str) -> str:
    return next((name for name in names if (folder / name).is_file()), names[0])


def _pad_token(folder: Path, config: Entries) -> int | None:
    """The number of CLIP's padding, where tokenizer_config.json names another token than the end of a text."""
    pad = config.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad in (None, _CLIP_END):
        return None
    for words in (_words(folder / name) for name in _WORDS if (folder / name).is_file()):
        if type(words.get(pad)) is int:
            return words[pad]
    raise config.wrong("pad_token", "a token of the vocabulary")


def _words(path: Path) -> Mapping[str, int]:
    """Numbers by token. Raises UserError for a file that holds none."""
    try:
        content = parse_json(path)
        words = content if path.name == "vocab.json" else content["model"]["vocab"]
        return dict(words)
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{path} holds no vocabulary: {printable(e)}") from e


def copy_vocabulary(opened: Opened, folder: Path) -> None:
    """Puts the vocabulary that lies beside an opened checkpoint into a folder under its name."""
    source = folder_of(opened.path)
    vocab = opened.description.text.get("vocab")
    for name in (vocab, "merges.txt") if vocab == "vocab.json" else (vocab,) if vocab else ():
        copy(source / name, folder / name)


def write(opened: Opened, folder: Path, kind: str) -> None:
    """The vocabulary and a tokenizer_config.json, as transformers wants them (`kind` as in `describe`)."""
    text = opened.description.text
    if not text:
        return
    source = folder_of(opened.path)
    if text["tokenizer"] == "sentencepiece" and text["vocab"].endswith(".model"):
        kind, name = ("siglip", "spiece.model") if text.get("strip_punctuation") else ("siglip2", "tokenizer.model")
        copy(source / text["vocab"], folder / name)
    else:
        kind = "siglip2" if text["tokenizer"] == "sentencepiece" else kind
        copy_vocabulary(opened, folder)
    if kind not in _CLASSES:
        return
    config = {"tokenizer_class": _CLASSES[kind], "model_max_length": text["max_len"]}
    if kind == "siglip":
        config |= {"do_lower_case": bool(text.get("lower")), "pad_token": "</s>"}
    elif kind == "siglip2":
        config |= {"do_lower_case": True, "add_eos_token": True, "add_bos_token": False, "padding_side": "right"}
        config |= {"pad_token": "<pad>", "eos_token": "<eos>"}
    elif "pad_token" in text and (source / text["vocab"]).name in _WORDS and (source / text["vocab"]).is_file():
        names = {number: word for word, number in _words(source / text["vocab"]).items()}
        config |= {"pad_token": names.get(text["pad_token"], _CLIP_END)}
    write_json(folder / "tokenizer_config.json", config)


def copy(source: Path, target: Path) -> None:
    """Copies the file of a vocabulary, unless it is there already; one that is missing is a warning."""
    if not source.is_file():
        log.warning("no %s lies beside the checkpoint: texts cannot be read until %s is there", source.name, target)
    elif not (target.exists() and target.samefile(source)):
        content = read_regular(source)
        write_atomically(target, lambda f: f.write(content))
