"""The tokenizer that belongs to a checkpoint: found, and the right one."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from tests.models import small
from vit_jax import checkpoint, models
from vit_jax.checkpoint import describe
from vit_jax.checkpoint.texts import open_tokenizer
from vit_jax.errors import UserError

BERT = {"config": {"hidden_size": 64, "mlp_dim": 40, "num_layers": 1, "num_heads": 1}, "vocab_size": 30, "max_len": 20}
TEXT = {"width": 24, "num_layers": 1, "mlp_dim": 40, "num_heads": 3, "vocab_size": 30}
IMAGE = {"hidden_size": 32, "patches": {"size": (8, 8)}, "transformer": small.ENCODER}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat"]


def write_towers(path, **fields):
    model = models.build("TwoTowers", {"image": IMAGE, "out_dim": (None, 32), **fields})
    inputs = {"images": np.zeros((1, 16, 16, 3)), "tokens": np.zeros((1, 16), int)}
    checkpoint.save(small.random_values(jax.eval_shape(partial(model.init, **inputs), jax.random.key(0))["params"]), path)
    return path


def test_a_published_lit_and_a_workdir(tmp_path):
    """LiT's vocabulary is called like its file; a run leaves its own beside model.npz."""
    path = write_towers(tmp_path / "mine.npz", text=BERT, text_model="bert")
    with pytest.raises(UserError, match="put it beside it, as .*mine.txt"):
        open_tokenizer(checkpoint.open_checkpoint(path))
    (tmp_path / "mine.txt").write_text("\n".join(WORDS))
    opened = checkpoint.open_checkpoint(path)
    tokens = open_tokenizer(opened)(["A cat", "a dog"])
    assert tokens.dtype == np.int32 and tokens.tolist() == [[2, 4, 5] + [0] * 13, [2, 4, 1] + [0] * 13]

    folder = tmp_path / "run"
    checkpoint.save(opened.params, folder / "model.npz")
    text = {"tokenizer": "bert", "vocab": "words.txt", "max_len": 4}
    describe.write(folder / "model.npz", dataclasses.replace(opened.description, text=text))
    (folder / "words.txt").write_text("\n".join([*WORDS, "dog"]))
    for source in (folder, folder / "model.npz"):
        assert open_tokenizer(checkpoint.open_checkpoint(source))(["a dog"]).tolist() == [[2, 4, 6, 0]]


def test_errors(tmp_path):
    path = write_towers(tmp_path / "mine.npz", text=BERT, text_model="bert")
    opened = checkpoint.open_checkpoint(path)
    (tmp_path / "long.txt").write_text("\n".join([*WORDS, *(f"word{i}" for i in range(30))]))
    with pytest.raises(UserError, match="has 36 tokens, the text tower knows 30"):
        open_tokenizer(opened, vocab=tmp_path / "long.txt")
    for changes, message in (({"text": {}}, "does not tell how texts"), ({"model_type": "ViT"}, "is a ViT, which reads no")):
        changed = dataclasses.replace(opened, description=dataclasses.replace(opened.description, **changes))
        with pytest.raises(UserError, match=message):
            open_tokenizer(changed)
