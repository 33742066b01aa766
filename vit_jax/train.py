"""The training loop, from top to bottom: `train_and_evaluate(config, workdir)`."""

import contextlib
import logging
import math
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vit_jax.checkpoint.state import Checkpointer, WriteError
from vit_jax.data import loader, memory
from vit_jax.errors import UserError, unknown
from vit_jax.evaluate import make_evaluators, scores
from vit_jax.optimize import parallel
from vit_jax.run import pipeline, save_model
from vit_jax.run import workdir as workdirs
from vit_jax.run.experiment import (
    Experiment,
    build,
    frozen_fingerprints,
    log_setup,
    make_update,
    model_params,
    new_state,
    restore_or_load,
)
from vit_jax.run.lock import only_run
from vit_jax.run.signals import GracefulExit, LoaderHangs
from vit_jax.run.writer import Writer, format_metrics, logging_to
from vit_jax.settings import Settings

log = logging.getLogger("vit_jax")


def train_and_evaluate(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains as `config` says, or continues what `workdir` holds, and leaves `model.npz` and `model.json` there.

    Returns the trained parameters. Ctrl-C, SIGTERM and SIGHUP, in any of the processes, save a last checkpoint and raise
    SystemExit(130, 143 or 129). BusyError if another run is going on in `workdir`.
    """
    settings = Settings.from_config(config)
    directory = workdirs.make(workdir)
    with only_run(directory), logging_to(directory), GracefulExit() as stop:
        experiment = build(settings, directory)
        parallel.check_batch(settings.batch, settings.accum_steps, experiment.parallelism.batch_shards)
        workdirs.claim(directory, settings, experiment.train_source.class_names, experiment.origin)
        log_setup(experiment)
        checkpointer = Checkpointer(
            directory / "checkpoints",
            keep=settings.keep,
            best=settings.keep_best,
            lower_is_better=_lower_is_better(settings.keep_best or ""),
        )
        state = restore_or_load(experiment, checkpointer)
        if state is None:
            log.info("start    from nothing, seed %d", settings.seed)
            state = new_state(experiment)
        workdirs.check_frozen(directory, frozen_fingerprints(experiment, state))
        done = int(experiment.parallelism.read(state.step))
        update = make_update(experiment)
        evaluators = make_evaluators(experiment)
        batches = stop.watch(_train_batches(experiment, start_step=done, stop=stop))
        writer = Writer(directory, start_step=done, total_steps=settings.total_steps)
        progress = Progress(experiment, writer, checkpointer, stop)
        try:
            if stop.signal and jax.process_count() == 1:
                raise SystemExit(stop.exit_code)
            if done >= settings.total_steps:
                if not workdirs.has_model(directory):  # what stopped the last step came after it
                    metrics = scores(experiment, state, [evaluator for _, evaluator in evaluators])
                    writer.scalars(done, metrics)
                    save_model.write_model(experiment, directory / "model.npz", state, done, metrics)
                log.info("nothing to do: all %d steps are done, the model is in %s", settings.total_steps, directory)
            for step in range(done + 1, settings.total_steps + 1):
                state, step_metrics = update(state, next(batches))
                progress.add(step, step_metrics)
                last = step == settings.total_steps
                metrics = {}

                if due := [evaluator for every, evaluator in evaluators if step % every == 0 or last]:
                    progress.catch_up()
                    checkpointer.check()
                    metrics = scores(experiment, state, due) | {"lr": float(experiment.schedule(step))}
                    writer.scalars(step, metrics)
                    log.info("step %d  %s", step, format_metrics(metrics))
                    progress.start_clock()

                if improved := progress.improves(metrics, complete=len(due) == len(evaluators)):
                    save_model.write_model(experiment, directory / "model_best.npz", state, step, metrics)
                if last:
                    save_model.write_model(experiment, directory / "model.npz", state, step, metrics)

                stopping = progress.stopping
                if step % settings.checkpoint_every == 0 or last or improved or stopping:
                    progress.save(step, state, metrics)

                if stopping:
                    log.info("stopped by signal %d after step %d: the same command continues", stop.exit_code - 128, step)
                    raise SystemExit(stop.exit_code)
        except (NotFiniteError, WriteError):
            raise
        except (UserError, LoaderHangs):  # a bad image, say: what was learnt so far stays
            if jax.process_count() == 1 and (step := int(experiment.parallelism.read(state.step))) > done:
                progress.save(step, state, {})
            raise
        except OSError as e:
            raise UserError(
                f"{e.filename or directory}: {e.strerror}. What was saved in {directory} is intact; "
                "once that is put right, the same command continues"
            ) from e
        finally:
            with contextlib.closing(checkpointer), contextlib.closing(writer):  # each closed even if another fails
                batches.close()
        return experiment.parallelism.read(model_params(experiment, state)[""])


def _lower_is_better(metric: str) -> bool:
    return bool({"loss", "ece"} & set(re.split("[/_]", metric.lower())))


class NotFiniteError(UserError):
    """The loss, the gradient or the update is not finite: there is nothing left to save."""


class Progress:
    """Follows the loop without holding it up: a step's metrics are read once later steps have been dispatched."""

    def __init__(self, experiment: Experiment, writer: Writer, checkpointer: Checkpointer, stop: GracefulExit):
        self.settings, self.parallelism, self.writer, self.checkpointer, self.stop = (
            experiment.settings,
            experiment.parallelism,
            writer,
            checkpointer,
            stop,
        )
        self.pending: deque[tuple[int, Any]] = deque()
        self.clock: float | None = None
        self.measured_steps, self.measured_seconds = 0, 0.0
        self.agreed_to_stop = False
        self.skipped = self.skipped_in_a_row = 0

    @property
    def stopping(self) -> bool:
        """Whether to save and leave. All processes see the same answer after the same step."""
        return self.agreed_to_stop if jax.process_count() > 1 else self.stop.signal is not None

    def start_clock(self) -> None:
        """Starts timing anew, so that neither evaluation nor an earlier stretch counts."""
        self.clock, self.timed_steps = time.perf_counter(), 0

    def add(self, step: int, metrics: Any) -> None:
        """Takes the metrics of a step just dispatched, and reads those of an earlier one."""
        self.pending.append((step, metrics))
        self._read(keep=self.settings.prefetch if self.clock else 0)

    def catch_up(self) -> None:
        """Waits for every step so far. Raises NotFiniteError at the first that is not finite."""
        self._read(keep=0)

    def improves(self, metrics: dict[str, float], *, complete: bool) -> bool:
        """Whether `config.keep_best` is better than ever. UserError if it is not among the metrics of all evaluators."""
        name = self.settings.keep_best
        plain = name and re.fullmatch(r".*_test(_ema)?", name) and "accuracy_test" in metrics
        if name and (complete or plain) and name not in metrics:
            raise unknown("metric config.keep_best", name, metrics)
        return name in metrics and self.checkpointer.improves(metrics)

    def save(self, step: int, state: Any, metrics: dict[str, float]) -> None:
        """Has a checkpoint written in the background, and notes how long that held the loop up."""
        started = time.perf_counter()
        copy = self.parallelism.snapshot(
            state.replace(frozen={})
        )  # before waiting: a CPU copies finished arrays in this thread
        stall = time.perf_counter() - started
        self.catch_up()
        self.checkpointer.save(step, copy, metrics)
        stall += self.checkpointer.stall_seconds
        share = f", {stall * self.measured_steps / self.measured_seconds:.1%} of a step" if self.measured_steps else ""
        log.info("saving   step %d in the background; training waited %.0f ms%s", step, 1000 * stall, share)
        self.writer.scalars(step, {"checkpoint_stall_sec": stall})

    def _read(self, keep: int) -> None:
        while len(self.pending) > keep:
            step, on_devices = self.pending.popleft()
            metrics = self.parallelism.read(on_devices)
            self.agreed_to_stop |= bool(metrics.get("stop", False))
            self._check_finite(step, metrics)
            if self.clock is None:  # the first step compiles, which says nothing about speed
                self.start_clock()
            else:
                self.timed_steps += 1
            if step % self.settings.progress_every == 0 or step == self.settings.total_steps:
                self._report(step, metrics)

    def _report(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        scalars = {"train_loss": metrics["loss"]} if math.isfinite(metrics["loss"]) else {}
        status = f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}"
        if self.timed_steps:
            seconds = time.perf_counter() - self.clock
            self.measured_steps, self.measured_seconds = self.measured_steps + self.timed_steps, self.measured_seconds + seconds
            rate = self.timed_steps * self.settings.batch / seconds
            scalars["img_sec_core_train"] = rate / jax.device_count()
            left = (self.settings.total_steps - step) * self.settings.batch / rate
            status += f"  {rate:,.0f} images/s  {_duration(left)} left"
        if self.skipped:
            scalars["skipped_steps"] = self.skipped
        self.writer.scalars(step, scalars)
        self.writer.advance(step, status)
        log.info("step %d/%d  %s", step, self.settings.total_steps, status, extra={"progress": True})
        self.start_clock()

    def _check_finite(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        finite = all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm", "update_norm"))
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if finite:
            return
        what = f"step {step}: the loss is {metrics['loss']}, the gradient's norm {metrics['grad_norm']}"
        what += f" and the update's {metrics['update_norm']}"
        if self.settings.nonfinite == "skip" and self.skipped_in_a_row < self.settings.nonfinite_limit:
            self.skipped += 1
            log.warning("%s; the step is skipped, %d so far", what, self.skipped)
            return
        good = self.checkpointer.latest_step()
        in_a_row = f" after {self.skipped_in_a_row} such steps in a row" if self.settings.nonfinite == "skip" else ""
        raise NotFiniteError(
            f"{what}; training stops{in_a_row}. "
            + (f"The checkpoint of step {good} is kept. " if good else "No checkpoint had been written yet. ")
            + "In a new --workdir, try a lower --config.base_lr, more --config.warmup_steps or --config.grad_norm_clip=1."
        )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _train_batches(experiment: Experiment, start_step: int, stop: GracefulExit) -> Iterator[dict[str, jax.Array]]:
    """Batches on the devices; of several processes each tells the others, by a field `stop`, whether it was asked to."""
    settings = experiment.settings
    batches = loader.train_batches(
        memory.kept_in_memory(experiment.train_source, settings.cache_gb),
        pipeline.train_transform(settings),
        batch_size=settings.batch,
        seed=settings.seed,
        start_step=start_step,
        shuffle=settings.shuffle_buffer > 0,
        skip_bad_images=settings.bad_images == "skip",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if jax.process_count() == 1:
        return experiment.parallelism.prefetch(batches, settings.prefetch)

    def flagged() -> Iterator[dict[str, np.ndarray]]:
        with contextlib.closing(batches):
            for batch in batches:
                yield batch | {"stop": np.full(len(batch["label"]), stop.signal is not None)}

    return experiment.parallelism.prefetch(flagged(), settings.prefetch)
