"""A tiny model of images and texts with random parameters, for tests of what uses one."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import checkpoint, models
from vit_jax.checkpoint import describe

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "red", "blue", "cat", "dog", ".", "the", "small")
SIZE = (8, 8)
MAX_LEN = 6
FIELDS: dict[str, Any] = {
    "image": {
        "hidden_size": 16,
        "patches": {"size": [4, 4]},
        "classifier": "token",
        "transformer": {"num_layers": 1, "mlp_dim": 16, "num_heads": 2},
    },
    "text": {"width": 16, "num_layers": 1, "mlp_dim": 16, "num_heads": 2, "vocab_size": len(WORDS), "max_len": MAX_LEN},
    "out_dim": 8,
    "temperature_init": 10.0,
}


def write(folder: Path, *, head: str = "softmax", seed: int = 0) -> Any:
    """A workdir with model.npz, model.json and the vocabulary; returns the parameters."""
    fields = FIELDS | ({"bias_init": -2.0} if head == "sigmoid" else {})
    inputs = {"images": np.zeros((1, *SIZE, 3), np.float32), "tokens": np.zeros((1, MAX_LEN), np.int32)}
    params = jax.device_get(jax.jit(models.build("TwoTowers", fields).init)(jax.random.key(seed), **inputs)["params"])
    rng, flat = np.random.default_rng(seed), flatten_dict(params, sep="/")
    drawn = {name: x if name in "tb" else x + rng.normal(0, 0.3, x.shape).astype(np.float32) for name, x in flat.items()}
    params = unflatten_dict(drawn, sep="/")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "words.txt"
    vocabulary.write_text("\n".join(WORDS))
    checkpoint.save(params, folder / "model.npz")
    description = describe.Description(
        model_type="TwoTowers",
        model=fields,
        image_size=SIZE,
        grid=(2, 2),
        mean=(127.5,) * 3,
        std=(127.5,) * 3,
        class_names=(),
        head=head,
        text={"tokenizer": "bert", "vocab": vocabulary.name, "max_len": MAX_LEN},
        task={"type": "contrast", "loss": head, "max_len": MAX_LEN},
    )
    describe.write(folder / "model.npz", description)
    return params


def embeddings(params: Any, *, images: np.ndarray | None = None, tokens: np.ndarray | None = None) -> np.ndarray:
    """Those of normalised images, or of tokens, in one piece."""
    zimg, ztxt, _ = _apply("b" in params)({"params": params}, images=images, tokens=tokens)
    return np.asarray(zimg if ztxt is None else ztxt)


@functools.cache
def _apply(has_bias: bool) -> Callable:
    return jax.jit(models.build("TwoTowers", FIELDS | ({"bias_init": 0.0} if has_bias else {})).apply)


def tokens(texts: list[str]) -> np.ndarray:
    """By hand: [CLS], the words, zeros."""
    rows = [[2, *(WORDS.index(word) if word in WORDS else 1 for word in text.split())][:MAX_LEN] for text in texts]
    return np.array([row + [0] * (MAX_LEN - len(row)) for row in rows], np.int32)
