"""What a task is made from: a recipe, what the data offers, and what the parameters come from."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Array

from vit_jax import checkpoint, models
from vit_jax.checkpoint.hub import fetch
from vit_jax.errors import UserError
from vit_jax.settings import Settings
from vit_jax.tasks.images import normalisation
from vit_jax.tasks.task import Model

log = logging.getLogger("vit_jax")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What `make_task` of every task gets.

    Attributes:
      features: what the data offers, by field, see `data.features`.
      origin: the description of the parameters that training starts from; None if it starts from nothing.
      constrain: lays activations (b, …) on the devices by example; None if nothing is trained.
    """

    settings: Settings
    features: Mapping[str, Any]
    origin: checkpoint.Description | None
    constrain: Callable[[Array], Array] | None = None

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation, by channel of the 0..255 pixels, that the model expects."""
        return normalisation(self.settings, self.origin)

    def vocabulary(self, named: str) -> Path | None:
        """The file of the vocabulary that a recipe names, or of the one that comes with the data; None if there is none."""
        return fetch(named) if named else getattr(self.features.get("text"), "vocab", None)

    def build_model(self, **changes: Any) -> Model:
        """The recipe's model, or that of the origin where the recipe names none, with some fields changed.

        A model on a ViT, of which the recipe names no fields, stands on the origin's.
        The activation and epsilon that the parameters were trained with count, whatever a recipe's table says, and so does an
        attention in windows or by sigmoids where the recipe names none.
        """
        settings, origin = self.settings, self.origin
        if not settings.model and origin is None:
            raise UserError("config.model is empty, and this run began from nothing: repeat its --config")
        kind = settings.model_type if settings.model else origin.model_type
        fields = {**(settings.model or origin.model), **changes}
        if kind == "MAE" and settings.task.get("type") != "reconstruct":  # its encoder
            kind, fields = "ViT", {name: value for name, value in fields.items() if name != "decoder"}
        architecture = models.architecture_of(kind)
        path = architecture.backbone.split(".") if architecture.backbone else []
        if path and _at(fields, path) == {}:
            fields = _on_vit_of(origin, kind, fields, path)
        if origin:
            path = path if origin.model_type != kind else []
            trained = models.architecture_of(origin.model_type).vit_fields(origin.model) if path else origin.model
            if own := _at(fields, path):
                fields = _with(fields, path, _with_numerics_of(origin.model_name, trained, own))
        if self.constrain is None:
            return Model(kind, fields, architecture.build(fields))
        of_blocks = {"remat": settings.remat, "scan": settings.scan, "constrain": self.constrain}
        return Model(
            kind, fields, architecture.build(architecture.with_memory_options(fields, dtype=settings.dtype, **of_blocks))
        )


def _at(fields: Mapping[str, Any], path: Sequence[str]) -> Any:
    for key in path:
        fields = (fields or {}).get(key)
    return fields


def _on_vit_of(
    origin: checkpoint.Description | None, kind: str, fields: Mapping[str, Any], path: Sequence[str]
) -> dict[str, Any]:
    """The fields, with those of the origin's ViT at `path`. Raises UserError where there is none."""
    where = ".".join(("config.model", *path))
    if origin is None:
        raise UserError(f"{where} is empty: --config.pretrained=FILE says on which ViT the {kind} stands")
    theirs = models.architecture_of(origin.model_type)
    theirs = theirs.vit_fields(origin.model) if theirs.backbone or origin.model_type == "ViT" else {}
    if not theirs:
        raise UserError(f"a {kind} stands on a ViT, and config.pretrained names a {origin.model_type}: give it a ViT")
    return _with(fields, path, {**theirs, "num_classes": None, "representation_size": None})


def _with(fields: Mapping[str, Any], path: Sequence[str], value: Any) -> Any:
    return {**fields, path[0]: _with(fields[path[0]], path[1:], value)} if path else value


def _with_numerics_of(name: str | None, origin: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, as of a model of this name that was trained with the fields `origin`."""
    fields = dict(fields)
    transformer, trained = dict(fields.get("transformer", {})), origin.get("transformer", {})
    names = ["activation", "norm", "norm_eps"]
    if transformer.get("attention", "softmax") == "softmax" and trained.get("attention", "softmax") != "softmax":
        names += ["attention", "window_size", "global_blocks"]  # a recipe that says nothing; from softmax one may go to any
    for option in names:
        theirs = trained.get(option)
        if theirs is not None and transformer.get(option) != theirs:
            log.info("model    %s=%s, as in the checkpoint", option, theirs)
            transformer[option] = theirs
    if transformer:
        fields = fields | {"transformer": transformer}
    return fields | {"model_name": fields.get("model_name") or name}
