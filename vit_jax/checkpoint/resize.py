"""Resampling a grid, exactly as each project does it: one small weight matrix an axis."""

import numpy as np
from jaxtyping import Float

from vit_jax.errors import unknown

RULES = ("bilinear", "bilinear_antialias", "bicubic", "bicubic_offset", "bicubic_antialias")


def resize(grid: Float[np.ndarray, "h w d"], size: tuple[int, int], rule: str) -> Float[np.ndarray, "i j d"]:
    """Resamples a grid of vectors, in float64.

    Rules:
      bilinear: aligned corners, as `scipy.ndimage.zoom(order=1)`; Google and big_vision.
      bilinear_antialias: torch's with antialias=True; SigLIP 2 on images of any shape.
      bicubic: torch's plain bicubic (a = −0.75, replicated border); Hugging Face, DeiT.
      bicubic_offset: the same with a scale of (n + 0.1) / old; DINOv2 without registers.
      bicubic_antialias: torch's with antialias=True (a = −0.5); timm, DINOv2 with registers.
    """
    rows, columns = (weights(old, new, rule) for old, new in zip(grid.shape[:2], size, strict=True))
    return np.einsum("ih,hwd,jw->ijd", rows, np.asarray(grid, np.float64), columns)


def weights(old: int, new: int, rule: str) -> Float[np.ndarray, "new old"]:
    """How much of each old place goes into each new one; rows sum to 1."""
    if rule not in RULES:
        raise unknown("resize rule", rule, RULES)
    places = np.arange(new)
    if rule == "bilinear":
        centers = places * ((old - 1) / (new - 1) if new > 1 else 0)
        return np.maximum(0, 1 - np.abs(centers[:, None] - np.arange(old)))
    if rule.endswith("antialias"):
        scale = old / new
        distance = ((np.arange(old) + 0.5) - (places[:, None] + 0.5) * scale) / max(1.0, scale)
        w = _cubic(distance, -0.5) if rule == "bicubic_antialias" else np.maximum(0, 1 - np.abs(distance))
        return w / w.sum(axis=1, keepdims=True)
    scale = old / (new + 0.1) if rule == "bicubic_offset" else old / new
    centers = (places + 0.5) * scale - 0.5
    w = np.zeros((new, old))
    for tap in range(-1, 3):
        source = np.floor(centers).astype(int) + tap
        np.add.at(w, (places, np.clip(source, 0, old - 1)), _cubic(centers - source, -0.75))
    return w


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
