"""One update: accumulation, keys, averaging, donation, and that all of it compiles once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import models, optim, parallel
from vit_jax.errors import UserError
from vit_jax.step import State, make_update
from vit_jax.tasks import classify


@pytest.fixture(scope="module")
def model():
    fields = {"num_layers": 1, "mlp_dim": 8, "num_heads": 2, "dropout_rate": 0.0}
    return models.get_model("testing", num_classes=3, hidden_size=8, patches={"size": (4, 4)}, transformer=fields)


def _batch(rng: np.random.Generator, b: int = 8) -> dict[str, np.ndarray]:
    images = rng.integers(0, 256, (b, 8, 8, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, 3, b, np.int32), "seed": rng.integers(2**32, size=b, dtype=np.uint32)}


def _state(model, optimizer) -> State:
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def test_four_micro_batches_give_the_update_of_one(model):
    optimizer = optim.make_optimizer("sgd", 0.1, grad_norm_clip=1.0)
    batch = parallel.shard(_batch(np.random.default_rng(0)))
    results = []
    for accum_steps in (1, 4):
        update = parallel.pmap_update(make_update(classify.make_task(model).loss, optimizer, seed=0, accum_steps=accum_steps))
        results.append(update(parallel.replicate(_state(model, optimizer)), batch))
    chex.assert_trees_all_close(*results, atol=1e-6)


def test_an_update_is_that_of_plain_gradient_descent_on_the_mean_cross_entropy(model):
    optimizer = optim.make_optimizer("sgd", 0.1)
    state, batch = _state(model, optimizer), _batch(np.random.default_rng(1))

    def loss(params):
        logits = model.apply({"params": params}, (batch["image"] - np.float32(127.5)) / np.float32(127.5))
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(batch["label"], 3), axis=-1))

    value, grads = jax.value_and_grad(loss)(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    update = parallel.pmap_update(make_update(classify.make_task(model, flip=False).loss, optimizer, seed=0))
    new, metrics = parallel.unreplicate(update(parallel.replicate(state), parallel.shard(batch)))
    chex.assert_trees_all_close(new.params, expected, atol=1e-6)
    chex.assert_trees_all_close(metrics["loss"], value, atol=1e-6)
    chex.assert_trees_all_close(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert new.step == 1


def test_every_micro_batch_and_every_step_draws_its_own_randomness():
    """The gradient of a randomly masked sum is the mask: one mask for both micro-batches could never average to 1/2."""

    def loss(params, batch, rng):
        masked = jnp.sum(params * jax.random.bernoulli(rng, shape=params.shape)) + 0 * jnp.sum(batch["x"])
        return masked, {"loss": masked}

    optimizer = optax.sgd(1.0)
    params = jnp.zeros(64)
    update = parallel.pmap_update(make_update(loss, optimizer, seed=0, accum_steps=2))
    state = parallel.replicate(State(jnp.zeros((), jnp.int32), params, optimizer.init(params)))
    masks = []
    for _ in range(2):
        before = np.asarray(state.params[0])
        state, _ = update(state, parallel.shard({"x": np.zeros(2, np.float32)}))
        masks.append(before - np.asarray(state.params[0]))
    assert set(np.unique(masks)) == {0.0, 0.5, 1.0}
    assert (masks[0] != masks[1]).any()


def test_the_state_is_donated_and_the_step_compiles_once(model):
    optimizer = optim.make_optimizer("adamw", 0.1, weight_decay=0.1)
    loss = classify.make_task(model).loss
    traces = []

    def counted(*args):
        traces.append(args)
        return loss(*args)

    update = parallel.pmap_update(make_update(counted, optimizer, seed=0))
    rng = np.random.default_rng(2)
    state = first = parallel.replicate(_state(model, optimizer))
    batches = parallel.prefetch(iter([_batch(rng) for _ in range(3)]), 2)
    for batch in batches:
        state, _ = update(state, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(first.params))
    assert len(traces) == 1


def test_prefetching_keeps_order_and_everything_to_the_last_batch():
    batches = [{"x": np.full((2, 1), i)} for i in range(5)]
    got = [int(batch["x"][0, 0, 0]) for batch in parallel.prefetch(iter(batches), 3)]
    assert got == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("batch", "accum"), [(0, 1), (7, 2), (8, 0), (8, 3)])
def test_a_batch_that_cannot_be_shared_out_is_refused(batch: int, accum: int):
    with pytest.raises(UserError, match=f"batch={batch} .*accum_steps={accum}.* choose a multiple"):
        parallel.check_batch(batch, accum)
