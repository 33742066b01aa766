"""Captioners as transformers saves them: a `VisionEncoderDecoderModel` of a ViT and GPT-2, in and out.

The ViT's pooler, which no decoder reads, is kept as `extras/pooler/…`. GPT-2's matrices are (in, out), as ours are.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.checkpoint import huggingface, rules
from vit_jax.checkpoint.describe import Description
from vit_jax.checkpoint.entries import Entries, folder_of, read_object
from vit_jax.checkpoint.family import Family, Written, count_blocks
from vit_jax.checkpoint.opened import Opened
from vit_jax.checkpoint.rules import Arrays, Flat, Rule, Transform, rule
from vit_jax.checkpoint.segmenters import backbone_of
from vit_jax.errors import UserError

NAME = "Hugging Face VisionEncoderDecoder"
_WORDS, _SCORES = "decoder.transformer.wte.weight", "decoder.lm_head.weight"
_POOLER = "extras/pooler/"
_FIXED = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": True,
}
"""What of GPT-2's config.json is the same for all that can be opened."""


def _packed(n: int) -> tuple[Transform, Transform]:
    """n projections beside each other: of the kernels (in, n · out), and of the biases."""

    def join(arrays: Arrays) -> Arrays:
        return [np.concatenate([x.reshape(len(x), -1) for x in arrays], axis=1)]

    kernels = Transform(lambda xs, heads: [x.reshape(len(x), heads, -1) for x in np.split(xs[0], n, axis=1)], join)
    biases = Transform(
        lambda xs, heads: [x.reshape(heads, -1) for x in np.split(xs[0], n)],
        lambda xs: [np.concatenate([x.reshape(-1) for x in xs])],
    )
    return kernels, biases


_OUT = Transform(lambda xs, heads: [xs[0].reshape(heads, -1, xs[0].shape[1])], lambda xs: [xs[0].reshape(-1, xs[0].shape[-1])])


def _attention(ours: str, theirs: str, maps: dict[str, tuple[str, ...]]) -> list[Rule]:
    table = []
    for name, parts in maps.items():
        kernels, biases = _packed(len(parts))
        table.append(rule(tuple(f"{ours}/{part}/kernel" for part in parts), f"{theirs}.{name}.weight", kernels))
        table.append(rule(tuple(f"{ours}/{part}/bias" for part in parts), f"{theirs}.{name}.bias", biases))
    return [
        *table,
        rule(f"{ours}/out/kernel", f"{theirs}.c_proj.weight", _OUT),
        rule(f"{ours}/out/bias", f"{theirs}.c_proj.bias"),
    ]


_OURS, _THEIRS = "text_decoder/layer_{i}", "decoder.transformer.h.{i}"
GPT2: tuple[Rule, ...] = (
    rule("embedding", _WORDS),
    rule("position_embedding", "decoder.transformer.wpe.weight"),
    *rules.norm(f"{_OURS}/self_attention_norm", f"{_THEIRS}.ln_1"),
    *_attention(f"{_OURS}/self_attention", f"{_THEIRS}.attn", {"c_attn": ("query", "key", "value")}),
    *rules.norm(f"{_OURS}/cross_attention_norm", f"{_THEIRS}.ln_cross_attn"),
    *_attention(f"{_OURS}/cross_attention", f"{_THEIRS}.crossattention", {"q_attn": ("query",), "c_attn": ("key", "value")}),
    *rules.norm(f"{_OURS}/mlp_norm", f"{_THEIRS}.ln_2"),
    *(
        rule(f"{_OURS}/mlp/Dense_{k}/{ours}", f"{_THEIRS}.mlp.{name}.{theirs}")
        for k, name in enumerate(("c_fc", "c_proj"))
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    ),
    *rules.norm("text_norm", "decoder.transformer.ln_f"),
)
PROJECTION = tuple(rules.dense("memory_projection", "enc_to_dec_proj"))
"""Between a ViT and a GPT-2 of different widths."""


