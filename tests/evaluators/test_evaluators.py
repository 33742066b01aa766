"""`config.evaluators`: names, schedules, what is refused; and the evaluation of a checkpoint by any of them."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests import compiling, tiny
from tests.evaluators import small
from vit_jax import checkpoint
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.evaluators import classify, knn, make_evaluators
from vit_jax.run.writer import format_metrics
from vit_jax.train import train_and_evaluate


def test_metrics_are_named_by_type_and_name_and_schedules_default_to_the_configs(tmp_path):
    configured = {
        "knn": {"every": 3, "k": (10,)},
        "far": {"type": "knn", "k": [20], "temperature": 1},
        "val2": {"type": "classify", "split": "train[:9]", "every": 7},
        "calibration": {},
    }
    e, params = small.experiment(tmp_path, evaluators=configured)
    due = make_evaluators(e)
    assert sorted(every for every, _ in due) == [3, 7, 10, 10, 10]
    plain = {"accuracy_test", "loss_test", "img_sec_core_test"}
    found = {}
    for _, evaluator in due:
        found |= evaluator(e.parallelism.place(params))
    assert found.keys() == plain | {"knn_10", "far/knn_20", "val2/accuracy", "val2/loss", "ece"}
    assert found["far/knn_20"] == knn.make_evaluator(e, k=(20,), temperature=1.0)(e.parallelism.place(params))["knn_20"]
    assert found["val2/loss"] == classify.make_evaluator(e, split="train[:9]")(e.parallelism.place(params))["loss"]


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        ({"kn": {}}, "unknown type of config.evaluators.kn 'kn': did you mean knn"),
        ({"a": {"type": "fewshots"}}, "unknown type of config.evaluators.a 'fewshots': did you mean fewshot"),
        ({"knn": {"temprature": 1.0}}, "unknown field of config.evaluators.knn 'temprature': did you mean temperature"),
        ({"knn": 500}, r"config.evaluators.knn=500 must be a dict of options, such as {'every': 1000}"),
        ({"knn": {"every": 0}}, "config.evaluators.knn.every=0 must be a number of steps, at least 1"),
        ({"knn": {"k": 10}}, r"config.evaluators.knn.k=10 must be of the kind of \(10, 20, 100, 200\)"),
        ({"fewshot": {"l2": ("a",)}}, "config.evaluators.fewshot.l2=.* must be of the kind of"),
        ({"knn": {"train": 3}}, "config.evaluators.knn.train=3 must be"),
        ({"near": {"type": "knn", "k": (0,)}}, "config.evaluators.near: .*all must be positive"),
        ({"val2": {"type": "classify", "split": "val"}}, "config.evaluators.val2: unknown split 'val'"),
    ],
)
def test_what_is_wrong_stops_before_the_first_step(configured, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_and_evaluate(small.config(trainer="train", evaluators=configured), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, config) of 20 steps, with an evaluator that is due at 8 and 16, and one that is due later than the end."""
    workdir = tmp_path_factory.mktemp("run")
    configured = {"knn": {"every": 8, "k": (1, 10)}, "calibration": {"every": 1000}}
    c = small.config(trainer="train", total_steps=20, eval_every=10, evaluators=configured)
    train_and_evaluate(c, workdir)
    return workdir, c


def test_evaluators_run_on_their_schedules_and_at_the_end(trained):
    workdir, _ = trained
    steps = {name: list(tiny.metrics(workdir, name)) for name in ("accuracy_test", "knn_1", "knn_10", "ece")}
    assert steps == {"accuracy_test": [10, 20], "knn_1": [8, 16, 20], "knn_10": [8, 16, 20], "ece": [20]}


