"""The named architectures as ConfigDicts, for recipes: `MODEL_CONFIGS["ViT-B_16"]`, `AUGREG_CONFIGS["B_16"]`."""

import ml_collections
from ml_collections import config_dict

from vit_jax import models
from vit_jax.errors import unknown
from vit_jax.models import zoo


def _config(name: str) -> ml_collections.ConfigDict:
    # every field that the model knows, so that the command line can set it
    architecture = models.architecture_of(models.model_type_of(name))
    fields = architecture.with_options(architecture.sizes[name])
    config = ml_collections.ConfigDict(fields)
    if fields.get("representation_size", 0) is None:
        config.representation_size = config_dict.placeholder(int)
    return config


MODEL_CONFIGS = {name: _config(name) for kind in models.ARCHITECTURES.values() for name in kind.sizes}
AUGREG_CONFIGS = {name: _config(zoo.augreg_to_model_name(name)) for name in zoo.AUGREG}

SHORT_NAMES = {
    "testing": "testing",
    "testing_unpooled": "testing-unpooled",
    "micro4": "ViT-Micro_4",
    "ti16": "ViT-Ti_16",
    "s16": "ViT-S_16",
    "b16": "ViT-B_16",
    "l16": "ViT-L_16",
    "h14": "ViT-H_14",
    "g14": "ViT-g_14",
    "e14": "ViT-e_14",
    "b8": "ViT-B_8",
    "s32": "ViT-S_32",
    "b32": "ViT-B_32",
    "l32": "ViT-L_32",
    "s16_gap_norep": "ViT-S_16-gap-norep",
    "b16_gap_norep": "ViT-B_16-gap-norep",
    "s32_gap_norep": "ViT-S_32-gap-norep",
    "b32_gap_norep": "ViT-B_32-gap-norep",
    "r_ti16": "R+ViT-Ti_16",
    "r50_b16": "R50+ViT-B_16",
    "r26_b32": "R26+ViT-B_32",
    "r26_s32": "R26+ViT-S_32",
    "r50_l32": "R50+ViT-L_32",
}


def use(config: ml_collections.ConfigDict, name: str) -> None:
    """Sets `config.model` and `config.model_type` to the architecture with this short or full name."""
    full = SHORT_NAMES.get(name, name)
    if full not in MODEL_CONFIGS:
        raise unknown("model", name, {*SHORT_NAMES, *MODEL_CONFIGS})
    config.model = _config(full)
    config.model_type = models.model_type_of(full)
