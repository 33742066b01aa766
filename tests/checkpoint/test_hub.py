"""Files arrive whole or not at all, from servers that are kind, broken, lying or away; all of them on 127.0.0.1."""

import base64
import concurrent.futures
import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import itertools
import json
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils
import numpy as np
import pytest
import safetensors.numpy

from vit_jax.checkpoint import connection, hub, readers
from vit_jax.errors import UserError


def archive(size, seed=0):
    """An archive of so many bytes: what comes is kept only if it has the form of what its name promises."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as f:
        f.writestr(zipfile.ZipInfo("x.npy"), np.random.default_rng(seed).bytes(size - 108))
    return out.getvalue()


CONTENT = archive(300_000)
SHA = "0123456789abcdef0123456789abcdef01234567"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; its other fields make it worse than it could be."""

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.files = {"/bucket/model.npz": CONTENT}
        self.etag = '"one"'
        self.modified = None
        self.knows_ranges = self.knows_if_range = True
        self.cuts = []  # how many bytes of each of the next answers get through
        self.statuses = []  # what the next requests are answered instead
        self.resets = False  # whether a cut is a reset rather than a polite end
        self.claimed = None  # a Content-Length that is not true
        self.headers = {}
        self.gate = threading.Event()  # no answer before it is set
        self.gate.set()
        self.asked = []  # the Range of each request
        self.starts = []  # where each answer with content began

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        site, wanted = self.server, self.headers.get("Range")
        site.asked.append(wanted)
        site.gate.wait(20)
        if site.statuses:
            return self.send_error(site.statuses.pop(0))
        content = site.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = 0
        if wanted and site.knows_ranges:
            strong = {site.modified if site.etag is None or site.etag.startswith("W/") else site.etag}
            if not site.knows_if_range or self.headers["If-Range"] in strong - {None}:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        site.starts.append(start)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if site.claimed != "none":
            self.send_header("Content-Length", str(site.claimed or len(content) - start))
        for name, value in (("ETag", site.etag), ("Last-Modified", site.modified), *site.headers.items()):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if not site.cuts:
            return self.wfile.write(content[start:])
        self.wfile.write(content[start : start + site.cuts.pop(0)])
        if site.resets:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, no proxy between us and 127.0.0.1, and no waiting."""
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hub, "_PAUSE", 0)
    return tmp_path / "cache"


@pytest.fixture
def site():
    with running(Server()) as server:
        yield server


def fetched(site, path="/bucket/model.npz"):
    return hub.fetch(site.url + path)


def place(cache, site, path="bucket/model.npz"):
    return cache / f"127.0.0.1:{site.server_port}" / path


def left(folder):
    """The names in a folder but for the lock."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


def refused(source, *parts):
    with pytest.raises(UserError) as error:
        hub.fetch(source)
    for part in parts:
        assert str(part) in str(error.value)


def test_local_paths_come_back_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.fetch("~/a/b.npz") == tmp_path / "a" / "b.npz"
    assert hub.fetch(tmp_path) == hub.fetch(str(tmp_path)) == tmp_path
    assert hub.fetch("models/x.npz") == Path("models/x.npz")


def test_a_file_is_downloaded_once_and_then_used_without_the_network(cache, site, capfd):
    path = fetched(site)
    assert path == place(cache, site) and path.read_bytes() == CONTENT and site.asked == [None]
    assert left(path.parent) == ["model.npz"]
    site.shutdown()
    site.server_close()
    assert fetched(site) == path and hub.fetch(Path(site.url + "/bucket/model.npz")) == path
    assert capfd.readouterr().err == ""  # the progress bar is for terminals


def test_a_bucket_is_read_as_plain_https(cache):
    path = cache / "storage.googleapis.com" / "vit_models" / "augreg" / "a b#1.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    for source in ("gs://vit_models/augreg/a b#1.npz", Path("gs://vit_models/augreg/a b#1.npz")):
        assert hub.fetch(source) == path
    assert hub.fetch("HTTPS://storage.googleapis.com/vit_models/augreg/a%20b%231.npz") == path