def test_alone_they_give_what_training_gave(trained):
    workdir, c = trained
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    c = c.copy_and_resolve_references()
    c.update({"trainer": "evaluate"})
    found = evaluate(c, workdir)
    for name in ("accuracy_test", "loss_test", "knn_1", "knn_10", "ece"):
        assert found[name] == tiny.metrics(workdir, name)[20]
    assert found.keys() == {"accuracy_test", "loss_test", "img_sec_core_test", "knn_1", "knn_10", "ece"}
    after = (workdir / "metrics.jsonl").read_text().splitlines()
    assert after[:-1] == lines and json.loads(after[-1]) == {"step": 20} | found  # added to what is there
    c.evaluator = "knn"  # with the options of the config's evaluator of that name
    assert evaluate(c, workdir) == {"knn_1": found["knn_1"], "knn_10": found["knn_10"]}
    c.evaluator = "ece"
    with pytest.raises(UserError, match="unknown config.evaluator 'ece'"):
        evaluate(c, workdir)


@pytest.mark.parametrize("num_classes", [None, 3, 10])
def test_features_of_a_file_are_scored_whatever_its_head(num_classes, tmp_path):
    e, params = small.experiment(tmp_path / "e")
    trunk = {name: x for name, x in params.items() if name != "head"}
    head = {"head": {"kernel": np.zeros((16, num_classes)), "bias": np.zeros(num_classes)}} if num_classes else {}
    checkpoint.save(trunk | head, tmp_path / "file.npz")
    c = small.config(pretrained=str(tmp_path / "file.npz"), evaluator="knn")
    metrics = evaluate(c, tmp_path / "run")
    assert metrics == knn.make_evaluator(e)(e.parallelism.place(params))
    assert list(metrics) == ["knn_10", "knn_20", "knn_100"]
    written = (tmp_path / "run" / "train.log").read_text()
    assert format_metrics(metrics) in written
    if num_classes == 3:
        c.evaluator = "calibration"
        with pytest.raises(UserError):
            evaluate(c, tmp_path / "other")


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate(small.config(evaluator="knn"), tmp_path / "empty")
    with pytest.raises(UserError, match="has 9 images: kNN needs 10 or more"):
        evaluate(small.config(evaluator="knn", pp_train="train[:9]"), tmp_path / "few")


@pytest.mark.parametrize(("evaluator", "where"), [("classify", "head"), ("calibration", "head"), ("knn", "embedding")])
def test_a_model_whose_outputs_are_no_numbers_is_not_scored(evaluator, where, tmp_path):
    _, params = small.experiment(tmp_path / "e")
    params[where]["kernel"] = np.full_like(params[where]["kernel"], 3e38)
    checkpoint.save(params, tmp_path / "file.npz")
    c = small.config(pretrained=str(tmp_path / "file.npz"), evaluator=evaluator)
    with pytest.raises(UserError, match="the model (cannot be scored: .* came out as|gives) NaN or infinity"):
        evaluate(c, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


FOUR_DEVICES = """
import json, sys
from pathlib import Path
import jax
from tests.evaluators import small
from vit_jax.evaluators import make_evaluators
assert jax.device_count() == 4
for parallelism in ("pmap", "mesh"):
    e, params = small.experiment(Path(sys.argv[1]), parallel=parallelism, evaluators=json.loads(sys.argv[2]))
    params, found = e.parallelism.place(params), {}
    for _, evaluator in make_evaluators(e):
        found |= evaluator(params)
    print(json.dumps(found))
"""


def test_four_devices_give_what_one_gives(tmp_path):
    configured = {"fewshot": {"shots": [5], "l2": [1024.0], "seeds": 1}}  # draws by position
    e, params = small.experiment(tmp_path, evaluators=configured)
    alone = {}
    for _, evaluator in make_evaluators(e):
        alone |= evaluator(e.parallelism.place(params))
    command = [sys.executable, "-c", FOUR_DEVICES, str(tmp_path), json.dumps(configured)]
    output = subprocess.run(command, env=compiling.with_devices(4), check=True, stdout=subprocess.PIPE, text=True).stdout
    for line in output.splitlines():
        found = json.loads(line)
        assert found.keys() == alone.keys()
        for name in found.keys() - {"img_sec_core_test"}:
            assert found[name] == pytest.approx(alone[name], abs=1e-6), name  # float32 sums in another order
    assert len(output.splitlines()) == 2
