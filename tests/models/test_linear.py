"""Linear maps and activations, and their backward passes."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax.models import linear


@pytest.mark.parametrize(
    "name, exact",
    [
        ("gelu_tanh", nn.gelu),
        ("gelu", partial(nn.gelu, approximate=False)),
        ("quick_gelu", lambda x: x / (1 + jnp.exp(-1.702 * x))),
    ],
)
def test_gelu_and_its_slope_are_exact_everywhere(name, exact):
    x = jnp.linspace(-20, 20, 4001)
    y, vjp = jax.vjp(partial(linear.activate, name=name), x)
    again, slope = linear.ACTIVATIONS[name][1](x)
    np.testing.assert_allclose(y, exact(x), atol=1e-6)
    np.testing.assert_allclose(again, y, atol=2e-6)
    np.testing.assert_allclose(vjp(jnp.ones_like(x))[0], slope)
    with jax.enable_x64():
        expected = jax.vmap(jax.grad(exact))(np.asarray(x, np.float64))
    np.testing.assert_allclose(slope, expected, atol=3e-6)


@pytest.mark.parametrize(
    "inputs, features, activation",
    [((6,), (10,), "gelu_tanh"), ((6,), (10,), "gelu"), ((6,), (2, 5), None), ((2, 3), (10,), None)],
)
def test_linear_is_the_dense_layer_of_flax_after_its_activation(inputs, features, activation):
    """The same parameters from the same key, the same values and gradients."""
    x, g = (jax.random.normal(jax.random.key(i), (2, 7, *shape)) for i, shape in enumerate((inputs, features)))
    init = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.normal()}
    ours = linear.Linear(features, len(inputs), activation, **init)
    theirs = nn.DenseGeneral(features, axis=tuple(range(-len(inputs), 0)), **init)
    params = ours.init(jax.random.key(2), x)
    chex.assert_trees_all_equal(params, theirs.init(jax.random.key(2), x))

    def expected(params, x):
        return theirs.apply(params, x if activation is None else nn.gelu(x, approximate=activation == "gelu_tanh"))

    def with_gradients(function, params, x):
        y, vjp = jax.vjp(function, params, x)
        return y, vjp(g)

    run = jax.jit(with_gradients, static_argnums=0)
    chex.assert_trees_all_close(run(ours.apply, params, x), run(expected, params, x), atol=5e-6)


def test_a_cpu_multiplies_bfloat16_as_it_is_into_float32():
    """Of the result, and of the gradients of x and of the kernel: else XLA would convert both to float32 first."""
    shapes = (40, 6), (6, 2, 4), (40, 2, 4)
    x, kernel, g = (jax.random.normal(jax.random.key(i), shape, "bfloat16") for i, shape in enumerate(shapes))

    def with_gradients(x, kernel, g):
        y, vjp = jax.vjp(lambda x, kernel: linear.linear(x, kernel, jnp.zeros((2, 4), x.dtype)), x, kernel)
        return y, *vjp(g)

    run, product = jax.jit(with_gradients), re.compile(r"stablehlo\.dot_general.*: \(.*xbf16>, .*xbf16>\) -> .*x(\w+)>")
    for platform, dtype in (("cpu", "f32"), ("cuda", "bf16")):
        lowered = run.trace(x, kernel, g).lower(lowering_platforms=(platform,)).as_text()
        assert product.findall(lowered) == [dtype] * 3
    exact = run(*(a.astype(jnp.float32) for a in (x, kernel, g)))
    for rounded, expected in zip(run(x, kernel, g), exact, strict=True):
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(rounded.astype(jnp.float32), expected, rtol=2**-8, atol=1e-4)
