"""Splits of a dataset and parts of them, in tfds' syntax."""

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction

from vit_jax.errors import UserError

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
        raise UserError(f"split {split!r} is empty: {name!r} has {size:,} examples")
    return name, part
