"""One training step: gradients over micro-batches and devices, then the optimiser. One text for pmap, mesh and all tasks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vit_jax.optimize import trainable
from vit_jax.optimize.parallel import Parallelism
from vit_jax.tasks.task import Batch, Context, Loss, Metrics, Params, Tree

MeanGrad = Callable[[Tree], tuple[Tree, dict]]
LossFunction = Callable[[Params, Context, Batch, jax.Array], Loss]
Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


@struct.dataclass
class State:
    """Everything that a step needs. The loader's position and all randomness follow from `step` and the seed.

    Attributes:
      params: what is trained.
      ema: the running average of `params`, or None.
      carry: what a task takes along from step to step, such as a centre; {} for most.
      frozen: trees by name that are not trained, such as the rest of the model or a teacher; no checkpoint holds them.
    """

    step: Int[Array, ""]
    params: Tree
    opt_state: optax.OptState
    ema: Tree = None
    carry: Tree = struct.field(default_factory=dict)
    frozen: dict[str, Tree] = struct.field(default_factory=dict)


def make_update(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    parallelism: Parallelism,
    *,
    seed: int,
    accum_steps: int = 1,
    ema_decay: float | Schedule | None = None,
    skip_nonfinite: bool = False,
    sharpness: Callable[[MeanGrad, Tree, Array], tuple[Tree, dict]] | None = None,
    totals: Callable[[Batch], Metrics] = lambda batch: {},
    embed: Callable[[Params, Context, Batch, jax.Array], Tree] | None = None,
    loss_of: Callable[[Params, Context, Tree], Loss] | None = None,
) -> Callable[[State, Batch], tuple[State, dict]]:
    """(state, batch) → (state, metrics), to be run by `parallelism.train_step`.

    Gradients are averaged over `accum_steps` micro-batches and over the devices. Every step, micro-batch and, with pmap,
    device has a key of its own. Metrics are the means of the loss and its own, `grad_norm` before clipping, `update_norm`,
    and `stop` if the batch has a field of that name: whether any process asks to stop.

    Args:
      loss, totals, embed, loss_of: see `tasks.task.Task`. The loss gets the parameters of the whole model.
      ema_decay: ema ← decay · ema + (1 − decay) · params after every step; it may depend on the step.
      skip_nonfinite: a step whose loss, gradient or update is not finite changes nothing but the counter.
      sharpness: (mean_grad, params, step) → (gradient, metrics), see `optimize.sharpness`.
    """

    functions = (loss,) if accum_steps == 1 or embed is None else (embed, loss_of)
    norm = jax.jit(optax.tree.norm, inline=True)  # traced once for both

    def update(state: State, batch: Batch) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = jax.random.fold_in(key, parallelism.device_index())
        batch = dict(batch)
        asks_to_stop = batch.pop("stop", None)
        context = _context(state, batch, parallelism, totals, accum_steps)

        def mean_grad(params: Tree) -> tuple[Tree, dict]:
            return _mean_grad(functions, state.frozen.get("model"), params, context, batch, key, accum_steps)

        # The gradient, and what the optimiser makes of it
        grads, metrics = sharpness(mean_grad, state.params, state.step) if sharpness else mean_grad(state.params)
        carry = metrics.pop("carry")
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics |= {"grad_norm": norm(grads), "update_norm": norm(updates)}
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if ema_decay is None else _averaged(state, params, ema_decay)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema, carry=carry)

        # What must not happen, and who asks to stop
        if skip_nonfinite:
            good = jnp.isfinite(jnp.stack([metrics[name] for name in ("loss", "grad_norm", "update_norm")])).all()
            new = _choose(good, new, state.replace(step=state.step + 1))
        if asks_to_stop is not None:
            metrics |= {"stop": parallelism.mean(jnp.mean(asks_to_stop, dtype=jnp.float32)) > 0}
        return new, metrics

    return update


def _context(state: State, batch: Batch, parallelism: Parallelism, totals: Callable, accum_steps: int) -> Context:
    frozen = {name: tree for name, tree in state.frozen.items() if name != "model"}
    ema = None if state.ema is None else trainable.join(state.ema, state.frozen.get("model"))
    means = {name: parallelism.mean(x / accum_steps) for name, x in totals(batch).items()}
    return Context(state.step, frozen, ema, state.carry, means, parallelism)


def _mean_grad(
    functions: tuple[Callable, ...], frozen: Tree, params: Tree, context: Context, batch: Batch, key: jax.Array, n: int
) -> tuple[Tree, dict]:
    """(gradient, metrics and, under that name, the carry), the mean over n micro-batches and all devices.

    `functions` are the loss of the whole model, or, of one that compares all examples, `embed` and `loss_of`.
    """

    def whole_model(function: Callable) -> Callable:
        return lambda params, *args: function(trainable.join(params, frozen), *args)

    devices, functions = context.devices, tuple(map(whole_model, functions))
    if n == 1:
        grads, metrics, carry = _grad(*functions, params, context, batch, jax.random.fold_in(key, 0))
        grads = devices.constrain(grads, "grads")
    else:
        accumulate = _accumulated if len(functions) == 1 else _cached
        grads, metrics, carry = accumulate(*functions, params, context, devices.micro_batches(batch, n), key, n)
    grads, metrics = devices.mean((grads, metrics))
    return grads, metrics | {"carry": carry}


def _averaged(state: State, params: Tree, decay: float | Schedule) -> Tree:
    """The running average with new parameters in it."""
    decay = decay(state.step) if callable(decay) else decay
    return jax.tree.map(lambda average, x: decay * average + (1 - decay) * x, state.ema, params)


def _grad(loss: LossFunction, params: Tree, context: Context, batch: Batch, key: jax.Array) -> tuple[Tree, dict, Tree]:
    """(gradient, metrics, carry) of one micro-batch on this device."""

    def value(params: Tree) -> tuple[Array, tuple[dict, Tree]]:
        result = loss(params, context, batch, key)
        return result.value, ({"loss": result.value} | result.metrics, result.carry)

    grads, (metrics, carry) = jax.grad(value, has_aux=True)(params)
    return grads, metrics, carry


def _accumulated(
    loss: LossFunction, params: Tree, context: Context, micro_batches: Batch, key: jax.Array, n: int
) -> tuple[Tree, dict, Tree]:
    """The mean over n micro-batches (n, b/n, …); the carry goes from one to the next."""

    @functools.partial(jax.jit, inline=True)  # traced once, for the shapes and for the loop
    def micro_step(carry: Tree, i: Array, batch: Batch) -> tuple[Tree, tuple[Tree, dict]]:
        context_ = context._replace(carry=carry)
        grads, metrics, carry = _grad(loss, params, context_, batch, jax.random.fold_in(key, i))
        return carry, (context.devices.constrain(grads, "grads"), metrics)

    first = jax.tree.map(lambda x: x[0], micro_batches)
    _, shapes = jax.eval_shape(micro_step, context.carry, jnp.arange(n)[0], first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: tuple[Tree, Tree], i_and_batch: tuple[Array, Batch]) -> tuple[tuple[Tree, Tree], None]:
        total, carry = total
        carry, result = micro_step(carry, *i_and_batch)
        return (jax.tree.map(lambda a, b: a + b, total, result), carry), None

    (total, carry), _ = jax.lax.scan(add, (zeros, context.carry), (jnp.arange(n), micro_batches))
    grads, metrics = jax.tree.map(lambda x: x / n, total)
    return grads, metrics, carry


def _cached(
    embed: Callable, loss_of: Callable, params: Tree, context: Context, micro_batches: Batch, key: jax.Array, n: int
) -> tuple[Tree, dict, Tree]:
    """The gradient of a loss that compares all examples, with the memory of one micro-batch (n, b/n, …).

    The embeddings of all micro-batches first, without what a backward pass needs; then the gradient of the loss with
    respect to them; then every micro-batch again, with its part of that gradient (https://arxiv.org/abs/2101.06983).
    """

    def embedded(params: Tree, i: Array, batch: Batch) -> Tree:
        return embed(params, context, batch, jax.random.fold_in(key, i))

    def value(params: Tree, embeddings: Tree) -> tuple[Array, tuple[dict, Tree]]:
        result = loss_of(params, context, embeddings)
        return result.value, ({"loss": result.value} | result.metrics, result.carry)

    def add(total: Tree, part: tuple[Array, Batch, Tree]) -> tuple[Tree, None]:
        i, batch, cotangent = part
        _, pullback = jax.vjp(lambda params: embedded(params, i, batch), params)
        (grads,) = pullback(cotangent)
        return jax.tree.map(lambda a, b: a + b, total, context.devices.constrain(grads, "grads")), None

    numbers = jnp.arange(n)
    parts = jax.lax.map(lambda part: embedded(params, *part), (numbers, micro_batches))
    whole = context.devices.whole_batch(parts)
    (own, cotangents), (metrics, carry) = jax.grad(value, (0, 1), has_aux=True)(params, whole)
    cotangents = context.devices.micro_batches(cotangents, n)
    grads, _ = jax.lax.scan(add, context.devices.constrain(own, "grads"), (numbers, micro_batches, cotangents))
    return grads, metrics, carry


def _choose(condition: Bool[Array, ""], yes: Tree, no: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), yes, no)
