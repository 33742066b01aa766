"""The demo: what it writes and says. Its scores are checked where it was run before, as .ci/run does."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_jax.data.sources import get_source
from vit_jax.tools import demo

ROOT = Path(demo.__file__).parents[2] / "runs" / "demo"


def test_images_are_the_digits_by_class_few_for_training_and_all_that_are_held_out(tmp_path):
    demo.write_images(tmp_path)
    source = get_source("digits", "test")
    for split, counts in (("train", [demo.FEW] * 10), ("test", np.bincount([source[i]["label"] for i in range(len(source))]))):
        assert [len(list((tmp_path / split / str(digit)).iterdir())) for digit in range(10)] == list(counts)
    first = next(source[i] for i in range(len(source)) if source[i]["label"] == 3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "test" / "3" / "001.png")), first["image"][..., 0])


def test_a_score_is_never_an_error_but_a_low_one_is_said(tmp_path, monkeypatch, capsys):
    started, scores = [], {}

    def run(module: str, *arguments: str) -> None:
        started.append((module, arguments))
        if module == "main":
            folder = Path(arguments[0].removeprefix("--workdir="))
            folder.mkdir()
            score = scores.get(folder.name, 0.5)
            lines = {"step": 1, "img_sec_core_train": 9.0}, {"step": 2, "accuracy_test": score}
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(demo, "run", run)
    (tmp_path / "finetune").mkdir()
    for low in ({"finetune": 0.96, "few": 0.7}, {"finetune": 0.98, "few": 0.54}):
        scores.update(low)
        assert demo.main([f"--workdir={tmp_path}", "--seed=3"]) == 0
        assert "please report it" in capsys.readouterr().out
    scores.update({"finetune": 0.98, "few": 0.7})
    assert demo.main([f"--workdir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert "please report it" not in text and "it names 20 more of a hundred digits rightly" in text
    trained = [arguments for module, arguments in started if module == "main"]
    assert [arguments[0] for arguments in trained[:5]] == [f"--workdir={tmp_path}/{name}" for name in demo.RUNS]
    assert all("--config.seed=3" in arguments for arguments in trained[:5])


@pytest.mark.skipif(not (ROOT / "few_scratch" / "model.npz").exists(), reason="needs what `make demo` leaves")
def test_the_demo_that_was_run_keeps_what_it_promises():
    assert demo.accuracy("finetune", str(ROOT)) >= demo.EXPECTED
    assert demo.accuracy("few", str(ROOT)) - demo.accuracy("few_scratch", str(ROOT)) >= demo.EXPECTED_GAIN
