"""Command line: python -m vit_jax.main --workdir=DIR --config=FILE[:ARG] [--config.field=value …]

`config.trainer` says what is done: "train" (the default), "evaluate" or "inference_time".
"""

import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from vit_jax.errors import UserError, unknown

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for logs, checkpoints and the trained model.")
_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe: FILE or FILE:ARGUMENT.", lock_config=True)


def main(argv: list[str]) -> None:
    """Runs the trainer that the config names."""
    if len(argv) > 1:
        raise UserError(f"unexpected arguments {' '.join(argv[1:])}: options begin with --")
    for flag, value in (("workdir", _WORKDIR.value), ("config", _CONFIG.value)):
        if value is None:
            raise UserError(f"--{flag} is missing. {__doc__}")
    config = _CONFIG.value
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
    try:
        app.run(main, flags_parser=_parse)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags and loads the recipe; what absl and ml_collections object to becomes a UserError."""
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS["verbosity"].using_default_value:
            flags.FLAGS.verbosity = logging.WARNING  # Orbax and JAX tell much at absl's own default
        if _CONFIG.value is not None:
            _CONFIG.value.lock()
        return rest
    except (AttributeError, KeyError) as e:  # ml_collections' words for an override of a field that does not exist
        text = str(e).strip("\"'")
        name = re.match(r"\w*", text)[0]
        flag = next((arg for arg in argv if re.match(rf"--config[\w.]*\.{name}\b", arg)), name)
        near = re.search(r'Did you mean \\?"(\w+)', text)
        hint = f"did you mean {near[1]}?" if near else "configs/common.py and vit_jax/settings.py list the fields"
        raise UserError(f"{flag}: the config has no such field; {hint}") from e
    except (flags.Error, SyntaxError, ImportError, TypeError, ValueError, OSError) as e:
        raise UserError(_last_words(str(e))) from e


def _last_words(text: str) -> str:
    """Of a recipe's own UserError, which arrives inside a printed traceback, its message; any other text as it is."""
    head, found, message = text.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
    return message.strip() if found else text.strip()


if __name__ == "__main__":
    cli()
