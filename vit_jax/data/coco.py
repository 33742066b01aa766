"""Boxes in COCO's JSON, as COCO itself, Roboflow, CVAT, Label Studio and FiftyOne lay it out."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vit_jax.data.boxes import Picture, Read, check_names
from vit_jax.data.image_files import check_image
from vit_jax.data.listing import is_file, read_text, shown
from vit_jax.errors import UserError, printable

WHOLE = ("_annotations.coco.json", "annotations.json", "result.json", "labels.json")
"""Files at the top of a folder that holds one split, for training."""


def splits(root: Path) -> dict[str, Read]:
    """What reads each split.

    annotations/instances_{train2017,val2017}.json with folders of images of these names, beside it or in `images`;
    {train,valid}/_annotations.coco.json beside the images; or one of the files `WHOLE`, with images beside it, in `images` or
    in `data`.
    """
    if files := annotated(root, "instances"):
        return {name: partial(_read, file, folders) for name, (file, folders) in files.items()}
    if files := sorted(root.glob("*/_annotations.coco.json")):
        return {file.parent.name: partial(_read, file, [file.parent]) for file in files}
    folders = [root, root / "images", root / "data"]
    for file in (root / name for name in WHOLE if is_file(root / name)):
        content = None if file.name == WHOLE[0] else _lists(file)
        if content or file.name == WHOLE[0]:
            return {"train": partial(_read, file, folders, content)}
    return {}


def annotated(root: Path, kind: str) -> dict[str, tuple[Path, list[Path]]]:
    """{split: (annotations/KIND_SPLIT.json, where its images may be)}."""
    files = {file.stem.removeprefix(f"{kind}_"): file for file in sorted(root.glob(f"annotations/{kind}_*.json"))}
    return {name: (file, [root / name, root / "images" / name, root / "images", root]) for name, file in files.items()}


def holding(folders: Sequence[Path], images: Iterable[str]) -> Path:
    """The folder that has the first of the images; of none the first folder."""
    first = next(iter(images), "")
    return next((folder for folder in folders if is_file(folder / first)), folders[0])


def _lists(file: Path) -> dict[str, Any] | None:
    """The content of a file with COCO's lists; None for any other, which may be anything."""
    try:
        content = json.loads(read_text(file))
        return content if {"images", "annotations", "categories"} <= set(content) else None
    except (UserError, ValueError, TypeError, RecursionError):
        return None


def _read(file: Path, folders: Sequence[Path], content: Any = None) -> tuple[list[Picture], list[str]]:
    """Classes are the categories by their numbers, which may have holes. Images are in the first folder that has one.

    The file is read, unless its `content` is there already.
    """
    text = "" if content else read_text(file)
    try:
        content = content or json.loads(text)
        categories = {c["id"]: c.get("name", "") for c in content["categories"]}
        records = {image["id"]: image for image in content["images"]}
        annotations = [dict(annotation) for annotation in content["annotations"]]
        order = sorted(categories)
        folder = holding(folders, (image["file_name"] for image in records.values()))
        pictures = {number: Picture(folder / image["file_name"], size=_size(image)) for number, image in records.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        why = printable(repr(e))
        raise UserError(f"{shown(file)} is no COCO file of images, annotations and categories: {why}") from e
    if nameless := [number for number, name in categories.items() if not name]:
        raise UserError(f"{shown(file)}: category {printable(nameless[0], 60)} has no name")
    names = check_names([categories[number] for number in order], file)
    for picture in pictures.values():
        check_image(picture.path, shown(file), "annotation")
    for annotation in annotations:
        where = f"{shown(file)}: annotation {printable(annotation.get('id'), 60)}"
        for key in ("image_id", "category_id", "bbox"):
            if key not in annotation:
                raise UserError(f"{where} has no {key}")
        image, category = annotation["image_id"], annotation["category_id"]
        if image not in pictures:
            raise UserError(f"{where} is of image {printable(image, 60)}, which the file does not list")
        if category not in categories:
            raise UserError(f"{where} is of category {printable(category, 60)}, which has no name in the file")
        try:
            left, top, width, height = map(float, annotation["bbox"])
            size = float(records[image]["height"]), float(records[image]["width"])
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise UserError(f"{where} needs a bbox of four numbers, in an image of a height and width: {printable(e)}") from e
        corners, crowd = (left, top, left + width, top + height), bool(annotation.get("iscrowd"))
        pictures[image].add(corners, order.index(category), size, f"{where} ({printable(records[image]['file_name'])})", crowd)
    return list(pictures.values()), names


def _size(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """(h, w) of an image, None where the file does not say it: only boxes need it."""
    try:
        return float(record["height"]), float(record["width"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
