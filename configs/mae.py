"""Trains a ViT without labels to draw what is hidden of an image, as a masked autoencoder (https://arxiv.org/abs/2111.06377).

    python -m vit_jax.main --workdir=runs/mae --config=configs/mae.py:micro4,digit_canvas
    python -m vit_jax.main --workdir=runs/mae_b16 --config=configs/mae.py:b16,imagenet2012

`:MODEL,DATASET` is a plain ViT by its short name. Of imagenet2012 these are the published settings: 1,600 epochs in batches of
4,096, for many accelerators. Published after fine-tuning: b16 83.6, l16 85.9, h14 86.9 % (the paper, table 3). Not measured
here. Other datasets are taken as small images with patches of 4x4 pixels, `pp.crop` being their size.
"""

import ml_collections

from configs import common, models

DECODERS = {"b16": (512, 8, 16), "l16": (512, 8, 16), "h14": (512, 8, 16)}  # width, blocks, heads


def get_config(arg: str = "micro4,digit_canvas") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET."""
    model, _, dataset = arg.partition(",")
    config = common.with_dataset(common.get_config(), dataset or "digit_canvas")
    models.use(config, model)
    config.model_type = "MAE"
    for name in ("head_bias_init", "representation_size"):
        del config.model[name]
    config.model.model_name = f"mae_{model}"
    config.model.transformer.update({"activation": "gelu", "dropout_rate": 0.0})
    width, blocks, heads = DECODERS.get(model, (48, 2, 4))
    config.model.decoder = {"width": width, "num_layers": blocks, "num_heads": heads, "mlp_dim": 4 * width}
    config.task = ml_collections.ConfigDict({"type": "reconstruct", "hidden": 0.75, "normalized": True})
    config.pretrained_dir = ""
    config.optimizer, config.optimizer_options, config.optim_dtype = "adamw", {"b2": 0.95}, "float32"
    config.weight_decay = 0.05
    config.grad_norm_clip = 0.0
    common.use_torchvision_crops(config)
    config.pp.area = (0.2, 1.0)
    config.accum_steps = 1
    if dataset == "imagenet2012":
        common.use_imagenet(config, train="train")
        config.pp.update({"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)})
        config.batch, config.base_lr, config.dtype = 4096, 1.5e-4 * 4096 / 256, "bfloat16"
        config.warmup_steps, config.total_steps = common.steps(config, 40), common.steps(config, 1_600)
        return config
    config.model.patches.size = (4, 4)
    config.pp.update(
        {"crop": 16 if config.dataset.startswith("digits") else 32, "flip": not config.dataset.startswith("digit")}
    )
    config.pp.area = (0.5, 1.0)
    config.batch, config.batch_eval, config.base_lr = 128, 256, 2e-3
    config.warmup_steps, config.total_steps, config.eval_every, config.progress_every = 100, 1_000, 500, 20
    return config
