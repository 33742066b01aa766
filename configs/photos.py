"""Fine-tunes a small AugReg ViT on a folder of photos, on a laptop.

    python -m vit_jax.main --workdir=runs/photos --config=configs/photos.py:path/to/photos --config.pretrained=FILE.npz

`:FOLDER` holds {train,test}/{class}/image or {class}/image. FILE.npz is any published checkpoint of --config.model,
which is ViT-Ti_16 here; `configs/photos.py:MODEL,FOLDER` takes another one. 300 steps of batch 32 at 224 px.
TIME
"""

import ml_collections

from configs import common, models


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg` is FOLDER or MODEL,FOLDER."""
    model, comma, folder = arg.partition(",")
    if not comma:
        model, folder = "ti16", arg
    config = common.with_dataset(common.get_config(), folder)
    models.use(config, model)
    config.pretrained_dir = ""
    config.batch = config.batch_eval = 32
    config.accum_steps = 1
    config.total_steps = 300
    config.warmup_steps = 30
    config.base_lr = 0.01
    config.eval_every = 50
    config.pp.area = (0.25, 1.0)
    return config
