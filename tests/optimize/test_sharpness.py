"""SAM and GSAM against two steps in plain NumPy on a logistic regression, on one device and on all of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.optimize import optim, sharpness

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 5))
Y = np.sign(X @ RNG.normal(size=5) + 0.5 * RNG.normal(size=64))
PARAMS = {"b": np.float32(0.3), "w": RNG.normal(size=5).astype(np.float32)}
SCHEDULE = optim.make_schedule(0.1, 100, warmup_steps=10, decay_type="linear", linear_end=0.02)
GSAM = {"rho_max": 0.5, "rho_min": 0.1, "alpha": 0.7, "schedule": SCHEDULE, "lr_max": 0.1, "lr_min": 0.02}


def mean_grad(params, x=None, y=None):
    x, y = (X.astype(np.float32), Y.astype(np.float32)) if x is None else (x, y)

    def loss(params):
        value = jnp.mean(jnp.log1p(jnp.exp(-y * (x @ params["w"] + params["b"]))))
        return value, {"loss": value, "share": jnp.mean(y > 0)}

    return jax.grad(loss, has_aux=True)(params)


def by_hand(v):
    """(gradient, loss) at v = (b, w) in float64."""
    margin = Y * (X @ v[1:] + v[0])
    weight = -Y / (1 + np.exp(margin)) / len(Y)
    return np.concatenate([[weight.sum()], weight @ X]), np.log1p(np.exp(-margin)).mean()


def sam_by_hand(rho):
    v = np.concatenate([[PARAMS["b"]], PARAMS["w"]]).astype(np.float64)
    clean, loss = by_hand(v)
    perturbed, loss_perturbed = by_hand(v + rho * clean / np.linalg.norm(clean))
    return clean, perturbed, {"loss": loss, "loss_perturbed": loss_perturbed, "share": np.mean(Y > 0)}


def assert_close(result, vector, metrics):
    grads, measured = jax.device_get(result)
    np.testing.assert_allclose(np.concatenate([[grads["b"]], grads["w"]]), vector, atol=1e-6, rtol=0)
    chex.assert_trees_all_close(measured, metrics, atol=1e-6)


def test_sam_is_the_gradient_uphill_and_reports_the_loss_where_it_stands():
    _, perturbed, metrics = sam_by_hand(0.5)
    assert metrics["loss_perturbed"] > metrics["loss"] + 0.1
    assert_close(sharpness.make_sam(rho=0.5)(mean_grad, PARAMS, jnp.int32(0)), perturbed, metrics)


@pytest.mark.parametrize(("step", "rho"), [(0, 0.1), (1, 0.1), (5, 0.25), (10, 0.5), (55, 0.3), (100, 0.1)])
def test_gsam_takes_away_what_is_orthogonal_and_its_radius_follows_the_rate(step, rho):
    clean, perturbed, metrics = sam_by_hand(rho)
    orthogonal = clean - (clean @ perturbed) / (perturbed @ perturbed) * perturbed
    assert np.linalg.norm(orthogonal) > 1e-3
    result = jax.jit(lambda p, i: sharpness.make_gsam(**GSAM)(mean_grad, p, i))(PARAMS, jnp.int32(step))
    assert_close(result, perturbed - 0.7 * orthogonal, metrics)


def test_gsam_without_alpha_and_with_one_radius_is_sam():
    gsam = sharpness.make_gsam(**GSAM | {"rho_min": 0.5, "alpha": 0.0})
    chex.assert_trees_all_close(
        gsam(mean_grad, PARAMS, jnp.int32(3)), sharpness.make_sam(rho=0.5)(mean_grad, PARAMS, jnp.int32(3)), rtol=1e-6
    )


@pytest.mark.parametrize("make", [lambda: sharpness.make_sam(rho=0.5), lambda: sharpness.make_gsam(**GSAM)])
def test_the_result_does_not_depend_on_how_the_batch_is_shared_out(make):
    """Over all devices that there are, each with two micro-batches."""
    n = jax.device_count()
    x, y = X.astype(np.float32).reshape(n, 2, -1, 5), Y.astype(np.float32).reshape(n, 2, -1)

    def on_device(params, x, y):
        def over_all(params):
            halves = [mean_grad(params, x[i], y[i]) for i in range(2)]
            return jax.lax.pmean(jax.tree.map(lambda a, b: (a + b) / 2, *halves), "devices")

        return make()(over_all, params, jnp.int32(10))

    shared = jax.pmap(on_device, axis_name="devices", in_axes=(None, 0, 0))(PARAMS, x, y)
    whole = make()(mean_grad, PARAMS, jnp.int32(10))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[-1], shared), whole, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: sharpness.make_sam(rho=0.5), lambda: sharpness.make_gsam(**GSAM)])
def test_a_gradient_of_zero_stays_zero(make):
    grads, _ = make()(lambda p: (jax.tree.map(jnp.zeros_like, p), {"loss": jnp.zeros(())}), PARAMS, jnp.int32(10))
    chex.assert_trees_all_equal(grads, jax.tree.map(np.zeros_like, PARAMS))


def test_both_are_made_by_name():
    rate = {"schedule": SCHEDULE, "lr_max": 0.1, "lr_min": 0.02}
    sam = sharpness.make_sharpness("sam", {"rho": 0.5}, **rate)
    chex.assert_trees_all_equal(
        sam(mean_grad, PARAMS, jnp.int32(0)), sharpness.make_sam(rho=0.5)(mean_grad, PARAMS, jnp.int32(0))
    )
    gsam = sharpness.make_sharpness("gsam", {"rho_max": 0.5, "rho_min": 0.1, "alpha": 0.7}, **rate)
    chex.assert_trees_all_equal(
        gsam(mean_grad, PARAMS, jnp.int32(0)), sharpness.make_gsam(**GSAM)(mean_grad, PARAMS, jnp.int32(0))
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sma", {}, "unknown sharpness 'sma': did you mean sam"),
        ("sam", {"rho": 0}, "rho=0 must be positive"),
        ("sam", {"rho_max": 0.1}, "unknown option of sam 'rho_max': did you mean rho"),
        ("sam", {}, "sam needs rho"),
        ("gsam", {"rho_max": 0.1, "rho_min": 0.2, "alpha": 0.1}, "rho_min=0.2, rho_max=0.1"),
        ("gsam", {"rho_max": 0.1, "rho_min": 0.1}, "gsam needs alpha"),
        ("gsam", {"rho_max": 0.1, "rho_min": 0.1, "alpha": 0.1}, "lr_min=0.1 must be below lr_max=0.1"),
    ],
)
def test_what_makes_no_sense_is_refused(name, options, message):
    with pytest.raises(UserError, match=message):
        sharpness.make_sharpness(name, options, schedule=SCHEDULE, lr_max=0.1, lr_min=0.1)
