"""Trains a recipe, or continues what the workdir holds.

    python -m vit_jax.main --workdir=runs/scratch --config=pretrain:micro4,digits
    python -m vit_jax.main --workdir=runs/photos --config=photos:PHOTOS --config.pretrained=SOURCE --config.total_steps=500

`config.trainer` says what is done: "train" (the default), "evaluate" or "inference_time".
"""

import importlib
import sys
import traceback

from absl import flags

from vit_jax import overrides
from vit_jax.arguments import as_typed
from vit_jax.errors import UserError, importing, leave_at_once, say, unknown
from vit_jax.files import COMPILED_PROGRAMS

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for logs, checkpoints and the trained model.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if several processes train one model.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train one model.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")

OPTIONS = ("workdir", "coordinator", "num_processes", "process_id")
TRAINERS = {
    "train": ("vit_jax.train", "train_and_evaluate"),
    "evaluate": ("vit_jax.evaluate", "evaluate"),
    "inference_time": ("vit_jax.inference_time", "inference_time"),
}


def main() -> None:
    """Runs the trainer that the config names."""
    config = overrides.CONFIG.value
    for flag, value in (("workdir", _WORKDIR.value), ("config", config)):
        if value is None:
            usage = "python -m vit_jax.main --workdir=DIR --config=FILE[:ARG] [--config.field=value …]"
            raise UserError(f"--{flag} is missing. Command line: {as_typed(usage)}")
    trainer = config.get("trainer", "train")
    if trainer not in TRAINERS:
        raise unknown("config.trainer", trainer, TRAINERS)
    with importing():
        from vit_jax.run import cluster, load_ahead, runtime, signals  # they import JAX, which --help does without

    kept = runtime.set_up(config.get("compilation_cache", COMPILED_PROGRAMS))
    cluster.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    load_ahead.start(kept, config.to_json_best_effort())
    module, name = TRAINERS[trainer]
    with importing():
        run = getattr(importlib.import_module(module), name)
    try:
        run(config, _WORKDIR.value)
    except UserError as e:
        if not cluster.joined():
            raise
        say(f"error: {e}", sys.stderr)
        leave_at_once(2)  # of several processes one that fails must not wait at its exit for the others, which wait for it
    except signals.LoaderHangs as e:
        leave_at_once(e.code)
    except Exception:
        if not cluster.joined():
            raise
        traceback.print_exc()
        leave_at_once(1)


def cli(doc: str = __doc__, preset: str = "") -> None:
    """The console command; `preset` is an option that is added where it is not given."""
    given = [arg.partition("=")[0].replace("--", "-") for arg in sys.argv]
    if preset and preset.partition("=")[0].replace("--", "-") not in given:
        sys.argv.insert(1 if preset.startswith("--config=") else len(sys.argv), preset)  # a recipe before its fields
    overrides.run(main, doc, OPTIONS)


if __name__ == "__main__":
    cli()
