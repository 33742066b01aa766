"""What a run leaves behind for others to use: its parameters, and what must be known of them."""

import logging
from pathlib import Path
from typing import Any

from vit_jax import checkpoint
from vit_jax.arguments import as_typed
from vit_jax.checkpoint import describe, lora_file, token_files
from vit_jax.checkpoint.describe import Description
from vit_jax.optimize import parallel, trainable
from vit_jax.optimize.step import State
from vit_jax.run.experiment import Experiment
from vit_jax.run.start import pretrained_paths
from vit_jax.tasks import images
from vit_jax.tasks.images import patch_grid

log = logging.getLogger("vit_jax")


def write_model(experiment: Experiment, path: Path, state: State, step: int, metrics: dict[str, float]) -> None:
    """Writes the parameters and their description, and with an average of them that beside, as `NAME_ema`.

    A LoRA run leaves its small part only, as `adapter.npz` for `model.npz`, which others open together with its base.
    """
    frozen = experiment.parallelism.read(state.frozen.get("model", {}))
    averaged = {} if state.ema is None else {"_ema": state.ema}
    trees = {suffix: experiment.parallelism.read(trained) for suffix, trained in ({"": state.params} | averaged).items()}
    if not experiment.settings.lora.rank:
        trees = experiment.task.leaves({suffix: trainable.merge(trained, frozen) for suffix, trained in trees.items()})
    for suffix, tree in trees.items():
        target = path.with_stem(path.stem + suffix)
        if parallel.is_main() and experiment.settings.lora.rank:
            target = target.with_name(target.name.replace("model", "adapter"))
            _write_adapter(experiment, target, tree, frozen, description(experiment, step, metrics))
        elif parallel.is_main():
            checkpoint.save(tree, target)
            describe.write(target, description(experiment, step, metrics))
        if path.stem == "model":
            log.info("wrote    %s", target)
    for file in experiment.task.files if parallel.is_main() else ():
        token_files.copy(file, path.with_name(file.name))
    if path.stem == "model":
        labels = "" if experiment.task.tokenize is None else " --labels='a LABEL,another'"
        log.info("use it   %s --model=%s%s IMAGE…", as_typed("python -m vit_jax.predict"), path.parent, labels)


def _write_adapter(experiment: Experiment, path: Path, trained: Any, frozen: Any, described: Description) -> None:
    lora, source = experiment.settings.lora, pretrained_paths(experiment.settings)[""]
    model = {name: tree for name, tree in frozen.items() if name != "lora"}
    base = lora_file.base_of(source, checkpoint.open_checkpoint(source), model)
    lora_file.save_adapter(path, trained, model, base=base, alpha=lora.alpha, targets=lora.targets, description=described)


def description(experiment: Experiment, step: int, metrics: dict[str, float]) -> Description:
    """What `predict` and others need to know of the trained parameters: the content of `model.json`."""
    settings, task, origin = experiment.settings, experiment.task, experiment.origin
    mean, std = images.normalisation(settings, origin)
    return Description(
        model_name=task.model.fields.get("model_name"),
        model_type=task.model.type,
        model=task.model.fields,
        image_size=settings.image_size,
        grid=patch_grid(task.model, settings.image_size),
        mean=mean,
        std=std,
        preprocessing=images.preprocessing(settings),
        dataset=settings.dataset,
        step=step,
        metrics=metrics,
        **({"resize": origin.resize if origin else "bilinear"} | task.describe()),
    )
