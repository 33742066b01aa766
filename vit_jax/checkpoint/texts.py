"""The tokenizer of a checkpoint that reads texts: what its description names, with the vocabulary beside it."""

import os
from pathlib import Path

from vit_jax.checkpoint.entries import folder_of
from vit_jax.checkpoint.hub import fetch
from vit_jax.checkpoint.opened import Opened
from vit_jax.data.host import text
from vit_jax.data.host.text import Tokenizer
from vit_jax.errors import UserError
from vit_jax.models import zoo


def open_tokenizer(opened: Opened, *, vocab: str | os.PathLike | None = None) -> Tokenizer:
    """What makes tokens (n, max_len), int32, of a list of n texts, as the text tower of `opened` was trained with them.

    Args:
      vocab: the vocabulary's file, or an address that `hub.fetch` knows, where it does not lie beside the checkpoint. Those
        of published LiT models are fetched.

    Raises:
      UserError: for a model without a text tower, a vocabulary that is not there, or one with more tokens than it knows.
    """
    described = dict(opened.description.text)
    if opened.description.model_type != "TwoTowers":
        raise UserError(f"{opened.path} is a {opened.description.model_type}, which reads no texts")
    if not described:
        raise UserError(f"{opened.path} does not tell how texts become tokens: its description has no entry text")
    name, _, max_len = (described.pop(key) for key in ("tokenizer", "vocab", "max_len"))
    tokenizer = text.make(name, find_vocabulary(opened, vocab=vocab), max_len, **described)
    check_vocabulary(tokenizer, opened.description.model["text"].get("vocab_size"))
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, known: int | None, *, reader: str = "the text tower", or_set: str = "") -> None:
    """Raises UserError for a tokenizer with more tokens than are `known` to what reads them; None: to one of no given size.

    `or_set` is the field that makes room for them, of a model that is not trained yet.
    """
    if known is None:
        return
    if tokenizer.vocab_size > known:
        more = f"set {or_set}={tokenizer.vocab_size}, or " if or_set else ""
        raise UserError(
            f"{tokenizer.vocab_path} has {tokenizer.vocab_size:,} tokens, {reader} knows {known:,}: "
            f"{more}give the vocabulary that the model was trained with"
        )
    if tokenizer.fill_token >= known:
        raise UserError(f"texts end in pad_token={tokenizer.fill_token:,}: {reader} knows {known:,} tokens, from 0 on")


def find_vocabulary(opened: Opened, *, vocab: str | os.PathLike | None = None) -> Path:
    """The vocabulary that is named, or lies beside a checkpoint, or is published. Raises UserError if there is none."""
    if vocab is not None:
        return fetch(vocab)
    path, file = opened.path, opened.description.text.get("vocab", "")
    beside = folder_of(path) / file
    if not beside.is_file() and Path(file).stem in zoo.LIT:
        return fetch(f"{zoo.LIT_BUCKET}/{file}")
    if not beside.is_file():
        raise UserError(
            f"{path} needs the vocabulary that it was trained with: put it beside it, as {beside}, or name it (--vocab)"
        )
    return beside
