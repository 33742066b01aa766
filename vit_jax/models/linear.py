"""Linear maps and the activations before them, with backward passes that keep and move less than what autodiff makes of flax's.

Derivatives are of first order and in reverse mode, which is what training needs.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

LINEAR = "linear"
"""What `jax.checkpoint` knows the results of `linear` by."""
_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


class Linear(nn.Module):
    """f(x)·kernel + bias over the last `axes` dimensions of x, which become `features`: flax's `DenseGeneral` after f.

    `activation`, f: None, or one of `ACTIVATIONS`, whose result is not kept for the backward pass but computed again.
    Without `use_bias` there is no parameter for the bias, which is 0.
    """

    features: tuple[int, ...]
    axes: int = 1
    activation: str | None = None
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: Any = jnp.float32

    def __call__(self, x: Float[Array, "*batch_and_in"]) -> Float[Array, "*batch_and_out"]:
        x, kernel, bias = nn.dtypes.promote_dtype(x, *self.parameters(x.shape[x.ndim - self.axes :]), dtype=self.dtype)
        return linear(x, kernel, bias, self.axes, self.activation)

    @nn.compact
    def parameters(self, inputs: Sequence[int]) -> tuple[Float[Array, "*in_and_out"], Float[Array, "*out"]]:
        """(kernel, bias), which are drawn as for a matrix."""
        if self.has_variable("params", "kernel"):  # `param` would trace how they are drawn to compare shapes
            bias = self.get_variable("params", "bias") if self.use_bias else jnp.zeros(self.features)
            return self.get_variable("params", "kernel"), bias

        def kernel_init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
            return self.kernel_init(key, (math.prod(inputs), math.prod(self.features)), dtype).reshape(shape)

        kernel = self.param("kernel", kernel_init, (*inputs, *self.features))
        return kernel, self.param("bias", self.bias_init, self.features) if self.use_bias else jnp.zeros(self.features)


def project(x: Float[Array, "b n d"], maps: list[Linear]) -> tuple[Float[Array, "b n k h"], ...]:
    """Queries, keys and values: on a GPU or TPU by one product, of stacked kernels, as they are better used by a large one.

    On a CPU that is no faster, and the stacks take memory: there by three.
    """
    kernels, biases = zip(*(f.parameters(x.shape[-1:]) for f in maps), strict=True)
    x, *parameters = nn.dtypes.promote_dtype(x, *kernels, *biases, dtype=maps[0].dtype)
    return _project(x, tuple(parameters[:3]), tuple(parameters[3:]))


@functools.partial(jax.jit, inline=True)
def _project(x: Array, kernels: tuple[Array, ...], biases: tuple[Array, ...]) -> tuple[Array, ...]:
    outputs = jax.lax.platform_dependent(x, kernels, biases, cpu=project_one_by_one, default=project_at_once)
    return tuple(checkpoint_name(y, LINEAR) for y in outputs)


def project_one_by_one(x: Array, kernels: tuple[Array, ...], biases: tuple[Array, ...]) -> tuple[Array, ...]:
    """x·kernel + bias for each."""
    return tuple(unnamed_linear(x, kernel, bias) for kernel, bias in zip(kernels, biases, strict=True))


def project_at_once(x: Array, kernels: tuple[Array, ...], biases: tuple[Array, ...]) -> tuple[Array, ...]:
    """The same by one product."""
    return tuple(jnp.moveaxis(unnamed_linear(x, jnp.stack(kernels, axis=1), jnp.stack(biases)), 2, 0))


def linear(
    x: Float[Array, "*batch_and_in"],
    kernel: Float[Array, "*in_and_out"],
    bias: Float[Array, "*out"],
    axes: int = 1,
    activation: str | None = None,
) -> Float[Array, "*batch_and_out"]:
    """activation(x)·kernel + bias over the last `axes` dimensions of x, by the name `LINEAR`."""
    return checkpoint_name(unnamed_linear(x, kernel, bias, axes, activation), LINEAR)


@functools.partial(jax.jit, static_argnames=("axes", "activation"), inline=True)  # traced once for all blocks
def unnamed_linear(
    x: Float[Array, "*batch_and_in"],
    kernel: Float[Array, "*in_and_out"],
    bias: Float[Array, "*out"],
    axes: int = 1,
    activation: str | None = None,
) -> Float[Array, "*batch_and_out"]:
    """`linear` without a name, for what is named as a whole.

    All batch dimensions are flattened to one: a product that sums over two, as for the gradient of the kernel, is
    preceded by a transposition.
    """
    batch, inputs = x.shape[: x.ndim - axes], x.shape[x.ndim - axes :]
    return _linear(x.reshape(-1, *inputs), kernel, bias, activation).reshape(*batch, *kernel.shape[axes:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(
    x: Float[Array, "b *in"], kernel: Float[Array, "*in_and_out"], bias: Float[Array, "*out"], activation: str | None
) -> Float[Array, "b *out"]:
    axes = x.ndim - 1
    x = x if activation is None else activate(x, activation)
    return product(x, kernel, tuple(range(1, axes + 1)), tuple(range(axes))) + bias


def _linear_forward(x, kernel, bias, activation):
    return _linear(x, kernel, bias, activation), (x, kernel)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _linear_backward(activation, saved, dy):
    x, kernel = saved
    x, slope = (x, None) if activation is None else _value_and_slope(x, activation)
    dkernel = product(x, dy, (0,), (0,))
    dbias = dy.reshape(dy.shape[0], -1).sum(0).reshape(dy.shape[1:])  # of a matrix XLA sums the columns faster
    # on a CPU the scheduler would put these off to the end, and keep x and dy until then
    dkernel, dbias, dy = jax.lax.platform_dependent(
        dkernel, dbias, dy, cpu=lambda *x: jax.lax.optimization_barrier(x), default=lambda *x: x
    )
    outputs = tuple(range(1, dy.ndim)), tuple(range(kernel.ndim - dy.ndim + 1, kernel.ndim))
    dx = product(dy, kernel, *outputs)
    return dx if slope is None else dx * slope, dkernel, dbias


_linear.defvjp(_linear_forward, _linear_backward)


def product(
    x: Float[Array, "*x"], y: Float[Array, "*y"], axes_of_x: tuple[int, ...], axes_of_y: tuple[int, ...]
) -> Float[Array, "*rest"]:
    """The sum of x·y over these axes, in their dtype.

    XLA for CPUs multiplies numbers in bfloat16 (by AMX or AVX512-BF16) if the sum is asked for in float32, and is not over a
    single axis in front, beside which another one of size 1 is put. If not, jaxlib 0.10 converts both to float32 first, which
    takes 5 times as long.
    """
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=((axes_of_x, axes_of_y), ((), ())))
    if x.dtype != jnp.bfloat16:
        return dot(x, y)

    def rounded(x: Array, y: Array) -> Array:
        if axes_of_x == axes_of_y == (0,):
            sums, x, y = (((0, 1), (0, 1)), ((), ())), x[None], y[None]
            return jax.lax.dot_general(x, y, sums, preferred_element_type=jnp.float32).astype(x.dtype)
        return dot(x, y, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, y, cpu=rounded, default=dot)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def activate(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """One of `ACTIVATIONS`; nothing but x is kept for the backward pass."""
    return ACTIVATIONS[name][0](x)


activate.defvjp(lambda x, name: (activate(x, name), x), lambda name, x, dy: (dy * _value_and_slope(x, name)[1],))


def _value_and_slope(x: Float[Array, "*shape"], name: str) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """The activation and its derivative, computed in float32 whatever the dtype of x, which they have."""
    return tuple(y.astype(x.dtype) for y in ACTIVATIONS[name][1](x.astype(jnp.float32)))


# The two below use other functions than the forward passes do: XLA would else find that it has computed the tanh, or the
# erfc, before, and keep that for all layers.


def _gelu_tanh_and_slope(x):
    square = x * x
    share = jax.nn.sigmoid(2 * _SLOPE * x * (1 + _CUBIC * square))  # (1 + tanh(u)) / 2 = sigmoid(2u)
    return x * share, share * (1 + (1 - share) * (2 * _SLOPE) * x * (1 + 3 * _CUBIC * square))


def _gelu_and_slope(x):
    share = (1 + jax.lax.erf(x * math.sqrt(0.5))) / 2
    return x * share, share + x * jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _relu_and_slope(x):
    return nn.relu(x), (x > 0).astype(x.dtype)


def _quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def _quick_gelu_and_slope(x):
    share = jax.nn.sigmoid(1.702 * x)
    return x * share, share * (1 + 1.702 * x * (1 - share))


# By name: the function, and x → (it, its derivative), of float32. "gelu_tanh" as in all Google ViTs, "gelu" as in torch's,
# "quick_gelu" as in OpenAI's CLIP.
ACTIVATIONS = {
    "gelu_tanh": (nn.gelu, _gelu_tanh_and_slope),
    "gelu": (functools.partial(nn.gelu, approximate=False), _gelu_and_slope),
    "quick_gelu": (_quick_gelu, _quick_gelu_and_slope),
    "relu": (nn.relu, _relu_and_slope),
}
