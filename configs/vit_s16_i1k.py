"""Trains ViT-S/16 on ImageNet-1k from nothing: "Better plain ViT baselines" (https://arxiv.org/abs/2205.01580).

    python -m vit_jax.main --workdir=runs/s16 --config=configs/vit_s16_i1k.py:90

`:EPOCHS` is 90, 150, 300, or any other number. `--config.dataset=FOLDER` reads {train,validation}/{class}/image instead of
the tfds dataset imagenet2012. On few devices raise accum_steps; a batch of another size needs other total_steps.

Published: 76.5 % after 90 epochs, 6 to 7 hours on 8 TPU v3 cores; 78.5 % after 150; 80.0 % after 300, within a day
(the paper and google-research/big_vision, configs/vit_s16_i1k.py). Not measured here.
"""

import ml_collections

from configs import common, models


def get_config(epochs: str = "90") -> ml_collections.ConfigDict:
    """`epochs` as above."""
    config = common.get_config()
    models.use(config, "ViT-S_16-gap-norep")
    config.model.representation_size = config.model.hidden_size
    config.model.position_embedding = "sincos2d"
    common.use_imagenet(config)
    config.augment.randaug = (2, 10)
    config.augment.mixup = 0.2
    config.batch = 1024
    config.optimizer = "adamw"
    config.base_lr = 1e-3
    config.weight_decay = 0.1  # here times the rate; big_vision's wd = 1e-4 is not: 1e-4 / 1e-3
    config.warmup_steps = 10_000
    config.total_steps = common.steps(config, common.number(epochs, int, "the epochs of configs/vit_s16_i1k.py"))
    return config
