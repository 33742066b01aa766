"""The parameters that a run starts from: of fresh ones no more are drawn than are passed on, and these are the same."""

import chex
import jax
import numpy as np
import pytest

from tests import tiny
from vit_jax import checkpoint
from vit_jax.run import experiment as experiments
from vit_jax.run import start
from vit_jax.settings import Settings


@pytest.mark.parametrize("classifier", ["token", "gap", "distilled"])
def test_what_a_file_lacks_is_drawn_as_if_everything_were(tmp_path, classifier):
    """A file of a class token, 2x2 patches and another head, for a model of 3x3 patches with its own tokens and head."""
    before = experiments.build(Settings.from_config(tiny.config()))
    rng = np.random.default_rng(0)
    held = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), jax.eval_shape(before.init_params))
    checkpoint.save(held, tmp_path / "model.npz")

    c = tiny.config(pretrained=str(tmp_path / "model.npz"), pp_crop=12)
    c.model.update({"classifier": classifier, "head_bias_init": -3.0})
    experiment = experiments.build(Settings.from_config(c))
    params = start._pretrained_params(experiment, start.pretrained_paths(experiment.settings), keep_head=False)
    whole = experiment.task.load({"": checkpoint.open_checkpoint(tmp_path / "model.npz")}, experiment.init_params())
    chex.assert_trees_all_equal(params, whole)
    chex.assert_trees_all_equal_dtypes(params, whole)
    assert (params["head"]["bias"] == -3).all() and np.isfinite(params["head"]["kernel"]).all()
