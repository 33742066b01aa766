"""Ctrl-C, SIGTERM and a terminal that is closed, during training: finish the step, save, leave."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds that a run that was asked to stop waits for its next batch: a file on a network that is gone may never be read.
Schedulers wait 30 seconds before they kill."""


class LoaderHangs(SystemExit):
    """A run that was asked to stop has waited too long for its next batch. The threads that read it cannot be ended."""


_active: "GracefulExit | None" = None


def watch(batches: Iterator[T]) -> Iterator[T]:
    """`GracefulExit.watch` of the run that is going on; the batches as they are where there is none."""
    return _active.watch(batches) if _active else batches


class GracefulExit:
    """Within `with GracefulExit() as stop:` the first SIGINT, SIGTERM or SIGHUP sets `stop.signal`; a second one acts at once.

    A signal that is ignored, as `nohup` has SIGHUP, stays ignored.
    """

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}
        self._waits = False

    @property
    def exit_code(self) -> int:
        """What shells expect of a process ended by this signal: 130 for Ctrl-C, 143 for SIGTERM, or another's signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def __enter__(self) -> "GracefulExit":
        global _active
        self._outer, _active = _active, self
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        global _active
        _active = self._outer
        self._waits = False
        self._set_deadline()
        self._restore()

    def watch(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; LoaderHangs if one takes longer than `PATIENCE` after a signal."""
        with contextlib.closing(batches):
            while True:
                with self.reading():
                    try:
                        batch = next(batches)
                    except StopIteration:
                        return
                yield batch

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Within it files are read: LoaderHangs if it takes longer than `PATIENCE` after a signal."""
        self._waits = True
        self._set_deadline()
        try:
            yield
        finally:
            self._waits = False
            self._set_deadline()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        with contextlib.suppress(OSError):  # the terminal is gone
            print("\nfinishing the step, then saving; once more to leave at once", file=sys.stderr, flush=True)
        self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
        self._set_deadline()

    def _set_deadline(self) -> None:
        """Starts the clock if a signal has come and a batch is waited for, else stops it."""
        if self.signal is not None:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE if self._waits else 0)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if self._waits:
            raise LoaderHangs(self.exit_code)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that Python did not set, such as JAX's
        self._previous = {}
