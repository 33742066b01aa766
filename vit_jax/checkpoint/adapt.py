"""Fits a loaded checkpoint to a new task (another head) and a new resolution (another grid of position embeddings)."""

import csv
import logging
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from vit_jax.checkpoint import describe, npz
from vit_jax.errors import UserError, unknown

Grid = tuple[int, int]
POSITIONS = "Transformer/posembed_input/pos_embedding"

log = logging.getLogger("vit_jax")


def load_pretrained(
    *,
    pretrained_path: str | os.PathLike,
    init_params: Mapping[str, Any],
    model_config: Mapping[str, Any],
    grid: Grid | None = None,
    keep_head: bool = False,
) -> npz.Params:
    """Parameters of `pretrained_path`, adapted to a model whose fresh parameters are `init_params`.

    The head starts anew from `init_params` unless `keep_head`; `pre_logits` is dropped if the model has no
    representation_size; position embeddings of another grid are interpolated; a class token that the model lacks is
    dropped with its position, one that the file lacks starts anew. Anything else that differs is an error.

    Args:
      pretrained_path: an .npz; the `model.json` beside it, if there is one, tells the file's own grid, else it is square.
      init_params: nested dict of arrays, not modified.
      model_config: the model's fields; `representation_size` is read.
      grid: (h, w) of the model's patches; None for a square grid.

    Raises:
      UserError: with a -/+ list of names and shapes when the file does not fit.
    """
    loaded = flatten_dict(npz.load(pretrained_path), sep="/")
    in_file = describe.summary(loaded)
    wanted = flatten_dict(dict(init_params), sep="/")
    if model_config.get("representation_size") is None:
        loaded = {name: x for name, x in loaded.items() if not name.startswith("pre_logits/")}
    if not keep_head:
        loaded = {name: x for name, x in loaded.items() if not name.startswith("head/")}
        loaded |= {name: np.asarray(x) for name, x in wanted.items() if name.startswith("head/")}
    if POSITIONS in loaded and POSITIONS in wanted:
        try:
            _adapt_positions(loaded, wanted, describe.grid_beside(pretrained_path), grid)
        except UserError as e:
            raise UserError(f"{pretrained_path}: {e}") from e
    _check_fit(loaded, wanted, pretrained_path, in_file)
    return unflatten_dict({name: np.asarray(loaded[name], wanted[name].dtype) for name in wanted}, sep="/")


