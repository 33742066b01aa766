"""From encoded bytes to pixels of the size a model wants: decoding, resizing and cropping on the host, in NumPy.

The published checkpoints were trained with TensorFlow's decoder and resizer. `decode` equals `tf.io.decode_jpeg` bit
for bit on grey and colour JPEGs, and `resize` equals `tf.image.resize` to 1e-4 on the scale [-1, 1]: TensorFlow rounds
positions to float32, OpenCV does not. What was trained with torch (DeiT, timm) saw Pillow's antialiased resizing and
torchvision's crops: `antialias`, "random_resized", "simple". Flipping and normalising happen later, on the device.
"""

import io
import math
from typing import Any

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

# EXIF orientation → how to turn the stored pixels so that they stand upright. 1 is upright already.
TURNS = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.flip(cv2.transpose(image), -1),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


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
    pixels = _decode_jpeg(image) if image.startswith(b"\xff\xd8") else None
    orientation = 1
    if pixels is None:
        with _open(image) as opened:
            pixels = _decode_pillow(opened, image)
            if exif_rotated:
                orientation = _orientation(image, opened)
    # Most JPEGs carry no orientation: a search of the bytes spares them the parser.
    elif exif_rotated and (b"Exif\0\0" in image or b"tiff:Orientation" in image):
        orientation = _orientation(image)
    return TURNS[orientation](pixels) if orientation in TURNS else pixels


def _from_array(image: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    shape = image.shape
    if image.dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,)) or image.size == 0:
        raise ImageError(f"an array of {image.dtype} {shape} is no image: expected uint8 (h w), (h w 1) or (h w 3)")
    if shape[2:] == (3,):
        return image
    return np.repeat(image.reshape(*shape[:2], 1), 3, axis=2)


