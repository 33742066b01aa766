"""From encoded bytes to pixels of the size a model wants: decoding, resizing and cropping on the host, in NumPy.

The published checkpoints were trained with TensorFlow's decoder and resizer. `decode` equals `tf.io.decode_jpeg` bit
for bit on grey and colour JPEGs, and `resize` equals `tf.image.resize` to 1e-4 on the scale [-1, 1]: TensorFlow rounds
positions to float32, OpenCV does not. What was trained with torch (DeiT, timm) saw Pillow's antialiased resizing and
torchvision's crops: `antialias`, "random_resized", "simple". Flipping and normalising happen later, on the device.
"""

import dataclasses
import io
import math
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float32, Shaped, UInt8
from PIL import ExifTags, Image

from vit_jax.errors import UserError, unknown

# What Pillow may open: among its other formats are some that start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# Pillow's own limit against decompression bombs; as 8-bit RGB an image of this size fills 537 MB.
MAX_PIXELS = 178_956_970

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
CROP_METHODS = ("inception", "random_resized", "simple")

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


class ImageError(UserError):
    """An image that cannot be decoded. The message does not name the file: whoever knows it puts it in front."""


class Box(NamedTuple):
    """A part of an image, in pixels of which the first covers 0 to 1."""

    top: float
    left: float
    height: float
    width: float


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
    with _open(image) as opened:
        pixels = _decode_pillow(opened, image)
        return _turn(pixels, _orientation(image, opened)) if exif_rotated else pixels


def header_size(image: bytes) -> tuple[int, int]:
    """(h, w) of an encoded image as its header has it. Raises ImageError where there is none."""
    if jpeg := Jpeg.read(image, exif_rotated=False):
        return jpeg.size
    with _open(image) as opened:
        return opened.height, opened.width


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
        _check_size(width, height)
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
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise _undecodable(data, "not a known image") from error
    except Exception as error:  # damaged headers raise nearly everything in Pillow's parsers
        raise _undecodable(data, str(error)) from error
    _check_size(*opened.size)
    return opened


def _load(opened: Image.Image, data: bytes) -> None:
    try:
        opened.load()
    except Exception as error:  # as above, for damaged pixel data
        raise _undecodable(data, str(error)) from error


def _decode_pillow(opened: Image.Image, data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    _load(opened, data)
    if opened.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255. The upper byte is what TensorFlow keeps.
        return _from_array((np.asarray(opened) >> 8).astype(np.uint8))
    if opened.mode in ("I", "F"):
        raise _undecodable(data, "32 bits a pixel, of which none says how bright white is")
    opened.info.pop("transparency", None)  # otherwise converting a palette warns that it is dropped
    try:
        return np.array(opened.convert("RGB"))
    except ValueError as error:
        raise _undecodable(data, str(error)) from error


def _orientation(data: bytes, opened: Image.Image | None = None) -> int:
    """Returns the EXIF (or XMP) orientation, 1 to 8, and 1 where there is none or it is damaged, as viewers do."""
    try:
        orientation = (opened or _open(data)).getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag is no reason to lose a sound picture
        return 1
    return orientation if orientation in TURNS else 1


def _may_be_turned(data: bytes) -> bool:
    """Whether a segment before a JPEG's pixels may tell its orientation: most have none, and are spared Pillow's parser."""
    at = 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) != b"\xda":  # where the pixels start
        segment = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
        if marker == b"\xe1" and (b"Exif\0\0" in segment or b"tiff:Orientation" in segment):
            return True
        at += len(segment)
    return data[at : at + 1] != b"\xff"


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"the image is {width} x {height} pixels: nothing to see")
    if width * height > MAX_PIXELS:
        raise ImageError(f"the image is {width} x {height} pixels, allowed are {MAX_PIXELS:,} in all: make it smaller")


def _undecodable(data: bytes, why: str) -> ImageError:
    start = f", which start with {data[:8].hex(' ')}" if data else ""
    why = why.rstrip(".")
    allowed = "allowed are JPEG, PNG, WebP, BMP, GIF and TIFF"
    return ImageError(f"the image cannot be decoded: {why}. It has {len(data):,} bytes{start}; {allowed}")


