"""CLIP, SigLIP, SigLIP 2 and OpenCLIP: the numbers of transformers, and files that come back as they were."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.checkpoint.peers import randomise, torch_peer
from tests.models import small
from vit_jax import checkpoint, convert, models, predictor
from vit_jax.checkpoint import image_text_export, image_text_files, timm
from vit_jax.errors import UserError
from vit_jax.export.program import Program
from vit_jax.models.packed import Pack
from vit_jax.models.two_towers import scores

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
TEXT = SIZES | {"hidden_size": 24, "vocab_size": 31, "max_position_embeddings": 9}
IMAGE = SIZES | {"hidden_size": 32, "image_size": 21, "patch_size": 7}
# Texts of CLIP end in 30, then comes padding: with 30 again, with 0, or none at all.
TOKENS = np.array([[29, 4, 7, 30, 30, 30, 30], [29, 8, 30, 0, 0, 0, 0], [29, 8, 5, 6, 3, 2, 30]])
TOKENS_OF_9 = np.pad(TOKENS, ((0, 0), (0, 2)))
CASES = {
    "CLIPModel": {"projection_dim": 20, "text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE},
    "CLIPModel with an end": {
        "projection_dim": 20,
        "text_config": TEXT | {"eos_token_id": 7, "hidden_act": "gelu"},
        "vision_config": IMAGE | {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    },
    "SiglipModel": {"text_config": TEXT | {"projection_size": 32}, "vision_config": IMAGE},
    "Siglip2Model": {
        "text_config": TEXT | {"projection_size": 32},
        "vision_config": {k: v for k, v in IMAGE.items() if k != "image_size"} | {"num_patches": 9},
    },
}


def peer(case: str, folder):
    """A tiny model of transformers, saved in `folder`."""
    torch_peer("transformers")
    import torch
    import transformers

    cls = getattr(transformers, case.split()[0])
    model = randomise(cls(cls.config_class(**CASES[case])))
    with torch.no_grad():
        for name, x in model.named_parameters():  # `randomise` makes these too small or too large to matter
            if "embedding" in name or name.endswith("probe"):
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    model.save_pretrained(folder)
    return model


def theirs(model, images, tokens) -> list[np.ndarray]:
    """Embeddings of images and of texts, and their scores."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    inputs = {"pixel_values": pixels, "interpolate_pos_encoding": True}
    if type(model).__name__ == "Siglip2Model":
        b, h, w, _ = images.shape
        patches = images.reshape(b, h // 7, 7, w // 7, 7, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, 147)
        inputs = {
            "pixel_values": torch.from_numpy(patches),
            "spatial_shapes": torch.tensor([[h // 7, w // 7]] * b),
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int32),
        }
    with torch.inference_mode():
        y = model(input_ids=torch.from_numpy(tokens), **inputs)
    return [np.asarray(x) for x in (y.image_embeds, y.text_embeds, y.logits_per_image)]


def ours(opened, images, tokens) -> list[np.ndarray]:
    model = models.build(opened.description.model_type, opened.description.model)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(model.apply, compiler_options={"xla_backend_optimization_level": 0})  # it runs once
        zimg, ztxt, out = run({"params": opened.params}, images=images, tokens=tokens)
    return jax.device_get([zimg, ztxt, scores(zimg, ztxt, out)])


def at_size(opened, grid):
    """The checkpoint for another grid of patches."""
    d, name = opened.description, "img/Transformer/posembed_input/pos_embedding"
    first = int("img/cls" in opened.flat)
    how = {"old_grid": d.grid, "grid": grid, "rule": d.resize}
    table = checkpoint.interpolate_posembed(opened.flat[name], math.prod(grid) + first, bool(first), **how)
    return dataclasses.replace(opened, flat=opened.flat | {name: table})


def as_json(opened) -> dict:
    """The description but for its name; transformers keeps mean and std as shares of 255."""
    described = opened.description.to_json()
    described |= {
        "model_name": "",
        "mean": np.round(described["mean"], 9).tolist(),
        "std": np.round(described["std"], 9).tolist(),
    }
    return json.loads(json.dumps(described))


def assert_same(mine, expected):
    for x, y in zip(mine, expected, strict=True):
        assert 0.05 < y.std() < 5
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_it_is_transformers_and_comes_back_as_it_was(tmp_path, case):
    model = peer(case, tmp_path / "theirs")
    opened = checkpoint.open_checkpoint(tmp_path / "theirs")
    assert opened.description.image_size == (21, 21) and opened.description.grid == (3, 3)
    assert opened.description.head == ("softmax" if "CLIP" in case else "sigmoid")
    images = small.random_images(21, 21, batch=2)
    for tokens in (TOKENS, TOKENS_OF_9):
        assert_same(ours(opened, images, tokens), theirs(model, images, tokens))
    wide = small.random_images(28, 35, batch=2)
    assert_same(ours(at_size(opened, (4, 5)), wide, TOKENS), theirs(model, wide, TOKENS))

    if case == "SiglipModel":
        told = {"size": {"height": 21, "width": 21}, "resample": 2, "image_processor_type": "SiglipImageProcessor"}
        (tmp_path / "theirs" / "processor_config.json").write_text(json.dumps({"image_processor": told}))
        opened = checkpoint.open_checkpoint(tmp_path / "theirs")
        assert opened.description.preprocessing["interpolation"] == "bilinear"
    checkpoint.write_checkpoint(opened, tmp_path / "model.npz", "npz")
    again = checkpoint.open_checkpoint(tmp_path / "model.npz")
    written = checkpoint.write_checkpoint(again, tmp_path / "ours", "hf")
    before, after = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(written)
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert x.shape == after[name].shape and x.tobytes() == after[name].tobytes(), name

    import transformers

    reread = getattr(transformers, case.split()[0]).from_pretrained(tmp_path / "ours").eval()
    assert_same(theirs(reread, images, TOKENS), theirs(model, images, TOKENS))
    assert as_json(checkpoint.open_checkpoint(tmp_path / "ours")) == as_json(opened) == as_json(again)


PHOTOS = [np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8) for size in ((53, 71), (20, 90), (64, 64), (9, 9))]


def test_siglip_2_sees_photos_in_their_own_shapes(tmp_path):
    """From photos to embeddings, of a batch that is filled up: by its own processor and by ours, in and out."""
    model = peer("Siglip2Model", tmp_path)
    told = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 7, "max_num_patches": 23}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    import torch
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    inputs = Siglip2ImageProcessorPil.from_pretrained(tmp_path)([Image.fromarray(x) for x in PHOTOS], return_tensors="pt")
    assert len({tuple(shape.tolist()) for shape in inputs["spatial_shapes"]}) == 3
    with torch.inference_mode():
        y = model(input_ids=torch.from_numpy(np.tile(TOKENS[:1], (4, 1))), **inputs)
    expected = np.asarray(y.image_embeds)
    opened = checkpoint.open_checkpoint(tmp_path)
    again = checkpoint.open_checkpoint(checkpoint.write_checkpoint(opened, tmp_path / "npz", "npz"))
    hf = checkpoint.open_checkpoint(checkpoint.write_checkpoint(again, tmp_path / "hf", "hf"))
    assert as_json(hf) == as_json(opened) and convert._check_photo(opened, hf, "hf") == 0
    how = opened.description.preprocessing | {"enlarge": False}
    small_photos = dataclasses.replace(opened, description=dataclasses.replace(opened.description, preprocessing=how))
    with pytest.raises(UserError, match="enlarges small photos, which this model does not"):
        checkpoint.write_checkpoint(small_photos, tmp_path / "small", "hf")
    loaded = predictor.load(tmp_path, batch_size=4)
    assert loaded.description.preprocessing["max_patches"] == 23
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(loaded.embed_images(PHOTOS), expected, atol=1e-5)
    with pytest.raises(UserError, match="keeps the shapes of photos: to see its attention give one size, --size=21,21"):
        loaded.attention(PHOTOS)
    with pytest.raises(UserError, match="give one size to export it, --size=21,21"):
        Program(loaded)
    with pytest.raises(UserError, match="tome=1 is for images of one size"):
        predictor.load(tmp_path, tome=1)(PHOTOS)
    for how in ({"size": (28, 28)}, {"head": False}):  # one size, given or the model's own
        assert "max_patches" not in predictor.load(tmp_path, **how).description.preprocessing
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told | {"patch_size": 16}))
    with pytest.raises(UserError, match="patch_size is 16; it must be 7, as in the model"):
        checkpoint.open_checkpoint(tmp_path)


