"""Rematerialisation and scan: less memory and less to compile, with the same parameters and numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from vit_jax.models.layers import REMAT, Encoder

HEIGHT, WIDTH = 40, 24
QUICK = {"xla_backend_optimization_level": 0}  # compilers spend longer on these programs than they run
PARTS = {"num_layers": 3, "layer_scale": True, "qk_norm": True, "stochastic_depth": 0.5, "activation": "swiglu"}


def logits_and_gradients(rates, **options):
    """In training, with everything that an encoder can have, of the mean square of the logits."""
    model = small.vit(num_registers=2, transformer=PARTS | rates | options)
    images = small.random_images(HEIGHT, WIDTH, batch=4)
    params = small.random_params(model, images)

    def loss(params):
        logits = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(3)})
        return jnp.mean(logits**2), logits

    with jax.default_matmul_precision("highest"):
        gradients, logits = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(params)
    return jax.device_get((logits, gradients))


@pytest.fixture(scope="module")
def plain():
    return logits_and_gradients({})


@pytest.mark.parametrize(("remat", "scan"), [("none", True), ("dots", True), ("full", False)])
def test_remat_and_scan_change_neither_logits_nor_gradients(plain, remat, scan):
    found = logits_and_gradients({}, remat=remat, scan=scan)
    assert np.abs(plain[0]).max() > 0.5
    chex.assert_trees_all_close(found, plain, atol=1e-6, rtol=1e-5)


def test_remat_draws_the_same_dropout_again():
    rates = {"dropout_rate": 0.3, "attention_dropout_rate": 0.3, "num_layers": 1}
    chex.assert_trees_all_close(logits_and_gradients(rates, remat="full"), logits_and_gradients(rates), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scan_draws_other_dropout_for_every_block(remat):
    """Blocks that add nothing but dropout of ones show their masks as differences between the layers."""
    encoder = Encoder(4, 8, 2, 0.5, 0.0, add_position_embedding=False, remat=remat, scan=True)
    x = np.zeros((8, 16, 32), np.float32)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), small.shapes(encoder, x))
    for i in range(4):
        params[f"encoderblock_{i}"]["MlpBlock_3"]["Dense_1"]["bias"] += 1
    kwargs = {"train": True, "with_layers": True, "rngs": {"dropout": jax.random.key(0)}}
    _, layers = small.apply(encoder, params, x, **kwargs)
    masks = np.diff(np.stack([x, *layers]), axis=0)
    assert set(masks.ravel()) == {0, 2}
    np.testing.assert_allclose(np.corrcoef(masks.reshape(4, -1)), np.eye(4), atol=4 / 64)  # of 64**2 numbers


def test_features_of_a_scan_are_those_of_the_loop():
    model, images = small.vit(num_registers=1), small.random_images(HEIGHT, WIDTH)
    params = small.random_params(model, images)
    scanned = small.vit(num_registers=1, transformer={"scan": True})
    found, expected = (small.apply(m, params, images, method="features") for m in (scanned, model))
    assert len(found["layers"]) == 2
    chex.assert_trees_all_close(found, expected, atol=1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_parameters_keep_their_published_names_and_first_values(remat):
    images = small.random_images(HEIGHT, WIDTH)
    found = small.initial_params(small.vit(transformer={"remat": remat, "scan": True}), images)
    chex.assert_trees_all_equal(found, small.initial_params(small.vit(), images))


def lowered_training(num_layers, **options):
    model, images = small.vit(transformer={"num_layers": num_layers} | options), small.random_images(64, 64, batch=8)

    def loss(params):
        return jnp.mean(model.apply({"params": params}, images, train=True) ** 2)

    return jax.jit(jax.grad(loss)).lower(small.shapes(model, images))


def test_a_scan_compiles_one_block_and_keeps_no_layers_for_training():
    three, four = (lowered_training(n, scan=True, remat="full").as_text() for n in (3, 4))
    assert three.count("dot_general") == four.count("dot_general") < lowered_training(3).as_text().count("dot_general")
    model, images = small.vit(transformer={"num_layers": 3, "scan": True}), small.random_images(HEIGHT, WIDTH)
    for method, keeps in (("__call__", False), ("features", True)):
        forward = jax.jit(functools.partial(model.apply, method=method))
        text = forward.lower({"params": small.shapes(model, images)}, images).as_text()
        assert ("tensor<3x2x16x32xf32>" in text) == keeps, method


def test_remat_saves_memory():
    compiled = (lowered_training(8, remat=remat, scan=True).compile(QUICK) for remat in REMAT)
    none, dots, full = (c.memory_analysis().temp_size_in_bytes for c in compiled)
    assert full < 0.7 * dots and dots < 0.7 * none


def test_remat_of_a_mixer_changes_no_gradient():
    def gradients(**fields):
        model, images = small.mixer(stochastic_depth=0.5, **fields), small.random_images(HEIGHT, WIDTH)
        params = small.random_params(model, images)

        def loss(params):
            logits = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
            return jnp.mean(logits**2)

        with jax.default_matmul_precision("highest"):
            lowered = jax.jit(jax.grad(loss)).lower(params)
        return jax.device_get(lowered.compile(QUICK)(params)), lowered.as_text().count("dot_general")

    (expected, products), (found, more_products) = gradients(), gradients(remat="full")
    chex.assert_trees_all_close(found, expected, atol=1e-6, rtol=1e-5)
    assert more_products > products
