"""What the first process of a recipe took long to compile, the next one loads in a thread, and JAX takes it by its own key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiling import AS_PINNED

REPOSITORY = Path(__file__).parent.parent.parent
PROGRAM = """
import collections, sys, threading
import jax
from vit_jax.run import load_ahead, runtime
load_ahead.LONG = load_ahead.LONG_TO_COMPILE = 0
counts, threads, load = collections.Counter(), set(), load_ahead._Ahead._load
def watched(*args):
    threads.add(threading.current_thread().name)
    return load(*args)
load_ahead._Ahead._load = watched
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.rpartition("/")[2]]))
load_ahead.start(runtime.set_up(sys.argv[1]), "a recipe")
step = lambda p, x: (p - float(sys.argv[2]) * jax.numpy.tanh(p @ x), x.sum())
p, _ = jax.pmap(step, donate_argnums=0)(jax.numpy.full((1, 8, 8), 0.1), jax.numpy.full((1, 8, 8), 0.1))
print(p.sum(), counts["cache_misses"], *threads)
"""


def run(folder: Path, rate: float) -> list[str]:
    """[a result, programs that were compiled, the thread that loaded some ahead if any did] of a process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") and k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(rate)]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not AS_PINNED, reason="JAX's functions that get and put programs are others")
def test_a_second_process_loads_ahead_and_runs_what_it_has_traced(tmp_path):
    first, compiled = run(tmp_path, 0.1)
    assert int(compiled) > 0
    assert run(tmp_path, 0.1) == [first, "0", "programs_0"]
    other, compiled, _ = run(tmp_path, 0.5)  # of the same recipe by another program, as after a change of the code
    assert other != first and int(compiled) > 0
    for path in tmp_path.glob("*"):
        if not path.name.startswith("ahead-"):
            path.write_bytes(path.read_bytes()[:50])
    assert run(tmp_path, 0.5)[0] == other
