"""Schedules have the published figures; optimisers do what their formulas say, and spare what is no matrix."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from vit_jax import models, optim
from vit_jax.errors import UserError

PUBLISHED = {"base_lr": 0.03, "total_steps": 10_000, "warmup_steps": 500}


@pytest.mark.parametrize(
    ("decay_type", "step", "rate"),
    [
        ("cosine", 0, 0),
        ("cosine", 1, 6e-5),
        ("cosine", 250, 0.015),
        ("cosine", 500, 0.03),
        ("cosine", 5_250, 0.015),
        ("cosine", 10_000, 0),
        ("linear", 250, 0.015),
        ("linear", 500, 0.03),
        ("linear", 5_250, 0.015005),
        ("linear", 10_000, 1e-5),
        ("linear", 12_000, 1e-5),
    ],
)
def test_schedule_has_the_published_figures(decay_type, step, rate):
    schedule = optim.make_schedule(**PUBLISHED, decay_type=decay_type)
    np.testing.assert_allclose(schedule(step), rate, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), rate, rtol=1e-5, atol=1e-9)


def test_without_warmup_the_first_step_has_the_full_rate():
    schedule = optim.make_schedule(0.03, 100)
    np.testing.assert_allclose([schedule(0), schedule(50), schedule(100)], [0.03, 0.015, 0], atol=1e-9)


def test_a_warmup_as_long_as_the_run_only_warms_up():
    schedule = optim.make_schedule(0.03, 100, warmup_steps=100)
    np.testing.assert_allclose([schedule(1), schedule(50), schedule(99)], [0.0003, 0.015, 0.0297], rtol=1e-6)


# Optimisers, against NumPy

PARAMS = {"kernel": np.float32([[1, -2], [3, 4]]), "bias": np.float32([0.5, -0.5])}
GRADS = [  # of norms 6 and 0.3
    {"kernel": np.float32([[1, 2], [4, 3]]), "bias": np.float32([-2, np.sqrt(2)])},
    {"kernel": np.float32([[0.1, 0], [0, 0.2]]), "bias": np.float32([0.2, 0])},
]


def run(optimizer, params=PARAMS, grads=GRADS):
    """(parameters, optimiser state) after one update by each of `grads`."""
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def sgd_by_hand(rates, clip):
    params, momentum = dict(PARAMS), dict.fromkeys(PARAMS, 0)
    for rate, grads in zip(rates, GRADS, strict=True):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            momentum[name] = 0.9 * momentum[name] + g * min(1, clip / norm)
            params[name] = params[name] - rate * momentum[name]
    return params


@pytest.mark.parametrize("clip", [1.0, 10.0])
def test_sgd_clips_by_the_global_norm_and_has_momentum(clip):
    params, _ = run(optim.make_optimizer("sgd", 0.1, grad_norm_clip=clip))
    chex.assert_trees_all_close(params, sgd_by_hand([0.1, 0.1], clip), rtol=1e-6)


def test_the_first_update_has_the_schedules_rate_of_step_0():
    params, _ = run(optim.make_optimizer("sgd", lambda step: 0.1 * (step + 1), grad_norm_clip=1.0))
    chex.assert_trees_all_close(params, sgd_by_hand([0.1, 0.2], clip=1.0), rtol=1e-6)


@pytest.mark.parametrize("clip", [0, None])
def test_grad_norm_clip_0_or_none_clips_nothing(clip):
    params, _ = run(optim.make_optimizer("sgd", 0.1, grad_norm_clip=clip))
    chex.assert_trees_all_close(params, sgd_by_hand([0.1, 0.1], clip=np.inf), rtol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_momentum_is_held_in_the_type_asked_for(name, dtype):
    params, state = run(optim.make_optimizer(name, 0.1, dtype=dtype))
    (momentum,) = optax.tree.get_all_with_path(state, "trace" if name == "sgd" else "mu")
    chex.assert_type(jax.tree.leaves(momentum[1]), jnp.dtype(dtype))
    chex.assert_type(jax.tree.leaves(params), jnp.float32)


def test_bfloat16_momentum_is_rounded_and_nothing_else():
    params, state = run(optim.make_optimizer("sgd", 0.1, dtype="bfloat16"))
    exact = sgd_by_hand([0.1, 0.1], clip=np.inf)
    first, _ = run(optim.make_optimizer("sgd", 0.1, dtype="bfloat16"), grads=GRADS[:1])
    chex.assert_trees_all_close(first, run(optim.make_optimizer("sgd", 0.1), grads=GRADS[:1])[0], rtol=1e-7)
    chex.assert_trees_all_close(params, exact, atol=0.1 * 4 * 2**-7)  # rate x largest momentum x two roundings
    assert np.abs(params["bias"] - exact["bias"]).max() > 1e-5


def test_adamw_follows_its_formula_and_decays_kernels_only():
    rate, decay = 0.01, 0.1
    expected = dict(PARAMS)
    for name in PARAMS:
        m = v = 0
        for t, grads in enumerate(GRADS, start=1):
            g = grads[name].astype(np.float64)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            adam = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            expected[name] = expected[name] - rate * (adam + decay * expected[name] * (name == "kernel"))
    params, _ = run(optim.make_optimizer("adamw", rate, weight_decay=decay))
    chex.assert_trees_all_close(params, jax.tree.map(np.float32, expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("testing", {}),
        ("R+ViT-Ti_16", {"resnet": {"num_layers": (1,)}, "transformer": {"num_layers": 1}}),
        ("Mixer-B_32", {"num_blocks": 1}),
    ],
)
def test_weight_decay_shrinks_the_kernels_of_a_real_model_and_spares_all_else(name, fields):
    model = models.get_model(name, num_classes=3, **fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    params = jax.tree.map(lambda x: np.ones(x.shape[-1:], np.float32), shapes)  # a row of each stands for the whole
    zeros = jax.tree.map(np.zeros_like, params)
    decayed, _ = run(optim.make_optimizer("adamw", 0.5, weight_decay=0.5), params, [zeros])
    for path, x in flatten_dict(decayed).items():
        np.testing.assert_array_equal(x, 0.75 if path[-1] == "kernel" else 1, err_msg="/".join(path))
    spared = {path[-1] for path in flatten_dict(params)} - {"kernel"}
    assert spared == {"scale", "bias"} | (set() if "Mixer" in name else {"cls", "pos_embedding"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.make_optimizer("adam", 0.1), "unknown optimizer 'adam': did you mean adamw"),
        (lambda: optim.make_schedule(0.1, 10, decay_type="cosin"), "unknown decay_type 'cosin': did you mean cosine"),
        (lambda: optim.make_optimizer("sgd", 0.1, weight_decay=0.1), "weight_decay=0.1 needs --config.optimizer=adamw"),
    ],
)
def test_what_does_not_exist_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
