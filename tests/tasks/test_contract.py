"""What every task in `tasks.TYPES` gets from the loop: resume, accumulation, devices, a plan, and prediction after training."""

import contextlib
import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import configs.caption
import configs.common
import configs.detect
import configs.segment
from tests import tiny
from vit_jax import predictor, tasks, train
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.run import experiment as experiments
from vit_jax.run import start
from vit_jax.run.signals import GracefulExit
from vit_jax.settings import Settings
from vit_jax.tools import plan
from vit_jax.train import train_and_evaluate

pytestmark = pytest.mark.usefixtures("each_step_once")

STEPS = 4


def caption(tmp_path):
    """Batches with other numbers of words on every device, some examples predicted in parallel, and all terms of the loss."""
    c = configs.caption.get_config("cappa,digits")
    c.model.body.vit.update({"hidden_size": 16, "patches": {"size": (16, 16)}, "position_embedding": "sincos2d"})
    del c.model.body.vit.resnet
    c.model.body.vit.transformer.update({"num_layers": 1, "mlp_dim": 16, "num_heads": 2})
    c.model.update({"width": 16, "num_heads": 2, "mlp_dim": 16, "num_layers": 1, "tied": False, "mask_token": True})
    c.task.update({"beams": 2, "parallel": 0.5, "doubly_stochastic": 0.1})
    c.pp.update({"train": "train[:100]", "test": "test[:7]"})
    c.update({"batch": 16, "batch_eval": 8, "progress_every": 1, "evaluators": {}})
    return c


def classify(tmp_path):
    """Rows of several images, of which every device has another number."""
    c = tiny.config(pp_max_patches=6, pp_enlarge=False, pp_pack=2)
    c.model.patches.size, c.augment.randaug = (2, 2), ()
    return c


def distill(tmp_path):
    """The teacher is the model that another run left, of other classes' order."""
    teacher = tmp_path / "teacher"
    if not teacher.exists():
        train_and_evaluate(tiny.config(total_steps=1, eval_every=1, seed=5), teacher)
    c = tiny.config()
    c.distill.teacher = str(teacher)
    return c


def detect(tmp_path):
    """Batches with other numbers of boxes on every device."""
    c = configs.detect.get_config()
    c.model.body.vit.update({"hidden_size": 16, "patches": {"size": (16, 16)}, "position_embedding": "sincos2d"})
    del c.model.body.vit.resnet
    c.model.body.vit.transformer.update({"num_layers": 1, "mlp_dim": 16, "num_heads": 2})
    c.pp.update({"train": "train[:100]", "test": "test[:7]"})
    c.update({"batch": 16, "batch_eval": 8, "progress_every": 1})
    return c


