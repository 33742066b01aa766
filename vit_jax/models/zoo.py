"""The table of every named architecture. `models.get_model` and `configs/models.py` both read it.

Sizes are those of the published checkpoints; a variant is a keyword override, not a new entry.
"""

from typing import Any

Fields = dict[str, Any]

_SIZES = {
    "Ti": {"hidden_size": 192, "mlp_dim": 768, "num_heads": 3, "num_layers": 12},
    "S": {"hidden_size": 384, "mlp_dim": 1536, "num_heads": 6, "num_layers": 12},
    "B": {"hidden_size": 768, "mlp_dim": 3072, "num_heads": 12, "num_layers": 12},
    "L": {"hidden_size": 1024, "mlp_dim": 4096, "num_heads": 16, "num_layers": 24, "dropout_rate": 0.1},
    "H": {"hidden_size": 1280, "mlp_dim": 5120, "num_heads": 16, "num_layers": 32, "dropout_rate": 0.1},
    "g": {"hidden_size": 1408, "mlp_dim": 6144, "num_heads": 16, "num_layers": 40},  # https://arxiv.org/abs/2106.04560
    "e": {"hidden_size": 1792, "mlp_dim": 15360, "num_heads": 16, "num_layers": 56},  # https://arxiv.org/abs/2209.06794
    "Micro": {"hidden_size": 64, "mlp_dim": 256, "num_heads": 4, "num_layers": 4},
    "testing": {"hidden_size": 10, "mlp_dim": 10, "num_heads": 2, "num_layers": 1, "dropout_rate": 0.1},
}


def _vit(name: str, size: str, patch: int, *, dropout_rate: float | None = None, **fields: Any) -> tuple[str, Fields]:
    transformer = {"dropout_rate": 0.0, "attention_dropout_rate": 0.0} | _SIZES[size]
    if dropout_rate is not None:
        transformer["dropout_rate"] = dropout_rate
    base = {"classifier": "token", "representation_size": None, "resnet": None}
    sizes = {"hidden_size": transformer.pop("hidden_size"), "patches": {"size": (patch, patch)}}
    return name, {"model_name": name, **base, **sizes, "transformer": transformer, **fields}


def _hybrid(name: str, size: str, patch: int, units: tuple[int, ...], **fields: Any) -> tuple[str, Fields]:
    return _vit(name, size, patch, resnet={"num_layers": units, "width_factor": 1}, **fields)


def _mixer(name: str, patch: int, hidden: int, blocks: int, tokens: int, channels: int) -> tuple[str, Fields]:
    mlps = {"tokens_mlp_dim": tokens, "channels_mlp_dim": channels}
    return name, {"model_name": name, "patches": {"size": (patch, patch)}, "hidden_dim": hidden, "num_blocks": blocks, **mlps}


VIT = dict(
    [
        _vit("testing", "testing", 16),
        _vit("testing-unpooled", "testing", 16, classifier="unpooled"),
        _vit("ViT-Micro_4", "Micro", 4),  # not published: small enough to train on a laptop's CPU in a minute
        _vit("ViT-Ti_16", "Ti", 16),
        _vit("ViT-S_16", "S", 16),
        _vit("ViT-B_16", "B", 16),
        _vit("ViT-L_16", "L", 16),
        _vit("ViT-H_14", "H", 14),
        _vit("ViT-g_14", "g", 14),
        _vit("ViT-e_14", "e", 14),
        _vit("ViT-B_8", "B", 8),
        _vit("ViT-S_32", "S", 32),
        _vit("ViT-B_32", "B", 32),
        _vit("ViT-L_32", "L", 32, dropout_rate=0.0),
        _vit("ViT-S_16-gap-norep", "S", 16, classifier="gap"),
        _vit("ViT-B_16-gap-norep", "B", 16, classifier="gap"),
        _vit("ViT-S_32-gap-norep", "S", 32, classifier="gap"),
        _vit("ViT-B_32-gap-norep", "B", 32, classifier="gap"),
        _hybrid("R+ViT-Ti_16", "Ti", 8, ()),
        _hybrid("R50+ViT-B_16", "B", 1, (3, 4, 9), dropout_rate=0.1),
        _hybrid("R26+ViT-B_32", "B", 1, (2, 2, 2, 2)),
        _hybrid("R26+ViT-S_32", "S", 1, (2, 2, 2, 2)),
        _hybrid("R50+ViT-L_32", "L", 1, (3, 4, 6, 3)),
    ]
)

