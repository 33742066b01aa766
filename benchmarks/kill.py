"""Fault test: a run that is killed again and again ends in the bits of one that nobody disturbed.

    python benchmarks/kill.py [--kills=20] [--seed=0] [--out=DIR]

A small ViT is trained from the command line, with dropout, micro-batches, frequent checkpoints and evaluations; once
undisturbed, and once killed by SIGKILL at random moments and started again until it has finished. Where a run finishes
before it was killed often enough, another one is begun. Exit code 1 if parameters or a loss of any step differ.
About 10 seconds a kill, most of which is starting Python.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parent.parent
EVAL_EVERY, CHECKPOINT_EVERY = 15, 40
RECIPE = (
    *("--config=configs/pretrain.py:micro4,digits", "--config.pp.crop=8", "--config.batch=32", "--config.accum_steps=2"),
    *("--config.model.hidden_size=16", "--config.model.transformer.num_layers=1", "--config.model.transformer.mlp_dim=16"),
    *("--config.model.transformer.num_heads=2", "--config.model.transformer.dropout_rate=0.1", "--config.progress_every=1"),
    *(f"--config.eval_every={EVAL_EVERY}", f"--config.checkpoint_every={CHECKPOINT_EVERY}", "--config.keep=2"),
    "--config.report=False",
)
# Where kills are aimed in turn, and up to how many seconds later they come. "anywhere" is a random step; the others make
# sure that what is short is hit too.
AIMS = (("anywhere", 0.05), ("a save", 0.02), ("an evaluation", 0.02), ("anywhere", 0.05), ("start-up", 0.5))


@dataclasses.dataclass
class Session:
    """One process that trains in `workdir`, and what it has logged since it started."""

    workdir: Path
    process: subprocess.Popen
    log_offset: int
    started: float

    @classmethod
    def start(cls, workdir: Path, steps: int, cache: Path) -> "Session":
        workdir.mkdir(parents=True, exist_ok=True)
        log = workdir / "train.log"
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        env = os.environ | compiled | {"JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "vit_jax.main", f"--workdir={workdir}", *RECIPE, f"--config.total_steps={steps}"]
        offset, started = log.stat().st_size if log.exists() else 0, time.time()
        with open(workdir / "output.txt", "ab") as output:
            process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=output, stderr=subprocess.STDOUT)
        return cls(workdir, process, offset, started)

    def new_log(self) -> str:
        path = self.workdir / "train.log"
        if not path.exists():
            return ""
        with open(path, "rb") as f:
            f.seek(self.log_offset)
            return f.read().decode(errors="replace")

    def steps(self) -> list[int]:
        """The steps that this process has reported."""
        return [int(step) for step in re.findall(r" step (\d+)/", self.new_log())]

    def evaluating(self) -> bool:
        """Whether the last step reported is one to evaluate after, and no result is there."""
        steps = self.steps()
        return bool(steps) and steps[-1] % EVAL_EVERY == 0 and f" step {steps[-1]}  " not in self.new_log()

    def saving(self) -> bool:
        """Whether this process is writing a checkpoint, or deleting an old one."""
        folders = [path for end in (".tmp", ".deleted") for path in (self.workdir / "checkpoints").glob(f"*{end}")]
        try:
            return any(path.stat().st_ctime > self.started for path in folders)  # older ones were left by another process
        except FileNotFoundError:  # it has just finished
            return False

    def kill_at(self, aim: str, step: int, delay: float) -> list[str] | None:
        """Kills the process `delay` seconds after its `step`-th step and the next moment that is aimed at.

        Returns what it was doing then; None if it came to its end before.
        """
        reached = {
            "start-up": lambda: "start " in self.new_log(),
            "anywhere": lambda: len(self.steps()) >= step,
            "a save": lambda: len(self.steps()) >= step and self.saving(),
            "an evaluation": lambda: len(self.steps()) >= step and self.evaluating(),
        }[aim]
        while not reached():
            if self.process.poll() is not None:
                return None
            time.sleep(0.005)
        time.sleep(delay)
        self.process.send_signal(signal.SIGKILL)
        if self.process.wait() != -signal.SIGKILL:
            return None
        phase = "an evaluation" if self.evaluating() else "steps" if self.steps() else "start-up"
        return [phase, "a save"] if self.saving() else [phase]


def finish(session: Session) -> None:
    """Waits until it has trained to the end."""
    if session.process.wait(timeout=600):
        tail = (session.workdir / "output.txt").read_text()[-2000:]
        raise RuntimeError(f"the run in {session.workdir} failed with exit code {session.process.returncode}:\n{tail}")


def kill_until_finished(workdir: Path, *, steps: int, cache: Path, rng: random.Random, kills: int) -> Iterator[list[str]]:
    """Trains to the end, killed up to `kills` times; yields what the process was doing at each of them."""
    while True:
        session = Session.start(workdir, steps, cache)
        if kills == 0:
            finish(session)
            return
        aim, latest = AIMS[kills % len(AIMS)]
        # A kill loses half of CHECKPOINT_EVERY on average: fewer steps in a session would never get anywhere.
        phases = session.kill_at(aim, rng.randint(1, 3 * CHECKPOINT_EVERY), rng.uniform(0, latest))
        if phases is None:
            finish(session)
            return
        kills -= 1
        yield phases


def differences(killed: Path, undisturbed: Path) -> list[str]:
    """What is not equal bit for bit: parameters, and the numbers of every step but times."""
    found = []
    ours, theirs = np.load(killed / "model.npz"), np.load(undisturbed / "model.npz")
    if ours.files != theirs.files:
        found.append(f"parameters are {ours.files} instead of {theirs.files}")
    for name in set(ours.files) & set(theirs.files):
        if ours[name].tobytes() != theirs[name].tobytes():
            found.append(f"parameter {name} differs by up to {np.abs(ours[name] - theirs[name]).max()}")
    curves = curve(killed), curve(undisturbed)
    if len(curves[0]) != len(curves[1]):
        found.append(f"metrics.jsonl has {len(curves[0])} numbers instead of {len(curves[1])}")
    found += [f"{a} instead of {b}" for a, b in zip(*curves, strict=False) if a != b][:5]
    return found


def curve(workdir: Path) -> list[tuple[int, str, float]]:
    """Every (step, name, number) of `metrics.jsonl` in order, without speeds and stalls."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], k, v) for line in lines for k, v in line.items() if k != "step" and "_sec" not in k]


