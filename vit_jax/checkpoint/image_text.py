"""Image and text towers of other projects under our names: transformers' CLIP, SigLIP and SigLIP 2, and OpenCLIP.

A layout is a table of rules for each tower, used for reading and for writing.
"""

from dataclasses import dataclass, replace

import numpy as np

from vit_jax.checkpoint import rules, timm
from vit_jax.checkpoint.family import BLOCK, POSITIONS, PROBE
from vit_jax.checkpoint.rules import CONVOLUTION, TRANSPOSED, Flat, Rule, Transform, rule

_TEXT_BLOCK = "Encoder_0/encoderblock_{i}"
_ONE_ROW = Transform(lambda arrays, _: [arrays[0].reshape(1, 1, -1)], lambda arrays: [arrays[0].reshape(-1)])
_TABLE = Transform(lambda arrays, _: [arrays[0][None]], lambda arrays: [arrays[0][0]])
_SCALAR = Transform(lambda arrays, _: [arrays[0].reshape(1)], lambda arrays: [arrays[0].reshape(())])


def _split_patches(weight: np.ndarray, _: int) -> np.ndarray:
    """A linear map of flattened patches, (d, p·p·3) → (p, p, 3, d)."""
    side = round((weight.shape[1] / 3) ** 0.5)
    return weight.T.reshape(side, side, 3, -1)


_FLAT_PATCHES = Transform(
    lambda arrays, heads: [_split_patches(arrays[0], heads)], lambda arrays: [arrays[0].reshape(-1, arrays[0].shape[-1]).T]
)


@dataclass(frozen=True)
class Layout:
    """How a project names and shapes two towers.

    Attributes:
      name: for people to read.
      marks: names that every file of this layout has.
      img, txt: the rules of each tower, ours without "img/" and "txt/".
      both: those of what stands beside the towers.
      of_image: how names of the image tower begin.
      image_blocks, text_blocks: what stands in front of a block's number.
    """

    name: str
    marks: tuple[str, ...]
    img: tuple[Rule, ...]
    txt: tuple[Rule, ...]
    both: tuple[Rule, ...]
    of_image: tuple[str, ...]
    image_blocks: str
    text_blocks: str


def read(layout: Layout, theirs: Flat, *, blocks: tuple[int, int], heads: tuple[int, int], where: str) -> Flat:
    """Their arrays under our names; blocks and heads of the image and of the text tower. Raises UserError."""
    img, txt, both = {}, {}, {}
    beside = {r.theirs[0] for r in layout.both}
    for name, x in theirs.items():
        part = img if name.startswith(layout.of_image) else both if name in beside else txt
        part[name] = x
    flat = rules.read(layout.both, both, blocks=0, heads=1, where=where)
    for prefix, table, part, n, k in zip(("img/", "txt/"), (layout.img, layout.txt), (img, txt), blocks, heads, strict=True):
        flat |= {prefix + name: x for name, x in rules.read(table, part, blocks=n, heads=k, where=where).items()}
    return flat


def write(layout: Layout, ours: Flat, *, blocks: tuple[int, int]) -> Flat:
    """Our arrays under their names. Raises UserError for what the layout has no place for."""
    img, txt = ({n[4:]: x for n, x in ours.items() if n.startswith(prefix)} for prefix in ("img/", "txt/"))
    beside = {name: x for name, x in ours.items() if not name.startswith(("img/", "txt/"))}
    theirs = rules.write(layout.both, beside, blocks=0, where=layout.name)
    theirs |= rules.write(layout.img, img, blocks=blocks[0], where=layout.name)
    return theirs | rules.write(layout.txt, txt, blocks=blocks[1], where=layout.name)


def _hf_block(ours: str, theirs: str) -> list[Rule]:
    attends = rules.attention(f"{ours}/MultiHeadDotProductAttention_1", f"{theirs}.self_attn")
    return rules.block(ours, theirs, attends, ("layer_norm1", "layer_norm2"))


def _openclip_block(ours: str, theirs: str) -> list[Rule]:
    attends = rules.packed_attention(f"{ours}/MultiHeadDotProductAttention_1", f"{theirs}.attn")
    return rules.block(ours, theirs, attends, ("ln_1", "ln_2"), ("mlp.c_fc", "mlp.c_proj"))


