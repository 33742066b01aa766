"""What kinds of attention cost: time, and the memory that XLA's program takes beside its arguments and results, by tokens.

    python -m benchmarks.attention_cost [--sides=14,28,42,56,64] [--heads=3] [--repeats=5] [--name=attention_cost]

One row of side² patches, heads of 64 in float32 on a CPU and bfloat16 elsewhere, forward and with gradients of q, k and v.
Windows are of 14 x 14 patches; packed is softmax over images of 196 patches in one row, which the mask keeps apart. Times are
the best of so many, on a CPU those of all its cores together, which other work on the machine changes little. Prints a table
and writes it to benchmarks/results/NAME.md, the data to NAME.json.
"""

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import side_by_side
from vit_jax.models.attention import attend, attend_in_windows
from vit_jax.models.packed import Segments
from vit_jax.models.windows import Windows
from vit_jax.run import runtime

WINDOW, IMAGE, HEAD = 14, 196, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default="14,28,42,56,64", help="of the grid of patches")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="attention_cost", help="of the files in benchmarks/results")
    args = parser.parse_args()
    runtime.set_up()
    rows, data = [], []
    for side in map(int, args.sides.split(",")):
        for kind, function in kinds(side).items():
            found = measure(function, side * side, args.heads, args.repeats)
            data.append({"tokens": side * side, "kind": kind, **found})
            rows.append([side * side, kind, *(f"{found[name]:.1f}" for name in ("forward_ms", "forward_mb"))])
            rows[-1] += [f"{found[name]:.1f}" for name in ("gradients_ms", "gradients_mb")]
            print(*rows[-1], flush=True)
    header = ["tokens", "attention", "forward, ms", "temporaries, MB", "with gradients, ms", "temporaries, MB"]
    title = f"Attention of one row of tokens, {args.heads} heads of {HEAD}"
    side_by_side.save(args.name, title, [side_by_side.table(header, rows)], {"rows": data}, side_by_side.environment())


def kinds(side: int) -> dict[str, Callable]:
    """(q, k, v) → what is attended to, by name."""
    numbers = Segments(jnp.arange(side * side)[None] // IMAGE, -(-side * side // IMAGE))
    return {
        "softmax": attend,
        "sigmoid": functools.partial(attend, kind="sigmoid"),
        f"window {WINDOW}": functools.partial(attend_in_windows, windows=Windows((side, side), WINDOW)),
        "packed": lambda q, k, v: attend(q, k, v, mask=numbers.mask()),
    }


def measure(function: Callable, n: int, heads: int, repeats: int) -> dict[str, float]:
    """Milliseconds and 10⁶ bytes of a forward pass, and of one with gradients."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    q, k, v, dy = (jnp.asarray(x, dtype) for x in np.random.default_rng(0).standard_normal((4, 1, n, heads, HEAD)))

    def with_gradients(q, k, v):
        y, vjp = jax.vjp(function, q, k, v)
        return y, *vjp(dy)

    found, clock = {}, time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    for name, run in (("forward", function), ("gradients", with_gradients)):
        compiled = jax.jit(run).lower(q, k, v).compile()
        jax.block_until_ready(compiled(q, k, v))
        seconds = []
        for _ in range(repeats):
            start = clock()
            jax.block_until_ready(compiled(q, k, v))
            seconds.append(clock() - start)
        found[f"{name}_ms"] = 1000 * min(seconds)
        found[f"{name}_mb"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return found


if __name__ == "__main__":
    main()