def test_the_default_cache_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("VIT_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".cache" / "vit_jax" / "example.org" / "x.npz"
    path.parent.mkdir(parents=True)
    path.touch()
    assert hub.fetch("https://example.org/x.npz") == path


def test_query_strings_are_different_files_of_the_same_name(site):
    contents = [archive(200 + i) for i in range(3)]
    site.files |= dict(zip(("/x.npz", "/x.npz?v=1", "/x.npz?v=2"), contents, strict=True))
    paths = [fetched(site, path) for path in ("/x.npz", "/x.npz?v=1", "/x.npz?v=2")]
    assert [path.read_bytes() for path in paths] == contents
    assert {path.name for path in paths} == {"x.npz"}


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_cut_connection_is_taken_up_again(site, knows_ranges):
    site.knows_ranges, site.cuts = knows_ranges, [100_000, 50_000]
    assert fetched(site).read_bytes() == CONTENT
    assert site.asked == [None, "bytes=100000-", "bytes=150000-" if knows_ranges else "bytes=50000-"]


def test_many_cuts_are_survived_as_long_as_each_brings_something(site):
    site.cuts = [20_000] * 14
    assert fetched(site).read_bytes() == CONTENT and len(site.asked) == 15


def test_a_reset_connection_is_taken_up_again(site):
    site.cuts, site.resets = [100_000, 50_000], True
    assert fetched(site).read_bytes() == CONTENT and len(site.asked) == 3


@pytest.mark.parametrize("validator", ["etag", "modified"])
def test_a_later_call_continues_the_part(cache, site, monkeypatch, validator):
    site.etag, site.modified = ('"one"', None) if validator == "etag" else ('W/"weak"', "Sat, 01 Aug 2026 00:00:00 GMT")
    site.cuts, site.statuses = [100_000], []
    with monkeypatch.context() as patch:
        patch.setattr(hub, "_pause", lambda _: site.statuses.append(503))  # after the cut the server goes down
        refused(site.url + "/bucket/model.npz", "503 Service Unavailable", place(cache, site), "continues the 100,000 bytes")
    assert left(place(cache, site).parent) == ["model.npz.part", "model.npz.part.json"]
    site.asked.clear()
    assert fetched(site).read_bytes() == CONTENT and site.asked == ["bytes=100000-"] and site.starts == [0, 100_000]
    assert left(place(cache, site).parent) == ["model.npz"]


@pytest.mark.parametrize("knows_if_range", [True, False])
@pytest.mark.parametrize("size", [300_000, 200_000, 50_000])
def test_a_file_that_changed_between_the_parts_is_not_glued(site, monkeypatch, knows_if_range, size):
    other = archive(size, seed=1)

    def change(_):
        site.files["/bucket/model.npz"], site.etag = other, '"two"'

    monkeypatch.setattr(hub, "_pause", change)
    site.knows_if_range, site.cuts = knows_if_range, [100_000]
    assert fetched(site).read_bytes() == other
    assert site.asked[:2] == [None, "bytes=100000-"]


def test_a_part_of_which_nothing_is_known_starts_over(cache, site):
    for facts in (None, "", "[]", '{"size": 3}', '{"size": 300000, "md5": null, "validator": null}'):
        path = place(cache, site)
        shutil.rmtree(cache, ignore_errors=True)
        path.parent.mkdir(parents=True)
        path.with_name("model.npz.part").write_bytes(b"x" * 1000)
        if facts is not None:
            path.with_name("model.npz.part.json").write_text(facts)
        assert fetched(site).read_bytes() == CONTENT
    assert set(site.asked) == {None}


def test_a_server_without_validators_starts_over(site):
    site.etag, site.cuts = None, [100_000]
    assert fetched(site).read_bytes() == CONTENT and site.asked == [None, None]
    site.files["/x.npz"], site.cuts = CONTENT, [100_000] * 9
    with pytest.raises(UserError, match="promised 300,.* and 100,000 came") as error:
        fetched(site, "/x.npz")
    assert "continues" not in str(error.value)


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_server_that_promises_more_than_it_has_is_found_out(cache, site, knows_ranges):
    site.claimed, site.knows_ranges = 400_000, knows_ranges
    refused(site.url + "/bucket/model.npz", "promised 400,000 bytes and 300,000 came", place(cache, site), "4 attempts")
    assert not place(cache, site).exists() and len(site.asked) <= 8


def test_a_server_that_promises_less_than_it_has_is_found_out_by_the_sum(cache, site):
    site.claimed, site.headers = 200_000, {"Content-MD5": base64.b64encode(hashlib.md5(CONTENT).digest()).decode()}
    promised, came = (hashlib.md5(x).hexdigest() for x in (CONTENT, CONTENT[:200_000]))
    refused(site.url + "/bucket/model.npz", f"MD5 {came}, the server promised {promised}", place(cache, site))
    assert not any(name.endswith((".npz", ".part")) for name in left(place(cache, site).parent))
    site.claimed = None
    assert fetched(site).read_bytes() == CONTENT


def test_the_sum_of_a_bucket_is_checked_over_all_parts(site):
    md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    site.cuts, site.headers = [100_000], {"x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"}
    assert fetched(site).read_bytes() == CONTENT and site.asked == [None, "bytes=100000-"]
    site.headers = {"x-goog-hash": "md5=" + base64.b64encode(bytes(16)).decode()}
    site.files["/other.npz"] = CONTENT
    refused(site.url + "/other.npz", "the server promised " + "0" * 32)
    site.headers["x-goog-stored-content-encoding"] = "gzip"  # then the sum is not that of what is sent
    assert fetched(site, "/other.npz").read_bytes() == CONTENT


def test_a_server_that_tells_no_length_is_believed(site):
    site.claimed = "none"
    assert fetched(site).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "body", "headers", "said"),
    [
        ("x.npz", b"", {}, "what came is empty"),
        ("x.npz", b"\n <!DOCTYPE html><p>Sign in", {}, "what came is a page of the web of 27 bytes"),
        ("index.csv", b"<html>", {}, "what came is a page of the web"),
        ("x.npz", b"{}" * 50, {}, "what came is no .npz (100 bytes, which start with 7b 7d"),
        ("x.npz", CONTENT[:1000], {}, "what came is no .npz"),
        ("x.pth", b"version https://git-lfs", {}, "what came is no file of torch"),
        ("x.safetensors", b"version https://git-lfs", {}, "what came is no .safetensors"),
        ("x.npz", gzip.compress(CONTENT, mtime=0), {"Content-Encoding": "gzip"}, "sends the file packed (gzip), unasked"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_is_no_checkpoint_is_thrown_away(cache, site, name, body, headers, said):
    site.files[f"/{name}"], site.headers = body, headers
    refused(f"{site.url}/{name}", said, f"put it here:\n  {place(cache, site, name)}")
    assert len(site.asked) == 1 and left(place(cache, site, name).parent) == []


def test_files_of_every_kind_are_kept(site):
    site.files |= {"/x.safetensors": WEIGHTS, "/x.pth": CONTENT, "/index.csv": b"ds,filename", "/x.json": b"{}"}
    for name, content in site.files.items():
        assert fetched(site, name).read_bytes() == content


class Socket:
    """A server of one answer: bytes, with a pause after each of the pieces; it goes on for ever if the last is `...`."""

    def __init__(self, *pieces, pause=0.0):
        self.pieces, self.pause = pieces, pause

    @contextlib.contextmanager
    def running(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"

    def _serve(self, listener):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with contextlib.suppress(OSError), connection:
            connection.recv(10_000)
            for piece, following in itertools.pairwise((*self.pieces, None)):
                while piece is not ...:
                    connection.sendall(piece)
                    time.sleep(self.pause)
                    if following is not ...:
                        break


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ((HEAD, b"X-A: a\r\n", ...), "no whole answer came in time"),
        ((HEAD + b"X-A: ", b"a", ...), "no whole answer came in time"),
        ((HEAD + b"Content-Length: 1000000\r\n\r\n", b"a", ...), "fewer than 1,000 bytes came in 0.2 seconds"),
        ((HEAD + b"\r\n", b"a", ...), "fewer than 1,000 bytes came in 0.2 seconds"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1", ...), "fewer than 1,000 bytes came in 0.2 seconds"),
    ],
    ids=["heads", "a head", "a body", "a body without length", "the length of a chunk"],
)
def test_bytes_that_trickle_in_do_not_hold_us_for_ever(monkeypatch, pieces, said):
    monkeypatch.setattr(hub, "_HEAD", 0.3 if "answer" in said else 30)
    monkeypatch.setattr(hub, "_TRIES", 2)
    monkeypatch.setattr(connection, "WINDOW", 0.2)
    monkeypatch.setattr(connection, "LEAST", 1000)
    with Socket(*pieces, pause=0.02).running() as url:
        refused(f"{url}/x.npz", said, "2 attempts")


def test_a_connection_that_comes_too_late_is_not_waited_for(monkeypatch):
    """Nobody would watch it, however slowly its answer trickles in."""
    connect = socket.create_connection

    def slowly(*args, **options):
        time.sleep(0.3)
        return connect(*args, **options)

    monkeypatch.setattr(hub, "_HEAD", 0.1)
    monkeypatch.setattr(hub, "_TRIES", 2)
    monkeypatch.setattr(socket, "create_connection", slowly)
    with Socket(HEAD + b"X-A: ", b"a", ..., pause=0.02).running() as url:
        refused(f"{url}/x.npz", "no whole answer came in time", "2 attempts")


def test_a_body_without_end_is_given_up_and_thrown_away(cache, monkeypatch):
    monkeypatch.setattr(hub, "_MOST", 1 << 20)
    with Socket(HEAD + b"\r\n", bytes(1 << 16), ...).running() as url:
        refused(f"{url}/x.npz", "tells no length and does not end after 1,048,576 bytes")
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", "answered 204 No Content, and no file"),
        (b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 5-9/10\r\nContent-Length: 5\r\n\r\n56789", "it sent another part"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 5\r\n\r\n56789", "it sent another part (no Content-Range)"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "the connection broke"),
        (b"HTTP/1.1 404 \x1b[2Jgone\r\n\r\n", r"answered 404 \x1b[2Jgone (no such file"),
        (b"SSH-2.0-OpenSSH\r\n", "the answer is no HTTP, it begins with SSH-2.0-OpenSSH"),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1/x.npz\r\n\r\n", "from http only http or https is followed"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
            "do not follow: Found - Redirection to url 'file:///etc/",
        ),
        (b"HTTP/1.1 302 Found\r\nLocation: /x.npz\r\n\r\n", "leads round in a circle, or where we do not follow"),
    ],
    ids=lambda x: repr(x)[:40],
)
def test_answers_without_the_file_are_refused(answer, said):
    with Socket(answer).running() as url:
        refused(f"{url}/x.npz", url, said)


