"""Training state on disk: written in the background through Orbax, committed whole, checked before it is read.

A checkpoint is a folder `STEP`: `state/` is Orbax's, with the arrays by path such as `params/head/kernel`, and
`checkpoint.json` tells what they must be, the metrics, and the size and CRC-32 of every file. These checksums are ours
because Orbax 0.12 restores flipped bytes without a word. A checkpoint is `STEP.tmp` until it is complete.
"""

import contextlib
import errno
import itertools
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from vit_jax.checkpoint import quiet_orbax
from vit_jax.checkpoint.checksums import check_files, checksum, files_in, read_json, sync_names, write_json
from vit_jax.errors import UserError

T = TypeVar("T")
log = logging.getLogger("vit_jax")

_STATE, _NOTES, _PART = "state", "checkpoint.json", "files.{}.json"
_UNFINISHED, _DAMAGED, _DELETED = ".tmp", ".damaged", ".deleted"
_BARRIER_SECONDS = 1200
_numbers = itertools.count()  # of saves: the same in every process, and none twice


class WriteError(UserError):
    """A checkpoint could not be written; those before it are intact."""


class Checkpointer:
    """The checkpoints of one run, in `directory`. Every process has one and calls its methods in the same order.

    Args:
      keep: how many of the newest stay.
      best: a metric by which the best one stays too.
      lower_is_better: whether that is the one with the smallest value; needed with `best`.
      read_only: another process may be writing there: nothing is made or renamed.

    Attributes:
      stall_seconds: for how long the last `save` held up its caller.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 1,
        best: str | None = None,
        lower_is_better: bool | None = None,
        read_only: bool = False,
    ):
        assert best is None or lower_is_better is not None
        self._directory, self._read_only = directory.absolute(), read_only
        if not read_only:
            _make_folder(self._directory)
        self._keep, self._best = keep, best
        self._sign = -1 if lower_is_better else 1
        self._main = jax.process_index() == 0
        self._wait_for_all = ocp.multihost.get_barrier_sync_fn()  # needs no device, so that it can be used in a thread
        # Compressed parameters are 8 % smaller, and take three times as long to write and five times to read.
        self._handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        quiet_orbax.hush()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future] | None = None
        self.stall_seconds = 0.0
        self._steps = _from_main(steps_in(self._directory))
        self._scores = {step: self._score(_metrics(self._folder(step))) for step in self._steps} if best else {}
        unfinished = sorted(str(p) for p in self._directory.glob(f"*{_UNFINISHED}"))
        if unfinished and self._main and not read_only:
            log.warning("%s: left from a write that did not finish, not used", ", ".join(unfinished))

    def latest_step(self) -> int | None:
        """The newest committed step, or None. Once `restore` has returned, it is the newest readable one."""
        return self._steps[-1] if self._steps else None

    def best_value(self) -> float | None:
        """The best value so far of the metric `best`, over restarts too; None if there is none."""
        scores = [score for score in self._scores.values() if score is not None]
        return self._sign * max(scores) if scores else None

    def improves(self, metrics: dict[str, float]) -> bool:
        """Whether `metrics` holds a better value of the metric `best` than any saved so far."""
        score, best = self._score(metrics), self.best_value()
        return score is not None and (best is None or score > self._sign * best)

    def restore(self, template: T) -> T:
        """The newest readable state, on the devices that the ShapeDtypeStructs of `template` ask for.

        A leaf without sharding comes to the first local device. A damaged checkpoint is named and renamed, and the one
        before it used. Raises UserError if none is readable, or the state is another than `template`, which is no damage.
        """
        wanted = _wanted(template)
        damaged: dict[Path, str] = {}
        for step in reversed(self._steps):
            arrays, reason = self._read(self._folder(step), wanted)
            if reason and self._read_only and steps_in(self._directory)[-1:] > [step]:  # the run there has deleted it
                self._steps = steps_in(self._directory)
                return self.restore(template)
            if reason is None:
                self._set_aside(damaged)
                self._steps = [s for s in self._steps if s <= step]
                self._scores = {s: score for s, score in self._scores.items() if s <= step}
                return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in wanted])
            damaged[self._folder(step)] = reason
        raise UserError(
            "no checkpoint can be read:\n"
            + "\n".join(f"  {folder}: {reason}" for folder, reason in damaged.items())
            + "\nMove these folders away to start anew, or start in another workdir."
        )

    def restore_best(self, template: T) -> tuple[int, T, dict[str, float]] | None:
        """(step, state, metrics) of the first of the best checkpoints; None if none has a score, or it is damaged."""
        self._wait()
        step = self._best_step()
        if step is None:
            return None
        wanted = _wanted(template)
        arrays, reason = self._read(self._folder(step), wanted)
        if reason:
            log.warning("%s, the best, is damaged (%s)", self._folder(step), reason)
            return None
        state = jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in wanted])
        return step, state, _metrics(self._folder(step))

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Has `state` written in the background; its arrays must stay as they are. A step that is there already is kept.

        Waits for the save before it. Raises WriteError if that one failed.
        """
        started = time.perf_counter()
        self._wait()
        if step not in self._steps:
            if self._best:  # known at once, so that all processes decide alike by `improves`
                self._scores[step] = self._score(metrics or {})
            self._writing = step, self._thread.submit(self._write, step, state, metrics or {}, next(_numbers))
        self.stall_seconds = time.perf_counter() - started

    def check(self) -> None:
        """Raises WriteError if the last save has failed. Does not wait."""
        if self._writing and self._writing[1].done():
            self._wait()

    def close(self) -> None:
        """Waits until everything is on disk. Raises WriteError if the last save failed."""
        try:
            self._wait()
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except Exception as e:  # Orbax raises many kinds
            self._scores.pop(step, None)
            good = self.latest_step()
            intact = f"The checkpoint of step {good} is intact" if good is not None else "There is no earlier one"
            raise WriteError(
                f"the checkpoint of step {step} could not be written to {self._directory}: {_short(e)}. "
                f"{intact}; free space there, lift its limit (quota, ulimit -f) or make it writable, "
                "and repeat the command to continue"
            ) from e

    # Writing, in the background. Every process comes to each of the barriers, even if it failed.

    def _write(self, step: int, state: Any, metrics: dict[str, float], number: int) -> None:
        final = self._folder(step)
        unfinished = final.with_name(final.name + _UNFINISHED)
        arrays = _flat(state)
        notes = {"step": step, "metrics": {k: float(v) for k, v in metrics.items()}, "arrays": _described(arrays)}
        stages = (
            lambda: self._main and _new_folder(unfinished, room_for=sum(x.nbytes for x in arrays.values())),
            lambda: self._write_part(unfinished, arrays),
            lambda: self._main and self._commit(unfinished, final, notes),
        )
        error = None
        for i, stage in enumerate(stages):
            try:
                if error is None:
                    stage()
            except Exception as e:
                error = e
            self._wait_for_all(key=f"checkpoint {number}.{i}", timeout_ms=1000 * _BARRIER_SECONDS)
        if error is None and not final.exists():
            error = RuntimeError("another process could not write its part")
        if error:
            if self._main:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise error
        self._steps = sorted({*self._steps, step})
        self._prune()

    def _write_part(self, folder: Path, arrays: dict[str, jax.Array]) -> None:
        """Writes this process's shards, and what its files must be."""
        with quiet_orbax.finishing():
            self._handler.save(epath.Path(folder / _STATE), args=ocp.args.PyTreeSave(arrays))
        number = jax.process_index()
        written = files_in(folder / _STATE / f"ocdbt.process_{number}")
        write_json(folder / _PART.format(number), {str(p.relative_to(folder)): checksum(p, sync=True) for p in written})

    def _commit(self, unfinished: Path, final: Path, notes: dict[str, Any]) -> None:
        """Makes one checkpoint of all processes' parts."""
        parts = [unfinished / _PART.format(number) for number in range(jax.process_count())]
        if missing := [number for number, part in enumerate(parts) if not part.exists()]:
            raise RuntimeError(f"process {missing[0]} could not write its part")
        self._handler.finalize(epath.Path(unfinished / _STATE))  # one index over all shards
        files = {}
        for part in parts:
            files |= read_json(part)
            part.unlink()
        for path in files_in(unfinished):
            if (name := str(path.relative_to(unfinished))) not in files:
                files[name] = checksum(path, sync=True)
        write_json(unfinished / _NOTES, notes | {"files": files})
        for folder in {path.parent for path in files_in(unfinished)}:
            sync_names(folder)
        unfinished.rename(final)
        sync_names(final.parent)

    def _prune(self) -> None:
        """Deletes all but the newest, and the best."""
        kept = set(self._steps[-self._keep :])
        if (best := self._best_step()) is not None:
            kept.add(best)
        dropped = [step for step in self._steps if step not in kept]
        self._steps = sorted(kept)
        if not self._main:
            return
        try:
            for folder in self._directory.glob(f"*{_DELETED}"):  # left by a process that was killed
                shutil.rmtree(folder)
            for step in dropped:  # under another name, lest a half-deleted one be taken for a checkpoint
                shutil.rmtree(self._folder(step).rename(self._directory / f"{step}{_DELETED}"))
        except OSError as e:
            log.warning("an old checkpoint could not be deleted: %s", e)

    def _best_step(self) -> int | None:
        scored = [step for step in self._steps if self._scores.get(step) is not None]
        return max(scored, key=self._scores.get, default=None)

    # Reading. What one process finds wrong, all of them hear of, so that all go on with the same checkpoint.

    def _read(self, folder: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, jax.Array], str | None]:
        """(arrays, None), or ({}, what is wrong with the checkpoint). UserError if it is sound and holds other arrays."""
        notes, reason = _attempt(lambda: _read_notes(folder))
        if reason is None:
            _, reason = _attempt(lambda: check_files(folder, notes["files"]))
        if reason is None:
            _check_arrays(folder, notes["arrays"], _described(wanted))
            args = ocp.args.PyTreeRestore(wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted))
            arrays, reason = _attempt(lambda: self._handler.restore(epath.Path(folder / _STATE), args=args))
        return ({}, reason) if reason else (arrays, None)

    def _set_aside(self, damaged: dict[Path, str]) -> None:
        """Names damaged checkpoints and renames them, so that they are neither read nor counted again."""
        for folder, reason in damaged.items() if self._main else ():
            if self._read_only:
                log.warning("%s is damaged (%s): the one before it is used", folder, reason)
                continue
            aside = folder.with_name(folder.name + _DAMAGED)
            while aside.exists():
                aside = aside.with_name(f"{aside.name}{_DAMAGED}")
            log.warning("%s is damaged (%s): set aside as %s, the one before it is used", folder, reason, aside.name)
            with contextlib.suppress(OSError):  # a folder that is for reading only
                folder.rename(aside)

    def _score(self, metrics: dict[str, float]) -> float | None:
        """The larger, the better."""
        value = metrics.get(self._best, math.nan)
        return None if math.isnan(value) else self._sign * float(value)

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)


