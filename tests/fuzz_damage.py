"""Damage as chance, broken disks and strangers do it: to any bytes, or to values inside a container that is otherwise sound."""

import copy
import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any

# Damage to bytes.

NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]


def damage(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes: flipped bits, cuts, chunks put in, repeated or taken out, numbers that are no length."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8, 16, 64, 1000))
        chunk = data[at : at + size]
        match rng.randrange(8):
            case 0 | 1:
                bits = bytearray(data)
                for _ in range(rng.choice((1, 1, 2, 8)) if bits else 0):
                    bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
                data = bytes(bits)
            case 2:
                data = data[:at]
            case 3:
                data = data[:at] + rng.randbytes(size) + data[at:]
            case 4:
                data = data[: at + size] + chunk * rng.choice((1, 2, 50)) + data[at + size :]
            case 5:
                data = data[:at] + data[at + size :]
            case 6:
                data = data[:at] + rng.randbytes(len(chunk)) + data[at + size :]
            case 7:
                width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
                number = rng.choice(NUMBERS) % (1 << 8 * width)
                data = data[:at] + number.to_bytes(width, order) + data[at + width :]
    return data


# Damage to JSON: any value becomes another, goes, or comes under another name.

VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        64,
        0.5,
        -0.0,
        10**6,
        10**9,
        10**30,
        -(10**18),
        1e308,
        1e-320,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "0", "224", "nan", "../x", "a" * 5000, "a\x1b[2J\nb", "\ud800", "é", "float32", "softmax", "bicubic"),
    *(
        [],
        [0],
        [1, 2],
        [-1, -1],
        [10**9] * 2,
        ["x"],
        [None],
        [[]],
        [0.5] * 3,
        [0.0] * 3,
        [float("nan")] * 3,
        list(range(1000)),
        {},
    ),
    *({"x": 1}, {"type": "x"}, {"": None}, {"size": [0, 0]}, {"height": 3}, [[[[[[[[1]]]]]]]], {"a": {"b": {"c": {}}}}),
]


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) of a JSON tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()):
        yield tree, key
        yield from places(value)


def damage_tree(tree: Any, rng: random.Random) -> Any:
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2))):
        if not (found := list(places(tree))) or rng.random() < 0.02:
            return copy.deepcopy(rng.choice(VALUES))
        container, key = rng.choice(found)
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(("", "x", key + "x", key.upper(), "../" + key))] = container.pop(key)
            case 2 if isinstance(container[key], (int, float)):
                container[key] = container[key] * rng.choice((2, 10, -1, 0.5, 1000, 10**6)) + rng.choice((0, 1, -1))
            case 3:
                other, name = rng.choice(found)
                container[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else other[name : name + 1])
            case _:
                container[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def damage_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage(data, rng)
    return json.dumps(damage_tree(json.loads(data), rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


# Damage inside a container, so that sums and lengths are right and only what is inside is wrong.


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = damage_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damage_numbers(data: bytes, rng: random.Random) -> bytes:
    """Numbers that are none, or far too large, at a few places of float32."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 3, 100))):
        value = struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, -1e30, 1e-40)))
        at = rng.randrange(len(out) // 4) * 4 if len(out) >= 4 else 0
        out[at : at + 4] = value
    return bytes(out)


def damage_npy(data: bytes, rng: random.Random) -> bytes:
    length = 10 + int.from_bytes(data[8:10], "little")
    header, values = data[10:length].decode("latin1"), data[length:]
    if rng.random() < 0.3:
        return data[:length] + damage_numbers(values, rng)
    swaps = {
        "descr": "'<f8' '<f2' '<i4' '|b1' '|u1' '|V4' '|O' '<c8' '<f16' '<U1' [('a','<f4')] 'M8[s]' 3".split(" "),
        "shape": "() (0,) (-1,) (4,) (1,2,3) (10**9,) (1000000000000,) (0,99999999999) 'x' None (True,)".split(" "),
        "fortran_order": "True 0 None 'x'".split(" "),
    }
    entry = rng.choice(list(swaps))
    start = header.find(f"'{entry}': ") + len(entry) + 4
    stop = header.find(")," if entry == "shape" else ",", start) + (entry == "shape")
    header = (header[:start] + rng.choice(swaps[entry]) + header[stop:]).rstrip()
    header = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + "\n"
    if rng.random() < 0.3:
        values = values[: rng.randrange(len(values) + 1)] if rng.random() < 0.5 else values * 2
    return data[:8] + len(header).to_bytes(2, "little") + header.encode("latin1") + values


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    i = rng.randrange(len(entries))
    name, content = entries[i]
    pickles = [k for k, (other, _) in enumerate(entries) if other.endswith("data.pkl")]
    match rng.randrange(7):
        case 0:
            del entries[i]
        case 1:
            entries[i] = rng.choice((name + "x", name[:-4], "../" + name, "a\x1b\n" + name, name.replace("_", "-"))), content
        case 2:
            entries.append((rng.choice((name, "x", name.replace("0", "1"), f"{name[:-4]}/x.npy")), content))
        case _ if pickles:
            i = pickles[0] if rng.random() < 0.7 else i
            entries[i] = entries[i][0], damage(entries[i][1], rng)
        case _ if content.startswith(b"\x93NUMPY"):
            entries[i] = name, damage_npy(content, rng) if rng.random() < 0.8 else damage(content, rng)
        case _:
            entries[i] = name, damage(content, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in entries:
            with archive.open(zipfile.ZipInfo(name), "w") as f:
                f.write(content)
    return out.getvalue()


TEXTS = ("", " ", "0", "-1", "²", "1e9", "9" * 300, "x", "\0", "a\x1b\nb", "\ud800", "é", '{"label": [1]}', '{"text": "\0"}')
KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"x")


def damage_tar(data: bytes, rng: random.Random) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        entries = [(entry, tar.extractfile(entry).read()) for entry in tar]
    i = rng.randrange(len(entries))
    entry, content = entries[i]
    match rng.randrange(6):
        case 0:
            del entries[i]
        case 1:
            name = entry.name
            entry.name = rng.choice((f"../{name}", f"a\x1b\n{name}", f"\udcff{name}", name[1:], "/", f"{name}.gz"))
        case 2:
            other, stem = copy.copy(entry), entry.name.partition(".")[0]
            other.name = rng.choice((entry.name, "z.jpg", f"{stem}.png", f"{stem}.cls", f"{stem}.json", f"{stem}.txt"))
            entries.append((other, content))
        case 3:
            entry.type = rng.choice(KINDS)
        case 4:
            entries[i] = entry, rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        case _:
            entries[i] = entry, (damage_json if entry.name.endswith(".json") else damage)(content, rng)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for entry, content in entries:
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


WHOLE = (b"", b"{}", b"[]", b"null", b"PK\x03\x04", bytes(100), b"[" * 100_000, b"\xff\xfe", b'{"a":' * 50_000)
INSIDE = {".json": damage_json, ".safetensors": damage_safetensors, ".tar": damage_tar}
INSIDE |= dict.fromkeys((".npz", ".pth", ".bin"), damage_zip)
