"""What a run leaves behind: metrics.jsonl, TensorBoard events and train.log, also after a restart."""

import io
import json
import logging
import os

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from vit_jax.checkpoint.state import WriteError
from vit_jax.errors import UserError
from vit_jax.run.writer import Writer, format_metrics, logging_to

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


def test_an_evaluation_adds_a_line_after_one_that_was_cut_off(tmp_path):
    write(tmp_path, {10: {"train_loss": 1}})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "tr')
    write(tmp_path, {10: {"accuracy_test": 0.5}}, start_step=None)
    assert lines(tmp_path) == [{"step": 10, "train_loss": 1}, {"step": 10, "accuracy_test": 0.5}]


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
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
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


@pytest.mark.parametrize("variables", [{"COLUMNS": "0", "TERM": "xterm"}, {"COLUMNS": "80", "TERM": "dumb"}])
def test_a_terminal_of_unknown_width_or_without_motion_gets_lines(variables, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with logging_to(tmp_path):
        writer = Writer(tmp_path, start_step=0, total_steps=100)
        log.info("step 50/100", extra={"progress": True})
        writer.close()
    assert capsys.readouterr().out == "step 50/100\n"


def test_output_whose_reader_has_ended_goes_nowhere_and_the_log_goes_on(tmp_path, monkeypatch):
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as pipe, logging_to(tmp_path):
        monkeypatch.setattr("sys.stdout", pipe)
        log.info("first")
        log.info("second")
        os.write(writes, b"what the process prints at its end")  # goes nowhere, and is no error
    logged = [line.split(maxsplit=2)[2] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert logged == ["WARNING nothing more can be printed (Broken pipe): the run goes on, follow train.log"] + [
        f"INFO {text}" for text in ("first", "second")
    ]


def test_what_the_output_cannot_encode_is_escaped(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with logging_to(tmp_path):
        log.info("IMAGE… %s", os.fsdecode(b"caf\xe9.png"))
    assert raw.getvalue() == b"IMAGE\\u2026 caf\\udce9.png\n"
    assert "IMAGE… caf\\udce9.png" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_a_line_that_is_no_record_is_set_aside_and_named(tmp_path, caplog):
    good = [b'{"step": 10, "train_loss": 2.0}', b'{"step": 20, "lr": NaN}']
    bad = [b'{"step": 10, "train_loss": \xff}', b"17", b'{"step": "10"}', b'{"train_loss": 1}', b'{"step": 1, "a": []}', b""]
    bad.append(b"[" * 100_000)
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *bad, good[1], b'{"step": 30}', b'{"step": 1']))
    with caplog.at_level(logging.WARNING, "vit_jax"):
        Writer(tmp_path, start_step=20).close()
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == good
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().split(b"\n") == [*bad, b""]
    (record,) = caplog.records
    assert "metrics.jsonl: line 2, 3, 4, 5, 6, 7, 8 is no record of numbers: set aside in metrics" in record.getMessage()


def test_folders_in_the_place_of_files_are_refused_by_name(tmp_path):
    (tmp_path / "train.log").mkdir()
    with pytest.raises(UserError, match="train.log cannot be written .Is a directory.: move it away"), logging_to(tmp_path):
        pass
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be written .Is a directory.: move it away"):
        Writer(tmp_path, start_step=0)


def test_a_workdir_that_was_moved_away_is_noticed(tmp_path):
    writer = Writer(tmp_path, start_step=0)
    writer.scalars(1, {"train_loss": 1})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match="metrics.jsonl was deleted or moved while the run wrote to it: start again"):
        writer.scalars(2, {"train_loss": 1})
    writer.close()


def test_metrics_for_people():
    metrics = {
        "accuracy_test": 1.0,
        "top5_val_test_ema": 0.98765,
        "loss_test": 1.88941,
        "ece_test": 0.01,
        "img_sec_core": 11034.2,
    }
    text = "accuracy_test 100.00 %  top5_val_test_ema 98.77 %  loss_test 1.889  ece_test 0.01000  img_sec_core 11,034"
    assert format_metrics(metrics) == text
    more = {"lr": 0.0, "train_loss": float("nan"), "fewshot_5shot": 0.5, "fewshot_5shot_l2": 0.5, "grad_norm": 1e-7}
    assert format_metrics(more) == "lr 0  train_loss nan  fewshot_5shot 50.00 %  fewshot_5shot_l2 0.5000  grad_norm 1.000e-07"
