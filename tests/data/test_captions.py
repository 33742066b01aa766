"""Every layout of captions gives the same pairs; what is wrong with a pair is an error that names file and line."""

import json

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
    with pytest.raises(UserError, match=r"has captions for 'train', not for 'test': name parts.*train\[90%:\]"):
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
        ('{"image": "a.jpg", "text": 3}', "needs the fields image"),
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
