"""What other trainers put around a model is taken off, and what is left out is said."""

import logging

import numpy as np
import pytest
import torch
from flax import serialization
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from tests.checkpoint import tiny_files
from tests.checkpoint.hostile import assert_refused
from vit_jax import checkpoint
from vit_jax.checkpoint import timm as timm_layout


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    """(folder, the state dict of a model in timm's names, our parameters of it)."""
    path = tiny_files.write(tmp_path_factory.mktemp("timm"), "timm")
    return path.parent, load_file(path), checkpoint.open_checkpoint(path).flat


def opened(folder, flat):
    save_file({name: np.ascontiguousarray(x) for name, x in flat.items()}, folder / "model.safetensors")
    return checkpoint.open_checkpoint(folder)


def assert_equal(flat, expected):
    assert set(flat) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(flat[name], expected[name])


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.model.", "backbone."])
def test_prefixes_are_taken_off(timm, prefix):
    folder, theirs, ours = timm
    assert_equal(opened(folder, {prefix + name: x for name, x in theirs.items()}).flat, ours)


@pytest.mark.parametrize(("taken", "left"), [("teacher.", "student."), ("", "ema."), ("model.", "model_ema.")])
def test_of_two_models_in_a_file_one_is_taken_and_the_other_named(caplog, timm, taken, left):
    folder, theirs, ours = timm
    both = {taken + name: x for name, x in theirs.items()} | {left + name: x + 1 for name, x in theirs.items()}
    loss = {f"{taken}dino_head.mlp.0.weight": np.ones((3, 3), np.float32)}
    assert_equal(opened(folder, both | loss).flat, ours)
    assert "are taken" in caplog.text and f"{len(theirs) + 1} others are left" in caplog.text


@pytest.mark.parametrize(
    ("taken", "left"), [("state_dict", "state_dict_ema"), ("state_dict_ema", None), ("model_ema", None), ("model", "model_ema")]
)
def test_what_trainers_on_torch_save_is_read(tmp_path, timm, taken, left):
    """`checkpoint-9.pth.tar` of timm: weights beside the epoch, the arguments and often an average."""
    _, theirs, ours = timm
    state = {taken: {f"module.{name}": torch.from_numpy(x) for name, x in theirs.items()}}
    state |= {left: {f"module.{name}": torch.from_numpy(x + 1) for name, x in theirs.items()}} if left else {}
    path = tmp_path / "checkpoint-9.pth.tar"
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 4}}')
    torch.save({"epoch": 9, "arch": "vit_tiny_patch8_24", "version": 2, "metric": 0.5} | state, path)
    assert_equal(checkpoint.open_checkpoint(path).flat, ours)


def test_one_name_for_two_arrays_is_an_error_that_says_how_to_choose(timm):
    folder, theirs, _ = timm
    save_file(theirs | {"module.cls_token": theirs["cls_token"] + 1}, folder / "model.safetensors")
    assert_refused(checkpoint.open_checkpoint, folder, "both cls_token and module.cls_token", "keep the entries of one")


def test_names_are_safe_to_print(tmp_path):
    path = tiny_files.write(tmp_path, "hf")
    save_file(load_file(path) | {"vit.encoder.layer.0.\x1b[2J\n": np.ones(3, np.float32)}, path)
    assert_refused(checkpoint.open_checkpoint, path, r"does not know: encoder.layer.0.\x1b[2J\n (3,)")


def test_deit_iii_is_read_with_its_layer_scale_and_imagenets_pixels(caplog, tmp_path, timm):
    _, theirs, ours = timm
    gammas = {f"blocks.{i}.gamma_{k}": np.full(32, i + k, np.float32) for i in (0, 1) for k in (1, 2)}
    theirs = theirs | gammas | {"pos_embed": theirs["pos_embed"][:, 1:]}  # its class token has no position
    for name in [name for name in theirs if ".attn.q" in name and "norm" in name]:
        del theirs[name]
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 4}}')
    found = opened(tmp_path, theirs)
    assert found.family == "DeiT III" and found.description.resize == "bicubic"
    assert found.description.mean == (123.675, 116.28, 103.53)
    assert "ImageNet's mean and std are assumed" in caplog.text
    np.testing.assert_array_equal(found.flat["Transformer/encoderblock_1/ls2/gamma"], np.full(32, 3))
    positions = found.flat["Transformer/posembed_input/pos_embedding"]
    np.testing.assert_array_equal(positions[:, 1:], ours["Transformer/posembed_input/pos_embedding"][:, 1:])
    assert not positions[:, 0].any()


@pytest.mark.parametrize("older", [False, True])
def test_the_originals_own_checkpoint_is_read(caplog, tmp_path, older):
    flat = dict(np.load(tiny_files.write(tmp_path)))
    params = unflatten_dict(flat, sep="/")
    state = ({"target": params, "state": {"step": 3}}, 3) if older else (params, {"mu": params}, 3)
    for step in (90, 100):
        (tmp_path / f"checkpoint_{step}").write_bytes(serialization.to_bytes(state))
    with caplog.at_level(logging.INFO, "vit_jax"):
        for source in (tmp_path, tmp_path / "checkpoint_100"):
            found = checkpoint.open_checkpoint(source)
            assert found.path.name == "checkpoint_100"
            assert_equal(found.flat, flat)
    assert "the parameters under 0" in caplog.text
    data = (tmp_path / "checkpoint_90").read_bytes()
    for bad in (b"", data[: len(data) // 2], b"\xdd\xff\xff\xff\xff", b"\x93" * 10_000, b"x" * 100):
        (tmp_path / "checkpoint_90").write_bytes(bad)
        assert_refused(checkpoint.open_checkpoint, tmp_path / "checkpoint_90", "flax")


def test_without_a_config_it_is_said_what_is_assumed(caplog, monkeypatch, timm):
    _, theirs, _ = timm
    folder = timm[0] / "alone"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_args": {"num_heads": 4}}')
    assert opened(folder, theirs).description.mean == (127.5,) * 3
    assert "127.5 and 127.5 are assumed; --mean and --std, or config.pp's, set others" in caplog.text
    (folder / "config.json").unlink()
    monkeypatch.setattr(timm_layout, "_published_heads", lambda width: 4)
    opened(folder, theirs)
    assert "neither heads nor activation: 4 heads and gelu, as published models have them, are assumed" in caplog.text
