"""What commands share: help that begins with the docstring of a command, options of one meaning, files to be written."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vit_jax.errors import UserError

SHARED: dict[str, dict[str, Any]] = {
    "images": {"nargs": "+", "metavar": "IMAGE_OR_FOLDER", "help": "image files, or folders of them"},
    "source": {"help": "a file or folder, or gs://, https://, hf://OWNER/NAME[@REVISION]"},
    "--model": {"required": True, "metavar": "SOURCE", "help": "a workdir, file, folder, gs://, https:// or hf://"},
    "--model_name": {"help": "architecture of a published .npz, e.g. ViT-B_16"},
    "--size": {"metavar": "H[,W]", "help": "pixels to resize to (default: what the model is made for)"},
    "--batch": {"type": int, "default": 8, "help": "images computed at a time (default 8)"},
    "--tome": {"type": int, "default": 0, "metavar": "R", "help": "tokens that each block merges: faster, less exact"},
    "--vocab": {"metavar": "FILE", "help": "vocabulary of the text tower, where it lies elsewhere than the model"},
    "--json": {"action": "store_true", "help": "one JSON object a line"},
}
"""Options that mean the same in every command that has them."""


def program() -> str:
    """What was typed to start this command: `vit-jax predict` or `python -m vit_jax.predict`."""
    path = Path(sys.argv[0])
    if path.suffix != ".py":
        return path.name
    return f"python -m vit_jax.{path.parent.name if path.stem == '__main__' else path.stem}"


def spelled(doc: str) -> str:
    """A docstring with its command lines indented, and as they are typed here: `vit-jax predict` where that was used."""
    return as_typed(re.sub(r"^ *(?=python -m |vit-jax )", "    ", doc.strip(), flags=re.MULTILINE))


def as_typed(text: str) -> str:
    """A text whose `python -m vit_jax.predict` is `vit-jax predict` where that was used."""
    if not program().startswith("vit-jax"):
        return text
    return re.sub(r"python -m vit_jax\.(\w+)", lambda m: f"vit-jax {m[1].replace('main', 'train').replace('_', '-')}", text)


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help begins with the docstring of the command, its examples included."""
    return argparse.ArgumentParser(
        prog=program(), description=spelled(doc), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Adds options of `SHARED` by their names."""
    for name in names:
        parser.add_argument(name, **SHARED[name])


def output_file(path: str, suffixes: Sequence[str], option: str = "--out") -> Path:
    """The file that an option names, checked before any work; its folder is made. Raises UserError."""
    file = Path(path).expanduser()
    if file.suffix.lower() not in suffixes:
        raise UserError(f"{option}={path} must end with {' or '.join(suffixes)}")
    if file.is_dir():
        raise UserError(f"{option}={path} is a folder: name a file in it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{option}={path}: its folder cannot be made: {e}") from e
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"{option}={path}: nothing can be written in {file.parent}")
    return file


def output_folder(path: str, option: str) -> Path:
    """The folder for pictures that an option names. UserError for a file, or what is named as one."""
    folder = Path(path).expanduser()
    if folder.is_file() or (not folder.is_dir() and folder.suffix.lower() in (".png", ".jpg", ".jpeg")):
        raise UserError(f"{option}={path} must be a folder, to which a picture of each image is written")
    return folder
