"""A recipe made concrete: sources, model, task, optimiser, and the state to start from."""

import functools
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from vit_jax import checkpoint, models, optim, workdir
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.data import augment, sources
from vit_jax.errors import UserError
from vit_jax.settings import Settings
from vit_jax.step import State
from vit_jax.tasks import classify

log = logging.getLogger("vit_jax")


@dataclass(frozen=True)
class Experiment:
    """What is trained and measured, on what, at which image size, and how it is optimised."""

    settings: Settings
    origin: dict[str, Any] | None  # the description of the parameters it starts from, if `config.pretrained` names some
    model_fields: dict[str, Any]
    model: nn.Module
    task: classify.Task
    train_source: sources.Source
    test_source: sources.Source
    image_size: tuple[int, int]
    grid: tuple[int, int]  # of the patches
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation


def build(s: Settings, directory: Path) -> Experiment:
    """The experiment of a recipe in a workdir. Raises UserError for whatever does not fit together."""
    where = {"tfds_data_dir": s.tfds_data_dir, "tfds_manual_dir": s.tfds_manual_dir}
    train_source = sources.get_source(s.dataset, s.pp.train, **where)
    test_source = sources.get_source(s.dataset, s.pp.test, **where)
    origin = workdir.origin(directory)
    if origin is None and s.pretrained:
        origin = checkpoint.open_checkpoint(workdir.find_npz(s.pretrained)).description
    fields, model_type = (s.model, s.model_type) if s.model else (origin["model"], origin["model_type"])
    fields = {**fields, "num_classes": train_source.num_classes}
    if origin:
        fields = _with_numerics_of(origin, fields)
    workdir.check_classes(directory, train_source.class_names)
    model = models.build(model_type, fields | {"dtype": s.dtype})
    if "unpooled" in fields.get("classifier", ""):
        raise UserError(f"classifier {fields['classifier']!r} scores every token; images are classified by token or gap")
    image_size = (s.pp.crop, s.pp.crop_width or s.pp.crop)
    schedule = optim.make_schedule(s.base_lr, s.total_steps or 1, warmup_steps=s.warmup_steps, decay_type=s.decay_type)
    optimizer = optim.make_optimizer(
        s.optimizer, schedule, grad_norm_clip=s.grad_norm_clip, weight_decay=s.weight_decay, dtype=s.optim_dtype
    )
    mean, std = normalisation(origin)
    return Experiment(
        settings=s,
        origin=origin,
        model_fields=fields,
        model=model,
        task=classify.make_task(model, flip=s.pp.flip, mean=mean, std=std),
        train_source=train_source,
        test_source=test_source,
        image_size=image_size,
        grid=patch_grid(model, image_size),
        schedule=schedule,
        optimizer=optimizer,
    )


