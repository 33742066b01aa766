"""Learning-rate schedules and optimisers."""

import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError, unknown
from vit_jax.optimize import towers

Tree = Any
Steps = list[optax.GradientTransformation]
Decay = float | optax.Schedule

DECAY_TYPES = ("cosine", "linear", "step", "rsqrt", "constant")


def make_schedule(
    base_lr: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    decay_type: str = "cosine",
    linear_end: float = 1e-5,
    decay_steps: Sequence[int] = (),
    cooldown_steps: int = 0,
    timescale: float = 10_000,
) -> optax.Schedule:
    """Linear warm-up to `base_lr`, then a cosine to 0, a line to `linear_end`, steps, a reciprocal square root, or nothing.

    With progress p = clip((step − warmup) / (total − warmup), 0, 1) the rate is
      cosine: base·(1 + cos πp)/2,
      linear: linear_end + (base − linear_end)·(1 − p),
      step: base / 10 for each of `decay_steps` that is done, as DETR and ResNets are trained,
      rsqrt: base / √(1 + max(0, step − warmup) / timescale), as in big_vision (https://arxiv.org/abs/2106.04560),
      constant: base,
    times min(1, step / warmup). The last two know no end of their own: over the last `cooldown_steps` they fall on a line
    to 0, by the factor (total − step) / cooldown. What comes before does not depend on `total_steps`, so a run can be
    cooled down from any of its checkpoints.
    """
    if decay_type not in DECAY_TYPES:
        raise unknown("decay_type", decay_type, DECAY_TYPES)
    if (decay_type == "step") != bool(decay_steps):
        raise UserError(f"decay_steps={tuple(decay_steps)} and decay_type={decay_type}: step needs them, others have none")
    endless = decay_type in ("rsqrt", "constant")
    if cooldown_steps and not endless:
        raise UserError(f"cooldown_steps={cooldown_steps} needs decay_type rsqrt or constant; {decay_type} ends by itself")
    if cooldown_steps < 0 or timescale <= 0:
        raise UserError(f"cooldown_steps={cooldown_steps} must be at least 0 and timescale={timescale} positive")
    if cooldown_steps and warmup_steps + cooldown_steps > total_steps > 1:  # 1 stands for no training at all
        raise UserError(
            f"warmup_steps={warmup_steps} and cooldown_steps={cooldown_steps} do not fit into total_steps={total_steps}: "
            "train for longer, or shorten them"
        )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        progress = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
        if decay_type == "cosine":
            rate = base_lr * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        elif decay_type == "linear":
            rate = linear_end + (base_lr - linear_end) * (1.0 - progress)
        elif decay_type == "step":
            rate = base_lr * 0.1 ** sum(jnp.float32(step >= at) for at in decay_steps)
        elif decay_type == "rsqrt":
            rate = base_lr / jnp.sqrt(1.0 + jnp.maximum(0, step - warmup_steps) / timescale)
        else:
            rate = jnp.float32(base_lr)
        if cooldown_steps:
            rate = rate * jnp.clip((total_steps - step) / cooldown_steps, 0.0, 1.0)
        return rate * jnp.minimum(1.0, step / warmup_steps) if warmup_steps else rate

    return schedule


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    *,
    grad_norm_clip: float | None = None,
    weight_decay: Decay = 0.0,
    dtype: Any = jnp.float32,
    lr_factors: Sequence[tuple[str, float]] = (),
    layer_decay: float | None = None,
    num_layers: towers.NumLayers | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> optax.GradientTransformation:
    """Clipping by the global norm, one of `OPTIMIZERS`, decay of the matrices, the rate, and a factor for every group.

    Args:
      weight_decay: decoupled and times the learning rate, on what `matrices` names; it may depend on the step. The published
        sgd has none.
      dtype: of the momentum or first moment.
      lr_factors, layer_decay, num_layers: see `group_factors`. They come last, so they scale a parameter's whole update,
        rate and decay, and no normalisation undoes them.
      options: the optimiser's own, such as b1, b2, eps, momentum: the keywords of its function below.
    """
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    known = [p.name for p in inspect.signature(OPTIMIZERS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise unknown(f"option of the optimizer {name}", option, known)
    clip = [optax.stateless(functools.partial(_clipped, grad_norm_clip))] if grad_norm_clip else []
    steps = OPTIMIZERS[name](weight_decay, dtype, **options)
    optimizer = optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))
    groups = [_scale_groups(lr_factors, layer_decay, num_layers)] if lr_factors or layer_decay is not None else []
    return optax.chain(*clip, optimizer, *groups)


