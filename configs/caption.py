"""Writes what is in an image: by default which two digits, and where, from nothing, on two CPU cores.

    python -m vit_jax.main --workdir=runs/words --config=configs/caption.py:show_attend_tell,digits
    python -m vit_jax.predict --model=runs/words --draw=drawn IMAGE…

Measured on 500 held-out pictures: show_attend_tell,digits writes 92.0 to 94.6 % of the sentences word for word (3 seeds), and
52 to 85 % of the attention falls into the box of the digit named; 7 minutes of CPU time on 2 cores. cappa,digits, seed 0:
84.4 % and 44 %, 10 minutes.

`:DECODER,DATASET`, of which DATASET is `digits`, or a folder with captions or tar shards.
Of a folder with captions both learn what the papers did; nobody has repeated their scores.
`cappa`: a ViT-B/16 and a decoder of 6 layers from nothing, on a billion images of the web, for a TPU pod slice
(https://arxiv.org/abs/2306.07915).
`show_attend_tell`: an LSTM on AugReg's ViT-B/16, which stays as it is and is fetched; published is BLEU-4 24.3 on COCO, for an
LSTM on a VGG network (https://arxiv.org/abs/1502.03044).

Both need a vocabulary, `--config.task.vocab=FILE`, see docs/captioning.md, and stand on another ViT with
`--config.pretrained=FILE --config.model.body.vit={}`.
"""

import ml_collections

from configs import common, models
from vit_jax.errors import unknown
from vit_jax.models import zoo

DECODERS = ("cappa", "show_attend_tell")


def get_config(arg: str = "cappa,digits") -> ml_collections.ConfigDict:
    """`arg` is DECODER,DATASET: one of `DECODERS`, and digits, or a folder with captions or tar shards."""
    decoder, _, dataset = arg.partition(",")
    if decoder not in DECODERS:
        raise unknown("decoder", decoder, DECODERS)
    if dataset in ("", "digits"):
        return _digits(decoder)
    config = common.get_config()
    common.use_captions(config, dataset)
    return (_cappa if decoder == "cappa" else _show_attend_tell)(config)


def _digits(decoder: str) -> ml_collections.ConfigDict:
    config = common.get_config()
    common.use_scenes(config)
    config.dataset = "digit_pairs"
    config.pp.update({"crop": 32, "resize": 32})
    config.task = {"type": "caption", "tokenizer": "bert", "vocab": "", "max_len": 8, "parallel": 0.0, "beams": 3}
    config.task.update({"doubly_stochastic": 0.0})
    # Convolutions tell the digits before a single block mixes the tokens: so it pays to look at the digit itself.
    vit = common.scene_vit()
    vit.update({"patches": {"size": (1, 1)}, "resnet": {"num_layers": (1,), "width_factor": 1}})
    vit["transformer"]["num_layers"] = 1
    if decoder == "cappa":
        config.model_type = "Captioner"
        sizes = {"width": 128, "num_heads": 4, "mlp_dim": 256, "num_layers": 2, "max_length": 8}
        sizes |= {"tied": True, "mask_token": False}
        config.base_lr, config.total_steps = 1e-3, 2_500
    else:
        config.model_type = "AttendingLSTM"
        sizes = {"width": 128, "embedding_dim": 128, "attention_dim": 128, "attention": "additive", "dropout_rate": 0.0}
        config.base_lr, config.total_steps = 2e-3, 2_000
    config.model = {"body": {"vit": vit}, "vocabulary": 19, **sizes}
    config.warmup_steps, config.eval_every = 100, 500
    config.evaluators = {"grounding": {}}
    return config


def _cappa(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    models.use(config, "b16")
    vit = {**config.model, "num_classes": None, "classifier": "unpooled"}
    config.model_type = "Captioner"
    config.model = {"body": {"vit": vit}, "vocabulary": 32_000, "mask_token": True}
    config.task = {"type": "caption", "tokenizer": "sentencepiece", "vocab": "", "max_len": 64, "parallel": 0.75}
    config.task.update({"tokenizer_options": {"pad_token": 0}})
    config.optimizer = "adafactor"
    config.base_lr, config.weight_decay = 1e-3, 1e-4
    config.batch = 8_192
    config.total_steps, config.warmup_steps = 366_500, 10_000
    return config


def _show_attend_tell(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    models.use(config, "b16")
    vit = {**config.model, "num_classes": None}
    config.model_type = "AttendingLSTM"
    config.model = {"body": {"vit": vit}, "vocabulary": 10_000, "attention": "additive"}
    config.task = {"type": "caption", "tokenizer": "sentencepiece", "vocab": "", "max_len": 32, "doubly_stochastic": 1.0}
    config.task.update({"tokenizer_options": {"pad_token": 0}})
    config.freeze = ("backbone/.*",)
    config.pretrained = zoo.PUBLISHED["ViT-B_16"][0]
    config.optimizer = "adamw"
    config.base_lr, config.weight_decay = 4e-4, 0.0
    config.batch = 256
    config.total_steps, config.warmup_steps = 50_000, 1_000
    return config
