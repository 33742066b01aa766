"""Trains a text tower for an image tower that stays as it is: locked-image tuning (LiT, https://arxiv.org/abs/2111.07991).

    python -m vit_jax.main --workdir=runs/lit --config=configs/lit.py:digits --config.pretrained.img=runs/small
    python -m vit_jax.main --workdir=runs/lit --config=configs/lit.py:b16b_2,FOLDER

`digits`, the default, for a ViT that the recipe small_data:micro4,digits trained in runs/small: 500 steps on
digits with sentences in English and German, see data/digit_sentences.py. By wordings that no training has seen it names 97.0,
98.9 and 99.7 % of the held-out digits (seeds 0 to 2), in about a minute on 2 CPU cores.
`:MODEL,DATASET`: b16b, b16b_2, l16l, l16s or l16ti, and a folder with captions or tar shards; the image tower starts from
AugReg's ImageNet-21k, the text tower from nothing unless `config.pretrained.txt` names a model of two towers
or, with `config.model.text.activation=gelu`, a BERT of Hugging Face. They and LiT's
vocabulary are fetched. For a TPU pod slice: batches of 16,384.

Published for text towers that started from BERT and learnt from CC12M and YFCC100M, zero-shot on ImageNet: 73.9 % with b16b_2
after 60,000 steps, 72.1 % with b16b after 30,000, 75.7 % with l16l (google-research/big_vision, README_lit.md). Not measured
here.
"""

import ml_collections

from configs import common, models, small_data
from vit_jax.data import digit_sentences
from vit_jax.errors import unknown
from vit_jax.models import zoo

MODELS = {
    "b16b": ("LiT-B16B", 30_000),
    "b16b_2": ("LiT-B16B_2", 60_000),
    "l16l": ("LiT-L16L", 60_000),
    "l16s": ("LiT-L16S", 60_000),
    "l16ti": ("LiT-L16Ti", 60_000),
}
"""Name and steps."""
VOCABULARIES = {"bert": "gs://vit_models/lit/{}.txt", "sentencepiece": "gs://vit_models/lit/{}.model"}
"""By tokenizer, of a published model."""


def get_config(arg: str = "digits") -> ml_collections.ConfigDict:
    """`arg` is digits, or MODEL,DATASET."""
    model, _, dataset = arg.partition(",")
    if model == "digits":
        return _digits()
    if model not in MODELS:
        raise unknown("model", model, ["digits", *MODELS])
    name, steps = MODELS[model]
    tokenizer, max_len = (zoo.LIT[name]["pp"][field] for field in ("tokenizer_name", "max_len"))
    config = common.get_config()
    models.use(config, name)
    config.model.temperature_init = 10.0
    if tokenizer == "bert":
        config.model.text.activation = "gelu_tanh"  # LiT's; Hugging Face's BERT has "gelu"
    image = zoo.LIT[name]["image"]["model_name"]
    config.pretrained = {"img": zoo.PUBLISHED[image][0], "txt": ""}
    config.freeze = ("img/.*",) if config.model.out_dim[0] is None else ("img/(?!head/).*",)
    common.use_captions(config, dataset)
    config.task = {"type": "contrast", "loss": "softmax", "tokenizer": tokenizer, "max_len": max_len}
    config.task.vocab = VOCABULARIES[tokenizer].format(name)
    config.optimizer = "adafactor"
    config.base_lr = 1e-3
    config.weight_decay = 0.1
    config.batch = 16_384
    config.total_steps = steps
    config.warmup_steps = 10_000
    return config


def _digits() -> ml_collections.ConfigDict:
    config = small_data.get_config("micro4,digits")
    config.dataset = "digit_sentences"
    text = {"width": 64, "num_layers": 2, "mlp_dim": 128, "num_heads": 4, "vocab_size": 64}
    image = config.model
    config.model_type = "TwoTowers"
    config.model = {"image": image, "text": text, "out_dim": (None, 64), "temperature_init": 10.0}
    config.task = {"type": "contrast", "loss": "softmax", "tokenizer": "bert", "vocab": "", "max_len": 16}
    config.pretrained = {"img": "runs/small", "txt": ""}
    config.freeze = ("img/.*",)
    config.batch = 128
    config.total_steps = 500
    config.eval_every = 250
    english, german = (digit_sentences.WORDINGS["test"][language][0] for language in ("en", "de"))
    config.evaluators = {
        "zeroshot": {"templates": english},
        "zeroshot_de": {"type": "zeroshot", "labels": ",".join(digit_sentences.NAMES["de"]), "templates": german},
        "retrieval": {"k": (1,)},
    }
    return config
