"""Images with boxes, in the three layouts that people have: COCO's JSON, YOLO's text files, Pascal VOC's XML.

`open_folder` tells them apart. All annotations are read and checked at the start: a box without an area, with NaN or
outside of its image, an image that is missing, a class without a name are errors that name file and annotation.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml

from vit_jax.data.features import Boxes, Image, digest
from vit_jax.data.host.decode import ImageError, header_size
from vit_jax.data.image_files import ImageFiles
from vit_jax.data.listing import is_file, list_images, read_file, read_text, shown
from vit_jax.data.splits import TEST_NAMES, meant, part_of
from vit_jax.errors import UserError, printable, unknown

OFFERS = "boxes"
"""What such a folder has beside images."""
_FAR = 0.1  # of a side of the image: so far a box may reach beyond it unnoticed

log = logging.getLogger("vit_jax")


@dataclass
class Picture:
    """An image and its objects: corners in pixels, classes, and which are crowds (or VOC's difficult ones).

    Of a `relative` picture corners are parts of its width and height, which nobody has read yet; another's `size` (h, w) is
    that of its annotations. `beyond` says which boxes reach far beyond the image.
    """

    path: Path
    relative: bool = False
    size: tuple[float, float] | None = None
    beyond: list[str] = field(default_factory=list)
    corners: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)

    def add(self, corners: Sequence[float], label: int, size: tuple[float, float], where: str, crowd: bool = False) -> None:
        """Adds a box of an image of `size` (h, w), clipped to it. Raises UserError with `where` if nothing is left."""
        if not all(math.isfinite(x) for x in corners):
            raise UserError(f"{where}: the box {list(corners)} has numbers that are not finite: correct or remove it")
        left, top, right, bottom = corners
        if right <= left or bottom <= top:
            raise UserError(f"{where}: the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) has no area: remove it")
        height, width = size
        if left >= width or top >= height or right <= 0 or bottom <= 0:
            raise UserError(
                f"{where}: the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) lies outside of its image, which is"
                f" {width:g} pixels wide and {height:g} high"
            )
        self.size = None if self.relative else size
        far = max(-left / width, -top / height, right / width - 1, bottom / height - 1)
        if far > _FAR:
            self.beyond.append(f"{where}: from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) of {width:g} x {height:g}")
        self.corners.append((max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)))
        self.labels.append(label)
        self.crowds.append(crowd)


class DetectionSource(ImageFiles):
    """Pictures as examples: `image` (encoded bytes), `boxes` (n, 4), `box_labels` (n,) and `box_crowd` (n,).

    Boxes are (left, top, right, bottom) in pixels of the upright image. Crowds are for the evaluation, which ignores what
    is found there; training leaves them out.
    """

    def __init__(self, pictures: Sequence[Picture], class_names: Sequence[str]):
        super().__init__([picture.path for picture in pictures])
        self.features = {"image": Image(), "boxes": Boxes(tuple(class_names))}
        self._pictures = pictures

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self._pictures[index]
        image = read_file(picture.path)
        boxes = np.array(picture.corners, np.float32).reshape(-1, 4)
        if len(boxes):
            boxes *= _scale(picture, image)
        return {
            "image": image,
            "boxes": boxes,
            "box_labels": np.array(picture.labels, np.int32),
            "box_crowd": np.array(picture.crowds, bool),
        }

    def size(self, index: int) -> tuple[int, int]:
        """As annotated, where that is more than nothing; of others the header is read."""
        picture = self._pictures[index]
        if picture.size and all(1 <= side < math.inf for side in picture.size):
            return round(picture.size[0]), round(picture.size[1])
        return header_size(read_file(picture.path), exif_rotated=True)

    def fingerprint(self) -> dict[str, str | int]:
        return super().fingerprint() | {"boxes": digest((picture.corners, picture.labels) for picture in self._pictures)}


def _scale(picture: Picture, image: bytes) -> np.ndarray:
    """What makes pixels of a picture's corners.

    Raises UserError for boxes that were drawn on an image of another size, or on one that was not turned upright.
    """
    try:
        height, width = header_size(image, exif_rotated=True)
    except ImageError:  # the loader's to report: it knows what to do about it
        return np.ones(4, np.float32)
    if picture.relative:
        return np.array([width, height, width, height], np.float32)
    if (height, width) != picture.size:
        turned = " as its EXIF tag turns it upright" if header_size(image) == picture.size else ""
        raise UserError(
            f"{shown(picture.path)} is {width} x {height} pixels (width x height){turned}, and its boxes are annotated for "
            f"{picture.size[1]:g} x {picture.size[0]:g}: annotate the images as they are, or change both together"
        )
    return np.ones(4, np.float32)


def open_folder(path: str, split: str) -> DetectionSource | None:
    """The examples of a split, or part of it, of a folder in one of the layouts; None for any other folder.

      COCO: annotations/instances_{train2017,val2017}.json beside folders of these names, or, as Roboflow exports it,
        {train,valid}/_annotations.coco.json beside the images;
      YOLO: data.yaml with names and the folders of images, whose `images` is replaced by `labels` for the text files;
      VOC: Annotations/*.xml, JPEGImages, and ImageSets/Main/{train,val}.txt.

    Raises UserError for a split that is not there, and for whatever is wrong with an annotation.
    """
    root = Path(path)
    for splits, read in ((_coco_splits, _read_coco), (_yolo_splits, _read_yolo), (_voc_splits, _read_voc)):
        if found := splits(root):
            name = _which(split.partition("[")[0], found, root)
            try:
                pictures, class_names = read(root, found, name)
            except UserError:
                raise
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as e:
                raise UserError(f"{shown(root)}: the annotations of {printable(name)} are damaged: {printable(repr(e))}") from e
            if beyond := [where for picture in pictures for where in picture.beyond]:
                log.warning(
                    "%s: %d of %d boxes reach far beyond their image and are cut at its edge, such as %s. Are their numbers in "
                    "the order that this layout has?",
                    *(shown(root), len(beyond), sum(len(picture.corners) for picture in pictures), beyond[0]),
                )
            part = part_of(split, len(pictures))
            return DetectionSource(pictures[part.start : part.stop], class_names)
    return None


def _which(asked: str, found: Mapping[str, Any], root: Path) -> str:
    name = meant(asked, found)
    if name is None:
        raise unknown(f"split of {shown(root)}", asked, map(printable, found))
    return name


def _check_image(path: Path, where: str) -> None:
    if not is_file(path):
        raise UserError(f"{where}: its image {shown(path)} does not exist: add it, or remove the annotation")


def _check_names(names: Sequence[Any], file: Path) -> list[str]:
    """The names of classes, which may be numbers. UserError for anything else."""
    for name in names:
        if not isinstance(name, str | int | float) or not str(name).strip():
            raise UserError(f"{shown(file)}: a class is called {printable(repr(name), 60)}: each must have a name")
    return [str(name) for name in names]


# COCO


def _coco_splits(root: Path) -> dict[str, tuple[Path, Path]]:
    """{split: (file of annotations, folder of images)}."""
    prefix = "instances_"
    files = {p.stem.removeprefix(prefix): p for p in sorted(root.glob(f"annotations/{prefix}*.json"))}
    splits = {name: (file, root / name) for name, file in files.items()}
    return splits or {p.parent.name: (p, p.parent) for p in sorted(root.glob("*/_annotations.coco.json"))}


def _read_coco(root: Path, found: Mapping[str, tuple[Path, Path]], name: str) -> tuple[list[Picture], list[str]]:
    """Classes are the categories by their numbers, which may have holes."""
    file, folder = found[name]
    text = read_text(file)
    try:
        content = json.loads(text)
        categories = {c["id"]: c.get("name", "") for c in content["categories"]}
        records = {image["id"]: image for image in content["images"]}
        annotations = [dict(annotation) for annotation in content["annotations"]]
        order = sorted(categories)
        pictures = {number: Picture(folder / image["file_name"], size=_coco_size(image)) for number, image in records.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        why = printable(repr(e))
        raise UserError(f"{shown(file)} is no COCO file of images, annotations and categories: {why}") from e
    if nameless := [number for number, name in categories.items() if not name]:
        raise UserError(f"{shown(file)}: category {printable(nameless[0], 60)} has no name")
    names = _check_names([categories[number] for number in order], file)
    for picture in pictures.values():
        _check_image(picture.path, shown(file))
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


def _coco_size(record: Mapping[str, Any]) -> tuple[float, float] | None:
    """(h, w) of an image, None where the file does not say it: only boxes need it."""
    try:
        return float(record["height"]), float(record["width"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


# YOLO


def _yolo_splits(root: Path) -> dict[str, list[Path]]:
    """{split: its images}."""
    file = root / "data.yaml"
    if not file.is_file():
        return {}
    content = _yaml(file)
    base = root / str(content.get("path", "."))
    base = base if base.is_dir() else root
    splits = {}
    for name in ("train", *TEST_NAMES):
        if content.get(name):
            folder = base / str(content[name])
            folder = folder if folder.is_dir() else root / str(content[name]).replace("../", "")
            if not folder.is_dir():
                raise UserError(
                    f"{shown(file)}: {name} is {printable(content[name])}, and there is no such folder in {shown(base)}"
                )
            splits[name] = [folder / image for image in list_images(str(folder)).images]
    if not splits:
        raise UserError(f"{shown(file)} names no folder of images: add train: and val:")
    return splits


def _yaml(file: Path) -> dict[str, Any]:
    text = read_text(file)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise UserError(f"{shown(file)} is no valid YAML: {printable(' '.join(str(e).split()))}") from e
    if not isinstance(content, dict) or not isinstance(content.get("names"), list | dict) or not content["names"]:
        raise UserError(f"{shown(file)} must have names: a list of the classes")
    return content


def _read_yolo(root: Path, found: Mapping[str, list[Path]], name: str) -> tuple[list[Picture], list[str]]:
    names = _yaml(root / "data.yaml")["names"]
    if isinstance(names, dict) and sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        raise UserError(f"{shown(root / 'data.yaml')}: the names must be numbered from 0 to {len(names) - 1}, each once")
    named = [name for _, name in sorted(names.items(), key=lambda x: int(x[0]))] if isinstance(names, dict) else names
    names = _check_names(named, root / "data.yaml")
    pictures = []
    for image in found[name]:
        parts = list(image.parts)
        if "images" not in parts:
            raise UserError(f"{shown(image)}: a folder in YOLO's layout has its images below a folder called images")
        i = len(parts) - 1 - parts[::-1].index("images")
        file = Path(*parts[:i], "labels", *parts[i + 1 :]).with_suffix(".txt")
        pictures.append(picture := Picture(image, relative=True))
        lines = read_text(file).split("\n") if file.exists() else ()
        for number, line in enumerate(lines, 1):
            if line.strip():
                _add_yolo_line(picture, line, names, f"{shown(file)}, line {number}")
    return pictures, names


def _add_yolo_line(picture: Picture, line: str, names: list[str], where: str) -> None:
    got = repr(printable(line.strip(), 80))
    try:
        label, *numbers = line.split()
        label, (x, y, w, h) = int(label), map(float, numbers)
    except ValueError:
        expected = "'class center_x center_y width height', parts of the image"
        raise UserError(f"{where}: {got} is not {expected} (polygons are not boxes: export boxes)") from None
    if not 0 <= label < len(names):
        raise UserError(f"{where}: class {label} has no name, data.yaml names {len(names)}")
    if max(x, y, w, h) > 1.01:
        raise UserError(f"{where}: {got} has numbers above 1: they must be parts of the image, not pixels")
    picture.add((x - w / 2, y - h / 2, x + w / 2, y + h / 2), label, (1, 1), where)


# Pascal VOC


def _voc_splits(root: Path) -> dict[str, list[str]]:
    """{split: the names of its images}."""
    if not (root / "Annotations").is_dir():
        return {}
    lists = {p.stem: read_text(p).split() for p in sorted((root / "ImageSets" / "Main").glob("*.txt")) if "_" not in p.stem}
    if not lists:
        raise UserError(
            f"{shown(root)} has Annotations but no ImageSets/Main/train.txt and val.txt with the names of the images"
        )
    return lists


def _read_voc(root: Path, found: Mapping[str, list[str]], name: str) -> tuple[list[Picture], list[str]]:
    """Classes are all that occur in the training images, by the alphabet. VOC counts pixels from 1, the last included."""
    stems, training = found[name], next((found[n] for n in found if n.startswith("train")), found[name])
    trees = {stem: _xml(root / "Annotations" / f"{stem}.xml") for stem in dict.fromkeys([*training, *stems])}
    names = sorted({_text(o, "name", stem) for stem in training for o in trees[stem].iter("object")})
    pictures = []
    for stem in stems:
        file, tree = root / "Annotations" / f"{stem}.xml", trees[stem]
        names_of_image = tree.findtext("filename") or f"{stem}.jpg", f"{stem}.jpg", f"{stem}.png"
        candidates = [root / "JPEGImages" / n for n in names_of_image]
        picture = Picture(next((p for p in candidates if p.is_file()), candidates[0]))
        _check_image(picture.path, shown(file))
        try:
            size = tuple(float(_text(tree, f"size/{side}", shown(file))) for side in ("height", "width"))
        except UserError:
            raise
        except ValueError as e:
            raise UserError(f"{shown(file)}: its size holds something that is no number: {printable(e)}") from e
        picture.size = size
        for number, o in enumerate(tree.iter("object"), 1):
            where = f"{shown(file)}, object {number}"
            label = _text(o, "name", where)
            if label not in names:
                raise UserError(
                    f"{where}: training has no class {printable(label)!r}, only {', '.join(map(printable, names[:10]))}"
                )
            try:
                corners = [float(_text(o, f"bndbox/{side}", where)) for side in ("xmin", "ymin", "xmax", "ymax")]
            except UserError:
                raise
            except ValueError as e:
                raise UserError(f"{where}: its bndbox holds something that is no number: {printable(e)}") from e
            corners = (corners[0] - 1, corners[1] - 1, *corners[2:])
            picture.add(corners, names.index(label), size, where, o.findtext("difficult", "0").strip() == "1")
        pictures.append(picture)
    return pictures, names


def _xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(read_file(file))
    except ElementTree.ParseError as e:
        raise UserError(f"{shown(file)} is no valid XML: {e}") from e
    except UserError as e:
        raise UserError(f"{e}; ImageSets/Main lists it") from e


def _text(element: ElementTree.Element, name: str, where: str) -> str:
    text = element.findtext(name)
    if not text:
        raise UserError(f"{where} has no <{name}>")
    return text.strip()
