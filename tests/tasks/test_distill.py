"""Distillation against torch's losses, on images that student and teacher share, with a teacher that nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import linen as nn

from vit_jax import evaluators
from vit_jax.errors import UserError
from vit_jax.optimize import parallel, trainable
from vit_jax.tasks import classify, distill, images
from vit_jax.tasks.task import Context

CLASSES = 5
MEAN, STD = (110.0, 120.0, 130.0), (50.0, 60.0, 70.0)
TEACHER_MEAN, TEACHER_STD = (127.5, 100.0, 90.0), (127.5, 30.0, 255.0)
rng = np.random.default_rng(0)
BATCH = {
    "image": rng.integers(0, 256, (6, 4, 4, 3), np.uint8),
    "label": rng.integers(0, CLASSES, 6, np.int32),
    "seed": np.arange(6, dtype=np.uint32),
}


class Linear(nn.Module):
    """A linear classifier that shows in class 0 whether it was called for training."""

    num_classes: int = CLASSES
    classifier: str = "token"

    def setup(self):
        self.head, self.head_dist = nn.Dense(self.num_classes), nn.Dense(self.num_classes)

    def __call__(self, images, *, train=False):
        cls, dist = self.head_logits(images, train=train)
        return (cls + dist) / 2 if self.classifier == "distilled" else cls

    def head_logits(self, images, *, train=False):
        x = images.reshape(len(images), -1) / 10
        return tuple(head(x).at[:, 0].add(float(train)) for head in (self.head, self.head_dist))


def params_of(seed):
    shapes = Linear(classifier="distilled").init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def reference(kind, cls, dist, teacher, targets, t, alpha):
    cls, dist, teacher, targets = (torch.from_numpy(np.array(x)) for x in (cls, dist, teacher, targets))
    kl = F.kl_div(F.log_softmax(dist / t, 1), F.log_softmax(teacher / t, 1), reduction="batchmean", log_target=True) * t**2
    hard = F.cross_entropy(dist, teacher.argmax(1))
    labels = F.cross_entropy(cls, targets)
    return {
        "soft": (1 - alpha) * labels + alpha * kl,
        "hard": (1 - alpha) * labels + alpha * hard,
        "function_matching": kl,
    }[kind].item()


@pytest.mark.parametrize("kind", distill.KINDS)
@pytest.mark.parametrize(("t", "alpha"), [(1.0, 0.5), (3.0, 0.1), (0.5, 1.0)])
def test_the_losses_are_torchs(kind, t, alpha):
    rng = np.random.default_rng(1)
    cls, dist, teacher = (rng.normal(0, 3, (8, 11)).astype(np.float32) for _ in range(3))
    targets = rng.dirichlet(np.ones(11), 8).astype(np.float32)
    found = distill.losses(cls, dist, teacher, targets, kind=kind, temperature=t, alpha=alpha)
    assert found.shape == (8,)
    np.testing.assert_allclose(found.mean(), reference(kind, cls, dist, teacher, targets, t, alpha), rtol=1e-6)


def test_far_apart_logits_give_finite_losses_and_gradients():
    far = jnp.array([[300.0, 0.0, -300.0]])

    def loss(student):
        return distill.losses(student, student, far, far, kind="function_matching", temperature=0.1, alpha=0.5).sum()

    assert loss(far) == 0
    assert np.isfinite(loss(-far)) and np.isfinite(jax.grad(loss)(-far)).all()


def prepare():
    """Inverts the colours and mixes each image with its neighbour's, 3 to 1."""

    def inverted(images, seeds):
        return 255 - images

    def mixed(images, targets, key):
        return 0.75 * images + 0.25 * jnp.roll(images, 1, 0), 0.75 * targets + 0.25 * jnp.roll(targets, 1, 0)

    return images.prepare(CLASSES, augmented=inverted, mixed=mixed, mean=MEAN, std=STD)


def loss_of(kind, classifier):
    """(trained parameters, frozen trees, batch, key) → (loss, metrics with the loss), as a training step computes it."""
    student, renormalized = Linear(classifier=classifier), distill.renormalisation(MEAN, STD, TEACHER_MEAN, TEACHER_STD)
    how = {"kind": kind, "temperature": 2.0, "alpha": 0.3, "renormalized": renormalized}
    loss = distill.make_loss(student, Linear(), prepare(), **how)

    def joined(params, frozen, batch, key):
        context = Context(0, {"teacher": frozen["teacher"]}, None, {}, {}, parallel.Pmap())
        result = loss(trainable.join(params, frozen.get("model")), context, batch, key)
        return result.value, result.metrics | {"loss": result.value}

    return joined


