"""Published segmenters: written in torch under their names, read, run, and written back."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from tests.models import torch_peer, transformer_peer
from vit_jax import checkpoint, convert, models
from vit_jax.checkpoint.export import write_checkpoint
from vit_jax.checkpoint.opening import open_checkpoint
from vit_jax.errors import UserError
from vit_jax.models.segment import Backbone

WIDTH, CLASSES, SIDE = 128, 5, 24


pytestmark = pytest.mark.usefixtures("full_precision")


class Block(nn.Module):
    """Segmenter's block, which is a ViT's with torch's epsilon."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 48), "fc2": nn.Linear(48, WIDTH)})

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).reshape(b, n, 3, d // 64, 64).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1) / 8).softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)
        x = x + self.attn["proj"](y)
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.cls_emb = nn.Parameter(torch.randn(1, CLASSES, WIDTH))
        self.proj_dec = nn.Linear(WIDTH, WIDTH)
        self.proj_patch, self.proj_classes = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))
        self.decoder_norm, self.mask_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(CLASSES)

    def forward(self, x):
        x = torch.cat([self.proj_dec(x), self.cls_emb.expand(len(x), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches, classes = (
            nn.functional.normalize(part @ matrix, dim=-1)
            for part, matrix in ((x[:, :-CLASSES], self.proj_patch), (x[:, -CLASSES:], self.proj_classes))
        )
        return self.mask_norm(patches @ classes.transpose(1, 2))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """(path, what torch makes of the pictures, its weights) of a Segmenter as its authors save one.

    Torch computes in float64: the last norm divides by the deviation of 5 cosines, down to 0.009, so that one rounding of a
    cosine in float32 is 7e-6 of the result.
    """
    with torch_peer.without_torchvision():
        from timm.models.vision_transformer import VisionTransformer
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "mlp_ratio": 0.5}
    encoder = VisionTransformer(**sizes, num_classes=7, norm_layer=nn.LayerNorm)
    model = transformer_peer.randomise(nn.ModuleDict({"encoder": encoder, "decoder": Decoder()}))
    path, weights = tmp_path_factory.mktemp("segmenter") / "checkpoint.pth", model.state_dict()
    torch.save({"model": weights}, path)
    with torch.no_grad():
        x = model.double()["encoder"].forward_features(torch.from_numpy(pictures()).permute(0, 3, 1, 2).double())
        return path, model["decoder"](x[:, 1:]).reshape(2, 3, 3, CLASSES).numpy(), weights


def pictures():
    return np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)


def run(opened):
    model = models.build(opened.description.model_type, opened.description.model)
    return np.asarray(jax.jit(model.apply)({"params": opened.params}, pictures()))


def test_a_segmenter_gives_the_same_masks_and_is_written_back(segmenter, tmp_path):
    path, expected, theirs = segmenter
    opened = open_checkpoint(path)
    assert opened.description.model_type == "Segmenter" and opened.description.image_size == (SIDE, SIDE)
    np.testing.assert_allclose(run(opened), expected, atol=1e-5)
    written = load_file(write_checkpoint(opened, tmp_path, "segmenter"))
    assert written.keys() == {name for name in theirs if not name.startswith("encoder.head.")}
    for name, x in written.items():
        np.testing.assert_array_equal(x, theirs[name].numpy(), err_msg=name)
    with pytest.raises(UserError, match="mmseg has no layout for a Segmenter"):
        write_checkpoint(opened, tmp_path, "mmseg")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """The folder of a DINOv2 with registers in its official names."""
    transformer = {"num_layers": 4, "num_heads": 2, "mlp_dim": 32, "activation": "gelu", "layer_scale": True, "norm_eps": 1e-6}
    fields = {"patches": {"size": (8, 8)}, "hidden_size": WIDTH, "num_registers": 2, "classifier": "cls_mean"}
    fields = {**fields, "num_classes": None, "transformer": transformer}
    shapes = jax.eval_shape(models.build("ViT", fields).init, jax.random.key(0), np.zeros((1, SIDE, SIDE, 3)))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), shapes)
    folder = tmp_path_factory.mktemp("dinov2")
    checkpoint.save(params, folder / "ours.npz")
    described = checkpoint.Description(
        model_type="ViT",
        model=fields,
        image_size=(SIDE, SIDE),
        grid=(3, 3),
        mean=(1.0, 2.0, 3.0),
        std=(50.0,) * 3,
        class_names=(),
    )
    checkpoint.describe.write(folder / "ours.npz", described)
    write_checkpoint(open_checkpoint(folder / "ours.npz"), folder / "dinov2.safetensors", "dinov2")
    return folder


@pytest.mark.parametrize("num_layers", [1, 4])
def test_a_published_head_joins_its_vit(dinov2, tmp_path, num_layers, capsys):
    norm, conv = nn.BatchNorm2d(num_layers * WIDTH), nn.Conv2d(num_layers * WIDTH, CLASSES, 1)
    head = transformer_peer.randomise(nn.ModuleDict({"decode_head": nn.ModuleDict({"bn": norm, "conv_seg": conv})})).eval()
    torch.save({"meta": {}, "state_dict": head.state_dict()}, tmp_path / "head.pth")
    with pytest.raises(UserError, match="holds a segmentation head alone: join it to its ViT by vit-jax convert VIT OUT"):
        open_checkpoint(tmp_path / "head.pth")

    vit = str(dinov2 / "dinov2.safetensors")
    assert convert.main([vit, str(tmp_path / "joined.npz"), "--to=npz", f"--head={tmp_path / 'head.pth'}"]) == 0
    assert "agree" in capsys.readouterr().out
    opened = open_checkpoint(tmp_path / "joined.npz")
    model = opened.description.model
    assert model["num_layers"] == num_layers and model["num_classes"] == CLASSES and opened.description.mean[0] == 123.675
    tokens = jax.jit(Backbone(model["body"]["vit"], num_layers).apply)({"params": opened.params["backbone"]}, pictures())
    with torch.no_grad():
        expected = conv(norm(torch.from_numpy(np.array(tokens)).permute(0, 3, 1, 2))).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(run(opened), expected, atol=1e-5, rtol=1e-5)

    # Both in one file, in mmsegmentation's names, and back.
    written = write_checkpoint(opened, tmp_path / "whole.safetensors", "mmseg")
    for name, x in head.state_dict().items():
        np.testing.assert_array_equal(load_file(written)[name], x.numpy(), err_msg=name)
    again = open_checkpoint(written)
    assert again.description.model_type == "LinearSegmenter"
    np.testing.assert_array_equal(run(again), run(opened))


def test_a_head_of_another_width_is_refused(dinov2, tmp_path):
    torch.save({"decode_head.conv_seg.weight": torch.zeros(CLASSES, 100, 1, 1)}, tmp_path / "head.pth")
    vit = open_checkpoint(dinov2 / "dinov2.safetensors")
    with pytest.raises(UserError, match=r"\(5, 100, 1, 1\) is no 1x1 convolution of tokens of width 128"):
        checkpoint.open_with_head(vit, tmp_path / "head.pth")
