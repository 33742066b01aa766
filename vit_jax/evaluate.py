"""Scores a model on a dataset, every example counted exactly once: the newest checkpoint of a run, or any file.

python -m vit_jax.evaluate --workdir=runs/scratch --config=pretrain:micro4,digits
python -m vit_jax.evaluate --workdir=runs/knn --config=vit:micro4,digits --config.pretrained=FILE --config.evaluator=knn
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax import evaluators
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.errors import UserError, unknown
from vit_jax.evaluators import Evaluator, classify
from vit_jax.optimize.step import State
from vit_jax.run import workdir as workdirs
from vit_jax.run.experiment import Experiment, build, frozen_fingerprints, log_setup, model_params, restore_or_load
from vit_jax.run.lock import BusyError, only_run
from vit_jax.run.writer import Writer, format_metrics, logging_to
from vit_jax.settings import Settings

log = logging.getLogger("vit_jax")


def evaluate(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, float]:
    """Scores what a training run with this config would start from, and trains nothing.

    That is the newest checkpoint in `workdir`, else `config.pretrained`, else the file in `config.pretrained_dir`, with
    its head as it is. `config.evaluator` names what is run: "classify" is accuracy and loss on the test set and all of
    `config.evaluators`; another name is one of these, or a type, and where that is about features a file may have any
    head. The metrics are returned, and added to `metrics.jsonl` with the number of steps that were trained, unless a run is
    going on in `workdir`, whose file it is.
    """
    settings = Settings.from_config(config)
    directory = workdirs.make(workdir)
    with logging_to(directory):
        experiment = build(settings, directory)
        log_setup(experiment)
        chosen, keep_head = _chosen(experiment)
        with contextlib.closing(Checkpointer(directory / "checkpoints", read_only=True)) as checkpointer:
            state = restore_or_load(experiment, checkpointer, keep_head=keep_head)
        if state is None:
            raise UserError(f"nothing to evaluate: {directory} holds no checkpoint and --config.pretrained is not set")
        if checkpointer.latest_step() is not None:
            workdirs.check_frozen(directory, frozen_fingerprints(experiment, state))
        metrics = scores(experiment, state, chosen)
        try:
            with only_run(directory), contextlib.closing(Writer(directory)) as writer:
                writer.scalars(int(experiment.parallelism.read(state.step)), metrics)
        except BusyError as e:
            log.warning("%s: these metrics are not added to metrics.jsonl", str(e).partition(": ")[0])
        log.info(format_metrics(metrics))
        return metrics


def scores(experiment: Experiment, state: State, chosen: Iterable[Evaluator]) -> dict[str, float]:
    """The metrics of the state's parameters, and of their average if there is one."""
    metrics = {}
    for suffix, params in model_params(experiment, state).items():
        for evaluator in chosen:
            metrics |= {name + suffix: value for name, value in evaluator(params).items()}
    return metrics


def make_evaluators(experiment: Experiment) -> list[tuple[int, Evaluator]]:
    """(every so many steps, evaluator) of the plain one and of all of `config.evaluators`. Each compiles once."""
    every, found = experiment.settings.eval_every, [(experiment.settings.eval_every, make_evaluator(experiment))]
    for name, options in experiment.settings.evaluators.items():
        evaluator = evaluators.make(name, options, experiment)
        found.append((evaluators.every(name, options, every), evaluator))
    return found


def make_evaluator(experiment: Experiment) -> Evaluator:
    """parameters on the devices → `accuracy_test`, `loss_test` and `img_sec_core_test` of the whole test source."""
    score = classify.make_score(experiment, experiment.test_source)

    def evaluator(params: Any) -> dict[str, float]:
        metrics, rate = score(params)
        return {f"{name}_test": value for name, value in metrics.items()} | {"img_sec_core_test": rate}

    return evaluator


def _chosen(experiment: Experiment) -> tuple[list[Evaluator], bool]:
    """What `config.evaluator` names, and whether that needs the head of a file."""
    name, configured = experiment.settings.evaluator, experiment.settings.evaluators
    if name == "classify":
        return [evaluator for _, evaluator in make_evaluators(experiment)], True
    if name not in (allowed := {*evaluators.TYPES, *configured}):
        raise unknown("config.evaluator", name, allowed)
    options = configured.get(name, {})
    return [evaluators.make(name, options, experiment)], evaluators.type_of(name, options) not in evaluators.HEADLESS


def cli() -> None:
    """The console command: training's, with `config.trainer` set."""
    from vit_jax import main

    main.cli(__doc__, "--config.trainer=evaluate")


if __name__ == "__main__":
    cli()
