"""Detection on a few canvases: steps, devices, evaluation and prediction."""

import dataclasses
import itertools
import json

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import configs.detect
from tests.models import small
from vit_jax import predictor, tasks, train
from vit_jax.data import canvases
from vit_jax.data.features import Boxes
from vit_jax.data.host.decode import decode
from vit_jax.errors import UserError
from vit_jax.evaluators import passes
from vit_jax.models import detr
from vit_jax.run import experiment as experiments
from vit_jax.run import start
from vit_jax.run.save_model import description
from vit_jax.run.signals import GracefulExit
from vit_jax.settings import Settings
from vit_jax.tasks import detect
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Model
from vit_jax.tools import abstract

SHAPES = (40, 90), (60, 30), (50, 50), (30, 64)
CANVAS = 32, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 photos in COCO's layout, each with a box or two; the evaluation has the first 7 of them."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    images, boxes = [], []
    for split in ("train", "val"):
        (root / split).mkdir()
    for i in range(40):
        height, width = SHAPES[i % 4]
        pixels = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for split in ("train", "val"):
            pixels.save(root / split / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        boxes += [{"image_id": i, "category_id": k, "bbox": [k, 2, 20, 10 + k]} for k in range(1 + i % 2)]
    (root / "annotations").mkdir()
    for split, count in (("train", 40), ("val", 7)):
        of_split = [box | {"id": k} for k, box in enumerate(boxes) if box["image_id"] < count]
        content = {
            "images": images[:count],
            "annotations": of_split,
            "categories": [{"id": k, "name": f"n{k}"} for k in (0, 1)],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def config(folder, **overrides):
    c = configs.detect.get_config()
    c.model.body.vit.update({"hidden_size": 16, "patches": {"size": (16, 16)}})
    del c.model.body.vit.resnet
    c.model.body.vit.transformer.update({"num_layers": 1, "mlp_dim": 16, "num_heads": 2})
    c.pp.update({"train": "train", "test": "val", "flip": True})
    c.task["canvases"] = (CANVAS,)
    c.update({"dataset": str(folder), "batch": 8, "batch_eval": 8, "total_steps": 4, "warmup_steps": 0})
    c.update({"optimizer": "sgd", "base_lr": 0.05, "weight_decay": 0.0})
    c.update(overrides)
    return c


@pytest.fixture(scope="module", autouse=True)
def short_windows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvases, "WINDOW", 3)
        yield


@pytest.fixture(scope="module")
def experiment(folder):
    return experiments.build(Settings.from_config(config(folder)))


def run(experiment, update, steps, start_step=0, state=None):
    """(losses, canvases, states after each step) of the steps from `start_step` on, from a state on the host."""
    place, read = experiment.parallelism.place, experiment.parallelism.read
    state = start.new_state(experiment) if state is None else place(state)
    losses, shapes, states = [], [], []
    for batch in itertools.islice(train._train_batches(experiment, start_step, GracefulExit()), steps):
        state, metrics = update(state, batch)
        losses.append(float(read(metrics)["loss"]))
        shapes.append(batch["image"].shape[-3:-1])
        states.append(read(state))
    return losses, shapes, states


def test_every_canvas_has_a_step_whatever_the_devices_and_wherever_a_run_begins(folder, experiment):
    update = experiments.make_update(experiment)
    losses, shapes, states = run(experiment, update, 4)
    assert set(shapes) == {CANVAS, (64, 64)}
    again = run(experiment, update, 2, start_step=2, state=states[1])  # windows are of 3
    assert again[:2] == (losses[2:], shapes[2:])
    chex.assert_trees_all_equal(again[2], states[2:])
    mesh = experiments.build(Settings.from_config(config(folder, parallel="mesh")))
    other_losses, other_shapes, _ = run(mesh, experiments.make_update(mesh), 3)
    assert other_shapes == shapes[:3] and set(other_shapes) == set(shapes)
    np.testing.assert_allclose(other_losses, losses[:3], rtol=1e-6)


def test_photos_are_predicted_each_on_its_canvas_and_in_their_order(experiment):
    params, source = jax.device_get(experiment.init_params()), experiment.test_source
    loaded = predictor.Predictor(experiment.task, params, description(experiment, 0, {}), batch_size=4)
    pictures = [decode(source[i]["image"], exif_rotated=True) for i in range(len(source))]
    examples = [loaded.example(picture) for picture in pictures]
    assert [x["image"].shape[:2] for x in examples] == [CANVAS if i % 4 in (0, 3) else (64, 64) for i in range(len(source))]
    outputs = loaded(pictures)
    assert outputs["scores"].shape == (7, 16)  # as many as there are patches on the largest
    in_turn = loaded.predict_examples(examples[:3], 4)
    chex.assert_trees_all_close(in_turn, {name: x[:3] for name, x in outputs.items()}, atol=1e-6)
    rows = passes.make_rows(experiment, experiment.task.predict)(experiment.parallelism.place(params), source)
    chex.assert_trees_all_close(rows, outputs, atol=1e-6)


def test_plans_features_and_models_of_other_sizes_have_one_canvas(experiment):
    assert abstract.abstract_batch(experiment)["image"].shape == (8, 64, 64, 3)
    described = description(experiment, 0, {})
    loaded = predictor.Predictor(experiment.task, {}, described)
    assert loaded.largest_example(np.zeros((*SHAPES[0], 3), np.uint8))["image"].shape == (64, 64, 3)
    assert json.loads(json.dumps(described.task))["canvases"] == [list(CANVAS)]
    assert tasks.of_description(described).canvases.sizes == (CANVAS, (64, 64))
    assert tasks.of_description(dataclasses.replace(described, image_size=(32, 48))).canvases is None


def test_a_detr_finds_on_a_smaller_canvas_what_it_finds_on_the_square():
    """Where the padding of both is wider than the convolutions of its ResNet reach, which know nothing of padding."""
    model = detr.Detr({"resnet": {"num_layers": (1,), "width": 8}}, 3, 5, 16, 2, 16, 1, 1)
    picture = np.random.default_rng(0).integers(0, 256, (24, 80, 3), np.uint8)
    make = detect.make_eval_example(detect.Sizes((64, 64), short=(12,)))
    examples = [make({"image": picture}, exif_rotated=False, canvas=canvas) for canvas in ((32, 64), (64, 64))]
    assert [x["image"].shape[:2] for x in examples] == [(32, 64), (64, 64)] and tuple(examples[0]["extent"]) == (12, 40)
    params = jax.jit(model.init)(jax.random.key(1), np.zeros((1, 64, 64, 3)))["params"]
    apply = detect.make_apply(Model("DETR", {"body": model.body}, model), (64, 64))
    predict = jax.jit(detect.make_predict(apply, (100.0,) * 3, (50.0,) * 3))
    small, square = (predict(params, {name: x[None] for name, x in example.items()}) for example in examples)
    chex.assert_trees_all_close(small, square, atol=1e-5)


def test_a_token_has_the_learned_position_of_its_place_on_every_canvas(experiment):
    """Shown by a ViT whose tokens know nothing of each other: each finds on the smaller canvas what it finds on the square."""
    apply = detect.make_apply(experiment.task.model, (64, 64))
    params = small.random_params(experiment.task.model.module, np.zeros((1, 64, 64, 3), np.float32))
    out = params["backbone"]["Transformer"]["encoderblock_0"]["MultiHeadDotProductAttention_1"]["out"]
    out["kernel"] = np.zeros_like(out["kernel"])
    pixels = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype(np.float32)
    valid = np.arange(64)[:, None] < np.full((1, 64, 64), 32)
    square, part = (jax.jit(apply)(params, pixels[:, :h], valid[:, :h]) for h in (64, 32))
    assert part["boxes"].shape == (1, 1, 8, 4)
    chex.assert_trees_all_close(part, {name: x[:, :, :8] for name, x in square.items()}, atol=1e-5)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ((800, 1333), "must be at most 6 pairs"),
        (((800, 0),), "must be at most 6 pairs"),
        (((8, 8),) * 7, "must be at most 6 pairs"),
    ],
)
def test_what_are_no_canvases_is_refused_in_words(chosen, message):
    c = configs.detect.get_config()
    c.task["canvases"] = chosen
    with pytest.raises(UserError, match=message):
        detect.make_task(Setup(Settings.from_config(c), {"boxes": Boxes(("a",))}, None), canvases=chosen)
