"""What a run starts from: its own newest checkpoint, a file, or nothing."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import checkpoint, tasks
from vit_jax.checkpoint import lora_file
from vit_jax.checkpoint.results import find_npz
from vit_jax.checkpoint.state import Checkpointer
from vit_jax.errors import UserError
from vit_jax.optimize import trainable
from vit_jax.optimize.step import State
from vit_jax.run import workdir
from vit_jax.run.experiment import Experiment
from vit_jax.settings import Settings
from vit_jax.tasks.task import Params

_MARK = np.uint32(0x7FC0F5E5).view(np.float32)

log = logging.getLogger("vit_jax")


def find_origin(settings: Settings, directory: Path | None = None) -> checkpoint.Description | None:
    """The description of what the run in a workdir started from, or a new one would; None if that is nothing."""
    if directory is not None and workdir.is_known(directory):
        return workdir.origin(directory)
    source = next((tower for tower in ("", "img", "backbone") if tower in settings.sources), None)
    if source is None:
        return None
    with _errors_name(source):
        opened = checkpoint.open_checkpoint(find_npz(settings.sources[source]))
    of_images = source or "txt" not in tasks.towers(settings)  # who has no texts trains the image tower alone
    return opened.image_tower().description if of_images else opened.description


def pretrained_paths(settings: Settings) -> dict[str, str | Path]:
    """The files or folders that a recipe starts from, by tower; that of a whole model is called "". {} for nothing."""
    if settings.sources:
        paths = {}
        for tower, source in settings.sources.items():
            with _errors_name(tower):
                paths[tower] = find_npz(source)
        return paths
    if not settings.pretrained_dir:
        return {}
    name = settings.model.get("model_name")
    if settings.model_or_filename:
        name = checkpoint.augreg_filename(settings.model_or_filename, settings.pretrained_dir)
    return {"": os.path.join(settings.pretrained_dir, f"{name}.npz")}


def split_params(experiment: Experiment, params: Params) -> tuple[Params, dict[str, Params]]:
    """(what of the parameters is trained, the rest as {"model": …}, or {} if there is none)."""
    settings = experiment.settings
    if settings.lora.rank:
        options = dataclasses.asdict(settings.lora)
        trained, frozen = trainable.add_lora(params, jax.random.key(settings.seed), **options)
    else:
        trained, frozen = trainable.split(params, train=settings.train_only or (".*",), freeze=settings.freeze)
    return trained, {"model": frozen} if frozen else {}


def new_state(experiment: Experiment, params: Params | None = None) -> State:
    """Step 0 on the devices, with fresh parameters or the given ones."""
    create = experiment.parallelism.create
    if params is None:
        return _with_frozen(experiment, create(lambda: _state_of(experiment, experiment.init_params())))
    return _with_frozen(experiment, create(lambda params: _state_of(experiment, params), params))


def abstract_state(experiment: Experiment) -> State:
    """Shapes and dtypes of step 0's state, without the task's own frozen trees. Nothing is computed."""
    return jax.eval_shape(lambda: _state_of(experiment, experiment.init_params()))


def restore_or_load(experiment: Experiment, checkpointer: Checkpointer, *, keep_head: bool = False) -> State | None:
    """The state to start from, on the devices, in this order, or None if there is none:

    1. this workdir's own newest checkpoint, and what is frozen from where it came first; 2. the parameters that
    `config.pretrained` names; 3. a published file in `config.pretrained_dir`. Only a file's head may be replaced, unless
    `keep_head`.
    """
    if checkpointer.latest_step() is None:
        paths = pretrained_paths(experiment.settings)
        if not paths:
            return None
        for tower, path in paths.items():
            with_head = "" if keep_head or tower else ", with a new head"
            log.info("start    %sfrom %s%s", f"{tower} " if tower else "", path, with_head)
        return new_state(experiment, _pretrained_params(experiment, paths, keep_head))
    shapes = abstract_state(experiment)
    wanted = experiment.parallelism.restore_shapes(shapes.replace(frozen={}))
    state = experiment.parallelism.place(checkpointer.restore(wanted))
    log.info("start    from this workdir's step %d", experiment.parallelism.read(state.step))
    if not shapes.frozen:
        return _with_frozen(experiment, state)
    paths = pretrained_paths(experiment.settings)
    params = _pretrained_params(experiment, paths, keep_head=False) if paths else None
    return state.replace(frozen=new_state(experiment, params).frozen)


def back_to_best(
    experiment: Experiment, checkpointer: Checkpointer, state: State, metrics: dict[str, float]
) -> tuple[State, dict[str, float]]:
    """The state with the parameters of the best checkpoint, and that one's metrics; as it is, where there is none."""
    wanted = experiment.parallelism.restore_shapes(abstract_state(experiment).replace(frozen={}))
    found = checkpointer.restore_best(wanted)
    if found is None:
        return state, metrics
    step, best, metrics = found
    best = experiment.parallelism.place(best)
    log.info("best     back to the parameters of step %d", step)
    return state.replace(params=best.params, ema=best.ema, carry=best.carry), metrics


