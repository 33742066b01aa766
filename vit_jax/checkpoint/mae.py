"""Opens and writes masked autoencoders with their decoders: transformers' ViTMAE, and the official files in timm's names."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vit_jax.checkpoint import huggingface, rules, timm
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import folder_of, read_object
from vit_jax.checkpoint.family import IMAGENET, Family, Written, count_blocks
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat, rule

_OWN = (
    *rules.dense("embed", "decoder_embed"),
    *rules.dense("predict", "decoder_pred"),
    rule("mask_token", "decoder_mask_token"),
)
"""Rules for what a decoder has beside a ViT's blocks, positions and last norm."""
_HEADS = 16
"""Of every official decoder; their files do not tell."""


@dataclass(frozen=True)
class Layout:
    """How a project names a decoder.

    Attributes:
      family: of the encoder, whose table is that of the decoder's blocks, too.
      names: (how a decoder's name begins, how the encoder's table or `_OWN` calls it).
      prefix: of the encoder's names.
      blocks: how the names of blocks begin in the table.
    """

    family: Family
    names: tuple[tuple[str, str], ...]
    prefix: str
    blocks: str

    @property
    def table(self) -> tuple[rules.Rule, ...]:
        return (*self.family.rules(False), *_OWN)

    def renamed(self, flat: Mapping[str, Any], *, write: bool = False) -> Flat:
        """A decoder's arrays under the names of the table, or the other way round."""
        pairs = [pair[::-1] if write else pair for pair in self.names]
        return {new + name.removeprefix(old): x for name, x in flat.items() for old, new in pairs if name.startswith(old)}


_COMMON = ("decoder_embed.", "decoder_pred.")
HF = Layout(
    family=huggingface.VIT,
    names=(
        ("decoder.decoder_layers.", "encoder.layer."),
        ("decoder.decoder_norm.", "layernorm."),
        ("decoder.decoder_pos_embed", "embeddings.position_embeddings"),
        ("decoder.mask_token", "decoder_mask_token"),
        *((f"decoder.{name}", name) for name in _COMMON),
    ),
    prefix="vit.",
    blocks="encoder.layer.",
)
TIMM = Layout(
    family=timm.TIMM,
    names=(
        ("decoder_blocks.", "blocks."),
        ("decoder_norm.", "norm."),
        ("decoder_pos_embed", "pos_embed"),
        ("mask_token", "decoder_mask_token"),
        *((name, name) for name in _COMMON),
    ),
    prefix="",
    blocks="blocks.",
)


def open_autoencoder(path: Path, arrays: Flat, open_encoder: Callable[[Path, Flat], Opened]) -> Opened | None:
    """The autoencoder in a file's arrays; None for other models. Raises UserError.

    Args:
      open_encoder: opens the arrays of a plain ViT.
    """
    layout = next((x for x in (HF, TIMM) if x.names[-1][0] + "weight" in arrays), None)
    if layout is None or not any(name.startswith(layout.prefix) for name in arrays):
        return None
    # transformers 5 saves decoder_layers under this name
    arrays = {name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): x for name, x in arrays.items()}
    of_decoder = {name: x for name, x in arrays.items() if any(name.startswith(old) for old, _ in layout.names)}
    encoder = open_encoder(path, {name: x for name, x in arrays.items() if name not in of_decoder})
    folder = folder_of(path)
    config, theirs = read_object(folder / "config.json"), layout.renamed(of_decoder)
    heads, blocks = config.whole("decoder_num_attention_heads", _HEADS), count_blocks(theirs, layout.blocks)
    ours = rules.read(layout.table, theirs, blocks=blocks, heads=heads, where=f"the decoder of {path}")
    first = ours["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"]
    decoder = {"width": first.shape[0], "num_layers": blocks, "num_heads": heads, "mlp_dim": first.shape[1]}
    transformer = encoder.description.model["transformer"]
    decoder |= {name: transformer[name] for name in ("activation", "norm_eps")}
    told = (
        (folder / "preprocessor_config.json").is_file()
        if layout is HF
        else "mean" in config.content | config.object("pretrained_cfg", {}).content
    )
    task = {"type": "reconstruct", "normalized": config.flag("norm_pix_loss", layout is TIMM)}
    description = dataclasses.replace(
        encoder.description,
        model_type="MAE",
        model={**encoder.description.model, "decoder": decoder},
        task=task | {"hidden": config.number("mask_ratio", 0.75, 0.01, 0.99)},
        **({} if told else {"mean": IMAGENET[0], "std": IMAGENET[1]}),
    )
    flat = encoder.flat | {f"decoder/{name}": x for name, x in ours.items()}
    return Opened(path, f"{encoder.family} with MAE's decoder", flat, description)


def write_autoencoder(opened: Opened, to: str) -> Written:
    """An encoder with its decoder as "hf" or "timm". Raises UserError."""
    layout, description = (HF if to == "hf" else TIMM), opened.description
    plain = {name: x for name, x in opened.flat.items() if not name.startswith(("decoder/", "extras/"))}
    fields = {name: value for name, value in description.model.items() if name != "decoder"}
    family, decoder = layout.family, description.model["decoder"]
    encoder = family.write(dataclasses.replace(description, model_type="ViT", model=fields), plain)
    where = f"the decoder of {family.name}"
    theirs = rules.write(layout.table, opened.under("decoder/"), blocks=decoder["num_layers"], where=where)
    arrays = {layout.prefix + name: x for name, x in encoder.arrays.items()} | layout.renamed(theirs, write=True)
    config = encoder.files["config.json"] | _config(description, decoder, to)
    return Written(arrays, {**encoder.files, "config.json": config})


def _config(description: Description, decoder: Mapping[str, Any], to: str) -> dict[str, Any]:
    task = description.task if description.task.get("type") == "reconstruct" else {}
    config = {
        "decoder_hidden_size": decoder["width"],
        "decoder_num_hidden_layers": decoder["num_layers"],
        "decoder_num_attention_heads": decoder["num_heads"],
        "decoder_intermediate_size": decoder["mlp_dim"],
        "mask_ratio": task.get("hidden", 0.75),
        "norm_pix_loss": task.get("normalized", True),
    }
    if to == "hf":
        return config | {"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"]}
    return config | {"mean": [x / 255 for x in description.mean], "std": [x / 255 for x in description.std]}
