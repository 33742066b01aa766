"""The forward passes in NumPy and float64, written from the published description and sharing nothing with vit_jax.

Depth, widths, heads and patch size are read off the parameters, which carry the published names.
"""

import numpy as np


def vit(params, images, classifier="token"):
    x = resnet(params, images) if "conv_root" in params else np.float64(images)
    x = patches(params["embedding"], x, "VALID")
    if classifier.startswith("token"):
        x = np.concatenate([np.tile(params["cls"], (len(x), 1, 1)), x], axis=1)
    x = encoder(params["Transformer"], x)
    x = {"token": lambda: x[:, 0], "gap": lambda: x.mean(1)}.get(classifier, lambda: x)()
    if "pre_logits" in params:
        x = np.tanh(dense(params["pre_logits"], x))
    return dense(params["head"], x) if "head" in params else x


def encoder(params, x):
    if "posembed_input" in params:
        x = x + params["posembed_input"]["pos_embedding"]
    for i in range(count(params, "encoderblock_")):
        block = params[f"encoderblock_{i}"]
        x = x + attention(block["MultiHeadDotProductAttention_1"], layer_norm(block["LayerNorm_0"], x))
        x = x + mlp(block["MlpBlock_3"], layer_norm(block["LayerNorm_2"], x))
    return layer_norm(params["encoder_norm"], x)


def attention(params, x):
    _, heads, size = params["query"]["kernel"].shape
    y = params["out"]["bias"]
    for k in range(heads):
        query, key, value = (x @ params[n]["kernel"][:, k] + params[n]["bias"][k] for n in ("query", "key", "value"))
        weights = np.exp(query @ key.swapaxes(1, 2) / np.sqrt(size))
        y = y + weights / weights.sum(-1, keepdims=True) @ value @ params["out"]["kernel"][k]
    return y


def mixer(params, images):
    x = patches(params["stem"], np.float64(images), "SAME")
    for i in range(count(params, "MixerBlock_")):
        block = params[f"MixerBlock_{i}"]
        x = x + mlp(block["token_mixing"], layer_norm(block["LayerNorm_0"], x).swapaxes(1, 2)).swapaxes(1, 2)
        x = x + mlp(block["channel_mixing"], layer_norm(block["LayerNorm_1"], x))
    return dense(params["head"], layer_norm(params["pre_head_layer_norm"], x).mean(1))


def resnet_stem(params, images):
    x = relu(group_norm(params["gn_root"], std_conv(params["conv_root"], np.float64(images), 2)))
    return windows(x, (3, 3), (2, 2), "SAME", -np.inf).max((-2, -1))


def resnet(params, images):
    x = resnet_stem(params, images)
    for i in range(count(params, "block")):
        stage = params[f"block{i + 1}"]
        for j in range(count(stage, "unit")):
            x = residual_unit(stage[f"unit{j + 1}"], x, 2 if i > 0 and j == 0 else 1)
    return x


def residual_unit(params, x, stride):
    shortcut = group_norm(params["gn_proj"], std_conv(params["conv_proj"], x, stride)) if "conv_proj" in params else x
    x = relu(group_norm(params["gn1"], std_conv(params["conv1"], x)))
    x = relu(group_norm(params["gn2"], std_conv(params["conv2"], x, stride)))
    return relu(shortcut + group_norm(params["gn3"], std_conv(params["conv3"], x)))


def std_conv(params, x, stride=1):
    w = np.float64(params["kernel"])
    mean = w.mean((0, 1, 2))
    return conv(x, (w - mean) / (np.sqrt(((w - mean) ** 2).mean((0, 1, 2))) + 1e-5), (stride, stride), "SAME")


def patches(params, x, padding):
    x = conv(x, params["kernel"], params["kernel"].shape[:2], padding) + params["bias"]
    return x.reshape(len(x), -1, x.shape[-1])


def conv(x, kernel, stride, padding):
    return np.einsum("bhwcpq,pqcd->bhwd", windows(x, kernel.shape[:2], stride, padding), kernel)


def windows(x, size, stride, padding, fill=0.0):
    """Windows of `size` every `stride`; SAME makes ceil(length / stride) of them and puts an odd zero at the end."""
    if padding == "SAME":
        pads = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(x.shape[1:3], stride, size, strict=True)]
        x = np.pad(x, [(0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)], constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, size, axis=(1, 2))[:, :: stride[0], :: stride[1]]


def group_norm(params, x, groups=32):
    grouped = x.reshape(*x.shape[:3], groups, -1)
    return normalise(grouped, (1, 2, 4)).reshape(x.shape) * params["scale"] + params["bias"]


def layer_norm(params, x):
    return normalise(x, -1) * params["scale"] + params["bias"]


def normalise(x, axes):
    x = x - x.mean(axes, keepdims=True)
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + 1e-6)


def mlp(params, x):
    x = dense(params["Dense_0"], x)
    return dense(params["Dense_1"], 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def relu(x):
    return np.maximum(x, 0)


def count(params, prefix):
    return sum(name.startswith(prefix) for name in params)
