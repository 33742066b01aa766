"""The file of a LoRA run: what was trained, and which parameters it belongs to. Opened, both become a plain model."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.arguments import as_typed
from vit_jax.checkpoint import describe, npz
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat
from vit_jax.errors import UserError
from vit_jax.optimize import trainable

FAMILY = "LoRA adapter"
FILE = "adapter.npz"

_FACTS = {"base": str, "fingerprint": str, "rank": int, "alpha": (int, float), "targets": list, "without": list}


class Base(NamedTuple):
    """The checkpoint that a run started from, to be found again.

    Attributes:
      source: an absolute path, or an address that `hub.fetch` knows.
      fingerprint: of all its parameters, see `fingerprint`.
      changed: names of the model's parameters that are not those of the file: a new head, resampled positions.
      without: names in the file that the model has no use for.
    """

    source: str
    fingerprint: str
    changed: tuple[str, ...]
    without: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA run's file as it is stored: `path`, its flat arrays, the description of the merged model, and its facts.

    `base` and `fingerprint` tell the checkpoint that it belongs to, `without` which of its parameters are not wanted.
    """

    path: Path
    stored: Flat
    description: Description
    base: str
    fingerprint: str
    rank: int
    alpha: float
    targets: Sequence[str]
    without: Sequence[str]


def base_of(source: str | os.PathLike, opened: Opened, params: Mapping[str, Any]) -> Base:
    """What a model with `params`, made from `opened`, takes from it. UserError if that is an adapter itself."""
    if opened.family == FAMILY:
        raise no_base(opened.path)
    here = Path(source).expanduser().exists()
    ours, theirs = flatten_dict(dict(params), sep="/"), opened.flat
    changed = [n for n, x in ours.items() if n not in theirs or not np.array_equal(x, np.asarray(theirs[n], x.dtype))]
    without = [name for name in theirs if name not in ours]
    source = opened.path.resolve() if here else source
    return Base(str(source), fingerprint(theirs), tuple(changed), tuple(without))


def no_base(path: Path) -> UserError:
    """The error for a base that is an adapter itself."""
    command = as_typed(f"python -m vit_jax.convert {path} MERGED.npz --to=npz")
    return UserError(f"{path} is a LoRA adapter, and another one cannot build on it: merge it first\n  {command}")


def fingerprint(flat: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(flat):
        x = np.ascontiguousarray(flat[name])
        digest.update(f"{name} {x.dtype} {x.shape}\n".encode())
        digest.update(x.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def save_adapter(
    path: str | os.PathLike,
    trained: Mapping[str, Any],
    frozen: Mapping[str, Any],
    *,
    base: Base,
    alpha: float,
    targets: Sequence[str],
    description: Description,
) -> None:
    """Writes what `adapters.add_lora` gave and training changed: `path`, an .npz, and its .json.

    The .npz holds all of `trained`, A and B as `lora/…/a` and `lora/…/b`, and those of `frozen` that are not the base's.
    The .json is a `model.json` with one more entry, "adapter".
    """
    trained, frozen = flatten_dict(dict(trained), sep="/"), flatten_dict(dict(frozen), sep="/")
    rank = next(x.shape[-1] for name, x in trained.items() if name.startswith("lora/") and name.endswith("/a"))
    facts = {"base": base.source, "fingerprint": base.fingerprint, "rank": rank, "alpha": alpha}
    facts |= {"targets": list(targets), "without": list(base.without)}
    describe.write(path, description, adapter=facts)
    npz.save(trained | {name: x for name, x in frozen.items() if name in base.changed}, path)


def read_adapter(path: Path, flat: Flat) -> Adapter:
    """An adapter from its arrays and the JSON beside it. Raises UserError for a description that makes no sense."""
    content = describe.read_json(path) or {}
    facts = content.get("adapter")
    where = Path(path).with_suffix(".json")
    if not isinstance(facts, dict):
        raise UserError(f"{path} is a LoRA adapter, and {where.name} beside it must tell its base: bring both files")
    if wrong := [name for name, kind in _FACTS.items() if not isinstance(facts.get(name), kind)]:
        raise UserError(f'{where}: "adapter" lacks {", ".join(wrong)}, or has another type there')
    if facts["rank"] < 1 or not 0 < facts["alpha"] < math.inf:
        raise UserError(f'{where}: "adapter" has rank={facts["rank"]}, alpha={facts["alpha"]}; both must be above 0')
    description = describe.Description.from_json(content, where)
    return Adapter(path=path, stored=flat, description=description, **{name: facts[name] for name in _FACTS})


def is_adapter(flat: Mapping[str, Any]) -> bool:
    """Whether flat names are those of an adapter."""
    return any(name.startswith("lora/") for name in flat)


def merge(adapter: Adapter, base: Flat) -> Flat:
    """The flat parameters of the model that an adapter and its base make, in float32. UserError for another base."""
    path, stored = adapter.path, adapter.stored
    if fingerprint(base) != adapter.fingerprint:
        raise UserError(f"{path} was trained on other parameters than {adapter.base} holds now: bring back the old file")
    frozen = {name: np.asarray(x, np.float32) for name, x in base.items() if name not in adapter.without}
    _check_lora(path, stored, frozen | stored, adapter.rank)
    frozen["lora/scale"] = trainable.scale(adapter.alpha, adapter.rank)
    nested = (unflatten_dict(flat, sep="/") for flat in (stored, frozen))
    return flatten_dict(trainable.merge(*nested), sep="/")


def _check_lora(path: Path, stored: Flat, model: Flat, rank: int) -> None:
    """Raises UserError unless every A and B come in pairs, and their product has the shape of a kernel of the model."""
    names = {name for name in stored if name.startswith("lora/")}
    layers = sorted({name.rpartition("/")[0] for name in names})
    if odd := sorted(names ^ {f"{layer}/{part}" for layer in layers for part in "ab"}):
        raise UserError(f"{path} is damaged: an A and a B belong to every kernel of LoRA, see {odd[0]}")
    for layer in layers:
        a, b, kernel = stored[f"{layer}/a"].shape, stored[f"{layer}/b"].shape, f"{layer.removeprefix('lora/')}/kernel"
        shape = model[kernel].shape if kernel in model else None
        if (a[-1:], b[:1], a[:-1] + b[1:]) != ((rank,), (rank,), shape):
            raise UserError(f"{path}: {layer} of {a} · {b} is no change of rank {rank} to {kernel}, {shape}")
