"""Which files below a folder are images: the same for training, evaluation, predict and features."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vit_jax.data.host import decode
from vit_jax.errors import UserError, printable
from vit_jax.files import read_regular

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")
TEXTS = {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html"}  # notes and labels: nobody takes them for photos
# What cameras, file managers and archives leave beside photos, besides hidden files: thumbnails, waste, settings.
NOT_PHOTOS = {
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
}
MOVED = ". Was it moved after the start?"
"""Advice of `read_file` for what was there when it was listed."""


@dataclass
class Listing:
    """The images below a folder, and what was left out."""

    images: list[str] = field(default_factory=list)  # relative to the root, sorted
    left_out: Counter[str] = field(default_factory=Counter)  # by suffix, or in words
    irregular: list[str] = field(default_factory=list)  # named as images, but no files: pipes, devices, broken links

    def add(self, name: str, is_file: bool) -> None:
        """Sorts a file in by its name."""
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in IMAGE_SUFFIXES:
            self.left_out[printable(suffix, 20) or "without a suffix"] += 1
        elif not is_file:
            self.irregular.append(name)
        elif missing := decode.missing_decoder(suffix):
            self.left_out[f"{suffix} ({missing})"] += 1
        else:
            self.images.append(name)

    def report(self, *, texts: bool = True) -> str:
        """'ignored 5 files: 3 .mov, 2 .csv; …', '' where nothing was; without `texts` these do not count."""
        parts, left_out = [], {kind: n for kind, n in self.left_out.items() if texts or kind not in TEXTS}
        if left_out:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(left_out.items(), key=lambda x: (-x[1], x[0])))
            parts.append(f"ignored {sum(left_out.values()):,} files: {kinds}")
        if self.irregular:
            parts.append(
                f"{some([shown(name) for name in sorted(self.irregular)])}: no regular file (a pipe, device or broken link)"
            )
        return "; ".join(parts)


def list_images(root: str, folder: str = "") -> Listing:
    """Lists what is visible below root/folder, by names relative to the root; links are followed, but never in a circle.

    Raises UserError for a folder that cannot be read.
    """
    listing, waiting = Listing(), [(folder, ())]
    while waiting:
        folder, parents = waiting.pop()
        path = os.path.join(root, folder)
        entries = visible(path)
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in parents:
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if is_folder(entry):
                waiting.append((name, (*parents, identity)))
            else:
                listing.add(name, _answer(entry.is_file))
    listing.images.sort(key=lambda name: name.split(os.sep))
    return listing


def folders(path: str) -> list[str]:
    """The sorted names of the visible folders in a folder."""
    return sorted(entry.name for entry in visible(path) if is_folder(entry))


def visible(path: str) -> list[os.DirEntry]:
    """What is in a folder, without hidden files and what is known to be no photo. Raises UserError if it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.name[0] != "." and entry.name.lower() not in NOT_PHOTOS]
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be listed: {error.strerror}") from error


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one."""
    return _answer(entry.is_dir)


def is_file(path: Path) -> bool:
    """Whether a path is that of a file; a name that is too long is none."""
    return _answer(path.is_file)


def _answer(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link that leads to itself, a name that is too long
        return False


def find_images(arguments: Sequence[str]) -> Iterator[Path]:
    """Yields files as they are given, and every image below the given folders; says on stderr what is left out of these.

    Raises UserError for what does not exist, and for a folder without images.
    """
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            listing = list_images(os.fspath(path))
            if not listing.images:
                report = listing.report()
                raise UserError(f"{shown(path)} holds no images ({', '.join(IMAGE_SUFFIXES)}){report and f': {report}'}")
            if report := listing.report(texts=False):
                print(f"{shown(path)}: {report}", file=sys.stderr)
            yield from (path / name for name in listing.images)
        elif os.path.lexists(path):
            yield path
        else:
            raise UserError(f"no such image or folder: {shown(path)}")


def shown(path: str | os.PathLike) -> str:
    """A path as it is printed: whole, with what is no text or not to be seen made visible."""
    return printable(os.fspath(path), 8192)


def some(names: Sequence[str], most: int = 10) -> str:
    """The names in a line, of many only the first."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_file(file: str | os.PathLike, advice: str = "") -> bytes:
    """The content of a regular file.

    Raises errors with its name: UserError with advice where it cannot be opened, ImageError for what is no file, or too large.
    """
    try:
        return read_regular(file)
    except OSError as e:
        raise UserError(f"{shown(file)} cannot be read: {e.strerror}{advice}") from e
    except UserError as e:
        raise decode.ImageError(f"{shown(file)} cannot be read: {e}") from e


def read_text(file: Path) -> str:
    """A text in UTF-8, with or without the mark at its start that spreadsheets leave. UserError for anything else."""
    try:
        return read_file(file).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{shown(file)} is no text in UTF-8: {e}") from e
