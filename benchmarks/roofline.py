"""Whether a roofline tells the time of a training step: python -m benchmarks.roofline [--rounds=5] [MODEL …]

Measures this machine's own peaks, the rate of a large matrix product and that of adding to a large array, and steps of models
on one CPU device, in turns, so that drifts of the machine's speed hit all alike. The prediction is the one of
`plan --accelerator`, made of the instructions of the compiled program, which for the CPU are known.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import compiled_work, side_by_side
from configs import pretrain
from vit_jax.run import runtime, start
from vit_jax.run.experiment import make_update
from vit_jax.settings import Settings
from vit_jax.tools import abstract, roofline
from vit_jax.tools.hlo import Work

SIDE = 2048  # of the matrices
ELEMENTS = 2**24  # of the array


def measured(run: Callable[[], object], repetitions: int) -> float:
    """Seconds of one repetition, the fastest."""
    times = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - begun)
    return min(times)


def peaks() -> Callable[[], tuple[float, float]]:
    """A function that measures (FLOPs a second, bytes a second)."""
    a, x = jnp.ones((SIDE, SIDE)), jnp.ones(ELEMENTS)
    multiply, add = jax.jit(jnp.dot), jax.jit(lambda x: x + 1.0, donate_argnums=0)
    jax.block_until_ready(multiply(a, a))

    def add_once() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    add_once()
    return lambda: (2.0 * SIDE**3 / measured(lambda: multiply(a, a), 5), 2.0 * 4 * ELEMENTS / measured(add_once, 10))


def step(model: str, batch: int) -> tuple[Callable[[], object], list[Work], float]:
    """(runs a step, its work, its FLOPs) of a model from nothing."""
    config = pretrain.get_config(f"{model},imagenet2012")
    config.batch, config.accum_steps = batch, 1
    settings = Settings.from_config(config)
    e = abstract.build(settings, num_classes=1000)
    update = make_update(e).lower(*abstract.abstract_arguments(e)).compile()
    state = start.new_state(e)
    host = {name: np.zeros(x.shape, x.dtype) for name, x in abstract.abstract_batch(e).items()}
    images = e.parallelism.send(host)

    def run() -> object:
        nonlocal state
        state, metrics = update(state, images)
        return metrics

    jax.block_until_ready(run())
    return run, compiled_work.work(update.as_text()), abstract.step_flops(settings, 1000, remat="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=["ti16", "s16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    runtime.set_xla_flags()
    steps, measure = {model: step(model, args.batch) for model in args.models}, peaks()
    rates, seconds = [], {model: [] for model in steps}
    for _ in range(args.rounds):
        rates.append(measure())
        for model, (run, _, _) in steps.items():
            seconds[model].append(measured(run, 2))
    flops, moved = (statistics.median(rate) for rate in zip(*rates, strict=True))
    here = roofline.Accelerator("this CPU", "cpu", flops, flops, 0.0, moved, 1.0, 1, 1.0, "measured")
    rows = []
    for model, (_, work, model_flops) in steps.items():
        p = roofline.predict(work, accelerator=here, dtype="float32", model_flops=model_flops, devices=1, sent=0.0)
        taken = statistics.median(seconds[model])
        figures = [p.compute, p.memory, p.fastest, taken]
        rows.append([model, *(f"{1e3 * x:.0f}" for x in figures), f"{p.fastest / taken:.2f}"])
    title = f"Peaks measured: {flops / 1e9:.0f} GFLOP/s, {moved / 1e9:.1f} GB/s; medians of {args.rounds} turns"
    header = [f"batch {args.batch}", "arithmetic, ms", "memory, ms", "predicted, ms", "measured, ms", "ratio"]
    tables = [title, side_by_side.table(header, rows)]
    side_by_side.save("roofline_cpu", "A roofline of this CPU", tables, {}, side_by_side.environment())


if __name__ == "__main__":
    main()
