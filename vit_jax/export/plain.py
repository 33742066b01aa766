"""A function of jax as few, plain operations: what a converter to ONNX knows, and what a quantiser finds.

Calls, and functions with derivatives of their own, become what they compute. A choice by platform becomes that for CPUs.
What depends on no input is computed here. A product with constants is one of two matrices. LayerNorm, softmax, GELU, max
pooling and padding are said in the words of flax and jax, which jax2onnx translates to operators of these names; sums over
the tokens that are merged are products.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import Array, Float

from vit_jax.models import token_merging
from vit_jax.models.attention import MultiHeadDotProductAttention

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}
_CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
_GELUS = {frozenset({"integer_pow", "mul", "add", "tanh"}): True, frozenset({"mul", "neg", "erfc", "copy"}): False}
"""What GELU is computed by, and whether that is the tanh form."""


def plain(function: Callable[[Array], Any], example: jax.ShapeDtypeStruct) -> Callable[[Array], Any]:
    """The same function of an array like `example`, whose shape may hold symbols; it calls flax's modules within `named`.

    It is traced here, before jax2onnx puts words of its own into jax and flax. LayerNorm takes the mean of squares after
    the mean is subtracted, where flax subtracts its square: it differs by rounding.
    """
    jaxpr, outputs = jax.make_jaxpr(function, return_shape=True)(example)
    return lambda x: jax.tree.unflatten(jax.tree.structure(outputs), _run(jaxpr, [x]))


# What is recognised by its name in the program


def named(call: Callable, args: Sequence[Any], options: Mapping[str, Any], context: nn.module.InterceptorContext) -> Any:
    """A method of a module, called; of LayerNorm and attention with a name for what it computes."""
    module = context.module
    if isinstance(module, nn.LayerNorm) and module.use_bias and context.method_name == "__call__":
        own = module.variables["params"]
        return plain_layer_norm(args[0], own["scale"], own["bias"], module.epsilon).astype(module.dtype)
    if context.method_name == "attend" and _is_softmax(module, mask := options.get("mask")):
        q, k, v = (x.swapaxes(1, 2) for x in args[:3])
        logits = jnp.matmul(q * q.shape[-1] ** -0.5, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
        logits = logits if mask is None else logits + mask
        return jnp.matmul(attention_softmax(logits).astype(v.dtype), v).swapaxes(1, 2)
    return call(*args, **options)


def _is_softmax(module: nn.Module, mask: Array | None) -> bool:
    """Whether attention is a softmax over all tokens, with nothing but numbers added to the logits."""
    added = mask is None or jnp.issubdtype(mask.dtype, jnp.floating)
    return isinstance(module, MultiHeadDotProductAttention) and module.kind == "softmax" and module.windows is None and added


@jax.jit
def plain_layer_norm(x: Float[Array, "*b d"], scale: Float[Array, " d"], bias: Float[Array, " d"], epsilon: float) -> Array:
    """(x − mean) / √(variance + epsilon) · scale + bias, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * scale + bias


@jax.jit
def attention_softmax(x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """Along the last axis."""
    x = jnp.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


# The program, operation by operation


def _run(program: ClosedJaxpr | Jaxpr, inputs: Sequence[Any]) -> list[Any]:
    """The outputs. Values that are no tracers are known."""
    jaxpr, constants = (program.jaxpr, program.consts) if isinstance(program, ClosedJaxpr) else (program, ())
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, _compute(eqn, [read(x) for x in eqn.invars]), strict=True))
    return [read(x) for x in jaxpr.outvars]


def _compute(eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    """The outputs of one operation."""
    name, params = eqn.primitive.name, eqn.params
    if name == "platform_index":
        return [next(i for i, platforms in enumerate(params["platforms"]) if platforms is None or "cpu" in platforms)]
    if name == "cond" and not _traced(inputs[0]):
        return _run(params["branches"][int(inputs[0])], inputs[1:])
    if name == "name":  # for rematerialisation
        return inputs
    if _traced(*inputs) and (said := _in_words(name, params, inputs)) is not None:
        return [said]
    if name in _CALLS:
        return _run(params[_CALLS[name]], inputs)
    known = not _traced(*inputs) and all(isinstance(n, int) for y in eqn.outvars for n in y.aval.shape)
    if not known and name == "dot_general" and not _traced(inputs[1]) and not any(params["dimension_numbers"][1]):
        return [_product(*inputs, params["dimension_numbers"][0]).astype(eqn.outvars[0].aval.dtype)]
    if not known:
        return _bind(eqn, inputs)
    with jax.ensure_compile_time_eval():
        return _bind(eqn, inputs)


def _bind(eqn: JaxprEqn, inputs: Sequence[Any]) -> Sequence[Any]:
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return outputs if eqn.primitive.multiple_results else [outputs]


def _in_words(name: str, params: Mapping[str, Any], inputs: Sequence[Any]) -> Array | None:
    """What flax and jax have a word for; None for all else."""
    x = inputs[0]
    if name == "custom_vjp_call":
        form = _GELUS.get(frozenset(eqn.primitive.name for eqn in params["call_jaxpr"].jaxpr.eqns))
        return None if form is None else nn.gelu(x, approximate=form)
    if name in ("jit", "pjit") and params["name"] == attention_softmax.__name__:
        return jax.nn.softmax(x)
    if name in ("jit", "pjit") and params["name"] == token_merging.sums_by_place.__name__:  # of a batch
        members = inputs[1][:, None] == jnp.arange(params["jaxpr"].out_avals[0].shape[1])[:, None]
        return members.astype(x.dtype) @ x
    if name in ("jit", "pjit") and params["name"] == plain_layer_norm.__name__:
        return nn.LayerNorm(float(inputs[3])).apply({"params": {"scale": inputs[1], "bias": inputs[2]}}, x)
    if name == "pad" and all(low >= 0 and high >= 0 and not inner for low, high, inner in params["padding_config"]):
        return jnp.pad(x, [(low, high) for low, high, _ in params["padding_config"]], constant_values=inputs[1])
    if name == "reduce_window_max" and x.ndim == 4:
        x = jnp.pad(x, params["padding"], constant_values=-jnp.inf)
        window, strides = (params[f"window_{key}"][1:-1] for key in ("dimensions", "strides"))
        return nn.max_pool(x, window_shape=window, strides=strides, padding="VALID")
    return None


def _product(x: Float[Array, "..."], kernel: Float[Array, "..."], axes: tuple[Sequence[int], Sequence[int]]) -> Array:
    """x·kernel over pairs of axes, as the product of (rows, in) and (in, out)."""
    of_x, of_kernel = axes
    rows, columns = ([i for i in range(y.ndim) if i not in own] for y, own in ((x, of_x), (kernel, of_kernel)))
    size = math.prod(kernel.shape[i] for i in of_kernel)
    with jax.ensure_compile_time_eval():
        matrix = jnp.transpose(kernel, (*of_kernel, *columns)).reshape(size, -1)
    shape = (*(x.shape[i] for i in rows), *(kernel.shape[i] for i in columns))
    order = (*rows, *of_x)
    x = x if order == tuple(range(x.ndim)) else jnp.transpose(x, order)
    return (x.reshape(-1, size) @ matrix).reshape(shape)


def _traced(*values: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in values)
