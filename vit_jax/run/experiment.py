"""A recipe made concrete: sources, model, task, optimiser, and the state to start from."""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vit_jax import checkpoint, models
from vit_jax.checkpoint import lora_file
from vit_jax.checkpoint.classes import match_classes
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.data import sources
from vit_jax.data.device import augment
from vit_jax.errors import UserError
from vit_jax.optimize import optim, parallel, sharpness, step, trainable
from vit_jax.optimize.step import State
from vit_jax.run import pipeline, workdir
from vit_jax.settings import Settings
from vit_jax.tasks import classify, distill

log = logging.getLogger("vit_jax")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained and measured, on what, at which image size, and how it is optimised."""

    settings: Settings
    origin: checkpoint.Description | None  # the description of the parameters it starts from, if `config.pretrained` names some
    model_type: str
    model_fields: dict[str, Any]
    model: nn.Module
    task: classify.Task
    train_source: sources.Source
    test_source: sources.Source
    image_size: tuple[int, int]
    grid: tuple[int, int]  # of the patches
    parallelism: parallel.Parallelism
    join: Callable[[Any, Any], Any]  # (trained, frozen) on the devices → the model's parameters
    teacher: checkpoint.Opened | None
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    sharpness: sharpness.Sharpness | None

    @functools.cached_property
    def init_params(self) -> Callable[[], Any]:
        """() → fresh parameters, which follow from the seed. It is traced once, which takes 0.2 s for B/16."""

        def init() -> Any:
            return self.model.init(jax.random.key(self.settings.seed), jnp.zeros((1, *self.image_size, 3)))["params"]

        return jax.jit(init, inline=True)


def build(settings: Settings, directory: Path, get_source: Callable[..., sources.Source] = sources.get_source) -> Experiment:
    """The experiment of a recipe in a workdir. Raises UserError for whatever does not fit together."""
    where = {"tfds_data_dir": settings.tfds_data_dir, "tfds_manual_dir": settings.tfds_manual_dir}
    train_source = get_source(settings.dataset, settings.pp.train, **where)
    test_source = get_source(settings.dataset, settings.pp.test, **where)
    origin = workdir.origin(directory)
    if origin is None and settings.pretrained and not workdir.is_known(directory):
        origin = checkpoint.open_checkpoint(workdir.find_npz(settings.pretrained)).description
    if not settings.model and origin is None:
        raise UserError(f"config.model is empty, and the run in {directory} began from nothing: repeat its --config")
    fields, model_type = (settings.model, settings.model_type) if settings.model else (origin.model, origin.model_type)
    fields = {**fields, "num_classes": train_source.num_classes}
    if origin:
        fields = _with_numerics_of(origin, fields)
    workdir.check_classes(directory, train_source.class_names)
    parallelism = make_parallelism(settings)
    architecture = models.architecture_of(model_type)
    model = architecture.build(
        architecture.with_memory_options(
            fields,
            dtype=settings.dtype,
            remat=settings.remat,
            scan=settings.scan,
            constrain=parallelism.constrain_examples,
        )
    )
    if "unpooled" in fields.get("classifier", ""):
        raise UserError(f"classifier {fields['classifier']!r} scores every token; images are classified by token or gap")
    schedule = make_schedule(settings)
    teacher = None
    if settings.distill.teacher and settings.trainer == "train":
        teacher = checkpoint.open_checkpoint(workdir.find_npz(settings.distill.teacher))
    return Experiment(
        settings=settings,
        origin=origin,
        model_type=model_type,
        model_fields=fields,
        model=model,
        task=_make_task(settings, model, teacher, train_source, normalisation(origin)),
        train_source=train_source,
        test_source=test_source,
        image_size=settings.image_size,
        grid=architecture.grid(fields, settings.image_size),
        parallelism=parallelism,
        join=parallelism.jit(trainable.join, "params"),
        teacher=teacher,
        schedule=schedule,
        optimizer=make_optimizer(settings, architecture.num_layers(fields), schedule),
        sharpness=_make_sharpness(settings, schedule),
    )


def make_schedule(settings: Settings) -> optax.Schedule:
    """The learning rate by step."""
    return optim.make_schedule(
        settings.base_lr,
        settings.total_steps or 1,
        warmup_steps=settings.warmup_steps,
        decay_type=settings.decay_type,
        linear_end=settings.linear_end,
        cooldown_steps=settings.cooldown_steps,
        timescale=settings.timescale,
    )


def make_optimizer(settings: Settings, num_layers: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimiser of a recipe; `num_layers` is as in `optim.group_factors`."""
    return optim.make_optimizer(
        settings.optimizer,
        schedule,
        grad_norm_clip=settings.grad_norm_clip,
        weight_decay=settings.weight_decay,
        dtype=settings.optim_dtype,
        lr_factors=settings.lr_factors,
        layer_decay=settings.layer_decay,
        num_layers=num_layers,
        options=settings.optimizer_options,
    )


