"""What the blocks of a model share is traced once, and computes what it did when it was flax's."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vit_jax.models import attention, linear, norms
from vit_jax.models.layers import Encoder


def test_the_parts_of_equal_blocks_are_traced_once_with_their_gradients():
    model = Encoder(num_layers=5, mlp_dim=22, num_heads=2, dropout_rate=0.0, attention_dropout_rate=0.1)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((3, 7, 14))))["params"]

    def loss(params, x):
        return model.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(1)})[0].sum()

    with (
        mock.patch.object(norms, "_over_last", wraps=norms._over_last) as scaled,
        mock.patch.object(attention, "_logits", wraps=attention._logits) as attended,
        mock.patch.object(linear, "_value_and_slope", wraps=linear._value_and_slope) as activated,
    ):
        jax.jit(jax.grad(loss)).trace(params, jax.ShapeDtypeStruct((3, 7, 14), jnp.float32))
    assert scaled.call_count <= 2 and attended.call_count <= 3 and activated.call_count == 1


@pytest.mark.parametrize(("kind", "theirs"), [("layer", nn.LayerNorm), ("rms", nn.RMSNorm)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_and_their_gradients_are_those_of_flax(kind, theirs, dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, 20), dtype)
    ours, theirs = norms.make_norm(kind, 1e-5, dtype, None), theirs(1e-5, dtype)
    params = jax.tree.map(lambda p: p + jnp.linspace(-1, 1, 20), theirs.init(jax.random.key(1), x))

    def with_gradients(norm, params, x):
        y, vjp = jax.vjp(norm.apply, params, x)
        return y, vjp(jnp.cos(y))

    run = jax.jit(with_gradients, static_argnums=0)
    found, expected = run(ours, params, x), run(theirs, params, x)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours.init(jax.random.key(1), x), theirs.init(jax.random.key(1), x)))
