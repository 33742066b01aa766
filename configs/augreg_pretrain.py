"""Trains any model of the grid of "How to train your ViT?" from nothing (https://arxiv.org/abs/2106.10270).

    python -m vit_jax.main --workdir=runs/augreg \
        --config=configs/augreg_pretrain.py:S_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.03-do_0.0-sd_0.0

`:NAME` is that of a published checkpoint, which says how it was trained: architecture, ImageNet-1k or -21k, epochs (300; 30
too on i21k), rate, augmentation (none, light1, light2, medium1, medium2, strong1, strong2), weight decay (0.1 or 0.03),
dropout and stochastic depth (0.0 or 0.1 both). Batches of 4,096 at 224 px, for a TPU pod slice or many GPUs. The tfds
dataset imagenet21k is not public: see configs/vit_i21k.py for a folder.

Published, i21k for 300 epochs and then ImageNet at 384 px (configs/augreg.py): 85.49 % for
B_16-…-aug_medium1-wd_0.1-do_0.0-sd_0.0, 83.73 % for S_16-…-aug_light1-wd_0.03-do_0.0-sd_0.0, and others there
(google-research/vision_transformer). Not measured here.
"""

import re

import ml_collections

from configs import common, models
from vit_jax.errors import UserError, unknown
from vit_jax.models import zoo

AUGMENTATIONS = {  # alpha of Mixup, (layers, magnitude) of RandAugment
    "none": (0.0, ()),
    "light1": (0.0, (2, 0)),  # operations without a magnitude, such as Equalize, act all the same
    "light2": (0.2, (2, 10)),
    "medium1": (0.2, (2, 15)),
    "medium2": (0.5, (2, 15)),
    "strong1": (0.5, (2, 20)),
    "strong2": (0.8, (2, 20)),
}
_NAME = re.compile(r"(\w+)-(i1k|i21k)-(\d+)ep-lr_([\d.]+)-aug_(\w+)-wd_([\d.]+)-do_([\d.]+)-sd_([\d.]+)")
_EXAMPLE = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"


def get_config(name: str = _EXAMPLE) -> ml_collections.ConfigDict:
    """`name` as above."""
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(f"{name!r} is no name of an AugReg model, such as {_EXAMPLE}")
    model, data, epochs, lr, augmentation, weight_decay, dropout, stochastic_depth = match.groups()
    if model not in models.AUGREG_CONFIGS:
        raise unknown("AugReg model", model, models.AUGREG_CONFIGS)
    config = common.get_config()
    models.use(config, zoo.augreg_to_model_name(model))
    config.model.transformer.dropout_rate = float(dropout)
    config.model.transformer.stochastic_depth = float(stochastic_depth)
    common.use_imagenet(config)
    if data == "i21k":
        use_imagenet21k(config)
    use_augmentation(config, augmentation)
    config.base_lr = float(lr)
    config.weight_decay = float(weight_decay)  # times the rate, there as here
    use_optimization(config, epochs=int(epochs))
    return config


def use_optimization(config: ml_collections.ConfigDict, *, epochs: int) -> None:
    """Batch, optimiser and schedule of all models in the paper."""
    config.batch = 4096
    config.optimizer = "adamw"
    config.warmup_steps = 10_000
    config.total_steps = common.steps(config, epochs)


def use_augmentation(config: ml_collections.ConfigDict, name: str) -> None:
    """One of `AUGMENTATIONS`, beside the Inception crop and flips that all have."""
    if name not in AUGMENTATIONS:
        raise unknown("augmentation", name, AUGMENTATIONS)
    config.augment.mixup, config.augment.randaug = AUGMENTATIONS[name]


def use_imagenet21k(config: ml_collections.ConfigDict) -> None:
    """The splits of big_vision, with the sigmoid loss and a head that starts by denying every one of 21,843 classes."""
    config.dataset = "imagenet21k"
    config.pp.update({"train": "full[51200:]", "test": "full[:25600]"})
    config.evaluators = {"minival": {"type": "classify", "split": "full[25600:51200]"}}
    config.loss = "sigmoid"
    config.model.head_bias_init = -10.0
