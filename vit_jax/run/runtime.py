"""What a command sets up before JAX starts: flags of XLA that measured better, the folder of compiled programs, memory."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import re
import resource
from pathlib import Path

import jax
import jaxlib

from vit_jax.errors import UserError
from vit_jax.files import COMPILED_PROGRAMS, write_atomically

log = logging.getLogger("vit_jax")

LIMIT = 2 * 2**30
"""Bytes that the folder may hold; a training step of B/16 takes one million."""

MANY_FILES, FEW_FILES = 4096, 64
"""Files that a process may want to have open at a time, and those without which checkpoints cannot be written."""

CPU_FLAGS = {  # name: (value, what it gained)
    "xla_cpu_enable_concurrency_optimized_scheduler": ("false", "temporaries of a step of S/16, batch 8: 718 MB, not 952"),
    # Barriers keep their order, as on other devices: gradients of kernels are not put off, nor rematerialisation undone.
    # XLA ends the process at one in a small loop, which the second pass would make a function of its own.
    "xla_disable_hlo_passes": (
        "cse_barrier_expander,small-while-loop-hoisting",
        "temporaries of that step, in less memory by then: 426 MB, not 532",
    ),
}
"""Flags for machines that have nothing but CPUs."""
KNOWN_TO = ("0.10.2", "0.12.0.1")
"""The versions of jaxlib that were tried: XLA ends the process at a flag that it does not know."""

COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX calls the event that a program has been compiled, or loaded."""


def set_up(cache: str | None = COMPILED_PROGRAMS) -> "Compiled | None":
    """`set_xla_flags`, `keep_compiled` …: what every command does before anything asks JAX for its devices."""
    allow_files()
    set_xla_flags()
    kept = keep_compiled(cache)
    return_memory()
    plain_warnings()
    return kept


class _Plain(logging.Formatter):
    """Leaves this package's messages as they are, and formats those of others as another formatter does."""

    def __init__(self, others: logging.Formatter):
        super().__init__()
        self.others = others

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == log.name else self.others.format(record)


def plain_warnings() -> None:
    """Warnings of commands without a log file come in plain lines, although Orbax sets up logging as it is imported."""
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler and not isinstance(handler.formatter, _Plain):
            handler.setFormatter(_Plain(handler.formatter or logging.Formatter()))


def allow_files() -> None:
    """Raises the number of files that this process may open as far as it may itself; UserError if that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(MANY_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        raise UserError(f"this process may open {soft} files at a time, at least {FEW_FILES} are needed: try `ulimit -n 1024`")


def set_xla_flags() -> None:
    """Adds `CPU_FLAGS` to the environment's XLA_FLAGS, but for those that are set there already.

    XLA reads them when JAX is first asked for its devices. Nothing is added where there may be a GPU or TPU, or for a
    version of jaxlib that is not `KNOWN_TO` have them.
    """
    given = os.environ.get("XLA_FLAGS", "").strip()
    if jaxlib.__version__ not in KNOWN_TO or not _only_cpus() or re.match("[^-]", given):  # that would be a file of flags
        return
    names = re.findall(r"--(\w+)", given)
    added = [f"--{name}={value}" for name, (value, _) in CPU_FLAGS.items() if name not in names]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *added])


@functools.cache
def return_memory() -> None:
    """From now on `trim_memory` follows every compilation of more than a second.

    That of a training step of S/16 leaves 150 MB, and on top of them would come the memory of the step itself.
    """

    def compiled(event: str, seconds: float, **_: str | int) -> None:
        if event == COMPILED and seconds > 1:
            trim_memory()

    jax.monitoring.register_event_duration_secs_listener(compiled)


def trim_memory() -> None:
    """Gives memory that was freed back to the system, which takes 20 ms; nothing where the C library is not glibc."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        trim(0)


def keep_compiled(folder: str | None = COMPILED_PROGRAMS) -> "Compiled | None":
    """Keeps every program that is compiled from now on in a folder, where the next process finds it; None or "": does not.

    JAX finds a program by its code, the version and flags of the compiler, and the features of the processor or the kind of
    the device, so machines may share a folder. Who may write to it may run code as whoever reads it. A folder that JAX has
    been told before, by JAX_COMPILATION_CACHE_DIR say, is left to JAX; a folder that cannot be used costs a warning. Then it
    returns None, and else the programs.
    """
    if jax.config.jax_compilation_cache_dir is not None or not folder:
        return None
    try:
        path = Path(folder).expanduser().absolute()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as e:  # the latter where nobody has a home
        log.warning("compiled programs are not kept: %s", e)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # files of XLA's own, which nothing would check
    with contextlib.suppress(ImportError):  # it is no part of JAX's interface; without it the files are as JAX writes them
        from jax._src import compilation_cache

        compilation_cache.get_file_cache = lambda path: (Compiled(Path(path)), path)
        return Compiled(path)
    return None


class Compiled:
    """The files of compiled programs, by JAX's key, in place of JAX's own `LRUCache`.

    That one leaves half a file when a process is killed or the disk is full, warns of it ever after and never replaces it,
    and may run a damaged one where zstandard compresses them. Here a file appears whole or not at all, begins with the
    SHA-256 of the rest, and is replaced if that is wrong. The least recently used go when all take more than `limit` bytes.
    """

    def __init__(self, folder: Path, limit: int = LIMIT):
        self._path, self._limit = folder, limit
        self._written = self._failed = False

    def get(self, key: str) -> bytes | None:
        """The program, None if it is not there or damaged."""
        path = self._path / key
        try:
            blob = path.read_bytes()
        except OSError:
            return None
        digest, program = blob[:32], blob[32:]
        if hashlib.sha256(program).digest() != digest:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return program

    def put(self, key: str, program: bytes) -> None:
        """Keeps the program. The first failure is a warning, and the last attempt."""
        if self._failed:
            return
        try:
            if not self._written:
                self._make_room()
            write_atomically(self._path / key, lambda f: f.write(hashlib.sha256(program).digest() + program))
            self._written = True
        except OSError as e:
            self._failed = True
            log.warning("compiled programs are not kept: %s", e)

    def _make_room(self) -> None:
        files = []
        for path in self._path.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room as well
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = 0
        for _, size, path in sorted(files, reverse=True):
            total += size
            if total > self._limit:
                path.unlink(missing_ok=True)


def _only_cpus() -> bool:
    if platforms := jax.config.jax_platforms:
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
