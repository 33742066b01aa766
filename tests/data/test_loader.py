"""The loader: what is seen is a function of (seed, step) alone, every example counts once, and errors name the example."""

import contextlib
import gc
import itertools
import logging
import os
import threading
import time

import chex
import numpy as np
import pytest

from vit_jax.data import loader
from vit_jax.data.features import Image, Label, Labels, Source
from vit_jax.data.host.decode import ImageError, decode
from vit_jax.errors import UserError
from vit_jax.tasks import classify


class Numbered(Source):
    """`size` images of 2x2 pixels, image i filled with the value i; those numbered in `bad` cannot be decoded."""

    exif_rotated = False

    def __init__(self, size, bad=(), labels=None, several=None):
        self.size, self.bad, self.labels, self.several = size, bad, labels or {}, several
        names = tuple("0123456789")
        self.features = {"image": Image()} | ({"labels": Labels(names)} if several else {"label": Label(names)})

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        image = b"junk" if i in self.bad else np.full((2, 2, 3), i, np.uint8)
        if self.several:
            return {"image": image, "labels": self.several[i]}
        return {"image": image, "label": self.labels.get(i, i % 10)}

    def where(self, i):
        return f"photos/{i}.jpg"


def noisy(image, rng, exif_rotated):
    """A random transform: the first row keeps the image's number, the second is noise."""
    noise = rng.integers(256, size=(2, 3), dtype=np.uint8)  # before it is known whether the image is sound
    return {"image": np.stack([decode(image, exif_rotated=exif_rotated)[0], noise])}


def train(size, steps, *, seed=3, batch_size=8, bad=(), labels=None, **kwargs):
    """The first `steps` batches."""
    source = Numbered(size, bad, labels)
    example = classify.make_train_example(noisy, 10)
    with contextlib.closing(loader.train_batches(source, example, batch_size=batch_size, seed=seed, **kwargs)) as batches:
        return list(itertools.islice(batches, steps))


def plain(image, exif_rotated):
    return {"image": decode(image, exif_rotated=exif_rotated).astype(np.float32)}


EVAL_EXAMPLE = classify.make_eval_example(plain, 10)


def evaluate(size, *, batch_size=8, bad=(), **kwargs):
    return list(loader.eval_batches(Numbered(size, bad), EVAL_EXAMPLE, batch_size=batch_size, **kwargs))


def numbers(batches):
    """Which images the batches hold, in order."""
    return [int(image[0, 0, 0]) for batch in batches for image in batch["image"]]


