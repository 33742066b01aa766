"""The commands that turn one layout into another and list what is inside, and what their users then do with it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import fuzz_targets
from tests.checkpoint import peers
from tests.models import small
from vit_jax import checkpoint, convert, models, predict
from vit_jax.checkpoint import describe
from vit_jax.errors import UserError
from vit_jax.tools import inspection

FIELDS = {
    "hidden_size": 32,
    "patches": {"size": [4, 8]},
    "num_classes": 5,
    "transformer": {"num_layers": 2, "mlp_dim": 48, "num_heads": 4},
}
SIZE = (16, 24)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A small model with class names and an unusual normalisation, as training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(small.random_params(models.build("ViT", FIELDS), small.random_images(*SIZE)), folder / "model.npz")
    description = {"model_name": "mine", "model_type": "ViT", "model": FIELDS, "image_size": SIZE, "grid": (4, 3)}
    pixels = {"mean": [110.0, 120.0, 130.0], "std": [50.0, 60.0, 70.0]}
    description |= pixels | {"class_names": peers.NAMES}
    describe.write(folder / "model.npz", describe.Description(**description))
    return folder


def run(capsys, *arguments, expected=0):
    assert convert.main([str(argument) for argument in arguments]) == expected
    return capsys.readouterr()


@pytest.mark.parametrize("to", ["npz", "hf", "timm"])
def test_convert_tells_what_it_read_and_checks_what_it_wrote(capsys, tmp_path, workdir, to):
    lines = dict(line.split(maxsplit=1) for line in run(capsys, workdir, tmp_path / "out", f"--to={to}").out.splitlines())
    count = sum(x.size for x in np.load(workdir / "model.npz").values())
    assert lines["source"] == str(workdir / "model.npz") and lines["family"] == "Google npz"
    assert lines["model"].startswith("ViT: hidden_size=32, patches={'size': [4, 8]}")
    assert lines["parameters"] == f"{count:,}"
    assert lines["image"] == "16x24 px, patches 4x3, mean 110 120 130, std 50 60 70 of 255"
    assert lines["classes"] == "5: ape, bear, cat, dög, …"
    assert float(lines["checked"].split()[-1]) < 1e-6
    again = checkpoint.open_checkpoint(lines["wrote"])
    assert list(again.description.class_names) == peers.NAMES
    for name, x in np.load(workdir / "model.npz").items():
        np.testing.assert_array_equal(again.flat[name], x)


def test_convert_takes_both_towers_to_another_project(capsys, tmp_path):
    for name, content in fuzz_targets.towers("hf").items():
        (tmp_path / name).write_bytes(content)
    told = run(capsys, tmp_path, tmp_path / "out", "--to=openclip").out
    lines = dict(line.split(maxsplit=1) for line in told.splitlines() if not line.startswith(" "))
    assert lines["family"] == "Hugging Face CLIP" and lines["model"] == "TwoTowers: out_dim=[6, 6]"
    assert lines["images"].startswith("ViT: classifier=token") and "causal=True" in told
    assert lines["tokens"] == "clip by tokenizer.json, max_len=16"
    assert lines["classes"] == "none: images are compared with texts"
    assert float(lines["checked"].split()[-1]) == 0
    assert checkpoint.open_checkpoint(tmp_path / "out").family == "OpenCLIP"


def test_a_file_that_came_out_as_another_model_is_an_error(capsys, monkeypatch, tmp_path, workdir):
    def broken(opened, destination, to):
        flat = opened.flat | {"cls": 2 * opened.flat["cls"]}
        return write(checkpoint.Opened(opened.path, opened.family, flat, opened.description), destination, to)

    write = checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", broken)
    assert "another model" in run(capsys, workdir, tmp_path / "out", "--to=hf", expected=1).err


def test_a_wrong_layout_names_the_right_ones(capsys, tmp_path, workdir):
    with pytest.raises(SystemExit) as stop:
        convert.main([str(workdir), str(tmp_path / "out"), "--to=onnx"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "onnx" in err and all(name in err for name in ("npz", "hf", "timm", "dinov2"))


def test_a_file_of_an_unknown_grid_is_converted_unchecked(capsys, tmp_path):
    model = small.vit()
    checkpoint.save(small.random_params(model, small.random_images(16, 24)), tmp_path / "a.npz")
    assert "unchecked" in run(capsys, tmp_path / "a.npz", tmp_path / "b.npz", "--to=npz").out
    with pytest.raises(UserError, match="a.npz has position embeddings that are no square"):
        convert.main([str(tmp_path / "a.npz"), str(tmp_path / "hf"), "--to=hf"])


def test_parameters_that_the_model_lacks_are_listed(tmp_path, workdir):
    flat = {name: x for name, x in np.load(workdir / "model.npz").items() if "query/bias" not in name}
    checkpoint.save(flat, tmp_path / "model.npz")
    (tmp_path / "model.json").write_text((workdir / "model.json").read_text())
    with pytest.raises(UserError, match=r"(?s)does not fit .*- Transformer/.*query/bias \(4, 8\) in 2 blocks"):
        convert.main([str(tmp_path), str(tmp_path / "out"), "--to=npz"])


def test_inspect_lists_names_and_shapes(capsys, tmp_path, workdir):
    assert inspection.main([str(workdir)]) == 0
    out = capsys.readouterr().out
    assert "parameters  " in out
    for name, x in np.load(workdir / "model.npz").items():
        assert any(line.split(maxsplit=2) == [name, "float32", str(x.shape)] for line in out.splitlines())
    np.savez(tmp_path / "model.npz", **np.load(workdir / "model.npz"), **{"a\x1b[2J\nb": np.zeros(3, np.float32)})
    (tmp_path / "model.json").write_text((workdir / "model.json").read_text())
    assert inspection.main([str(tmp_path)]) == 0 and r"a\x1b[2J\nb" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["hf", "timm"])
def test_a_converted_model_answers_as_before(capsys, tmp_path, workdir, to):
    """Through `predict` on the converted folder, and for hf through transformers' own processor and model."""
    peers.torch_peer("transformers")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    run(capsys, workdir, tmp_path / "out", f"--to={to}")
    ours, again = predicted(capsys, workdir, paths), predicted(capsys, tmp_path / "out", paths)
    for path in paths:
        assert_close(again[path], ours[path])
        if to == "hf":
            assert_close(predicted_by_transformers(tmp_path / "out", path), ours[path])


