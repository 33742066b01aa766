"""Stochastic depth: what is drawn, what is done with it, and that a model in training does nothing else."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from vit_jax.errors import UserError
from vit_jax.models import residual

RATES = [0.0, 0.25, 0.9]


def test_rates_are_a_line_from_the_first_block_to_the_last():
    np.testing.assert_allclose(residual.rates(0.3, 5), np.linspace(0, 0.3, 5), atol=1e-12)
    assert residual.rates(0.3, 1) == [0] and residual.rates(0.3, 3, uniform=True) == [0.3] * 3


@pytest.mark.parametrize("last", [-0.1, 1.0])
def test_a_rate_that_is_no_chance_is_refused(last):
    with pytest.raises(UserError, match="must be from 0 to below 1"):
        residual.rates(last, 3)


def test_masks_are_drawn_for_every_block_branch_and_example_apart():
    b = 20_000
    kept = np.asarray(residual.draw(jax.random.key(0), RATES, b))
    assert kept.shape == (3, 2, b)
    for masks, rate in zip(kept, RATES, strict=True):
        np.testing.assert_allclose(masks[masks > 0], 1 / (1 - rate), rtol=1e-6)
        sigma = np.sqrt(rate * (1 - rate) / b)
        np.testing.assert_allclose((masks == 0).mean(-1), rate, atol=4 * sigma)
        np.testing.assert_allclose(masks.mean(-1), 1, atol=4 * sigma / (1 - rate))  # branches keep their mean
    dropped = (kept[1:] == 0).reshape(4, b).astype(float)
    np.testing.assert_allclose(np.corrcoef(dropped), np.eye(4), atol=4 / np.sqrt(b))


def test_subsets_are_of_the_promised_size_and_equally_likely():
    b, draws = 10, 2000
    draw = jax.jit(jax.vmap(lambda key: residual.draw(key, RATES, b, "subset")[1:]))
    first, *others = [np.asarray(x) for pair in draw(jax.random.split(jax.random.key(0), draws)) for x in pair]
    assert residual.draw(jax.random.key(0), RATES, b, "subset")[0] == (None, None)
    assert [x.shape for x in (first, *others)] == [(draws, 8), (draws, 8), (draws, 1), (draws, 1)]
    for places in (first, *others):
        assert all(len(set(row)) == places.shape[1] for row in places)
        share = places.shape[1] / b
        np.testing.assert_allclose(np.bincount(places.ravel()) / draws, share, atol=4 * np.sqrt(share * (1 - share) / draws))
    assert (np.sort(first) != np.sort(others[0])).any()


def test_add_equals_the_branch_by_hand_and_computes_a_subset_only():
    x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    seen = []

    def branch(x):
        seen.append(len(x))
        return 3 * x**2

    np.testing.assert_allclose(residual.add(x, branch, None), x + 3 * x**2, rtol=1e-6)
    masked = residual.add(x, branch, jnp.array([0, 2.5, 0, 2.5, 2.5]))
    places = jnp.array([3, 1])
    subset = residual.add(jnp.asarray(x), branch, places)
    expected = x.copy()
    expected[[1, 3]] += 5 / 2 * 3 * x[[1, 3]] ** 2
    np.testing.assert_allclose(subset, expected, rtol=1e-6)
    expected[4] += 5 / 2 * 3 * x[4] ** 2
    np.testing.assert_allclose(masked, expected, rtol=1e-6)
    assert seen == [5, 5, 2]

    def loss(x, kept):
        return jnp.sum(residual.add(x, branch, kept) ** 2)

    by_mask = jax.grad(loss)(jnp.asarray(x), jnp.array([0, 2.5, 0, 2.5, 0]))
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(x), places), by_mask, rtol=1e-6)


def changed(params, **factors):
    """Parameters whose last block's branches are multiplied: those with `name` in their path by its factor."""

    def change(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf * next((factor for part, factor in factors.items() if "lock_1/" + part in name), 1)

    return jax.tree_util.tree_map_with_path(change, params)


@pytest.mark.parametrize(
    ("kind", "mode", "branches"),
    [
        ("vit", "mask", ("MultiHeadDotProductAttention_1/out", "MlpBlock_3/Dense_1")),
        ("vit", "subset", ("MultiHeadDotProductAttention_1/out", "MlpBlock_3/Dense_1")),
        ("mixer", "mask", ("token_mixing/Dense_1", "channel_mixing/Dense_1")),
    ],
)
def test_in_training_every_example_lacks_branches_of_the_last_block_or_has_them_scaled(kind, mode, branches):
    """Of two blocks the first keeps all. Every example equals one of four models whose last branches are 0 or doubled."""
    fields = {"stochastic_depth": 0.5}
    fields = {"transformer": fields | {"stochastic_depth_mode": mode}} if kind == "vit" else fields
    model, image = small.MODELS[kind](**fields), small.random_images(16, 16, batch=1)
    params = small.random_params(model, image)
    combinations = list(itertools.product((0, 2), repeat=2))
    possible = [
        small.apply(small.MODELS[kind](), changed(params, **dict(zip(branches, factors, strict=True))), image)[0]
        for factors in combinations
    ]
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(possible, 2)) > 0.1

    logits = small.apply(model, params, np.repeat(image, 64, axis=0), train=True, rngs={"dropout": jax.random.key(0)})
    which = np.abs(logits[:, None] - np.stack(possible)).max(-1)
    chex.assert_trees_all_close(which.min(1), np.zeros(64), atol=1e-5)
    kept = np.array(combinations)[which.argmin(1)] > 0
    if mode == "subset":
        assert kept.sum(0).tolist() == [32, 32]
    counts = np.bincount(which.argmin(1), minlength=4)
    assert counts.min() > 16 - 4 * np.sqrt(12)


@pytest.mark.parametrize("mode", residual.MODES)
def test_outside_training_nothing_is_left_out(mode):
    fields = {"stochastic_depth": 0.9, "stochastic_depth_uniform": True, "stochastic_depth_mode": mode}
    model, images = small.vit(transformer=fields), small.random_images(16, 16)
    params = small.random_params(model, images)
    np.testing.assert_array_equal(small.apply(model, params, images), small.apply(small.vit(), params, images))
    everything = small.apply(model, params, images, train=True, rngs={"dropout": jax.random.key(0)})
    assert np.abs(everything - small.apply(model, params, images)).max() > 0.01