def _clipped(largest: float, grads: Tree, params: Tree) -> Tree:
    """g · largest / max(largest, ‖g‖), with the norm of all together.

    optax's `clip_by_global_norm` divides every number by the norm: XLA keeps the quotients, a second copy of the gradient.
    """
    factor = largest / jnp.maximum(largest, optax.tree.norm(grads))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


# The optimisers: a function each from (weight_decay, dtype of the first moment, options) to what precedes the rate.


def _sgd(weight_decay: Decay, dtype: Any, *, momentum: float = 0.9) -> Steps:
    """m ← momentum·m + g, as in the published fine-tuning."""
    if weight_decay:
        how = "a schedule of weight_decay" if callable(weight_decay) else f"weight_decay={weight_decay}"
        raise UserError(f"{how} needs --config.optimizer=adamw; sgd here is the published one, without")
    return [optax.trace(momentum, accumulator_dtype=dtype)]


def _adamw(weight_decay: Decay, dtype: Any, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Steps:
    """https://arxiv.org/abs/1711.05101"""
    return [optax.scale_by_adam(b1, b2, eps, mu_dtype=dtype), optax.add_decayed_weights(weight_decay, matrices)]


def _adafactor(
    weight_decay: Decay,
    dtype: Any,
    *,
    momentum: float = 0.9,
    decay_rate: float = 0.8,
    beta2_cap: float = 0.999,
    min_dim_size_to_factor: int = 32,
    clipping_threshold: float | None = None,
) -> Steps:
    """Adafactor as big_vision scales ViTs with it (https://arxiv.org/abs/2106.04560).

    A second moment that is factored over the two largest dimensions, if both reach `min_dim_size_to_factor`, with
    β₂ = min(cap, 1 − t^−decay_rate) and no bias correction; then clipping of every tensor's root mean square, if asked
    for; then an average of the updates. The rate is the schedule's, not relative to the parameters.
    """

    def beta2(count, exponent):
        return jnp.minimum(beta2_cap, 1.0 - (count + 1.0) ** -exponent)

    steps = [
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor, decay_rate_fn=beta2)
    ]
    if clipping_threshold:
        steps.append(optax.clip_by_block_rms(clipping_threshold))
    steps.append(optax.ema(momentum, debias=False, accumulator_dtype=dtype))
    return [*steps, optax.add_decayed_weights(weight_decay, matrices)]


def _lamb(weight_decay: Decay, dtype: Any, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6) -> Steps:
    """AdamW whose step for a matrix w is u·φ(‖w‖)/‖u‖ (https://arxiv.org/abs/1904.00962).

    As in the implementations that train BERT and DeiT III, only what is decayed is so scaled. φ(z) = max(z, 1): with
    φ(z) = z the head, which starts at 0, could only grow by a factor of 1 + rate a step.
    """
    trust = optax.masked(optax.scale_by_trust_ratio(min_norm=1.0), matrices)
    return [optax.scale_by_adam(b1, b2, eps, mu_dtype=dtype), optax.add_decayed_weights(weight_decay, matrices), trust]


def _lion(weight_decay: Decay, dtype: Any, *, b1: float = 0.9, b2: float = 0.99) -> Steps:
    """The sign of b1·m + (1 − b1)·g, then m ← b2·m + (1 − b2)·g (https://arxiv.org/abs/2302.06675)."""
    return [optax.scale_by_lion(b1, b2, mu_dtype=dtype), optax.add_decayed_weights(weight_decay, matrices)]