def open_captioner(path: Path, arrays: Flat) -> Opened | None:
    """The ViT with GPT-2 in a file's arrays, with the `config.json` beside it; None for other models. Raises UserError."""
    if _WORDS not in arrays or "encoder.embeddings.patch_embeddings.projection.weight" not in arrays:
        return None
    folder = folder_of(path)
    config = read_object(folder / "config.json")
    text = config.object("decoder", {})
    if wrong := [name for name, value in _FIXED.items() if text.content.get(name, value) != value]:
        raise text.wrong(wrong[0], repr(_FIXED[wrong[0]]))
    theirs = {name: x for name, x in arrays.items() if not name.endswith((".attn.bias", ".masked_bias", "attention.bias"))}
    if (scores := theirs.pop(_SCORES, None)) is not None and not np.array_equal(scores, theirs[_WORDS]):
        raise UserError(f"{path}: {_SCORES} is another matrix than {_WORDS}: only tied ones are read")
    flat, vit = _open_vit(path, theirs, config.object("encoder", {}))
    layers, heads = count_blocks(theirs, "decoder.transformer.h."), text.whole("n_head", 12)
    theirs = {name: x for name, x in theirs.items() if not name.startswith("encoder.")}
    projected = "enc_to_dec_proj.weight" in theirs
    flat |= rules.read(GPT2 + PROJECTION * projected, theirs, blocks=layers, heads=heads, where=str(path))
    (vocabulary, width), (places, _) = flat["embedding"].shape, flat["position_embedding"].shape
    fields = {
        "vocabulary": vocabulary,
        "width": width,
        "num_heads": heads,
        "mlp_dim": flat["text_decoder/layer_0/mlp/Dense_0/kernel"].shape[1],
        "num_layers": layers,
        "max_length": places,
        "tied": True,
        "use_bias": True,
        "project_memory": projected,
        "norm_eps": text.number("layer_norm_epsilon", 1e-5, 1e-12, 1),
    }
    written = read_object(folder / "generation_config.json")
    whole = lambda name, default, high: written.whole(name, config.whole(name, default, high=high), high=high)  # noqa: E731
    penalty = written.number("length_penalty", config.number("length_penalty", 1.0, -10, 10), -10, 10)
    vocab = next((name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()), "tokenizer.json")
    description = dataclasses.replace(
        vit,
        model_name=path.stem,
        model_type="Captioner",
        model={"body": {"vit": vit.model}, **fields},
        text={"tokenizer": "gpt2", "vocab": vocab, "max_len": min(places, whole("max_length", 20, 10**6))},
        task={"type": "caption", "beams": whole("num_beams", 1, 1_000), "length_penalty": float(penalty)},
    )
    return Opened(path, NAME, flat, description)