def test_what_is_asked_for_safely_is_not_followed_elsewhere():
    redirects = connection._Redirects()
    request = urllib.request.Request("https://example.org/x.npz")
    for place in ("http://example.org/x.npz", "ftp://example.org/x.npz", "file:///x.npz"):
        with pytest.raises(UserError, match="from https only https is followed"):
            redirects.redirect_request(request, None, 302, "Found", {}, place)
    followed = redirects.redirect_request(request, None, 302, "Found", {}, "https://cdn.example.org/x.npz")
    assert followed.full_url == "https://cdn.example.org/x.npz"


def test_a_part_is_not_continued_by_an_answer_without_a_validator(cache, site, monkeypatch):
    """It may be of another version: right in length, wrong in content."""
    other = archive(300_000, seed=1)

    def change(_):
        site.files["/bucket/model.npz"], site.etag = other, None

    monkeypatch.setattr(hub, "_pause", change)
    site.knows_if_range, site.cuts = False, [100_000]
    assert fetched(site).read_bytes() == other and site.asked == [None, "bytes=100000-", None]


def test_an_address_that_a_file_names_is_used_from_the_cache_alone(cache, site):
    url = site.url + "/bucket/model.npz"
    with pytest.raises(UserError, match="is not in the cache, and is not fetched unasked") as error:
        hub.fetch(url, online=False)
    assert f"python -m vit_jax.inspect {url}" in str(error.value) and site.asked == []
    assert hub.fetch(hub.fetch(url), online=False) == hub.fetch(url, online=False) == place(cache, site)


