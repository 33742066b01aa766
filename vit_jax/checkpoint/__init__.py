"""Parameter files: read them, write them, fit them to a new task."""

from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.export import write_checkpoint
from vit_jax.checkpoint.fit import augreg_filename, check_fit, interpolate_posembed, load_pretrained
from vit_jax.checkpoint.npz import load, save
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.opening import open_checkpoint, open_with_head

__all__ = [
    "Description",
    "Opened",
    "augreg_filename",
    "check_fit",
    "interpolate_posembed",
    "load",
    "load_pretrained",
    "open_checkpoint",
    "open_with_head",
    "save",
    "write_checkpoint",
]
