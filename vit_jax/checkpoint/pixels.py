"""What photos go through where a checkpoint does not tell it right: --mean, --std and --interpolation of the commands."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from vit_jax.checkpoint.entries import Entries
from vit_jax.checkpoint.opened import Opened
from vit_jax.data.host.resize import INTERPOLATIONS
from vit_jax.errors import UserError


def add_pixel_arguments(parser: argparse.ArgumentParser) -> None:
    """The options --mean, --std and --interpolation of a command, which `pixel_options` reads."""
    parser.add_argument("--mean", metavar="R,G,B", help="of the 0..255 pixels, where the checkpoint tells none")
    parser.add_argument("--std", metavar="R,G,B", help="the same for the standard deviation; ImageNet's is 58.395,57.12,57.375")
    parser.add_argument("--interpolation", choices=sorted(INTERPOLATIONS), help="resize photos so, as Pillow does")


def pixel_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `with_pixels` from the options of a command. Raises UserError for what are no numbers."""
    options: dict[str, Any] = {"interpolation": args.interpolation}
    for name in ("mean", "std"):
        if (text := getattr(args, name)) is not None:
            try:
                numbers = [float(part) for part in text.split(",")]
            except ValueError as e:
                raise UserError(f"--{name}={text} must be numbers divided by commas, such as 123.675,116.28,103.53") from e
            options[name] = Entries({name: numbers}, "the command line").numbers(name, low=1e-3 if name == "std" else -1e6)
    return options


def with_pixels(
    opened: Opened,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
) -> Opened:
    """A checkpoint whose images are normalised and resized otherwise than its files say; None leaves that as it is."""
    changes: dict[str, Any] = {name: tuple(x) for name, x in (("mean", mean), ("std", std)) if x is not None}
    if interpolation:
        how = {"interpolation": interpolation, "antialias": True}
        changes["preprocessing"] = {**opened.description.preprocessing, **how}
    return dataclasses.replace(opened, description=dataclasses.replace(opened.description, **changes))
