"""Ctrl-C and SIGTERM during training: finish the step, save, leave."""

import signal
import sys
import threading
from types import FrameType


class GracefulExit:
    """Within `with GracefulExit() as stop:` the first SIGINT or SIGTERM sets `stop.signal`; a second one acts at once."""

    def __init__(self):
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """What shells expect of a process ended by this signal: 130 for Ctrl-C, 143 for SIGTERM, or another's signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def __enter__(self) -> "GracefulExit":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        print("\nfinishing the step, then saving; once more to leave at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler that Python did not set, such as JAX's
        self._previous = {}
