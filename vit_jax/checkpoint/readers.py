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

import ml_dtypes
import numpy as np
from safetensors import safe_open

from vit_jax.checkpoint.unpickle import Storage, Tensor, state_dict
from vit_jax.errors import UserError

Arrays = dict[str, np.ndarray]

_BOMB = 20, 1 << 30  # refused: more than 20 times the file and more than 1 GiB
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
        try:
            archive = np.load(file, allow_pickle=False)
        except ValueError as e:
            if "pickle" in str(e):
                raise _pickled(path) from e
            raise
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{path} is a single array, not an .npz with one array a parameter: save it with checkpoint.save")
        with archive:
            _check_archive(path, archive.zip)
            for entry in archive.zip.infolist():
                name = entry.filename.removesuffix(".npy")
                if name == entry.filename:
                    raise UserError(f"{path} holds {name!r}, which is no array: a checkpoint must be an .npz, no .pt file")
                with archive.zip.open(entry) as f:
                    flat[name] = _read_npy(path, name, f, entry.file_size)
    return _checked(path, flat)


def _read_file(path: Path) -> Arrays:
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _TORCH:
        return _read_torch(path)
    raise UserError(f"{_existing(path)} is no parameter file: use .npz, .safetensors, {', '.join(_TORCH)} or ….index.json")


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path).expanduser()
    if path.is_file():
        return path
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"no such checkpoint: {path} (the folder {folder} does not exist)")
    found = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".npz", ".safetensors", *_TORCH)]
    raise UserError(f"no such checkpoint: {path} (the folder holds {', '.join(found[:10]) or 'no parameter file'})")


def _choose(folder: Path) -> Path:
    for name in _FIRST:
        if (folder / name).is_file():
            return folder / name
    for pattern in _THEN:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(p.name for p in found[:10])
            raise UserError(f"{folder} holds {len(found)} parameter files: name one of {names}, or call it {_FIRST[0]}")
        if found:
            return found[0]
    raise UserError(f"{folder} holds no parameter file: one of {', '.join((*_FIRST, *_THEN))} is needed")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e}") from e
    except Exception as e:  # damaged bytes raise nearly everything in zipfile, zlib, NumPy, pickle and safetensors
        size = path.stat().st_size
        raise UserError(
            f"{path} is truncated or damaged ({size:,} bytes: {e}). Fetch or write it again, after deleting this copy."
        ) from e


def _pickled(path: Path) -> UserError:
    return UserError(
        f"{path} is no .npz or holds pickled objects, which can run code and are never loaded; "
        "a checkpoint must be an .npz of plain arrays"
    )


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    names = collections.Counter(archive.namelist())
    for name, count in names.items():
        _check_name(path, name.removesuffix(".npy"))
        if count > 1:
            raise UserError(f"{path} holds {name!r} {count} times, and only one can be meant. Fetch or write it again.")
    _check_size(path, sum(entry.file_size for entry in archive.infolist()))


def _check_size(path: Path, total: int) -> None:
    size, (factor, least) = path.stat().st_size, _BOMB
    if total > max(factor * size, least):
        raise UserError(f"{path} has {size:,} bytes and would unpack to {total:,}: such an archive bomb is not read")


def _check_name(path: Path, name: str) -> None:
    if not name or name[0] in "/\\" or ".." in re.split(r"[/\\]", name):
        raise UserError(f"{path} holds a parameter {name!r}: a name must not be empty or absolute, nor lead elsewhere by '..'")


def _checked(path: Path, flat: Arrays) -> Arrays:
    if not flat:
        raise UserError(f"{path} holds no parameters")
    for name, x in flat.items():
        _check_name(path, name)
        is_float = x.dtype.kind == "f" or x.dtype == ml_dtypes.bfloat16
        if not is_float and x.dtype.kind not in "biu":
            raise UserError(f"{path}: {name} is of type {x.dtype}; a parameter must be of floats, integers or booleans")
        if is_float and not _is_finite(x):
            count = x.size - np.count_nonzero(np.isfinite(x))
            raise UserError(f"{path}: {count:,} of the {x.size:,} values of {name} are not finite; use an earlier checkpoint")
    return flat


