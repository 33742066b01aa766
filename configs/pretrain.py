"""Trains from scratch, without any checkpoint: AdamW, warm-up and cosine, weight decay on matrices only.

    python -m vit_jax.main --workdir=runs/scratch --config=configs/pretrain.py:micro4,digits

`:MODEL,DATASET` as in configs/vit.py. `--config.model.…` changes the architecture, `--config.seed` the run.

micro4,digits: 1,000 steps, 97.2 % of the held-out digits (seed 0), within a minute on 2 CPU cores. imagenet2012: 90 epochs
of batch 1,024 at 224 px, for a TPU or several GPUs; its score has not been measured here.
"""

import ml_collections

from configs import common, models


def get_config(arg: str = "micro4,digits") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET."""
    model, _, dataset = arg.partition(",")
    config = common.with_dataset(common.get_config(), dataset or "digits")
    models.use(config, model)
    config.pretrained_dir = ""  # from nothing; None would be a type of its own, which --config.pretrained_dir cannot change
    config.optimizer = "adamw"
    config.optim_dtype = "float32"
    config.base_lr = 1e-3
    config.weight_decay = 0.1
    if config.dataset.startswith("digits"):
        config.base_lr = 3e-3
        config.total_steps = 1_000
        config.pp.area = (0.5, 1.0)
        return config
    config.pp.crop = 224
    if dataset == "imagenet2012":
        config.batch = 1024
        config.warmup_steps = 10_000
        config.total_steps = common.steps(config, epochs=90)
    return config
