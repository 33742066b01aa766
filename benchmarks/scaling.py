"""What the devices send each other in a training step, and how long it takes, as their number grows.

    python -m benchmarks.scaling [--steps=20] [--counts=1,2,4,8] [--config=FILE[:ARG] --config.field=value …]

Compiles the real step for so many virtual CPU devices, each number in a process of its own, and prints a Markdown table:
the collectives of the compiled program with the bytes that a device sends (see `vit_jax.tools.hlo.Collective`). Virtual devices
share the cores of this machine, so the time shows only what dividing the work costs, not what it gains. --steps=0 leaves
the time out, for models that would be too slow.
"""

import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from vit_jax.overrides import parse
from vit_jax.run import experiment, start
from vit_jax.settings import Settings
from vit_jax.tools import abstract, hlo, plan

_STEPS = flags.DEFINE_integer("steps", 20, "Steps to time; 0 for none.", lower_bound=0)
_COUNTS = flags.DEFINE_list("counts", ["1", "2", "4", "8"], "Numbers of devices.")
_ROWS_OF = flags.DEFINE_integer("rows_of", 0, "Only the rows of so many devices, as JSON.", lower_bound=0)

LAYOUTS = {
    "pmap": {},
    "data mesh": {"parallel": "mesh"},
    "zero mesh": {"parallel": "mesh", "mesh": {"data": 1, "fsdp": -1, "rules": "zero"}},
    "fsdp mesh": {"parallel": "mesh", "mesh": {"data": 1, "fsdp": -1}},
    "fsdp x tensor 2": {"parallel": "mesh", "mesh": {"data": 1, "fsdp": -1, "tensor": 2}},
}
DEFAULT = ("--config=configs/pretrain.py:micro4,digits", "--config.pp.crop=32")
WARM_UP = 3


def measure(layout: str, steps: int) -> dict:
    """One row of the table, on the devices of this process."""
    config = copy.deepcopy(flags.FLAGS.config)
    config.update(LAYOUTS[layout])
    e = abstract.build(Settings.from_config(config), num_classes=1000)
    state, batch = abstract.abstract_arguments(e)
    update = experiment.make_update(e).lower(state, batch).compile()
    found = hlo.collectives(update.as_text())
    return {
        "layout": layout,
        "collectives": {
            kind: [sum(c.times for c in found if c.kind == kind), hlo.sent_bytes(found, kind)] for kind in hlo.KINDS
        },
        "sent": hlo.sent_bytes(found),
        "state": plan.bytes_a_device(state),
        "parameters": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(start.abstract_state(e).params)),
        "seconds": _time(e, update, steps) if steps else None,
    }


def _time(e: experiment.Experiment, update, steps: int) -> float:
    """The median of a step's seconds."""
    rng = np.random.default_rng(0)
    state = start.new_state(e)
    host = {name: rng.integers(0, 10, x.shape).astype(x.dtype) for name, x in abstract.abstract_batch(e).items()}
    batch, seconds = e.parallelism.send(host), []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        state, metrics = update(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP:])


def table(rows: dict[int, list[dict]]) -> str:
    """Rows by number of devices → Markdown."""
    kinds = [kind for kind in hlo.KINDS if any(row["collectives"][kind][0] for part in rows.values() for row in part)]
    head = ["devices", "layout", *kinds, "sent, MB", "sent / parameters", "state, MB", "ms a step"]
    lines = [" | ".join(head), " | ".join(["--:", ":--", *["--:"] * (len(head) - 2)])]
    for n, part in rows.items():
        for row in part:
            counts = (row["collectives"][kind] for kind in kinds)
            cells = [str(n), row["layout"], *(f"{count:,}: {sent / 1e6:.2f}" if count else "" for count, sent in counts)]
            cells += [f"{row['sent'] / 1e6:.2f}", f"{row['sent'] / row['parameters']:.2f}", f"{row['state'] / 1e6:.2f}"]
            cells += ["" if row["seconds"] is None else f"{1000 * row['seconds']:.0f}"]
            lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def _rows_of(devices: int) -> list[dict]:
    plan.use_devices(devices)
    layouts = [name for name in LAYOUTS if devices > 1 or name == "pmap"]
    layouts = [name for name in layouts if devices > 2 or "tensor" not in name]
    return [measure(layout, _STEPS.value) for layout in layouts]


def main(argv: list[str]) -> None:
    """Prints the table; or as JSON the rows of the devices of this process."""
    if _ROWS_OF.value:
        print(json.dumps(_rows_of(_ROWS_OF.value)))
        return
    rows = {}
    for n in map(int, _COUNTS.value):
        command = [sys.executable, "-m", "benchmarks.scaling", f"--rows_of={n}", *sys.argv[1:]]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True, check=True)
        rows[n] = json.loads(done.stdout.splitlines()[-1])
    print(table(rows))


if __name__ == "__main__":
    if not any(arg.startswith("--config=") for arg in sys.argv):
        sys.argv += DEFAULT
    app.run(main, flags_parser=parse)
