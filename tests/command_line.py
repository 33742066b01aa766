"""The command line within the test's own process: starting another one costs seconds each."""

import contextlib
import gc
import sys
from collections.abc import Iterator
from unittest import mock

from absl import flags
from absl.testing import flagsaver

from vit_jax import main, overrides


@contextlib.contextmanager
def arguments(*args: str) -> Iterator[None]:
    """Makes `args` the arguments of this process, and its flags new ones."""
    saved = flagsaver.save_flag_values()
    flags.FLAGS.unparse_flags()
    try:
        with mock.patch.object(sys, "argv", ["vit-jax", *args]), mock.patch.object(sys, "path", list(sys.path)):
            yield
    finally:
        flagsaver.restore_flag_values(saved)
        gc.unfreeze()  # a command takes all that there is for its own, until its process ends


def parse(*args: str):
    """The config that the command line makes of a recipe and its overrides."""
    with arguments(*args):
        overrides.parse(sys.argv)
        return overrides.CONFIG.value


def run(*args: str) -> int:
    """Runs the console command and returns its exit code."""
    with arguments(*args):
        try:
            main.cli()
        except SystemExit as stop:
            return stop.code or 0
    return 0
