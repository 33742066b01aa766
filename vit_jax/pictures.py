"""Pictures for people: heat maps over photos, and sheets of captioned pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from vit_jax.data.listing import shown
from vit_jax.errors import UserError
from vit_jax.files import write_atomically

GAP, LINE = 6, 18
"""Between pictures, and what a line of text takes, in pixels."""
Captioned = tuple[str, Image.Image]
_DARK_TO_BRIGHT = np.array(
    [(0, 0, 10), (60, 15, 95), (135, 35, 105), (205, 70, 70), (245, 130, 30), (250, 200, 60), (252, 252, 170)]
)
_DIVERGING = np.array([(35, 60, 130), (120, 160, 210), (245, 245, 245), (225, 140, 90), (150, 30, 30)])


def font(size: int = 13) -> ImageFont.FreeTypeFont:
    """The font of all pictures."""
    return ImageFont.load_default(size=size)


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of its beginning as fits into `width` pixels, and dots."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "..") > width:
        text = text[:-1]
    return text + ".."


def scaled(x: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    """From 0 for the least to 1 for the largest; all 0 where nothing differs."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else np.zeros_like(x)


def coloured(x: Float[np.ndarray, "h w"], *, diverging: bool = False) -> Image.Image:
    """0..1 as colours, dark to bright; `diverging`: -1..1 from blue over white to red."""
    anchors = _DIVERGING if diverging else _DARK_TO_BRIGHT
    place = np.linspace(-1 if diverging else 0, 1, len(anchors))
    return Image.fromarray(np.stack([np.interp(x, place, c) for c in anchors.T], axis=-1).round().astype(np.uint8))


def heat_over(image: Image.Image, heat: Float[np.ndarray, "h w"], *, share: tuple[float, float] = (1.0, 1.0)) -> Image.Image:
    """A heat map, from its least to its largest value, over a grey version of the image, which shows less where it is hot.

    Args:
      share: how much of the image's height and width the map stands for, from the top left; a patch that is cut off makes
        it less than 1, one that is padded more.
    """
    whole = tuple(max(1, round(length * part)) for length, part in zip(image.size, reversed(share), strict=True))
    smooth = Image.fromarray(scaled(heat).astype(np.float32)).resize(whole, Image.Resampling.BICUBIC)
    smooth = np.asarray(smooth.crop((0, 0, *image.size))).clip(0, 1)  # 0 where it is too small
    opacity = Image.fromarray((255 * (0.4 + 0.45 * smooth)).round().astype(np.uint8))
    return Image.composite(coloured(smooth), image.convert("L").convert("RGB"), opacity)


def sheet(rows: Sequence[Sequence[Captioned]], title: str = "") -> Image.Image:
    """Rows of pictures below their captions, and a title above all."""
    words, heading = font(), font(15)
    lines = [LINE if any(caption for caption, _ in row) else 0 for row in rows]
    heights = [line + max(picture.height for _, picture in row) + GAP for line, row in zip(lines, rows, strict=True)]
    width = max(GAP + sum(picture.width + GAP for _, picture in row) for row in rows)
    top = GAP + (LINE + GAP if title else 0)
    canvas = Image.new("RGB", (width, top + sum(heights)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, GAP), fitted(title, heading, width - 2 * GAP), fill="black", font=heading)
    for row, line, height in zip(rows, lines, heights, strict=True):
        left = GAP
        for caption, picture in row:
            pen.text((left, top), fitted(caption, words, picture.width), fill="black", font=words)
            canvas.paste(picture, (left, top + line))
            left += picture.width + GAP
        top += height
    return canvas


def resized(image: Image.Image, width: int, *, smooth: bool = True) -> Image.Image:
    """The image at this width, its aspect kept."""
    size = width, max(1, round(image.height * width / image.width))
    return image.resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


def write(picture: Image.Image, path: Path) -> None:
    """Writes a PNG, whole or not at all. UserError where nothing can be written."""
    try:
        write_atomically(path, lambda f: picture.save(f, "PNG", optimize=True))
    except OSError as e:
        raise UserError(f"{shown(path)} cannot be written: {e.strerror or e}") from e
