"""Files of two towers as LiT and big_vision publish them: names as they are, sizes from the shapes."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models import small
from vit_jax import models, predictor
from vit_jax.checkpoint import open_checkpoint

IMAGE = {"hidden_size": 32, "patches": {"size": (8, 8)}, "transformer": small.ENCODER}
TEXT = {"width": 24, "num_layers": 2, "mlp_dim": 40, "num_heads": 3, "vocab_size": 30}
BERT = {"config": {"hidden_size": 64, "mlp_dim": 40, "num_layers": 2, "num_heads": 1}, "vocab_size": 30, "max_len": 9}
TOKENS = np.array([[2, 7, 9, 4, 0, 0, 0]])


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({"text": BERT, "text_model": "bert", "out_dim": (None, 32)}, ""),
        ({"image": IMAGE | {"classifier": "map"}, "text": TEXT, "out_dim": (None, 32), "bias_init": -10.0}, "params/"),
    ],
    ids=["LiT", "SigLIP"],
)
def test_a_file_of_two_towers(tmp_path, fields, prefix):
    model = models.build("TwoTowers", {"image": IMAGE} | fields)
    inputs = {"images": small.random_images(16, 16, batch=1), "tokens": TOKENS}
    shapes = jax.eval_shape(lambda key: model.init(key, **inputs), jax.random.key(0))["params"]
    params = small.random_values(shapes)
    flat = {f"{prefix}{name}": x for name, x in flatten_dict(params, sep="/").items()}
    if prefix:  # as big_vision saves a ViT's position embedding
        flat["params/img/pos_embedding"] = flat.pop("params/img/Transformer/posembed_input/pos_embedding")
    np.savez(tmp_path / "towers.npz", **flat)
    opened = open_checkpoint(tmp_path / "towers.npz")
    assert opened.description.head == ("sigmoid" if prefix else "softmax")
    assert opened.description.text["max_len"] == (7 if prefix else 9)
    assert predictor.load(tmp_path / "towers.npz").task.model.type == "TwoTowers"  # it reads fewer tokens than LiT's 16
    read = models.build(opened.description.model_type, opened.description.model)
    ours, theirs = (jax.jit(m.apply)({"params": p}, **inputs) for m, p in ((read, opened.params), (model, params)))
    for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(mine, expected)
