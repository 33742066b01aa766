"""The parts every model here is built from: patch embedding, position embedding, MLP, encoder block, encoder.

Shapes: b batch, h w grid, c channels, n tokens, d width, k heads. Parameters are float32; `dtype` is what a layer computes in.
Submodules carry the names of the published checkpoints, which number a block's layers across the block
(`LayerNorm_0`, `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vit_jax.errors import UserError, unknown
from vit_jax.models import linear, residual
from vit_jax.models.attention import Mask, MultiHeadDotProductAttention
from vit_jax.models.linear import Linear, activate
from vit_jax.models.norms import make_norm
from vit_jax.models.windows import Windows

Dtype = Any
ATTENTIONS = ("softmax", "sigmoid", "window")
ACTIVATIONS = (*linear.ACTIVATIONS, "swiglu")
REMAT = {  # what of a block's forward pass is kept for the backward pass, beside its input
    "none": None,  # everything
    "dots": jax.checkpoint_policies.save_only_these_names(linear.LINEAR),  # the dense layers; not attention's n x n weights
    "full": jax.checkpoint_policies.nothing_saveable,
}


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each one linearly to `width` numbers.

    The same as a convolution whose kernel and stride are both `patch_size`, computed as one matrix product.
    With padding "VALID" pixels that do not fill a patch are dropped; "SAME" adds zeros around the image instead.
    """

    width: int
    patch_size: tuple[int, int]
    padding: str = "VALID"
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        b, height, width, c = images.shape
        p, q = self.patch_size
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (p, q, c, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,)) if self.use_bias else None
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        if self.padding == "SAME":
            (top, bottom), (left, right) = (((-s % r) // 2, -s % r - (-s % r) // 2) for s, r in ((height, p), (width, q)))
            images = jnp.pad(images, ((0, 0), (top, bottom), (left, right), (0, 0)))
        h, w = images.shape[1] // p, images.shape[2] // q
        if h == 0 or w == 0:
            raise UserError(f"an image of {height}x{width} holds no patch of {p}x{q}: use larger images or smaller patches")
        patches = images[:, : h * p, : w * q].reshape(b, h, p, w, q, c)
        x = jnp.einsum("bhpwqc,pqcd->bhwd", patches, kernel)
        return x if bias is None else x + bias


Resample = Callable[[Float[Array, "1 m d"]], Float[Array, "b n d"]]
"""From learned position embeddings to those of the tokens at hand."""


class Joining(NamedTuple):
    """Tokens that join in front of all others before a block, as in EoMT.

    Attributes:
      before: the number of that block.
      tokens: (b, q, d).
      look: (all tokens, normalised, grid of the patches) → who sees whom in the next block; asked before that block and each
        later one. None where all see all.
    """

    before: int
    tokens: Float[Array, "b q d"]
    look: Callable[[Float[Array, "b q+n d"], tuple[int, int]], Mask] | None = None


class AddPositionEmbs(nn.Module):
    """Adds a learned embedding to every token; it belongs to one number of tokens (`checkpoint.adapt` resizes it).

    With `resample` it is made of the embeddings of another number of tokens, which the parameters must hold already.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], resample: Resample | None = None) -> Float[Array, "b n d"]:
        _, n, d = x.shape
        if resample is not None:
            return x + resample(self.get_variable("params", "pos_embedding")).astype(x.dtype)
        return x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, n, d)).astype(x.dtype)


class MlpBlock(nn.Module):
    """Dense → activation → Dense, each followed by dropout; the width is kept.

    `activation`: "gelu_tanh" as in all Google ViTs, "gelu" (the erf form, as in torch's), "quick_gelu" (as in
    OpenAI's CLIP), "relu", or "swiglu", where Dense_0 makes a gate and a value of `mlp_dim` each: silu(gate) · value.
    """

    mlp_dim: int
    dropout_rate: float = 0.0
    activation: str = "gelu_tanh"
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], *, train: bool = False) -> Float[Array, "b n d"]:
        init = {"kernel_init": nn.initializers.xavier_uniform(), "bias_init": nn.initializers.normal(1e-6)}
        dense = partial(Linear, use_bias=self.use_bias, dtype=self.dtype, **init)
        d = x.shape[-1]
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        gated, drops = self.activation == "swiglu", train and self.dropout_rate > 0
        x = dense((2 * self.mlp_dim if gated else self.mlp_dim,), name="Dense_0")(x)
        if gated:
            gate, value = jnp.split(x, 2, axis=-1)
            x = nn.silu(gate) * value
        elif drops:
            x = activate(x, self.activation)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = dense((d,), activation=None if gated or drops else self.activation, name="Dense_1")(x)
        return nn.Dropout(self.dropout_rate, deterministic=not train)(x)


class LayerScale(nn.Module):
    """Multiplies every channel by a learned factor, `initial_value` at first (https://arxiv.org/abs/2103.17239)."""

    initial_value: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x * self.param("gamma", nn.initializers.constant(self.initial_value), (x.shape[-1],)).astype(x.dtype)


class EncoderBlock(nn.Module):
    """x + MHA(LN(x)), then x + MLP(LN(x)): the pre-LN Transformer block of ViT (equations 2 and 3 of the paper).

    `norm` is one of `norms.NORMS`. With `layer_scale` both branches are scaled, by `ls1` and `ls2`, before they are added;
    with `qk_norm` every head's queries and keys are normalised likewise; `rotation`, `attention` (its kind) and `windows` are
    those of the attention.
    """

    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    activation: str = "gelu_tanh"
    norm: str = "layer"
    norm_eps: float = 1e-6
    layer_scale: bool = False
    layer_scale_init: float = 1e-5
    qk_norm: bool = False
    rotation: tuple[tuple[int, int], float] | None = None
    attention: str = "softmax"
    windows: Windows | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        kept: Sequence[residual.Kept] = (None, None),
        train: bool = False,
        mask: Mask | None = None,
    ) -> Float[Array, "b n d"]:
        """`kept` says for each of the two branches which examples it is added to, see `residual.add`; `mask` who sees whom."""

        def norm(x: Float[Array, "b n d"], name: str) -> Float[Array, "b n d"]:
            return make_norm(self.norm, self.norm_eps, self.dtype, name)(x)

        def scale(y: Float[Array, "b n d"], name: str) -> Float[Array, "b n d"]:
            return LayerScale(self.layer_scale_init, name=name)(y) if self.layer_scale else y

        def attend(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
            y = MultiHeadDotProductAttention(
                num_heads=self.num_heads,
                dropout_rate=self.attention_dropout_rate,
                qk_norm=self.norm if self.qk_norm else None,
                qk_norm_eps=self.norm_eps,
                rotation=self.rotation,
                kind=self.attention,
                windows=self.windows,
                dtype=self.dtype,
                name="MultiHeadDotProductAttention_1",
            )(norm(x, "LayerNorm_0"), mask=mask, train=train)
            return scale(nn.Dropout(self.dropout_rate, deterministic=not train)(y), "ls1")

        def transform(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
            mlp = MlpBlock(
                mlp_dim=self.mlp_dim,
                dropout_rate=self.dropout_rate,
                activation=self.activation,
                dtype=self.dtype,
                name="MlpBlock_3",
            )
            return scale(mlp(norm(x, "LayerNorm_2"), train=train), "ls2")

        x = self.between(residual.add(x, attend, kept[0]))
        return residual.add(x, transform, kept[1])

    def between(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The tokens between the branches, as they are: a method, so that another may take its place, see `token_merging`."""
        return x


def rematerialised(block: type[nn.Module], remat: str, *, in_scan: bool = False) -> type[nn.Module]:
    """The block, called as block(x, kept, train, mask), whose backward pass computes again what `REMAT[remat]` does not save.

    Outside a scan it takes `runtime.CPU_FLAGS` on CPUs: there XLA would find what is computed twice, and compute it once.
    """
    if remat not in REMAT:
        raise unknown("remat", remat, REMAT)
    if REMAT[remat] is None:
        return block
    return nn.remat(block, policy=REMAT[remat], prevent_cse=not in_scan, static_argnums=(3,))


class Encoder(nn.Module):
    """Position embedding, `num_layers` encoder blocks, a last LayerNorm.

    Returns the normalised tokens and, for those who ask by `with_layers`, every block's output before that norm, or, by
    `norm_layers`, after it.

    Attributes:
      stochastic_depth: chance of the last block to leave out a branch for an example in training; it grows from 0 at the
        first, or is the same for all with stochastic_depth_uniform. stochastic_depth_mode: "mask" multiplies by 0,
        "subset" computes a branch for a random part of the batch only, and so saves the work, see `residual`.
      remat: what the backward pass computes again to save memory: "none", "dots" all but the dense layers, "full" everything.
      scan: compile one block, and loop over the stacked parameters of all. Their stored names and values stay the same;
        dropout draws other masks than without, stochastic depth the same. It wants remat: alone it takes more memory.
      attention: "softmax", "sigmoid" (see `attention.attend`), or "window": patches attend within windows of
        window_size x window_size patches, see `windows`, but in the blocks global_blocks, counted from 0, to all.
      rope_theta: the largest period of rotary positions, which turn the queries and keys of patches; None for none.
      add_position_embedding: whether every token gets a learned embedding for its place.
      norm_pre: whether a LayerNorm of this name stands in front of the blocks, as in CLIP.
      final_norm: False leaves the last LayerNorm to whoever pools the tokens.
      constrain: says how the tokens before a block lie on the devices, see `parallel.Mesh.by_example`.
      the others: see `EncoderBlock`.
    """

    num_layers: int
    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    activation: str = "gelu_tanh"
    norm: str = "layer"
    norm_eps: float = 1e-6
    layer_scale: bool = False
    layer_scale_init: float = 1e-5
    qk_norm: bool = False
    stochastic_depth: float = 0.0
    stochastic_depth_uniform: bool = False
    stochastic_depth_mode: str = "mask"
    remat: str = "none"
    scan: bool = False
    norm_pre: bool = False
    rope_theta: float | None = None
    attention: str = "softmax"
    window_size: int = 0
    global_blocks: tuple[int, ...] = ()
    add_position_embedding: bool = True
    final_norm: bool = True
    constrain: Callable[[Array], Array] = lambda x: x
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        registers: Float[Array, "b r d"] | None = None,
        *,
        num_prefix: int = 0,
        grid: tuple[int, int] | None = None,
        seen: Int[Array, "b m"] | None = None,
        mask: Mask | None = None,
        resample: Resample | None = None,
        train: bool = False,
        with_layers: bool = False,
        norm_layers: bool = False,
        joining: Joining | None = None,
    ) -> tuple[Float[Array, "b n+r d"], tuple[Float[Array, "b n+r d"], ...]]:
        """`registers` join behind the first `num_prefix` tokens, without a position embedding, as in DINOv2.

        With `seen` only the tokens at these places, behind that prefix, are encoded; each keeps its position.
        `mask` says which tokens see which, see `attention.attend`.
        `grid` is that of the patches, for rotary positions. `resample` is that of `AddPositionEmbs`.
        """
        if joining and self.scan:
            raise UserError("tokens that join before a block do not go with scan=True, for which all blocks are alike")
        if self.rope_theta is not None and (grid is None or seen is not None):
            raise UserError("rotary positions (rope_theta) are for whole grids of patches, of one size: set rope_theta=None")
        rotation = None if self.rope_theta is None else (tuple(grid), self.rope_theta)
        windows = self._windows(None if seen is not None else grid)
        if self.add_position_embedding:
            x = AddPositionEmbs(name="posembed_input")(x, resample)
            x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        if seen is not None:
            kept = jnp.take_along_axis(x[:, num_prefix:], seen[..., None], axis=1)
            x = jnp.concatenate([x[:, :num_prefix], kept], axis=1)
        if registers is not None:
            x = jnp.concatenate([x[:, :num_prefix], registers.astype(x.dtype), x[:, num_prefix:]], axis=1)
        if self.norm_pre:
            x = make_norm(self.norm, self.norm_eps, self.dtype, "norm_pre")(x)
        kept = self._keep(x.shape[0], train)
        norm = make_norm(self.norm, self.norm_eps, self.dtype, "encoder_norm") if self.final_norm else lambda x: x
        if self.scan and not self.is_initializing():
            x, layers = self._scan_blocks(x, kept, train, with_layers, mask, rotation, windows[0])
        else:
            layers = []
            for i in range(self.num_layers):
                if joining and i == joining.before:
                    x = jnp.concatenate([joining.tokens.astype(x.dtype), x], axis=1)
                if joining and joining.look and i >= joining.before:
                    mask = joining.look(norm(x), grid)
                block = self._block(rotation=rotation, windows=windows[i], name=f"encoderblock_{i}")
                x = block(self.constrain(x), kept[i], train, mask)
                layers.append(x)
        layers = map(norm, layers) if norm_layers else layers
        return norm(x), tuple(layers) if with_layers else ()

    def _keep(self, b: int, train: bool) -> residual.KeptOfBlocks:
        """What stochastic depth keeps of every block's branches."""
        if self.scan and self.stochastic_depth_mode == "subset" and self.stochastic_depth:
            raise UserError("stochastic_depth_mode='subset' does not go with scan=True: turn scan off, or use 'mask'")
        rates = residual.rates(self.stochastic_depth, self.num_layers, uniform=self.stochastic_depth_uniform)
        key = self.make_rng("dropout") if train and self.stochastic_depth else None
        return residual.draw(key, rates, b, self.stochastic_depth_mode)

    def _windows(self, grid: tuple[int, int] | None) -> list[Windows | None]:
        """The windows of every block, None where all tokens attend to all. Raises UserError for fields that do not fit."""
        if self.attention not in ATTENTIONS:
            raise unknown("attention", self.attention, ATTENTIONS)
        if self.attention != "window":
            if self.window_size or self.global_blocks:
                raise UserError(f"window_size and global_blocks are for attention='window', not {self.attention!r}")
            return [None] * self.num_layers
        if self.window_size < 1:
            raise UserError(f"attention='window' needs a window_size in patches, such as 7, not {self.window_size}")
        if wrong := [i for i in self.global_blocks if not 0 <= i < self.num_layers]:
            raise UserError(f"global_blocks={wrong} are not among the blocks 0 to {self.num_layers - 1}")
        if grid is None:
            raise UserError("attention='window' is for whole grids of patches, of one size: use 'softmax' or 'sigmoid'")
        if self.scan and self.global_blocks:
            raise UserError("global_blocks do not go with scan=True, for which all blocks are alike")
        windows = Windows(tuple(grid), self.window_size)
        return [None if i in self.global_blocks else windows for i in range(self.num_layers)]

    def _block(self, **kwargs: Any) -> EncoderBlock:
        return rematerialised(EncoderBlock, self.remat, in_scan=self.scan)(
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout_rate=self.dropout_rate,
            attention_dropout_rate=self.attention_dropout_rate,
            activation=self.activation,
            norm=self.norm,
            norm_eps=self.norm_eps,
            layer_scale=self.layer_scale,
            layer_scale_init=self.layer_scale_init,
            qk_norm=self.qk_norm,
            attention="sigmoid" if self.attention == "sigmoid" else "softmax",
            dtype=self.dtype,
            **kwargs,
        )

    def _scan_blocks(
        self,
        x: Float[Array, "b n d"],
        kept: Any,
        train: bool,
        with_layers: bool,
        mask: Mask | None,
        rotation: Any,
        windows: Windows | None,
    ):
        """All blocks, by a loop on the device, and the output of each if `with_layers`."""
        blocks = (self.variables["params"][f"encoderblock_{i}"] for i in range(self.num_layers))
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        drops = train and self.has_rng("dropout")
        keys = jax.random.split(self.make_rng("dropout"), self.num_layers) if drops else None
        block = self._block(rotation=rotation, windows=windows, parent=None)

        def body(x, layer):
            params, kept, key = layer
            rngs = {"dropout": key} if drops else None
            x = block.apply({"params": params}, self.constrain(x), kept, train, mask, rngs=rngs)
            return x, x if with_layers else None

        kept = kept if isinstance(kept, jax.Array) else (None, None)
        x, layers = jax.lax.scan(body, x, (params, kept, keys))
        return x, layers if with_layers else ()
