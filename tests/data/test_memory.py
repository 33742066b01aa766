"""Keeping a small dataset in memory: when, what is the same as without, and that nothing is decoded twice."""

import contextlib
import io
import itertools
import logging
from collections import Counter

import chex
import numpy as np
import pytest
from PIL import Image

from vit_jax.data import features, loader
from vit_jax.data.digits import DigitsSource
from vit_jax.data.host import view
from vit_jax.data.host.decode import ImageError
from vit_jax.data.memory import InMemory, kept
from vit_jax.tasks import classify

SIZE = 20


class Photos(features.Source):
    """JPEGs of 50 x 40 (w x h) pixels of noise, all to be turned by 90°; those in `bad` end early. Counts what is read."""

    features = {"image": features.Image(), "label": features.Label(("a", "b"))}
    exif_rotated = True

    def __init__(self, bad=()):
        self.read = Counter()
        self.encoded = [self._encode(i) for i in range(SIZE)]
        for i in bad:
            self.encoded[i] = self.encoded[i][: len(self.encoded[i]) // 2]

    def _encode(self, i):
        exif = Image.Exif()
        exif[0x0112] = 6
        file = io.BytesIO()
        noise = np.random.default_rng(i).integers(256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, "JPEG", exif=exif)
        return file.getvalue()

    def __len__(self):
        return SIZE

    def __getitem__(self, i):
        self.read[i] += 1
        return {"image": self.encoded[i], "label": i % 2}

    def where(self, i):
        return f"photos/{i}.jpg"


BYTES = SIZE * 40 * 50 * 3


def batches(source, steps=15, **options):
    transform = classify.make_train_example(lambda image, **how: {"image": view.train_image(image, crop=32, **how)}, 2)
    with contextlib.closing(loader.train_batches(source, transform, batch_size=8, seed=1, **options)) as found:
        return list(itertools.islice(found, steps))


@pytest.mark.parametrize(("gigabytes", "is_kept"), [(0, False), (0.99 * BYTES / 1e9, False), (1.01 * BYTES / 1e9, True)])
def test_kept_if_all_of_it_is_small_enough_decoded(gigabytes, is_kept, caplog):
    with caplog.at_level(logging.INFO, logger="vit_jax"):
        source = kept(Photos(bad=[3]), cache_gb=gigabytes)
    assert source.features == Photos.features and source.class_names == ("a", "b") and source.num_classes == 2
    assert isinstance(source, InMemory) == is_kept
    expected = ["data     20 training images are kept in memory (0.0 GB)"] if is_kept else []
    assert [record.getMessage() for record in caplog.records] == expected


def test_arrays_are_in_memory_already(caplog):
    digits = DigitsSource("digits", "train")
    assert kept(digits, cache_gb=1.0) is digits


def test_batches_are_the_same_and_every_image_is_decoded_once():
    photos = Photos()
    chex.assert_trees_all_equal(batches(InMemory(photos)), batches(Photos()))
    assert len(photos.read) == SIZE and photos.read.total() < 2 * SIZE  # threads may meet, in the first epoch only


def test_bad_images_are_what_they_were():
    with pytest.raises(ImageError, match=r"^photos/3\.jpg: the image cannot be decoded: the JPEG is cut off"):
        batches(InMemory(Photos(bad=[3])))
    skipping = [batches(source, skip_bad_images=True) for source in (InMemory(Photos(bad=[3])), Photos(bad=[3]))]
    chex.assert_trees_all_equal(*skipping)
