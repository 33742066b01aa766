"""Masked attention against float64 NumPy, and which kernels a program lowered for another platform holds."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import small
from vit_jax.errors import UserError
from vit_jax.models import attention, cores
from vit_jax.models.windows import Windows

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


def by_numpy(q, k, v, mask, scale, dy, kind="softmax"):
    """Output and gradients of q, k, v and the mask; zeros for a query that may look nowhere."""
    q, k, v, dy = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v, dy))
    logits = scale * q @ k.swapaxes(2, 3)
    logits = np.where(mask, logits, -np.inf) if mask.dtype == bool else logits + mask
    dweights = dy @ v.swapaxes(2, 3)
    if kind == "sigmoid":
        count = np.isfinite(logits).sum(-1, keepdims=True)
        weights = 1 / (1 + np.maximum(count, 1) * np.exp(-logits))
        dlogits = weights * (1 - weights) * dweights
    else:
        largest = np.maximum(logits.max(-1, keepdims=True), -1e30)
        weights = np.exp(logits - largest)
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
        dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    dmask = dlogits
    while dmask.ndim > mask.ndim:
        dmask = dmask.sum(0)
    dmask = dmask.sum(tuple(i for i, n in enumerate(mask.shape) if n == 1), keepdims=True)
    found = weights @ v, scale * dlogits @ k, scale * dlogits.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dy
    return *(x.swapaxes(1, 2) for x in found), dmask


@pytest.mark.parametrize(("count", "kind"), [(1, "softmax"), (2, "softmax"), (2, "sigmoid")])
@pytest.mark.parametrize("name", MASKS)
def test_masked_attention_and_its_gradients_are_those_of_numpy(name, count, kind, monkeypatch):
    monkeypatch.setattr(cores, "cores", lambda: count)
    monkeypatch.setattr(attention, "_WORTH_SHARING", 0)
    mask, scale = MASKS[name], 0.3
    q, dy = RNG.standard_normal((2, B, N, K, H)).astype(np.float32)
    k, v = RNG.standard_normal((2, B, M, K, H)).astype(np.float32)

    @jax.jit
    def run(q, k, v, mask):
        if mask.dtype == bool:
            y, vjp = jax.vjp(lambda q, k, v: attention.attend(q, k, v, mask=mask, scale=scale, kind=kind), q, k, v)
        else:
            y, vjp = jax.vjp(lambda *x: attention.attend(*x[:3], mask=x[3], scale=scale, kind=kind), q, k, v, mask)
        return y, *vjp(dy)

    found, expected = run(q, k, v, mask), by_numpy(q, k, v, mask, scale, dy, kind)
    assert len(found) == 4 + (mask.dtype != bool)
    for x, wanted in zip(found, expected, strict=False):
        np.testing.assert_allclose(x, wanted, atol=2e-6)
    if "padding" in name:
        assert not found[0][2].any() and not found[1][2].any()


def test_sigmoids_without_a_mask_are_those_of_a_mask_that_hides_nothing():
    q, k, v = RNG.standard_normal((3, B, N, K, H)).astype(np.float32)
    masked = attention.attend(q, k, v, mask=np.ones((N, N), bool), kind="sigmoid")
    np.testing.assert_allclose(attention.attend(q, k, v, kind="sigmoid"), masked, atol=1e-6)
    with pytest.raises(UserError, match="did you mean sigmoid"):
        attention.attend(q, k, v, kind="sigmoids")


def plain_mask(grid, size, first):
    """Who sees whom, place by place."""
    places = [None] * first + [(y // size, x // size) for y in range(grid[0]) for x in range(grid[1])]
    return np.array([[a is None or b is None or a == b for b in places] for a in places])


@pytest.mark.parametrize(("grid", "size", "first"), [((5, 7), 3, 2), ((4, 6), 2, 0), ((3, 5), 4, 1), ((2, 3), 9, 1)])
def test_windows_and_their_gradients_are_those_of_a_dense_mask(grid, size, first):
    mask, windows = plain_mask(grid, size, first), Windows(grid, size)
    np.testing.assert_array_equal(windows.mask(first), mask)
    q, k, v, dy = RNG.standard_normal((4, B, len(mask), K, H)).astype(np.float32)
    y, vjp = jax.vjp(jax.jit(lambda *x: attention.attend_in_windows(*x, windows)), q, k, v)
    for x, wanted in zip((y, *vjp(dy)), by_numpy(q, k, v, mask, H**-0.5, dy), strict=False):
        np.testing.assert_allclose(x, wanted, atol=3e-6)


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


@pytest.mark.parametrize("kind", attention.KINDS)
def test_attention_in_bfloat16_is_that_of_float32_rounded(kind):
    """The result and the gradients, by products that a CPU multiplies as they are: each sums over two axes."""
    q, k, v, dy = jax.random.normal(jax.random.key(0), (4, 2, 9, 3, 8), "bfloat16")

    def with_gradients(q, k, v, dy):
        y, vjp = jax.vjp(partial(attention.attend, kind=kind), q, k, v)
        return y, *vjp(dy)

    run = jax.jit(with_gradients)
    exact = run(*(x.astype(jnp.float32) for x in (q, k, v, dy)))
    for rounded, expected in zip(run(q, k, v, dy), exact, strict=True):
        assert rounded.dtype == jnp.bfloat16
        assert np.linalg.norm(rounded - expected) < 1e-2 * np.linalg.norm(expected)
    by_heads = re.findall(r"dot_general.*batching_dims = (.*) x .*contracting_dims = (.*) x ", run.lower(q, k, v, dy).as_text())
    assert [len(axes.split(",")) for batch, axes in by_heads if batch == "[0, 1]"] == [2] * 7


KINDS = {name: {"transformer": fields} for name, fields in small.ATTENTIONS.items()}


@pytest.mark.parametrize("kind", [*small.MODELS, *KINDS])
def test_a_model_of_any_batch_can_be_exported_for_all_platforms(kind):
    model = small.vit(**KINDS[kind]) if kind in KINDS else small.MODELS[kind]()
    (b,) = jax.export.symbolic_shape("b")
    images = small.random_images(32, 32, batch=3)
    params = small.random_params(model, images)
    forward = partial(model.apply, {"params": params})
    shape = jax.ShapeDtypeStruct((b, *images.shape[1:]), jnp.float32)
    program = jax.export.export(jax.jit(forward), platforms=["cpu", "cuda", "tpu"])(shape)
    for size in (1, 3):
        np.testing.assert_array_equal(program.call(images[:size]), jax.jit(forward)(images[:size]))


# kinds of attention

WRONG = [
    ({"attention": "sigmoids"}, "did you mean sigmoid"),
    ({"attention": "window"}, "needs a window_size in patches"),
    ({"window_size": 2}, "are for attention='window', not 'softmax'"),
    ({"attention": "window", "window_size": 2, "global_blocks": (2,)}, r"global_blocks=\[2\] are not among the blocks 0 to 1"),
    ({"attention": "window", "window_size": 2, "global_blocks": (1,), "scan": True}, "all blocks are alike"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_windows_that_cannot_be_are_refused_in_words(fields, message):
    with pytest.raises(UserError, match=message):
        small.shapes(small.vit(transformer=fields), small.random_images(40, 24))


def test_windows_as_large_as_the_grid_and_a_scan_of_them_change_nothing():
    whole, images = small.vit(), small.random_images(40, 24)
    params = small.random_params(whole, images)
    expected = small.apply(whole, params, images)
    for fields in ({"window_size": 5}, {"window_size": 2, "global_blocks": (0, 1)}):
        model = small.vit(transformer={"attention": "window", **fields})
        np.testing.assert_allclose(small.apply(model, params, images), expected, atol=1e-5)
    windows = {"attention": "window", "window_size": 2}
    found = [small.apply(small.vit(transformer=windows | {"scan": scan}), params, images) for scan in (False, True)]
    np.testing.assert_allclose(*found, atol=1e-5)
    assert np.abs(found[0] - expected).max() > 1e-3
