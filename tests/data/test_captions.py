"""Every layout of captions gives the same pairs; what is wrong with a pair is an error that names file and line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import captions
from vit_jax.data.sources import get_source
from vit_jax.errors import UserError

PAIRS = {"a.jpg": ("a red, round thing", "ein rotes Ding"), "sub/b.jpg": ('a "blue" thing',)}


def write_images(folder):
    for name in PAIRS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6, 3), 99, np.uint8)).save(folder / name)


def jsonl(folder):
    rows = [{"image": name, "text": list(texts) if len(texts) > 1 else texts[0]} for name, texts in PAIRS.items()]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))


def csv(folder):
    rows = [f'{name},"{text.replace(chr(34), chr(34) * 2)}"' for name, texts in PAIRS.items() for text in texts]
    (folder / "captions.csv").write_bytes("\r\n".join(["\ufeffimage,text", *rows]).encode())


def tsv(folder):
    rows = [f"{text.replace(chr(34), chr(34) * 2)}" for texts in PAIRS.values() for text in texts]
    names = [name for name, texts in PAIRS.items() for _ in texts]
    lines = [f'7\t"{text}"\t{name}' for name, text in zip(names, rows, strict=True)]
    (folder / "captions.tsv").write_text("\n".join(["id\ttext\timage", *lines]) + "\n")


def beside(folder):
    for name, texts in PAIRS.items():
        (folder / name).with_suffix(".txt").write_text("\n".join(texts) + "\n")


@pytest.mark.parametrize("write", [jsonl, csv, tsv, beside])
@pytest.mark.parametrize("top", ["", "train"])
def test_every_layout_gives_the_same_pairs(tmp_path, write, top):
    write_images(tmp_path / top)
    write(tmp_path / top)
    source = get_source(str(tmp_path), "train")
    assert [example["text"] for example in source] == list(PAIRS.values())
    assert source[1]["image"] == (tmp_path / top / "sub/b.jpg").read_bytes()
    assert source.where(1).endswith("sub/b.jpg") and set(source.features) == {"image", "text"}
    assert [example["text"] for example in get_source(str(tmp_path), "train[1:]")] == [PAIRS["sub/b.jpg"]]


def test_splits_are_folders_of_their_own_or_parts(tmp_path):
    for name in ("train", "val"):
        write_images(tmp_path / name)
        jsonl(tmp_path / name)
    (tmp_path / "val" / "captions.jsonl").write_text('{"image": "a.jpg", "text": "held out"}')
    assert get_source(str(tmp_path), "test")[0]["text"] == ("held out",)
    with pytest.raises(UserError, match=r"has captions for train, not for 'test': name parts.*train\[90%:\]"):
        captions.open_folder(str(tmp_path / "train"), "test")


def test_other_wording_is_other_data(tmp_path):
    write_images(tmp_path)
    jsonl(tmp_path)
    before = get_source(str(tmp_path), "train").fingerprint()
    file = tmp_path / "captions.jsonl"
    file.write_text(file.read_text().replace("red", "green"))
    after = get_source(str(tmp_path), "train").fingerprint()
    assert {name for name in before if before[name] != after[name]} == {"texts"}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"image": "c.jpg", "text": "x"}', "its image .*c.jpg does not exist: add it"),
        ('{"image": "a.jpg", "text": " "}', "the caption of a.jpg is empty"),
        ('{"image": "a.jpg", "text": []}', "needs the fields image, a path, and text"),
        ('{"image": "a.jpg", "caption": "x"}', "needs the fields image.*it has image, caption"),
        ('{"image": "a.jpg", "text": 3}', "needs the fields image.*it has image, text=3"),
        ('{"image": "a.jpg", "text": NaN}', "needs the fields image.*it has image, text=nan"),
        ('{"image": "' + "a" * 300 + '", "text": "x"}', "its image .* does not exist"),
        ('["a.jpg", "x"]', "must be an object such as"),
        ('{"image": ', "is no JSON"),
    ],
)
def test_a_wrong_pair_is_named(tmp_path, line, message):
    write_images(tmp_path)
    (tmp_path / "captions.jsonl").write_text(f'{{"image": "a.jpg", "text": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match=f"captions.jsonl, line 2:? ?{message}"):
        captions.open_folder(str(tmp_path), "train")


def test_what_is_wrong_with_files_is_named(tmp_path):
    write_images(tmp_path)
    beside(tmp_path)
    (tmp_path / "sub" / "b.txt").write_text("\n")
    with pytest.raises(UserError, match="b.txt: the caption of sub/b.jpg is empty"):
        captions.open_folder(str(tmp_path), "train")
    (tmp_path / "sub" / "b.txt").unlink()
    with pytest.raises(UserError, match="sub/b.jpg has no caption: write .*b.txt"):
        captions.open_folder(str(tmp_path), "train")
    (tmp_path / "sub" / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="b.txt is no text in UTF-8"):
        captions.open_folder(str(tmp_path), "train")
    jsonl(tmp_path)
    csv(tmp_path)
    with pytest.raises(UserError, match=r"captions.jsonl and captions.csv: keep one"):
        captions.open_folder(str(tmp_path), "train")


def coco(folder, annotations=None):
    """COCO's folder of two splits of the same images."""
    for split in ("train2017", "val2017"):
        write_images(folder / split)
        images = [{"id": i, "file_name": name} for i, name in enumerate(PAIRS)]
        pairs = [{"id": 7, "image_id": i, "caption": text} for i, texts in enumerate(PAIRS.values()) for text in texts]
        content = {"images": images, "annotations": pairs if annotations is None else annotations}
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))


