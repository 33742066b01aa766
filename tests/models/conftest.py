"""Models are compared with others as they are compiled for users."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def optimised() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()  # or what another module has compiled in its way would be used
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
