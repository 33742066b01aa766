"""The training loop, from top to bottom: `train_and_evaluate(config, workdir)`."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import evaluators, fit_head, report
from vit_jax.checkpoint.state import Checkpointer, WriteError
from vit_jax.data import loader, memory
from vit_jax.errors import UserError
from vit_jax.optimize.step import State
from vit_jax.run import start
from vit_jax.run import workdir as workdirs
from vit_jax.run.experiment import Experiment, build, make_update, model_params
from vit_jax.run.lock import only_run
from vit_jax.run.progress import Progress, log_setup
from vit_jax.run.save_model import write_model
from vit_jax.run.signals import GracefulExit, LoaderHangs
from vit_jax.run.writer import Writer, format_metrics, logging_to
from vit_jax.settings import Settings
from vit_jax.tasks.task import TrainingFailed

log = logging.getLogger("vit_jax")


def train_and_evaluate(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains as `config` says, or continues what the workdir holds, and leaves `model.npz` and `model.json` there.

    Returns the trained parameters. Ctrl-C, SIGTERM and SIGHUP, in any of the processes, save a last checkpoint and raise
    SystemExit(130, 143 or 129). BusyError if another run is going on in `workdir`.
    """
    settings = Settings.from_config(config)
    directory = workdirs.make(workdir)
    with only_run(directory), logging_to(directory), GracefulExit() as stop:
        # What is trained, on what, and where it starts
        experiment = _open(settings, directory, stop)
        due_evaluators = evaluators.make_evaluators(experiment)
        every_evaluator = [evaluator for _, evaluator in due_evaluators]
        checkpointer = Checkpointer(
            directory / "checkpoints",
            keep=settings.keep,
            best=settings.keep_best,
            lower_is_better=evaluators.lower_is_better(every_evaluator, settings.keep_best),
        )
        state, fits_head = _first_state(experiment, checkpointer, directory, stop)
        done = checkpointer.latest_step() or 0  # not read from the state, whose parameters may still be drawn

        update = make_update(experiment)
        with stop.reading():  # the sizes of images
            batches = stop.watch(_train_batches(experiment, start_step=done, stop=stop))
        writer = Writer(directory, start_step=done, total_steps=settings.total_steps)
        progress = Progress(experiment, writer, checkpointer, stop)
        try:
            if fits_head:
                _keep_fitted(experiment, state, every_evaluator, progress, directory)
            _leave_if_asked(stop)
            if done >= settings.total_steps and not fits_head:
                _leave_complete(experiment, state, every_evaluator, writer, directory)

            for step in range(done + 1, settings.total_steps + 1):
                # One update; its metrics are read while later ones run
                state, step_metrics = update(state, next(batches))
                progress.add(step, step_metrics)
                last = step == settings.total_steps
                metrics = {}

                # Scores, each on its own schedule
                if due := [evaluator for every, evaluator in due_evaluators if step % every == 0 or last]:
                    progress.catch_up()
                    checkpointer.check()
                    metrics = evaluators.scores(experiment, state, due) | {"lr": float(experiment.schedule(step))}
                    progress.report_scores(step, metrics)

                # What stays: checkpoints, the best model, the last one
                improved = progress.improves(metrics, complete=len(due) == len(due_evaluators))
                stopping = progress.stopping
                if last and settings.end_with_best and not improved:
                    state, metrics = start.back_to_best(experiment, checkpointer, state, metrics)
                    progress.report_scores(step, metrics)
                if improved:
                    write_model(experiment, directory / "model_best.npz", state, step, metrics)
                if step % settings.checkpoint_every == 0 or last or improved or stopping:
                    progress.save(step, state, metrics)
                if last:
                    write_model(experiment, directory / "model.npz", state, step, metrics)

                if stopping:
                    log.info("stopped by signal %d after step %d: the same command continues", stop.exit_code - 128, step)
                    raise SystemExit(stop.exit_code)
        except (TrainingFailed, WriteError):
            raise
        except (UserError, LoaderHangs):  # a bad image, say: what was learnt so far stays
            if jax.process_count() == 1 and (step := int(experiment.parallelism.read(state.step))) > done:
                progress.save(step, state, {})
            raise
        except OSError as error:
            raise UserError(
                f"{error.filename or directory}: {error.strerror}. What was saved in {directory} is intact; "
                "once that is put right, the same command continues"
            ) from error
        finally:
            with contextlib.closing(checkpointer), contextlib.closing(writer):  # each closed even if another fails
                batches.close()
        if settings.report and (done < settings.total_steps or fits_head or not (directory / report.FILE).exists()):
            report.of_run(experiment, state, directory)
        return experiment.parallelism.read(model_params(experiment, state)[""])