@pytest.mark.parametrize(("status", "said"), [(404, "check the name"), (403, "not public, or no such file"), (410, "refused")])
def test_a_refusal_is_final_and_says_where_to_put_the_file(cache, site, status, said):
    site.statuses = [status] * 2
    refused(site.url + "/bucket/model.npz", f"answered {status}", said, f"put it here:\n  {place(cache, site)}")
    assert len(site.asked) == 1 and left(place(cache, site).parent) == []


def test_a_busy_server_is_asked_again_but_not_for_ever(cache, site):
    site.statuses = [503, 500, 429]
    assert fetched(site).read_bytes() == CONTENT and len(site.asked) == 4
    site.files["/other.npz"], site.statuses = CONTENT, [503] * 9
    refused(site.url + "/other.npz", "answered 503", "4 attempts", place(cache, site, "other.npz"))
    assert len(site.statuses) == 5


def test_without_a_network_the_file_can_be_put_there_by_hand(cache, site):
    site.shutdown()
    site.server_close()
    path = place(cache, site)
    refused(site.url + "/bucket/model.npz", site.url, "Connection refused", "4 attempts", f"put it here:\n  {path}")
    path.write_bytes(CONTENT)
    assert fetched(site) == path


def test_a_silent_server_does_not_hold_us_for_ever(monkeypatch):
    monkeypatch.setattr(hub, "_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts and says nothing
        refused(f"http://127.0.0.1:{listener.getsockname()[1]}/x.npz", "timed out", "4 attempts")


def test_a_full_disk_is_said_before_and_while_it_fills(cache, site, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
        refused(site.url + "/bucket/model.npz", "no room", "1,000 bytes free", "300,000 bytes are needed", "VIT_JAX_CACHE")
    with monkeypatch.context() as patch:

        def fsync(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(hub.os, "fsync", fsync)
        refused(site.url + "/bucket/model.npz", "no room", "No space left on device", "VIT_JAX_CACHE")
    assert not place(cache, site).exists()
    assert fetched(site).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_is_named(tmp_path, monkeypatch, site):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "file"))
    refused(site.url + "/bucket/model.npz", tmp_path / "file", "cannot be kept", "Set VIT_JAX_CACHE to another folder")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://example.org/../../etc/x.npz", "without '..'"),
        ("https://example.org/%2e%2e/x.npz", "without '..'"),
        ("https://example.org/a%2fb.npz", "names no file"),
        ("https://example.org/a/..%5cb.npz", "names no file"),
        ("https://example.org/a/%00.npz", "names no file"),
        ("https://../x.npz", "names no file"),
        ("gs://bucket/../x.npz", "without '..'"),
        ("gs://bucket/a//b.npz", "'//'"),
        ("https://example.org/a/", "names no file"),
        ("https://example.org", "names no file"),
        ("https://example.org:port/x.npz", "no valid address"),
        ("https://me:secret@example.org/x.npz", "holds a user name"),
        (f"https://example.org/{'x' * 300}.npz", "a name of more than 200 bytes"),
        ("s3://bucket/x.npz", "gs://, https://, http:// or hf://"),
        ("ftp://example.org/x.npz", "gs://, https://, http:// or hf://"),
        ("hf://owner", "use hf://OWNER/NAME"),
        ("hf://owner/name/../x.npz", "use hf://OWNER/NAME"),
        ("hf://owner/name@../../x", "use hf://OWNER/NAME"),
        ("hf://owner/name@a@b", "use hf://OWNER/NAME"),
        ("hf://../name", "use hf://OWNER/NAME"),
    ],
)
def test_addresses_that_name_no_file_or_lead_elsewhere_are_refused(cache, source, said):
    refused(source, said)
    assert not cache.exists()
    with pytest.raises(UserError) as error:
        hub.fetch(source)
    assert "secret" not in str(error.value)


