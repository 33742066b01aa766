"""A training step without its data and its arrays: the experiment of a recipe, the shapes of its step, and the FLOPs."""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax import models
from vit_jax.data import features, sources
from vit_jax.data.unlabelled import PREFIX
from vit_jax.optimize.step import State
from vit_jax.run import experiment as experiments
from vit_jax.run.experiment import Experiment, make_update
from vit_jax.run.start import abstract_state, find_origin
from vit_jax.settings import Mesh, Settings
from vit_jax.tools import hlo


class _Unseen:
    """Stands for a dataset of which only the number of classes is known."""

    def __init__(self, num_classes: int):
        self.num_classes, self.class_names = num_classes, tuple(map(str, range(num_classes)))
        names = self.class_names
        self.features = {
            "image": features.Image(),
            "label": features.Label(names),
            "boxes": features.Boxes(names),
            "segmentation": features.Segmentation(names),
            "text": features.Text(),
        }


def build(settings: Settings, num_classes: int) -> Experiment:
    """The experiment of a recipe, without its data; `num_classes` are those of a tfds dataset, which is not looked for."""

    def get_source(dataset: str, split: str, **where: Any) -> sources.Source | _Unseen:
        if dataset.startswith(("digit", PREFIX)) or os.path.isdir(os.path.expanduser(dataset)):
            return sources.get_source(dataset, split, **where)
        return _Unseen(num_classes)

    return experiments.build(settings, origin=find_origin(settings), get_source=get_source)


def abstract_arguments(experiment: Experiment) -> tuple[State, dict[str, jax.ShapeDtypeStruct]]:
    """(state, batch) as they lie on the devices: shapes, dtypes and shardings of what `make_update(e)` takes."""
    return experiment.parallelism.state_shapes(host_state(experiment)), experiment.parallelism.batch_shapes(
        abstract_batch(experiment)
    )


def host_state(experiment: Experiment) -> State:
    """Shapes of the state as a checkpoint has it, before it is laid out on the devices."""
    state = abstract_state(experiment)
    own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), experiment.task.frozen())
    return state.replace(frozen=state.frozen | own)


def abstract_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as the loader makes it."""
    example = features.example(experiment.train_source.features)
    rng = np.random.default_rng(0)
    arrays = experiment.task.train_example(example, rng=rng, exif_rotated=False) | {"seed": np.uint32(0)}
    b = experiment.settings.batch
    batch = experiment.task.collate({name: np.broadcast_to(x, (b, *x.shape)) for name, x in arrays.items()})
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def step_flops(settings: Settings, num_classes: int, *, remat: str) -> float:
    """XLA's count for a whole step as it is written: one program, before it is divided among devices and optimised.

    Without loops over blocks or micro-batches, as XLA counts a loop's body once; XLA itself adds up in float32.
    """
    one = dataclasses.replace(settings, parallel="mesh", mesh=Mesh(), scan=False, remat=remat, accum_steps=1)

    def count(experiment: Experiment) -> dict[str, float]:
        lowered = make_update(experiment).lower(host_state(experiment), abstract_batch(experiment))
        return {"flops": lowered.cost_analysis()["flops"]}

    return _of_all_blocks(one, num_classes, count)["flops"]


def step_products(settings: Settings, num_classes: int, *, platform: str, batch_shards: int) -> list[hlo.Work]:
    """The work of a device in a step lowered for a platform, as `hlo.products` has it, by `batch_shards` shares of the batch.

    The work of a share is divided equally among the devices along a tensor axis. FLOPs of the kernels with names are those of
    the products which other platforms have in their place.
    """
    n = jax.device_count()
    micro_batch = settings.batch // batch_shards // settings.accum_steps
    one = dataclasses.replace(settings, parallel="pmap", mesh=Mesh(), scan=False, accum_steps=1, batch=micro_batch * n)

    def count(experiment: Experiment) -> dict[tuple[float, float], float]:
        traced = jax.jit(make_update(experiment)).trace(*abstract_arguments(experiment))
        work = hlo.products(traced.lower(lowering_platforms=(platform,)).as_text())
        found = {(w.flops, w.bytes): w.times for w in work if w.flops}
        if kernels := sum(w.bytes * w.times for w in work if not w.flops):
            plain = hlo.products(traced.lower(lowering_platforms=("cpu",)).as_text())
            flops = sum(w.flops * w.times for w in plain) - sum(w.flops * w.times for w in work)
            found |= {("kernels", "flops"): flops, ("kernels", "bytes"): kernels}
        return found

    found = _of_all_blocks(one, num_classes, count)
    kernels = found.pop(("kernels", "flops"), 0.0), found.pop(("kernels", "bytes"), 0.0)
    share = batch_shards / n
    return [hlo.Work(f * share, b * share, t * settings.accum_steps) for (f, b), t in [*found.items(), (kernels, 1)]]


def _of_all_blocks(settings: Settings, num_classes: int, count: Callable[[Experiment], dict[Any, float]]) -> dict[Any, float]:
    """A count of a step. The blocks of a ViT or Mixer are equal, so that models of 2 and 3 of them tell it for any number."""
    experiment = build(settings, num_classes)
    n = _equal_blocks(experiment)
    if n < 4:
        return count(experiment)
    of_two, of_three = (count(build(_with_blocks(experiment, blocks), num_classes)) for blocks in (2, 3))
    return {name: of_two.get(name, 0) + (n - 2) * (times - of_two.get(name, 0)) for name, times in of_three.items()}


def _equal_blocks(experiment: Experiment) -> int:
    """How many blocks the model has, of which the second and all that follow take the same work; 0 if they do not.

    They do not where patterns choose among blocks, stochastic depth leaves out more of the later ones, or some attend to all.
    """
    settings, model = experiment.settings, experiment.task.model
    architecture = models.architecture_of(model.type)
    if not architecture.depth or settings.lr_factors:
        return 0
    of_blocks = model.fields[architecture.blocks] if architecture.blocks else model.fields
    subset = of_blocks.get("stochastic_depth") and of_blocks.get("stochastic_depth_mode") == "subset"
    if subset or of_blocks.get("global_blocks"):
        return 0
    n = of_blocks[architecture.depth]
    if settings.freeze or settings.train_only or settings.lora.rank:
        names = flatten_dict(host_state(experiment).params, sep="/")
        matches = (re.fullmatch(architecture.block, name.removeprefix("lora/")) for name in names)
        parts = Counter(match.string.replace(match[1], "", 1) for match in matches if match)
        return n if set(parts.values()) <= {n} else 0
    return n


def _with_blocks(experiment: Experiment, blocks: int) -> Settings:
    """The recipe, of a model with so many blocks."""
    settings, origin = experiment.settings, experiment.origin
    kind, fields = (settings.model_type, settings.model) if settings.model else (origin.model_type, origin.model)
    architecture = models.architecture_of(kind)
    changed = {architecture.depth: blocks}
    if architecture.blocks:
        changed = {architecture.blocks: {**fields[architecture.blocks], **changed}}
    return dataclasses.replace(settings, model_type=kind, model={**fields, **changed})
