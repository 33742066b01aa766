"""The heads of segmenters against torch versions written from their formulas, on the tokens of a ViT of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from vit_jax import models
from vit_jax.errors import UserError
from vit_jax.models import segment
from vit_jax.models.segment import at_pixels

BLOCKS = {"num_layers": 3, "mlp_dim": 24, "num_heads": 2, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
VIT = {"patches": {"size": (4, 4)}, "hidden_size": 16, "num_registers": 2, "classifier": "token", "transformer": BLOCKS}
HEADS = {"width": 20, "num_heads": 2, "mlp_dim": 28}
CLASSES = 5


pytestmark = pytest.mark.usefixtures("full_precision")


def pictures():
    return np.random.default_rng(0).normal(size=(2, 12, 20, 3)).astype(np.float32)


def drawn(kind, **fields):
    """(model, parameters that are all drawn anew)."""
    model = models.build(kind, {"body": {"vit": VIT}, "num_classes": CLASSES, **fields})
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 12, 20, 3)))["params"]
    params = jax.tree.map(lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32), shapes)
    if "bn" in params:
        params["bn"]["var"] = np.abs(params["bn"]["var"]) + 0.1
    return model, params


def backbone(params, num_layers=1):
    """The tokens that the head gets, as torch has them: (b c h w)."""
    x = jax.jit(segment.Backbone(VIT, num_layers).apply)({"params": params["backbone"]}, pictures())
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def put(module, **values):
    for name, value in values.items():
        target = getattr(module, name)
        with torch.no_grad():
            target.copy_(torch.from_numpy(np.array(value)).reshape(target.shape))


def same(ours, theirs):
    np.testing.assert_allclose(ours, theirs.detach().permute(0, 2, 3, 1).numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_linear_head_is_a_batch_norm_and_a_convolution(num_layers):
    model, params = drawn("LinearSegmenter", num_layers=num_layers)
    x = backbone(params, num_layers)
    norm, conv = nn.BatchNorm2d(x.shape[1]).eval(), nn.Conv2d(x.shape[1], CLASSES, 1)
    bn, kernel = params["bn"], params["conv_seg"]["kernel"]
    put(norm, weight=bn["scale"], bias=bn["bias"], running_mean=bn["mean"], running_var=bn["var"])
    put(conv, weight=kernel.reshape(-1, CLASSES).T, bias=params["conv_seg"]["bias"])
    theirs = conv(norm(x))
    ours = jax.jit(model.apply)({"params": params}, pictures())
    assert ours.shape == (2, 3, 5, CLASSES)
    same(ours, theirs)
    same(at_pixels(ours, (12, 20)), nn.functional.interpolate(theirs, (12, 20), mode="bilinear", align_corners=False))


def test_the_last_layers_are_normalised_and_come_in_their_order():
    _, params = drawn("LinearSegmenter", num_layers=3)
    one, three = (backbone(params, n) for n in (1, 3))
    np.testing.assert_array_equal(three[:, -16:], one)
    features = models.VisionTransformer(**VIT, num_classes=None)
    apply = jax.jit(lambda p, x: features.apply({"params": p}, x, method="features")["layers"][0][:, 3:])
    raw = np.asarray(apply(params["backbone"], pictures()))
    norm = params["backbone"]["Transformer"]["encoder_norm"]
    mean, var = raw.mean(-1, keepdims=True), raw.var(-1, keepdims=True)
    expected = (raw - mean) / np.sqrt(var + 1e-6) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(three[:, :16].permute(0, 2, 3, 1).reshape(2, 15, 16), expected, atol=1e-5)
    with pytest.raises(UserError, match="of the last 4 layers, on a ViT of 3"):
        drawn("LinearSegmenter", num_layers=4)


class MaskTransformer(nn.Module):
    """Segmenter's decoder from the paper: project, append the classes, attend, compare, normalise over the classes."""

    def __init__(self, params, heads):
        super().__init__()
        self.params, self.heads = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), params), heads

    def linear(self, x, p):
        return x @ p["kernel"].reshape(x.shape[-1], -1) + p["bias"].reshape(-1)

    def norm(self, x, p):
        return nn.functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-5)

    def block(self, x, p):
        b, n, d = x.shape
        y, attention = self.norm(x, p["LayerNorm_0"]), p["MultiHeadDotProductAttention_1"]
        heads = (self.linear(y, attention[name]).reshape(b, n, self.heads, -1) for name in ("query", "key", "value"))
        q, k, v = (part.transpose(1, 2) for part in heads)
        y = ((q @ k.transpose(-2, -1) / (d // self.heads) ** 0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, n, d)
        x = x + y @ attention["out"]["kernel"].reshape(d, d) + attention["out"]["bias"]
        mlp = p["MlpBlock_3"]
        hidden = nn.functional.gelu(self.linear(self.norm(x, p["LayerNorm_2"]), mlp["Dense_0"]))
        return x + self.linear(hidden, mlp["Dense_1"])

    def forward(self, x):
        p, (b, c, h, w) = self.params, x.shape
        x = self.linear(x.permute(0, 2, 3, 1).reshape(b, h * w, c), p["proj_dec"])
        x = torch.cat([x, p["cls_emb"].expand(b, -1, -1)], dim=1)
        for i in range(2):
            x = self.block(x, p[f"mask_block_{i}"])
        x = self.norm(x, p["decoder_norm"])
        patches, classes = x[:, : h * w] @ p["proj_patch"], x[:, h * w :] @ p["proj_classes"]
        masks = nn.functional.normalize(patches, dim=-1) @ nn.functional.normalize(classes, dim=-1).transpose(1, 2)
        return self.norm(masks, p["mask_norm"]).transpose(1, 2).reshape(b, -1, h, w)


@pytest.mark.usefixtures("optimised")
def test_the_mask_transformer_is_that_of_the_paper():
    model, params = drawn("Segmenter", **HEADS)
    ours = jax.jit(model.apply)({"params": params}, pictures())
    assert ours.shape == (2, 3, 5, CLASSES)
    same(ours, MaskTransformer(params, 2)(backbone(params)))


@pytest.mark.parametrize("kind", ["LinearSegmenter", "Segmenter"])
def test_places_lie_within_their_patch(kind):
    model, params = drawn(kind, places=2, **(HEADS if kind == "Segmenter" else {}))
    ours = np.asarray(jax.jit(model.apply)({"params": params}, pictures()))
    assert ours.shape == (2, 6, 10, CLASSES)
    # The head of one place alone gives every second row and column.
    model, _ = drawn(kind, **(HEADS if kind == "Segmenter" else {}))
    for row in (0, 1):
        for column in (0, 1):
            one = dict(params)
            if kind == "Segmenter":
                d = HEADS["width"]
                one["proj_patch"] = params["proj_patch"].reshape(d, 2, 2, d)[:, row, column]
            else:
                one["conv_seg"] = {name: x[..., row, column, None, None, :] for name, x in params["conv_seg"].items()}
            alone = jax.jit(model.apply)({"params": one}, pictures())
            np.testing.assert_allclose(ours[:, row::2, column::2], alone, atol=1e-5)


def test_the_statistics_of_the_norm_have_no_gradient():
    model, params = drawn("LinearSegmenter")
    grads = jax.jit(jax.grad(lambda p: (model.apply({"params": p}, pictures()) ** 2).sum()))(params)
    assert not any(np.any(x) for x in grads["bn"].values()) and np.any(grads["conv_seg"]["kernel"])


def test_a_body_that_is_no_vit_is_refused():
    with pytest.raises(UserError, match="body of a segmenter must be a vit with its fields, not resnet"):
        models.build("LinearSegmenter", {"body": {"resnet": {}}, "num_classes": 2})
