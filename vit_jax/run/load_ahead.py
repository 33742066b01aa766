"""Compiled programs that take long to load are loaded in a thread, while this process still imports, reads and traces.

Which these will be is noted by the first process that runs a recipe. JAX finds a program by the key of what it has traced, here
as always: one that was loaded for nothing is never run. The thread holds up nobody, as XLA loads outside of Python's lock.
"""

import base64
import contextlib
import hashlib
import inspect
import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from vit_jax.run.runtime import Compiled, trim_memory

ARGUMENTS = (
    ("cache_key", "compile_options", "backend", "executable_devices"),
    ("cache_key", "module_name", "executable", "backend", "compile_time"),
)
"""Of JAX's functions that get and put a program, as they are known here."""
LONG = 0.5
"""Seconds of loading from which on a program is noted; a step of B/16 takes 3."""
LONG_TO_COMPILE = 2
"""The same of compiling, after which loading is known to be worth it."""


class _Ahead:
    """Stands in for JAX's two functions that get and put programs; `noted` are (key, options, numbers of devices) by key."""

    def __init__(self, kept: Compiled, name: str, jax_cache: Any, xla: Any):
        self._kept, self._name, self._xla = kept, name, xla
        self._get, self._put = jax_cache.get_executable_and_time, jax_cache.put_executable_and_time
        self._read = lambda blob: jax_cache.extract_executable_and_time(jax_cache.decompress_executable(blob))
        self._noted = {note[0]: note for note in json.loads(kept.get(name) or b"[]")}
        self._used: dict[str, list] = {}
        self._missed: dict[str, list] = {}
        executor = ThreadPoolExecutor(1, thread_name_prefix="programs")
        self._loading: dict[str, Future] = {key: executor.submit(self._load, *note) for key, note in self._noted.items()}
        executor.shutdown(wait=False)

    def get(self, key: str, options: Any, backend: Any, devices: Any) -> tuple[Any, int | None]:
        """The program of a key and how long it took to compile, (None, None) if there is none."""
        note = [key, base64.b64encode(options.SerializeAsString()).decode(), [device.id for device in devices]]
        loading = self._loading.pop(key, None)
        if loading is not None and note == self._noted[key]:
            with contextlib.suppress(Exception):  # of XLA's many kinds: JAX tries it again, and tells
                loaded = loading.result()
                self._used[key] = note
                return loaded
        started = time.perf_counter()
        program, seconds = self._get(key, options, backend, devices)
        if program is None:
            self._missed[key] = note
        elif time.perf_counter() - started > LONG:
            self._note(note)
        return program, seconds

    def put(self, key: str, module_name: str, program: Any, backend: Any, seconds: int) -> None:
        """Keeps a program that has been compiled in so many seconds."""
        self._put(key, module_name, program, backend, seconds)
        if seconds >= LONG_TO_COMPILE and key in self._missed:
            self._note(self._missed.pop(key))

    def _note(self, note: list) -> None:
        """Notes a program, and forgets those of an earlier process that this one has not asked for."""
        self._used[note[0]] = note
        self._kept.put(self._name, json.dumps(list(self._used.values())).encode())

    def _load(self, key: str, options: str, devices: list[int]) -> tuple[Any, int]:
        program, seconds = self._read(self._kept.get(key))
        by_number = {device.id: device for device in jax.devices()}
        chosen = self._xla.DeviceList(tuple(by_number[number] for number in devices))
        options = self._xla.CompileOptions.ParseFromString(base64.b64decode(options))
        loaded = jax.devices()[0].client.deserialize_executable(program, chosen, options)
        trim_memory()
        return loaded, seconds


def start(kept: Compiled | None, recipe: str) -> None:
    """Loads what an earlier process noted for this recipe, and notes what this one needs. For one process on CPUs alone.

    Where JAX's functions take other arguments, as those of 0.12 do, they are left alone.
    """
    if kept is None or jax.process_count() > 1 or jax.default_backend() != "cpu":
        return
    with contextlib.suppress(ImportError, AttributeError):  # it is no part of JAX's interface
        from jax._src import compilation_cache
        from jax._src.lib import xla_client

        replaced = (compilation_cache.get_executable_and_time, compilation_cache.put_executable_and_time)
        if tuple(tuple(inspect.signature(function).parameters) for function in replaced) != ARGUMENTS:
            return
        name = f"ahead-{hashlib.sha256(recipe.encode('utf-8', 'surrogateescape')).hexdigest()}"
        ahead = _Ahead(kept, name, compilation_cache, xla_client)
        compilation_cache.get_executable_and_time, compilation_cache.put_executable_and_time = ahead.get, ahead.put
