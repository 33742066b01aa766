"""What is measured besides the loss: `config.evaluators = {name: {"type": …, "every": steps, …}}`, one module a type.

`type` is the name by default, `every` is `config.eval_every`, and the other options are the keywords of the module's
`make_evaluator`. All run at the last step too. The metrics of an evaluator that is named otherwise than its type begin with
its name, as in `val2/accuracy`. A task's own evaluators score the test split; their metrics end with `_test`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from vit_jax import options
from vit_jax.errors import UserError, unknown
from vit_jax.evaluators import (
    calibration,
    caption,
    classify,
    detect,
    fewshot,
    grounding,
    knn,
    probe,
    retrieval,
    segment,
    zeroshot,
)
from vit_jax.optimize.step import State
from vit_jax.run.experiment import Experiment, model_params

TYPES: dict[str, ModuleType] = {
    "calibration": calibration,
    "caption": caption,
    "classify": classify,
    "detect": detect,
    "fewshot": fewshot,
    "grounding": grounding,
    "knn": knn,
    "probe": probe,
    "retrieval": retrieval,
    "segment": segment,
    "zeroshot": zeroshot,
}
HEADLESS = ("fewshot", "knn", "probe")  # these score features: the model's head does not matter


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """parameters on the devices → metrics by name; of those in `lower_is_better` the smaller is the better."""

    run: Callable[[Any], dict[str, float]]
    lower_is_better: frozenset[str] = frozenset()

    def __call__(self, params: Any) -> dict[str, float]:
        return self.run(params)

    def renamed(self, rename: Callable[[str], str]) -> "Evaluator":
        """The same under other names."""

        def run(params: Any) -> dict[str, float]:
            return {rename(name): value for name, value in self.run(params).items()}

        return Evaluator(run, frozenset(map(rename, self.lower_is_better)))


def make(name: str, evaluator_options: Mapping[str, Any], experiment: Experiment) -> Evaluator:
    """The evaluator called `name`: parameters on the devices → metrics. UserError for options that it does not have.

    It computes nothing yet, but opens its data, so that whatever is wrong with it shows before the first step.
    """
    kind = type_of(name, evaluator_options)
    module, where = TYPES[kind], f"config.evaluators.{name}"
    own = options.checked(module.make_evaluator, evaluator_options, where, reserved=("type", "every"))
    try:
        run = module.make_evaluator(experiment, **own)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    evaluator = Evaluator(run, frozenset(getattr(module, "LOWER_IS_BETTER", ())))
    return evaluator if name == kind else evaluator.renamed(lambda metric: f"{name}/{metric}")


def type_of(name: str, evaluator_options: Mapping[str, Any]) -> str:
    """What kind of evaluator `config.evaluators` asks for under this name."""
    if not isinstance(evaluator_options, Mapping):
        raise UserError(f"config.evaluators.{name}={evaluator_options!r} must be a dict of options, such as {{'every': 1000}}")
    kind = evaluator_options.get("type", name)
    if kind not in TYPES:
        raise unknown(f"type of config.evaluators.{name}", kind, TYPES)
    return kind


def every(name: str, evaluator_options: Mapping[str, Any], default: int) -> int:
    """After how many steps an evaluator is due."""
    value = evaluator_options.get("every", default)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.evaluators.{name}.every={value!r} must be a number of steps, at least 1")
    return value


def make_evaluators(experiment: Experiment) -> list[tuple[int, Evaluator]]:
    """(every so many steps, evaluator) of the task's own and of all of `config.evaluators`. Each compiles once."""
    settings = experiment.settings
    due = [(settings.eval_every, _of_test(kind, experiment)) for kind in experiment.task.evaluators]
    for name, evaluator_options in settings.evaluators.items():
        evaluator = make(name, evaluator_options, experiment)
        due.append((every(name, evaluator_options, settings.eval_every), evaluator))
    return due


def chosen(experiment: Experiment) -> tuple[list[Evaluator], bool]:
    """What `config.evaluator` names, and whether that needs the head of a file."""
    name, configured = experiment.settings.evaluator, experiment.settings.evaluators
    if name == "classify":
        return [evaluator for _, evaluator in make_evaluators(experiment)], True
    if name not in (allowed := {*TYPES, *configured}):
        raise unknown("config.evaluator", name, allowed)
    evaluator_options = configured.get(name, {})
    return [make(name, evaluator_options, experiment)], type_of(name, evaluator_options) not in HEADLESS


def scores(experiment: Experiment, state: State, evaluators: Iterable[Evaluator]) -> dict[str, float]:
    """The metrics of the state's parameters, and of their average if there is one."""
    metrics = {}
    for suffix, params in model_params(experiment, state).items():
        for evaluator in evaluators:
            metrics |= {name + suffix: value for name, value in evaluator(params).items()}
    return metrics


def lower_is_better(evaluators: Iterable[Evaluator], metric: str | None) -> bool:
    """Whether the smaller value of a metric of one of these evaluators, or of their average's, is the better."""
    return metric is not None and any(metric.removesuffix("_ema") in evaluator.lower_is_better for evaluator in evaluators)


def _of_test(kind: str, experiment: Experiment) -> Evaluator:
    """A task's own evaluator on the test source, `NAME_test`, with `img_sec_core_test`, the images a second and device."""
    module = TYPES[kind]
    score = module.make_score(experiment, experiment.test_source)

    def run(params: Any) -> dict[str, float]:
        metrics, rate = score(params)
        return metrics | {"img_sec_core": rate}

    return Evaluator(run, frozenset(getattr(module, "LOWER_IS_BETTER", ()))).renamed("{}_test".format)
