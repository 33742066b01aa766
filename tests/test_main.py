"""The command line: overrides arrive, a mistake is one line without traceback and exit code 2, speed is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import inference_time as recipe
from tests.command_line import parse, run
from vit_jax import evaluate, train
from vit_jax.errors import UserError
from vit_jax.inference_time import inference_time

CONFIGS = Path(recipe.__file__).parent
VIT = f"--config={CONFIGS / 'vit.py'}:testing,digits"
SPEED = f"--config={CONFIGS / 'inference_time.py'}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([VIT, "--config.base_lrr=1"], "unknown field of config 'base_lrr': did you mean base_lr?"),
        ([VIT, "--config.pp.cropp=1"], "unknown field of config.pp 'cropp': did you mean crop or crop_width or crop_method?"),
        (
            [VIT, "--config.batch=8", "--config.model.transformer.dropout=0.1"],
            "unknown field of config.model.transformer 'dropout': did you mean dropout_rate",
        ),
        ([VIT, "--config.modle.hidden_size=4"], "unknown field of config 'modle': did you mean model"),
        ([VIT, "--config.batch.size=4"], "--config.batch.size=4: config.batch is 64 and has no fields"),
        ([VIT, "--config.lr=1"], "unknown field of config 'lr': did you mean base_lr?"),
        (
            [VIT, "--config.Epochs=3"],
            "unknown field of config 'Epochs': did you mean total_steps? It counts steps: an epoch is",
        ),
        ([VIT, "--config.img_size=32"], "unknown field of config 'img_size': did you mean pp.crop?"),
        ([VIT, "--config.pp.img_size=32"], "unknown field of config.pp 'img_size': did you mean crop?"),
        (
            [VIT, "--config.model.transformer.drop_path=1"],
            "unknown field of config.model.transformer 'drop_path': did you mean st",
        ),
        ([VIT, "--config.seed", "1", "--config.bach", "8"], "unknown field of config 'bach': did you mean batch"),
        ([VIT, "--noconfig.pp.flop"], "unknown field of config.pp 'flop': did you mean flip"),
        ([VIT, "--config.batch=many"], "flag --config.batch=many: invalid literal for int() with base 10: 'many'"),
        ([VIT, "--config.total_steps=1.5"], "flag --config.total_steps=1.5: invalid literal"),
        ([VIT, "--config.model.resnet=(3,4)"], "Type <class 'NoneType'> of field config.model.resnet is not supported"),
        ([VIT.replace("testing", "tasting")], "unknown model 'tasting': did you mean testing"),
        ([f"--config={CONFIGS / 'nowhere.py'}:b16"], f"--config={CONFIGS / 'nowhere.py'}: no such file"),
        (["--config", str(CONFIGS)], f"--config={CONFIGS}: no such file"),
        (["--config="], "--config=: no such file"),
        (["--config=pretain:micro4"], "--config=pretain: no such file or recipe: did you mean pretrain"),
        (["--config", "configs/fit.py:b16"], "--config=configs/fit.py: no such file or recipe: did you mean vit"),
        (
            [f"--config={CONFIGS}/transfr.py"],
            f"--config={CONFIGS}/transfr.py: no such file or recipe: did you mean transfer or {CONFIGS}",
        ),
        ([f"{SPEED}:b16"], f"flag {SPEED}:b16: get_config() takes 0 positional arguments but 1 was given"),
        ([], "--config is missing. Command line: vit-jax train --workdir=DIR --config=FILE"),
        ([VIT, "--config.trainer=trian"], "unknown config.trainer 'trian': did you mean train"),
        ([VIT, "evaluate"], "unexpected arguments evaluate: options begin with --"),
        ([VIT, "--wrokdir=a"], "Unknown command line flag 'wrokdir'. Did you mean: workdir"),
        ([SPEED, "--config.model_name=ViT-B_61"], "unknown model 'ViT-B_61': did you mean ViT-B_16"),
        ([SPEED, "--config.model_name=Mixer-B_16", "--config.tome=4"], "tome=4 does not go with a MlpMixer"),
        ([VIT, "--config.tome=4"], "config.tome=4 is for trained models: it needs --config.trainer=evaluate"),
        ([SPEED, "--config.batch=0"], "batch=0 must be a multiple of the"),
        ([VIT, "--config.optim_dtype=float3"], "unknown config.optim_dtype 'float3': did you mean float32"),
        ([VIT, "--config.dataset="], "config.dataset is not set"),
    ],
    ids=lambda value: value.replace(str(CONFIGS), "")[:40] if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(args, message, tmp_path, capsys):
    assert run(f"--workdir={tmp_path / 'run'}", *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message)
    assert error.count("\n") == 1 and error.endswith("\n")
    assert not (tmp_path / "run").exists()


def test_a_missing_workdir_is_one_line_and_exit_code_2(capsys):
    assert run(VIT) == 2
    assert capsys.readouterr().err.startswith("error: --workdir is missing. Command line: vit-jax train")


def test_a_process_of_its_own_shows_no_traceback_either(tmp_path):
    command = [sys.executable, "-m", "vit_jax.main", f"--workdir={tmp_path}", VIT, "--config.zzz=3"]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown field of config 'zzz': use one of accum_steps, augment, bad_images, ")
    assert done.stderr.count("\n") == 1


def test_a_fault_of_the_recipe_keeps_its_traceback(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("def get_config():\n    return {}['base_lr']\n")
    with pytest.raises(KeyError, match="base_lr"):
        run(f"--workdir={tmp_path}", f"--config={path}", "--config.base_lr=1")


def test_overrides_arrive_with_their_types():
    config = parse(
        *(VIT, "--config.batch=8", "--config.total_steps=7", "--config.pp.crop=32", "--config.pp.flip=true"),
        *("--config.pp.area=(0.5,1.0)", "--config.model.patches.size=(8,8)", "--config.model.representation_size=12"),
        *("--config.pretrained=model.npz", "--config.pp.resize=40", "--config.grad_norm_clip=0"),
    )
    assert (config.batch, config.total_steps, config.pretrained, config.grad_norm_clip) == (8, 7, "model.npz", 0.0)
    assert (config.pp.crop, config.pp.flip, config.pp.area, config.pp.resize) == (32, True, (0.5, 1.0), 40)
    assert (config.model.patches.size, config.model.representation_size) == ((8, 8), 12)


def test_pretraining_can_be_given_a_folder_to_start_from():
    assert parse(f"--config={CONFIGS / 'pretrain.py'}", "--config.pretrained_dir=files").pretrained_dir == "files"


@pytest.mark.parametrize(
    ("trainer", "module", "name"), [("train", train, "train_and_evaluate"), ("evaluate", evaluate, "evaluate")]
)
def test_the_trainer_gets_the_config_and_the_workdir(trainer, module, name, monkeypatch):
    calls = []
    monkeypatch.setattr(module, name, lambda config, workdir: calls.append((config.trainer, config.batch, workdir)))
    assert run("--workdir=here", VIT, f"--config.trainer={trainer}", "--config.batch=8") == 0
    assert calls == [(trainer, 8, "here")]


def test_interrupting_the_start_exits_with_130(monkeypatch):
    def interrupt(config, workdir):
        raise KeyboardInterrupt

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(train, "train_and_evaluate", interrupt)
    monkeypatch.setattr("os._exit", leave)
    assert run("--workdir=here", VIT) == 130


def test_recipes_find_each_other_whatever_started_the_program(tmp_path):
    """The installed command, unlike `python -m`, does not look for modules where it is started."""
    code = f"import sys; sys.path.insert(0, {str(CONFIGS.parent)!r}); from vit_jax.main import cli; sys.path.pop(0); cli()"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("NAME = 'tasting'\n")
    (tmp_path / "configs" / "mine.py").write_text(
        "import ml_collections\nfrom configs import base\n\n"
        "def get_config():\n    return ml_collections.ConfigDict({'trainer': base.NAME})\n"
    )
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, "--workdir=here", "--config=configs/mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, env=environment)
    assert done.stderr.startswith("error: unknown config.trainer 'tasting'")


# Inference time

TINY = {"model_name": "testing", "steps": 3, "initial_steps": 1, "batch": 8, "num_classes": 3, "image_size": 32}


def test_inference_time_writes_its_figures(tmp_path, capsys):
    assert run(f"--workdir={tmp_path}", SPEED, *[f"--config.{name}={value}" for name, value in TINY.items()]) == 0
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    figures = json.loads(line)
    assert list(figures) == ["step", "img_sec_core", "img_sec_core_p10", "img_sec_core_p90"]
    assert figures["step"] == 3
    assert 0 < figures["img_sec_core_p10"] <= figures["img_sec_core"] <= figures["img_sec_core_p90"]
    out = capsys.readouterr().out
    assert "testing, batch 8 at 32 px, float32" in out
    assert f"{figures['img_sec_core']:.1f} images/s a device (median of 3 steps" in out
    assert "images/s a device" in (tmp_path / "train.log").read_text()
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_sise": 32}, "unknown field of config 'image_sise': did you mean image_size"),
        ({"batch": 0}, "batch=0 must be a multiple"),
        ({"steps": 0}, "steps=0 at least 1"),
    ],
)
def test_inference_time_refuses_what_it_does_not_know(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        inference_time(TINY | fields, tmp_path / "run")
    assert not (tmp_path / "run").exists()
