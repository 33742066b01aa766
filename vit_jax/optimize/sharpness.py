"""Sharpness-aware gradients: SAM and GSAM, which measure the gradient a second time, uphill of the parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vit_jax.errors import UserError, unknown

Tree = Any
Metrics = dict[str, Float[Array, ""]]
MeanGrad = Callable[[Tree], tuple[Tree, Metrics]]
Sharpness = Callable[[MeanGrad, Tree, Int[Array, ""]], tuple[Tree, Metrics]]
"""(mean_grad, params, step) → (gradients for the optimiser, metrics).

`mean_grad(params)` returns the gradient and metrics, among them "loss", of one batch, averaged over its micro-batches and
over all devices, with the same dropout at every call. So a result does not depend on how a batch is shared out. The
originals instead let every device climb its own gradient ("m-sharpness", with m the examples of a device), which made their
results depend on the number of devices, and which they found to generalise better the smaller m is.

The metrics are those at `params`, and "loss_perturbed"; less "loss" it is what GSAM calls the surrogate gap."""

OPTIONS = {"sam": ("rho",), "gsam": ("rho_max", "rho_min", "alpha")}
_TINY = 1e-12  # keeps a gradient of exactly 0 from becoming NaN


def make_sam(*, rho: float) -> Sharpness:
    """SAM: the gradient at w + ρ·g/‖g‖, where g is the gradient at w (https://arxiv.org/abs/2010.01412)."""
    if rho <= 0:
        raise UserError(f"sharpness: rho={rho} must be positive, such as 0.05; 0.2 for a ViT from scratch")

    def sam(mean_grad: MeanGrad, params: Tree, step: Int[Array, ""]) -> tuple[Tree, Metrics]:
        _, perturbed, metrics = _climb(mean_grad, params, rho)
        return perturbed, metrics

    return sam


def make_gsam(
    *,
    rho_max: float,
    rho_min: float,
    alpha: float,
    schedule: optax.Schedule,
    lr_max: float,
    lr_min: float = 0.0,
) -> Sharpness:
    """GSAM: gₚ − α·g⊥, which descends the perturbed loss and the surrogate gap (https://arxiv.org/abs/2203.08065).

    gₚ is SAM's gradient, g⊥ = g − (g·gₚ/‖gₚ‖²)·gₚ the part of the clean gradient that is orthogonal to it. The radius
    follows the learning rate: ρ = rho_min + (rho_max − rho_min)·(schedule(step) − lr_min) / (lr_max − lr_min), where the
    fraction is kept within 0 and 1, also in the warm-up. With alpha=0 and rho_max=rho_min it is SAM.
    """
    if not 0 < rho_min <= rho_max or alpha < 0:
        raise UserError(
            f"sharpness: rho_min={rho_min}, rho_max={rho_max}, alpha={alpha} must be 0 < rho_min <= rho_max, alpha >= 0"
        )
    if lr_min >= lr_max:
        raise UserError(f"sharpness: lr_min={lr_min} must be below lr_max={lr_max}, the largest rate of the schedule")

    def gsam(mean_grad: MeanGrad, params: Tree, step: Int[Array, ""]) -> tuple[Tree, Metrics]:
        share = jnp.clip((schedule(step) - lr_min) / (lr_max - lr_min), 0.0, 1.0)
        clean, perturbed, metrics = _climb(mean_grad, params, rho_min + (rho_max - rho_min) * share)
        along = optax.tree.vdot(clean, perturbed) / (optax.tree.vdot(perturbed, perturbed) + _TINY)
        return jax.tree.map(lambda p, g: p - alpha * (g - along * p), perturbed, clean), metrics

    return gsam


def make_sharpness(
    name: str, options: Mapping[str, float], *, schedule: optax.Schedule, lr_max: float, lr_min: float
) -> Sharpness:
    """SAM or GSAM by name; `options` are "rho", or "rho_max", "rho_min" and "alpha"."""
    if name not in OPTIONS:
        raise unknown("sharpness", name, OPTIONS)
    for option in options:
        if option not in OPTIONS[name]:
            raise unknown(f"option of {name}", option, OPTIONS[name])
    if missing := [option for option in OPTIONS[name] if option not in options]:
        raise UserError(f"sharpness: {name} needs {' and '.join(missing)}")
    if name == "sam":
        return make_sam(**options)
    return make_gsam(**options, schedule=schedule, lr_max=lr_max, lr_min=lr_min)


def _climb(mean_grad: MeanGrad, params: Tree, rho: Float[Array, ""] | float) -> tuple[Tree, Tree, Metrics]:
    """(gradient at params, gradient at a distance of rho up that gradient, metrics)."""
    clean, metrics = mean_grad(params)
    uphill = optax.tree.add_scale(params, rho / (optax.tree.norm(clean) + _TINY), clean)
    perturbed, metrics_there = mean_grad(uphill)
    return clean, perturbed, metrics | {"loss_perturbed": metrics_there["loss"]}
