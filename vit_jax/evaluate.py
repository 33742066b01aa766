"""Scores parameters on a test set, every example counted exactly once."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from vit_jax import experiment, parallel
from vit_jax import workdir as workdirs
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.data import loader, preprocess, sources
from vit_jax.errors import UserError
from vit_jax.metrics import logging_to
from vit_jax.settings import Settings
from vit_jax.tasks import classify

log = logging.getLogger("vit_jax")


def evaluate(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, float]:
    """Scores what a training run with this config would start from, and trains nothing.

    That is the newest checkpoint in `workdir`, else `config.pretrained`, else the file in `config.pretrained_dir`, with
    its head as it is. Returns the metrics.
    """
    s = Settings.from_config(config)
    directory = workdirs.make(workdir)
    with logging_to(directory):
        e = experiment.build(s, directory)
        experiment.log_setup(e)
        with contextlib.closing(Checkpointer(directory / "checkpoints", keep=s.keep)) as checkpointer:
            state = experiment.start(e, checkpointer, keep_head=True)
        if state is None:
            raise UserError(f"nothing to evaluate: {directory} holds no checkpoint and --config.pretrained is not set")
        metrics = make_evaluator(e)(parallel.replicate(state.params))
        log.info("  ".join(f"{name} {value:.5g}" for name, value in metrics.items()))
        return metrics


def make_evaluator(e: experiment.Experiment) -> Callable[[Any], dict[str, float]]:
    """A function from replicated parameters to the metrics on the whole test source; it compiles once."""
    score = parallel.pmap_sums(e.task.evaluate)
    source, devices = e.test_source, jax.device_count()

    def evaluator(params: Any) -> dict[str, float]:
        started, untimed = time.perf_counter(), 0
        sums: dict[str, float] = {}
        running = None
        for batch in batches_of(e, source):
            dispatched = score(params, batch)
            _add(sums, running)
            if running is None and len(source) > batch_size(e, source):  # the first may compile: the clock starts behind it
                jax.block_until_ready(dispatched)
                started, untimed = time.perf_counter(), batch_size(e, source)
            running = dispatched
        _add(sums, running)
        if sums["count"] != len(source):
            raise AssertionError(f"counted {sums['count']} of {len(source)} test examples")
        rate = (len(source) - untimed) / (time.perf_counter() - started) / devices
        return classify.summarize(sums) | {"img_sec_core_test": rate}

    return evaluator


def batches_of(e: experiment.Experiment, source: sources.Source) -> Iterator[dict[str, jax.Array]]:
    """The examples of a source on the devices, each once and without augmentation; the last batch padded and masked."""
    batches = loader.eval_batches(
        source,
        functools.partial(preprocess.eval_image, crop=e.image_size),
        batch_size=batch_size(e, source),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return parallel.prefetch(batches, e.settings.prefetch)


def batch_size(e: experiment.Experiment, source: sources.Source) -> int:
    """`config.batch_eval`, or as much of it as the source can fill, rounded up to a multiple of the devices."""
    devices = jax.device_count()
    return -(-min(e.settings.batch_eval, len(source)) // devices) * devices


def _add(sums: dict[str, float], replicated: Any) -> None:
    """Adds one batch's sums as Python numbers, which stay exact for any number of examples."""
    for name, value in parallel.read(replicated or {}).items():
        sums[name] = sums.get(name, 0) + value.item()
