"""Names what is in images.

python -m vit_jax.predict --model=runs/photos --top=3 new_photo.jpg more_photos/
python -m vit_jax.predict --model=hf://google/vit-base-patch16-224 --json cat.jpg
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from vit_jax import arguments, checkpoint, models
from vit_jax.checkpoint import describe
from vit_jax.data.device import augment
from vit_jax.data.host.decode import decode
from vit_jax.data.host.view import eval_image
from vit_jax.data.listing import find_images, shown
from vit_jax.errors import UserError, command
from vit_jax.files import json_text, read_regular
from vit_jax.run import runtime, workdir


@dataclass(frozen=True)
class Classifier:
    """A trained model, ready to use.

    `image_size` is (h, w); mean and std are of the 0..255 pixels, by channel; `preprocessing` are keywords of
    `data.host.view.eval_image`.
    """

    model: nn.Module
    params: dict[str, Any]
    class_names: Sequence[str]
    image_size: tuple[int, int]
    mean: Sequence[float] = (augment.MEAN,) * 3
    std: Sequence[float] = (augment.STD,) * 3
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def _probabilities(self) -> Callable:
        def run(params, images):
            logits = self.model.apply({"params": params}, augment.normalize(images, self.mean, self.std), train=False)
            return jax.nn.softmax(logits.astype(jnp.float32))

        return jax.jit(run)

    def __call__(self, images: Sequence[np.ndarray], *, batch_size: int = 8) -> Float[np.ndarray, "b classes"]:
        """Probabilities of decoded uint8 images (h w 3) of any sizes. Batches are padded, so that one size compiles."""
        outputs = []
        for i in range(0, len(images), batch_size):
            batch = [eval_image(image, crop=self.image_size, **self.preprocessing) for image in images[i : i + batch_size]]
            padding = [np.zeros_like(batch[0])] * (batch_size - len(batch))
            outputs.append(np.asarray(self._probabilities(self.params, np.stack(batch + padding)))[: len(batch)])
        return np.concatenate(outputs)


def load_classifier(source: str | os.PathLike, *, model_name: str | None = None) -> Classifier:
    """The classifier in a workdir, or in anything that `checkpoint.open_checkpoint` reads.

    `model.json` or `config.json` beside the parameters describe it; without one the architecture and its resolution are
    read from names and shapes, 1,000 classes are taken for ImageNet's, and `model_name` may insist on an architecture.
    """
    opened = checkpoint.open_checkpoint(workdir.find_npz(source))
    description = opened.description
    if not description.model.get("num_classes"):
        raise UserError(f"{source} has no head: it cannot classify before it is fine-tuned (configs/vit.py)")
    if description.image_size is None:
        raise UserError(f"{source} has position embeddings that are no square, and no model.json tells their grid")
    if "unpooled" in description.model.get("classifier", ""):
        raise UserError(f"{source} scores every token ({description.model['classifier']}), not the image as a whole")
    model = models.build(description.model_type, description.model)
    if model_name:
        representation = {"representation_size": description.model.get("representation_size")}
        has = models.architecture_of(models.model_type_of(model_name)).cls.__dataclass_fields__
        overrides = representation if "representation_size" in has else {}
        model = models.get_model(model_name, num_classes=description.model["num_classes"], **overrides)
    classifier = Classifier(
        model,
        opened.params,
        description.class_names,
        tuple(description.image_size),
        description.mean,
        description.std,
        description.preprocessing,
    )
    _check_fits(classifier, opened.path)
    return classifier


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, or one JSON object an image; returns 1 if some image could not be read."""
    parser = arguments.parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, or folders of them")
    parser.add_argument("--model", required=True, metavar="WORKDIR_OR_NPZ", help="the workdir of a run, or an .npz")
    parser.add_argument("--model_name", help="architecture of a published .npz, e.g. ViT-B_16")
    parser.add_argument("--top", type=int, default=5, help="how many classes to show (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--batch", type=int, default=8, help="images computed at a time (default 8)")
    args = parser.parse_args(argv)
    if args.top < 1 or args.batch < 1:
        raise UserError(f"--top={args.top} and --batch={args.batch} must be at least 1")
    runtime.set_up()
    paths = list(find_images(args.images))
    classifier = load_classifier(args.model, model_name=args.model_name)
    width = max(len(shown(path)) for path in paths)
    batch_size = min(args.batch, len(paths))
    failures = 0
    for i in range(0, len(paths), batch_size):
        decoded = []
        for path in paths[i : i + batch_size]:
            try:
                decoded.append((path, decode(read_regular(path), exif_rotated=True)))
            except (UserError, OSError) as e:
                failures += 1
                print(f"error: {shown(path)}: {e}", file=sys.stderr)
        if decoded:
            probabilities = classifier([image for _, image in decoded], batch_size=batch_size)
            for (path, _), p in zip(decoded, probabilities, strict=True):
                _print(path, _top(p, classifier.class_names, args.top), as_json=args.json, width=width)
    if failures:
        print(f"{failures} of {len(paths)} images could not be read", file=sys.stderr)
    return 1 if failures else 0


def _check_fits(classifier: Classifier, path: Path) -> None:
    images = jnp.zeros((1, *classifier.image_size, 3))
    wanted = jax.eval_shape(classifier.model.init, jax.random.key(0), images)["params"]
    checkpoint.check_fit(classifier.params, wanted, path)
    if len(classifier.class_names) != classifier.model.num_classes:
        raise UserError(
            f"{describe.path_beside(path)} names {len(classifier.class_names)} classes, "
            f"the head of {path} has {classifier.model.num_classes}"
        )


def _top(probabilities: np.ndarray, names: Sequence[str], top: int) -> list[dict[str, Any]]:
    best = np.argsort(-probabilities, kind="stable")[:top]
    return [{"label": names[i], "index": int(i), "probability": float(probabilities[i])} for i in best]


def _print(path: Path, predictions: list[dict[str, Any]], *, as_json: bool, width: int) -> None:
    if as_json:
        print(json_text({"image": str(path), "predictions": predictions}, encoding=sys.stdout.encoding), flush=True)
        return
    for rank, p in enumerate(predictions):
        print(f"{shown(path) if rank == 0 else '':{width}}  {p['probability']:7.2%}  {shown(p['label'])}", flush=True)


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
