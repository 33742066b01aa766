"""What a run leaves behind for others to use: its parameters, and what must be known of them."""

import logging
from pathlib import Path
from typing import Any

from vit_jax import adapters, checkpoint, experiment, parallel, pipeline
from vit_jax.checkpoint import adapter, describe
from vit_jax.step import State

log = logging.getLogger("vit_jax")


def write_model(e: experiment.Experiment, path: Path, state: State, step: int, metrics: dict[str, float]) -> None:
    """Writes the parameters and their description, and with an average of them that beside, as `NAME_ema`.

    A LoRA run leaves its small part only, as `adapter.npz` for `model.npz`, which others open together with its base.
    """
    frozen = e.way.read(state.frozen.get("model", {}))
    for suffix, trained in (("", state.params), ("_ema", state.ema)):
        if trained is None:
            continue
        trained = e.way.read(trained)
        target = path.with_stem(path.stem + suffix)
        if parallel.is_main() and e.settings.lora.rank:
            target = target.with_name(target.name.replace("model", "adapter"))
            _write_adapter(e, target, trained, frozen, description(e, step, metrics))
        elif parallel.is_main():
            checkpoint.save(adapters.merge(trained, frozen), target)
            describe.write(target, description(e, step, metrics))
        if path.stem == "model":
            log.info("wrote    %s", target)
    if path.stem == "model":
        log.info("use it   python -m vit_jax.predict --model=%s IMAGE…", path.parent)


def _write_adapter(e: experiment.Experiment, path: Path, trained: Any, frozen: Any, described: dict[str, Any]) -> None:
    lora, source = e.settings.lora, experiment.pretrained_path(e.settings)
    model = {name: tree for name, tree in frozen.items() if name != "lora"}
    base = adapter.base_of(source, checkpoint.open_checkpoint(source), model)
    adapter.save_adapter(path, trained, model, base=base, alpha=lora.alpha, targets=lora.targets, description=described)


def description(e: experiment.Experiment, step: int, metrics: dict[str, float]) -> dict[str, Any]:
    """What `predict` and others need to know of the trained parameters: the content of `model.json`."""
    s = e.settings
    mean, std = experiment.normalisation(e.origin)
    return {
        "model_name": e.model_fields.get("model_name"),
        "model_type": "Mixer" if "num_blocks" in e.model_fields else "ViT",
        "model": e.model_fields,
        "image_size": e.image_size,
        "grid": e.grid,
        "resize": (e.origin or {}).get("resize", "bilinear"),
        "mean": mean,
        "std": std,
        "preprocessing": pipeline.preprocessing(s),
        "class_names": e.train_source.class_names,
        "dataset": s.dataset,
        "step": step,
        "metrics": metrics,
    }
