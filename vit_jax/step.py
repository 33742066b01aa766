"""One training step: gradients over micro-batches and devices, then the optimiser. Written once for every way to run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int

from vit_jax import parallel

Tree = Any


@struct.dataclass
class State:
    """Everything that training changes. The loader's position and all randomness follow from `step` and the seed."""

    step: Int[Array, ""]
    params: Tree
    opt_state: optax.OptState


def make_update(
    loss: Callable, optimizer: optax.GradientTransformation, *, seed: int, accum_steps: int = 1
) -> Callable[[State, dict], tuple[State, dict]]:
    """(state, batch) → (state, metrics), to be run by `parallel.pmap_update`.

    Gradients are averaged over `accum_steps` micro-batches and over the devices. Every step, device and micro-batch has
    a dropout key of its own. Metrics are the means of the loss's own, and `grad_norm` before clipping.
    """
    grad = jax.grad(loss, has_aux=True)

    def update(state: State, batch: dict) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = jax.random.fold_in(key, parallel.device_index())

        def micro_step(i, micro_batch):
            return grad(state.params, micro_batch, jax.random.fold_in(key, i))

        if accum_steps == 1:
            grads_and_metrics = micro_step(0, batch)
        else:
            grads_and_metrics = _mean_over_micro_batches(micro_step, batch, accum_steps)
        grads, metrics = parallel.mean_over_devices(grads_and_metrics)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        state = State(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        return state, metrics | {"grad_norm": optax.tree.norm(grads)}

    return update


def _mean_over_micro_batches(micro_step: Callable, batch: dict, accum_steps: int) -> Tree:
    micro_batches = jax.tree.map(lambda x: x.reshape(accum_steps, -1, *x.shape[1:]), batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_step, 0, first))

    def add(total, i_and_batch):
        return jax.tree.map(lambda a, b: a + b, total, micro_step(*i_and_batch)), None

    total, _ = jax.lax.scan(add, zeros, (jnp.arange(accum_steps), micro_batches))
    return jax.tree.map(lambda x: x / accum_steps, total)
