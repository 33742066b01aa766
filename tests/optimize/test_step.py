"""One update: accumulation, keys, averaging, donation, and that all of it compiles once."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vit_jax import models
from vit_jax.data.device import augment
from vit_jax.errors import UserError
from vit_jax.optimize import optim, parallel
from vit_jax.optimize.step import State, make_update
from vit_jax.run.experiment import make_ema_decay
from vit_jax.settings import Settings
from vit_jax.tasks import classify, images
from vit_jax.tasks.task import Loss


@pytest.fixture(scope="module")
def model():
    fields = {"num_layers": 1, "mlp_dim": 8, "num_heads": 2, "dropout_rate": 0.0}
    return models.get_model("testing", num_classes=3, hidden_size=8, patches={"size": (4, 4)}, transformer=fields)


def _batch(rng: np.random.Generator, b: int = 8) -> dict[str, np.ndarray]:
    images = rng.integers(0, 256, (b, 8, 8, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, 3, b, np.int32), "seed": rng.integers(2**32, size=b, dtype=np.uint32)}


def _state(model, optimizer) -> State:
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _loss(model, **options):
    return classify.make_loss(model, images.prepare(3, **options))


@pytest.fixture(params=["pmap", "mesh"])
def parallelism(request: pytest.FixtureRequest) -> parallel.Parallelism:
    return parallel.Pmap() if request.param == "pmap" else parallel.Mesh()


def test_four_micro_batches_give_the_update_of_one(model, parallelism: parallel.Parallelism):
    optimizer = optim.make_optimizer("sgd", 0.1, grad_norm_clip=1.0)
    batch = parallelism.send(_batch(np.random.default_rng(0)))
    results = []
    for accum_steps in (1, 4):
        update = parallelism.train_step(make_update(_loss(model), optimizer, parallelism, seed=0, accum_steps=accum_steps))
        results.append(update(parallelism.place(_state(model, optimizer)), batch))
    chex.assert_trees_all_close(*results, atol=1e-6)


def test_an_update_is_that_of_plain_gradient_descent_on_the_mean_cross_entropy(model, parallelism: parallel.Parallelism):
    optimizer = optim.make_optimizer("sgd", 0.1)
    state, batch = _state(model, optimizer), _batch(np.random.default_rng(1))

    def loss(params):
        logits = model.apply({"params": params}, (batch["image"] - np.float32(127.5)) / np.float32(127.5))
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(batch["label"], 3), axis=-1))

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    update = parallelism.train_step(make_update(_loss(model), optimizer, parallelism, seed=0))
    new, metrics = parallelism.read(update(parallelism.place(state), parallelism.send(batch)))
    chex.assert_trees_all_close(new.params, expected, atol=1e-6)
    chex.assert_trees_all_close(metrics["loss"], value, atol=1e-6)
    chex.assert_trees_all_close(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert new.step == 1


def test_every_micro_batch_and_every_step_draws_its_own_randomness(parallelism: parallel.Parallelism):
    """The gradient of a randomly masked sum is the mask: one mask for both micro-batches could never average to 1/2."""

    def loss(params, context, batch, rng):
        return Loss(jnp.sum(params * jax.random.bernoulli(rng, shape=params.shape)) + 0 * jnp.sum(batch["x"]))

    optimizer = optax.sgd(1.0)
    params = jnp.zeros(64)
    update = parallelism.train_step(make_update(loss, optimizer, parallelism, seed=0, accum_steps=2))
    state = parallelism.place(State(jnp.zeros((), jnp.int32), params, optimizer.init(params)))
    masks = []
    for _ in range(2):
        before = parallelism.read(state.params)
        state, _ = update(state, parallelism.send({"x": np.zeros(2, np.float32)}))
        masks.append(before - parallelism.read(state.params))
    assert set(np.unique(masks)) == {0.0, 0.5, 1.0}
    assert (masks[0] != masks[1]).any()


def test_the_state_is_donated_compiles_once_and_nothing_is_copied_in_the_loop(model, parallelism: parallel.Parallelism):
    optimizer = optim.make_optimizer("adamw", 0.1, weight_decay=0.1)
    loss, traces = _loss(model, augmented=augment.random_flip), []

    def counted(*args):
        traces.append(args)
        return loss(*args)

    update = parallelism.train_step(make_update(counted, optimizer, parallelism, seed=0, ema_decay=0.9, skip_nonfinite=True))
    rng = np.random.default_rng(2)
    state = first = parallelism.create(lambda: _state(model, optimizer).replace(ema=_state(model, optimizer).params))
    batches = parallelism.prefetch(iter([_batch(rng) for _ in range(4)]), 2)
    with jax.transfer_guard("disallow"):  # explicit transfers are allowed: sending a batch, reading metrics
        for batch in batches:
            state, metrics = update(state, batch)
        parallelism.read(metrics)
    assert all(x.is_deleted() for x in jax.tree.leaves(first.params))
    assert len(traces) == 1


def test_the_average_of_the_parameters_follows_them_and_what_is_frozen_stays(model):
    parallelism, optimizer = parallel.Pmap(), optim.make_optimizer("sgd", 0.1)
    state = _state(model, optimizer)
    head, rest = {"head": state.params["head"]}, {k: v for k, v in state.params.items() if k != "head"}
    state = State(state.step, head, optimizer.init(head), ema=head, frozen={"model": rest})
    update = parallelism.train_step(make_update(_loss(model), optimizer, parallelism, seed=0, ema_decay=0.75))
    new, _ = parallelism.read(update(parallelism.place(state), parallelism.send(_batch(np.random.default_rng(1)))))
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, head, new.params)
    chex.assert_trees_all_close(new.ema, expected, atol=1e-7)
    assert np.abs(new.params["head"]["kernel"]).max() > 0
    chex.assert_trees_all_equal(new.frozen["model"], jax.device_get(rest))


def test_a_step_that_is_not_finite_changes_nothing_but_the_counter_if_asked_so():
    """1/0 in the second of three steps."""

    def loss(params, context, batch, rng):
        return Loss(jnp.sum(params**2) / jnp.mean(batch["x"]))

    parallelism, optimizer = parallel.Pmap(), optax.adam(0.1)
    params = jnp.ones(3)
    states = {}
    for xs in ((1.0, 0.0, 1.0), (1.0, 1.0)):
        update = parallelism.train_step(make_update(loss, optimizer, parallelism, seed=0, ema_decay=0.5, skip_nonfinite=True))
        state = parallelism.place(State(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema=params))
        skipped = []
        for x in xs:
            state, metrics = update(state, parallelism.send({"x": np.full(2, x, np.float32)}))
            skipped.append(not np.isfinite(parallelism.read(metrics)["update_norm"]))
        assert skipped == [x == 0 for x in xs]
        states[len(xs)] = parallelism.read(state)
    assert states[3].step == 3
    chex.assert_trees_all_equal(states[3].replace(step=None), states[2].replace(step=None))


def test_prefetching_keeps_order_and_everything_to_the_last_batch(parallelism: parallel.Parallelism):
    batches = [{"x": np.full((2, 1), i)} for i in range(5)]
    got = [int(parallelism.gather(batch)["x"][0, 0]) for batch in parallelism.prefetch(iter(batches), 3)]
    assert got == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("batch", "accum"), [(0, 1), (7, 2), (8, 0), (8, 3)])
def test_a_batch_that_cannot_be_shared_out_is_refused(batch: int, accum: int):
    with pytest.raises(UserError, match=f"batch={batch} .*accum_steps={accum}.* choose a multiple"):
        parallel.check_batch(batch, accum, shards=1)


def _compared(params, context, embeddings):
    """A contrastive loss over all examples of all devices: of this device's rows against every column."""
    everything = context.devices.all_examples(embeddings)
    b = embeddings.shape[0]
    own = context.devices.device_index() * b + jnp.arange(b)
    logits = params["t"] * embeddings @ everything.T
    return Loss(optax.softmax_cross_entropy_with_integer_labels(logits, own).mean(), carry={"seen": context.carry["seen"] + 1})


