"""Parameters of shapes that no model has are refused by name, in every layout."""

import numpy as np
import pytest

from tests.checkpoint.hostile import assert_refused
from vit_jax import checkpoint

BLOCK = "Transformer/encoderblock"
GOOGLE = {
    "embedding/kernel": np.ones((4, 4, 3, 8)),
    f"{BLOCK}_0/MultiHeadDotProductAttention_1/query/kernel": np.ones((8, 2, 4)),
    f"{BLOCK}_0/MlpBlock_3/Dense_0/kernel": np.ones((8, 16)),
    "cls": np.ones((1, 1, 8)),
}
TIMM = {"patch_embed.proj.weight": np.ones((64, 3, 4, 4)), "pos_embed": np.ones((1, 5, 64)), "cls_token": np.ones((1, 1, 64))}
MLP = {"blocks.0.mlp.fc1.weight": np.ones((8, 64)), "blocks.0.mlp.fc2.weight": np.ones((64, 8))}


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        (GOOGLE | {"embedding/kernel": np.ones((0, 4, 3, 8))}, "embedding/kernel has the shape (0, 4, 3, 8): no parameter"),
        (GOOGLE | {"embedding/kernel": np.ones(())}, "its shapes"),
        (GOOGLE | {f"{BLOCK}/LayerNorm_0/scale": np.ones(())}, "those of no model known here"),
        (GOOGLE | {"pos_embedding": np.ones(())}, "those of no model known here"),
        (TIMM, "shapes"),
        (TIMM | MLP | {"patch_embed.proj.weight": np.ones(())}, "its shapes"),
        (TIMM | MLP | {"blocks.2.mlp.fc1.weight": np.ones((8, 64))}, "some are missing"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_shapes_of_no_model_are_refused(tmp_path, flat, said):
    np.savez(tmp_path / "x.npz", **{name: np.asarray(x, np.float32) for name, x in flat.items()})
    assert_refused(checkpoint.open_checkpoint, tmp_path / "x.npz", said)
