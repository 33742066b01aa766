"""Cases for `tests/fuzz.py` made by hand: what an attacker, a broken program or a tired person would write."""

import functools
import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from PIL import Image

from tests.fuzz import Files
from tests.fuzz_targets import DINOV2, encoded, opens, sees, torch_file, written

Case = Callable[[], tuple[Files, Callable[[Path], str | None]]]

checkpoint_files = functools.cache(written)


def npz(flat: dict[str, np.ndarray], *, compress: bool = False) -> bytes:
    out = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(out, **flat)
    return out.getvalue()


def arrays() -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(checkpoint_files("npz")["model.npz"])) as archive:
        return dict(archive)


def described(**changes: Any) -> bytes:
    """Our model.json with entries set, `model.transformer.num_heads` and the like by `__`; `...` takes one out."""
    content = json.loads(checkpoint_files("npz")["model.json"])
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = functools.reduce(lambda tree, name: tree[name], parents, content)
        place.pop(last) if value is ... else place.__setitem__(last, value)
    return json.dumps(content).encode()


def reads(source: str = "") -> Callable[[Path], str | None]:
    """What opens a folder and always predicts."""
    return functools.partial(opens, source=source, always=True)


POSITIONS, STACKED = "Transformer/posembed_input/pos_embedding", "Transformer/encoderblock/LayerNorm_0/scale"
HEAVY = {
    "a bomb of zeros": lambda: {"x": np.zeros(120 << 20, np.int8)},
    "a bomb of a whole model": lambda: arrays() | {"head/kernel": np.zeros((16, 4_000_000), np.float32)},
    "a bomb of booleans": lambda: arrays() | {"head/kernel": np.zeros((16, 15_000_000), bool)},
    "a bomb of blocks": lambda: arrays() | {STACKED: np.zeros((3_000_000, 20), np.int8)},
    "a bomb of positions": lambda: arrays() | {POSITIONS: np.zeros((1, 1_000_001, 16), np.int8)},
    "30,000 arrays": lambda: {f"a{i}": np.zeros(0, np.int8) for i in range(30_000)},
}
SHAPES = ((0,), (), (0, 0, 0), (1,) * 30, (2,), (1, 1))
TYPES = (np.longdouble, np.int8, np.complex64, "U1", ml_dtypes.bfloat16, np.float16, ">f4")


def weights() -> Iterator[tuple[str, Case]]:
    """Our parameters with one of them changed, gone, or of another type; bombs."""
    for name, make in HEAVY.items():
        yield name, lambda make=make: ({"x.npz": npz(make(), compress=True)}, reads("x.npz"))
    sound, beside = arrays(), checkpoint_files("npz")["model.json"]
    changes: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(sound):
        x = sound[name]
        changes |= {f"{name} of {shape}": sound | {name: np.zeros(shape, np.float32)} for shape in SHAPES if shape != x.shape}
        changes |= {f"{name} is {np.dtype(kind)}": sound | {name: np.ones(x.shape, kind)} for kind in TYPES}
        changes |= {f"{name} is {v}": sound | {name: np.full(x.shape, v, np.float32)} for v in (np.nan, np.inf, 3e38, 0.0)}
        changes[f"{name} is missing"] = {n: y for n, y in sound.items() if n != name}
    for name, flat in changes.items():
        yield name, lambda flat=flat: ({"model.npz": npz(flat), "model.json": beside}, reads())
        yield f"{name}, no model.json", lambda flat=flat: ({"model.npz": npz(flat)}, reads())


VALUES = (None, True, -1, 0, 0.5, 10**9, 10**30, 1e308, float("nan"), "", "x\x1b[2J", [], [0], ["x"], [[1]], {}, {"x": 1}, ...)
TEXTS = ("[" * 100_000, '{"a":' * 100_000, "[]", "3", "null", '"x"', "{}", "NaN", "\ufeff{}", '{"model": 1, "model": 2}')


