"""Fine-tunes a ViT from a published checkpoint, as in the ViT paper: SGD with momentum, no weight decay, 384 px.

    python -m vit_jax.main --workdir=runs/vit --config=configs/vit.py:b16,cifar10 --config.pretrained_dir=DIR

`:MODEL,DATASET` names a model (see configs/models.py) and cifar10, cifar100, imagenet2012, digits, a folder of photos or
any tfds dataset. DIR holds {model_name}.npz from gs://vit_models/imagenet21k; `--config.pretrained=FILE` names any file.

Published with ViT-B_16 from ImageNet-21k: cifar10 99.02 %, cifar100 92.06 % (google-research/vision_transformer), on
8 TPU v3 cores or GPUs of 16 GB. On one small GPU raise accum_steps or lower batch; batch and base_lr go together.
"""

import ml_collections

from configs import common, models


def get_config(arg: str = "b16,cifar10") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET."""
    model, _, dataset = arg.partition(",")
    config = common.with_dataset(common.get_config(), dataset or "cifar10")
    models.use(config, model)
    if config.model.model_name == "ViT-B_16" and config.dataset == "cifar10":
        config.base_lr = 0.01
    return config
