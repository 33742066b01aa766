"""A checkpoint that has been read, whatever it was: parameters under our names, and a description of the model."""

from dataclasses import dataclass
from pathlib import Path

from flax.traverse_util import unflatten_dict

from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.npz import Params
from vit_jax.checkpoint.rules import Flat


@dataclass(frozen=True)
class Opened:
    """A checkpoint under our names.

    Attributes:
      path: the local file or folder.
      family: what it was.
      flat: our flat names and arrays, `extras/…` (which no model here uses) included.
      description: of the model, as in `model.json`.
    """

    path: Path
    family: str
    flat: Flat
    description: Description

    @property
    def params(self) -> Params:
        """The model's parameters, nested."""
        return unflatten_dict({n: x for n, x in self.flat.items() if not n.startswith("extras/")}, sep="/")
