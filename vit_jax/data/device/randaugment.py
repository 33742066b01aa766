"""RandAugment (https://arxiv.org/abs/1909.13719) on the device, as AugReg and big_vision trained with it.

Every layer draws one of 16 operations. Branches would all be computed for every image, so there are none: an image goes
once through a look-up table, a warp, a blend and a hole, and all but the drawn operation's own leave it as it is. Numbers
are those of the code that the published models were trained with, including what its authors may not have meant:

- Solarize's threshold is 256 · magnitude / 10 modulo 256: at 10 it inverts the image, at 15 it acts from 128
  (https://github.com/google-research/big_vision/issues/110);
- Contrast blends with the constant grey (h · w) / 256, at most 255, and not with the mean of the image;
- shifts and holes are in pixels, up to 100 and 80 at magnitude 10 whatever the size of the image: meant for about 224.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)
MAX_MAGNITUDE = 20
"""The strongest of the AugReg grid. Above it the published code's own numbers overflow."""
FILL = 128
"""Of every channel, where a warped image leaves a gap or a hole is cut."""


def randaugment(image: UInt8[Array, "h w 3"], key: jax.Array, layers: int, magnitude: float) -> UInt8[Array, "h w 3"]:
    """The image after `layers` operations, each drawn uniformly from OPS, all of strength `magnitude` of 10."""

    def layer(image: UInt8[Array, "h w 3"], key: jax.Array) -> tuple[UInt8[Array, "h w 3"], None]:
        which, side, y, x = jax.random.uniform(key, (4,))
        h, w, _ = image.shape
        op, y, x = (jnp.floor(u * n).astype(jnp.int32) for u, n in ((which, len(OPS)), (y, h), (x, w)))
        return apply(image, op, magnitude, jnp.where(side < 0.5, 1.0, -1.0), (y, x)), None

    return jax.lax.scan(layer, image, jax.random.split(key, layers))[0]


def apply(
    image: UInt8[Array, "h w 3"],
    op: Int[Array, ""],
    magnitude: float,
    sign: Float[Array, ""],
    centre: tuple[Int[Array, ""], Int[Array, ""]],
) -> UInt8[Array, "h w 3"]:
    """The image after operation OPS[op]. `sign` (±1) is the direction of warps, `centre` (y, x) that of the hole."""
    enhance = magnitude / 10 * 1.8 + 0.1
    # Each part reads the image itself: XLA would fuse a chain of them, and compute the first ones anew for every neighbour.
    warped = warp(image, _matrix(image.shape[:2], op, magnitude, sign))
    changed = look_up(warped, _table(image, op, magnitude, enhance))
    degenerates = {"Color": grey(image), "Sharpness": smooth(image)}
    changed = _choose(op, {name: blend(degenerate, image, enhance) for name, degenerate in degenerates.items()}, changed)
    hole = (op == OPS.index("Cutout")) & _square(image.shape[:2], centre, int(magnitude / 10 * 40))
    return jnp.where(hole[..., None], jnp.uint8(FILL), changed)


def blend(degenerate: Array, image: Array, factor: float | Float[Array, ""]) -> UInt8[Array, "..."]:
    """degenerate + factor · (image − degenerate), cut to 0..255 and rounded down, as TensorFlow's code and Pillow do."""
    degenerate = degenerate.astype(jnp.float32)
    return jnp.clip(degenerate + factor * (image.astype(jnp.float32) - degenerate), 0, 255).astype(jnp.uint8)


def look_up(image: UInt8[Array, "h w 3"], table: UInt8[Array, "3 256"]) -> UInt8[Array, "h w 3"]:
    """Each channel's pixels replaced by their entry in its table."""
    return table[jnp.arange(3), image]


def autocontrast(image: UInt8[Array, "h w 3"]) -> Int[Array, "3 256"]:
    """The table that stretches each channel to 0..255: ⌊255 (v − lo) / (hi − lo)⌋."""
    low, high = (reduce(image, axis=(0, 1)).astype(jnp.int32)[:, None] for reduce in (jnp.min, jnp.max))
    levels = jnp.arange(256)
    return jnp.where(high > low, jnp.clip((levels - low) * 255 // jnp.maximum(high - low, 1), 0, 255), levels)


def equalize(image: UInt8[Array, "h w 3"], needed: Bool[Array, ""] | bool = True) -> Int[Array, "3 256"]:
    """The table that gives each channel a flat histogram, as Pillow's. Undefined unless `needed`."""
    # Counts that nobody asked for fall outside and are dropped: atomic additions are what a histogram costs on a GPU.
    bins = jnp.where(needed, image + 256 * jnp.arange(3), 768)
    counts = jnp.zeros(768, jnp.int32).at[bins].add(1, mode="drop").reshape(3, 256)
    below = jnp.cumsum(counts, axis=1) - counts
    last = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1, keepdims=True)
    step = jnp.take_along_axis(below, last, axis=1) // 255
    levels = jnp.arange(256)
    return jnp.where(step > 0, jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255), levels)


