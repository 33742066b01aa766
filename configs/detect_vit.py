"""Finds objects with DETR's decoder over the feature map of a trained ViT, which stays as it is.

    python -m vit_jax.main --workdir=runs/boxes --config=configs/detect_vit.py:b16,FOLDER --config.pretrained=FILE

`:MODEL,DATASET` names a ViT (see configs/models.py) and a folder in COCO's, YOLO's or VOC's layout. No score was measured.

`:scenes` finds digits in scenes of 64 px, with the ViT that configs/segment.py has trained in runs/masks for their masks:

    python -m vit_jax.main --workdir=runs/boxes --config=configs/detect_vit.py:scenes --config.pretrained=runs/masks

AP50 84.9 %, AP 49.8 % on 500 test scenes (seed 0, 11 minutes of CPU time on 2 cores, after the 18 of runs/masks, whose mIoU was
82.0 %), and AP50 75.6 % after 1,500 of the 2,500 steps. Some digits are found twice.
"""

import ml_collections

from configs import common, detect, models


def get_config(arg: str = "scenes") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET or scenes."""
    if arg == "scenes":
        return _scenes()
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


def _scenes() -> ml_collections.ConfigDict:
    config = detect.get_config()
    config.model_type = "DETR"
    decoder = {"num_queries": 25, "width": 128, "num_heads": 4, "mlp_dim": 256, "num_decoder_layers": 4, "dropout_rate": 0.0}
    config.model = {"body": {"vit": common.scene_vit()}, "num_encoder_layers": 0, **decoder}
    config.freeze = ("backbone/.*",)
    config.base_lr = 5e-4
    return config
