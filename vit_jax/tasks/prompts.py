"""Labels as a text tower reads them: put into sentences, of which the embeddings are averaged.

https://arxiv.org/abs/2103.00020, section 3.1.4
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float

from vit_jax.checkpoint import describe
from vit_jax.checkpoint.classes import listed
from vit_jax.data.listing import read_text, shown
from vit_jax.errors import UserError, near, printable, unknown
from vit_jax.models import two_towers
from vit_jax.tasks import classify
from vit_jax.tasks.task import Batch, Params, Task

PLACE = "{}"
"""Where the label stands in a template."""
TEMPLATES = {
    "none": (PLACE,),
    "imagenet": (
        "a photo of a {}.",
        "a dark or blurry photo of the {}.",
        "a close view of a {}.",
        "a {} seen from far away.",
        "a photo of several {}.",
        "a drawing of the {}.",
        "a toy {}.",
    ),
    "cifar": (
        "a photo of a {}.",
        "a tiny photo of a {}.",
        "a blurry photo of the {}.",
        "a photo of a {} with few pixels.",
        "a photo of the large {}.",
        "a photo of the small {}.",
    ),
}
"""By name: a label is put into each of these sentences."""
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
LABELS: dict[str, Callable[[], tuple[str, ...]]] = {
    "imagenet": lambda: _imagenet(),
    "cifar10": lambda: readable(CIFAR10.split()),
    "cifar100": lambda: readable(CIFAR100.split()),
}
"""By name: the classes of a dataset, in the order of its numbers."""


def read_labels(given: str) -> tuple[str, ...]:
    """The labels of a name in `LABELS`, of a file with one a line, or of a list such as "a cat,a dog".

    Raises UserError for a file that is not there, and as `check_labels` does.
    """
    if given in LABELS:
        return LABELS[given]()
    path = _file(given, "--labels", LABELS)
    labels = _lines(path) if path else [label.strip() for label in given.split(",")]
    check_labels(labels, where=shown(path) if path else "--labels")
    return tuple(labels)


def read_templates(given: str) -> tuple[str, ...]:
    """The templates of a name in `TEMPLATES`, of a file with one a line, or a single one that holds `{}`.

    Raises UserError for a file that is not there, and a template without a place for the label.
    """
    if given in TEMPLATES:
        return TEMPLATES[given]
    if PLACE in given:
        return (given,)
    path = _file(given, "--templates", TEMPLATES)
    if path is None:
        raise unknown("templates", given, [*TEMPLATES, "a file", "a sentence with {}"])
    templates = _lines(path)
    check_templates(templates, where=shown(path))
    return tuple(templates)


def check_labels(labels: Sequence[str], *, where: str = "the labels") -> None:
    """Raises UserError for no labels, an empty one, and one that is given twice."""
    if not labels or not any(labels):
        raise UserError(f"{where}: there are no labels: give some, such as 'a cat,a dog'")
    if not all(labels):
        raise UserError(f"{where}: label {1 + next(i for i, label in enumerate(labels) if not label)} is empty: remove it")
    counts = Counter(" ".join(label.casefold().split()) for label in labels)
    if twice := [label for label, count in counts.items() if count > 1]:
        raise UserError(f"{where}: given more than once: {listed(twice)}: remove what is left over, or use other words")


def check_templates(templates: Sequence[str], *, where: str = "the templates") -> None:
    """Raises UserError for no templates, and one that does not hold `{}`."""
    if not any(templates):
        raise UserError(f"{where}: there are no templates: give some, such as 'a photo of a {PLACE}'")
    for i, template in enumerate(templates, 1):
        if PLACE not in template:
            raise UserError(f"{where}: template {i}, {printable(template)!r}, has no {PLACE} for the label to stand")


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """Class names as words: "tench, Tinca tinca" is a tench, `palm_tree` a palm tree; the numbers of WordNet are ImageNet's."""
    if len(names) == 1000 and all(name[0] == "n" and name[1:].isdecimal() for name in names) and sorted(names) == list(names):
        return _imagenet()
    return tuple(name.partition(",")[0].replace("_", " ").strip() for name in names)


def embed_labels(
    embed_texts: Callable[[list[str]], Float[np.ndarray, "n d"]], labels: Sequence[str], templates: Sequence[str]
) -> Float[np.ndarray, "labels d"]:
    """For each label the mean of the embeddings of its sentences, of length 1.

    Args:
      embed_texts: texts → their embeddings, each of length 1.
    """
    z = embed_texts([template.replace(PLACE, label) for label in labels for template in templates])
    z = z.reshape(len(labels), len(templates), -1).mean(axis=1)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def score(
    task: Task, params: Params, zimg: Float[Array, "b d"], ztxt: Float[np.ndarray, "labels d"], *, head: str
) -> dict[str, Array]:
    """`logits` and `probabilities` (b, labels) of embedded images, see `make_classifier`."""
    _, _, out = task.model.module.apply({"params": params})
    logits = two_towers.scores(zimg, ztxt, out)
    return {"logits": logits, "probabilities": classify.PROBABILITIES[head](logits)}


def make_classifier(task: Task, ztxt: Float[np.ndarray, "labels d"], labels: Sequence[str], *, head: str) -> Task:
    """The task of images and texts, which also gives `logits` and `probabilities` of labels that `embed_labels` has embedded.

    Args:
      head: "softmax", one label an image, or "sigmoid", each label for itself: as the model was trained.
    """

    def predict(params: Params, batch: Batch) -> dict[str, Array]:
        outputs = task.predict(params, batch)
        return outputs | (score(task, params, outputs["zimg"], ztxt, head=head) if "zimg" in outputs else {})

    return dataclasses.replace(task, needs=("image", "label"), predict=predict, show=classify.make_show(labels))


def _imagenet() -> tuple[str, ...]:
    """ImageNet's class names; of the two that differ in case alone, the dog is called so."""
    return tuple("Cardigan Welsh corgi" if name == "Cardigan" else name for name in describe.imagenet_class_names())


def _file(given: str, option: str, names: Sequence[str]) -> Path | None:
    """The file that is meant, None for something else. Raises UserError for one that is not there."""
    path = Path(given).expanduser()
    if os.path.lexists(path) and not os.path.isdir(path):
        return path
    if given.endswith(".txt") or (os.sep in given and "," not in given):
        close = near(given, names)
        raise UserError(f"{option}={printable(given)}: no such file{f'; did you mean {close[0]}?' if close else ''}")
    return None


def _lines(path: Path) -> list[str]:
    """The lines of a text, without the empty ones at its end."""
    return [line.strip() for line in read_text(path).rstrip().splitlines()]
