"""Linear probe: multinomial logistic regression on frozen features, as CLIP evaluates (https://arxiv.org/abs/2103.00020)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from vit_jax.errors import UserError
from vit_jax.evaluators import passes
from vit_jax.run.experiment import Experiment

L2 = tuple(10.0**i for i in range(-6, 1))
HELD_OUT = 0.2  # share of the training split on which l2 is chosen
TOLERANCE = 1e-5  # largest number in the gradient of the mean loss at which the fit ends
STEPS = 500  # or at this many

Weights = tuple[Float[Array, "d classes"], Float[Array, " classes"]]


def make_evaluator(
    experiment: Experiment,
    *,
    train: str | None = None,
    test: str | None = None,
    dataset: str | None = None,
    l2: Sequence[float] = L2,
) -> Callable[[Any], dict[str, float]]:
    """parameters → `probe`, the accuracy on `test` of what was learnt on `train`, and of several l2 the chosen `probe_l2`.

    The splits are `config.pp.train` and `config.pp.test` if not said otherwise; a head is ignored.
    """
    if min(l2, default=0) <= 0:
        raise UserError(f"l2={tuple(l2)}: all must be positive, and one or more")
    train_source, test_source = passes.open_pair(experiment, train, test, dataset)
    if len(train_source) < 2:
        raise UserError(f"a linear probe needs 2 images or more to learn from, not {len(train_source)}")
    features = passes.make_features(experiment)

    def evaluator(params: Any) -> dict[str, float]:
        accuracy, chosen = probe(*features(params, train_source), *features(params, test_source), train_source.num_classes, l2)
        return {"probe": accuracy} | ({"probe_l2": chosen} if len(l2) > 1 else {})

    return evaluator


def probe(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
    num_classes: int,
    l2: Sequence[float] = L2,
) -> tuple[float, float]:
    """(accuracy on the test rows, the l2 it was reached with).

    Features are standardised by mean and deviation of the training rows. Of several l2, the one with which the rest of
    the training rows tells a random fifth of them best is chosen, of equal ones the largest; all rows are then learnt.
    """
    mean, std = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64) + 1e-5
    train, test = (jnp.asarray((x - mean) / std, jnp.float32) for x in (train, test))
    labels = jnp.asarray(train_labels)
    start = jnp.zeros((train.shape[1], num_classes)), jnp.zeros(num_classes)
    chosen = l2[0]
    if len(l2) > 1:
        held_out = np.zeros(len(train), bool)
        held_out[np.random.default_rng(0).permutation(len(train))[: max(1, round(HELD_OUT * len(train)))]] = True
        scores, weights = {}, start
        for value in sorted(l2, reverse=True):  # from the easiest to fit; each begins where the one before ended
            weights = fit(weights, train, labels, ~held_out, value)
            scores[value] = np.mean((predict(weights, train) == train_labels)[held_out])
        chosen = max(scores, key=lambda value: (scores[value], value))
    weights = fit(start, train, labels, np.ones(len(train), bool), chosen)
    return float(np.mean(predict(weights, test) == test_labels)), chosen


@functools.partial(jax.jit, static_argnames=("loss", "with_bias"))
def fit(
    start: Weights,
    x: Float[Array, "n d"],
    targets: Int[Array, " n"] | Float[Array, "n classes"],
    counted: Bool[Array, " n"],
    l2: float,
    *,
    loss: Callable[[Array, Array], Float[Array, " n"]] = optax.softmax_cross_entropy_with_integer_labels,
    with_bias: bool = True,
    tolerance: float = TOLERANCE,
) -> Weights:
    """(W, b) = argmin mean of loss(xW + b, targets) + l2/2 ‖W‖² over the counted rows, by L-BFGS; b stays without `with_bias`.

    With optax rather than scikit-learn, whose C is 1 / (n · l2): on two cores it took from a tenth to three quarters of
    the time, and it runs on a GPU. Rows are left out by a mask, so that one program does it all.
    """

    def objective(weights: Weights) -> Float[Array, ""]:
        kernel, bias = weights
        losses = loss(logits((kernel, bias if with_bias else jax.lax.stop_gradient(bias)), x), targets)
        return jnp.sum(losses * counted) / counted.sum() + l2 / 2 * jnp.sum(kernel**2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry: tuple[Weights, Any]) -> tuple[Weights, Any]:
        weights, state = carry
        value, grad = value_and_grad(weights, state=state)
        updates, state = optimizer.update(grad, state, weights, value=value, grad=grad, value_fn=objective)
        return optax.apply_updates(weights, updates), state

    def goes_on(carry: tuple[Weights, Any]) -> Array:
        steps, grad = optax.tree.get(carry[1], "count"), optax.tree.get(carry[1], "grad")
        steepest = jnp.maximum(*(jnp.abs(g).max() for g in grad))
        return (steps == 0) | ((steps < STEPS) & (steepest > tolerance))

    return jax.lax.while_loop(goes_on, step, (start, optimizer.init(start)))[0]


def predict(weights: Weights, x: Float[Array, "n d"]) -> Int[np.ndarray, " n"]:
    """The class with the highest score, by row."""
    return np.asarray(logits(weights, x).argmax(axis=-1))


@jax.jit
def logits(weights: Weights, x: Float[Array, "n d"]) -> Float[Array, "n classes"]:
    """xW + b."""
    return jnp.matmul(x, weights[0], precision="highest") + weights[1]
