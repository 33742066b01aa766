"""Every family of checkpoints against the library that it belongs to, there and back."""

import json
import re

import jax
import numpy as np
import pytest

from tests.checkpoint import peers
from tests.models import numpy_peer, small
from vit_jax import checkpoint, models
from vit_jax.checkpoint import describe, google, opening, readers
from vit_jax.errors import UserError
from vit_jax.models import zoo

NAMES = peers.NAMES


def reopened(opened, folder, to):
    return checkpoint.open_checkpoint(checkpoint.write_checkpoint(opened, folder / to, to))


def assert_bits_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def random_vit(folder, *, size=peers.SIZE, **fields):
    """A random ViT of ours, written as this project writes it after training, and opened again."""
    model = small.vit(**{"num_classes": 5} | fields)
    path = folder / "mine" / "model.npz"
    checkpoint.save(small.random_params(model, small.random_images(*size)), path)
    fields = {name: getattr(model, name) for name in ("patches", "hidden_size", "num_classes", "representation_size")}
    others = ("classifier", "fc_norm", "position_embedding", "num_registers", "resnet", "patch_bias", "head_bias")
    fields |= {name: getattr(model, name) for name in others}
    description = {
        "model_name": "mine",
        "model_type": "ViT",
        "model": jax.tree.map(lambda x: x, fields | {"transformer": dict(model.transformer)}),
        "image_size": size,
        "grid": [side // patch for side, patch in zip(size, model.patches["size"], strict=True)],
        "mean": [110.0, 120.0, 130.0],
        "std": [50.0, 60.0, 70.0],
        "class_names": NAMES if model.num_classes else [],
    }
    describe.write(path, describe.Description(**description))
    return checkpoint.open_checkpoint(path)


# Reading: the numbers of the family's own library


@pytest.mark.parametrize("name", peers.HF)
def test_a_model_of_transformers_is_the_same_here(tmp_path, name):
    model = peers.hf(name, tmp_path)
    opened = checkpoint.open_checkpoint(tmp_path)
    peers.assert_same(opened, model, peers.images(opened))
    assert list(opened.description.class_names) == (NAMES if "Classification" in name else [])
    if name == "DeiTForImageClassification":
        return  # its unread distillation token has become a register, for which transformers' ViT has no place
    assert_bits_equal(readers.read(checkpoint.write_checkpoint(opened, tmp_path / "back", "hf")), readers.read(tmp_path))


def test_the_pooler_of_transformers_is_the_representation(tmp_path):
    model = peers.hf("ViTModel", tmp_path)
    opened = checkpoint.open_checkpoint(tmp_path)
    x = peers.images(opened)
    mine = small.apply(models.build("ViT", opened.description.model), opened.params, x)
    np.testing.assert_allclose(mine, peers.torch_peer().run(model, x).pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", peers.TIMM)
def test_a_model_of_timm_is_the_same_here(tmp_path, name):
    model = peers.timm(name, tmp_path)
    opened = checkpoint.open_checkpoint(tmp_path)
    peers.assert_same(opened, model, peers.images(opened))
    again = reopened(opened, tmp_path, "timm")
    assert_bits_equal(again.flat, opened.flat)
    if name not in peers.FOLDED:
        assert_bits_equal(readers.read(again.path), readers.read(tmp_path))


def test_heads_that_only_the_name_of_a_timm_model_tells(tmp_path):
    """test_vit4, whose heads are of 32 and whose norms are RMSNorms, as timm publishes it: nothing but its name says so."""
    with peers.torch_peer("timm").without_torchvision():
        import timm

        model = peers.randomise(timm.create_model("test_vit4", num_classes=5, img_size=48, depth=2))
        timm.models.save_for_hf(model, tmp_path, model_args={"img_size": [48, 48]}, safe_serialization=True)
    opened = checkpoint.open_checkpoint(tmp_path)
    assert opened.description.model["transformer"]["num_heads"] == 3
    peers.assert_same(opened, model, peers.images(opened))


def official(model, *, chunk=None):
    """The state dict that the official DINOv2 code would hold of a `Dinov2Model` of transformers."""
    renamed, qkv = {}, {}
    for name, x in readers.read(model).items():
        name = re.sub(r"^embeddings\.(?:patch_embeddings\.projection)", "patch_embed.proj", name).removeprefix("embeddings.")
        name = name.replace("position_embeddings", "pos_embed").replace("layernorm.", "norm.")
        name = name.replace("encoder.layer.", "blocks." if chunk is None else f"blocks.{chunk}.")
        name = name.replace("layer_scale", "ls").replace("lambda1", "gamma").replace("attention.output.dense", "attn.proj")
        name = name.replace("mlp.weights_in", "mlp.w12").replace("mlp.weights_out", "mlp.w3")
        if match := re.fullmatch(r"(.*)attention\.attention\.(\w+)\.(\w+)", name):
            qkv.setdefault(f"{match[1]}attn.qkv.{match[3]}", {})[match[2]] = x
        else:
            renamed[name] = x
    return renamed | {name: np.concatenate([x[n] for n in ("query", "key", "value")]) for name, x in qkv.items()}


OFFICIAL = {"hidden_size": 128, "num_attention_heads": 2}  # heads of 64, which no file tells


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel"])
def test_official_dinov2_is_the_same_here_and_goes_back_bit_by_bit(tmp_path, name):
    torch = peers.torch_peer("transformers").torch
    model = peers.hf(name, tmp_path / "hf", **OFFICIAL)
    plain = official(tmp_path / "hf")
    chunked = {f"backbone.{n}": torch.tensor(x) for n, x in official(tmp_path / "hf", chunk=0).items()}
    torch.save({"teacher": chunked | {"dino_head.mlp.0.weight": torch.ones(3, 3)}}, tmp_path / "teacher.pth")
    opened = checkpoint.open_checkpoint(tmp_path / "teacher.pth")
    assert opened.family == "DINOv2"
    peers.assert_same(opened, model, peers.images(opened))
    ours = reopened(opened, tmp_path, "npz")
    assert ours.family == "Google npz"
    path = checkpoint.write_checkpoint(ours, tmp_path / "back.safetensors", "dinov2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.safetensors", "hf", "npz", "teacher.pth"]
    assert_bits_equal(readers.read(path), plain)
    assert_bits_equal(official(checkpoint.write_checkpoint(ours, tmp_path / "to_hf", "hf")), plain)


@pytest.mark.parametrize("name", ["Dinov2Model", "Dinov2WithRegistersModel"])
@pytest.mark.parametrize("size", [(48, 24), (16, 40)])
def test_dinov2_at_another_size_is_that_of_transformers(tmp_path, name, size):
    model = peers.hf(name, tmp_path)
    opened = checkpoint.open_checkpoint(tmp_path)
    x = small.random_images(*size)
    fields = opened.description.model
    params = small.shapes(models.build("ViT", fields), x)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    grid = size[0] // 8, size[1] // 8
    params = checkpoint.load_pretrained(pretrained_path=opened, init_params=params, model_config=fields, grid=grid)
    here = opening.Opened(opened.path, opened.family, small.flat(params), opened.description)
    peers.assert_same(here, model, x)


# big_vision


def big_vision(flat, *, prefix="", stacked=False):
    """Our flat parameters as big_vision writes them: new layer names, position embeddings outside, of the patches alone."""
    new = {"LayerNorm_2": "LayerNorm_1", "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}
    theirs = {}
    for name, x in flat.items():
        for old in new:
            name = name.replace(f"/{old}/", f"/{new[old]}/")
        theirs[name.replace("/MlpBlock_3/", "/MlpBlock_0/")] = x
    if (table := theirs.pop("Transformer/posembed_input/pos_embedding", None)) is not None:
        theirs["pos_embedding"] = table[:, int("cls" in flat) :]
    if stacked:
        blocks = [n for n in theirs if "/encoderblock_0/" in n]
        for name in blocks:
            parts = [theirs.pop(name.replace("_0/", f"_{i}/", 1)) for i in range(2)]
            theirs[name.replace("encoderblock_0", "encoderblock")] = np.stack(parts)
    return {f"{prefix}{name}": x for name, x in theirs.items()}


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"classifier": "map"}, {"prefix": "params/img/", "stacked": True}),
        ({"classifier": "map", "representation_size": 20}, {"prefix": "params/"}),
        ({"classifier": "gap", "position_embedding": "sincos2d"}, {}),
        ({"classifier": "token"}, {"stacked": True}),
    ],
    ids=str,
)
def test_a_file_of_big_vision_is_the_same_here(tmp_path, fields, form):
    side = 224 if "position_embedding" in fields else 40  # where no table tells it, 224 is assumed
    model, x = small.vit(**fields), small.random_images(side, side, batch=1)
    params = small.random_params(model, x)
    flat = small.flat(params)
    if fields["classifier"] == "token":
        flat["Transformer/posembed_input/pos_embedding"][:, 0] = 0  # big_vision's class token has no position
    other = {"params/t": np.ones(1)} if "img" in form.get("prefix", "") else {}  # the text side of a pair
    checkpoint.save(big_vision(flat, **form) | other, tmp_path / "bv.npz")
    opened = checkpoint.open_checkpoint(tmp_path / "bv.npz")
    assert_bits_equal(opened.flat, flat)
    assert list(opened.description.image_size) == [side, side]
    reopened_model = models.build("ViT", opened.description.model)
    np.testing.assert_array_equal(small.apply(reopened_model, opened.params, x), small.apply(model, params, x))


