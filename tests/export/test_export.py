"""Exported files compute what the model does, for any number of images, and what is needed to use them stands beside."""

import ast
import copy
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import vit_jax.api
from tests import towers
from tests.export import models
from tests.serve import models as serve_models
from vit_jax import checkpoint, predictor
from vit_jax.errors import UserError
from vit_jax.export import __main__ as export
from vit_jax.export import files, onnx_graph, plain
from vit_jax.export.program import Program, random_pixels

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")
pytest.importorskip("flatbuffers")
OUTPUTS = {"vit": {"logits", "probabilities"}, "dinov2": {"cls", "patches"}, "siglip": {"zimg"}}
ALONE = """
import sys

import numpy as np
from jax import export

program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
for count in (2, 5):
    outputs = program.call(np.load(sys.argv[2])[:count])
np.savez(sys.argv[3], **outputs)
assert program.platforms == ("cpu", "cuda", "tpu")
assert not [name for name in sys.modules if name.startswith(("vit_jax", "flax"))]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of every family, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("models")
    for name, family in models.FAMILIES.items():
        models.write(folder / name, *family)
    towers.write(folder / "siglip", head="sigmoid")
    return folder


def exported(model: Path, out: Path, *options: str) -> tuple[dict[str, np.ndarray], dict]:
    """The outputs of a new ONNX file for 5 images, and the content of the JSON beside."""
    export.main([f"--model={model}", str(out), "--to=onnx", *options])
    facts = json.loads(out.with_name(f"{out.name}.json").read_text())
    return run(out, images(facts)), facts


def images(facts: dict) -> np.ndarray:
    """As the JSON beside a file says."""
    pixels = random_pixels(tuple(facts["image_size"]), 5)
    if facts["input"]["dtype"] == "uint8":
        return pixels
    return (pixels - np.float32(facts["mean"])) / np.float32(facts["std"])


def run(path: Path, inputs: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip([y.name for y in session.get_outputs()], session.run(None, {"image": inputs}), strict=True))


@functools.cache
def expected(model: Path) -> dict[str, np.ndarray]:
    """What the predictor makes of the same images, which it is given at their size."""
    loaded = predictor.load(model, head=None)
    return loaded.predict_examples([{"image": x.astype(np.float32)} for x in random_pixels(loaded.image_size, 5)], 5)


@pytest.mark.parametrize("name", [*models.FAMILIES, "siglip"])
def test_onnx_gives_what_the_model_gives(folder, tmp_path, name, capsys):
    outputs, facts = exported(folder / name, tmp_path / "model.onnx", "--preprocess")
    assert set(outputs) == set(facts["outputs"]) == OUTPUTS.get(name, OUTPUTS["vit"])
    if name == "dinov2":
        loaded = predictor.load(folder / name, head=False)
        normalised = (random_pixels(models.SIZE, 5) - np.float32(facts["mean"])) / np.float32(facts["std"])
        features = loaded.task.model.module.apply({"params": loaded.params}, normalised, method="features")
        wanted = {"cls": features["cls"], "patches": features["map"]}
    else:
        wanted = expected(folder / name)
    for key, y in wanted.items():
        np.testing.assert_allclose(outputs[key], y, atol=1e-5)
        assert facts["outputs"][key]["shape"][1:] == list(y.shape[1:])
    assert "largest difference" in capsys.readouterr().out
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    used = {node.op_type for node in nodes}
    assert sum(node.op_type == "Gelu" for node in nodes) == (2 if name == "mixer" else 1)  # nothing is computed twice
    assert {"LayerNormalization", "Gelu", "MatMul"} <= used and not used & {"Einsum", "Gemm", "Tanh", "Erf", "If"}
    assert ("Softmax" in used) == (name != "mixer")
    assert jnp.cumsum(jnp.ones((2, 3)), 1).shape == (2, 3), "jax2onnx leaves a cumsum that takes its axis by name alone"


def test_images_are_normalised_before_and_all_is_in_the_metadata(folder, tmp_path):
    out = tmp_path / "model.onnx"
    outputs, facts = exported(folder / "vit", out, "--dtype=float16")
    np.testing.assert_allclose(outputs["logits"], expected(folder / "vit")["logits"], atol=1e-2)
    assert outputs["logits"].dtype == np.float32
    assert facts["input"]["dtype"] == "float32" and facts["input"]["shape"] == ["batch", *models.SIZE, 3]
    assert facts["class_names"] == ["cat", "dog", "émeu"] and facts["preprocessing"]["resize_to"] == 20
    model = onnx.load(out)
    stored = {x.key: x.value for x in model.metadata_props}
    known = {name: x for name, x in facts.items() if x is not None}
    assert {name: x if isinstance(known[name], str) else json.loads(x) for name, x in stored.items()} == known
    assert max(np.prod(x.dims) for x in model.graph.initializer if x.data_type == onnx.TensorProto.FLOAT) <= 1


@pytest.fixture(scope="module")
def program(folder) -> Program:
    return Program(predictor.load(folder / "vit"))


@pytest.fixture(scope="module")
def graph(program) -> onnx.ModelProto:
    return onnx_graph.convert(program)


@pytest.mark.parametrize("kind, operator", [(kind, found) for kind, (_, found) in onnx_graph.QUANTISERS.items()])
def test_kernels_of_8_bits(folder, tmp_path, program, graph, kind, operator):
    for i, pixels in enumerate(random_pixels((30, 40), 3)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    photos = files._calibration(program, str(tmp_path))
    assert [x.shape for x in photos] == [(1, *models.SIZE, 3)] * 3
    quantised = onnx_graph.quantise(copy.deepcopy(graph), kind, photos)
    found = onnx_graph.run(quantised.SerializeToString(), program.inputs(random_pixels(models.SIZE, 5)))["logits"]
    wanted = expected(folder / "vit")["logits"]
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()
    used = [node.op_type for node in quantised.graph.node]
    assert used.count(operator) >= 6  # of 8 products, three of which have the same input
    kept = [np.prod(x.dims) for x in quantised.graph.initializer if x.data_type == onnx.TensorProto.FLOAT]
    assert max(kept) <= 13 * 32  # the embeddings of positions
    run_as = optimised(quantised, tmp_path / "optimised.onnx")
    assert "DequantizeLinear" not in run_as  # what is left so is computed in float32
    assert run_as.count("MatMul") + run_as.count("FusedMatMul") + run_as.count("Gemm") == 2  # those of attention


def optimised(model: onnx.ModelProto, path: Path) -> list[str]:
    """The operators that onnxruntime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path).graph.node]


