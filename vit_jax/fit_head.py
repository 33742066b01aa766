"""A head to start with: the logistic regression on what the model makes of the training images, fitted exactly.

It takes forward passes, each a third of the work of a training step, and knows no learning rate. Fine-tuning that starts from
it bends the features less than from a head that knows nothing (LP-FT, https://arxiv.org/abs/2202.10054).
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from vit_jax.data import memory
from vit_jax.data.device import mix
from vit_jax.data.features import Source
from vit_jax.data.host.decode import ImageError, decode
from vit_jax.errors import UserError
from vit_jax.evaluators import passes, probe
from vit_jax.optimize.step import State
from vit_jax.run import start
from vit_jax.run.experiment import Experiment, model_params
from vit_jax.tasks.classify import LOSSES
from vit_jax.tasks.task import Example

HELD_OUT = 0.2
"""Share of each class on which the strength of the regularisation is chosen."""
TOLERANCE = 1e-6
"""Largest number in the gradient of the mean loss at which the fit to all images ends; about the least in float32."""
ROUGHLY = 1e-4
"""The same while the strength of the regularisation is chosen: scikit-learn's default; 1e-5 took three times as long."""
HEADS = ("head", "head_dist")

log = logging.getLogger("vit_jax")


class Head(NamedTuple):
    """logits = features · kernel + bias, and the l2 that was chosen."""

    kernel: Float32[np.ndarray, "d classes"]
    bias: Float32[np.ndarray, " classes"]
    l2: float


def check(experiment: Experiment) -> None:
    """Raises UserError where `config.head_fit` asks for what cannot be: before anything is computed."""
    if experiment.task.head_inputs is None:
        raise UserError("config.head_fit: the heads of classifiers alone are fitted, and this task trains another one")
    trained, _ = start.split_params(experiment, jax.eval_shape(experiment.init_params))
    if "head" not in trained:
        raise UserError("config.head_fit: the head is not trained: take it out of config.freeze or into config.train_only")


def fitted(experiment: Experiment, state: State, *, go_on: Callable[[], None] = lambda: None) -> State:
    """The state of step 0 with its head fitted to the training images, as `config.head_fit` and `config.loss` say.

    It follows from images and settings alone: a run that was killed meanwhile comes to the same bits when it starts again.
    `go_on` is called after each view of the images, and raises what ends the run.
    """
    settings, source = experiment.settings, experiment.train_source
    on_devices = model_params(experiment, state)[""]
    params = dict(experiment.parallelism.read(on_devices))
    x, labels = _features(experiment, on_devices, go_on)
    if rare := [name for i, name in enumerate(source.class_names) if (labels == i).sum() < 2]:
        log.warning("head     fewer than 2 images to learn from in %s", ", ".join(rare[:10]))

    # The fit, on the host and the first device
    started = time.perf_counter()
    targets = np.asarray(mix.smooth(jnp.asarray(labels), source.num_classes, settings.label_smoothing))
    head = fit(x, labels, targets, settings.head_fit.l2, loss=settings.loss, with_bias="bias" in params["head"])
    log.info("head     fitted in %.1f s with l2 %.1g", time.perf_counter() - started, head.l2)

    # Of two heads, the mean of whose logits counts, each has its token
    names = [name for name in HEADS if name in params]
    for name, kernel in zip(names, np.split(head.kernel * len(names), len(names)), strict=True):
        params[name] = {"kernel": kernel, "bias": head.bias} if "bias" in params[name] else {"kernel": kernel}
    return start.new_state(experiment, params)


def fit(
    x: Float[np.ndarray, "v n d"],
    labels: Int[np.ndarray, " n"],
    targets: Float[np.ndarray, "n classes"],
    l2: Sequence[float],
    *,
    loss: str = "softmax",
    with_bias: bool = True,
) -> Head:
    """The least mean loss + l2/2 ‖W‖² of standardised features over v views of n images.

    Of several l2 that one is taken with which the other images tell a fifth of each class best, by the loss of their first
    views; from the largest on, until the loss rises.
    """
    v, n, d = x.shape
    x = x.reshape(v * n, d)
    mean, std = x.mean(axis=0, dtype=np.float64) * with_bias, x.std(axis=0, dtype=np.float64) + 1e-5
    x, basis = (x - mean) / std, None
    if v * n < d:  # the best kernel is a sum of rows: their coordinates in the space that they span tell all, and are fewer
        basis, r = np.linalg.qr(x.T)
        x = r.T
    x = jnp.asarray(x, jnp.float32)
    every, nothing = jnp.tile(targets, (v, 1)), (jnp.zeros((x.shape[1], targets.shape[1])), jnp.zeros(targets.shape[1]))

    def solve(begin: probe.Weights, counted: Bool[np.ndarray, " n"], l2: float, tolerance: float) -> probe.Weights:
        how = {"loss": LOSSES[loss], "with_bias": with_bias, "tolerance": tolerance}
        return probe.fit(begin, x, every, np.tile(counted, v), l2, **how)

    chosen, held_out = max(l2), _held_out(labels)
    if len(l2) > 1 and held_out.any():
        losses: dict[float, float] = {}
        weights = nothing
        for value in sorted(l2, reverse=True):  # from the easiest to fit; each begins where the one before ended
            weights = solve(weights, ~held_out, value, ROUGHLY)
            losses[value] = float(LOSSES[loss](probe.logits(weights, x[:n]), targets)[held_out].mean())
            if losses[value] > min(losses.values()):
                break
        chosen = min(losses, key=losses.__getitem__)
    kernel, bias = (np.asarray(part, np.float64) for part in solve(nothing, np.ones(n, bool), chosen, TOLERANCE))
    kernel = (kernel if basis is None else basis @ kernel) / std[:, None]
    return Head(kernel.astype(np.float32), (bias - mean @ kernel).astype(np.float32), chosen)