def test_the_map_head_equals_numpy():
    model, x = small.vit(classifier="map"), small.random_images(24, 40)
    params = small.random_params(model, x)
    tokens = np.float64(small.apply(model, params, x, method="features")["patches"])
    head = params["MAPHead_0"]
    attention = head["MultiHeadDotProductAttention_0"]
    query, key, value = (
        np.einsum("bnd,dkf->bknf", y, np.float64(attention[name]["kernel"])) + attention[name]["bias"][:, None]
        for name, y in (("query", head["probe"]), ("key", tokens), ("value", tokens))
    )
    weights = np.exp(query @ key.swapaxes(2, 3) / np.sqrt(query.shape[-1]))
    y = weights / weights.sum(-1, keepdims=True) @ value
    y = np.einsum("bkf,kfd->bd", y[:, :, 0], attention["out"]["kernel"]) + attention["out"]["bias"]
    y = y + numpy_peer.mlp(head["MlpBlock_0"], numpy_peer.layer_norm(head["LayerNorm_0"], y))
    expected = numpy_peer.dense(params["head"], y)
    np.testing.assert_allclose(small.apply(model, params, x), expected, atol=1e-5, rtol=0)


# Writing: it opens in the family's own library, and comes back bit by bit

DINO = {"activation": "gelu", "layer_scale": True}
SWIGLU = {"activation": "swiglu", "layer_scale": True, "mlp_dim": 88}
TO_HF = {
    "ViT": {},
    "ViT without head": {"num_classes": None},
    "ViT with pooler": {"num_classes": None, "representation_size": 32},
    "ViT with wide patches, quick GELU": {"patches": {"size": (4, 8)}, "transformer": {"activation": "quick_gelu"}},
    "DeiT": {"classifier": "distilled", "transformer": {"activation": "gelu"}},
    "DINOv2": {"classifier": "cls_mean", "transformer": DINO | {"mlp_dim": 64}, "size": (32, 32)},
    "DINOv2, tanh GELU": {"classifier": "cls_mean", "transformer": {"layer_scale": True, "mlp_dim": 64}, "size": (32, 32)},
    "DINOv2, SwiGLU": {"classifier": "cls_mean", "num_classes": None, "transformer": SWIGLU, "size": (32, 32)},
    "DINOv2, registers": {"classifier": "cls_mean", "num_registers": 3, "transformer": SWIGLU, "size": (32, 32)},
}
TO_TIMM = {
    "ViT": {},
    "ViT without head": {"num_classes": None, "patches": {"size": (4, 8)}},
    "mean": {"classifier": "gap"},
    "mean with fc_norm, registers": {"classifier": "gap", "fc_norm": True, "num_registers": 2},
    "q/k norm, registers": {"num_registers": 2, "transformer": {"qk_norm": True, "activation": "gelu", "mlp_dim": 43}},
    "SwiGLU, LayerScale": {"transformer": SWIGLU | {"mlp_dim": 45}},
    "SwiGLU": {"transformer": {"activation": "swiglu"}},
    "distilled": {"classifier": "distilled"},
    "RMSNorm": {"classifier": "gap", "fc_norm": True, "transformer": {"norm": "rms", "qk_norm": True, "activation": "gelu"}},
}


