"""What the rest of the house must know of a kind of model. A model registers one `Architecture` in `models.ARCHITECTURES`."""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax import linen as nn

from vit_jax.errors import UserError, unknown

Fields = Mapping[str, Any]
"""A model's keywords as a recipe and a `model.json` hold them."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A kind of model: its module, its named sizes, and what its parameters' names mean.

    Attributes:
      cls: the module; it is built from fields, and `method="features"` gives what `VisionTransformer.features` does.
      sizes: fields by the name of a published or own size.
      num_layers: fields → the number of blocks, or for several towers that number by the prefix of a tower's parameters.
      first: regular expression of the parameters in front of the blocks, whole names within one tower.
      block: the same for a block's parameters; its only group is the block's number. Kernels among them are the matrices that
        Muon turns into orthogonal updates.
      last: the same for what follows the blocks.
      nested: the module that a field holds the keywords of, by field.
      blocks: the field that holds the blocks' keywords, such as remat; "" where they are the model's own.
      backbone: dotted name of the field with the keywords of a ViT that may come from a checkpoint of its own; "" for none.
      depth: the field, among the blocks' keywords, that is the number of equal blocks; "" where they are not equal.
      choices: the allowed values of a field, by its dotted name.
      check: raises UserError for fields whose allowed values depend on others.
      options: dotted names of fields with a default that every recipe holds, so that the command line can set them.
      cut: fields → (height, width) in pixels of the patch that images are cut into, so that the last rows and columns of an
        image are lost where they do not fill one; None where images are padded instead.
      grid: (fields, (height, width) of an image) → (h, w) of its patches.
    """

    cls: type[nn.Module]
    sizes: Mapping[str, Fields]
    num_layers: Callable[[Fields], int | Mapping[str, int]]
    first: str
    block: str
    last: str
    cut: Callable[[Fields], tuple[int, int] | None]
    grid: Callable[[Fields, tuple[int, int]], tuple[int, int]]
    nested: Mapping[str, type[nn.Module]] = dataclasses.field(default_factory=dict)
    blocks: str = ""
    backbone: str = ""
    depth: str = ""
    choices: Mapping[str, Collection[str]] = dataclasses.field(default_factory=dict)
    check: Callable[[Fields], None] = lambda fields: None
    options: tuple[str, ...] = ()

    @functools.cached_property
    def _patterns(self) -> tuple[re.Pattern, re.Pattern, re.Pattern]:
        return re.compile(self.first), re.compile(self.block), re.compile(self.last)

    def layer_of(self, name: str, num_layers: int) -> int | None:
        """0 in front of the blocks, i + 1 in block i, num_layers + 1 behind them; None for a name that no rule knows.

        `name` is whole within the tower, such as "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel".
        """
        first, block, last = self._patterns
        if match := block.fullmatch(name):
            return int(match[1]) + 1
        return 0 if first.fullmatch(name) else num_layers + 1 if last.fullmatch(name) else None

    def is_block(self, name: str) -> bool:
        """Whether a parameter, whole within the tower, belongs to a block."""
        return self._patterns[1].fullmatch(name) is not None

    def build(self, fields: Fields) -> nn.Module:
        """The model. Raises UserError for a field that does not exist, is missing, or has a value that is not allowed."""
        check_fields(self.cls, fields, "model")
        for key, module in self.nested.items():
            if fields.get(key) is not None:
                check_fields(module, fields[key], f"model.{key}")
        for path, allowed in self.choices.items():
            key, _, name = path.rpartition(".")
            where = (fields.get(key) or {}) if key else fields
            if name in where and where[name] not in allowed:
                raise unknown(name, where[name], allowed)
        if "patches" in fields:
            size = fields["patches"].get("size", ())
            if len(size) != 2 or min(size) < 1:
                raise UserError(f"model.patches.size={size} must be (height, width), such as (16, 16)")
        self.check(fields)
        return self.cls(**fields)

    def vit_fields(self, fields: Fields) -> Fields:
        """The keywords of the ViT that sees the images: those at `backbone`, or the model's own. {} for another backbone."""
        for key in self.backbone.split(".") if self.backbone else ():
            fields = fields.get(key) or {}
        return fields

    def with_memory_options(self, fields: Fields, *, dtype: Any, **of_blocks: Any) -> dict[str, Any]:
        """Fields with what does not change the model: `dtype`, and of its blocks `remat`, `scan` and `constrain`.

        A module that has no such field computes as without it; only `scan` is refused, as it would save nothing in silence.
        """
        known = (self.nested[self.blocks] if self.blocks else self.cls).__dataclass_fields__
        if of_blocks.get("scan") and "scan" not in known:
            raise UserError(f"config.scan=True is not for {self.cls.__name__}, whose blocks are compiled one by one")
        more = {name: value for name, value in of_blocks.items() if name in known}
        more = {self.blocks: {**fields[self.blocks], **more}} if self.blocks else more
        return {**fields, "dtype": dtype, **more}

    def with_options(self, fields: Fields) -> dict[str, Any]:
        """Fields with every one of `options`, at its default where a size does not set it."""
        filled = dict(fields)
        for path in self.options:
            key, _, name = path.rpartition(".")
            default = (self.nested[key] if key else self.cls).__dataclass_fields__[name].default
            if key:
                filled[key] = {name: default} | filled[key]
            else:
                filled = {name: default} | filled
        return filled


_SET_BY_THE_MODEL = ("parent", "name", "add_position_embedding", "final_norm", "patch")
"""Fields of modules that a recipe does not hold: flax's own, and what follows from a ViT's other fields."""


def check_fields(cls: type[nn.Module], fields: Fields, where: str) -> None:
    """Raises UserError for a field that the module does not have, or that is missing; `where` is the fields' name."""
    known = [name for name in cls.__dataclass_fields__ if name not in _SET_BY_THE_MODEL]
    for name in fields:
        if name not in known:
            raise unknown(f"field of {where}", name, known)
    missing = [n for n, f in cls.__dataclass_fields__.items() if n in known and _required(f) and n not in fields]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}, which {cls.__name__} needs")


def _required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory  # both are dataclasses.MISSING
