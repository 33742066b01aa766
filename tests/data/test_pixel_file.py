"""Images in a mapped file: what is there is right, whoever wrote it, was killed at it, or damaged it."""

import errno
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import numpy as np
import pytest
from PIL import Image

from tests.data.test_memory import SIZE, Photos, batches
from vit_jax.data import features, memory, pixel_file, sources
from vit_jax.data.host import view
from vit_jax.data.host.decode import ImageError
from vit_jax.data.memory import kept
from vit_jax.data.pixel_file import PixelFile
from vit_jax.errors import UserError

COUNT = 300


def image(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return rng.integers(256, size=(*rng.integers(1, 60, 2), 3), dtype=np.uint8)


def write(folder: str, *numbers: int) -> None:
    file = PixelFile(Path(folder), COUNT)
    for number in numbers:
        file.put(number, image(number), b"%d" % number, stamp=7)


def check(file: PixelFile) -> list[int]:
    """The numbers of the images that are there, all of them right."""
    found = {number: file.get(number, lambda: 7) for number in range(COUNT)}
    for number, kept_one in found.items():
        if kept_one is not None:
            np.testing.assert_array_equal(kept_one[0], image(number))
            assert kept_one[1] == b"%d" % number
    return [number for number, kept_one in found.items() if kept_one is not None]


def on_disk(folder: Path, photos: features.Source, **options) -> memory.OnDisk:
    return kept(photos, cache_gb=1, cache_dir=str(folder), **options)


def the_file(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"*/{name}")
    return found


def test_processes_share_a_file_and_may_be_killed(tmp_path, monkeypatch):
    imports = "import sys; import numpy as np; from pathlib import Path; from vit_jax.data.pixel_file import PixelFile"
    own = [f"COUNT = {COUNT}", inspect.getsource(image), inspect.getsource(write)]
    code = "\n".join([imports, *own, "write(sys.argv[1], *map(int, sys.argv[2:]))"])
    monkeypatch.setattr(pixel_file, "GROWTH", 4096)
    file = PixelFile(tmp_path, COUNT)
    numbers = [str(number) for number in range(COUNT)]
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *numbers[::step]]) for step in (1, -1)]
    while len(file.written) < 40:  # while others write it is right, and it has grown
        assert all(writer.poll() in (None, 0) for writer in writers)
    writers[0].kill()
    assert len(check(file)) >= 40
    assert [writer.wait() for writer in writers][1] == 0
    assert check(file) == check(PixelFile(tmp_path, COUNT)) == list(range(COUNT))


