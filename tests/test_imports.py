"""The structure of the house: imports run one way, and nothing below knows what stands above it."""

import ast
import gc
import subprocess
import sys
from pathlib import Path

from vit_jax import errors

PACKAGE = Path(__file__).parents[1] / "vit_jax"

LAYERS = (
    ("errors", "files", "finite", "fields", "options", "arguments", "recipes"),
    ("models",),
    ("data",),
    ("settings",),
    ("checkpoint", "preprocess", "pictures"),
    ("tasks",),
    ("optimize",),
    ("run",),
    ("evaluators",),
    ("predictor",),
    ("report",),
)
"""From the ground up. What is not named here is a command: it may know all of them, and no layer knows it."""
LEAVES = {f"vit_jax.optimize.{name}" for name in ("trainable", "parallel", "sharding")}
"""They know nothing but errors, so that any may use them."""


def modules() -> dict[str, Path]:
    return {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vit_jax"):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                found.add(name if name in known or f"{name}.__init__" in known else node.module)
    return {f"{name}.__init__" if f"{name}.__init__" in known else name for name in found}


def subject(module: str) -> str:
    return module.split(".")[1]


def test_no_module_imports_in_a_circle():
    known = modules()
    edges = {name: imports(path, known) for name, path in known.items()}
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in edges.get(name, ()):
                visit(other)
            done.add(path.pop())

    for name in known:
        visit(name)


def test_imports_point_down():
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    known = modules()
    up = []
    for name, path in known.items():
        if name.endswith(("__main__", "vit_jax.__init__")):
            continue
        for other in imports(path, known) - LEAVES:
            if subject(name) in height and height.get(subject(other), len(LAYERS)) > height[subject(name)]:
                up.append(f"{name} -> {other}")
    assert not up


def test_prediction_does_without_what_training_reads_and_saves_with():
    others = "grain orbax tensorboard tensorstore tensorflow_datasets ml_collections sklearn scipy torch transformers"
    code = f"import sys, vit_jax.predict; print(sorted(set({others.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_what_commands_import_is_never_searched_for_garbage():
    with errors.importing():
        assert not gc.isenabled()
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    assert gc.isenabled() and frozen > 10_000


def test_settings_name_the_rules_that_there_are():
    from vit_jax import settings
    from vit_jax.optimize import sharding

    assert set(settings.MESH_RULES) == set(sharding.RULES)
