"""The package as a notebook uses it."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import vit_jax
from tests import tiny
from vit_jax.errors import UserError

FIELDS = {name: tiny.config().to_dict()[name] for name in ("model", "model_type", "batch", "batch_eval")}
FIELDS |= {"report": False, "total_steps": 2, "warmup_steps": 1, "pp": {"crop": 8, "train": "train[:100]", "test": "test[:20]"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Fine-tuned for two steps on digits, from a model that was trained for one."""
    root = tmp_path_factory.mktemp("api")
    config = tiny.config(total_steps=1, warmup_steps=0)
    from vit_jax.train import train_and_evaluate

    train_and_evaluate(config, root / "pretrained")
    return vit_jax.fine_tune("digits", pretrained=root / "pretrained", workdir=root / "fine", **FIELDS)


def test_importing_the_package_takes_no_time_and_touches_no_device():
    """Which it could not without jax."""
    code = (
        "import time; before = time.process_time(); import vit_jax, sys; assert time.process_time() - before < 0.3;"
        "print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_a_notebook_shows_of_a_model_and_a_prediction_is_short(model):
    assert repr(model).endswith("parameters, images of 8x8 pixels, 10 classes: 0, 1, 2, …>")
    assert len(repr(model)) < 300 and len(repr(model.predictor)) < 3000
    assert "array" not in repr(model.predict(np.zeros((8, 8, 3), np.uint8)))


def test_one_image_gives_a_prediction_and_a_list_gives_a_list(model):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 20, 3), np.uint8)
    one, several = model.predict(pixels[0], top=3), model.predict([Image.fromarray(x) for x in pixels], top=3)
    assert len(several) == 3 and len(one.answers["predictions"]) == 3 and str(one).count("%") == 3
    best = one.answers["predictions"][0]
    assert model.class_names[int(one.outputs["probabilities"].argmax())] == best["label"]
    np.testing.assert_allclose([p.outputs["logits"] for p in several], [p.outputs["logits"] for p in model.predict(pixels)])
    np.testing.assert_allclose(one.outputs["probabilities"], model.probabilities(pixels)[0], rtol=1e-6)
    assert model.features(pixels).shape == (3, 16) and model.features(pixels[0], "patches").shape[0] == 1


def test_the_module_and_its_parameters_are_those_that_predict(model):
    inputs = np.zeros((2, *model.image_size, 3), np.float32)
    logits = model.module.apply({"params": model.params}, inputs, train=False)
    np.testing.assert_array_equal(model.logits(inputs), logits)


def test_what_is_no_image_and_no_option_is_said(model):
    with pytest.raises(UserError, match="option threshold means nothing to the task of this model: it has top"):
        model.predict(np.zeros((4, 4), np.uint8), threshold=0.5)
    with pytest.raises(UserError, match="an int is no image|a int is no image"):
        model.predict(3)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = vit_jax.lode
