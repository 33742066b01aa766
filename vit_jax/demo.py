"""Pretrains, fine-tunes and names held-out digits: python -m vit_jax.demo (see vit_jax/tools/demo.py)."""

from vit_jax.tools.demo import cli

if __name__ == "__main__":
    cli()
