"""From a source to batches on the device: order, threads, batches, and where to start after an interruption.

Everything is a pure function of (seed, position): position counts examples from the start of training, every epoch is
a permutation of its own, and an example's randomness depends on its position alone. So starting at any step gives what
an undisturbed run would have seen, on any number of threads, devices and processes. Where there are canvases, positions are
put into another order, see `canvases`, and keep all the rest.
"""

import copy
import functools
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from vit_jax.data.canvases import Canvases, Size, size_of
from vit_jax.data.features import ExampleError, Source
from vit_jax.data.host.decode import ImageError
from vit_jax.errors import UserError

Batch = dict[str, np.ndarray]
MakeExample = Callable[..., dict[str, np.ndarray]]

RUN = 8
"""Examples that a thread loads in a row: handing each over by itself costs a tenth of the time."""
AHEAD = 64
"""At least so many examples, and at least one batch, are loaded ahead."""

log = logging.getLogger("vit_jax")


def train_batches(
    source: Source,
    train_example: MakeExample,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    shuffle: bool = True,
    skip_bad_images: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    collate: Callable[[Batch], Batch] = lambda batch: batch,
    canvases: Canvases | None = None,
) -> Iterator[Batch]:
    """Endless batches from `start_step` on: what `train_example` makes, and "seed": uint32 (b,).

    Args:
      train_example: (example of the source, rng=generator, exif_rotated=) → dict of arrays of fixed shapes.
      batch_size: over all processes, which share a batch's examples out among themselves; this one gets its part.
      shuffle: False keeps the source's order.
      skip_bad_images: replaces an example whose image cannot be decoded by the next one of the source, and logs it;
        otherwise it is an error that names the image.
      collate: what becomes of a batch of stacked examples.
      canvases: `train_example` is also given the `canvas` (h, w) of its batch.
    """
    order = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        order = order.shuffle()
    order, local = order.repeat(), batch_size // process_count
    transform = _TrainExample(source, train_example, skip_bad_images)
    if canvases is None:
        examples = order.random_map(transform)[process_index::process_count][start_step * local :]
        return _batches(_in_order(examples, local), local, collate)
    views = order.random_map(_ViewSize(source, canvases))
    batches = canvases.train_batches(views.__getitem__, batch_size=batch_size, seed=seed, start_step=start_step)
    on = {canvas: order.random_map(transform.on(canvas)) for canvas in canvases.sizes}
    return _batches(((on[canvas], rows[process_index::process_count]) for canvas, rows in batches), local, collate)


