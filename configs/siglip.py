"""Trains both towers from nothing with a sigmoid for every pair (SigLIP, https://arxiv.org/abs/2303.15343).

    python -m vit_jax.main --workdir=runs/siglip --config=configs/siglip.py:b16,FOLDER --config.task.vocab=c4_en.model

`:MODEL,DATASET`: ti16, s16, b16 or l16, and a folder with captions or tar shards, such as 'shards/name-{000..999}.tar'.
Batches of 32,768 at 224 px for a TPU pod slice. A tower that has learnt something starts from `config.pretrained.img` or
`.txt`, and learns more slowly with `--config.lr_factors="(('img/.*', 0.1),)"`.

Published: 76.0 % zero-shot on ImageNet with b16 at 224 px, from the 40 billion examples of WebLI, which is not public
(as measured by mlfoundations/open_clip, docs/openclip_results.csv). Not measured here, and no public data reaches it.
"""

import ml_collections

from configs import common, models
from vit_jax.errors import unknown

WIDTHS = {"ti16": 192, "s16": 384, "b16": 768, "l16": 1024}


def get_config(arg: str = "b16,shards") -> ml_collections.ConfigDict:
    """`arg` is MODEL,DATASET."""
    model, _, dataset = arg.partition(",")
    if model not in WIDTHS:
        raise unknown("model", model, WIDTHS)
    config = common.get_config()
    models.use(config, model)
    image, width = config.model, WIDTHS[model]
    image.classifier = "map"
    image.transformer.dropout_rate = 0.0
    sizes = {name: image.transformer[name] for name in ("num_layers", "mlp_dim", "num_heads")}
    text = {"width": width, "vocab_size": 32_000, **sizes}
    config.model_type = "TwoTowers"
    config.model = {"image": image, "text": text, "out_dim": (None, width), "temperature_init": 10.0, "bias_init": -10.0}
    config.pretrained = {"img": "", "txt": ""}
    common.use_captions(config, dataset)
    options = {"lower": True, "strip_punctuation": True}
    config.task = {"type": "contrast", "loss": "sigmoid", "tokenizer": "sentencepiece", "vocab": "", "max_len": 64}
    config.task.tokenizer_options = options
    config.optimizer = "adafactor"
    config.optimizer_options = {"beta2_cap": 0.95}
    config.base_lr = 1e-3
    config.weight_decay = 0.1  # here times the rate; big_vision's wd = 1e-4 is not
    config.batch = 32_768
    config.total_steps = 1_220_000  # 40 billion examples
    config.warmup_steps = 50_000
    return config
