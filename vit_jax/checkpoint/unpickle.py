"""The only unpickler here: it lets in tensors and dicts, as inert descriptions, and refuses every other name."""

import collections
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" once it is imported

from vit_jax.errors import UserError

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
_PLACES = ("model", "state_dict", "teacher")


class Storage(NamedTuple):
    """`numel` numbers of a NumPy type, in the entry `data/KEY` of the archive."""

    dtype: str
    key: str
    numel: int


class Tensor(NamedTuple):
    """A view of a storage, in numbers rather than bytes; nothing is checked yet."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def state_dict(path: Path, data: bytes) -> Mapping[str, Tensor]:
    """The dict of tensors that is pickled in `data`, the `data.pkl` of the torch file at `path`.

    It may stand alone under one of 'model', 'state_dict' and 'teacher'. Raises UserError for names other than those of
    tensors, and where there is not exactly one such dict; damaged bytes raise anything.
    """
    try:
        tree = _Unpickler(path, data).load()
    except MemoryError as e:
        raise pickle.UnpicklingError("a length far beyond the file") from e
    if _is_state(tree):
        return tree
    inside = tree if isinstance(tree, dict) else {}
    found = [key for key in _PLACES if _is_state(inside.get(key))]
    if len(found) == 1:
        return inside[found[0]]
    kinds = [f"{key!r}: {'tensors' if _is_state(x) else type(x).__name__}" for key, x in list(inside.items())[:10]]
    raise UserError(
        f"{path} holds {', '.join(kinds) or type(tree).__name__}; wanted: a dict of tensors alone, or exactly one under "
        f"{', '.join(map(repr, _PLACES))}. Save the one that you mean with torch.save."
    )


def _is_state(x: Any) -> bool:
    return isinstance(x, dict) and bool(x) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in x.items())


class _Unpickler(pickle._Unpickler):
    """Looks no name up: each is one of a few of our own objects, or an error.

    The one in Python: of the one in C, a few bytes can claim 32 GB for its table of what it has seen.
    """

    def __init__(self, path: Path, data: bytes):
        super().__init__(io.BytesIO(data))
        self._path = path
        # Made anew for each file: a pickle may change the attributes of what it gets.
        self._known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *_: Tensor(storage, offset, size, stride),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
        } | {f"torch.{name}": dtype for name, dtype in _STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        known = self._known.get(f"{module}.{name}")
        if known is None:
            raise UserError(
                f"{self._path} asks for {module}.{name} when it is unpickled; only tensors are let in, since all else can run "
                "code. If you trust its source, load it with torch and save the state dict alone with torch.save."
            )
        return known

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or dtype not in _STORAGES.values() or not isinstance(key, str):
            raise pickle.UnpicklingError("an unknown kind of storage")
        return Storage(dtype, key, numel)
