"""How tests compile: quickly, in their own process and in those that they start."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jaxlib
import pytest
from jax._src import compiler

from vit_jax import train
from vit_jax.run import experiment as experiments

AS_PINNED = jaxlib.__version__ == "0.10.2"
"""Whether jaxlib is that of requirements.txt. Later ones lack a flag that is used here, and have other private functions."""
FUSION_EMITTERS = "xla_cpu_use_fusion_emitters"
"""They take half of the time to compile a training step; without them XLA writes the same loops in its older way.
A later XLA does not know this flag, and ends the process at it."""
IN_ONE_PART = "xla_cpu_parallel_codegen_split_count=1"
"""To cut a program into parts, for as many threads, takes a sixth of the time that is left."""


def quickly() -> None:
    """To be called before anything asks JAX for its devices."""
    if AS_PINNED:
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} --{FUSION_EMITTERS}=false --{IN_ONE_PART}".strip()
    _set("jax_disable_most_optimizations", True)


def once(folder: Path) -> None:
    """Keeps what is compiled in `folder`, for all workers and the processes that they start."""
    _set("jax_compilation_cache_dir", str(folder))
    _set("jax_persistent_cache_min_compile_time_secs", 0.0)
    _set("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def as_for_users() -> Iterator[None]:
    """Compiles with all optimisations, the fusion emitters among them."""
    before, options = jax.config.read("jax_disable_most_optimizations"), compiler.get_compile_options

    def optimised(*args, env_options_overrides: dict | None = None, **kwargs):
        return options(*args, env_options_overrides={FUSION_EMITTERS: True} | (env_options_overrides or {}), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if AS_PINNED:
            patch.setattr(compiler, "get_compile_options", optimised)
        jax.clear_caches()  # or what has been compiled in another way would be used
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", before)
        jax.clear_caches()


NO_PART_OF_A_STEP = {
    "dataset",
    "pretrained",
    "checkpoint_every",
    "eval_every",
    "keep",
    "keep_best",
    "end_with_best",
    "cache_gb",
    "cache_dir",
    "cache_side",
}
"""Settings that say where a run starts, what it reads, and when it saves and scores."""


@contextlib.contextmanager
def each_step_once() -> Iterator[None]:
    """Within it, runs of this process that differ in `NO_PART_OF_A_STEP` alone trace their step and first parameters once."""
    make_update, build = experiments.make_update, experiments.build
    updates: dict[str, Callable] = {}
    first: dict[str, Callable] = {}

    def build_once(settings, **options) -> experiments.Experiment:
        experiment = build(settings, **options)
        vars(experiment)["init_params"] = first.setdefault(_step_of(experiment), experiment.init_params)
        return experiment

    def make_update_once(experiment: experiments.Experiment) -> Callable:
        key = _step_of(experiment)
        if key not in updates:
            updates[key] = make_update(experiment)
        return updates[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build", build_once)
        patch.setattr(train, "make_update", make_update_once)
        yield


def _step_of(experiment: experiments.Experiment) -> str:
    fields = {f.name: getattr(experiment.settings, f.name) for f in dataclasses.fields(experiment.settings)}
    fields = {name: value for name, value in fields.items() if name not in NO_PART_OF_A_STEP}
    return repr((fields, experiment.origin, experiment.train_source.class_names))


def with_devices(n: int) -> dict[str, str]:
    """The environment of a process with `n` virtual devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def _set(name: str, value: str | float | bool) -> None:
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for processes that tests start
