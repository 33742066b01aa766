"""Disks that are full, folders that cannot be written to and images that vanish: said clearly, and nothing is lost."""

import gc
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vit_jax.checkpoint.state import WriteError
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.run import writer
from vit_jax.train import train_and_evaluate

pytestmark = pytest.mark.usefixtures("each_step_once")


def recipe(photos: Path) -> ml_collections.ConfigDict:
    c = tiny.config(dataset=str(photos), pp_train="train", pp_test="test", batch=4, total_steps=25, checkpoint_every=5, keep=2)
    c.update({"accum_steps": 2, "eval_every": 10, "cache_gb": 0.0})  # read at every step
    return c


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of 25 steps of 4 photos, of which there are 40, with checkpoints at every fifth; they are in `photos`."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = workdir / "photos" / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    shutil.copytree(workdir / "photos" / "train", workdir / "photos" / "test")
    train_and_evaluate(recipe(workdir / "photos"), workdir)
    return workdir


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable], None]:
    """`after_step(7, function)` calls it once step 7 has been reported."""

    def install(step: int, function: Callable[[], object]) -> None:
        scalars = writer.Writer.scalars

        def hooked(self, at, values):
            scalars(self, at, values)
            if at == step and "train_loss" in values:
                function()

        monkeypatch.setattr(writer.Writer, "scalars", hooked)

    return install


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def assert_continues_to_the_same_end(workdir: Path, undisturbed: Path) -> None:
    train_and_evaluate(recipe(undisturbed / "photos"), workdir)
    for name in ("train_loss", "accuracy_test"):
        assert tiny.metrics(workdir, name) == tiny.metrics(undisturbed, name)
    ours, theirs = tiny.arrays(workdir), tiny.arrays(undisturbed)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_one_before(
    undisturbed: Path,
    tmp_path: Path,
    after_step: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
):
    """No file may grow beyond 16 KiB from step 7 on, as if there were no more room: the one of step 10 would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_more_room():
        while not (tmp_path / "checkpoints" / "5").exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, limits[1]))

    after_step(7, no_more_room)
    try:
        message = "the checkpoint of step 10 could not be written to .*: File too large. The checkpoint of step 5 is intact"
        with pytest.raises(WriteError, match=message):
            train_and_evaluate(recipe(undisturbed / "photos"), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()  # asyncio tells of errors that nobody asked for when it comes across them
    assert "Traceback" not in capfd.readouterr().err and "asyncio" not in {record.name for record in caplog.records}
    assert steps_saved(tmp_path) == [5]
    assert "could not be written" in (tmp_path / "train.log").read_text()
    monkeypatch.undo()
    assert_continues_to_the_same_end(tmp_path, undisturbed)


def test_an_image_that_vanishes_while_training_is_named_and_nothing_learnt_is_lost(
    undisturbed: Path, tmp_path: Path, after_step: Callable, monkeypatch: pytest.MonkeyPatch
):
    victim = undisturbed / "photos" / "train" / "a" / "8.png"
    content = victim.read_bytes()
    after_step(1, victim.unlink)
    with pytest.raises(UserError, match=f"{victim} cannot be read: No such file or directory. Was it moved after the start"):
        train_and_evaluate(recipe(undisturbed / "photos"), tmp_path)
    learnt = max(tiny.metrics(tmp_path, "train_loss"))
    assert steps_saved(tmp_path)[-1] == learnt < 25
    victim.write_bytes(content)
    monkeypatch.undo()
    assert_continues_to_the_same_end(tmp_path, undisturbed)
    assert f"from this workdir's step {learnt}" in (tmp_path / "train.log").read_text()


def test_what_cannot_be_written_to_is_refused_before_training(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run cannot be made a folder: .*Not a directory"):
        train_and_evaluate(tiny.config(), tmp_path / "file" / "run")
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints, for checkpoints, cannot be made a folder: File exists"):
        train_and_evaluate(tiny.config(), tmp_path)


def test_a_workdir_deleted_or_in_use_while_a_run_writes_to_it_is_one_message(
    undisturbed: Path, tmp_path: Path, after_step: Callable, capfd: pytest.CaptureFixture
):
    workdir = tmp_path / "run"
    refused = []

    def twice_and_deleted():
        while not (workdir / "checkpoints" / "5").exists():
            time.sleep(0.01)
        with pytest.raises(UserError, match="run is in use by the run of .*, process .*, since ") as error:
            train_and_evaluate(recipe(undisturbed / "photos"), workdir)
        refused.append(error)
        scores = evaluate(recipe(undisturbed / "photos"), workdir)
        assert "accuracy_test" in scores and 7 not in tiny.metrics(workdir, "accuracy_test")
        shutil.rmtree(workdir)

    after_step(7, twice_and_deleted)
    with pytest.raises(WriteError, match="could not be written|was deleted or moved"):
        train_and_evaluate(recipe(undisturbed / "photos"), workdir)
    assert refused
    assert "Traceback" not in (out := "".join(capfd.readouterr())), out
    assert not workdir.exists()


def test_a_photo_more_is_noticed_when_a_run_is_started_again(undisturbed: Path, tmp_path: Path):
    photos, workdir = undisturbed / "photos", tmp_path / "run"
    shutil.copytree(undisturbed, workdir, ignore=shutil.ignore_patterns("photos"))
    more = shutil.copy(photos / "train" / "a" / "0.png", photos / "train" / "a" / "more.png")
    try:
        with pytest.raises(UserError, match=r"(?s)train.count: 40 before, 41 now\n.*train.names: changed.*changed_data=accept"):
            train_and_evaluate(recipe(photos), workdir)
        train_and_evaluate(recipe(photos).to_dict() | {"changed_data": "accept"}, workdir)
    finally:
        Path(more).unlink()
    assert "nothing to do" in (workdir / "train.log").read_text()
