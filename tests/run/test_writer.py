"""What a run leaves behind: metrics.jsonl, TensorBoard events and train.log, also after a restart."""

import json
import logging

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from vit_jax.run.writer import Writer, logging_to

log = logging.getLogger("vit_jax")


def write(workdir, values, start_step=0):
    """Runs a writer over {step: scalars}."""
    writer = Writer(workdir, start_step=start_step, total_steps=100)
    for step, scalars in values.items():
        writer.scalars(step, scalars)
        writer.advance(step, "loss 0.1")
    writer.close()


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    accumulator = EventAccumulator(str(workdir))
    accumulator.Reload()
    names = accumulator.PluginTagToContent("scalars")  # what TensorBoard shows as curves
    return {name: [(e.step, tensor_util.make_ndarray(e.tensor_proto)) for e in accumulator.Tensors(name)] for name in names}


def test_every_scalar_is_a_line_and_an_event(tmp_path):
    write(tmp_path, {10: {"train_loss": 2.5, "lr": 0.25}, 20: {"train_loss": 1.5}})
    assert lines(tmp_path) == [{"step": 10, "train_loss": 2.5, "lr": 0.25}, {"step": 20, "train_loss": 1.5}]
    assert events(tmp_path) == {"train_loss": [(10, 2.5), (20, 1.5)], "lr": [(10, 0.25)]}


def test_lines_are_on_disk_before_the_run_ends(tmp_path):
    writer = Writer(tmp_path, start_step=0, total_steps=10)
    writer.scalars(1, {"train_loss": 1})
    assert lines(tmp_path) == [{"step": 1, "train_loss": 1.0}]
    writer.close()


@pytest.mark.parametrize("cut_off", ["", '{"step": 4', '{"step": 20, "train_loss": 0.'])
def test_a_restart_drops_what_it_will_write_again(tmp_path, cut_off):
    write(tmp_path, {step: {"train_loss": step} for step in (10, 20, 30)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(cut_off)
    write(tmp_path, {30: {"train_loss": 3.5}}, start_step=20)
    assert [(line["step"], line["train_loss"]) for line in lines(tmp_path)] == [(10, 10), (20, 20), (30, 3.5)]


def test_a_new_run_does_not_inherit_lines(tmp_path):
    write(tmp_path, {10: {"train_loss": 1}})
    write(tmp_path, {}, start_step=0)
    assert lines(tmp_path) == []


def test_the_log_goes_to_the_file_and_in_plain_lines_to_the_output(tmp_path, capsys):
    with logging_to(tmp_path):
        log.info("data     %d images", 7)
        log.info("step 10/100", extra={"progress": True})
        log.warning("skipped bad image")
        log.debug("not for the user")
    assert capsys.readouterr().out.splitlines() == ["data     7 images", "step 10/100", "warning: skipped bad image"]
    logged = [line.split(maxsplit=2)[2] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert logged == ["INFO data     7 images", "INFO step 10/100", "WARNING skipped bad image"]


def test_a_continued_run_appends_to_its_log(tmp_path):
    for text in ("first", "résumé …"):
        with logging_to(tmp_path):
            log.info(text)
    logged = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [line.split()[3] for line in logged] == ["first", "résumé"]


@pytest.mark.parametrize("propagate", [True, False])
def test_afterwards_logging_is_as_before(propagate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "propagate", propagate)
    monkeypatch.setattr(log, "level", logging.ERROR)
    before = list(log.handlers)
    with pytest.raises(ZeroDivisionError), logging_to(tmp_path):
        raise ZeroDivisionError
    assert (log.handlers, log.level, log.propagate) == (before, logging.ERROR, propagate)
    log.error("after the run")
    assert "after the run" not in capsys.readouterr().out + (tmp_path / "train.log").read_text()


def test_a_terminal_gets_a_bar_instead_of_progress_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with logging_to(tmp_path):
        writer = Writer(tmp_path, start_step=20, total_steps=100)
        log.info("step 50/100", extra={"progress": True})
        log.info("accuracy 0.5")
        writer.advance(50, "loss 0.1234")
        writer.close()
    out = capsys.readouterr().out
    assert "step 20/100" in out and "step 50/100" in out and "loss 0.1234" in out
    assert out.count("step 50/100") < out.count("step ")
    assert "accuracy 0.5\n" in out
    assert "step 50/100" in (tmp_path / "train.log").read_text()
