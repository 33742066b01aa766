"""Devices: data parallelism by `jax.pmap`. Nothing else in the package knows how many devices there are."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from vit_jax.errors import UserError

AXIS = "devices"
Tree = Any


def check_batch(batch_size: int, accum_steps: int) -> None:
    """Raises UserError unless every device can get `accum_steps` equal micro-batches of a batch."""
    devices = jax.device_count()
    if batch_size < 1 or accum_steps < 1 or batch_size % (devices * accum_steps):
        raise UserError(
            f"batch={batch_size} cannot be shared out equally to {devices} device(s) x accum_steps={accum_steps}: "
            f"choose a multiple of {devices * max(1, accum_steps)}, or another --config.accum_steps"
        )


def pmap_update(update: Callable[[Tree, dict], tuple[Tree, dict]]) -> Callable[[Tree, dict], tuple[Tree, dict]]:
    """(replicated state, sharded batch) → (replicated state, metrics). The given state's buffers are used up."""
    return jax.pmap(update, axis_name=AXIS, donate_argnums=0)


def pmap_sums(evaluate: Callable[[Tree, dict], dict]) -> Callable[[Tree, dict], dict]:
    """(replicated params, sharded batch) → the sums over all devices of `evaluate(params, batch)`."""
    return pmap_apply(lambda params, batch: jax.lax.psum(evaluate(params, batch), AXIS))


def pmap_apply(function: Callable[[Tree, dict], Tree]) -> Callable[[Tree, dict], Tree]:
    """(replicated params, sharded batch) → sharded result, each device on its own."""
    return jax.pmap(function, axis_name=AXIS)


def device_index() -> Int[Array, ""]:
    """Which of all devices is running this, within `pmap_update`."""
    return jax.lax.axis_index(AXIS)


def mean_over_devices(tree: Tree) -> Tree:
    """The mean over all devices, within `pmap_update`."""
    return jax.lax.pmean(tree, AXIS)


def replicate(tree: Tree) -> Tree:
    """A copy on every device of this process, behind a leading axis of devices.

    The copies are placed as `pmap` places its results, else the second step would compile the function again.
    """
    n = jax.local_device_count()
    copies = jax.tree.map(lambda x: np.broadcast_to(x, (n, *np.shape(x))), jax.device_get(tree))
    return jax.device_put(copies, _over_devices())


def unreplicate(tree: Tree) -> Tree:
    """The first device's copy, as arrays on that device."""
    return jax.tree.map(lambda x: x[0], tree)


def read(tree: Tree) -> Tree:
    """The first device's copy, as NumPy arrays; waits for it and, unlike `unreplicate`, for nothing dispatched since."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[0], tree)


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(b, …) → (devices, b / devices, …) for this process's devices."""
    n = jax.local_device_count()
    return {name: x.reshape(n, x.shape[0] // n, *x.shape[1:]) for name, x in batch.items()}


def prefetch(batches: Iterator[dict[str, np.ndarray]], size: int) -> Iterator[dict[str, Array]]:
    """Shards batches and sends them to the devices, `size` of them ahead of the one in use."""
    sent = (jax.device_put(shard(batch), _over_devices()) for batch in batches)
    queue = deque(itertools.islice(sent, size))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(sent, 1))


def _over_devices() -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
