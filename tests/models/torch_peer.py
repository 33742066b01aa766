"""Models of transformers and timm that hold our weights, with Google's numbers: tanh GELU and epsilon 1e-6."""

import sys
from contextlib import contextmanager
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import torch


def hf_vit(params, image_size):
    """`ViTForImageClassification`, its weights read under the names that the hub's files carry."""
    from transformers import ViTConfig, ViTForImageClassification

    p, _, _, d = params["embedding"]["kernel"].shape
    blocks = _blocks(params["Transformer"], "encoderblock_")
    config = ViTConfig(
        hidden_size=d,
        num_hidden_layers=len(blocks),
        num_attention_heads=_heads(blocks[0]),
        intermediate_size=_mlp_dim(blocks[0]["MlpBlock_3"]),
        image_size=image_size,
        patch_size=p,
        num_labels=len(params["head"]["bias"]),
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    weights = {
        "vit.embeddings.cls_token": params["cls"],
        "vit.embeddings.position_embeddings": params["Transformer"]["posembed_input"]["pos_embedding"],
        **_conv("vit.embeddings.patch_embeddings.projection", params["embedding"]),
        **_norm("vit.layernorm", params["Transformer"]["encoder_norm"]),
        **_linear("classifier", params["head"]),
    }
    for i, block in enumerate(blocks):
        name, mha = f"vit.encoder.layer.{i}", block["MultiHeadDotProductAttention_1"]
        for part in ("query", "key", "value"):
            weights |= _linear(f"{name}.attention.attention.{part}", mha[part])
        weights |= {
            **_norm(f"{name}.layernorm_before", block["LayerNorm_0"]),
            **_linear(f"{name}.attention.output.dense", mha["out"], outputs=1),
            **_norm(f"{name}.layernorm_after", block["LayerNorm_2"]),
            **_linear(f"{name}.intermediate.dense", block["MlpBlock_3"]["Dense_0"]),
            **_linear(f"{name}.output.dense", block["MlpBlock_3"]["Dense_1"]),
        }
    model, report = ViTForImageClassification.from_pretrained(
        None, config=config, state_dict=_tensors(weights), output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def timm_vit(params, image_size):
    """`timm.models.VisionTransformer`, pooling as our parameters say: with a class token or by the mean."""
    with without_torchvision():
        from timm.models.vision_transformer import VisionTransformer

    p, _, _, d = params["embedding"]["kernel"].shape
    blocks = _blocks(params["Transformer"], "encoderblock_")
    model = VisionTransformer(
        img_size=image_size,
        patch_size=p,
        embed_dim=d,
        depth=len(blocks),
        num_heads=_heads(blocks[0]),
        mlp_ratio=_mlp_dim(blocks[0]["MlpBlock_3"]) / d,
        num_classes=len(params["head"]["bias"]),
        class_token="cls" in params,
        global_pool="token" if "cls" in params else "avg",
        fc_norm=False,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        act_layer=partial(torch.nn.GELU, approximate="tanh"),
    )
    weights = {
        **({"cls_token": params["cls"]} if "cls" in params else {}),
        "pos_embed": params["Transformer"]["posembed_input"]["pos_embedding"],
        **_conv("patch_embed.proj", params["embedding"]),
        **_norm("norm", params["Transformer"]["encoder_norm"]),
        **_linear("head", params["head"]),
    }
    for i, block in enumerate(blocks):
        mha = block["MultiHeadDotProductAttention_1"]
        qkv = [_linear("qkv", mha[part]) for part in ("query", "key", "value")]
        weights |= {
            **_norm(f"blocks.{i}.norm1", block["LayerNorm_0"]),
            **{f"blocks.{i}.attn.{name}": np.concatenate([part[name] for part in qkv]) for name in qkv[0]},
            **_linear(f"blocks.{i}.attn.proj", mha["out"], outputs=1),
            **_norm(f"blocks.{i}.norm2", block["LayerNorm_2"]),
            **_mlp(f"blocks.{i}.mlp", block["MlpBlock_3"]),
        }
    model.load_state_dict(_tensors(weights))
    return model.eval()


def timm_mixer(params, image_size):
    """`timm.models.MlpMixer`."""
    with without_torchvision():
        from timm.models.mlp_mixer import MlpMixer

    p, _, _, d = params["stem"]["kernel"].shape
    blocks = _blocks(params, "MixerBlock_")
    model = MlpMixer(
        num_classes=len(params["head"]["bias"]),
        img_size=image_size,
        patch_size=p,
        num_blocks=len(blocks),
        embed_dim=d,
        mlp_ratio=tuple(_mlp_dim(blocks[0][mixing]) / d for mixing in ("token_mixing", "channel_mixing")),
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        act_layer=partial(torch.nn.GELU, approximate="tanh"),
    )
    weights = {
        **_conv("stem.proj", params["stem"]),
        **_norm("norm", params["pre_head_layer_norm"]),
        **_linear("head", params["head"]),
    }
    for i, block in enumerate(blocks):
        weights |= {
            **_norm(f"blocks.{i}.norm1", block["LayerNorm_0"]),
            **_mlp(f"blocks.{i}.mlp_tokens", block["token_mixing"]),
            **_norm(f"blocks.{i}.norm2", block["LayerNorm_1"]),
            **_mlp(f"blocks.{i}.mlp_channels", block["channel_mixing"]),
        }
    model.load_state_dict(_tensors(weights))
    return model.eval()


def run(model, images, **kwargs):
    """The outputs of one of these models for our images, which have their channels last."""
    with torch.inference_mode():
        return model(torch.from_numpy(images).permute(0, 3, 1, 2), **kwargs)


def _blocks(params, prefix):
    return [params[f"{prefix}{i}"] for i in range(sum(name.startswith(prefix) for name in params))]


def _heads(block):
    return block["MultiHeadDotProductAttention_1"]["query"]["kernel"].shape[1]


def _mlp_dim(mlp):
    return len(mlp["Dense_0"]["bias"])


def _linear(name, params, outputs=None):
    """[out, in] from our kernel, of which the last `outputs` axes are outputs (all but the first if not given)."""
    kernel = params["kernel"]
    outputs = outputs or kernel.ndim - 1
    width = int(np.prod(kernel.shape[-outputs:]))
    return {f"{name}.weight": kernel.reshape(-1, width).T, f"{name}.bias": params["bias"].reshape(-1)}


def _mlp(name, params):
    return _linear(f"{name}.fc1", params["Dense_0"]) | _linear(f"{name}.fc2", params["Dense_1"])


def _norm(name, params):
    return {f"{name}.weight": params["scale"], f"{name}.bias": params["bias"]}


def _conv(name, params):
    return {f"{name}.weight": params["kernel"].transpose(3, 2, 0, 1), f"{name}.bias": params["bias"]}


def _tensors(weights):
    return {name: torch.from_numpy(np.array(x, order="C")) for name, x in weights.items()}


class _StubNames(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StubModule(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _StubNames(name, (), {})


class _StubFinder(MetaPathFinder, Loader):
    def find_spec(self, fullname, path=None, target=None):
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return _StubModule(spec.name)

    def exec_module(self, module):
        pass


@contextmanager
def without_torchvision():
    """timm imports torchvision for parts unused here: stubs stand in for a missing one while timm is imported."""
    finder = _StubFinder()
    sys.meta_path.append(finder)  # after the real finders: an installed torchvision wins
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StubModule)]:
            del sys.modules[name]