def test_fetches_at_once_do_not_meet(site, caplog):
    """A lock of flock keeps threads apart just as it does processes."""
    caplog.set_level(logging.INFO, "vit_jax")
    site.gate.clear()
    site.cuts = [50_000, 70_000]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = [pool.submit(fetched, site) for _ in range(4)]
        while caplog.text.count("another process is downloading model.npz") < 3:
            concurrent.futures.wait(results, timeout=0.01)
        site.gate.set()
        assert all(result.result(timeout=20).read_bytes() == CONTENT for result in results)
    assert site.asked == [None, "bytes=50000-", "bytes=120000-"]


# The Hugging Face hub: a cache in its own layout, and a server that answers as the hub does.


@pytest.fixture
def hf_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hf"


def cached_repository(hf_cache, files, revision="main"):
    """Writes the layout of huggingface_hub: blobs, snapshots of links to them, refs."""
    repository = hf_cache / "models--owner--name"
    snapshot = repository / "snapshots" / SHA
    for name, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    ref = repository / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(SHA)
    return snapshot


WEIGHTS = safetensors.numpy.save({"x": np.arange(3.0)})


def test_a_repository_in_the_cache_is_used_offline(hf_cache):
    snapshot = cached_repository(hf_cache, {"model.safetensors": WEIGHTS, "config.json": b"{}"})
    assert hub.fetch("hf://owner/name") == hub.fetch(Path("hf://owner/name")) == hub.fetch(f"hf://owner/name@{SHA}") == snapshot
    assert hub.fetch("hf://owner/name/model.safetensors") == snapshot / "model.safetensors"
    np.testing.assert_array_equal(readers.read(hub.fetch("hf://owner/name"))["x"], np.arange(3.0))


