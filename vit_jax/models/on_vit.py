"""What models that stand on a ViT, such as segmenters and captioners, have in common."""

from collections.abc import Collection, Mapping

from flax import linen as nn

from vit_jax.errors import UserError
from vit_jax.models import vit
from vit_jax.models.architecture import Architecture, Fields


def architecture(
    cls: type[nn.Module], kind: str, *, first: str, block: str, last: str, choices: Mapping[str, Collection[str]]
) -> Architecture:
    """That of a module whose field body is {"vit": fields of `VisionTransformer`}, the parameters of which are `backbone`.

    The blocks are those of its own; those of the ViT are a tower for themselves. `kind` is what messages call it.
    """

    def check(fields: Fields) -> None:
        if set(fields["body"]) != {"vit"}:
            raise UserError(f"the body of a {kind} must be a vit with its fields, not {', '.join(fields['body']) or 'nothing'}")
        vit.ARCHITECTURE.build({**fields["body"]["vit"], "num_classes": None})

    return Architecture(
        cls=cls,
        sizes={},
        num_layers=lambda fields: {"backbone": vit.ARCHITECTURE.num_layers(fields["body"]["vit"])},
        first=first,
        block=block,
        last=last,
        cut=lambda fields: vit.ARCHITECTURE.cut(fields["body"]["vit"]),
        grid=lambda fields, size: vit.ARCHITECTURE.grid(fields["body"]["vit"], size),
        backbone="body.vit",
        choices=choices,
        check=check,
    )
