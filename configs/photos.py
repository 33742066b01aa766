"""Fits a published ViT to a folder of photos, on a laptop: its head alone in a minute or two, or all of it.

    python -m vit_jax.main --workdir=runs/photos --config=configs/photos.py:path/to/photos,quick --config.pretrained=SOURCE

`:FOLDER` holds {train,test}/{class}/image or {class}/image. SOURCE is a checkpoint of any family (see README.md), which
also tells the architecture; a small one such as AugReg's Ti/16 suits a laptop. `vit-jax models` lists the published files.

`:FOLDER,quick` computes the features of every photo twice, as it is and mirrored, and fits a linear head to those of the last
six blocks: there are no steps. With Ti/16 at 224 px a run with 1,000 photos took 61 s on 2 CPU cores, float32.
`:FOLDER,quick,finetune` then trains all of the model for 100 steps of batch 32, and ends with what scored
best on the held-out photos, be it the head of step 0. `:FOLDER` alone fine-tunes with a new head: 300 steps, 12 minutes with
Ti/16 on 2 CPU cores (13 images a second).

Without any checkpoint: configs/small_data.py:micro4,FOLDER trains a small model from nothing.
"""

import os

import ml_collections

from configs import common
from vit_jax.errors import UserError

QUICK, FINETUNE = ",quick", ",quick,finetune"


def get_config(folder: str = "") -> ml_collections.ConfigDict:
    """`folder` may also be a dataset's name; --config.pretrained is to be given."""
    end = next((end for end in (FINETUNE, QUICK) if folder.endswith(end)), "")
    folder = folder.removesuffix(end)
    before, comma, word = folder.partition(",")
    if comma and os.path.isdir(os.path.expanduser(before)) and not os.path.exists(os.path.expanduser(folder)):
        raise UserError(f"photos:{folder}{end}: {word!r} is not known: use photos:{before}{QUICK} or photos:{before}{FINETUNE}")
    config = common.with_dataset(common.get_config(), folder)
    config.pretrained_dir = ""
    config.batch = config.batch_eval = 32
    config.accum_steps = 1
    config.total_steps = 300
    config.warmup_steps = 30
    config.base_lr = 0.01
    config.eval_every = 50
    config.pp.area = (0.25, 1.0)
    if end:
        config.head_fit.views, config.head_fit.layers = 2, 6
        config.total_steps, config.warmup_steps = 0, 0
        config.batch_eval = 8  # on a CPU features of 32 at once took a tenth to a quarter longer
    if end == FINETUNE:
        config.total_steps, config.warmup_steps, config.eval_every = 100, 10, 25
        config.base_lr = 0.001
        config.pp.area = (0.5, 1.0)
        config.keep_best, config.end_with_best = "accuracy_test", True
    return config
