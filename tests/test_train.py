"""The loop: the same run twice, interrupted runs, other devices, wrong numbers, and what a run leaves behind."""

import contextlib
import json
import shutil
import signal
from pathlib import Path
from unittest import mock

import chex
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests import tiny
from vit_jax import convert, evaluators, models, predictor
from vit_jax.checkpoint import load
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.data import sources
from vit_jax.data.renumbered import RenumberedSource
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.models import token_merging
from vit_jax.run import start, writer
from vit_jax.run.experiment import build
from vit_jax.settings import Settings
from vit_jax.train import train_and_evaluate

pytestmark = pytest.mark.usefixtures("each_step_once")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run of 20 steps with dropout and two micro-batches a step."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    train_and_evaluate(tiny.config(accum_steps=2), workdir)
    return workdir


def test_a_run_leaves_everything_it_promises(undisturbed: Path):
    names = {path.name for path in undisturbed.iterdir()}
    assert {"train.log", "metrics.jsonl", "config.json", "checkpoints", "model.npz", "model.json"} <= names
    assert any("tfevents" in name for name in names)
    description = json.loads((undisturbed / "model.json").read_text())
    assert description["class_names"] == [str(i) for i in range(10)]
    assert description["image_size"] == [8, 8] and description["grid"] == [2, 2] and description["step"] == 20
    assert set(tiny.metrics(undisturbed, "accuracy_test")) == set(tiny.metrics(undisturbed, "lr")) == {10, 20}
    assert set(tiny.metrics(undisturbed, "train_loss")) == set(range(1, 21))
    rebuilt = models.build(description["model_type"], description["model"])
    shapes = jax.eval_shape(rebuilt.init, jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, load(undisturbed / "model.npz"))


def test_one_seed_gives_identical_losses_and_another_does_not(undisturbed: Path, tmp_path: Path):
    train_and_evaluate(tiny.config(accum_steps=2), tmp_path / "again")
    assert tiny.metrics(tmp_path / "again", "train_loss") == tiny.metrics(undisturbed, "train_loss")
    train_and_evaluate(tiny.config(accum_steps=2, seed=1), tmp_path / "other")
    assert tiny.metrics(tmp_path / "other", "train_loss")[20] != tiny.metrics(undisturbed, "train_loss")[20]


