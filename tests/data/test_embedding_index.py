"""An index of photos: what is computed again and what is not, what is kept, damaged files, and how fast it is searched."""

import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from vit_jax.data import embedding_index
from vit_jax.data.listing import list_images
from vit_jax.errors import UserError


def photo(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)).save(path)


def embed(pictures):
    """The first three pixels' first colours, of length 1."""
    z = np.stack([picture[0, :3, 0] for picture in pictures]).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


class Folder:
    """A folder of photos with its index, and how many photos each update computes."""

    def __init__(self, path):
        self.path, self.index, self.kept = path, None, 0

    def update(self, **options):
        def keep(index):
            self.kept += 1
            embedding_index.save(index, self.path / ".index.npz", model="m")

        names = list_images(os.fspath(self.path)).images
        known = embedding_index.load(self.path / ".index.npz", model="m")
        options = {"embed": embed, "batch": 3, "keep": keep} | options
        self.index, changes = embedding_index.update(known, self.path, names, **options)
        return changes

    def check(self):
        """Every embedding is that of the file with its name, in the file that is kept too."""
        loaded = embedding_index.load(self.path / ".index.npz", model="m")
        assert loaded.names == self.index.names
        np.testing.assert_array_equal(loaded.embeddings, self.index.embeddings)
        pictures = [np.asarray(Image.open(self.path / name)) for name in self.index.names]
        np.testing.assert_array_equal(self.index.embeddings, embed(pictures))


@pytest.fixture
def folder(tmp_path):
    for i in range(7):
        photo(tmp_path / ("a" if i % 2 else "b") / f"{i}.png", i)
    return Folder(tmp_path)


def test_only_new_contents_are_computed(folder):
    root = folder.path
    assert folder.update() == embedding_index.Changes(7, 0, {})
    folder.check()
    assert folder.update() == embedding_index.Changes(0, 0, {}) and folder.kept == 1
    shutil.copy(root / "a" / "1.png", root / "copy.png")
    (root / "a" / "3.png").rename(root / "moved.png")
    os.utime(root / "b" / "0.png", (1, 1))
    assert folder.update() == embedding_index.Changes(0, 1, {}) and folder.kept == 2
    folder.check()
    photo(root / "b" / "2.png", 99)
    photo(root / "new.png", 98)
    (root / "b" / "4.png").unlink()
    assert folder.update() == embedding_index.Changes(2, 1, {}) and len(folder.index) == 8
    folder.check()
    assert folder.update() == embedding_index.Changes(0, 0, {}) and folder.kept == 3


def test_names_that_are_no_text_are_kept(folder):
    os.rename(folder.path / "a" / "1.png", os.fsencode(folder.path) + b"/a/\xff\n.png")
    folder.update()
    folder.check()
    assert folder.update().embedded == 0


def test_damaged_photos_are_told_and_left_out(folder):
    (folder.path / "bad.jpg").write_bytes(b"nothing")
    changes = folder.update()
    assert (
        changes.embedded == 7
        and list(changes.unreadable) == ["bad.jpg"]
        and "not a known image" in changes.unreadable["bad.jpg"]
    )
    assert folder.update().unreadable.keys() == {"bad.jpg"} and folder.kept == 1
    for name in folder.index.names:
        (folder.path / name).write_bytes(b"")
    folder.update()
    assert folder.index is None


def test_what_is_done_is_kept_when_the_work_is_interrupted(folder, monkeypatch):
    calls = []

    def interrupted(pictures):
        calls.append(len(pictures))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(pictures)

    with pytest.raises(KeyboardInterrupt):
        folder.update(embed=interrupted)
    assert calls == [3, 3, 1] and folder.kept == 1 and folder.update().embedded == 1
    folder.check()
    monkeypatch.setattr(embedding_index, "KEEP_EVERY", -1)
    for i in range(6):
        photo(folder.path / f"{i}.png", 50 + i)
    folder.update()
    assert folder.kept == 4, "after each batch, and not once more"
    folder.check()


def test_files_that_are_no_index_are_refused(folder, tmp_path):
    folder.update()
    path = folder.path / ".index.npz"
    with pytest.raises(UserError, match="is an index of another model"):
        embedding_index.load(path, model="other")
    whole = path.read_bytes()
    arrays = dict(np.load(path))
    for content in (b"", whole[: len(whole) // 2], b"PK\x03\x04" + whole[4:-40], whole.replace(b"digests", b"digest_")):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            embedding_index.load(path, model="m")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="it is no file"):
        embedding_index.load(path, model="m")
    path.unlink()
    for change in ({"stamps": arrays["stamps"][:3]}, {"embeddings": arrays["embeddings"] * np.nan}, {"names": np.array("a")}):
        np.savez(path, **arrays | change)
        with pytest.raises(UserError, match="cannot be read"):
            embedding_index.load(path, model="m")


def test_the_nearest_are_those_of_a_full_sort_with_ties_in_order():
    rng = np.random.default_rng(0)
    z = np.repeat(rng.normal(size=(40, 5)).astype(np.float32), 2, axis=0)
    index = embedding_index.Index(tuple(map(str, range(80))), np.zeros((80, 2), int), np.zeros((80, 16), np.uint8), z)
    query = rng.normal(size=5).astype(np.float32)
    order = sorted(range(80), key=lambda i: (-float(z[i] @ query), i))
    for top in (1, 2, 3, 79, 80, 500):
        found = index.nearest(query, top)
        assert [name for name, _ in found] == [str(i) for i in order[:top]]
        np.testing.assert_allclose([score for _, score in found], z[order[:top]] @ query, rtol=1e-5)


def test_a_hundred_thousand_photos_are_searched_at_once():
    """50 ms where nothing else runs; the bound leaves room for machines that are busy."""
    n, rng = 100_000, np.random.default_rng(0)
    z = rng.normal(size=(n, 512)).astype(np.float32)
    index = embedding_index.Index(tuple(map(str, range(n))), np.zeros((n, 2), int), np.zeros((n, 16), np.uint8), z)
    index.nearest(z[0], 10)
    times = []
    for i in range(5):
        start = time.perf_counter()
        assert index.nearest(z[i * 777], 10)[0][0] == str(i * 777)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5, times
