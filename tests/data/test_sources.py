"""Sources: splits that tile, folders as people have them, and errors that name what is wrong."""

import logging
import os

import numpy as np
import pytest

from vit_jax.data import loader, sources
from vit_jax.data.digits import DigitsSource
from vit_jax.data.host.decode import ImageError
from vit_jax.data.sources import FolderSource, get_source
from vit_jax.data.splits import split_range
from vit_jax.errors import UserError


def fill(root, *names):
    """Makes files below root; each holds its own name, so that reading can be checked."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return str(root)


def photos(folder, count):
    return [f"{folder}/photo {i:04}.jpg" for i in range(count)]


def contents(source):
    """Returns {name: class name} of everything in the source."""
    examples = [source[i] for i in range(len(source))]
    return {example["image"].decode(): source.class_names[example["label"]] for example in examples}


def log_of(caplog, path, split):
    sources._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="vit_jax"):
        FolderSource(path, split)
    return caplog.text


# Splits


@pytest.mark.parametrize("size", [1, 3, 5, 10, 99, 1437, 50_000])
def test_percentages_tile(size):
    def part(spec):
        try:
            return list(split_range(f"train[{spec}]", {"train": size})[1])
        except UserError as error:
            assert "is empty" in str(error)
            return []

    everything = list(range(size))
    for percent in (1, 2, 10, 33, 50, 75, 98, 99, 12.5):
        assert part(f":{percent}%") + part(f"{percent}%:") == everything
        assert part(f":{percent}%") + part(f"-{100 - percent}%:") == everything
        assert part(f":-{percent}%") + part(f"-{percent}%:") == everything
    assert sum((part(f"{i}%:{i + 10}%") for i in range(0, 100, 10)), []) == everything


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(200)),
        ("test", range(50)),
        ("train[:]", range(200)),
        ("train[:98%]", range(196)),
        ("train[10%:]", range(20, 200)),
        ("train[10:20%]", range(20, 40)),
        ("train[:33.4%]", range(67)),
        ("train[:150]", range(150)),
        ("train[-20%:]", range(160, 200)),
        ("train[-30:]", range(170, 200)),
        ("train[10:-10]", range(10, 190)),
        ("test[0:50]", range(50)),
    ],
)
def test_split_syntax_is_that_of_tfds(split, expected):
    assert split_range(split, {"train": 200, "test": 50}) == (split.split("[")[0], expected)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("dev", "unknown split 'dev': allowed are train, test"),
        ("train[:98%", "unknown split"),
        ("train+test", "unknown split"),
        ("", "unknown split"),
        ("test[:0]", "is empty: 'test' has 50 examples"),
        ("train[50%:50%]", "is empty"),
        ("train[20:10]", "is empty"),
        ("train[:201]", "reaches beyond the 200 examples"),
        ("train[:101%]", "reaches beyond"),
        ("train[-201:]", "reaches beyond"),
        ("train[:1.5]", "'1.5' is no number"),
        ("train[:1.2.3%]", "'1.2.3' is no number"),
    ],
)
def test_bad_splits(split, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        split_range(split, {"train": 200, "test": 50})


# Digits


def test_digits():
    train, test = get_source("digits", "train"), get_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.num_classes == 10 and train.class_names == tuple("0123456789") and not train.exif_rotated
    image = train[0]["image"]
    assert image.dtype == np.uint8 and image.shape == (8, 8, 1) and type(train[0]["label"]) is int
    assert max(train[i]["image"].max() for i in range(50)) == 255  # 16 is white
    assert train.where(17) == "digits train, example 17"
    # Stratified, and no image on both sides more often than the data set itself holds duplicates.
    counts = np.bincount([test[i]["label"] for i in range(360)], minlength=10)
    assert counts.min() >= 34 and counts.max() <= 38
    assert len({train[i]["label"] for i in range(60)}) == 10


def test_digits_are_all_there_and_fixed():
    from sklearn.datasets import load_digits

    sources = [get_source("digits", split) for split in ("train[:98%]", "train[98%:]", "test")]
    got = sorted((s[i]["label"], s[i]["image"].tobytes()) for s in sources for i in range(len(s)))
    digits = load_digits()
    expected = np.floor(digits.images * 255 / 16 + 0.5).astype(np.uint8)  # half up: 8 -> 127.5 -> 128
    assert got == sorted((int(y), x.tobytes()) for x, y in zip(expected, digits.target, strict=True))
    assert [get_source("digits", "test")[i]["label"] for i in range(8)] == [7, 6, 3, 7, 7, 3, 2, 8]  # seen here once


def test_digits_0to4():
    train, test = get_source("digits_0to4", "train"), get_source("digits_0to4", "test[:50%]")
    assert train.num_classes == 5 and train.class_names == tuple("01234")
    assert {train[i]["label"] for i in range(len(train))} == set(range(5))
    full = DigitsSource("digits", "train")
    kept = [full[i]["image"] for i in range(len(full)) if full[i]["label"] < 5]
    np.testing.assert_array_equal([train[i]["image"] for i in range(len(train))], kept)
    assert len(train) + len(get_source("digits_0to4", "test")) == 901 and len(test) < 100
    with pytest.raises(UserError, match="allowed are train, test"):
        get_source("digits", "validation")


# Folders: what is found


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_train_and_test_folders(tmp_path, test_name):
    names = ["train/cat/a.jpg", "train/dog/b.jpg", f"{test_name}/dog/c.jpg"]
    path = fill(tmp_path, *names)
    train = get_source(path, "train")
    assert train.class_names == ("cat", "dog") and train.num_classes == 2 and train.exif_rotated
    assert contents(train) == {"train/cat/a.jpg": "cat", "train/dog/b.jpg": "dog"}
    for split in ("test", "val", "validation"):
        test = get_source(path, split)
        assert test.class_names == ("cat", "dog")
        # 'dog' is class 1 although it is the first, and only, test folder.
        assert contents(test) == {f"{test_name}/dog/c.jpg": "dog"}
        assert test.where(0) == os.path.join(path, test_name, "dog", "c.jpg")


def test_each_of_several_test_folders_is_found_under_its_name(tmp_path):
    path = fill(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg", "test/cat/t.jpg", "val/cat/v.jpg")
    assert list(contents(FolderSource(path, "test"))) == ["test/cat/t.jpg"]
    assert list(contents(FolderSource(path, "val"))) == ["val/cat/v.jpg"]
    assert list(contents(FolderSource(path, "validation"))) == ["val/cat/v.jpg"]


def test_every_suffix_subfolders_and_links(tmp_path, caplog):
    suffixes = [".jpg", ".JPEG", ".Jpe", ".jfif", ".PNG", ".webp", ".BMP", ".gif"]
    kept = [f"train/cat/{i}{suffix}" for i, suffix in enumerate(suffixes)]
    kept += ["train/cat/2019/May/x.jpg", "train/dog/two words.jpg", "train/dog/mönch.jpg"]
    ignored = ["train/cat/readme.txt", "train/cat/jpg", "train/dog/labels.csv", "train/stray.jpg"]
    hidden = [
        "train/cat/._0.jpg",
        "train/.ipynb_checkpoints/0.jpg",
        "train/__MACOSX/cat/0.jpg",
        "train/cat/.thumbs/0.jpg",
    ]
    path = fill(tmp_path / "photos", *kept, *ignored, *hidden, "test/cat/t.jpg")
    assert sorted(contents(FolderSource(path, "train"))) == sorted(kept)
    assert "ignored 4 files" in log_of(caplog, path, "train")

    elsewhere = fill(tmp_path / "elsewhere", "e.jpg")
    os.symlink(elsewhere, tmp_path / "photos/train/eel")
    os.symlink(tmp_path / "photos/train/cat", tmp_path / "photos/train/cat/circle")
    source = FolderSource(path, "train")
    assert source.class_names == ("cat", "dog", "eel") and contents(source)["e.jpg"] == "eel"
    assert len(source) == len(kept) + 1


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", fill(tmp_path, "pets/train/cat/a.jpg", "pets/train/dog/b.jpg", "pets/test/cat/c.jpg"))
    assert len(get_source("~/pets", "train")) == 2


def test_a_class_may_be_called_train(tmp_path):
    path = fill(tmp_path, *photos("bus", 30), *photos("train", 30))
    assert FolderSource(path, "train").class_names == ("bus", "train")


# Folders: order and what is held out


def test_order_is_fixed_and_mixes_the_classes(tmp_path):
    path = fill(tmp_path, *photos("train/cat", 200), *photos("train/dog", 200), "test/cat/a.jpg")
    whole = FolderSource(path, "train")
    names = [whole.where(i) for i in range(400)]
    assert names == [FolderSource(path, "train").where(i) for i in range(400)]
    for split in ("train[:25%]", "train[-25%:]"):
        labels = [FolderSource(path, split)[i]["label"] for i in range(100)]
        assert 35 < sum(labels) < 65
    parts = [FolderSource(path, split) for split in ("train[:98%]", "train[98%:]")]
    assert [part.where(i) for part in parts for i in range(len(part))] == names
    # The order depends on the names alone, not on the machine, the folder's place or its file system: seen here once.
    assert [os.path.basename(name) for name in names[:3]] == ["photo 0103.jpg", "photo 0180.jpg", "photo 0109.jpg"]


def sides(path):
    train, test = FolderSource(path, "train"), FolderSource(path, "test")
    assert set(contents(train)).isdisjoint(contents(test))
    return contents(train), contents(test)


@pytest.mark.parametrize("top", ["", "train/"])
def test_a_tenth_is_held_out_and_stays_when_photos_are_added(tmp_path, caplog, top):
    path = fill(tmp_path, *photos(f"{top}cat", 500), *photos(f"{top}dog", 500))
    train, test = sides(path)
    assert len(train) + len(test) == 1000 and 70 < len(test) < 130
    assert set(test.values()) == {"cat", "dog"}
    assert f"{len(test)} of its 1000 images are held out" in log_of(caplog, path, "test")
    assert contents(FolderSource(path, "validation")) == test

    fill(tmp_path, *[f"{top}dog/new {i}.png" for i in range(500)], *[f"{top}ant/{i}.png" for i in range(100)])
    more_train, more_test = sides(path)
    assert train.items() <= more_train.items() and test.items() <= more_test.items()
    assert len(more_train) + len(more_test) == 1600 and len(more_test) > len(test)


def test_the_side_depends_on_nothing_but_the_name(tmp_path):
    """The two ways to write ö in Unicode name one file: macOS stores the one, Linux what it is given."""
    sources = []
    for form, folder in (("\u00f6", "linux"), ("o\u0308", "mac")):
        names = [f"cat/{form} {i}.jpg" for i in range(60)] + photos("dog", 60)
        path = fill(tmp_path / folder, *names)
        sources.append([name.replace("o\u0308", "\u00f6") for name in contents(FolderSource(path, "test"))])
    assert sources[0] == sources[1] and any("\u00f6" in name for name in sources[0])


def test_tiny_folders_still_have_both_sides(tmp_path):
    for count in range(1, 8):  # by chance alone, a tenth of so few is mostly none
        path = fill(tmp_path / str(count), *photos("cat", count), *photos("dog", count + 1))
        train, test = sides(path)
        assert test and set(train.values()) == {"cat", "dog"}, count


def test_a_class_is_never_held_out_whole(tmp_path):
    path = fill(tmp_path, *[f"class {i:03}/photo.jpg" for i in range(100)], *photos("cat", 100))
    train, test = sides(path)
    assert len(set(train.values())) == 101 and set(test.values()) == {"cat"}


# Folders: names as file systems allow them


def test_what_is_left_out_is_counted_by_suffix_once(tmp_path, caplog):
    names = ["cat/a.txt", "cat/b.txt", "dog/c.csv", "dog/no suffix", "stray.jpg", "notes.md"]
    path = fill(tmp_path, *photos("cat", 20), *photos("dog", 20), *names)
    os.mkfifo(tmp_path / "cat/pipe.jpg")
    os.symlink(tmp_path / "gone.jpg", tmp_path / "cat/link.jpg")
    expected = (
        f"{path}: ignored 6 files: 2 .txt, 1 .csv, 1 .jpg outside a class folder, 1 .md outside a class folder, "
        "1 without a suffix; cat/link.jpg, cat/pipe.jpg: no regular file (a pipe, device or broken link)"
    )
    log_of(caplog, path, "train")
    FolderSource(path, "test")
    said = [message for message in caplog.messages if "ignored" in message]
    assert said == [expected]


def test_the_two_forms_of_a_letter_are_one_class(tmp_path):
    """macOS writes é as e and an accent: copies of one folder from two machines lie beside each other."""
    one, two = "caf\u00e9", "cafe\u0301"
    path = fill(tmp_path, f"train/{one}/a.jpg", f"train/{two}/b.jpg", "train/dog/c.jpg", f"test/{two}/d.jpg")
    assert len(os.listdir(tmp_path / "train")) == 3  # or this file system says nothing
    train, test = FolderSource(path, "train"), FolderSource(path, "test")
    assert train.class_names == test.class_names == (one, "dog")
    assert contents(train) == {f"train/{one}/a.jpg": one, f"train/{two}/b.jpg": one, "train/dog/c.jpg": "dog"}
    assert contents(test) == {f"test/{two}/d.jpg": one}


def test_any_name_that_a_file_system_allows(tmp_path, caplog):
    """Bytes that are no UTF-8, line breaks, control characters; printable wherever they are shown, and read all the same."""
    names = [b"bad \xff\xfe", b"two\nlines", b"bell\x07", "mönch".encode()]
    for name in names:
        folder = os.path.join(os.fsencode(tmp_path), b"train", name)
        os.makedirs(folder)
        for file in (b"a\xff\n.jpg", b"b.JPG", b"c\x1b[2J.txt"):
            with open(os.path.join(folder, file), "wb") as f:
                f.write(b"content")
    fill(tmp_path, "test/mönch/d.jpg")
    log = log_of(caplog, str(tmp_path), "train")
    source = FolderSource(str(tmp_path), "train")
    assert source.class_names == tuple(sorted(os.fsdecode(name) for name in names))
    assert len(source) == 8 and all(source[i]["image"] == b"content" for i in range(8))
    places = [source.where(i) for i in range(8)]
    assert all(place.isprintable() and place.isascii() or "mönch" in place for place in places)
    assert any(place.endswith("train/two\\nlines/a\\udcff\\n.jpg") for place in places)
    assert "ignored 4 files: 4 .txt" in log
    with pytest.raises(UserError) as caught:
        FolderSource(fill(tmp_path, "test/new\nclass/e.jpg"), "test")
    assert str(caught.value).isprintable() and "new\\nclass: training has no class" in str(caught.value)


# Folders: fingerprints


def test_a_fingerprint_tells_what_has_changed(tmp_path):
    def changed():
        now = FolderSource(path, "train").fingerprint()
        assert set(now) == set(before) and all(type(value) in (str, int) for value in now.values())
        return {key for key in now if now[key] != before[key]}

    path = fill(tmp_path, *photos("train/cat", 20), *photos("train/dog", 20), "test/cat/a.jpg")
    before = FolderSource(path, "train").fingerprint()
    assert before["count"] == 40 and before == FolderSource(path, "train").fingerprint()
    assert changed() == set()

    train = tmp_path / "train"
    (train / "cat/photo 0003.jpg").rename(train / "cat/other.jpg")
    assert {"names"} <= changed() <= {"names", "labels"}  # the order is that of the names' hashes
    (train / "cat/other.jpg").rename(train / "cat/photo 0003.jpg")
    fill(tmp_path, "train/dog/new.jpg")
    assert {"count", "names", "labels"} <= changed()
    (train / "dog/new.jpg").unlink()
    fill(tmp_path, *photos("train/emu", 1))
    assert {"count", "names", "labels", "classes"} <= changed()
    (train / "emu/photo 0000.jpg").unlink()
    (train / "emu").rmdir()
    assert changed() == set()
    for i in range(20):  # the classes exchange their photos, which have the same names
        (train / f"dog/photo {i:04}.jpg").write_bytes(b"a photo of a cat")
    assert changed() == {"sizes"}


def test_fingerprints_of_parts_and_of_wrapped_sources_differ_and_agree(tmp_path):
    from vit_jax.data.memory import InMemory

    digits = [get_source(name, split).fingerprint() for name in ("digits", "digits_0to4") for split in ("train", "test")]
    assert len({tuple(f.items()) for f in digits}) == 4
    path = fill(tmp_path, *photos("cat", 30), *photos("dog", 30))
    parts = [FolderSource(path, split) for split in ("train", "test", "train[:50%]", "train[50%:]")]
    assert len({tuple(part.fingerprint().items()) for part in parts}) == 4
    assert InMemory(parts[0]).fingerprint() == parts[0].fingerprint()


# Errors


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        ([], "train", "no images"),
        (["readme.txt"], "train", "no images"),
        (["a.jpg", "b.jpg"], "train", "no images"),
        (["train/a.jpg"], "train", "one class only"),
        (["photos/cat/a.jpg", "photos/dog/b.jpg"], "train", "one class only, 'photos'.*give its path"),
        (["cat/a.jpg", "dog/b.txt"], "train", "dog is a class without images"),
        (["cat/a.jpg", "dog/.hidden.jpg"], "test", "dog is a class without images"),
        (["train/cat/a.jpg", "train/dog/b.txt", "test/cat/c.jpg"], "train", "train/dog is a class without images"),
        (
            ["train/cat/a.jpg", "train/dog/b.jpg", "test/emu/c.jpg"],
            "test",
            "test/emu: training has no class 'emu', only cat, dog. Rename.*train/emu",
        ),
        (["train/cat/a.jpg", "train/dog/b.jpg", "test/cat/c.txt"], "test", "test has no images"),
        (["cat/a.jpg", "dog/b.jpg"], "train", "2 images in as many classes"),
        (["Train/cat/a.jpg", "Test/cat/b.jpg"], "train", "holds Test, Train, which must be splits"),
        (["training/cat/a.jpg", "testing/cat/b.jpg"], "train", "must be splits"),
        (["test/cat/a.jpg", "test/dog/b.jpg"], "test", "must be splits"),
        (["train/cat/a.jpg", "train/dog/b.jpg", "test/cat/c.jpg"], "dev", "allowed are train, validation, val, valid, test"),
        (["train/cat/a.jpg", "train/dog/b.jpg", "test/cat/c.jpg"], "test[:0]", "is empty"),
    ],
)
def test_bad_folders(tmp_path, names, split, message):
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        get_source(fill(tmp_path, *names), split)
    assert str(tmp_path) in str(caught.value) or split in ("dev", "test[:0]")


def test_a_test_folder_without_images_of_a_class_is_fine(tmp_path):
    path = fill(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg", "test/cat/c.jpg", "test/dog/.keep", "test/emu/notes.txt")
    assert contents(FolderSource(path, "test")) == {"test/cat/c.jpg": "cat"}


def test_a_vanished_photo_is_named(tmp_path):
    source = FolderSource(fill(tmp_path, "train/cat/a.jpg", "train/dog/b.jpg", "test/cat/c.jpg"), "test")
    (tmp_path / "test/cat/c.jpg").unlink()
    with pytest.raises(UserError, match="c.jpg cannot be read: No such file"):
        source[0]
    os.mkfifo(tmp_path / "test/cat/c.jpg")
    with pytest.raises(UserError, match="c.jpg cannot be read: this is a named pipe"):
        source[0]


@pytest.mark.parametrize(
    "dataset", ["no/such/folder/here", "./photos", "/nowhere/photos", "~/nowhere", "", "my photos", "a/../b"]
)
def test_no_such_folder(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        get_source(dataset, "train")


def test_a_file_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path, "photos.zip", "cifar10"))
    for dataset in ("photos.zip", "cifar10"):
        with pytest.raises(UserError, match="no such folder"):
            get_source(dataset, "train")


@pytest.mark.parametrize("name", ["cifar10", "cifar10:3.0.2", "imagenet_resized/64x64", "imagenet_resized/64x64:0.1.0"])
def test_tfds_names_go_to_tfds(name, tmp_path, monkeypatch):
    import vit_jax.data.tfds_source as tfds_source

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tfds_source, "TfdsSource", lambda *args, **kwargs: (args, kwargs))
    needs = ("image", "label")
    got = get_source(name, "train[:98%]", needs=needs, tfds_data_dir="prepared", tfds_manual_dir="downloaded")
    assert got == ((name, "train[:98%]"), {"needs": needs, "data_dir": "prepared", "manual_dir": "downloaded"})


def test_a_file_that_becomes_a_pipe_is_a_bad_image(tmp_path, caplog):
    source = FolderSource(fill(tmp_path, *photos("cat", 5), *photos("dog", 5)), "train")
    os.unlink(source.path(3))
    os.mkfifo(source.path(3))
    with pytest.raises(ImageError, match="cannot be read: this is a named pipe"):
        source[3]

    def label(example, *, rng, exif_rotated):
        return {"label": np.int32(example["label"])}

    next(loader.train_batches(source, label, batch_size=len(source), seed=0, skip_bad_images=True))
    assert f"skipped bad image 1: {source.where(3)} cannot be read: this is a named pipe" in caplog.text
