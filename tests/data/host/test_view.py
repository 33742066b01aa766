"""Resizing that matches plain arithmetic, TensorFlow, Pillow and timm, and crops that keep their bounds."""

import dataclasses
import functools
import importlib
import importlib.util
import io
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from vit_jax.data.host import view
from vit_jax.data.host.crop import inception_box, random_box
from vit_jax.data.host.decode import ImageError, Jpeg, decode
from vit_jax.data.host.resize import Box, cut, resize
from vit_jax.data.host.view import eval_image
from vit_jax.errors import UserError

PHOTO = Image.fromarray(load_sample_images().images[1]).resize((61, 43))
PIXELS = np.asarray(PHOTO)
train_image = functools.partial(view.train_image, exif_rotated=True)


# Resizing


def bilinear(image, size):
    """Bilinear resizing by the book, one axis after the other in float64: output i looks at (i + 1/2) n / m - 1/2."""
    pixels = image.astype(np.float64)
    for axis, m in enumerate(size):
        n = pixels.shape[axis]
        position = ((np.arange(m) + 0.5) * n / m - 0.5).clip(0, n - 1)
        low = np.floor(position).astype(int)
        weight = (position - low).reshape([-1 if a == axis else 1 for a in range(3)])
        high = np.minimum(low + 1, n - 1)
        pixels = np.take(pixels, low, axis) * (1 - weight) + np.take(pixels, high, axis) * weight
    return pixels


@pytest.mark.parametrize("size", [(224, 224), (43, 61), (86, 122), (21, 30), (7, 200), (129, 5), (1, 1), (60, 43)])
@pytest.mark.parametrize("shape", [(43, 61), (42, 60), (1, 1), (1, 9), (200, 3)])
def test_resize_is_plain_bilinear(shape, size):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    pixels = resize(image, size)
    assert pixels.shape == (*size, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, bilinear(image, size), atol=1e-4)  # of 255
    np.testing.assert_array_equal(resize(image.astype(np.float32), size), pixels)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 30), (43, 17), (90, 100), (3, 1)])
def test_antialiased_resize_is_that_of_pillow_with_kernels_as_wide_as_the_step(interpolation, size):
    """jax.image.resize knows the same kernels. Pillow rounds to 8 bits after either axis, and clips: so no black and white."""
    image = PIXELS // 2 + 64
    pixels = resize(image, size, interpolation=interpolation, antialias=True)
    assert pixels.shape == (*size, 3) and pixels.dtype == np.uint8
    by_pillow = Image.fromarray(image).resize(size[::-1], Image.Resampling[interpolation.upper()])
    np.testing.assert_array_equal(pixels, np.asarray(by_pillow))
    method = {"bilinear": "linear", "bicubic": "cubic"}[interpolation]
    exact = np.asarray(jax.image.resize(image.astype(np.float32), (*size, 3), method, antialias=True))
    assert np.abs(pixels - exact).max() < 1.5 and np.abs(pixels - exact).mean() < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolation": "cubic"}, "unknown interpolation 'cubic': did you mean bicubic"),
        ({"interpolation": "bicubic"}, "interpolation='bicubic' needs antialias=True"),
    ],
)
def test_what_resize_cannot_do_is_refused(options, message):
    for call in (eval_image, lambda *a, **k: train_image(*a, np.random.default_rng(0), **k)):
        with pytest.raises(UserError, match=message):
            call(PIXELS, crop=8, **options)


# Crops


