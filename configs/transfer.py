"""Fine-tunes AugReg's B/32, or any other checkpoint, with what big_vision found best for each dataset.

    python -m vit_jax.main --workdir=runs/pets --config=configs/transfer.py:oxford_iiit_pet
    python -m vit_jax.main --workdir=runs/pets_s16 --config=configs/transfer.py:oxford_iiit_pet,S_16

`:DATASET` is cifar10, cifar100, imagenet2012, oxford_flowers102 or oxford_iiit_pet. `:DATASET,NAME` starts from another file of
configs/augreg.py; a checkpoint from elsewhere is `--config.pretrained=FILE --config.model.…`. SGD with momentum, batches of
512 at 384 px: 500 steps on the pets and flowers, 10,000 on the CIFARs, 20,000 on ImageNet.

Published with B/32 from ImageNet-21k, the mean of 5 runs: imagenet2012 83.27, cifar10 98.55, cifar100 91.35, oxford_iiit_pet
93.78, oxford_flowers102 99.43 % (google-research/big_vision, configs/transfer.py). Not measured here.
"""

import ml_collections

from configs import augreg
from vit_jax.errors import unknown

PRESETS = {  # train, held out for choices, test; steps, warm-up, rate; whether crops are random resized windows
    "cifar10": ("train[:98%]", "train[98%:]", "test", 10_000, 500, 0.003, False),
    "cifar100": ("train[:98%]", "train[98%:]", "test", 10_000, 500, 0.01, False),
    "imagenet2012": ("train[:99%]", "train[99%:]", "validation", 20_000, 500, 0.03, True),
    "oxford_flowers102": ("train[:90%]", "train[90%:]", "test", 500, 100, 0.003, True),
    "oxford_iiit_pet": ("train[:90%]", "train[90%:]", "test", 500, 100, 0.003, True),
}


def get_config(arg: str = "cifar10") -> ml_collections.ConfigDict:
    """`arg` is DATASET or DATASET,NAME."""
    dataset, _, name = arg.partition(",")
    if dataset not in PRESETS:
        raise unknown("dataset", dataset, PRESETS)
    train, val, test, steps, warmup_steps, lr, resized_windows = PRESETS[dataset]
    config = augreg.get_config(name or "B_32")
    config.dataset = dataset
    config.pp.update({"train": train, "test": test, "crop": 384, "eval_resize": 448})
    # Else windows of the image at 448 px. CIFAR's are square, so that keeping the shape, as big_vision does, is the same.
    config.pp.resize = None if resized_windows else 448
    config.evaluators = {"val": {"type": "classify", "split": val}}
    config.base_lr = lr
    config.total_steps = steps
    config.warmup_steps = warmup_steps
    return config