def test_a_run_killed_after_step_10_ends_in_the_same_bits(undisturbed: Path, tmp_path: Path):
    c = tiny.config(accum_steps=2, checkpoint_every=10, keep=2)
    train_and_evaluate(c, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "20")
    (tmp_path / "model.npz").unlink()
    train_and_evaluate(c, tmp_path)
    _assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_exits_with_its_code_and_the_same_command_continues(
    number: int, code: int, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scalars = writer.Writer.scalars

    def interrupted(self, step, values):
        scalars(self, step, values)
        if step == 5:
            signal.raise_signal(number)

    monkeypatch.setattr(writer.Writer, "scalars", interrupted)
    with pytest.raises(SystemExit) as exit_:
        train_and_evaluate(tiny.config(accum_steps=2), tmp_path)
    assert exit_.value.code == code and not (tmp_path / "model.npz").exists()
    monkeypatch.undo()
    train_and_evaluate(tiny.config(accum_steps=2), tmp_path)
    _assert_same_run(tmp_path, undisturbed)


def test_a_complete_run_started_again_changes_nothing(undisturbed: Path):
    before = (undisturbed / "model.npz").read_bytes(), (undisturbed / "metrics.jsonl").read_text()
    train_and_evaluate(tiny.config(accum_steps=2), undisturbed)
    assert before == ((undisturbed / "model.npz").read_bytes(), (undisturbed / "metrics.jsonl").read_text())


def test_fine_tuning_takes_the_features_and_starts_a_new_head(undisturbed: Path, tmp_path: Path):
    c = tiny.config(dataset="digits_0to4", pretrained=str(undisturbed), pp_crop=12, pp_train="train", base_lr=0.0)
    c.update({"total_steps": 1, "weight_decay": 0.0})
    train_and_evaluate(c, tmp_path)
    before, after = tiny.arrays(undisturbed), tiny.arrays(tmp_path)
    assert after["head/kernel"].shape == (16, 5) and not after["head/kernel"].any()
    assert after["Transformer/posembed_input/pos_embedding"].shape == (1, 10, 16)
    np.testing.assert_array_equal(after["embedding/kernel"], before["embedding/kernel"])


def test_evaluating_scores_the_workdir_or_the_file_and_trains_nothing(undisturbed: Path, tmp_path: Path):
    expected = tiny.metrics(undisturbed, "accuracy_test")[20]
    before = (undisturbed / "model.npz").read_bytes()
    c = tiny.config(accum_steps=2, trainer="evaluate")
    assert evaluate(c, undisturbed)["accuracy_test"] == expected
    c.pretrained = str(undisturbed / "model.npz")
    assert evaluate(c, tmp_path)["accuracy_test"] == expected
    c.tome = 1  # of one block, whose class token does not look at what it merges
    with mock.patch.object(token_merging, "merge", wraps=token_merging.merge) as merge:
        assert evaluate(c, tmp_path)["accuracy_test"] == expected
    assert merge.called
    assert (undisturbed / "model.npz").read_bytes() == before
    assert not (tmp_path / "model.npz").exists()


def test_a_head_that_was_taken_out_before_publishing_is_told(undisturbed: Path, tmp_path: Path, caplog):
    """Google's files of ImageNet-21k have zeros there."""
    flat = tiny.arrays(undisturbed) | {"head/kernel": np.zeros((16, 10), np.float32)}
    np.savez(tmp_path / "model.npz", **flat)
    shutil.copy(undisturbed / "model.json", tmp_path)
    predictor.load(undisturbed)
    assert "all zeros" not in caplog.text
    predictor.load(tmp_path)
    assert "its head is all zeros, and what it says of images means nothing" in caplog.text
    evaluate(tiny.config(trainer="evaluate", pretrained=str(tmp_path)), tmp_path / "run")
    assert "its head is all zeros" in (tmp_path / "run" / "train.log").read_text()


def test_evaluating_nothing_or_other_classes_is_refused(undisturbed: Path, tmp_path: Path):
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(tiny.config(trainer="evaluate"), tmp_path)
    c = tiny.config(trainer="evaluate", dataset="digits_0to4", pretrained=str(undisturbed))
    with pytest.raises(UserError, match="knows the classes 0, 1, .*the dataset has 0, 1, 2, 3, 4"):
        evaluate(c, tmp_path)


def test_a_head_with_its_classes_in_another_order_is_scored_by_name(tmp_path: Path):
    """As files made elsewhere number them: rows of the classifier and `id2label` permuted."""
    train_and_evaluate(tiny.config(total_steps=150, base_lr=0.01, eval_every=150, progress_every=50), tmp_path / "run")
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--to=hf"]) == 0
    c = tiny.config(trainer="evaluate", pretrained=str(tmp_path / "hf"))
    expected = evaluate(c, tmp_path / "before")
    order = np.roll(np.arange(10), 3)
    weights, config = tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "config.json"
    params, described = load_file(weights), json.loads(config.read_text())
    for name in ("classifier.weight", "classifier.bias"):
        params[name] = params[name][order]
    labels = {str(i): described["id2label"][str(place)] for i, place in enumerate(order)}
    save_file(params, weights)
    config.write_text(json.dumps(described | {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}))
    found = evaluate(c, tmp_path / "after")
    assert found["accuracy_test"] == expected["accuracy_test"] > 0.2  # 0.24 to 0.43 with six seeds
    np.testing.assert_allclose(found["loss_test"], expected["loss_test"], rtol=1e-6)
    said = (tmp_path / "after" / "train.log").read_text()
    assert "in another order than the dataset: they are matched by name" in said
    assert "the checkpoint's own files, and predict, have --config.pp.antialias=True\n" in said


def test_test_images_may_number_the_classes_otherwise_than_those_for_training(undisturbed: Path, tmp_path: Path):
    """As two files of COCO may; the same by name is the same score."""
    order = np.roll(np.arange(10), 3)

    def get_source(dataset: str, split: str, **options) -> sources.Source:
        source = sources.get_source(dataset, split, **options)
        if split != c.pp.test:
            return source
        return RenumberedSource(source, np.argsort(order), np.array(source.class_names)[order])

    c = tiny.config(trainer="evaluate", pretrained=str(undisturbed))
    settings = Settings.from_config(c)
    experiment = build(settings, origin=start.find_origin(settings), get_source=get_source)
    with contextlib.closing(Checkpointer(tmp_path / "checkpoints", read_only=True)) as checkpointer:
        state = start.restore_or_load(experiment, checkpointer, keep_head=True)
    found = evaluators.scores(experiment, state, evaluators.chosen(experiment)[0])
    expected = evaluate(c, tmp_path)
    assert found["loss_test"] == pytest.approx(expected["loss_test"], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_names_the_step_and_keeps_the_checkpoint(tmp_path: Path):
    c = tiny.config(base_lr=1e15, optimizer="sgd", weight_decay=0.0, warmup_steps=4, checkpoint_every=1, grad_norm_clip=0.0)
    with pytest.raises(UserError, match=r"step (\d+): the loss is .*The checkpoint of step \d+ is kept") as error:
        train_and_evaluate(c, tmp_path)
    step = int(str(error.value).split(":")[0].removeprefix("step "))
    kept = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert kept == [step - 1]
    assert f"step {step}: the loss is" in (tmp_path / "train.log").read_text()
    assert not (tmp_path / "model.npz").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(undisturbed: Path, tmp_path: Path):
    workdir = tmp_path / "new"
    for overrides, message in [
        ({"batch": 15, "accum_steps": 2}, "batch=15 cannot be shared out .* choose a multiple of 2"),
        ({"dataset": "no/such/folder"}, "no such folder"),
        ({"pretrained": str(tmp_path)}, "holds no parameter file"),
        ({"pretrained": str(tmp_path / "missing.npz")}, "no such checkpoint"),
        ({"pretrained_dir": str(tmp_path)}, "no such checkpoint.*ViT-Micro_4.npz"),
        ({"pp_crop": 2}, "no patch"),
    ]:
        with pytest.raises(UserError, match=message):
            train_and_evaluate(tiny.config(**overrides), workdir)
        assert not (workdir / "model.npz").exists()
    unpooled = tiny.config()
    unpooled.model.classifier = "unpooled"
    with pytest.raises(UserError, match="scores every token"):
        train_and_evaluate(unpooled, workdir)
    with pytest.raises(UserError, match=r"(?s)another config.*- seed = 0.*\+ seed = 7"):
        train_and_evaluate(tiny.config(accum_steps=2, seed=7), undisturbed)


def test_an_image_that_cannot_be_decoded_loses_nothing_learnt_before_it(tmp_path: Path):
    photos = tmp_path / "photos"
    for i in range(40):
        folder = photos / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(folder / f"{i}.png")
    shutil.copytree(photos / "train", photos / "test")
    (photos / "train" / "a" / "0.png").write_bytes(b"no image")
    c = tiny.config(dataset=str(photos), pp_train="train", pp_test="test", batch=4)
    with pytest.raises(UserError, match="0.png: "):
        train_and_evaluate(c, tmp_path / "run")
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(steps) == 1 and steps[0] == len(tiny.metrics(tmp_path / "run", "train_loss")) > 0


def test_a_recipe_takes_activation_epsilon_and_normalisation_from_what_it_starts_from(undisturbed: Path, tmp_path: Path):
    for name in ("model.npz", "model.json"):
        shutil.copy(undisturbed / name, tmp_path / name)
    description = json.loads((tmp_path / "model.json").read_text())
    description["model"]["transformer"] |= {"activation": "gelu", "norm_eps": 1e-12}
    description |= {"mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}
    (tmp_path / "model.json").write_text(json.dumps(description))
    c = tiny.config(pretrained=str(tmp_path / "model.npz"), total_steps=1)
    train_and_evaluate(c, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "model.json").read_text())
    assert written["model"]["transformer"]["activation"] == "gelu" and written["model"]["transformer"]["norm_eps"] == 1e-12
    assert (written["mean"], written["std"]) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])


