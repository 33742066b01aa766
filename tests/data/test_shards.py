"""Shards give the pairs, classes and images that were put into them, from an index made once; what is wrong is named."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import shards
from vit_jax.data.sources import get_source
from vit_jax.errors import UserError


def jpeg(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(buffer, "jpeg")
    return buffer.getvalue()


def write(path, members):
    """A tar file of {name: content}; a `TarInfo` stands for itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if isinstance(content, tarfile.TarInfo) else len(content)
            tar.addfile(info, None if info is content else io.BytesIO(content))


def pair(key, text, value=7):
    return {f"{key}.jpg": jpeg(value), f"{key}.txt": text.encode()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three shards of two, one and two pairs, in every way that a pair may be written."""
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    write(
        folder / "train-08.tar",
        pair("a", "a red thing\nein rotes Ding\n", 1) | {"a.cls": b"3"} | pair("sub/b", "two", 2) | {"a.seg.png": b""},
    )
    write(folder / "train-09.tar", {"n.json": json.dumps({"caption": "three", "x": 1}).encode(), "n.PNG": jpeg(3)})
    both = {"p.jpg": jpeg(4), "p.json": json.dumps({"caption": "not this"}).encode(), "p.txt": b"\xef\xbb\xbffour"}
    listed = {"q.json": json.dumps({"text": ["five", "fünf"]}).encode(), "q.webp": jpeg(5)}
    write(folder / "train-10.tar", both | listed)
    return folder


TEXTS = [("a red thing", "ein rotes Ding"), ("two",), ("three",), ("four",), ("five", "fünf")]


def test_pairs_come_in_order_by_pattern_and_by_folder(folder):
    pattern = str(folder / "train-{08..10}.tar")
    for dataset in (pattern, str(folder)):
        source = get_source(dataset, "train")
        assert [example["text"] for example in source] == [source.texts(i) for i in range(5)] == TEXTS
        assert [example["image"] for example in source] == [jpeg(i) for i in range(1, 6)]
    assert source.where(1).endswith("train-08.tar: sub/b") and set(source.features) == {"image", "text"}
    assert [example["text"] for example in get_source(pattern, "train[40%:80%]")] == TEXTS[2:4]
    assert get_source(pattern, "train[2:]").where(0).endswith("train-09.tar: n")
    write(folder / "val" / "0.tar", pair("z", "held out"))
    assert get_source(str(folder), "test")[0]["text"] == ("held out",)


def test_other_members_are_counted(folder, caplog):
    caplog.set_level("INFO", "vit_jax")
    assert len(get_source(str(folder), "train")) == 5
    assert [r.getMessage().partition(": ")[2] for r in caplog.records] == ["ignored 2 members: 1 .cls, 1 .seg.png"]


def test_an_index_is_made_once_and_anew_for_another_file(folder, monkeypatch):
    pattern = str(folder / "train-{08..10}.tar")
    before = get_source(pattern, "train").fingerprint()
    assert len(list(folder.glob(".train-*.tar.index.npz"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_listed", None)
        assert get_source(pattern, "train").fingerprint() == before
    write(folder / "train-09.tar", pair("n", "drei"))
    changed = get_source(pattern, "train")
    assert changed[2]["text"] == ("drei",) and changed.fingerprint()["sizes"] != before["sizes"]
    index = folder / ".train-09.tar.index.npz"
    whole, arrays = index.read_bytes(), dict(np.load(index))
    index.write_bytes(whole[:50])
    assert get_source(pattern, "train")[2]["text"] == ("drei",)
    for name, wrong in (("texts", arrays["texts"] + (1 << 40)), ("images", -arrays["images"]), ("keys", arrays["keys"][:0])):
        np.savez(index, **arrays | {name: wrong})
        assert get_source(pattern, "train")[2]["text"] == ("drei",)


def test_where_nothing_can_be_written_the_index_is_in_the_cache(folder, tmp_path, monkeypatch):
    real = shards.write_atomically

    def write_atomically(path, write):
        if path.parent == folder:
            raise PermissionError(13, "read-only", str(path))
        real(path, write)

    monkeypatch.setattr(shards, "write_atomically", write_atomically)
    assert len(get_source(str(folder), "train")) == 5
    assert len(list((tmp_path / "cache" / "shards").glob("*.npz"))) == 3 and not list(folder.glob(".*"))
    monkeypatch.setattr(shards, "_listed", None)
    assert [example["text"] for example in get_source(str(folder), "train")] == TEXTS


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.txt": b"x"}, "s.tar: a has a text without an image"),
        ({"a.jpg": b"x"}, "s.tar: a has an image without a text"),
        ({"a.jpg": b"x", "a.txt": b" \n"}, "s.tar: a: its text is empty"),
        ({"a.jpg": b"x", "a.txt": b"\xff\xfe"}, "s.tar: a: its text is not in UTF-8"),
        ({"a.jpg": b"x", "a.json": b'{"caption": NaN}'}, "s.tar: a: its JSON needs text or caption.*it has caption=nan"),
        ({"a.jpg": b"x", "a.json": b'{"url": "x"}'}, "it has neither"),
        ({"a.jpg": b"x", "a.json": b'{"text": []}'}, "it has text=\\[\\]"),
        ({"a.jpg": b"x", "a.json": b'{"text": '}, "s.tar: a: its text is no JSON"),
        ({"a.jpg": b"x", "a.json": b"[" * 100_000}, "s.tar: a: its text is no JSON"),
        ({"a.jpg": b"x", "a.png": b"x", "a.txt": b"x"}, "s.tar: a.png is the second image of its key"),
        ({"a.jpg": b"x", "a.txt": b"x" * (shards.LARGEST_TEXT + 1)}, "its text has 1,048,577 bytes, allowed are 1,048,576"),
        ({"readme.md": b"x"}, "s.tar holds no pairs of an image"),
    ],
)
def test_what_is_wrong_with_a_pair_is_named(tmp_path, members, message):
    write(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=message):
        get_source(str(tmp_path / "s.tar"), "train")
    assert not list(tmp_path.glob(".*"))


def test_only_regular_files_whole_and_unpacked_are_read(tmp_path):
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write(tmp_path / "link.tar", {"a.jpg": link, "a.txt": b"x"})
    write(tmp_path / "cut.tar", pair("a", "x"))
    whole = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:700])
    (tmp_path / "none.tar").write_bytes(b"x" * 5000)
    os.mkfifo(tmp_path / "pipe.tar")
    wrong = {
        "link.tar": "link.tar: a.jpg is a link, a device or a sparse file",
        "cut.tar": "cut.tar.* is cut off",
        "none.tar": "none.tar is no tar file, or is cut off",
        "pipe.tar": "pipe.tar: this is a named pipe, not a file",
        "a.tar.gz": "unpack it to .tar",
        "x-{3..1}.tar": "{3..1} holds no number",
        "missing.tar": "missing.tar cannot be read: No such file",
    }
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message):
            get_source(str(tmp_path / name), "train")
    with pytest.raises(UserError, match=r"is all for training: name parts, such as --config.pp.train='train\[:99%\]'"):
        get_source(str(tmp_path / "cut.tar"), "test")


def classes(folder, split="train"):
    return get_source(str(folder), split, needs=("image", "label"))


def test_classes_are_numbers_or_names_in_an_order_that_mixes_them(tmp_path):
    write(tmp_path / "train-0.tar", {f"{i:02}.{kind}": x for i in range(8) for kind, x in (("jpg", jpeg(i)), ("cls", b"0\n"))})
    json_of = {f"{i:02}.json": json.dumps({"label": 2, "text": "not read"}).encode() for i in range(8, 16)}
    write(tmp_path / "train-1.tar", json_of | {f"{i:02}.png": jpeg(i) for i in range(8, 16)})
    source = classes(tmp_path)
    found = [(example["label"], example["image"], source.where(i)[-2:]) for i, example in enumerate(source)]
    assert sorted(found, key=lambda x: x[2]) == [(2 if i > 7 else 0, jpeg(i), f"{i:02}") for i in range(16)]
    assert source.class_names == ("0", "1", "2") and {label for label, *_ in found[:6]} == {0, 2}
    part = classes(tmp_path / "train-{0..1}.tar", "train[50%:]")
    assert [part[i] for i in range(len(part))] == [source[i] for i in range(8, 16)]
    assert part.fingerprint()["names"] != source.fingerprint()["names"]
    (tmp_path / "classes.txt").write_text("cat\ndog\nö\n")
    write(tmp_path / "test-0.tar", {"a.jpg": jpeg(1), "a.cls": b"1", "b.jpg": jpeg(2), "b.cls": b"7"})
    test = classes(tmp_path, "test")
    assert test.class_names == ("cat", "dog", "ö")
    by_key = {test.where(i)[-1]: i for i in range(2)}
    assert test[by_key["a"]] == {"image": jpeg(1), "label": 1}
    with pytest.raises(UserError, match="test-0.tar: b is of class 7, which no shard for training has"):
        test[by_key["b"]]
    named = {"a.jpg": jpeg(1), "a.cls": "ö".encode(), "b.jpg": jpeg(2), "b.json": b'{"cls": "dog"}'}
    write(tmp_path / "names.tar", named)
    assert {classes(tmp_path / "names.tar")[i]["label"] for i in range(2)} == {0, 1}
    assert classes(tmp_path / "names.tar").class_names == ("dog", "ö")


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.cls": b"1"}, "s.tar: a has a class without an image"),
        (
            {"a.jpg": b"x", "a.txt": b"x"},
            "s.tar: a has an image without a class: add .cls or .json, or remove it; .* unlabelled:",
        ),
        ({"a.jpg": b"x", "a.cls": b" "}, "s.tar: a has class none: .cls, or label or cls in .json, is a number or a name"),
        ({"a.jpg": b"x", "a.json": b'{"label": true}'}, "s.tar: a has class True"),
        ({"a.jpg": b"x", "a.cls": b"\0"}, r"s.tar: a has class .x00: .cls, or label or cls"),
        ({"a.jpg": b"x", "a.json": b"[1"}, "s.tar: a: its class cannot be read"),
        ({"a.jpg": b"x", "a.cls": b"\xff"}, "s.tar: a: its class cannot be read"),
        ({"a.jpg": b"x", "a.cls": b"9" * 99}, "has class 9.*, allowed are 0 to 999,999"),
        ({"a.jpg": b"x", "a.cls": b"0"}, "has one class only, 0: two or more are needed"),
        (
            {"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x", "b.cls": b"-1"},
            r"some classes are numbers .*, and others names \(1 and -1\)",
        ),
        ({"a.md": b"x"}, "s.tar holds no pairs of an image .* and .cls or .json"),
    ],
)
def test_what_is_wrong_with_a_class_is_named(tmp_path, members, message):
    write(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=message):
        classes(tmp_path / "s.tar")


def test_images_alone_are_read_whatever_else_there_is(tmp_path):
    write(tmp_path / "train-0.tar", {f"{i:02}.{kind}": x for i in range(20) for kind, x in (("jpg", jpeg(i)), ("cls", b"0"))})
    for dataset in (f"unlabelled:{tmp_path}/train-0.tar", f"unlabelled:{tmp_path}"):
        train, test = (get_source(dataset, split) for split in ("train", "test"))
        assert (len(train), len(test), set(train.features)) == (18, 2, {"image"})
        assert sorted(example["image"] for source in (train, test) for example in source) == sorted(map(jpeg, range(20)))
    write(tmp_path / "val-0.tar", {"a.jpg": jpeg(1)})
    assert [len(get_source(f"unlabelled:{tmp_path}", split)) for split in ("train", "test", "train[:5]")] == [20, 1, 5]
