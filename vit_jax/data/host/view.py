"""Views: which part of an image is seen, at which size, drawn once and applied alike to pixels, boxes and class maps.

`draw_view` draws a view for training, `eval_view` gives the one for evaluation. Several views of one `Picture` need one
decoding: `picture = picture.decoded(views)`, then `[view.image(picture) for view in views]`. The colours are changed
later, on the device.
"""

import dataclasses
import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Integer, Num, Shaped, UInt8

from vit_jax.data.host.crop import inception_box, random_box, random_resized_box
from vit_jax.data.host.decode import ImageError, Jpeg, decode
from vit_jax.data.host.resize import Box, cover, cut, resize
from vit_jax.errors import UserError, unknown

CROP_METHODS = ("inception", "random_resized", "simple")
IGNORED = 255
"""The class of what lies outside the image, in a class map: no loss, no score counts it."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of (h, w), stood upright: a JPEG of which only the header has been read, or pixels at 1 / `factor`.

    Pixels begin at the (row, column) `start` of the image at this size.
    """

    size: tuple[int, int]
    jpeg: Jpeg | None = None
    pixels: Shaped[np.ndarray, "h2 w2 3"] | None = None
    factor: int = 1
    start: tuple[int, int] = (0, 0)

    @classmethod
    def read(cls, image: bytes | np.ndarray, *, exif_rotated: bool) -> "Picture":
        """Reads the header of a JPEG; everything else, as `decode` takes it, is decoded at once. Raises ImageError."""
        if jpeg := Jpeg.read(image, exif_rotated=exif_rotated):
            return cls(jpeg.size, jpeg)
        return cls.of(decode(image, exif_rotated=exif_rotated))

    @classmethod
    def of(cls, pixels: Shaped[np.ndarray, "h w 3"]) -> "Picture":
        """The picture of decoded pixels."""
        return cls(pixels.shape[:2], pixels=pixels)

    def decoded(self, views: "Sequence[View]", *, scaled: bool = True) -> "Picture":
        """The picture with pixels for all the views: decoded once, as far and as large as they need.

        With `scaled` a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its size at which no view resizes fewer
        pixels than it gets. Windows stay where they are, to a fraction of a pixel. Raises ImageError.
        """
        if self.pixels is not None:
            return self
        factor = min((view.factor for view in views), default=1) if scaled else 1
        boxes = [self.jpeg.scaled(view.window, factor) for view in views] or [Box(0, 0, *self.size)]
        pixels, start = self.jpeg.decode_part(boxes, factor)
        return dataclasses.replace(self, pixels=pixels, factor=factor, start=start)


