"""From texts to tokens of a fixed length, as the text towers were trained with them, and back.

WordPiece equals TensorFlow Text's `BertTokenizer`, which LiT was trained with: it differs from Hugging Face's in rare
characters (ligatures, ß, control characters, words of more than 100 bytes). SentencePiece runs in Google's own library,
byte-pair encoding in Hugging Face's `tokenizers`.
"""

import functools
import logging
import re
import string
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Int32
from tokenizers import models, pre_tokenizers

from vit_jax.data.host import byte_pairs
from vit_jax.errors import UserError, printable, unknown

log = logging.getLogger("vit_jax")

_LONGEST_WORD = 100
"""In bytes of UTF-8: TensorFlow Text takes longer words for unknown ones."""
_REMEMBERED = 100_000
"""Words of which the pieces are kept."""
# What Unicode calls default-ignorable, which folding the case removes: joiners, soft hyphens, variation selectors, fillers.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    "\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_CHINESE = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f\U0002b820-\U0002ceaf"
    "\uf900-\ufaff\U0002f800-\U0002fa1f"
)
"""What BERT takes for characters that are words of their own."""


@dataclass(frozen=True)
class Tokenizer:
    """What all tokenizers have in common: `tokenizer(texts)` are tokens (b, max_len), too long a text is cut.

    Attributes:
      vocab_path: a local file.
      max_len: how many tokens a text becomes.
    """

    vocab_path: Path
    max_len: int
    _state: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _ends: ClassVar[int] = 1  # tokens that end every text

    def __post_init__(self):
        path = Path(self.vocab_path).expanduser()
        object.__setattr__(self, "vocab_path", path)
        if self.max_len < 2:
            raise UserError(f"max_len={self.max_len} leaves no room for words: use at least 2")
        if not path.is_file():
            raise UserError(f"no vocabulary at {path}")
        try:
            self._read(path)
        except UserError:
            raise
        except Exception as e:  # of each library's own kinds
            raise UserError(f"{path} is no vocabulary for {type(self).__name__}: {printable(e)}") from e

    def __call__(self, texts: Sequence[str | bytes]) -> Int32[np.ndarray, "b n"]:
        """The tokens of each text. Raises UserError for what is no text, or no UTF-8."""
        if isinstance(texts, str | bytes):
            raise UserError("a tokenizer takes a list of texts, not a single one")
        result, longer = np.empty((len(texts), self.max_len), np.int32), 0
        room = self.max_len - self._ends
        for row, text in zip(result, texts, strict=True):
            ids = self._tokens(_decoded(text))
            longer += len(ids) > room
            row[:] = self._fit(ids[:room])
        if longer and not self._state.get("said"):
            self._state["said"] = True
            log.warning(
                "text     %d of %d texts are longer than the %d tokens that the model reads: their ends are cut (said once)",
                longer,
                len(texts),
                self.max_len,
            )
        return result

    @property
    def files(self) -> tuple[Path, ...]:
        """What it was read from."""
        path = Path(self.vocab_path)
        return (path, path.with_name("merges.txt")) if path.name == "vocab.json" else (path,)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are: a model needs an embedding for each."""
        return self._state["size"]

    @property
    def start_token(self) -> int | None:
        """What stands in front of every text; None for nothing."""
        return None

    @property
    def stop_token(self) -> int:
        """What the first of ends a text."""
        raise NotImplementedError

    @property
    def fill_token(self) -> int:
        """What follows the end."""
        return self.stop_token

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens, none of which starts or ends it."""
        raise NotImplementedError

    def _read(self, path: Path) -> None:
        """Fills `_state`: "size", and what `_encode` needs."""
        raise NotImplementedError

    def _encode(self, text: str) -> list[int]:
        """The tokens of a text, of any number, with what stands in front."""
        raise NotImplementedError

    def _tokens(self, text: str) -> list[int]:
        """`_encode`. Raises UserError where the vocabulary cannot, such as one that lacks its own token for unknown words."""
        try:
            return self._encode(text)
        except Exception as e:  # of each library's own kinds
            raise UserError(f"{self.vocab_path} makes no tokens of {text[:40]!r}: {printable(e)}") from e

    def _fit(self, ids: list[int]) -> list[int]:
        """Exactly `max_len` tokens, of at most `max_len` less `_ends`."""
        ids = ids + [self.stop_token] * self._ends
        return ids + [self.fill_token] * (self.max_len - len(ids))


