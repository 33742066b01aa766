"""From encoded bytes to upright pixels, in NumPy.

The published checkpoints were trained with TensorFlow's decoder: `decode` equals `tf.io.decode_jpeg` bit for bit on grey
and colour JPEGs. Every other format goes through Pillow, HEIC through its plug-in pillow-heif where that is installed.
"""

import dataclasses
import functools
import importlib.util
import io
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image
from PIL import features as pillow_features

from vit_jax.data.host.part import decode_part
from vit_jax.data.host.resize import Box
from vit_jax.errors import UserError

# What Pillow may open: among its other formats are some that start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF = {b"avif", b"avis"}
PNG = b"\x89PNG\r\n\x1a\n"
# Pillow's own limit against decompression bombs; as 8-bit RGB an image of this size fills 537 MB.
MAX_PIXELS = 178_956_970
# An image of more pixels than the spare ones, which take 500 MB while they are decoded, must have a byte for so many of them.
SPARE_PIXELS, PIXELS_A_BYTE = {"WEBP": 16_000_000, "other": 36_000_000}, 32
# A progressive JPEG has about 10; each passes over all pixels again.
MAX_SCANS = 100
SCAN = 0xDA
"""The marker at which a JPEG's pixels start."""

# EXIF orientation → what makes the stored pixels stand upright: (transpose, then mirror rows, then mirror columns).
TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


T = TypeVar("T")


class ImageError(UserError):
    """An image that cannot be decoded. The message does not name the file: whoever knows it puts it in front."""