def contrast(tmp_path):
    """A folder of captions, two for every image, of photos that keep their shapes, and a vocabulary of words."""
    folder = tmp_path / "pairs"
    if not folder.exists():
        folder.mkdir()
        words, rng = ["one", "two", "red", "blue"], np.random.default_rng(0)
        (tmp_path / "words.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]))
        for i in range(40):
            size = rng.integers(4, 20, 2)
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"{words[i % 2]} {words[2 + i % 2]}\n{words[i % 4]}")
    c = configs.common.get_config()
    transformer = {"num_layers": 1, "mlp_dim": 16, "num_heads": 2, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    image = {"patches": {"size": (4, 4)}, "hidden_size": 16, "classifier": "token", "transformer": transformer}
    text = {"width": 16, "num_layers": 1, "mlp_dim": 16, "num_heads": 2, "vocab_size": 8}
    c.model_type, c.model = "TwoTowers", {"image": image, "text": text, "out_dim": 8}
    c.task = {"type": "contrast", "tokenizer": "bert", "vocab": str(tmp_path / "words.txt"), "max_len": 4}
    c.pp.update({"train": "train[:32]", "test": "train[32:]", "crop": 8, "max_patches": 7})
    c.update({"dataset": str(folder), "pretrained_dir": "", "batch": 16, "batch_eval": 8, "progress_every": 1})
    return c


def segment(tmp_path):
    """Batches with other numbers of ignored pixels on every device."""
    c = configs.segment.get_config("linear,digit_masks")
    c.model.body.vit.update({"hidden_size": 16, "patches": {"size": (8, 8)}, "position_embedding": "sincos2d"})
    del c.model.body.vit.resnet
    c.model.body.vit.transformer.update({"num_layers": 1, "mlp_dim": 16, "num_heads": 2})
    c.model.places = 2
    c.pp.update({"train": "train[:100]", "test": "test[:7]", "resize": None, "crop_method": "simple"})
    c.update({"batch": 16, "batch_eval": 8, "progress_every": 1})
    return c


def reconstruct(tmp_path):
    c = tiny.config()
    c.model_type, c.model.decoder = "MAE", {"width": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
    c.model.patches.size = (2, 2)
    del c.model.representation_size
    c.task = {"type": "reconstruct", "hidden": 0.6}
    return c


def self_distill(tmp_path):
    """Both kinds of heads, a centre in the carry, and three sizes of views."""
    c = tiny.config(ema_decay=0.5)
    c.model.patches.size = (4, 4)
    c.pp.update({"crop": 16, "mean": (100.0, 110.0, 120.0)})
    heads = {"prototypes": 24, "hidden": 16, "bottleneck": 8, "ibot_prototypes": 16, "ibot_bottleneck": 8}
    c.task = {"type": "self_distill", "local_crops": 2, "local_size": 8, "centring": "centre", "freeze_last_layer": 1, **heads}
    c.task.update({"jitter_prob": 0.0, "blur": (0.0,) * 3, "solarize": (0.5,) * 3})  # others take long to compile
    return c


RECIPES = {
    "caption": caption,
    "classify": classify,
    "contrast": contrast,
    "detect": detect,
    "distill": distill,
    "reconstruct": reconstruct,
    "segment": segment,
    "self_distill": self_distill,
}
"""By type, the smallest recipe of a task: (folder for what it needs) → config. A new task adds a line."""


def config(kind, folder, **overrides):
    """Plain gradient descent without dropout, so that devices and micro-batches can be compared."""
    c = RECIPES[kind](folder)
    c.update(
        {"report": False, "total_steps": STEPS, "eval_every": STEPS, "warmup_steps": 0, "optimizer": "sgd", "weight_decay": 0.0}
    )
    c.update({"optim_dtype": "float32", "base_lr": 0.05})
    if "transformer" in c.model:
        c.model.transformer.dropout_rate = 0.0
    c.update(overrides)
    return c


@pytest.fixture(scope="module", params=sorted(tasks.TYPES))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return tmp_path_factory.mktemp(kind)


@pytest.fixture(scope="module")
def undisturbed(kind, folder):
    """(workdir, trained parameters) of a run with checkpoints at 2 and 4 and a running average."""
    workdir = folder / "undisturbed"
    return workdir, train_and_evaluate(config(kind, folder, ema_decay=0.5, checkpoint_every=2, keep=2), workdir)


def test_every_task_stands_in_the_table():
    assert set(RECIPES) == set(tasks.TYPES)


def test_micro_batches_on_a_mesh_learn_what_one_batch_on_pmap_does(kind, folder, undisturbed):
    """In steps 3 and 4, which go on from a checkpoint of pmap.

    That both kinds of devices take a batch and micro-batches alike, whatever the loss, is shown in optimize/test_step.py.
    """
    workdir, _ = undisturbed
    expected = tiny.metrics(workdir, "train_loss")
    assert np.isfinite(list(expected.values())).all() and expected[1] != expected[3]
    experiment = experiments.build(Settings.from_config(config(kind, folder, ema_decay=0.5, parallel="mesh", accum_steps=2)))
    shutil.copytree(workdir / "checkpoints" / "2", folder / "mesh" / "2")
    states = []
    for path in (folder / "mesh", workdir / "checkpoints"):
        with contextlib.closing(Checkpointer(path, read_only=True)) as checkpointer:
            states.append(start.restore_or_load(experiment, checkpointer))
    state, update, losses = states[0], experiments.make_update(experiment), {}
    for step, batch in zip((3, 4), train._train_batches(experiment, 2, GracefulExit()), strict=False):
        state, metrics = update(state, batch)
        losses[step] = experiment.parallelism.read(metrics)["loss"]
    np.testing.assert_allclose([losses[3], losses[4]], [expected[3], expected[4]], rtol=1e-6)
    chex.assert_trees_all_close(*(experiment.parallelism.read(x.params) for x in (state, states[1])), atol=1e-6)


def test_a_run_cut_off_after_step_2_ends_in_the_same_bits(kind, folder, undisturbed):
    workdir, _ = undisturbed
    again = folder / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    for left in again.glob("model*"):
        left.unlink()
    train_and_evaluate(config(kind, folder, ema_decay=0.5, checkpoint_every=2, keep=2), again)
    names = sorted(path.name for path in workdir.glob("model*.npz"))
    assert names
    for name in names:
        chex.assert_trees_all_equal(*(dict(np.load(path / name)) for path in (workdir, again)))
    losses = [tiny.metrics(path, "train_loss") for path in (workdir, again)]
    assert losses[0] == losses[1]


def test_a_saved_model_predicts_what_the_trained_one_does(kind, folder, undisturbed):
    workdir, params = undisturbed
    experiment = experiments.build(Settings.from_config(config(kind, folder)))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 9, 11, 3), np.uint8)
    loaded = predictor.load(workdir, batch_size=len(pictures))
    examples = [experiment.task.eval_example({"image": picture}, exif_rotated=False) for picture in pictures]
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    outputs, expected = loaded(pictures), jax.jit(experiment.task.predict)(params, batch)
    assert outputs.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(outputs[name], x, atol=1e-6, err_msg=name)
    shown = loaded.task.show({name: x[0] for name, x in outputs.items()}, pictures[0].shape[:2])
    assert shown.text and json.dumps(shown.json)


def test_a_plan_has_the_shapes_of_the_step(kind, folder):
    experiment = plan.build(Settings.from_config(config(kind, folder, ema_decay=0.5)), num_classes=10)
    state, batch = plan.abstract_arguments(experiment)
    real = start.new_state(experiment)
    real_batch = next(train._train_batches(experiment, 0, GracefulExit()))
    chex.assert_trees_all_equal_shapes_and_dtypes((state, batch), (real, real_batch))
    assert dataclasses.is_dataclass(experiment.task)
