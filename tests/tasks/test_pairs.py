"""The contrastive losses equal plain NumPy and the gradients of the dense formula, on all devices and in parts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax.models.two_towers import TwoTowers
from vit_jax.optimize import parallel
from vit_jax.optimize.step import State, make_update
from vit_jax.tasks import pairs


def embeddings(b, d=5):
    z = np.random.default_rng(b).normal(size=(2, b, d)).astype(np.float32)
    return tuple(z / np.linalg.norm(z, axis=-1, keepdims=True))


OUT = {"softmax": {"t": np.array([7.0], np.float32)}, "sigmoid": {"t": np.array([7.0], np.float32), "b": np.array([-3.0])}}


def numpy_loss(kind, zimg, ztxt, out):
    """In float64, from the formulas of the papers."""
    logits = np.float64(out["t"]) * np.float64(zimg) @ np.float64(ztxt).T + np.float64(out.get("b", 0.0))
    if kind == "sigmoid":
        signs = 2 * np.eye(len(zimg)) - 1
        return np.log1p(np.exp(-signs * logits)).sum() / len(zimg)
    rows, columns = (np.diag(logits) - np.log(np.exp(logits).sum(axis=axis)) for axis in (1, 0))
    return -(rows.mean() + columns.mean()) / 2


def dense_loss(kind, zimg, ztxt, out):
    """The same in JAX, for its gradients: the whole table at once."""
    logits = out["t"] * zimg @ ztxt.T + out.get("b", 0.0)
    if kind == "sigmoid":
        return -jax.nn.log_sigmoid((2 * jnp.eye(len(zimg)) - 1) * logits).sum() / len(zimg)
    return -(jnp.diag(jax.nn.log_softmax(logits, 1)).mean() + jnp.diag(jax.nn.log_softmax(logits, 0)).mean()) / 2


class OneDevice:
    """`task.Devices` of a device that is alone."""

    def all_examples(self, tree):
        return tree

    def device_index(self):
        return 0


@pytest.mark.parametrize("kind", pairs.LOSSES)
@pytest.mark.parametrize("rows", [12, 5, 1])
def test_losses_and_gradients_are_those_of_the_plain_formula_in_parts_or_whole(kind, rows):
    zimg, ztxt = embeddings(12)

    def in_parts(zimg, ztxt, out):
        return pairs.LOSSES[kind]((zimg, ztxt), out, OneDevice(), rows=rows).value

    value, grads = jax.jit(jax.value_and_grad(in_parts, (0, 1, 2)))(zimg, ztxt, OUT[kind])
    expected = jax.jit(jax.grad(lambda *args: dense_loss(kind, *args), (0, 1, 2)))(zimg, ztxt, OUT[kind])
    np.testing.assert_allclose(value, numpy_loss(kind, zimg, ztxt, OUT[kind]), rtol=1e-6)
    chex.assert_trees_all_close(grads, expected, atol=1e-6)


def test_what_is_found_is_counted():
    zimg = np.eye(4, dtype=np.float32)
    ztxt = zimg[[0, 1, 3, 2]]
    metrics = pairs.softmax_loss((zimg, ztxt), OUT["softmax"], OneDevice(), rows=2).metrics
    assert metrics == {"text_found": 0.5, "image_found": 0.5}


def test_parts_need_no_memory_for_the_whole_table():
    b, rows = 2048, 64

    def memory(rows):
        grad = jax.grad(lambda z: pairs.softmax_loss(z, OUT["softmax"], OneDevice(), rows=rows).value)
        shape = jax.ShapeDtypeStruct((b, 8), jnp.float32)
        return jax.jit(grad).lower((shape, shape)).compile().memory_analysis().temp_size_in_bytes

    assert memory(rows) < b * b * 4 / 4 < memory(b)


@pytest.mark.parametrize(
    "kind, ways", [("softmax", [(parallel.Pmap, 2), (parallel.Mesh, 1)]), ("sigmoid", [(parallel.Pmap, 1), (parallel.Mesh, 2)])]
)
def test_a_step_is_the_same_on_pmap_and_mesh_and_with_cached_gradients(kind, ways, monkeypatch):
    """One step of a model of both towers, against the dense formula on the whole batch."""
    monkeypatch.setattr(pairs, "ROWS", 4)
    vit = {"patches": {"size": (4, 4)}, "hidden_size": 8, "classifier": "token"}
    vit |= {"transformer": {"num_layers": 1, "mlp_dim": 8, "num_heads": 2, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}}
    text = {"width": 8, "num_layers": 1, "mlp_dim": 8, "num_heads": 2, "vocab_size": 11}
    bias = {"bias_init": -1.0} if kind == "sigmoid" else {}
    model = TwoTowers(image=vit, text=text, out_dim=6, temperature_init=5.0, **bias)
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 256, (16, 8, 8, 3), np.uint8), "tokens": rng.integers(0, 11, (16, 5), np.int32)}
    images = (batch["image"].astype(np.float32) - 127.5) / 127.5
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), images=images, tokens=batch["tokens"])["params"])
    # An image's head and class token begin at 0, which has no direction
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.5, x.shape).astype(np.float32), params)
    embed, loss_of = pairs.make_embed(model, [127.5] * 3, [127.5] * 3), pairs.make_loss_of(model, loss=kind)

    def loss(params, context, batch, key):
        return loss_of(params, context, embed(params, context, batch, key))

    def dense(params):
        return dense_loss(kind, *model.apply({"params": params}, images=images, tokens=batch["tokens"]))

    value, grads = jax.jit(jax.value_and_grad(dense))(params)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    optimizer = optax.sgd(0.1)
    for devices, accum_steps in ways:
        parallelism = devices()
        options = {"seed": 0, "accum_steps": accum_steps, "embed": embed, "loss_of": loss_of}
        update = parallelism.train_step(make_update(loss, optimizer, parallelism, **options))
        state = State(jnp.zeros((), jnp.int32), params, optimizer.init(params))
        new, metrics = parallelism.read(update(parallelism.place(state), parallelism.send(batch)))
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
        chex.assert_trees_all_close(new.params, jax.tree.map(lambda x, g: x - 0.1 * g, params, grads), atol=1e-6)
