"""The one command `vit-jax`: every command explains itself and does nothing else, and ends well whatever reads its output."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common
from tests.command_line import arguments
from vit_jax import cli, recipes
from vit_jax.models import zoo
from vit_jax.tools import model_table

ROOT = Path(cli.__file__).parent.parent
COMMAND = [sys.executable, "-m", "vit_jax"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def vit_jax(*args: str) -> int:
    """The exit code of `vit-jax ARGS`, in this process."""
    with arguments(*args):
        with pytest.raises(SystemExit) as stop:
            cli.cli()
    return stop.value.code or 0


def shell(text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """What `text` does in bash, where $VIT_JAX is the command; the exit code is that of the first in a pipe."""
    script = f"{text}; exit ${{PIPESTATUS[0]}}"
    environment = ENVIRONMENT | {"VIT_JAX": " ".join(COMMAND)} | environment
    return subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_help_lists_every_command_without_importing_jax(tmp_path):
    code = "import sys; from vit_jax.cli import cli; sys.argv = ['vit-jax', *sys.argv[1:]]\n"
    code += "try: cli()\nfinally: print('jax' in sys.modules, 'flax' in sys.modules, 'numpy' in sys.modules)"
    for args in ([], ["--help"], ["recipes"]):
        done = subprocess.run([sys.executable, "-c", code, *args], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout.endswith("False False False\n")
        names = cli.COMMANDS if args != ["recipes"] else [recipe.name for recipe in recipes.recipes()]
        assert all(f"{name} " in done.stdout for name in names)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_and_does_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vit_jax(name, "--help") == 0
    text = capsys.readouterr().out
    assert text.count(f"\n    vit-jax {name}") >= 2, text
    assert "python -m" not in text
    if name in ("train", "evaluate", "plan", "preview", "inference-time"):
        assert "--config=RECIPE[:ARGUMENT]" in text and "--config.FIELD=VALUE" in text
    assert not any(tmp_path.iterdir())


def test_a_recipe_that_takes_an_argument_says_in_which_forms():
    for recipe in recipes.recipes():
        assert recipe.arguments or recipe.default is None, recipe.name
        assert all(re.fullmatch(r"[\w,]+", form) for form in recipe.arguments), recipe.arguments


def test_a_recipe_is_told_in_the_words_that_were_typed(capsys):
    assert vit_jax("recipes", "photos") == 0
    text = capsys.readouterr().out
    assert "\n    vit-jax train --workdir=runs/photos --config=photos:path/to/photos,quick" in text
    assert "python -m" not in text


def test_help_of_a_recipe_lists_its_fields(capsys):
    assert vit_jax("train", "--config=pretrain:micro4,digits", "--config.batch=8", "--help") == 0
    text = capsys.readouterr().out
    assert "\n  --config.batch=8\n" in text and "\n  --config.model.patches.size=(4, 4)\n" in text
    assert "\n  --config.base_lr=0.003\n" in text


def test_evaluate_is_training_with_another_trainer_unless_told_otherwise(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("vit_jax.evaluate.evaluate", lambda config, workdir: calls.append((config.trainer, workdir)))
    monkeypatch.setattr("vit_jax.train.train_and_evaluate", lambda config, workdir: calls.append((config.trainer, workdir)))
    recipe = "--config=pretrain:testing,digits"
    assert vit_jax("evaluate", "--workdir=a", recipe) == 0
    assert vit_jax("train", "--workdir=b", recipe) == 0
    assert vit_jax("--workdir=c", recipe) == 0
    assert calls == [("evaluate", "a"), ("train", "b"), ("train", "c")]


def test_an_unknown_command_names_the_near_ones(capsys):
    assert vit_jax("trian", "--workdir=a") == 2
    assert capsys.readouterr().err == "error: unknown command 'trian': did you mean train?\n"


UNBUFFERED = pytest.mark.parametrize("unbuffered", ["", "1"])


@UNBUFFERED
@pytest.mark.parametrize("command", ["recipes", "--help", "train --help"])
def test_output_that_nobody_reads_ends_quietly(command, unbuffered, tmp_path):
    done = shell(f"$VIT_JAX {command} | sleep 0", tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stderr) == (141, "")


@UNBUFFERED
def test_a_full_disk_is_an_error_and_a_closed_output_none(unbuffered, tmp_path):
    full = shell("$VIT_JAX recipes > /dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert full.returncode == 2
    assert full.stderr == "error: the standard output cannot be written: No space left on device\n"
    closed = shell("$VIT_JAX recipes >&-", tmp_path)
    assert (closed.returncode, closed.stderr) == (0, "")
    both = shell("$VIT_JAX recipe >&- 2>&-", tmp_path)
    assert both.returncode == 2
    of_file = shell(f"{sys.executable} -c \"from vit_jax import errors; errors.command(lambda: open('no/x'))\"", tmp_path)
    assert (of_file.returncode, of_file.stderr) == (2, "error: no/x cannot be read or written: No such file or directory\n")


def test_a_terminal_that_knows_ascii_alone_shows_escapes(tmp_path):
    ascii_only = {"LC_ALL": "C", "TERM": "dumb", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = shell("$VIT_JAX --help", tmp_path, **ascii_only)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: vit-jax COMMAND \\u2026" in done.stdout


def test_the_table_of_models_counts_without_building_deep_ones(capsys):
    assert vit_jax("models", "l_16") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(lines) == {"ViT-L_16", "Mixer-L_16"}
    assert lines["ViT-L_16"].split()[1:5] == ["304,326,632", "1,217.3", "224", "GPU"]
    assert lines["Mixer-L_16"].split()[1] == "208,196,168" and model_table.parameters("R50+ViT-L_32") == 328_994_856
    assert "gs://vit_models/augreg/L_16-i21k-300ep" in lines["ViT-L_16"]
    assert [model_table.runs_on(name) for name in ("ViT-S_16", "ViT-B_16", "ViT-H_14", "R50+ViT-B_16")] == [
        *("laptop", "GPU", "pod", "GPU")
    ]
    for name in zoo.AUGREG:
        address, size = zoo.published_file(name)
        assert zoo.published_file(zoo.augreg_to_model_name(name)) == (address, size)
        assert address.startswith(f"gs://vit_models/augreg/{name}-i21k-")
    for name in ("Ti_16", "R26_S_32"):
        size, count = zoo.published_file(name)[1], model_table.parameters(zoo.augreg_to_model_name(name))
        width = zoo.VIT[zoo.augreg_to_model_name(name)]["hidden_size"]
        assert size == pytest.approx(4 * (count + (21_843 - 1_000) * (width + 1)) / 2**20, abs=3), name  # another head


# Words


def test_a_model_that_is_not_there_is_said_to_be_so_and_where_published_ones_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    for name, words in (
        ("nope", "no such checkpoint: nope (there is no such file or folder). Name a file, the workdir of a run, or hf://"),
        ("ViT-B_16", "A published file of this model is gs://vit_models/augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1"),
        ("Ti_16", "wd_0.03-do_0.0-sd_0.0.npz (37 MiB)"),
    ):
        assert vit_jax("predict", f"--model={name}", "a.png") == 2
        assert words in capsys.readouterr().err


def test_an_option_of_another_command_tells_where_those_of_this_one_are(capsys):
    assert vit_jax("evaluate", "--model=runs/a") == 2
    assert "flag 'model': `vit-jax evaluate --help` lists those that there are" in capsys.readouterr().err


def test_a_mistyped_folder_is_suggested(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert vit_jax("train", "--workdir=a", "--config=small_data:micro4,photo", "--config.tfds_data_dir=tfds") == 2
    assert "photo is no folder here" in (error := capsys.readouterr().err) and "did you mean the folder photos" in error


def test_photos_without_a_model_to_start_from_tells_which_there_are(tmp_path, capsys):
    assert vit_jax("train", f"--workdir={tmp_path / 'run'}", f"--config=photos:{tmp_path}") == 2
    error = capsys.readouterr().err
    assert "--config.pretrained=gs://vit_models/augreg/Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03" in error
    assert "(37 MiB, for a laptop)" in error and f"--config=small_data:micro4,{tmp_path}\n" in error


def test_a_dataset_is_suggested_only_where_it_is_near(tmp_path, capsys):
    for name, words in (("nothing", "tfds.list_builders() lists"), ("cifar1", "cifar10"), ("flowers102", "oxford_flowers102")):
        folders = f"--config.tfds_data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"
        assert vit_jax("train", f"--config=pretrain:micro4,{name}", *folders) == 2
        error = capsys.readouterr().err
        assert words in error and "segment_anything" not in error


# Recipes


def test_a_recipe_is_found_by_its_name_wherever_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = Path(common.__file__).resolve().parent / "pretrain.py"
    (tmp_path / "pretrain").mkdir()
    for name in ("pretrain", "pretrain.py", "configs/pretrain.py"):
        assert recipes.find(name).resolve() == ours
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "pretrain.py"
    own.write_text("")
    assert recipes.find("configs/pretrain.py").resolve() == own and recipes.find("pretrain").resolve() == ours


def test_a_folder_called_configs_neither_breaks_ours_nor_is_hidden_by_them(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    (tmp_path / "configs" / "common.py").write_text("NAME = 'tasting'\n")
    head, body = "import ml_collections\nfrom configs import", "def get_config():\n    return ml_collections.ConfigDict"
    (tmp_path / "configs" / "mine.py").write_text(
        f"{head} common, models\n\n{body}({{'trainer': common.NAME + models.SHORT_NAMES['b16']}})\n"
    )
    (tmp_path / "elsewhere.py").write_text(f"{head} common\n\n{body}({{'trainer': str(common.SIZES['imagenet2012'])}})\n")
    main = [sys.executable, "-m", "vit_jax.main"]
    for command, recipe, message in (
        (COMMAND, "pretrain:tasting", "unknown model 'tasting': did you mean testing"),
        (COMMAND, "configs/mine.py", "unknown config.trainer 'tastingViT-B_16'"),
        (main, "configs/mine.py", "unknown config.trainer 'tastingViT-B_16'"),
        (main, "elsewhere.py", "unknown config.trainer \"{'train': 1281167}\""),
    ):
        args = [*command, "--workdir=here", f"--config={recipe}"]
        done = subprocess.run(args, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.stderr.startswith(f"error: {message}"), done.stderr