def _held_out(labels: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """A random fifth of each class; of a class with less than three images none."""
    held_out, rng = np.zeros(len(labels), bool), np.random.default_rng(0)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        held_out[rows[: round(HELD_OUT * len(rows))]] = True
    return held_out


def _features(
    experiment: Experiment, params: Any, go_on: Callable[[], None]
) -> tuple[Float32[np.ndarray, "v n d"], Int[np.ndarray, " n"]]:
    """What the head sees of each view of the training images that can be decoded, and their labels."""
    settings, task = experiment.settings, experiment.task
    source = memory.kept(experiment.train_source, **settings.caching)
    viewed = dataclasses.replace(experiment, task=dataclasses.replace(task, eval_example=make_view(experiment)))

    def run(params: Any, batch: passes.Batch) -> passes.Batch:
        x = task.head_inputs(params, batch)
        return {"x": x.reshape(len(x), -1), "label": batch["label"], "decoded": batch["decoded"]}

    rows, views = passes.make_rows(viewed, run), []
    for view in range(settings.head_fit.views):
        started = time.perf_counter()
        views.append(rows(params, View(source, view, skip=settings.bad_images == "skip")))
        go_on()
        done = f"view {view + 1} of {settings.head_fit.views}"
        log.info("head     features of %s images, %s: %.0f s", f"{len(source):,}", done, time.perf_counter() - started)
    decoded = np.logical_and.reduce([view["decoded"] for view in views])
    if not decoded.any():
        raise UserError(f"none of the {len(source)} images can be decoded")
    return np.stack([view["x"][decoded] for view in views]), views[0]["label"][decoded]


class View(Source):
    """The examples of a source, each with the number of a view and its own. With `skip` an error is one whose image it is."""

    def __init__(self, source: Source, view: int, *, skip: bool = False):
        self.features, self.exif_rotated, self.where = source.features, source.exif_rotated, source.where
        self._source, self._view, self._skip = source, view, skip

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = {"view": self._view, "number": index}
        try:
            return self._source[index] | numbers
        except ImageError as e:  # no file any more
            if not self._skip:
                raise
            return {"image": e, "label": 0} | numbers


def make_view(experiment: Experiment) -> Callable[..., Example]:
    """(example of a `View`, exif_rotated=) → what `Task.eval_example` makes, and `decoded`.

    View 0 is the image as in evaluation, 1 its mirror image where `config.pp.flip`, the others are cut out as in training.
    With `config.bad_images` "skip" an image that cannot be decoded is black, and not `decoded`.
    """
    settings, task = experiment.settings, experiment.task
    flip = settings.pp.flip

    def seen(example: Example, exif_rotated: bool) -> Example:
        if isinstance(example["image"], ImageError):
            raise example["image"]
        view, rng = example["view"], np.random.default_rng((settings.seed, example["view"], example["number"]))
        mirrored = flip and (view == 1 or (view > 1 and rng.integers(2) == 1))
        if mirrored:
            picture = decode(example["image"], exif_rotated=exif_rotated)[:, ::-1]
            example, exif_rotated = example | {"image": picture}, False
        if view > int(flip):
            return task.train_example(example, rng=rng, exif_rotated=exif_rotated)
        return task.eval_example(example, exif_rotated=exif_rotated)

    def view_example(example: Example, *, exif_rotated: bool) -> Example:
        try:
            found = seen(example, exif_rotated)
        except ImageError as e:
            if settings.bad_images != "skip":
                raise
            if not example["view"]:
                log.warning("skipped bad image %d: %s", example["number"], e)
            found = task.eval_example(example | {"image": np.zeros((*settings.image_size, 3), np.uint8)}, exif_rotated=False)
            return _as_floats(found) | {"decoded": np.bool_(False)}
        return _as_floats(found) | {"decoded": np.bool_(True)}

    return view_example


def _as_floats(example: Example) -> Example:
    """With pixels of one dtype, as one program computes all views."""
    return example | {"image": example["image"].astype(np.float32)}