def check_fit(params: Mapping[str, Any], wanted: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Raises UserError with a -/+ list unless `params`, read from `path`, have the names and shapes of `wanted`."""
    flat = flatten_dict(dict(params), sep="/")
    _check_fit(flat, flatten_dict(dict(wanted), sep="/"), path, describe.summary(flat))


def interpolate_posembed(
    posemb: Float[np.ndarray, "1 n d"],
    num_tokens: int,
    has_class_token: bool,
    *,
    old_grid: Grid | None = None,
    grid: Grid | None = None,
) -> Float[np.ndarray, "1 m d"]:
    """Resamples position embeddings bilinearly with aligned corners, as `scipy.ndimage.zoom(order=1)` does.

    Args:
      num_tokens: how many embeddings are wanted, the class token's included, which is kept as it is.
      old_grid, grid: (h, w) of the patches before and after; None for square.

    Raises:
      UserError: if the number of tokens is not that of the grid, or not a square where no grid is given.
    """
    first = int(has_class_token)
    _, n, d = posemb.shape
    h, w = old_grid or _square(n - first)
    new_h, new_w = grid or _square(num_tokens - first)
    if h * w != n - first or new_h * new_w != num_tokens - first:
        raise UserError(
            f"{n - first} position embeddings for a grid of {h}x{w} cannot become {num_tokens - first} for {new_h}x{new_w}"
        )
    old = np.asarray(posemb[0, first:], np.float64).reshape(h, w, d)
    new = np.einsum("ih,hwd,jw->ijd", _weights(h, new_h), old, _weights(w, new_w)).reshape(1, -1, d)
    return np.concatenate([posemb[:, :first], new.astype(posemb.dtype)], axis=1)


def augreg_filename(name: str, directory: str | os.PathLike) -> str:
    """File name (without .npz) for `config.model_or_filename`: a name with "-" is one already.

    Otherwise the ImageNet-21k checkpoint of that architecture with the best upstream validation accuracy, by the
    `index.csv` in `directory`.
    """
    if "-" in name:
        return name.removesuffix(".npz")
    index = os.path.join(os.path.expanduser(directory), "index.csv")
    if not os.path.isfile(index):
        url = "https://storage.googleapis.com/vit_models/augreg"
        raise UserError(
            f"{index} is needed to choose an AugReg checkpoint of {name}, and is not there. Fetch it and the file it names:\n"
            f"  curl -O {url}/index.csv\n"
            "or name a file: --config.model_or_filename=FILE, whose name holds a '-'; then set --config.pretrained_dir=DIR"
        )
    with open(index, newline="") as f:
        listed = [row for row in csv.DictReader(f) if row["ds"] == "i21k"]
    rows = [row for row in listed if _architecture(row) == name]
    if not rows:
        raise unknown(f"architecture among the ImageNet-21k checkpoints in {index}", name, set(map(_architecture, listed)))
    best = max(rows, key=lambda row: float(row["final_val"]))
    log.info("chose %s: upstream accuracy %s, the best of %d", best["filename"], best["final_val"], len(rows))
    return best["filename"]


def _architecture(row: Mapping[str, str]) -> str:
    return row["filename"].split("-")[0]


def _adapt_positions(loaded: dict, wanted: dict, old_grid: Grid | None, grid: Grid | None) -> None:
    """Changes `loaded` in place: its class token and position embeddings become those that `wanted` has room for."""
    old, new = np.asarray(loaded[POSITIONS]), wanted[POSITIONS]
    if old.ndim != 3 or old.shape[-1] != new.shape[-1]:
        return  # another width: the −/+ list will say so
    in_file, in_model = "cls" in loaded, "cls" in wanted
    if in_file and not in_model:
        old = old[:, 1:]
        del loaded["cls"]
    elif in_model and not in_file:
        loaded["cls"] = np.asarray(wanted["cls"])
        old = np.concatenate([np.asarray(new[:, :1], old.dtype), old], axis=1)
    n, first = new.shape[1], int(in_model)
    grid = grid or _square(n - first)
    count = old.shape[1] - first
    if old_grid is None:  # published files are square
        old_grid = grid if count == grid[0] * grid[1] and count != math.isqrt(count) ** 2 else _square(count)
    if old_grid != grid:
        log.info("position embeddings: %dx%d → %dx%d", *old_grid, *grid)
        old = interpolate_posembed(old, n, in_model, old_grid=old_grid, grid=grid)
    loaded[POSITIONS] = old


def _weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Each row blends the two old places around one new place; the first and last places stay where they are."""
    places = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)))


def _square(n: int) -> Grid:
    side = round(n**0.5)
    if side * side != n:
        raise UserError(f"{n} position embeddings are no square: give the grid, or keep the model.json beside the file")
    return side, side


def _check_fit(loaded: Mapping[str, Any], wanted: Mapping[str, Any], path: str | os.PathLike, in_file: str) -> None:
    if differences := _differences(loaded, wanted):
        raise UserError(
            f"{path} does not fit the model (- the model wants, + the file has):\n{differences}\nThe file holds {in_file}."
        )


def _differences(loaded: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """A −/+ list of names and shapes, the same parameter of many blocks in one line; "" if there is none."""
    lines: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for sign, ours, theirs in (("-", wanted, loaded), ("+", loaded, wanted)):
        for name, x in ours.items():
            if name not in theirs or theirs[name].shape != x.shape:
                pattern = re.sub(r"(encoderblock|MixerBlock)_\d+", r"\1_*", name)
                lines.setdefault((pattern, sign, tuple(x.shape)), []).append(name)
    return "\n".join(
        f"  {sign} {pattern} {shape} in {len(names)} blocks" if len(names) > 1 else f"  {sign} {names[0]} {shape}"
        for (pattern, sign, shape), names in sorted(lines.items(), key=lambda line: (line[0][0], line[0][1] == "+"))
    )
