"""The report of a run: where it lies, that its numbers are the run's, and that nothing else changes or fails for it."""

import logging
import re
import types
import urllib.parse

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from tests import tiny
from tests.evaluators import small
from tests.report.test_page import SECTIONS
from tests.tasks import test_contract
from vit_jax.checkpoint import load
from vit_jax.evaluate import evaluate
from vit_jax.evaluators import passes
from vit_jax.report import collect, draw, of_run, page
from vit_jax.run import experiment as experiments
from vit_jax.settings import Settings
from vit_jax.train import train_and_evaluate


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Noise in two classes, one of a name that HTML would read."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(40):
        path = folder / ("<b>beach" if i % 2 else "forest & co") / f"{i} #.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8)).save(path)
    return folder


def config(photos, **changes):
    return tiny.config(**{"dataset": str(photos), "pp_train": "train", "pp_test": "train", "report": True} | changes)


@pytest.fixture(scope="module")
def workdir(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_and_evaluate(config(photos, evaluators={"calibration": {}}), folder)
    return folder


def sections(workdir):
    return tuple(re.findall(r'<section id="(\w+)">', (workdir / page.FILE).read_text()))


def test_a_run_ends_with_a_report_whose_scores_are_those_of_the_run(workdir, photos):
    content = (workdir / page.FILE).read_text()
    assert sections(workdir) == SECTIONS
    assert f"{100 * tiny.metrics(workdir, 'accuracy_test')[20]:.1f} %</b>" in content
    assert f"<b>{tiny.metrics(workdir, 'ece')[20]:.4f}</b>" in content
    links = re.findall(r'<a href="(\.\./[^"]*)"', content)
    assert links and "%3Cb%3Ebeach" in "".join(links) and "<b>beach" not in content
    assert all((workdir / urllib.parse.unquote(link)).exists() for link in links)
    assert "<dt>hidden_size" not in content and "<dt>model.hidden_size</dt><dd>16</dd>" in content


def test_the_matrix_is_that_of_the_answers(tmp_path):
    experiment, params = small.experiment(tmp_path)
    logits, labels = small.logits(experiment, params, experiment.test_source)
    rows = passes.make_rows(experiment, collect.make_answers(experiment.task.predict))
    found = collect.find(**rows(experiment.parallelism.place(params), experiment.test_source), names="0123456789")
    np.testing.assert_array_equal(found.heat, confusion_matrix(labels, logits.argmax(axis=1), labels=range(10)))


def test_what_is_learnt_and_written_is_the_same_without(workdir, photos, tmp_path):
    train_and_evaluate(config(photos, report=False, evaluators={"calibration": {}}), tmp_path)
    assert not (tmp_path / page.FILE).exists()
    assert (tmp_path / "model.npz").read_bytes() == (workdir / "model.npz").read_bytes()
    assert tiny.metrics(tmp_path, "train_loss") == tiny.metrics(workdir, "train_loss")


def test_an_evaluation_and_a_run_that_is_complete_write_it_again(workdir, photos):
    (workdir / page.FILE).unlink()
    train_and_evaluate(config(photos, evaluators={"calibration": {}}), workdir)
    assert sections(workdir) == SECTIONS
    (workdir / page.FILE).unlink()
    evaluate(config(photos, trainer="evaluate"), workdir)
    assert sections(workdir) == SECTIONS


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """An experiment with random parameters, as a state after 7 steps."""
    experiment, params = small.experiment(tmp_path_factory.mktemp("scored"))
    return experiment, untrained(experiment.parallelism.place(params))


def untrained(params):
    return types.SimpleNamespace(step=jax.numpy.full(jax.device_count(), 7), params=params, ema=None, frozen={})


def test_a_head_that_does_not_matter_is_not_reported(scored, tmp_path):
    of_run(*scored, tmp_path, head=False)
    assert sections(tmp_path) == ("inputs", "throughput", "recipe")


@pytest.mark.parametrize(
    ("place", "name", "left"),
    [
        (passes, "make_rows", ["inputs", "throughput", "recipe"]),
        (draw, "thumbnail", [name for name in SECTIONS if name not in ("curves", "inputs")]),
        (page, "render", []),
    ],
)
def test_what_goes_wrong_is_a_warning(place, name, left, scored, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("out of luck\nat length")

    monkeypatch.setattr(place, name, fail)
    of_run(*scored, tmp_path)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings and all(re.fullmatch("report   without [a-z ]+: out of luck", line) for line in warnings)
    assert list(sections(tmp_path)) == left if left else not (tmp_path / page.FILE).exists()


@pytest.mark.parametrize("task", sorted(test_contract.RECIPES.keys() - {"classify", "distill"}))
def test_other_tasks_have_the_parts_that_they_can_have(task, tmp_path, caplog):
    c = test_contract.RECIPES[task](tmp_path)
    c.total_steps = 2
    experiment = experiments.build(Settings.from_config(c))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2}\n{"step": 2, "train_loss": 1}\n')
    of_run(experiment, untrained({}), tmp_path)
    assert sections(tmp_path) == ("scores", "curves", "inputs", "throughput", "recipe")
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_a_run_that_is_whole_ends_well_though_its_report_cannot_be_written(photos, tmp_path):
    (tmp_path / page.FILE / "in the way").mkdir(parents=True)
    train_and_evaluate(config(photos), tmp_path)
    assert load(tmp_path / "model.npz") and "report   without a page: " in (tmp_path / "train.log").read_text()
