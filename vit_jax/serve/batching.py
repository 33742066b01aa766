"""What arrives at about the same time is computed together, in batches of few sizes."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Full(Exception):
    """No more items may wait, or none at all any more."""


class _Entry(NamedTuple):
    item: object
    result: asyncio.Future
    arrived: float


class Batcher(Generic[Item, Result]):
    """Computes items in batches of at most `most`.

    While a batch is computed the next one gathers. It goes when as many wait as the last one had: clients that were answered
    at a time come back at a time, and one alone never waits. If they do not come it goes after `wait` seconds, or a quarter
    of what the last one took, if that is longer. All methods are called in one event loop, within `async with batcher`; its
    end waits for what was accepted.
    """

    def __init__(self, compute: Callable[[list[Item]], Sequence[Result]], *, most: int, wait: float, room: int):
        """
        Args:
          compute: items → a result of each; called in a thread of its own, a batch at a time.
          room: items that may wait; more are refused.
        """
        self._compute, self._most, self._wait, self._room = compute, most, wait, room
        self._waiting: deque[_Entry] = deque()
        self._expected, self._free, self._patience = 1, 0.0, wait
        self._changed = asyncio.Event()
        self._closing = False
        self.thread = ThreadPoolExecutor(1, "compute")

    def __len__(self) -> int:
        """How many items wait."""
        return len(self._waiting)

    async def __aenter__(self) -> "Batcher":
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_) -> None:
        self._closing = True
        self._changed.set()
        await self._worker
        self.thread.shutdown()

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """The results of all items, or Full for all of them; what `compute` raises is raised here.

        If it is cancelled, what still waits is not computed.
        """
        if self._closing or len(self._waiting) + len(items) > self._room:
            raise Full
        loop, now = asyncio.get_running_loop(), time.monotonic()
        entries = [_Entry(item, loop.create_future(), now) for item in items]
        self._waiting.extend(entries)
        self._changed.set()
        return await asyncio.gather(*(entry.result for entry in entries))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := await self._next():
            start = time.monotonic()
            try:
                results = await loop.run_in_executor(self.thread, self._compute, [entry.item for entry in batch])
            except Exception as e:
                for entry in batch:
                    if not entry.result.done():
                        entry.result.set_exception(e)
            else:
                for entry, result in zip(batch, results, strict=True):
                    if not entry.result.done():  # whoever asked may have gone
                        entry.result.set_result(result)
            self._free = time.monotonic()
            self._patience = max(self._wait, (self._free - start) / 4)

    async def _next(self) -> list[_Entry]:
        """The next batch, never empty before the end."""
        while True:
            self._waiting = deque(entry for entry in self._waiting if not entry.result.cancelled())
            left = max(self._waiting[0].arrived, self._free) + self._patience - time.monotonic() if self._waiting else None
            if self._closing or len(self._waiting) >= self._expected or (left is not None and left <= 0):
                self._expected = max(1, min(self._most, len(self._waiting)))
                return [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()


def sizes(most: int) -> list[int]:
    """The powers of two below `most`, and `most`: no batch of them is filled up to more than twice what it holds."""
    return [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]
