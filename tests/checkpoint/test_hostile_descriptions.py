"""What strangers may write beside weights: every absurd entry is refused by the file's and the entry's name."""

import json
import time

import pytest

from tests.checkpoint import tiny_files
from vit_jax import checkpoint
from vit_jax.checkpoint import Description
from vit_jax.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{layout: (folder, {file: JSON})}"""
    folder, files = tmp_path_factory.mktemp("files"), {}
    for to in ("npz", "hf", "timm"):
        path = tiny_files.write(folder, to)
        files[to] = path.parent, {p.name: json.loads(p.read_text()) for p in path.parent.glob("*.json")}
    return files


def changed(content, dotted, value):
    """A copy of the object with one entry replaced."""
    first, _, rest = dotted.partition(".")
    return content | {first: changed(content.get(first) or {}, rest, value) if rest else value}


NPZ = [
    *(("model_type", x) for x in (3, None, [], "Vit", {})),
    *(("model", x) for x in (3, None, [], "ViT")),
    *(("model.hidden_size", x) for x in (-1, 0, "32", 1.5, True, 10**9, [32], 10**400, None)),
    *(("model.patches", x) for x in (8, [8, 8], {"size": [0, 8]}, {"size": [8]}, {"size": "8"}, {"size": [10**9, 1]})),
    *(("model.transformer", x) for x in (3, [], "x", None)),
    *(("model.transformer.num_heads", x) for x in (0, -4, 5, "4", 1e9)),
    *(("model.transformer.num_layers", x) for x in (10**9, 10**7, -1, [2], "2")),
    *(("model.transformer.mlp_dim", x) for x in (0, 10**7, {"a": 1})),
    *(("model.transformer.norm_eps", x) for x in (-1, "small", float("nan"), 10, None)),
    *(("model.transformer.dropout_rate", x) for x in (1.5, "0.1")),
    *(("model.transformer.constrain", x) for x in (1, "f")),
    ("model.transformer.layer_scale", "yes"),
    ("model.dtype", "float99"),
    ("model.num_classes", 10**9),
    ("model.num_registers", -1),
    ("model.resnet", [1]),
    ("model.resnet", {"num_layers": [10**9]}),
    *(("image_size", x) for x in ([10**6, 10**6], [0, 8], "24", [1, 2, 3], {})),
    *(("grid", x) for x in ([0, 3], [10**9, 10**9], "3")),
    *(("mean", x) for x in ("0.5", [1, 2], [float("inf")] * 3, [None] * 3, {})),
    *(("std", x) for x in (0, [0.0] * 3, [-1] * 3, [float("nan")] * 3)),
    *(("class_names", x) for x in ("abc", [1, 2, 3], [None] * 3, {"0": "a"})),
    *(
        ("preprocessing", x)
        for x in (3, [], {"interpolation": "lanczos"}, {"resize": 3}, {"resize_to": -3}, {"resize_to": "9"})
    ),
    ("preprocessing", {"interpolation": "bicubic", "antialias": False}),
    *(("resize", x) for x in ("nearest", 3)),
    *(("head", x) for x in ("tanh", 1)),
    *(("task", x) for x in (3, {}, {"type": 3})),
    ("step", -1),
    ("metrics", [1]),
]
HF = [
    *(("config.json", "image_size", x) for x in (-1, "24", [24], [0, 24], 10**9, 48)),
    *(("config.json", "num_attention_heads", x) for x in (0, -1, "4", 5, 10**12)),
    *(("config.json", "layer_norm_eps", x) for x in ("x", -1, float("nan"), [])),
    *(("config.json", "id2label", x) for x in ([1, 2, 3], {"0": 1, "1": 2, "2": 3}, {"a": "x", "b": "y", "c": "z"})),
    *(("config.json", "problem_type", x) for x in ("regression", 3)),
    *(("config.json", "model_type", x) for x in (3, [])),
    *(("preprocessor_config.json", "image_mean", x) for x in ("x", [0.5], {}, [float("nan")] * 3)[:1]),
    *(("preprocessor_config.json", "image_std", x) for x in ([0, 0, 0], "x", [-1] * 3)),
    *(("preprocessor_config.json", "size", x) for x in ("x", {"longest_edge": 9}, {"height": 0, "width": 3}, -1, {})),
    *(("preprocessor_config.json", "resample", x) for x in (0, 1, "bilinear", 99)),
    *(("preprocessor_config.json", name, 1) for name in ("do_resize", "do_normalize", "do_rescale", "do_center_crop")),
    ("preprocessor_config.json", "do_resize", False),
    ("preprocessor_config.json", "rescale_factor", 0),
    ("preprocessor_config.json", "do_flip_channel_order", True),
    ("preprocessor_config.json", "do_pad", True),
    ("preprocessor_config.json", "image_processor_type", "SamImageProcessor"),
    ("preprocessor_config.json", "size", {"shortest_edge": 24}),
    ("preprocessor_config.json", "size", {"height": 7999, "width": 24}),
    ("preprocessor_config.json", "do_center_crop", True),
]
TIMM = [
    *(("model_args", x) for x in (3, [])),
    *(("model_args.num_heads", x) for x in (0, -1, "4", 5, 10**9)),
    *(("model_args.img_size", x) for x in ("x", [1], 10**9)),
    *(("pretrained_cfg.mean", x) for x in ("x", [1, 2], [float("nan")] * 3)),
    *(("pretrained_cfg.std", x) for x in ([0] * 3, {})),
    *(("pretrained_cfg.crop_pct", x) for x in (0, "x", 9)),
    ("pretrained_cfg.crop_mode", "border"),
    ("pretrained_cfg.interpolation", "lanczos"),
    ("pretrained_cfg.input_size", 3),
    ("label_names", [1, 2, 3]),
    ("architecture", 3),
]
CASES = [("npz", "model.json", *case) for case in NPZ] + [("hf", *case) for case in HF]
CASES += [("timm", "config.json", *case) for case in TIMM]


@pytest.mark.parametrize(("layout", "file", "entry", "value"), CASES)
def test_an_absurd_entry_is_refused_at_once(written, layout, file, entry, value):
    folder, files = written[layout]
    (folder / file).write_text(json.dumps(changed(files[file], entry, value)))
    started = time.process_time()
    try:
        with pytest.raises(UserError) as error:
            checkpoint.open_checkpoint(folder)
    finally:
        (folder / file).write_text(json.dumps(files[file]))
    assert str(folder) in str(error.value) and len(str(error.value)) < 1000
    assert time.process_time() - started < 2
    if layout == "npz":
        assert entry.split(".")[-1] in str(error.value) or str(value)[:5] in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a":' + "[" * 60 + "]" * 60 + "}", "\xff", "", "{}"])
@pytest.mark.parametrize(("layout", "file"), [("npz", "model.json"), ("hf", "config.json"), ("hf", "preprocessor_config.json")])
def test_what_is_no_description_is_refused(written, layout, file, text):
    folder, files = written[layout]
    (folder / file).write_bytes(text.encode("latin-1"))
    try:
        if text == "{}" and file.startswith("preprocessor"):
            assert checkpoint.open_checkpoint(folder).description.mean == (127.5,) * 3
        else:
            with pytest.raises(UserError, match=str(folder)):
                checkpoint.open_checkpoint(folder)
    finally:
        (folder / file).write_text(json.dumps(files[file]))


@pytest.mark.parametrize("layout", ["npz", "hf", "timm"])
def test_unchanged_it_opens(written, layout):
    assert checkpoint.open_checkpoint(written[layout][0]).description.class_names == tiny_files.DESCRIPTION.class_names


def test_a_byte_order_mark_is_no_damage(written):
    folder, files = written["npz"]
    (folder / "model.json").write_text("\ufeff" + json.dumps(files["model.json"]))
    assert checkpoint.open_checkpoint(folder).description == tiny_files.DESCRIPTION


@pytest.mark.parametrize(
    "decoder", [None, 3, [1], *({"width": x} for x in ("8", -8, 0)), {"num_heads": 0}, {"norm_eps": "a"}, {"activation": 3}]
)
def test_the_decoder_of_an_autoencoder_is_checked_like_its_encoder(written, decoder):
    content = changed(written["npz"][1]["model.json"] | {"model_type": "MAE"}, "model.decoder", decoder)
    with pytest.raises(UserError, match="^file has entries that make no sense: model.decoder"):
        Description.from_json(content, "file")
