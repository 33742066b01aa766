"""What an attacker would send, and how to see that a reader refuses it."""

from pathlib import Path

import pytest

from vit_jax.errors import UserError


class Payload:
    """What an attacker would pickle: loading it creates a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def assert_refused(read, path, *parts):
    """`read(path)` is an error that names the path and says all of `parts`."""
    with pytest.raises(UserError) as error:
        read(path)
    for part in (str(path), *parts):
        assert part in str(error.value)
