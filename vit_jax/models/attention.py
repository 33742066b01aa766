"""Multi-head attention with the parameter names and shapes of the published checkpoints.

`attend` is the one attention of this package. Which kernel computes it is chosen by the platform that a program is lowered
for, not by the machine that traces it: a program exported for a GPU or TPU on a CPU machine is the one that runs there.

    CUDA            cuDNN's, which keeps no n x m weights, where `cudnn_takes` the heads and there is neither mask nor dropout
    CPU             XLA's, with the batch shared out to cores
    all others      XLA's

Sigmoids in the place of the softmax (https://arxiv.org/abs/2409.04431) are always XLA's.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vit_jax.errors import UserError, unknown
from vit_jax.models import cores
from vit_jax.models.linear import Linear, project
from vit_jax.models.norms import make_norm
from vit_jax.models.positions import rotate
from vit_jax.models.windows import Windows

log = logging.getLogger("vit_jax")
Mask = Bool[Array, "#b #k #n #m"] | Float[Array, "#b #k #n #m"]
Drop = Callable[[Array, Array], Array | None]
"""(queries, keys) → the dropout mask (b, k, n, m) of their weights, or None."""
KINDS = ("softmax", "sigmoid")
CUDNN_CALLS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
"""What cuDNN's attention is called in a program. `jax.export` for CUDA wants to be told that these are accepted:
`disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in CUDNN_CALLS]`."""
_WORTH_SHARING = 2**22
"""Multiplications in q·kᵀ from which on a product is shared out to cores."""


class MultiHeadDotProductAttention(nn.Module):
    """softmax(q·kᵀ / √head_dim)·v for every head, between linear maps `query`, `key`, `value` and `out`.

    Kernels are (d, k, d/k) for the three inputs and (k, d/k, d) for the output, as in flax's module of this name.
    The softmax is computed in float32 whatever `dtype` is; `kind` may put sigmoids in its place, see `attend`. `qk_norm`, one
    of `norms.NORMS` or None, is over every head's query and key (`query_ln`, `key_ln`). `rotation` is the grid (h, w) of the
    patches and the largest period of their rotary positions, see `positions.rotate`, None for none. With `windows` patches
    attend within these, see `windows`.
    """

    num_heads: int
    dropout_rate: float = 0.0
    qk_norm: str | None = None
    qk_norm_eps: float = 1e-6
    rotation: tuple[tuple[int, int], float] | None = None
    kind: str = "softmax"
    windows: Windows | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        inputs: Float[Array, "b m d"] | None = None,
        *,
        mask: Mask | None = None,
        train: bool = False,
    ) -> Float[Array, "b n d"]:
        """Attends from `x` to `inputs`, or to `x` itself; `mask` is that of `attend`."""
        d = x.shape[-1]
        if d % self.num_heads:
            raise UserError(f"a width of {d} cannot be shared out to {self.num_heads} heads: choose a multiple")
        maps = [Linear((self.num_heads, d // self.num_heads), dtype=self.dtype, name=n) for n in ("query", "key", "value")]
        if inputs is None:
            q, k, v = project(x, maps)
        else:
            query, key, value = maps
            q, k, v = query(x), key(inputs), value(inputs)
        if self.qk_norm is not None:
            norms = (make_norm(self.qk_norm, self.qk_norm_eps, self.dtype, f"{n}_ln") for n in ("query", "key"))
            q, k = (norm(x) for norm, x in zip(norms, (q, k), strict=True))
        if self.rotation is not None:
            q, k = (rotate(x, *self.rotation) for x in (q, k))

        def drop(q: Array, k: Array) -> Array | None:
            if not train or self.dropout_rate == 0:
                return None
            ones = jnp.ones((q.shape[0], self.num_heads, q.shape[1], k.shape[1]))
            return nn.Dropout(self.dropout_rate, deterministic=False)(ones)

        y = self.attend(q, k, v, drop, mask=mask)
        return Linear((d,), 2, dtype=self.dtype, name="out")(y)

    def attend(
        self,
        q: Float[Array, "b n k h"],
        k: Float[Array, "b m k h"],
        v: Float[Array, "b m k h"],
        drop: Drop,
        *,
        mask: Mask | None = None,
    ) -> Float[Array, "b n k h"]:
        """`attend`: a method, so that whoever wants the weights can put another in its place, see `attention_maps`."""
        if self.windows is None:
            return attend(q, k, v, drop(q, k), mask=mask, kind=self.kind)
        if mask is not None:
            raise UserError("attention within windows takes no mask: use attention='softmax'")
        return attend_in_windows(q, k, v, self.windows, drop)


def attend(
    q: Float[Array, "b n k h"],
    k: Float[Array, "b m k h"],
    v: Float[Array, "b m k h"],
    dropout_mask: Float[Array, "b k n m"] | None = None,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    kind: str = "softmax",
) -> Float[Array, "b n k h"]:
    """(softmax(scale · q·kᵀ + mask) ∘ dropout_mask)·v, the softmax in float32, with gradients to q, k, v and a float mask.

    By `kind` "sigmoid" it is σ(scale · q·kᵀ + mask − log n), where n counts the keys that a query may look at, so that padding
    changes nothing (https://arxiv.org/abs/2409.04431).

    Args:
      mask: broadcastable to (b, k, n, m), for padding, causality, or anything else. Boolean: True where a query may look.
        Float: added to the logits, such as -inf, or a learned bias. A query that may look nowhere gets zeros, and gradients
        of zero.
      scale: 1 / √h if None.
    """
    if kind not in KINDS:
        raise unknown("kind of attention", kind, KINDS)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    cudnn = kind == "softmax" and dropout_mask is None and mask is None and _fits_cudnn(q, k)
    return _attend_by_platform(q, k, v, dropout_mask, mask, scale=scale, kind=kind, parts=_parts(q, k), cudnn=cudnn)


@functools.partial(jax.jit, static_argnames=("scale", "kind", "parts", "cudnn"), inline=True)  # traced once for all blocks
def _attend_by_platform(
    *arrays: Array | None, scale: float | None, kind: str, parts: int, cudnn: bool
) -> Float[Array, "b n k h"]:
    """`attend` in so many parts on CPUs, and by cuDNN where it takes the arrays."""
    whole = functools.partial(_attend, divisor=math.sqrt(arrays[0].shape[-1]) if scale is None else 1 / scale, kind=kind)
    kernels = {}
    if parts > 1:
        kernels["cpu"] = functools.partial(_share_out, whole, parts)
    if cudnn:
        kernels["cuda"] = functools.partial(_attend_by_cudnn, scale=scale)
    return jax.lax.platform_dependent(*arrays, **kernels, default=whole) if kernels else whole(*arrays)


def attend_in_windows(
    q: Float[Array, "b n k h"],
    k: Float[Array, "b n k h"],
    v: Float[Array, "b n k h"],
    windows: Windows,
    drop: Drop = lambda q, k: None,
) -> Float[Array, "b n k h"]:
    """`attend` by the mask `windows.mask`, with as many weights a patch as tokens that it sees."""
    (b, n), count = q.shape[:2], math.prod(windows.count)
    first = n - math.prod(windows.grid)
    valid = windows.valid()
    mask = None
    if not valid.all():
        keys = np.pad(valid, ((0, 0), (first, 0)), constant_values=True)
        mask = jnp.broadcast_to(keys, (b, *keys.shape)).reshape(-1, 1, 1, keys.shape[1])

    def seen(x: Array) -> Array:
        prefix = jnp.broadcast_to(x[:, None, :first], (b, count, first, *x.shape[2:]))
        return jnp.concatenate([prefix.reshape(b * count, first, *x.shape[2:]), windows.cut(x[:, first:])], axis=1)

    queries, keys, values = windows.cut(q[:, first:]), seen(k), seen(v)
    y = windows.join(attend(queries, keys, values, drop(queries, keys), mask=mask))
    if first == 0:
        return y
    prefix = q[:, :first]
    return jnp.concatenate([attend(prefix, k, v, drop(prefix, k)), y], axis=1)


# On CPUs a product by heads runs on one core


def _parts(q: Array, k: Array) -> int:
    """Into how many parts of the batch attention is cut on CPUs; 1 for sizes that are symbols."""
    size = q.size * k.shape[1]
    return min(cores.cores(), cores.MOST, q.shape[0]) if isinstance(size, int) and size >= _WORTH_SHARING else 1


def _share_out(function: Any, parts: int, *arrays: Array | None) -> Float[Array, "b n k h"]:
    """function(*arrays), computed for each part of the batch by itself, so that several cores have each theirs."""
    b = arrays[0].shape[0]
    cut = [[x] * parts if x is None or x.shape[0] != b else jnp.array_split(x, parts) for x in arrays]
    return jnp.concatenate([function(*part) for part in zip(*cut, strict=True)])


# cuDNN's


def _fits_cudnn(q: Array, k: Array) -> bool:
    sizes = *q.shape, *k.shape
    return all(isinstance(n, int) for n in sizes) and cudnn_takes(q.dtype.name, q.shape[3], q.shape[1], k.shape[1])


@functools.cache
def cudnn_takes(dtype: str, head_dim: int, n: int = 16, m: int = 16) -> bool:
    """Whether CUDA's program attends by cuDNN, for such heads and n queries to m keys.

    cuDNN wants bfloat16 or float16, heads whose size is a multiple of 8, and Ampere or later. Where this process has a GPU it
    is tried, values and gradients, once, and the log tells what came out. Where it has none, the program is for another
    machine: Ampere, or later, is taken for granted, which have heads of up to 128 in common.
    """
    if dtype not in ("bfloat16", "float16") or head_dim % 8:
        return False
    if jax.default_backend() != "gpu":
        return head_dim <= 128
    try:
        with jax.ensure_compile_time_eval():
            _try_cudnn(dtype, head_dim, n, m)
    except Exception as e:  # of many kinds: the version, the GPU, the shape, the values
        log.info("model    attention by XLA: cuDNN refused heads of %d in %s (%s)", head_dim, dtype, str(e).partition("\n")[0])
        return False
    log.info("model    attention by cuDNN, heads of %d in %s", head_dim, dtype)
    return True


def _try_cudnn(dtype: str, head_dim: int, n: int, m: int) -> None:
    """Raises whatever cuDNN does for such heads, or an ArithmeticError for values or gradients that are not XLA's."""
    rng = np.random.default_rng(0)
    q, k, v, dy = (jnp.asarray(rng.standard_normal((2, length, 1, head_dim)), dtype) for length in (n, m, m, n))

    def with_gradients(function: Any) -> Any:
        def run(q: Array, k: Array, v: Array) -> Any:
            y, vjp = jax.vjp(function, q, k, v)
            return y, *vjp(dy)

        return jax.device_get(jax.jit(run)(q, k, v))

    whole = functools.partial(_attend, dropout_mask=None, mask=None, divisor=math.sqrt(head_dim), kind="softmax")
    for found, expected in zip(with_gradients(_attend_by_cudnn), with_gradients(whole), strict=True):
        found, expected = found.astype(np.float32), expected.astype(np.float32)
        if not np.abs(found - expected).max() <= 0.05 * np.abs(expected).max():
            raise ArithmeticError("its numbers differ from XLA's")


def _attend_by_cudnn(
    q: Array, k: Array, v: Array, dropout_mask: None = None, mask: None = None, *, scale: float | None = None
) -> Float[Array, "b n k h"]:
    """jax lets cuDNN train on even lengths only: an odd one is padded, and cuDNN told the true one."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    b, n, m = q.shape[0], q.shape[1], k.shape[1]
    lengths = {}
    if n % 2 or m % 2:
        q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = {name: jnp.full(b, size) for name, size in (("query_seq_lengths", n), ("key_value_seq_lengths", m))}
    attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", scale=scale)
    if cudnn.cuda_versions is not None:
        return attention(q, k, v, **lengths)[:, :n]
    # jax asks for the version of cuDNN, of which this machine has none; the program for Ampere to Hopper does not depend on it
    with mock.patch.object(cudnn, "check_cudnn_version", lambda: 90_000):
        return attention(q, k, v, **lengths)[:, :n]


# XLA's, of which it makes more than of `jax.nn.dot_product_attention`


@functools.partial(jax.custom_vjp, nondiff_argnames=("divisor", "kind"))
def _attend(
    q: Array, k: Array, v: Array, dropout_mask: Array | None, mask: Mask | None, divisor: float, kind: str
) -> Float[Array, "b n k h"]:
    """Heads are in front, and the sums divide at the end.

    The n x m weights are not kept for the backward pass, but computed again, as in https://arxiv.org/abs/2205.14135; its
    products take the dtype of q, where autodiff's would be float32.
    """
    return _forward(q, k, v, dropout_mask, mask, divisor, kind)[0]


def _forward(
    q: Array, k: Array, v: Array, dropout_mask: Array | None, mask: Mask | None, divisor: float, kind: str
) -> tuple[Array, tuple[Array | None, ...]]:
    q, k, v = _by_head(q), _by_head(k), _by_head(v)
    logits = _masked(_logits(q, k, divisor), mask)
    if kind == "sigmoid":
        offset, sums = _log_count(logits, mask), None
        weights = jax.nn.sigmoid(logits - offset)
    else:
        offset = logits.max(axis=-1, keepdims=True)
        if mask is not None:
            offset = jnp.where(jnp.isneginf(offset), 0, offset)
        weights = jnp.exp(logits - offset)
        sums = weights.sum(axis=-1, keepdims=True)
        if mask is not None:
            sums = jnp.where(sums == 0, 1, sums)  # of a query that may look nowhere
    weights = (weights if dropout_mask is None else weights * dropout_mask).astype(v.dtype)
    y = _product(weights, v)
    y = _by_head((y if sums is None else y / sums).astype(v.dtype))
    return y, (q, k, v, dropout_mask, mask, y, offset, sums)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _backward(
    divisor: float, kind: str, saved: tuple[Array | None, ...], dy: Float[Array, "b n k h"]
) -> tuple[Array | None, ...]:
    """All n x m arrays are transposed here, (b k m n): XLA would find products of the forward pass, and keep them instead."""
    q, k, v, dropout_mask, mask, y, offset, sums = saved
    ddropout_mask = None if dropout_mask is None else jnp.zeros_like(dropout_mask)  # it is drawn, not learnt
    dropout_mask = None if dropout_mask is None else _transposed(dropout_mask)
    mean = jnp.einsum("bnkh,bnkh->bkn", dy, y, preferred_element_type=jnp.float32)[..., None, :]
    dy = _by_head(dy)
    logits = _masked(_logits(k, q, divisor), None if mask is None else _transposed(mask)) - _transposed(offset)
    weights = jax.nn.sigmoid(logits) if kind == "sigmoid" else jnp.exp(logits) / _transposed(sums)
    dweights = _product(v, dy, (3, 3))
    dropped, dweights = (weights, dweights) if dropout_mask is None else (weights * dropout_mask, dweights * dropout_mask)
    dlogits = weights * ((1 - weights) * dweights if kind == "sigmoid" else dweights - mean)
    dmask = None if mask is None or mask.dtype == bool else _sum_to(_transposed(dlogits), mask)
    dlogits = (dlogits / divisor).astype(q.dtype)
    gradients = _product(dlogits, k, (2, 2)), _product(dlogits, q), _product(dropped.astype(q.dtype), dy)
    return *(_by_head(x.astype(q.dtype)) for x in gradients), ddropout_mask, dmask


_attend.defvjp(_forward, _backward)


def _logits(q: Float[Array, "b k n h"], k: Float[Array, "b k m h"], divisor: float) -> Float[Array, "b k n m"]:
    return _product(q * (1 / divisor), k, (3, 3))


def _product(x: Array, y: Array, axes: tuple[int, int] = (3, 2)) -> Float[Array, "b k n m"]:
    """The sum of x·y over an axis of each, in float32. XLA's CPUs convert bfloat16 unless they sum over two: one has size 1."""
    if x.dtype == jnp.bfloat16:
        sums, x, y = [(2, axis + 1) for axis in axes], x[:, :, None], y[:, :, None]
        return jax.lax.dot_general(x, y, (sums, ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    x, y = (x if axes[0] == 3 else _transposed(x)), (y if axes[1] == 2 else _transposed(y))
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _masked(logits: Float[Array, "b k n m"], mask: Mask | None) -> Float[Array, "b k n m"]:
    if mask is None:
        return logits
    return jnp.where(mask, logits, -jnp.inf) if mask.dtype == bool else logits + mask.astype(logits.dtype)


def _log_count(logits: Float[Array, "b k n m"], mask: Mask | None) -> Float[Array, "#b #k #n 1"]:
    """log n, of the n keys that a query may look at, or 0 where there are none."""
    if mask is None:
        return jnp.log(jnp.full((1, 1, 1, 1), logits.shape[-1], logits.dtype))
    count = (logits > -jnp.inf).sum(axis=-1, keepdims=True)
    return jnp.log(jnp.maximum(count, 1).astype(logits.dtype))


def _sum_to(x: Float[Array, "b k n m"], mask: Float[Array, "#b #k #n #m"]) -> Float[Array, "#b #k #n #m"]:
    """The sum over the axes along which a mask was broadcast."""
    axes = [i for i, size in enumerate(mask.shape) if size == 1]
    return x.sum(axis=axes, keepdims=True).astype(mask.dtype)


def _transposed(x: Float[Array, "b k n m"]) -> Float[Array, "b k m n"]:
    return x.swapaxes(-1, -2)


def _by_head(x: Float[Array, "b n k h"]) -> Float[Array, "b k n h"]:
    """Swaps tokens and heads; its own inverse."""
    return x.swapaxes(1, 2)
