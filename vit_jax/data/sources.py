"""Where examples come from: the bundled digits, a folder of images, or a tfds dataset, all with random access."""

import logging
import os
import re
from collections.abc import Collection, Iterable
from functools import cache

import numpy as np

from vit_jax.data import captions, class_lists, class_shards, detection, listing, segmentation, shards, tables
from vit_jax.data.digit_canvas import DigitCanvasSource
from vit_jax.data.digit_pairs import DigitPairsSource
from vit_jax.data.digit_scenes import DigitMasksSource, DigitScenesSource
from vit_jax.data.digit_sentences import DigitSentencesSource
from vit_jax.data.digits import DigitsSource
from vit_jax.data.features import Image, Label, Source, digest
from vit_jax.data.listing import IMAGE_SUFFIXES, MOVED, Listing, read_file, shown
from vit_jax.data.splits import TEST_NAMES, composed, hash_of, hold_out_of_classes, split_range
from vit_jax.data.unlabelled import PREFIX, open_unlabelled
from vit_jax.errors import UserError

log = logging.getLogger("vit_jax")

SIZES = 1000  # so many files, evenly spaced, tell by their sizes whether contents have changed
# Where these stand for classes, splits were meant: training must not take them for its classes.
SPLIT_LIKE = (*TEST_NAMES, "train", "training", "testing")


def get_source(
    dataset: str,
    split: str,
    *,
    needs: Collection[str] = (),
    tfds_data_dir: str | None = None,
    tfds_manual_dir: str | None = None,
) -> Source:
    """Returns the examples of a split, such as `train`, `test`, `train[:98%]` or `train[-500:]`.

    `dataset` is `digits`, `digits_0to4`, `digit_scenes`, `digit_masks`, `digit_sentences`, `digit_canvas`, `digit_pairs` (see
    their classes), the path of an existing folder (see FolderSource, detection.open_folder for images with boxes,
    segmentation.open_folder for images with masks, captions.open_folder and shards.open_folder for images with sentences,
    class_lists.open_folder for images whose classes stand in a list, class_shards.open_folder and tables.open_folder for tar,
    Parquet and Arrow files with classes), `unlabelled:FOLDER` (see open_unlabelled), tar files (see shards.open_pattern), or a
    tfds name such as `cifar10`, for which alone the two tfds folders are. A folder of several layouts is read in the one that
    offers what a task `needs`.

    Raises UserError for an unknown dataset, split or empty part.
    """
    if dataset in ("digits", "digits_0to4"):
        return DigitsSource(dataset, split)
    if dataset == "digit_scenes":
        return DigitScenesSource(split)
    if dataset == "digit_masks":
        return DigitMasksSource(split)
    if dataset == "digit_sentences":
        return DigitSentencesSource(split)
    if dataset == "digit_canvas":
        return DigitCanvasSource(split)
    if dataset == "digit_pairs":
        return DigitPairsSource(split)
    if dataset.startswith(PREFIX):
        return open_unlabelled(dataset.removeprefix(PREFIX), split)
    path = os.path.expanduser(dataset)
    if os.path.isdir(path):
        layouts = (detection, segmentation, captions, shards, class_lists, class_shards, tables)
        layouts = sorted(layouts, key=lambda layout: layout.OFFERS not in needs)
        known = (source for layout in layouts if (source := layout.open_folder(path, split)))
        return next(known, None) or _folder_of_classes(path, split, needs)
    if shards.is_pattern(path):
        return (class_shards if class_shards.OFFERS in needs else shards).open_pattern(path, split)
    # tfds' own names: cifar10, cifar10:3.0.2, imagenet_resized/64x64, imagenet_resized/64x64:0.1.0, huggingface:mnist
    if os.path.exists(path) or not re.fullmatch(r"[A-Za-z]\w*(:[\w.*]+)?(/[\w.+-]+(:[\w.*]+)?)?", dataset):
        raise UserError(
            f"dataset {dataset!r}: no such folder. A dataset is 'digits', 'digits_0to4', the path of a folder of images"
            f" ({{train,test}}/{{class}}/image or {{class}}/image), or a tfds name such as 'cifar10'"
        )
    from vit_jax.data.tfds_source import TfdsSource  # slow to import, and of no use to the others

    try:
        return TfdsSource(dataset, split, needs=needs, data_dir=tfds_data_dir, manual_dir=tfds_manual_dir)
    except UserError as e:
        if "/" not in dataset:
            raise
        raise UserError(f"there is no folder {dataset}; as a tfds dataset: {e}") from e


def _folder_of_classes(path: str, split: str, needs: Collection[str]) -> "FolderSource":
    """A FolderSource, whose errors say what else there is for tasks that have no use for classes."""
    try:
        return FolderSource(path, split)
    except UserError as e:
        if not needs or "label" in needs:
            raise
        if lacking := [name for name in needs if name != "image"]:
            what = f"{shown(path)} is in no layout with {' and '.join(lacking)} that docs/data.md lists"
            raise UserError(f"{what}. As a folder of classes: {e}") from e
        raise UserError(f"{e}. For a task without classes, {PREFIX}{shown(path)} is all images below it") from e


