"""Compilation is most of what these tests take: it is done once for the whole session, and with few optimisations.

tests/models has them all, so that the numbers of the programs that users run are those that are compared.
"""

import os

import jax
import pytest

from vit_jax.run import runtime

runtime.set_xla_flags()  # before any test asks for the devices


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"  # one for all workers
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for processes that tests start
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def full_precision():
    """Products in full float32, for tests that compare with torch."""
    with jax.default_matmul_precision("highest"):
        yield