def _open_vit(path: Path, arrays: Flat, config: Entries) -> tuple[Flat, Description]:
    """The encoder's parameters under our names, and a description of it as a ViT without a head."""
    theirs = {name.removeprefix("encoder."): x for name, x in arrays.items() if name.startswith("encoder.")}
    family = _family(any("layer_scale1" in name for name in theirs))
    facts = family.facts(theirs, config, read_object(folder_of(path) / "preprocessor_config.json"))
    model = {**facts.model, "representation_size": None, "num_classes": None}
    transformer = model["transformer"]
    ours = rules.read(
        family.rules(transformer.get("activation") == "swiglu"),
        family.fold(theirs, facts),
        blocks=transformer["num_layers"],
        heads=transformer["num_heads"],
        where=str(path),
    )
    flat = {}
    for name, x in ours.items():
        kept = name.replace("pre_logits/", _POOLER) if name.startswith("pre_logits/") else name
        flat[kept if kept.startswith("extras/") else f"backbone/{kept}"] = x
    size, patch = facts.image_size, model["patches"]["size"]
    described = Description(
        model_type="ViT",
        model=model,
        image_size=facts.input_size or size,
        grid=tuple(n // p for n, p in zip(size, patch, strict=True)),
        mean=facts.mean,
        std=facts.std,
        class_names=(),
        resize=facts.resize,
        preprocessing=facts.preprocessing,
    )
    return flat, described


def _family(layer_scale: bool) -> Family:
    return huggingface.DINOV2 if layer_scale else huggingface.VIT


def write_captioner(opened: Opened) -> Written:
    """A captioner in transformers' names. Raises UserError for one that GPT-2 has no place for."""
    fields, task, text = opened.description.model, opened.description.task, opened.description.text
    width, eps = fields.get("width", 768), fields.get("norm_eps", 1e-6)
    projected, other_width = fields.get("project_memory", False), width != fields["body"]["vit"]["hidden_size"]
    faults = {
        "tied=False": not fields.get("tied"),
        "use_bias=False": not fields.get("use_bias"),
        "mask_token=True": fields.get("mask_token"),
        f"activation={fields.get('activation')}": fields.get("activation", "gelu_tanh") != "gelu_tanh",
        "another width than the ViT with project_memory=False": other_width and not projected,
        "project_memory=True with the width of the ViT": projected and not other_width,
        f"the {text.get('tokenizer')} tokenizer": text.get("tokenizer") != "gpt2",
    }
    if wrong := [name for name, fault in faults.items() if fault]:
        raise UserError(f"transformers' ViT with GPT-2 has no place for {', '.join(wrong)}: convert with --to=npz")
    vit = backbone_of(opened)
    pooler = {name.replace(_POOLER, "pre_logits/"): x for name, x in opened.flat.items() if name.startswith(_POOLER)}
    extras = {name: x for name, x in opened.flat.items() if name.startswith("extras/") and not name.startswith(_POOLER)}
    size = next((x.shape[-1] for name, x in pooler.items() if name.endswith("kernel")), None)
    described = dataclasses.replace(vit.description, model={**vit.description.model, "representation_size": size})
    image = _family(bool(vit.description.model["transformer"].get("layer_scale"))).write(described, vit.flat | pooler | extras)
    ours = {name: x for name, x in opened.flat.items() if not name.startswith(("backbone/", "extras/"))}
    arrays = rules.write(GPT2 + PROJECTION * projected, ours, blocks=fields.get("num_layers", 6), where="transformers' GPT-2")
    end = _end_of(opened)
    decoder: dict[str, Any] = _FIXED | {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "is_decoder": True,
        "vocab_size": fields["vocabulary"],
        "n_positions": fields.get("max_length", 64),
        "n_embd": width,
        "n_layer": fields.get("num_layers", 6),
        "n_head": fields.get("num_heads", 12),
        "n_inner": fields.get("mlp_dim", 3072),
        "layer_norm_epsilon": eps,
        "bos_token_id": end,
        "eos_token_id": end,
        "tie_word_embeddings": True,
    }
    tokens = {"decoder_start_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config = {
        "model_type": "vision-encoder-decoder",
        "architectures": ["VisionEncoderDecoderModel"],
        "encoder": image.files["config.json"],
        "decoder": decoder,
        **tokens,
    }
    written = {
        "max_length": text["max_len"],
        "num_beams": task.get("beams", 3),
        "length_penalty": task.get("length_penalty", 1.0),
    }
    files = {**image.files, "config.json": config, "generation_config.json": {**tokens, **written}}
    return Written({f"encoder.{name}": x for name, x in image.arrays.items()} | arrays, files, "gpt2")


def _end_of(opened: Opened) -> int:
    """The token that starts and ends a text: what its vocabulary says, or the last one, as GPT-2's own."""
    config = read_object(folder_of(opened.path) / "config.json")
    last = opened.description.model["vocabulary"] - 1
    return config.whole("eos_token_id", last, low=0) if opened.family == NAME else last
