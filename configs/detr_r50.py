"""Fine-tunes a published DETR on a folder of images with boxes, with the rates and the augmentation of DETR's paper.

    python -m vit_jax.main --workdir=runs/detr --config=configs/detr_r50.py --config.pretrained=detr-r50.pth \
        --config.dataset=FOLDER

`:MODEL` is r50, dc5, r101 or r101_dc5; the file must hold the same one. FOLDER is in COCO's, YOLO's or VOC's layout.
Images are padded to the smallest of five canvases, and so many programs are compiled: see docs/detection.md.
`--config.task.canvases="()"` has one square.
With an ImageNet ResNet of torchvision, timm or transformers as `--config.pretrained` all but the backbone is new.
300 epochs of COCO with 64 images a step are 554,000 steps; fewer classes and images need far fewer.

Published on COCO val2017, AP: r50 42.0, dc5 43.3, r101 43.5, r101_dc5 44.9 (facebookresearch/detr). Nobody has repeated
that with this code.
"""

import ml_collections

from configs import common, models
from vit_jax.errors import unknown

NAMES = {"r50": "DETR-R50", "dc5": "DETR-R50-DC5", "r101": "DETR-R101", "r101_dc5": "DETR-R101-DC5"}


def get_config(arg: str = "r50") -> ml_collections.ConfigDict:
    """`arg` is a key of `NAMES`."""
    if arg not in NAMES:
        raise unknown("model", arg, NAMES)
    config = common.get_config()
    models.use(config, NAMES[arg])
    config.pretrained_dir = ""
    config.dataset = "coco"
    config.task = {"type": "detect", "max_boxes": 100, "crop": 0.5, "short_sides": tuple(range(480, 801, 32))}
    config.task["canvases"] = ((640, 864), (864, 640), (800, 1333), (1333, 800))  # and 1333x1333 for batches of all
    config.pp.update({"train": "train", "test": "val", "crop": 1333, "flip": True})
    config.pp.mean, config.pp.std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    config.optimizer = "adamw"
    config.base_lr = 1e-4
    config.lr_factors = (("backbone/.*", 0.1),)
    config.weight_decay = 1e-4
    config.grad_norm_clip = 0.1
    config.batch = 64
    config.batch_eval = 64
    config.total_steps = 554_000
    config.decay_type, config.decay_steps = "step", (369_000,)  # after 200 of 300 epochs
    config.warmup_steps = 0
    config.eval_every = 10_000
    # without gradient, but weight decay would move them
    config.freeze = (r"backbone/(conv1|layer1_\d+)/.*", r"backbone/(.*/)?bn\w+/.*")
    return config
