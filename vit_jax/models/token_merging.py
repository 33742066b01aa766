"""Token merging, ToMe (https://arxiv.org/abs/2210.09461): a trained ViT gets faster, as its blocks make fewer tokens of many.

Between attention and MLP every block merges r of its tokens into others:

    matching    every second patch is compared with all those between, by the cosine of their keys, of which the mean over
                the heads is taken; the r that are most similar to one join it
    merging     tokens become their mean, weighted by how many patches each stands for, its size
    attention   log(size) is added to the logits of a token, as if all of its patches were there

Class, distillation and register tokens stay as they are. Behind the last block every patch gets the token that it is part of:
what means, MAP heads and grids of features make of these is what they would make of the merged tokens by their sizes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vit_jax.errors import UserError
from vit_jax.models.layers import Encoder
from vit_jax.models.two_towers import TwoTowers
from vit_jax.models.vit import VisionTransformer


def check(model: nn.Module, r: int) -> None:
    """Raises UserError where a model cannot merge `r` tokens in each block; every model can merge 0."""
    if not isinstance(r, int) or r < 0:
        raise UserError(f"tome={r} must be how many tokens each block merges, such as 8, or 0 for none")
    if r and type(model) not in (VisionTransformer, TwoTowers):
        raise UserError(
            f"tome={r} does not go with a {type(model).__name__}: the tokens of a Mixer have fixed places, and detectors and "
            "segmenters want every patch by itself. Leave it out, or take a ViT or a hybrid that says one thing of an image"
        )
    transformer = (model.image if isinstance(model, TwoTowers) else vars(model)).get("transformer", {})
    if r and (transformer.get("rope_theta") or transformer.get("attention", "softmax") != "softmax"):
        raise UserError(
            f"tome={r} does not go with rotary positions, as in DINOv3, or attention in windows, which are for whole grids of "
            "patches, nor with sigmoids, which do not add up to one: leave it out"
        )


@contextlib.contextmanager
def merging(r: int) -> Iterator[None]:
    """Within it, and in functions that are traced within it, every block of a ViT merges `r` tokens, or as many as it can.

    It puts other methods in the place of the modules' own, so that models compute as ever without it. See `check`.
    """
    running: list[_Tokens] = []

    def intercept(method: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        name = context.method_name
        if name == "__call__" and isinstance(context.module, Encoder) and kwargs.get("resample"):
            raise UserError(f"tome={r} is for images of one size: leave it out, or give one with --size=H,W")
        if name == "__call__" and isinstance(context.module, Encoder) and kwargs.get("grid"):  # a ViT's, not a text's
            running.append(tokens := _Tokens(r, *args, kwargs["grid"]))
            x, layers = method(*args, **kwargs)
            running.pop()
            return tokens.by_patch(x), tuple(map(tokens.by_patch, layers, range(len(layers))))
        if running and name == "attend":
            return method(*args, **kwargs | {"mask": running[-1].mask(keys=args[1])})
        if running and name == "between":
            return running[-1].merge(*args)
        return method(*args, **kwargs)

    with nn.intercept_methods(intercept) if r else contextlib.nullcontext():
        yield


class _Tokens:
    """What has become of the tokens of an encoder, up to the block that runs."""

    def __init__(self, r: int, x: Float[Array, "b n d"], registers: Float[Array, "b r d"] | None, grid: tuple[int, int]):
        b, n = x.shape[0], x.shape[1] + (0 if registers is None else registers.shape[1])
        self.r, self.num_prefix = r, n - grid[0] * grid[1]
        self.sizes = jnp.ones((b, n))
        self.place = jnp.broadcast_to(jnp.arange(n), (b, n))  # where each of the first tokens is now
        self.places: list[Int[Array, "b n"]] = []  # and was, behind each block

    def mask(self, keys: Float[Array, "b n k h"]) -> Float[Array, "b 1 1 n"]:
        """That of proportional attention; the keys are those by which tokens are then merged."""
        self.keys = keys.astype(jnp.float32).mean(axis=2)
        return jnp.log(self.sizes)[:, None, None]

    def merge(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        """The tokens of a block after it has merged them."""
        x, self.sizes, place = jax.vmap(lambda *arrays: merge(*arrays, self.num_prefix, self.r))(x, self.sizes, self.keys)
        self.place = jnp.take_along_axis(place, self.place, axis=1)
        self.places.append(self.place)
        return x

    def by_patch(self, x: Float[Array, "b m d"], layer: int = -1) -> Float[Array, "b n d"]:
        """For each of the first tokens the one that it is part of behind a block."""
        return jnp.take_along_axis(x, self.places[layer][..., None], axis=1)


def merge(
    x: Float[Array, "n d"], sizes: Float[Array, " n"], keys: Float[Array, "n h"], num_prefix: int, r: int
) -> tuple[Float[Array, "m d"], Float[Array, " m"], Int[Array, " n"]]:
    """One image's tokens, their sizes, and the place of each of the old: prefix, tokens that stay, tokens that are joined."""
    place, m = match(keys[num_prefix:], num_prefix % 2, r)
    if num_prefix:
        place = jnp.concatenate([jnp.arange(num_prefix), num_prefix + place])
    sums = sums_by_place(x.astype(jnp.float32) * sizes[:, None], place, num_prefix + m)
    sizes = sums_by_place(sizes[:, None], place, num_prefix + m)
    return (sums / sizes).astype(x.dtype), sizes[:, 0], place


@functools.partial(jax.jit, static_argnums=2)
def sums_by_place(x: Float[Array, "n d"], place: Int[Array, " n"], m: int) -> Float[Array, "m d"]:
    """The sum of the rows of each place. ONNX knows it by this name, see `export.plain`."""
    return jax.ops.segment_sum(x, place, m)


def match(keys: Float[Array, "n h"], first: int, r: int) -> tuple[Int[Array, " n"], int]:
    """Bipartite soft matching: the place of each token among those that are left, and how many these are.

    The tokens first, first + 2, … may join one of the others. At most half of all do.
    """
    n = len(keys)
    if (r := min(r, n // 2)) == 0:
        return jnp.arange(n), n
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    scores = keys[first::2] @ keys[1 - first :: 2].T
    a, b = scores.shape
    _, joining = jax.lax.top_k(scores.max(axis=-1), r)
    joins = (joining[:, None] == jnp.arange(a)).any(axis=0)
    place_a = jnp.where(joins, a - r + scores.argmax(axis=-1), jnp.cumsum(~joins) - 1)
    turns = [place_a, a - r + jnp.arange(b)][:: 1 if first == 0 else -1]
    place = jnp.stack([x[: n // 2] for x in turns], axis=1).reshape(-1)
    return jnp.append(place, turns[0][n // 2]) if n % 2 else place, n - r
