"""What a Vision Transformer looks at: the weights of its attention, and what three methods make of them.

The models themselves keep no n x n weights: `attention` puts an explicit softmax in the place of their kernels, for one call.

    mean        the last attention that the head reads from, its heads averaged
    rollout     "Quantifying Attention Flow in Transformers" (https://arxiv.org/abs/2005.00928)
    relevance   for a class: "Generic Attention-model Explainability" (https://arxiv.org/abs/2103.15679)

Shapes: l layers, b batch, k heads, n tokens, of which the last h·w are the patches.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vit_jax.errors import UserError, unknown
from vit_jax.models import vit
from vit_jax.models.attention import MultiHeadDotProductAttention
from vit_jax.models.captioner import AttendingLSTM, Captioner
from vit_jax.models.mixer import MlpMixer
from vit_jax.models.two_towers import TwoTowers
from vit_jax.models.vit import VisionTransformer

FUSED = {"mean": jnp.mean, "min": jnp.min, "max": jnp.max}
"""How the heads of a layer become one."""


Score = Callable[[], Float[Array, "b classes"]]
"""Runs a model once, and gives the logits of the images."""


class Attention(NamedTuple):
    """The attention of a model to a batch of images, in float32.

    Attributes:
      weights: (l, b, k, n, n), of every block: the rows, queries, sum to one, but for sigmoids, each of which is from 0 to 1;
        outside of a patch's window they are 0.
      pooling: (b, k, n), the weights of a MAP head's probe; None for other heads.
      grid: (h, w) of the patches, which are the last tokens.
      logits: (b, classes), or the representation of a model without a head.
    """

    weights: Float[Array, "l b k n n"]
    pooling: Float[Array, "b k n"] | None
    grid: tuple[int, int]
    logits: Float[Array, "b classes"]


def image_tower(model: nn.Module, params: Any) -> tuple[VisionTransformer, Any]:
    """The ViT that sees the images, and its parameters. UserError for a model without."""
    if isinstance(model, TwoTowers):  # whose head alone scores no classes
        return VisionTransformer(**{"dtype": model.dtype, **model.image, "num_classes": None}), params["img"]
    if isinstance(model, MlpMixer):
        raise UserError("a Mixer has no attention to look at: its tokens are mixed by an MLP")
    if isinstance(model, Captioner | AttendingLSTM):
        raise UserError("where a captioner looks for each word is drawn by predict: vit-jax predict --draw=DIR")
    if not isinstance(model, VisionTransformer):
        raise UserError(f"{type(model).__name__} is not one of the models whose attention is shown: give a ViT or a hybrid")
    return model, params


def attention(model: VisionTransformer, params: Any, images: Float[Array, "b H W c"]) -> Attention:
    """The weights with which every token attends to every other, and what the head makes of the images."""
    logits, weights = _run(_own_score(model, params, images))
    return _collected(model, images, logits, weights)


def _own_score(model: VisionTransformer, params: Any, images: Float[Array, "b H W c"]) -> Score:
    """What the model itself makes of the images; its blocks run one by one, so that each shows its weights."""
    model = model.clone(transformer={**model.transformer, "scan": False, "remat": "none"})
    return lambda: model.apply({"params": params}, images, train=False)


def _run(
    score: Score, offsets: tuple[Array, ...] | None = None
) -> tuple[Float[Array, "b classes"], tuple[Float[Array, "b k n m"], ...]]:
    """(logits, weights of every attention, the pooling head's the last); `offsets` are added to the weights in use."""
    taken: list[Array] = []

    def take(attend: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        if context.method_name != "attend" or not isinstance(context.module, MultiHeadDotProductAttention):
            return attend(*args, **kwargs)
        q, k, v = args[:3]
        weights = dense_weights(context.module, q, k)
        used = weights if offsets is None else weights + offsets[len(taken)]
        taken.append(weights)
        return jnp.einsum("bknm,bmkh->bnkh", used, v, preferred_element_type=jnp.float32).astype(v.dtype)

    with nn.intercept_methods(take):
        logits = score()
    return logits.astype(jnp.float32), tuple(taken)


def dense_weights(
    module: MultiHeadDotProductAttention, q: Float[Array, "b n k h"], k: Float[Array, "b m k h"]
) -> Float[Array, "b k n m"]:
    """What an attention weighs its values by, in float32: softmax(q·kᵀ / √h), or the sigmoids that stand in its place."""
    logits = jnp.einsum("bnkh,bmkh->bknm", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    if module.kind == "sigmoid":
        return jax.nn.sigmoid(logits - jnp.log(logits.shape[-1]))
    if module.windows is not None:
        seen = module.windows.mask(logits.shape[-1] - math.prod(module.windows.grid))
        logits = jnp.where(seen, logits, -jnp.inf)
    return jax.nn.softmax(logits)


def _collected(
    model: VisionTransformer, images: Float[Array, "b H W c"], logits: Array, weights: tuple[Array, ...]
) -> Attention:
    blocks, pooling = weights, None
    if model.classifier == "map":
        *blocks, pooling = weights
        pooling = pooling[:, :, 0]
    grid = vit.ARCHITECTURE.grid({"patches": model.patches, "resnet": model.resnet}, images.shape[1:3])
    return Attention(jnp.stack(blocks), pooling, grid, logits)


# From weights to maps over the patches


def reading(classifier: str, found: Attention, *, fuse: str = "mean") -> Float[Array, "b n"]:
    """How much of its answer the head takes from every token: shares that sum to one.

    All of it from the class token; half from the class and half from the distillation token; the same from every patch
    for a head that takes their mean; for a MAP head by the weights of its probe, the heads fused.
    """
    _, b, _, n, _ = found.weights.shape
    h, w = found.grid
    if found.pooling is not None:
        return _rows_to_one(_fused(fuse, found.pooling, axis=1))
    if classifier in ("gap", "unpooled"):
        shares = jnp.zeros(n).at[n - h * w :].set(1 / (h * w))
    else:
        shares = jnp.zeros(n).at[: 2 if classifier == "distilled" else 1].set(0.5 if classifier == "distilled" else 1.0)
    return jnp.broadcast_to(shares, (b, n))


def heads(classifier: str, found: Attention) -> Float[Array, "l b k h w"]:
    """How every head of every layer looks at the patches, on behalf of the tokens that the model's head reads, see `reading`.

    For a class token these are its own rows. The probe of a MAP head counts as one more layer.
    """
    maps = jnp.einsum("bn,lbknm->lbkm", reading(classifier, found), found.weights)
    if found.pooling is not None:
        maps = jnp.concatenate([maps, found.pooling[None]])
    return of_patches(maps, found.grid)


def of_patches(tokens: Float[Array, "*b n"], grid: tuple[int, int]) -> Float[Array, "*b h w"]:
    """The patches as a grid, without the tokens in front: class and distillation tokens, registers."""
    h, w = grid
    return tokens[..., tokens.shape[-1] - h * w :].reshape(*tokens.shape[:-1], h, w)


def rollout(
    weights: Float[Array, "l b k n n"], reading: Float[Array, "b n"], *, fuse: str = "mean", discard: float = 0.0
) -> Float[Array, "b n"]:
    """reading · Â_l ··· Â_1, where Â = (A + I) / 2 with rows that sum to one: the residual branch passes half of a token on.

    Of sigmoids, whose rows do not, A + I is divided by its own sums.

    Args:
      fuse: how A is made of the heads of a layer, one of `FUSED`.
      discard: the share of the n x n weights of every A that are set to 0, the smallest ones.
    """
    if not 0 <= discard < 1:
        raise UserError(f"discard={discard} must be from 0 to below 1, such as 0.9")

    for layer in (weights[i] for i in reversed(range(len(weights)))):
        fused = _fused(fuse, layer, axis=1)
        if discard:
            flat = jnp.sort(fused.reshape(fused.shape[0], -1), axis=1)
            fused = jnp.where(fused < flat[:, int(discard * flat.shape[1]), None, None], 0, fused)
        reading = _back(reading, _rows_to_one(fused + jnp.eye(fused.shape[-1])))
    return reading


def relevance(
    model: VisionTransformer,
    params: Any,
    images: Float[Array, "b H W c"],
    target: Int[Array, " b"] | None = None,
    score: Score | None = None,
) -> tuple[Float[Array, "b n"], Attention]:
    """How much every token contributes to the logit of a class, and the attention that it was computed from.

    R = (I + Ā_l) ··· (I + Ā_1) with Ā = E_k[(∇A ∘ A)⁺], of which the rows that the head reads are taken; before a MAP
    head the rows are summed with its own Ā.

    Args:
      target: the class of every image; the one with the largest logit where it is below 0, and if None.
      score: scores the classes, where that is not the model's own head, and calls the model.
    """
    if not (score or model.num_classes):
        raise UserError("this model has no head, and so no classes to explain: use mean or rollout")
    score = score or _own_score(model, params, images)
    _, weights = jax.eval_shape(lambda: _run(score))
    zeros = tuple(jnp.zeros(w.shape, w.dtype) for w in weights)

    def chosen_logits(offsets: tuple[Array, ...]) -> tuple[Array, tuple[Array, tuple[Array, ...]]]:
        logits, weights = _run(score, offsets)
        return jnp.take_along_axis(logits, _chosen(logits, target)[:, None], axis=1).sum(), (logits, weights)

    gradients, (logits, weights) = jax.grad(chosen_logits, has_aux=True)(zeros)
    found = _collected(model, images, logits, weights)
    useful = [jax.nn.relu(g * w).mean(axis=1) for g, w in zip(gradients, weights, strict=True)]  # (b, n, m) each
    reads = reading(model.classifier, found) if found.pooling is None else useful.pop()[:, 0]
    for layer in reversed(useful):
        reads = reads + _back(reads, layer)
    return reads, found


def maps(
    model: VisionTransformer,
    params: Any,
    images: Float[Array, "b H W c"],
    *,
    target: Int[Array, " b"] | None = None,
    fuse: str = "mean",
    discard: float = 0.0,
    score: Score | None = None,
) -> dict[str, Array]:
    """All that can be shown, by image; `score` as in `relevance`.

    Returns:
      heads: (b, l, k, h, w), see `heads`; mean: (b, h, w), of its last layer, the heads fused; rollout: (b, h, w);
      relevance: (b, h, w) for the class `target`, (b,), and logits: (b, classes), all three only where there are classes.
    """
    tokens = {}
    if has_classes := bool(score or model.num_classes):
        tokens["relevance"], found = relevance(model, params, images, target, score)
    else:
        found = attention(model, params, images)
    reads = reading(model.classifier, found, fuse=fuse)
    tokens["rollout"] = rollout(found.weights, reads, fuse=fuse, discard=discard)
    outputs = {name: of_patches(x, found.grid) for name, x in tokens.items()}
    of_heads = jnp.moveaxis(heads(model.classifier, found), 0, 1)
    outputs |= {"heads": of_heads, "mean": _fused(fuse, of_heads[:, -1], axis=1)}
    if has_classes:
        outputs |= {"target": _chosen(found.logits, target), "logits": found.logits}
    return outputs


def _chosen(logits: Float[Array, "b classes"], target: Int[Array, " b"] | None) -> Int[Array, " b"]:
    best = logits.argmax(axis=-1)
    return best if target is None else jnp.where(target < 0, best, target)


def _back(reads: Float[Array, "b n"], layer: Float[Array, "b n m"]) -> Float[Array, "b m"]:
    """reads · layer: from what is read of a layer's tokens to what that is in the tokens before it."""
    return jnp.einsum("bn,bnm->bm", reads, layer)


def _fused(fuse: str, weights: Array, *, axis: int) -> Array:
    if fuse not in FUSED:
        raise unknown("way to fuse heads", fuse, FUSED)
    return FUSED[fuse](weights, axis=axis)


def _rows_to_one(x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    return x / x.sum(axis=-1, keepdims=True)
