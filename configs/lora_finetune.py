"""Fine-tunes small matrices beside the frozen kernels of a trained ViT: LoRA (https://arxiv.org/abs/2106.09685).

    python -m vit_jax.main --workdir=runs/lora --config=configs/lora_finetune.py:b16,oxford_iiit_pet --config.pretrained=FILE

`:MODEL,DATASET` as in configs/vit.py. `config.lora` says which kernels get LoRA (`targets`, by default those of query and
value) and what is trained itself (`train`, by default the head). For the digits, from a model of another resolution that must
learn to read its input anew, embedding, positions and the scales of the norms are trained too: 4.7 % of micro4's parameters.
"""

import ml_collections

from configs import vit


def get_config(arg: str = "b16,oxford_iiit_pet") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET."""
    config = vit.get_config(arg)
    config.model.transformer.dropout_rate = 0.0
    config.lora.update({"rank": 8, "alpha": 16.0})
    config.optimizer = "adamw"
    config.optim_dtype = "float32"
    config.base_lr = 1e-3
    if config.dataset.startswith("digits"):
        config.base_lr = 2e-2
        config.lora.targets = (".*/value/kernel",)
        config.lora.train = ("head/.*", "embedding/.*", ".*/pos_embedding", ".*/scale")
    return config