def _muon(
    weight_decay: Decay, dtype: Any, *, momentum: float = 0.95, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Steps:
    """Orthogonalised Nesterov momentum for the matrices of the blocks, Adam (b1, b2) for everything else.

    Embeddings, head, biases and norms are Adam's, as the author advises (https://kellerjordan.github.io/posts/muon).
    An update is scaled by 0.2·√max(inputs, outputs), which makes its root mean square that of AdamW, so that one learning
    rate and decay serve both (https://arxiv.org/abs/2502.16982). optax corrects the momentum's bias; the author does not.
    """
    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, eps=eps, mu_dtype=dtype, weight_dimension_numbers=_inputs_and_outputs),
        optax.stateless(_scale_by_size),
    )
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=dtype)
    return [optax.partition({"muon": muon, "adam": adam}, _muon_or_adam), optax.add_decayed_weights(weight_decay, matrices)]


OPTIMIZERS: dict[str, Callable[..., Steps]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lamb": _lamb,
    "lion": _lion,
    "muon": _muon,
}


# Names of parameters: which are matrices, and which of those Muon's


def matrices(params: Tree) -> Tree:
    """A tree of booleans: True for the kernels of linear maps and convolutions, False for all else."""
    return towers.map_with_names(lambda name, _: name.rsplit("/", 1)[-1] == "kernel", params)


def _muon_or_adam(params: Tree) -> Tree:
    """A tree of "muon" for the kernels of blocks, "adam" for all else; a warning names the kernels that no rule knows."""
    names = towers.flat(params)
    found = towers.find(names)
    towers.warn_of_unknown_kernels(names, found, "Adam trains them, not Muon")

    def label(name: str, _: Any) -> str:
        return "muon" if name.endswith("/kernel") and towers.in_block(name, found) else "adam"

    return towers.map_with_names(label, params)


def _inputs_and_outputs(kernels: Tree) -> Tree:
    """Which axes of a block's kernels are inputs and which outputs: all heads together make up one matrix.

    Query, key and value (d, k, d/k) map d to k·d/k numbers, the output (k, d/k, d) maps k·d/k to d.
    """

    def axes(name: str, x: jax.Array) -> optax.contrib.MuonDimensionNumbers:
        inputs = x.ndim - 1 if name.endswith("/out/kernel") else 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, x.ndim)))

    return towers.map_with_names(axes, kernels)


