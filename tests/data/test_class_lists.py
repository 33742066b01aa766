"""Images whose classes stand in a list: who is what, what is held out, and what is wrong with a line."""

import json

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.sources import FolderSource, get_source
from vit_jax.errors import UserError

LABELS = {f"{i}.jpg": ("dog", "cat", "10", "9")[i % 4] for i in range(40)}
NAMES = ("9", "10", "cat", "dog")


def write(folder, labels, name="labels.csv", fields=("image", "label")):
    """Images of one colour, which is their number, and a list of them."""
    (folder / "pics").mkdir(parents=True)
    for image in labels:
        Image.fromarray(np.full((4, 4, 3), int(image.split(".")[0]), np.uint8)).save(folder / "pics" / image)
    if name.endswith("jsonl"):
        rows = [json.dumps({fields[0]: f"pics/{image}", fields[1]: label}) for image, label in labels.items()]
    else:
        between = "\t" if name.endswith("tsv") else ","
        rows = [between.join(("number", *fields)), *(between.join(("1", f"pics/{k}", v)) for k, v in labels.items())]
    (folder / name).write_text("\n".join(rows) + "\n")


def labels_of(source):
    return {source.path(i).rsplit("/", 1)[1]: source.class_names[source[i]["label"]] for i in range(len(source))}


@pytest.mark.parametrize(
    ("name", "field"),
    [("labels.csv", "image"), ("labels.tsv", "image"), ("metadata.csv", "file_name"), ("metadata.jsonl", "file_name")],
)
def test_a_list_gives_each_image_its_class(tmp_path, name, field):
    write(tmp_path, LABELS, name, (field, "label"))
    train, test = (get_source(str(tmp_path), split, needs=("image", "label")) for split in ("train", "test"))
    assert train.class_names == test.class_names == NAMES
    assert (len(train), len(test)) == (35, 5) and labels_of(train) | labels_of(test) == LABELS
    assert [train.path(i) for i in range(5)] != sorted(train.path(i) for i in range(5))
    for i in range(4):
        assert test[i]["image"].startswith(b"\xff\xd8")
    assert len(get_source(str(tmp_path), "train[:5]")) == 5 and train.fingerprint() != test.fingerprint()


def test_folders_of_splits_have_a_list_each(tmp_path):
    test = {name: label for name, label in LABELS.items() if label == "cat"}
    write(tmp_path / "train", LABELS)
    write(tmp_path / "val", test)
    for split, labels in (("train", LABELS), ("test", test), ("validation", test)):
        source = get_source(str(tmp_path), split)
        assert labels_of(source) == labels and source.class_names == NAMES
    write(tmp_path / "other", {"1.jpg": "cow"})
    (tmp_path / "other" / "labels.csv").rename(tmp_path / "val" / "labels.csv")
    (tmp_path / "val" / "pics" / "1.jpg").write_bytes((tmp_path / "other" / "pics" / "1.jpg").read_bytes())
    with pytest.raises(UserError, match="val/pics/1.jpg: training has no class 'cow', only 9, 10, cat, dog"):
        get_source(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,pics/none.jpg,cat", "labels.csv, line 42: its image .*pics/none.jpg does not exist"),
        ("1,pics/3.jpg,", "line 42: needs the fields image .* and label"),
        ("1,pics/3.jpg,cat", "line 42: pics/3.jpg has a label already"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    write(tmp_path, LABELS)
    with (tmp_path / "labels.csv").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=message):
        get_source(str(tmp_path), "train")


def test_images_may_lie_elsewhere(tmp_path):
    write(tmp_path, LABELS)
    (tmp_path / "lists").mkdir()
    text = (tmp_path / "labels.csv").read_text().replace("pics/", "../pics/").replace("../pics/3.jpg", f"{tmp_path}/pics/3.jpg")
    (tmp_path / "lists" / "labels.csv").write_text(text)
    train, test = (get_source(str(tmp_path / "lists"), split) for split in ("train", "test"))
    assert labels_of(train) | labels_of(test) == LABELS


def test_one_class_is_not_enough(tmp_path):
    write(tmp_path, dict.fromkeys(LABELS, "cat"))
    with pytest.raises(UserError, match="has one class only, 'cat'"):
        get_source(str(tmp_path), "train")


@pytest.mark.parametrize("text", ["image,text\na/1.jpg,a cat\n", "", "\xff"])
def test_lists_of_something_else_are_left_to_others(tmp_path, text):
    for name in ("a", "b"):
        write(tmp_path / name, {"1.jpg": "", "2.jpg": ""})
        (tmp_path / name / "labels.csv").unlink()
    (tmp_path / "labels.csv").write_text(text, encoding="latin-1")
    assert isinstance(get_source(str(tmp_path), "train"), FolderSource)