def test_every_image_once_an_epoch_and_epochs_do_not_mix():
    seen = numbers(train(37, steps=14))  # 112 examples: three epochs of 37 and one more; no batch ends with an epoch
    epochs = [seen[:37], seen[37:74], seen[74:111]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert list(range(37)) not in epochs


def test_a_batch_may_be_larger_than_the_source():
    seen = numbers(train(5, steps=2, batch_size=8))
    assert sorted(seen[:5]) == sorted(seen[5:10]) == list(range(5))


def test_batches_hold_what_they_promise():
    (batch,) = train(37, steps=1)
    assert {name: (x.dtype.name, x.shape) for name, x in batch.items()} == {
        "image": ("uint8", (8, 2, 2, 3)),
        "label": ("int32", (8,)),
        "seed": ("uint32", (8,)),
    }
    np.testing.assert_array_equal(batch["label"], np.array(numbers([batch])) % 10)


def test_one_seed_gives_one_sequence_and_another_seed_another():
    chex.assert_trees_all_equal(train(37, steps=6), train(37, steps=6))
    assert numbers(train(37, steps=4)) != numbers(train(37, steps=4, seed=4))


def test_an_example_meets_new_noise_and_a_new_seed_every_epoch():
    batches = train(5, steps=10, batch_size=5)
    assert len({int(seed) for batch in batches for seed in batch["seed"]}) == 50
    noise = {image[1].tobytes() for batch in batches for image in batch["image"]}
    assert len(noise) == 50


@pytest.mark.parametrize("threads", [1, 7])
@pytest.mark.parametrize("start", [1, 4, 5, 12])
def test_starting_at_any_step_equals_the_undisturbed_run(monkeypatch, start, threads):
    undisturbed = train(37, steps=15)  # epochs end within steps 4 and 9
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    chex.assert_trees_all_equal(train(37, steps=15 - start, start_step=start), undisturbed[start:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_examples_of_each_step(processes):
    def examples(batch):
        return sorted(zip(numbers([batch]), batch["label"], batch["seed"], strict=True))

    def union(start, steps):
        share = {"process_count": processes, "start_step": start}
        parts = [train(37, steps, process_index=i, **share) for i in range(processes)]
        assert all(len(batch["image"]) == 8 // processes for part in parts for batch in part)
        return [sorted(itertools.chain(*map(examples, step))) for step in zip(*parts, strict=True)]

    alone = [examples(batch) for batch in train(37, steps=12)]
    assert union(start=0, steps=12) == alone
    assert union(start=7, steps=5) == alone[7:]


def test_without_shuffling_the_order_is_the_sources():
    assert numbers(train(37, steps=10, shuffle=False)) == [*range(37), *range(37), *range(6)]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("size", [37, 40, 3])
def test_evaluation_counts_every_example_once_and_masks_the_padding(size, processes):
    parts = [evaluate(size, process_index=i, process_count=processes) for i in range(processes)]
    assert {len(part) for part in parts} == {-(-size // 8)}
    batches = [batch for part in parts for batch in part]
    for batch in batches:
        chex.assert_shape(batch["image"], (8 // processes, 2, 2, 3))
        chex.assert_type([batch["image"], batch["label"], batch["valid"]], [np.float32, np.int32, bool])
    mask = np.concatenate([batch["valid"] for batch in batches])
    counted = np.array(numbers(batches))[mask]
    assert sorted(counted) == list(range(size))
    labels = np.concatenate([batch["label"] for batch in batches])[mask]
    np.testing.assert_array_equal(labels, counted % 10)


def test_several_labels_an_image_become_rows():
    source = Numbered(5, several=[(3,), (), (0, 9), (9, 9), (4,)])
    first, second = loader.eval_batches(source, EVAL_EXAMPLE, batch_size=3)
    rows = np.concatenate([first["labels"], second["labels"]])
    assert rows.dtype == bool and rows.shape == (6, 10) and set(first) == {"image", "labels", "valid"}
    assert [np.flatnonzero(row).tolist() for row in rows[:5]] == [[3], [], [0, 9], [9], [4]]
    assert [*first["valid"], *second["valid"]] == [True] * 5 + [False]


def test_several_labels_an_image_are_not_trained_on_and_stay_in_range():
    with pytest.raises(
        UserError, match=r"^photos/\d.jpg may have several labels: such a dataset can be evaluated, not trained"
    ):
        example = classify.make_train_example(noisy, 10)
        next(loader.train_batches(Numbered(2, several=[(1,), (2,)]), example, batch_size=1, seed=0))
    with pytest.raises(UserError, match=r"^photos/1.jpg has label 10, allowed are 0 to 9"):
        list(loader.eval_batches(Numbered(2, several=[(1,), (3, 10)]), EVAL_EXAMPLE, batch_size=2))


def test_evaluation_keeps_the_order():
    assert numbers(evaluate(37))[:37] == list(range(37))


@pytest.mark.parametrize("run", [lambda: train(9, steps=4, bad=[5]), lambda: evaluate(9, bad=[5])])
def test_a_bad_image_is_an_error_that_names_it(run):
    with pytest.raises(ImageError, match=r"^photos/5\.jpg: the image cannot be decoded"):
        run()


def test_a_skipped_bad_image_is_replaced_by_the_next_good_one_and_logged_once(caplog):
    with caplog.at_level(logging.WARNING, logger="vit_jax"):
        skipping = train(9, steps=9, bad=[4, 5, 8], skip_bad_images=True)  # eight epochs
    good = train(9, steps=9)
    replaced = {4: 6, 5: 6, 8: 0}
    assert numbers(skipping) == [replaced.get(i, i) for i in numbers(good)]
    np.testing.assert_array_equal(skipping[0]["label"], np.array(numbers(skipping[:1])) % 10)
    np.testing.assert_array_equal(skipping[0]["seed"], good[0]["seed"])

    messages = [record.getMessage() for record in caplog.records]
    assert sorted(m.split(": ")[1] for m in messages) == ["photos/4.jpg", "photos/5.jpg", "photos/8.jpg"]
    assert [m.split(": ")[0] for m in messages] == [f"skipped bad image {i}" for i in (1, 2, 3)]


def test_skipping_is_an_error_once_nothing_is_left():
    with pytest.raises(UserError, match="none of the 3 images can be decoded"):
        train(3, steps=1, bad=range(3), skip_bad_images=True)


@pytest.mark.parametrize("label", [-1, 10])
@pytest.mark.parametrize("skip", [False, True])
def test_a_label_out_of_range_is_an_error_that_names_the_example(label, skip):
    with pytest.raises(UserError) as error:
        train(9, steps=2, labels={6: label}, skip_bad_images=skip)
    assert str(error.value) == f"photos/6.jpg has label {label}, allowed are 0 to 9"


@pytest.mark.parametrize("bad", [(), [20]], ids=["closed halfway", "after an error"])
def test_no_thread_outlives_the_iterator(bad):
    before = set(threading.enumerate())
    with contextlib.suppress(ImageError):
        train(37, steps=3 if not bad else 9, bad=bad)
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not left