def descriptions() -> Iterator[tuple[str, Case]]:
    """Every entry of every JSON beside parameters replaced by values of every kind; deep ones; no objects."""
    for to, changes in (("npz", {}), ("hf", {}), ("timm", {}), ("hf", DINOV2)):
        files = written(to, **changes)
        for file in (name for name in files if name.endswith(".json")):
            where, tree = f"{to}{' dinov2' if changes else ''} {file}", json.loads(files[file])
            contents = {text[:9]: text.encode() for text in TEXTS}
            for path in _paths(tree):
                for value in VALUES:
                    contents[f"{path}={value}"] = json.dumps(_with(tree, path, value)).encode()
            for name, content in contents.items():
                whole = files | {file: content}
                yield f"{where} {name}", lambda whole=whole: (whole, reads())


def _paths(tree: Any, before: tuple = ()) -> Iterator[tuple]:
    for key in tree if isinstance(tree, dict) else range(min(1, len(tree))) if isinstance(tree, list) else ():
        yield (*before, key)
        yield from _paths(tree[key], (*before, key))


def _with(tree: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(path) == 1 and value is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = _with(copy[path[0]], path[1:], value)
    return copy


MOST = (2 << 20) - 10
PICKLES = {
    "nested keys": b"}K\x01" + b"q\x00h\x00\x86" * 80 + b"K\x01s.",
    "a deep key": b"})" + b"\x85" * MOST + b"K\x01s.",
    "marks": b"(" * MOST + b".",
    "lists": b"]" * MOST + b".",
    "dicts": b"}" * MOST + b".",
    "lists in a list": b"](" + b"]" * MOST + b"e.",
    "memory": b"N" + b"\x94" * MOST + b".",
    "remembered lists": b"]\x94" * (MOST // 2) + b".",
    "remembered far away": b"Nr\xff\xff\xff\xff" * (MOST // 6) + b".",
    "deep lists": b"]q\x00" + b"h\x00]q\x00a" * (MOST // 6) + b".",
    "keys": b"}(" + b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(MOST // 6)) + b"u.",
    "huge numbers": b"L0x" + b"f" * MOST + b"L\n.",
    "many digits": b"L" + b"9" * MOST + b"L\n.",
    "a long name": b"c" + b"x" * MOST + b"\nx\n.",
    "bytes that are not there": b"\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "text that is not there": b"\x8d" + (1 << 40).to_bytes(8, "little") + b".",
    "a frame that is not there": b"\x95" + (1 << 40).to_bytes(8, "little") + b"N.",
    "calls": b"ccollections\nOrderedDict\nq\x00" + b"h\x00)R" * (MOST // 4) + b".",
    "code": pickle.dumps(re.compile("x"), 2)[2:],
    "empty": b"",
}


def archives() -> Iterator[tuple[str, Case]]:
    """Files of torch, zip archives and safetensors that are small and ask for much."""

    def zipped(compression: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", compression) as archive:
            for name, content in entries.items():
                archive.writestr(name.replace("__", "/").replace("_", "."), content)
        return out.getvalue()

    def case(name: str, content: Callable[[], bytes]) -> Case:
        return lambda: ({name: content()}, reads(name))

    for name, data in PICKLES.items():
        yield f"pickle: {name}", case("x.pth", lambda data=data: zipped(a__data_pkl=b"\x80\x02" + data))
    yield "pickle: a compressed bomb", case("x.pth", lambda: zipped(zipfile.ZIP_DEFLATED, a__data_pkl=b"]" * (200 << 20)))
    yield (
        "pickle: a compressed order",
        case("x.pth", lambda: zipped(zipfile.ZIP_DEFLATED, a__data_pkl=b"N.", a__byteorder=bytes(200 << 20))),
    )
    flat = safetensors.numpy.load(checkpoint_files("timm")["model.safetensors"])
    for name in sorted(flat):
        yield f"torch without {name}", case("x.pth", lambda name=name: torch_file({n: x for n, x in flat.items() if n != name}))
        for shape in ((), (0,), (0, 0)):
            yield (
                f"torch {name} {shape}",
                case("x.pth", lambda n=name, s=shape: torch_file(flat | {n: np.zeros(s, np.float32)})),
            )
    for depth in (1, 1000, 100_000):
        header = b'{"x":' * depth + b"[" * depth
        yield f"safetensors: a header of {depth}", case("x.safetensors", lambda h=header: len(h).to_bytes(8, "little") + h)
    many = json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}).encode()
    yield "safetensors: many", case("x.safetensors", lambda: len(many).to_bytes(8, "little") + many)
    same = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    yield "safetensors: twice", case("x.safetensors", lambda: len(same).to_bytes(8, "little") + same + bytes(4))
    for name in ("x.npz", "x.safetensors", "x.pth"):
        for content in (b"", b"\0" * 1000, b"PK\x05\x06" + bytes(18), b"<html>", b"\x93NUMPY\x01\x00", b"\x80\x02."):
            yield f"{name}: {content[:10]!r}", case(name, lambda c=content: c)


def png(width: int, height: int, kind: int = 2, bits: int = 8, *, rows: int | None = None, chunks: tuple = ()) -> bytes:
    """A PNG of zeros, or of fewer rows than it says."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    line = 1 + (width * bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind] + 7) // 8
    packer, data = zlib.compressobj(9), b""
    for _ in range(height if rows is None else rows):
        data += packer.compress(bytes(line))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", data + packer.flush())
        + chunk(b"IEND", b"")
    )


def bitmap(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def saved(form: str, size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, form, **options)
    return out.getvalue()


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = saved("JPEG", (side, side), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


IMAGES: dict[str, Callable[[], bytes]] = {
    "png: 4,000,000,000 pixels": lambda: png(65_000, 65_000, rows=1),
    "png: 169 million pixels": lambda: png(13_000, 13_000),
    "png: 169 million pixels of 16 bits": lambda: png(13_000, 13_000, 6, 16, rows=2),
    "png: 64 million pixels": lambda: png(8_000, 8_000),
    "png: 36 million pixels of 16 bits and alpha": lambda: png(6_000, 6_000, 6, 16),
    "png: one line": lambda: png(1, 1_000_000),
    "png: one bit": lambda: png(12_000, 12_000, 0, 1),
    "png: a huge text": lambda: png(4, 4, chunks=((b"zTXt", b"a\0\0" + zlib.compress(bytes(300 << 20))),)),
    "png: a huge profile": lambda: png(4, 4, chunks=((b"iCCP", b"a\0\0" + zlib.compress(bytes(300 << 20))),)),
    "png: no size": lambda: png(0, 0),
    "bmp: no pixels": lambda: bitmap(13_000, 13_000),
    "bmp: negative": lambda: bitmap(-5, -(1 << 31)),
    "gif: 169 million pixels": lambda: saved("GIF", (13_000, 13_000), "P"),
    "webp: 169 million pixels": lambda: saved("WEBP", (13_000, 13_000), lossless=True, quality=0, method=0),
    "tiff: 169 million pixels": lambda: saved("TIFF", (13_000, 13_000), compression="tiff_adobe_deflate"),
    "jpeg: 169 million pixels": lambda: saved("JPEG", (13_000, 13_000)),
    "jpeg: many scans": lambda: scans(2_000, 3_000),
    "jpeg: 40 million pixels, progressive": lambda: saved("JPEG", (6_400, 6_400), progressive=True),
    "jpeg: only a head": lambda: encoded("jpeg")[:30],
    "empty": lambda: b"",
    "two bytes": lambda: b"\xff\xd8",
    "text": lambda: b"no image",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}


def images() -> Iterator[tuple[str, Case]]:
    """Bombs, and what is no image."""
    for name, make in IMAGES.items():
        yield name, lambda make=make: ({"image": make()}, sees)


GROUPS = {"images": images, "archives": archives, "weights": weights, "descriptions": descriptions}


@functools.cache
def cases(group: str) -> dict[str, Case]:
    """The cases of a group by name, which starts with it."""
    return {f"{group}: {name}": case for name, case in GROUPS[group]()}
