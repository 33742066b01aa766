"""What a request holds: images as multipart files or base64 in JSON, and options. Nothing in it is taken for a path."""

import asyncio
import base64
import binascii
import contextlib
import inspect
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from vit_jax.errors import UserError, printable, unknown
from vit_jax.serve.multipart import Body

FIELDS = 64
"""Parts without a file that a multipart request may have: options."""


class Refused(Exception):
    """A request that is not answered: its status and why."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class Asked:
    """Encoded images by name, and options as they were given: texts in multipart, any JSON value in JSON."""

    images: list[tuple[str, bytes]]
    options: dict[str, Any] = field(default_factory=dict)


class Hold:
    """Counts the bytes of requests until they are answered; `most` of a request, and `room` of all."""

    def __init__(self, most: int, room: int):
        self.most, self._room, self._held = most, room, 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that is told of bytes that arrive for one request, and raises Refused if they are too many."""
        own = 0

        def count(arrived: int) -> None:
            nonlocal own
            own += arrived
            self._held += arrived
            if own > self.most:
                raise Refused(413, f"the request has more than {self.most:,} bytes, which are allowed")
            if self._held > self._room:
                raise Refused(503, "too many bytes arrive at a time: try again in a second")

        try:
            yield count
        finally:
            self._held -= own


async def read(request: Request, count: Callable[[int], None], *, max_bytes: int, max_images: int) -> Asked:
    """The content of a request, whose bytes are counted, see `Hold`.

    Raises Refused for one that is too large, UserError for one that is not as it should be.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    readers = {"multipart/form-data": _read_multipart, "application/json": _read_json}
    if kind not in readers:
        raise Refused(415, f"content type {printable(kind)!r}: send multipart/form-data or application/json")
    asked = await readers[kind](request, _limited(request, count, max_bytes), max_images)
    if not asked.images:
        raise UserError("there are no images: send files in the field 'image', or base64 in the list 'images'")
    if len(asked.images) > max_images:
        raise Refused(413, f"the request has {len(asked.images)} images, allowed are {max_images}: send them in parts")
    return asked


async def _limited(request: Request, count: Callable[[int], None], most: int) -> AsyncIterator[bytes]:
    said = request.headers.get("content-length", "0")
    if not said.isdecimal() or int(said[:20]) > most:
        raise Refused(413, f"the request has {printable(said)} bytes, allowed are {most:,}")
    async for chunk in request.stream():
        count(len(chunk))
        yield chunk


async def _read_multipart(request: Request, stream: AsyncIterator[bytes], max_images: int) -> Asked:
    body = Body(request.headers["content-type"], max_images + FIELDS)
    async for piece in stream:
        body.write(piece)
    body.close()
    asked = Asked([])
    for part in body.parts:
        if part.file is not None:
            asked.images.append((part.file, bytes(part.data)))
        elif part.name == "labels":
            asked.options.setdefault(part.name, []).append(part.data.decode(errors="replace"))
        else:
            asked.options[part.name] = part.data.decode(errors="replace")
    return asked


async def _read_json(request: Request, stream: AsyncIterator[bytes], max_images: int) -> Asked:
    body = b"".join([chunk async for chunk in stream])
    return await asyncio.to_thread(_parse_json, body)  # megabytes of base64 must not hold up the others


def _parse_json(body: bytes) -> Asked:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise UserError(f"the request is no JSON: {printable(e)}") from e
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError('the request must be an object with a list of images: {"images": ["base64", …]}')
    images = [(str(i), _from_base64(text, i)) for i, text in enumerate(content.pop("images"))]
    return Asked(images, content)


def _from_base64(text: Any, index: int) -> bytes:
    if not isinstance(text, str):
        raise UserError(f"image {index} must be a text in base64, not {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as e:
        raise UserError(f"image {index} is no base64: {e}; paths, addresses and data: are not read") from e


def options(given: Mapping[str, Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """What was given of the options that there are, as numbers, true or false, and lists of texts.

    Args:
      offered: default values by name, which tell the kind: 5, 0.5, False, ().

    Raises:
      UserError: for others, and for values of another kind or beyond their range.
    """
    for name in given:
        if name not in offered:
            raise unknown("option", printable(name), offered) if offered else UserError(f"unknown option {printable(name)!r}")
    return {name: _READERS[type(offered[name])](name, value) for name, value in given.items()}


def known(signature: inspect.Signature) -> dict[str, Any]:
    """The options of a `Task.show` by their default values, as far as they can be given here."""
    given = {name: parameter.default for name, parameter in list(signature.parameters.items())[2:]}
    return {name: default for name, default in given.items() if type(default) in _READERS}


def _whole(name: str, value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 9 else value
    if type(number) is not int or not 1 <= number <= 10**8:
        raise UserError(f"{name}={printable(value)} must be a whole number, at least 1")
    return number


def _part(name: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        number = -1.0
    if not 0 <= number <= 1:
        raise UserError(f"{name}={printable(value)} must be a number from 0 to 1")
    return number


def _truth(name: str, value: Any) -> bool:
    truths = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in truths):
        return value if isinstance(value, bool) else truths[value.lower()]
    raise UserError(f"{name}={printable(value)} must be true or false")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{name} must be a list of texts")
    return tuple(value)


_READERS = {int: _whole, float: _part, bool: _truth, tuple: _texts}
