"""Lists in files: JSON lines, and tables of text with the names of their columns in the first line."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vit_jax.data.listing import read_text, shown
from vit_jax.errors import UserError


def rows_of(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it stands, fields by name) of every row of a .jsonl, .csv or .tsv. UserError for what is none."""
    for number, row in _json_rows(file) if file.suffix == ".jsonl" else _csv_rows(file):
        yield f"{shown(file)}, line {number}", row


def text_of(file: Path) -> str:
    """A text in UTF-8 whose lines end by a line feed, whatever system wrote it."""
    return read_text(file).replace("\r\n", "\n")


def _json_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number of the line, object) of every line that is not empty."""
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{shown(file)}, line {number} is no JSON: {e}") from e
        if not isinstance(row, dict):
            raise UserError(f'{shown(file)}, line {number} must be an object such as {{"image": "a.jpg", "text": "a cat"}}')
        yield number, row


def _csv_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number of its last line, fields by the names in the first line) of every row."""
    reader = csv.DictReader(io.StringIO(text_of(file)), delimiter="\t" if file.suffix == ".tsv" else ",")
    try:
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as e:
        raise UserError(f"{shown(file)}, line {reader.line_num}: {e}") from e
