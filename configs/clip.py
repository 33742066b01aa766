"""Trains both towers from nothing to find each other within the batch (CLIP, https://arxiv.org/abs/2103.00020).

    python -m vit_jax.main --workdir=runs/clip --config=configs/clip.py:b32,FOLDER --config.task.vocab=VOCABULARY

`:MODEL,DATASET`: b32, b16 or l14, and a folder with captions or tar shards, such as 'laion/{00000..41455}.tar'. VOCABULARY is
OpenAI's bpe_simple_vocab_16e6.txt.gz, or a tokenizer.json. Batches of 32,768 at 224 px, for a hundred GPUs;
`config.accum_steps` computes such a batch in parts with the same gradient.

Published: 62.9 % zero-shot on ImageNet with b32 after 32 epochs of LAION-400M, 67.1 % with b16 (mlfoundations/open_clip). Not
measured here. As there, the temperature stops at 100.
"""

import ml_collections

from configs import common, models
from vit_jax.errors import unknown

TEXT = {
    "b32": {"width": 512, "num_heads": 8, "mlp_dim": 2048},
    "b16": {"width": 512, "num_heads": 8, "mlp_dim": 2048},
    "l14": {"width": 768, "num_heads": 12, "mlp_dim": 3072},
}


def get_config(arg: str = "b32,shards") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET."""
    model, _, dataset = arg.partition(",")
    if model not in TEXT:
        raise unknown("model", model, TEXT)
    config = common.get_config()
    name = {"l14": "l16"}.get(model, model)
    models.use(config, name)
    image = config.model
    if model == "l14":
        image.update({"model_name": "ViT-L_14", "patches": {"size": (14, 14)}})
    image.update({"patch_bias": False, "head_bias": False})
    image.transformer.update({"dropout_rate": 0.0, "norm_pre": True, "activation": "gelu", "norm_eps": 1e-5})
    text = {"num_layers": 12, "vocab_size": 49_408, "causal": True, "pool": "end", "head_bias": False, **TEXT[model]}
    text |= {"activation": "gelu", "norm_eps": 1e-5}
    config.model_type = "TwoTowers"
    config.model = {"image": image, "text": text, "out_dim": TEXT[model]["width"], "temperature_init": 1 / 0.07}
    config.model.temperature_max = 100.0
    config.pretrained = {"img": "", "txt": ""}
    common.use_captions(config, dataset)
    config.pp.update({"mean": common.CLIP_MEAN, "std": common.CLIP_STD})
    config.task = {"type": "contrast", "loss": "softmax", "tokenizer": "clip", "vocab": "", "max_len": 77}
    config.optimizer = "adamw"
    config.optimizer_options = {"b1": 0.9, "b2": 0.98, "eps": 1e-6}
    config.base_lr = 4e-4 if model == "l14" else 5e-4
    config.weight_decay = 0.2
    config.batch = 32_768
    config.total_steps = 400_000  # 32 epochs of 407 million pairs
    config.warmup_steps = 2_000
    return config
