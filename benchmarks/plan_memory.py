"""Whether a step takes the memory that its plan says: python -m benchmarks.plan_memory [--config=FILE[:ARG] …]

Runs steps on one CPU device and compares the growth of this process's peak memory (VmHWM, Linux only), since state and batch
were in place, with XLA's figure for what a step takes besides them: temporaries, and results that are not written in
place. Once for the program as it runs on this CPU, once for the one that a plan is made of.
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks import side_by_side
from vit_jax.overrides import parse
from vit_jax.run import experiment, runtime, start
from vit_jax.settings import Settings
from vit_jax.tools import abstract, plan

DEFAULT = ("--config=configs/pretrain.py:s16,imagenet2012", "--config.batch=16", "--config.accum_steps=1")
STEPS = 2


def run() -> None:
    jax.config.update("jax_platforms", "cpu")
    runtime.set_xla_flags()  # as every command does
    sys.argv += DEFAULT if len(sys.argv) == 1 else ()  # where ml_collections looks for overrides
    parse(sys.argv)
    s = Settings.from_config(flags.FLAGS.config)
    e = abstract.build(s, num_classes=1000)
    lowered = experiment.make_update(e).lower(*abstract.abstract_arguments(e))
    print(f"{e.task.model.fields['model_name']}, batch {s.batch}, {s.dtype}, remat={s.remat}, scan={s.scan}")
    for name, options in (("as it runs here", {}), ("as it is planned", plan.NEARER_TO_A_GPU)):
        update = lowered.compile(options)
        memory = update.memory_analysis()
        expected = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        measured = _growth(e, update)
        print(f"  {name:16}  XLA {expected / 1e9:.3f} GB  measured {measured / 1e9:.3f} GB  {expected / measured:.2f}")


def _growth(e: experiment.Experiment, update: Callable) -> int:
    """By how many bytes the peak grows in the steps after the first."""
    state = start.new_state(e)
    batch = e.parallelism.send({name: np.zeros(x.shape, x.dtype) for name, x in abstract.abstract_batch(e).items()})
    state, metrics = update(state, batch)  # copies the state, of which NumPy owns some still
    jax.block_until_ready((state, metrics))
    before = _reset_peak()
    for _ in range(STEPS):
        state, metrics = update(state, batch)
        jax.block_until_ready(metrics)
    return side_by_side.memory("VmHWM") - before


def _reset_peak() -> int:
    """What the process takes now, in bytes, which is its peak from here on."""
    gc.collect()
    runtime.trim_memory()  # what compiling left behind would hide what a step needs
    Path("/proc/self/clear_refs").write_text("5")
    return side_by_side.memory("VmRSS")


if __name__ == "__main__":
    run()
