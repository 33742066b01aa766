"""Masked autoencoding without labels (https://arxiv.org/abs/2111.06377): what is hidden of an image is drawn from the rest."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt
from PIL import Image

from vit_jax.checkpoint import Description
from vit_jax.checkpoint.opened import Opened
from vit_jax.data.device import augment
from vit_jax.errors import UserError
from vit_jax.models.mae import fixed_positions, patchify, unpatchify
from vit_jax.tasks import backbone, classify, images
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Batch, Context, Loss, Model, Params, Shown, Task

NEEDS = backbone.NEEDS
HIDDEN = 32
"""What is folded into an example's key to draw what is hidden; augment.py and colors.py have other numbers."""
EPS = 1e-6
_POSITIONS = ("posembed_input", "pos_embedding")


def make_task(setup: Setup, *, hidden: float = 0.75, normalized: bool = True) -> Task:
    """A `models.mae.MaskedAutoencoder`, by the squared error of the pixels that it does not see.

    Args:
      hidden: the share of the patches that is hidden.
      normalized: whether each patch is to be drawn with mean 0 and variance 1 over its pixels.
    """
    model = setup.build_model(num_classes=None, representation_size=None)
    if model.type != "MAE":
        raise UserError(f"config.model_type={model.type}: hidden patches are drawn by MAE, see configs/mae.py")
    if not 0 < hidden < 1:
        raise UserError(f"config.task.hidden={hidden} must be a share between 0 and 1, such as 0.75")
    settings, (mean, std) = setup.settings, setup.normalisation
    patch, grid = tuple(model.fields["patches"]["size"]), images.patch_grid(model, settings.image_size)
    count = int(grid[0] * grid[1] * (1 - hidden))
    if count < 1:
        raise UserError(f"config.task.hidden={hidden} hides all {grid[0] * grid[1]} patches: hide fewer, or cut smaller ones")
    features = backbone.features_task(setup, model, "reconstruct")
    recolor = images.make_augment(settings)

    def prepare(batch: Batch) -> Float[Array, "b H W 3"]:
        return augment.normalize(recolor(batch["image"], batch["seed"]), mean, std)

    described = {"type": "reconstruct", "hidden": hidden, "normalized": normalized}
    return Task(
        **vars(features)
        | {
            "train_example": make_train_example(images.train_image(settings)),
            "init": make_init(model, settings.image_size),
            "loss": make_loss(model, prepare, count, normalized),
            "predict": make_predict(model, features.predict, mean, std, count, normalized),
            "describe": lambda: {"class_names": (), "task": described, "resize": backbone.position_rule(setup, model)},
            "show": make_show(patch),
            "preview": make_preview(recolor, grid, patch, count),
            "load": make_load(model, settings.image_size),
        }
    )


def check_usable(description: Description, source: Any) -> None:
    """Raises UserError for a checkpoint without a decoder."""
    if description.model_type != "MAE":
        raise UserError(f"{source} is a {description.model_type} without a decoder: it has features, and reconstructs nothing")


def make_train_example(train_image: Callable) -> Callable[..., dict[str, np.ndarray]]:
    """(example, rng=, exif_rotated=) → image."""
    return lambda example, *, rng, exif_rotated: {"image": train_image(example["image"], rng=rng, exif_rotated=exif_rotated)}


def make_init(model: Model, image_size: tuple[int, int]) -> Callable[[jax.Array], Params]:
    """key → fresh parameters, with the positions of `fixed_positions` and the initial values of MAE's code."""
    init_model, grid = classify.make_init(model.module, image_size), images.patch_grid(model, image_size)

    def init(key: jax.Array) -> Params:
        params = init_model(key)
        cls = 0.02 * jax.random.normal(jax.random.fold_in(key, 1), params["cls"].shape)
        params = with_positions(params, lambda table: jnp.asarray(fixed_positions(grid, table.shape[-1])))
        return {**params, "cls": cls}

    return init


def with_positions(params: Params, function: Callable[[Array], Array]) -> Params:
    """The parameters with `function` of the positions of the encoder and of the decoder."""

    def changed(tree: Params) -> Params:
        first, second = _POSITIONS
        encoder = tree["Transformer"]
        return {**tree, "Transformer": {**encoder, first: {second: function(encoder[first][second])}}}

    return {**changed(params), "decoder": changed(params["decoder"])}


# The loss


def shuffled(noise: Float[Array, "b n"], count: int) -> tuple[Int[Array, "b m"], Bool[Array, "b n"]]:
    """The places of the `count` patches with the least noise, which are seen, and which patches are hidden."""
    order = jnp.argsort(noise, axis=1)
    seen = order[:, :count]
    hidden = jnp.ones(noise.shape, bool).at[jnp.arange(len(noise))[:, None], seen].set(False)
    return seen, hidden


def reconstruction_loss(
    pixels: Float[Array, "b n p"], target: Float[Array, "b n p"], hidden: Bool[Array, "b n"], *, normalized: bool
) -> Float[Array, ""]:
    """The mean squared error over the pixels of the hidden patches.

    With `normalized` the target is that of `normalized_patches`.
    """
    target = normalized_patches(target)[0] if normalized else target
    return (jnp.square(pixels - target).mean(axis=-1) * hidden).sum() / hidden.sum()


def normalized_patches(
    target: Float[Array, "b n p"],
) -> tuple[Float[Array, "b n p"], Float[Array, "b n 1"], Float[Array, "b n 1"]]:
    """((x − mean) / √(variance + 1e-6), mean, that root) over the pixels of each patch, with torch's unbiased variance."""
    mean, variance = target.mean(axis=-1, keepdims=True), target.var(axis=-1, keepdims=True, ddof=1)
    scale = jnp.sqrt(variance + EPS)
    return (target - mean) / scale, mean, scale


