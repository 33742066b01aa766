"""Opens the .npz of an image and a text tower: LiT's, and those of big_vision such as SigLIP's."""

from pathlib import Path

from vit_jax import models
from vit_jax.checkpoint import describe, google
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.npz import canonical
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat

_BERT_HEAD = 64
"""The width of an attention head of BERT, which the shapes of its parameters do not tell."""


def open_towers(path: Path, arrays: Flat) -> Opened | None:
    """The two towers in a file's arrays; None for other models. Raises UserError."""
    for prefix in ("opt/target/", "params/"):
        if any(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    if path.suffix != ".npz" or not {"img", "txt"} <= {name.split("/")[0] for name in arrays}:
        return None
    img = google.normalize(_tower(arrays, "img/"))
    txt = canonical(google.unstack(_tower(arrays, "txt/")))
    flat = {f"img/{name}": x for name, x in img.items()} | {f"txt/{name}": x for name, x in txt.items()}
    flat |= {name: arrays[name] for name in ("t", "b") if name in arrays}
    known = describe.read(path)
    if known:
        known.check_sizes(flat, path)
    return Opened(path, "two towers", flat, known or _description(img, txt, flat, path))


def _tower(arrays: Flat, prefix: str) -> Flat:
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def _description(img: Flat, txt: Flat, flat: Flat, path: Path) -> Description:
    facts = google.facts(img)
    is_bert = any(name.startswith("BertEncoder_0/") for name in txt)
    widths = [tower["head/kernel"].shape[-1] if "head/kernel" in tower else None for tower in (img, txt)]
    fields = {
        "image": {name: x for name, x in facts.model.items() if name != "num_classes"},
        "text": _bert(txt) if is_bert else _transformer(txt),
        "text_model": "bert" if is_bert else "text_transformer",
        "out_dim": widths,
        "bias_init": float(flat["b"].reshape(-1)[0]) if "b" in flat else None,
    }
    size = facts.image_size
    return Description(
        model_name=path.stem,
        model_type="TwoTowers",
        model=fields,
        image_size=size,
        grid=models.architecture_of("TwoTowers").grid(fields, size) if size else None,
        resize=facts.resize,
        mean=facts.mean,
        std=facts.std,
        class_names=(),
        head="sigmoid" if "b" in flat else "softmax",
        task={"type": "contrast"},
    )


def _bert(txt: Flat) -> dict:
    encoder = "BertEncoder_0/encoder_block/layer_sequence/layers_"
    tables = {name: txt[f"BertEncoder_0/embedder/embedders_{name}_ids/embedding"].shape for name in ("token", "position")}
    width = tables["token"][1]
    sizes = {
        "hidden_size": width,
        "mlp_dim": txt[f"{encoder}0/mlp_block/mlp/dense_layer/kernel"].shape[1],
        "num_layers": len({name.removeprefix(encoder).split("/")[0] for name in txt if name.startswith(encoder)}),
        "num_heads": max(1, width // _BERT_HEAD),
    }
    return {"config": sizes, "vocab_size": tables["token"][0], "max_len": tables["position"][0]}


def _transformer(txt: Flat) -> dict:
    block = "Encoder_0/encoderblock_"
    return {
        "width": txt["Embed_0/embedding"].shape[1],
        "vocab_size": txt["Embed_0/embedding"].shape[0],
        "max_len": txt["pos_embedding"].shape[1],
        "num_layers": len({name.split("/")[1] for name in txt if name.startswith(block)}),
        "mlp_dim": txt[f"{block}0/MlpBlock_3/Dense_0/kernel"].shape[1],
        "num_heads": txt[f"{block}0/MultiHeadDotProductAttention_1/query/kernel"].shape[1],
    }