def _with_numerics_of(origin: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with the activation and epsilon that the parameters were trained with, whatever a recipe's table says."""
    transformer = dict(fields.get("transformer", {}))
    for name in ("activation", "norm_eps"):
        theirs = origin["model"].get("transformer", {}).get(name)
        if theirs is not None and transformer.get(name) != theirs:
            log.info("model    %s=%s, as in the checkpoint", name, theirs)
            transformer[name] = theirs
    if transformer:
        fields = fields | {"transformer": transformer}
    return fields | {"model_name": fields.get("model_name") or origin["model_name"]}


def normalisation(origin: dict[str, Any] | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, by channel of the 0..255 pixels, that parameters of this origin expect."""
    return (origin["mean"], origin["std"]) if origin else ([augment.MEAN] * 3, [augment.STD] * 3)


def patch_grid(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the patches that the model cuts such an image into. Nothing is computed."""
    run = functools.partial(model.init_with_output, method="features")
    features, _ = jax.eval_shape(run, jax.random.key(0), jnp.zeros((1, *image_size, 3)))
    return features["map"].shape[1:3]


def init_params(e: Experiment) -> Any:
    """Fresh parameters, which follow from the seed."""
    images = jnp.zeros((1, *e.image_size, 3))
    return jax.jit(e.model.init)(jax.random.key(e.settings.seed), images)["params"]


def new_state(e: Experiment, params: Any = None) -> State:
    """Step 0, with fresh parameters or the given ones."""
    params = init_params(e) if params is None else params
    return State(jnp.zeros((), jnp.int32), params, e.optimizer.init(params))


def start(e: Experiment, checkpointer: Checkpointer, *, keep_head: bool = False) -> State | None:
    """The state to start from, in this order, or None if there is none:

    1. this workdir's own newest checkpoint; 2. the parameters that `config.pretrained` names; 3. a published file in
    `config.pretrained_dir`. Only a file's head may be replaced, unless `keep_head`.
    """
    s = e.settings
    if (step := checkpointer.latest_step()) is not None:
        log.info("start    from this workdir's step %d", step)
        return checkpointer.restore(jax.eval_shape(lambda: new_state(e)))
    path = _pretrained_path(s)
    if path is None:
        return None
    log.info("start    from %s%s", path, "" if keep_head else ", with a new head")
    opened = checkpoint.open_checkpoint(path)
    if keep_head:
        _check_classes(opened, e.test_source)
    params = checkpoint.load_pretrained(
        pretrained_path=opened,
        init_params=init_params(e),
        model_config=e.model_fields,
        grid=e.grid,
        keep_head=keep_head,
    )
    return new_state(e, jax.tree.map(jnp.asarray, params))


def description(e: Experiment, step: int, metrics: dict[str, float]) -> dict[str, Any]:
    """What `predict` and others need to know of the trained parameters: the content of `model.json`."""
    s = e.settings
    mean, std = normalisation(e.origin)
    return {
        "model_name": e.model_fields.get("model_name"),
        "model_type": "Mixer" if "num_blocks" in e.model_fields else "ViT",
        "model": e.model_fields,
        "image_size": e.image_size,
        "grid": e.grid,
        "resize": (e.origin or {}).get("resize", "bilinear"),
        "mean": mean,
        "std": std,
        "class_names": e.train_source.class_names,
        "dataset": s.dataset,
        "step": step,
        "metrics": metrics,
    }


def log_setup(e: Experiment) -> None:
    """Says in a few lines what is about to run."""
    s = e.settings
    shapes = jax.eval_shape(e.model.init, jax.random.key(0), jnp.zeros((1, *e.image_size, 3)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    size, grid = "x".join(map(str, e.image_size)), "x".join(map(str, e.grid))
    log.info("model    %s, %s parameters, %s patches of a %s image", e.model_fields.get("model_name"), f"{count:,}", grid, size)
    patch = e.model_fields["patches"]["size"]
    cut_off = e.model_fields.get("resnet") is None and "num_blocks" not in e.model_fields  # a Mixer pads instead
    if cut_off and any(length % p for length, p in zip(e.image_size, patch, strict=True)):
        log.warning("%s pixels are no multiple of patches of %s: the right and lower edge are cut off", size, patch)
    train, test = f"{len(e.train_source):,} images of {s.pp.train}", f"{len(e.test_source):,} of {s.pp.test}"
    log.info("data     %s: %s, %s, %d classes", s.dataset, train, test, e.train_source.num_classes)
    devices = jax.devices()
    log.info("devices  %d x %s, computing in %s", len(devices), devices[0].device_kind, s.dtype)


def _pretrained_path(s: Settings) -> str | Path | None:
    if s.pretrained:
        return workdir.find_npz(s.pretrained)
    if not s.pretrained_dir:
        return None
    name = s.model.get("model_name")
    if s.model_or_filename:
        name = checkpoint.augreg_filename(s.model_or_filename, s.pretrained_dir)
    return os.path.join(s.pretrained_dir, f"{name}.npz")


def _check_classes(opened: checkpoint.Opened, source: sources.Source) -> None:
    """A head of our own making must know the classes of the dataset; published ones call them by other names."""
    known = opened.description["class_names"]
    if "dataset" in opened.description and tuple(known) != tuple(source.class_names):
        raise UserError(
            f"{opened.path} knows the classes {', '.join(known[:10])}, "
            f"the dataset has {', '.join(source.class_names[:10])}: they must be the same, in the same order"
        )
