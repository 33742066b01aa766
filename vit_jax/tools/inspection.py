"""Lists what is inside a checkpoint: python -m vit_jax.inspect SOURCE"""

import argparse
from collections.abc import Sequence

from vit_jax import checkpoint
from vit_jax.convert import summary
from vit_jax.errors import command


def main(argv: Sequence[str] | None = None) -> int:
    """Prints family, model, parameters, grid and classes, and every name with its shape."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.inspect", description="Lists what is inside a checkpoint.")
    parser.add_argument("source", help="a file or folder, or gs://, https://, hf://OWNER/NAME[@REVISION]")
    opened = checkpoint.open_checkpoint(parser.parse_args(argv).source)
    print("\n".join(summary(opened)))
    width = max(map(len, opened.flat))
    print("\nunder our names:")
    for name, x in opened.flat.items():
        print(f"  {name:{width}}  {x.dtype}  {tuple(x.shape)}")
    return 0


def cli() -> None:
    """The console command."""
    command(main)
