"""Whose classes are whose: a head and a dataset name their classes, and meet by name, never by number alone."""

import collections
import logging
import re
import unicodedata
from collections.abc import Sequence

from vit_jax.errors import UserError, printable

log = logging.getLogger("vit_jax")

_ID = re.compile(r"(?:label|class)?[ _-]?(\d+)", re.IGNORECASE)  # LABEL_3, class 3, 3
_WORDNET = re.compile(r"n\d{8}")  # what tfds calls the classes of ImageNet


def match_classes(head: Sequence[str], dataset: Sequence[str], *, where: str) -> tuple[int, ...]:
    """For each class of a dataset the column of a head that scores it.

    Names are equal if they are after folding case, Unicode's forms of one letter, spaces, underscores and hyphens, or if one
    of the synonyms that a comma divides ("tench, Tinca tinca") is the other. Where all are found in another order, a log line
    says so. Where no name is shared and one side has mere ids (LABEL_0, class 0, 0, n01440764) in their order, the order is
    trusted, and a warning says so.

    Args:
      where: whose head it is, for messages.

    Raises:
      UserError: with counts and names, if the classes are not the same.
    """
    head, dataset = list(head), list(dataset)
    if head == dataset:
        return tuple(range(len(head)))
    found = find_classes(head, dataset)
    known = [place for place in found if place is not None]
    if not known and len(head) == len(dataset) and (_are_ids(head) or _are_ids(dataset)):
        log.warning(
            "classes  %s calls its classes %s, the dataset %s: no name is shared, and their order is trusted",
            where,
            listed(head),
            listed(dataset),
        )
        return tuple(range(len(head)))
    if twice := [dataset[found.index(place)] for place, count in collections.Counter(known).items() if count > 1]:
        raise UserError(f"{where} has one class for several of the dataset's, such as {listed(twice)}: rename them")
    if len(known) < max(len(head), len(dataset)):
        raise UserError(
            f"{where} knows the classes {listed(head)}, the dataset has {listed(dataset)}: " + _difference(head, dataset, found)
        )
    if found != list(range(len(head))):
        log.info("classes  %s has them in another order than the dataset: they are matched by name", where)
    return tuple(found)


def find_classes(head: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name the column of the head that is called so, see `match_classes`; None for a name that no column has."""
    places = _places(head)
    return [_find(name, places) for name in names]


def check_same(known: Sequence[str], given: Sequence[str], *, where: str) -> None:
    """Raises UserError unless both are the same classes, by name, in the same order, as labels that are numbers need."""
    if [_fold(name) for name in known] != [_fold(name) for name in given]:
        raise UserError(
            f"{where} knows the classes {listed(known)}, the dataset has {listed(given)}: "
            "they must be the same, in the same order"
        )


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, as they are safe to print, and how many more there are."""
    more = f" … ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(printable(name, 60) for name in names[:most]) + more


def _difference(head: list[str], dataset: list[str], found: list[int | None]) -> str:
    missing = [name for name, place in zip(dataset, found, strict=True) if place is None]
    others = [name for i, name in enumerate(head) if i not in set(found)]
    parts = [f"{len(names)} only {who} ({listed(names)})" for names, who in ((others, "there"), (missing, "here")) if names]
    return (
        f"{len(dataset) - len(missing)} are the same by name, {', '.join(parts)}; rename the dataset's classes, or train a new "
        "head"
    )


def _fold(name: str) -> str:
    name = unicodedata.normalize("NFC", name)  # macOS takes letters and their accents apart
    return " ".join(re.split(r"[\s_-]+", name.strip().casefold()))


def _places(names: Sequence[str]) -> dict[str, int | None]:
    """Column by folded name and synonym; a word that two classes share leads to neither, unless it is all of one's name."""
    whole: dict[str, list[int]] = {}
    parts: dict[str, set[int]] = {}
    for i, name in enumerate(names):
        whole.setdefault(_fold(name), []).append(i)
        for part in name.split(","):
            parts.setdefault(_fold(part), set()).add(i)
    unique = {word: next(iter(where)) if len(where) == 1 else None for word, where in parts.items()}
    return unique | {word: where[0] if len(where) == 1 else None for word, where in whole.items()}


def _find(name: str, places: dict[str, int | None]) -> int | None:
    if (place := places.get(_fold(name))) is not None:
        return place
    found = {places.get(_fold(part)) for part in name.split(",")} - {None}
    return found.pop() if len(found) == 1 else None


def _are_ids(names: Sequence[str]) -> bool:
    """Whether names tell nothing but the order that they stand in."""
    if all(_WORDNET.fullmatch(name) for name in names):
        return sorted(names) == list(names)
    numbers = [_ID.fullmatch(name.strip()) for name in names]
    return all(numbers) and [int(match[1]) for match in numbers] == list(range(len(names)))
