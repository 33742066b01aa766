"""What is optimised, predicted and measured: `config.task = {"type": …, options}`, one module a type.

The options are the keywords of the module's `make_task`. Without a type the task is classification, and distillation where
`config.distill` names a teacher.
"""

from pathlib import Path
from types import ModuleType

from vit_jax import options
from vit_jax.checkpoint import Description
from vit_jax.data import features
from vit_jax.errors import UserError, unknown
from vit_jax.settings import Preprocessing, Settings
from vit_jax.tasks import caption, classify, contrast, detect, distill, reconstruct, segment, self_distill
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Context, Loss, Model, Shown, Task

TYPES: dict[str, ModuleType] = {
    "caption": caption,
    "classify": classify,
    "contrast": contrast,
    "detect": detect,
    "distill": distill,
    "reconstruct": reconstruct,
    "segment": segment,
    "self_distill": self_distill,
}

OF_ANY_SHAPE = ("classify", "contrast")
"""The tasks that take images of different shapes in one batch, see `shapes`."""

__all__ = ["TYPES", "Context", "Loss", "Model", "Setup", "Shown", "Task", "chosen", "make", "of_description", "check_usable"]


def chosen(settings: Settings) -> dict[str, object]:
    """`config.task` with its type; `config.distill` is another way to write that of distillation."""
    default = {"type": "classify"}
    if settings.distill.teacher:
        default = {"type": "distill"} | {name: value for name, value in vars(settings.distill).items()}
    return default | dict(settings.task)


def needs(settings: Settings) -> tuple[str, ...]:
    """The fields by which the task of a recipe chooses among the layouts that a folder may be read in."""
    return getattr(TYPES.get(chosen(settings)["type"]), "NEEDS", ())


def towers(settings: Settings) -> tuple[str, ...]:
    """The parts of the model that the task of a recipe trains, see `Task.towers`."""
    return getattr(TYPES.get(chosen(settings)["type"]), "TOWERS", ())


def make(setup: Setup) -> Task:
    """The task of a recipe. UserError for options that it does not have, and data that lacks what it needs."""
    task_options = chosen(setup.settings)
    kind = task_options["type"]
    if kind not in TYPES:
        raise unknown("config.task.type", kind, TYPES)
    if (most := setup.settings.pp.max_patches) and kind not in OF_ANY_SHAPE:
        raise UserError(f"config.pp.max_patches={most} is for the tasks {' and '.join(OF_ANY_SHAPE)}, not {kind}")
    if setup.settings.pp.pack and kind != "classify":
        raise UserError(f"config.pp.pack={setup.settings.pp.pack} is for the task classify, not {kind}")
    make_task = TYPES[kind].make_task
    task = make_task(setup, **options.checked(make_task, task_options, "config.task", reserved=("type",)))
    for tower in setup.settings.sources:
        if tower and tower not in task.towers:
            has = f"has {' and '.join(task.towers)}" if task.towers else "is one model: give one file or folder"
            raise UserError(f"config.pretrained.{tower}: the task {kind} {has}")
    if missing := [name for name in task.needs if name not in setup.features and f"{name}s" not in setup.features]:
        raise UserError(
            f"{setup.settings.dataset} offers {', '.join(setup.features)}; the task {kind} also needs {', '.join(missing)}"
        )
    return task


def check_usable(description: Description, source: object) -> None:
    """Raises UserError for a checkpoint, called `source`, that lacks what its task predicts with."""
    kind = description.task.get("type")
    if kind not in TYPES:
        raise unknown(f"task of {source}", str(kind), TYPES)
    TYPES[kind].check_usable(description, source)


def writes(description: Description) -> bool:
    """Whether the task of a model writes texts, for which it needs its vocabulary."""
    return getattr(TYPES.get(description.task.get("type")), "WRITES", False)


def of_description(description: Description, vocab: Path | None = None) -> Task:
    """The task that a model was trained for, as its description says, to predict with it; `vocab` is its vocabulary."""
    height, width = description.image_size
    how, names = dict(description.preprocessing), description.class_names
    pp = Preprocessing(crop=height, crop_width=width, eval_resize=how.pop("resize_to", None), **how)
    settings = Settings(
        trainer="evaluate",
        task=description.task,
        model_type=description.model_type,
        model=description.model,
        loss=description.head,
        dataset=description.dataset or "this model",
        pp=pp,
    )
    offered = {
        "image": features.Image(),
        "label": features.Label(names),
        "boxes": features.Boxes(names),
        "segmentation": features.Segmentation(names),
        "text": features.Text(vocab),
    }
    return make(Setup(settings, offered, description))
