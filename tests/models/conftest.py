"""Models are compared with others as they are compiled for users."""

from collections.abc import Iterator

import pytest

from tests import compiling


@pytest.fixture(scope="module", autouse=True)
def optimised() -> Iterator[None]:
    with compiling.as_for_users():
        yield
