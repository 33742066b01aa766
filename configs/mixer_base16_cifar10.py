"""Fine-tunes Mixer-B/16 on CIFAR-10 at 224 px.

    python -m vit_jax.main --workdir=runs/mixer --config=configs/mixer_base16_cifar10.py --config.pretrained_dir=DIR

DIR holds Mixer-B_16.npz from gs://mixer_models/imagenet21k. 10,000 steps of batch 512 on 8 TPU v3 cores.
Published from ImageNet-21k: 96.82 % (google-research/vision_transformer).
"""

import ml_collections

from configs import common, models


def get_config() -> ml_collections.ConfigDict:
    """The recipe takes no argument; a Mixer belongs to the resolution of its checkpoint."""
    config = common.with_dataset(common.get_config(), "cifar10")
    models.use(config, "Mixer-B_16")
    config.pp.crop = 224
    return config