@dataclass(frozen=True)
class BertTokenizer(Tokenizer):
    """WordPiece in lower case: [CLS] in front, no [SEP], zeros behind. `vocab_path`: one token a line."""

    _ends: ClassVar[int] = 0

    @property
    def start_token(self) -> int:
        return self._state["cls"]

    @property
    def stop_token(self) -> int:
        return 0  # what fills up

    def decode(self, tokens: Sequence[int]) -> str:
        words = self._state["words"]
        return " ".join(words.get(int(i), "[UNK]") for i in tokens).replace(" ##", "")

    def _read(self, path: Path) -> None:
        words = path.read_text(encoding="utf-8").split("\n")
        words = words[:-1] if words[-1] == "" else words
        vocab = {word.rstrip("\r"): i for i, word in enumerate(words)}
        if "[CLS]" not in vocab:
            raise UserError(f"{path} is no vocabulary of BERT, which has a line [CLS]")
        vocab.setdefault("[UNK]", len(words))  # a row more, as TensorFlow does it
        pieces = models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD)
        self._state.update(cls=vocab["[CLS]"], unknown=vocab["[UNK]"], size=max(vocab.values()) + 1, pieces=pieces, known={})
        self._state["words"] = {i: word for word, i in vocab.items()}

    def _encode(self, text: str) -> list[int]:
        return [self.start_token, *(i for word in _bert_words(text) for i in self._pieces(word))]

    def _pieces(self, word: str) -> list[int]:
        known = self._state["known"]
        if word not in known:
            too_long = len(word.encode()) > _LONGEST_WORD
            ids = [self._state["unknown"]] if too_long else [token.id for token in self._state["pieces"].tokenize(word)]
            if len(known) >= _REMEMBERED:
                return ids
            known[word] = ids
        return known[word]


@dataclass(frozen=True)
class _PaddedTokenizer(Tokenizer):
    """What follows the end of a text is `pad_token`, or the end itself for None."""

    pad_token: int | None = None

    @property
    def fill_token(self) -> int:
        return self.stop_token if self.pad_token is None else self.pad_token


@dataclass(frozen=True)
class SentencepieceTokenizer(_PaddedTokenizer):
    """SentencePiece with a sticky end: the last token is always </s>, or padding.

    `vocab_path`: a `.model`, or a `tokenizer.json` of Hugging Face.

    Attributes:
      lower: whether texts are lower-cased (SigLIP).
      strip_punctuation: whether ASCII punctuation is left out, too, and white space made single (SigLIP, not SigLIP 2).
      pad_token: what follows the end; None takes the end itself, as LiT and SigLIP do (SigLIP 2: 0).
    """

    lower: bool = False
    strip_punctuation: bool = False

    @property
    def stop_token(self) -> int:
        return self._state["eos"]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._state["decode"]([int(i) for i in tokens])

    def _read(self, path: Path) -> None:
        if path.suffix == ".json":
            model = byte_pairs.read_json(path)
            ends = [i for i in (model.token_to_id(name) for name in ("</s>", "<eos>")) if i is not None]
            size = byte_pairs.size(model)
            encode = lambda text: model.encode(text, add_special_tokens=False).ids  # noqa: E731
            decode = model.decode
        else:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            names = [name for name in ("</s>", "<eos>") if model.piece_to_id(name) != model.unk_id()]
            ends, size = [model.piece_to_id(name) for name in names], model.vocab_size()
            encode, decode = model.encode, model.decode
        if not ends:
            raise UserError(f"{path} has no token </s> or <eos> for the end of a text")
        self._state.update(eos=ends[0], size=size, encode=encode, decode=decode)

    def _encode(self, text: str) -> list[int]:
        if self.strip_punctuation:
            text = " ".join(text.translate(_NO_PUNCTUATION).split())
        return self._state["encode"](text.lower() if self.lower else text)


@dataclass(frozen=True)
class ClipTokenizer(_PaddedTokenizer):
    """CLIP's byte-pair encoding in lower case, between <|startoftext|> and <|endoftext|>, which a cut text keeps.

    `vocab_path`: `tokenizer.json`, or `vocab.json` with `merges.txt` beside it, or OpenAI's `bpe_simple_vocab_16e6.txt.gz`.

    Attributes:
      pad_token: what follows the end; None takes the end itself, as OpenAI's models on Hugging Face do (OpenCLIP: 0).
    """

    @property
    def start_token(self) -> int:
        return self._state["start"]

    @property
    def stop_token(self) -> int:
        return self._state["end"]

    def decode(self, tokens: Sequence[int]) -> str:
        letters = "".join(self._state["model"].id_to_token(int(i)) or "" for i in tokens)
        return byte_pairs.from_letters(letters.replace("</w>", " ")).strip()

    def _read(self, path: Path) -> None:
        if path.name.endswith((".txt", ".gz")):
            model = byte_pairs.clip_model(*byte_pairs.openai_vocabulary(path))
        elif path.name == "vocab.json":
            model = byte_pairs.clip_model(*models.BPE.read_file(str(path), str(path.with_name("merges.txt"))))
        else:
            model = byte_pairs.read_json(path)
        start, end = (model.token_to_id(name) for name in (byte_pairs.CLIP_START, byte_pairs.CLIP_END))
        if start is None or end is None:
            raise UserError(f"{path} is no vocabulary of CLIP: it lacks {byte_pairs.CLIP_START} or {byte_pairs.CLIP_END}")
        self._state.update(start=start, end=end, size=byte_pairs.size(model), model=model)

    def _encode(self, text: str) -> list[int]:
        return [self._state["start"], *self._state["model"].encode(text.strip(), add_special_tokens=False).ids]


