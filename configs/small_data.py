"""Trains a small ViT from nothing on 1,000 to 50,000 small images.

    python -m vit_jax.main --workdir=runs/small --config=configs/small_data.py:micro4,digits
    python -m vit_jax.main --workdir=runs/cifar --config=configs/small_data.py:ti16,cifar10
    python -m vit_jax.main --workdir=runs/icons --config=configs/small_data.py:micro4,FOLDER --config.pp.crop=24

`:MODEL,DATASET` as in configs/vit.py, but for patches of 4x4 pixels, whatever the model's name says. Images are not to be
enlarged: `pp.crop` is their own size, 32 if not said otherwise.
"""

import ml_collections

from configs import pretrain


def get_config(arg: str = "micro4,digits") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET."""
    config = pretrain.get_config(arg)
    config.model.patches.size = (4, 4)
    if config.dataset.startswith("digits"):
        # They fill their 8 pixels: shifting them by as much as other images would cut strokes off.
        config.pp.update({"crop_method": "random_resized", "area": (0.8, 1.0)})
        return config
    config.pp.update({"crop_method": "simple", "crop": 32})
    config.accum_steps = 1
    if config.dataset.startswith("cifar"):
        config.batch = 128
        config.base_lr = 1e-3
        config.warmup_steps = 2_000
        config.total_steps = 40_000  # 104 epochs
    else:
        config.batch = 64
        config.base_lr = 3e-3
        config.warmup_steps = 50
        config.total_steps = 1_000
    return config
