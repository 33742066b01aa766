"""Flips are mirrors that each example's own seed decides; normalisation is exact."""

import chex
import jax
import numpy as np

from vit_jax.data import augment

flip = jax.jit(augment.random_flip)


def batch(size=400):
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(size, 3, 4, 3), dtype=np.uint8), rng.integers(2**32, size=size, dtype=np.uint32)


def test_about_half_are_exact_mirrors_and_the_others_untouched():
    images, seeds = batch()
    flipped = np.asarray(flip(images, seeds))
    chex.assert_type(flipped, np.uint8)
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    untouched = (flipped == images).all((1, 2, 3))
    np.testing.assert_array_equal(mirrored, ~untouched)
    assert 160 <= mirrored.sum() <= 240  # four standard deviations


def test_an_examples_seed_alone_decides():
    images, seeds = batch()
    flipped = np.asarray(flip(images, seeds))
    order = np.random.default_rng(1).permutation(len(seeds))
    np.testing.assert_array_equal(flip(images[order], seeds[order]), flipped[order])
    for i in range(3):
        np.testing.assert_array_equal(flip(images[i : i + 1], seeds[i : i + 1])[0], flipped[i])


def test_all_images_of_one_seed_share_its_fate():
    images, seeds = batch(8)
    for seed in seeds:
        flipped = np.asarray(flip(images, np.full(8, seed)))
        assert (flipped == images).all() or (flipped == images[:, :, ::-1]).all()


def test_normalisation_is_exact():
    levels = np.arange(256)
    expected = ((levels - 127.5) / 127.5).astype(np.float32)
    for dtype in (np.uint8, np.float32):
        images = levels.astype(dtype).reshape(1, 16, 16, 1)
        normal = augment.normalize(images)
        chex.assert_type(normal, np.float32)
        np.testing.assert_allclose(np.ravel(normal), expected, rtol=0, atol=1e-7)  # two roundings instead of one
    assert augment.normalize(np.float32([[[[0, 127.5, 255]]]])).tolist() == [[[[-1, 0, 1]]]]


def test_mean_and_deviation_may_differ_by_channel():
    images = np.full((1, 2, 2, 3), 100, np.uint8)
    normal = augment.normalize(images, mean=[100, 90, 80], std=[1, 2, 4])
    np.testing.assert_array_equal(normal[0, 1, 1], [0, 5, 5])
