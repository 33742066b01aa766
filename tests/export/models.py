"""Tiny models of every family with random parameters, as folders that any command opens."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.models import small
from vit_jax import checkpoint, models
from vit_jax.checkpoint import describe

TRANSFORMER = {"num_layers": 1, "mlp_dim": 40, "num_heads": 2}
VIT = {"hidden_size": 32, "patches": {"size": [4, 4]}, "transformer": TRANSFORMER, "num_classes": 3}
DINO = VIT | {
    "num_classes": None,
    "num_registers": 2,
    "transformer": TRANSFORMER | {"activation": "gelu", "layer_scale": True, "norm_eps": 1e-6},
}
HYBRID = VIT | {"resnet": {"num_layers": [], "width_factor": 0.5}, "patches": {"size": [1, 2]}}
MIXER = {
    "hidden_dim": 32,
    "patches": {"size": [4, 4]},
    "num_blocks": 1,
    "tokens_mlp_dim": 24,
    "channels_mlp_dim": 40,
    "num_classes": 3,
}
FAMILIES = {"vit": ("ViT", VIT), "dinov2": ("ViT", DINO), "hybrid": ("ViT", HYBRID), "mixer": ("Mixer", MIXER)}
SIZE = (12, 16)


def write(folder: Path, kind: str, fields: dict[str, Any], size: tuple[int, int] = SIZE) -> Path:
    """A workdir with model.npz and model.json."""
    images = np.zeros((1, *size, 3), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save(small.random_params(models.build(kind, fields), images), folder / "model.npz")
    description = describe.Description(
        model_type=kind,
        model=fields,
        image_size=size,
        grid=tuple(models.architecture_of(kind).grid(fields, size)),
        mean=(120.0, 115.0, 100.0),
        std=(60.0, 57.0, 59.0),
        class_names=("cat", "dog", "émeu", *map(str, range(3, fields["num_classes"] or 0)))[: fields["num_classes"] or 0],
        preprocessing={"resize_to": max(size) + 4, "interpolation": "bicubic", "antialias": True},
    )
    describe.write(folder / "model.npz", description)
    return folder
