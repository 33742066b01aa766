"""What is installed from a wheel, elsewhere: it trains by the name of a recipe, as a stranger would type it."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import vit_jax

SOURCE = Path(vit_jax.__file__).parents[1]
FEW_STEPS = (
    "--config.total_steps=2",
    "--config.warmup_steps=1",
    "--config.batch=8",
    "--config.batch_eval=8",
    "--config.pp.test=test[:8]",
    "--config.model.transformer.num_layers=1",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The programs of a fresh environment that holds the wheel, and can import what this one can."""
    folder = tmp_path_factory.mktemp("wheel")
    names = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "vit_jax", "configs")
    for name in names:  # without what earlier builds may have left beside them
        copy = shutil.copytree if (SOURCE / name).is_dir() else shutil.copy
        copy(SOURCE / name, folder / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir=wheels", "."], cwd=folder, check=True)
    venv.create(folder / "env", with_pip=False, symlinks=True)
    (wheel,) = (folder / "wheels").iterdir()
    install = ["--python", str(folder / "env"), "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run([*pip, *install], cwd=folder, check=True)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "env" / "bin"


def run(command: list[str | Path], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_installed_command_trains_predicts_and_starts_the_demo(installed, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "common.py").write_text("raise RuntimeError('a file of a stranger')\n")
    where = run([installed / "python", "-c", "import vit_jax; print(vit_jax.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "small_data " in run([installed / "vit-jax", "recipes"], tmp_path)
    run([installed / "vit-jax", "train", "--workdir=run", "--config=pretrain:micro4,digits", *FEW_STEPS], tmp_path)
    assert (tmp_path / "run" / "model.npz").is_file()
    code = "from vit_jax.tools import demo; demo.run('main', *demo.arguments('pretrain', 'demo', 0), *"
    said = run([installed / "python", "-c", f"{code}{FEW_STEPS!r})"], tmp_path)
    assert "$ python -m vit_jax.main --workdir=demo/pretrain --config=pretrain:micro4,digits_0to4" in said
    lines = [json.loads(line) for line in (tmp_path / "demo" / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
