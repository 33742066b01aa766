"""Compilation is most of what these tests take: it is done once for the whole session, and with few optimisations.

Comparisons with other libraries' models have them all, so that the numbers that are compared are those of users' programs.
"""

import gc
import os
import signal
from collections.abc import Iterator

import jax
import pytest

from tests import compiling
from vit_jax.run import runtime

compiling.quickly()
runtime.set_xla_flags()  # before any test asks for the devices
for number in (signal.SIGINT, signal.SIGHUP):  # nohup, and a shell that starts tests in the background, have them ignored
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# Files that take longest, in that order: one at the end would have a worker to itself while the others wait.
FIRST = ("test_recipes", "optimize/test_parallel", "test_docs", "tasks/test_contract", "models/test_decoder", "test_train")
FIRST += ("tools/test_plan", "run/test_kill", "models/test_detr", "test_fit_head", "tasks/test_start_of_towers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"tests/{name}.py": i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


def pytest_collection_finish() -> None:
    """What is imported stays: looking through it again and again for garbage takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    compiling.once((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")  # one for all workers


@pytest.fixture(scope="module")
def full_precision():
    """Products in full float32, for tests that compare with torch."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def each_step_once() -> Iterator[None]:
    """For tests of runs that are repeated, cut off and continued."""
    with compiling.each_step_once():
        yield
