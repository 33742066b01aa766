"""README and docs say what is: their blocks run, on small stand-ins for photos and checkpoints, and what they name exists.

A ```bash or ```python block is run; a ```sh block needs the network, a GPU or hours, and a ```text block is no command. The
commands of a page run in order in one folder. A Python block that begins with the path of a file stands for that module.
"""

import ast
import dataclasses
import inspect
import re
import shlex
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import inference_time
from tests import tiny, towers
from tests.command_line import arguments
from vit_jax import cli, evaluators, recipes, settings, tasks
from vit_jax.checkpoint import hub
from vit_jax.tasks import contrast, mask_loss
from vit_jax.tools import plan, preview  # noqa: F401  their flags are to stay
from vit_jax.train import train_and_evaluate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DATA = (
    "batch=4",
    "batch_eval=8",
    "accum_steps=1",
    "total_steps=1",
    "warmup_steps=0",
    "prefetch=1",
    "pp.crop=8",
    "report=False",
)
MODEL = ("model.hidden_size=16", *(f"model.transformer.{field}" for field in ("num_layers=1", "mlp_dim=16", "num_heads=2")))
TOWERS = (*(field.replace("model.", "model.image.", 1) for field in MODEL), "model.out_dim=(None,16)")
DECODER = tuple(f"model.decoder.{field}" for field in ("width=16", "num_layers=1", "mlp_dim=16", "num_heads=2"))
HEADS = tuple(f"task.{field}" for field in ("prototypes=16", "hidden=16", "bottleneck=8", "local_crops=1"))
HEADS += ("task.jitter_prob=0.0", "task.blur=(0.0,0.0,0.0)")  # they take seconds to compile
SEGMENTER = tuple(field.replace("model.", "model.body.vit.", 1) for field in MODEL)
DIGITS = ("pp.train=train[:60]", "pp.test=test[:20]")