@pytest.mark.parametrize("case", TO_HF)
def test_what_is_written_opens_in_transformers_and_comes_back(tmp_path, case):
    peers.torch_peer("transformers")
    import transformers

    opened = random_vit(tmp_path, **TO_HF[case])
    again = reopened(opened, tmp_path, "hf")
    head = "head/kernel" in opened.flat
    auto = transformers.AutoModelForImageClassification if head else transformers.AutoModel
    extra = {} if head or "pooler" in case or "DINO" in case else {"add_pooling_layer": False}
    model, report = auto.from_pretrained(tmp_path / "hf", output_loading_info=True, **extra)
    assert not any(report.values()), report
    peers.assert_same(opened, model.eval(), peers.images(opened))
    if head:
        assert list(model.config.id2label.values()) == NAMES
    assert again.family == ("Hugging Face DINOv2" if "DINO" in case else "Hugging Face ViT")
    lost = {n: x for n, x in reopened(again, tmp_path, "npz").flat.items() if n != "extras/mask_token"}
    assert_bits_equal(opened.flat, lost)
    for key in ("image_size", "grid", "class_names"):
        assert list(getattr(again.description, key)) == list(getattr(opened.description, key))
    for key in ("mean", "std"):
        np.testing.assert_allclose(getattr(again.description, key), getattr(opened.description, key), rtol=1e-12)


