"""What other trainers put around a model: prefixes, several models in one file, heads of losses, flax's files."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict

from vit_jax.checkpoint.rules import Flat
from vit_jax.errors import UserError, listed, printable
from vit_jax.files import read_regular
from vit_jax.finite import check_parameters

log = logging.getLogger("vit_jax")

FLAX = re.compile(r"checkpoint_\d+")  # what flax.training.checkpoints.save_checkpoint calls its files
_MOST_BYTES = 1 << 36
# A wrapper tells nothing; of models in one file one is taken, in this order: a teacher is what DINO publishes.
_WRAPPERS = ("_orig_mod.", "module.", "model.", "backbone.")
_MODELS = ("teacher.", "", "ema.", "model_ema.", "ema_model.", "state_dict_ema.", "student.")
# Heads of losses, and decoders of pretraining.
_LEFT_OUT = re.compile(r"(dino_head|ibot_head|head\.(mlp|last_layer)|decoder\w*|projector|predictor)\.|decoder_pos_embed$")


def unwrap(arrays: Flat, path: Path) -> Flat:
    """Names without the prefixes of other trainers; of several models in a file one, and without heads of losses.

    What is taken and what is left is logged, as a warning where another model is left. Raises UserError where one name
    would stand for two arrays.
    """
    models: dict[str, dict[str, list[str]]] = {}
    for name in arrays:
        model, bare = _split(name)
        models.setdefault(model, {}).setdefault(bare, []).append(name)
    taken = next((m for m in _MODELS if m in models and any("." in bare or "/" in bare for bare in models[m])), "")
    names = models.get(taken, {})
    if double := next((found for found in names.values() if len(found) > 1), None):
        first, second = map(printable, double[:2])
        raise UserError(
            f"{path} holds both {first} and {second}, and only one can be meant: load it, keep the entries of one of the "
            "two, and save them again"
        )
    kept = {bare: found[0] for bare, found in names.items() if not _LEFT_OUT.match(bare)}
    left = sorted(set(arrays) - set(kept.values()))
    if left:
        what = f"the parameters under {taken!r}" if taken else f"{len(kept)} parameters"
        others = any("." in bare and not _LEFT_OUT.match(bare) for model in models.keys() - {taken} for bare in models[model])
        say = log.warning if others else log.info
        say("opened   %s: %s are taken, %d others are left (%s)", path, what, len(left), listed(left))
    return {bare: arrays[name] for bare, name in kept.items()}


def _split(name: str) -> tuple[str, str]:
    """(which of `_MODELS`, the name without wrappers)."""
    model, before = "", None
    while name != before:
        before = name
        for prefix in (*_WRAPPERS, *filter(None, _MODELS)):
            if name.startswith(prefix):
                model = prefix if prefix in _MODELS else model
                name = name.removeprefix(prefix)
    return model, name


def read_flax(path: Path) -> Flat:
    """The parameters in a `checkpoint_N` of flax (msgpack), as the original code of Google's ViT leaves them in its workdir.

    Raises UserError for a file that is damaged, or in which no model is found.
    """
    try:
        tree = serialization.msgpack_restore(read_regular(path, _MOST_BYTES))
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except Exception as e:  # damaged bytes raise nearly everything in msgpack and NumPy
        raise UserError(f"{path} is no checkpoint of flax, or damaged: {printable(e)}") from e
    for way in (("0",), ("0", "target"), ("optimizer", "target"), ("target",), ("params",), ()):
        found = tree
        for key in way:
            found = found.get(key) if isinstance(found, dict) else None
        flat = _arrays(found)
        if any(name.split("/")[0] in ("Transformer", "stem") for name in flat):
            where = "/".join(way) or "the file"
            log.info("opened   %s: the parameters under %s are taken, the optimiser's state is left", path, where)
            check_parameters(flat, str(path))
            return flat
    raise UserError(f"{path} is a checkpoint of flax without the parameters of a ViT or Mixer: it holds {listed(list(tree))}")


def _arrays(tree: Any) -> Flat:
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        return {}
    flat = flatten_dict(tree, sep="/")
    return {name: np.asarray(x) for name, x in flat.items() if isinstance(x, np.ndarray) and x.dtype.kind in "fV"}