def _wanted(template: Any) -> dict[str, jax.ShapeDtypeStruct]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = _flat(template).items()
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here) for k, x in leaves}


def _flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _described(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}


def _check_arrays(folder: Path, found: dict[str, str], wanted: dict[str, str], most: int = 10) -> None:
    """Raises UserError with the first differences unless both are the same."""
    sides = ("-", found, wanted), ("+", wanted, found)
    lines = [f"  {sign} {k} {a[k]}" for k in wanted | found for sign, a, b in sides if k in a and a[k] != b.get(k)]
    if lines:
        more = f"\n  … and {len(lines) - most} more" if len(lines) > most else ""
        raise UserError(
            f"the checkpoint {folder} holds another state than this config trains (- there, + now):\n"
            + "\n".join(lines[:most])
            + more
            + "\nRepeat the config that wrote it, or start in another workdir."
        )


def steps_in(directory: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order; none where there is no such folder."""
    names = (path.name for path in directory.glob("*"))
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}, for checkpoints, cannot be made a folder: {e.strerror}") from e


def _read_notes(folder: Path) -> dict[str, Any]:
    """`checkpoint.json`. OSError if it is not there, ValueError if it does not tell what it must."""
    notes = read_json(folder / _NOTES)
    told = notes if isinstance(notes, dict) else {}
    for name, kind in (("arrays", str), ("metrics", (int, float)), ("files", list)):
        values = told.get(name)
        if not isinstance(values, dict) or not all(isinstance(value, kind) for value in values.values()):
            raise ValueError(f"{_NOTES} tells no {name} as a checkpoint's does")
    if not all(len(file) == 2 and all(isinstance(number, int) for number in file) for file in told["files"].values()):
        raise ValueError(f"{_NOTES} tells no sizes and checksums of files")
    return notes


def _metrics(folder: Path) -> dict[str, float]:
    """The metrics of a checkpoint; none if it is damaged, which `restore` will find."""
    try:
        return _read_notes(folder)["metrics"]
    except (OSError, ValueError):
        return {}


def _new_folder(path: Path, room_for: int) -> None:
    """Makes it anew. OSError if the disk has not so many bytes free: Orbax would say it with pages of tracebacks."""
    shutil.rmtree(path, ignore_errors=True)
    free = shutil.disk_usage(path.parent).free
    if free < room_for + (1 << 20):
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {room_for >> 20:,} MiB are needed, {free >> 20:,} are free")
    path.mkdir()  # not its parents: if they are gone, the workdir was deleted while the run went on
    (path / _STATE).mkdir()


def _attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """(the result, None), or (None, why it failed in this or another process)."""
    result = reason = None
    try:
        result = function()
    except Exception as e:
        reason = _short(e)
    if jax.process_count() > 1:
        text = (reason or "").encode()[:256]
        texts = multihost_utils.process_allgather(np.frombuffer(text.ljust(256), np.uint8))
        reason = next((t for t in (bytes(row).decode(errors="replace").strip() for row in texts) if t), None)
    return result, reason


def _from_main(numbers: list[int]) -> list[int]:
    """Process 0's numbers, in every process: a network's file system need not show all of them the same."""
    if jax.process_count() == 1:
        return numbers
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    return multihost_utils.broadcast_one_to_all(np.resize(np.array(numbers or [0], np.int32), count)).tolist()


def _short(error: Exception) -> str:
    """The first line of an error, which for the libraries below can be pages long, or what the system called it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    text = str(error).strip() or type(error).__name__
    if code := re.search(r"os_error_code='(\d+)'", text):  # TensorStore
        return os.strerror(int(code[1]))
    line = text.splitlines()[0]
    return line if len(line) <= 200 else line[:200] + "…"