MIXER = dict(
    [
        _mixer("Mixer-B_16", 16, 768, 12, 384, 3072),
        _mixer("Mixer-B_32", 32, 768, 12, 384, 3072),
        _mixer("Mixer-L_16", 16, 1024, 24, 512, 4096),
    ]
)

_BERT = {"tokenizer_name": "bert", "size": 224, "max_len": 16}
_SENTENCEPIECE = {"tokenizer_name": "sentencepiece", "size": 224, "max_len": 16}


def _lit(name: str, image: str, text: Fields | str, out_dim: tuple[int | None, int]) -> tuple[str, Fields]:
    """`text` is the size of a BERT, or that of a plain text tower with its vocabulary of 16,000."""
    bert = isinstance(text, str)
    fields = {"config": text} if bert else {"vocab_size": 16_000, **text}
    towers = {"image": VIT[image], "text_model": "bert" if bert else "text_transformer", "text": fields}
    return name, {"model_name": name, **towers, "out_dim": out_dim, "pp": _BERT if bert else _SENTENCEPIECE}


def _text(size: str) -> Fields:
    fields = dict(_SIZES[size])
    return {"width": fields.pop("hidden_size"), **fields}


LIT_BUCKET = "gs://vit_models/lit"
"""Where LiT's parameters and vocabularies lie, called like their models."""
LIT = dict(
    [
        _lit("LiT-B16B", "ViT-B_16", "base", (768, 768)),
        _lit("LiT-B16B_2", "ViT-B_16", "base", (None, 768)),
        _lit("LiT-L16L", "ViT-L_16", "large", (None, 1024)),
        _lit("LiT-L16S", "ViT-L_16", _text("S"), (None, 1024)),
        _lit("LiT-L16Ti", "ViT-L_16", _text("Ti"), (None, 1024)),
    ]
)

AUGREG = ("Ti_16", "S_32", "S_16", "B_32", "B_16", "B_8", "L_16", "R_Ti_16", "R26_S_32", "R50_L_32")
"""Architectures of "How to train your ViT?" (https://arxiv.org/abs/2106.10270), as its checkpoints spell them."""


def augreg_to_model_name(name: str) -> str:
    """`R26_S_32` → `R26+ViT-S_32`, `B_16` → `ViT-B_16`: what the AugReg files call X is `models` name ViT-X here."""
    *resnet, size, patch = name.split("_")
    return "+".join([*resnet, f"ViT-{size}_{patch}"])


_AUGREG_FILES = {  # how the best of each was trained (ImageNet-21k, 300 epochs, learning rate 0.001), MiB
    "Ti_16": ("aug_none-wd_0.03-do_0.0-sd_0.0", 37),
    "S_32": ("aug_none-wd_0.1-do_0.0-sd_0.0", 118),
    "S_16": ("aug_light1-wd_0.03-do_0.0-sd_0.0", 115),
    "B_32": ("aug_light1-wd_0.1-do_0.0-sd_0.0", 398),
    "B_16": ("aug_medium1-wd_0.1-do_0.0-sd_0.0", 391),
    "B_8": ("aug_medium2-wd_0.1-do_0.0-sd_0.0", 391),
    "L_16": ("aug_strong1-wd_0.1-do_0.0-sd_0.0", 1243),
    "R_Ti_16": ("aug_none-wd_0.03-do_0.0-sd_0.0", 40),
    "R26_S_32": ("aug_light1-wd_0.1-do_0.0-sd_0.0", 170),
    "R50_L_32": ("aug_medium1-wd_0.1-do_0.1-sd_0.1", 1337),
}
PUBLISHED = {  # name: (address, MiB), of a file pretrained on ImageNet-21k to fine-tune the model from
    augreg_to_model_name(name): (f"gs://vit_models/augreg/{name}-i21k-300ep-lr_0.001-{how}.npz", size)
    for name, (how, size) in _AUGREG_FILES.items()
} | {
    "ViT-L_32": ("gs://vit_models/imagenet21k/ViT-L_32.npz", 1255),
    "ViT-H_14": ("gs://vit_models/imagenet21k/ViT-H_14.npz", 2519),
    "R50+ViT-B_16": ("gs://vit_models/imagenet21k/R50+ViT-B_16.npz", 440),
    "Mixer-B_16": ("gs://mixer_models/imagenet21k/Mixer-B_16.npz", 290),
    "Mixer-L_16": ("gs://mixer_models/imagenet21k/Mixer-L_16.npz", 876),
}


def published_file(name: str) -> tuple[str, int] | None:
    """(address, MiB) of the file to start from; `name` may also be AugReg's, such as B_16. None where none is published."""
    return PUBLISHED.get(augreg_to_model_name(name) if name in AUGREG else name)
