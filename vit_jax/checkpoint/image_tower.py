"""SigLIP's and SigLIP 2's image tower alone: transformers' `SiglipVisionModel` and `Siglip2VisionModel`, in and out."""

from pathlib import Path

from vit_jax.checkpoint import image_text_export, rules
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import folder_of, read_object
from vit_jax.checkpoint.family import ACTIVATIONS, POSITIONS, Written, count_blocks, square_side, vit_fields
from vit_jax.checkpoint.image_text import SIGLIP, SIGLIP2
from vit_jax.checkpoint.image_text_files import RESIZE, pixels_of
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat
from vit_jax.errors import UserError

_PREFIX, _PATCHES = "vision_model.", "vision_model.embeddings.patch_embedding.weight"
_MARKS = {"vision_model.head.probe", _PATCHES}


def open_image_tower(path: Path, arrays: Flat) -> Opened | None:
    """A ViT without classes, whose MAP head pools; None for other models. Raises UserError."""
    theirs = {name if name.startswith(_PREFIX) else _PREFIX + name: x for name, x in arrays.items()}
    if not theirs.keys() >= _MARKS or any(name.startswith("text_model.") for name in arrays):
        return None
    layout, folder = SIGLIP2 if theirs[_PATCHES].ndim == 2 else SIGLIP, folder_of(path)
    config = read_object(folder / "config.json")
    if not config.content:
        raise UserError(f"{folder} holds no config.json, which tells the heads of the tower: put it beside the parameters")
    config = config.object("vision_config") if "vision_config" in config else config
    theirs = {name: x for name, x in theirs.items() if not name.endswith("position_ids")}
    blocks, heads = count_blocks(theirs, layout.image_blocks), config.whole("num_attention_heads", 12)
    flat = rules.read(layout.img, theirs, blocks=blocks, heads=heads, where=str(path))
    p, q, _, width = flat["embedding/kernel"].shape
    side = square_side(flat[POSITIONS].shape[1], str(folder))
    transformer = {
        "num_layers": blocks,
        "num_heads": heads,
        "mlp_dim": flat["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"].shape[1],
        "activation": ACTIVATIONS[config.text("hidden_act", "gelu_pytorch_tanh", tuple(ACTIVATIONS))],
        "norm_eps": config.number("layer_norm_eps", 1e-6, 1e-16, 1),
    }
    sizes = {"hidden_size": width, "patches": {"size": (p, q)}, "classifier": "map", "num_classes": None}
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
    layout = SIGLIP2 if description.resize == RESIZE[SIGLIP2.name] else SIGLIP
    image_text_export.check_image_tower(description, layout)
    theirs = rules.write(layout.img, opened.flat, blocks=transformer["num_layers"], where=layout.name)
    kind = "siglip2" if layout is SIGLIP2 else "siglip"
    config = {
        "model_type": f"{kind}_vision_model",
        "architectures": [f"{kind.capitalize()}VisionModel"],
        **image_text_export.image_config(description, layout),
    }
    files = {"config.json": config, "preprocessor_config.json": image_text_export.preprocessor(description, layout)}
    return Written({name.removeprefix(_PREFIX): x for name, x in theirs.items()}, files)
