"""Vision Transformers in JAX and Flax: train, fine-tune, evaluate and use them.

vit-jax train --workdir=runs/scratch --config=pretrain:micro4,digits
vit-jax predict --model=runs/scratch IMAGE
"""

import importlib
import sys
from collections.abc import Sequence

from vit_jax.arguments import spelled
from vit_jax.errors import command, importing, unknown

COMMANDS = {  # name: (module with a function `cli`, what it does)
    "train": ("vit_jax.main", "train a recipe, or continue what a folder holds"),
    "evaluate": ("vit_jax.evaluate", "score a model on a dataset"),
    "predict": ("vit_jax.predict", "name what is in images"),
    "serve": ("vit_jax.serve.__main__", "show a model as a page on this machine, and answer over HTTP"),
    "zeroshot": ("vit_jax.zeroshot", "name what is in images with any words, by a model of images and texts"),
    "search": ("vit_jax.search", "find the photos that a sentence describes, or that look like an image"),
    "features": ("vit_jax.features", "write the features of images to a file"),
    "attention": ("vit_jax.attention", "draw where a model looks in images"),
    "export": ("vit_jax.export.__main__", "write a model as ONNX or StableHLO, for other programs"),
    "tokenizer": ("vit_jax.tokenizer", "make the vocabulary of a captioner from the sentences of a dataset"),
    "convert": ("vit_jax.convert", "turn a checkpoint into the layout of another library"),
    "inspect": ("vit_jax.tools.inspection", "list what is inside a checkpoint"),
    "plan": ("vit_jax.tools.plan", "tell what memory and time a recipe takes before it is run"),
    "preview": ("vit_jax.tools.preview", "draw what a recipe makes of its training images"),
    "demo": ("vit_jax.tools.demo", "pretrain, fine-tune and predict on handwritten digits, in about two minutes"),
    "recipes": ("vit_jax.recipes", "list the recipes, or tell all about one"),
    "models": ("vit_jax.tools.model_table", "list the models: size, where they run, where to get them"),
    "inference-time": ("vit_jax.inference_time", "measure how many images a second a model classifies"),
}


def cli() -> None:
    """Runs `vit-jax COMMAND …`. Options without a command are those of train."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        command(_print_help if not rest else lambda: _run(rest[0], ["--help"]))
    if name.startswith("-"):
        name, rest = "train", sys.argv[1:]
    command(lambda: _run(name, rest))


def _run(name: str, arguments: Sequence[str]) -> None:
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    sys.argv = [f"vit-jax {name}", *arguments]
    with importing():
        module = importlib.import_module(COMMANDS[name][0])
    module.cli()


def _print_help() -> None:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    about, _, examples = spelled(__doc__).partition("\n\n")
    print(f"usage: vit-jax COMMAND …\n\n{about}\n\nCommands:")
    print("\n".join(lines))
    print(f"\nExamples:\n{examples}\n")
    print("`vit-jax COMMAND --help` tells more. `python -m vit_jax` is the same as `vit-jax`.")
