"""Turns what a user names (a path, an address, a Hugging Face repository) into a local file or folder."""

import base64
import contextlib
import errno
import fcntl
import glob
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tqdm import tqdm

from vit_jax.arguments import as_typed
from vit_jax.checkpoint import connection, readers
from vit_jax.errors import UserError, printable

_TRIES, _PAUSE = 4, 0.25  # attempts in a row without progress; seconds between them
_TIMEOUT, _HEAD = 30, 60  # seconds for any byte, and until an answer has begun
_LONGEST, _MOST = 12 * 3600, 16 << 30  # seconds for a file, and bytes of one whose length the server does not tell
_LONGEST_NAME = 200  # file systems allow 255 bytes, with what is added to it while it comes in
_RETRIED = {408, 429, 500, 502, 503, 504}
_WEIGHTS = ("*.safetensors", "*.npz")
_BESIDE = ("*.json", "merges.txt", "spiece.model", "tokenizer.model")  # what tells of a model, and its vocabulary
_PICKLED_WEIGHTS = ("pytorch_model*.bin", "*.pth")  # only where a repository holds nothing better

log = logging.getLogger("vit_jax")


class _Broken(Exception):
    """The connection or the answer failed in a way that another attempt may mend."""


def fetch(source: str | os.PathLike, *, online: bool = True) -> Path:
    """A local file or folder that holds `source`, downloaded first where it must be. What comes is checked to be a checkpoint.

    Args:
      source: a local path, returned as it is (`~` expanded) whether it exists or not; `gs://BUCKET/PATH` of a public
        bucket, `https://…` or `http://…`, kept in `$VIT_JAX_CACHE` (~/.cache/vit_jax) and used from there without asking
        the network again; `hf://OWNER/NAME[/FILE][@REVISION]`, kept in the cache of huggingface_hub.
      online: False for an address that a file named, not the user: it must be in a cache.

    Raises:
      UserError: for an address of another form, or a file that cannot be had. The message says what was tried and
        where to put the file by hand.
    """
    source = os.fspath(source)
    match = re.match(r"([a-zA-Z][a-zA-Z0-9+]+):/+(?=[^/])", source)  # a Path keeps one slash of two
    if not match:
        return Path(source).expanduser()
    scheme, rest = match[1].lower(), source[match.end() :]
    if scheme == "hf":
        return _fetch_repository(rest, online)
    if scheme not in ("gs", "https", "http"):
        raise UserError(f"{source}: use a local path, or an address that starts with gs://, https://, http:// or hf://")
    url = f"https://storage.googleapis.com/{quote(rest)}" if scheme == "gs" else f"{scheme}://{rest}"
    url = quote(url.partition("#")[0], safe=":/?&=%+,;@!$'()*~[]")
    target = _cached(url)
    if not target.is_file():
        if not online:
            raise UserError(f"{url} is not in the cache, and is not fetched unasked. {_ask_for(source)}")
        _download(url, target)
    return target


