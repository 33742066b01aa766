"""Parameter files: read them, write them, fit them to a new task."""

from vit_jax.checkpoint.adapt import augreg_filename, check_fit, interpolate_posembed, load_pretrained
from vit_jax.checkpoint.npz import load, save

__all__ = ["augreg_filename", "check_fit", "interpolate_posembed", "load", "load_pretrained", "save"]
