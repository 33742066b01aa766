"""The only unpickler here: it lets in tensors and dicts, as inert descriptions, and refuses every other name."""

import io
import itertools
import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" once it is imported

from vit_jax.errors import UserError, printable

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
MOST = 2 << 20  # bytes of pickle: a tensor takes 200 of them
_AXES = 64  # as many as NumPy knows
_LONGEST_KEY = 1000
_PLACES = ("model", "state_dict", "teacher")
_AVERAGES = ("model_ema", "state_dict_ema", "ema")  # taken where none of the former is there


log = logging.getLogger("vit_jax")


class Storage(NamedTuple):
    """`numel` numbers of a NumPy type, in the entry `data/KEY` of the archive."""

    dtype: str
    key: str
    numel: int


class Tensor(NamedTuple):
    """A view of a storage, in numbers rather than bytes; whether it lies inside is not checked yet."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def state_dict(path: Path, data: bytes) -> Mapping[str, Tensor]:
    """The dict of tensors that is pickled in `data`, the `data.pkl` of the torch file at `path`.

    It may stand alone under one of 'model', 'state_dict' and 'teacher', or else of averages: 'model_ema', 'state_dict_ema',
    'ema'. Raises UserError for names other than those of
    tensors, and where there is not exactly one such dict; damaged bytes raise anything. `data` of `MOST` bytes takes
    5 seconds and 200 MB at most, whatever it says.
    """
    if len(data) > MOST:
        raise UserError(
            f"{path} holds {len(data):,} bytes of pickle beside its tensors, allowed are {MOST:,}: load it with torch, if you "
            "trust its source, and save the state dict alone with torch.save"
        )
    tree = _Unpickler(path, data).load()
    if _is_state(tree):
        return tree
    inside = tree if isinstance(tree, dict) else {}
    states = [key for key in (*_PLACES, *_AVERAGES) if _is_state(inside.get(key))]
    found = [key for key in states if key in _PLACES] or states
    if len(found) == 1:
        if left := [str(key) for key in inside if key != found[0]]:
            log.info("opened   %s: %r is taken, left is %s", path, found[0], printable(", ".join(left)))
        return inside[found[0]]
    kinds = [f"{key!r}: {'tensors' if _is_state(x) else type(x).__name__}" for key, x in itertools.islice(inside.items(), 10)]
    raise UserError(
        f"{path} holds {printable(', '.join(kinds)) or type(tree).__name__}; wanted: a dict of tensors alone, or exactly one "
        f"under {', '.join(map(repr, _PLACES))}. Save the one that you mean with torch.save."
    )


def _is_state(x: Any) -> bool:
    return isinstance(x, dict) and bool(x) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in x.items())


def _tensor(storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """Refuses what would make later sums and products of these numbers slow."""
    if not isinstance(storage, Storage) or type(size) is not tuple or type(stride) is not tuple:
        raise pickle.UnpicklingError("a tensor of something else")
    if max(len(size), len(stride)) > _AXES or not all(_is_small(n, 63) for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor of absurd sizes")
    return Tensor(storage, offset, size, stride)


def _is_small(x: Any, bits: int) -> bool:
    return type(x) is int and x.bit_length() <= bits


class _Allowed(dict):
    """The operations that a torch file needs; without sets, and without what calls classes or copies what is there."""

    def __missing__(self, code: int) -> Callable:
        raise pickle.UnpicklingError(f"the pickle operation {bytes([code])!r}, which no file of tensors needs")


class _Unpickler(pickle._Unpickler):
    """Looks no name up: each is one of a few of our own functions, or an error.

    Every operation takes time and memory in proportion to its bytes. So only short text and small numbers are keys: to hash
    nested tuples takes for ever, or overflows the stack. This is the unpickler in Python: a few bytes can make the one in C
    take 32 GB for its table of what it has seen.
    """

    def __init__(self, path: Path, data: bytes):
        super().__init__(io.BytesIO(data))
        self._path = path
        self._known = {
            "collections.OrderedDict": dict,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        } | {f"torch.{name}": dtype for name, dtype in _STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        known = self._known.get(f"{module}.{name}")
        if known is None:
            asked = printable(f"{module}.{name}")
            raise UserError(
                f"{self._path} asks for {asked} when it is unpickled; only tensors are let in, since all else can run code. "
                "If you trust its source, load it with torch and save the state dict alone with torch.save."
            )
        return known

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, numel = pid if type(pid) is tuple and len(pid) == 5 else (None,) * 5
        is_known = type(kind) is type(dtype) is type(key) is str and kind == "storage" and dtype in _STORAGES.values()
        if not is_known or len(key) > _LONGEST_KEY or not _is_small(numel, 63):
            raise pickle.UnpicklingError("an unknown kind of storage")
        return Storage(dtype, key, numel)

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if type(args) is not tuple or len(args) > 8 or function not in self._known.values() or (args and function is dict):
            raise pickle.UnpicklingError("a call that no tensor needs")
        self.stack[-1] = {} if function is dict else function(*args)

    def load_build(self) -> None:
        self.stack.pop()  # attributes, such as the `_metadata` of a state dict, are of no use here

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(target) is not dict or not (type(key) is str and len(key) <= _LONGEST_KEY or _is_small(key, 31)):
                raise pickle.UnpicklingError(f"a {type(key).__name__} as key: only short text and small numbers may be")
            target[key] = value

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("something appended to no list")
        self.stack[-1].extend(items)

    _NAMES = (
        "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
        "BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST EMPTY_DICT GLOBAL STACK_GLOBAL BINPERSID "
        "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET"
    )
    dispatch = _Allowed({code: pickle._Unpickler.dispatch[code] for (code,) in (getattr(pickle, n) for n in _NAMES.split())})
    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
    }
