"""What a preprocessor_config.json says of pixels: the same as transformers makes of it, or a refusal by name."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.checkpoint import peers, tiny_files
from vit_jax import checkpoint
from vit_jax.data.host.view import eval_image
from vit_jax.errors import UserError

PHOTO = np.random.default_rng(0).integers(0, 256, (53, 71, 3), np.uint8)
VIT = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
BIT = {"image_processor_type": "BitImageProcessor", "crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 29}}
CASES = {
    "whole image": VIT,
    "a number for both sides": VIT | {"size": 24},
    "bicubic": VIT | {"resample": 3},
    "not normalised": VIT | {"do_normalize": False},
    "not rescaled": VIT | {"do_rescale": False, "image_mean": [110, 120, 130], "image_std": [50, 60, 70]},
    "another factor": VIT | {"rescale_factor": 1 / 127.5, "image_mean": [1, 1.1, 0.9], "image_std": [1, 2, 0.5]},
    "stretched, then cut": VIT | {"size": {"height": 27, "width": 31}, "do_center_crop": True, "crop_size": 24},
    "shorter side, then cut": BIT,
    "a number for the shorter side": BIT | {"size": 31, "crop_size": 24},
    "silent DeiT": {"image_processor_type": "DeiTImageProcessor", "size": 30, "crop_size": 24},
    "one mean for all": VIT | {"image_mean": 0.4, "image_std": 0.3},
}


@pytest.mark.parametrize("case", CASES)
def test_a_photo_becomes_the_pixels_that_transformers_makes_of_it(tmp_path, case):
    peers.torch_peer("transformers")
    from transformers import AutoImageProcessor

    folder = tiny_files.write(tmp_path, "hf").parent
    (folder / "preprocessor_config.json").write_text(json.dumps(CASES[case]))
    expected = AutoImageProcessor.from_pretrained(folder)(Image.fromarray(PHOTO), return_tensors="np")["pixel_values"][0]
    description = checkpoint.open_checkpoint(folder).description
    mine = eval_image(PHOTO, crop=description.image_size, **description.preprocessing)
    mine = (mine - np.float64(description.mean)) / np.float64(description.std)
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(mine / scale, expected.transpose(1, 2, 0) / scale, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"resize_to": 29, "antialias": True, "floor_cut": True},
        {"resize_to": (27, 31), "interpolation": "bicubic", "antialias": True, "floor_cut": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_what_is_written_is_read_as_it_was(tmp_path, how, head):
    description = checkpoint.open_checkpoint(tiny_files.write(tmp_path, "hf", preprocessing=how, head=head)).description
    plain = {"resize_to": None, "interpolation": "bilinear", "antialias": True, "floor_cut": True}
    assert description.preprocessing == plain | how and description.head == head


@pytest.mark.parametrize("to", ["hf", "timm"])
@pytest.mark.parametrize("resize_to", [24, 27, 29, 256])
def test_a_shorter_side_survives_in_both_layouts(tmp_path, to, resize_to):
    how = {"resize_to": resize_to, "interpolation": "bicubic", "antialias": True}
    again = checkpoint.open_checkpoint(tiny_files.write(tmp_path, to, preprocessing=how)).description.preprocessing
    assert {name: again[name] for name in how} == how


def test_what_transformers_cannot_say_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot resize to a shorter side of 40 and cut out 24x32"):
        tiny_files.write(tmp_path, "hf", preprocessing={"resize_to": 40}, image_size=(24, 32), grid=(3, 4))
    with pytest.raises(UserError, match="timm.* a head of sigmoids"):
        tiny_files.write(tmp_path, "timm", head="sigmoid")
