"""Batches of images of about one shape: the same examples, of which only the order changes, however the run is shared out."""

import contextlib
import itertools

import chex
import numpy as np
import pytest

from vit_jax.data import canvases, features, loader
from vit_jax.data.features import Boxes, Image, Source
from vit_jax.tasks import detect

SHAPES = (40, 90), (60, 30), (50, 50), (45, 64)
SIZES = detect.Sizes((48, 48), (24, 28, 32), crop=0.3, crop_short=(40,), crop_sides=(20, 40), flip=True)
CANVASES = SIZES.canvases(((32, 48), (48, 32)))


class Photos(Source):
    """Photos of several shapes, of which those numbered in `bad` cannot be decoded, and claim to be high."""

    exif_rotated = False
    features = {"image": Image(), "boxes": Boxes(("a",))}

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad
        self.images = [np.random.default_rng(i).integers(0, 256, (*SHAPES[i % 4], 3), np.uint8) for i in range(count)]

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        nothing = {"boxes": np.zeros((0, 4), np.float32), "box_labels": np.zeros(0, np.int32), "box_crowd": np.zeros(0, bool)}
        return {"image": b"junk" if i in self.bad else self.images[i], **nothing}

    def where(self, i):
        return f"photo {i}"


def train(steps, *, fitting=CANVASES, bad=(), batch_size=8, **how):
    example = detect.make_train_example(SIZES, max_boxes=1)
    given = {"batch_size": batch_size, "seed": 3, "canvases": fitting} | how
    with contextlib.closing(loader.train_batches(Photos(37, bad), example, **given)) as batches:
        return list(itertools.islice(batches, steps))


def views(batches):
    """What is seen, without its padding, by the seed that every position has of its own."""
    seen = {}
    for batch in batches:
        for image, (height, width), seed in zip(batch["image"], batch["extent"], batch["seed"], strict=True):
            assert not image[height:].any() and not image[:, width:].any()
            seen[int(seed)] = image[:height, :width]
    return seen


def test_the_examples_of_a_window_are_those_that_would_come_without_canvases():
    steps = 2 * canvases.WINDOW
    batches, plain = train(steps), train(steps, fitting=None)
    for first in (0, canvases.WINDOW):
        part = slice(first, first + canvases.WINDOW)
        chex.assert_trees_all_equal(views(batches[part]), views(plain[part]))
        mixed, shapes = 0, []
        for batch in batches[part]:
            canvas = batch["image"].shape[1:3]
            assert canvas == CANVASES.smallest(tuple(batch["extent"].max(axis=0)))
            mixed += len({CANVASES.smallest(tuple(extent)) for extent in batch["extent"]}) > 1
            shapes.append(canvas)
        assert set(shapes) == set(CANVASES.sizes) and mixed < len(CANVASES.sizes)
        assert shapes != sorted(shapes)  # a window does not go from one canvas to the next


@pytest.mark.parametrize("start", [15, 16, 21])
def test_starting_within_a_window_equals_the_undisturbed_run(start):
    chex.assert_trees_all_equal(train(24 - start, start_step=start), train(24)[start:])


def test_processes_have_parts_of_the_same_batches_on_the_same_canvas():
    whole, parts = train(20), [train(20, process_index=i, process_count=2) for i in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert {share["image"].shape for share in shares} == {(4, *batch["image"].shape[1:])}
        chex.assert_trees_all_equal(views(shares), views([batch]))


def test_what_replaces_a_damaged_image_is_made_to_fit(caplog):
    batches, good = train(32, bad=(0, 9, 10), skip_bad_images=True), train(32)
    assert [set(views([batch])) for batch in batches] != [set(views([batch])) for batch in good]  # groups are others
    assert views(batches).keys() == views(good).keys()
    assert caplog.text.count("skipped bad image") == 3


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_image_once_and_says_which(processes):
    source, example = Photos(37), detect.make_eval_example(SIZES)
    share = {"batch_size": 8, "process_count": processes, "canvases": CANVASES}
    parts = [list(loader.eval_batches(source, example, process_index=i, **share)) for i in range(processes)]
    shapes = [[batch["image"].shape for batch in part] for part in parts]
    assert shapes[0] == shapes[-1] and len(shapes[0]) == 4 + 2 and len(set(shapes[0])) == 2
    seen = {}
    for batch in itertools.chain(*parts):
        assert (batch["valid"] == (batch["index"] < 37)).all()
        for number, image, (height, width) in zip(batch["index"], batch["image"], batch["extent"], strict=True):
            if number < 37:
                assert number not in seen and not image[height:].any() and not image[:, width:].any()
                seen[int(number)] = image[:height, :width]
    expected = {i: SIZES.fixed(source.size(i)).image(source[i]["image"]) for i in range(37)}
    chex.assert_trees_all_equal(seen, expected)


def test_the_size_of_an_image_is_read_once(monkeypatch):
    source, read = Photos(9, bad=(4,)), []
    monkeypatch.setattr(Photos, "size", lambda self, i: read.append(i) or features.Source.size(self, i))
    first = [list(CANVASES.eval_batches(source, 4)) for _ in range(2)][0]
    assert sorted(read) == list(range(9)) and len(first) == 3
    assert [canvases.size_of(source, i) for i in (0, 4)] == [SHAPES[0], (1, 1)] and len(read) == 9
    assert canvases.size_of(Photos(1, bad=(0,)), 0) == (1, 1)  # another source knows nothing of this one