def _make_task(
    settings: Settings,
    model: nn.Module,
    teacher: checkpoint.Opened | None,
    source: sources.Source,
    mean_and_std: tuple[Sequence[float], Sequence[float]],
) -> classify.Task:
    pixels = dict(zip(("mean", "std"), mean_and_std, strict=True))
    prepare = pipeline.make_prepare(settings, source.num_classes, **pixels)
    if teacher is None:
        return classify.make_task(model, prepare, loss=settings.loss, **pixels)
    description = teacher.description
    return distill.make_task(
        model,
        models.build(description.model_type, description.model | {"dtype": settings.dtype}),
        prepare,
        kind=settings.distill.kind,
        temperature=settings.distill.temperature,
        alpha=settings.distill.alpha,
        teacher_mean=description.mean,
        teacher_std=description.std,
        **pixels,
    )


def _with_numerics_of(origin: checkpoint.Description, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with the activation and epsilon that the parameters were trained with, whatever a recipe's table says."""
    transformer = dict(fields.get("transformer", {}))
    for name in ("activation", "norm_eps"):
        theirs = origin.model.get("transformer", {}).get(name)
        if theirs is not None and transformer.get(name) != theirs:
            log.info("model    %s=%s, as in the checkpoint", name, theirs)
            transformer[name] = theirs
    if transformer:
        fields = fields | {"transformer": transformer}
    return fields | {"model_name": fields.get("model_name") or origin.model_name}


def make_parallelism(settings: Settings) -> parallel.Parallelism:
    """How the devices share the work. UserError for a mesh that they do not make up."""
    if settings.parallel == "pmap":
        return parallel.Pmap()
    rules = (*settings.mesh.more_rules, *parallel.RULES[settings.mesh.rules])
    return parallel.Mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor, rules)


def normalisation(origin: checkpoint.Description | None) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation, by channel of the 0..255 pixels, that parameters of this origin expect."""
    return (origin.mean, origin.std) if origin else ([augment.MEAN] * 3, [augment.STD] * 3)


def split_params(experiment: Experiment, params: Any) -> tuple[Any, dict[str, Any]]:
    """(what of the parameters is trained, the rest as {"model": …}, or {} if there is none)."""
    settings = experiment.settings
    if settings.lora.rank:
        options = dataclasses.asdict(settings.lora)
        trained, frozen = trainable.add_lora(params, jax.random.key(settings.seed), **options)
    else:
        trained, frozen = trainable.split(params, train=settings.train_only or (".*",), freeze=settings.freeze)
    return trained, {"model": frozen} if frozen else {}


def new_state(experiment: Experiment, params: Any = None) -> State:
    """Step 0 on the devices, with fresh parameters or the given ones."""
    if params is None:
        return _with_teacher(experiment, experiment.parallelism.create(lambda: _state_of(experiment, experiment.init_params())))
    return _with_teacher(experiment, experiment.parallelism.create(lambda params: _state_of(experiment, params), params))


def abstract_state(experiment: Experiment) -> State:
    """Shapes and dtypes of step 0's state, without a teacher. Nothing is computed."""
    return jax.eval_shape(lambda: _state_of(experiment, experiment.init_params()))


def _state_of(experiment: Experiment, params: Any) -> State:
    trained, frozen = split_params(experiment, params)
    ema = None if experiment.settings.ema_decay is None else jax.tree.map(jnp.copy, trained)
    return State(jnp.zeros((), jnp.int32), trained, experiment.optimizer.init(trained), ema, frozen)


def _with_teacher(experiment: Experiment, state: State) -> State:
    if experiment.teacher is None:
        return state
    description = experiment.teacher.description
    teacher = models.build(description.model_type, description.model)
    shapes = jax.eval_shape(teacher.init, jax.random.key(0), jnp.zeros((1, *experiment.image_size, 3)))["params"]
    params = checkpoint.load_pretrained(
        pretrained_path=experiment.teacher,
        init_params=jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes),  # takes no memory
        model_config=description.model,
        grid=models.architecture_of(description.model_type).grid(description.model, experiment.image_size),
        keep_head=True,
        columns=match_classes(description.class_names, experiment.train_source.class_names, where=str(experiment.teacher.path)),
    )
    return state.replace(frozen=state.frozen | {"teacher": experiment.parallelism.place(params, "frozen/teacher")})


def restore_or_load(experiment: Experiment, checkpointer: Checkpointer, *, keep_head: bool = False) -> State | None:
    """The state to start from, on the devices, in this order, or None if there is none:

    1. this workdir's own newest checkpoint, and what is frozen from where it came first; 2. the parameters that
    `config.pretrained` names; 3. a published file in `config.pretrained_dir`. Only a file's head may be replaced, unless
    `keep_head`.
    """
    if checkpointer.latest_step() is None:
        path = pretrained_path(experiment.settings)
        if path is None:
            return None
        log.info("start    from %s%s", path, "" if keep_head else ", with a new head")
        return new_state(experiment, _pretrained_params(experiment, path, keep_head))
    shapes = abstract_state(experiment)
    state = experiment.parallelism.place(checkpointer.restore(experiment.parallelism.restore_shapes(shapes.replace(frozen={}))))
    log.info("start    from this workdir's step %d", experiment.parallelism.read(state.step))
    if not shapes.frozen:
        return _with_teacher(experiment, state)
    path = pretrained_path(experiment.settings)
    params = None if path is None else _pretrained_params(experiment, path, keep_head=False)
    return state.replace(frozen=new_state(experiment, params).frozen)