@pytest.mark.parametrize("case", TO_TIMM)
def test_what_is_written_opens_in_timm_and_comes_back(tmp_path, case):
    with peers.torch_peer("timm").without_torchvision():
        import timm
    opened = random_vit(tmp_path, **TO_TIMM[case])
    again = reopened(opened, tmp_path, "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    peers.assert_same(opened, model, peers.images(opened))
    assert model.pretrained_cfg["label_names"] == list(opened.description.class_names)
    assert tuple(model.pretrained_cfg["input_size"]) == (3, *peers.SIZE)
    assert again.family == "timm ViT"
    assert_bits_equal(opened.flat, reopened(again, tmp_path, "npz").flat)
    assert again.description.class_names == opened.description.class_names
    np.testing.assert_allclose(again.description.std, opened.description.std, rtol=1e-12)


@pytest.mark.parametrize(
    ("to", "fields", "complaint"),
    [
        ("hf", {"classifier": "gap"}, "transformers' vit cannot express classifier=gap"),
        ("hf", {"num_registers": 2}, "registers without LayerScale"),
        ("hf", {"transformer": {"qk_norm": True}, "fc_norm": True}, "fc_norm, qk_norm"),
        ("hf", {"transformer": {"activation": "swiglu"}}, "SwiGLU without LayerScale"),
        ("hf", {"representation_size": 8}, "representation_size with a head"),
        ("hf", {"transformer": DINO}, "classifier=token, mlp_dim=48, a grid that is not square"),
        ("hf", {"transformer": {"norm_pre": True, "activation": "quick_gelu"}}, "cannot express norm_pre: convert"),
        ("hf", {"transformer": {"norm": "rms"}}, "hf cannot express transformer.norm=rms: convert"),
        ("timm", {"classifier": "map", "num_registers": 2}, "registers that a probe sees"),
        ("timm", {"classifier": "unpooled"}, "timm's VisionTransformer cannot express classifier=unpooled"),
        ("timm", {"patch_bias": False, "head_bias": False}, "norm_pre with a bias in front, or neither, a head without a bias"),
        ("timm", {"position_embedding": "sincos2d", "classifier": "gap"}, "position_embedding=sincos2d"),
        ("timm", {"classifier": "cls_mean"}, "a head on class token and mean"),
        ("timm", {"representation_size": 8}, "pre_logits"),
        ("timm", {"resnet": small.RESNET, "patches": {"size": (2, 2)}}, "cannot express resnet"),
        ("dinov2", {}, "no place for a model with no LayerScale, a head, tanh GELU, a grid that is not square"),
    ],
)
def test_what_a_layout_cannot_express_is_refused(tmp_path, to, fields, complaint):
    with pytest.raises(UserError, match=complaint):
        checkpoint.write_checkpoint(random_vit(tmp_path, **fields), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_only_vits_have_other_layouts(tmp_path):
    model, x = small.mixer(), small.random_images(24, 24)
    checkpoint.save(small.random_params(model, x), tmp_path / "mixer.npz")
    opened = checkpoint.open_checkpoint(tmp_path / "mixer.npz")
    with pytest.raises(UserError, match="hf has no layout for a Mixer here: use --to=npz"):
        checkpoint.write_checkpoint(opened, tmp_path / "hf", "hf")
    with pytest.raises(UserError, match="--to=hf writes a folder, not x.npz"):
        checkpoint.write_checkpoint(opened, tmp_path / "x.npz", "hf")
    with pytest.raises(UserError, match="unknown format 'onnx'"):
        checkpoint.write_checkpoint(opened, tmp_path / "x", "onnx")
    assert_bits_equal(reopened(opened, tmp_path, "npz").flat, opened.flat)


# Full size, by names and shapes alone


def nothing(shape):
    """An array of that shape which occupies no memory."""
    return np.broadcast_to(np.float32(0), shape)


def linear(name, rows, columns):
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norms(d, *names):
    return {f"{name}.{kind}": (d,) for name in names for kind in ("weight", "bias")}


def hf_vit(d, layers, mlp, patch, grid):
    shapes = {"vit.embeddings.cls_token": (1, 1, d), "vit.embeddings.position_embeddings": (1, grid * grid + 1, d)}
    projection = "vit.embeddings.patch_embeddings.projection"
    shapes |= {f"{projection}.weight": (d, 3, patch, patch), f"{projection}.bias": (d,)}
    for i in range(layers):
        b = f"vit.encoder.layer.{i}"
        shapes |= norms(d, f"{b}.layernorm_before", f"{b}.layernorm_after")
        for name in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            shapes |= linear(f"{b}.{name}", d, d)
        shapes |= linear(f"{b}.attention.output.dense", d, d)
        shapes |= linear(f"{b}.intermediate.dense", mlp, d) | linear(f"{b}.output.dense", d, mlp)
    return shapes | norms(d, "vit.layernorm") | linear("classifier", 1000, d)


def torch_vit(d, layers, mlp, patch, grid, *, dinov2=False, registers=0):
    """timm's names, or DINOv2's, which has LayerScale and no head; a tuple for `mlp` is a SwiGLU's (w12, w3)."""
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, grid * grid + 1, d)}
    shapes |= {"patch_embed.proj.weight": (d, 3, patch, patch), "patch_embed.proj.bias": (d,)} | norms(d, "norm")
    for i in range(layers):
        b = f"blocks.{i}"
        shapes |= norms(d, f"{b}.norm1", f"{b}.norm2")
        shapes |= linear(f"{b}.attn.qkv", 3 * d, d) | linear(f"{b}.attn.proj", d, d)
        names, (first, last) = (("w12", "w3"), mlp) if isinstance(mlp, tuple) else (("fc1", "fc2"), (mlp, mlp))
        shapes |= linear(f"{b}.mlp.{names[0]}", first, d) | linear(f"{b}.mlp.{names[1]}", d, last)
        shapes |= {f"{b}.ls1.gamma": (d,), f"{b}.ls2.gamma": (d,)} if dinov2 else {}
    shapes |= {"register_tokens": (1, registers, d)} if registers else {}
    return shapes | ({"mask_token": (1, d)} if dinov2 else linear("head", 1000, d))


