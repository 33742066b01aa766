"""Fits a loaded checkpoint to a new task (another head) and a new resolution (another grid of position embeddings)."""

import csv
import io
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from vit_jax.checkpoint import describe, npz
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.family import POSITIONS
from vit_jax.checkpoint.hub import fetch
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.opening import open_checkpoint
from vit_jax.checkpoint.resize import resize
from vit_jax.errors import UserError, printable, unknown
from vit_jax.files import read_regular

Grid = tuple[int, int]
_PREFIX = ("cls", "dist")
_HEADS = ("head/", "head_dist/")

log = logging.getLogger("vit_jax")


def load_pretrained(
    *,
    pretrained_path: str | os.PathLike | Opened,
    init_params: Mapping[str, Any],
    model_config: Mapping[str, Any],
    grid: Grid | None = None,
    keep_head: bool = False,
    columns: Sequence[int] | None = None,
) -> npz.Params:
    """Parameters of `pretrained_path`, adapted to a model whose fresh parameters are `init_params`.

    The head starts anew from `init_params` unless `keep_head`; `pre_logits` is dropped if the model has no
    representation_size; position embeddings of another grid are interpolated; a class token that the model lacks is
    dropped with its position, one that the file lacks starts anew. Anything else that differs is an error.

    Args:
      pretrained_path: whatever `open_checkpoint` reads, or what it returned; of two towers that of images is taken.
        The description beside the file tells its grid; without one it is square.
      init_params: nested dict of arrays, not modified.
      model_config: the model's fields; `representation_size` is read.
      grid: (h, w) of the model's patches; None for a square grid.
      columns: of a kept head, in the order of the model's classes, see `classes.match_classes`; None for all as they stand.

    Raises:
      UserError: with a -/+ list of names and shapes when the file does not fit.
    """
    opened = pretrained_path if isinstance(pretrained_path, Opened) else open_checkpoint(pretrained_path)
    if "img" not in init_params:
        opened = opened.image_tower()
    pretrained_path = opened.path
    loaded = flatten_dict(opened.params, sep="/")
    in_file = describe.summary(loaded)
    wanted = flatten_dict(dict(init_params), sep="/")
    if model_config.get("representation_size") is None:
        loaded = {name: x for name, x in loaded.items() if not name.startswith("pre_logits/")}
    if opened.description.model_type == "MAE":  # its encoder
        loaded = {name: x for name, x in loaded.items() if not name.startswith("decoder/")}
    if not keep_head:
        loaded = {name: x for name, x in loaded.items() if not name.startswith(_HEADS)}
        loaded |= {name: np.asarray(x) for name, x in wanted.items() if name.startswith(_HEADS)}
    else:
        warn_of_empty_head(loaded, pretrained_path)
    if keep_head and columns is not None:
        picked = {name: np.asarray(x)[..., list(columns)] for name, x in loaded.items() if name.startswith(_HEADS)}
        loaded |= picked
    if POSITIONS in loaded and POSITIONS in wanted:
        try:
            _adapt_positions(loaded, wanted, opened.description, grid)
        except UserError as e:
            raise UserError(f"{pretrained_path}: {e}") from e
    _check_fit(loaded, wanted, pretrained_path, in_file)
    return unflatten_dict({name: np.asarray(loaded[name], wanted[name].dtype) for name in wanted}, sep="/")


def warn_of_empty_head(flat: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Logs that a head is all zeros, as Google's ImageNet-21k files have it, which are for fine-tuning alone."""
    kernels = [x for name, x in flat.items() if name.startswith(_HEADS) and name.endswith("/kernel")]
    if kernels and not any(np.any(x) for x in kernels):
        log.warning("opened   %s: its head is all zeros, and what it says of images means nothing: fine-tune it first", path)


def check_shape(name: str, given: Any, wanted: Any, path: str | os.PathLike) -> None:
    """Raises UserError unless what `path` has under a name, None for nothing, has the shape of `wanted`."""
    if given is None or given.shape != wanted.shape:
        has = "lacks it" if given is None else f"has it as {given.shape}"
        raise UserError(f"{path} does not fit: {name} must be {wanted.shape}, and the file {has}")


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
    num_prefix: int | None = None,
    rule: str = "bilinear",
) -> Float[np.ndarray, "1 m d"]:
    """Resamples position embeddings to another grid of patches.

    Args:
      num_tokens: how many embeddings are wanted, the class token's included, which is kept as it is.
      old_grid, grid: (h, w) of the patches before and after; None for square.
      num_prefix: how many tokens stand in front of the patches, if not the class token alone.
      rule: how to resample, see `resize.resize`; the default is that of Google's code.

    Raises:
      UserError: if the number of tokens is not that of the grid, or not a square where no grid is given.
    """
    first = int(has_class_token) if num_prefix is None else num_prefix
    _, n, d = posemb.shape
    h, w = old_grid or _square(n - first)
    new_h, new_w = grid or _square(num_tokens - first)
    if h * w != n - first or new_h * new_w != num_tokens - first:
        raise UserError(
            f"{n - first} position embeddings for a grid of {h}x{w} cannot become {num_tokens - first} for {new_h}x{new_w}"
        )
    new = resize(posemb[0, first:].reshape(h, w, d), (new_h, new_w), rule).reshape(1, -1, d)
    return np.concatenate([posemb[:, :first], new.astype(posemb.dtype)], axis=1)