def frozen_fingerprints(experiment: Experiment, state: State) -> dict[str, str]:
    """By name of the trees that are not trained: what tells whether they are the same as in another process."""
    frozen = experiment.parallelism.read(state.frozen)
    return {name: lora_file.fingerprint(flatten_dict(tree, sep="/")) for name, tree in frozen.items()}


def _state_of(experiment: Experiment, params: Params) -> State:
    trained, frozen = split_params(experiment, params)
    ema = None if experiment.settings.ema_decay is None else jax.tree.map(jnp.copy, trained)
    carry = experiment.task.init_carry()
    return State(jnp.zeros((), jnp.int32), trained, experiment.optimizer.init(trained), ema, carry, frozen)


def _with_frozen(experiment: Experiment, state: State) -> State:
    place = experiment.parallelism.place
    own = {name: place(tree, f"frozen/{name}") for name, tree in experiment.task.frozen().items()}
    return state.replace(frozen=state.frozen | own) if own else state


def _pretrained_params(experiment: Experiment, paths: Mapping[str, str | Path], keep_head: bool) -> Params:
    """The parameters in files, made to fit."""
    sources = {}
    for tower, path in paths.items():
        with _errors_name(tower):
            sources[tower] = opened = checkpoint.open_checkpoint(path)
        if experiment.settings.lora.rank and opened.family == lora_file.FAMILY:
            raise lora_file.no_base(opened.path)
    classes = experiment.train_source.class_names if keep_head else None
    load = functools.partial(experiment.task.load, sources, classes=classes)
    if experiment.task.head_inputs is None:
        return load(experiment.init_params())
    return _with_few_drawn(load, experiment.init_params)


def _with_few_drawn(load: Callable[[Params], Params], init_params: Callable[[], Params]) -> Params:
    """`load(init_params())` of a classifier, for which only those of the fresh parameters are drawn that `load` passes on.

    They are told by a mark in place of the numbers: a NaN, which no file may hold. Compiling the drawing of all takes 15 s of
    CPU for S/16.
    """
    marked = jax.tree.map(lambda x: np.broadcast_to(_MARK, x.shape), jax.eval_shape(init_params))
    params = flatten_dict(load(marked), sep="/")
    fresh = {name: np.ascontiguousarray(x).view(np.uint32) == _MARK.view(np.uint32) for name, x in params.items()}
    fresh = {name: places for name, places in fresh.items() if places.any()}

    def draw() -> dict[str, jax.Array]:
        drawn = flatten_dict(init_params(), sep="/")
        return {name: drawn[name] for name in fresh}

    drawn = jax.device_get(jax.jit(draw)()) if fresh else {}
    params |= {name: np.where(places, drawn[name], params[name]) for name, places in fresh.items()}
    return unflatten_dict(params, sep="/")


@contextlib.contextmanager
def _errors_name(tower: str) -> Iterator[None]:
    """What is wrong with a source is said of the tower that it is for."""
    try:
        yield
    except UserError as e:
        if not tower:
            raise
        raise UserError(f"config.pretrained.{tower}: {e}") from e
