"""Measures several ways to do the same work, alternating, each in a process of its own on the same machine.

A worker is a module run as `python -m MODULE JSON`, which hands `serve` a function that does the work n times, and waits
for the end of it. Workers sleep while another one is measured, so that drifts of the machine's speed hit all alike.
"""

import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "timm", "transformers", "simplejpeg", "opencv-python-headless", "pillow")


class Failed(Exception):
    """A worker could not do its work; the message is its last line."""


class Worker:
    """A process that has built what it measures, by our own interpreter or by that of `job["python"]`.

    `job["variables"]` are added to its environment; `job["checkout"]` is another checkout of this project to run in.
    """

    def __init__(self, module: str, job: Mapping[str, Any]):
        command = [job.get("python", sys.executable), "-m", module, json.dumps(job)]
        self._process = subprocess.Popen(
            command,
            cwd=job.get("checkout", REPOSITORY),
            env=os.environ | job.get("variables", {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def seconds(self, n: int) -> float:
        """How long one of n repetitions took."""
        print(n, file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self) -> dict[str, Any]:
        """Ends the process, and returns what it knows at its end: the peak of its memory, in bytes."""
        print(0, file=self._process.stdin, flush=True)
        facts = self._answer()
        self._process.wait()
        return facts

    def _answer(self) -> dict[str, Any]:
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise Failed(self._process.stderr.read().strip().rpartition("\n")[2] or f"exit code {self._process.wait()}")


def serve(build: Callable[[dict[str, Any]], tuple[Callable[[int], float], dict[str, Any]]]) -> None:
    """The other end of `Worker`: `build` takes the job and returns (n → seconds of one repetition, facts about it)."""
    started = time.perf_counter()
    repeat, facts = build(json.loads(sys.argv[1]))
    _say(facts | {"build_seconds": time.perf_counter() - started})
    for line in sys.stdin:
        if int(line) == 0:
            break
        _say({"seconds": repeat(int(line))})
    _say({"peak_rss": memory("VmHWM")})
    os._exit(0)  # thread pools of several libraries may wait for each other


def memory(field: str) -> int | None:
    """Bytes of this process: "VmRSS", what it takes, or "VmHWM", the most that it took; None where there is no /proc."""
    path = Path("/proc/self/status")
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", path.read_text())[1]) if path.exists() else None


def _say(answer: Mapping[str, Any]) -> None:
    print("answer " + json.dumps(answer), flush=True)


@dataclasses.dataclass
class Measured:
    """Seconds of one repetition, by round, and what the worker said of itself."""

    seconds: list[float]
    facts: dict[str, Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the distance between the outer quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        return (high - low) / 2 / self.median


def alternate(
    module: str,
    jobs: Mapping[str, Mapping[str, Any]],
    *,
    rounds: int,
    seconds: float = 0.0,
    samples: int = 1,
    warm_up: int = 0,
) -> tuple[dict[str, Measured], dict[str, str]]:
    """({name: measured}, {name: why it failed}) after `rounds` turns for each job, and one to warm up.

    A turn is `warm_up` repetitions that do not count, and `samples` times as many as take about `seconds`, one at least.
    """
    workers, failed, repetitions, times = {}, {}, {}, {}
    for name, job in jobs.items():
        try:
            worker = Worker(module, job)
            worker.seconds(2)
            once = worker.seconds(2)
            workers[name], repetitions[name], times[name] = worker, max(1, round(seconds / once)), []
        except Failed as e:
            failed[name] = str(e)
    for i in range(rounds):
        for name in list(workers)[:: 1 if i % 2 else -1]:
            if warm_up:
                workers[name].seconds(warm_up)
            times[name] += [workers[name].seconds(repetitions[name]) for _ in range(samples)]
    found = {name: Measured(times[name], worker.facts | worker.close()) for name, worker in workers.items()}
    return found, failed


def environment() -> dict[str, Any]:
    """The machine and the versions a table was measured with."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{os.cpu_count()} x {model[1] if model else platform.processor()}",
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "variables": {name: os.environ[name] for name in ("XLA_FLAGS", "OMP_NUM_THREADS") if name in os.environ},
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def save(name: str, title: str, tables: Sequence[str], data: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Prints the tables, and writes them to results/NAME.md with what they were measured on, and the data to NAME.json."""
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    lines = [f"# {title}", "", f"{facts['date']}, {facts['cpu']}, Python {facts['python']}, {versions}.", ""]
    lines += [f"    {facts['command']}", "", *("\n".join([table, ""]) for table in tables)]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines))
    (RESULTS / f"{name}.json").write_text(json.dumps({**facts, **data}, indent=1) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
