"""The description beside a parameter file: it comes back whole, and belongs to the right file."""

import json
import re

import numpy as np
import pytest

from tests.models import small
from vit_jax import models
from vit_jax.checkpoint import describe
from vit_jax.errors import UserError

DESCRIPTION = {
    "model_type": "ViT",
    "model": {"patches": {"size": [16, 16]}, "num_classes": 2, "representation_size": None},
    "image_size": [32, 48],
    "grid": [2, 3],
    "mean": [127.5, 127.5, 127.5],
    "std": [127.5, 127.5, 127.5],
    "class_names": ["Bär", "猫"],
}


def test_a_description_comes_back_as_it_was(tmp_path):
    path = tmp_path / "Ti_16-i21k-lr_0.001-sd_0.0.npz"
    assert describe.read(path) is None
    describe.write(path, describe.Description(**DESCRIPTION))
    assert (tmp_path / "Ti_16-i21k-lr_0.001-sd_0.0.json").exists()
    assert describe.read(path) == describe.Description(**DESCRIPTION)


@pytest.mark.parametrize(
    ("files", "described_by"),
    [
        (["a.npz"], None),
        (["a.npz", "a.json", "model.json"], "a.json"),
        (["a.npz", "model.json"], "model.json"),  # a model.npz that was renamed
        (["a.npz", "model.npz", "model.json"], None),
        (["a.npz", "b.json"], None),
    ],
)
def test_a_description_belongs_to_one_file(tmp_path, files, described_by):
    for name in files:
        (tmp_path / name).write_text(json.dumps(DESCRIPTION | {"dataset": name}))
    found = describe.read(tmp_path / "a.npz")
    assert (found and found.dataset) == described_by


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"model_type": "ViT",', "is no valid JSON description"),
        ("null", "is no valid JSON description"),
        ("\0\0\0", "is no valid JSON description"),
        ("[]", "lacks class_names, grid, image_size"),
        (json.dumps({k: v for k, v in DESCRIPTION.items() if k not in ("std", "grid")}), "lacks grid, std"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, text, complaint):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'a.json'))} .*{complaint}"):
        describe.read(tmp_path / "a.npz")


def test_the_fields_that_a_recipe_fills_in_are_read_back():
    kind, fields = models.named("ViT-Micro_4", num_classes=len(DESCRIPTION["class_names"]))
    fields = models.architecture_of(kind).with_options(fields)
    content = json.loads(json.dumps(DESCRIPTION | {"model_type": kind, "model": fields}))
    assert describe.Description.from_json(content, "here").model == json.loads(json.dumps(fields))
    content["model"]["transformer"]["global_blocks"] = "all"
    with pytest.raises(UserError, match="global_blocks is .all.; it must be a list of whole numbers"):
        describe.Description.from_json(content, "here")


def test_the_summary_tells_what_a_file_holds():
    images = np.zeros((1, 224, 224, 3), np.float32)
    vit = small.flat(small.shapes(models.get_model("testing"), images))
    assert describe.summary(vit).startswith("21,390 parameters, patches of 16x16, width 10, 1 block")
    assert describe.summary(vit).endswith(", 1000 classes")
    mixer = small.flat(small.shapes(small.mixer(num_classes=None, num_blocks=11), images))
    assert describe.summary(mixer).endswith("patches of 8x8, width 32, 11 blocks")


TOWERS = {
    "model_type": "TwoTowers",
    "model": {
        "image": {"patches": {"size": [16, 16]}, "transformer": {"num_layers": 1, "num_heads": 2}, "hidden_size": 8},
        "text": {"width": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 30},
        "out_dim": [None, 8],
        "bias_init": -10.0,
    },
    "class_names": [],
    "text": {"tokenizer": "sentencepiece", "vocab": "words.model", "max_len": 16, "lower": True, "pad_token": 0},
}


def test_a_description_of_two_towers_comes_back_as_it_was(tmp_path):
    description = describe.Description(**DESCRIPTION | TOWERS)
    describe.write(tmp_path / "model.npz", description)
    assert describe.read(tmp_path / "model.npz") == description


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("text", {"tokenizer": "berd"}, "unknown text.tokenizer 'berd': did you mean bert"),
        ("text", {"tokenizer": "bert", "vocab": "../words.txt", "max_len": 9}, "text.vocab .* the name of a file in the same"),
        ("text", {"tokenizer": "bert", "vocab": "w", "max_len": 1}, "text.max_len is 1; it must be a whole number from 2"),
        ("text", {"tokenizer": "bert", "vocab": "w", "max_len": 9, "lower": True}, "unknown entry of text 'lower'"),
        ("model", TOWERS["model"] | {"out_dim": [8, 8, 8]}, "model.out_dim"),
        ("model", TOWERS["model"] | {"text": {"width": "8"}}, "model.text.width"),
        ("model", TOWERS["model"] | {"image": {"hidden_size": -1}}, "model.image.hidden_size"),
    ],
)
def test_a_damaged_description_of_two_towers(entry, value, message):
    with pytest.raises(UserError, match=message):
        describe.Description.from_json(DESCRIPTION | TOWERS | {entry: value}, "model.json")
