"""Decoding: every kind of image there is, and what is none."""

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from vit_jax.data.host import decode as decoding
from vit_jax.data.host.decode import ImageError, decode, header_size

PHOTO = Image.fromarray(load_sample_images().images[1]).resize((61, 43))
PIXELS = np.asarray(PHOTO)


def encode(image, form="JPEG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def mean_difference(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(float) - b).mean()


def many_scans(count):
    """A progressive JPEG whose last scan comes again and again, each time through all of its pixels."""
    data = encode(PHOTO, progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


# Decoding


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 40}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_decoded_with_the_fast_dct(options, mode):
    if mode == "L":
        options = {name: value for name, value in options.items() if name != "subsampling"}
    data = encode(PHOTO.convert(mode), **options)
    pixels = decode(data, exif_rotated=False)
    # Bit for bit what TensorFlow gives: checked once, on 720 JPEGs, against TensorFlow itself.
    np.testing.assert_array_equal(pixels, simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=False))
    # Pillow's accurate DCT differs a little, and nothing is mirrored or in another order of colours.
    assert mean_difference(pixels, np.array(Image.open(io.BytesIO(data)).convert("RGB"))) < 1.5


@pytest.mark.parametrize(
    ("mode", "form", "suffix", "tolerance"),
    [
        ("RGB", "JPEG", ".JPG", 2),
        ("L", "JPEG", ".jpeg", 2),
        ("CMYK", "JPEG", ".jpg", 2),
        ("RGB", "PNG", ".PNG", 0),
        ("L", "PNG", ".png", 0),
        ("P", "PNG", ".png", 0),
        ("1", "PNG", ".png", 0),
        ("RGBA", "PNG", ".png", 0),
        ("LA", "PNG", ".png", 0),
        ("RGB", "BMP", ".Bmp", 0),
        ("L", "BMP", ".bmp", 0),
        ("1", "BMP", ".bmp", 0),
        ("P", "GIF", ".GIF", 0),
        ("L", "GIF", ".gif", 0),
        ("RGB", "WEBP", ".WebP", 0),
        ("RGBA", "WEBP", ".webp", 0),
        ("CMYK", "TIFF", ".tif", 0),
        ("RGB", "TIFF", ".tiff", 0),
        ("P", "TIFF", ".tiff", 0),
        ("RGB", "AVIF", ".avif", 2),
        ("RGBA", "AVIF", ".avif", 2),
    ],
)
def test_every_kind_of_image(tmp_path, mode, form, suffix, tolerance):
    image = PHOTO.convert(mode)
    expected = np.array(image.convert("RGB"))
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size).point(lambda alpha: max(alpha, 1)))
    path = tmp_path / f"photo{suffix}"
    options = {
        "WEBP": {"lossless": True, "exact": True},
        "AVIF": {"quality": 95, "subsampling": "4:4:4"},
        "JPEG": {"quality": 98, "subsampling": 0},
    }
    image.save(path, form, **options.get(form, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(path.read_bytes(), exif_rotated=True)
    assert mean_difference(pixels, expected) <= tolerance
    assert pixels.flags.c_contiguous


def test_cmyk_of_adobe_is_not_inverted():
    """Adobe stores CMYK inverted, 255 for no ink, and says so in a segment of its own."""
    data = encode(PHOTO.convert("CMYK"), quality=98)
    assert b"Adobe" in data and simplejpeg.decode_jpeg_header(data)[2] == "CMYK"
    assert mean_difference(decode(data, exif_rotated=False), PIXELS) < 2


def test_alpha_is_dropped_not_blended():
    image = PHOTO.convert("RGBA")
    image.putalpha(0)
    np.testing.assert_array_equal(decode(encode(image, "PNG"), exif_rotated=False), PIXELS)


def test_palette_with_partial_transparency_gives_no_warning():
    image = PHOTO.convert("P")
    data = encode(image, "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(decode(data, exif_rotated=False), np.array(image.convert("RGB")))


def test_16_bits_are_scaled_not_clipped():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode(encode(Image.fromarray(values), "PNG"), exif_rotated=False)
    np.testing.assert_array_equal(pixels, np.repeat((values // 256).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(form):
    red, blue = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 255))
    data = encode(red, form, save_all=True, append_images=[blue], duration=100, loop=0)
    assert decode(data, exif_rotated=False)[5, 5].tolist() == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_arrays(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, *channels), np.uint8)
    pixels = decode(image, exif_rotated=False)
    assert pixels.shape == (5, 7, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.broadcast_to(image.reshape(5, 7, -1), (5, 7, 3)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(PHOTO, form, exif=exif, **options)
    stored = decode(encode(PHOTO, form, **options), exif_rotated=False)
    turned = Image.fromarray(stored)
    turned.getexif()[0x0112] = orientation
    expected = np.array(ImageOps.exif_transpose(turned))
    assert expected.shape == ((43, 61, 3) if orientation < 5 else (61, 43, 3))
    pixels = decode(data, exif_rotated=True)
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.flags.c_contiguous
    if form != "TIFF":  # which Pillow itself turns
        np.testing.assert_array_equal(decode(data, exif_rotated=False), stored)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_in_xmp_and_a_damaged_exif():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert decode(encode(PHOTO, xmp=xmp), exif_rotated=True).shape == (61, 43, 3)
    assert decode(encode(PHOTO, exif=b"Exif\0\0MM\0*\xff\xff\xff\xffnonsense"), exif_rotated=True).shape == (43, 61, 3)
    exif = Image.Exif()
    exif[0x0112] = 77
    assert decode(encode(PHOTO, exif=exif), exif_rotated=True).shape == (43, 61, 3)


# HEIC


def test_heic_is_decoded_upright():
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(PHOTO, "HEIF", quality=95, chroma=444, exif=exif.tobytes())
    upright = PIXELS[::-1].transpose(1, 0, 2)  # 6: the camera was held at 90 degrees
    for exif_rotated in (True, False):  # HEIC says itself how it stands, and its decoder turns it
        assert mean_difference(decode(data, exif_rotated=exif_rotated), upright) < 2
    assert header_size(data) == (61, 43)
    for share in (0.1, 0.5, 0.95):
        with pytest.raises(ImageError, match="cannot be decoded"):
            decode(data[: int(share * len(data))], exif_rotated=True)


def test_heic_names_the_package_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoding._register_heic.cache_clear()
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        decode(data, exif_rotated=True)
    assert decoding.missing_decoder(".heic") == "pip install pillow-heif"
    decoding._register_heic.cache_clear()


# Metadata


def insert(data, kind, body, *, before=b"IDAT", damaged=False):
    """Puts a chunk into a PNG, with a wrong checksum if `damaged`."""
    checksum = zlib.crc32(kind + body) ^ damaged
    at = data.index(before) - 4
    return data[:at] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum) + data[at:]


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5_000_000))),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(5_000_000))),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(5_000_000))),
        (b"gAMA", b""),
    ],
)
def test_pixels_of_a_png_do_not_depend_on_its_metadata(kind, body, before):
    exif = Image.Exif()
    exif[0x0112] = 6
    sound = encode(PHOTO, "PNG", exif=exif)
    upright = decode(sound, exif_rotated=True)
    assert upright.shape == (61, 43, 3)
    for damaged in (False, True):
        data = insert(sound, kind, body, before=before, damaged=damaged)
        np.testing.assert_array_equal(decode(data, exif_rotated=True), upright)
        assert header_size(data) == (43, 61)
    cut_off = data[: data.index(b"IDAT") + 2000]
    with pytest.raises(ImageError, match=f"It has {len(cut_off):,} bytes"):
        decode(cut_off, exif_rotated=True)