@dataclass(frozen=True)
class Gpt2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, which keeps upper case, between two <|endoftext|>, which also fill up.

    `vocab_path`: `tokenizer.json`, or `vocab.json` with `merges.txt` beside it.
    """

    @property
    def start_token(self) -> int:
        return self._state["end"]

    @property
    def stop_token(self) -> int:
        return self._state["end"]

    def decode(self, tokens: Sequence[int]) -> str:
        return byte_pairs.from_letters("".join(self._state["model"].id_to_token(int(i)) or "" for i in tokens)).strip()

    def _read(self, path: Path) -> None:
        if path.name == "vocab.json":
            model = tokenizers.Tokenizer(models.BPE(*models.BPE.read_file(str(path), str(path.with_name("merges.txt")))))
            model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            model.add_special_tokens([byte_pairs.CLIP_END])
        else:
            model = byte_pairs.read_json(path)
        end = model.token_to_id(byte_pairs.CLIP_END)
        if end is None:
            raise UserError(f"{path} is no vocabulary of GPT-2: it lacks {byte_pairs.CLIP_END}")
        self._state.update(end=end, size=byte_pairs.size(model), model=model)

    def _encode(self, text: str) -> list[int]:
        return [self.start_token, *self._state["model"].encode(text, add_special_tokens=False).ids]


TOKENIZERS = {"bert": BertTokenizer, "sentencepiece": SentencepieceTokenizer, "clip": ClipTokenizer, "gpt2": Gpt2Tokenizer}


def make(tokenizer_name: str, vocab_path: str | Path, max_len: int, **options: Any) -> Tokenizer:
    """The tokenizer of this name. Raises UserError for another name, or an option that it does not have."""
    if tokenizer_name not in TOKENIZERS:
        raise unknown("tokenizer", tokenizer_name, TOKENIZERS)
    cls = TOKENIZERS[tokenizer_name]
    known = [name for name in cls.__dataclass_fields__ if not name.startswith("_")]
    for name in options:
        if name not in known:
            raise unknown(f"option of the {tokenizer_name} tokenizer", name, known)
    return cls(vocab_path, max_len, **options)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _decoded(text: str | bytes) -> str:
    if isinstance(text, bytes):
        try:
            return text.decode()
        except UnicodeDecodeError as e:
            raise UserError(f"a text is no UTF-8: {text[:40]!r} …") from e
    if not isinstance(text, str):
        raise UserError(f"a text must be a string, not {type(text).__name__}: {text!r}")
    return text.encode(errors="replace").decode()  # a lone surrogate is no character


def _bert_words(text: str) -> list[str]:
    """Lower-cased words, punctuation marks and Chinese characters, without accents."""
    marks, controls, words = _bert_patterns()
    text = text.lower() if text.isascii() else marks.sub("", unicodedata.normalize("NFD", _casefold(text)))
    return words.findall(controls.sub(" ", text))


@functools.cache
def _bert_patterns() -> tuple[re.Pattern, re.Pattern, re.Pattern]:
    """Accents; control characters; words. Unicode knows their characters by category."""
    found: dict[str, list[str]] = {"Mn": [], "C": [], "P": []}
    for char in map(chr, range(sys.maxunicode + 1)):
        category = unicodedata.category(char)
        kind = "C" if category in ("Cc", "Cf") else "P" if category[0] == "P" else category
        if kind in found:
            found[kind].append(re.escape(char))
    marks, controls, punctuation = ("".join(chars) for chars in found.values())
    alone = rf"!-/:-@\[-`{{-~{punctuation}{_CHINESE}"
    return re.compile(f"[{marks}]"), re.compile(f"[{controls}]"), re.compile(rf"[{alone}]|[^ \t\n\r\f{alone}]+")


def _casefold(text: str) -> str:
    """Unicode's NFKC_Casefold."""
    for _ in range(2):
        text = _IGNORABLE.sub("", unicodedata.normalize("NFKC", text).casefold())
    return unicodedata.normalize("NFC", text)
