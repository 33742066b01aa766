"""Finds objects with DETR's decoder over the feature map of a trained ViT, which stays as it is.

    python -m vit_jax.main --workdir=runs/boxes --config=configs/detect_vit.py:b16,FOLDER --config.pretrained=FILE

`:MODEL,DATASET` names a ViT (see configs/models.py) and a folder in COCO's, YOLO's or VOC's layout, or digit_scenes.
No score was measured.
"""

import ml_collections

from configs import common, models


def get_config(arg: str = "b16,digit_scenes") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET."""
    model, _, dataset = arg.partition(",")
    config = common.get_config()
    models.use(config, model)
    config.model = {"body": {"vit": config.model}, "num_encoder_layers": 0, "num_decoder_layers": 6}
    config.model_type = "DETR"
    config.pretrained_dir = ""
    config.dataset = dataset or "digit_scenes"
    config.task = {"type": "detect", "max_boxes": 100}
    config.pp.update({"train": "train", "test": "test", "crop": 512, "flip": dataset not in ("", "digit_scenes")})
    config.freeze = ("backbone/.*",)
    config.optimizer = "adamw"
    config.base_lr = 1e-4
    config.weight_decay = 1e-4
    config.grad_norm_clip = 0.1
    config.batch = 32
    config.batch_eval = 32
    config.total_steps = 20_000
    config.warmup_steps = 500
    config.eval_every = 2_000
    return config
