"""What is written where: `train.log`, `metrics.jsonl`, TensorBoard events, and the progress that the user watches."""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tqdm import tqdm

from vit_jax.checkpoint.state import WriteError
from vit_jax.errors import UserError
from vit_jax.files import is_still, write_atomically
from vit_jax.optimize import parallel

log = logging.getLogger("vit_jax")

SHARES = {
    "accuracy",
    "top1",
    "top5",
    "knn",
    "fewshot",
    "precision",
    "recall",
    "ap",
    "ap50",
    "ap75",
    "ar",
    "map",
    "iou",
    "miou",
    "dice",
}
"""Words in the names of metrics that are shares of a whole."""


@contextlib.contextmanager
def logging_to(workdir: Path) -> Iterator[None]:
    """Sends the package's log to `workdir/train.log` and, in plain lines, to standard output.

    Of several processes the first does so; the others print their warnings only. UserError if the file cannot be written.
    """
    handlers: list[logging.Handler] = [_Console()]
    if parallel.is_main():
        try:
            handlers.append(_LogFile(workdir / "train.log", encoding="utf-8", errors="backslashreplace"))
        except OSError as e:
            raise UserError(f"{workdir / 'train.log'} cannot be written ({e.strerror}): move it away") from e
        handlers[1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO if parallel.is_main() else logging.WARNING)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    except Exception as e:
        for handler in handlers[1:]:
            handler.emit(log.makeRecord(log.name, logging.ERROR, __file__, 0, str(e), (), None))
        raise
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = propagate


class Writer:
    """Writes the scalars of a run, and shows how far it is: a bar on a terminal, plain lines anywhere else.

    A run that starts after `start_step` replaces what was written of later steps; None adds to what is there. Of several
    processes only the first writes anything. UserError if `metrics.jsonl` cannot be written.
    """

    def __init__(self, workdir: Path, *, start_step: int | None = None, total_steps: int = 0):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._bar = None
        self._writes = parallel.is_main()
        if not self._writes:
            return
        self._jsonl_path = workdir / "metrics.jsonl"
        try:
            _drop_after(self._jsonl_path, math.inf if start_step is None else start_step)
            self._jsonl = open(self._jsonl_path, "a")
        except OSError as e:
            raise UserError(f"{self._jsonl_path} cannot be written ({e.strerror}): move it away") from e
        self._events = EventFileWriter(str(workdir))
        if start_step is not None:
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # TensorBoard drops what came after this step
            self._events.add_event(event_pb2.Event(wall_time=time.time(), step=start_step + 1, session_log=restart))
        if total_steps and _has_bar():
            layout = "{percentage:3.0f}% {bar:20} step {n_fmt}/{total_fmt}{postfix}"
            with _output_may_end():
                self._bar = tqdm(total=total_steps, initial=start_step or 0, bar_format=layout, file=sys.stdout, leave=False)
                self._bar.set_postfix_str("compiling the first step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records named numbers of one step in `metrics.jsonl` and as TensorBoard events.

        OSError if they cannot be written, WriteError if the workdir was deleted or moved meanwhile.
        """
        if not self._writes:
            return
        if not is_still(self._jsonl_path, self._jsonl.fileno()):
            raise WriteError(
                f"{self._jsonl_path} was deleted or moved while the run wrote to it: start again, in a --workdir that stays"
            )
        values = {name: float(value) for name, value in values.items()}
        try:
            self._jsonl.write(json.dumps({"step": step} | values) + "\n")
            self._jsonl.flush()
        except OSError as e:
            raise OSError(e.errno, e.strerror, os.fspath(self._jsonl_path)) from e
        self._events.add_event(_event(step, values))

    def advance(self, step: int, status: str) -> None:
        """Moves the bar to `step`, with a few words such as 'loss 0.31'."""
        if self._bar is not None:
            with _output_may_end():
                self._bar.n = step
                self._bar.set_postfix_str(status)

    def close(self) -> None:
        """Puts everything on disk and takes the bar away."""
        if self._bar is not None:
            with _output_may_end():
                self._bar.close()
        if self._writes:
            for file in (self._jsonl, self._events):
                with contextlib.suppress(OSError):  # a full disk, of which `scalars` told
                    file.close()


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Metrics for people, in one line: shares such as accuracy as percentages, all else with four significant digits."""
    return "  ".join(f"{name} {format_metric(name, float(value))}" for name, value in metrics.items())


def format_metric(name: str, value: float) -> str:
    """A value as `format_metrics` writes it."""
    words = set(re.split("[/_]", name.lower()))
    if words & SHARES and "l2" not in words and 0 <= value <= 1:
        return f"{100 * value:.2f} %"
    if math.isfinite(value) and (abs(value) >= 1000 or value == 0):
        return f"{value:,.0f}"
    return f"{value:#.4g}"


class _Console(logging.Handler):
    """Prints messages above the bar; where there is a bar, messages marked `progress` are left to it."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "progress", False) and _has_bar():
            return
        text = record.getMessage()
        text = text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        with _output_may_end():
            tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
            sys.stdout.flush()


class _LogFile(logging.FileHandler):
    """A file that is full keeps no messages; that it is full is `Writer.scalars`'s to say."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _has_bar() -> bool:
    """Whether standard output is a terminal of a known width, that can go back to the start of a line."""
    width = shutil.get_terminal_size(fallback=(0, 0)).columns
    return width >= 40 and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def _output_may_end() -> Iterator[None]:
    """Lets a run go on where standard output does not: a pipe whose reader has ended, a terminal that was closed.

    From then on what is printed goes nowhere, the rest of a buffer at the end of the process included.
    """
    try:
        yield
    except OSError as e:
        nowhere = open(os.devnull, "w")
        with contextlib.suppress(OSError):  # one that is no file
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.stdout = nowhere
        log.warning("nothing more can be printed (%s): the run goes on, follow train.log", e.strerror)


def _event(step: int, values: dict[str, float]):
    from tensorboard.compat.proto import event_pb2, summary_pb2

    scalars = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    return event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=scalars))


def _drop_after(path: Path, step: float) -> None:
    """Keeps the records up to `step`: a run that starts again there will write later ones anew.

    A line that is no record is set aside and named, but for the last one, which is cut off where a run was killed.
    """
    if not path.exists():
        return
    *lines, last = path.read_bytes().split(b"\n")
    records = [(number, line, _step_of(line)) for number, line in enumerate(lines, 1)]
    if (damaged := [line for _, line, at in records if at is None]) and parallel.is_main():
        aside = path.with_name(path.name + ".damaged")
        numbers = ", ".join(str(number) for number, _, at in records if at is None)
        log.warning("%s: line %s is no record of numbers: set aside in %s", path, numbers, aside.name)
        with open(aside, "ab") as f:
            f.write(b"".join(line + b"\n" for line in damaged))
    if _step_of(last) is not None:  # whole but for its end
        records.append((len(records) + 1, last, _step_of(last)))
    kept = b"".join(line + b"\n" for _, line, at in records if at is not None and at <= step)
    write_atomically(path, lambda f: f.write(kept))


def _step_of(line: bytes) -> int | None:
    """The step of a line `{"step": 10, "name": number, …}`; None if it is none."""
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(record, dict) and all(type(value) in (int, float) for value in record.values())
    return record["step"] if numbers and type(record.get("step")) is int else None
