"""Which files are images, for every command: links, leftovers of file managers, pipes, and what is said of the rest."""

import importlib.util
import os

import pytest

from vit_jax.data import listing
from vit_jax.data.host import decode
from vit_jax.data.sources import FolderSource
from vit_jax.errors import UserError


def fill(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"content")
    return str(root)


@pytest.fixture
def album(tmp_path):
    """A folder of two classes as a camera, a NAS, macOS and Windows leave it, with links to a folder and to a file."""
    root, elsewhere = tmp_path / "album", tmp_path / "elsewhere"
    fill(elsewhere, "e.jpg", "deep/f.png")
    leftovers = [".thumbnails/t.jpg", "__MACOSX/cat/m.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "._a.jpg", "Thumbs.db"]
    leftovers += [".DS_Store", "desktop.ini", "#recycle/old.jpg", "lost+found/x.jpg", "$RECYCLE.BIN/y.jpg"]
    photos = ["a.jpg", "b.TIF", "c.avif", "d.tiff"]
    for folder in ("cat", "dog"):
        fill(root / folder, *photos, *leftovers, "notes.txt", "clip.MOV")
    os.symlink(elsewhere, root / "cat/linked")
    os.symlink(elsewhere / "e.jpg", root / "dog/link to a file.jpg")
    os.symlink(root / "cat", root / "cat/circle")
    os.symlink(root / "cat/itself.jpg", root / "cat/itself.jpg")
    os.mkfifo(root / "cat/pipe.jpg")
    os.symlink("/dev/zero", root / "dog/zero.png")
    return root


EXPECTED = {f"{folder}/{name}" for folder in ("cat", "dog") for name in ("a.jpg", "b.TIF", "c.avif", "d.tiff")}
EXPECTED |= {"cat/linked/e.jpg", "cat/linked/deep/f.png", "dog/link to a file.jpg"}


def test_training_and_the_commands_see_the_same_images(album, capsys):
    found = [os.path.relpath(path, album) for path in listing.find_images([str(album)])]
    assert len(found) == len(EXPECTED) and set(found) == EXPECTED
    assert found == sorted(found, key=lambda name: name.split("/"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{album}: ignored 2 files: 2 .mov; " in said
    for name in ("cat/itself.jpg", "cat/pipe.jpg", "dog/zero.png"):
        assert name in said
    parts = [FolderSource(str(album), split) for split in ("train", "test")]
    trained = {os.path.relpath(part.where(i), album) for part in parts for i in range(len(part))}
    assert trained == EXPECTED


def test_images_that_need_a_package_are_left_out_and_the_package_is_named(tmp_path, monkeypatch, capsys):
    path = fill(tmp_path, "a.jpg", "b.heic", "c.HEIC", "d.avif")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(decode.pillow_features, "check", lambda name: False)
    assert [found.name for found in listing.find_images([path])] == ["a.jpg"]
    said = capsys.readouterr().err
    assert "2 .heic (pip install pillow-heif)" in said and "1 .avif (pip install 'pillow>=11.3')" in said
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert len(list(listing.find_images([path]))) == 4


def test_files_are_taken_as_given_and_what_is_not_there_is_an_error(tmp_path):
    path = fill(tmp_path, "data.bin", "empty/notes.txt")
    assert [found.name for found in listing.find_images([f"{path}/data.bin"])] == ["data.bin"]
    os.symlink("nowhere", tmp_path / "broken.jpg")  # reading it says why, and does not stop the others
    assert len(list(listing.find_images([f"{path}/broken.jpg", f"{path}/data.bin"]))) == 2
    with pytest.raises(UserError, match=r"no such image or folder: .*two\\nlines"):
        list(listing.find_images([f"{path}/two\nlines"]))
    with pytest.raises(UserError, match=r"empty holds no images \(.jpg, .*\): ignored 1 files: 1 .txt"):
        list(listing.find_images([f"{path}/empty"]))
