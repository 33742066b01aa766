"""Masked attention against float64 NumPy, and which kernels a program lowered for another platform holds."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from vit_jax.models import attention

RNG = np.random.default_rng(0)
B, N, M, K, H = 3, 5, 7, 2, 4
PADDING = np.arange(M) < np.array([M, 4, 0])[:, None, None, None]  # the last example holds nothing
MASKS = {
    "padding": PADDING,
    "causal": np.tril(np.ones((N, M), bool)),
    "of each head": RNG.random((1, K, N, M)) < 0.5,
    "bias": RNG.standard_normal((K, N, M)).astype(np.float32),
    "padding as a bias": np.where(PADDING, 0, -np.inf).astype(np.float32),
}


def by_numpy(q, k, v, mask, scale, dy):
    """Output and gradients of q, k, v and the mask; zeros for a query that may look nowhere."""
    q, k, v, dy = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v, dy))
    logits = scale * q @ k.swapaxes(2, 3)
    logits = np.where(mask, logits, -np.inf) if mask.dtype == bool else logits + mask
    largest = np.maximum(logits.max(-1, keepdims=True), -1e30)
    weights = np.exp(logits - largest)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    dweights = dy @ v.swapaxes(2, 3)
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dmask = dlogits
    while dmask.ndim > mask.ndim:
        dmask = dmask.sum(0)
    dmask = dmask.sum(tuple(i for i, n in enumerate(mask.shape) if n == 1), keepdims=True)
    found = weights @ v, scale * dlogits @ k, scale * dlogits.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dy
    return *(x.swapaxes(1, 2) for x in found), dmask


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("kind", MASKS)
def test_masked_attention_and_its_gradients_are_those_of_numpy(kind, cores, monkeypatch):
    monkeypatch.setattr(attention, "_cores", lambda: cores)
    monkeypatch.setattr(attention, "_WORTH_SHARING", 0)
    mask, scale = MASKS[kind], 0.3
    q, dy = RNG.standard_normal((2, B, N, K, H)).astype(np.float32)
    k, v = RNG.standard_normal((2, B, M, K, H)).astype(np.float32)

    @jax.jit
    def run(q, k, v, mask):
        if mask.dtype == bool:
            y, vjp = jax.vjp(lambda q, k, v: attention.attend(q, k, v, mask=mask, scale=scale), q, k, v)
        else:
            y, vjp = jax.vjp(lambda *x: attention.attend(*x[:3], mask=x[3], scale=scale), q, k, v, mask)
        return y, *vjp(dy)

    found, expected = run(q, k, v, mask), by_numpy(q, k, v, mask, scale, dy)
    assert len(found) == 4 + (mask.dtype != bool)
    for x, wanted in zip(found, expected, strict=False):
        np.testing.assert_allclose(x, wanted, atol=2e-6)
    if "padding" in kind:
        assert not found[0][2].any() and not found[1][2].any()


def exported(function, platform, *args):
    accepted = [jax.export.DisabledSafetyCheck.custom_call(name) for name in attention.CUDNN_CALLS]
    return jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=accepted)(*args).mlir_module()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_a_program_lowered_on_this_machine_is_the_one_of_its_platform(platform, dtype):
    """Forward and training, of 17 tokens: an odd number."""
    model = small.vit(dtype=dtype, transformer={"num_layers": 1})
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    params = small.shapes(model, images)

    def forward(params, images):
        return model.apply({"params": params}, images, train=True)

    text = exported(forward, platform, params, images)
    training = exported(jax.grad(lambda *args: forward(*args).astype(jnp.float32).sum()), platform, params, images)
    found = [[name in program for name in attention.CUDNN_CALLS] for program in (text, training)]
    by_cudnn = platform == "cuda" and dtype == "bfloat16"
    assert found == ([[True, False], [True, True]] if by_cudnn else [[False, False]] * 2)
    assert ("optimization_barrier" in training) == (platform == "cpu")
    products = re.findall(r"dot_general.*: \(tensor<([^>]*)>, tensor<([^>]*)>\)", training)
    of_one_kind = "bf16" if dtype == "bfloat16" else "f32"
    assert len(products) > 15 and all(x.endswith(f"x{of_one_kind}") for pair in products for x in pair)
    stacked = any("x3x4x8x" in x for pair in products for x in pair)
    assert stacked == (platform != "cpu"), "query, key and value by one product"


@pytest.mark.parametrize("kind", small.MODELS)
def test_a_model_of_any_batch_can_be_exported_for_all_platforms(kind):
    model = small.MODELS[kind]()
    (b,) = jax.export.symbolic_shape("b")
    images = small.random_images(32, 32, batch=3)
    params = small.random_params(model, images)
    forward = partial(model.apply, {"params": params})
    shape = jax.ShapeDtypeStruct((b, *images.shape[1:]), jnp.float32)
    program = jax.export.export(jax.jit(forward), platforms=["cpu", "cuda", "tpu"])(shape)
    for size in (1, 3):
        np.testing.assert_array_equal(program.call(images[:size]), jax.jit(forward)(images[:size]))