def predicted(capsys, model, paths):
    assert predict.main([f"--model={model}", "--top=5", "--json", *paths]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {entry["image"]: {p["label"]: p["probability"] for p in entry["predictions"]} for entry in found}


def predicted_by_transformers(folder, path):
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.inference_mode():
        logits = model(**processor(Image.open(path), return_tensors="pt")).logits
    probabilities = torch.softmax(logits, -1)[0]
    return {model.config.id2label[i]: float(p) for i, p in enumerate(probabilities)}


def assert_close(found, expected):
    assert set(found) == set(expected) == set(peers.NAMES)
    for name in expected:
        assert abs(found[name] - expected[name]) < 1e-4


@pytest.mark.parametrize("to", ["hf", "timm", "dinov2"])
def test_attention_that_other_projects_do_not_have_is_told_and_not_written(to, workdir, tmp_path):
    opened = checkpoint.open_checkpoint(workdir)
    transformer = FIELDS["transformer"] | {"attention": "window", "window_size": 2, "global_blocks": [1]}
    opened.description.model["transformer"] = transformer
    assert "attention=window, window_size=2, global_blocks=[1]" in " ".join(" ".join(convert.summary(opened)).split())
    with pytest.raises(UserError, match=f"{to} cannot express transformer.attention=window: convert with --to=npz"):
        checkpoint.write_checkpoint(opened, tmp_path / "out", to)
