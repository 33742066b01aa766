"""JSON from strangers, read entry by entry: each has a kind and bounds, and nothing else comes in."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError, printable, unknown
from vit_jax.files import read_regular

_MOST_BYTES = 64 << 20
_DEEPEST = 50
_LARGEST = 10**7
REQUIRED = object()


def folder_of(path: Path) -> Path:
    """The folder that a checkpoint is, or lies in."""
    return path if path.is_dir() else path.parent


def parse_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds. ValueError for what is none or is nested too deep; UserError for a pipe or too large a file."""
    try:
        content = json.loads(read_regular(path, _MOST_BYTES).decode("utf-8-sig"))
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    except RecursionError as e:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep") from e
    level = [content]
    for _ in range(_DEEPEST):
        inside = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list))]
        level = [x for part in inside for x in part]
        if not level:
            return content
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")


def read_object(path: str | os.PathLike) -> "Entries":
    """The JSON object in a file, without an entry if there is no file. Raises UserError for anything else."""
    if not Path(path).is_file():
        return Entries({}, path)
    try:
        content = parse_json(path)
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{path} is no valid JSON: {e}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return Entries(content, path)


class Entries:
    """A JSON object. Every method returns one entry, its default where it is missing or null, or raises UserError.

    The error names the file, the entry, what it says and what is allowed. A missing entry without a default is a KeyError.
    """

    def __init__(self, content: Mapping[str, Any], where: str | os.PathLike, prefix: str = ""):
        self.content, self.where, self.prefix = content, where, prefix

    def __contains__(self, name: str) -> bool:
        return self.content.get(name) is not None

    def get(self, name: str) -> Any:
        """The entry as it stands there, or None."""
        return self.content.get(name)

    def wrong(self, name: str, allowed: str) -> UserError:
        """The error for an entry."""
        said = json.dumps(self.content.get(name), ensure_ascii=False, default=str)
        return UserError(
            f"{self.where} has entries that make no sense: {printable(self.prefix + name)} is {printable(said, 80)}; "
            f"it must be {allowed}"
        )

    def _entry(self, name: str, default: Any) -> tuple[Any, bool]:
        """(the entry or its default, whether it is the default)."""
        if self.content.get(name) is None:
            if default is not REQUIRED:
                return default, True
            if name in self.content:
                raise self.wrong(name, "there")
            raise KeyError(self.prefix + name)
        return self.content[name], False

    def text(self, name: str, default: Any = REQUIRED, allowed: Sequence[str] | None = None) -> Any:
        """A string, one of `allowed`."""
        value, is_default = self._entry(name, default)
        if is_default:
            return value
        if not isinstance(value, str):
            raise self.wrong(name, f"one of {', '.join(allowed)}" if allowed else "a string")
        if allowed is not None and value not in allowed:
            raise UserError(f"{self.where}: {unknown(self.prefix + name, printable(value, 80), allowed)}")
        return value

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        """True or false."""
        value, is_default = self._entry(name, default)
        if not is_default and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def whole(self, name: str, default: Any = REQUIRED, low: int = 1, high: int = _LARGEST) -> Any:
        """A whole number from `low` to `high`."""
        value, is_default = self._entry(name, default)
        if not is_default and not _is_whole(value, low, high):
            raise self.wrong(name, f"a whole number from {low} to {high:,}")
        return value

    def number(self, name: str, default: Any = REQUIRED, low: float = -1e6, high: float = 1e6) -> Any:
        """A finite number from `low` to `high`."""
        value, is_default = self._entry(name, default)
        if not is_default and not _is_number(value, low, high):
            raise self.wrong(name, f"a number from {low:g} to {high:g}")
        return value

    def numbers(self, name: str, default: Any = REQUIRED, low: float = -1e6, high: float = 1e6) -> Any:
        """One number a channel: a list of 1 or 3."""
        value, is_default = self._entry(name, default)
        if is_default:
            return value
        value = [value] if _is_number(value, low, high) else value
        if not isinstance(value, list) or len(value) not in (1, 3) or not all(_is_number(x, low, high) for x in value):
            raise self.wrong(name, f"1 or 3 numbers from {low:g} to {high:g}, one a channel")
        return tuple(value) * (1 if len(value) == 3 else 3)

    def size(self, name: str, default: Any = REQUIRED, high: int = 1 << 15, most: int = 1 << 24) -> Any:
        """(h, w) from a number or a list of two, at most `most` in all."""
        value, is_default = self._entry(name, default)
        if is_default:
            return value
        pair = [value, value] if isinstance(value, int) else value
        if not isinstance(pair, list) or len(pair) != 2 or not all(_is_whole(x, 1, high) for x in pair):
            raise self.wrong(name, f"a whole number or two of them, from 1 to {high:,}")
        if pair[0] * pair[1] > most:
            raise self.wrong(name, f"a height and width that make at most {most:,} in all")
        return tuple(pair)

    def names(self, name: str, default: Any = REQUIRED) -> Any:
        """A list of strings."""
        value, is_default = self._entry(name, default)
        if is_default:
            return value
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise self.wrong(name, "a list of strings")
        return tuple(value)

    def object(self, name: str, default: Any = REQUIRED) -> "Entries":
        """An object inside this one; a default of {} has no entries."""
        value, _ = self._entry(name, default)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object of names and values")
        return Entries(value, self.where, f"{self.prefix}{name}.")

    def known(self, allowed: Sequence[str], kind: str) -> None:
        """Raises UserError for an entry that is none of `allowed`."""
        for name in self.content:
            if name not in allowed:
                raise UserError(f"{self.where}: {unknown(kind, printable(name, 80), allowed)}")


def _is_whole(x: Any, low: int, high: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and low <= x <= high


def _is_number(x: Any, low: float, high: float) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and low <= x <= high
