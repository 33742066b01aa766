"""What a process finds of an earlier one's compilations, what it does about a bad folder, and whose flags count."""

import io
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from benchmarks.side_by_side import memory
from vit_jax.errors import UserError
from vit_jax.run import runtime
from vit_jax.run.runtime import Compiled

REPOSITORY = Path(__file__).parent.parent.parent
PROGRAM = """
import collections, os, sys
import jax
from vit_jax.run import runtime
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.rpartition("/")[2]]))
runtime.set_up(sys.argv[1])
step = lambda p, x: (p - 0.1 * jax.numpy.tanh(p @ x), x.sum())
p, _ = jax.pmap(step, donate_argnums=0)(jax.numpy.ones((1, 8, 8)), jax.numpy.ones((1, 8, 8)))
result = p.sum()
print(counts["cache_hits"], counts["cache_misses"], result, os.environ.get("XLA_FLAGS", ""))
"""


def start(folder: Path | str, **environment: str) -> tuple[int, int, str, str, str]:
    """(programs found, programs written, a result, XLA_FLAGS, what was said on stderr) of a process that keeps programs."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") and k != "XLA_FLAGS"}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    env = inherited | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found, written, result, *flags = done.stdout.split()
    return int(found), int(written), result, " ".join(flags), done.stderr


def test_the_second_process_compiles_nothing_and_what_is_damaged_is_compiled_again(tmp_path):
    folder = tmp_path / "new" / "xla"
    found, written, result, _, said = start(folder)
    assert (found, said) == (0, "") and written > 0
    assert folder.stat().st_mode & 0o777 == 0o700
    assert start(folder)[:3] == (written, 0, result)
    flipped, halved, *_ = sorted(folder.iterdir())
    blob = bytearray(flipped.read_bytes())
    blob[-20] ^= 16
    flipped.write_bytes(blob)
    halved.write_bytes(halved.read_bytes()[:50])
    found, again, *rest, said = start(folder)
    assert (found, again, rest[0], said) == (written - 2, 2, result, "")
    assert start(folder)[:2] == (written, 0)


def test_other_flags_of_the_compiler_find_nothing(tmp_path):
    _, written, *_ = start(tmp_path)
    name = next(iter(runtime.CPU_FLAGS))
    assert start(tmp_path, XLA_FLAGS=f"--{name}=true")[:2] == (0, written)


@pytest.mark.parametrize("folder", ["", "/dev/null/xla"])
def test_without_a_folder_all_is_compiled_and_a_bad_one_costs_a_line(folder):
    found, written, _, flags, said = start(folder)
    assert (found, written) == (0, 0)
    added = runtime.CPU_FLAGS if jaxlib.__version__ in runtime.KNOWN_TO else {}
    assert flags == " ".join(f"--{name}={value}" for name, (value, _) in added.items())
    assert said.count("compiled programs are not kept: ") == said.count("\n") == bool(folder)


def test_the_folder_of_jaxs_own_variable_wins(tmp_path):
    start(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_users_own_flags_win(tmp_path):
    name = next(iter(runtime.CPU_FLAGS))
    *_, flags, _ = start("", XLA_FLAGS=f"--{name}=true --xla_backend_optimization_level=1")
    assert flags.split()[:2] == [f"--{name}=true", "--xla_backend_optimization_level=1"]
    assert flags.count(name) == 1


@pytest.mark.parametrize(("version", "platforms"), [("0.99.0", "cpu"), (jaxlib.__version__, "cuda,cpu")])
def test_no_flag_for_another_compiler_or_another_device(version, platforms, monkeypatch):
    monkeypatch.setattr(jaxlib, "__version__", version)
    monkeypatch.setattr(runtime, "_only_cpus", lambda: platforms == "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    runtime.set_xla_flags()
    assert "XLA_FLAGS" not in os.environ


def test_a_barrier_in_a_tiny_loop_does_not_end_the_process():
    """As XLA's does that is told to keep barriers and compiles such a loop as one function, see `runtime.CPU_FLAGS`."""

    def step(x, _):
        x, twice = jax.lax.optimization_barrier((x, 2 * x))
        return x + twice, None

    assert jax.jit(lambda x: jax.lax.scan(step, x, length=4)[0])(jnp.ones(3)).tolist() == [81, 81, 81]


def test_the_least_recently_used_programs_make_room(tmp_path):
    for i, name in enumerate("abc"):
        Compiled(tmp_path).put(name, b"." * 68)  # 100 with its digest
        os.utime(tmp_path / name, (i, i))
    assert Compiled(tmp_path).get("a") == b"." * 68
    Compiled(tmp_path, limit=250).put("d", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_a_full_disk_is_one_warning(tmp_path, monkeypatch, caplog):
    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime, "write_atomically", full)
    compiled = Compiled(tmp_path)
    compiled.put("a", b"program")
    compiled.put("b", b"program")
    assert compiled.get("a") is None
    assert [record.message for record in caplog.records] == [
        "compiled programs are not kept: [Errno 28] No space left on device"
    ]


@pytest.mark.skipif(memory("VmRSS") is None, reason="the memory of a process is read from /proc")
def test_memory_that_the_compiler_has_freed_goes_back():
    events = []
    runtime.return_memory()
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
    jax.jit(lambda x: x + 17)(1.0)
    assert runtime.COMPILED in events
    blocks = [np.ones(12_500) for _ in range(1_000)]  # of 100 kB, which malloc takes from its heap
    last = blocks.pop()
    blocks.clear()
    kept = memory("VmRSS")
    jax.monitoring.record_event_duration_secs(runtime.COMPILED, 2.0)
    assert kept - memory("VmRSS") > 80e6, last.size


def test_the_files_that_may_be_open_are_as_many_as_allowed_and_too_few_are_an_error(monkeypatch):
    limits = [256, 100_000]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    runtime.allow_files()
    assert limits == [runtime.MANY_FILES, 100_000]
    limits[:] = 16, 16
    with pytest.raises(UserError, match="may open 16 files at a time, at least 64 are needed: try `ulimit"):
        runtime.allow_files()


def test_warnings_are_plain_and_those_of_others_as_they_were(monkeypatch):
    root, said = logging.getLogger(), io.StringIO()
    handler = logging.StreamHandler(said)
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    monkeypatch.setattr(root, "handlers", [*root.handlers, handler])
    for _ in range(2):
        runtime.plain_warnings()
    logging.getLogger("vit_jax").warning("text     %d are cut", 3)
    logging.getLogger("other").warning("loud")
    assert said.getvalue() == "text     3 are cut\nWARNING:other:loud\n"
