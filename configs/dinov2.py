"""Trains a ViT on images without labels, as DINOv2 does (https://arxiv.org/abs/2304.07193).

    python -m vit_jax.main --workdir=runs/digits --config=configs/dinov2.py:micro4,digits
    python -m vit_jax.main --workdir=runs/mine --config=configs/dinov2.py:photos,FOLDER --config.pretrained=FILE
    python -m vit_jax.main --workdir=runs/dino --config=configs/dinov2.py:vitl16_short

`:MODEL,DATASET` is for small images, with patches of 4x4 pixels; what `micro4` reaches on `digits` stands in
docs/self_supervision.md.

`:photos,FOLDER` takes every image below a folder, however sorted, and goes on from the ViT in `--config.pretrained`: DINOv2's,
AugReg's or any other with a class token. Nobody has measured it here.

`:vitl16_short` is the published recipe for ImageNet-1k: 100 epochs of 1,250 steps of 2,048 images. Published: 81.6 % by
neighbours, 82.9 % by a linear probe (facebookresearch/dinov2). `:vitg14` is that for 142 million curated images, which nobody
can get: 500 epochs of 1,250 steps; published 83.5 and 86.5 %. `:vits14` and `:vitb14` take the short recipe with smaller
models; the published ones (79.0 and 81.1, 82.1 and 84.5 %) learnt from the large one instead. They need many accelerators, and
none was measured here. Missing here: the rate ends at 0 there at 1e-6, gradients are clipped as a whole, there by module, and
one global view of each image has hidden patches, there half of all.
"""

import math

import ml_collections

from configs import common, models
from vit_jax.data.unlabelled import PREFIX
from vit_jax.errors import UserError, unknown
from vit_jax.tasks import self_distill

EPOCH = 1_250
SIZES = {  # model, patch, batch, epochs, warm-up, rate for 1,024 images, last weight decay, momentum, prototypes, drop path
    "vits14": ("s16", 14, 2048, 100, 10, 4e-3, 0.4, 0.992, 65_536, 0.3),
    "vitb14": ("b16", 14, 2048, 100, 10, 4e-3, 0.4, 0.992, 65_536, 0.3),
    "vitl16_short": ("l16", 16, 2048, 100, 10, 4e-3, 0.4, 0.992, 65_536, 0.3),
    "vitg14": ("g14", 14, 3072, 500, 80, 2e-4, 0.2, 0.994, 131_072, 0.4),
}


def get_config(arg: str = "micro4,digits") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET, photos,FOLDER, or one of `SIZES`."""
    name, _, dataset = arg.partition(",")
    if name == "photos":
        return _photos(dataset)
    if dataset:
        return _small(name, dataset)
    if name not in SIZES:
        raise unknown("recipe of dinov2", name, ["micro4,digits", "photos,FOLDER", *SIZES])
    return _published(name)


def _base() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = ml_collections.ConfigDict({"type": "self_distill", **self_distill.make_task.__kwdefaults__})
    config.pretrained_dir = ""
    config.optimizer, config.optim_dtype = "adamw", "float32"
    config.weight_decay = 0.04
    config.grad_norm_clip = 3.0
    config.accum_steps = 1
    config.ema_decay_end = 1.0
    return config


def _published(name: str) -> ml_collections.ConfigDict:
    model, patch, batch, epochs, warmup, rate, decay, momentum, prototypes, drop = SIZES[name]
    config = _base()
    models.use(config, model)
    config.model.patches.size = (patch, patch)
    config.model.model_name = f"dinov2_{name}"
    transformer = {"activation": "gelu", "layer_scale": True, "dropout_rate": 0.0, "stochastic_depth": drop}
    config.model.transformer.update(transformer | {"stochastic_depth_uniform": True, "stochastic_depth_mode": "subset"})
    common.use_imagenet(config, train="train")
    config.pp.update({"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)})
    config.evaluators = {"knn": {"every": 10 * EPOCH, "k": (10, 20)}}
    config.batch = batch
    config.base_lr = rate * math.sqrt(batch / 1024)
    config.weight_decay_end, config.ema_decay = decay, momentum
    config.total_steps, config.warmup_steps = epochs * EPOCH, warmup * EPOCH
    config.lr_factors = (("backbone/embedding/.*", 0.2),)
    config.dtype = "bfloat16"
    local = 7 * patch if patch == 14 else 6 * patch
    config.task.update({"local_size": local, "prototypes": prototypes, "teacher_temperature_steps": 30 * EPOCH})
    config.task.freeze_last_layer = EPOCH
    if name == "vitg14":
        config.model.hidden_size = 1536
        config.model.transformer.update({"num_heads": 24, "mlp_dim": 4096, "activation": "swiglu"})
        config.task.update({"bottleneck": 384, "ibot_prototypes": 131_072, "ibot_bottleneck": 256})
    else:
        config.layer_decay = 0.9
        config.task.centring = "centre"
    return config


def _photos(folder: str) -> ml_collections.ConfigDict:
    if not folder:
        raise UserError("a folder is missing: --config=dinov2:photos,FOLDER")
    config = _base()
    config.dataset = f"{PREFIX}{folder}"
    config.batch = 32
    config.base_lr = 1e-4
    config.ema_decay = 0.994
    config.total_steps, config.warmup_steps = 2_000, 200
    heads = {"prototypes": 4096, "freeze_last_layer": 100, "teacher_temperature_steps": 600, "local_crops": 4}
    config.task.update(heads | {"teacher_temperature": (0.04, 0.07), "local_size": 112})
    return config


def _small(model: str, dataset: str) -> ml_collections.ConfigDict:
    config = common.with_dataset(_base(), dataset)
    models.use(config, model)
    config.model.patches.size = (4, 4)
    config.model.transformer.update({"activation": "gelu", "layer_scale": True, "layer_scale_init": 1.0})
    plain = dataset.startswith("digits")  # of 8 pixels, and without colours
    config.pp.update({"crop": 16 if plain else 24, "flip": not dataset.startswith("digit")})
    config.batch, config.batch_eval = 128, 256
    config.base_lr, config.weight_decay_end = 2e-3, 0.1
    config.ema_decay = 0.99
    config.total_steps, config.warmup_steps = 600, 60
    config.progress_every, config.eval_every = 20, 150
    config.evaluators = {} if dataset.startswith(PREFIX) else {"knn": {"k": (10,)}}  # which scores by classes
    config.task.update({"local_size": 8 if plain else 12, "local_crops": 2})
    config.task.update({"global_area": (0.5, 1.0), "local_area": (0.3, 0.6) if plain else (0.2, 0.5)})
    config.task.update({"prototypes": 128, "hidden": 256, "bottleneck": 64, "freeze_last_layer": 20})
    config.task.update({"teacher_temperature": (0.04, 0.04), "blur": (0.0,) * 3, "solarize": (0.0 if plain else 0.2,) * 3})
    if plain:
        config.task.update({"jitter_prob": 0.0, "grey_prob": 0.0})
    return config
