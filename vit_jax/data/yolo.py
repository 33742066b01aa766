"""Boxes in YOLO's text files, as Ultralytics, Roboflow, CVAT and Label Studio lay them out."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from vit_jax.data.boxes import Picture, Read, check_names
from vit_jax.data.listing import is_file, list_images, read_text, shown
from vit_jax.data.splits import TEST_NAMES
from vit_jax.errors import UserError, printable

CLASSES = "classes.txt"
"""The names of the classes where no YAML file tells them: one a line."""


def splits(root: Path) -> dict[str, Read]:
    """What reads each split: those of data.yaml, or of another YAML file that names classes and images.

    Or `images`, `labels` and classes.txt, all of it for training. Raises UserError for images that are not there.
    """
    file = _description(root)
    if file is None:
        file = root / CLASSES
        if not is_file(file) or not any((root / "labels").rglob("*.txt")):
            return {}
        content = {"names": [line.strip() for line in read_text(file).splitlines() if line.strip()]}
        return {"train": partial(_read, [root / "images"], file, content)}
    content = _yaml(file)
    base = root / str(content.get("path", "."))
    base = base if base.is_dir() else root
    found = {}
    for name in ("train", *TEST_NAMES):
        if entries := content.get(name):
            entries = entries if isinstance(entries, list) else [entries]
            found[name] = partial(_read, [_place(file, name, str(entry), base) for entry in entries], file, content)
    if not found:
        raise UserError(f"{shown(file)} names no folder of images: add train: and val:")
    return found


def _description(root: Path) -> Path | None:
    """The YAML file that names classes and images, which is mostly called data.yaml."""
    if (root / "data.yaml").is_file():
        return root / "data.yaml"
    files = (file for file in sorted(root.glob("*.y*ml")) if is_file(file))
    return next((file for file in files if _names_classes(file)), None)


def _names_classes(file: Path) -> bool:
    try:
        text = read_text(file)
    except UserError:
        return False
    return all(re.search(rf"^{key}:", text, re.MULTILINE) for key in ("names", "(train|val)"))


def _yaml(file: Path) -> dict[str, Any]:
    text = read_text(file)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise UserError(f"{shown(file)} is no valid YAML: {printable(' '.join(str(e).split()))}") from e
    if not isinstance(content, dict) or not isinstance(content.get("names"), list | dict) or not content["names"]:
        raise UserError(f"{shown(file)} must have names: a list of the classes")
    return content


def _place(file: Path, name: str, entry: str, base: Path) -> Path:
    """A folder of images, or a text file that lists them. Roboflow's paths lead out of its folder, and mean it all the same."""
    for place in (base / entry, file.parent / entry.replace("../", "")):
        if place.is_dir() or place.suffix == ".txt" and is_file(place):
            return place
    raise UserError(
        f"{shown(file)}: {name} is {printable(entry)}, and there is no such folder, nor list of images, in {shown(base)}"
    )


def _read(places: list[Path], file: Path, content: Mapping[str, Any]) -> tuple[list[Picture], list[str]]:
    """The images of folders and lists, and the classes in the `content` of a file. An image without a text has no boxes."""
    names, poses = _class_names(file, content["names"]), "kpt_shape" in content
    pictures = []
    for image in (image for place in places for image in _images(place, file.parent)):
        parts = list(image.parts)
        if "images" not in parts:
            raise UserError(f"{shown(image)}: a folder in YOLO's layout has its images below a folder called images")
        i = len(parts) - 1 - parts[::-1].index("images")
        labels = Path(*parts[:i], "labels", *parts[i + 1 :]).with_suffix(".txt")
        pictures.append(picture := Picture(image, relative=True))
        lines = read_text(labels).split("\n") if labels.exists() else ()
        for number, line in enumerate(lines, 1):
            if line.strip():
                _add_line(picture, line, names, poses, f"{shown(labels)}, line {number}", file.name)
    return pictures, names


def _images(place: Path, root: Path) -> list[Path]:
    """Those of a folder, or in a list, whose paths begin at the list or the root. UserError for one that is missing."""
    if place.is_dir():
        return [place / image for image in list_images(str(place)).images]
    images = []
    for number, line in enumerate(read_text(place).splitlines(), 1):
        if name := line.strip():
            from_top = name.removeprefix("data/")  # as CVAT writes them
            candidates = (place.parent / name, root / name, root / from_top)
            image = next((path for path in candidates if is_file(path)), None)
            if image is None:
                raise UserError(
                    f"{shown(place)}, line {number}: there is no image {printable(name)}: add it, or remove the line"
                )
            images.append(image)
    return images


def _class_names(file: Path, names: Sequence[Any] | Mapping[Any, Any]) -> list[str]:
    """The names in the order of their numbers."""
    if isinstance(names, dict) and sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        raise UserError(f"{shown(file)}: the names must be numbered from 0 to {len(names) - 1}, each once")
    named = [name for _, name in sorted(names.items(), key=lambda x: int(x[0]))] if isinstance(names, dict) else names
    return check_names(named, file)


def _add_line(picture: Picture, line: str, names: list[str], poses: bool, where: str, names_file: str) -> None:
    """Adds the box of a line; of a polygon that which encloses it, as Ultralytics does. Of `poses` points follow the box."""
    got = repr(printable(line.strip(), 80))
    try:
        label, *numbers = line.split()
        label, numbers = int(label), [float(x) for x in (numbers[:4] if poses else numbers)]
    except ValueError:
        numbers = []
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        expected = "'class center_x center_y width height', nor 'class x1 y1 x2 y2 x3 y3 …', all parts of the image"
        raise UserError(f"{where}: {got} is not {expected}")
    if not 0 <= label < len(names):
        raise UserError(f"{where}: class {label} has no name, {names_file} names {len(names)}")
    if max(numbers) > 1.01:
        raise UserError(f"{where}: {got} has numbers above 1: they must be parts of the image, not pixels")
    if len(numbers) == 4:
        x, y, w, h = numbers
        corners = x - w / 2, y - h / 2, x + w / 2, y + h / 2
    else:
        xs, ys = numbers[::2], numbers[1::2]
        corners = min(xs), min(ys), max(xs), max(ys)
    picture.add(corners, label, (1, 1), where)