def test_revisions_and_files_in_folders_are_found(hf_cache):
    snapshot = cached_repository(hf_cache, {"sub/x.npz": b"1", "sub/config.json": b"{}"}, revision="refs/pr/1")
    assert hub.fetch("hf://owner/name/sub/x.npz@refs/pr/1") == snapshot / "sub" / "x.npz"
    refused("hf://owner/name/sub/x.npz", "could not be fetched", "hf download owner/name --local-dir FOLDER")


def test_a_repository_that_a_file_names_is_used_from_the_cache_alone(hf_site):
    hf_site.files = {"model.safetensors": WEIGHTS}
    for address in ("hf://owner/name", "hf://owner/name/model.safetensors"):
        with pytest.raises(UserError, match="is not fetched unasked"):
            hub.fetch(address, online=False)
    assert hf_site.served == set()
    assert hub.fetch("hf://owner/name") == hub.fetch("hf://owner/name", online=False)


def test_what_is_not_in_the_cache_says_how_to_get_it(hf_cache):
    refused("hf://owner/name@v1", "HF_HUB_OFFLINE", "hf download owner/name --revision v1 --local-dir FOLDER")
    snapshot = cached_repository(hf_cache, {"config.json": b"{}", "tf_model.h5": b"1"})
    refused("hf://owner/name", "holds no weights", "*.safetensors", snapshot, "hf://owner/name/FILE")
    refused("hf://owner/name/model.npz", "no file model.npz", "https://huggingface.co/owner/name/tree/main")


