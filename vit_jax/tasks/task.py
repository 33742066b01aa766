"""What a task is: all that the loop, the evaluators and the commands need to know of it.

A batch is a flat dict of arrays with the examples in front: `image`, `label`, `seed`; `boxes`, `box_labels`, `box_valid`;
`tokens`; `segmentation`; in evaluation `valid`, False on padding. An example is the same without the leading axis. Where images
have shapes of their own, `image` holds their patches, and `grid` how these lie, see `shapes`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int
from PIL import Image

from vit_jax.data.canvases import Canvases
from vit_jax.errors import UserError

Tree = Any
Params = Any
Batch = dict[str, Array]
Example = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]


class TrainingFailed(UserError):
    """What was learnt since the last checkpoint is worth nothing: none is written."""


class Devices(Protocol):
    """What a loss may ask of the devices that share the batch, see `optimize.parallel`."""

    def mean(self, tree: Tree) -> Tree:
        """The mean over all devices."""

    def sum(self, tree: Tree) -> Tree:
        """The sum over all devices of what each has counted of its own examples."""

    def all_examples(self, tree: Tree) -> Tree:
        """(b, …) of this device → (devices · b, …) of all of them, in the same order everywhere. Gradients flow back."""

    def device_index(self) -> Int[Array, ""]:
        """Where this device's examples stand in `all_examples`: from device_index · b on."""


class Context(NamedTuple):
    """What a loss may read besides the parameters.

    Attributes:
      step: steps done so far.
      frozen: trees by name that are not trained, such as a fixed teacher.
      ema: the running average of the parameters, None without `config.ema_decay`.
      carry: what the last loss returned as its carry: centres, queues. It is the same on all devices.
      totals: what `Task.totals` says of the whole batch, as the mean over devices and micro-batches.
      devices: see `Devices`.
    """

    step: Int[Array, ""]
    frozen: Mapping[str, Params]
    ema: Params | None
    carry: Tree
    totals: dict[str, Array]
    devices: Devices


class Loss(NamedTuple):
    """The mean loss of a (micro-)batch on this device, named numbers to be averaged and shown, and the new carry."""

    value: Float[Array, ""]
    metrics: Metrics = {}
    carry: Tree = {}


class Model(NamedTuple):
    """A model, and what it is made from: a name in `models.ARCHITECTURES` and the fields that recipes and model.json hold."""

    type: str
    fields: dict[str, Any]
    module: nn.Module


class Written(NamedTuple):
    """A sentence, and what tells each of its words with the places of the tokens that make it."""

    text: str
    words: Callable[[], list[tuple[str, list[int]]]]


class Shown(NamedTuple):
    """A prediction for people: lines of text, for programs: a JSON object, and, where it can be drawn, as a picture.

    `maps` are pictures for programs, by what their names end with, which are written beside that one.
    """

    text: list[str]
    json: dict[str, Any]
    draw: Callable[[Image.Image], Image.Image] | None = None
    maps: dict[str, Image.Image] = {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: functions, and what they are about.

    Attributes:
      model: the model that is trained.
      needs: fields that the examples of a source must offer, such as ("image", "label").
      train_example: (example of a source, rng=numpy generator, exif_rotated=) → dict of arrays of fixed shapes.
      eval_example: (example of a source, exif_rotated=) → dict of arrays of fixed shapes.
      canvases: where the arrays of a batch are of a few shapes, these; both kinds of examples are then also made for a `canvas`
        (h, w), without which they are of the largest.
      collate: training examples, stacked → the batch that the devices get, see `rows`.
      init: key → fresh parameters, of the model, or of all that is trained where `leaves` picks the model from them.
      loss: (parameters of the model, Context, batch, key) → Loss. It draws all randomness from the key.
      predict: (parameters of the model, evaluation batch) → dict of arrays by example.
      head_inputs: (parameters of the model, evaluation batch) → (b, d), or (b, 2, d) for two heads, what a linear `head` makes
        logits of; None where there is none that could be fitted, see `fit_head`.
      evaluators: types of `evaluators.TYPES` that run on the test split by default; their metrics end with `_test`.
      describe: () → the fields of `checkpoint.Description` that only this task knows: class_names, head, task.
      show: (outputs of `predict` for one example, its picture's (h, w), keyword options) → Shown.
      preview: (training batch, key), or (evaluation batch, None) → (what the model sees of it, uint8 (b h w 3), captions).
      load: (checkpoints by tower, fresh parameters, classes=) → parameters made to fit; that of the whole model is called "".
        A head starts anew, unless it is to score these classes.
      towers: parts of the model, by the prefix of their parameters, that `config.pretrained` may name sources of their own for.
      frozen: () → other trees by name, on the host, that the loss reads and nobody trains.
      init_carry: () → the carry before the first step.
      tokenize: texts → tokens (n, max_len), of a task that reads texts and has their vocabulary.
      write: outputs of `predict` for n examples → n `Written`, of a task that writes texts.
      files: what a trained model needs beside its parameters and description, such as a vocabulary; copied there.
      totals: batch → sums over its examples that a loss divides by, such as the number of boxes.
      leaves: parameters by suffix, "" and with `config.ema_decay` "_ema" → those that are scored, and written as
        `modelSUFFIX.npz`.
      check: (step, metrics) → None; raises TrainingFailed where going on makes no sense.
      whole_batch: the loss of an example depends on the others of the batch. Micro-batches then need `embed`.
      embed: (parameters, Context, batch, key) → tree of arrays by example, from which `loss_of` makes the loss of
        the whole batch: loss = loss_of(parameters, Context, embed(…)). Gradients are cached (https://arxiv.org/abs/2101.06983).
    """

    model: Model
    needs: tuple[str, ...]
    train_example: Callable[..., dict[str, np.ndarray]]
    eval_example: Callable[..., dict[str, np.ndarray]]
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, Context, Batch, jax.Array], Loss]
    predict: Callable[[Params, Batch], dict[str, Array]]
    evaluators: tuple[str, ...]
    describe: Callable[[], dict[str, Any]]
    show: Callable[..., Shown]
    preview: Callable[[dict[str, np.ndarray], jax.Array | None], tuple[np.ndarray, list[str]]]
    load: Callable[..., Params]
    head_inputs: Callable[[Params, Batch], Array] | None = None
    canvases: Canvases | None = None
    collate: Callable[[Batch], Batch] = field(default=lambda batch: batch)
    towers: tuple[str, ...] = ()
    frozen: Callable[[], dict[str, Params]] = field(default=dict)
    init_carry: Callable[[], Tree] = field(default=dict)
    totals: Callable[[Batch], dict[str, Array]] = field(default=lambda batch: {})
    leaves: Callable[[dict[str, Params]], dict[str, Params]] = field(default=lambda params: params)
    check: Callable[[int, Mapping[str, float]], None] = field(default=lambda step, metrics: None)
    whole_batch: bool = False
    embed: Callable[[Params, Context, Batch, jax.Array], Tree] | None = None
    loss_of: Callable[[Params, Context, Tree], Loss] | None = None
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "n l"]] | None = None
    write: Callable[[Mapping[str, np.ndarray]], list[Written]] | None = None
    files: tuple[Path, ...] = ()


def of_whole_batch(embed: Callable[..., Tree], loss_of: Callable[..., Loss]) -> Callable[..., Loss]:
    """`Task.loss` of a task that compares the examples of a batch: `loss_of` what `embed` makes of all of it at once."""

    def loss(params: Params, context: Context, batch: Batch, key: jax.Array) -> Loss:
        return loss_of(params, context, embed(params, context, batch, key))

    return loss