def test_inception_box_keeps_area_aspect_and_image():
    rng = np.random.default_rng(0)
    for h, w in ((400, 500), (300, 900), (500, 200), (33, 47)):
        image = np.arange(h * w, dtype=np.int64).reshape(h, w, 1)
        crops = [cut(image, inception_box((h, w), rng, area=(0.2, 0.8))) for _ in range(1000)]
        shapes = np.array([crop.shape[:2] for crop in crops])
        share, aspect = shapes.prod(1) / (h * w), shapes[:, 1] / shapes[:, 0]
        assert share.min() >= 0.2 and share.max() <= 0.8
        slack = 0.5 / shapes[:, 0]  # the width is rounded
        assert (aspect >= 3 / 4 - slack).all() and (aspect <= 4 / 3 + slack).all()
        # Windows of the image, as views, that reach every edge.
        assert all(np.shares_memory(crop, image) for crop in crops[:10])
        tops, lefts = np.array([np.unravel_index(crop[0, 0, 0], (h, w)) for crop in crops]).T
        assert tops.min() == 0 and lefts.min() == 0
        assert (tops + shapes[:, 0]).max() == h and (lefts + shapes[:, 1]).max() == w


def test_inception_box_is_distributed_as_tensorflow_draws():
    """Mean and quartiles of 20,000 windows of tf.image.sample_distorted_bounding_box on 400 x 500, seen once."""
    rng = np.random.default_rng(0)
    shapes = np.array([inception_box((400, 500), rng)[2:] for _ in range(8000)])
    share, aspect = shapes.prod(1) / 200_000, shapes[:, 1] / shapes[:, 0]
    np.testing.assert_allclose(share.mean(), 0.357, atol=0.012)
    np.testing.assert_allclose(np.percentile(share, [25, 50, 75]), [0.151, 0.310, 0.530], atol=0.02)
    np.testing.assert_allclose(np.percentile(aspect, [25, 50, 75]), [0.895, 1.042, 1.186], atol=0.015)
    assert np.abs(shapes.mean(0)[0] - 247.6) < 4


def test_inception_box_is_the_whole_image_when_nothing_fits():
    assert inception_box((10, 100), np.random.default_rng(0), area=(0.9, 1.0)) == Box(0, 0, 10, 100)
    assert inception_box((1, 1), np.random.default_rng(0)) == Box(0, 0, 1, 1)


