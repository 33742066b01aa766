"""Splits of a dataset and parts of them, in tfds' syntax; and the files that splits are in."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vit_jax.data.features import Source
from vit_jax.data.listing import shown
from vit_jax.errors import UserError, printable

T = TypeVar("T")

HELD_OUT = 0.1  # share of the examples that is for testing where a dataset itself keeps none
TEST_NAMES = ("validation", "val", "valid", "test")  # one stands in for another, the first before the last


def meant(asked: str, offered: Iterable[str]) -> str | None:
    """The split that is meant by a name: itself, the same with a year, or for testing any that is; None for none."""
    names = (asked, *(TEST_NAMES if asked in TEST_NAMES else ()))
    matches = (n for name in names for n in offered if n == name or n.startswith(name) and n.removeprefix(name).isdigit())
    return next(matches, None)


def split_range(split: str, sizes: Mapping[str, int]) -> tuple[str, range]:
    """Reads tfds' syntax for (parts of) splits: 'train[:98%]' → ('train', range(0, 98 % of sizes['train'])).

    A bound is a number of examples or a percentage, and counts from the end if negative. A percentage is rounded in the
    same way wherever it stands, so that 'train[:98%]' and 'train[98%:]', or 'train[-2%:]', tile the split.
    Raises UserError for a name that `sizes` lacks, for bounds outside the split, and for an empty part.
    """
    match = re.fullmatch(r"([\w-]+)(?:\[(-?[\d.]+)?(%)?:(-?[\d.]+)?(%)?\])?", split)
    if not match or match[1] not in sizes:
        raise UserError(f"unknown split {split!r}: allowed are {', '.join(sizes)}, and parts such as 'train[:98%]'")
    name, start, start_unit, stop, stop_unit = match.groups()
    size = sizes[name]

    def position(bound: str | None, default: int) -> int:
        if bound is None:
            return default
        try:
            if start_unit or stop_unit:  # as with tfds, one % is enough for both
                percent = Fraction(bound)
                return round(size * (100 + percent if percent < 0 else percent) / 100)
            return size + int(bound) if int(bound) < 0 else int(bound)
        except ValueError:
            raise UserError(f"split {split!r}: {bound!r} is no number of examples") from None

    part = range(position(start, 0), position(stop, size))
    if part.start < 0 or part.stop > size:
        raise UserError(f"split {split!r} reaches beyond the {size:,} examples of {name!r}")
    if not part:
        raise UserError(
            f"split {split!r} is empty: {name!r} has {size:,} examples. Name a split or other parts, such as"
            f" --config.pp.train='{name}[:90%]' and --config.pp.test='{name}[90%:]'"
        )
    return name, part


def part_of(split: str, size: int) -> range:
    """`split_range` of the one split that is meant, whatever it is called."""
    return split_range(split, {split.partition("[")[0]: size})[1]


def hold_out(order: Sequence[T]) -> dict[str, Sequence[T]]:
    """Examples without a split for testing, by split: the first `HELD_OUT` of them, or one, are for testing."""
    count = max(1, round(HELD_OUT * len(order)))
    return {"train": order[count:]} | dict.fromkeys(TEST_NAMES, order[:count])


def hold_out_of_classes(examples: list[tuple[int, Any, Any]], root: str) -> tuple[list, list]:
    """Splits examples (hash, name, class), sorted, into those for training and those held out: a hash in the lowest tenth.

    The last image of each class is always for training, and if no hash is that low, the lowest one is held out.
    """
    last = {label: position for position, (_, _, label) in enumerate(examples)}
    spare = [example for position, example in enumerate(examples) if last[example[2]] != position]
    if not spare:
        raise UserError(
            f"{shown(root)} has {len(examples)} images in as many classes: none can be held out for testing."
            " Add images, or a test folder beside a train folder"
        )
    limit = max(HELD_OUT * 2**64, spare[0][0] + 1)
    held_out = [example for example in spare if example[0] < limit]
    held = set(held_out)
    return [example for example in examples if example not in held], held_out


def hash_of(name: str) -> int:
    """Returns 64 bits that depend on nothing but the name."""
    name = composed(name.replace(os.sep, "/"))
    return int.from_bytes(hashlib.blake2s(name.encode("utf-8", "surrogateescape"), digest_size=8).digest())


def composed(name: str) -> str:
    """The one of the forms in which Unicode writes ö that the rest of the world uses: macOS takes it apart."""
    return unicodedata.normalize("NFC", name)


def taken(parts: Mapping[str, Sequence[T]], split: str) -> Sequence[T]:
    """The examples of a split or a part of it."""
    name, part = split_range(split, {name: len(examples) for name, examples in parts.items()})
    return parts[name][part.start : part.stop]


def chosen(found: Mapping[str, T], split: str, root: Path, what: str) -> T:
    """That of the split which is `meant`. Raises UserError, which says `what` a folder has for its splits, if there is none."""
    asked = split.partition("[")[0]
    name = meant(asked, found)
    if name is None:
        offered = next(iter(found))
        raise UserError(
            f"{shown(root)} has {what} for {', '.join(map(printable, found))}, not for {asked!r}: name parts of a split, such"
            f" as --config.pp.train='{printable(offered)}[:90%]' and --config.pp.test='{printable(offered)}[90%:]'"
        )
    return found[name]


def files_by_split(root: Path, suffix: str) -> dict[str, list[Path]]:
    """The files of each split, {} without any for training: train.SUFFIX, train-00000-of-00002.SUFFIX, …

    They lie in a folder or its folder `data`, or in its folders `train` and `test`. `test` may also be called as `TEST_NAMES`.
    """

    def named(folder: Path, split: str) -> list[Path]:
        return [x for x in folder.glob(f"{split}*{suffix}") if not x.name[len(split)].isalpha()]

    found = {
        name: sorted({*named(root, name), *named(root / "data", name), *root.glob(f"{name}/*{suffix}")})
        for name in ("train", *TEST_NAMES)
    }
    return {name: files for name, files in found.items() if files} if found["train"] else {}


class InFiles(Source):
    """Examples that lie in several files, in their order: those of a split, of which `counts` are in each."""

    def __init__(self, counts: Sequence[int], split: str):
        self._part, self._starts = part_of(split, sum(counts)), np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self._part)

    def _place(self, index: int) -> tuple[int, int]:
        """(number of the file, number within it) of an example."""
        number = self._part[index]
        file = int(np.searchsorted(self._starts, number, side="right")) - 1
        return file, number - int(self._starts[file])
