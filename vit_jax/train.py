"""The training loop, from top to bottom: `train_and_evaluate(config, workdir)`."""

import functools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import checkpoint, experiment, parallel
from vit_jax import workdir as workdirs
from vit_jax.checkpoint import describe
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.data import loader, preprocess
from vit_jax.errors import UserError
from vit_jax.evaluate import make_evaluator
from vit_jax.metrics import Writer, logging_to
from vit_jax.settings import Settings
from vit_jax.signals import GracefulExit
from vit_jax.step import make_update

log = logging.getLogger("vit_jax")


def train_and_evaluate(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains as `config` says, or continues what `workdir` holds, and leaves `model.npz` and `model.json` there.

    Returns the trained parameters. Ctrl-C and SIGTERM save a last checkpoint and raise SystemExit(130 or 143).
    """
    s = Settings.from_config(config)
    parallel.check_batch(s.batch, s.accum_steps)
    directory = workdirs.make(workdir)
    with logging_to(directory), GracefulExit() as stop:
        e = experiment.build(s, directory)
        workdirs.claim(directory, s, e.train_source.class_names, e.origin)
        experiment.log_setup(e)
        checkpointer = Checkpointer(directory / "checkpoints", keep=s.keep)
        state = experiment.start(e, checkpointer)
        if state is None:
            log.info("start    from nothing, seed %d", s.seed)
            state = experiment.new_state(e)
        done = int(state.step)
        if done >= s.total_steps:
            log.info("nothing to do: all %d steps are done, the model is in %s", s.total_steps, directory / "model.npz")

        state = parallel.replicate(state)
        update = parallel.pmap_update(make_update(e.task.loss, e.optimizer, seed=s.seed, accum_steps=s.accum_steps))
        evaluator = make_evaluator(e)
        batches = _train_batches(e, start_step=done)
        writer = Writer(directory, start_step=done, total_steps=s.total_steps)
        progress = Progress(s, writer, checkpointer)
        try:
            if stop.signal:
                raise SystemExit(stop.exit_code)
            for step in range(done + 1, s.total_steps + 1):
                state, step_metrics = update(state, next(batches))
                progress.add(step, step_metrics)
                last = step == s.total_steps

                if step % s.eval_every == 0 or last:
                    progress.catch_up()
                    metrics = evaluator(state.params) | {"lr": float(e.schedule(step))}
                    writer.scalars(step, metrics)
                    log.info("step %d  %s", step, "  ".join(f"{name} {x:.5g}" for name, x in metrics.items()))
                    progress.start_clock()

                if last:
                    _write_model(e, directory, parallel.read(state.params), step, metrics)

                if step % s.checkpoint_every == 0 or last or stop.signal:
                    progress.catch_up()
                    checkpointer.save(step, parallel.unreplicate(state))

                if stop.signal:
                    log.info("stopped by signal %d after step %d: the same command continues", stop.signal, step)
                    raise SystemExit(stop.exit_code)
        except NotFiniteError:
            raise
        except UserError:  # a bad image, say: what was learnt so far stays
            progress.catch_up()
            if (step := int(parallel.read(state.step))) > done:
                checkpointer.save(step, parallel.unreplicate(state))
            raise
        finally:
            batches.close()
            writer.close()
            checkpointer.close()
        return parallel.read(state.params)


class NotFiniteError(UserError):
    """The loss or the gradient is not finite: there is nothing left to save."""


class Progress:
    """Follows the loop without holding it up: a step's metrics are read once later steps have been dispatched."""

    def __init__(self, s: Settings, writer: Writer, checkpointer: Checkpointer):
        self.s, self.writer, self.checkpointer = s, writer, checkpointer
        self.pending: deque[tuple[int, Any]] = deque()
        self.clock: float | None = None

    def start_clock(self) -> None:
        """Starts timing anew, so that neither evaluation nor an earlier stretch counts."""
        self.clock, self.timed_steps = time.perf_counter(), 0

    def add(self, step: int, metrics: Any) -> None:
        """Takes the metrics of a step just dispatched, and reads those of an earlier one."""
        self.pending.append((step, metrics))
        self._read(keep=self.s.prefetch if self.clock else 0)

    def catch_up(self) -> None:
        """Waits for every step so far. Raises NotFiniteError at the first whose loss or gradient is not finite."""
        self._read(keep=0)

    def _read(self, keep: int) -> None:
        while len(self.pending) > keep:
            step, replicated = self.pending.popleft()
            metrics = parallel.read(replicated)
            self._check_finite(step, metrics)
            if self.clock is None:  # the first step compiles, which says nothing about speed
                self.start_clock()
            else:
                self.timed_steps += 1
            if step % self.s.progress_every == 0 or step == self.s.total_steps:
                self._report(step, metrics)

    def _report(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        scalars = {"train_loss": metrics["loss"]}
        status = f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}"
        if self.timed_steps:
            rate = self.timed_steps * self.s.batch / (time.perf_counter() - self.clock)
            scalars["img_sec_core_train"] = rate / jax.device_count()
            status += f"  {rate:,.0f} images/s  {_duration((self.s.total_steps - step) * self.s.batch / rate)} left"
        self.writer.scalars(step, scalars)
        self.writer.advance(step, status)
        log.info("step %d/%d  %s", step, self.s.total_steps, status, extra={"progress": True})
        self.start_clock()

    def _check_finite(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            return
        good = self.checkpointer.latest_step()
        raise NotFiniteError(
            f"step {step}: the loss is {metrics['loss']} and the gradient's norm {metrics['grad_norm']}; training stops. "
            + (f"The checkpoint of step {good} is kept. " if good else "No checkpoint had been written yet. ")
            + "In a new --workdir, try a lower --config.base_lr, more --config.warmup_steps or --config.grad_norm_clip=1."
        )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _train_batches(e: experiment.Experiment, start_step: int) -> Iterator[dict[str, jax.Array]]:
    s = e.settings
    transform = functools.partial(preprocess.train_image, crop=e.image_size, resize_to=s.pp.resize, area=tuple(s.pp.area))
    batches = loader.train_batches(
        e.train_source,
        transform,
        batch_size=s.batch,
        seed=s.seed,
        start_step=start_step,
        shuffle=s.shuffle_buffer > 0,
        skip_bad_images=s.bad_images == "skip",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return parallel.prefetch(batches, s.prefetch)


def _write_model(e: experiment.Experiment, directory: Path, params: Any, step: int, metrics: dict[str, float]) -> None:
    path = directory / "model.npz"
    checkpoint.save(params, path)
    describe.write(path, experiment.description(e, step, metrics))
    log.info("wrote    %s\nuse it   python -m vit_jax.predict --model=%s IMAGE…", path, directory)
