"""A workdir belongs to one config once it holds results, and says so field by field."""

import dataclasses
import json
import logging

import pytest

from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.results import find_npz
from vit_jax.errors import UserError
from vit_jax.run import notes
from vit_jax.run.workdir import check_classes, check_data, check_frozen, claim, origin
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


def test_the_folder_of_a_cache_may_move_but_not_come_or_go(tmp_path):
    claim(tmp_path, changed(cache_dir="a"), CLASSES)
    (tmp_path / "model.npz").mkdir()
    claim(tmp_path, changed(cache_dir="b"), CLASSES)
    assert "- cache_dir = 'b'" in refusal(tmp_path, SETTINGS)


def test_more_steps_are_refused_with_how_to_train_longer(used):
    more, fewer = (refusal(used, changed(total_steps=steps)) for steps in (15, 5))
    assert f"--config.pretrained={used} --config.total_steps=5." in more and "To train longer" in more
    assert "longer" not in fewer


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
    rest = {"model_type": "ViT", "model": {}, "image_size": (8, 8), "grid": (1, 1), "std": (2.0,) * 3, "class_names": ("a",)}
    start = Description(mean=(1.0,) * 3, **rest)
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


@pytest.mark.parametrize("lost", [["config.json"], ["start.json"], ["config.json", "start.json"]])
def test_what_was_asked_for_is_known_from_several_files(used, lost):
    """Of a run with checkpoints, all but the copy beside them may be lost."""
    (used / "checkpoints").mkdir(exist_ok=True)
    check_data(used, {}, accept=False)
    for name in lost:
        (used / name).unlink()
    assert "- seed = 0" in refusal(used, changed(seed=5))
    claim(used, SETTINGS, CLASSES)
    assert written(used)["seed"] == 0 and notes.read(used)["class_names"] == list(CLASSES)
    (used / "config.json").write_text(json.dumps(written(used) | {"seed": 5}))  # by hand
    assert "- seed = 0" in refusal(used, changed(seed=5))


def test_results_of_which_nothing_tells_are_not_taken_over(tmp_path):
    (tmp_path / "model.npz").touch()
    assert "neither config.json nor start.json tells: bring one of them back" in refusal(tmp_path, SETTINGS)


@pytest.mark.parametrize("content", [b'{"crc32": 5, "content"', b"[1]", b"\xff", b"", b'{"crc32": 1, "content": {}}', None])
def test_damaged_notes_are_set_aside_and_come_from_their_copy(content, tmp_path, caplog):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    path, copy = tmp_path / "start.json", tmp_path / "checkpoints" / "start.json"

    def damage(path):
        path.unlink()
        path.write_bytes(content) if content is not None else path.mkdir()

    notes.write(tmp_path, {"class_names": ["cow"]})
    damage(path)
    with caplog.at_level(logging.WARNING, "vit_jax"):
        assert notes.read(tmp_path) == notes.read(tmp_path) == {"class_names": ["cow"]}
    assert [f"{path} is damaged" in record.getMessage() for record in caplog.records] == [True]
    assert (tmp_path / "start.json.damaged").exists() and not path.exists()
    damage(copy)
    with pytest.raises(UserError, match="start.json, which tells what the run began with, is damaged .*no copy"):
        origin(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "start.json"])
def test_a_folder_in_the_place_of_a_file_is_named(name, tmp_path):
    (tmp_path / name).mkdir()
    assert f"{name} cannot be written (Is a directory): move it away" in refusal(tmp_path, SETTINGS)


def test_other_data_is_named_and_refused_unless_it_is_accepted(tmp_path, caplog):
    old = {"train": {"count": 400, "names": "5f3a", "labels": "77aa"}, "test": {"count": 100}}
    new = {"train": {"count": 401, "names": "0c1d", "labels": "77aa"}, "test": {"count": 100}}
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    check_data(tmp_path, old, accept=False)
    check_data(tmp_path, old, accept=False)
    check_frozen(tmp_path, {"model": "1"})
    with pytest.raises(UserError) as error:
        check_data(tmp_path, new, accept=False)
    lines = str(error.value).splitlines()
    assert lines[1:3] == ["  train.count: 400 before, 401 now", "  train.names: changed"]
    assert len(lines) == 4 and "--config.changed_data=accept" in lines[3]
    check_data(tmp_path, new, accept=True)
    assert "train.count: 400 before, 401 now" in caplog.text
    check_data(tmp_path, new, accept=False)
    assert notes.read(tmp_path)["frozen"] == {"model": "1"}
