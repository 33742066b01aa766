"""What is written where: `train.log`, `metrics.jsonl`, TensorBoard events, and the progress that the user watches."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from vit_jax.files import write_atomically
from vit_jax.optimize import parallel

log = logging.getLogger("vit_jax")


@contextlib.contextmanager
def logging_to(workdir: Path) -> Iterator[None]:
    """Sends the package's log to `workdir/train.log` and, in plain lines, to standard output.

    Of several processes the first does so; the others print their warnings only.
    """
    handlers: list[logging.Handler] = [_Console()]
    if parallel.is_main():
        handlers.append(logging.FileHandler(workdir / "train.log", encoding="utf-8"))
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
    processes only the first writes anything.
    """

    def __init__(self, workdir: Path, *, start_step: int | None = None, total_steps: int = 0):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._bar = None
        self._writes = parallel.is_main()
        if not self._writes:
            return
        self._jsonl_path = workdir / "metrics.jsonl"
        if start_step is not None:
            _drop_after(self._jsonl_path, start_step)
        self._jsonl = open(self._jsonl_path, "a")
        self._events = EventFileWriter(str(workdir))
        if start_step is not None:
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # TensorBoard drops what came after this step
            self._events.add_event(event_pb2.Event(wall_time=time.time(), step=start_step + 1, session_log=restart))
        if total_steps and sys.stdout.isatty():
            layout = "{percentage:3.0f}% {bar:20} step {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=total_steps, initial=start_step or 0, bar_format=layout, file=sys.stdout, leave=False)
            self._bar.set_postfix_str("compiling the first step")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records named numbers of one step in `metrics.jsonl` and as TensorBoard events."""
        if not self._writes:
            return
        values = {name: float(value) for name, value in values.items()}
        self._jsonl.write(json.dumps({"step": step} | values) + "\n")
        self._jsonl.flush()
        self._events.add_event(_event(step, values))

    def advance(self, step: int, status: str) -> None:
        """Moves the bar to `step`, with a few words such as 'loss 0.31'."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(status)

    def close(self) -> None:
        """Puts everything on disk and takes the bar away."""
        if self._bar is not None:
            self._bar.close()
        if self._writes:
            for file in (self._jsonl, self._events):
                with contextlib.suppress(OSError):  # a full disk, of which `scalars` told
                    file.close()


class _Console(logging.Handler):
    """Prints messages above the bar; where there is a bar, messages marked `progress` are left to it."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "progress", False) and sys.stdout.isatty():
            return
        text = record.getMessage()
        tqdm.write(text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}", file=sys.stdout)
        sys.stdout.flush()


def _event(step: int, values: dict[str, float]):
    from tensorboard.compat.proto import event_pb2, summary_pb2

    scalars = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
    return event_pb2.Event(wall_time=time.time(), step=step, summary=summary_pb2.Summary(value=scalars))


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`: a run that starts again at `step` will write them anew."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _is_up_to(line, step)]
        write_atomically(path, lambda f: f.write("".join(line + "\n" for line in lines).encode()))


def _is_up_to(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # a line cut off when the last run was killed
        return False
