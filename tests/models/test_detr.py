"""Detectors against transformers', on pictures that are not square and padded, with every BatchNorm and norm drawn anew."""

import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.models import small, transformer_peer
from vit_jax.checkpoint import Description, Opened
from vit_jax.checkpoint import detr as checkpoint
from vit_jax.checkpoint.detectors import write_detector
from vit_jax.checkpoint.export import write_checkpoint
from vit_jax.checkpoint.opening import open_checkpoint
from vit_jax.models import detr, get_model
from vit_jax.models.batchnorm_resnet import Bottleneck
from vit_jax.models.vit import VisionTransformer

SIZES = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("attention_heads", 3), ("ffn_dim", 40))}


pytestmark = pytest.mark.usefixtures("full_precision")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a DetrForObjectDetection, the folder where it is saved)."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    resnet = ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 1, 1], layer_type="bottleneck", out_features=["stage4"]
    )
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=resnet,
        d_model=24,
        encoder_layers=2,
        decoder_layers=3,
        **SIZES,
        num_queries=7,
        num_labels=5,
    )
    model = transformer_peer.randomise(DetrForObjectDetection(config))
    folder = tmp_path_factory.mktemp("detr")
    model.save_pretrained(folder)
    return model, folder


def opened(folder):
    theirs = load_file(folder / "model.safetensors")
    kind, fields, ours = checkpoint.read(theirs, json.loads((folder / "config.json").read_text()), where=str(folder))
    return kind, fields, ours, theirs


def nested(flat):
    from flax.traverse_util import unflatten_dict

    return {"params": unflatten_dict(flat, sep="/")}


def pictures():
    """Two pictures of 90x131 and 61x101 in a batch of 96x132, padded with zeros."""
    rng = np.random.default_rng(0)
    valid = np.zeros((2, 96, 132), bool)
    valid[0, :90, :131] = valid[1, :61, :101] = True
    return rng.normal(size=(2, 96, 132, 3)).astype(np.float32) * valid[..., None], valid


def run_torch(model, images, valid=None, **kwargs):
    mask = {} if valid is None else {"pixel_mask": torch.from_numpy(valid).long()}
    return model(pixel_values=torch.from_numpy(images).permute(0, 3, 1, 2), **mask, **kwargs)


def run(model, params, *inputs):
    return jax.jit(model.apply)(params, *inputs)


@pytest.mark.usefixtures("optimised")
def test_it_is_transformers_detr(saved):
    model, folder = saved
    _, fields, ours, _ = opened(folder)
    images, valid = pictures()
    with torch.inference_mode():
        theirs = run_torch(model, images, valid)
    apply = detr.Detr(**fields).apply
    both = jax.jit(lambda *inputs: (apply(*inputs), apply(*inputs, method="features")))
    outputs, features = both(nested(ours), images, valid)
    assert outputs["logits"].shape == (3, 2, 7, 6) and outputs["boxes"].shape == (3, 2, 7, 4)
    np.testing.assert_allclose(outputs["logits"][-1], theirs.logits, atol=1e-5)
    np.testing.assert_allclose(outputs["boxes"][-1], theirs.pred_boxes, atol=1e-5)
    np.testing.assert_allclose(features["patches"], theirs.encoder_last_hidden_state, atol=1e-5)
    second = features["map"][1, :2, :4].mean(axis=(0, 1))  # 61x101 pixels at 1/32
    np.testing.assert_allclose(features["cls"][1], second, atol=1e-6)


def test_checkpoints_come_back_bit_for_bit_in_every_layout(saved):
    _, folder = saved
    kind, fields, ours, theirs = opened(folder)
    assert kind == "detr-hf"
    for to in ("detr", "detr-hf", "detr-hf-timm"):
        written = checkpoint.write(ours, fields, to)
        config = {"encoder_attention_heads": 3, "decoder_attention_heads": 3}
        if to == "detr":  # whose files do not tell the heads: always 8
            assert written["transformer.decoder.layers.2.multihead_attn.in_proj_weight"].shape == (72, 24)
            assert checkpoint.layout(written) == "detr"
            continue
        again, same_fields, same = checkpoint.read(written, config, where="it")
        assert again == to and same_fields == fields and set(same) == set(ours)
        assert all(np.array_equal(same[name], ours[name]) for name in ours)
    written = checkpoint.write(ours, fields, "detr-hf")
    assert set(written) == set(theirs) and all(np.array_equal(written[name], theirs[name]) for name in theirs)