def test_random_resized_crop_is_the_one_of_timm(monkeypatch):
    """Bit for bit, with both drawing from the same generator: windows of common images, and the middle of odd ones."""
    for name in ("torch", "timm"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    with importlib.import_module("tests.models.torch_peer").without_torchvision():
        theirs = importlib.import_module("timm.data.transforms")
    monkeypatch.setattr(theirs, "F", SimpleNamespace(get_image_size=lambda image: image.size))
    options = {"crop_method": "random_resized", "interpolation": "bicubic", "antialias": True}
    for area, size in (((0.08, 1.0), (61, 43)), ((0.9, 1.0), (20, 90)), ((0.9, 1.0), (90, 20)), ((1.5, 2.0), (61, 43))):
        photo = PHOTO.resize(size)
        for seed in range(20):
            rng = np.random.default_rng(seed)
            draw = SimpleNamespace(uniform=rng.uniform, randint=lambda a, b, rng=rng: int(rng.integers(a, b, endpoint=True)))
            monkeypatch.setattr(theirs, "random", draw)
            top, left, h, w = theirs.RandomResizedCropAndInterpolation.get_params(photo, area, (3 / 4, 4 / 3))
            expected = photo.crop((left, top, left + w, top + h)).resize((24, 16), Image.Resampling.BICUBIC)
            pixels = train_image(np.asarray(photo), np.random.default_rng(seed), crop=(16, 24), area=area, **options)
            np.testing.assert_array_equal(pixels, np.asarray(expected))


@pytest.mark.parametrize(
    ("turned", "size", "whole"), [(False, (24, 24), (34, 24)), (True, (24, 24), (24, 34)), (False, (20, 40), (40, 28))]
)
def test_simple_crop_is_a_window_of_the_resized_and_reflected_image(turned, size, whole):
    """As torchvision's Resize (whose longer side is rounded down) and RandomCrop(padding=4, padding_mode="reflect")."""
    photo = PHOTO.transpose(Image.Transpose.ROTATE_90) if turned else PHOTO
    resized = np.asarray(photo.resize(whole, Image.Resampling.BICUBIC))
    padded = np.pad(resized, [(4, 4), (4, 4), (0, 0)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (*size, 3))[:, :, 0]
    places = set()
    for seed in range(200):
        how = {"crop_method": "simple", "interpolation": "bicubic", "antialias": True}
        pixels = train_image(np.asarray(photo), np.random.default_rng(seed), crop=size, **how)
        (place,) = np.argwhere((windows == pixels).all((2, 3, 4)))
        places.add(tuple(place))
    tops, lefts = (set(axis) for axis in zip(*places, strict=True))
    assert tops == {*range(windows.shape[0])} and lefts == {*range(windows.shape[1])}


def test_random_box_reaches_every_place_equally():
    rng = np.random.default_rng(0)
    boxes, counts = np.unique([random_box((5, 4), (3, 2), rng) for _ in range(9000)], axis=0, return_counts=True)
    assert boxes.tolist() == [[top, left, 3, 2] for top in range(3) for left in range(3)]
    assert counts.min() > 850 and counts.max() < 1150
    assert random_box((5, 4), (5, 4), rng) == Box(0, 0, 5, 4)
    with pytest.raises(UserError, match="6 x 2 does not fit into 5 x 4"):
        random_box((5, 4), (6, 2), rng)


# Whole images


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resize_to": 40},
        {"area": (0.5, 1.0)},
        {"crop_method": "random_resized"},
        {"crop_method": "simple"},
        {"crop_method": "simple", "interpolation": "bicubic", "antialias": True},
        {"resize_to": 40, "interpolation": "bicubic", "antialias": True},
    ],
)
def test_train_image_depends_on_nothing_but_the_generator(options):
    first, again, other = (train_image(PIXELS, np.random.default_rng(seed), crop=32, **options) for seed in (1, 1, 2))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8 and first.flags.c_contiguous
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_train_image_is_the_resized_inception_crop():
    pixels = train_image(PIXELS, np.random.default_rng(3), crop=(20, 30), area=(0.3, 0.9))
    crop = cut(PIXELS, inception_box(PIXELS.shape[:2], np.random.default_rng(3), area=(0.3, 0.9)))
    assert pixels.shape == (20, 30, 3)
    exact = bilinear(crop, (20, 30))
    assert np.abs(pixels - exact).max() <= 0.5 + 1e-4  # rounded, not cut off
    white = train_image(np.full((50, 37, 3), 255, np.uint8), np.random.default_rng(3), crop=224)
    assert white.min() == 255  # no wrapping to 0


def test_train_image_with_resize_to_crops_a_window_of_the_whole():
    whole = np.rint(bilinear(PIXELS, (48, 48)))
    rng = np.random.default_rng(0)
    for _ in range(5):
        pixels = train_image(PIXELS, rng, crop=32, resize_to=48)
        windows = np.lib.stride_tricks.sliding_window_view(whole, (32, 32, 3))[:, :, 0]
        # one level of tolerance, where the exact value lies between two
        assert np.abs(windows - pixels).max((2, 3, 4)).min() <= 1
    assert train_image(PIXELS, rng, crop=(24, 32), resize_to=32).shape == (24, 32, 3)
    with pytest.raises(UserError, match="crop of 64 x 64 does not fit into 48 x 48"):
        train_image(PIXELS, rng, crop=64, resize_to=48)


# Scaled decoding


