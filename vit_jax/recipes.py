"""Recipes: lists them, and finds one by its name.

    python -m vit_jax.recipes
    python -m vit_jax.recipes pretrain

A recipe is a Python file with `get_config(ARGUMENT)`. `--config=NAME:ARGUMENT` takes one of those listed here, and
`--config=FILE.py:ARGUMENT` a file of your own.
"""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from vit_jax.arguments import as_typed, parser
from vit_jax.errors import UserError, command, did_you_mean, near

PACKAGE = "configs"


@dataclass(frozen=True)
class Recipe:
    """A recipe as its file describes it: `arguments` are the forms that it takes, `default` is what stands for none."""

    name: str
    doc: str
    arguments: tuple[str, ...]
    default: str | None

    @property
    def summary(self) -> str:
        """What it does, without the address of its paper."""
        return re.sub(r" *\(https?://\S+\)", "", self.doc.splitlines()[0])


def folder() -> Path:
    """Where our recipes are: inside the installed package, and in a clone beside it."""
    inside, beside = (parent / PACKAGE for parent in Path(__file__).resolve().parents[:2])
    return inside if inside.is_dir() else beside


def recipes() -> Iterator[Recipe]:
    """Our recipes by name. A file there that shows no command line is what recipes share, and none itself."""
    for path in sorted(folder().glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        doc = ast.get_docstring(tree) or ""
        if f"--config={PACKAGE}/{path.name}" in doc:
            get_config = next(x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "get_config")
            defaults = [x.value for x in get_config.args.defaults if isinstance(x, ast.Constant)]
            quoted = dict.fromkeys(re.findall(r"`([^`]+)`", doc)) if get_config.args.args else ()
            forms = tuple(form[1:] for form in quoted if re.fullmatch(r":\S+", form))
            yield Recipe(path.stem, doc, forms, (defaults or [None])[0])


def find(name: str) -> Path:
    """The file of a recipe: a path of one's own, else one of ours by `pretrain`, `pretrain.py` or `configs/pretrain.py`.

    Raises UserError for a name that is neither, with the near ones.
    """
    path = Path(name).expanduser()
    ours = re.fullmatch(rf"(?:{PACKAGE}/)?(\w+)(\.py)?", name)
    own_file = path.is_file() and not (ours and not ours[2] and (folder() / f"{name}.py").is_file())
    if own_file:
        return path
    if ours and (folder() / f"{ours[1]}.py").is_file():
        return folder() / f"{ours[1]}.py"
    hint = "it names a recipe such as pretrain, or a Python file."
    if name:
        beside = [str(other) for other in path.parent.glob("*.py")] if path.suffix == ".py" or len(path.parts) > 1 else []
        names = near(path.stem, [recipe.name for recipe in recipes()], cutoff=0.6, most=2) + near(
            str(path), beside, cutoff=0.8, most=1
        )
        hint = did_you_mean(list(dict.fromkeys(names))) or hint
    raise UserError(f"--config={name}: no such file or recipe: {hint} (`vit-jax recipes` lists them)")


def load(name: str, argument: str = "") -> Any:
    """The ConfigDict of a recipe, see `find`, as its `get_config(argument)` makes it."""
    path = find(name)
    make_importable(path)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def make_importable(recipe: Path) -> None:
    """Has `from configs import common` find our files, whatever folders of that name lie about.

    A file of one's own in a folder called configs finds those beside it first. What is neither there nor ours is looked
    for in ./configs.
    """
    beside = [recipe.resolve().parent] if recipe.resolve().parent.name == PACKAGE else []
    places = [str(place.resolve()) for place in (*beside, folder(), Path(PACKAGE))]
    if PACKAGE not in sys.modules:
        spec = ModuleSpec(PACKAGE, None, is_package=True)
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE].__path__ = list(dict.fromkeys(places))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line a recipe, or all that is said of one."""
    options = parser(__doc__)
    options.add_argument("name", nargs="?", help="a recipe, of which everything is told")
    name = options.parse_args(argv).name
    table = {recipe.name: recipe for recipe in recipes()}
    if name is None:
        width = max(map(len, table))
        for recipe in table.values():
            print(f"{recipe.name:{width}}  {recipe.summary}")
            print(f"{'':{width}}  --config={recipe.name}{_argument(recipe)}")
        return 0
    if name not in table:
        raise UserError(f"unknown recipe {name!r}: {did_you_mean(near(name, table)) or 'vit-jax recipes lists them'}")
    print(as_typed(re.sub(rf"--config={PACKAGE}/(\w+)\.py", r"--config=\1", table[name].doc)))
    return 0


def _argument(recipe: Recipe) -> str:
    forms = f":{' or :'.join(recipe.arguments)}" if recipe.arguments else ""
    return forms + (f"   (default :{recipe.default})" if recipe.default else "")


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
