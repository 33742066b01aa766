"""What a person sees of a run: what is about to run, how it goes on, and when it must stop."""

import logging
import math
import re
import time
from collections import deque
from typing import Any

import jax
import numpy as np

from vit_jax import models
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.errors import unknown
from vit_jax.optimize import optim, parallel, trainable
from vit_jax.run.experiment import Experiment
from vit_jax.run.signals import GracefulExit
from vit_jax.run.start import split_params
from vit_jax.run.writer import Writer, format_metrics
from vit_jax.tasks.task import TrainingFailed

log = logging.getLogger("vit_jax")

_WRITTEN_ONLY = ("grad_norm", "update_norm")  # metrics of the step itself, which only metrics.jsonl and TensorBoard get
_MUCH_LARGER = 16  # times as many pixels as a checkpoint has seen
_LONG = 300.0  # seconds from which on it is told what would take less
_VIEWS, _FORWARD = 2, 1 / 3  # of each image; a forward pass as part of a training step's work
_QUICK = "--config=photos:FOLDER,quick, or --config.head_fit.views=2 --config.total_steps=0, in another --workdir"


def log_setup(experiment: Experiment) -> None:
    """Says in a few lines what is about to run."""
    settings, model = experiment.settings, experiment.task.model
    architecture = models.architecture_of(model.type)
    shapes = jax.eval_shape(experiment.init_params)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    grid = "x".join(map(str, architecture.grid(model.fields, settings.image_size)))
    size = "x".join(map(str, settings.image_size))
    name = model.fields.get("model_name") or model.type
    log.info("model    %s, %s parameters, %s patches of a %s image", name, f"{count:,}", grid, size)
    canvases = (settings.image_size,)
    if experiment.task.canvases:
        canvases = experiment.task.canvases.sizes
        sizes = ", ".join(f"{h}x{w}" for h, w in canvases)
        log.info("canvases %s: at most %d programs for training, and as many for evaluation", sizes, len(canvases))
    patch = architecture.cut(model.fields)
    for canvas in canvases:
        if patch and any(length % p for length, p in zip(canvas, patch, strict=True)):
            size = "x".join(map(str, canvas))
            log.warning("%s pixels are no multiple of patches of %s: the right and lower edge are cut off", size, patch)
    if experiment.origin and (own := experiment.origin.image_size):
        if (times := math.prod(settings.image_size) / math.prod(own)) > _MUCH_LARGER:
            message = "%dx%d pixels are %.0f times as many as the checkpoint was trained on, and take as much longer"
            log.warning(f"{message}: --config.pp.crop=%d is its own size", *settings.image_size, times, max(own))

    train, test = experiment.train_source, experiment.test_source
    sizes = f"{len(train):,} images of {settings.pp.train}, {len(test):,} of {settings.pp.test}"
    classes = f", {train.num_classes} classes" if train.num_classes else ""
    log.info("data     %s: %s%s", settings.dataset, sizes, classes)

    trained, frozen = split_params(experiment, shapes)
    if frozen:
        log.info("training %s", trainable.describe(trained, frozen["model"]).replace("\n", "\n         "))
    if settings.lr_factors or settings.layer_decay or (frozen and not settings.lora.rank):
        num_layers = architecture.num_layers(model.fields)
        table = optim.factor_table(trained, settings.lr_factors, settings.layer_decay, num_layers, frozen=frozen.get("model"))
        log.info("rates    the learning rate is multiplied by\n%s", table)

    devices, processes = jax.devices(), jax.process_count()
    how = f", mesh {dict(experiment.parallelism.mesh.shape)}" if isinstance(experiment.parallelism, parallel.Mesh) else ""
    how += f", {processes} processes" if processes > 1 else ""
    log.info("devices  %d x %s, computing in %s%s", len(devices), devices[0].device_kind, settings.dtype, how)


def _could_fit_a_head(experiment: Experiment) -> bool:
    """Whether a classifier is fine-tuned on CPUs with a head that knows nothing."""
    settings = experiment.settings
    fine_tuning = bool(settings.sources) and not settings.head_fit.views and experiment.task.head_inputs is not None
    return fine_tuning and jax.default_backend() == "cpu"


class NotFiniteError(TrainingFailed):
    """The loss, the gradient or the update is not finite: there is nothing left to save."""