def logits_by_hand(params, mean, std, *, train):
    pixels = 255.0 - BATCH["image"]
    images = (0.75 * pixels + 0.25 * np.roll(pixels, 1, 0) - mean) / std
    heads = [images.reshape(6, -1) / 10 @ params[n]["kernel"] + params[n]["bias"] for n in ("head", "head_dist")]
    return [(x + [train, 0, 0, 0, 0]).astype(np.float32) for x in heads]


@pytest.mark.parametrize(
    ("kind", "classifier"),
    [
        ("soft", "token"),
        ("soft", "distilled"),
        ("hard", "distilled"),
        *(("function_matching", c) for c in ("token", "distilled")),
    ],
)
def test_teacher_and_student_see_the_same_augmented_images(kind, classifier):
    student, teacher = params_of(1), params_of(2)
    value, metrics = jax.jit(loss_of(kind, classifier))(student, {"teacher": teacher}, BATCH, jax.random.key(0))
    cls, dist = logits_by_hand(student, MEAN, STD, train=True)
    taught, _ = logits_by_hand(teacher, TEACHER_MEAN, TEACHER_STD, train=False)
    mean = (cls + dist) / 2 if classifier == "distilled" else cls
    targets = 0.75 * np.eye(CLASSES)[BATCH["label"]] + 0.25 * np.roll(np.eye(CLASSES)[BATCH["label"]], 1, 0)
    if classifier == "token" or kind == "function_matching":
        cls = dist = mean
    # The pixels are normalised twice on the way to the teacher, which costs a few bits.
    np.testing.assert_allclose(value, reference(kind, cls, dist, taught, targets, 2.0, 0.3), rtol=1e-5)
    answers = mean.argmax(1)
    expected = {"loss": value, "accuracy": answers == targets.argmax(1), "agreement": answers == taught.argmax(1)}
    assert set(metrics) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(metrics[name], np.mean(x), atol=1e-7)


@pytest.mark.parametrize("kind", distill.KINDS)
def test_the_gradient_reaches_what_is_trained_and_never_the_teacher(kind):
    student, teacher = params_of(1), params_of(2)
    trained, rest = {"head": student["head"]}, {"head_dist": student["head_dist"]}
    loss = loss_of(kind, "distilled")
    run = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (mine, frozen), metrics = run(trained, {"teacher": teacher, "model": rest}, BATCH, jax.random.key(0))
    assert np.abs(mine["head"]["kernel"]).max() > 1e-3
    assert all(np.all(x == 0) for x in jax.tree.leaves(frozen["teacher"]))
    np.testing.assert_allclose(metrics["loss"], loss(student, {"teacher": teacher}, BATCH, jax.random.key(0))[0], rtol=1e-6)


def test_function_matching_needs_no_labels():
    loss, frozen = loss_of("function_matching", "token"), {"teacher": params_of(2)}
    values = [loss(params_of(1), frozen, BATCH | {"label": label}, jax.random.key(0))[0] for label in np.eye(6, dtype=np.int32)]
    assert len(set(map(float, values))) == 1


def test_the_student_alone_is_evaluated():
    batch = {"image": BATCH["image"].astype(np.float32), "label": BATCH["label"], "valid": np.arange(6) < 4}
    predict = classify.make_predict(Linear(classifier="distilled"), loss="softmax", mean=MEAN, std=STD)
    logits = predict(params_of(1), batch)["logits"]
    sums = evaluators.classify.one_label_sums(logits, batch["label"], batch["valid"], loss="softmax")
    logits = (batch["image"] - MEAN) / STD
    heads = [logits.reshape(6, -1) / 10 @ params_of(1)[n]["kernel"] + params_of(1)[n]["bias"] for n in ("head", "head_dist")]
    expected = F.cross_entropy(
        torch.from_numpy(sum(heads)[:4] / 2), torch.from_numpy(batch["label"][:4]).long(), reduction="sum"
    )
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-6)
    assert sums["count"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sof"}, "did you mean soft"),
        ({"kind": "hard", "classifier": "token"}, "config.model.classifier=distilled"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"alpha": 1.5}, "alpha <= 1"),
        ({"classes": 4}, "teacher scores 4 classes and the student 5"),
        ({"classes": None}, "teacher scores no classes"),
    ],
)
def test_what_cannot_be_distilled_is_refused(change, message):
    fields = {"kind": "soft", "temperature": 1.0, "alpha": 0.5, "classifier": "distilled", "classes": CLASSES} | change
    student, teacher = Linear(classifier=fields.pop("classifier")), Linear(num_classes=fields.pop("classes"))
    with pytest.raises(UserError, match=message):
        distill.make_loss(student, teacher, prepare(), **fields)