def _decode_jpeg(data: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
    """Returns a JPEG as TensorFlow decodes it (CMYK to 2 of 255), or None for what simplejpeg leaves to Pillow."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height)
    try:
        # The fast DCT and the slow ("fancy") upsampling of colour are TensorFlow's defaults.
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True)
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise _undecodable(data, "the JPEG is cut off") from error
    # A warning of libjpeg, such as stray bytes, which TensorFlow and every viewer tolerate. It stopped the decoder, so
    # that a missing end may have gone unseen: Pillow would tell.
    with _open(data) as opened:
        _load(opened, data)
    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, strict=False)


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
        return (opened or _open(data)).getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged tag is no reason to lose a sound picture
        return 1


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
    image: Shaped[np.ndarray, "h w 3"], size: tuple[int, int], *, interpolation: str = "bilinear", antialias: bool = False
) -> Shaped[np.ndarray, "h2 w2 3"]:
    """Resizes to (h2, w2) with half-pixel centres; the range stays.

    As it stands, like `tf.image.resize`: bilinear, float32. With `antialias`, which takes and returns uint8, like Pillow,
    and so torchvision and timm: bit for bit the same, and `interpolation` may be "bicubic", too.
    """
    if interpolation not in INTERPOLATIONS:
        raise unknown("interpolation", interpolation, INTERPOLATIONS)
    height, width = size
    if antialias:
        return np.asarray(Image.fromarray(image).resize((width, height), INTERPOLATIONS[interpolation]))
    if interpolation != "bilinear":
        raise UserError(f"interpolation={interpolation!r} needs antialias=True")
    # float32 matters: on uint8 OpenCV interpolates with 11 bits.
    return cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)


def resize_to_cover(image: Shaped[np.ndarray, "h w 3"], box: tuple[int, int], **how: Any) -> Shaped[np.ndarray, "h2 w2 3"]:
    """Resizes to the smallest size of the same aspect that covers (h, w) of `box`: of a square, the shorter side is its own.

    The other side is rounded down, as torchvision does. `how` is for `resize`.
    """
    h, w, _ = image.shape
    height, width = box
    size = (height, int(height * w / h)) if height * w >= width * h else (int(width * h / w), width)
    return resize(image, size, **how)


def inception_crop(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    area: tuple[float, float] = (0.05, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Returns a random window as a view: `area` is its share of the image, `aspect` its width / height.

    This draws as `tf.image.sample_distorted_bounding_box` does with the whole image as box: the aspect uniformly, then
    the height uniformly among those that keep area and image, so that small windows are likelier than in torchvision.
    After 100 vain attempts the whole image is returned. Unlike TensorFlow, a window may include the last row or column.
    """
    h, w, _ = image.shape
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
            return random_crop(image, (height, width), rng)
    return image


def random_resized_crop(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Returns a random window as a view, drawn as torchvision's and timm's RandomResizedCrop do.

    Its share of the image is uniform in `area`, its width / height log-uniform in `aspect`. After 10 vain attempts it is
    the largest window in the middle whose aspect is allowed.
    """
    h, w, _ = image.shape
    for _ in range(10):
        pixels, ratio = h * w * rng.uniform(*area), math.exp(rng.uniform(*map(math.log, aspect)))
        height, width = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < height <= h and 0 < width <= w:
            return random_crop(image, (height, width), rng)
    ratio = min(max(w / h, aspect[0]), aspect[1])
    height, width = min(h, round(w / ratio)), min(w, round(h * ratio))
    top, left = (h - height) // 2, (w - width) // 2
    return image[top : top + height, left : left + width]


def simple_crop(
    image: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator, size: tuple[int, int], *, padding: int = 4, **how: Any
) -> Shaped[np.ndarray, "h2 w2 3"]:
    """Returns DeiT III's simple random crop (https://arxiv.org/abs/2204.07118), a window of (h2, w2) pixels.

    The image is resized to cover `size`, reflected around its edges by `padding` pixels, and cropped at random. `how` is
    for `resize`.
    """
    pixels = resize_to_cover(image, size, **how)
    return random_crop(cv2.copyMakeBorder(pixels, *[padding] * 4, cv2.BORDER_REFLECT_101), size, rng)


def random_crop(
    image: Shaped[np.ndarray, "h w 3"], size: tuple[int, int], rng: np.random.Generator
) -> Shaped[np.ndarray, "h2 w2 3"]:
    """Returns a window of (h2, w2) at a uniformly random place, as a view."""
    h, w, _ = image.shape
    height, width = size
    if height > h or width > w:
        raise UserError(f"a crop of {height} x {width} does not fit into {h} x {w} (h x w): make the crop smaller")
    top = rng.integers(h - height, endpoint=True)
    left = rng.integers(w - width, endpoint=True)
    return image[top : top + height, left : left + width]


def train_image(
    image: UInt8[np.ndarray, "h w 3"],
    rng: np.random.Generator,
    *,
    crop: int | tuple[int, int],
    resize_to: int | None = None,
    crop_method: str = "inception",
    area: tuple[float, float] = (0.05, 1.0),
    interpolation: str = "bilinear",
    antialias: bool = False,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Returns a random view of the image for training, of `crop` pixels (a side, or (h2, w2)), rounded to uint8.

    `crop_method`: "inception" and "random_resized" resize a random window, which covers a share of the image within
    `area`, see `inception_crop` and `random_resized_crop`; "simple" is `simple_crop`. With `resize_to`, whatever the
    method, the transfer recipe of AugReg ("How to train your ViT?", arXiv 2106.10270): the whole image resized to a
    square of `resize_to`, and a random window of it. `interpolation` and `antialias` are those of `resize`.
    """
    if crop_method not in CROP_METHODS:
        raise unknown("crop_method", crop_method, CROP_METHODS)
    size, how = _pair(crop), {"interpolation": interpolation, "antialias": antialias}
    if resize_to is not None:
        pixels = random_crop(resize(image, _pair(resize_to), **how), size, rng)
    elif crop_method == "simple":
        pixels = simple_crop(image, rng, size, **how)
    else:
        window = inception_crop if crop_method == "inception" else random_resized_crop
        pixels = resize(window(image, rng, area), size, **how)
    # No clipping: bilinear interpolation leaves 0..255 by less than rint takes back.
    return np.ascontiguousarray(pixels if pixels.dtype == np.uint8 else np.rint(pixels).astype(np.uint8))


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
    pixels = resize_to_cover(image, tuple(round(resize_to * side / min(size)) for side in size), **how)
    top, left = (round((have - want) / 2) for have, want in zip(pixels.shape[:2], size, strict=True))
    return np.ascontiguousarray(pixels[top : top + size[0], left : left + size[1]], np.float32)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