def test_files_are_opened_and_written_for_transformers(saved, tmp_path):
    from transformers import DetrForObjectDetection

    model, folder = saved
    detector = open_checkpoint(folder)
    assert detector.description.model_type == "DETR" and detector.description.class_names == tuple(
        f"LABEL_{i}" for i in range(5)
    )
    write_checkpoint(detector, tmp_path / "hf", "hf")
    again = DetrForObjectDetection.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(x, again[name]) for name, x in model.state_dict().items())
    own = open_checkpoint(write_checkpoint(detector, tmp_path / "own", "npz"))
    assert json.dumps(own.description.to_json()) == json.dumps(detector.description.to_json())

    _, fields, ours, _ = opened(folder)
    official = checkpoint.write(ours, fields, "detr")
    torch.save({"model": {name: torch.from_numpy(x.copy()) for name, x in official.items()}}, tmp_path / "detr-dc5.pth")
    read = open_checkpoint(tmp_path / "detr-dc5.pth")
    assert read.family == "official DETR" and read.description.model["body"]["resnet"]["dilated"]
    rewritten = checkpoint.write(read.flat, read.description.model, "detr")
    assert set(rewritten) == set(official) and all(np.array_equal(rewritten[n], official[n]) for n in official)


def test_the_official_names_are_those_of_the_official_model():
    """Names and shapes of detr-r50's parameters, as facebookresearch/detr prints them; nothing is left over."""
    fields, model = detr.DETR.sizes["DETR-R50"], get_model("DETR-R50")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    zeros = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.broadcast_to(np.float32(0), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    theirs = checkpoint.write(zeros, fields, "detr")
    assert theirs["backbone.0.body.layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1)
    assert theirs["input_proj.weight"].shape == (256, 2048, 1, 1)
    assert theirs["transformer.encoder.layers.5.self_attn.in_proj_weight"].shape == (768, 256)
    assert theirs["class_embed.weight"].shape == (92, 256) and theirs["bbox_embed.layers.2.weight"].shape == (4, 256)
    kind, again, ours = checkpoint.read(theirs, {}, where="detr-r50-dc5-f0fb7ef5.pth")
    assert kind == "detr" and set(ours) == set(zeros)
    assert again["body"]["resnet"] == {"num_layers": (3, 4, 6, 3), "width": 64, "dilated": True}
    assert (again["mlp_dim"], again["num_heads"], again["num_classes"]) == (2048, 8, 91)

    # transformers has dilation on timm's ResNet alone.
    of_sizes = {"model_type": "DETR", "image_size": (64, 64), "grid": (4, 4), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    described = Description(**of_sizes, model=fields | {"body": again["body"]}, class_names=("x",) * 91)
    written = write_detector(Opened(Path("x"), "", zeros, described))
    config = written.files["config.json"]
    assert (config["use_timm_backbone"], config["backbone"], config["dilation"]) == (True, "resnet50", True)
    kind, same, _ = checkpoint.read(written.arrays, config, where="it")
    assert kind == "detr-hf-timm" and same["body"] == again["body"]


@pytest.mark.parametrize("name, millions", [("DETR-R50", 41.5), ("DETR-R101-DC5", 60.5), ("YOLOS-Ti", 6.5), ("YOLOS-S", 30.7)])
def test_the_published_sizes(name, millions):
    shapes = jax.eval_shape(get_model(name).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    frozen = ("bn1", "bn2", "bn3", "bn_proj")  # no parameters in torch, but buffers
    count = sum(x.size for path, x in leaves if not any(f"'{bn}'" in jax.tree_util.keystr(path) for bn in frozen))
    assert round(count / 1e6, 1) == millions


def test_a_dilated_resnet_has_twice_the_resolution_and_is_torchs():
    model = detr.BatchNormResNet((1, 1, 1, 2), 4, dilated=True)
    images = np.random.default_rng(0).normal(size=(1, 67, 99, 3)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: np.abs(rng.normal(size=x.shape)).astype(np.float32) * (0.2 if len(x.shape) > 1 else 1), shapes
    )
    ours = run(model, {"params": params}, images)

    def conv(x, name, layer, **kwargs):
        kernel = torch.from_numpy(layer[name]["kernel"].transpose(3, 2, 0, 1).copy())
        return torch.nn.functional.conv2d(x, kernel, padding=kwargs.get("dilation", 1) * (kernel.shape[-1] // 2), **kwargs)

    def norm(x, p):
        scale, bias, mean, var = (torch.from_numpy(p[n]) for n in ("scale", "bias", "mean", "var"))
        return torch.nn.functional.batch_norm(x, mean, var, scale, bias)

    x = torch.relu(norm(conv(torch.from_numpy(images).permute(0, 3, 1, 2), "conv1", params, stride=2), params["bn1"]))
    x = torch.nn.functional.max_pool2d(x, 3, 2, 1)
    for name, stride, dilation in (
        ("layer1_0", 1, 1),
        ("layer2_0", 2, 1),
        ("layer3_0", 2, 1),
        ("layer4_0", 1, 1),
        ("layer4_1", 1, 2),
    ):
        layer = params[name]
        y = torch.relu(norm(conv(x, "conv1", layer), layer["bn1"]))
        y = torch.relu(norm(conv(y, "conv2", layer, stride=stride, dilation=dilation), layer["bn2"]))
        y = norm(conv(y, "conv3", layer), layer["bn3"])
        x = norm(conv(x, "conv_proj", layer, stride=stride), layer["bn_proj"]) if "conv_proj" in layer else x
        x = torch.relu(x + y)
    theirs = x.permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape == (1, 5, 7, 128)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_the_gradients_of_a_bottleneck_are_those_of_its_formula():
    block = Bottleneck(4, stride=2, dilation=2)
    x = np.random.default_rng(0).normal(size=(2, 9, 11, 8)).astype(np.float32)
    params = small.random_params(block, x)
    for name in ("bn1", "bn2", "bn3", "bn_proj"):
        params[name]["var"] = np.abs(params[name]["var"])

    def formula(params, x):
        def layer(x, number, stride=1):
            kernel, norm = params[f"conv{number}"]["kernel"], jax.lax.stop_gradient(params[f"bn{number}"])
            rate = 2 if kernel.shape[0] == 3 else 1
            margins, axes = [(rate * (kernel.shape[0] // 2),) * 2] * 2, ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, margins, (1, 1), (rate,) * 2, axes)
            return (y - norm["mean"]) / jnp.sqrt(norm["var"] + 1e-5) * norm["scale"] + norm["bias"]

        y = layer(jax.nn.relu(layer(jax.nn.relu(layer(x, 1)), 2, stride=2)), 3)
        return jax.nn.relu(layer(x, "_proj", stride=2) + y)

    def results(function):
        y, backward = jax.vjp(function, params, x)
        return y, backward(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    ours, theirs = (jax.jit(functools.partial(results, f))() for f in (lambda p, x: block.apply({"params": p}, x), formula))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.abs(ours[1][0]["conv3"]["kernel"]).max() > 1 and not np.any(ours[1][0]["bn2"]["scale"])


@pytest.mark.usefixtures("optimised")
def test_it_is_transformers_yolos_at_other_sizes_too(tmp_path):
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        image_size=[48, 80],
        num_detection_tokens=7,
        num_labels=5,
    )
    model = transformer_peer.randomise(YolosForObjectDetection(config))
    model.save_pretrained(tmp_path)
    kind, fields, ours, theirs = opened(tmp_path)
    assert kind == "yolos" and fields["mid_positions"]
    written = checkpoint.write(ours, fields, "yolos")
    assert set(written) == set(theirs) and all(np.array_equal(written[name], theirs[name]) for name in theirs)
    images = pictures()[0][:, :64, :96]
    with torch.inference_mode():
        peer = run_torch(model, images)
    outputs = run(detr.Yolos(**fields), nested(ours), images)
    np.testing.assert_allclose(outputs["logits"][-1], peer.logits, atol=1e-5)
    np.testing.assert_allclose(outputs["boxes"][-1], peer.pred_boxes, atol=1e-5)


def small_vit():
    transformer = {"num_layers": 2, "mlp_dim": 48, "num_heads": 4, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    return {"patches": {"size": (12, 12)}, "hidden_size": 32, "transformer": transformer}


def test_the_same_decoder_stands_on_a_vit(monkeypatch):
    """The decoder sees the ViT's map: what a model gives that has this map instead of a backbone."""
    fields = {"num_classes": 5, "num_queries": 7, "width": 24, "num_heads": 3, "mlp_dim": 40}
    fields |= {"body": {"vit": small_vit()}, "num_encoder_layers": 0, "num_decoder_layers": 2}
    model = detr.Detr(**fields)
    images, valid = pictures()
    variables = {"params": small.random_params(model, images)}
    assert set(variables["params"]["backbone"]) == {"embedding", "Transformer", "cls"}  # a ViT's own names: a checkpoint fits
    outputs = run(model, variables, images, valid)

    vit = VisionTransformer(**small_vit(), num_classes=None)
    grid = small.apply(vit, variables["params"]["backbone"], images, method="features")["map"]
    monkeypatch.setattr(detr, "make_backbone", lambda body, dtype: lambda x, valid, *, train: (x, valid[:, ::12, ::12]))
    rest = {"params": {name: x for name, x in variables["params"].items() if name != "backbone"}}
    same = run(detr.Detr(**fields), rest, grid, valid[:, :, :132])
    np.testing.assert_allclose(outputs["boxes"], same["boxes"], atol=1e-5)


def test_a_box_for_every_token_starts_at_its_place():
    model = detr.TokenDetector({"vit": small_vit()}, num_classes=5)
    images, valid = pictures()
    params = small.random_params(model, images)
    zero = jax.tree.map(np.zeros_like, params["bbox_embed"])
    outputs = run(model, {"params": params | {"bbox_embed": zero}}, images, valid)
    boxes = np.asarray(outputs["boxes"]).reshape(2, 8, 11, 4)
    np.testing.assert_allclose(boxes[0, 3, 4], [4.5 / 11, 3.5 / 8, 1 / 11, 1 / 8], atol=1e-5)
    np.testing.assert_allclose(boxes[1, 3, 4], [4.5 / 9, 3.5 / 6, 1 / 9, 1 / 6], atol=1e-5)  # 61x101 pixels touch 6x9 cells
    objects = np.asarray(jax.nn.softmax(outputs["logits"])[..., :-1]).sum(axis=-1).reshape(2, 8, 11)
    assert (objects[1, 6:] < 1e-6).all() and (objects[1, :6, :9] > 1e-3).all()
