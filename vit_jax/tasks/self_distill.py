"""Self-distillation without labels, DINOv2's (https://arxiv.org/abs/2304.07193): a student learns what its own average says.

The teacher is the running average of the student, `context.ema`; it sees two large views of an image, the student those with
patches hidden, and small views. What is left behind is the teacher's ViT, without heads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_jax.checkpoint import Description
from vit_jax.checkpoint.opened import Opened
from vit_jax.data.device import augment
from vit_jax.data.device.colors import make_recolor
from vit_jax.data.host.block_mask import draw_blocks
from vit_jax.data.host.multi_crop import make_draw_views
from vit_jax.errors import UserError, unknown
from vit_jax.models.dino_head import DinoHead
from vit_jax.tasks import backbone, centring, classify, collapse, images
from vit_jax.tasks.dino import dino_loss
from vit_jax.tasks.ibot import ibot_loss
from vit_jax.tasks.koleo import koleo_loss
from vit_jax.tasks.setup import Setup
from vit_jax.tasks.task import Batch, Context, Loss, Model, Params, Task, Tree, of_whole_batch

NEEDS = backbone.NEEDS


class Views(NamedTuple):
    """How an image is seen, see `make_task`."""

    local_crops: int
    local_size: int
    global_area: tuple[float, float]
    local_area: tuple[float, float]
    masked: tuple[float, float]


class Terms(NamedTuple):
    """What is weighed in the loss, see `make_task`."""

    dino: float
    ibot: float
    koleo: float
    centring: str
    temperature: float
    teacher_temperature: tuple[float, float]
    teacher_temperature_steps: int
    freeze_last_layer: int


def make_task(
    setup: Setup,
    *,
    local_crops: int = 8,
    local_size: int = 98,
    global_area: tuple[float, float] = (0.32, 1.0),
    local_area: tuple[float, float] = (0.05, 0.32),
    masked: tuple[float, float] = (0.1, 0.5),
    jitter: tuple[float, ...] = (0.4, 0.4, 0.2, 0.1),
    jitter_prob: float = 0.8,
    grey_prob: float = 0.2,
    blur: tuple[float, ...] = (1.0, 0.1, 0.5),
    solarize: tuple[float, ...] = (0.0, 0.2, 0.0),
    prototypes: int = 65_536,
    hidden: int = 2048,
    bottleneck: int = 256,
    ibot_prototypes: int = 0,
    ibot_bottleneck: int = 256,
    centring: str = "sinkhorn",
    dino: float = 1.0,
    ibot: float = 1.0,
    koleo: float = 0.1,
    temperature: float = 0.1,
    teacher_temperature: tuple[float, float] = (0.04, 0.07),
    teacher_temperature_steps: int = 37_500,
    freeze_last_layer: int = 1_250,
) -> Task:
    """A ViT with a class token, by DINO's, iBOT's and KoLeo's losses. `config.pp.crop` is the size of the global views.

    Args:
      local_crops, local_size: how many small views there are, and their side in pixels, a multiple of the patch.
      global_area, local_area: share of the image that a view covers.
      masked: the share of its patches that is hidden in one of an image's global views, drawn between these two.
      jitter, jitter_prob, grey_prob: strengths of brightness, contrast, saturation, hue; chances of jitter and of grey.
      blur, solarize: chances in the first global view, in the second, and in local ones.
      prototypes, hidden, bottleneck: of the head, see `DinoHead`.
      ibot_prototypes, ibot_bottleneck: of a head of its own for patches; 0 shares the head.
      centring: one of `centring.METHODS`.
      dino, ibot, koleo: weights of the losses.
      temperature, teacher_temperature: of the student, and of the teacher before the first step and from
        teacher_temperature_steps on, with a line between.
      freeze_last_layer: for so many steps the prototypes stay as they are.
    """
    views = Views(local_crops, local_size, tuple(global_area), tuple(local_area), tuple(masked))
    terms = Terms(
        dino, ibot, koleo, centring, temperature, tuple(teacher_temperature), teacher_temperature_steps, freeze_last_layer
    )
    model = setup.build_model(num_classes=None, representation_size=None)
    features = backbone.features_task(setup, model, "self_distill")
    if setup.settings.trainer != "train":  # a trained backbone, which has no heads
        return features
    _check(setup, model, views, terms)
    head = {"hidden": hidden, "dtype": setup.settings.dtype}
    heads = {"dino": DinoHead(prototypes, bottleneck=bottleneck, **head)}
    if ibot_prototypes:
        heads["ibot"] = DinoHead(ibot_prototypes, bottleneck=ibot_bottleneck, **head)
    color = {"jitter": jitter, "jitter_prob": jitter_prob, "grey_prob": grey_prob}
    recolor = [make_recolor(**color, blur_prob=b, solarize_prob=s) for b, s in zip(blur, solarize, strict=True)]
    return _training_task(setup, features, views, terms, heads, recolor)


def _training_task(
    setup: Setup, features: Task, views: Views, terms: Terms, heads: Mapping[str, DinoHead], recolor: Sequence[Callable]
) -> Task:
    """`features`, the task of a trained backbone, with all that trains one. See `make_prepare` for `recolor`."""
    settings, model, rule = setup.settings, features.model, backbone.position_rule(setup, features.model)
    embed = make_embed(model, make_prepare(recolor, *setup.normalisation), settings.image_size, views, rule)
    loss_of = make_loss_of(heads, terms)
    return Task(
        **vars(features)
        | {
            "train_example": make_train_example(setup, model, views),
            "init": make_init(model, heads, settings.image_size),
            "loss": of_whole_batch(embed, loss_of),
            "whole_batch": True,
            "embed": embed,
            "loss_of": loss_of,
            "init_carry": make_init_carry(heads, terms),
            "leaves": lambda params: {"": backbone_of(params["_ema"])},
            "check": collapse.make_check(max(settings.warmup_steps, terms.freeze_last_layer, collapse.EARLIEST)),
            "describe": lambda: {"class_names": (), "task": {"type": "self_distill"}, "resize": rule},
            "preview": make_preview(recolor, tuple(model.fields["patches"]["size"])),
            "load": make_load(model, settings.image_size),
        }
    )


def check_usable(description: Description, source: Any) -> None:
    """Every backbone has features."""


# What a batch holds


def make_train_example(setup: Setup, model: Model, views: Views) -> Callable[..., dict[str, np.ndarray]]:
    """(example, rng=, exif_rotated=) → `global` (2, H, W, 3), `local` (n, h, w, 3) and `hidden` (2, grid): patches to hide."""
    settings = setup.settings
    draw_views = make_draw_views(
        global_size=settings.image_size,
        local_size=views.local_size,
        local_crops=views.local_crops,
        global_area=views.global_area,
        local_area=views.local_area,
        flip=settings.pp.flip,
        scaled_decoding=settings.pp.scaled_decoding,
    )
    grid = images.patch_grid(model, settings.image_size)

    def train_example(example: Mapping[str, Any], *, rng: np.random.Generator, exif_rotated: bool) -> dict[str, np.ndarray]:
        seen = draw_views(example["image"], rng=rng, exif_rotated=exif_rotated)
        hidden = np.zeros((2, *grid), bool)
        hidden[rng.integers(2)] = draw_blocks(grid, int(math.prod(grid) * rng.uniform(*views.masked)), rng)
        return seen | {"hidden": hidden}

    return train_example


def make_prepare(
    recolor: Sequence[Callable], mean: Sequence[float], std: Sequence[float]
) -> Callable[[Batch], tuple[Float[Array, "b 2 H W 3"], Float[Array, "b n h w 3"]]]:
    """A batch → its views, recoloured and normalised; `recolor` is for the first global view, the second, and local ones."""

    def prepare(batch: Batch) -> tuple[Float[Array, "b 2 H W 3"], Float[Array, "b n h w 3"]]:
        parts = batch["global"][:, :1], batch["global"][:, 1:], batch["local"]
        first, second, local = (f(x, batch["seed"], i) for i, (f, x) in enumerate(zip(recolor, parts, strict=True)))
        seen = jnp.concatenate([first, second], axis=1)
        return augment.normalize(seen, mean, std), augment.normalize(local, mean, std)

    return prepare


# What the models make of it


def make_embed(
    model: Model, prepare: Callable, image_size: tuple[int, int], views: Views, rule: str
) -> Callable[[Params, Context, Batch, jax.Array], Tree]:
    """See `Task.embed`: what both backbones say of the views.

    Returns:
      global (b, 2, d), local (b, n, d): the student's class tokens; patches (b, m, d): its tokens of the hidden patches;
      teacher (b, 2, d), teacher_patches (b, m, d): the same of the teacher, who sees all patches;
      weight (b, m): 1 / (patches hidden in that image) for each of them, and 0 for places that are left over.
    """
    grid = images.patch_grid(model, image_size)
    small = images.patch_grid(model, (views.local_size,) * 2)
    most = max(1, int(math.prod(grid) * views.masked[1]))

    def run(params: Params, x: Float[Array, "b v h w 3"], **how: Any) -> tuple[Float[Array, "b v d"], Float[Array, "b vn d"]]:
        b, v = x.shape[:2]
        found = model.module.apply({"params": params}, x.reshape(b * v, *x.shape[2:]), method="features", **how)
        d = found["cls"].shape[-1]
        return tuple(found[name].astype(jnp.float32).reshape(b, -1, d) for name in ("cls", "patches"))

    def embed(params: Params, context: Context, batch: Batch, key: jax.Array) -> Tree:
        seen, parts = prepare(batch)
        (b, n), hidden = parts.shape[:2], batch["hidden"]
        places, weight = hidden_places(hidden.reshape(b, -1), most)
        keys = jax.random.split(key)
        training = [{"train": True, "rngs": {"dropout": k}} for k in keys]
        with_gaps = (hidden.reshape(2 * b, *grid), params["mask_token"])
        cls, patches = run(params["backbone"], seen, hidden=with_gaps, **training[0])
        local = jnp.zeros((b, 0, cls.shape[-1]))
        if n:
            local, _ = run(backbone.at_grid(params["backbone"], grid, small, rule), parts, **training[1])
        teacher, teacher_patches = jax.lax.stop_gradient(run(context.ema["backbone"], seen))
        return {
            "global": cls,
            "local": local,
            "patches": jnp.take_along_axis(patches, places[..., None], axis=1),
            "teacher": teacher,
            "teacher_patches": jnp.take_along_axis(teacher_patches, places[..., None], axis=1),
            "weight": weight,
        }

    return embed


def hidden_places(hidden: Bool[Array, "b n"], most: int) -> tuple[Int[Array, "b m"], Float[Array, "b m"]]:
    """Where up to `most` patches are hidden, and 1 / (their number) for each; 0 for places that are left over."""
    places = jnp.argsort(~hidden, axis=1, stable=True)[:, :most]
    count = hidden.sum(axis=1, keepdims=True)
    return places, jnp.take_along_axis(hidden, places, axis=1) / jnp.maximum(count, 1)


# The loss


def make_loss_of(heads: Mapping[str, DinoHead], terms: Terms) -> Callable[[Params, Context, Tree], Loss]:
    """See `Task.loss_of`: the weighted sum of the three losses. The carry holds the centres."""
    patch_head = "ibot" if "ibot" in heads else "dino"

    def scores(params: Params, name: str, x: Float[Array, "*b d"]) -> Float[Array, "*b k"]:
        return heads[name].apply({"params": params[name]}, x)

    def teach(
        context: Context, name: str, scored: Float[Array, "n k"], weight: Float[Array, " n"]
    ) -> tuple[Float[Array, "n k"], Tree]:
        first, last = terms.teacher_temperature
        share = jnp.clip(context.step / max(1, terms.teacher_temperature_steps), 0, 1)
        temperature = first + (last - first) * share
        if terms.centring == "sinkhorn":
            return centring.sinkhorn(scored, weight, temperature, context.devices), {}
        moved = centring.moved(context.carry[name], scored, weight, context.devices)
        return centring.centred(scored, context.carry[name], temperature), {name: moved}

    def loss_of(params: Params, context: Context, embedded: Tree) -> Loss:
        student = {name: _with_frozen_last_layer(params[name], context.step < terms.freeze_last_layer) for name in heads}
        b, m = embedded["weight"].shape
        teacher = jax.lax.stop_gradient(scores(context.ema, "dino", embedded["teacher"]))
        taught, carry = teach(context, "dino", teacher.reshape(2 * b, -1), jnp.ones(2 * b))
        taught = jax.lax.stop_gradient(taught.reshape(teacher.shape))
        of_views = (scores(student, "dino", embedded[name]) for name in ("global", "local"))
        parts = {"dino_loss": dino_loss(*of_views, taught, temperature=terms.temperature)}
        if terms.ibot:
            patches = jax.lax.stop_gradient(scores(context.ema, patch_head, embedded["teacher_patches"]))
            is_hidden = (embedded["weight"] > 0).reshape(-1).astype(jnp.float32)
            of_patches, more = teach(context, "ibot", patches.reshape(b * m, -1), is_hidden)
            of_patches = jax.lax.stop_gradient(of_patches.reshape(patches.shape))
            own = scores(student, patch_head, embedded["patches"])
            parts["ibot_loss"] = ibot_loss(own, of_patches, embedded["weight"], temperature=terms.temperature)
            carry |= more
        if terms.koleo:
            both = jnp.unstack(embedded["global"], axis=1)
            parts["koleo_loss"] = sum(koleo_loss(x, context.devices) for x in both)
        value = sum(getattr(terms, name.removesuffix("_loss")) * x for name, x in parts.items())
        return Loss(value, parts | collapse.spread(taught, embedded["teacher"], context), jax.lax.stop_gradient(carry))

    return loss_of


def _with_frozen_last_layer(head: Params, frozen: Bool[Array, ""]) -> Params:
    return {**head, "last_layer": jax.tree.map(lambda x: jnp.where(frozen, jax.lax.stop_gradient(x), x), head["last_layer"])}


# Parameters


def make_init(model: Model, heads: Mapping[str, DinoHead], image_size: tuple[int, int]) -> Callable[[jax.Array], Params]:
    """key → `backbone`, `mask_token` and heads, with fresh parameters."""
    init_backbone, d = classify.make_init(model.module, image_size), model.fields["hidden_size"]

    def init(key: jax.Array) -> Params:
        keys = (jax.random.fold_in(key, i + 1) for i in range(len(heads)))
        made = {name: head.init(k, jnp.zeros((1, d)))["params"] for (name, head), k in zip(heads.items(), keys, strict=True)}
        return {"backbone": init_backbone(key), "mask_token": jnp.zeros((1, d)), **made}

    return init


def make_init_carry(heads: Mapping[str, DinoHead], terms: Terms) -> Callable[[], Tree]:
    """() → centres of zeros, where they are used."""
    sizes = {"dino": heads["dino"].num_prototypes} | ({"ibot": list(heads.values())[-1].num_prototypes} if terms.ibot else {})
    return lambda: {name: jnp.zeros(n) for name, n in sizes.items()} if terms.centring == "centre" else {}


def backbone_of(params: Params) -> Params:
    """The ViT as files hold it, with the token of hidden patches where DINOv2's files keep it."""
    return {**params["backbone"], "extras": {"mask_token": params["mask_token"]}}


