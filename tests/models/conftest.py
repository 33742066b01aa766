"""Models are compared with those of others as they are compiled for users, where a test asks for it."""

from collections.abc import Iterator

import pytest

from tests import compiling


@pytest.fixture
def optimised() -> Iterator[None]:
    with compiling.as_for_users():
        yield


@pytest.fixture(scope="module")
def all_optimised() -> Iterator[None]:
    """The same for all tests of a file: to come and go costs what has been compiled."""
    with compiling.as_for_users():
        yield