def hf_config(d, layers, heads, mlp, patch):
    sizes = {"hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp}
    return sizes | {"model_type": "vit", "image_size": 224, "patch_size": patch, "layer_norm_eps": 1e-12}


FULL = {
    "HF B/16": (hf_vit(768, 12, 3072, 16, 14), hf_config(768, 12, 12, 3072, 16), 86_567_656, (224, 224)),
    "HF L/16": (hf_vit(1024, 24, 4096, 16, 14), hf_config(1024, 24, 16, 4096, 16), 304_326_632, (224, 224)),
    "HF H/14": (hf_vit(1280, 32, 5120, 14, 16), hf_config(1280, 32, 16, 5120, 14), 632_045_800, (224, 224)),
    "timm B/16": (torch_vit(768, 12, 3072, 16, 14), None, 86_567_656, (224, 224)),
    "DINOv2 S/14": (torch_vit(384, 12, 1536, 14, 37, dinov2=True), None, 22.06e6, (518, 518)),
    "DINOv2 B/14": (torch_vit(768, 12, 3072, 14, 37, dinov2=True), None, 86.58e6, (518, 518)),
    "DINOv2 L/14": (torch_vit(1024, 24, 4096, 14, 37, dinov2=True, registers=4), None, 304.4e6, (518, 518)),
    "DINOv2 g/14": (torch_vit(1536, 40, (8192, 4096), 14, 37, dinov2=True), None, 1136.5e6, (518, 518)),
}


@pytest.mark.parametrize("case", FULL)
def test_full_size_layouts_fit_by_names_and_shapes(monkeypatch, tmp_path, case):
    shapes, config, count, size = FULL[case]
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(readers, "read", lambda path: {name: nothing(shape) for name, shape in shapes.items()})
    opened = checkpoint.open_checkpoint(tmp_path)
    assert tuple(opened.description.image_size) == size
    wanted = small.shapes(models.build("ViT", opened.description.model), nothing((1, *size, 3)))
    checkpoint.check_fit(opened.params, wanted, case)
    total = sum(x.size for x in opened.flat.values())
    assert total == count if isinstance(count, int) else abs(total - count) < 5e-4 * count


UNTOLD = ("model_name", "dropout_rate", "attention_dropout_rate")  # what no parameter shows


def told(fields):
    return {k: told(v) if isinstance(v, dict) else v for k, v in fields.items() if k not in UNTOLD}


@pytest.mark.parametrize("name", [n for n in (*zoo.VIT, *zoo.MIXER) if n != "testing-unpooled"])
def test_names_and_shapes_tell_a_published_architecture(name):
    size = 224 if name in zoo.MIXER else 384
    table = zoo.VIT | zoo.MIXER
    depth = table[name].get("num_blocks") or table[name]["transformer"]["num_layers"]
    one_block = {"num_blocks": 1} if name in zoo.MIXER else {"transformer": {"num_layers": 1}}
    shapes = small.flat(small.shapes(models.get_model(name, num_classes=21, **one_block), nothing((1, size, size, 3))))
    flat = {
        n.replace("Block_0/", f"Block_{i}/").replace("block_0/", f"block_{i}/"): x
        for i in range(depth)
        for n, x in shapes.items()
    }
    facts = google.facts({n: nothing(x.shape) for n, x in flat.items()}, {})
    defaults = {"position_embedding": "learned"} if name in zoo.VIT else {}
    assert told(facts.model) == told(table[name]) | {"num_classes": 21} | defaults
    assert facts.image_size == (378 if name.endswith("_14") else size,) * 2


# Bad input


def test_an_unknown_family_is_named_by_its_parameters(tmp_path):
    checkpoint.save({"layer1": {"conv": np.ones(3)}, "bn": np.ones(2)}, tmp_path / "resnet.npz")
    with pytest.raises(
        UserError, match="resnet.npz is of no family known here .*timm.*: its parameters are called bn, layer1/conv"
    ):
        checkpoint.open_checkpoint(tmp_path / "resnet.npz")


def break_config(folder, change):
    path = folder / "config.json"
    path.write_text(change(json.loads(path.read_text())))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: "{", "config.json is no valid JSON"),
        (lambda c: "[1]", "config.json must hold a JSON object, not list"),
        (lambda c: "{}", "looks like Hugging Face ViT, but 'model_type' is missing from its parameters or its config.json"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "num_attention_heads"}), "'num_attention_heads' is missing"),
        (lambda c: json.dumps(c | {"image_size": None}), "make no sense"),
        (lambda c: json.dumps(c | {"hidden_act": "relu"}), "unknown hidden_act 'relu': did you mean"),
        (lambda c: json.dumps(c | {"num_attention_heads": 5}), "query.weight .32, 32. does not fit a model of 5 heads"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, complaint):
    peers.hf("ViTForImageClassification", tmp_path)
    break_config(tmp_path, change)
    with pytest.raises(UserError, match=complaint):
        checkpoint.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: "{}", "a ViT of width 32, and no config.json beside it tells how many heads it has"),
        (lambda c: json.dumps({"architecture": "vit_base_patch16_gap_224"}), "patch16_gap_224 is another model than its"),
        (lambda c: json.dumps(c | {"model_args": {"num_heads": 4, "act_layer": "silu"}}), "act_layer='silu' is not supported"),
        (lambda c: json.dumps(c | {"model_args": {"num_heads": 4, "global_pool": "max"}}), "pooling by 'max'"),
        (lambda c: json.dumps(c | {"model_args": {"num_heads": 4, "global_pool": "map"}}), "asks for patches alone"),
    ],
)
def test_a_model_of_timm_that_is_not_supported_is_refused(tmp_path, change, complaint):
    peers.timm("plain", tmp_path)
    break_config(tmp_path, change)
    with pytest.raises(UserError, match=complaint):
        checkpoint.open_checkpoint(tmp_path)
