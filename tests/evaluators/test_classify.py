"""Accuracy and loss: any split, and several labels an image as in ImageNet-ReaL."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.data.toy_tfds import build
from tests.evaluators import small
from vit_jax.errors import UserError
from vit_jax.evaluators import calibration, classify, knn
from vit_jax.train import train_and_evaluate


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("batch", [8, 37])
def test_any_split_is_scored_as_by_hand(batch, tmp_path):
    e, params = small.experiment(tmp_path, batch_eval=batch)
    for split, source in ((None, e.test_source), ("train[:100]", e.train_source)):
        logits, labels = small.logits(e, params, source)
        metrics = classify.make_evaluator(e, split=split)(e.parallelism.place(params))
        assert metrics["accuracy"] == np.mean(logits.argmax(axis=1) == labels)
        expected = -log_softmax(logits)[np.arange(len(labels)), labels].mean()
        assert metrics == {"accuracy": metrics["accuracy"], "loss": pytest.approx(expected, rel=1e-5)}


def test_other_classes_are_refused(tmp_path):
    e, _ = small.experiment(tmp_path)
    with pytest.raises(UserError, match=r"digits_0to4 test\[:5\], example 0, .* 5 are the same by name, 5 only there"):
        classify.make_evaluator(e, split="test[:5]", dataset="digits_0to4")


def test_several_labels_are_counted_as_by_hand():
    # Top-1 is 1, 0, 2, 2, 1 of the five images; the fourth has no label and the fifth is padding.
    logits = np.log([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.1, 0.3, 0.6], [0.2, 0.7, 0.1]])
    labels = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    mask = np.array([True, True, True, True, False])
    sums = classify.multi_label_sums(jnp.array(logits), jnp.array(labels), jnp.array(mask), loss="softmax")
    assert sums["correct"] == 2 and sums["count"] == 3
    expected = -(np.log(0.2) + np.log(0.7)) / 2 - (np.log(0.3) + np.log(0.2)) / 2 - np.log(0.6)
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-6)
    sums = classify.multi_label_sums(jnp.array(logits), jnp.array(labels), jnp.array(mask), loss="sigmoid")
    p = 1 / (1 + np.exp(-logits[:3]))
    np.testing.assert_allclose(sums["loss"], -np.log(np.where(labels[:3], p, 1 - p)).sum(), rtol=1e-6)


def real_labels(i):
    return [(), (i % 10,), (i % 10, (i + 3) % 10)][i % 3]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A data_dir with `real`: grey images of 8 pixels with none, one or two of ten labels; 37 of train and 11 of test."""
    import tensorflow_datasets as tfds

    names = [str(digit) for digit in range(10)]
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "original_label": tfds.features.ClassLabel(names=names),
        "real_label": tfds.features.Sequence(tfds.features.ClassLabel(names=names)),
    }

    def example(split, i):
        file = io.BytesIO()
        Image.fromarray(pixels(i)).save(file, "PNG")
        return {"image": io.BytesIO(file.getvalue()), "original_label": i % 10, "real_label": real_labels(i)}

    root = tmp_path_factory.mktemp("tfds")
    build(root, "real", features, example)
    return str(root)


def pixels(i):
    return np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)


@pytest.mark.parametrize(("loss", "batch"), [("softmax", 8), ("sigmoid", 37)])
def test_a_dataset_with_several_labels_is_scored_as_by_hand(loss, batch, real, tmp_path):
    e, params = small.experiment(tmp_path, tfds_data_dir=real, loss=loss, batch_eval=batch)
    metrics = classify.make_evaluator(e, split="train", dataset="real")(e.parallelism.place(params))
    images = np.stack([pixels(i) for i in range(37)]) / np.float32(127.5) - 1
    logits = np.asarray(e.task.model.module.apply({"params": params}, images.astype(np.float32)), np.float64)
    hits, losses = [], []
    for i in range(37):
        if labels := list(real_labels(i)):
            hits.append(logits[i].argmax() in labels)
            right = 1 / (1 + np.exp(-np.where(np.isin(np.arange(10), labels), 1, -1) * logits[i]))
            losses.append(-np.log(right).sum() if loss == "sigmoid" else -log_softmax(logits[i : i + 1])[0, labels].mean())
    assert len(hits) == 24 and 0 < sum(hits) < 24
    assert metrics == {"accuracy": sum(hits) / 24, "loss": pytest.approx(np.mean(losses), rel=1e-5)}


def test_several_labels_are_for_nothing_but_classify(real, tmp_path):
    e, _ = small.experiment(tmp_path, tfds_data_dir=real)
    for module, options in ((calibration, {"split": "test"}), (knn, {"train": "train", "test": "test"})):
        with pytest.raises(UserError, match="real t.*, example 0 may have several labels: only an evaluator of type classify"):
            module.make_evaluator(e, dataset="real", **options)
    c = small.config(trainer="train", dataset="real", tfds_data_dir=real, pp_train="train", pp_test="test")
    with pytest.raises(UserError, match="real train, example .* may have several labels: such a dataset can be evaluated, not"):
        train_and_evaluate(c, tmp_path / "run")


def test_a_split_without_any_label_is_an_error(real, tmp_path):
    e, params = small.experiment(tmp_path, dataset="real", tfds_data_dir=real, pp_train="train", pp_test="test")
    without = next(i for i in range(11) if not e.test_source[i]["labels"])
    evaluator = classify.make_evaluator(e, split=f"test[{without}:{without + 1}]")
    with pytest.raises(UserError, match="none of the 1 images to be scored has a label"):
        evaluator(e.parallelism.place(params))
