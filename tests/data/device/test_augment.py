"""Changes of training images against Pillow, SciPy and timm; each example's own seed decides; normalisation is exact."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import ndimage, stats
from sklearn.datasets import load_sample_images

from vit_jax.data.device import augment
from vit_jax.errors import UserError

flip = jax.jit(augment.random_flip)
everything = jax.jit(augment.make_augment(flip=True, color_jitter=0.3, randaug=(2, 10), three_augment=True))
ENHANCERS = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color


@functools.cache
def photos() -> np.ndarray:
    """A temple, a flower, and an image of a single colour, of odd sizes."""
    temple, flower = load_sample_images().images
    return np.stack([temple[100:171, 200:297], flower[50:263:3, 1:389:4], np.full((71, 97, 3), (255, 0, 77), np.uint8)])


def pillows(change) -> np.ndarray:
    return np.stack([change(Image.fromarray(photo)) for photo in photos()])


def difference(ours, theirs) -> np.ndarray:
    return np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))


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


def test_with_only_a_flip_it_is_random_flip():
    images, seeds = batch()
    augmented = jax.jit(augment.make_augment(flip=True))(images, seeds)
    np.testing.assert_array_equal(augmented, flip(images, seeds))
    np.testing.assert_array_equal(augment.make_augment(flip=False)(images, seeds), images)


def test_grey_and_solarized_are_pillows():
    np.testing.assert_array_equal(augment.grayscale(photos()), pillows(lambda image: image.convert("L").convert("RGB")))
    np.testing.assert_array_equal(augment.solarize(photos()), pillows(ImageOps.solarize))


@pytest.mark.parametrize("what", range(3))
def test_brightness_contrast_and_saturation_are_pillows(what):
    enhance = jax.jit(jax.vmap(augment.enhance, in_axes=(0, None, None)))
    for factor in (0.0, 0.25, 0.7, 1.0, 1.3, 2.0):
        expected = pillows(lambda image, factor=factor: ENHANCERS[what](image).enhance(factor))
        off = difference(enhance(photos(), what, factor), expected)
        # One off where the blend is a whole number but for its last bit: XLA may round once where Pillow rounds twice.
        assert off.max() <= 1 and (off > 0).mean() <= 1e-3


def test_jitter_draws_three_factors_and_any_order(monkeypatch):
    factors, asked = (1.8, 1.9, 0.2), []  # strong enough to tell all orders apart

    def uniform(key, shape, minval, maxval):
        asked.append((minval, maxval))
        return jnp.array(factors)

    photo, keys = photos()[0], jax.random.split(jax.random.key(0), 60)
    monkeypatch.setattr(jax.random, "uniform", uniform)
    jittered = np.asarray(jax.jit(jax.vmap(lambda key: augment.jitter(photo, key, 0.3)))(keys))
    assert asked == [(0.7, 1.3)]
    seen = np.zeros(60, int)
    for order in itertools.permutations(range(3)):
        image = Image.fromarray(photo)
        for what in order:
            image = ENHANCERS[what](image).enhance(factors[what])
        same = difference(jittered, image).max((1, 2, 3)) <= 4  # one off, times 1.8 and 1.9
        assert same.any()
        seen += same
    np.testing.assert_array_equal(seen, 1)


def test_strong_jitter_never_goes_below_black():
    grey = np.full((200, 2, 2, 3), 100, np.uint8)  # only brightness changes it
    keys = jax.random.split(jax.random.key(0), 200)
    jittered = np.asarray(jax.jit(jax.vmap(augment.jitter, in_axes=(0, 0, None)), static_argnums=2)(grey, keys, 1.5))
    assert (jittered == jittered[:, :1, :1, :1]).all()
    factors = jittered[:, 0, 0, 0] / 100
    assert stats.kstest(factors, stats.uniform(0, 2.5).cdf).pvalue > 0.01


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_a_gaussian_and_close_to_pillows(sigma):
    blurred = np.asarray(jax.jit(jax.vmap(augment.gaussian_blur, in_axes=(0, None)))(photos(), sigma))
    exact = ndimage.gaussian_filter(photos().astype(float), (0, sigma, sigma, 0), radius=(0, 6, 6, 0), mode="nearest")
    np.testing.assert_allclose(blurred, exact, rtol=0, atol=0.5001)  # rounded once
    # Pillow's three boxes have another shape, other borders, and are rounded six times.
    off = difference(blurred, pillows(lambda image: image.filter(ImageFilter.GaussianBlur(sigma))))[:, 7:-7, 7:-7]
    assert off.max() <= 6 and off.mean() <= 0.6


def test_one_of_three_takes_each_as_often():
    photo = photos()[0]
    changed = jax.jit(jax.vmap(lambda key: augment.one_of_three(photo, key)))(jax.random.split(jax.random.key(0), 300))
    changed = np.asarray(changed)
    grey = (changed == np.asarray(augment.grayscale(photo))).all((1, 2, 3))
    solarized = (changed == np.asarray(augment.solarize(photo))).all((1, 2, 3))
    blurred = changed[~grey & ~solarized]
    assert 70 <= min(grey.sum(), solarized.sum(), len(blurred)) and (grey & solarized).sum() == 0  # 3.7 standard deviations
    strengths = [jax.jit(augment.gaussian_blur)(photo, jnp.float32(sigma)) for sigma in augment.BLUR]
    weakest, strongest = (np.diff(np.asarray(x).astype(int), axis=0).std() for x in strengths)
    contrasts = np.diff(blurred.astype(int), axis=1).std((1, 2, 3))
    assert contrasts.max() <= weakest and contrasts.min() >= strongest
    assert np.ptp(contrasts) > 0.9 * (weakest - strongest)


def test_batch_and_place_do_not_matter_to_any_operation():
    images = np.stack([photos()[i % 3, :23, :17] for i in range(16)])
    seeds = np.random.default_rng(0).integers(2**32, size=16, dtype=np.uint32)
    augmented = np.asarray(everything(images, seeds))
    assert augmented.dtype == np.uint8 and augmented.shape == images.shape
    order = np.random.default_rng(1).permutation(16)
    images, seeds, kept = images[order], seeds[order], np.arange(16) % 3 > 0
    images[~kept], seeds[~kept] = 0, 1  # other neighbours
    np.testing.assert_array_equal(np.asarray(everything(images, seeds))[kept], augmented[order][kept])


def test_turning_one_operation_on_leaves_the_draws_of_the_others():
    images, seeds = np.stack([photos()[0, :23, :17]] * 8), np.arange(8, dtype=np.uint32)
    grey, jitter = (jax.jit(augment.make_augment(flip=False, **x)) for x in ({"three_augment": True}, {"color_jitter": 0.3}))
    together = jax.jit(augment.make_augment(flip=True, three_augment=True, color_jitter=0.3))
    np.testing.assert_array_equal(together(images, seeds), jitter(grey(flip(images, seeds), seeds), seeds))


@functools.cache
def erased(reverse: bool = False) -> np.ndarray:
    """A thousand images of 40 x 56, erased with probability 0.7."""
    erase = jax.jit(functools.partial(augment.random_erasing, probability=0.7))
    images = jnp.full((1000, 40, 56, 3), 9.0)  # noise is never 9
    return np.asarray(erase(images, np.arange(1000, dtype=np.uint32)[:: -1 if reverse else 1]))


def boxes(images: np.ndarray) -> np.ndarray:
    """(top, left, height, width) of each box; checks that it is full."""
    inside = (images != 9).all(-1)
    np.testing.assert_array_equal(inside, (images != 9).any(-1))
    rows, columns = inside.any(2), inside.any(1)
    found = np.stack([rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)], axis=1)
    np.testing.assert_array_equal(inside.sum((1, 2)), found[:, 2] * found[:, 3])
    return found[found[:, 2] > 0]


def test_erased_boxes_are_distributed_as_timms():
    torch = pytest.importorskip("torch")
    from tests.models.torch_peer import without_torchvision

    with without_torchvision():
        random_erasing = pytest.importorskip("timm.data.random_erasing")
    import random

    random.seed(0)
    theirs = torch.full((1000, 3, 40, 56), 9.0)
    theirs = random_erasing.RandomErasing(probability=0.7, mode="pixel", device="cpu")(theirs)
    ours, theirs = boxes(erased()), boxes(theirs.numpy().transpose(0, 2, 3, 1))
    assert 640 <= len(ours) <= 760  # four standard deviations
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.01
    area = ours[:, 2] * ours[:, 3] / (40 * 56)
    assert 0.015 < area.min() and area.max() < 0.35
    np.testing.assert_array_equal(ours[:, :2] + ours[:, 2:] <= (40, 56), True)


def test_erased_pixels_are_independent_standard_normals():
    noise = erased()[erased() != 9][:100_000]
    assert len(np.unique(noise)) > 0.99 * len(noise)
    assert stats.kstest(noise, "norm").pvalue > 0.01


def test_an_examples_seed_alone_decides_what_is_erased():
    np.testing.assert_array_equal(erased(reverse=True)[::-1], erased())


def test_what_makes_no_sense_is_refused():
    for wrong in ({"color_jitter": -0.1}, {"randaug": (0, 10)}, {"randaug": (2, 21)}, {"randaug": (2, -1)}, {"randaug": (2,)}):
        with pytest.raises(UserError, match=next(iter(wrong)).partition("_")[2] or "randaug"):
            augment.make_augment(flip=True, **wrong)
    with pytest.raises(UserError, match="0 to 1"):
        augment.random_erasing(jnp.zeros((1, 4, 4, 3)), jnp.zeros(1, jnp.uint32), probability=1.5)
