"""The published file format: a flat .npz, one array a parameter, "/" between the names of modules."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.checkpoint import readers
from vit_jax.errors import UserError, printable
from vit_jax.files import write_atomically

Params = dict[str, Any]

_REMOTE = re.compile(r"^(gs|https?|hf|s3):/+")  # a Path keeps one slash of two
# Newer flax numbers the layers of a block per class; the published files number them across the block.
_NEW_NAME = re.compile(r"(.*\bencoderblock_\d+/)(LayerNorm_1|MultiHeadDotProductAttention_0|MlpBlock_0)(/.*)")
_OLD_NAME = {
    "LayerNorm_1": "LayerNorm_2",
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "MlpBlock_0": "MlpBlock_3",
}


def load(path: str | os.PathLike) -> Params:
    """Reads a published or saved .npz as a nested dict of arrays under the names that `models` use.

    Accepts layer names of old and new flax, an `opt/target/` prefix, and group norms of shape (1, 1, 1, c). Never
    unpickles. Raises UserError for a file that is missing, truncated, pickled, or no .npz.
    """
    flat = _read(path)
    if any(name.startswith("opt/target/") for name in flat):
        flat = {name.removeprefix("opt/target/"): x for name, x in flat.items() if name.startswith("opt/target/")}
    try:
        return unflatten_dict(canonical(flat), sep="/")
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def canonical(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flat names and arrays with the layer names of old flax, and group norms of shape (c,).

    Raises UserError if two names would become one.
    """
    result, names = {}, {}
    for name, x in flat.items():
        old = _old_name(name)
        if old in result:
            raise UserError(
                f"{printable(names[old])} and {printable(name)} are two names of one parameter: only one may be there"
            )
        result[old], names[old] = _squeeze_group_norm(name, x), name
    return result


def save(params: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes a (nested) dict of arrays in the published layout: beside `path` first, then renamed onto it.

    bfloat16, which .npz cannot hold, is widened to float32. The same parameters always give the same bytes.
    """
    path = Path(path).expanduser()
    flat = flatten_dict(jax.device_get(dict(params)), sep="/")
    arrays = {name: _storable(flat[name]) for name in sorted(flat)}
    write_atomically(path, lambda f: np.savez(f, **arrays))


def _read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    if _REMOTE.match(str(path)):
        raise UserError(_download_by_hand(_REMOTE.sub(r"\1://", str(path))))
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a checkpoint: name the .npz{_npz_in(path)}")
    return readers.read_npz(path)


def _download_by_hand(url: str) -> str:
    public = re.sub(r"^gs://", "https://storage.googleapis.com/", url)
    advice = f"  curl -O {public}\n" if public.startswith("http") else ""
    return f"{url} is not a local file. Download it first\n{advice}and name the local file, or its folder as pretrained_dir"


def _npz_in(folder: Path) -> str:
    found = sorted(p.name for p in folder.glob("*.npz"))
    return f" (the folder holds {', '.join(found[:10])})" if found else " (the folder holds no .npz)"


def _old_name(name: str) -> str:
    match = _NEW_NAME.fullmatch(name)
    return match[1] + _OLD_NAME[match[2]] + match[3] if match else name


def _squeeze_group_norm(name: str, x: np.ndarray) -> np.ndarray:
    is_group_norm = re.search(r"(^|/)gn\w*/(scale|bias)$", name)
    return x.reshape(-1) if is_group_norm and x.shape[:-1] == (1, 1, 1) else x


def _storable(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x
