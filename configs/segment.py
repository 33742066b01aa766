"""Finds the class of every pixel: by default of digits in scenes, from nothing, on two CPU cores.

    python -m vit_jax.main --workdir=runs/masks --config=configs/segment.py:linear
    python -m vit_jax.main --workdir=runs/masks --config=configs/segment.py:linear,FOLDER --config.pretrained=FILE
    python -m vit_jax.predict --model=runs/masks --draw=drawn IMAGE…

`:HEAD,DATASET`, of which HEAD is `linear`, `segmenter` or `eomt`, and DATASET a folder of images and masks or `digit_masks`.
Measured on 500 held-out scenes, seed 0, 2 cores: mIoU 82.5 % with the linear head after 18 minutes of CPU time, 80.0 % with
EoMT after 31.

On images of your own a head is trained on the ViT of FILE: `linear` and `segmenter` leave it as it is, as DINOv2's scores were
taken, `eomt` trains it further, as published, in 2,000 steps of 16 images. See docs/segmentation.md.
"""

import ml_collections

from configs import common
from vit_jax.errors import unknown

HEADS = {
    "linear": ("LinearSegmenter", {"places": 8}),
    "segmenter": ("Segmenter", {"width": 128, "num_heads": 4, "mlp_dim": 256, "places": 8}),
    "eomt": ("EoMT", {"num_queries": 20, "num_blocks": 2, "num_doublings": 2}),
}
ON_PHOTOS = {
    "linear": {"num_layers": 1, "places": 1},
    "segmenter": {"width": 384, "num_heads": 6, "mlp_dim": 1536, "num_layers": 2, "places": 1},
    "eomt": {"num_queries": 100, "num_blocks": 4, "num_doublings": 2},
}
"""The fields of each head, for scenes and for photos."""


def get_config(arg: str = "linear,digit_masks") -> ml_collections.ConfigDict:
    """`arg` is HEAD,DATASET: a key of `HEADS`, and a folder of images and masks, or digit_masks."""
    head, _, dataset = arg.partition(",")
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    config = common.get_config()
    config.task = {"type": "segment", "canvas": (), "stride": 0} | ({"matching": {}} if head == "eomt" else {})
    (_for_scenes if dataset in ("", "digit_masks") else _for_photos)(config, head)
    config.dataset = dataset or "digit_masks"
    return config


def _for_scenes(config: ml_collections.ConfigDict, head: str) -> None:
    common.use_scenes(config)
    config.pp.resize = 64
    config.model_type, fields = HEADS[head]
    config.model = {"body": {"vit": common.scene_vit()}, **fields}
    config.base_lr = 2e-3
    if head == "eomt":
        config.task.matching.points = 256
        config.batch = 16
        config.base_lr = 1e-3


def _for_photos(config: ml_collections.ConfigDict, head: str) -> None:
    config.model_type = HEADS[head][0]
    config.model = {"body": {"vit": {}}, **ON_PHOTOS[head]}  # the ViT is that of --config.pretrained
    config.pp.update({"train": "train", "test": "val", "crop": 448, "crop_method": "random_resized", "area": (0.25, 1.0)})
    config.optimizer = "adamw"
    config.pretrained_dir = ""
    config.accum_steps = 1
    config.batch, config.batch_eval = 16, 16
    config.total_steps, config.warmup_steps = 2_000, 200
    config.eval_every, config.progress_every = 500, 50
    if head == "eomt":
        config.base_lr, config.weight_decay, config.layer_decay = 1e-4, 0.05, 0.8
    else:
        config.base_lr, config.weight_decay = 1e-3, 1e-4
        config.freeze = ("backbone/.*",)
