"""Lists what is inside a checkpoint: family, model, classes, and every parameter with its shape.

python -m vit_jax.inspect runs/photos
python -m vit_jax.inspect hf://facebook/dinov2-base
"""

from collections.abc import Sequence

from vit_jax import arguments, checkpoint
from vit_jax.convert import summary
from vit_jax.errors import command, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Prints family, model, parameters, grid and classes, and every name with its shape."""
    parser = arguments.parser(__doc__)
    arguments.add_shared(parser, "source")
    opened = checkpoint.open_checkpoint(parser.parse_args(argv).source)
    print("\n".join(summary(opened)))
    names = {printable(name): x for name, x in opened.flat.items()}
    width = max(map(len, names))
    print("\nunder our names:")
    for name, x in names.items():
        print(f"  {name:{width}}  {x.dtype}  {tuple(x.shape)}")
    return 0


def cli() -> None:
    """The console command."""
    command(main)
