"""Devices: data parallelism by `jax.pmap`, or a mesh that shards parameters too. Nothing else here knows how many there are.

Both kinds offer the same methods, and the step is written once for both. "Host" below is NumPy, or arrays on one device.
"""

import functools
import itertools
import math
import operator
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int

from vit_jax.errors import UserError
from vit_jax.models import cores
from vit_jax.optimize import sharding
from vit_jax.optimize.sharding import AXES, DATA, FSDP, RULES, TENSOR, Rule

Tree = Any
_DEVICES = "devices"  # pmap's only axis


class Pmap:
    """The plain kind: every device holds all of the state and computes its share of a batch."""

    def __init__(self):
        self.batch_shards = jax.device_count()
        self._local = NamedSharding(jax.sharding.Mesh(np.array(jax.local_devices()), (_DEVICES,)), PartitionSpec(_DEVICES))

    def device_index(self) -> Int[Array, ""]:
        """Which of all devices is running this, within `train_step`."""
        return jax.lax.axis_index(_DEVICES)

    def mean(self, tree: Tree) -> Tree:
        """The mean over all devices, within `train_step`."""
        return tree if jax.device_count() == 1 else jax.lax.pmean(tree, _DEVICES)  # of one, XLA would copy it

    def sum(self, tree: Tree) -> Tree:
        """The sum over all devices, within `train_step`."""
        return tree if jax.device_count() == 1 else jax.lax.psum(tree, _DEVICES)

    def all_examples(self, tree: Tree) -> Tree:
        """(b, …) of this device → (devices · b, …) of all devices, by device, within `train_step`."""
        return tree if jax.device_count() == 1 else jax.lax.all_gather(tree, _DEVICES, tiled=True)

    def micro_batches(self, batch: Tree, n: int) -> Tree:
        """(b, …) → (n, b/n, …), within `train_step`."""
        return _strided(batch, n)

    def whole_batch(self, micro_batches: Tree) -> Tree:
        """(n, b/n, …) → (b, …): undoes `micro_batches`."""
        return _unstrided(micro_batches)

    def constrain(self, tree: Tree, path: str) -> Tree:
        """Nothing is sharded: the tree as it is."""
        return tree

    def constrain_examples(self, x: Array) -> Array:
        """Nothing is sharded: the array as it is."""
        return x

    def train_step(self, update: Callable[[Tree, dict], tuple[Tree, dict]]) -> Callable[[Tree, dict], tuple[Tree, dict]]:
        """(state, batch) on the devices → (state, metrics). The given state's buffers are used up."""
        return jax.pmap(update, axis_name=_DEVICES, donate_argnums=0)

    def eval_sums(self, evaluate: Callable[[Tree, dict], dict]) -> Callable[[Tree, dict], dict]:
        """(params, batch) on the devices → the sums over all devices of `evaluate(params, batch)`."""
        run = jax.pmap(lambda params, batch: jax.lax.psum(evaluate(params, batch), _DEVICES), axis_name=_DEVICES)
        return _by_cores(run, lambda *sums: functools.reduce(operator.add, sums))

    def eval_examples(self, function: Callable[[Tree, dict], Tree]) -> Callable[[Tree, dict], Tree]:
        """(params, batch) on the devices → results by example, to be read by `gather`."""
        return _by_cores(jax.pmap(function, axis_name=_DEVICES), lambda *parts: np.concatenate(parts, axis=1))

    def place(self, tree: Tree, path: str = "") -> Tree:
        """A host tree → a copy on every device of this process, behind a leading axis of devices.

        The copies are placed as `pmap` places its results, else the second step would compile the function again.
        """
        n = jax.local_device_count()
        copies = jax.tree.map(lambda x: np.broadcast_to(x, (n, *np.shape(x))), _local_copy(tree))
        return jax.device_put(copies, self._local)

    def create(self, function: Callable[..., Tree], *host: Tree) -> Tree:
        """`place(function(*host))`, computed where it stays."""
        n = jax.local_device_count()

        def copies(*trees: Tree) -> Tree:
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), function(*trees))

        return jax.jit(copies, out_shardings=self._local)(*host)

    def jit(self, function: Callable[..., Tree], path: str) -> Callable[..., Tree]:
        """(trees on the devices) → a tree on the devices."""
        return jax.pmap(function, axis_name=_DEVICES)

    def restore_shapes(self, shapes: Tree) -> Tree:
        """What a checkpoint is restored into: shapes with shardings, to be given to `place`."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._stored()), shapes)

    def state_shapes(self, shapes: Tree, path: str = "") -> Tree:
        """What `place` makes of arrays of these shapes: shapes with shardings."""
        n = jax.local_device_count()
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype, sharding=self._local), shapes)

    def batch_shapes(self, shapes: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """What `send` makes of a batch of these shapes."""
        n = jax.local_device_count()
        split = {name: jax.ShapeDtypeStruct((x.shape[0] // n, *x.shape[1:]), x.dtype) for name, x in shapes.items()}
        return self.state_shapes(split)

    def snapshot(self, tree: Tree) -> Tree:
        """A fresh copy of a tree on the devices, that stays as it is while training goes on and can be saved."""
        copies = _first(jax.tree.map(lambda x: x.addressable_data(0), tree))
        if jax.process_count() == 1:
            return copies
        where = self._stored()
        return jax.tree.map(lambda x: jax.make_array_from_single_device_arrays(x.shape, where, [x]), copies)

    def read(self, tree: Tree) -> Tree:
        """The first device's copy as NumPy arrays; waits for it, and for nothing dispatched since."""
        return jax.tree.map(lambda x: jax.device_get(x.addressable_data(0))[0], tree)

    def gather(self, tree: Tree) -> Tree:
        """What `eval_examples` returned, as NumPy arrays with the examples of all devices and processes, (b, …)."""
        local = jax.tree.map(lambda x: np.concatenate(jax.device_get(x)), tree)
        return multihost_utils.process_allgather(local, tiled=True) if jax.process_count() > 1 else local

    def send(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """This process's part of a batch (b, …) → (devices, b / devices, …), on them."""
        n = jax.local_device_count()
        split = {name: x.reshape(n, x.shape[0] // n, *x.shape[1:]) for name, x in batch.items()}
        return jax.device_put(split, self._local)

    def prefetch(self, batches: Iterator[dict[str, np.ndarray]], size: int) -> Iterator[dict[str, Array]]:
        """Sends batches to the devices, `size` of them ahead of the one in use."""
        sent = map(self.send, batches)
        queue = deque(itertools.islice(sent, size))
        while queue:
            yield queue.popleft()
            queue.extend(itertools.islice(sent, 1))

    def _stored(self) -> jax.sharding.Sharding:
        if jax.process_count() == 1:
            return SingleDeviceSharding(jax.local_devices()[0])
        first = [next(d for d in jax.devices() if d.process_index == i) for i in range(jax.process_count())]
        return NamedSharding(jax.sharding.Mesh(np.array(first), (_DEVICES,)), PartitionSpec())


class Mesh:
    """`jax.jit` over a mesh of devices with axes data × fsdp × tensor.

    Batches are shared out over data × fsdp; the state by a table of rules, see `RULES`. One program computes the whole
    batch, so that the result, dropout included, is that of one device.
    """

    def __init__(self, data: int = -1, fsdp: int = 1, tensor: int = 1, rules: Sequence[Rule] = RULES["fsdp"]):
        sizes = _mesh_shape({DATA: data, FSDP: fsdp, TENSOR: tensor})
        self.batch_shards = sizes[0] * sizes[1]
        # Not jax.make_mesh: its axes are explicit in newer JAX, which Linen modules do not know.
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))  # the axis tensor is within a process
        self.mesh = jax.sharding.Mesh(np.array(devices).reshape(sizes), AXES)
        self.rules = tuple(rules)
        for rule in self.rules:
            sharding.check_rule(rule)
        self._batch = NamedSharding(self.mesh, PartitionSpec((DATA, FSDP)))
        self._whole = NamedSharding(self.mesh, PartitionSpec())

    def device_index(self) -> int:
        """0: one program computes the whole batch."""
        return 0

    def mean(self, tree: Tree) -> Tree:
        """The tree as it is: means are over the whole batch already."""
        return tree

    def sum(self, tree: Tree) -> Tree:
        """The tree as it is: sums are over the whole batch already."""
        return tree

    def all_examples(self, tree: Tree) -> Tree:
        """The tree as it is: it has the whole batch already."""
        return tree

    def micro_batches(self, batch: Tree, n: int) -> Tree:
        """(b, …) → (n, b/n, …), within `train_step`, without moving an example to another device."""
        where = NamedSharding(self.mesh, PartitionSpec(None, (DATA, FSDP)))
        return jax.lax.with_sharding_constraint(_strided(batch, n), where)

    def whole_batch(self, micro_batches: Tree) -> Tree:
        """(n, b/n, …) → (b, …): undoes `micro_batches`."""
        return jax.lax.with_sharding_constraint(_unstrided(micro_batches), self._batch)

    def constrain(self, tree: Tree, path: str) -> Tree:
        """The tree, sharded as the rules say for `path`, within `train_step`."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree, path))

    def constrain_examples(self, x: Array) -> Array:
        """Activations (b, …), shared out by example. A loop over blocks would else take on the sharding of their parameters."""
        return x if x.shape[0] % self.batch_shards else jax.lax.with_sharding_constraint(x, self._batch)

    def shardings(self, tree: Tree, path: str = "") -> Tree:
        """The sharding of every leaf; `path` stands before the leaves' own."""
        return jax.tree_util.tree_map_with_path(lambda keys, x: self._sharding(sharding.path_of(path, keys), np.shape(x)), tree)

    def train_step(self, update: Callable[[Tree, dict], tuple[Tree, dict]]) -> Callable[[Tree, dict], tuple[Tree, dict]]:
        """(state, batch) on the devices → (state, metrics). The given state's buffers are used up."""

        def sharded(state: Tree, batch: dict) -> tuple[Tree, dict]:
            state, metrics = update(state, batch)
            state = jax.lax.with_sharding_constraint(state, self.shardings(state))
            return state, jax.lax.with_sharding_constraint(metrics, self._whole)

        return jax.jit(sharded, donate_argnums=0)

    def eval_sums(self, evaluate: Callable[[Tree, dict], dict]) -> Callable[[Tree, dict], dict]:
        """(params, batch) on the devices → `evaluate(params, batch)`, which sums over the whole batch."""
        return jax.jit(evaluate, out_shardings=self._whole)

    def eval_examples(self, function: Callable[[Tree, dict], Tree]) -> Callable[[Tree, dict], Tree]:
        """(params, batch) on the devices → results by example, to be read by `gather`."""
        return jax.jit(function, out_shardings=self._batch)

    def place(self, tree: Tree, path: str = "") -> Tree:
        """A tree on the host → on the devices, sharded as the rules say for `path`; what is so placed already stays."""

        def put(x: Any, where: NamedSharding) -> Array:
            if isinstance(x, jax.Array) and x.sharding == where:
                return x
            host = np.asarray(x)
            return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

        return jax.tree.map(put, tree, self.shardings(tree, path))

    def create(self, function: Callable[..., Tree], *host: Tree) -> Tree:
        """`place(function(*host))` for parameters on the host, without ever holding the whole result on one device."""
        shapes = jax.eval_shape(function, *host)
        return jax.jit(function, out_shardings=self.shardings(shapes))(*(self.place(x, "params") for x in host))

    def jit(self, function: Callable[..., Tree], path: str) -> Callable[..., Tree]:
        """(trees on the devices) → a tree on the devices, sharded as the rules say for `path`."""
        return jax.jit(lambda *trees: self.constrain(function(*trees), path))

    def restore_shapes(self, shapes: Tree) -> Tree:
        """What a checkpoint is restored into: shapes with shardings."""
        return self.state_shapes(shapes)

    def state_shapes(self, shapes: Tree, path: str = "") -> Tree:
        """What `place` makes of arrays of these shapes: shapes with shardings."""
        return jax.tree.map(_sharded, shapes, self.shardings(shapes, path))

    def batch_shapes(self, shapes: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """What `send` makes of a batch of these shapes, all of it."""
        return {name: _sharded(x, self._batch) for name, x in shapes.items()}

    def snapshot(self, tree: Tree) -> Tree:
        """A fresh copy of a tree on the devices, that stays as it is while training goes on and can be saved."""
        return _copy(tree)

    def read(self, tree: Tree) -> Tree:
        """The whole of every array as NumPy; one at a time, so that no device ever holds more than one whole array."""
        return jax.tree.map(self._read, tree)

    def gather(self, tree: Tree) -> Tree:
        """What `eval_examples` returned, as NumPy arrays (b, …)."""
        return self.read(tree)

    def send(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """This process's part of a batch (b, …) → the whole batch, on the devices."""
        return {name: jax.make_array_from_process_local_data(self._batch, x) for name, x in batch.items()}

    prefetch = Pmap.prefetch

    def _read(self, x: Array) -> np.ndarray:
        if x.is_fully_replicated:
            return jax.device_get(x.addressable_data(0))
        if not x.is_fully_addressable:
            return self._read(jax.jit(jnp.copy, out_shardings=self._whole)(x))
        return jax.device_get(x)

    def _sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(self.mesh, sharding.spec_of(path, shape, self.rules, self.mesh.shape))


Parallelism = Pmap | Mesh


def check_batch(batch_size: int, accum_steps: int, shards: int, pack: int = 1) -> None:
    """Raises UserError unless each of the parts that a batch is cut into can get `accum_steps` equal micro-batches.

    `pack` examples count as one, see `tasks.rows`.
    """
    if batch_size < 1 or accum_steps < 1 or batch_size % (shards * accum_steps * pack):
        packed = f" x pack={pack}" if pack > 1 else ""
        raise UserError(
            f"batch={batch_size} cannot be shared out equally to {shards} device(s) x accum_steps={accum_steps}{packed}: "
            f"choose a multiple of {shards * max(1, accum_steps) * pack}, or another --config.accum_steps"
        )


def is_main() -> bool:
    """Whether this process is the one that writes logs and models."""
    return jax.process_index() == 0


def _by_cores(run: Callable[[Tree, dict], Tree], combine: Callable[..., Any]) -> Callable[[Tree, dict], Tree]:
    """`run`, (params, batch) → results, or where the only device is a CPU, of parts of the batch at once."""

    def by_cores(params: Tree, batch: dict[str, Array]) -> Tree:
        n = cores.parts(next(iter(batch.values())).shape[1])
        if n == 1:
            return run(params, batch)
        found = cores.by_parts(lambda part: jax.block_until_ready(run(params, part)), jax.device_get(batch), n, axis=1)
        return jax.tree.map(combine, *found)

    return by_cores


def _mesh_shape(sizes: dict[str, int]) -> tuple[int, ...]:
    n, shape = jax.device_count(), dict(sizes)
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and known > 0 and n % known == 0:
        shape[free[0]] = n // known
    if min(shape.values()) < 1 or math.prod(shape.values()) != n:
        text = ", ".join(f"{axis}: {size}" for axis, size in sizes.items())
        raise UserError(f"config.mesh={{{text}}} does not make up {n} device(s): the product must be {n}; one size may be -1")
    if jax.local_device_count() % shape[TENSOR]:
        raise UserError(f"config.mesh.tensor={shape[TENSOR]} must divide the {jax.local_device_count()} devices of a process")
    return tuple(shape.values())


def _sharded(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _strided(batch: Tree, n: int) -> Tree:
    """(b, …) → (n, b/n, …): micro-batch i has the examples i, i + n, … so that every device keeps its own."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0), batch)


def _unstrided(micro_batches: Tree) -> Tree:
    """(n, b/n, …) → (b, …): the examples in their own order."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), micro_batches)


def _local_copy(tree: Tree) -> Tree:
    """NumPy copies of host arrays, or of global arrays that are whole on every device."""
    return jax.tree.map(lambda x: jax.device_get(x.addressable_data(0) if isinstance(x, jax.Array) else x), tree)


@jax.jit
def _first(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x[0], tree)


@jax.jit
def _copy(tree: Tree) -> Tree:
    return jax.tree.map(jnp.copy, tree)
