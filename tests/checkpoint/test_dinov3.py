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
        run = jax.jit(lambda p, x, model=model: model.apply({"params": p}, x, method="features")["patches"])
        outputs.append(run(opened.params, pixels))
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


def official(peer):
    """transformers' parameters under the names of facebookresearch/dinov3; in its files masked biases may be anything."""
    theirs = dict(peer.named_parameters())
    arrays = {"rope_embed.periods": 1 / peer.rope_embeddings.inv_freq, "local_cls_norm.weight": torch.ones(24)}
    names = {
        "embeddings.cls_token": "cls_token", "embeddings.register_tokens": "storage_tokens",
        "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
        "embeddings.patch_embeddings.bias": "patch_embed.proj.bias", "norm.weight": "norm.weight", "norm.bias": "norm.bias",
    }  # fmt: skip
    arrays |= {name: theirs[x] for x, name in names.items()} | {"mask_token": theirs["embeddings.mask_token"][0]}
    ends = {"norm1": "norm1", "norm2": "norm2", "attention.o_proj": "attn.proj"}
    gated = any("gate_proj" in name for name in theirs)
    mlp = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    ends |= {f"mlp.{x}": f"mlp.{name}" for x, name in mlp.items()}
    for i in range(2):
        block = {name.split(f"layer.{i}.")[1]: x for name, x in theirs.items() if f"layer.{i}." in name}
        for end, name in ends.items():
            arrays |= {f"blocks.{i}.{name}.{kind}": block[f"{end}.{kind}"] for kind in ("weight", "bias")}
        arrays |= {f"blocks.{i}.ls{n}.gamma": block[f"layer_scale{n}.lambda1"] for n in (1, 2)}
        projections = [f"attention.{name}_proj" for name in "qkv"]
        arrays[f"blocks.{i}.attn.qkv.weight"] = torch.cat([block[f"{name}.weight"] for name in projections])
        if "attention.q_proj.bias" in block:
            biases = [block.get(f"{name}.bias", torch.full((24,), 7.0)) for name in projections]
            arrays[f"blocks.{i}.attn.qkv.bias"] = torch.cat(biases)
            arrays[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0, 1]).repeat_interleave(24)
    return {name: x.detach().clone() for name, x in arrays.items()}


def test_official_files_are_the_same_model_and_come_back(peer, opened, tmp_path):
    given = official(peer)
    torch.save(given, tmp_path / "dinov3.pth")
    ours = checkpoint.open_checkpoint(tmp_path / "dinov3.pth")
    assert ours.description.model == opened.description.model
    assert ours.flat.keys() == opened.flat.keys()
    for name, x in opened.flat.items():
        np.testing.assert_array_equal(ours.flat[name], x.reshape(ours.flat[name].shape), err_msg=name)
    written = load_file(checkpoint.write_checkpoint(ours, tmp_path / "back.safetensors", "dinov3"))
    assert written.keys() == given.keys() - {"local_cls_norm.weight"}
    np.testing.assert_allclose(written.pop("rope_embed.periods"), given["rope_embed.periods"], rtol=1e-6)
    for name, x in written.items():
        np.testing.assert_array_equal(x, np.where(given[name] == 7, 0, given[name]), err_msg=name)


def test_projections_without_any_bias(tmp_path):
    """The largest model's; transformers' file and the official one of the same numbers hold none, and come back so."""
    biases = dict.fromkeys(("query_bias", "key_bias", "value_bias"), False)
    how = {"intermediate_size": 40, "image_size": 16, "patch_size": 8, "use_gated_mlp": True, "hidden_act": "silu"}
    config = transformers.DINOv3ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, **how, **biases)
    config.num_register_tokens = 4
    peer = transformers.DINOv3ViTModel(config).eval()
    peer.save_pretrained(tmp_path / "hf")
    torch.save(official(peer), tmp_path / "dinov3.pth")
    ours = [checkpoint.open_checkpoint(path) for path in (tmp_path / "hf", tmp_path / "dinov3.pth")]
    assert ours[0].description.model == ours[1].description.model
    for name, x in ours[0].flat.items():
        np.testing.assert_array_equal(ours[1].flat[name], x.reshape(ours[1].flat[name].shape), err_msg=name)
    checkpoint.write_checkpoint(ours[0], tmp_path / "again", "hf")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(tmp_path / "hf/model.safetensors").keys()
    back = load_file(checkpoint.write_checkpoint(ours[0], tmp_path / "back.safetensors", "dinov3"))
    assert back.keys() == official(peer).keys() - {"local_cls_norm.weight"}


def test_official_periods_of_another_kind_are_refused(peer, tmp_path):
    for name, x, message in (
        ("rope_embed.periods", torch.tensor([0.5, 0.9]), "periods are not theta"),
        ("cls_norm.weight", torch.ones(24), "a norm of the class token alone"),
    ):
        torch.save(official(peer) | {name: x}, tmp_path / "dinov3.pth")
        with pytest.raises(UserError, match=message):
            checkpoint.open_checkpoint(tmp_path / "dinov3.pth")


def test_any_size_in_whole_patches_and_no_other_layout(opened, tmp_path):
    checkpoint.write_checkpoint(opened, tmp_path / "model.npz", "npz")
    loaded = predictor.load(tmp_path, head=False, size=(16, 48))
    assert loaded.features([np.zeros((20, 30, 3), np.uint8)], kind="patches")["patches"].shape == (1, 2, 6, 24)
    for layout in ("timm", "dinov2"):
        with pytest.raises(UserError, match="position"):
            checkpoint.write_checkpoint(opened, tmp_path / layout, layout)