def _embedded(params, context, batch, key):
    z = jnp.tanh(batch["x"] @ params["w"])
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def test_cached_gradients_of_a_loss_that_compares_all_examples_are_those_of_the_whole_batch(parallelism):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 7)).astype(np.float32), "t": np.float32(3.0)}
    batch, optimizer, results = {"x": rng.normal(size=(8, 5)).astype(np.float32)}, optax.sgd(0.5), []

    def loss(params, context, batch, key):
        return _compared(params, context, _embedded(params, context, batch, key))

    for accum_steps in (1, 4):
        options = {"seed": 0, "accum_steps": accum_steps, "embed": _embedded, "loss_of": _compared}
        update = parallelism.train_step(make_update(loss, optimizer, parallelism, **options))
        state = State(jnp.zeros((), jnp.int32), params, optimizer.init(params), carry={"seen": jnp.int32(0)})
        results.append(parallelism.read(update(parallelism.place(state), parallelism.send(batch))))
    (one, one_metrics), (four, four_metrics) = results
    chex.assert_trees_all_close(one.params, four.params, atol=1e-6)
    np.testing.assert_allclose(one_metrics["loss"], four_metrics["loss"], rtol=1e-6)
    assert one.carry["seen"] == four.carry["seen"] == 1


def test_totals_are_those_of_the_whole_batch_and_the_carry_goes_from_micro_batch_to_micro_batch(parallelism):
    """Boxes are unevenly shared out: a mean of the micro-batches' means would be another number."""
    x, valid = np.arange(16, dtype=np.float32).reshape(8, 2), np.arange(16).reshape(8, 2) % 5 == 0

    def loss(params, context, batch, key):
        total = jnp.sum(params * batch["x"] * batch["valid"])
        return Loss(total / context.totals["boxes"], carry=context.carry + 1)

    optimizer = optax.sgd(1.0)
    for accum_steps in (1, 2, 4):
        totals = {"totals": lambda batch: {"boxes": jnp.sum(batch["valid"])}}
        update = parallelism.train_step(make_update(loss, optimizer, parallelism, seed=0, accum_steps=accum_steps, **totals))
        state = State(jnp.zeros((), jnp.int32), jnp.float32(1.0), optimizer.init(jnp.float32(1.0)), carry=jnp.int32(0))
        new, metrics = parallelism.read(update(parallelism.place(state), parallelism.send({"x": x, "valid": valid})))
        np.testing.assert_allclose(metrics["loss"], (x * valid).sum() / valid.sum(), rtol=1e-6)
        assert new.carry == accum_steps


def test_the_average_may_follow_a_schedule():
    settings = Settings(total_steps=4, ema_decay=0.9, ema_decay_end=1.0)
    decay = make_ema_decay(settings)
    expected = [1 - (1 - 0.9) * (np.cos(np.pi * step / 4) + 1) / 2 for step in range(5)]
    np.testing.assert_allclose([float(decay(step)) for step in range(5)], expected, rtol=1e-6)
