"""A workdir belongs to one config once it holds results, and says so field by field."""

import dataclasses
import json

import pytest

from vit_jax.checkpoint.describe import Description
from vit_jax.errors import UserError
from vit_jax.run.workdir import check_classes, claim, find_npz, origin
from vit_jax.settings import Preprocessing, Settings

CLASSES = ("cat", "dog")
SETTINGS = Settings(
    model={"model_name": "testing", "patches": {"size": (16, 16)}, "resnet": None},
    dataset="digits",
    total_steps=10,
    pp=Preprocessing(crop=16, area=(0.5, 1.0)),
)
FREE = {
    "trainer": "evaluate",
    "pretrained": "model.npz",
    "pretrained_dir": "elsewhere",
    "tfds_data_dir": "data",
    "tfds_manual_dir": "downloads",
    "prefetch": 5,
    "batch_eval": 7,
    "progress_every": 3,
    "eval_every": 3,
    "checkpoint_every": 3,
    "keep": 4,
}


def changed(**fields):
    return dataclasses.replace(SETTINGS, **fields)


def refusal(workdir, settings):
    with pytest.raises(UserError) as error:
        claim(workdir, settings, CLASSES)
    return str(error.value)


def written(workdir):
    return json.loads((workdir / "config.json").read_text())


@pytest.fixture(params=["checkpoints/10", "model.npz"])
def used(request, tmp_path):
    """A workdir with results, of whichever kind."""
    claim(tmp_path, SETTINGS, CLASSES)
    (tmp_path / request.param).mkdir(parents=True)
    return tmp_path


def test_claiming_makes_the_folder_and_writes_the_config(tmp_path):
    claim(tmp_path / "runs" / "a", SETTINGS, CLASSES)
    config = written(tmp_path / "runs" / "a")
    assert config == json.loads(json.dumps(dataclasses.asdict(SETTINGS)))
    assert {path.name for path in (tmp_path / "runs" / "a").iterdir()} == {"config.json", "start.json"}


def test_the_same_config_continues(used):
    claim(used, SETTINGS, CLASSES)
    claim(used, dataclasses.replace(SETTINGS), CLASSES)


def test_another_config_is_refused_and_the_fields_are_named(used):
    before = written(used)
    model = {"model_name": "testing", "patches": {"size": (8, 8)}, "resnet": {"num_layers": (1,)}}
    message = refusal(used, changed(base_lr=0.5, seed=0, pp=Preprocessing(crop=24, area=(0.5, 1.0)), model=model))
    lines = [line.strip() for line in message.splitlines() if line.startswith("  ")]
    assert lines == [
        "- base_lr = 0.03",
        "+ base_lr = 0.5",
        "- model.patches.size = [16, 16]",
        "+ model.patches.size = [8, 8]",
        "+ model.resnet.num_layers = [1]",
        "- pp.crop = 16",
        "+ pp.crop = 24",
    ]
    assert str(used) in message and "--workdir" in message
    assert written(used) == before


@pytest.mark.parametrize("field", ["total_steps", "dataset", "optim_dtype", "accum_steps", "batch"])
def test_whatever_changes_what_is_learnt_is_refused(used, field):
    assert f"- {field} = " in refusal(used, changed(**{field: "else"}))


def test_what_does_not_change_what_is_learnt_may_change(used):
    claim(used, changed(**FREE), CLASSES)
    assert {name: written(used)[name] for name in FREE} == FREE


def test_without_results_the_folder_may_be_claimed_anew(tmp_path):
    claim(tmp_path, SETTINGS, CLASSES)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "train.log").touch()
    claim(tmp_path, changed(base_lr=0.5), CLASSES)
    assert written(tmp_path)["base_lr"] == 0.5


@pytest.mark.parametrize("content", ['{"seed": 0, ', "[]", "\xff"])
def test_a_damaged_config_is_refused_by_name(used, content):
    (used / "config.json").write_text(content, encoding="latin-1")
    assert refusal(used, SETTINGS).startswith(f"{used / 'config.json'} is no ")


def test_find_npz_takes_a_file_as_it_is_and_looks_into_a_workdir(tmp_path, monkeypatch):
    assert find_npz(tmp_path) == tmp_path
    (tmp_path / "train.log").touch()
    with pytest.raises(UserError, match="holds no model.npz: the run there has not finished"):
        find_npz(tmp_path)
    (tmp_path / "model.npz").touch()
    assert find_npz(str(tmp_path)) == tmp_path / "model.npz"
    assert find_npz("hf://google/vit-base-patch16-224") == "hf://google/vit-base-patch16-224"
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert find_npz(f"~/{tmp_path.name}") == tmp_path / "model.npz"


def test_other_classes_or_another_order_are_refused_and_an_origin_is_remembered(tmp_path):
    rest = {"model_type": "ViT", "model": {}, "image_size": (8, 8), "grid": (1, 1), "std": (2.0,), "class_names": ("a",)}
    start = Description(mean=(1.0,), **rest)
    claim(tmp_path, SETTINGS, CLASSES, start)
    assert origin(tmp_path) is None  # there are no results yet: whoever comes next starts anew
    check_classes(tmp_path, ("cow",))
    (tmp_path / "model.npz").touch()
    assert origin(tmp_path) == start
    check_classes(tmp_path, CLASSES)
    with pytest.raises(UserError, match="knows the classes cat, dog, the dataset has dog, cat"):
        check_classes(tmp_path, ("dog", "cat"))
    (tmp_path / "model.npz").unlink()
    claim(tmp_path, SETTINGS, CLASSES)
    (tmp_path / "model.npz").touch()
    assert origin(tmp_path) is None