def warp(image: UInt8[Array, "h w 3"], matrix: Float[Array, " 6"]) -> UInt8[Array, "h w 3"]:
    """Takes each pixel (x, y) from (a x + b y + c, d x + e y + f), the nearest one; FILL where there is none."""
    h, w, _ = image.shape
    y, x = jnp.mgrid[:h, :w].astype(jnp.float32)
    a, b, c, d, e, f = matrix
    x, y = (_round(v).astype(jnp.int32) for v in (a * x + b * y + c, d * x + e * y + f))
    outside = (x < 0) | (x >= w) | (y < 0) | (y >= h)
    taken = image.reshape(h * w, 3)[jnp.where(outside, 0, y * w + x)]
    return jnp.where(outside[..., None], jnp.uint8(FILL), taken)


def grey(image: UInt8[Array, "h w 3"]) -> UInt8[Array, "h w 3"]:
    """⌊255.5 / 255 (0.2989 r + 0.587 g + 0.114 b)⌋ in every channel: `tf.image.rgb_to_grayscale`, in exact integers."""
    luma = jnp.sum(image.astype(jnp.int32) * jnp.array([2989, 5870, 1140]), axis=-1, keepdims=True)
    return jnp.broadcast_to((luma * 511 // 5_100_000).astype(jnp.uint8), image.shape)


def smooth(image: UInt8[Array, "h w 3"]) -> UInt8[Array, "h w 3"]:
    """⌊(sum of 3 x 3 pixels + 4 · the middle) / 13⌋, and the borders as they are."""
    h, w, _ = image.shape
    padded = jnp.pad(image.astype(jnp.int32), ((1, 1), (1, 1), (0, 0)))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image.astype(jnp.int32)
    y, x = jnp.mgrid[:h, :w]
    inner = (y > 0) & (y < h - 1) & (x > 0) & (x < w - 1)
    return jnp.where(inner[..., None], ((total + 0.5) * (1 / 13)).astype(jnp.uint8), image)


def _table(image: UInt8[Array, "h w 3"], op: Int[Array, ""], magnitude: float, enhance: float) -> UInt8[Array, "3 256"]:
    h, w, _ = image.shape
    level = jnp.arange(256)
    # No bits is one bit: TensorFlow does not shift by more than 7.
    shift = 8 - max(1, int(magnitude / 10 * 4))
    threshold = int(magnitude / 10 * 256) % 256
    addition = int(magnitude / 10 * 110)
    tables = {
        "AutoContrast": autocontrast(image),
        "Equalize": equalize(image, op == OPS.index("Equalize")),
        "Invert": 255 - level,
        "Posterize": level >> shift << shift,
        "Solarize": jnp.where(level < threshold, level, 255 - level),
        "Contrast": blend(jnp.array(min(h * w // 256, 255)), level, enhance),
        "Brightness": blend(jnp.array(0), level, enhance),
        "SolarizeAdd": jnp.where(level < 128, jnp.minimum(level + addition, 255), level),
    }
    drawn = jnp.array([op == OPS.index(name) for name in tables])
    drawn = jnp.append(drawn, ~drawn.any()).astype(jnp.float32)
    tables = jnp.stack([jnp.broadcast_to(table, (3, 256)).astype(jnp.float32) for table in (*tables.values(), level)])
    # A matrix product, exact for numbers up to 255, because XLA would fuse any other choice into the look-up that follows
    # and compute an entry anew for every pixel.
    return jnp.einsum("t,tcv->cv", drawn, tables).astype(jnp.uint8)


def _matrix(size: tuple[int, int], op: Int[Array, ""], magnitude: float, sign: Float[Array, ""]) -> Float[Array, " 6"]:
    bottom, right = size[0] - 1, size[1] - 1
    angle = math.radians(magnitude / 10 * 30)
    cos, sin = math.cos(angle), sign * math.sin(angle)
    shear, shift = sign * (magnitude / 10 * 0.3), sign * (magnitude / 10 * 100)
    # The middle of the image stays where it is.
    rotated = (cos, -sin, (right - cos * right + sin * bottom) / 2, sin, cos, (bottom - sin * right - cos * bottom) / 2)
    matrices = {
        "Rotate": rotated,
        "ShearX": (1, shear, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, shear, 1, 0),
        "TranslateX": (1, 0, shift, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, shift),
    }
    matrices = {name: jnp.stack([jnp.float32(x) for x in matrix]) for name, matrix in matrices.items()}
    return _choose(op, matrices, jnp.array([1, 0, 0, 0, 1, 0], jnp.float32))


def _square(size: tuple[int, int], centre: tuple[Array, Array], half: int) -> Bool[Array, "h w"]:
    """Where the square [centre − half, centre + half) lies."""
    (h, w), (top, left) = size, (c - half for c in centre)
    y, x = jnp.mgrid[:h, :w]
    return (y >= top) & (y < top + 2 * half) & (x >= left) & (x < left + 2 * half)


def _choose(op: Int[Array, ""], by_name: dict[str, Array], otherwise: Array) -> Array:
    return jnp.select([op == OPS.index(name) for name in by_name], list(by_name.values()), otherwise)


def _round(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Halves away from zero, as in C; `jnp.round` takes them to the even neighbour."""
    return jnp.trunc(x + jnp.copysign(0.5, x))