def encode(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


@pytest.fixture
def factors(monkeypatch):
    """By how much JPEGs were scaled down, in order."""
    seen, decode = [], Jpeg.decode_part
    monkeypatch.setattr(Jpeg, "decode_part", lambda jpeg, boxes, factor: (seen.append(factor), decode(jpeg, boxes, factor))[1])
    return seen


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({}, {1, 2, 4}),
        ({"crop_method": "random_resized", "interpolation": "bicubic", "antialias": True}, {1, 2, 4}),
        ({"crop_method": "simple"}, {4}),
        ({"resize_to": 150}, {4}),
    ],
)
def test_scaled_decoding_draws_the_same_and_comes_close_to_antialiasing(factors, options, used):
    data = encode(Image.fromarray(load_sample_images().images[0]).resize((1203, 801), Image.Resampling.BICUBIC))
    scaled, full, ideal = [], [], []
    for seed in range(20):
        rngs = [np.random.default_rng(seed) for _ in range(3)]
        scaled.append(train_image(data, rngs[0], crop=128, **options).astype(float))
        full.append(train_image(data, rngs[1], crop=128, scaled_decoding=False, **options))
        ideal.append(train_image(data, rngs[2], crop=128, scaled_decoding=False, **(options | {"antialias": True})))
        assert rngs[0].random() == rngs[1].random()
    assert set(factors[::3]) == used and set(factors[1::3]) == {1}
    error = np.abs(np.array(scaled) - ideal).mean()
    assert error < 4
    if "antialias" not in options:
        assert error < 0.5 * np.abs(np.array(full, float) - ideal).mean()


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_crop_is_where_the_full_one_is_however_the_jpeg_is_turned(factors, orientation, antialias):
    """Grey that grows along one side: 513 x 401 leaves seven eighths of a pixel of 1/8 beyond both edges."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for ramp in np.mgrid[:401, :513] * 250 / [[[401]], [[513]]]:
        data = encode(Image.fromarray(ramp.astype(np.uint8)), exif=exif)
        for seed in range(8):
            how = {"crop": 32, "area": (0.3, 1.0), "antialias": antialias}
            scaled, full = (train_image(data, np.random.default_rng(seed), scaled_decoding=x, **how) for x in (True, False))
            error = scaled.astype(float) - full
            assert abs(error.mean()) < 1 and np.abs(error).max() < 6
    assert {4, 8} <= set(factors)


def test_scaled_decoding_notices_what_is_missing(factors):
    data = encode(PHOTO.resize((600, 400)))
    with pytest.raises(ImageError, match="the JPEG is cut off"):
        train_image(data[: len(data) // 2], np.random.default_rng(0), crop=32, area=(0.9, 1.0))
    assert factors == [8]


def test_small_crops_and_other_formats_are_decoded_in_full(factors):
    data = encode(PHOTO.resize((600, 400)))
    pixels = train_image(data, np.random.default_rng(0), crop=224)
    whole = decode(data, exif_rotated=False)
    np.testing.assert_array_equal(pixels, train_image(whole, np.random.default_rng(0), crop=224))
    png = io.BytesIO()
    PHOTO.resize((600, 400)).save(png, "PNG")
    assert train_image(png.getvalue(), np.random.default_rng(0), crop=32).shape == (32, 32, 3)
    assert factors == [1]


# Evaluation


def test_eval_image_is_the_whole_image_unrounded():
    pixels = eval_image(PIXELS, crop=24)
    assert pixels.shape == (24, 24, 3) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, bilinear(PIXELS, (24, 24)), atol=1e-4)
    assert eval_image(PIXELS, crop=(24, 40)).shape == (24, 40, 3)


@pytest.mark.parametrize("portrait", [False, True])
@pytest.mark.parametrize(
    ("crop", "resize_to", "whole"),  # `whole`: of the landscape, 61 x 43 (w x h), as torchvision rounds
    [(24, 32, (45, 32)), (24, 24, (34, 24)), ((24, 24), 27, (38, 27)), (40, 41, (58, 41))],
)
def test_eval_image_resizes_the_shorter_side_and_crops_the_middle(portrait, crop, resize_to, whole):
    photo = PHOTO.transpose(Image.Transpose.ROTATE_90) if portrait else PHOTO
    resized = np.asarray(photo.resize(whole[::-1] if portrait else whole, Image.Resampling.BICUBIC))
    side = crop if isinstance(crop, int) else crop[0]
    top, left = (int(round((n - side) / 2.0)) for n in resized.shape[:2])
    pixels = eval_image(np.asarray(photo), crop=crop, resize_to=resize_to, interpolation="bicubic", antialias=True)
    assert pixels.dtype == np.float32 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, resized[top : top + side, left : left + side])


def test_eval_image_crops_what_is_no_square_from_a_box_of_its_aspect():
    """24 x 40 of a shorter side of 30: the image covers 30 x 50, by its height as 50 / 30 > 61 / 43."""
    pixels = eval_image(PIXELS, crop=(24, 40), resize_to=30)
    assert pixels.shape == (24, 40, 3)
    whole = bilinear(PIXELS, (35, 50))  # 50 * 43 / 61 = 35.2
    np.testing.assert_allclose(pixels, whole[6:30, 5:45], atol=1e-4)  # round(5.5) is 6


def test_eval_image_needs_more_pixels_than_it_crops():
    with pytest.raises(UserError, match="crop of 24 x 40 does not fit into a shorter side of 20"):
        eval_image(PIXELS, crop=(24, 40), resize_to=20)


def test_an_unknown_crop_method_names_the_near_ones():
    with pytest.raises(UserError, match="unknown crop_method 'random_resize': did you mean random_resized"):
        train_image(PIXELS, np.random.default_rng(0), crop=24, crop_method="random_resize")


# Views: one geometry for pixels, boxes and class maps

METHODS = [
    {},
    {"crop_method": "random_resized", "area": (0.3, 1.0)},
    {"crop_method": "simple"},
    {"resize_to": 48},
    {"resize_to": (57, 44)},
]


def views(options, size, seeds=30):
    for seed in range(seeds):
        yield view.draw_view(size, np.random.default_rng(seed), crop=(40, 36), flip=True, **options)
    yield view.eval_view(size, crop=(40, 36), resize_to=41)
    yield view.eval_view(size, crop=(13, 90))


@pytest.mark.parametrize("options", METHODS)
def test_a_box_stays_around_what_it_is_around(options):
    """A white rectangle on black, before and after: half of the white at an edge is where the box's edge is."""
    seen, mirrored = 0, set()
    for v in views(options, (83, 121)):
        rng = np.random.default_rng(seen)
        top, left = rng.integers(0, 60, 2)
        bottom, right = top + rng.integers(8, 23), left + rng.integers(8, 61)
        canvas = np.zeros((83, 121, 3), np.uint8)
        canvas[top:bottom, left:right] = 255
        boxes, kept = v.boxes(np.array([[left, top, right, bottom], [-9.0, -9, 0, 0], [0, 0, 121, 83]]))
        assert boxes.dtype == np.float32 and not kept[1] and kept[2]
        x0, y0, x1, y1 = boxes[0]
        pixels = v.image(canvas, rounded=False)[..., 0]
        assert pixels.shape == v.size
        shown = np.zeros(v.size, bool)  # a border repeats what is inside: no box lies there
        shown[tuple(slice(*np.rint(boxes[2, axis::2]).astype(int)) for axis in (1, 0))] = True
        inside = np.argwhere((pixels > 127.5) & shown) + 0.5
        assert bool(kept[0]) == bool((x1 > x0) and (y1 > y0))
        if not kept[0] or min(x1 - x0, y1 - y0) < 3:
            continue
        np.testing.assert_allclose(inside.min(0), [y0, x0], atol=1.01)
        np.testing.assert_allclose(inside.max(0), [y1, x1], atol=1.01)
        assert len(inside) == pytest.approx((y1 - y0) * (x1 - x0), rel=0.3)
        seen += 1
        mirrored.add(v.mirrored)
    assert seen > 10 and mirrored == {False, True}


