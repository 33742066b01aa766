"""Small models with random parameters, for every test in this folder."""

import re
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from vit_jax.models import MlpMixer, VisionTransformer, get_model

ENCODER = {"num_layers": 2, "mlp_dim": 48, "num_heads": 4, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
FAINT = re.compile("^cls|^(embedding|stem)/bias|pos_embedding|/out/|Dense_1|conv|gn")
ATTENTIONS = {
    "sigmoid": {"attention": "sigmoid"},
    "window": {"attention": "window", "window_size": 3, "global_blocks": (1,), "num_layers": 3},
}
RESNET = {"num_layers": (1,), "width_factor": 1}


def vit(**overrides: Any) -> VisionTransformer:
    small = {"hidden_size": 32, "patches": {"size": (8, 8)}, "num_classes": 7}
    return get_model("testing", **small | overrides | {"transformer": ENCODER | overrides.get("transformer", {})})


def hybrid(**overrides: Any) -> VisionTransformer:
    return vit(**{"resnet": RESNET, "patches": {"size": (2, 2)}} | overrides)


def mixer(**overrides: Any) -> MlpMixer:
    small = {"hidden_dim": 32, "patches": {"size": (8, 8)}, "num_blocks": 2, "num_classes": 7}
    return get_model("Mixer-B_16", **small | {"tokens_mlp_dim": 24, "channels_mlp_dim": 48} | overrides)


MODELS = {"vit": vit, "hybrid": hybrid, "mixer": mixer}


def random_images(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, height, width, 3)).astype(np.float32)


def shapes(model: nn.Module, images: Any) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def random_params(model: nn.Module, images: np.ndarray, faint: float = 1.0) -> Any:
    """`random_values` for the parameters of a model of images."""
    return random_values(shapes(model, images), faint)


def random_values(wanted: Any, faint: float = 1.0) -> Any:
    """Parameters none of which is 0 or 1, so that every one matters, scaled to keep activations of order 1.

    With images as faint, `faint` shrinks all that enters the residual stream, so that the epsilons of the norms show.
    """
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        names = [key.key for key in path]
        if names[-1] == "kernel":
            inputs = leaf.shape[:1] if names[-2] in ("query", "key", "value") else leaf.shape[:-1]
            x = x / np.sqrt(np.prod(inputs))
        elif names[-1] == "scale":
            x = 1 + 0.2 * x
        elif names[-1] == "bias":
            x = 0.2 * x
        return (faint * x if FAINT.search("/".join(names)) else x).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, wanted)


def initial_params(model: nn.Module, images: np.ndarray) -> dict[str, Any]:
    """What `model.init` draws, by name; compiled without optimisation, which would take longer than it saves."""
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
    return flat(jax.device_get(init(jax.random.key(0), images)["params"]))


_compiled: dict[str, Any] = {}


def apply(model: nn.Module, params: Any, images: Any, *, rngs: Any = None, **kwargs: Any) -> Any:
    """`model.apply` under jit, compiled once for all tests, with products that are float32 on every kind of device.

    The results are NumPy arrays: what a test computes with them costs no further compilation.
    """
    key = repr((model, kwargs))
    if key not in _compiled:
        _compiled[key] = jax.jit(partial(model.apply, **kwargs))
    with jax.default_matmul_precision("highest"):
        return jax.device_get(_compiled[key]({"params": params}, images, rngs=rngs))


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their names in a published checkpoint."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