def test_the_environment_of_the_hub_is_respected(tmp_path):
    snapshot = cached_repository(tmp_path / "hub", {"model.safetensors": WEIGHTS})
    code = "from vit_jax.checkpoint import hub; print(hub.fetch('hf://owner/name'))"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in environment.items() if k not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(snapshot)


def test_without_the_package_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("hf://owner/name", "pip install huggingface_hub")


class HubHandler(http.server.BaseHTTPRequestHandler):
    """The three calls of the hub that a snapshot needs; `server.error` answers all of them instead."""

    def do_HEAD(self):  # noqa: N802
        self.do_GET()

    def do_GET(self):  # noqa: N802
        files, path = self.server.files, self.path.partition("?")[0]
        if self.server.error:
            status, code = self.server.error
            return self.answer(b"{}", status=status, **{"X-Error-Code": code})
        if path == "/api/models/owner/name/revision/main":
            return self.answer(json.dumps({"id": "owner/name", "sha": SHA}).encode())
        if path.startswith("/api/models/owner/name/tree/"):
            entries = [
                {"type": "file", "path": n, "size": len(x), "oid": hashlib.sha1(x).hexdigest()} for n, x in files.items()
            ]
            return self.answer(json.dumps(entries).encode())
        content = files[path.removeprefix(f"/owner/name/resolve/{SHA}/")]
        self.server.served.add(path.rpartition("/")[2])
        return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **{"X-Repo-Commit": SHA})

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hf_site(hf_cache, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.files, server.served, server.error = {}, set(), None
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    huggingface_hub.utils.close_session()
    with running(server):
        yield server
    huggingface_hub.utils.close_session()


OTHERS = {"config.json": b"{}", "README.md": b"#", "tf_model.h5": b"h5", "onnx/model.safetensors": b"onnx"}


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ({"model.safetensors": WEIGHTS, "pytorch_model.bin": b"bin"}, {"model.safetensors"}),
        ({"x.npz": b"npz", "x.pth": b"pth"}, {"x.npz"}),
        ({"pytorch_model.bin": b"bin", "training_args.bin": b"args"}, {"pytorch_model.bin"}),
        ({"x.pth": b"pth"}, {"x.pth"}),
    ],
)
def test_only_the_files_that_are_needed_are_downloaded(hf_site, monkeypatch, weights, wanted):
    hf_site.files = OTHERS | weights
    folder = hub.fetch("hf://owner/name")
    assert hf_site.served == wanted | {"config.json"} == set(os.listdir(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("hf://owner/name") == folder


def test_one_file_comes_with_its_description(hf_site):
    hf_site.files = OTHERS | {"a.npz": b"a", "b.npz": b"b"}
    assert hub.fetch("hf://owner/name/a.npz").read_bytes() == b"a" and hf_site.served == {"a.npz", "config.json"}
    refused("hf://owner/name/c.npz", "no file c.npz")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", ["is gated", "https://huggingface.co/owner/name", "hf auth login"]),
        (401, "RepoNotFound", ["does not exist, or is private", "hf auth login"]),
        (404, "RevisionNotFound", ["no revision 'main'", "a branch, a tag"]),
        (400, "", ["could not be fetched", "hf download owner/name --revision main --local-dir FOLDER"]),
    ],
)
def test_what_the_hub_refuses_is_explained(hf_site, status, code, said):
    hf_site.error = status, code
    refused("hf://owner/name@main", *said)
