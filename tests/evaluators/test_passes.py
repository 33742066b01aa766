"""A pass over a split: every example once and in order, on any number of devices and processes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.data import test_shards
from tests.evaluators import small
from vit_jax.data import loader
from vit_jax.data.features import Boxes, Image, Label, Labels, Segmentation, Source
from vit_jax.data.sources import get_source
from vit_jax.errors import UserError
from vit_jax.evaluators import passes


@pytest.mark.parametrize(("batch", "parallelism"), [(8, "pmap"), (37, "pmap"), (512, "mesh")])
def test_features_are_those_of_all_examples_in_order(batch, parallelism, tmp_path):
    e, params = small.experiment(tmp_path, batch_eval=batch, parallel=parallelism)
    found, labels = passes.make_features(e)(e.parallelism.place(params), e.test_source)
    expected, truth = small.features(e, params, e.test_source)
    assert found.shape == (37, 16) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_array_equal(labels, truth)


@pytest.mark.parametrize("batch", [8, 37, 512])
def test_sums_count_every_example_once(batch, tmp_path):
    e, params = small.experiment(tmp_path, batch_eval=batch)

    def sums_of(params, batch):
        by_class = jax.nn.one_hot(batch["label"], 10) * batch["valid"][:, None]
        return {"classes": by_class.sum(axis=0), "label": (batch["label"] * batch["valid"]).sum()}

    sums, rate = passes.make_sums(e, e.test_source, sums_of)(e.parallelism.place(params))
    _, labels = small.images_and_labels(e.test_source)
    assert sums["classes"].tolist() == np.bincount(labels, minlength=10).tolist()
    assert sums["label"] == labels.sum() and sums.keys() == {"classes", "label"} and rate > 0


@pytest.mark.parametrize("processes", [2, 4])
def test_what_several_processes_gather_is_put_in_order(processes, tmp_path, monkeypatch):
    e, _ = small.experiment(tmp_path)
    _, truth = small.images_and_labels(e.test_source)
    share = functools.partial(loader.eval_batches, e.test_source, e.task.eval_example, batch_size=8, process_count=processes)
    parts = zip(*(share(process_index=i) for i in range(processes)), strict=True)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    gathered = [passes._in_order({"label": np.concatenate([p["label"] for p in part])}) for part in parts]
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in gathered])[:37], truth)


def test_a_split_is_opened_by_its_name(tmp_path):
    e, _ = small.experiment(tmp_path)
    assert passes.open_split(e, None, None) is passes.open_split(e, "test[:37]", None) is e.test_source
    assert passes.open_split(e, "train[:100]", None) is e.train_source
    assert len(passes.open_split(e, "test[:5]", None)) == 5
    assert passes.open_split(e, "train[:7]", "digits_0to4").num_classes == 5
    assert [len(source) for source in passes.open_pair(e, None, None, None)] == [100, 37]


def test_a_task_without_labels_is_scored_by_those_of_shards(tmp_path):
    members = {f"{i}.{kind}": x for i in range(9) for kind, x in (("jpg", b"x"), ("cls", b"%d" % (i % 2)))}
    test_shards.write(tmp_path / "train-0.tar", members)
    e, _ = small.experiment(tmp_path)
    alone = get_source(f"unlabelled:{tmp_path}", "train")
    e = dataclasses.replace(e, task=dataclasses.replace(e.task, needs=("image",)), train_source=alone, test_source=alone)
    pair = passes.open_pair(e, "train[:6]", "train[6:]", f"{tmp_path}/train-0.tar")
    assert [(len(source), set(source.features)) for source in pair] == [(6, {"image", "label"}), (3, {"image", "label"})]
    e = dataclasses.replace(e, settings=dataclasses.replace(e.settings, dataset=f"unlabelled:{tmp_path}"))
    with pytest.raises(UserError, match="train-0.tar: . has no class, by which this evaluator scores: name data that has"):
        passes.open_pair(e, "train", "test", None)


class Few(Source):
    """One example with one label, several, boxes and a map of classes."""

    exif_rotated = False

    def __init__(self, *names):
        self.features = {"image": Image()} | {
            field: kind(names)
            for field, kind in (("label", Label), ("labels", Labels), ("boxes", Boxes), ("segmentation", Segmentation))
        }

    def __len__(self):
        return 1

    def __getitem__(self, index):
        pixels = np.array([[0, 1], [2, 255]], np.uint8)
        return {"label": 2, "labels": (0, 1), "box_labels": np.array([1, 1, 0], np.int32), "segmentation": pixels}

    def where(self, index):
        return "the one"


def test_classes_in_another_order_are_matched_by_name_in_every_field():
    known = Few("cat", "dog", "eel")
    assert passes.with_classes_of(known, same := Few("cat", "dog", "eel")) is same
    source = passes.with_classes_of(known, Few("Eel", "cat", "dog"))
    assert source.class_names == known.class_names and source.where(0) == "the one" and len(source) == 1
    example = source[0]
    assert example["label"] == 1 and example["labels"] == (2, 0)
    assert example["box_labels"].tolist() == [0, 0, 2] and example["box_labels"].dtype == np.int32
    assert example["segmentation"].tolist() == [[2, 0], [1, 255]] and example["segmentation"].dtype == np.uint8
    with pytest.raises(UserError, match="the one, have other classes: .* 2 are the same .*only there .eel., 1 only here .cow"):
        passes.with_classes_of(known, Few("cat", "dog", "cow"))


def test_a_label_that_is_no_class_stays_and_is_refused_where_it_is_read():
    source = passes.with_classes_of(Few("a", "b", "c"), few := Few("c", "b", "a"))
    few.__class__ = type("Wrong", (Few,), {"__getitem__": lambda self, i: {"label": -1, "labels": (3, 0)}})
    assert source[0] == {"label": -1, "labels": (3, 2)}
