"""Signals during training: which are heard, and that a loader that hangs does not keep a run that was asked to stop."""

import errno
import io
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from vit_jax import train
from vit_jax.data import loader
from vit_jax.run import signals
from vit_jax.run.signals import GracefulExit, LoaderHangs
from vit_jax.train import train_and_evaluate

pytestmark = pytest.mark.usefixtures("each_step_once")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_is_noted_and_afterwards_all_is_as_before(number: int, capsys: pytest.CaptureFixture):
    before = [signal.getsignal(n) for n in (number, signal.SIGALRM)]
    with GracefulExit() as stop:
        signal.raise_signal(number)
        assert stop.signal == number and stop.exit_code == 128 + number
        assert signal.getsignal(number) == before[0]
    assert [signal.getsignal(n) for n in (number, signal.SIGALRM)] == before
    assert "finishing the step, then saving" in capsys.readouterr().err


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with GracefulExit() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_cannot_be_told_anything(monkeypatch: pytest.MonkeyPatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    with GracefulExit() as stop:
        monkeypatch.setattr("sys.stderr", Gone())
        signal.raise_signal(signal.SIGHUP)
        assert stop.signal == signal.SIGHUP


def batches_until(hangs: threading.Event) -> Iterator[int]:
    yield from range(3)
    hangs.wait(30)


def test_batches_that_come_are_not_hurried_and_one_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    assert list(GracefulExit().watch(i for i in (1, 2))) == [1, 2]
    with GracefulExit() as stop:
        batches = stop.watch(batches_until(threading.Event()))
        assert next(batches) == 0
        signal.raise_signal(signal.SIGTERM)
        assert next(batches) == 1
        time.sleep(0.5)  # a step takes longer than a batch may
        assert next(batches) == 2
        started = time.monotonic()
        with pytest.raises(LoaderHangs) as exit_:
            next(batches)
        assert exit_.value.code == 143 and 0.1 < time.monotonic() - started < 20


def test_a_signal_while_the_loader_hangs_saves_what_was_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    train_batches, hangs = train._train_batches, threading.Event()

    def hanging(*args, **kwargs) -> Iterator[dict]:
        for i, batch in enumerate(train_batches(*args, **kwargs)):
            if i == 5:
                signal.raise_signal(signal.SIGTERM)
                hangs.wait(30)
            yield batch

    monkeypatch.setattr(train, "_train_batches", hanging)
    with pytest.raises(LoaderHangs):
        train_and_evaluate(tiny.config(), tmp_path)
    assert (tmp_path / "checkpoints" / "5").is_dir()
    monkeypatch.undo()
    train_and_evaluate(tiny.config(), tmp_path)
    assert "from this workdir's step 5" in (tmp_path / "train.log").read_text()


def test_a_signal_while_the_loader_hangs_in_an_evaluation_saves_what_was_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    eval_batches, hangs = loader.eval_batches, threading.Event()

    def hanging(*args, **kwargs) -> Iterator[dict]:
        for batch in eval_batches(*args, **kwargs):
            yield batch
            signal.raise_signal(signal.SIGTERM)
            hangs.wait(30)

    monkeypatch.setattr(loader, "eval_batches", hanging)
    with pytest.raises(LoaderHangs) as exit_:
        train_and_evaluate(tiny.config(total_steps=10), tmp_path)
    assert exit_.value.code == 143 and (tmp_path / "checkpoints" / "10").is_dir()
