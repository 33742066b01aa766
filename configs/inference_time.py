"""Measures how many images a second a model classifies, on random weights and images.

    python -m vit_jax.main --workdir=runs/speed --config=configs/inference_time.py --config.model_name=ViT-B_32 \
        --config.batch=8 --config.num_classes=1000 --config.image_size=224
"""

import ml_collections

from vit_jax.files import COMPILED_PROGRAMS


def get_config() -> ml_collections.ConfigDict:
    """`initial_steps` warm-up steps are not counted, `steps` are."""
    config = ml_collections.ConfigDict()
    config.trainer = "inference_time"
    config.model_name = "ViT-B_16"
    config.dtype = "float32"
    config.steps = 30
    config.initial_steps = 10
    config.batch = 8
    config.num_classes = 1000
    config.image_size = 224
    config.tome = 0  # tokens that each block merges with others, see docs/speed.md
    config.compilation_cache = COMPILED_PROGRAMS
    return config
