"""Keeps Orbax from printing pages of tracebacks beside the error that it raises, which is told in one line."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator


def hush() -> None:
    """Drops what it logs."""
    logging.getLogger("absl").addFilter(_is_not_orbaxs)


def _is_not_orbaxs(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Within it, an event loop that is closed first waits for its tasks.

    Orbax closes the loop at the first write that fails. The others then fail without a loop, each with a traceback.
    """
    before, asyncio.new_event_loop = asyncio.new_event_loop, _PatientLoop
    try:
        yield
    finally:
        asyncio.new_event_loop = before


class _PatientLoop(asyncio.SelectorEventLoop):
    def close(self) -> None:
        if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        super().close()
