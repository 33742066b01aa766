"""Tiny random models of the libraries whose checkpoints we read, and of ours, and what they make of images."""

import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.models import small
from vit_jax import models

os.environ["HF_HUB_OFFLINE"] = "1"
SIZE = 24, 40
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = SIZES | {"intermediate_size": 48, "image_size": SIZE, "patch_size": 8, "num_labels": 5}
DINOV2 = SIZES | {"image_size": 32, "patch_size": 8, "num_labels": 5, "mlp_ratio": 2}
NAMES = ["ape", "bear", "cat", "dög", "eel"]

HF = {
    "ViTForImageClassification": VIT | {"hidden_act": "gelu"},
    "ViTModel": VIT | {"patch_size": [4, 8]},  # with a pooler
    "DeiTForImageClassificationWithTeacher": VIT | {"layer_norm_eps": 1e-6},
    "DeiTForImageClassification": VIT,  # a distillation token that no head reads
    "Dinov2Model": DINOV2,
    "Dinov2ForImageClassification": DINOV2 | {"use_swiglu_ffn": True, "mlp_ratio": 4},
    "Dinov2WithRegistersModel": DINOV2 | {"use_swiglu_ffn": True, "num_register_tokens": 2},
    "Dinov2WithRegistersForImageClassification": DINOV2 | {"num_register_tokens": 3},
}

TIMM_SIZES = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}
TIMM = {
    "plain": {},
    "tanh GELU": {"act_layer": "gelu_tanh", "patch_size": (4, 8)},
    "mean with fc_norm": {"global_pool": "avg"},
    "mean with norm": {"global_pool": "avg", "fc_norm": False, "class_token": False},
    "token with fc_norm": {"fc_norm": True},
    "registers": {"reg_tokens": 2},
    "registers without positions": {"reg_tokens": 2, "no_embed_class": True, "init_values": 1e-5},
    "no class position": {"no_embed_class": True},
    "mean, registers": {"global_pool": "avg", "reg_tokens": 2},
    "mean, registers, no class token": {"global_pool": "avg", "reg_tokens": 2, "class_token": False, "no_embed_class": True},
    "mean of patches without a class position": {"global_pool": "avg", "no_embed_class": True},
    "q/k norm, no biases of queries, keys and values": {"qk_norm": True, "qkv_bias": False},
    "LayerScale, no head": {"init_values": 1e-5, "num_classes": 0},
    "SwiGLU": {"mlp_ratio": 3.0, "architecture": "vit_giant_patch14_dinov2"},
    "CLIP": {"architecture": "vit_base_patch32_clip_quickgelu_224"},
    "attention pooling": {"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"},
    "distilled": {"architecture": "deit_base_distilled_patch16_224"},
    "RMSNorm": {"norm_layer": "rmsnorm", "qk_norm": True, "global_pool": "avg", "class_token": False, "reg_tokens": 1},
    "RMSNorm, attention pooling": {"norm_layer": "rmsnorm", "global_pool": "map", "class_token": False},
}
FOLDED = (
    "mean with fc_norm",
    "registers",
    "registers without positions",
    "no class position",
    "mean, registers",
    "mean, registers, no class token",
    "RMSNorm",
    "mean of patches without a class position",
)
"""Whose tokens in front come back in another but equal form: with positions added, or an unread class token as a register."""


def torch_peer(*names: str):
    """The module of torch peers, or a skipped test where one of the libraries is missing."""
    for name in ("torch", *names):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    return importlib.import_module("tests.models.torch_peer")


def randomise(model):
    """Gives every parameter a random value, so that each matters, and activations are of order 1."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=generator)
            if p.ndim > 1 and name.endswith("weight"):
                x = x / (p[0].numel() ** 0.5)
            elif name.endswith(("weight", "gamma", "lambda1")):
                x = 1 + 0.2 * x
            elif name.endswith("bias"):
                x = 0.2 * x
            p.copy_(x)
    return model.eval()


def hf(name: str, folder: Path, **changes):
    """One of `HF`, saved in `folder` by transformers."""
    torch_peer("transformers")
    import transformers

    cls = getattr(transformers, name)
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    model = randomise(cls(cls.config_class(**{**labels, **HF[name], **changes})))
    model.save_pretrained(folder)
    return model


def timm(name: str, folder: Path, **changes):
    """One of `TIMM`, saved in `folder` by timm."""
    with torch_peer("timm").without_torchvision():
        import timm

    args = {**TIMM_SIZES, "num_classes": 5, **TIMM[name], **changes}
    model = randomise(timm.create_model(args.pop("architecture", "vit_base_patch16_224"), **args))
    model_args = args | {"img_size": list(args["img_size"])}
    with torch_peer("timm").without_torchvision():
        timm.models.save_for_hf(model, folder, model_args=model_args, safe_serialization=True)
    return model


def ours(opened, images) -> tuple:
    """(logits or None, class token or None, patch tokens) of an opened checkpoint."""
    model = models.build(opened.description.model_type, opened.description.model)

    def run(params, x):
        logits = model.apply({"params": params}, x) if model.num_classes else None
        features = model.apply({"params": params}, x, method="features")
        return logits, features["cls"], features["patches"]

    compiled = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})  # it runs once
    with jax.default_matmul_precision("highest"):
        return jax.device_get(compiled(opened.params, images))


def theirs(model, images) -> tuple:
    """The same of a torch model. The patches come last in every family."""
    import torch

    with torch.inference_mode():
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        base = getattr(model, "base_model", model)
        tokens = model.forward_features(x) if hasattr(model, "forward_features") else base(x).last_hidden_state
        output = model(x)
        logits = output if torch.is_tensor(output) else getattr(output, "logits", None)
    return logits if getattr(model, "num_classes", 1) else None, tokens[:, 0], tokens


def assert_same(opened, model, images) -> float:
    """Raises unless logits, class token and patches are the same; returns the largest difference."""
    logits, cls, patches = ours(opened, images)
    their_logits, their_cls, their_tokens = theirs(model, images)
    assert (logits is None) == (their_logits is None)
    pairs = [(patches, their_tokens[:, -patches.shape[1] :])]
    pairs += [(cls, their_cls)] if cls is not None else []
    pairs += [(logits, their_logits)] if logits is not None else []
    for mine, other in pairs:
        other = np.asarray(other)
        assert 0.2 < other.std() < 5, "1e-5 means something for numbers of order 1 only"
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=0)
    return max(float(np.abs(mine - np.asarray(other)).max()) for mine, other in pairs)


def images(opened, seed: int = 1) -> np.ndarray:
    """Random images of the checkpoint's own size."""
    return small.random_images(*opened.description.image_size)
