"""StableHLO with versions of `jax.export`: one program for CPUs, GPUs and TPUs, for any number of images."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from vit_jax.export.program import Program

NEEDED, INSTALL = ("flatbuffers",), "pip install flatbuffers"
PLATFORMS = ("cpu", "cuda", "tpu")


def to_bytes(program: Program) -> bytes:
    """What `jax.export.deserialize` reads: images → outputs, with the parameters inside."""
    params = program.predictor.params
    if program.dtype != "float32":
        params = jax.tree.map(lambda x: x.astype(program.dtype) if x.dtype == jnp.float32 else x, params)
    (batch,) = jax.export.symbolic_shape("batch")
    function = jax.jit(program.function(params))
    exported = jax.export.export(function, platforms=PLATFORMS)(program.example(batch))
    return bytes(exported.serialize())


def run(data: bytes, images: Shaped[np.ndarray, "b h w 3"]) -> Mapping[str, np.ndarray]:
    """What such a program makes of images, here."""
    outputs = jax.export.deserialize(bytearray(data)).call(images)
    return {name: np.asarray(y) for name, y in outputs.items()}
