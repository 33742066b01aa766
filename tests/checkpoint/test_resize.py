"""Every rule of resampling against the library that it is taken from."""

import numpy as np
import pytest

from tests.checkpoint import peers
from vit_jax.checkpoint.resize import RULES, resize, weights
from vit_jax.errors import UserError

SIZES = [
    ((14, 14), (24, 24)),
    ((24, 24), (14, 14)),
    ((37, 37), (16, 23)),
    ((5, 8), (11, 3)),
    ((7, 4), (7, 9)),
    ((1, 3), (4, 6)),
]
both_sizes = pytest.mark.parametrize(("old", "new"), SIZES)


def grid(size):
    return np.random.default_rng(0).normal(size=(*size, 6)).astype(np.float32)


@both_sizes
@pytest.mark.parametrize("rule", ["bilinear_antialias", "bicubic", "bicubic_offset", "bicubic_antialias"])
def test_interpolation_is_that_of_torch(rule, old, new):
    torch = peers.torch_peer().torch
    x = torch.from_numpy(grid(old)).permute(2, 0, 1)[None]
    how = {"size": new, "antialias": rule.endswith("antialias")}
    if rule == "bicubic_offset":
        how = {"scale_factor": [(n + 0.1) / o for n, o in zip(new, old, strict=True)]}
    expected = torch.nn.functional.interpolate(x, mode=rule.split("_")[0], **how)[0].permute(1, 2, 0)
    np.testing.assert_allclose(resize(grid(old), new, rule), expected, atol=2e-5, rtol=0)


@both_sizes
def test_bilinear_is_that_of_scipy(old, new):
    ndimage = pytest.importorskip("scipy.ndimage")
    zoom = [n / o for n, o in zip(new, old, strict=True)]
    expected = ndimage.zoom(np.float64(grid(old)), [*zoom, 1], order=1)
    np.testing.assert_allclose(resize(grid(old), new, "bilinear"), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_weights_sum_to_one_and_keep_a_grid_of_the_same_size(rule):
    for old, new in ((1, 5), (5, 1), (6, 17), (17, 6)):
        np.testing.assert_allclose(weights(old, new, rule).sum(axis=1), 1, atol=1e-12)
    if rule != "bicubic_offset":  # whose scale is never 1
        np.testing.assert_allclose(weights(9, 9, rule), np.eye(9), atol=1e-12)


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="unknown resize rule 'bicubical': did you mean bicubic"):
        resize(grid((2, 2)), (3, 3), "bicubical")
