"""The report of `predict` on images whose folders tell their classes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vit_jax.checkpoint.classes import find_classes, listed
from vit_jax.data.host.decode import decode
from vit_jax.data.listing import shown, some
from vit_jax.errors import UserError, printable
from vit_jax.files import read_regular
from vit_jax.report import collect, draw, page
from vit_jax.report.run import has_answers
from vit_jax.tasks.task import Task


def known_labels(found: Sequence[tuple[str, Sequence[Path]]], task: Task, class_names: Sequence[str]) -> dict[Path, int]:
    """The class of every image: the first folder on the way to it, from a given folder on, that is called as a class.

    Args:
      found: (folder or file as it was given, images there).

    Raises:
      UserError: for a task without classes, and for images in no such folder.
    """
    if not has_answers(task, {"label": None}):
        raise UserError("--errors: the task of this model does not name one class for an image, which could be wrong")
    labels: dict[Path, int] = {}
    stray: list[Path] = []
    known: dict[tuple[str, ...], int | None] = {}
    for argument, paths in found:
        root = Path(argument).expanduser()
        for path in paths:
            inside = path.relative_to(root).parts[:-1] if path != root else ()
            folders = (*inside, os.path.basename(os.path.abspath(root if path != root else root.parent)))
            if folders not in known:
                known[folders] = next((i for i in find_classes(class_names, folders) if i is not None), None)
            if (label := known[folders]) is None:
                stray.append(path)
            else:
                labels[path] = label
    if stray:
        raise UserError(
            f"--errors: {len(stray):,} of {len(stray) + len(labels):,} images are in no folder that is called as a class of "
            f"the model ({listed(class_names)}): {some([shown(path) for path in stray], 3)}. "
            f"Give a folder with images such as {printable(class_names[0], 60)}/1.jpg in it"
        )
    return labels


def of_predictions(
    answers: Mapping[Path, Float[np.ndarray, " classes"]],
    labels: Mapping[Path, int],
    class_names: Sequence[str],
    folder: Path,
    about: Mapping[str, str],
) -> Path:
    """Writes `folder/report.html` of the probabilities that a model gives for images whose class is known.

    UserError if it cannot be written.
    """
    paths = list(answers)
    p = np.stack([answers[path] for path in paths])
    label = np.array([labels[path] for path in paths])
    findings = collect.find(label, p.argmax(axis=1), p.max(axis=1), class_names)

    def picture(i: int) -> page.Picture:
        pixels = decode(read_regular(paths[i]), exif_rotated=True)
        return page.Picture(*draw.thumbnail(pixels), shown(paths[i]), page.link(paths[i], folder))

    pictures = page.pictures(findings, picture)
    try:
        return page.write(page.Content(title="predictions", about=about, findings=findings, pictures=pictures), folder)
    except OSError as e:
        raise UserError(f"--errors={shown(folder)}: {page.FILE} cannot be written there: {e.strerror}") from e
