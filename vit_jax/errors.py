"""Errors that are meant for the user rather than for us."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable

_JOINERS = "\u200c\u200d"  # words in Persian and Hindi, and many emoji, hold them


class UserError(ValueError):
    """An error whose message is meant for the user: what arrived, what was allowed, what to do."""


def printable(text: object, most: int = 200) -> str:
    """A name from a file as it is safe to print: control characters, line breaks and what turns text round are made visible.

    Of a text longer than `most` characters the middle is left out.
    """
    text = str(text)
    text = text if len(text) <= most else f"{text[: most // 2]} … {text[-(most // 2) :]}"
    return "".join(c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape").decode() for c in text)


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not among `allowed`: the near ones if there are any, else all of them."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(allowed)}."
    return UserError(f"unknown {kind} {name!r}: {hint}")


def command(main: Callable[[], int]) -> None:
    """Runs a console command: a UserError is printed without a traceback, exit code 2; Ctrl-C exits with 130."""
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    try:
        sys.exit(main())
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        leave_at_once(130)


def open_standard_streams() -> None:
    """Sends to nowhere what was started closed (`command >&-`): the next file that is opened would take its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def leave_at_once(code: int) -> None:
    """Ends the process without the interpreter's clean-up, which crashes if JAX is compiling in another thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
