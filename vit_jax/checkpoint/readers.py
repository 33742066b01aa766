"""Reads parameter files of every format into flat names and arrays: nothing is unpickled freely, nothing needs torch."""

import collections
import contextlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from safetensors import safe_open

from vit_jax.checkpoint.unpickle import MOST, Storage, Tensor, state_dict
from vit_jax.errors import UserError, did_you_mean, printable
from vit_jax.files import read_regular
from vit_jax.finite import check_parameters
from vit_jax.models import zoo

Arrays = dict[str, np.ndarray]

_BOMB = 3, 1 << 28  # refused: more than 3 times the file and more than 256 MiB
_HEADER = 16 << 20  # bytes of what lists the parameters: the directory of a zip, the header of .safetensors, an index
_TORCH = (".pth", ".pt", ".bin", ".ckpt")
_FIRST = ("model.safetensors", "model.safetensors.index.json", "model.npz")
_THEN = ("*.safetensors", "*.npz", "*.pth", "*.pt", "pytorch_model.bin", "pytorch_model.bin.index.json", "*.bin")
_SAFETENSORS_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def read(path: str | os.PathLike) -> Arrays:
    """The arrays in a local file or folder under the names that they have there, in the types that they have there.

    Files: .npz; .safetensors; torch's .pth, .pt, .bin, .ckpt (zip format), of which a state dict alone under 'model',
    'state_dict' or 'teacher' is unwrapped (its arrays may share memory); the `….index.json` of a file in shards. In a
    folder: model.safetensors, its index, model.npz, or else the only .safetensors, .npz, .pth, .pt, .bin, in this order.

    Raises:
      UserError: for a path that is missing, ambiguous or of another kind; a file that is damaged, an archive bomb, or
        wants to run code; a parameter whose name leads elsewhere, whose shape is not that of its bytes, whose type is
        no number or whose values are not finite.
    """
    path = Path(path).expanduser()
    return _read_file(_choose(path) if path.is_dir() else path)


