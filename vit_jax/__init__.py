"""Vision Transformers in JAX and Flax: train, fine-tune, evaluate and use them.

import vit_jax

model = vit_jax.load("hf://google/vit-base-patch16-224")
print(model.predict("cat.jpg", top=3))
"""

import importlib
from typing import Any

__all__ = ["Model", "Prediction", "checkpoint", "fine_tune", "load", "models"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for: `import vit_jax` alone takes no time and touches no device."""
    if name in ("checkpoint", "models"):
        return importlib.import_module(f"vit_jax.{name}")
    if name in __all__:
        return getattr(importlib.import_module("vit_jax.api"), name)
    raise AttributeError(f"module 'vit_jax' has no attribute {name!r}")
