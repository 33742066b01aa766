"""A checkpoint that has been read, whatever it was: parameters under our names, and a description of the model."""

import dataclasses
from dataclasses import dataclass, field
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
    flat: Flat = field(repr=False)
    description: Description

    def image_tower(self) -> "Opened":
        """The image tower of two as a model of its own, whose head may have a bias; any other model as it is."""
        if self.description.model_type != "TwoTowers":
            return self
        model = {name: value for name, value in self.description.model["image"].items() if name != "head_bias"}
        fields = {"model_type": "ViT", "model": model, "text": {}, "head": "softmax", "task": {"type": "classify"}}
        return dataclasses.replace(self, flat=self.under("img/"), description=dataclasses.replace(self.description, **fields))

    def under(self, prefix: str) -> Flat:
        """The parameters whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): x for name, x in self.flat.items() if name.startswith(prefix)}

    @property
    def params(self) -> Params:
        """The model's parameters, nested."""
        return unflatten_dict({n: x for n, x in self.flat.items() if not n.startswith("extras/")}, sep="/")
