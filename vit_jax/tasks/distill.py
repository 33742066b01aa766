"""Knowledge distillation: a classifier learns what a fixed teacher says of the same images."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from vit_jax.data.device import augment
from vit_jax.errors import UserError, unknown
from vit_jax.optimize import trainable
from vit_jax.tasks import classify
from vit_jax.tasks.classify import Batch, Metrics, Params

KINDS = ("soft", "hard", "function_matching")

Images = Float[Array, "b h w c"]
Logits = Float[Array, "b classes"]


def make_task(
    student: nn.Module,
    teacher: nn.Module,
    prepare: classify.Prepare,
    *,
    kind: str = "soft",
    temperature: float = 1.0,
    alpha: float = 0.5,
    mean: Sequence[float] = (augment.MEAN,) * 3,
    std: Sequence[float] = (augment.STD,) * 3,
    teacher_mean: Sequence[float] = (augment.MEAN,) * 3,
    teacher_std: Sequence[float] = (augment.STD,) * 3,
) -> classify.Task:
    """The loss of `losses`; the teacher, `frozen["teacher"]`, sees the very images that the student sees.

    A student with a distillation token learns the labels with the head of its class token and the teacher's answers with
    the other one; with the mean of both, by which it is evaluated, if the kind is "function_matching".

    Args:
      student, teacher: normalised images → logits of the same classes.
      prepare: see `classify.make_prepare`.
      kind, temperature, alpha: see `losses`.
      mean, std, teacher_mean, teacher_std: of the 0..255 pixels, by channel.

    Raises:
      UserError: for an unknown kind, a temperature or alpha out of range, a teacher of another number of classes, and hard
        distillation of a student without a distillation token.
    """
    two_heads = getattr(student, "classifier", None) == "distilled"
    _check(student, teacher, kind, temperature, alpha, two_heads)
    renormalized = _renormalisation(mean, std, teacher_mean, teacher_std)

    def loss(params: Params, frozen: dict[str, Params], batch: Batch, rng: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        mix_key, dropout_key = jax.random.split(rng)
        images, targets = prepare(batch, mix_key)
        variables = {"params": trainable.join(params, frozen.get("model"))}
        method = "head_logits" if two_heads else None
        logits = student.apply(variables, images, train=True, method=method, rngs={"dropout": dropout_key})
        logits = jnp.stack(logits if two_heads else (logits, logits)).astype(jnp.float32)
        mean_logits = logits.mean(axis=0)
        cls, dist = (mean_logits, mean_logits) if kind == "function_matching" else logits

        teacher_logits = teacher.apply({"params": frozen["teacher"]}, renormalized(images), train=False)
        teacher_logits = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32)
        value = losses(cls, dist, teacher_logits, targets, kind=kind, temperature=temperature, alpha=alpha).mean()
        answers = jnp.argmax(mean_logits, axis=-1)
        return value, {
            "loss": value,
            "accuracy": jnp.mean(answers == jnp.argmax(targets, axis=-1), dtype=jnp.float32),
            "agreement": jnp.mean(answers == jnp.argmax(teacher_logits, axis=-1), dtype=jnp.float32),
        }

    return classify.Task(loss, classify.make_evaluate(student, mean=mean, std=std))


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


def _renormalisation(mean: Any, std: Any, other_mean: Any, other_std: Any) -> Callable[[Images], Images]:
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
