"""Errors that are meant for the user rather than for us, how a command prints, and how it ends."""

import contextlib
import difflib
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, TextIO

BROKEN_PIPE = 141
"""The exit code of a command whose output nobody reads any more, as a shell gives it: 128 + SIGPIPE."""

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


def listed(names: Sequence[str], most: int = 4) -> str:
    """'a, b, c, d, …': the first names as they are safe to print."""
    return ", ".join(map(printable, names[:most])) + (", …" if len(names) > most else "")


def near(name: str, allowed: Iterable[str], *, cutoff: float = 0.5, most: int = 3) -> list[str]:
    """The names among `allowed` that may have been meant, the nearest first; `cutoff` is difflib's, 1 for equal names."""
    return difflib.get_close_matches(name, sorted(allowed), n=most, cutoff=cutoff)


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UserError:
    """The error for a name that is not among `allowed`: the near ones if there are any, else all of them."""
    allowed = sorted(allowed)
    hint = did_you_mean(near(name, allowed)) or f"use one of {', '.join(allowed)}."
    return UserError(f"unknown {kind} {name!r}: {hint}")


def did_you_mean(names: Iterable[str]) -> str:
    """'did you mean a or b?', nothing without names."""
    return f"did you mean {' or '.join(names)}?" if names else ""


def command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a console command and ends the process.

    A UserError is printed without a traceback, exit code 2; Ctrl-C exits with 130. Output that nobody reads any more, as
    after `| head`, ends it quietly; what cannot be read or written otherwise, as on a full disk, is an error.
    """
    steady_streams()
    gc.freeze()
    try:
        code = _exit_code(main)
        sys.stdout.flush()
    except UserError as e:
        say(f"error: {e}", sys.stderr)
        code = 2
    except KeyboardInterrupt:
        leave_at_once(130)
    except OSError as e:
        code = 2
        if isinstance(e.filename, str | bytes | os.PathLike):
            say(f"error: {printable(os.fsdecode(e.filename), 8192)} cannot be read or written: {e.strerror}", sys.stderr)
        elif not (failure := _failure(sys.stdout)):
            raise
        else:
            if isinstance(failure, BrokenPipeError):
                code = BROKEN_PIPE
            else:
                say(f"error: the standard output cannot be written: {e.strerror or e}", sys.stderr)
            mute(sys.stdout)
    gc.freeze()
    sys.exit(code)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Within it no garbage is collected, and what it has made is never searched for any: imports make what stays.

    Python would search it several times over as it grows, and once more as the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def steady_streams() -> None:
    """Standard output and error take any text, and exist: one that was started closed (`command >&-`) leads to nowhere.

    Where the terminal's encoding lacks a character, or the name of a file is no valid text, an escape is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # else the next file that is opened would take its place
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line at once, on standard output by default. A stream that cannot be written is muted: it ends no run."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        mute(stream)


def mute(stream: TextIO) -> None:
    """Has a stream lead to nowhere from now on, what still waits in it included."""
    with contextlib.suppress(OSError, ValueError):  # it has no file, or was closed
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def leave_at_once(code: int) -> NoReturn:
    """Ends the process without the interpreter's clean-up, which crashes if JAX is compiling in another thread."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _exit_code(main: Callable[[], int | None]) -> int | str | None:
    try:
        return main()
    except SystemExit as e:  # argparse and absl end like this
        return e.code


def _failure(stream: TextIO) -> OSError | None:
    """Why a stream cannot be written, None if it can. It is tried by an empty line, where a traceback would follow anyway."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # it has no file
        return None
    try:
        stream.flush()
        os.write(number, b"\n")
    except OSError as e:
        return e
    return None