def test_a_recipe_sets_the_pixels_that_a_file_does_not_tell(undisturbed: Path, tmp_path: Path):
    """A model that expects other pixels scores as before once it is told so, and model.json keeps them."""
    expected = evaluate(tiny.config(trainer="evaluate", pretrained=str(undisturbed)), tmp_path / "before")
    params = {name: x.copy() for name, x in tiny.arrays(undisturbed).items()}
    mean, std = np.array([100.0, 110, 120], np.float32), np.array([50.0, 60, 70], np.float32)
    kernel = params["embedding/kernel"]  # of (x - 127.5) / 127.5 = (x - mean) / std · std / 127.5 + mean / 127.5 - 1
    params["embedding/bias"] += np.einsum("hwcd,c->d", kernel, mean / 127.5 - 1)
    params["embedding/kernel"] = kernel * (std / 127.5)[:, None]
    np.savez(tmp_path / "file.npz", **params)
    pixels = {"pp_mean": tuple(mean.tolist()), "pp_std": tuple(std.tolist())}
    c = tiny.config(trainer="evaluate", pretrained=str(tmp_path / "file.npz"), **pixels)
    found = evaluate(c, tmp_path / "after")
    assert found["accuracy_test"] == expected["accuracy_test"]
    assert found["loss_test"] == pytest.approx(expected["loss_test"], abs=1e-4)
    pixels |= {"pp_interpolation": "bicubic", "pp_antialias": True}
    c = tiny.config(pretrained=str(tmp_path / "file.npz"), total_steps=1, **pixels)
    train_and_evaluate(c, tmp_path / "run")
    described = json.loads((tmp_path / "run" / "model.json").read_text())
    assert described["mean"] == mean.tolist() and described["std"] == std.tolist()
    assert described["preprocessing"]["interpolation"] == "bicubic" and described["preprocessing"]["antialias"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_ends_in_the_same_bits(undisturbed: Path, tmp_path: Path):
    c = tiny.config(accum_steps=2, checkpoint_every=10, keep=2)
    train_and_evaluate(c, tmp_path)
    largest = max((p for p in (tmp_path / "checkpoints" / "20").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    (tmp_path / "model.npz").unlink()
    train_and_evaluate(c, tmp_path)
    assert "checkpoints/20 is damaged" in (tmp_path / "train.log").read_text()
    assert (tmp_path / "checkpoints" / "20.damaged").is_dir()
    _assert_same_run(tmp_path, undisturbed)


def _assert_same_run(workdir: Path, expected: Path) -> None:
    assert tiny.metrics(workdir, "train_loss") == tiny.metrics(expected, "train_loss")
    assert tiny.metrics(workdir, "accuracy_test") == tiny.metrics(expected, "accuracy_test")
    ours, theirs = tiny.arrays(workdir), tiny.arrays(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
