"""Opens the .npz of an image and a text tower: LiT's, and those of big_vision such as SigLIP's."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vit_jax import models
from vit_jax.checkpoint import describe, google
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.npz import canonical
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat

_BERT_HEAD = 64
"""The width of an attention head of BERT, which the shapes of its parameters do not tell."""
_LIT_LENGTH = 16
"""Tokens a text of LiT: a BERT's parameters have room for more."""
_GEMMA = 256_000
"""Tokens of Gemma's vocabulary, that of SigLIP 2."""
_NAFLEX = {
    "resize": "bilinear_antialias",
    "preprocessing": {"resize_to": None, "interpolation": "bilinear", "antialias": True, "max_patches": 256},
}
"""How SigLIP 2's NaFlex sees images, of as many patches as its processor gives one where nothing else is said."""


def open_towers(path: Path, arrays: Flat) -> Opened | None:
    """The two towers in a file's arrays; None for other models. Raises UserError."""
    for prefix in ("opt/target/", "params/"):
        if any(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    if path.suffix != ".npz" or not {"img", "txt"} <= {name.split("/")[0] for name in arrays}:
        return None
    of_any_shape = "img/embedding/kernel" in arrays and arrays["img/embedding/kernel"].ndim == 2
    img = google.normalize(_of_a_grid(_tower(arrays, "img/")) if of_any_shape else _tower(arrays, "img/"))
    txt = canonical(google.unstack(_tower(arrays, "txt/")))
    if (more := txt.pop("Encoder_0/pos_embedding", None)) is not None:  # of older files: it is added behind the other
        txt["pos_embedding"] = txt["pos_embedding"] + more
    flat = {f"img/{name}": x for name, x in img.items()} | {f"txt/{name}": x for name, x in txt.items()}
    flat |= {name: arrays[name] for name in ("t", "b") if name in arrays}
    known = describe.read(path)
    if known:
        known.check_sizes(flat, path)
    return Opened(path, "two towers", flat, known or _description(img, txt, flat, path, of_any_shape))


def _of_a_grid(flat: Flat) -> Flat:
    """NaFlex's linear map of flat patches (p·p·3, d) as a convolution's, and its positions (side, side, d) as a table."""
    kernel, table = flat["embedding/kernel"], flat["pos_embedding"]
    side = math.isqrt(kernel.shape[0] // 3)
    grid = {"embedding/kernel": kernel.reshape(side, side, 3, -1), "pos_embedding": table.reshape(1, -1, table.shape[-1])}
    return flat | grid


def _tower(arrays: Flat, prefix: str) -> Flat:
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def describe_towers(
    path: Path, flat: Flat, *, image: Mapping[str, Any], text: Mapping[str, Any], tokens: Mapping[str, Any], **entries: Any
) -> Description:
    """What is known of the towers in `flat`: fields of both, `Description.text`, and more entries of it, such as `image_size`.

    Where scores have a bias each pair of image and text was a question of its own, of a sigmoid.
    """
    loss = "sigmoid" if "b" in flat else "softmax"
    heads = (flat.get(f"{tower}/head/kernel") for tower in ("img", "txt"))
    fields = {
        "image": dict(image),
        "text": dict(text),
        "text_model": "bert" if "config" in text else "text_transformer",
        "out_dim": [None if kernel is None else kernel.shape[-1] for kernel in heads],
        "bias_init": float(flat["b"].reshape(-1)[0]) if "b" in flat else None,
    }
    size = entries["image_size"]
    usual = {
        "grid": models.architecture_of("TwoTowers").grid(fields, size) if size else None,
        "task": {"type": "contrast", "loss": loss, "max_len": tokens["max_len"]},
    }
    about = {"model_name": path.stem, "model_type": "TwoTowers", "class_names": (), "head": loss}
    return Description(**about, model=fields, text=tokens, **usual | entries)


def _description(img: Flat, txt: Flat, flat: Flat, path: Path, of_any_shape: bool) -> Description:
    facts = google.facts(img)
    if any(name.startswith("BertEncoder_0/") for name in txt):
        text = _bert(txt)
        tokens = _bert_text(path, text)
    else:
        text = _transformer(txt)
        tokens = _sentencepiece_text(path, text, sigmoid="b" in flat)
    return describe_towers(
        path,
        flat,
        image={name: x for name, x in facts.model.items() if name != "num_classes"},
        text=text,
        tokens=tokens,
        image_size=facts.image_size,
        mean=facts.mean,
        std=facts.std,
        **(_NAFLEX if of_any_shape else {"resize": facts.resize}),
    )


def _bert_text(path: Path, fields: Mapping[str, Any]) -> dict:
    return {"tokenizer": "bert", "vocab": _vocabulary(path, "vocab.txt"), "max_len": min(_LIT_LENGTH, fields["max_len"])}


def _sentencepiece_text(path: Path, fields: Mapping[str, Any], *, sigmoid: bool) -> dict:
    """LiT takes texts as they are; SigLIP was trained on lower case without punctuation, SigLIP 2 on lower case alone."""
    is_gemma = fields["vocab_size"] >= _GEMMA
    options = {"lower": True, **({"pad_token": 0} if is_gemma else {"strip_punctuation": True})} if sigmoid else {}
    return {
        "tokenizer": "sentencepiece",
        "vocab": _vocabulary(path, "spiece.model", "sentencepiece.model"),
        "max_len": fields["max_len"],
        **options,
    }


def _vocabulary(path: Path, *usual: str) -> str:
    """The name of the vocabulary beside a file: that of LiT's, which are called like their models, or a usual one."""
    own = path.with_suffix(Path(usual[0]).suffix).name
    return next((name for name in (own, *usual) if (path.parent / name).is_file()), own)


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