def resize(
    image: Shaped[np.ndarray, "h w 3"],
    size: tuple[int, int],
    *,
    box: Box | None = None,
    interpolation: str = "bilinear",
    antialias: bool = False,
) -> Shaped[np.ndarray, "h2 w2 3"]:
    """Resizes the image, or the part of it in `box`, to (h2, w2) with half-pixel centres; the range stays.

    As it stands, like `tf.image.resize`: bilinear, float32. With `antialias`, which takes and returns uint8, like Pillow,
    and so torchvision and timm: bit for bit the same, and `interpolation` may be "bicubic", too. The edges of `box` may
    lie within pixels; none that it does not touch counts.
    """
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation", interpolation, INTERPOLATIONS)
    if interpolation != "bilinear" and not antialias:
        raise UserError(f"interpolation={interpolation!r} needs antialias=True")
    height, width = size
    top, left, h, w = box or Box(0, 0, *image.shape[:2])
    image = image[math.floor(top) : math.ceil(top + h), math.floor(left) : math.ceil(left + w)]
    y, x = top % 1, left % 1
    if antialias:
        how = {"resample": INTERPOLATIONS[interpolation], "box": (x, y, x + w, y + h)}
        return np.asarray(Image.fromarray(image).resize((width, height), **how))
    image = image.astype(np.float32)  # on uint8 OpenCV interpolates with 11 bits
    if image.shape[:2] == (h, w):
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    step_y, step_x = h / height, w / width
    positions = np.array([[step_x, 0, x + (step_x - 1) / 2], [0, step_y, y + (step_y - 1) / 2]])
    how = {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, "borderMode": cv2.BORDER_REPLICATE}
    return cv2.warpAffine(image, positions, (width, height), **how)