def test_metadata_of_other_formats_changes_no_pixel():
    for form in ("JPEG", "WEBP", "TIFF"):
        plain = decode(encode(PHOTO, form), exif_rotated=True)
        for metadata in ({"icc_profile": bytes(2_000_000)}, {"exif": b"Exif\0\0" + b"junk" * 10}, {"xmp": b"<" * 60_000}):
            if form == "TIFF" and "exif" in metadata:  # Pillow writes none that is junk
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                np.testing.assert_array_equal(decode(encode(PHOTO, form, **metadata), exif_rotated=True), plain)


# What cannot be decoded


def png(width, height):
    """Returns a PNG that claims a size and holds no pixels."""
    chunks = b""
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunks


def jpeg_of_size(width, height):
    """Returns a JPEG whose header claims another size than it has."""
    data = encode(PHOTO)
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


@pytest.mark.parametrize("form", ["JPEG", "progressive", "PNG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95, 0.99])
def test_a_truncated_file_is_an_error(form, share):
    photo = PHOTO.resize((300, 200))
    options = {"progressive": True} if form == "progressive" else {}
    data = encode(photo, "JPEG" if form == "progressive" else form, **options)
    assert decode(data, exif_rotated=True).shape == (200, 300, 3)
    data = data[: int(share * len(data))]
    with pytest.raises(ImageError, match=f"It has {len(data):,} bytes, which start with {data[:2].hex(' ')}"):
        decode(data, exif_rotated=True)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("tail", [b"", b"\xff\xd9", bytes(5000)])
def test_a_jpeg_without_its_lower_half_is_never_filled_up(progressive, tail):
    data = encode(PHOTO.resize((300, 200)), progressive=progressive)
    with pytest.raises(ImageError, match="cut off"):
        decode(data[: len(data) // 2] + tail, exif_rotated=False)


def test_stray_bytes_in_a_jpeg_are_tolerated_unless_it_is_cut_off_too():
    sound = encode(PHOTO.resize((300, 200)), restart_marker_rows=1)
    start = sound.index(b"\xff\xd3")
    data = sound[:start] + b"stray bytes" + sound[start:]
    with pytest.raises(ValueError, match="extraneous bytes"):  # or this test says nothing
        simplejpeg.decode_jpeg(data, "RGB", fastdct=True)
    np.testing.assert_array_equal(decode(data, exif_rotated=True), decode(sound, exif_rotated=True))
    with pytest.raises(ImageError, match="truncated"):
        decode(data[: len(data) * 3 // 4], exif_rotated=False)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"not a known image. It has 0 bytes; allowed are JPEG, PNG"),
        (b"<html>404 Not Found</html>", "not a known image. It has 26 bytes, which start with 3c 68 74 6d"),
        (b"\xff\xd8", "It has 2 bytes, which start with ff d8"),
        (b"\xff\xd8\xff" + bytes(1000), "It has 1,003 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a known image"),
        (png(50_000, 50_000), "exceeds limit of 178956970 pixels"),
        (png(0, 5), "."),
        (png(5, 5), "cannot be decoded"),
        (jpeg_of_size(60_000, 60_000), "60000 x 60000 pixels, allowed are 178,956,970 in all"),
        (jpeg_of_size(0, 10), "."),
        (jpeg_of_size(8_000, 8_000), "as bombs are; allowed are 36,000,000 pixels, or 32 a byte"),
        (png(6_001, 6_000), "6001 x 6000 pixels in [0-9]+ bytes, as bombs are"),
        (many_scans(101), "a JPEG of 1[0-9]+ scans, allowed are 100"),
        (encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "32 bits a pixel"),
        (None, "must be bytes or a uint8 array, not NoneType"),
        ("photo.jpg", "must be bytes or a uint8 array, not str"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \(4, 4, 3\) is no image: expected uint8"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8 \(4, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "is no image"),
        (np.zeros((4,), np.uint8), "is no image"),
        (np.zeros((0, 4, 3), np.uint8), "is no image"),
    ],
)
def test_what_is_no_image(data, message):
    with pytest.raises(ImageError, match=message):
        decode(data, exif_rotated=True)


def test_scans_are_counted_unless_there_is_surely_one():
    plain, frame = encode(PHOTO), b"\xff\xc0\x00\x11\x08" + bytes(12)
    one_scan = [plain, encode(PHOTO.convert("L")), encode(PHOTO, exif=Image.Exif())]
    more = [encode(PHOTO, progressive=True), plain[:2] + frame + plain[2:], plain[:2] + b"\xff" + plain[2:], plain[:300], b""]
    scan = plain.index(b"\xff\xda")
    more.append(plain[: scan + 4] + b"\x01" + plain[scan + 5 :])  # the first scan is of one colour of three
    assert [decoding._has_one_scan(data) for data in one_scan + more] == [True] * 3 + [False] * 6


def test_damaged_bytes_give_an_image_or_an_image_error():
    rng = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"):
        sound = encode(PHOTO.convert("P") if form == "GIF" else PHOTO, form)
        for _ in range(40):
            data = np.frombuffer(sound, np.uint8).copy()
            places = rng.integers(0, min(len(data), 400), 3)
            data[places] = rng.integers(0, 256, 3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert decode(data.tobytes(), exif_rotated=True).shape[2] == 3
                except ImageError:
                    pass
