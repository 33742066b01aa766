"""Several views of one image: two large ones, which a teacher sees, too, and some of small parts (SwAV, DINO)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vit_jax.data.host.decode import ImageError
from vit_jax.data.host.view import Picture, draw_view


def make_draw_views(
    *,
    global_size: tuple[int, int],
    local_size: int,
    local_crops: int,
    global_area: tuple[float, float] = (0.32, 1.0),
    local_area: tuple[float, float] = (0.05, 0.32),
    flip: bool = True,
    scaled_decoding: bool = True,
) -> Callable[..., dict[str, UInt8[np.ndarray, "n h w 3"]]]:
    """(image as `decode` takes it, rng=, exif_rotated=) → `global` (2, h, w, 3) and `local` (n, h, w, 3), from one decoding.

    Windows are torchvision's, resized by Pillow's bicubic; an area is the share of the image that a window covers.
    ImageError for an image that is smaller than a local crop.
    """
    large = {"crop": global_size, "area": global_area}
    small = {"crop": local_size, "area": local_area}
    how = {"crop_method": "random_resized", "flip": flip, "interpolation": "bicubic", "antialias": True}

    def draw(image: Any, *, rng: np.random.Generator, exif_rotated: bool) -> dict[str, UInt8[np.ndarray, "n h w 3"]]:
        picture = Picture.read(image, exif_rotated=exif_rotated)
        if min(picture.size) < local_size:
            has = "x".join(map(str, picture.size))
            advice = "set a smaller config.task.local_size, or leave such images out by --config.bad_images=skip"
            raise ImageError(f"an image of {has} is too small for a crop of {local_size} pixels: {advice}")
        views = [draw_view(picture.size, rng, **kind, **how) for kind in [large] * 2 + [small] * local_crops]
        picture = picture.decoded(views, scaled=scaled_decoding)
        seen = [view.image(picture) for view in views]
        none = np.zeros((0, local_size, local_size, 3), np.uint8)
        return {"global": np.stack(seen[:2]), "local": np.stack(seen[2:]) if local_crops else none}

    return draw