pytestmark = pytest.mark.usefixtures("each_step_once")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder with photos, and two tiny models: `published` stands for those at addresses, `runs/words` knows texts."""
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    names = ["cat.jpg", "dog.png", "digit.png", "new_photo.jpg", "more_photos/1.jpg"]
    names += [f"photos/{kind}/{i}.png" for kind in ("beach", "forest") for i in range(8)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(folder / name)
    config = tiny.config(total_steps=1, eval_every=1, dataset=str(folder / "photos"), pp_train="train", pp_test="test")
    train_and_evaluate(config, folder / "published")
    towers.write(folder / "runs" / "words")
    return folder


@pytest.fixture
def workplace(stand_ins, tmp_path, monkeypatch):
    """A copy to work in, where every address leads to the stand-in, and plans are made for the devices that are here."""
    shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "published", tmp_path / "runs" / "finished")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_fetch_repository", lambda rest, online: tmp_path / "published")
    monkeypatch.setattr(hub, "_download", lambda url, target: _put(tmp_path / "published" / "model.npz", target))
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "use_devices", lambda n: None)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, workplace, monkeypatch, capsys):
    names = {}
    if page.stem == "export":
        pytest.importorskip("jax2onnx")
    for kind, text in BLOCK.findall(page.read_text()):
        assert kind in ("bash", "python", "sh", "text"), kind
        if kind == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                assert run(line) == 0, (line, capsys.readouterr())
        elif kind == "python" and (match := re.match(r"# vit_jax/(tasks|evaluators)/(\w+)\.py\n", text)):
            module = types.ModuleType(match[2])
            exec(compile(text, page.name, "exec"), vars(module))
            monkeypatch.setitem({"tasks": tasks, "evaluators": evaluators}[match[1]].TYPES, match[2], module)
        elif kind == "python":
            exec(compile(shrunk(text), page.name, "exec"), names)


def run(line: str) -> int:
    """The exit code of a `vit-jax` line, with few steps of a small model where it trains."""
    command, name, *rest = shlex.split(line)
    assert command == "vit-jax", line
    named = {arg.partition("=")[0]: arg.partition("=")[2] for arg in rest}
    given = named.get("--config", "")
    if name in ("train", "evaluate", "plan", "preview"):
        more = [*DATA, *(MODEL if "micro4" in given else ())]
        more += DIGITS if "digit" in given else ()
        more += TOWERS if given.startswith("lit:digits") else ()
        more += DECODER if given.startswith("mae") else HEADS if given.startswith("dinov2") else ()
        more += (*SEGMENTER, *DIGITS) if given.startswith("segment") else ()
        added = [f"--config.{field}" for field in more]
        rest += [option for option in added if option.partition("=")[0] not in named]
    with arguments(name, *rest), pytest.raises(SystemExit) as stop:
        cli.cli()
    return stop.value.code or 0


def shrunk(text: str) -> str:
    """A block that trains, with a small model and little data."""
    small = "config.batch = config.batch_eval = 4; config.pp.update({'train': 'train[:60]', 'test': 'test[:20]', 'crop': 8}); "
    small += "config.model.hidden_size = 16; config.model.transformer.update({'num_layers': 1, 'mlp_dim': 16, 'num_heads': 2})"
    text = re.sub(r"(fine_tune\(.*)\)$", r"\1, batch=4, batch_eval=4, pp={'crop': 8})", text, flags=re.MULTILINE)
    return re.sub(r"^(?=.*train_and_evaluate\(config)", small + "\n", text, flags=re.MULTILINE)


def test_the_readme_fits_into_a_few_screens_and_its_picture_is_light():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    for page in PAGES[1:]:
        body = re.sub(r"\[[^]]*\]\([^)]*\)|^\|.*$", "", page.read_text(), flags=re.MULTILINE)
        assert max(map(len, body.splitlines())) <= 140, page.name
    assert (ROOT / "docs" / "demo.png").stat().st_size < 200_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:vit_jax|configs|tests|benchmarks)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"vit-jax ([a-z][a-z-]+)", text):
        assert command in cli.COMMANDS, command
    for field in re.findall(r"(?<!preprocessor_)\bconfig\.(?!json|model\b)([a-z]\w*(?:\.[a-z]\w*)*)", text):
        assert field in known_fields() | {"FIELD", "update", *inference_time.get_config()}, field
    for name in re.findall(r"--config=(\w+)", text):
        assert name in {recipe.name for recipe in recipes.recipes()} | {"configs", "mine", "FILE", "RECIPE", "NAME"}, name


def known_fields() -> set[str]:
    """Dotted names of all fields of a recipe."""
    default, names = settings.Settings(), {f"pretrained.{tower}" for tower in contrast.TOWERS}
    names |= {f"task.{option}" for task in tasks.TYPES.values() for option in inspect.signature(task.make_task).parameters}
    names |= {f"task.matching.{name}" for name in mask_loss.Matching.__dataclass_fields__}
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        nested = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        names |= {field.name, *(f"{field.name}.{inner.name}" for inner in nested)}
    return names


def test_every_command_recipe_and_evaluator_is_told_of():
    index, table, scores = ((ROOT / "docs" / name).read_text() for name in ("index.md", "recipes.md", "evaluate.md"))
    assert [name for name in cli.COMMANDS if f"`vit-jax {name}`" not in index] == []
    assert [recipe.name for recipe in recipes.recipes() if not re.search(rf"`{recipe.name}[:`]", table)] == []
    assert [name for name in evaluators.TYPES if f"`{name}`" not in scores] == []


def test_every_message_that_is_explained_can_appear():
    texts = [text for path in (ROOT / "vit_jax").rglob("*.py") for text in messages(ast.parse(path.read_text()))]
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    parts = [part.strip() for row in rows for part in row.split("…") if part.strip()]
    assert len(rows) > 30
    assert [part for part in parts if not any(part in text for text in texts)] == []


def messages(tree: ast.AST) -> list[str]:
    """All texts of a module; what is put into a text stands as …"""
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return texts


def _put(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, target)
