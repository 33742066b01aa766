"""Connections of HTTP that cannot hold us for ever, nor lead from a safe place to an unsafe one."""

import contextlib
import http.client
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from vit_jax.errors import UserError, printable

WINDOW, LEAST = 60, 60_000  # a connection that brings fewer bytes in so many seconds is closed


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https, but never from https to what anyone on the way can read and change."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("https", old):
            allowed = "https" if old == "https" else "http or https"
            raise UserError(f"{req.full_url} leads to {printable(newurl)}: from {old} only {allowed} is followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Watch:
    """Closes a connection whose answer does not begin in `seconds`, or that brings fewer than `LEAST` bytes in `WINDOW`.

    A time-out of the socket is for each of its bytes: a server that sends one every 20 seconds would hold us for ever.
    """

    def __init__(self, seconds: float):
        self.has_closed, self._received, self._deadline = False, 0, time.monotonic() + seconds
        self._sockets: list[socket.socket] = []
        self._done = threading.Event()

    def __enter__(self) -> "Watch":
        threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def connect(self, *args: Any, **options: Any) -> socket.socket:
        """A new connection that is watched."""
        connection = socket.create_connection(*args, **options)
        self._sockets.append(connection.dup())  # TLS takes the other one over
        if self.has_closed:  # while it was being made, as nobody watches any more
            connection.close()
            raise TimeoutError("it took too long to connect")
        return connection

    def begin(self) -> None:
        """The head of the answer is there."""
        self._deadline = time.monotonic() + WINDOW

    def receive(self, size: int) -> None:
        """So many more bytes have come."""
        self._received += size
        if self._received >= LEAST:
            self._received, self._deadline = 0, time.monotonic() + WINDOW

    def _run(self) -> None:
        while not self._done.wait(max(0, min(1, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline:
                self.has_closed = True
                break
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                if self.has_closed:
                    connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def open_url(url: str, headers: dict[str, str], watch: Watch, timeout: float) -> http.client.HTTPResponse:
    """The answer to a GET, of which the head has come; `timeout` is for each byte. Errors are those of urllib."""
    opener = urllib.request.build_opener(_Redirects, _Http(watch))
    response = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    watch.begin()
    return response


class _Http(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections that are watched."""

    def __init__(self, watch: Watch):
        super().__init__()
        self._watch = watch

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection(http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection(http.client.HTTPSConnection), req)

    def _connection(self, kind: type[http.client.HTTPConnection]) -> Callable[..., http.client.HTTPConnection]:
        def make(*args: Any, **options: Any) -> http.client.HTTPConnection:
            connection = kind(*args, **options)
            connection._create_connection = self._watch.connect
            return connection

        return make
