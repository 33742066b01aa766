"""The weights of torch's and transformers' Transformers under our names."""

import numpy as np
import torch

ATTENTION = ("query", "key", "value")


def randomise(module, seed=0):
    """Draws every parameter and buffer anew, so that none of them is 0 or 1; variances are positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in (*module.named_parameters(), *module.named_buffers()):
            if not x.is_floating_point() or "final_logits_bias" in name or "embed_positions" in name:
                continue
            if x.ndim == 1:
                center = 1.0 if name.endswith(("weight", "var")) else 0.0
                x.copy_(center + 0.2 * torch.rand(x.shape, generator=generator))
            else:
                x.copy_(torch.randn(x.shape, generator=generator) * x[0].numel() ** -0.5)
    return module.eval()


def eomt(folder, *, side, classes, **fields):
    """An EomtForUniversalSegmentation with random weights, trained to its end, which `folder` then holds, too."""
    from transformers import EomtConfig, EomtForUniversalSegmentation

    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 2, "patch_size": 8}
    sizes |= {"num_blocks": 2, "num_queries": 7, "num_register_tokens": 2, "image_size": side, "num_labels": classes}
    model = randomise(EomtForUniversalSegmentation(EomtConfig(**(sizes | fields))))
    model.attn_mask_probs.zero_()
    model.save_pretrained(folder)
    return model


def torch_transformer(model, heads):
    """The stacks of a `torch.nn.Transformer`."""
    flat = _arrays(model)
    names = {"self_attention": "self_attn", "cross_attention": "multihead_attn", "mlp": ("linear1", "linear2")}
    norms = {
        "encoder": {"self_attention_norm": "norm1", "mlp_norm": "norm2"},
        "decoder": {"self_attention_norm": "norm1", "cross_attention_norm": "norm2", "mlp_norm": "norm3"},
    }
    stacks = {}
    for stack, of in norms.items():
        stacks[stack] = {"norm": _norm(flat, f"{stack}.norm")}
        for i in range(len(getattr(model, stack).layers)):
            at = f"{stack}.layers.{i}"
            layer = {ours: _norm(flat, f"{at}.{theirs}") for ours, theirs in of.items()}
            layer["mlp"] = {f"Dense_{k}": _dense(flat, f"{at}.{name}") for k, name in enumerate(names["mlp"])}
            for ours in ("self_attention", "cross_attention"):
                if f"{at}.{names[ours]}.in_proj_weight" in flat:
                    layer[ours] = _packed(flat, f"{at}.{names[ours]}", heads)
            stacks[stack][f"layer_{i}"] = layer
    return stacks


def marian(model):
    """A `MarianMTModel`."""
    flat, heads = _arrays(model), model.config.encoder_attention_heads
    ours = {"embedding": flat["model.shared.weight"]}
    for stack in ("encoder", "decoder"):
        ours[stack] = {}
        for i in range(len(getattr(model.model, stack).layers)):
            at = f"model.{stack}.layers.{i}"
            layer = {
                "self_attention": _attention(flat, f"{at}.self_attn", heads),
                "self_attention_norm": _norm(flat, f"{at}.self_attn_layer_norm"),
                "mlp": {"Dense_0": _dense(flat, f"{at}.fc1"), "Dense_1": _dense(flat, f"{at}.fc2")},
                "mlp_norm": _norm(flat, f"{at}.final_layer_norm"),
            }
            if stack == "decoder":
                layer["cross_attention"] = _attention(flat, f"{at}.encoder_attn", heads)
                layer["cross_attention_norm"] = _norm(flat, f"{at}.encoder_attn_layer_norm")
            ours[stack][f"layer_{i}"] = layer
    return ours


def _arrays(model):
    return {name: x.numpy() for name, x in model.state_dict().items()}


def _dense(flat, name):
    return {"kernel": flat[f"{name}.weight"].T, "bias": flat[f"{name}.bias"]}


def _norm(flat, name):
    return {"scale": flat[f"{name}.weight"], "bias": flat[f"{name}.bias"]}


def _heads(weight, bias, heads):
    return {"kernel": weight.T.reshape(weight.shape[1], heads, -1), "bias": bias.reshape(heads, -1)}


def _packed(flat, at, heads):
    weights, biases = (np.split(flat[f"{at}.in_proj_{kind}"], 3) for kind in ("weight", "bias"))
    parts = {name: _heads(w, b, heads) for name, w, b in zip(ATTENTION, weights, biases, strict=True)}
    return parts | {"out": _out(flat, f"{at}.out_proj", heads)}


def _attention(flat, at, heads):
    parts = {n: _heads(flat[f"{at}.{n[0]}_proj.weight"], flat[f"{at}.{n[0]}_proj.bias"], heads) for n in ATTENTION}
    return parts | {"out": _out(flat, f"{at}.out_proj", heads)}


def _out(flat, name, heads):
    weight = flat[f"{name}.weight"]
    return {"kernel": weight.T.reshape(heads, -1, len(weight)), "bias": flat[f"{name}.bias"]}
