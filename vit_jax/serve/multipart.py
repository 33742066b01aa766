"""Multipart bodies, in memory: nothing of a request is written to the disk, and one that is cut off is refused."""

from dataclasses import dataclass, field

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from vit_jax.errors import UserError, printable


@dataclass
class Part:
    """A field of a form: `file` is its file's name, None where it is no file."""

    name: str = ""
    file: str | None = None
    data: bytearray = field(default_factory=bytearray)
    header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))


class Body:
    """A body that is written in pieces, with at most so many parts. UserError for one that is not as it should be."""

    def __init__(self, content_type: str, most: int):
        self.parts: list[Part] = []
        self._most, self._complete = most, False
        _, options = parse_options_header(content_type)
        if not options.get(b"boundary"):
            raise UserError("the multipart request names no boundary in its Content-Type")
        callbacks = {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self.parts[-1].header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self.parts[-1].header[1].extend(data[start:end]),
            "on_header_end": self._header,
            "on_part_data": lambda data, start, end: self.parts[-1].data.extend(data[start:end]),
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(options[b"boundary"], callbacks)
        except FormParserError as e:
            raise UserError(f"the multipart request is damaged: {printable(e)}") from e

    def write(self, piece: bytes) -> None:
        """The next bytes."""
        try:
            self._parser.write(piece)
        except FormParserError as e:
            raise UserError(f"the multipart request is damaged: {printable(e)}") from e

    def close(self) -> None:
        """All is written: `parts` are complete."""
        if not self._complete:
            raise UserError("the multipart request is cut off: its last boundary is missing")
        if any(not part.name for part in self.parts):
            raise UserError("the multipart request has a part without a name in its Content-Disposition")

    def _begin(self) -> None:
        if len(self.parts) == self._most:
            raise UserError(f"the multipart request has too many parts, allowed are {self._most}")
        self.parts.append(Part())

    def _header(self) -> None:
        part = self.parts[-1]
        name, value = (bytes(x) for x in part.header)
        if name.lower() == b"content-disposition":
            _, options = parse_options_header(value)
            part.name = options.get(b"name", b"").decode(errors="replace")
            part.file = options[b"filename"].decode(errors="replace") if b"filename" in options else None
        part.header = (bytearray(), bytearray())

    def _end(self) -> None:
        self._complete = True