def noise_of(seeds: UInt[Array, " b"], n: int) -> Float[Array, "b n"]:
    """A number for each patch of each example, which its seed decides."""
    return jax.vmap(lambda seed: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), HIDDEN), (n,)))(seeds)


def make_loss(
    model: Model, prepare: Callable, count: int, normalized: bool
) -> Callable[[Params, Context, Batch, jax.Array], Loss]:
    """`reconstruction_loss` with `count` patches that are seen. Positions stay as they are."""
    patch = tuple(model.fields["patches"]["size"])

    def loss(params: Params, context: Context, batch: Batch, key: jax.Array) -> Loss:
        inputs = prepare(batch)
        target = patchify(inputs, patch)
        seen, hidden = shuffled(noise_of(batch["seed"], target.shape[1]), count)
        params = with_positions(params, jax.lax.stop_gradient)
        how = {"train": True, "rngs": {"dropout": key}, "method": "reconstruct"}
        pixels = model.module.apply({"params": params}, inputs, seen, **how).astype(jnp.float32)
        return Loss(reconstruction_loss(pixels, target, hidden, normalized=normalized))

    return loss


# What is shown


def make_predict(
    model: Model, features: Callable, mean: Sequence[float], std: Sequence[float], count: int, normalized: bool
) -> Callable[[Params, Batch], dict[str, Array]]:
    """(parameters, batch) → `features` (b, d) of the whole image; `image`, `reconstruction` (b, H, W, 3), 0..255; `hidden`.

    The same patches are hidden in every image. Those that are seen are copied; where the model draws normalised patches,
    each gets its own mean and variance back, which it was not told.
    """
    patch = tuple(model.fields["patches"]["size"])
    mean, std = np.float32(mean), np.float32(std)

    def predict(params: Params, batch: Batch) -> dict[str, Array]:
        inputs = augment.normalize(batch["image"], mean, std)
        target, grid = patchify(inputs, patch), [n // p for n, p in zip(inputs.shape[1:3], patch, strict=True)]
        noise = jnp.broadcast_to(jax.random.uniform(jax.random.key(0), target.shape[1:2]), target.shape[:2])
        seen, hidden = shuffled(noise, count)
        drawn = model.module.apply({"params": params}, inputs, seen, method="reconstruct").astype(jnp.float32)
        if normalized:
            _, mean_of_patch, scale = normalized_patches(target)
            drawn = drawn * scale + mean_of_patch
        drawn = jnp.where(hidden[..., None], drawn, target)
        pictures = {"image": target, "reconstruction": drawn}
        shown = {name: jnp.clip(unpatchify(x, grid, patch) * std + mean, 0, 255) for name, x in pictures.items()}
        return features(params, batch) | shown | {"hidden": hidden.reshape(-1, *grid)}

    return predict


def make_show(patch: tuple[int, int]) -> Callable[..., Shown]:
    """(outputs, size) → how far off the hidden pixels are, and a picture: what is seen, what is drawn, and the image."""

    def show(outputs: Mapping[str, np.ndarray], size: tuple[int, int]) -> Shown:
        true, drawn = outputs["image"], outputs["reconstruction"]
        covered = backbone.cover(true[None], outputs["hidden"][None], patch)[0]
        of_pixels = outputs["hidden"].repeat(patch[0], axis=0).repeat(patch[1], axis=1)
        error = float(np.sqrt(np.square(true - drawn)[of_pixels].mean()))
        row = images.side_by_side(images.pixels(np.stack([covered, drawn, true])))
        text = [f"{outputs['hidden'].mean():.0%} hidden, drawn to ±{error:.1f} of 255"]
        shown = {"hidden": outputs["hidden"].tolist(), "rms_error": error, "features": outputs["features"].tolist()}
        return Shown(text, shown, lambda image: Image.fromarray(row))

    return show


def make_preview(recolor: Callable, grid: tuple[int, int], patch: tuple[int, int], count: int) -> Callable:
    """See `Task.preview`: the images with grey in place of what is hidden."""

    def preview(batch: dict[str, np.ndarray], key: jax.Array | None) -> tuple[np.ndarray, list[str]]:
        if key is None:
            return images.pixels(batch["image"]), ["image"] * len(batch["image"])
        _, hidden = shuffled(noise_of(batch["seed"], grid[0] * grid[1]), count)
        hidden = np.asarray(hidden).reshape(-1, *grid)
        pictures = backbone.cover(np.asarray(recolor(batch["image"], batch["seed"])), hidden, patch)
        return images.pixels(pictures), [f"{x.mean():.0%} hidden" for x in hidden]

    return preview


def make_load(model: Model, image_size: tuple[int, int]) -> Callable[..., Params]:
    """See `Task.load`: a masked autoencoder at this size of images; or a ViT, whose decoder starts anew.

    Positions on another grid are the fixed ones of that grid, as in MAE's code.
    """
    load_backbone, grid = images.make_load(model, image_size), images.patch_grid(model, image_size)

    def load(sources: Mapping[str, Opened], init_params: Params, *, classes: Sequence[str] | None = None) -> Params:
        opened = sources[""]
        fresh = {name: x for name, x in init_params.items() if name != "decoder"}
        loaded = {**load_backbone(sources, fresh), "decoder": init_params["decoder"]}
        if opened.description.model_type == "MAE":
            loaded["decoder"] = opened.params["decoder"]
            if opened.description.grid and tuple(opened.description.grid) != tuple(grid):
                loaded = with_positions(loaded, lambda table: fixed_positions(grid, table.shape[-1]))
        return loaded

    return load
