"""The named architectures as ConfigDicts, for recipes: `MODEL_CONFIGS["ViT-B_16"]`, `AUGREG_CONFIGS["B_16"]`."""

import ml_collections
from ml_collections import config_dict

from vit_jax.errors import unknown
from vit_jax.models import MlpMixer, VisionTransformer, zoo
from vit_jax.models.layers import Encoder

_VIT_FIELDS = ("head_bias_init", "fc_norm", "position_embedding", "num_registers")
_ENCODER_FIELDS = (
    "activation",
    "norm_eps",
    "layer_scale",
    "layer_scale_init",
    "qk_norm",
    "stochastic_depth",
    "stochastic_depth_uniform",
    "stochastic_depth_mode",
)
_MIXER_FIELDS = ("stochastic_depth",)


def _default(module: type, name: str):
    return module.__dataclass_fields__[name].default


def _config(fields: dict) -> ml_collections.ConfigDict:
    # every field that the model knows, so that the command line can set it
    if "transformer" in fields:
        vit = {name: _default(VisionTransformer, name) for name in _VIT_FIELDS}
        encoder = {name: _default(Encoder, name) for name in _ENCODER_FIELDS}
        fields = vit | fields | {"transformer": encoder | fields["transformer"]}
    else:
        fields = {name: _default(MlpMixer, name) for name in _MIXER_FIELDS} | fields
    config = ml_collections.ConfigDict(fields)
    if fields.get("representation_size", 0) is None:
        config.representation_size = config_dict.placeholder(int)
    return config


MODEL_CONFIGS = {name: _config(fields) for name, fields in (zoo.VIT | zoo.MIXER).items()}
AUGREG_CONFIGS = {name: _config(zoo.VIT[zoo.augreg_to_model_name(name)]) for name in zoo.AUGREG}

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
        raise unknown("model", name, [*SHORT_NAMES, *MODEL_CONFIGS])
    config.model = _config((zoo.VIT | zoo.MIXER)[full])
    config.model_type = "Mixer" if full in zoo.MIXER else "ViT"
