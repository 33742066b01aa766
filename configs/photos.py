"""Fine-tunes a published ViT on a folder of photos, on a laptop.

    python -m vit_jax.main --workdir=runs/photos --config=configs/photos.py:path/to/photos --config.pretrained=SOURCE

`:FOLDER` holds {train,test}/{class}/image or {class}/image. SOURCE is a checkpoint of any family (see README.md), which
also tells the architecture; a small one such as AugReg's Ti/16 suits a laptop. 300 steps of batch 32 at 224 px.
With Ti/16 that is 12 minutes on 2 CPU cores (13 images a second, float32). `vit-jax models` lists the published files.

Without any checkpoint: configs/small_data.py:micro4,FOLDER trains a small model from nothing.
"""

import ml_collections

from configs import common


def get_config(folder: str = "") -> ml_collections.ConfigDict:
    """`folder` may also be a dataset's name; --config.pretrained is to be given."""
    config = common.with_dataset(common.get_config(), folder)
    config.pretrained_dir = ""
    config.batch = config.batch_eval = 32
    config.accum_steps = 1
    config.total_steps = 300
    config.warmup_steps = 30
    config.base_lr = 0.01
    config.eval_every = 50
    config.pp.area = (0.25, 1.0)
    return config