class Progress:
    """Follows the loop without holding it up: a step's metrics are read once later steps have been dispatched."""

    def __init__(self, experiment: Experiment, writer: Writer, checkpointer: Checkpointer, stop: GracefulExit):
        self.settings, self.parallelism, self.task = experiment.settings, experiment.parallelism, experiment.task
        self.writer, self.checkpointer, self.stop = writer, checkpointer, stop
        self.pending: deque[tuple[int, Any]] = deque()
        self.clock: float | None = None
        self.agreed_to_stop = False
        self.skipped = self.skipped_in_a_row = 0
        self.images = len(experiment.train_source) if _could_fit_a_head(experiment) else 0

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

    def report_scores(self, step: int, metrics: dict[str, float]) -> None:
        """Writes and shows what the evaluators found, and starts the clock anew."""
        self.writer.scalars(step, metrics)
        log.info("step %d  %s", step, format_metrics(metrics))
        self.start_clock()

    def improves(self, metrics: dict[str, float], *, complete: bool) -> bool:
        """Whether `config.keep_best` is better than ever. UserError if it is not among the metrics of all evaluators."""
        name = self.settings.keep_best
        plain = name and re.fullmatch(r".*_test(_ema)?", name) and "img_sec_core_test" in metrics
        if name and (complete or plain) and name not in metrics:
            raise unknown("metric config.keep_best", name, metrics)
        return name in metrics and self.checkpointer.improves(metrics)

    def save(self, step: int, state: Any, metrics: dict[str, float]) -> None:
        """Has a checkpoint written in the background, and notes how long that held the loop up."""
        started = time.perf_counter()
        copy = self.parallelism.snapshot(state.replace(frozen={}))  # before waiting: a CPU copies finished arrays here
        stall = time.perf_counter() - started
        self.catch_up()
        self.checkpointer.save(step, copy, metrics)
        stall += self.checkpointer.stall_seconds
        log.info("saving   step %d in the background; training waited %.0f ms", step, 1000 * stall)
        self.writer.scalars(step, {"checkpoint_stall_sec": stall})

    def _read(self, keep: int) -> None:
        while len(self.pending) > keep:
            step, on_devices = self.pending.popleft()
            metrics = self.parallelism.read(on_devices)
            self.agreed_to_stop |= bool(metrics.get("stop", False))
            self._check_finite(step, metrics)
            self.task.check(step, metrics)
            if self.clock is None:  # the first step compiles, which says nothing about speed
                self.start_clock()
            else:
                self.timed_steps += 1
            if step % self.settings.progress_every == 0 or step == self.settings.total_steps:
                self._report(step, metrics)

    def _report(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        finite = {name: float(x) for name, x in metrics.items() if math.isfinite(x) and name != "stop"}
        scalars = {f"train_{name}": x for name, x in finite.items()}
        status = format_metrics({name: x for name, x in finite.items() if name not in _WRITTEN_ONLY})
        if self.timed_steps:
            seconds = time.perf_counter() - self.clock
            rate = self.timed_steps * self.settings.batch / seconds
            scalars["img_sec_core_train"] = rate / jax.device_count()
            left = (self.settings.total_steps - step) * self.settings.batch / rate
            status += f"  {rate:,.0f} images/s  {_duration(left)} left"
            self._advise(rate, left)
        if self.skipped:
            scalars["skipped_steps"] = self.skipped
        self.writer.scalars(step, scalars)
        self.writer.advance(step, status)
        log.info("step %d/%d  %s", step, self.settings.total_steps, status, extra={"progress": True})
        self.start_clock()

    def _advise(self, rate: float, left: float) -> None:
        """Says once what takes less time than so many seconds on CPUs, at so many images a second."""
        if self.images and left > _LONG:
            seconds = _duration(_VIEWS * self.images * _FORWARD / rate)
            log.info("advice   on CPUs a head alone, fitted to features, takes about %s and no steps: %s", seconds, _QUICK)
        self.images = 0

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
            + (f"The checkpoint of step {good} is kept. " if good is not None else "No checkpoint had been written yet. ")
            + "In a new --workdir, try a lower --config.base_lr, more --config.warmup_steps or --config.grad_norm_clip=1."
        )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
