"""The web application: the page, predictions, and what those who watch over a server ask for."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from vit_jax.errors import UserError
from vit_jax.files import json_text
from vit_jax.serve import openapi, payload
from vit_jax.serve.payload import Hold, Refused
from vit_jax.serve.service import Service

log = logging.getLogger("vit_jax")

PAGE = Path(__file__).with_name("page.html").read_text()
SAFE = {  # the pages load nothing from elsewhere, and no other page may show them as its own
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
UNREAD = {"Connection": "close"}
"""For a request of which not all was read: what follows on the connection is the rest of it."""


def make_app(service: Service) -> Starlette:
    """The application of a service, which it starts and stops."""
    requests, hold = 0, Hold(service.limits.max_bytes, service.limits.max_held * service.limits.max_bytes)

    async def predict(request: Request) -> Response:
        nonlocal requests
        start = time.monotonic()
        requests += 1
        try:
            with hold.counting() as count:
                response = await _predict(service, request, count, busy=requests > service.limits.queue)
        finally:
            requests -= 1
        service.metrics.request(response.status_code, time.monotonic() - start)
        return response

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.metrics.text(waiting=len(service.batcher)), media_type="text/plain; version=0.0.4")

    async def docs(request: Request) -> Response:
        return HTMLResponse(openapi.page(specification, str(request.base_url)), headers=SAFE)

    specification = openapi.specification(service.describe())
    fixed = {
        "/": HTMLResponse(PAGE, headers=SAFE),
        "/openapi.json": _json(specification),
        "/v1/model": _json(service.describe()),
        "/healthz": _json({"status": "ok"}),
    }
    routes = [Route(path, _always(response)) for path, response in fixed.items()]
    routes += [Route("/docs", docs), Route("/metrics", metrics), Route("/v1/predict", predict, methods=["POST"])]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service:
            yield

    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})


async def _predict(service: Service, request: Request, count: Callable[[int], None], *, busy: bool) -> Response:
    limits = service.limits
    try:
        if busy:
            raise Refused(503, "too many requests at a time: try again in a second")
        late = Refused(408, f"the request did not arrive within {limits.timeout:g} seconds")
        async with _deadline(limits.timeout, late):
            asked = await payload.read(request, count, max_bytes=limits.max_bytes, max_images=limits.queue)
        late = Refused(504, f"there was no answer within {limits.timeout:g} seconds")
        async with _deadline(limits.timeout, late):
            results = await service.answer(asked)
        return _json({"results": results})
    except UserError as e:
        return _json({"error": str(e)}, 400, UNREAD)
    except Refused as e:
        return _json({"error": e.message}, e.status, UNREAD | ({"Retry-After": "1"} if e.status == 503 else {}))
    except ClientDisconnect:
        return _json({"error": "the client has gone"}, 499)  # nginx's number for it: nobody reads this but the counters
    except Exception:
        log.exception("a request failed")
        return _json({"error": "internal error"}, 500, UNREAD)


@contextlib.asynccontextmanager
async def _deadline(seconds: float, late: Refused) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as e:
        raise late from e


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json_text(content) + "\n"
    return Response(text, status, {**(headers or {}), "X-Content-Type-Options": "nosniff"}, "application/json")


def _always(response: Response):
    async def endpoint(request: Request) -> Response:
        return response

    return endpoint


async def _http_error(request: Request, error: HTTPException) -> Response:
    wanted = "POST /v1/predict takes images, GET /docs tells of all addresses"
    return _json({"error": f"{error.detail}: {wanted}"}, error.status_code, dict(error.headers or {}))