_HF_TEXT = (
    rule("Embed_0/embedding", "text_model.embeddings.token_embedding.weight"),
    rule("pos_embedding", "text_model.embeddings.position_embedding.weight", _TABLE),
    *_hf_block(_TEXT_BLOCK, "text_model.encoder.layers.{i}"),
    *rules.norm("Encoder_0/encoder_norm", "text_model.final_layer_norm"),
)
_HF_IMAGE = (
    rule(POSITIONS, "vision_model.embeddings.position_embedding.weight", _TABLE),
    *_hf_block(BLOCK, "vision_model.encoder.layers.{i}"),
    *rules.norm("Transformer/encoder_norm", "vision_model.post_layernorm"),
)
_PATCHES = "vision_model.embeddings.patch_embedding"
_MAP_HEAD = (
    rule("MAPHead_0/probe", "vision_model.head.probe"),
    *rules.packed_attention(PROBE, "vision_model.head.attention"),
    *rules.norm("MAPHead_0/LayerNorm_0", "vision_model.head.layernorm"),
    *rules.dense("MAPHead_0/MlpBlock_0/Dense_0", "vision_model.head.mlp.fc1"),
    *rules.dense("MAPHead_0/MlpBlock_0/Dense_1", "vision_model.head.mlp.fc2"),
)
_HF = {
    "of_image": ("vision_model.", "visual_projection."),
    "image_blocks": "vision_model.encoder.layers.",
    "text_blocks": "text_model.encoder.layers.",
}
_SIGLIP = _HF | {
    "txt": (*_HF_TEXT, *rules.dense("head", "text_model.head")),
    "both": (rule("t", "logit_scale"), rule("b", "logit_bias")),
}
CLIP = Layout(
    "Hugging Face CLIP",
    ("vision_model.pre_layrnorm.weight", "text_projection.weight"),
    img=(
        rule("cls", "vision_model.embeddings.class_embedding", _ONE_ROW),
        rule("embedding/kernel", f"{_PATCHES}.weight", CONVOLUTION),
        *rules.norm("Transformer/norm_pre", "vision_model.pre_layrnorm"),  # sic
        *_HF_IMAGE,
        rule("head/kernel", "visual_projection.weight", TRANSPOSED),
    ),
    txt=(*_HF_TEXT, rule("head/kernel", "text_projection.weight", TRANSPOSED)),
    both=(rule("t", "logit_scale", _SCALAR),),
    **_HF,
)
SIGLIP = Layout(
    "Hugging Face SigLIP",
    ("vision_model.head.probe", "text_model.head.weight"),
    img=(*rules.patch_embedding(_PATCHES), *_HF_IMAGE, *_MAP_HEAD),
    **_SIGLIP,
)
SIGLIP2 = Layout(
    "Hugging Face SigLIP 2",
    SIGLIP.marks,
    img=(
        rule("embedding/kernel", f"{_PATCHES}.weight", _FLAT_PATCHES),
        rule("embedding/bias", f"{_PATCHES}.bias"),
        *_HF_IMAGE,
        *_MAP_HEAD,
    ),
    **_SIGLIP,
)
OPENCLIP = Layout(
    "OpenCLIP",
    ("visual.conv1.weight", "token_embedding.weight"),
    img=(
        rule("cls", "visual.class_embedding", _ONE_ROW),
        rule("embedding/kernel", "visual.conv1.weight", CONVOLUTION),
        rule(POSITIONS, "visual.positional_embedding", _TABLE),
        *rules.norm("Transformer/norm_pre", "visual.ln_pre"),
        *_openclip_block(BLOCK, "visual.transformer.resblocks.{i}"),
        *rules.norm("Transformer/encoder_norm", "visual.ln_post"),
        rule("head/kernel", "visual.proj"),
    ),
    txt=(
        rule("Embed_0/embedding", "token_embedding.weight"),
        rule("pos_embedding", "positional_embedding", _TABLE),
        *_openclip_block(_TEXT_BLOCK, "transformer.resblocks.{i}"),
        *rules.norm("Encoder_0/encoder_norm", "ln_final"),
        rule("head/kernel", "text_projection"),
    ),
    both=(rule("t", "logit_scale", _SCALAR), rule("b", "logit_bias", _SCALAR)),
    of_image=("visual.",),
    image_blocks="visual.transformer.resblocks.",
    text_blocks="transformer.resblocks.",
)
OPENCLIP_SIGLIP = Layout(
    "OpenCLIP SigLIP",
    ("visual.trunk.attn_pool.latent", "text.text_projection.weight"),
    img=tuple(replace(r, theirs=tuple(f"visual.trunk.{name}" for name in r.theirs)) for r in timm.TABLE),
    txt=(
        rule("Embed_0/embedding", "text.token_embedding.weight"),
        rule("pos_embedding", "text.positional_embedding", _TABLE),
        *_openclip_block(_TEXT_BLOCK, "text.transformer.resblocks.{i}"),
        *rules.norm("Encoder_0/encoder_norm", "text.ln_final"),
        *rules.dense("head", "text.text_projection"),
    ),
    both=OPENCLIP.both,
    of_image=("visual.",),
    image_blocks="visual.trunk.blocks.",
    text_blocks="text.transformer.resblocks.",
)


def layout_of(theirs: Flat) -> Layout | None:
    """The layout that such names and shapes belong to; None for other models."""
    for layout in (CLIP, SIGLIP, OPENCLIP, OPENCLIP_SIGLIP):
        if all(name in theirs for name in layout.marks):
            return SIGLIP2 if layout is SIGLIP and theirs[f"{_PATCHES}.weight"].ndim == 2 else layout
    return None