def augreg_filename(name: str, directory: str | os.PathLike) -> str:
    """File name (without .npz) for `config.model_or_filename`: a name with "-" is one already.

    Otherwise the ImageNet-21k checkpoint of that architecture with the best upstream validation accuracy, by the
    `index.csv` in `directory`.
    """
    if "-" in name:
        return name.removesuffix(".npz")
    index = fetch(os.path.join(directory, "index.csv"))
    if not index.is_file():
        raise UserError(
            f"{index} is needed to choose an AugReg checkpoint of {name}, and is not there: fetch it and the file it names\n"
            "  curl -O https://storage.googleapis.com/vit_models/augreg/index.csv\n"
            "or name a file, with a '-' in its name: --config.model_or_filename=FILE"
        )
    listed = _upstream_accuracies(index)
    rows = {filename: value for filename, value in listed.items() if _architecture(filename) == name}
    if not rows:
        raise unknown(f"architecture among the ImageNet-21k checkpoints in {index}", name, set(map(_architecture, listed)))
    best = max(rows, key=rows.__getitem__)
    log.info("chose %s: upstream accuracy %s, the best of %d", best, rows[best], len(rows))
    return best


def _upstream_accuracies(index: Path) -> dict[str, float]:
    """{file name: validation accuracy} of the ImageNet-21k checkpoints in AugReg's `index.csv`. UserError if it is none."""
    try:
        text = read_regular(index).decode("utf-8-sig")
        rows = [row for row in csv.DictReader(io.StringIO(text, newline="")) if row["ds"] == "i21k"]
        found = {row["filename"]: float(row["final_val"]) for row in rows}
        if not all(re.fullmatch(r"[\w.-]+", filename) and math.isfinite(value) for filename, value in found.items()):
            raise ValueError("a name that is no file's, or an accuracy that is no number")
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as e:
        raise UserError(
            f"{index} is not AugReg's index, with columns ds, filename and final_val ({printable(e)}): fetch it again\n"
            "  curl -O https://storage.googleapis.com/vit_models/augreg/index.csv"
        ) from e
    return found


def _architecture(filename: str) -> str:
    return filename.split("-")[0]


def _adapt_positions(loaded: dict, wanted: dict, description: Description, grid: Grid | None) -> None:
    """Changes `loaded` in place: its tokens in front and position embeddings become those that `wanted` has room for."""
    old, new = np.asarray(loaded[POSITIONS]), wanted[POSITIONS]
    if old.ndim != 3 or old.shape[-1] != new.shape[-1]:
        return  # another width: the -/+ list will say so
    in_file, in_model = ([name for name in _PREFIX if name in params] for params in (loaded, wanted))
    patches = old[:, len(in_file) :]
    slots = {name: new[:, i : i + 1] for i, name in enumerate(in_model)}
    slots |= {name: old[:, i : i + 1] for i, name in enumerate(in_file)}
    for name in _PREFIX:
        if name not in wanted:
            loaded.pop(name, None)
        elif name not in loaded:
            loaded[name] = np.asarray(wanted[name])
    count, first = patches.shape[1], len(in_model)
    grid = tuple(grid or _square(new.shape[1] - first))
    same = grid[0] * grid[1] == count  # an unknown grid that is not square is taken for the model's own, if it fits
    old_grid = tuple(description.grid or (grid if same else _square(count)))
    if old_grid[0] * old_grid[1] != count:
        raise UserError(f"{count} position embeddings of patches do not fit the grid of {old_grid[0]}x{old_grid[1]}")
    table = np.concatenate([*(np.asarray(slots[name], old.dtype) for name in in_model), patches], axis=1)
    if old_grid != grid:
        rule = description.resize
        log.info("position embeddings: %dx%d → %dx%d, %s", *old_grid, *grid, rule)
        table = interpolate_posembed(
            table, new.shape[1], bool(first), old_grid=old_grid, grid=grid, num_prefix=first, rule=rule
        )
    loaded[POSITIONS] = table


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
