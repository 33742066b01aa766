"""Images without classes, and digits on canvases."""

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from vit_jax import tasks
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.settings import Settings


def test_every_image_below_a_folder_is_there_once(tmp_path):
    names = ["a.png", "b.png", "deep/er/c.png", "x y/d.png", *(f"{i}.png" for i in range(20))]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    train, test = (sources.get_source(f"unlabelled:{tmp_path}", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (22, 2)
    where = [source.where(i) for source in (train, test) for i in range(len(source))]
    assert sorted(where) == sorted(str(tmp_path / name) for name in names)
    assert set(train.features) == {"image"} and train.class_names == () and isinstance(train[0]["image"], bytes)
    assert train.fingerprint() != test.fingerprint()
    assert len(sources.get_source(f"unlabelled:{tmp_path}", "train[:5]")) == 5


def test_what_is_no_folder_of_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="unlabelled:/nowhere: no such folder"):
        sources.get_source("unlabelled:/nowhere", "train")
    (tmp_path / "a.mov").write_bytes(b"")
    with pytest.raises(UserError, match="holds 0 images, two or more are needed: ignored 1 files: 1 .mov"):
        sources.get_source(f"unlabelled:{tmp_path}", "train")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("self_distill", "has no class folders.* For a task without classes, unlabelled:.* is all images below it"),
        ("detect", "is in no layout with boxes that docs/data.md lists. As a folder of classes: .* has no class folders"),
        ("classify", r"has no class folders, hence no images: expected \S+ or \S+$"),
    ],
)
def test_a_folder_that_is_none_of_classes_says_what_the_task_takes(tmp_path, task, said):
    Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(tmp_path / "a.png")
    needs = tasks.needs(Settings.from_config(tiny.config(dataset=str(tmp_path), task={"type": task})))
    with pytest.raises(UserError, match=said):
        sources.get_source(str(tmp_path), "train", needs=needs)


def test_a_canvas_depends_on_its_number_and_shows_its_digit():
    train, test = (sources.get_source("digit_canvas", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (10_000, 1_000)
    np.testing.assert_array_equal(train[7]["image"], sources.get_source("digit_canvas", "train[5:9]")[2]["image"])
    for i in range(50):
        image = train[i]["image"].astype(float)
        paper = np.median(image.reshape(-1, 3), axis=0)
        far = np.abs(image - paper).mean(axis=-1) > 40  # the ink, which is at least 80 away where it is full
        assert image.shape == (32, 32, 3) and 10 < far.sum() < 32 * 32 / 2
    assert np.bincount([train[i]["label"] for i in range(200)], minlength=10).min() > 5