def _open(settings: Settings, directory: Path, stop: GracefulExit) -> Experiment:
    """The experiment, once the workdir is found to be its own."""
    with stop.reading():
        experiment = build(settings, origin=start.find_origin(settings, directory))
    workdirs.check_classes(directory, experiment.train_source.class_names)
    workdirs.claim(directory, settings, experiment.train_source.class_names, experiment.origin)
    log_setup(experiment)
    if settings.head_fit.views:
        fit_head.check(experiment)
    return experiment


def _first_state(experiment: Experiment, checkpointer: Checkpointer, directory: Path, stop: GracefulExit) -> tuple[State, bool]:
    """The state to go on from, and whether its head has just been fitted.

    UserError if what is frozen, or the data, have changed since the workdir was begun.
    """
    settings = experiment.settings
    state = start.restore_or_load(experiment, checkpointer)
    if state is None:
        log.info("start    from nothing, seed %d", settings.seed)
        state = start.new_state(experiment)
        if "model" in state.frozen:
            log.warning("start    what config.freeze or config.lora keeps is random: name a --config.pretrained=FILE")
    fits_head = settings.head_fit.views > 0 and checkpointer.latest_step() is None
    if fits_head:
        state = fit_head.fitted(experiment, state, go_on=lambda: _leave_if_asked(stop))
    workdirs.check_frozen(directory, start.frozen_fingerprints(experiment, state))
    with stop.reading():
        data = {"train": experiment.train_source.fingerprint(), "test": experiment.test_source.fingerprint()}
    workdirs.check_data(directory, data, accept=settings.changed_data == "accept")
    return state, fits_head


def _leave_complete(
    experiment: Experiment, state: State, chosen: Sequence[evaluators.Evaluator], writer: Writer, directory: Path
) -> None:
    """Of a run whose steps are done: its model is there, or is scored and written now."""
    steps = int(experiment.parallelism.read(state.step))
    if not workdirs.has_model(directory):  # what stopped the last step came after it
        metrics = evaluators.scores(experiment, state, chosen)
        writer.scalars(steps, metrics)
        write_model(experiment, directory / "model.npz", state, steps, metrics)
    log.info("nothing to do: all %d steps are done, the model is in %s", experiment.settings.total_steps, directory)


def _keep_fitted(
    experiment: Experiment, state: State, chosen: Sequence[evaluators.Evaluator], progress: Progress, directory: Path
) -> None:
    """Scores a fitted head and saves it as step 0, so that it is not fitted again."""
    metrics = evaluators.scores(experiment, state, chosen)
    progress.writer.scalars(0, metrics)
    log.info("step 0  %s", format_metrics(metrics))
    if progress.improves(metrics, complete=True):
        write_model(experiment, directory / "model_best.npz", state, 0, metrics)
    if experiment.settings.total_steps == 0:
        write_model(experiment, directory / "model.npz", state, 0, metrics)
    progress.save(0, state, metrics)


def _leave_if_asked(stop: GracefulExit) -> None:
    if stop.signal and jax.process_count() == 1:
        raise SystemExit(stop.exit_code)


def _train_batches(experiment: Experiment, start_step: int, stop: GracefulExit) -> Iterator[dict[str, jax.Array]]:
    """Batches on the devices; of several processes each tells the others, by a field `stop`, whether it was asked to."""
    settings = experiment.settings
    batches = loader.train_batches(
        memory.kept(experiment.train_source, **settings.caching),
        experiment.task.train_example,
        batch_size=settings.batch,
        seed=settings.seed,
        start_step=start_step,
        shuffle=settings.shuffle_buffer > 0,
        skip_bad_images=settings.bad_images == "skip",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        collate=experiment.task.collate,
        canvases=experiment.task.canvases,
    )
    if jax.process_count() == 1:
        return experiment.parallelism.prefetch(batches, settings.prefetch)

    def flagged() -> Iterator[dict[str, np.ndarray]]:
        with contextlib.closing(batches):
            for batch in batches:
                yield batch | {"stop": np.full(len(batch["seed"]), stop.signal is not None)}

    return experiment.parallelism.prefetch(flagged(), settings.prefetch)


if __name__ == "__main__":
    from vit_jax import main

    main.cli()
