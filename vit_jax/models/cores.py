"""The cores of a CPU, and batches computed in parts, one a core.

XLA gives a large operation to all cores and a small one to a single core, and each waits for the one before. Parts of a batch
do not wait for each other, and are one program: forward passes of Ti/16, S/16 and B/16 take 0.78 to 0.93 of the time on two
cores, see benchmarks/README.md.
"""

import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np

Result = TypeVar("Result")
MOST = 4
"""Cores that a batch is shared out to at most. Within a program each part of attention is compiled by itself: with 8 a step of
S/16 takes 10 s to compile, with 2 it takes 6."""


def cores() -> int:
    """Of this machine, for each of this process's devices that are CPUs."""
    devices = sum(device.platform == "cpu" for device in jax.local_devices())
    return max(1, (os.cpu_count() or 1) // max(1, devices))


def parts(size: int) -> int:
    """Into how many equal parts a batch of `size` examples is cut: 1 unless the only device of all processes is a CPU."""
    if jax.device_count() > 1 or jax.devices()[0].platform != "cpu":
        return 1
    return next(n for n in range(min(cores(), MOST, size), 0, -1) if size % n == 0)


def by_parts(
    function: Callable[[dict[str, np.ndarray]], Result], batch: Mapping[str, np.ndarray], n: int, *, axis: int = 0
) -> list[Result]:
    """`function` of n equal parts of a batch along `axis`, at once; it must wait for what it computes."""
    cut = {name: np.split(x, n, axis) for name, x in batch.items()}
    pieces = [{name: x[i] for name, x in cut.items()} for i in range(n)]
    return list(_threads().map(function, pieces)) if n > 1 else [function(piece) for piece in pieces]


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST, "part of a batch")
