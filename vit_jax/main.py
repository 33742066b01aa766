"""Command line: python -m vit_jax.main --workdir=DIR --config=FILE[:ARG] [--config.field=value …]

`config.trainer` says what is done: "train" (the default), "evaluate" or "inference_time".
"""

import os
import re
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from vit_jax.errors import UserError, leave_at_once, open_standard_streams, unknown
from vit_jax.run import cluster, runtime
from vit_jax.run.signals import LoaderHangs

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for logs, checkpoints and the trained model.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if several processes train one model.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train one model.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe: FILE or FILE:ARGUMENT.", lock_config=True)


def main(argv: list[str]) -> None:
    """Runs the trainer that the config names."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {' '.join(argv[1:])}: options begin with --")
    for flag, value in (("workdir", _WORKDIR.value), ("config", _CONFIG.value)):
        if value is None:
            raise UserError(f"--{flag} is missing. {__doc__.splitlines()[0]}")
    config = _CONFIG.value
    runtime.set_up(config.get("compilation_cache", runtime.CACHE))
    cluster.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    trainer = config.get("trainer", "train")
    if trainer == "train":
        from vit_jax.train import train_and_evaluate as run
    elif trainer == "evaluate":
        from vit_jax.evaluate import evaluate as run
    elif trainer == "inference_time":
        from vit_jax.inference_time import inference_time as run
    else:
        raise unknown("config.trainer", trainer, ("train", "evaluate", "inference_time"))
    run(config, _WORKDIR.value)


def cli() -> None:
    """The console command: errors meant for the user are printed without a traceback, exit code 2."""
    open_standard_streams()
    sys.path.append(os.getcwd())  # as `python -m` has it, so that recipes find each other from the installed command too
    try:
        app.run(main, flags_parser=parse)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        _leave(2)
    except LoaderHangs as e:
        leave_at_once(e.code)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _leave(1)
    except KeyboardInterrupt:
        leave_at_once(130)


def _leave(code: int) -> None:
    """Of several processes one that fails must not wait at its exit for the others, which wait for it."""
    if jax.distributed.is_initialized():
        leave_at_once(code)
    sys.exit(code)


def parse(argv: list[str]) -> list[str]:
    """Parses the flags and loads the recipe; what absl and ml_collections object to becomes a UserError."""
    recipe = _recipe(argv)
    if recipe is not None and not os.path.isfile(path := recipe.partition(":")[0]):
        raise UserError(f"--config={path}: no such file. It names a recipe such as configs/vit.py, from where you are")
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError):  # an override of a field that does not exist, or a fault of the recipe
        config = flags.FLAGS["config"].parser.parse(recipe)
        raise _unknown_field(argv, config) from None
    except (flags.Error, ImportError, SyntaxError, TypeError, ValueError) as e:
        raise UserError(_last_words(str(e))) from e
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # Orbax and JAX tell much at absl's own default
    return rest


def _recipe(argv: list[str]) -> str | None:
    """The value of --config."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.fullmatch(r"--?config(=(.*))?", arg):
            return match[2] if match[1] else following
    return None


def _unknown_field(argv: list[str], config: ConfigDict) -> UserError:
    """The error for the first --config.field of `argv` that `config` has not."""
    for arg in argv:
        node, path = config, "config"
        for name in re.sub(r"^--?(no)?config\.|[=\[].*", "", arg).split(".") if "config." in arg else ():
            if not isinstance(node, ConfigDict):
                return UserError(f"{arg}: {path} is {node!r} and has no fields")
            if name not in node:
                return unknown(f"field of {path}", name, node)
            node, path = node[name], f"{path}.{name}"
    raise AssertionError(f"every field of {argv} exists")


def _last_words(text: str) -> str:
    """What to show of another library's message: all but the traceback that it may hold and its list of types."""
    head, found, message = text.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
    if found:  # the recipe's own words
        return message.strip()
    if match := re.search(r"TypeError: (get_config\(\) .*)", text):
        return f"{text.partition(': ')[0]}: {match[1]}; after the ':' stands the recipe's argument"
    return text.partition("Currently supported types")[0].strip()


if __name__ == "__main__":
    cli()
