"""A recipe made concrete: sources, model, task, optimiser, and the state to start from."""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict

from vit_jax import adapters, checkpoint, models, optim, parallel, pipeline, sharpness, step, workdir
from vit_jax.checkpoint import adapter
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.data import augment, sources
from vit_jax.errors import UserError
from vit_jax.settings import Settings
from vit_jax.step import State
from vit_jax.tasks import classify, distill

log = logging.getLogger("vit_jax")


@dataclasses.dataclass(frozen=True)
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
    way: parallel.Way
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


def build(s: Settings, directory: Path, get_source: Callable[..., sources.Source] = sources.get_source) -> Experiment:
    """The experiment of a recipe in a workdir. Raises UserError for whatever does not fit together."""
    where = {"tfds_data_dir": s.tfds_data_dir, "tfds_manual_dir": s.tfds_manual_dir}
    train_source = get_source(s.dataset, s.pp.train, **where)
    test_source = get_source(s.dataset, s.pp.test, **where)
    origin = workdir.origin(directory)
    if origin is None and s.pretrained and not workdir.has_results(directory):
        origin = checkpoint.open_checkpoint(workdir.find_npz(s.pretrained)).description
    if not s.model and origin is None:
        raise UserError(f"config.model is empty, and the run in {directory} began from nothing: repeat its --config")
    fields, model_type = (s.model, s.model_type) if s.model else (origin["model"], origin["model_type"])
    fields = {**fields, "num_classes": train_source.num_classes}
    if origin:
        fields = _with_numerics_of(origin, fields)
    workdir.check_classes(directory, train_source.class_names)
    way = make_way(s)
    model = models.build(model_type, _with_memory_options(fields, s, way))
    if "unpooled" in fields.get("classifier", ""):
        raise UserError(f"classifier {fields['classifier']!r} scores every token; images are classified by token or gap")
    schedule = make_schedule(s)
    teacher = None
    if s.distill.teacher and s.trainer == "train":
        teacher = checkpoint.open_checkpoint(workdir.find_npz(s.distill.teacher))
    return Experiment(
        settings=s,
        origin=origin,
        model_fields=fields,
        model=model,
        task=_make_task(s, model, teacher, train_source, normalisation(origin)),
        train_source=train_source,
        test_source=test_source,
        image_size=s.image_size,
        grid=patch_grid(model, s.image_size),
        way=way,
        join=way.transform(adapters.join, "params"),
        teacher=teacher,
        schedule=schedule,
        optimizer=make_optimizer(s, model, schedule),
        sharpness=_make_sharpness(s, schedule),
    )


def make_schedule(s: Settings) -> optax.Schedule:
    """The learning rate by step."""
    return optim.make_schedule(
        s.base_lr,
        s.total_steps or 1,
        warmup_steps=s.warmup_steps,
        decay_type=s.decay_type,
        linear_end=s.linear_end,
        cooldown_steps=s.cooldown_steps,
        timescale=s.timescale,
    )