def _pretrained_params(experiment: Experiment, path: str | Path, keep_head: bool) -> Any:
    """The parameters in a file, made to fit."""
    opened = checkpoint.open_checkpoint(path)
    if experiment.settings.lora.rank and opened.family == lora_file.FAMILY:
        raise lora_file.no_base(opened.path)
    columns = None
    if keep_head:
        columns = match_classes(opened.description.class_names, experiment.test_source.class_names, where=str(opened.path))
    return checkpoint.load_pretrained(
        pretrained_path=opened,
        init_params=experiment.init_params(),
        model_config=experiment.model_fields,
        grid=experiment.grid,
        keep_head=keep_head,
        columns=columns,
    )


def make_update(experiment: Experiment) -> Callable[[State, dict], tuple[State, dict]]:
    """One step on the devices: (state, batch) → (state, metrics)."""
    settings = experiment.settings
    update = step.make_update(
        experiment.task.loss,
        experiment.optimizer,
        experiment.parallelism,
        seed=settings.seed,
        accum_steps=settings.accum_steps,
        ema_decay=settings.ema_decay,
        skip_nonfinite=settings.nonfinite == "skip",
        sharpness=experiment.sharpness,
    )
    return experiment.parallelism.train_step(update)


def _make_sharpness(settings: Settings, schedule: optax.Schedule) -> sharpness.Sharpness | None:
    if settings.sharpness is None:
        return None
    lowest = settings.linear_end if settings.decay_type == "linear" else 0.0
    return sharpness.make_sharpness(
        settings.sharpness, settings.sharpness_options, schedule=schedule, lr_max=settings.base_lr, lr_min=lowest
    )


def model_params(experiment: Experiment, state: State) -> dict[str, Any]:
    """The parameters to evaluate, on the devices, by the suffix of their metrics: "", and "_ema" for the average."""
    trained = {"": state.params} | ({"_ema": state.ema} if state.ema is not None else {})
    if "model" not in state.frozen:
        return trained
    return {suffix: experiment.join(params, state.frozen["model"]) for suffix, params in trained.items()}


def frozen_fingerprints(experiment: Experiment, state: State) -> dict[str, str]:
    """By name of the trees that are not trained: what tells whether they are the same as in another process."""
    frozen = experiment.parallelism.read(state.frozen)
    return {name: lora_file.fingerprint(flatten_dict(tree, sep="/")) for name, tree in frozen.items()}


def log_setup(experiment: Experiment) -> None:
    """Says in a few lines what is about to run."""
    settings = experiment.settings
    shapes = jax.eval_shape(experiment.init_params)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    size, grid = "x".join(map(str, experiment.image_size)), "x".join(map(str, experiment.grid))
    log.info(
        "model    %s, %s parameters, %s patches of a %s image",
        experiment.model_fields.get("model_name"),
        f"{count:,}",
        grid,
        size,
    )
    architecture = models.architecture_of(experiment.model_type)
    patch = architecture.cut(experiment.model_fields)
    if patch and any(length % p for length, p in zip(experiment.image_size, patch, strict=True)):
        log.warning("%s pixels are no multiple of patches of %s: the right and lower edge are cut off", size, patch)
    train, test = (
        f"{len(experiment.train_source):,} images of {settings.pp.train}",
        f"{len(experiment.test_source):,} of {settings.pp.test}",
    )
    log.info("data     %s: %s, %s, %d classes", settings.dataset, train, test, experiment.train_source.num_classes)
    trained, frozen = split_params(experiment, shapes)
    if frozen:
        log.info("training %s", trainable.describe(trained, frozen["model"]).replace("\n", "\n         "))
    if settings.lr_factors or settings.layer_decay or (frozen and not settings.lora.rank):
        num_layers = architecture.num_layers(experiment.model_fields)
        table = optim.factor_table(trained, settings.lr_factors, settings.layer_decay, num_layers, frozen=frozen.get("model"))
        log.info("rates    the learning rate is multiplied by\n%s", table)
    devices, processes = jax.devices(), jax.process_count()
    how = f", mesh {dict(experiment.parallelism.mesh.shape)}" if isinstance(experiment.parallelism, parallel.Mesh) else ""
    how += f", {processes} processes" if processes > 1 else ""
    log.info("devices  %d x %s, computing in %s%s", len(devices), devices[0].device_kind, settings.dtype, how)


def pretrained_path(settings: Settings) -> str | Path | None:
    """The file or folder that a recipe starts from, None for nothing."""
    if settings.pretrained:
        return workdir.find_npz(settings.pretrained)
    if not settings.pretrained_dir:
        return None
    name = settings.model.get("model_name")
    if settings.model_or_filename:
        name = checkpoint.augreg_filename(settings.model_or_filename, settings.pretrained_dir)
    return os.path.join(settings.pretrained_dir, f"{name}.npz")
