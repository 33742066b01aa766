"""Trains a ViT on ImageNet-1k from nothing for 300 epochs, with the augmentation that suits its size.

    python -m vit_jax.main --workdir=runs/i1k --config=configs/vit_i1k.py:b16

`:MODEL` or `:MODEL,AUGMENTATION`: ti16, s32, s16, b32, b16 or l16, and one of configs/augreg_pretrain.py's if not the usual
one. Batches of 4,096 at 224 px, for a TPU pod slice or many GPUs.

Published: about 79 % with b16 (google-research/big_vision, configs/vit_i1k.py, after https://arxiv.org/abs/2106.10270, and
issue 7 there). Not measured here.
"""

import ml_collections

from configs import augreg_pretrain, common, models
from vit_jax.errors import unknown

AUGMENTATION = {"ti16": "light1", "s32": "light2", "s16": "medium2", "b32": "medium2", "b16": "medium2", "l16": "medium2"}


def get_config(arg: str = "b16") -> ml_collections.ConfigDict:
    """`arg` is MODEL or MODEL,AUGMENTATION."""
    model, _, augmentation = arg.partition(",")
    if model not in AUGMENTATION:
        raise unknown("model", model, AUGMENTATION)
    config = common.get_config()
    models.use(config, model)
    config.model.representation_size = config.model.hidden_size
    config.model.transformer.dropout_rate = 0.0
    common.use_imagenet(config)
    augreg_pretrain.use_augmentation(config, augmentation or AUGMENTATION[model])
    config.base_lr = 1e-3
    config.weight_decay = 0.1  # here times the rate; big_vision's wd = 1e-4 is not: 1e-4 / 1e-3
    augreg_pretrain.use_optimization(config, epochs=300)
    return config
