"""A BERT of transformers alone, from which the text tower of a model of images and texts starts (`config.pretrained.txt`)."""

from pathlib import Path
from typing import Any

from vit_jax.checkpoint import rules
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import folder_of, read_object
from vit_jax.checkpoint.family import ACTIVATIONS, HALF, count_blocks
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Flat, rule

_MARK = "embeddings.token_type_embeddings.weight"
_LAYER, _THEIRS = "encoder_block/layer_sequence/layers_{i}", "encoder.layer.{i}"
_RULES = (
    rule("embedder/embedders_token_ids/embedding", "embeddings.word_embeddings.weight"),
    rule("embedder/embedders_position_ids/embedding", "embeddings.position_embeddings.weight"),
    rule("embedder/embedders_segment_ids/embedding", _MARK),
    *rules.norm("layer_norm", "embeddings.LayerNorm"),
    *(
        r
        for name in ("query", "key", "value")
        for r in rules.dense(f"{_LAYER}/attention_block/attention_layer/{name}", f"{_THEIRS}.attention.self.{name}")
    ),
    *rules.dense(f"{_LAYER}/attention_block/dense_layer", f"{_THEIRS}.attention.output.dense"),
    *rules.norm(f"{_LAYER}/attention_block/layer_norm", f"{_THEIRS}.attention.output.LayerNorm"),
    *rules.dense(f"{_LAYER}/mlp_block/mlp/dense_layer", f"{_THEIRS}.intermediate.dense"),
    *rules.dense(f"{_LAYER}/mlp_block/dense_layer", f"{_THEIRS}.output.dense"),
    *rules.norm(f"{_LAYER}/mlp_block/layer_norm", f"{_THEIRS}.output.LayerNorm"),
)
_ACTIVATIONS = {theirs: ours for theirs, ours in ACTIVATIONS.items() if ours != "quick_gelu"}


def open_bert(path: Path, arrays: Flat) -> Opened | None:
    """The encoder in a file's arrays, without what was trained on top of it, as "txt/…"; None for others. Raises UserError."""
    theirs = {name.removeprefix("bert."): x for name, x in arrays.items() if not name.startswith(("cls.", "classifier."))}
    if _MARK not in theirs:
        return None
    names = {".gamma": ".weight", ".beta": ".bias"}  # of the first files
    kept = {name: x for name, x in theirs.items() if not name.startswith("pooler.") and not name.endswith("position_ids")}
    for old, new in names.items():
        kept = {name.removesuffix(old) + new if name.endswith(old) else name: x for name, x in kept.items()}
    config = read_object(folder_of(path) / "config.json")
    layers = count_blocks(kept, "encoder.layer.")
    flat = rules.read(_RULES, kept, blocks=layers, heads=1, where=str(path))
    (words, width), positions = (flat[f"embedder/embedders_{n}_ids/embedding"].shape for n in ("token", "position"))
    sizes = {
        "hidden_size": width,
        "mlp_dim": flat["encoder_block/layer_sequence/layers_0/mlp_block/mlp/dense_layer/kernel"].shape[1],
        "num_layers": layers,
        "num_heads": config.whole("num_attention_heads", max(1, width // 64)),
    }
    activation = _ACTIVATIONS[config.text("hidden_act", "gelu", tuple(_ACTIVATIONS))]
    if config.number("layer_norm_eps", 1e-12) != 1e-12:
        raise config.wrong("layer_norm_eps", "1e-12, as in every BERT known here")
    text = {"config": sizes, "vocab_size": words, "max_len": positions[0], "activation": activation}
    return Opened(path, "Hugging Face BERT", {f"txt/BertEncoder_0/{n}": x for n, x in flat.items()}, _description(path, text))


def _description(path: Path, text: dict[str, Any]) -> Description:
    return Description(
        model_name=path.stem,
        model_type="TwoTowers",
        model={"image": {}, "text": text, "text_model": "bert"},
        image_size=None,
        grid=None,
        mean=HALF[0],
        std=HALF[1],
        class_names=(),
        text={"tokenizer": "bert", "vocab": "vocab.txt", "max_len": min(16, text["max_len"])},
        task={"type": "contrast"},
    )