def make_load(model: Model, image_size: tuple[int, int]) -> Callable[..., Params]:
    """See `Task.load`: a ViT of any family becomes the backbone; the heads start anew."""
    load_backbone = images.make_load(model, image_size)

    def load(sources: Mapping[str, Opened], init_params: Params, *, classes: Sequence[str] | None = None) -> Params:
        loaded = load_backbone(sources, init_params["backbone"])
        token = sources[""].flat.get("extras/mask_token", init_params["mask_token"])
        return {**init_params, "backbone": loaded, "mask_token": np.asarray(token, np.float32).reshape(1, -1)}

    return load


def make_preview(recolor: Sequence[Callable], patch: tuple[int, int]) -> Callable:
    """See `Task.preview`: the first global view of each image, with the patches that are hidden in grey, or the image."""
    prepare = jax.jit(make_prepare(recolor, [0.0] * 3, [1.0] * 3))

    def preview(batch: dict[str, np.ndarray], key: jax.Array | None) -> tuple[np.ndarray, list[str]]:
        if key is None:
            return images.pixels(batch["image"]), ["image"] * len(batch["image"])
        seen = np.asarray(prepare(batch)[0])
        which = batch["hidden"].any(axis=(2, 3)).argmax(axis=1)
        rows = np.arange(len(seen))
        hidden = batch["hidden"][rows, which]
        pictures = backbone.cover(seen[rows, which], hidden, patch)
        return images.pixels(pictures), [f"view {i + 1}, {x.mean():.0%} hidden" for i, x in zip(which, hidden, strict=True)]

    return preview