def test_boxes_by_hand():
    """Window (y 10, x 20, 40 x 80) at 20 x 20, a border of 2, cut (y 3, x 1, 18 x 22): x → (x - 20) / 4 + 2 - 1."""
    v = view.View((100, 200), Box(10, 20, 40, 80), (20, 20), border=2, cut=Box(3, 1, 18, 22))
    boxes = np.array([[24, 14, 40, 30], [0, 0, 200, 100], [20, 10, 24, 11], [100, 10, 120, 50], [30, 20, 30, 40]])
    got, kept = v.boxes(boxes)
    np.testing.assert_allclose(got[:2], [[2, 1, 6, 9], [1, 0, 21, 18]])
    assert kept.tolist() == [True, True, False, False, False]  # above the cut, beside the window, no area
    mirrored, still = dataclasses.replace(v, mirrored=True).boxes(boxes)
    np.testing.assert_allclose(mirrored[:2], [[16, 1, 20, 9], [1, 0, 21, 18]])
    assert still.tolist() == kept.tolist()
    assert v.boxes(np.zeros((0, 4)))[0].shape == (0, 4)


@pytest.mark.parametrize("options", METHODS)
def test_a_class_map_is_seen_where_the_pixels_are(options):
    """Two ramps, which bilinear resizing keeps: the value at a pixel is where it looks, the class the pixel next to it."""
    rows, columns = np.mgrid[:83, :121].astype(np.uint8)
    borders = 0
    for v in views(options, (83, 121)):
        for ramp in (rows, columns):
            looks_at = v.image(np.repeat(ramp[..., None], 3, axis=2), rounded=False)[..., 0]
            labels = v.segmentation(ramp, ignored=255)
            assert labels.shape == v.size and labels.dtype == np.uint8
            known = labels != 255
            borders += (~known).sum()
            assert np.abs(labels.astype(float) - looks_at)[known].max() <= 0.5 + 1e-3
        (box,), _ = v.boxes([[0, 0, 121, 83]])  # what is ignored is what no box reaches
        assert known.sum() == (box[2] - box[0]) * (box[3] - box[1])
    assert bool(borders) == (options.get("crop_method") == "simple")


