"""Plans and compiled programs for 8 virtual devices, as JSON, for the tests: python -m tests.plans"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests import tiny
from vit_jax.run import start
from vit_jax.settings import Settings
from vit_jax.tools import abstract, hlo, plan

LAYOUTS = {"pmap": {}, "fsdp": {"parallel": "mesh", "mesh": {"data": 1, "fsdp": -1}, "scan": True, "remat": "full"}}


def config(layout: str = "pmap"):
    """AdamW, an average of the parameters, two blocks; float32, so that bytes can be counted by hand."""
    c = tiny.config(ema_decay=0.5)
    c.model.transformer.update({"num_layers": 2, "dropout_rate": 0.0})
    c.update(LAYOUTS[layout])
    return c


def placed_as_planned(layout: str) -> bool:
    """Whether state and batch come to lie on the devices as `abstract_arguments` says."""
    e = plan.build(Settings.from_config(config(layout)), num_classes=1000)
    state, batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (start.abstract_state(e), abstract.abstract_batch(e)))
    real = e.parallelism.place(state), e.parallelism.send(batch)
    same = jax.tree.map(_same, plan.abstract_arguments(e), real)
    return all(jax.tree.leaves(same))


def _same(x, y) -> bool:
    return (x.shape, x.dtype) == (y.shape, y.dtype) and x.sharding.is_equivalent_to(y.sharding, x.ndim)


def exchanges() -> list[hlo.Collective]:
    """Of a program that gathers 3 times 64 kB, a part of 8 devices each, and sums 1 kB over groups of 4."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    grid = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("d"))

    def gathered(x: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            whole_x = jax.lax.with_sharding_constraint(x, whole)
            return jax.lax.with_sharding_constraint(jnp.sin(whole_x[::-1]), rows), None

        return jax.lax.scan(body, x, length=3)[0]

    def summed(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "b")

    summed = jax.shard_map(summed, mesh=grid, in_specs=PartitionSpec(("a", "b")), out_specs=PartitionSpec("a"))
    programs = (gathered, (128, 128), rows), (summed, (8, 256), NamedSharding(grid, PartitionSpec(("a", "b"))))
    found = []
    for function, shape, where in programs:
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        found += hlo.collectives(jax.jit(function).lower(x).compile().as_text())
    return found


def main() -> None:
    plan.use_devices(8)
    plans = {layout: plan.make_plan(config(layout)) for layout in LAYOUTS}
    found = {
        "plans": {name: dataclasses.asdict(dataclasses.replace(p, settings=None)) for name, p in plans.items()},
        "placed_as_planned": {layout: placed_as_planned(layout) for layout in LAYOUTS},
        "exchanges": exchanges(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
