"""DINOv3 against transformers' `DINOv3ViTModel` on odd sizes, and its files in and out, to the bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from vit_jax import checkpoint, models, predictor
from vit_jax.errors import UserError
from vit_jax.tasks import images

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=[False, True], ids=["gelu", "swiglu"])
def peer(request):
    config = transformers.DINOv3ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=40, patch_size=8,
        num_register_tokens=4, use_gated_mlp=request.param, hidden_act="silu" if request.param else "gelu",
    )  # fmt: skip
    model, generator = transformers.DINOv3ViTModel(config).eval(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = p.data + 0.2 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def opened(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov3")
    peer.save_pretrained(folder)
    return checkpoint.open_checkpoint(folder)


@pytest.mark.parametrize("size", [(40, 40), (24, 56)])
def test_features_are_transformers(peer, opened, size):
    pixels = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = peer(torch.tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    model = models.build("ViT", opened.description.model)
    found = jax.jit(lambda params: model.apply({"params": params}, pixels, method="features"))(opened.params)
    np.testing.assert_allclose(found["cls"], expected[:, 0], atol=1e-5)
    np.testing.assert_allclose(found["registers"], expected[:, 1:5], atol=1e-5)
    np.testing.assert_allclose(found["patches"], expected[:, 5:], atol=1e-5)
    features = images.image_features(model, opened.params, pixels)
    assert features["patches"].shape == (2, size[0] // 8, size[1] // 8, 24)


def test_blocks_in_a_loop_turn_as_well(opened):
    pixels = np.random.default_rng(0).normal(size=(1, 24, 40, 3)).astype(np.float32)
    fields = dict(opened.description.model)
    outputs = []
    for scan in (False, True):
        model = models.build("ViT", fields | {"transformer": {**fields["transformer"], "scan": scan}})
        outputs.append(model.apply({"params": opened.params}, pixels, method="features")["patches"])
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)


def test_a_model_without_registers_comes_back(opened, tmp_path):
    model = {**opened.description.model, "num_registers": 0}
    flat = {name: x for name, x in opened.flat.items() if name != "register_tokens"}
    bare = dataclasses.replace(opened, flat=flat, description=dataclasses.replace(opened.description, model=model))
    again = checkpoint.open_checkpoint(checkpoint.write_checkpoint(bare, tmp_path, "hf"))
    assert again.flat.keys() == flat.keys() and all(np.array_equal(again.flat[name], x) for name, x in flat.items())
    theirs = transformers.DINOv3ViTModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(theirs.state_dict()["norm.weight"].numpy(), flat["Transformer/encoder_norm/scale"])


def test_files_come_back_in_the_same_bits(peer, opened, tmp_path):
    checkpoint.write_checkpoint(opened, tmp_path, "hf")
    given, written = load_file(opened.path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert written.keys() == given.keys()
    for name, x in given.items():
        np.testing.assert_array_equal(written[name], x, err_msg=name)
    config, expected = (json.loads((path / "config.json").read_text()) for path in (tmp_path, opened.path))
    for name in (
        "key_bias",
        "rope_theta",
        "use_gated_mlp",
        "hidden_act",
        "num_register_tokens",
        "layer_norm_eps",
        "image_size",
    ):
        assert config[name] == expected[name], name
    again = transformers.AutoModel.from_pretrained(tmp_path)
    for (name, a), (_, b) in zip(again.named_parameters(), peer.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_trained_bias_of_the_keys_is_written(opened, tmp_path):
    name = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/bias"
    opened.flat[name] = np.ones_like(opened.flat[name])
    checkpoint.write_checkpoint(opened, tmp_path, "hf")
    assert json.loads((tmp_path / "config.json").read_text())["key_bias"]
    np.testing.assert_array_equal(checkpoint.open_checkpoint(tmp_path).flat[name], opened.flat[name])
    opened.flat[name] = np.zeros_like(opened.flat[name])


def test_any_size_in_whole_patches_and_no_other_layout(opened, tmp_path):
    checkpoint.write_checkpoint(opened, tmp_path / "model.npz", "npz")
    loaded = predictor.load(tmp_path, head=False, size=(16, 48))
    assert loaded.features([np.zeros((20, 30, 3), np.uint8)], kind="patches")["patches"].shape == (1, 2, 6, 24)
    for layout in ("timm", "dinov2"):
        with pytest.raises(UserError, match="position"):
            checkpoint.write_checkpoint(opened, tmp_path / layout, layout)
