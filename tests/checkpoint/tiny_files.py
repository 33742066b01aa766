"""Checkpoint files of a model that is never run: zeros under the names and shapes of a small ViT, and its description."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from tests.models import small
from vit_jax import checkpoint
from vit_jax.checkpoint import describe

FIELDS = {
    "hidden_size": 32,
    "patches": {"size": [8, 8]},
    "num_classes": 3,
    "transformer": {"num_layers": 2, "mlp_dim": 48, "num_heads": 4},
}
DESCRIPTION = describe.Description(
    model_name="mine",
    model_type="ViT",
    model=FIELDS,
    image_size=(24, 24),
    grid=(3, 3),
    mean=(110.0, 120.0, 130.0),
    std=(50.0, 60.0, 70.0),
    class_names=("ape", "bear", "cat"),
)


def write(folder: Path, to: str = "npz", **changes) -> Path:
    """The file of such a model in a layout, in a folder of its own; `changes` are fields of the description."""
    shapes = small.shapes(small.vit(num_classes=3), np.zeros((1, 24, 24, 3), np.float32))
    flat = small.flat(jax.tree.map(lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape), shapes))
    description = dataclasses.replace(DESCRIPTION, **changes)
    opened = checkpoint.Opened(folder / "model.npz", "Google npz", flat, description)
    return checkpoint.write_checkpoint(opened, folder / to, to)
