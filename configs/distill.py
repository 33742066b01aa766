"""Distils a classifier into a smaller ViT, by "patient and consistent" function matching or as DeiT did.

    python -m vit_jax.main --workdir=runs/student --config=configs/distill.py:function_matching,s16,oxford_iiit_pet \
        --config.distill.teacher=runs/teacher
    python -m vit_jax.main --workdir=runs/deit --config=configs/distill.py:deit,b16 --config.distill.teacher=TEACHER

TEACHER is anything that `--config.pretrained` may name, with a head for the classes of the dataset.

`:function_matching,MODEL,DATASET` (https://arxiv.org/abs/2106.05237): teacher and student see the same crops, all of them
mixed, for very many epochs: 1,200 of imagenet2012 at 224 px, 3,000 of oxford_iiit_pet and 100,000 of oxford_flowers102 at
128 px (20,000 and 200,000 steps of 512). Published with ResNets, which are no models here: ResNet-50 82.8 % on ImageNet after
9,600 epochs, from a ResNet-152x2 of 83.0 % (google-research/big_vision, configs/proj/distill). Temperatures, epochs, mixing
and, for the small datasets, rates are from there; the rate for ImageNet is that of configs/vit_i1k.py, since 0.03 is for
ResNets. No score is published for ViTs, and none was measured here.

`:deit,MODEL` (https://arxiv.org/abs/2012.12877): a distillation token learns the teacher's answers, 300 epochs of
imagenet2012 in batches of 1,024. Published: ti16 74.5, s16 81.2, b16 83.4 %, from a RegNetY-16GF of 82.9 %, which is no model
here (facebookresearch/deit, README_deit.md, and the paper). Not measured here. Missing here: repeated augmentation, and
timm's rand-m9-mstd0.5-inc1, for which RandAugment (2, 9) stands; the rate falls to 0, there to 1e-5.
"""

import ml_collections

from configs import common, models
from vit_jax.errors import unknown

PATIENCE = {  # epochs, temperature, rate, and big_vision's weight decay, which is not times the rate
    "imagenet2012": (1_200, 1.0, 1e-3, 1e-4),
    "oxford_flowers102": (100_000, 1.0, 1e-3, 1e-4),
    "oxford_iiit_pet": (3_000, 10.0, 3e-3, 3e-4),
}


def get_config(arg: str = "function_matching,s16,imagenet2012") -> ml_collections.ConfigDict:
    """`arg` is KIND,MODEL or KIND,MODEL,DATASET; --config.distill.teacher is to be given."""
    kind, model, dataset = (*arg.split(","), "", "")[:3]
    recipes = {"function_matching": _match_functions, "deit": _deit}
    if kind not in recipes:
        raise unknown("kind of distillation", kind, recipes)
    config = common.get_config()
    models.use(config, model)
    config.model.transformer.dropout_rate = 0.0
    config.optimizer = "adamw"
    recipes[kind](config, dataset or "imagenet2012")
    return config


def _match_functions(config: ml_collections.ConfigDict, dataset: str) -> None:
    if dataset not in PATIENCE:
        raise unknown("dataset for function matching", dataset, PATIENCE)
    epochs, temperature, lr, weight_decay = PATIENCE[dataset]
    common.use_imagenet(config, train="train[:98%]")
    config.batch = 4096
    config.warmup_steps = 5_000
    if dataset != "imagenet2012":
        train, val = ("train[:90%]", "train[90%:]") if dataset == "oxford_iiit_pet" else ("train", "validation")
        config.dataset = dataset
        config.pp.update({"train": train, "test": "test", "crop": 128, "eval_resize": 160})
        config.evaluators = {"val": {"type": "classify", "split": val}}
        config.batch = 512
        config.warmup_steps = 1_500
    config.augment.mixup = 1.0
    config.distill.update({"kind": "function_matching", "temperature": temperature})
    config.base_lr = lr
    config.weight_decay = weight_decay / lr
    config.total_steps = common.steps(config, epochs)


def _deit(config: ml_collections.ConfigDict, dataset: str) -> None:
    if dataset != "imagenet2012":
        raise unknown("dataset for DeiT", dataset, ["imagenet2012"])
    common.use_imagenet(config, train="train")
    config.model.classifier = "distilled"
    config.model.transformer.update({"activation": "gelu", "stochastic_depth": 0.1})
    common.use_torchvision_crops(config)
    config.augment.update({"randaug": (2, 9), "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0})
    config.label_smoothing = 0.1
    config.distill.update({"kind": "hard", "alpha": 0.5})
    config.grad_norm_clip = 0.0
    config.optim_dtype = "float32"
    config.batch = 1024
    config.base_lr = 1e-3  # 5e-4 for every 512 examples
    config.weight_decay = 0.05
    config.warmup_steps = common.steps(config, 5)
    config.total_steps = common.steps(config, 300)
