"""Trains from scratch, without any checkpoint: AdamW, warm-up and cosine, weight decay on matrices only.

    python -m vit_jax.main --workdir=runs/scratch --config=configs/pretrain.py:micro4,digits

`:MODEL,DATASET` as in configs/vit.py. `--config.model.…` changes the architecture, `--config.seed` the run.
SCORE
"""

import ml_collections

from configs import common, models


def get_config(arg: str = "micro4,digits") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET."""
    model, _, dataset = arg.partition(",")
    config = common.with_dataset(common.get_config(), dataset or "digits")
    config.model = models.by_name(model)
    config.model_type = "Mixer" if "Mixer" in config.model.model_name else "ViT"
    config.pretrained_dir = None
    config.optimizer = "adamw"
    config.optim_dtype = "float32"
    config.base_lr = 1e-3
    config.weight_decay = 0.1
    if dataset in ("imagenet2012", "cifar10", "cifar100"):
        config.pp.crop = 224
        config.batch = 1024
        config.warmup_steps = 10_000
        config.total_steps = 93_000  # 75 epochs of ImageNet
    return config
