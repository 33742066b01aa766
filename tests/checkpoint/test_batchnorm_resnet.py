"""An ImageNet ResNet of timm or transformers is the model that they compute, and begins the backbone of a DETR."""

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.hostile import assert_refused
from tests.models import small, transformer_peer
from tests.models.torch_peer import without_torchvision
from vit_jax import checkpoint, models
from vit_jax.tasks import detect
from vit_jax.tasks.task import Model

UNITS = (1, 2, 1, 1)


def timm(folder):
    with without_torchvision():
        from timm.models.resnet import Bottleneck, ResNet

        model = transformer_peer.randomise(ResNet(Bottleneck, UNITS, num_classes=5)).eval()
    path = folder / "model.safetensors"
    save_file({f"module.{name}": x for name, x in model.state_dict().items()}, path)  # as trained on several GPUs
    return path, model.forward_features


def torchvision(folder):
    """The same names, as `torch.save` writes them."""
    path, forward = timm(folder)
    state = {name.removeprefix("module."): torch.from_numpy(x) for name, x in _arrays(path).items()}
    torch.save(state, folder / "resnet.pth")
    return folder / "resnet.pth", forward


def transformers(folder):
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [32, 64, 128, 256], "depths": list(UNITS)}
    model = transformer_peer.randomise(ResNetForImageClassification(ResNetConfig(**sizes, num_labels=5))).eval()
    model.save_pretrained(folder)
    return folder, lambda x: model.resnet(x).last_hidden_state


def _arrays(path):
    from safetensors.numpy import load_file

    return load_file(path)


@pytest.mark.parametrize("write", [timm, torchvision, transformers])
def test_it_is_the_same_model_and_begins_a_detector(tmp_path, write):
    path, forward = write(tmp_path)
    opened = checkpoint.open_checkpoint(path)
    assert opened.description.model["num_layers"] == list(UNITS) and opened.description.mean == (123.675, 116.28, 103.53)
    images = np.random.default_rng(0).normal(size=(2, 75, 102, 3)).astype(np.float32)
    ours = jax.jit(models.build("BatchNormResNet", opened.description.model).apply)({"params": opened.params}, images)
    with torch.inference_mode():
        theirs = forward(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())

    fields = {"body": {"resnet": opened.description.model}, "num_classes": 3, "num_queries": 4, "width": 16, "mlp_dim": 8}
    fields |= {"num_encoder_layers": 1, "num_decoder_layers": 1}
    model = Model("DETR", fields, models.build("DETR", fields))
    fresh = small.random_values(jax.eval_shape(detect.make_init(model.module, (64, 64)), jax.random.key(0)))
    for tower in ("", "backbone"):
        begun = detect.make_load(model, (64, 64))({tower: opened}, fresh)
        np.testing.assert_array_equal(
            begun["backbone"]["layer2_1"]["conv2"]["kernel"], opened.params["layer2_1"]["conv2"]["kernel"]
        )
        np.testing.assert_array_equal(begun["input_proj"]["kernel"], fresh["input_proj"]["kernel"])


def test_a_resnet_of_other_blocks_is_refused(tmp_path):
    with without_torchvision():
        from timm.models.resnet import BasicBlock, ResNet

        save_file(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5).state_dict(), tmp_path / "model.safetensors")
    assert_refused(checkpoint.open_checkpoint, tmp_path, "ResNet of two convolutions a block", "ResNet-50")
