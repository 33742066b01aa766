"""The image tower alone of CLIP, SigLIP and SigLIP 2, in and out.

They are transformers' `CLIPVisionModel`, `CLIPVisionModelWithProjection`, `SiglipVisionModel` and `Siglip2VisionModel`.
"""

from pathlib import Path

from vit_jax.checkpoint import image_text_export, rules
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import folder_of, read_object
from vit_jax.checkpoint.family import ACTIVATIONS, POSITIONS, Written, count_blocks, square_side, vit_fields
from vit_jax.checkpoint.image_text import CLIP, SIGLIP, SIGLIP2
from vit_jax.checkpoint.image_text_files import RESIZE, pixels_of
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat
from vit_jax.errors import UserError

_PREFIX, _PATCHES = "vision_model.", "vision_model.embeddings.patch_embedding.weight"
_MARKS = {"vision_model.head.probe", "vision_model.pre_layrnorm.weight"}  # sic
_PROJECTION = "visual_projection.weight"


def open_image_tower(path: Path, arrays: Flat) -> Opened | None:
    """A ViT without classes, whose MAP head or class token pools; None for other models. Raises UserError.

    The projection of CLIP's, if there is one, is its head, without a bias and names of classes.
    """
    theirs = {name if name.startswith((_PREFIX, _PROJECTION)) else _PREFIX + name: x for name, x in arrays.items()}
    if _PATCHES not in theirs or not _MARKS & theirs.keys() or any(name.startswith("text_model.") for name in arrays):
        return None
    is_clip, folder = "vision_model.head.probe" not in theirs, folder_of(path)
    layout = CLIP if is_clip else SIGLIP2 if theirs[_PATCHES].ndim == 2 else SIGLIP
    config = read_object(folder / "config.json")
    if not config.content:
        raise UserError(f"{folder} holds no config.json, which tells the heads of the tower: put it beside the parameters")
    config = config.object("vision_config") if "vision_config" in config else config
    theirs = {name: x for name, x in theirs.items() if not name.endswith("position_ids")}
    blocks, heads = count_blocks(theirs, layout.image_blocks), config.whole("num_attention_heads", 12)
    flat = rules.read(layout.img, theirs, blocks=blocks, heads=heads, where=str(path))
    p, q, _, width = flat["embedding/kernel"].shape
    side = square_side(flat[POSITIONS].shape[1] - ("cls" in flat), str(folder))
    act, eps = ("quick_gelu", 1e-5) if is_clip else ("gelu_pytorch_tanh", 1e-6)
    transformer = {
        "num_layers": blocks,
        "num_heads": heads,
        "mlp_dim": flat["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"].shape[1],
        "activation": ACTIVATIONS[config.text("hidden_act", act, tuple(ACTIVATIONS))],
        "norm_eps": config.number("layer_norm_eps", eps, 1e-16, 1),
        "norm_pre": is_clip,
    }
    sizes = {
        "hidden_size": width,
        "patches": {"size": (p, q)},
        "classifier": "token" if is_clip else "map",
        "num_classes": flat["head/kernel"].shape[1] if "head/kernel" in flat else None,
        **({"patch_bias": False, "head_bias": False} if is_clip else {}),
    }
    description = Description(
        model_name=path.stem,
        model_type="ViT",
        model=vit_fields(**sizes, transformer=transformer),
        grid=(side, side),
        class_names=(),
        resize=RESIZE[layout.name],
        **({"image_size": (side * p, side * q)} | pixels_of(layout, folder, (side * p, side * q), p)),
    )
    return Opened(path, f"{layout.name}, image tower", flat, description)


def write_image_tower(opened: Opened) -> Written:
    """The same for transformers. Raises UserError for what it cannot express."""
    description, transformer = opened.description, opened.description.model["transformer"]
    is_clip, projected = description.model.get("classifier") != "map", "head/kernel" in opened.flat
    layout = CLIP if is_clip else SIGLIP2 if description.resize == RESIZE[SIGLIP2.name] else SIGLIP
    image_text_export.check_image_tower(description, layout)
    theirs = rules.write(layout.img, opened.flat, blocks=transformer["num_layers"], where=layout.name)
    kind = "clip" if is_clip else "siglip2" if layout is SIGLIP2 else "siglip"
    cls = f"{'CLIP' if is_clip else kind.capitalize()}VisionModel"
    config = {
        "model_type": f"{kind}_vision_model",
        "architectures": [f"{cls}WithProjection" if projected else cls],
        **({"projection_dim": opened.flat["head/kernel"].shape[1]} if projected else {}),
        **image_text_export.image_config(description, layout),
    }
    files = {"config.json": config, "preprocessor_config.json": image_text_export.preprocessor(description, layout)}
    return Written(theirs if projected else {name.removeprefix(_PREFIX): x for name, x in theirs.items()}, files)