@pytest.mark.parametrize("damage", ["zeros", "cut", "index", "entries", "note", "gone"])
def test_damage_is_noticed_and_mended(tmp_path, damage):
    write(str(tmp_path), *range(100))
    index, pixels = tmp_path / "index", tmp_path / "pixels"
    used = PixelFile(tmp_path, COUNT).used_bytes
    changes = {
        "zeros": lambda: os.pwrite(os.open(pixels, os.O_WRONLY), bytes(4096), used // 2),
        "cut": lambda: os.truncate(pixels, used // 2),
        "index": lambda: os.truncate(index, 100),
        "entries": lambda: index.write_bytes(np.random.default_rng(0).bytes(index.stat().st_size)),
        "note": lambda: os.pwrite(os.open(index, os.O_WRONLY), bytes(8), 0),  # as after a power failure
        "gone": pixels.unlink,
    }
    changes[damage]()
    file = PixelFile(tmp_path, COUNT)
    there = check(file)
    assert len(there) == 100 if damage == "note" else len(there) < 100
    write(str(tmp_path), *range(COUNT))
    assert check(PixelFile(tmp_path, COUNT)) == list(range(COUNT)) and set(there) <= set(check(file))


def test_batches_are_those_without_it_and_nothing_is_decoded_again(tmp_path):
    expected = batches(Photos())
    chex.assert_trees_all_equal(batches(on_disk(tmp_path, Photos())), expected)
    photos = Photos()
    source = on_disk(tmp_path, photos)
    read = photos.read.total()
    chex.assert_trees_all_equal(batches(source), expected)
    assert photos.read.total() == read and source[3].keys() == {"image", "label"} and source[3]["label"] == 1
    with pytest.raises(ImageError, match=r"^photos/3\.jpg: the image cannot be decoded"):
        batches(on_disk(tmp_path / "bad", Photos(bad=[3])))


def test_pixels_are_those_of_decoding_in_full(tmp_path):
    photos, options = Photos(), {"crop": 8, "exif_rotated": True}
    stored, encoded = on_disk(tmp_path, photos)[5]["image"], photos[5]["image"]
    crops = [
        view.train_image(image, np.random.default_rng(0), scaled_decoding=scaled, **options)
        for image, scaled in ((stored, True), (encoded, False), (encoded, True))
    ]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert np.any(crops[0] != crops[2])


def test_other_images_of_the_same_names_are_noticed(tmp_path, caplog):
    batches(on_disk(tmp_path, Photos()))
    others = Photos()
    others.encoded.reverse()
    chex.assert_trees_all_equal(batches(on_disk(tmp_path, others)), batches(others))
    assert "it is written anew" in caplog.text


def test_a_file_that_was_changed_is_decoded_anew(tmp_path):
    for i in range(SIZE):
        (tmp_path / "photos" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((3, 5, 3), i, np.uint8)).save(tmp_path / "photos" / "ab"[i % 2] / f"{i}.bmp")
    source = sources.get_source(str(tmp_path / "photos"), "train")
    first = [example["image"] for example in on_disk(tmp_path / "cache", source)]
    Image.fromarray(np.full((3, 5, 3), 99, np.uint8)).save(source.path(4))
    again = on_disk(tmp_path / "cache", source)
    assert [i for i in range(len(source)) if not np.array_equal(again[i]["image"], first[i])] == [4]


def test_images_may_be_kept_smaller(tmp_path):
    photos = Photos()
    source = on_disk(tmp_path, photos, cache_side=20)
    upright = memory.decode(photos[0]["image"], exif_rotated=True)
    expected = Image.fromarray(upright).resize((20, 25), Image.Resampling.BICUBIC)
    for _ in range(2):
        np.testing.assert_array_equal(source[0]["image"], expected)
    assert upright.shape[:2] == (50, 40) and photos.size(0) == (50, 40) and source.size(0) == (25, 20)
    whole = on_disk(tmp_path, photos, cache_side=400)[0]["image"]
    np.testing.assert_array_equal(whole, upright)


class Boxed(Photos):
    """Photos with boxes and sentences in place of labels."""

    features = {"image": features.Image(), "boxes": features.Boxes(("a", "b")), "text": features.Text()}

    def __getitem__(self, i):
        boxes = np.array([[0.1, 2, 3.3, 4]] * (i % 3), np.float32).reshape(-1, 4)
        labels = {"box_labels": np.ones(i % 3, np.int32), "box_crowd": np.zeros(i % 3, bool)}
        return {"image": self.encoded[i], "boxes": boxes, "text": ("ö", "b")} | labels


def test_what_is_beside_an_image_keeps_its_types(tmp_path):
    source = on_disk(tmp_path, Boxed())
    for i in (0, 1, 2):
        first, second = source[i], source[i]
        chex.assert_trees_all_equal(second, first, strict=True)
        assert type(second["text"]) is tuple and second["boxes"].shape == (i, 4)
    with pytest.raises(UserError, match="config.cache_side would make images smaller than their boxes say"):
        on_disk(tmp_path, Boxed(), cache_side=20)


def test_a_full_disk_is_told_in_a_line(tmp_path, monkeypatch, caplog):
    write_all, written = os.pwrite, []

    def pwrite(descriptor, data, offset):
        if sum(written) > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(len(data))
        return write_all(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    chex.assert_trees_all_equal(batches(on_disk(tmp_path, Photos())), batches(Photos()))
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "No space left on device. No more images are kept there" in line
    monkeypatch.undo()
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"about \S+ GB are needed, 1e-06 GB are free\. Name a folder on a larger disk"):
        on_disk(tmp_path, Photos())


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"config.cache_dir={tmp_path}/file cannot be used: Not a directory"):
        on_disk(tmp_path / "file", Photos())
