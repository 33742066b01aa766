"""Trains a ViT on ImageNet-21k from nothing for 300 epochs, to be fine-tuned with configs/vit.py or configs/transfer.py.

    python -m vit_jax.main --workdir=runs/i21k --config=configs/vit_i21k.py:b16

`:MODEL` is ti16, s32, s16, b32, b16 or l16. 14.1 million images of 21,843 classes in batches of 4,096 at 224 px, a million
steps: for a TPU pod. The dataset is big_vision's own preparation for tfds, which is not public. To read a folder of
{class}/image instead:
    --config.dataset=FOLDER --config.pp.train=train --config.pp.test=test --config.evaluators.minival.split=test

From google-research/big_vision, configs/vit_i21k.py, which publishes no score for these models with mean pooling; those of
the same grid with a class token are in configs/augreg_pretrain.py. Not measured here.
"""

import ml_collections

from configs import augreg_pretrain, common, models
from vit_jax.errors import unknown

AUGMENTATION = {"ti16": "none", "s32": "none", "s16": "light1", "b32": "light2", "b16": "light2", "l16": "medium2"}


def get_config(model: str = "b16") -> ml_collections.ConfigDict:
    """`model` as above."""
    if model not in AUGMENTATION:
        raise unknown("model", model, AUGMENTATION)
    config = common.get_config()
    models.use(config, model)
    config.model.classifier = "gap"
    config.model.transformer.dropout_rate = 0.0
    common.use_imagenet(config)
    augreg_pretrain.use_imagenet21k(config)
    augreg_pretrain.use_augmentation(config, AUGMENTATION[model])
    config.base_lr = 1e-3
    config.weight_decay = 0.1  # here times the rate; big_vision's wd = 1e-4 is not: 1e-4 / 1e-3
    augreg_pretrain.use_optimization(config, epochs=300)
    return config