def _cached(url: str) -> Path:
    """Where the file of an address lies in the cache: HOST/PATH, with a folder for each query string."""
    try:
        parts = urlsplit(url)
        host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    except ValueError as e:
        raise UserError(f"{url} is no valid address: {e}") from e
    if parts.username is not None:
        raise UserError(f"the address of {parts.hostname} holds a user name: fetch the file yourself and name the local copy")
    names = [unquote(name) for name in parts.path.split("/")[1:]]
    if not host or not names or any(name in ("", ".", "..") or re.search(r"[/\\\0]", name) for name in (host, *names)):
        raise UserError(f"{url} names no file: give HOST/FOLDER/FILE, without '..', '//' or a '/' at the end")
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in (host, *names)):
        raise UserError(f"{printable(url)}: a name of more than {_LONGEST_NAME} bytes cannot be kept; fetch the file yourself")
    query = [hashlib.sha256(parts.query.encode()).hexdigest()[:16]] if parts.query else []
    cache = Path(os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax").expanduser()
    return cache.joinpath(host, *names[:-1], *query, names[-1])


def _download(url: str, target: Path) -> None:
    """Fills `target.part`, which a later call continues, and renames it to `target` when it is whole."""
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{target.name}.lock")):
            if target.is_file():  # another process was faster
                return
            log.info("downloading %s to %s", url, target)
            _persist(url, target, part)
            os.replace(part, target)
            _facts_path(part).unlink(missing_ok=True)
    except OSError as e:
        advice = "Set VIT_JAX_CACHE to another folder"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free
            raise UserError(f"no room for {url} in {target.parent} ({free:,} bytes free): {e}. {advice} or free some.") from e
        raise UserError(f"{url} cannot be kept as {target}: {e}. {advice}.") from e


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; the empty file stays, since removing it would let two of them in."""
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is downloading %s: waiting for it", path.name[1:].removesuffix(".lock"))
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _persist(url: str, target: Path, part: Path) -> None:
    """Attempts until `part` is whole; gives up after `_TRIES` attempts in a row that brought little new, or `_LONGEST`."""
    failures, best, start = 0, 0, time.monotonic()
    with tqdm(unit="B", unit_scale=True, desc=target.name, disable=None) as bar:  # on a terminal one sees that it waits
        while True:
            try:
                return _attempt(url, target, part, bar)
            except _Broken as e:
                size = part.stat().st_size if part.exists() else 0
                failures, best = (0, size) if size >= best + connection.LEAST // 10 else (failures + 1, best)
                seconds = time.monotonic() - start
                if failures >= _TRIES or seconds > _LONGEST:
                    kept = f"\nThe next call continues the {size:,} bytes that came." if _continues(part) else ""
                    tried = f"{_TRIES} attempts" if failures >= _TRIES else f"{seconds / 3600:.0f} hours"
                    raise UserError(f"{url} could not be downloaded: {e} ({tried}). {_by_hand(target)}{kept}") from e
                log.info("%s: %s; trying again", url, e)
                _pause(failures)


def _pause(failures: int) -> None:
    time.sleep(_PAUSE * 2**failures)


def _attempt(url: str, target: Path, part: Path, bar: tqdm) -> None:
    """One request: continues `part` if it is still a part of the same file, else starts over. Checks what came."""
    facts = _read_facts(part)
    start = part.stat().st_size if _continues(part) else 0
    headers = {"User-Agent": "vit_jax", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": facts["validator"]}
    with connection.Watch(_HEAD) as watch, _open(url, headers, target, part, watch) as response:
        _check_answer(response, url, target)
        if response.status == 206:
            _check_continues(response, start, facts, part)
        else:
            start = 0
        with open(part, "r+b" if start else "wb") as f:
            if not start:  # only now: the facts of one file never stand beside the bytes of another
                facts = _facts(response)
                _facts_path(part).write_text(json.dumps(facts))
            if (facts["size"] or 0) - start > shutil.disk_usage(part.parent).free:
                raise OSError(errno.ENOSPC, f"{facts['size'] - start:,} bytes are needed")
            f.seek(start)
            bar.total, bar.n = facts["size"], start
            for chunk in _chunks(response, watch):
                f.write(chunk)
                bar.update(len(chunk))
                if facts["size"] is None and f.tell() > _MOST:
                    _discard(part)
                    raise UserError(f"{url} tells no length and does not end after {_MOST:,} bytes. {_by_hand(target)}")
            f.flush()
            os.fsync(f.fileno())
            size = f.tell()
    if facts["size"] is not None and size != facts["size"]:
        raise _Broken(f"the server promised {facts['size']:,} bytes and {size:,} came")
    if facts["md5"] and (md5 := _md5(part)) != facts["md5"]:
        _discard(part)
        raise UserError(f"{url} arrived with MD5 {md5}, the server promised {facts['md5']}. Try again. {_by_hand(target)}")
    if wrong := readers.what_is_wrong(part, target.name):
        _discard(part)
        raise UserError(f"{url}: what came is {wrong}. It is thrown away: check the address. {_by_hand(target)}")


def _check_answer(response: http.client.HTTPResponse, url: str, target: Path) -> None:
    """Refuses answers without a file, or with a packed one, which we have said not to take."""
    packed = response.headers.get("Content-Encoding", "identity").strip().lower()
    if response.status not in (200, 206):
        raise UserError(f"{url}: the server answered {response.status} {response.reason}, and no file. {_by_hand(target)}")
    if packed not in ("identity", ""):
        raise UserError(f"{url}: the server sends the file packed ({printable(packed)}), unasked. {_by_hand(target)}")


def _open(url: str, headers: dict[str, str], target: Path, part: Path, watch: connection.Watch) -> http.client.HTTPResponse:
    try:
        response = connection.open_url(url, headers, watch, _TIMEOUT)
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == 416:  # the part is no part of the file that is there now
            part.unlink(missing_ok=True)
        if e.code == 416 or e.code in _RETRIED:
            raise _Broken(f"the server answered {e.code} {printable(e.reason)}") from e
        if 300 <= e.code < 400:
            where = printable(str(e.reason).partition("\n")[0])
            raise UserError(f"{url} leads round in a circle, or where we do not follow: {where}. {_by_hand(target)}") from e
        reason = {404: "no such file: check the name", 403: "not public, or no such file", 401: "not public"}.get(e.code, "")
        answer = f"{e.code} {printable(e.reason)} ({reason or 'refused'})"
        raise UserError(f"{url}: the server answered {answer}. {_by_hand(target)}") from e
    except (OSError, http.client.HTTPException) as e:
        why = printable(getattr(e, "reason", e) or type(e).__name__)
        why = f"the answer is no HTTP, it begins with {why}" if type(e) is http.client.BadStatusLine else why
        raise _Broken("no whole answer came in time" if watch.has_closed else why) from e
    if watch.has_closed:  # what had come then looks like a whole head
        raise _Broken("no whole answer came in time")
    return response


def _chunks(response: http.client.HTTPResponse, watch: connection.Watch) -> Iterator[bytes]:
    """The body as it comes in; an error of the network becomes `_Broken`, one of the disk is none of ours."""
    chunk = b"\0"
    while chunk:
        broken = None
        try:
            chunk = response.read1(1 << 18)
        except http.client.IncompleteRead as e:
            chunk, broken = e.partial, e
        except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: a chunk's length that is no number
            chunk, broken = b"", e
        watch.receive(len(chunk))
        if chunk:
            yield chunk
        if watch.has_closed:
            raise _Broken(f"fewer than {connection.LEAST:,} bytes came in {connection.WINDOW} seconds")
        if broken:
            raise _Broken(f"the connection broke: {printable(broken) or type(broken).__name__}") from broken


def _facts(response: http.client.HTTPResponse) -> dict[str, Any]:
    """What the head of a whole file's answer promises: its size, its MD5 in hexadecimal, and a validator for `If-Range`."""
    headers = response.headers
    length = headers.get("Content-Length", "")
    sums = [headers.get("Content-MD5", "")]
    if headers.get("x-goog-stored-content-encoding", "identity") == "identity":  # else of the bytes before unpacking
        listed = ",".join(headers.get_all("x-goog-hash", [])).split(",")
        sums += [item.strip().removeprefix("md5=") for item in listed if item.strip().startswith("md5=")]
    md5 = next((base64.b64decode(text).hex() for text in sums if re.fullmatch(r"[A-Za-z0-9+/]{22}==", text)), None)
    return {"size": int(length) if length.isdecimal() else None, "md5": md5, "validator": _validator(response)}


def _validator(response: http.client.HTTPResponse) -> str | None:
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _check_continues(response: http.client.HTTPResponse, start: int, facts: dict[str, Any], part: Path) -> None:
    """Drops `part` and starts over unless the partial answer follows it; some servers know Range but not If-Range."""
    given = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", given)
    total = facts["size"] if match and match[2] == "*" else match and int(match[2])
    same = start and _validator(response) == facts["validator"] and facts["size"] in (None, total)
    if not same or not match or int(match[1]) != start:
        part.unlink(missing_ok=True)
        shown = printable(given) or "no Content-Range"
        raise _Broken(f"the file has changed on the server, or it sent another part ({shown})")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _facts_path(part).unlink(missing_ok=True)


def _facts_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_facts(part: Path) -> dict[str, Any]:
    try:
        facts = json.loads(_facts_path(part).read_text())
        return {key: facts[key] for key in ("size", "md5", "validator")}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}  # without them the part is not continued