@dataclasses.dataclass(frozen=True)
class View:
    """A part of an upright image of `source` (h, w), and how it is seen; the same for all that belongs to the image.

    The `window` of the image is resized to `resized` (h, w), a `border` of reflected pixels is put around it, of which
    `cut`, of whole pixels, is taken and, if `mirrored`, its left and right are exchanged. `interpolation` and `antialias`
    are those of `resize`.
    """

    source: tuple[int, int]
    window: Box
    resized: tuple[int, int]
    border: int = 0
    cut: Box | None = None
    mirrored: bool = False
    interpolation: str = "bilinear"
    antialias: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the view."""
        return (self.cut.height, self.cut.width) if self.cut else tuple(n + 2 * self.border for n in self.resized)

    @property
    def factor(self) -> int:
        """The largest of 8, 4, 2 and 1 by which a JPEG can be scaled down and leave the window `resized` pixels or more."""
        (_, _, h, w), (height, width) = self.window, self.resized
        return next((n for n in (8, 4, 2) if h >= n * height and w >= n * width), 1)

    def image(
        self, picture: Picture | Shaped[np.ndarray, "h w 3"], *, rounded: bool = True
    ) -> UInt8[np.ndarray, "h2 w2 3"] | Float32[np.ndarray, "h2 w2 3"]:
        """Returns the pixels of the view, as uint8, or as they are interpolated (0..255, float32) if not `rounded`.

        A picture without pixels is decoded for this view alone. Raises ImageError.
        """
        picture = Picture.of(picture) if isinstance(picture, np.ndarray) else picture.decoded([self])
        self._check("image", picture.size)
        window = picture.jpeg.scaled(self.window, picture.factor) if picture.factor > 1 else self.window
        window = window._replace(top=window.top - picture.start[0], left=window.left - picture.start[1])
        pixels = resize(picture.pixels, self.resized, box=window, interpolation=self.interpolation, antialias=self.antialias)
        if self.border:
            pixels = cv2.copyMakeBorder(pixels, *[self.border] * 4, cv2.BORDER_REFLECT_101)
        pixels = self._cut_and_mirrored(pixels)
        if rounded and pixels.dtype != np.uint8:
            # This rounds half to even. The absolute value changes nothing: bilinear interpolation stays within 0..255.
            return cv2.convertScaleAbs(pixels)
        return np.ascontiguousarray(pixels, np.uint8 if rounded else np.float32)

    def boxes(self, boxes: Num[np.ndarray, "n 4"]) -> tuple[Float32[np.ndarray, "n 4"], Bool[np.ndarray, " n"]]:
        """Returns the boxes in pixels of the view, clipped to what it shows, and which of them have an area left.

        Boxes are (left, top, right, bottom) in pixels of the upright image, of which the first covers 0 to 1. A border
        repeats what is inside, and has no boxes.
        """
        boxes = np.asarray(boxes, np.float64).reshape(-1, 2, 2)  # (n, corner, x or y)
        window, cut_out = self.window, self.cut or Box(0, 0, *self.size)
        start, extent = np.array([window.left, window.top]), np.array([window.width, window.height])
        # From the image to the window, as resized, to the view.
        boxes = (boxes - start).clip(0, extent) * np.array(self.resized[::-1]) / extent
        boxes = (boxes + self.border - [cut_out.left, cut_out.top]).clip(0, self.size[::-1])
        if self.mirrored:
            right, left = self.size[1] - boxes[:, 0, 0], self.size[1] - boxes[:, 1, 0]
            boxes[:, 0, 0], boxes[:, 1, 0] = left, right
        kept = (boxes[:, 1] > boxes[:, 0]).all(axis=1)
        return boxes.reshape(-1, 4).astype(np.float32), kept

    def segmentation(self, labels: Integer[np.ndarray, "h w"], *, ignored: int = IGNORED) -> Integer[np.ndarray, "h2 w2"]:
        """Returns the class map of the view: the class of the source pixel at each pixel's centre, `ignored` in a border.

        The centres are where `resize` looks, and no classes are mixed. Raises ImageError for a map of another size.
        """
        self._check("class map", labels.shape)
        top, left, h, w = self.window
        rows = _nearest(top, h, self.resized[0], self.source[0])
        columns = _nearest(left, w, self.resized[1], self.source[1])
        labels = np.pad(labels[np.ix_(rows, columns)], self.border, constant_values=ignored)
        return np.ascontiguousarray(self._cut_and_mirrored(labels))

    def _cut_and_mirrored(self, array: np.ndarray) -> np.ndarray:
        array = cut(array, self.cut) if self.cut else array
        return array[:, ::-1] if self.mirrored else array

    def _check(self, what: str, size: tuple[int, ...]) -> None:
        if tuple(size) != tuple(self.source):
            has, expected = (" x ".join(map(str, n)) for n in (size, self.source))
            raise ImageError(f"the {what} is {has} (h x w), where the view was drawn for {expected}")


def _nearest(start: float, length: float, count: int, limit: int) -> Integer[np.ndarray, " count"]:
    """The pixels at the centres of `count` equal parts of [start, start + length]."""
    return np.floor(start + (np.arange(count) + 0.5) * length / count).astype(int).clip(0, limit - 1)


def draw_view(
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    crop: int | tuple[int, int],
    resize_to: int | tuple[int, int] | None = None,
    crop_method: str = "inception",
    area: tuple[float, float] = (0.05, 1.0),
    flip: bool = False,
    interpolation: str = "bilinear",
    antialias: bool = False,
) -> View:
    """Returns a random view of an image of `size` (h, w) for training: `crop` pixels (a side, or (h2, w2)).

    `crop_method`: "inception" and "random_resized" resize a random window, which covers a share of the image within
    `area`, see `inception_box` and `random_resized_box`; "simple" is DeiT III's (https://arxiv.org/abs/2204.07118): the
    image resized to cover `crop`, reflected around its edges by 4 pixels, and a random window of it. With `resize_to`,
    whatever the method, the transfer recipe of AugReg ("How to train your ViT?", arXiv 2106.10270): the whole image
    resized to a square of `resize_to`, and a random window of it. With `flip`, every second view is mirrored: for what
    the device does not mirror itself.
    """
    if crop_method not in CROP_METHODS:
        raise unknown("crop_method", crop_method, CROP_METHODS)
    how = {"interpolation": interpolation, "antialias": antialias}
    crop = _pair(crop)
    if resize_to is not None or crop_method == "simple":
        resized, border = (_pair(resize_to), 0) if resize_to is not None else (cover(size, crop), 4)
        window = random_box(tuple(n + 2 * border for n in resized), crop, rng)
        view = View(size, Box(0, 0, *size), resized, border, window, **how)
    else:
        draw = inception_box if crop_method == "inception" else random_resized_box
        view = View(size, draw(size, rng, area), crop, **how)
    return dataclasses.replace(view, mirrored=bool(rng.random() < 0.5)) if flip else view


def eval_view(
    size: tuple[int, int],
    *,
    crop: int | tuple[int, int],
    resize_to: int | tuple[int, int] | None = None,
    interpolation: str = "bilinear",
    antialias: bool = False,
    floor_cut: bool = False,
) -> View:
    """Returns the view of an image of `size` (h, w) that a model gets in evaluation: `crop` pixels (a side, or (h2, w2)).

    Without `resize_to` the whole image is resized to them, as the published evaluation of Google's ViTs does. With it, as
    in torchvision's: resized to a shorter side of `resize_to`, the middle cut out. Of a `crop` that is no square,
    `resize_to` is for the shorter side, and the image is resized to cover a box of its aspect. With a pair (h, w) the image
    is resized to just that. Half a pixel at the cut is rounded to even as by torchvision, or down with `floor_cut` as by
    transformers.
    """
    crop, how = _pair(crop), {"interpolation": interpolation, "antialias": antialias}
    if resize_to is None:
        return View(size, Box(0, 0, *size), crop, **how)
    is_side = isinstance(resize_to, int)
    if resize_to < min(crop) if is_side else resize_to[0] < crop[0] or resize_to[1] < crop[1]:
        raise UserError(f"a crop of {crop[0]} x {crop[1]} does not fit into a shorter side of {resize_to}: resize to more")
    box = tuple(round(resize_to * side / min(crop)) for side in crop) if is_side else tuple(resize_to)
    resized = cover(size, box) if is_side else box
    halved = math.floor if floor_cut else round
    top, left = (halved((have - want) / 2) for have, want in zip(resized, crop, strict=True))
    return View(size, Box(0, 0, *size), resized, cut=Box(top, left, *crop), **how)


def train_image(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    *,
    exif_rotated: bool,
    scaled_decoding: bool = True,
    **options,
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Returns a random view of an image, as `decode` takes it, for training; `options` are those of `draw_view`.

    With `scaled_decoding` a JPEG is decoded as large as needed, see `Picture.decoded`. The draws are the same.
    """
    picture = Picture.read(image, exif_rotated=exif_rotated)
    view = draw_view(picture.size, rng, **options)
    return view.image(picture.decoded([view], scaled=scaled_decoding))


def eval_image(image: UInt8[np.ndarray, "h w 3"], **options) -> Float32[np.ndarray, "h2 w2 3"]:
    """Returns a decoded image as a model sees it in evaluation, 0..255, unrounded; `options` are those of `eval_view`."""
    return eval_view(image.shape[:2], **options).image(image, rounded=False)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
