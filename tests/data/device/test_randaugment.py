"""RandAugment's operations on photographs against Pillow and against the formulas of the code it follows, in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from vit_jax.data.device import randaugment

OPS = randaugment.OPS
SIGNS = 1, -1
CENTRE = 7, 60


@functools.cache
def photos() -> np.ndarray:
    """A temple, a flower, and an image of a single colour, of odd sizes."""
    temple, flower = load_sample_images().images
    return np.stack(
        [temple[100:213, 200:351], flower[50:389:3, 1:-2:4][:, :151], np.full((113, 151, 3), (255, 0, 77), np.uint8)]
    )


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.vmap, in_axes=(0, None, None, None))
def jitted(image, op, magnitude, sign):
    return randaugment.apply(image, op, magnitude, sign, (jnp.int32(CENTRE[0]), jnp.int32(CENTRE[1])))


def applied(name: str, magnitude: float, sign: float = 1) -> np.ndarray:
    """All photos after one operation."""
    return np.asarray(jitted(photos(), OPS.index(name), magnitude, jnp.float32(sign)))


def pillows(change) -> np.ndarray:
    return np.stack([change(Image.fromarray(photo)) for photo in photos()])


def pillow_warp(matrix: tuple[float, ...]) -> np.ndarray:
    a, b, c, d, e, f = matrix
    # Pillow maps the centres of pixels, which stand at (x + 1/2, y + 1/2).
    centred = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    method, nearest = Image.Transform.AFFINE, Image.Resampling.NEAREST
    return pillows(lambda image: image.transform(image.size, method, centred, nearest, fillcolor=(128, 128, 128)))


def difference(ours: np.ndarray, theirs) -> np.ndarray:
    return np.abs(ours.astype(int) - np.asarray(theirs))


@pytest.mark.parametrize("magnitude, bits", [(10.0, 4), (15.0, 6), (20.0, 8)])
def test_equalize_invert_and_posterize_are_pillows(magnitude, bits):
    np.testing.assert_array_equal(applied("Equalize", magnitude), pillows(ImageOps.equalize))
    np.testing.assert_array_equal(applied("Invert", magnitude), pillows(ImageOps.invert))
    np.testing.assert_array_equal(applied("Posterize", magnitude), pillows(lambda image: ImageOps.posterize(image, bits)))


@pytest.mark.parametrize("magnitude, enhance", [(10.0, 1.9), (15.0, 2.8)])
def test_autocontrast_brightness_and_color_are_pillows(magnitude, enhance):
    # One off where the quotient is a whole number, which Pillow's floating-point product misses.
    assert difference(applied("AutoContrast", magnitude), pillows(ImageOps.autocontrast)).max() <= 1
    bright = pillows(lambda image: ImageEnhance.Brightness(image).enhance(enhance))
    np.testing.assert_array_equal(applied("Brightness", magnitude), bright)
    # Pillow's grey has other weights and is rounded to the nearest: one off, times the enhancement.
    color = pillows(lambda image: ImageEnhance.Color(image).enhance(enhance))
    assert difference(applied("Color", magnitude), color).max() <= enhance + 1


def test_color_is_a_blend_with_tensorflows_grey():
    # 255.5 is what tf.image.convert_image_dtype multiplies by before it cuts the fraction off.
    grey = np.floor(photos() / 255 @ [0.2989, 0.5870, 0.1140] * 255.5 + 1e-9)[..., None]
    expected = np.clip(grey + 1.9 * (photos() - grey), 0, 255)
    np.testing.assert_array_equal(applied("Color", 10.0), np.floor(expected + 1e-4))


def test_contrast_is_a_blend_with_the_constant_of_the_original_code():
    constant = 113 * 151 // 256
    expected = np.clip(constant + 1.9 * (photos() - float(constant)), 0, 255)
    np.testing.assert_array_equal(applied("Contrast", 10.0), np.floor(expected + 1e-4))


def test_sharpness_extrapolates_from_a_smoothed_inside():
    smoothed = photos().astype(int)
    around = sum(smoothed[:, i : i + 111, j : j + 149] for i in range(3) for j in range(3))
    smoothed[:, 1:-1, 1:-1] = (around + 4 * smoothed[:, 1:-1, 1:-1]) // 13
    expected = np.clip(smoothed + 1.9 * (photos() - smoothed.astype(float)), 0, 255)
    np.testing.assert_array_equal(applied("Sharpness", 10.0), np.floor(expected + 1e-4))


@pytest.mark.parametrize("magnitude, threshold", [(10.0, 0), (15.0, 128), (20.0, 0), (9.7, 248)])
def test_solarizes_threshold_overflows_as_in_the_original_code(magnitude, threshold):
    expected = pillows(lambda image: ImageOps.solarize(image, threshold))
    np.testing.assert_array_equal(applied("Solarize", magnitude), expected)


def test_solarize_add_brightens_the_dark_half():
    expected = np.where(photos() < 128, np.minimum(photos().astype(int) + 110, 255), photos())
    np.testing.assert_array_equal(applied("SolarizeAdd", 10.0), expected)


@pytest.mark.parametrize("sign", SIGNS)
def test_warps_take_the_nearest_pixel_as_pillow_does(sign):
    angle, shear, shift = sign * math.radians(0.97 * 30), sign * 0.97 * 0.3, sign * 97  # few pixels are halfway between two
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = 75, 56  # the middle
    matrices = {
        "Rotate": (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y),
        "ShearX": (1, shear, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, shear, 1, 0),
        "TranslateX": (1, 0, shift, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, shift),
    }
    for name, matrix in matrices.items():
        differs = (applied(name, 9.7, sign) != pillow_warp(matrix)).any(-1).mean()
        # Pillow's positions are 16-bit fractions, and its edge has no second pixel half outside.
        assert differs <= (0 if name.startswith("Translate") else 2e-3), name


def test_a_pixel_halfway_between_two_is_rounded_away_from_zero():
    ramp = np.arange(30, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    for shift, expected in ((0.5, [*range(1, 30), 128]), (-0.5, [128, *range(1, 30)]), (-1.5, [128, 128, *range(1, 29)])):
        warped = randaugment.warp(ramp, jnp.array([1, 0, shift, 0, 1, 0], jnp.float32))
        np.testing.assert_array_equal(warped[0, :, 0], expected)


def test_cutout_is_a_grey_square_that_the_border_cuts():
    expected = photos().copy()
    expected[:, : CENTRE[0] + 40, CENTRE[1] - 40 : CENTRE[1] + 40] = 128
    np.testing.assert_array_equal(applied("Cutout", 10.0), expected)


def drawn(monkeypatch, number: int, layers: int) -> np.ndarray:
    """What each of `layers` layers drew, with `number` keys: (number, layers, 4) of op, sign, y, x."""

    def note(image, op, magnitude, sign, centre):
        assert magnitude == 10
        row = jnp.array([op, sign + 1, *centre]).astype(jnp.uint8)
        return jnp.concatenate([image[1:], jnp.broadcast_to(row[:, None], (1, 4, 3))])

    monkeypatch.setattr(randaugment, "apply", note)
    image = np.zeros((layers, 4, 3), np.uint8)
    keys = jax.random.split(jax.random.key(0), number)
    return np.asarray(jax.vmap(lambda key: randaugment.randaugment(image, key, layers, 10))(keys))[..., 0]


def test_every_layer_draws_operation_sign_and_place_uniformly_and_anew(monkeypatch):
    draws = drawn(monkeypatch, 3200, 3).astype(int)
    for layer in range(3):
        op, sign, y, x = draws[:, layer].T
        assert np.abs(np.bincount(op, minlength=16) - 200).max() <= 60  # 4.4 standard deviations
        assert set(sign) == {0, 2} and abs((sign == 2).mean() - 0.5) <= 0.04
        assert np.abs(np.bincount(y, minlength=3) - 3200 / 3).max() <= 120
        assert np.abs(np.bincount(x, minlength=4) - 800).max() <= 110
    # Independent of the layer before: as often the same as chance has it.
    assert abs((draws[:, 0, 0] == draws[:, 1, 0]).mean() - 1 / 16) <= 0.02
    assert abs((draws[:, 0, 1] == draws[:, 1, 1]).mean() - 1 / 2) <= 0.04


def test_layers_follow_each_other():
    photo, keys = photos()[0, :23, :17], jax.random.split(jax.random.key(0), 16)
    once, twice = (
        np.asarray(jax.jit(jax.vmap(lambda key, n=n: randaugment.randaugment(photo, key, n, 10)))(keys)) for n in (1, 2)
    )
    assert once.dtype == np.uint8 and once.shape == (16, *photo.shape)
    changed, again = (once != photo).any((1, 2, 3)), (twice != once).any((1, 2, 3))
    assert changed.sum() >= 12 and again.sum() >= 12
