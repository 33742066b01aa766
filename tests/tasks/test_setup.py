"""A model computes as the checkpoint that it starts from, whatever a recipe leaves at its default."""

import pytest

from tests import tiny
from vit_jax.checkpoint import Description
from vit_jax.settings import Settings
from vit_jax.tasks import Setup

WINDOW = {"attention": "window", "window_size": 2, "global_blocks": [0]}
SIGMOID = {"attention": "sigmoid", "window_size": 0, "global_blocks": []}
SOFTMAX = {"attention": "softmax", "window_size": 0, "global_blocks": ()}


@pytest.mark.parametrize(
    ("trained", "recipe", "expected"),
    [(WINDOW, {}, WINDOW), (SIGMOID, {}, SIGMOID), ({}, {}, SOFTMAX), ({}, WINDOW, WINDOW), (WINDOW, SIGMOID, SIGMOID)],
)
def test_an_attention_that_is_no_softmax_stays(trained, recipe, expected):
    c = tiny.config()
    c.model.transformer.update(recipe)
    origin = Description(
        model_type="ViT",
        model={**c.model.to_dict(), "transformer": {**c.model.transformer.to_dict(), **SOFTMAX, **trained}},
        image_size=(8, 8),
        grid=(2, 2),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        class_names=(),
    )
    built = Setup(Settings.from_config(c), {}, origin).build_model()
    found = built.fields["transformer"]
    assert {name: found[name] for name in ("attention", "window_size")}.items() <= expected.items()
    assert list(found["global_blocks"]) == list(expected["global_blocks"])