def run(out: Path, *, kills: int, steps: int = 1000, seed: int = 0) -> tuple[Counter, list[str]]:
    """How many kills hit what, and the differences to the undisturbed run."""
    rng, hit, found, done, runs = random.Random(seed), Counter(), [], 0, 0
    cache = out / "compiled"
    undisturbed = Session.start(out / "undisturbed", steps, cache)
    while done < kills:
        runs += 1
        workdir = out / f"killed{runs}"
        for phases in kill_until_finished(workdir, steps=steps, cache=cache, rng=rng, kills=kills - done):
            done += 1
            hit.update(phases)
            saved = sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())
            print(f"kill {done:3d} in run {runs} during {' and '.join(phases)}; checkpoints {saved}", flush=True)
        finish(undisturbed)
        found += [f"run {runs}: {difference}" for difference in differences(workdir, undisturbed.workdir)]
    print(f"\n{done} kills in {runs} run(s) of {steps} steps hit (a save goes on beside the others)")
    for phase, count in sorted(hit.items()):
        print(f"  {phase:15} {count:4d}")
    numbers = len(curve(undisturbed.workdir))
    print("\n".join(found) or f"parameters and all {numbers} numbers of metrics.jsonl are equal bit for bit")
    return hit, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="folder for the runs; default: a temporary one")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="kill"))
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"--out={out} is not empty")
    _, found = run(out.absolute(), kills=arguments.kills, seed=arguments.seed)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