def test_int8_by_itself_takes_the_fastest():
    assert export._parser().parse_args(["--model=m", "m.onnx", "--to=onnx", "--int8"]).int8 == "dynamic"


def test_a_model_without_products_has_no_kernels_of_8_bits(graph):
    without = copy.deepcopy(graph)
    del without.graph.node[:]
    with pytest.raises(UserError, match="no product of matrices"):
        onnx_graph.quantise(without, "weights")


def test_stablehlo_runs_in_a_process_without_this_package(folder, tmp_path):
    export.main([f"--model={folder / 'vit'}", str(tmp_path / "m.stablehlo"), "--to=stablehlo"])
    facts = json.loads((tmp_path / "m.stablehlo.json").read_text())
    np.save(tmp_path / "images.npy", images(facts))
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    arguments = ["m.stablehlo", "images.npy", "outputs.npz"]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], cwd=tmp_path, env=environment, check=True, timeout=120)
    with np.load(tmp_path / "outputs.npz") as found:
        for key, y in expected(folder / "vit").items():
            np.testing.assert_allclose(found[key], y, atol=1e-5)


def test_a_file_that_computes_something_else_is_not_left(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "to_bytes", lambda *args: b"")
    monkeypatch.setattr(onnx_graph, "run", lambda data, x: dict.fromkeys(OUTPUTS["vit"], np.ones((len(x), 3))))
    with pytest.raises(UserError, match="not written: it computes something else"):
        export.main([f"--model={folder / 'vit'}", str(tmp_path / "out" / "model.onnx"), "--to=onnx"])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("make, to", [(serve_models.segmenter, "onnx"), (serve_models.detector, "stablehlo")])