def make_optimizer(s: Settings, model: nn.Module, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimiser of a recipe."""
    return optim.make_optimizer(
        s.optimizer,
        schedule,
        grad_norm_clip=s.grad_norm_clip,
        weight_decay=s.weight_decay,
        dtype=s.optim_dtype,
        **_groups(s, model),
        options=s.optimizer_options,
    )


def _groups(s: Settings, model: nn.Module) -> dict[str, Any]:
    num_layers = model.num_blocks if isinstance(model, models.MlpMixer) else model.transformer["num_layers"]
    return {"lr_factors": s.lr_factors, "layer_decay": s.layer_decay, "num_layers": num_layers}


def _make_task(
    s: Settings,
    model: nn.Module,
    teacher: checkpoint.Opened | None,
    source: sources.Source,
    mean_and_std: tuple[list[float], list[float]],
) -> classify.Task:
    pixels = dict(zip(("mean", "std"), mean_and_std, strict=True))
    prepare = pipeline.make_prepare(s, source.num_classes, **pixels)
    if teacher is None:
        return classify.make_task(model, prepare, loss=s.loss, **pixels)
    known = teacher.description
    _check_classes(teacher, source)
    return distill.make_task(
        model,
        models.build(known["model_type"], known["model"] | {"dtype": s.dtype}),
        prepare,
        kind=s.distill.kind,
        temperature=s.distill.temperature,
        alpha=s.distill.alpha,
        teacher_mean=known["mean"],
        teacher_std=known["std"],
        **pixels,
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


def _with_memory_options(fields: dict[str, Any], s: Settings, way: parallel.Way) -> dict[str, Any]:
    """Fields with what does not belong to the architecture: dtype, remat, scan."""
    fields = fields | {"dtype": s.dtype}
    if "transformer" in fields:
        more = {"remat": s.remat, "scan": s.scan, "constrain": way.by_example}
        return fields | {"transformer": {**fields["transformer"], **more}}
    if s.scan:
        raise UserError("config.scan=True is for ViTs: a Mixer's blocks are compiled one by one")
    return fields | {"remat": s.remat}


def make_way(s: Settings) -> parallel.Way:
    """How the devices share the work. UserError for a mesh that they do not make up."""
    if s.parallel == "pmap":
        return parallel.Pmap()
    rules = (*s.mesh.more_rules, *parallel.RULES[s.mesh.rules])
    return parallel.Mesh(s.mesh.data, s.mesh.fsdp, s.mesh.tensor, rules)


def normalisation(origin: dict[str, Any] | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, by channel of the 0..255 pixels, that parameters of this origin expect."""
    return (origin["mean"], origin["std"]) if origin else ([augment.MEAN] * 3, [augment.STD] * 3)


def patch_grid(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the patches that the model cuts such an image into. Nothing is computed."""
    run = functools.partial(model.init_with_output, method="features")
    features, _ = jax.eval_shape(run, jax.random.key(0), jnp.zeros((1, *image_size, 3)))
    return features["map"].shape[1:3]


def divide(e: Experiment, params: Any) -> tuple[Any, dict[str, Any]]:
    """(what of the parameters is trained, the rest as {"model": …}, or {} if there is none)."""
    s = e.settings
    if s.lora.rank:
        options = dataclasses.asdict(s.lora)
        trained, frozen = adapters.add_lora(params, jax.random.key(s.seed), **options)
    else:
        trained, frozen = adapters.split(params, train=s.train_only or (".*",), freeze=s.freeze)
    return trained, {"model": frozen} if frozen else {}


def new_state(e: Experiment, params: Any = None) -> State:
    """Step 0 on the devices, with fresh parameters or the given ones."""
    if params is None:
        return _with_teacher(e, e.way.create(lambda: _state_of(e, e.init_params())))
    return _with_teacher(e, e.way.create(lambda params: _state_of(e, params), params))


def abstract_state(e: Experiment) -> State:
    """Shapes and dtypes of step 0's state, without a teacher. Nothing is computed."""
    return jax.eval_shape(lambda: _state_of(e, e.init_params()))


def _state_of(e: Experiment, params: Any) -> State:
    trained, frozen = divide(e, params)
    ema = None if e.settings.ema_decay is None else jax.tree.map(jnp.copy, trained)
    return State(jnp.zeros((), jnp.int32), trained, e.optimizer.init(trained), ema, frozen)


def _with_teacher(e: Experiment, state: State) -> State:
    if e.teacher is None:
        return state
    known = e.teacher.description
    teacher = models.build(known["model_type"], known["model"])
    shapes = jax.eval_shape(teacher.init, jax.random.key(0), jnp.zeros((1, *e.image_size, 3)))["params"]
    params = checkpoint.load_pretrained(
        pretrained_path=e.teacher,
        init_params=jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes),  # takes no memory
        model_config=known["model"],
        grid=patch_grid(teacher, e.image_size),
        keep_head=True,
    )
    return state.replace(frozen=state.frozen | {"teacher": e.way.place(params, "frozen/teacher")})


def start(e: Experiment, checkpointer: Checkpointer, *, keep_head: bool = False) -> State | None:
    """The state to start from, on the devices, in this order, or None if there is none:

    1. this workdir's own newest checkpoint, and what is frozen from where it came first; 2. the parameters that
    `config.pretrained` names; 3. a published file in `config.pretrained_dir`. Only a file's head may be replaced, unless
    `keep_head`.
    """
    if checkpointer.latest_step() is None:
        path = pretrained_path(e.settings)
        if path is None:
            return None
        log.info("start    from %s%s", path, "" if keep_head else ", with a new head")
        return new_state(e, _pretrained_params(e, path, keep_head))
    shapes = abstract_state(e)
    state = e.way.place(checkpointer.restore(e.way.abstract(shapes.replace(frozen={}))))
    log.info("start    from this workdir's step %d", e.way.read(state.step))
    if not shapes.frozen:
        return _with_teacher(e, state)
    path = pretrained_path(e.settings)
    params = None if path is None else _pretrained_params(e, path, keep_head=False)
    return state.replace(frozen=new_state(e, params).frozen)


def _pretrained_params(e: Experiment, path: str | Path, keep_head: bool) -> Any:
    """The parameters in a file, made to fit."""
    opened = checkpoint.open_checkpoint(path)
    if e.settings.lora.rank and opened.family == adapter.FAMILY:
        raise adapter.no_base(opened.path)
    if keep_head:
        _check_classes(opened, e.test_source)
    return checkpoint.load_pretrained(
        pretrained_path=opened,
        init_params=e.init_params(),
        model_config=e.model_fields,
        grid=e.grid,
        keep_head=keep_head,
    )


def make_update(e: Experiment) -> Callable[[State, dict], tuple[State, dict]]:
    """One step on the devices: (state, batch) → (state, metrics)."""
    s = e.settings
    update = step.make_update(
        e.task.loss,
        e.optimizer,
        e.way,
        seed=s.seed,
        accum_steps=s.accum_steps,
        ema_decay=s.ema_decay,
        skip_nonfinite=s.nonfinite == "skip",
        sharpness=e.sharpness,
    )
    return e.way.update(update)


def _make_sharpness(s: Settings, schedule: optax.Schedule) -> sharpness.Sharpness | None:
    if s.sharpness is None:
        return None
    lowest = s.linear_end if s.decay_type == "linear" else 0.0
    return sharpness.make_sharpness(s.sharpness, s.sharpness_options, schedule=schedule, lr_max=s.base_lr, lr_min=lowest)


def model_params(e: Experiment, state: State) -> dict[str, Any]:
    """The parameters to evaluate, on the devices, by the suffix of their metrics: "", and "_ema" for the average."""
    trained = {"": state.params} | ({"_ema": state.ema} if state.ema is not None else {})
    if "model" not in state.frozen:
        return trained
    return {suffix: e.join(params, state.frozen["model"]) for suffix, params in trained.items()}


def frozen_fingerprints(e: Experiment, state: State) -> dict[str, str]:
    """By name of the trees that are not trained: what tells whether they are the same as in another process."""
    frozen = e.way.read(state.frozen)
    return {name: adapter.fingerprint(flatten_dict(tree, sep="/")) for name, tree in frozen.items()}


def log_setup(e: Experiment) -> None:
    """Says in a few lines what is about to run."""
    s = e.settings
    shapes = jax.eval_shape(e.init_params)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    size, grid = "x".join(map(str, e.image_size)), "x".join(map(str, e.grid))
    log.info("model    %s, %s parameters, %s patches of a %s image", e.model_fields.get("model_name"), f"{count:,}", grid, size)
    patch = e.model_fields["patches"]["size"]
    cut_off = e.model_fields.get("resnet") is None and "num_blocks" not in e.model_fields  # a Mixer pads instead
    if cut_off and any(length % p for length, p in zip(e.image_size, patch, strict=True)):
        log.warning("%s pixels are no multiple of patches of %s: the right and lower edge are cut off", size, patch)
    train, test = f"{len(e.train_source):,} images of {s.pp.train}", f"{len(e.test_source):,} of {s.pp.test}"
    log.info("data     %s: %s, %s, %d classes", s.dataset, train, test, e.train_source.num_classes)
    trained, frozen = divide(e, shapes)
    if frozen:
        log.info("training %s", adapters.describe(trained, frozen["model"]).replace("\n", "\n         "))
    if s.lr_factors or s.layer_decay or (frozen and not s.lora.rank):
        table = optim.factor_table(trained, **_groups(s, e.model), frozen=frozen.get("model"))
        log.info("rates    the learning rate is multiplied by\n%s", table)
    devices, processes = jax.devices(), jax.process_count()
    how = f", mesh {dict(e.way.mesh.shape)}" if isinstance(e.way, parallel.Mesh) else ""
    how += f", {processes} processes" if processes > 1 else ""
    log.info("devices  %d x %s, computing in %s%s", len(devices), devices[0].device_kind, s.dtype, how)


def pretrained_path(s: Settings) -> str | Path | None:
    """The file or folder that a recipe starts from, None for nothing."""
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
