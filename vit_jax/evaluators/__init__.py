"""What is measured besides the loss: `config.evaluators = {name: {"type": …, "every": steps, …}}`, one module a type.

`type` is the name if not said otherwise, `every` is `config.eval_every`, and the other options are the keywords of the
module's `make_evaluator`. All run at the last step too. The metrics of an evaluator that is named otherwise than its type
begin with its name, as in `val2/accuracy`.
"""

import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from vit_jax.errors import UserError, unknown
from vit_jax.evaluators import calibration, classify, fewshot, knn, probe
from vit_jax.run.experiment import Experiment

TYPES: dict[str, ModuleType] = {
    "calibration": calibration,
    "classify": classify,
    "fewshot": fewshot,
    "knn": knn,
    "probe": probe,
}
HEADLESS = ("fewshot", "knn", "probe")  # these score features: the model's head does not matter

Evaluator = Callable[[Any], dict[str, float]]


def make(name: str, options: Mapping[str, Any], experiment: Experiment) -> Evaluator:
    """The evaluator called `name`: parameters on the devices → metrics. UserError for options that it does not have.

    It computes nothing yet, but opens its data, so that whatever is wrong with it shows before the first step.
    """
    kind = type_of(name, options)
    make_evaluator = TYPES[kind].make_evaluator
    parameters = inspect.signature(make_evaluator).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    own = {option: value for option, value in options.items() if option not in ("type", "every")}
    for option, value in own.items():
        if option not in defaults:
            raise unknown(f"field of config.evaluators.{name}", option, ("type", "every", *defaults))
        if not _is_like(value, defaults[option]):
            raise UserError(f"config.evaluators.{name}.{option}={value!r} must be of the kind of {defaults[option]!r}")
    try:
        evaluator = make_evaluator(experiment, **own)
    except UserError as error:
        raise UserError(f"config.evaluators.{name}: {error}") from error
    if name == kind:
        return evaluator
    return lambda params: {f"{name}/{metric}": value for metric, value in evaluator(params).items()}


def type_of(name: str, options: Mapping[str, Any]) -> str:
    """What kind of evaluator `config.evaluators` asks for under this name."""
    if not isinstance(options, Mapping):
        raise UserError(f"config.evaluators.{name}={options!r} must be a dict of options, such as {{'every': 1000}}")
    kind = options.get("type", name)
    if kind not in TYPES:
        raise unknown(f"type of config.evaluators.{name}", kind, TYPES)
    return kind


def every(name: str, options: Mapping[str, Any], default: int) -> int:
    """After how many steps an evaluator is due."""
    value = options.get("every", default)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.evaluators.{name}.every={value!r} must be a number of steps, at least 1")
    return value


def _is_like(value: Any, default: Any) -> bool:
    """Whether an option's value is of the type of its default; None stands for a name."""
    if isinstance(default, tuple):
        return isinstance(value, tuple | list) and all(_is_like(x, default[0]) for x in value)
    return isinstance(value, {float: int | float, int: int}.get(type(default), str | None))
