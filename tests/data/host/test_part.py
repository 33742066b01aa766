"""Decoding a part of a JPEG gives the pixels of decoding it all."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from vit_jax.data.host import decode, part, view
from vit_jax.data.host.decode import ImageError, Jpeg

PHOTO = Image.fromarray(load_sample_images().images[0])

with_library = pytest.mark.skipif(part.library() is None, reason="libturbojpeg 3 is not installed")


def encode(size=(403, 301), mode="RGB", **options) -> bytes:
    file = io.BytesIO()
    PHOTO.resize(size).convert(mode).save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


@pytest.fixture
def parts(monkeypatch):
    """The shapes of the parts that were decoded; what a library would give is cut out of what simplejpeg gives."""
    seen = []

    def cut(data: bytes, rows: range, columns: range, factor: int):
        whole = Jpeg.read(data, exif_rotated=False).decode(factor)
        top, left = max(0, rows.start - 3), max(0, columns.start - 5)
        seen.append((len(rows), len(columns)))
        return whole[top : rows.stop, left : columns.stop].copy(), (top, left)

    monkeypatch.setattr(decode, "decode_part", cut)
    return seen


@pytest.mark.parametrize("options", [{}, {"antialias": True, "interpolation": "bicubic"}, {"scaled_decoding": False}])
@pytest.mark.parametrize("crop", [32, (100, 60)])
def test_views_are_the_same(parts, monkeypatch, options, crop):
    data = encode()

    def views():
        return [view.train_image(data, np.random.default_rng(i), exif_rotated=True, crop=crop, **options) for i in range(30)]

    of_parts = views()
    assert len(set(parts)) > 20
    monkeypatch.setattr(decode, "decode_part", lambda *_: None)
    np.testing.assert_array_equal(of_parts, views())


def test_several_views_share_a_part(parts, monkeypatch):
    data = encode()

    def views():
        picture, rng = view.Picture.read(data, exif_rotated=True), np.random.default_rng(0)
        drawn = [view.draw_view(picture.size, rng, crop=24, area=(0.02, 0.05)) for _ in range(2)]
        picture = picture.decoded(drawn)
        return [v.image(picture) for v in drawn]

    of_parts = views()
    assert len(parts) == 1
    monkeypatch.setattr(decode, "decode_part", lambda *_: None)
    np.testing.assert_array_equal(of_parts, views())


def test_photos_to_be_turned_and_files_without_an_end_are_decoded_in_full(parts):
    exif = Image.Exif()
    exif[0x0112] = 6
    cut_off = encode()[:-500]
    how = {"exif_rotated": True, "crop": 32, "area": (0.05, 0.1)}
    view.train_image(encode(exif=exif), np.random.default_rng(0), **how)
    with pytest.raises(ImageError, match="the JPEG is cut off"):
        view.train_image(cut_off, np.random.default_rng(0), **how)
    assert not parts


@with_library
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("options", [{"subsampling": i} for i in range(3)] + [{"mode": "L"}, {"progressive": True}])
def test_the_library_gives_the_pixels_of_simplejpeg(options, factor):
    data, rng = encode(**options), np.random.default_rng(0)
    whole = Jpeg.read(data, exif_rotated=False).decode(factor)
    for _ in range(40):
        rows, columns = (range(*np.sort(rng.choice(n + 1, 2, replace=False)).tolist()) for n in whole.shape[:2])
        pixels, (top, left) = part.decode_part(data, rows, columns, factor)
        found = pixels[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        np.testing.assert_array_equal(found, whole[rows.start : rows.stop, columns.start : columns.stop])


@with_library
def test_what_the_library_cannot_do_is_left_to_others():
    assert part.decode_part(encode(mode="CMYK"), range(9), range(9), 1) is None
    assert part.decode_part(b"\xff\xd8 no image \xff\xd9", range(9), range(9), 1) is None
    damaged = bytearray(encode())
    damaged[3000:3400] = bytes(400)
    assert part.decode_part(bytes(damaged), range(301), range(9), 1) is None