def decode(image: bytes | np.ndarray, *, exif_rotated: bool) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the pixels of an encoded image, or of a uint8 array (h w), (h w 1) or (h w 3), as RGB.

    Alpha is dropped, not blended, as TensorFlow and torchvision do; an animation gives its first frame; of 16 bits the
    upper 8 are kept. With `exif_rotated` the image is turned upright as its EXIF tag says.
    Raises ImageError where there is no complete image: a truncated file is never filled up with grey.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if not isinstance(image, bytes):
        raise ImageError(f"an image must be bytes or a uint8 array, not {type(image).__name__}")
    if jpeg := Jpeg.read(image, exif_rotated=exif_rotated):
        return jpeg.decode()

    def decode_all(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
        with _open(data) as opened:
            pixels = _decode_pillow(opened, data)
            return _turn(pixels, _orientation(data, opened)) if exif_rotated else pixels

    return _despite_metadata(decode_all, image)


def from_pillow(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a PIL image, upright: those that `decode` makes of its file. Raises ImageError."""
    return _turn(_rgb(image), _orientation(b"", image))


def decode_indices(image: bytes, *, colors: bool = False) -> UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]:
    """Returns the numbers that a PNG holds at its pixels: places in its palette, or grey values. Raises ImageError.

    With `colors` a PNG of RGB is allowed, too, of which those are returned.
    """

    def decode_all(data: bytes) -> UInt8[np.ndarray, "..."]:
        with _open(data) as opened:
            of_colors = colors and opened.format == "PNG" and opened.mode in ("RGB", "RGBA")
            if not of_colors and (opened.format != "PNG" or opened.mode not in ("P", "L", "1")):
                kind = f"{opened.format} of mode {opened.mode}"
                raise ImageError(
                    f"is a {kind}: a mask is a PNG of 8 bits with a palette, or grey, whose numbers are classes, or one of RGB "
                    'where classes.json gives the "colors" of the classes'
                )
            _load(opened, data)
            if of_colors:
                return np.asarray(opened.convert("RGB"))
            indices = np.asarray(opened).astype(np.uint8)
            # Pillow stretches grey values of fewer than 8 bits to 0..255; how many they are stands in the header.
            return indices // (255 // (2 ** data[24] - 1)) if opened.mode == "L" else indices

    return _despite_metadata(decode_all, image)


def header_size(image: bytes | np.ndarray, *, exif_rotated: bool = False) -> tuple[int, int]:
    """(h, w) of an encoded image as its header has it, or turned upright, or of an array. Raises ImageError for others."""
    if isinstance(image, np.ndarray):
        return image.shape[:2]
    if jpeg := Jpeg.read(image, exif_rotated=exif_rotated):
        return jpeg.size
    with _despite_metadata(_open, image) as opened:
        transposed = exif_rotated and TURNS[_orientation(image, opened)][0]
        return (opened.width, opened.height) if transposed else (opened.height, opened.width)


def missing_decoder(suffix: str) -> str:
    """What must be installed to decode images with this suffix, in words; '' where nothing is missing."""
    if suffix in (".heic", ".heif") and importlib.util.find_spec("pillow_heif") is None:
        return "pip install pillow-heif"
    return "pip install 'pillow>=11.3'" if suffix == ".avif" and not pillow_features.check("avif") else ""


@dataclasses.dataclass(frozen=True)
class Jpeg:
    """A JPEG of which only the header has been read."""

    data: bytes
    size: tuple[int, int]  # (h, w) of the upright image
    orientation: int  # a key of TURNS

    @classmethod
    def read(cls, image: bytes | np.ndarray, *, exif_rotated: bool) -> "Jpeg | None":
        """None for other images, and for what simplejpeg leaves to Pillow."""
        if not isinstance(image, bytes) or not image.startswith(b"\xff\xd8"):
            return None
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(image)
        except ValueError:
            return None
        _check_size(width, height, image)
        orientation = _orientation(image) if exif_rotated and _may_be_turned(image) else 1
        return cls(image, (width, height) if TURNS[orientation][0] else (height, width), orientation)

    def decode(self, factor: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """The upright pixels as TensorFlow decodes them (CMYK to 2 of 255), at 1 / `factor` of the size: 1, 2, 4 or 8.

        A side that `factor` does not divide is rounded up: the last pixel reaches beyond the image.
        """
        h, w = self.size[::-1] if TURNS[self.orientation][0] else self.size
        scale = {"min_factor": factor, "min_height": -(-h // factor), "min_width": -(-w // factor)} if factor > 1 else {}
        # The fast DCT and the slow ("fancy") upsampling of colour are TensorFlow's defaults.
        how = {"colorspace": "RGB", "fastdct": True, **scale}
        try:
            pixels = simplejpeg.decode_jpeg(self.data, **how)
        except ValueError as error:
            if "premature end" in str(error).lower():
                raise _undecodable(self.data, "the JPEG is cut off") from error
            # A warning of libjpeg, such as stray bytes, which TensorFlow and every viewer tolerate. It stopped the
            # decoder, so that a missing end may have gone unseen: Pillow would tell.
            with _open(self.data) as opened:
                _load(opened, self.data)
            pixels = simplejpeg.decode_jpeg(self.data, **how, strict=False)
        return _turn(pixels, self.orientation)

    def decode_part(self, boxes: Sequence[Box], factor: int) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
        """Pixels of `decode(factor)` that hold these boxes of it, and the (row, column) where they begin: all, or fewer.

        Damage outside of what is decoded may go unnoticed, but for a missing end.
        """
        top, left = (max(0, math.floor(min(box[i] for box in boxes))) for i in (0, 1))
        bottom, right = (math.ceil(max(box[i] + box[i + 2] for box in boxes)) for i in (0, 1))
        if self.orientation == 1 and self.data.endswith(b"\xff\xd9") and (bottom - top) * (right - left) < self._most(factor):
            if part := decode_part(self.data, range(top, bottom), range(left, right), factor):
                return part
        return self.decode(factor), (0, 0)

    def _most(self, factor: int) -> float:
        """Of more pixels than these `decode` is as fast."""
        return 0.9 * self.size[0] * self.size[1] / factor**2

    def scaled(self, box: Box, factor: int) -> Box:
        """Where a box of the upright image lies in `decode(factor)`: behind the pixel that reaches beyond, if mirrored."""
        _, *mirrored = TURNS[self.orientation]
        beyond = [(-n % factor) / factor if mirror else 0 for n, mirror in zip(self.size, mirrored, strict=True)]
        return Box(*(x / factor + more for x, more in zip(box, (*beyond, 0, 0), strict=True)))


def _turn(image: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    transpose, rows, columns = TURNS[orientation]
    image = cv2.transpose(image) if transpose else image
    return cv2.flip(image, -1 if rows and columns else int(columns)) if rows or columns else image


def _from_array(image: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    shape = image.shape
    if image.dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,)) or image.size == 0:
        raise ImageError(f"an array of {image.dtype} {shape} is no image: expected uint8 (h w), (h w 1) or (h w 3)")
    if shape[2:] == (3,):
        return image
    return np.repeat(image.reshape(*shape[:2], 1), 3, axis=2)


def _open(data: bytes) -> Image.Image:
    """Opens bytes with Pillow; only the header is read."""
    is_heic = _is_heic(data)
    if is_heic and not _register_heic():
        raise _undecodable(data, "HEIC needs a plug-in: pip install pillow-heif")
    try:
        opened = Image.open(io.BytesIO(data), formats=("HEIF",) if is_heic else FORMATS)
    except Image.UnidentifiedImageError as error:
        raise _undecodable(data, "not a known image") from error
    except Exception as error:  # damaged headers raise nearly everything in Pillow's parsers
        raise _undecodable(data, str(error)) from error
    _check_size(*opened.size, data, opened.format)
    return opened


def _is_heic(data: bytes) -> bool:
    """Whether the first box of a HEIF file names HEIC among the kinds that it is, and not AVIF, which is Pillow's own."""
    if data[4:8] != b"ftyp":
        return False
    kinds = {data[i : i + 4] for i in range(8, min(int.from_bytes(data[:4]), 256), 4)}
    return bool(kinds & HEIC) and not kinds & AVIF


@functools.cache
def _register_heic() -> bool:
    """Makes Pillow open HEIC, if its plug-in is installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _despite_metadata(read: Callable[[bytes], T], data: bytes) -> T:
    """Calls read(data). Where a PNG fails, its texts and profiles, which Pillow limits, may be why: again without them."""
    try:
        return read(data)
    except ImageError:
        if not data.startswith(PNG) or (bare := _without_metadata(data)) == data:
            raise
        try:
            return read(bare)
        except ImageError:
            pass
        raise


def _without_metadata(png: bytes) -> bytes:
    """A PNG with nothing but what pixels depend on, and its EXIF, of which a damaged checksum is mended."""
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        kind, chunk = png[at + 4 : at + 8], png[at:end]
        if kind[:1].isupper() or kind == b"tRNS":
            kept.append(chunk)
        elif kind == b"eXIf":
            kept += [chunk[:-4], zlib.crc32(chunk[4:-4]).to_bytes(4)]
        at = end
    return b"".join(kept)


def _load(opened: Image.Image, data: bytes) -> None:
    try:
        opened.load()
    except Exception as error:  # as above, for damaged pixel data
        raise _undecodable(data, str(error)) from error


def _decode_pillow(opened: Image.Image, data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    _load(opened, data)
    try:
        return _rgb(opened)
    except ValueError as error:
        raise _undecodable(data, str(error)) from error


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255. The upper byte is what TensorFlow keeps.
        return _from_array((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError("32 bits a pixel, of which none says how bright white is")
    if "transparency" in image.info:  # converting a palette would warn that it is dropped
        image = image.copy()
        del image.info["transparency"]
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(data: bytes, opened: Image.Image | None = None) -> int:
    """Returns the EXIF (or XMP) orientation, 1 to 8, and 1 where there is none or it is damaged, as viewers do."""
    try:
        orientation = (opened or _open(data)).getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag is no reason to lose a sound picture
        return 1
    return orientation if orientation in TURNS else 1


def _may_be_turned(data: bytes) -> bool:
    """Whether a segment before a JPEG's pixels may tell its orientation: most have none, and are spared Pillow's parser."""
    for marker, segment in _segments(data):
        if marker == 0xE1 and (b"Exif\0\0" in segment or b"tiff:Orientation" in segment):
            return True
    return marker != SCAN


def _has_one_scan(data: bytes) -> bool:
    """Whether a JPEG surely has a single scan: it is not progressive, and its first scan is of all colours."""
    frames = []
    for marker, segment in _segments(data):
        if marker in (0xC0, 0xC1):
            frames.append(segment[9:10])
        elif marker not in (0xC4, 0xDB, 0xDD, 0xFE, SCAN) and not 0xE0 <= marker <= 0xEF:
            return False
    return marker == SCAN and frames == [segment[4:5]]


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, segment) of what precedes a JPEG's pixels, up to the first scan; at damage (0, b"") is the last."""
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        yield marker, data[at:end]
        if marker == SCAN:
            return
        at = end
    yield 0, b""


def _check_size(width: int, height: int, data: bytes, kind: str | None = "JPEG") -> None:
    if width < 1 or height < 1:
        raise ImageError(f"the image is {width} x {height} pixels: nothing to see")
    if width * height > MAX_PIXELS:
        raise ImageError(f"the image is {width} x {height} pixels, allowed are {MAX_PIXELS:,} in all: make it smaller")
    spare = SPARE_PIXELS.get(kind, SPARE_PIXELS["other"])
    if width * height > max(spare, PIXELS_A_BYTE * len(data)):
        allowed = f"allowed are {spare:,} pixels, or {PIXELS_A_BYTE} a byte"
        raise ImageError(f"the image is {width} x {height} pixels in {len(data):,} bytes, as bombs are; {allowed}")
    if kind == "JPEG" and not _has_one_scan(data) and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ImageError(f"the image is a JPEG of {scans:,} scans, allowed are {MAX_SCANS}: that is none of a camera")


def _undecodable(data: bytes, why: str) -> ImageError:
    start = f", which start with {data[:8].hex(' ')}" if data else ""
    why = why.rstrip(".")
    allowed = "allowed are JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF and HEIC"
    return ImageError(f"the image cannot be decoded: {why}. It has {len(data):,} bytes{start}; {allowed}")