def test_a_class_map_is_the_nearest_of_a_one_hot_map():
    classes = np.random.default_rng(0).integers(0, 3, (43, 61))
    for v in views({}, (43, 61)):
        top, left, h, w = v.window
        index = [
            np.floor(start + (np.arange(n) + 0.5) * extent / n).astype(int)
            for start, extent, n in ((top, h, v.resized[0]), (left, w, v.resized[1]))
        ]
        one_hot = np.eye(3)[classes][index[0]][:, index[1]]
        expected = one_hot.argmax(-1)
        if v.cut:
            expected = expected[v.cut.top : v.cut.top + 40, v.cut.left : v.cut.left + 36]
        np.testing.assert_array_equal(v.segmentation(classes), expected[:, ::-1] if v.mirrored else expected)
    with pytest.raises(ImageError, match=r"the class map is 61 x 43 \(h x w\), where the view was drawn for 43 x 61"):
        v.segmentation(classes.T)


def test_a_mirrored_view_is_the_view_mirrored():
    for options in METHODS:
        plain = view.draw_view((43, 61), np.random.default_rng(5), crop=24, **options)
        drawn = {v.mirrored: v for v in views(options, (43, 61))}
        assert set(drawn) == {False, True}
        np.testing.assert_array_equal(dataclasses.replace(plain, mirrored=True).image(PIXELS), plain.image(PIXELS)[:, ::-1])


def test_several_views_of_one_picture_are_decoded_once_as_the_largest_needs_it(factors):
    data = encode(PHOTO.resize((600, 400)))
    picture = view.Picture.read(data, exif_rotated=True)
    assert picture.size == (400, 600) and not factors
    rng = np.random.default_rng(0)
    large = [view.draw_view(picture.size, rng, crop=96, area=(0.5, 1.0)) for _ in range(2)]
    small = [view.draw_view(picture.size, rng, crop=32, area=(0.2, 0.4)) for _ in range(6)]
    decoded = picture.decoded(large + small)
    images = [v.image(decoded) for v in large + small]
    assert factors == [2] and [image.shape[0] for image in images] == [96] * 2 + [32] * 6
    np.testing.assert_array_equal(images[0], large[0].image(picture))  # which needs as much alone
    full = picture.decoded([], scaled=False)
    for v, image in zip(large + small, images, strict=True):
        assert np.abs(v.image(full).astype(float) - image).mean() < 8