def test_naflex_of_big_vision(tmp_path):
    """Patches are mapped by a matrix there, and positions are a grid."""
    peer("Siglip2Model", tmp_path / "hf")
    hf = checkpoint.open_checkpoint(tmp_path / "hf")
    arrays = {f"params/{name}": x for name, x in hf.flat.items()}
    arrays["params/img/embedding/kernel"] = arrays["params/img/embedding/kernel"].reshape(147, 32)
    arrays["params/img/pos_embedding"] = arrays.pop("params/img/Transformer/posembed_input/pos_embedding").reshape(3, 3, 32)
    np.savez(tmp_path / "naflex.npz", **arrays)
    opened = checkpoint.open_checkpoint(tmp_path / "naflex.npz")
    assert opened.flat.keys() == hf.flat.keys() and all((opened.flat[name] == x).all() for name, x in hf.flat.items())
    mine, theirs = opened.description, hf.description
    assert mine.resize == theirs.resize and mine.image_size == theirs.image_size and mine.head == "sigmoid"
    assert mine.preprocessing | {"floor_cut": True} == theirs.preprocessing | {"floor_cut": True, "resize_to": None}


def test_openclip(tmp_path):
    """Its names and its packed attention, of the same numbers as transformers' model."""
    model = peer("CLIPModel", tmp_path / "hf")
    hf = load_file(tmp_path / "hf" / "model.safetensors")
    arrays = {"logit_scale": hf["logit_scale"], "visual.proj": hf["visual_projection.weight"].T}
    arrays |= {"text_projection": hf["text_projection.weight"].T}
    arrays |= {"visual.class_embedding": hf["vision_model.embeddings.class_embedding"]}
    arrays |= {"visual.conv1.weight": hf["vision_model.embeddings.patch_embedding.weight"]}
    arrays |= {"token_embedding.weight": hf["text_model.embeddings.token_embedding.weight"]}
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    norms |= {"ln_final": "text_model.final_layer_norm"}
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        arrays[f"{prefix}positional_embedding"] = hf[f"{tower}.embeddings.position_embedding.weight"]
        for i in range(2):
            block, layer = f"{prefix}transformer.resblocks.{i}", f"{tower}.encoder.layers.{i}"
            norms |= {f"{block}.ln_1": f"{layer}.layer_norm1", f"{block}.ln_2": f"{layer}.layer_norm2"}
            norms |= {f"{block}.mlp.c_fc": f"{layer}.mlp.fc1", f"{block}.mlp.c_proj": f"{layer}.mlp.fc2"}
            norms |= {f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj"}
            for kind in ("weight", "bias"):
                packed = [hf[f"{layer}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
                arrays[f"{block}.attn.in_proj_{kind}"] = np.concatenate(packed)
    arrays |= {f"{a}.{kind}": hf[f"{b}.{kind}"] for a, b in norms.items() for kind in ("weight", "bias")}
    folder = tmp_path / "openclip"
    folder.mkdir()
    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, folder / "open_clip_model.safetensors")
    config = {"quick_gelu": True, "vision_cfg": {"head_width": 8}, "text_cfg": {"heads": 4}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))

    opened = checkpoint.open_checkpoint(folder)
    images = small.random_images(21, 21, batch=2)
    assert_same(ours(opened, images, TOKENS), theirs(model, images, TOKENS))
    written = load_file(checkpoint.write_checkpoint(opened, tmp_path / "again", "openclip"))
    assert arrays.keys() == written.keys()
    assert all(written[name].shape == x.shape and (written[name] == x).all() for name, x in arrays.items())
    assert as_json(checkpoint.open_checkpoint(tmp_path / "again")) == as_json(opened)
    plain = json.loads((tmp_path / "again" / "open_clip_config.json").read_text())["model_cfg"]
    assert "act_kwargs" not in plain["text_cfg"] and "norm_kwargs" not in plain["vision_cfg"]
    for activations in (("gelu_tanh", "gelu_tanh"), ("gelu", "gelu_tanh")):
        other = dataclasses.replace(
            opened, description=dataclasses.replace(opened.description, model={**opened.description.model})
        )
        tower, words = other.description.model["image"], other.description.model["text"]
        how = {"activation": activations[0], "norm_eps": 1e-6}
        other.description.model["image"] = tower | {"transformer": tower["transformer"] | how}
        other.description.model["text"] = words | {"activation": activations[1]}
        checkpoint.write_checkpoint(other, tmp_path / "tanh", "openclip")
        told = json.loads((tmp_path / "tanh" / "open_clip_config.json").read_text())["model_cfg"]
        assert told["text_cfg"]["act_kwargs"] == {"approximate": "tanh"} and not told.get("quick_gelu")
        assert told["vision_cfg"]["norm_kwargs"] == {"eps": 1e-6} and "norm_kwargs" not in told["text_cfg"]
        assert as_json(checkpoint.open_checkpoint(tmp_path / "tanh")) == as_json(other)
    other.description.model["text"]["activation"] = "quick_gelu"  # which OpenCLIP has in both towers or in none
    with pytest.raises(UserError, match="cannot express the activations gelu and quick_gelu"):
        checkpoint.write_checkpoint(other, tmp_path / "x", "openclip")
    config["text_cfg"]["act_kwargs"] = {"approximate": "tanh"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(UserError, match="text_cfg.act_kwargs is .*left out where quick_gelu is true"):
        checkpoint.open_checkpoint(folder)
    alone = {name: np.ascontiguousarray(x) for name, x in arrays.items() if name.startswith("visual.")}
    save_file(alone, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"has visual.conv1.weight, but not both towers"):
        checkpoint.open_checkpoint(tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match="timm has no layout for a TwoTowers here"):
        checkpoint.write_checkpoint(opened, tmp_path / "x", "timm")


def test_siglip_of_openclip(tmp_path, monkeypatch):
    """Its image tower is timm's: the numbers of transformers' SigLIP under these names."""
    model = peer("SiglipModel", tmp_path / "hf")
    with torch_peer("timm").without_torchvision():
        from timm import list_models
        from timm.models import VisionTransformer

    hf = load_file(tmp_path / "hf" / "model.safetensors")
    trunk, tower = "visual.trunk", "vision_model"
    arrays = {name: hf[name].reshape(()) for name in ("logit_scale", "logit_bias")}
    arrays |= {f"{trunk}.pos_embed": hf[f"{tower}.embeddings.position_embedding.weight"][None]}
    arrays |= {f"{trunk}.attn_pool.latent": hf[f"{tower}.head.probe"]}
    arrays |= {"text.token_embedding.weight": hf["text_model.embeddings.token_embedding.weight"]}
    arrays |= {"text.positional_embedding": hf["text_model.embeddings.position_embedding.weight"]}
    same = {f"{trunk}.patch_embed.proj": f"{tower}.embeddings.patch_embedding", f"{trunk}.norm": f"{tower}.post_layernorm"}
    pool = {"norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "proj": "attention.out_proj"}
    same |= {f"{trunk}.attn_pool.{a}": f"{tower}.head.{b}" for a, b in pool.items()}
    same |= {"text.ln_final": "text_model.final_layer_norm", "text.text_projection": "text_model.head"}
    names = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.out_proj")
    in_timm, in_openclip = ("norm1", "norm2", "mlp.fc1", "mlp.fc2", "attn.proj"), ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for i in range(2):
        block, layer = f"{trunk}.blocks.{i}", f"{tower}.encoder.layers.{i}"
        text, words = f"text.transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        same |= {f"{block}.{a}": f"{layer}.{b}" for a, b in zip(in_timm, names, strict=True)}
        same |= {f"{text}.{a}": f"{words}.{b}" for a, b in zip((*in_openclip, "attn.out_proj"), names, strict=True)}
        for kind in ("weight", "bias"):
            arrays[f"{block}.attn.qkv.{kind}"] = np.concatenate([hf[f"{layer}.self_attn.{n}_proj.{kind}"] for n in "qkv"])
            arrays[f"{text}.attn.in_proj_{kind}"] = np.concatenate([hf[f"{words}.self_attn.{n}_proj.{kind}"] for n in "qkv"])
    arrays |= {f"{a}.{kind}": hf[f"{b}.{kind}"] for a, b in same.items() for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        q, k, v = np.split(hf[f"{tower}.head.attention.in_proj_{kind}"], 3)
        arrays |= {f"{trunk}.attn_pool.q.{kind}": q, f"{trunk}.attn_pool.kv.{kind}": np.concatenate([k, v])}
    known = set(list_models("vit_*_siglip_*"))
    for name, sides in image_text_export._TIMM_SIZES.values():
        assert known >= {f"vit_{name}_patch{patch}_siglip_{side}" for patch in sides for side in sides[patch]}
    sizes = {"img_size": 21, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.25}
    peer_of_image = VisionTransformer(**sizes, num_classes=0, class_token=False, global_pool="map").state_dict()
    wanted = {f"{trunk}.{name}": tuple(x.shape) for name, x in peer_of_image.items()}
    mlp = {name: shape for name, shape in wanted.items() if ".attn_pool.mlp." in name}  # of another ratio
    assert wanted.keys() == {name for name in arrays if name.startswith("visual.")}
    assert all(arrays[name].shape == shape for name, shape in wanted.items() if name not in mlp)

    save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, tmp_path / "open_clip_model.safetensors")
    text = {"heads": 4, "no_causal_mask": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    vision = {"timm_model_name": "vit_so400m_patch16_siglip_256", "timm_pool": "map", "timm_proj": "none"}
    config = {"vision_cfg": vision, "text_cfg": text | {"act_kwargs": {"approximate": "tanh"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    monkeypatch.setattr(image_text_files, "_SIGLIP_HEADS", {32: 4})
    opened = checkpoint.open_checkpoint(tmp_path / "open_clip_model.safetensors")
    described = opened.description
    assert described.head == "sigmoid" and described.mean == (127.5,) * 3 and described.preprocessing["resize_to"] is None
    told = {"tokenizer": "sentencepiece", "vocab": "spiece.model", "lower": True, "strip_punctuation": True, "max_len": 9}
    assert described.text == told
    images = small.random_images(21, 21, batch=2)
    assert_same(ours(opened, images, TOKENS_OF_9), theirs(model, images, TOKENS_OF_9))
    written = load_file(checkpoint.write_checkpoint(opened, tmp_path / "again", "hf"))
    assert written.keys() == hf.keys()
    assert all((written[name] == x).all() for name, x in hf.items())

    with pytest.raises(UserError, match="an image tower of sizes for which timm has no SigLIP"):
        checkpoint.write_checkpoint(opened, tmp_path / "back", "openclip")
    monkeypatch.setattr(image_text_export, "_TIMM_SIZES", {(32, 2, 4, 40): ("so400m", {7: (21,)})})
    with pytest.raises(UserError, match="activation=gelu_tanh, for which vit_so400m_patch7_siglip_21 has gelu"):
        checkpoint.write_checkpoint(opened, tmp_path / "back", "openclip")
    monkeypatch.setattr(timm, "SIGLIP_TANH", re.compile("so400m_patch7"))
    written = load_file(checkpoint.write_checkpoint(opened, tmp_path / "back", "openclip"))
    assert written.keys() == arrays.keys()
    assert all(written[name].shape == x.shape and (written[name] == x).all() for name, x in arrays.items())
    assert as_json(checkpoint.open_checkpoint(tmp_path / "back")) == as_json(opened)
    told = json.loads((tmp_path / "back" / "open_clip_config.json").read_text())["model_cfg"]
    assert told["embed_dim"] == 32 and told["vision_cfg"]["timm_model_name"] == "vit_so400m_patch7_siglip_21"
    assert told["text_cfg"] | text | {"act_kwargs": {"approximate": "tanh"}} == told["text_cfg"]
    config["text_cfg"]["no_causal_mask"] = False
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(UserError, match="no_causal_mask is false; it must be true"):
        checkpoint.open_checkpoint(tmp_path / "open_clip_model.safetensors")


@pytest.mark.parametrize(
    "name", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel", "Siglip2VisionModel"]
)
def test_an_image_tower_alone(tmp_path, name):
    """Of SigLIP 2 in a batch of two shapes, which is filled up."""
    torch_peer("transformers")
    import torch
    import transformers

    cls = getattr(transformers, name)
    sizes = CASES[name.replace("Vision", "").removesuffix("WithProjection")]["vision_config"]
    model = randomise(cls(cls.config_class(**sizes, **({"projection_dim": 20} if "Projection" in name else {}))))
    model.save_pretrained(tmp_path / "theirs")
    opened = checkpoint.open_checkpoint(tmp_path / "theirs")
    assert opened.description.image_size == (21, 21) and opened.description.class_names == ()
    images = small.random_images(21, 21, batch=2)
    inputs, x = images, {"pixel_values": torch.from_numpy(images.transpose(0, 3, 1, 2).copy())}
    if name == "Siglip2VisionModel":
        assert opened.description.preprocessing["max_patches"] == 256
        grids = np.array([[2, 4], [1, 5]])
        patches = np.random.default_rng(0).normal(size=(2, 9, 147)).astype(np.float32)
        mask = np.arange(9) < grids.prod(axis=1)[:, None]
        inputs = Pack(patches, grids[:, None])
        x = {"pixel_values": patches, "pixel_attention_mask": mask.astype(np.int32), "spatial_shapes": grids}
        x = {name: torch.from_numpy(value) for name, value in x.items()}
    with torch.inference_mode():
        y = model(**x)
        expected = (y.image_embeds if "Projection" in name else y.pooler_output).numpy()
    module = models.build("ViT", opened.description.model)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(module.apply)({"params": opened.params}, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    written = load_file(checkpoint.write_checkpoint(opened, tmp_path / "ours", "hf"))
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    assert written.keys() == before.keys() and all(written[n].tobytes() == x.tobytes() for n, x in before.items())
    assert as_json(checkpoint.open_checkpoint(tmp_path / "ours")) == as_json(opened)
    assert isinstance(cls.from_pretrained(tmp_path / "ours"), cls)
    said = "its head gives embeddings of 20 numbers, no classes. `features`" if "Projection" in name else "has no head"
    with pytest.raises(UserError, match=said):
        predictor.load(tmp_path / "theirs")
    assert cls.__name__ == json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
