"""Commands that take a recipe: `--config=RECIPE[:ARGUMENT]`, and `--config.FIELD=VALUE` for each of its fields."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from vit_jax import recipes
from vit_jax.arguments import program, spelled
from vit_jax.errors import UserError, command
from vit_jax.fields import unknown_field

CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe: NAME[:ARGUMENT] or FILE.py[:ARGUMENT].", lock_config=True)

_HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull")
_ABOUT_CONFIG = """\
  --config=RECIPE[:ARGUMENT]
      what is to be done: a name such as pretrain:micro4,digits (`vit-jax recipes` lists them), or FILE.py[:ARGUMENT]
  --config.FIELD=VALUE
      changes a field of the recipe: --config.base_lr=0.01, --config.pp.crop=32, --config.pp.area=(0.5,1.0)
"""


def run(main: Callable[[], int | None], doc: str, options: Sequence[str]) -> NoReturn:
    """Runs a command of absl's flags and a recipe, and ends the process; `doc` and those `options` are its help."""

    def parse_or_help(argv: list[str]) -> list[str]:
        wanted = [arg for arg in argv if arg not in _HELP]
        if len(wanted) == len(argv):
            return parse(argv)
        print(_help(doc, options, parse_fields(wanted)))
        sys.exit(0)

    sys.path.append(os.getcwd())  # as `python -m` has it, so that recipes find each other from the installed command too
    command(lambda: app.run(lambda _: main(), flags_parser=parse_or_help))


def parse(argv: list[str]) -> list[str]:
    """Parses the flags and loads the recipe; what absl and ml_collections object to becomes a UserError."""
    argv, recipe = _with_path(argv)
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError):  # an override of a field that does not exist, or a fault of the recipe
        config = flags.FLAGS["config"].parser.parse(recipe)
        raise _unknown_field(argv, config) from None
    except flags.UnrecognizedFlagError as e:
        others = "" if "Did you mean" in str(e) else f": `{program()} --help` lists those that there are"
        raise UserError(f"{e}{others}") from e
    except (flags.Error, ImportError, SyntaxError, TypeError, ValueError) as e:
        raise UserError(_last_words(str(e))) from e
    if len(rest) > 1:
        raise UserError(f"unexpected arguments {' '.join(rest[1:])}: options begin with --")
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # Orbax and JAX tell much at absl's own default
    return rest


def parse_fields(argv: list[str]) -> ConfigDict | None:
    """The recipe that a command line names, overridden as it says; None if it names none."""
    if _recipe(argv) is None:
        return None
    parse(argv)
    return CONFIG.value


def _with_path(argv: list[str]) -> tuple[list[str], str | None]:
    """The arguments with the path of the recipe in place of its name, and `PATH[:ARGUMENT]`, None if none is named."""
    named = _recipe(argv)
    if named is None:
        return argv, None
    name, colon, argument = named.partition(":")
    path = recipes.find(name)
    recipes.make_importable(path)
    recipe = f"{path}{colon}{argument}"
    i = next(i for i, arg in enumerate(argv) if re.fullmatch(r"--?config(=.*)?", arg, re.DOTALL))
    return [*argv[:i], f"--config={recipe}", *argv[i + (1 if "=" in argv[i] else 2) :]], recipe


def _recipe(argv: list[str]) -> str | None:
    """The value of --config."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        if match := re.fullmatch(r"--?config(=(.*))?", arg, re.DOTALL):
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
                return unknown_field(path, name, node)
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


def _help(doc: str, options: Sequence[str], config: ConfigDict | None) -> str:
    lines = [spelled(doc), "", "Options:"]
    for name in options:
        flag = flags.FLAGS[name]
        default = "" if flag.default in (None, "") else f" (default {flag.default})"
        lines += [f"  --{name}={name.upper()}", f"      {flag.help}{default}"]
    lines += [_ABOUT_CONFIG.rstrip()]
    if config is None:
        return "\n".join([*lines, "", "With a recipe, --help lists its fields and their values."])
    return "\n".join([*lines, "", "Fields of this recipe:", *(f"  --config.{name}={value}" for name, value in _fields(config))])


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
