"""Says what is in images, with any words: a model of images and texts chooses among labels that it was not trained for.

python -m vit_jax.zeroshot --model=runs/words --labels="a cat,a dog" cat.jpg more_photos/
python -m vit_jax.zeroshot --model=LiT-B16B.npz --labels=imagenet --templates=imagenet --top=3 --json cat.jpg

It is `predict --model=SOURCE --labels=…`.
"""

from collections.abc import Sequence

from vit_jax import predict
from vit_jax.errors import command


def main(argv: Sequence[str] | None = None) -> int:
    """See `predict.main`."""
    return predict.main(argv, doc=__doc__, by_labels=True)


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()
