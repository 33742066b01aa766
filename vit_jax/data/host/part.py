"""Decoding a part of a JPEG by libjpeg-turbo 3, where the system has it: simplejpeg decodes all of an image.

What lies below a window is not decoded, and of what lies above and beside it only the entropy coding is. The pixels are
those of simplejpeg bit for bit, which is tried out once: a library that gives others is not used.
"""

import ctypes
import functools
import os
import sys
import threading

import numpy as np
import simplejpeg
from jaxtyping import UInt8

VARIABLE = "VIT_JAX_TURBOJPEG"
"""The environment variable that names the library's file, or is empty to do without."""
NAMES = {
    "darwin": ("libturbojpeg.dylib", "/opt/homebrew/opt/jpeg-turbo/lib/libturbojpeg.dylib"),
    "linux": ("libturbojpeg.so.0", f"{sys.prefix}/lib/libturbojpeg.so.0"),
}
# Of turbojpeg.h: a decompressor, and the numbers of parameters.
DECOMPRESS, SUBSAMPLING, WIDTH, HEIGHT, FAST_DCT = 1, 4, 5, 6, 10
BLOCKS = {0: (8, 8), 1: (8, 16), 2: (16, 16), 3: (8, 8), 4: (16, 8)}
"""(h, w) of the blocks by subsampling of colours: 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0. Others are left to simplejpeg."""


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class _Factor(ctypes.Structure):
    _fields_ = [("numerator", ctypes.c_int), ("denominator", ctypes.c_int)]


class _Decompressor:
    """A decompressor of the library: one a thread."""

    def __init__(self, library: ctypes.CDLL):
        self.library, self.handle = library, library.tj3Init(DECOMPRESS)

    def __del__(self):
        self.library.tj3Destroy(self.handle)


_OF_THREAD = threading.local()


def decode_part(
    data: bytes, rows: range, columns: range, factor: int
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]] | None:
    """(pixels, (row, column) of the first of them) which hold these rows and columns of a JPEG at 1 / `factor` of its size.

    None where there is no library, and for whatever is not plain in the file: damage, CMYK, rare kinds of subsampling.
    """
    found = library()
    return found and _decode(found, data, rows, columns, factor)


def _decode(
    library: ctypes.CDLL, data: bytes, rows: range, columns: range, factor: int
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]] | None:
    if not hasattr(_OF_THREAD, "decompressor"):
        _OF_THREAD.decompressor = _Decompressor(library)
    handle = _OF_THREAD.decompressor.handle
    if library.tj3DecompressHeader(handle, data, len(data)) or library.tj3SetScalingFactor(handle, _Factor(1, factor)):
        return None
    height, width, sampling = (library.tj3Get(handle, name) for name in (HEIGHT, WIDTH, SUBSAMPLING))
    if sampling not in BLOCKS:
        return None
    # A block more on each side: colours are interpolated across its border.
    block_h, block_w = (-(-n // factor) for n in BLOCKS[sampling])
    top, left = max(0, rows.start - block_h), max(0, (columns.start // block_w - 1) * block_w)
    bottom, right = min(-(-height // factor), rows.stop + block_h), min(-(-width // factor), columns.stop + block_w)
    library.tj3Set(handle, FAST_DCT, 1)
    if library.tj3SetCroppingRegion(handle, _Region(left, top, right - left, bottom - top)):
        return None
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    if library.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, 0):
        return None
    return pixels, (top, left)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, if there is one that can decode parts and gives the pixels of simplejpeg."""
    named = os.environ.get(VARIABLE)
    for name in NAMES.get(sys.platform, ()) if named is None else filter(None, [named]):
        try:
            found = ctypes.CDLL(name)
            found.tj3SetCroppingRegion.argtypes = (ctypes.c_void_p, _Region)
        except (OSError, AttributeError):  # there is none, or one of version 2
            continue
        found.tj3Init.argtypes, found.tj3Init.restype = (ctypes.c_int,), ctypes.c_void_p
        found.tj3Destroy.argtypes, found.tj3Destroy.restype = (ctypes.c_void_p,), None
        data = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
        found.tj3DecompressHeader.argtypes, found.tj3Decompress8.argtypes = data, (*data, ctypes.c_void_p, *[ctypes.c_int] * 2)
        found.tj3Get.argtypes, found.tj3Set.argtypes = (ctypes.c_void_p, ctypes.c_int), (ctypes.c_void_p, *[ctypes.c_int] * 2)
        found.tj3SetScalingFactor.argtypes = (ctypes.c_void_p, _Factor)
        if _gives_the_same(found):
            return found
    return None


def _gives_the_same(library: ctypes.CDLL) -> bool:
    noise = np.random.default_rng(0).integers(256, size=(90, 100, 3), dtype=np.uint8)
    for sampling in ("444", "422", "420"):
        jpeg = simplejpeg.encode_jpeg(noise, colorsubsampling=sampling)
        whole = simplejpeg.decode_jpeg(jpeg, colorspace="RGB", fastdct=True)
        part = _decode(library, jpeg, range(30, 60), range(35, 70), 1)
        if part is None:
            return False
        pixels, (top, left) = part
        if not np.array_equal(pixels[30 - top : 60 - top, 35 - left : 70 - left], whole[30:60, 35:70]):
            return False
    return True
