"""Options of a recipe that are the keywords of a function: checked against its signature."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from vit_jax.errors import UserError, unknown


def checked(function: Callable, options: Mapping[str, Any], where: str, *, reserved: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options, without the reserved ones, to be given to `function` as keywords.

    Args:
      where: names the options in errors, such as "config.evaluators.knn".
      reserved: names that are read elsewhere, such as "type".

    Raises:
      UserError: for a name that is no keyword of the function, and a value that is not of the kind of its default.
    """
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    own = {name: value for name, value in options.items() if name not in reserved}
    for name, value in own.items():
        if name not in defaults:
            raise unknown(f"field of {where}", name, (*reserved, *defaults))
        if not _is_like(value, defaults[name]):
            raise UserError(f"{where}.{name}={value!r} must be of the kind of {defaults[name]!r}")
    return own


def _is_like(value: Any, default: Any) -> bool:
    """Whether an option's value is of the type of its default; None stands for a name."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, Mapping):
        return isinstance(value, Mapping)
    if isinstance(default, tuple):
        return isinstance(value, tuple | list) and all(not default or _is_like(x, default[0]) for x in value)
    return isinstance(value, {float: int | float, int: int}.get(type(default), str | None))