def _check(setup: Setup, model: Model, views: Views, terms: Terms) -> None:
    """Raises UserError for what cannot be trained so."""
    settings, patches = setup.settings, tuple(model.fields.get("patches", {}).get("size", ()))
    if model.type != "ViT" or model.fields.get("resnet") or model.fields.get("classifier") not in ("token", "cls_mean"):
        raise UserError("config.task.type=self_distill trains a plain ViT with a class token: config.model.classifier=token")
    for name, size in (("config.task.local_size", (views.local_size,) * 2), ("config.pp.crop", settings.image_size)):
        if any(n < p or n % p for n, p in zip(size, patches, strict=True)):
            near = max(1, round(size[0] / patches[0])) * patches[0]
            raise UserError(
                f"{name}={size[0]} is no multiple of the patch of {patches[0]}x{patches[1]} pixels: set {name}={near}"
            )
    if settings.ema_decay is None:
        raise UserError("the teacher is the running average of the student: set --config.ema_decay=0.992")
    if settings.lora.rank:
        raise UserError("config.lora and config.task.type=self_distill exclude each other: set --config.lora.rank=0")
    if terms.centring not in centring.METHODS:
        raise unknown("config.task.centring", terms.centring, centring.METHODS)
    for name, (low, high) in (("global_area", views.global_area), ("local_area", views.local_area), ("masked", views.masked)):
        if not 0 < low <= high <= 1:
            raise UserError(f"config.task.{name}={(low, high)} must be two shares, such as (0.1, 0.5)")
    if min(terms.temperature, *terms.teacher_temperature) <= 0:
        raise UserError(f"temperatures must be above 0, not {terms.temperature} and {terms.teacher_temperature}")
