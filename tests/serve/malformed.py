"""Requests as broken clients and strangers send them, each of which follows from its number."""

import base64
import json
import random

from tests.fuzz_damage import damage
from tests.serve.models import photo

BOUNDARY = "b0undary"
CRLF = "\r\n"
JSON = {"content-type": "application/json"}
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
VALUES = [None, True, -1, 0, 1e308, 10**30, "", "5", "nan", "\ud800", "/etc/passwd", "file:///etc/passwd", [[]], {}, {"a": 1}]
BY_HAND = [
    (JSON, b""),
    (JSON, b"null"),
    (JSON, b"[" * 100_000),
    (JSON, b'{"images": ' + b"[" * 100_000),
    (JSON, b'{"images": [], "top": ' + b"9" * 10_000 + b"}"),
    (JSON, "{}".encode("utf-16")),
    (JSON, b"\xff\xfe{"),
    (JSON | {"content-length": "-5"}, b"{}"),
    (JSON | {"content-length": "9" * 40}, b"{}"),
    (FORM, b""),
    (FORM, f"--{BOUNDARY}--{CRLF}".encode()),
    ({"content-type": "multipart/form-data"}, b"abc"),
    ({"content-type": "multipart/form-data; boundary="}, b"abc"),
    ({"content-type": "multipart/form-data; boundary=é".encode("latin-1")}, b"abc"),
    ({"content-type": f"multipart/form-data; boundary={'x' * 10_000}"}, b"abc"),
    ({"content-type": f"multipart/form-data; charset=zip; boundary={BOUNDARY}"}, b"abc"),
    ({"content-type": "application/x-www-form-urlencoded"}, b"image=1"),
    ({"content-type": "text/html; charset=\x01"}, b""),
    ({}, photo(0)),
]


def multipart(*parts: tuple[str, bytes]) -> bytes:
    """A body of parts: (what follows the name of its Content-Disposition, content)."""
    bodies = [f"--{BOUNDARY}{CRLF}Content-Disposition: form-data; {head}{CRLF * 2}".encode() + data for head, data in parts]
    return CRLF.encode().join([*bodies, f"--{BOUNDARY}--{CRLF}".encode()])


def request(number: int) -> tuple[dict[str, str | bytes], bytes]:
    """(headers, body) of the request of a number."""
    if number < len(BY_HAND):
        return BY_HAND[number]
    rng = random.Random(number)
    image = photo(number % 7, rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")))
    match rng.randrange(5):
        case 0:  # a damaged image
            return FORM, multipart(('name="image"; filename="a"', damage(image, rng)))
        case 1:  # a damaged body
            return FORM, damage(multipart(('name="image"; filename="ä\x00.png"', image), ('name="top"', b"3")), rng)
        case 2:  # values that are none
            images = [rng.choice([*VALUES, base64.b64encode(image).decode()]) for _ in range(rng.randrange(4))]
            name, value = rng.choice(("images", "top", "threshold", "labels", "x\ud800")), rng.choice(VALUES)
            return JSON, json.dumps({"images": images, name: value}).encode()
        case 3:  # damaged JSON
            return JSON, damage(json.dumps({"images": [base64.b64encode(image).decode()], "top": 3}).encode(), rng)
        case _:  # odd names, fields and contents of parts
            heads = ("name=image", "name", 'filename="a"', 'name="image"; filename=""', 'name="top"; filename="b"', "name=top")
            parts = [(rng.choice(heads), rng.choice((image, b"", b"\xff\xfe", b"5"))) for _ in range(rng.randrange(1, 40))]
            return FORM, multipart(*parts)
