"""A recipe made concrete: data, task, devices, optimiser."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vit_jax import checkpoint, models, tasks
from vit_jax.data import sources
from vit_jax.errors import UserError
from vit_jax.optimize import optim, parallel, sharding, sharpness, step, trainable
from vit_jax.optimize.step import State
from vit_jax.settings import Settings
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Params, Task


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained and measured, on what, and how it is optimised.

    Attributes:
      origin: the description of the parameters that training starts from, None if it starts from nothing.
      join: (trained, frozen) on the devices → the model's parameters.
    """

    settings: Settings
    origin: checkpoint.Description | None
    task: Task
    train_source: sources.Source
    test_source: sources.Source
    parallelism: parallel.Parallelism
    join: Callable[[Params, Params], Params]
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    sharpness: sharpness.Sharpness | None

    @functools.cached_property
    def init_params(self) -> Callable[[], Params]:
        """() → fresh parameters, which follow from the seed. It is traced once, which takes 0.2 s for B/16."""
        return jax.jit(lambda: self.task.init(jax.random.key(self.settings.seed)), inline=True)


def build(
    settings: Settings,
    *,
    origin: checkpoint.Description | None = None,
    get_source: Callable[..., sources.Source] = sources.get_source,
) -> Experiment:
    """The experiment of a recipe. Raises UserError for whatever does not fit together. See `Experiment.origin`."""
    where = {"needs": tasks.needs(settings), **settings.tfds_folders}
    train_source = get_source(settings.dataset, settings.pp.train, **where)
    test_source = get_source(settings.dataset, settings.pp.test, **where)
    parallelism = make_parallelism(settings)
    task = tasks.make(Setup(settings, train_source.features, origin, parallelism.constrain_examples))
    check_batch(settings, task, parallelism, len(train_source) if hasattr(train_source, "__len__") else None)
    schedule = make_schedule(settings)
    return Experiment(
        settings=settings,
        origin=origin,
        task=task,
        train_source=train_source,
        test_source=test_source,
        parallelism=parallelism,
        join=parallelism.jit(trainable.join, "params"),
        schedule=schedule,
        optimizer=make_optimizer(settings, task.model, schedule),
        sharpness=_make_sharpness(settings, schedule),
    )


def make_parallelism(settings: Settings) -> parallel.Parallelism:
    """How the devices share the work. UserError for a mesh that they do not make up."""
    if settings.parallel == "pmap":
        return parallel.Pmap()
    rules = (*settings.mesh.more_rules, *sharding.RULES[settings.mesh.rules])
    return parallel.Mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor, rules)


def check_batch(settings: Settings, task: Task, parallelism: parallel.Parallelism, count: int | None) -> None:
    """Raises UserError unless devices and micro-batches get equal parts, and the task allows for micro-batches.

    Where examples are compared with each other, a batch must not be larger than their `count`, if that is known.
    """
    if settings.trainer != "train":
        return
    parallel.check_batch(settings.batch, settings.accum_steps, parallelism.batch_shards, settings.pp.pack or 1)
    if task.whole_batch and count is not None and count < settings.batch:
        raise UserError(
            f"{settings.pp.train} of {settings.dataset} has {count:,} examples, and config.batch={settings.batch} of them are "
            f"compared with each other, where none may be twice: use more, or --config.batch={max(1, count // 2)} or less"
        )
    if settings.accum_steps > 1 and task.whole_batch and task.embed is None:
        raise UserError(
            f"config.accum_steps={settings.accum_steps}: this task compares all examples of a batch, "
            "so that micro-batches would learn something else: use --config.accum_steps=1"
        )


def make_schedule(settings: Settings) -> optax.Schedule:
    """The learning rate by step."""
    return optim.make_schedule(
        settings.base_lr,
        settings.total_steps or 1,
        warmup_steps=settings.warmup_steps,
        decay_type=settings.decay_type,
        linear_end=settings.linear_end,
        decay_steps=settings.decay_steps,
        cooldown_steps=settings.cooldown_steps,
        timescale=settings.timescale,
    )


def make_optimizer(settings: Settings, model: tasks.Model, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimiser of a recipe for a model."""
    return optim.make_optimizer(
        settings.optimizer,
        schedule,
        grad_norm_clip=settings.grad_norm_clip,
        weight_decay=make_weight_decay(settings),
        dtype=settings.optim_dtype,
        lr_factors=settings.lr_factors,
        layer_decay=settings.layer_decay,
        num_layers=models.architecture_of(model.type).num_layers(model.fields),
        options=settings.optimizer_options,
    )


def make_update(experiment: Experiment) -> Callable[[State, dict], tuple[State, dict]]:
    """One step on the devices: (state, batch) → (state, metrics)."""
    settings, task = experiment.settings, experiment.task
    update = step.make_update(
        task.loss,
        experiment.optimizer,
        experiment.parallelism,
        seed=settings.seed,
        accum_steps=settings.accum_steps,
        ema_decay=make_ema_decay(settings),
        skip_nonfinite=settings.nonfinite == "skip",
        sharpness=experiment.sharpness,
        totals=task.totals,
        embed=task.embed,
        loss_of=task.loss_of,
    )
    return experiment.parallelism.train_step(update)


def make_ema_decay(settings: Settings) -> float | step.Schedule | None:
    """`config.ema_decay`, or the half cosine over all steps from it to `config.ema_decay_end`, as in BYOL and DINO."""
    return _half_cosine(settings.ema_decay, settings.ema_decay_end, settings.total_steps)


def make_weight_decay(settings: Settings) -> float | optax.Schedule:
    """`config.weight_decay`, or the half cosine over all steps from it to `config.weight_decay_end`, as in DINO."""
    return _half_cosine(settings.weight_decay, settings.weight_decay_end, settings.total_steps)


def _half_cosine(first: float | None, last: float | None, total_steps: int | None) -> float | step.Schedule | None:
    if last is None:
        return first
    return lambda done: last - (last - first) * (jnp.cos(jnp.pi * done / (total_steps or 1)) + 1) / 2


def _make_sharpness(settings: Settings, schedule: optax.Schedule) -> sharpness.Sharpness | None:
    if settings.sharpness is None:
        return None
    lowest = settings.linear_end if settings.decay_type == "linear" else 0.0
    return sharpness.make_sharpness(
        settings.sharpness, settings.sharpness_options, schedule=schedule, lr_max=settings.base_lr, lr_min=lowest
    )


def model_params(experiment: Experiment, state: State) -> dict[str, Params]:
    """The parameters to evaluate, on the devices, by the suffix of their metrics, see `Task.leaves`."""
    trained = {"": state.params} | ({"_ema": state.ema} if state.ema is not None else {})
    if "model" in state.frozen:
        trained = {suffix: experiment.join(params, state.frozen["model"]) for suffix, params in trained.items()}
    return experiment.task.leaves(trained)
