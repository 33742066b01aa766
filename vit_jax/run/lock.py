"""One run at a time in a workdir: a lock that the system takes back when its holder dies, however it dies."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.errors import UserError
from vit_jax.files import is_still
from vit_jax.optimize import parallel

log = logging.getLogger("vit_jax")

FILE = "run.lock"


class BusyError(UserError):
    """Another run is writing to the workdir."""


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """Within the block no other process comes this far with the same workdir; BusyError, which names the other, if one has.

    Of several processes of one run the first holds the lock for all. It is `flock`'s, on the file `run.lock`, where host,
    process and start stand while the run goes on. Other machines see it on NFS and SMB if these are mounted with locks, as
    is the default, and on Lustre with `-o flock`. They do not see it on folders that are mounted with `nolock` or
    `local_lock`, nor through most bucket and sshfs mounts. Where a file system has no locks at all, and where a run on
    another host did not end by itself or goes on unseen, a warning says so.
    """
    refusal, descriptor = "", None
    if parallel.is_main():
        try:
            descriptor = _acquire(workdir / FILE)
        except UserError as e:
            refusal = str(e)
    if refusal := _from_main(refusal):
        raise BusyError(refusal)
    try:
        yield
    finally:
        if descriptor is not None:
            if is_still(workdir / FILE, descriptor):  # the workdir may have been deleted, and another run begun in its place
                (workdir / FILE).unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(path: Path) -> int:
    """The descriptor of the locked file. UserError if another process holds it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as e:
            raise UserError(f"{path} cannot be written ({e.strerror}): move it away") from e
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(descriptor, patience=1.0) or "another process"
            os.close(descriptor)
            raise UserError(
                f"{path.parent} is in use by the run of {holder}: wait for it, stop it, or choose another --workdir"
            ) from None
        except OSError as e:
            log.warning("%s cannot be locked (%s): nothing keeps a second run out of this workdir", path, e.strerror)
        if is_still(path, descriptor):
            break
        os.close(descriptor)  # its last holder removed it just now
    host = socket.gethostname()
    left = _read(descriptor)
    if left and not left.startswith(f"{host}, "):
        log.warning(
            "the run of %s did not end by itself. If it still goes on there, stop it: locks in %s do not reach that machine",
            left,
            path.parent,
        )
    os.ftruncate(descriptor, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    with contextlib.suppress(OSError):  # a full disk: it is locked all the same
        os.pwrite(descriptor, f"{host}, process {os.getpid()}, since {started}\n".encode(), 0)
    return descriptor


def _read(descriptor: int, patience: float = 0.0) -> str:
    """What a holder wrote, as one line; "" if nothing is there after `patience` seconds: it writes just after it locks."""
    deadline = time.monotonic() + patience
    while not (text := os.pread(descriptor, 500, 0)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return " ".join("".join(c if c.isprintable() else " " for c in text.decode(errors="replace")).split())


def _from_main(text: str) -> str:
    """Process 0's text, in every process."""
    if jax.process_count() == 1:
        return text
    padded = np.frombuffer(text.encode()[:1000].ljust(1000), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)).decode(errors="replace").strip()