def _continues(part: Path) -> bool:
    """Whether a part is there that another request may continue: of a file without a validator it may be another's."""
    return part.exists() and part.stat().st_size > 0 and bool(_read_facts(part).get("validator"))


def _md5(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _by_hand(target: Path) -> str:
    return f"Or fetch it by other means and put it here:\n  {target}"


def _ask_for(source: str) -> str:
    return f"If you trust it, fetch it once:\n  {as_typed('python -m vit_jax.inspect')} {source}"


def _fetch_repository(rest: str, online: bool) -> Path:
    """The snapshot folder, or one file in it, of `OWNER/NAME[/FILE][@REVISION]`."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@([^@]+))?", rest)
    if not match or any(name in ("", ".", "..") for name in re.split(r"[/\\@]", rest)):
        raise UserError(f"hf://{rest}: use hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME/FILE@REVISION")
    repository, file, revision = match.groups()
    if file:
        folder, _, _ = file.rpartition("/")
        beside = [f"{glob.escape(folder)}/{name}" if folder else name for name in _BESIDE]
        snapshot = _snapshot(repository, revision, [glob.escape(file), *beside], online)
        if (snapshot / file).is_file():
            return snapshot / file
        place = f"https://huggingface.co/{repository}/tree/{revision or 'main'}"
        raise UserError(f"hf://{rest}: the repository has no file {file}, see {place}; or, offline, it is not in {snapshot}")
    for patterns in (_WEIGHTS, _PICKLED_WEIGHTS):
        snapshot = _snapshot(repository, revision, [*patterns, *_BESIDE], online, ignore="*/*")
        if any(any(snapshot.glob(pattern)) for pattern in (*_WEIGHTS, *_PICKLED_WEIGHTS)):
            return snapshot
    raise UserError(
        f"hf://{rest} holds no weights in its first level ({', '.join((*_WEIGHTS, *_PICKLED_WEIGHTS))}), or, offline, they are "
        f"not in {snapshot}. Name one of its files: hf://{repository}/FILE"
    )


def _snapshot(repository: str, revision: str | None, patterns: list[str], online: bool, ignore: str | None = None) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as e:
        raise UserError(f"hf://{repository} needs huggingface_hub: pip install huggingface_hub") from e
    try:
        how = {"allow_patterns": patterns, "ignore_patterns": ignore, "local_files_only": not online}
        return Path(snapshot_download(repository, revision=revision, **how))
    except errors.LocalEntryNotFoundError as e:
        if online:
            raise _not_whole(repository, revision, e) from e
        asked = _ask_for(f"hf://{repository}{f'@{revision}' if revision else ''}")
        raise UserError(f"hf://{repository} is not in the cache, and is not fetched unasked. {asked}") from e
    except errors.GatedRepoError as e:
        page = f"https://huggingface.co/{repository}"
        raise UserError(f"hf://{repository} is gated: accept its terms at {page}, then log in with `hf auth login`") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(f"hf://{repository} does not exist, or is private: check the name, or `hf auth login`") from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"hf://{repository} has no revision {revision!r}: name a branch, a tag or a whole commit hash") from e
    except Exception as e:  # the network errors of whichever HTTP library it uses, and its own of the cache
        raise _not_whole(repository, revision, e) from e


def _not_whole(repository: str, revision: str | None, e: Exception) -> UserError:
    at = f" --revision {revision}" if revision else ""
    return UserError(
        f"hf://{repository} could not be fetched and is not whole in huggingface_hub's cache: {type(e).__name__}: {e}\n"
        f"Where there is a network,\n  hf download {repository}{at} --local-dir FOLDER\nthen bring FOLDER here and name it."
    )
