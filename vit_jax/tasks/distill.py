"""Knowledge distillation: a classifier learns what a fixed teacher says of the same images."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax import checkpoint, models
from vit_jax.checkpoint.classes import match_classes
from vit_jax.checkpoint.results import find_npz
from vit_jax.errors import UserError, unknown
from vit_jax.tasks import classify, images
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Batch, Context, Loss, Model, Params, Task

NEEDS = classify.NEEDS
KINDS = ("soft", "hard", "function_matching")

Images = Float[Array, "b h w c"]
Logits = Float[Array, "b classes"]
Numbers = Sequence[float]


def make_task(
    setup: Setup, *, teacher: str | None = None, kind: str = "soft", temperature: float = 1.0, alpha: float = 0.5
) -> Task:
    """A classifier that learns from `teacher`, anything that `config.pretrained` may name, with a head for the same classes.

    kind, temperature, alpha: see `losses`. The teacher computes in the dtype of the student.
    """
    student = classify.make_task(setup)
    if setup.settings.trainer != "train":  # nothing is learnt from a teacher then
        return student
    if not teacher:
        raise UserError("config.distill needs a teacher: --config.distill.teacher names a trained classifier")
    opened = checkpoint.open_checkpoint(find_npz(teacher))
    description = opened.description
    names = classify.class_names(setup)
    match_classes(description.class_names, names, where=str(opened.path))  # before anything is computed
    mean, std = setup.normalisation
    settings = setup.settings
    loss = make_loss(
        student.model.module,
        models.build(description.model_type, description.model | {"dtype": settings.dtype}),
        images.make_prepare(settings, len(names), mean, std),
        kind=kind,
        temperature=temperature,
        alpha=alpha,
        renormalized=renormalisation(mean, std, description.mean, description.std),
    )
    return dataclasses.replace(
        student, loss=loss, frozen=lambda: {"teacher": _teacher_params(opened, settings.image_size, names)}
    )


def make_loss(
    student: nn.Module,
    teacher: nn.Module,
    prepare: images.Prepare,
    *,
    kind: str = "soft",
    temperature: float = 1.0,
    alpha: float = 0.5,
    renormalized: Callable[[Images], Images] = lambda images: images,
) -> Callable[[Params, Context, Batch, jax.Array], Loss]:
    """The loss of `losses`; the teacher, `context.frozen["teacher"]`, sees the very images that the student sees.

    A student with a distillation token learns the labels with the head of its class token and the teacher's answers with
    the other one; with the mean of both, by which it is evaluated, if the kind is "function_matching".

    Args:
      student, teacher: normalised images → logits of the same classes.
      prepare: see `images.prepare`.
      kind, temperature, alpha: see `losses`.
      renormalized: images as the student sees them → as the teacher does.

    Raises:
      UserError: for an unknown kind, a temperature or alpha out of range, a teacher of another number of classes, and hard
        distillation of a student without a distillation token.
    """
    two_heads = getattr(student, "classifier", None) == "distilled"
    _check(student, teacher, kind, temperature, alpha, two_heads)

    def loss(params: Params, context: Context, batch: Batch, key: jax.Array) -> Loss:
        mix_key, dropout_key = jax.random.split(key)
        inputs, targets = prepare(batch, mix_key)
        method = "head_logits" if two_heads else None
        logits = student.apply({"params": params}, inputs, train=True, method=method, rngs={"dropout": dropout_key})
        logits = jnp.stack(logits if two_heads else (logits, logits)).astype(jnp.float32)
        mean_logits = logits.mean(axis=0)
        cls, dist = (mean_logits, mean_logits) if kind == "function_matching" else logits

        teacher_logits = teacher.apply({"params": context.frozen["teacher"]}, renormalized(inputs), train=False)
        teacher_logits = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
        value = losses(cls, dist, teacher_logits, targets, kind=kind, temperature=temperature, alpha=alpha).mean()

        answers = jnp.argmax(mean_logits, axis=-1)
        accuracy = jnp.mean(answers == jnp.argmax(targets, axis=-1), dtype=jnp.float32)
        agreement = jnp.mean(answers == jnp.argmax(teacher_logits, axis=-1), dtype=jnp.float32)
        return Loss(value, {"accuracy": accuracy, "agreement": agreement})

    return loss


def losses(
    cls: Logits, dist: Logits, teacher: Logits, targets: Logits, *, kind: str, temperature: float, alpha: float
) -> Float[Array, " b"]:
    """What each example costs. With cross-entropy CE, temperature t and KL = KL(softmax(teacher/t) ‖ softmax(dist/t)):

    soft: (1−α) CE(cls, targets) + α t² KL (https://arxiv.org/abs/1503.02531; DeiT's code also divides KL by the classes);
    hard: (1−α) CE(cls, targets) + α CE(dist, argmax teacher) (DeiT, https://arxiv.org/abs/2012.12877, where α is 1/2);
    function_matching: t² KL, without labels (https://arxiv.org/abs/2106.05237).

    `cls` and `dist` are the same for a student with one head.
    """
    if kind == "hard":
        from_teacher = optax.softmax_cross_entropy_with_integer_labels(dist, teacher.argmax(axis=-1))
    else:
        log_student, log_teacher = (jax.nn.log_softmax(x / temperature) for x in (dist, teacher))
        from_teacher = temperature**2 * optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
    if kind == "function_matching":
        return from_teacher
    return (1 - alpha) * optax.softmax_cross_entropy(cls, targets) + alpha * from_teacher


def renormalisation(mean: Numbers, std: Numbers, other_mean: Numbers, other_std: Numbers) -> Callable[[Images], Images]:
    """Images normalised by mean and std → normalised by the others."""
    mean, std, other_mean, other_std = (np.asarray(x, np.float32) for x in (mean, std, other_mean, other_std))
    factor, shift = std / other_std, (mean - other_mean) / other_std
    return lambda images: images * factor + shift


def _check(student: nn.Module, teacher: nn.Module, kind: str, temperature: float, alpha: float, two_heads: bool) -> None:
    if kind not in KINDS:
        raise unknown("kind of distillation", kind, KINDS)
    if not temperature > 0 or not 0 <= alpha <= 1:
        raise UserError(f"distillation needs temperature > 0 and 0 <= alpha <= 1, not {temperature} and {alpha}")
    if student.num_classes != teacher.num_classes:
        raise UserError(
            f"the teacher scores {teacher.num_classes or 'no'} classes and the student {student.num_classes or 'none'}: "
            "both must know the same ones, so fine-tune the teacher on this dataset first"
        )
    if kind == "hard" and not two_heads:
        raise UserError(
            "hard distillation trains the head of a distillation token: set --config.model.classifier=distilled, "
            "or --config.distill.kind=soft"
        )


def _teacher_params(opened: checkpoint.Opened, image_size: tuple[int, int], names: Sequence[str]) -> Params:
    """The teacher's parameters for images of this size, with the head in the order of these classes, on the host."""
    kind, fields = opened.description.model_type, opened.description.model
    teacher = Model(kind, fields, models.build(kind, fields))
    shapes = jax.eval_shape(classify.make_init(teacher.module, image_size), jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)  # takes no memory
    return images.make_load(teacher, image_size)({"": opened}, zeros, classes=names)
