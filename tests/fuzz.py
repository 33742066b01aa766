"""Damages files as chance, broken disks and strangers do, and sees that every reader answers or refuses, within a budget.

A case is a target (what is read) and a number, from which alone all of its bytes follow. A worker process runs cases and
measures each: 5 seconds of computing, and memory of 3 times its files plus 500 MB. What is wrong with one is its verdict:
"traceback" (any exception but UserError), "nan" (an answer that is not finite), "slow", "memory", "crash"; "answer" and
"refusal" are right. `benchmarks/fuzz.py` runs many, `tests/test_fuzz.py` a few.
"""

import io
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.fuzz_damage import INSIDE, WHOLE, damage

SECONDS, LONGEST, FACTOR, SPARE = 5, 60, 3, 500 << 20  # of computing, until it is given up, times the files, bytes
COMPILING = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
Files = dict[str, bytes]


class Target(NamedTuple):
    """Sound files by name, those of them that are damaged, and what reads their folder: it returns None or what is wrong."""

    files: Files
    damaged: tuple[str, ...]
    read: Callable[[Path], str | None]


class Verdict(NamedTuple):
    kind: str
    text: str
    seconds: float
    megabytes: float


def damaged(target: Target, number: int) -> Files:
    """The files of a case; of number -1 the sound ones."""
    rng = random.Random(number)
    files = dict(target.files)
    if number < 0:
        return files
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = rng.choice(target.damaged)
        if name not in files:
            continue
        if rng.random() < 0.02:
            files[name] = rng.choice(WHOLE)
        elif rng.random() < 0.01 and len(files) > 1:
            del files[name]
        elif (inside := INSIDE.get(Path(name).suffix)) and rng.random() < 0.8:
            try:
                files[name] = inside(files[name], rng)
            except Exception:  # it is too damaged already
                files[name] = damage(files[name], rng)
        else:
            files[name] = damage(files[name], rng)
    return files


# The worker.


def memory(what: str) -> int:
    """Bytes that /proc/self/status tells."""
    for line in open("/proc/self/status"):
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    return 0


def judge(files: Files, read: Callable[[Path], str | None]) -> Verdict:
    """Writes the files to a folder and reads it."""
    from vit_jax.errors import UserError

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = memory("VmRSS"), time.process_time()
        try:
            wrong = read(Path(folder))
            kind, text = ("nan", wrong) if wrong else ("answer", "")
        except UserError as e:
            text = str(e)
            kind = "refusal" if all(c.isprintable() or c == "\n" for c in text) else "escape"
        except BaseException as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            ours = [f for f in traceback.extract_tb(e.__traceback__) if "vit_jax" in f.filename]
            kind = "traceback"
            text = f"{type(e).__name__}: {e} at {where.filename}:{where.lineno}" + (
                f" from {ours[-1].filename}:{ours[-1].lineno}" if ours else ""
            )
        seconds, grown = time.process_time() - start, memory("VmHWM") - before
    text = text.replace(folder, "FOLDER")
    if seconds > SECONDS:
        kind, text = "slow", f"{kind}: {text}"
    elif grown > FACTOR * sum(map(len, files.values())) + SPARE:
        kind, text = "memory", f"{kind}: {text}"
    return Verdict(kind, text[:2000], round(seconds, 2), round(grown / 1e6))


def work() -> None:
    """Answers lines `[target, number or name of a case by hand]` by lines of verdicts, until its input ends."""
    import logging
    import warnings

    from tests import fuzz_by_hand, fuzz_targets

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    out, sys.stdout = sys.stdout, io.StringIO()
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + (6 << 30),) * 2)
    targets: dict[str, Target] = {}
    for line in sys.stdin:
        name, number = json.loads(line)
        if isinstance(number, str):
            files, read = fuzz_by_hand.cases(number.partition(":")[0])[number]()
        else:
            if name not in targets:
                targets[name] = fuzz_targets.TARGETS[name]()
            files, read = damaged(targets[name], number), targets[name].read
        print(json.dumps(judge(files, read)), file=out, flush=True)


class Worker:
    """A process that runs cases; another one takes its place when it dies or hangs."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def _stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def run(self, target: str, case: int | str) -> Verdict:
        """The verdict on one case."""
        if self._process is None:
            command = [sys.executable, "-c", "from tests import fuzz; fuzz.work()"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            environment = os.environ | COMPILING
            self._process = subprocess.Popen(command, cwd=Path.cwd(), env=environment, text=True, **pipes)
            self._is_fresh = True
        limit = 300 if self._is_fresh else LONGEST  # the first one imports and builds the sound files
        self._is_fresh = False
        try:
            print(json.dumps([target, case]), file=self._process.stdin, flush=True)
            answered = self._answers(limit)
            line = self._process.stdout.readline() if answered else ""
        except BrokenPipeError:
            answered, line = True, ""
        if line:
            return Verdict(*json.loads(line))
        self._stop()
        return Verdict("crash", "the process died", 0, 0) if answered else Verdict("slow", "no answer", LONGEST, 0)

    def _answers(self, limit: float) -> bool:
        """Whether an answer comes within so many seconds of computing, or ten times as many by the clock.

        On a busy machine a process may get hardly any of the time that passes.
        """
        computed, started = self._computed(), time.monotonic()
        while not select.select([self._process.stdout], [], [], 1)[0]:
            if self._computed() - computed > limit or time.monotonic() - started > 10 * limit:
                return False
        return True

    def _computed(self) -> float:
        """Seconds that the worker has computed; 0 of one that is gone."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