def _scale_by_size(updates: Tree, params: Tree) -> Tree:
    def scale(u: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        inputs, outputs = (math.prod(u.shape[i] for i in part) for part in axes)
        return u * (0.2 * math.sqrt(max(inputs, outputs)))

    return jax.tree.map(scale, updates, _inputs_and_outputs(updates))


# Factors on the updates of groups of parameters


def group_factors(
    params: Tree,
    lr_factors: Sequence[tuple[str, float]] = (),
    layer_decay: float | None = None,
    num_layers: towers.NumLayers | None = None,
) -> Tree:
    """What the update of every parameter is multiplied by: a tree of floats, in the structure of `params`.

    Args:
      params: arrays or shapes; it may be a part of a model. Only names count, such as
        "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel".
      lr_factors: (regular expression, factor) pairs. The first expression that matches a whole name counts; what none
        matches has the factor 1. One that is never the first to match is a UserError.
      layer_decay: multiplies by layer_decay^(num_layers + 1 − layer), where layer is 0 for the embeddings of patches and
        positions, class tokens and a hybrid's ResNet, i + 1 for block i, num_layers + 1 for what follows the blocks
        (BEiT, https://arxiv.org/abs/2106.08254; timm counts the last norm to the last block). What no architecture's rules
        know counts as what follows the blocks, and a warning names it.
      num_layers: of the model, for `layer_decay`: its number of blocks, or for several towers that number by the prefix of
        each, such as {"img": 12}; other towers, and what lies in none, have the factor 1.
    """
    names = list(towers.flat(params))
    patterns = [_checked(pair) for pair in lr_factors]
    first = {name: next((i for i, p in enumerate(patterns) if p.fullmatch(name)), None) for name in names}
    for i, pattern in enumerate(patterns):
        if i not in first.values():
            raise _matches_nothing(pattern.pattern, names)
    if layer_decay is not None:
        assert num_layers is not None, "layer_decay needs num_layers"
        if not 0 < layer_decay <= 1:
            raise UserError(f"layer_decay={layer_decay} must be above 0 and at most 1, such as 0.75")
        layers_behind = towers.layers_behind(names, num_layers)

    def factor(name: str, _: Any) -> float:
        by_pattern = 1.0 if first[name] is None else lr_factors[first[name]][1]
        return by_pattern if layer_decay is None else by_pattern * layer_decay ** layers_behind[name]

    return towers.map_with_names(factor, params)


def factor_table(
    params: Tree,
    lr_factors: Sequence[tuple[str, float]] = (),
    layer_decay: float | None = None,
    num_layers: towers.NumLayers | None = None,
    *,
    frozen: Tree = None,
) -> str:
    """`group_factors` as a table: a line for every factor, with its tensors and parameters; those of `frozen` have 0."""
    shapes = towers.flat(params)
    found = towers.find(shapes)
    factors = jax.tree.leaves(group_factors(params, lr_factors, layer_decay, num_layers))
    members: dict[float, dict[str, Any]] = {}
    for (name, x), factor in zip(shapes.items(), factors, strict=True):
        members.setdefault(factor, {})[name] = x
    if kept := {name: x for name, x in towers.flat(frozen).items() if x.shape}:  # LoRA's scale is no parameter
        members[0.0] = kept
    lines = [f"{'factor':>8} {'tensors':>8} {'parameters':>13}  of"]
    for factor, group in sorted(members.items()):
        size = sum(math.prod(x.shape) for x in group.values())
        parts = towers.parts(group, found)
        of = ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
        lines.append(f"{factor:>8.4g} {len(group):>8,} {size:>13,}  {of}")
    return "\n".join(lines)


def _scale_groups(
    lr_factors: Sequence, layer_decay: float | None, num_layers: towers.NumLayers | None
) -> optax.GradientTransformation:
    def factors(tree: Tree) -> Tree:
        return group_factors(tree, lr_factors, layer_decay, num_layers)

    def init(params: Tree) -> optax.EmptyState:
        factors(params)  # a pattern that matches nothing is refused before the first step
        return optax.EmptyState()

    def update(updates: Tree, state: optax.EmptyState, params: Tree = None) -> tuple[Tree, optax.EmptyState]:
        return jax.tree.map(lambda u, factor: u if factor == 1 else u * factor, updates, factors(updates)), state

    return optax.GradientTransformation(init, update)


def _checked(pair: tuple[str, float]) -> re.Pattern:
    if not (isinstance(pair, Sequence) and [type(x) for x in pair] in ([str, float], [str, int])):
        raise UserError(f"lr_factors: {pair!r} must be a pair of a pattern and a factor, such as ('head/.*', 10.0)")
    pattern, factor = pair
    if factor <= 0:
        raise UserError(
            f"lr_factors: {factor} for {pattern!r} must be positive; config.freeze is for what is not to be trained"
        )
    try:
        return re.compile(pattern)
    except re.error as e:
        raise UserError(f"lr_factors: {pattern!r} is no regular expression: {e}") from e


def _matches_nothing(pattern: str, names: list[str]) -> UserError:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or towers.parts(names, towers.find(names))[:5]
    return UserError(
        f"lr_factors: {pattern!r} matches no trained parameter that no pattern before it matches; "
        f"a pattern matches whole names, near ones are {', '.join(near)}"
    )
