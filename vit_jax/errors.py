"""Errors that are meant for the user rather than for us."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error whose message is meant for the user: what arrived, what was allowed, what to do."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not among `allowed`: the near ones if there are any, else all of them."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(allowed)}."
    return UserError(f"unknown {kind} {name!r}: {hint}")