def test_models_of_other_tasks_give_what_their_task_predicts(tmp_path, make, to):
    made = make()
    out = vit_jax.api.Model(made).export(tmp_path / f"model.{to}", to=to, preprocess=True)
    pixels, extent = random_pixels(made.image_size, 2), np.int32(made.image_size)
    wanted = made.predict_examples([{"image": x.astype(np.float32), "extent": extent} for x in pixels], 2)
    found = files.FORMATS[to].run(out.read_bytes(), pixels)
    assert set(found) == set(wanted)
    for key, y in wanted.items():
        np.testing.assert_allclose(found[key], y, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (["m.onnx", "--to=onx"], "unknown format 'onx': did you mean onnx?"),
        (["m.onnx", "--to=stablehlo"], "must end with .stablehlo"),
        (["folder.onnx", "--to=onnx"], "folder.onnx is a folder"),
        (["m.stablehlo", "--to=stablehlo", "--int8=weights"], "is for --to=onnx"),
        (["m.onnx", "--to=onnx", "--int8=static"], "--calibrate=FOLDER go together"),
        (["m.onnx", "--to=onnx", "--calibrate=photos"], "--calibrate=FOLDER go together"),
        (["m.onnx", "--to=onnx", "--int8=static", "--calibrate=nowhere"], "nowhere"),
    ],
)
def test_wrong_options(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.onnx").mkdir()
    with pytest.raises(UserError) as error:
        export.main([f"--model={folder / 'vit'}", *options])
    assert message in str(error.value)


MERGING = {"gap": models.VIT | {"classifier": "gap"}, "distilled": models.VIT | {"classifier": "distilled", "num_registers": 1}}


@pytest.mark.parametrize("kind, to", [("gap", "stablehlo"), ("gap", "onnx"), ("distilled", "onnx")])
def test_tokens_are_merged_in_files(tmp_path, kind, to):
    fields = MERGING[kind] | {"transformer": models.TRANSFORMER | {"num_layers": 3}}
    made = predictor.load(models.write(tmp_path / kind, "ViT", fields), tome=3)  # 12 patches, 9, 6, 3
    files.write(made, tmp_path / f"m.{to}", to=to, preprocess=True)
    pixels = random_pixels(models.SIZE, 5)
    found = files.FORMATS[to].run((tmp_path / f"m.{to}").read_bytes(), pixels)["logits"]
    examples = [{"image": x.astype(np.float32)} for x in pixels]
    np.testing.assert_allclose(found, made.predict_examples(examples, 5)["logits"], atol=1e-5)
    whole = dataclasses.replace(made, tome=0).predict_examples(examples, 5)["logits"]
    assert np.abs(found - whole).max() > 1e-3


@pytest.mark.parametrize("kind", ["Captioner", "AttendingLSTM"])
def test_a_captioner_writes_the_same_sentences_where_this_package_is_not(tmp_path, kind):
    """The reader is the one of docs/export.md."""
    made = serve_models.captioner(kind)
    with pytest.raises(UserError, match="--to=stablehlo alone"):
        files.write(made, tmp_path / "m.onnx")
    files.write(made, tmp_path / "says.stablehlo", to="stablehlo", preprocess=True)
    for i, pixels in enumerate(random_pixels(made.image_size, 5)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (reader,) = re.findall(r"```text\n(import json, sys\n.*?)```", Path("docs/export.md").read_text(), re.DOTALL)
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    alone = f"{reader}\nimport sys\nassert not [x for x in sys.modules if x.startswith(('vit_jax', 'flax'))]"
    run = [sys.executable, "-c", alone, *(f"{i}.png" for i in range(5))]
    said = subprocess.run(run, cwd=tmp_path, env=environment, check=True, timeout=120, capture_output=True, text=True).stdout
    outputs = made.predict_examples([{"image": x.astype(np.float32)} for x in random_pixels(made.image_size, 5)], 5)
    assert said.splitlines() == [written.text for written in made.task.write(outputs)]
    assert len(set(said.splitlines())) > 1


def test_norms_without_a_bias_are_left_as_they_are():
    x, norm = np.random.default_rng(0).normal(size=(2, 8)).astype("f"), nn.LayerNorm(use_bias=False)
    variables = {"params": {"scale": np.linspace(1, 2, 8, dtype="f")}}
    with nn.intercept_methods(plain.named):
        found = norm.apply(variables, x)
    np.testing.assert_array_equal(found, norm.apply(variables, x))


def test_a_text_tower_alone_is_no_model_of_images(folder, tmp_path):
    checkpoint.save(predictor.load(folder / "siglip").params["txt"], tmp_path / "model.npz")
    with pytest.raises(UserError, match="'embedding/kernel' is missing"):
        export.main([f"--model={tmp_path}", str(tmp_path / "m.onnx"), "--to=onnx"])


def test_without_the_libraries_the_error_says_how_to_get_them(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "NEEDED", ("jax2onnx", "no_such_library"))
    with pytest.raises(UserError, match="needs no_such_library: pip install onnx .* --no-deps jax2onnx"):
        export.main([f"--model={folder / 'vit'}", str(tmp_path / "m.onnx"), "--to=onnx"])


def test_no_library_of_onnx_is_imported_before_it_is_needed():
    for path in Path(files.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [x.name for x in getattr(node, "names", ())]
            assert not {name.partition(".")[0] for name in names} & set(onnx_graph.NEEDED), path


def test_what_no_file_holds_and_bad_images_for_scales_are_named_before_the_work(folder, tmp_path, monkeypatch):
    loaded = predictor.load(folder / "vit")
    (tmp_path / "bad.jpg").write_bytes(b"junk")
    with pytest.raises(UserError, match="bad.jpg: the image cannot be decoded"):
        files.write(loaded, tmp_path / "m.onnx", int8="static", calibrate=tmp_path)
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="GiB, a file of either format holds 2"):
        files.write(loaded, tmp_path / "m.stablehlo", to="stablehlo")
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jpg"}