class FolderSource(Source):
    """A folder of images, as {train,test}/{class}/image or only {class}/image; the class folders may have sub-folders.

    `test` may also be called `val` or `validation`, and each of these names finds whichever there is. Where there is
    none, a tenth of the images is held out by a hash of their names, so that adding photos moves no other photo to the
    other side (but in tiny folders: a class always keeps an image to train on, and at least one image is held out).

    Classes are numbered by the sorted names of the training folders. Examples are ordered by the hash, which is fixed
    and mixes the classes. Hidden files are ignored; links are followed.
    Raises UserError for a folder without two classes, a class without images, or a test class that training lacks.
    """

    exif_rotated = True

    def __init__(self, path: str, split: str):
        folders = listing.folders(path)
        # Without folders of its own, 'train' is no split but a class, the vehicle.
        train = "train" if "train" in folders and listing.folders(os.path.join(path, "train")) else ""
        tests = [name for name in TEST_NAMES if name in folders]
        asked = re.match(r"[\w-]*", split)[0]
        self._root = path
        self.features = {"image": Image(), "label": Label(_training_classes(path, train))}

        if train and tests:
            test = asked if asked in tests else tests[0]
            examples = self._list(test if asked in TEST_NAMES else train)
        else:
            examples = self._list(train)
            trained, held_out = hold_out_of_classes(examples, path)
            if asked in TEST_NAMES:
                counts = len(held_out), len(examples)
                log.info(
                    "%s has no test folder: %d of its %d images are held out, by a hash of their names", shown(path), *counts
                )
            examples = held_out if asked in TEST_NAMES else trained

        _, part = split_range(split, dict.fromkeys(("train", *TEST_NAMES), len(examples)))
        self._names = [name for _, name, _ in examples[part.start : part.stop]]
        self._labels = np.array([label for _, _, label in examples[part.start : part.stop]], np.int32)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict:
        return {"image": read_file(self.path(index), MOVED), "label": int(self._labels[index])}

    def where(self, index: int) -> str:
        return shown(self.path(index))

    def path(self, index: int) -> str:
        return os.path.join(self._root, self._names[index])

    def fingerprint(self) -> dict[str, str | int]:
        names = [composed(name) for name in self._names]
        return super().fingerprint() | {"names": digest(names), "labels": digest(self._labels), "sizes": digest(self._sizes())}

    def _sizes(self) -> list[int]:
        """The bytes of some files, evenly spaced: they tell what has other contents under the same name."""
        some = np.linspace(0, len(self) - 1, min(SIZES, len(self)), dtype=int)
        paths = [os.path.join(self._root, self._names[i]) for i in some]
        return [os.stat(path).st_size if os.path.exists(path) else -1 for path in paths]

    def _list(self, split: str) -> list[tuple[int, str, int]]:
        """Returns (hash, name relative to the root, label) of every image below root/split/class, sorted."""
        labels = {name: label for label, name in enumerate(self.class_names)}
        top = os.path.join(self._root, split) if split else self._root
        examples, total = [], Listing()
        strays = [os.path.splitext(entry.name)[1] for entry in listing.visible(top) if not listing.is_folder(entry)]
        total.left_out.update(f"{suffix} outside a class folder".strip() for suffix in strays)
        for folder_name in listing.folders(top):
            folder, class_name = os.path.join(top, folder_name), composed(folder_name)
            found = listing.list_images(self._root, os.path.join(split, folder_name))
            total.left_out += found.left_out
            total.irregular += found.irregular
            if found.images and class_name not in labels:
                raise UserError(
                    f"{shown(folder)}: training has no class {class_name!r}, only {_some(self.class_names)}. Rename the"
                    f" folder or remove it, or add images of it to {shown(os.path.join(self._root, 'train', folder_name))}"
                )
            if not found.images and split not in TEST_NAMES:
                report = found.report()
                raise UserError(
                    f"{shown(folder)} is a class without images: add some ({', '.join(IMAGE_SUFFIXES)}) or remove it"
                    + (report and f". It has others: {report}")
                )
            examples += [(hash_of(name), name, labels[class_name]) for name in found.images]
        if report := total.report():
            _say_once(f"{shown(top)}: {report}")
        if not examples:
            raise UserError(f"{shown(top)} has no images: expected {{class}}/image ({', '.join(IMAGE_SUFFIXES)})")
        return sorted(examples)


@cache
def _say_once(message: str) -> None:
    """Logs what every split of a folder has to say."""
    log.info(message)


def _training_classes(root: str, train: str) -> tuple[str, ...]:
    """Returns the sorted class names: the folders of root/train, or of the root itself where `train` is empty."""
    names = sorted({composed(name) for name in listing.folders(os.path.join(root, train))})
    root = shown(root)
    expected = f"expected {os.path.join(root, '{train,test}/{class}/image')} or {os.path.join(root, '{class}/image')}"
    splits = [name for name in names if name.lower() in SPLIT_LIKE and name != "train"]
    if not train and splits:
        raise UserError(
            f"{root} holds {_some(splits)}, which must be splits, but no 'train' with class folders in it: {expected}."
            " Rename the folders, or give the one with the classes as the dataset"
        )
    if not names:
        raise UserError(f"{os.path.join(root, train)} has no class folders, hence no images: {expected}")
    if len(names) == 1:
        raise UserError(
            f"{os.path.join(root, train)} has one class only, {names[0]!r}; two or more are needed: {expected}."
            f" If the classes are folders inside {names[0]!r}, give its path as the dataset"
        )
    return tuple(names)


def _some(names: Iterable[str]) -> str:
    return listing.some([shown(name) for name in names])