def eval_batches(
    source: Source,
    eval_example: MakeExample,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    canvases: Canvases | None = None,
) -> Iterator[Batch]:
    """Every example once: what `eval_example` makes, and "valid": bool (b,).

    The last batch, of each canvas, is padded to `batch_size`, with valid False; all processes get the same number of batches.

    Args:
      eval_example: (example of the source, exif_rotated=) → dict of arrays of fixed shapes.
      canvases: `eval_example` is also given the `canvas` (h, w) of its batch. Batches then also have "index": int32 (b,), the
        numbers of the examples, of which padding has `len(source)`.
    """
    transform, local = _EvalExample(source, eval_example), batch_size // process_count
    if canvases is None:
        rounded_up = -(-len(source) // batch_size) * batch_size
        examples = grain.MapDataset.range(rounded_up).map(transform)[process_index::process_count]
        return _batches(_in_order(examples, local), local)
    numbers = grain.MapDataset.range(len(source) + 1)
    on = {canvas: numbers.map(transform.on(canvas)) for canvas in canvases.sizes}
    batches = canvases.eval_batches(source, batch_size)
    return _batches(((on[canvas], rows[process_index::process_count]) for canvas, rows in batches), local)


def load(source: Source, index: int, make_example: MakeExample) -> dict[str, np.ndarray]:
    """`make_example(source[index], exif_rotated=)`. A UserError names the example."""
    example = source[index]
    try:
        return make_example(example, exif_rotated=source.exif_rotated)
    except UserError as e:
        separator = " " if isinstance(e, ExampleError) else ": "
        raise type(e)(f"{source.where(index)}{separator}{e}") from e


class _TrainExample(grain.transforms.RandomMap):
    def __init__(self, source: Source, train_example: MakeExample, skip_bad_images: bool):
        self.source, self.train_example, self.skip_bad_images = source, train_example, skip_bad_images
        self.bad: set[int] = set()
        self.lock = threading.Lock()  # examples are loaded on several threads

    def on(self, canvas: Size) -> "_TrainExample":
        """The same for batches on one canvas; what is known of bad images is shared."""
        other = copy.copy(self)
        other.train_example = functools.partial(self.train_example, canvas=canvas)
        return other

    def random_map(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        example = self._load(index, functools.partial(self.train_example, rng=rng), rng)
        return example | {"seed": rng.integers(2**32, dtype=np.uint32)}

    def _load(self, index: int, make_example: MakeExample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        if not self.skip_bad_images:
            return load(self.source, index, make_example)
        start = rng.bit_generator.state
        for candidate in ((index + i) % len(self.source) for i in range(len(self.source))):
            try:
                return load(self.source, candidate, make_example)
            except ImageError as e:
                rng.bit_generator.state = start  # whatever was drawn for a bad image
                with self.lock:
                    if candidate not in self.bad:
                        self.bad.add(candidate)
                        log.warning("skipped bad image %d: %s", len(self.bad), e)
        raise UserError(f"none of the {len(self.source)} images can be decoded")


class _ViewSize(grain.transforms.RandomMap):
    """(h, w) of the view that `_TrainExample` draws at a position: both get generators in the same state."""

    def __init__(self, source: Source, canvases: Canvases):
        self.source, self.drawn = source, canvases.drawn

    def random_map(self, index: int, rng: np.random.Generator) -> Size:
        return self.drawn(size_of(self.source, index), rng)


class _EvalExample(grain.transforms.Map):
    def __init__(self, source: Source, eval_example: MakeExample, canvas: Size | None = None):
        self.source, self.eval_example, self.canvas = source, eval_example, canvas

    def on(self, canvas: Size) -> "_EvalExample":
        """The same for batches on one canvas."""
        return _EvalExample(self.source, functools.partial(self.eval_example, canvas=canvas), canvas)

    def map(self, index: int) -> dict[str, Any]:
        padding = index >= len(self.source)
        numbered = {} if self.canvas is None else {"index": np.int32(index)}
        example = load(self.source, 0 if padding else index, self.eval_example)
        return example | numbered | {"valid": np.bool_(not padding)}


class _Loading:
    """A batch that several threads are filling, each its own rows, a run of `RUN` after the other."""

    def __init__(self, executor: ThreadPoolExecutor, examples: grain.MapDataset, rows: Sequence[int], run: int):
        self.examples, self.rows, self.batch = examples, rows, Batch()
        self.lock = threading.Lock()
        self.runs = [executor.submit(self._load, range(i, min(i + run, len(rows)))) for i in range(0, len(rows), run)]

    def result(self) -> Batch:
        """The batch, once it is full."""
        for run in self.runs:
            run.result()
        return self.batch

    def _load(self, run: range) -> None:
        for i in run:
            example = self.examples[self.rows[i]]
            with self.lock:
                if not self.batch:
                    self.batch.update({name: _aligned((len(self.rows), *x.shape), x.dtype) for name, x in example.items()})
            for name, x in example.items():
                self.batch[name][i] = x


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose memory starts where JAX wants it, so that the CPU as a device takes it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _in_order(examples: grain.MapDataset, batch_size: int) -> Iterator[tuple[grain.MapDataset, range]]:
    """The rows of every batch."""
    return ((examples, range(i, i + batch_size)) for i in range(0, len(examples) - batch_size + 1, batch_size))


def _batches(
    parts: Iterable[tuple[grain.MapDataset, Sequence[int]]],
    batch_size: int,
    collate: Callable[[Batch], Batch] = lambda batch: batch,
) -> Iterator[Batch]:
    """Loads batches, (examples, rows of them), on as many threads as there are cores, ahead of the one asked for."""
    threads = os.cpu_count() or 1
    run = max(1, min(RUN, batch_size // threads))
    ahead = -(-AHEAD // batch_size)
    executor = ThreadPoolExecutor(threads, thread_name_prefix="loader")
    loading: deque[_Loading] = deque()
    try:
        for examples, rows in parts:
            loading.append(_Loading(executor, examples, rows, run))
            if len(loading) > ahead:
                yield collate(loading.popleft().result())
        while loading:
            yield collate(loading.popleft().result())
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