def read_npz(path: str | os.PathLike) -> Arrays:
    """The arrays of one .npz. Never unpickles; 2-byte void, as NumPy writes bfloat16, is read as bfloat16."""
    path = _existing(path)
    flat = {}
    with _reading(path), open(path, "rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            raise UserError(f"{path} is a single array, not an .npz with one array a parameter: save it with checkpoint.save")
        _check_directory(path, file)
        try:
            archive = np.load(file, allow_pickle=False)
        except ValueError as e:
            if "pickle" in str(e):
                raise _pickled(path) from e
            raise
        with archive:
            _check_archive(path, archive.zip)
            for entry in archive.zip.infolist():
                name = entry.filename.removesuffix(".npy")
                if name == entry.filename:
                    shown = printable(repr(name))
                    raise UserError(f"{path} holds {shown}, which is no array: a checkpoint must be an .npz, no .pt file")
                with archive.zip.open(entry) as f:
                    flat[name] = _read_npy(path, name, f, entry.file_size)
    return _checked(path, flat)


def what_is_wrong(path: Path, name: str) -> str | None:
    """Why a file that came as `name` cannot be one of that kind, judged by its form alone; None for a sound one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(4096)
        suffix = Path(name).suffix
        if not start:
            return "empty"
        if re.match(rb"\s*<(!doctype|html|\?xml)", start, re.IGNORECASE):
            return f"a page of the web of {size:,} bytes"
        if suffix == ".npz" and not zipfile.is_zipfile(file):
            return f"no .npz ({size:,} bytes, which start with {start[:8].hex(' ')})"
        if suffix in _TORCH and not start.startswith((b"PK\x03\x04", b"\x80")):
            return f"no file of torch ({size:,} bytes, which start with {start[:8].hex(' ')})"
        if suffix == ".safetensors" and (start[8:9] != b"{" or int.from_bytes(start[:8], "little") > size - 8):
            return f"no .safetensors ({size:,} bytes, which start with {start[:8].hex(' ')})"
    return None


def _read_file(path: Path) -> Arrays:
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _TORCH or path.name.endswith(".pth.tar"):
        return _read_torch(path)
    raise UserError(f"{_existing(path)} is no parameter file: use .npz, .safetensors, {', '.join(_TORCH)} or ….index.json")


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path).expanduser()
    if path.is_file():
        return path
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"no such checkpoint: {path} (the folder {folder} does not exist)")
    found = [printable(p.name) for p in sorted(folder.iterdir()) if p.suffix in (".npz", ".safetensors", *_TORCH)]
    instead = f"the folder holds {', '.join(found[:10])}" if found else "there is no such file or folder"
    raise UserError(f"no such checkpoint: {path} ({instead}){_where_published(path)}")


def _where_published(path: Path) -> str:
    """What to add for a name without a suffix, which no file or folder has: a model's, perhaps."""
    if path.suffix in (".npz", ".safetensors", *_TORCH):
        return ""
    if published := zoo.published_file(path.name):
        return ". A published file of this model is {} ({:,} MiB)".format(*published)
    return ". Name a file, the workdir of a run, or hf://OWNER/NAME; `vit-jax models` lists published files"


def _choose(folder: Path) -> Path:
    for name in _FIRST:
        if (folder / name).is_file():
            return folder / name
    for pattern in _THEN:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(printable(p.name) for p in found[:10])
            raise UserError(f"{folder} holds {len(found)} parameter files: name one of {names}, or call it {_FIRST[0]}")
        if found:
            return found[0]
    below = sorted({path.parent for name in _FIRST for path in folder.glob(f"*/{name}")}, key=lambda path: path.stat().st_mtime)
    hint = did_you_mean([printable(str(path)) for path in below[-1:-4:-1]])  # the newest
    raise UserError(f"{folder} holds no parameter file: one of {', '.join((*_FIRST, *_THEN))} is needed{hint and '; ' + hint}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except MemoryError as e:
        raise UserError(f"{path} ({path.stat().st_size:,} bytes) does not fit into the memory of this machine") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    except Exception as e:  # damaged bytes raise nearly everything in zipfile, zlib, NumPy, pickle and safetensors
        what = f"{path} is truncated or damaged ({path.stat().st_size:,} bytes: {printable(e)})"
        raise UserError(f"{what}. Fetch or write it again, after deleting this copy.") from e


def _pickled(path: Path) -> UserError:
    return UserError(
        f"{path} is no .npz or holds pickled objects, which can run code and are never loaded; "
        "a checkpoint must be an .npz of plain arrays"
    )


def _check_directory(path: Path, file: BinaryIO) -> None:
    """Refuses a zip archive whose directory is too long, before all of it becomes objects; `file` is back at its start."""
    size = zipfile._EndRecData(file)[zipfile._ECD_SIZE] if zipfile.is_zipfile(file) else 0
    if size > _HEADER:
        raise UserError(f"{path} lists its contents in {size:,} bytes, allowed are {_HEADER:,}: that is no parameter file")
    file.seek(0)


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    names = collections.Counter(archive.namelist())
    for name, count in names.items():
        _check_name(path, name.removesuffix(".npy"))
        if count > 1:
            shown = printable(repr(name))
            raise UserError(f"{path} holds {shown} {count} times, and only one can be meant. Fetch or write it again.")
    _check_size(path, sum(entry.file_size for entry in archive.infolist()))


def _check_size(path: Path, total: int) -> None:
    size, (factor, least) = path.stat().st_size, _BOMB
    if total > max(factor * size, least):
        raise UserError(f"{path} has {size:,} bytes and would unpack to {total:,}: such an archive bomb is not read")


def _check_name(path: Path, name: str) -> None:
    if not name or name[0] in "/\\" or ".." in re.split(r"[/\\]", name):
        shown = printable(repr(name))
        raise UserError(f"{path} holds a parameter {shown}: a name must not be empty or absolute, nor lead elsewhere by '..'")


def _checked(path: Path, flat: Arrays) -> Arrays:
    if not flat:
        raise UserError(f"{path} holds no parameters")
    folders = {name[: m.start()] for name in flat for m in re.finditer("/", name)}
    for name, x in flat.items():
        _check_name(path, name)
        if name in folders:
            raise UserError(f"{path}: {printable(name)} is a parameter and holds others: only one can be meant")
        is_float = x.dtype.kind == "f" and x.itemsize <= 8 or x.dtype == ml_dtypes.bfloat16
        if not is_float and x.dtype.kind not in "biu":
            allowed = "a parameter must be of floats, integers or booleans, of 64 bits at most"
            raise UserError(f"{path}: {printable(name)} is of type {printable(x.dtype)}; {allowed}")
    check_parameters(flat, str(path))
    return flat


def _read_npy(path: Path, name: str, f: zipfile.ZipExtFile, size: int) -> np.ndarray:
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, is_fortran, dtype = header[np.lib.format.read_magic(f)](f)
    except MemoryError as e:  # of Python's parser, at too many parentheses
        raise ValueError(f"the header of {name} cannot be parsed") from e
    if dtype.hasobject:
        raise _pickled(path)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - f.tell():
        raise UserError(
            f"{path} is damaged: {printable(name)} claims the shape {printable(shape)} of {printable(dtype)} and has "
            f"{size - f.tell():,} bytes. Fetch or write it again."
        )
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "V2" else dtype
    return _take(f, size - f.tell()).view(dtype).reshape(shape, order="F" if is_fortran else "C")


def _take(f: zipfile.ZipExtFile, size: int) -> np.ndarray:
    """The next `size` bytes, in pieces: reading them at once would hold them twice."""
    out, done = np.empty(size, np.uint8), 0
    while done < size:
        piece = f.read(min(1 << 20, size - done))
        if not piece:
            raise EOFError(f"{f.name} ends after {done:,} of {size:,} bytes")
        out[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    return out


def _read_safetensors(path: Path) -> Arrays:
    with _reading(_existing(path)), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if _HEADER < length < path.stat().st_size:
            raise UserError(f"{path} has a header of {length:,} bytes, allowed are {_HEADER:,}: that is no parameter file")
    flat = {}
    # "pread": a memory map would count beside the arrays, and take twice the file
    with _reading(_existing(path)), safe_open(path, framework="np", backend="pread") as f:
        for name in f.keys():  # the file is no dict
            dtype = f.get_slice(name).get_dtype()
            if dtype not in _SAFETENSORS_TYPES:
                raise UserError(f"{path}: {printable(name)} is of type {dtype}; use {', '.join(_SAFETENSORS_TYPES)}")
            flat[name] = f.get_tensor(name)
    return _checked(path, flat)


def _read_shards(index: Path) -> Arrays:
    with _reading(_existing(index)):
        weight_map = json.loads(read_regular(index, _HEADER))["weight_map"]
        inside: dict[str, list[str]] = {}
        for name, shard in sorted(weight_map.items()):
            inside.setdefault(str(shard), []).append(name)
    for shard in inside:
        if not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", shard):
            shown = printable(repr(shard))
            raise UserError(f"{index} names the shard {shown}: it must be a .safetensors or .bin file beside it")
    if missing := [shard for shard in inside if not index.with_name(shard).is_file()]:
        raise UserError(f"{index}: {len(missing)} of {len(inside)} shards are missing beside it: {', '.join(missing[:10])}")
    flat = {}
    for shard, names in inside.items():
        arrays = _read_file(index.with_name(shard))
        for name in names:
            if name not in arrays:
                raise UserError(f"{index} says that {shard} holds {printable(name)}, and it does not. Fetch both again.")
            flat[name] = arrays[name]
    return _checked(index, flat)


def _read_torch(path: Path) -> Arrays:
    with _reading(_existing(path)), open(path, "rb") as f:
        if f.read(4) != b"PK\x03\x04":
            raise UserError(
                f"{path} is no zip archive, as torch has written since 1.6, but an older file or a plain pickle, which can run "
                "code, or it is damaged. If you trust its source, load it with torch and save the state dict with torch.save."
            )
        _check_directory(path, f)
        with zipfile.ZipFile(f) as archive:
            _check_archive(path, archive)
            mains = [name for name in archive.namelist() if re.fullmatch(r"([^/]*/)?data\.pkl", name)]
            if len(mains) != 1:
                raise UserError(f"{path} is a zip archive with {len(mains)} data.pkl, no torch file: is the suffix right?")
            root = mains[0].removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and _start(archive, f"{root}byteorder", 7) != b"little":
                raise UserError(f"{path} was written on a big-endian machine: save it again on a little-endian one")
            tensors = state_dict(path, _start(archive, mains[0], MOST + 1))
            _check_size(path, sum(math.prod(t.size) * np.dtype(t.storage.dtype).itemsize for t in tensors.values()))
            storages: dict[Storage, np.ndarray] = {}
            flat = {name: _array(path, name, t, archive, root, storages) for name, t in tensors.items()}
    return _checked(path, flat)


def _start(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """The first `most` bytes of an entry: what it unpacks to may be far larger than the file."""
    with archive.open(name) as f:
        return f.read(most)


def _array(path: Path, name: str, t: Tensor, archive: zipfile.ZipFile, root: str, storages: dict) -> np.ndarray:
    """The view that a tensor is of its storage, which is read once however many share it."""
    storage, offset, size, stride = t
    dtype = np.dtype(storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    entry = archive.getinfo(f"{root}data/{storage.key}")
    is_inside = offset >= 0 and min((*size, *stride), default=0) >= 0 and (0 in size or last < storage.numel)
    if not is_inside or entry.file_size != storage.numel * dtype.itemsize:
        raise UserError(
            f"{path} is damaged: {printable(name)} claims the shape {size} with strides {stride} from {offset} of "
            f"{storage.numel:,} {dtype}, and has {entry.file_size:,} bytes. Fetch or write it again."
        )
    if storage not in storages:
        with archive.open(entry) as f:
            storages[storage] = _take(f, entry.file_size).view(dtype)
    return np.lib.stride_tricks.as_strided(storages[storage][offset:], size, [step * dtype.itemsize for step in stride])
