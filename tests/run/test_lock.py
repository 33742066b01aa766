"""Two runs in one workdir: the second is refused, whoever the first is, and only as long as that one lives."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vit_jax.run import lock
from vit_jax.run.lock import BusyError, only_run

HOLDER = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.write(descriptor, b"node7, process 12, since 2026-01-02 03:04:05 UTC\\n")
print("locked", flush=True)
time.sleep(100)
"""


def test_a_second_run_is_refused_by_the_name_of_the_first_until_that_ends(tmp_path: Path):
    with only_run(tmp_path):
        with pytest.raises(BusyError) as error, only_run(tmp_path):
            pass
        message = str(error.value)
        assert message.startswith(f"{tmp_path} is in use by the run of {socket.gethostname()}, process {os.getpid()}, since 20")
        assert "\n" not in message
    assert list(tmp_path.iterdir()) == []
    with only_run(tmp_path):
        pass


def test_a_lock_dies_with_its_holder_and_a_holder_of_another_host_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / lock.FILE)], stdout=subprocess.PIPE)
    first.stdout.readline()
    with (
        pytest.raises(BusyError, match="the run of node7, process 12, since 2026-01-02 03:04:05 UTC: wait"),
        only_run(tmp_path),
    ):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    with only_run(tmp_path):
        (warning,) = [record.getMessage() for record in caplog.records]
        assert warning.startswith("the run of node7, process 12, since 2026-01-02 03:04:05 UTC did not end by itself")
        assert (tmp_path / lock.FILE).read_text().startswith(f"{socket.gethostname()}, process {os.getpid()}, ")


def test_a_lock_file_that_is_removed_while_it_is_taken_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first run ends between the second's opening of the file and its lock."""
    flock, removed = lock.fcntl.flock, []

    def removes_once(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        if not removed:
            removed.append((tmp_path / lock.FILE).unlink())

    monkeypatch.setattr(lock.fcntl, "flock", removes_once)
    with only_run(tmp_path):
        monkeypatch.undo()
        with pytest.raises(BusyError), only_run(tmp_path):
            pass


def test_without_locks_a_run_goes_on_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with only_run(tmp_path):
        assert "cannot be locked (Function not implemented): nothing keeps a second run out" in caplog.text


def test_a_folder_in_its_place_and_a_workdir_that_is_gone_are_no_tracebacks(tmp_path: Path):
    (tmp_path / lock.FILE).mkdir()
    with pytest.raises(BusyError, match="run.lock cannot be written .Is a directory.: move it away"), only_run(tmp_path):
        pass
    (tmp_path / lock.FILE).rmdir()
    with only_run(tmp_path):
        (tmp_path / lock.FILE).unlink()
        tmp_path.rmdir()


def test_a_run_whose_workdir_was_replaced_leaves_the_lock_of_the_next(tmp_path: Path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with contextlib.ExitStack() as second:
        with only_run(workdir):
            shutil.rmtree(workdir)
            workdir.mkdir()
            second.enter_context(only_run(workdir))
        with pytest.raises(BusyError), only_run(workdir):
            pass