def cover(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """The smallest (h, w) of the aspect of `size` that covers (h, w) of `box`: of a square, the shorter side is its own.

    The other side is rounded down, as torchvision does.
    """
    (h, w), (height, width) = size, box
    return (height, int(height * w / h)) if height * w >= width * h else (int(width * h / w), width)


def inception_box(
    size: tuple[int, int],
    rng: np.random.Generator,
    area: tuple[float, float] = (0.05, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Returns a random window of an image of (h, w): `area` is its share of the image, `aspect` its width / height.

    This draws as `tf.image.sample_distorted_bounding_box` does with the whole image as box: the aspect uniformly, then
    the height uniformly among those that keep area and image, so that small windows are likelier than in torchvision.
    After 100 vain attempts the whole image is returned. Unlike TensorFlow, a window may include the last row or column.
    """
    h, w = size
    smallest, largest = area[0] * h * w, area[1] * h * w
    for _ in range(100):
        ratio = rng.uniform(*aspect)
        low = round(math.sqrt(smallest / ratio))
        high = min(round(math.sqrt(largest / ratio)), int((w + 0.5) / ratio), h)
        height = int(rng.integers(min(low, high), high, endpoint=True))
        # Rounding can leave the allowed area by a little: one row more or less brings it back.
        if height * round(height * ratio) < smallest:
            height += 1
        if height * round(height * ratio) > largest:
            height -= 1
        width = round(height * ratio)
        if 0 < height <= h and 0 < width <= w and smallest <= height * width <= largest:
            return random_box(size, (height, width), rng)
    return Box(0, 0, h, w)


def random_resized_box(
    size: tuple[int, int],
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Returns a random window of an image of (h, w), drawn as torchvision's and timm's RandomResizedCrop do.

    Its share of the image is uniform in `area`, its width / height log-uniform in `aspect`. After 10 vain attempts it is
    the largest window in the middle whose aspect is allowed.
    """
    h, w = size
    for _ in range(10):
        pixels, ratio = h * w * rng.uniform(*area), math.exp(rng.uniform(*map(math.log, aspect)))
        height, width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < height <= h and 0 < width <= w:
            return random_box(size, (height, width), rng)
    ratio = min(max(w / h, aspect[0]), aspect[1])
    height, width = min(h, round(w / ratio)), min(w, round(h * ratio))
    return Box((h - height) // 2, (w - width) // 2, height, width)


def random_box(size: tuple[int, int], window: tuple[int, int], rng: np.random.Generator) -> Box:
    """Returns a window of (h2, w2) at a uniformly random place of an image of (h, w)."""
    (h, w), (height, width) = size, window
    if height > h or width > w:
        raise UserError(f"a crop of {height} x {width} does not fit into {h} x {w} (h x w): make the crop smaller")
    return Box(int(rng.integers(h - height, endpoint=True)), int(rng.integers(w - width, endpoint=True)), height, width)


def cut(image: Shaped[np.ndarray, "h w 3"], box: Box) -> Shaped[np.ndarray, "h2 w2 3"]:
    """Returns a box of whole pixels as a view."""
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


def train_image(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    exif_rotated: bool,
    crop: int | tuple[int, int],
    resize_to: int | None = None,
    crop_method: str = "inception",
    area: tuple[float, float] = (0.05, 1.0),
    interpolation: str = "bilinear",
    antialias: bool = False,
    scaled_decoding: bool = True,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Returns a random view of an image, as `decode` takes it, for training: `crop` pixels (a side, or (h2, w2)), rounded.

    `crop_method`: "inception" and "random_resized" resize a random window, which covers a share of the image within
    `area`, see `inception_box` and `random_resized_box`; "simple" is DeiT III's (https://arxiv.org/abs/2204.07118): the
    image resized to cover `crop`, reflected around its edges by 4 pixels, and a random window of it. With `resize_to`,
    whatever the method, the transfer recipe of AugReg ("How to train your ViT?", arXiv 2106.10270): the whole image
    resized to a square of `resize_to`, and a random window of it. `interpolation` and `antialias` are those of `resize`.

    With `scaled_decoding` a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its size at which what is resized
    has no fewer pixels than it gets. The draws are the same, the windows too, to a fraction of a pixel.
    """
    if crop_method not in CROP_METHODS:
        raise unknown("crop_method", crop_method, CROP_METHODS)
    jpeg = Jpeg.read(image, exif_rotated=exif_rotated)
    pixels = None if jpeg else decode(image, exif_rotated=exif_rotated)
    size = jpeg.size if jpeg else pixels.shape[:2]
    whole = resize_to is not None or crop_method == "simple"
    if whole:
        box, target = Box(0, 0, *size), cover(size, _pair(crop)) if resize_to is None else _pair(resize_to)
    else:
        draw = inception_box if crop_method == "inception" else random_resized_box
        box, target = draw(size, rng, area), _pair(crop)
    if jpeg:
        factor = _factor(box, target) if scaled_decoding else 1
        pixels, box = jpeg.decode(factor), jpeg.scaled(box, factor) if factor > 1 else box
    pixels = resize(pixels, target, box=box, interpolation=interpolation, antialias=antialias)
    if whole and resize_to is None:
        pixels = cv2.copyMakeBorder(pixels, *[4] * 4, cv2.BORDER_REFLECT_101)
    if whole:
        pixels = cut(pixels, random_box(pixels.shape[:2], _pair(crop), rng))
    # This rounds half to even. The absolute value changes nothing: bilinear interpolation stays within 0..255.
    return np.ascontiguousarray(pixels) if pixels.dtype == np.uint8 else cv2.convertScaleAbs(pixels)


def _factor(box: Box, target: tuple[int, int]) -> int:
    """The largest by which a JPEG can be scaled down and leave `box` at least (h, w) of `target`."""
    return next(n for n in (8, 4, 2, 1) if n == 1 or (box.height >= n * target[0] and box.width >= n * target[1]))


def eval_image(
    image: UInt8[np.ndarray, "h w 3"],
    *,
    crop: int | tuple[int, int],
    resize_to: int | None = None,
    interpolation: str = "bilinear",
    antialias: bool = False,
) -> Float32[np.ndarray, "h2 w2 3"]:
    """Returns the image as a model sees it in evaluation: `crop` pixels (a side, or (h2, w2)), 0..255.

    Without `resize_to` the whole image is resized to them, as the published evaluation of Google's ViTs does. With it, as
    in torchvision's: resized to a shorter side of `resize_to`, the middle cut out. Of a `crop` that is no square,
    `resize_to` is for the shorter side, and the image is resized to cover a box of its aspect.
    """
    size, how = _pair(crop), {"interpolation": interpolation, "antialias": antialias}
    if resize_to is None:
        return resize(image, size, **how).astype(np.float32, copy=False)
    if resize_to < min(size):
        raise UserError(f"a crop of {size[0]} x {size[1]} does not fit into a shorter side of {resize_to}: resize to more")
    pixels = resize(image, cover(image.shape[:2], tuple(round(resize_to * side / min(size)) for side in size)), **how)
    top, left = (round((have - want) / 2) for have, want in zip(pixels.shape[:2], size, strict=True))
    return np.ascontiguousarray(pixels[top : top + size[0], left : left + size[1]], np.float32)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
