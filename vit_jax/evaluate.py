"""Scores a model on a dataset, every example counted exactly once: the newest checkpoint of a run, or any file.

python -m vit_jax.evaluate --workdir=runs/scratch --config=pretrain:micro4,digits
python -m vit_jax.evaluate --workdir=runs/knn --config=vit:micro4,digits --config.pretrained=FILE --config.evaluator=knn
"""

import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any

from vit_jax import evaluators, report
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.errors import UserError
from vit_jax.finite import check_metrics
from vit_jax.models import token_merging
from vit_jax.run import start
from vit_jax.run import workdir as workdirs
from vit_jax.run.experiment import Experiment, build
from vit_jax.run.lock import BusyError, only_run
from vit_jax.run.progress import log_setup
from vit_jax.run.writer import Writer, format_metrics, logging_to
from vit_jax.settings import Settings
from vit_jax.tasks import images

log = logging.getLogger("vit_jax")


def evaluate(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, float]:
    """Scores what a training run with this config would start from, and trains nothing.

    That is the newest checkpoint in `workdir`, else `config.pretrained`, else the file in `config.pretrained_dir`, with
    its head as it is. `config.evaluator` names what is run: "classify" is accuracy and loss on the test set and all of
    `config.evaluators`; another name is one of these, or a type, and where that is about features a file may have any
    head. The metrics are returned, and added to `metrics.jsonl` with the number of steps that were trained, unless a run is
    going on in `workdir`, whose file it is. UserError if one is not finite.
    """
    settings = Settings.from_config(config)
    directory = workdirs.make(workdir)
    with logging_to(directory), token_merging.merging(settings.tome):
        experiment = build(settings, origin=start.find_origin(settings, directory))
        workdirs.check_classes(directory, experiment.train_source.class_names)
        token_merging.check(experiment.task.model.module, settings.tome)
        log_setup(experiment)
        chosen, keep_head = evaluators.chosen(experiment)
        with contextlib.closing(Checkpointer(directory / "checkpoints", read_only=True)) as checkpointer:
            state = start.restore_or_load(experiment, checkpointer, keep_head=keep_head)
        if checkpointer.latest_step() is None and keep_head and experiment.origin:
            _warn_of_other_pixels(experiment)
        if state is None:
            raise UserError(f"nothing to evaluate: {directory} holds no checkpoint and --config.pretrained is not set")
        if checkpointer.latest_step() is not None:
            workdirs.check_frozen(directory, start.frozen_fingerprints(experiment, state))
        metrics = evaluators.scores(experiment, state, chosen)
        check_metrics(metrics, "the model")
        try:
            with only_run(directory), contextlib.closing(Writer(directory)) as writer:
                writer.scalars(int(experiment.parallelism.read(state.step)), metrics)
                if settings.report:
                    report.of_run(experiment, state, directory, head=keep_head)
        except BusyError as error:
            log.warning(
                "%s: these metrics are not added to metrics.jsonl, and no report is written", str(error).partition(": ")[0]
            )
        log.info(format_metrics(metrics))
        return metrics


def _warn_of_other_pixels(experiment: Experiment) -> None:
    """Says where a file's own way to resize photos is not that of the recipe, by which its score may be another."""
    told = images.pixels_of_origin(experiment.settings, experiment.origin)
    if told and "boxes" not in experiment.task.needs:
        how = " ".join(f"--config.pp.{name}={value}" for name, value in sorted(told.items()))
        log.warning("photos   are resized as this recipe says; the checkpoint's own files, and predict, have %s", how)


def cli() -> None:
    """The console command: training's, with `config.trainer` set."""
    from vit_jax import main

    main.cli(__doc__, "--config.trainer=evaluate")


if __name__ == "__main__":
    cli()
