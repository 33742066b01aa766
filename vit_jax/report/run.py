"""The report of a run or an evaluation."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from vit_jax.data import sources
from vit_jax.data.host.decode import decode
from vit_jax.evaluators import passes
from vit_jax.optimize import parallel
from vit_jax.optimize.step import State
from vit_jax.report import collect, draw, page
from vit_jax.report.samples import augmented
from vit_jax.run.experiment import Experiment, model_params
from vit_jax.settings import Settings
from vit_jax.tasks.task import Task

log = logging.getLogger("vit_jax")

ROWS, COLUMNS = 4, 5
T = TypeVar("T")


def of_run(experiment: Experiment, state: State, workdir: Path, *, head: bool = True) -> None:
    """Writes `workdir/report.html` of the model in `state`, scored on the test split, and of what `metrics.jsonl` holds.

    All processes take part in the scoring, the first one writes. What goes wrong is a warning: the run itself is whole.

    Args:
      head: False leaves the answers out, where the model's head is not what is judged.
    """
    findings = None
    if head and has_answers(experiment.task, experiment.test_source.features):
        findings = _attempt("answers", lambda: _answers(experiment, state))
    step = int(experiment.parallelism.read(state.step))  # which all processes read together
    if parallel.is_main():
        _attempt("a page", lambda: _write(experiment, step, findings, workdir))


def has_answers(task: Task, offered: Mapping[str, Any]) -> bool:
    """Whether a task names one class for each example, and the data tells which is right."""
    return "label" in task.needs and "label" in offered


def _attempt(what: str, make: Callable[[], T]) -> T | None:
    try:
        return make()
    except Exception as error:  # whatever it is: what was learnt is saved, and stays so
        cause = next(iter(str(error).splitlines()), "")
        log.warning("report   without %s: %s", what, cause or type(error).__name__)
        return None


def _answers(experiment: Experiment, state: State) -> collect.Findings:
    source = scored_source(experiment)
    rows = passes.make_rows(experiment, collect.make_answers(experiment.task.predict))
    return collect.find(**rows(model_params(experiment, state)[""], source), names=source.class_names)


def scored_source(experiment: Experiment) -> sources.Source:
    """The test split, its classes numbered as those of the training set."""
    return passes.with_classes_of(experiment.train_source, experiment.test_source)


def _write(experiment: Experiment, step: int, findings: collect.Findings | None, workdir: Path) -> None:
    settings, task = experiment.settings, experiment.task
    series = collect.read_metrics(workdir / "metrics.jsonl")
    content = page.Content(
        title=workdir.resolve().name or "run",
        about=_about(experiment, step),
        metrics={name: float(values[-1]) for name, (_, values) in series.items()},
        curves=collect.curves(_with_rates(series, experiment) if settings.trainer == "train" else series),
        recipe=_flat(dataclasses.asdict(settings)),
        defaults=_flat(dataclasses.asdict(Settings())),
        findings=findings,
        pictures=findings and _attempt("mistakes", lambda: pictures(findings, scored_source(experiment), workdir)) or {},
        samples=_attempt("samples", lambda: _samples(task, experiment.train_source, settings)) or [],
        throughput=_throughput(series, settings),
    )
    path = page.write(content, workdir)
    log.info("report   %s", path)


def _about(experiment: Experiment, step: int) -> dict[str, str]:
    settings, fields = experiment.settings, experiment.task.model.fields
    train, test = experiment.train_source, experiment.test_source
    size = " × ".join(map(str, settings.image_size))
    return {
        "model": f"{fields.get('model_name') or experiment.task.model.type}, images of {size} pixels",
        "data": f"{settings.dataset}: {len(train):,} images of {settings.pp.train}, {len(test):,} of {settings.pp.test}",
        "trained": f"{step:,} steps" if step else "not in this folder",
    }


def _with_rates(series: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """With the learning rate of every step, of which the metrics hold only those at evaluations."""
    if not (total := experiment.settings.total_steps):
        return series
    steps = np.unique(np.linspace(1, total, min(total, collect.MOST_POINTS)).astype(int))
    rates = jax.vmap(experiment.schedule)(steps)
    return series | {"lr": (steps, np.asarray(rates, np.float64) + np.zeros(len(steps)))}


def _throughput(series: Mapping[str, Any], settings: Settings) -> dict[str, str]:
    devices = jax.devices()
    table = {"devices": f"{len(devices)} × {devices[0].device_kind}, computing in {settings.dtype}"}
    for name, (_, values) in series.items():
        if "img_sec_core" in name:
            what = {"img_sec_core_train": "training", "img_sec_core_test": "evaluation"}.get(name, name)
            table[what] = f"{np.median(values):,.0f} images a second and device (median; the most {values.max():,.0f})"
    if "checkpoint_stall_sec" in series:
        table["held up by checkpoints"] = f"{series['checkpoint_stall_sec'][1].sum():.2f} s"
    return table


def pictures(findings: collect.Findings, source: sources.Source, folder: Path) -> dict[int, page.Picture]:
    """By number of an example that is to be shown, its picture, and where it is, for a page in `folder`."""

    def picture(i: int) -> page.Picture:
        pixels = decode(source[i]["image"], exif_rotated=source.exif_rotated)
        return page.Picture(*draw.thumbnail(pixels), source.where(i), page.link(source.path(i), folder))

    return page.pictures(findings, picture)


def _samples(task: Task, source: sources.Source, settings: Settings) -> list[list[page.Picture]]:
    """By row: an image as it is evaluated, then as it is trained on."""
    columns = augmented(task, source, settings, rows=ROWS, columns=COLUMNS)
    rows = zip(*(zip(images, captions, strict=True) for images, captions in columns), strict=True)
    return [[page.Picture(*draw.thumbnail(pixels), caption) for pixels, caption in row] for row in rows]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat
