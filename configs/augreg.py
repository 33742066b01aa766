"""Fine-tunes one of the 50,000 checkpoints of "How to train your ViT?" (https://arxiv.org/abs/2106.10270).

    python -m vit_jax.main --workdir=runs/r_ti --config=configs/augreg.py:R_Ti_16 --config.pretrained_dir=DIR \
        --config.dataset=oxford_iiit_pet --config.base_lr=0.01

`:NAME` is an architecture (the best ImageNet-21k checkpoint is looked up in DIR/index.csv) or the name of a file in DIR.
Both come from gs://vit_models/augreg. 500 steps of batch 512 at 384 px: minutes on 8 TPU v3 cores.

Published for ImageNet at 384 px after longer fine-tuning: L/16 85.59, B/16 85.49, S/16 83.73, R50+L/32 85.99,
R26+S/32 83.85, Ti/16 78.22, B/32 83.59, S/32 79.58, R+Ti/16 75.40 % (google-research/vision_transformer).
"""

import ml_collections

from configs import common, models
from vit_jax.errors import unknown
from vit_jax.models import zoo


def get_config(model_or_filename: str = "Ti_16") -> ml_collections.ConfigDict:
    """`model_or_filename` as above; --config.dataset is to be given."""
    name = model_or_filename.split("-")[0]
    if name not in models.AUGREG_CONFIGS:
        raise unknown("AugReg model", name, models.AUGREG_CONFIGS)
    config = common.get_config()
    config.pretrained_dir = "gs://vit_models/augreg"
    config.model_or_filename = model_or_filename
    models.use(config, zoo.augreg_to_model_name(name))
    config.model.transformer.dropout_rate = 0.0
    config.base_lr = 0.03
    config.total_steps = 500
    config.warmup_steps = 100
    config.pp.resize = 448
    config.pp.crop = 384
    return config