def _is_finite(x: np.ndarray) -> bool:
    """A minimum or maximum of anything with a NaN is one; unlike `np.isfinite(x)`, they take no memory."""
    with np.errstate(invalid="ignore"):
        return not x.size or bool(np.isfinite(x.min()) and np.isfinite(x.max()))


def _read_npy(path: Path, name: str, f: zipfile.ZipExtFile, size: int) -> np.ndarray:
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, is_fortran, dtype = header[np.lib.format.read_magic(f)](f)
    if dtype.hasobject:
        raise _pickled(path)
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size - f.tell():
        raise UserError(
            f"{path} is damaged: {name} claims the shape {shape} of {dtype} and has {size - f.tell():,} bytes. "
            "Fetch or write it again."
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
    flat = {}
    # "pread": a memory map would count beside the arrays, and take twice the file
    with _reading(_existing(path)), safe_open(path, framework="np", backend="pread") as f:
        for name in f.keys():  # the file is no dict
            dtype = f.get_slice(name).get_dtype()
            if dtype not in _SAFETENSORS_TYPES:
                raise UserError(f"{path}: {name} is of type {dtype}; use {', '.join(_SAFETENSORS_TYPES)}")
            flat[name] = f.get_tensor(name)
    return _checked(path, flat)


def _read_shards(index: Path) -> Arrays:
    with _reading(_existing(index)):
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(map(str, weight_map.values())))
    for shard in shards:
        if not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", shard):
            raise UserError(f"{index} names the shard {shard!r}: it must be a .safetensors or .bin file beside it")
    if missing := [shard for shard in shards if not index.with_name(shard).is_file()]:
        raise UserError(f"{index}: {len(missing)} of {len(shards)} shards are missing beside it: {', '.join(missing[:10])}")
    flat = {}
    for shard in shards:
        arrays = _read_file(index.with_name(shard))
        for name in (name for name, place in weight_map.items() if place == shard):
            if name not in arrays:
                raise UserError(f"{index} says that {shard} holds {name}, and it does not. Fetch both again.")
            flat[name] = arrays[name]
    return _checked(index, flat)


def _read_torch(path: Path) -> Arrays:
    with _reading(_existing(path)), open(path, "rb") as f:
        if f.read(4) != b"PK\x03\x04":
            raise UserError(
                f"{path} is no zip archive, as torch has written since 1.6, but an older file or a plain pickle, which can run "
                "code, or it is damaged. If you trust its source, load it with torch and save the state dict with torch.save."
            )
        with zipfile.ZipFile(f) as archive:
            _check_archive(path, archive)
            mains = [name for name in archive.namelist() if re.fullmatch(r"([^/]*/)?data\.pkl", name)]
            if len(mains) != 1:
                raise UserError(f"{path} is a zip archive with {len(mains)} data.pkl, no torch file: is the suffix right?")
            root = mains[0].removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{path} was written on a big-endian machine: save it again on a little-endian one")
            tensors = state_dict(path, archive.read(mains[0]))
            _check_size(path, sum(math.prod(t.size) * np.dtype(t.storage.dtype).itemsize for t in tensors.values()))
            storages: dict[Storage, np.ndarray] = {}
            flat = {name: _array(path, name, t, archive, root, storages) for name, t in tensors.items()}
    return _checked(path, flat)


def _array(path: Path, name: str, t: Tensor, archive: zipfile.ZipFile, root: str, storages: dict) -> np.ndarray:
    """The view that a tensor is of its storage, which is read once however many share it."""
    storage, offset, size, stride = t
    dtype = np.dtype(storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    entry = archive.getinfo(f"{root}data/{storage.key}")
    is_inside = offset >= 0 and min((*size, *stride), default=0) >= 0 and (0 in size or last < storage.numel)
    if not is_inside or entry.file_size != storage.numel * dtype.itemsize:
        raise UserError(
            f"{path} is damaged: {name} claims the shape {size} with strides {stride} from {offset} of {storage.numel:,} "
            f"{dtype}, and has {entry.file_size:,} bytes. Fetch or write it again."
        )
    if storage not in storages:
        with archive.open(entry) as f:
            storages[storage] = _take(f, entry.file_size).view(dtype)
    return np.lib.stride_tricks.as_strided(storages[storage][offset:], size, [step * dtype.itemsize for step in stride])
