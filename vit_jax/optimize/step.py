"""One training step: gradients over micro-batches and devices, then the optimiser. One text for pmap and mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Int

from vit_jax.optimize.parallel import Parallelism

Tree = Any
Batch = dict[str, Array]
MeanGrad = Callable[[Tree], tuple[Tree, dict]]


@struct.dataclass
class State:
    """Everything that a step needs. The loader's position and all randomness follow from `step` and the seed.

    Attributes:
      params: what is trained.
      ema: the running average of `params`, or None.
      frozen: trees by name that are not trained, such as the rest of the model or a teacher; no checkpoint holds them.
    """

    step: Int[Array, ""]
    params: Tree
    opt_state: optax.OptState
    ema: Tree = None
    frozen: dict[str, Tree] = struct.field(default_factory=dict)


def make_update(
    loss: Callable[[Tree, dict, Batch, jax.Array], tuple[Array, dict]],
    optimizer: optax.GradientTransformation,
    parallelism: Parallelism,
    *,
    seed: int,
    accum_steps: int = 1,
    ema_decay: float | None = None,
    skip_nonfinite: bool = False,
    sharpness: Callable[[MeanGrad, Tree, Array], tuple[Tree, dict]] | None = None,
) -> Callable[[State, Batch], tuple[State, dict]]:
    """(state, batch) → (state, metrics), to be run by `parallelism.train_step`.

    Gradients are averaged over `accum_steps` micro-batches and over the devices. Every step, micro-batch and, with pmap,
    device has a key of its own. Metrics are the means of the loss's own, `grad_norm` before clipping, `update_norm`, and
    `stop` if the batch has a field of that name: whether any process asks to stop.

    Args:
      loss: (params, frozen, batch, key) → (mean loss, metrics).
      ema_decay: ema ← decay · ema + (1 − decay) · params after every step.
      skip_nonfinite: a step whose loss, gradient or update is not finite changes nothing but the counter.
      sharpness: (mean_grad, params, step) → (gradient, metrics), see `vit_jax.sharpness`.
    """
    grad = jax.grad(loss, has_aux=True)

    def update(state: State, batch: Batch) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = jax.random.fold_in(key, parallelism.device_index())
        batch = dict(batch)
        asks_to_stop = batch.pop("stop", None)

        def mean_grad(params: Tree) -> tuple[Tree, dict]:
            def micro_step(i: Array, micro_batch: Batch) -> tuple[Tree, dict]:
                grads, metrics = grad(params, state.frozen, micro_batch, jax.random.fold_in(key, i))
                return parallelism.constrain(grads, "grads"), metrics

            if accum_steps == 1:
                return parallelism.mean(micro_step(0, batch))
            return parallelism.mean(_mean_over(micro_step, parallelism.micro_batches(batch, accum_steps), accum_steps))

        grads, metrics = sharpness(mean_grad, state.params, state.step) if sharpness else mean_grad(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics |= {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = jax.tree.map(lambda average, x: ema_decay * average + (1 - ema_decay) * x, ema, params)
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        if skip_nonfinite:
            good = jnp.isfinite(jnp.stack([metrics[name] for name in ("loss", "grad_norm", "update_norm")])).all()
            new = _choose(good, new, state.replace(step=state.step + 1))
        if asks_to_stop is not None:
            metrics |= {"stop": parallelism.mean(jnp.mean(asks_to_stop, dtype=jnp.float32)) > 0}
        return new, metrics

    return update


def _mean_over(micro_step: Callable, micro_batches: Batch, n: int) -> Tree:
    first = jax.tree.map(lambda x: x[0], micro_batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_step, 0, first))

    def add(total: Tree, i_and_batch: tuple[Array, Batch]) -> tuple[Tree, None]:
        return jax.tree.map(lambda a, b: a + b, total, micro_step(*i_and_batch)), None

    total, _ = jax.lax.scan(add, zeros, (jnp.arange(n), micro_batches))
    return jax.tree.map(lambda x: x / n, total)


def _choose(condition: Bool[Array, ""], yes: Tree, no: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), yes, no)