def test_cocos_captions_are_read_and_chosen_where_there_are_boxes_too(tmp_path):
    coco(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "val2017").rename(tmp_path / "images" / "val2017")
    for split in ("train", "train2017", "test", "val"):
        source = get_source(str(tmp_path), split)
        assert [example["text"] for example in source] == list(PAIRS.values())
    assert source.where(1).endswith("val2017/sub/b.jpg")
    boxes = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    boxes["images"] = [{"id": 0, "file_name": "a.jpg", "width": 6, "height": 4}]
    for split in ("train2017", "val2017"):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(boxes))
    assert "boxes" in get_source(str(tmp_path), "train").features
    assert "boxes" in get_source(str(tmp_path), "train", needs=("image", "boxes")).features
    assert "text" in get_source(str(tmp_path), "train", needs=("image", "text")).features


@pytest.mark.parametrize(
    "annotation, message",
    [
        ({"id": 9, "image_id": 5, "caption": "x"}, "annotation 9 is of image 5, which the file does not list"),
        ({"id": 9, "image_id": [1], "caption": "x"}, r"annotation 9 is of image \[1\]"),
        ({"id": 9, "image_id": 0, "caption": float("nan")}, "annotation 9: its caption is nan, not a sentence"),
        ({"id": 9, "image_id": 0, "caption": " "}, "annotation 9: the caption of a.jpg is empty"),
        ({"id": 9, "image_id": 0, "caption": "x"}, "sub/b.jpg has no caption: write one, or remove the image"),
        ({"id": 9, "image_id": 0}, "is no COCO file of images, and annotations with image_id and caption: KeyError"),
        (7, "is no COCO file of images"),
    ],
)
def test_a_wrong_annotation_of_coco_is_named(tmp_path, annotation, message):
    coco(tmp_path, [annotation])
    with pytest.raises(UserError, match=rf"captions_train2017.json:? ?{message}"):
        get_source(str(tmp_path), "train")


def test_what_coco_lists_and_is_not_there_is_named(tmp_path):
    coco(tmp_path)
    (tmp_path / "val2017" / "a.jpg").unlink()
    with pytest.raises(UserError, match="annotation 7: its image .*val2017/a.jpg does not exist"):
        get_source(str(tmp_path), "test")


@pytest.mark.parametrize("top", ["", "train"])
def test_a_note_beside_class_folders_is_no_caption(tmp_path, top):
    folder = tmp_path / top
    for name in ("cat/0.png", "cat/1.png", "dog/2.png", "x.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name)
    (folder / "x.txt").write_text("a note about this folder")
    if top:
        shutil.copytree(folder / "cat", tmp_path / "test" / "cat")
    assert get_source(str(tmp_path), "train").class_names == ("cat", "dog")
    (folder / "cat" / "1.txt").write_text("a cat")
    with pytest.raises(UserError, match="cat/0.png has no caption: write .*cat/0.txt"):
        get_source(str(tmp_path), "train")


def test_folders_for_training_and_testing_are_not_mixed_by_a_note_above_them(tmp_path):
    for name in ("train", "test"):
        write_images(tmp_path / name)
        beside(tmp_path / name)
    shutil.copy(tmp_path / "train" / "a.jpg", tmp_path / "x.jpg")
    (tmp_path / "x.txt").write_text("a note")
    assert len(get_source(str(tmp_path), "train")) == len(get_source(str(tmp_path), "test")) == 2
